//! The files that a storm begins with, made by the installed tools where they are there.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::book::{Book, SECTOR, Tag, fill, tag_of};
use crate::daemon::Tools;
use crate::rng::Rng;
use crate::testcase::{Made, runs};

/// An image file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    pub(crate) format: String,
    /// The name in its header.
    pub(crate) backing: Option<String>,
    /// What a reader of the whole chain sees.
    pub(crate) tags: Vec<Tag>,
    /// It has the internal snapshot `s1` with what it held in the beginning, and no backing file.
    pub(crate) snapshot: bool,
}

/// All files, and what else there is.
#[derive(Debug, Default)]
pub(crate) struct Files {
    pub(crate) images: BTreeMap<String, Image>,
    /// The active layers.
    pub(crate) tops: Vec<String>,
    /// The disk that the server behind the daemon exports, if there is one.
    pub(crate) served: Option<String>,
    /// A small file system is mounted at `full`.
    pub(crate) full: bool,
    /// The loop device that the link `blk` leads to.
    pub(crate) device: Option<PathBuf>,
    /// What was done.
    pub(crate) script: Vec<Made>,
}

const CLUSTERS: [u64; 6] = [512, 4096, 16 << 10, 64 << 10, 64 << 10, 1 << 20];

/// The link to the loop device.
pub(crate) const DEVICE: &str = "blk";

/// The name of the export of the server behind the daemon, as headers have it.
pub(crate) const SERVED: &str = "nbd+unix:///b?socket=back.nbd";

pub(crate) struct Builder<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) tools: &'a Tools,
    pub(crate) book: &'a mut Book,
    pub(crate) rng: Rng,
    pub(crate) files: Files,
}

impl Builder<'_> {
    fn run(&mut self, tool: &str, args: &[&str]) -> Result<String, String> {
        self.files.script.push(Made::Tool(tool.into(), args.iter().map(|a| (*a).to_owned()).collect()));
        let (code, text) = Tools::run(self.dir, &self.tools.judge.join(tool), args);
        if code == 0 { Ok(text) } else { Err(format!("{tool} {}: {text}", args.join(" "))) }
    }

    /// Runs a program of the system; whether it succeeded, and what it said.
    fn system(&mut self, program: &str, args: &[&str]) -> Option<String> {
        let (code, text) = Tools::run(self.dir, Path::new(program), args);
        if code == 0 {
            self.files.script.push(Made::System(format!("{program} {}", args.join(" "))));
        }
        (code == 0).then_some(text)
    }

    /// Overwrites some extents of a disk: with data, sometimes with zeroes.
    fn change(&mut self, tags: &mut [Tag], percent: u64) {
        let sectors = tags.len() as u64;
        let mut left = sectors * percent / 100;
        while left > 0 {
            let unit = self.rng.one(&[1u64, 8, 128, 128, 512]);
            let len = (unit * (1 + self.rng.below(4))).min(sectors).min(left.max(unit));
            let at = self.rng.below(sectors) / unit * unit;
            let end = (at + len).min(sectors);
            let tag = if self.rng.percent(12) { 0 } else { self.book.fresh_tag() };
            tags[at as usize..end as usize].fill(tag);
            left = left.saturating_sub(len.max(1));
        }
    }

    /// Writes a raw file with this content; zeroes are holes.
    fn raw(&mut self, name: &str, tags: &[Tag]) -> Result<(), String> {
        self.files.script.push(Made::Raw(name.into(), tags.len() as u64, runs(tags)));
        let text = |e: std::io::Error| format!("{name}: {e}");
        let file = fs::File::create(self.dir.join(name)).map_err(text)?;
        file.set_len(tags.len() as u64 * SECTOR).map_err(text)?;
        let mut sector = vec![0; SECTOR as usize];
        for (i, tag) in tags.iter().enumerate().filter(|(_, t)| **t != 0) {
            fill(*tag, i as u64, &mut sector);
            file.write_all_at(&sector, i as u64 * SECTOR).map_err(text)?;
        }
        Ok(())
    }

    /// Makes an image that reads like this.
    fn image(
        &mut self,
        name: &str,
        tags: Vec<Tag>,
        format: &str,
        backing: Option<(&str, &str)>,
    ) -> Result<(), String> {
        let mut image =
            Image { format: format.into(), backing: backing.map(|b| b.0.to_owned()), ..Image::default() };
        if format == "raw" {
            self.raw(name, &tags)?;
        } else {
            self.raw("whole", &tags)?;
            let cluster = self.rng.one(&CLUSTERS);
            let old = self.rng.percent(25);
            let mut options = format!("cluster_size={cluster},compat={}", if old { "0.10" } else { "1.1" });
            if !old && self.rng.percent(20) {
                options += ",lazy_refcounts=on";
            }
            let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &options];
            if self.rng.percent(25) {
                args.push("-c");
            }
            if let Some((b, f)) = backing {
                args.extend(["-B", b, "-F", f]);
            }
            args.extend(["whole", name]);
            self.run("qemu-img", &args)?;
            if self.rng.percent(25) {
                self.run("qemu-img", &["snapshot", "-c", "s1", name])?;
                image.snapshot = backing.is_none();
            }
        }
        image.tags = tags;
        self.files.images.insert(name.into(), image);
        Ok(())
    }

    /// What a disk holds in the beginning.
    fn first(&mut self) -> Vec<Tag> {
        let size = (1 + self.rng.below(4)) * (1 << 20) + if self.rng.percent(20) { 13 * 512 } else { 0 };
        let mut tags = vec![0; (size / SECTOR) as usize];
        self.change(&mut tags, 60);
        tags
    }

    fn chain(
        &mut self,
        disk: usize,
        mut tags: Vec<Tag>,
        mut below: Option<(String, &'static str)>,
    ) -> Result<(), String> {
        let mut size = tags.len() as u64 * SECTOR;
        let depth = 1 + self.rng.below(if below.is_some() { 2 } else { 4 });
        for layer in 0..depth {
            let name = format!("d{disk}l{layer}");
            if below.is_some() {
                if self.rng.percent(25) {
                    size =
                        if self.rng.percent(60) { size + (1 << 20) } else { (size - size / 4) / 512 * 512 };
                    tags.resize((size / SECTOR) as usize, 0);
                }
                self.change(&mut tags, 25);
            }
            let format = if below.is_none() && self.rng.percent(30) { "raw" } else { "qcow2" };
            let backing = below.as_ref().map(|(b, f)| (b.as_str(), *f));
            self.image(&name, tags.clone(), format, backing)?;
            below = Some((name, format));
        }
        let (top, format) = below.expect("at least one layer");
        self.files.tops.push(top.clone());
        self.targets(disk, &top, format, tags)
    }

    /// Files that may become copies or overlays of a disk.
    fn targets(&mut self, disk: usize, top: &str, format: &str, tags: Vec<Tag>) -> Result<(), String> {
        let len = tags.len();
        for kind in 0..8 {
            let name = format!("t{disk}{}", (b'a' + kind) as char);
            let size = (len as u64 * SECTOR).to_string();
            if self.rng.percent(40) && kind != 0 {
                continue;
            }
            match kind {
                0 => self.image(&name, vec![0; len], "qcow2", None)?,
                1 => {
                    let mut dirty = vec![0; len];
                    self.change(&mut dirty, 50);
                    self.image(&name, dirty, "qcow2", None)?;
                }
                2 => self.image(&name, vec![0; len / 2], "qcow2", None)?,
                3 => self.image(&name, vec![0; len], "raw", None)?,
                4 => {
                    // An overlay of what the top is an overlay of.
                    let below = self.files.images[top].backing.clone();
                    let Some(b) = below.filter(|b| self.files.images.contains_key(b)) else { continue };
                    let i = self.files.images[&b].clone();
                    let mut seen = i.tags;
                    seen.resize(len, 0);
                    self.overlay(&name, &b, &i.format, &size, seen)?;
                }
                5 => self.overlay(&name, top, format, &size, tags.clone())?,
                6 => {
                    // An overlay with data of its own, or without the name of what is below.
                    let mut dirty = tags.clone();
                    self.change(&mut dirty, 10);
                    self.image(&name, dirty, "qcow2", self.rng.clone().percent(60).then_some((top, format)))?;
                }
                _ => {
                    if self.files.full && disk == 0 {
                        let name = format!("full/{name}");
                        self.run("qemu-img", &["create", "-q", "-f", "qcow2", &name, &size])?;
                        let i = Image { format: "qcow2".into(), tags: vec![0; len], ..Image::default() };
                        self.files.images.insert(name, i);
                    }
                }
            }
        }
        Ok(())
    }

    fn overlay(
        &mut self,
        name: &str,
        below: &str,
        format: &str,
        size: &str,
        tags: Vec<Tag>,
    ) -> Result<(), String> {
        self.run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", format, "-b", below, name, size])?;
        let i = Image { format: "qcow2".into(), backing: Some(below.into()), tags, snapshot: false };
        self.files.images.insert(name.into(), i);
        Ok(())
    }

    /// Decides what there is besides files.
    pub(crate) fn surroundings(&mut self) {
        let root = fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0);
        if self.rng.percent(25) {
            self.files.served = Some("served.raw".into());
        }
        if root && self.rng.percent(20) {
            let _ = fs::create_dir(self.dir.join("full"));
            let size = format!("size={}k", 1024 + self.rng.below(2048));
            self.files.full = self.system("mount", &["-t", "tmpfs", "-o", &size, "none", "full"]).is_some();
        }
        if root && self.rng.percent(20) {
            let size = (1 + self.rng.below(4)) << 20;
            let file = self.dir.join("device.img");
            let made = fs::File::create(&file).and_then(|f| f.set_len(size));
            let found = made.ok().and_then(|()| self.system("losetup", &["-f", "--show", "device.img"]));
            if let Some(device) = found.map(|d| PathBuf::from(d.trim())) {
                let _ = std::os::unix::fs::symlink(&device, self.dir.join(DEVICE));
                let i = Image {
                    format: "device".into(),
                    tags: vec![0; (size / SECTOR) as usize],
                    ..Image::default()
                };
                self.files.images.insert(DEVICE.into(), i);
                self.files.device = Some(device);
            }
        }
    }

    /// Makes everything else. The server behind the daemon serves `served.raw`.
    pub(crate) fn build(&mut self, serve: impl Fn() -> Result<(), String>) -> Result<(), String> {
        let disks = if self.files.served.is_some() { 2 } else { 1 + self.rng.below(2) as usize };
        for d in 0..disks {
            let tags = self.first();
            let mut below = None;
            if d == 1 && self.files.served.is_some() {
                self.raw("served.raw", &tags)?;
                serve()?;
                below = Some((SERVED.to_owned(), "raw"));
            }
            self.chain(d, tags, below)?;
        }
        let _ = fs::remove_file(self.dir.join("whole"));
        Ok(())
    }
}

/// The tags of a raw file; `None` for sectors that are nobody's.
pub(crate) fn tags_of(data: &[u8]) -> Vec<Option<Tag>> {
    data.chunks_exact(SECTOR as usize).enumerate().map(|(i, s)| tag_of(i as u64, s)).collect()
}

/// Takes down what outlives the directory.
pub(crate) fn take_down(dir: &Path, files: &Files) {
    if files.full {
        let _ = Tools::run(dir, Path::new("umount"), &["-l", "full"]);
    }
    if let Some(device) = &files.device {
        let _ = Tools::run(dir, Path::new("losetup"), &["-d", &device.to_string_lossy()]);
    }
}
