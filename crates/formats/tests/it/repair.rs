//! Damage to every field of every table, repaired, and judged by what the image showed before.
//!
//! The story: a refcount block was said to be where the guest's first data cluster is. The repair gave the "leaks"
//! back and wrote counts over the data; it did so by design, as it wrote wherever a table was said to be. With
//! compressed data or a snapshot's it even answered that all is well. The tests of that time changed counts only,
//! one field at a time, and never looked whether what was changed was something else as well.

use dolmen_graph::CreateCx;
use dolmen_graph::{CheckResult, RepairWhat};
use dolmen_sim::{CrashPoints, DiskConfig, Harness, Image, Leaf, MemoryDisk, Random, Sim, SimDisk};
use dolmen_types::{Actions, ChildRole, Claim, Result};

use crate::support::{EVERYTHING, Files, REGISTRY, must, node, own_check, run};
use crate::view::{Disks, Seen, View};

/// Bytes of a cluster: small, so that a small image has several tables of each kind.
pub(crate) const CLUSTER: u64 = 4096;

/// An image with data, zeroes, compressed clusters, and two snapshots.
pub(crate) struct Base {
    files: Files,
    pub(crate) bytes: Vec<u8>,
    backing: u64,
}

/// A field: what it is, where, and how many bytes it has.
type Field = (String, u64, u64);

impl Base {
    pub(crate) fn new(compat: &str, backed: bool) -> Base {
        let files = Files::new();
        let path = files.path("base.qcow2");
        let o = format!("compat={compat},cluster_size={CLUSTER}");
        let backing = if backed { 3u64 << 20 } else { 0 };
        let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"create", &"-f", &"qcow2", &"-o", &o];
        if backed {
            std::fs::write(files.path("b.raw"), vec![11; backing as usize]).unwrap();
            args.extend::<[&dyn AsRef<std::ffi::OsStr>; 4]>([&"-b", &"b.raw", &"-F", &"raw"]);
        }
        args.extend::<[&dyn AsRef<std::ffi::OsStr>; 2]>([&path, &"6M"]);
        must("qemu-img", &args);
        let io = |commands: &[&str]| {
            let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"-f", &"qcow2"];
            commands.iter().for_each(|c| all.extend::<[&dyn AsRef<std::ffi::OsStr>; 2]>([&"-c", c]));
            all.push(&path);
            must("qemu-io", &all);
        };
        io(&["write -P 1 0 40k", "write -c -P 2 64k 4k", "write -c -P 3 68k 4k", "write -P 4 2500k 20k"]);
        must("qemu-img", &[&"snapshot", &"-c", &"first", &path]);
        io(&["write -P 5 8k 16k", "write -c -P 6 72k 4k", "write -P 7 4500k 8k"]);
        must("qemu-img", &[&"snapshot", &"-c", &"second", &path]);
        io(&["write -P 8 4k 8k", "write -z 24k 8k", "write -P 9 5M 12k", "write -c -P 10 80k 4k"]);
        if compat == "1.1" {
            must("qemu-img", &[&"bitmap", &"--add", &path, &"b0"]);
        }
        let bytes = std::fs::read(&path).unwrap();
        Base { files, bytes, backing }
    }

    fn be(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes[at as usize..at as usize + 8].try_into().unwrap())
    }

    fn offset(&self, at: u64) -> u64 {
        self.be(at) & 0x00ff_ffff_ffff_fe00
    }

    pub(crate) fn disks(&self, bytes: &[u8]) -> Disks {
        View { bytes, backing: self.backing }.disks()
    }

    /// Every field of every table; of long tables those in use, and the first that is not.
    fn fields(&self) -> Vec<Field> {
        let mut f: Vec<Field> = vec![
            ("header: L1 entries".into(), 36, 4),
            ("header: L1 table".into(), 40, 8),
            ("header: refcount table".into(), 48, 8),
            ("header: refcount table clusters".into(), 56, 4),
            ("header: snapshots".into(), 60, 4),
            ("header: snapshot table".into(), 64, 8),
        ];
        let mut table = |what: &str, at: u64, n: u64, most: usize| {
            let used: Vec<u64> = (0..n).filter(|i| self.be(at + i * 8) != 0).collect();
            let unused = (0..n).find(|i| self.be(at + i * 8) == 0);
            // Some from the start and some from the end.
            let step = used.len().div_ceil(most).max(1);
            for i in used.into_iter().step_by(step).chain(unused) {
                f.push((format!("{what} {i}"), at + i * 8, 8));
            }
        };
        table("refcount table", self.be(48), CLUSTER / 8, 4);
        let block = self.be(self.be(48));
        let l1 = self.be(40);
        table("L1", l1, 3, 4);
        table("L2", self.offset(l1), CLUSTER / 8, 9);
        let mut at = self.be(64);
        for s in 0..2 {
            let l1 = self.be(at);
            table(&format!("snapshot {s} L1"), l1, 3, 4);
            table(&format!("snapshot {s} L2"), self.offset(l1), CLUSTER / 8, 5);
            at += 40 + 24 + 8;
        }
        let mut at = self.be(64);
        for s in 0..2 {
            let part =
                [("L1 table", 0, 8), ("L1 entries", 8, 4), ("id length", 12, 2), ("name length", 14, 2)];
            let more = [("extra size", 36, 4), ("disk size", 48, 8)];
            f.extend(part.iter().chain(&more).map(|(w, o, n)| (format!("snapshot {s}: {w}"), at + o, *n)));
            let lengths = |o: u64| u64::from(u16::from_be_bytes([self.byte(at + o), self.byte(at + o + 1)]));
            let extra = self.be(at + 32) & 0xffff_ffff;
            at = (at + 40 + extra + lengths(12) + lengths(14)).next_multiple_of(8);
        }
        // Each of the counts in use, the tables' among them.
        let end = self.bytes.len() as u64 / CLUSTER;
        f.extend((0..=end).step_by(3).map(|c| (format!("refcount {c}"), block + c * 2, 2)));
        if self.bytes[95] & 1 == 1 {
            let (extension, directory) = self.bitmaps();
            f.push(("bitmaps: directory".into(), extension + 16, 8));
            f.push(("bitmaps: bytes".into(), extension + 8, 8));
            f.push(("bitmap: table".into(), directory, 8));
            f.push(("bitmap: entries".into(), directory + 8, 4));
        }
        f
    }

    fn byte(&self, at: u64) -> u8 {
        self.bytes[at as usize]
    }

    /// Where the data of the bitmaps extension are, and the directory.
    fn bitmaps(&self) -> (u64, u64) {
        let at =
            self.bytes[..4096].windows(4).position(|w| w == [0x23, 0x85, 0x28, 0x75]).unwrap() as u64 + 8;
        (at, self.be(at + 16))
    }

    /// Offsets that a damaged field may name: one of each kind of cluster, and none.
    fn places(&self) -> Vec<u64> {
        let reftable = self.be(48);
        let l1 = self.be(40);
        let l2 = self.offset(l1);
        let snapshots = self.be(64);
        let end = (self.bytes.len() as u64).next_multiple_of(CLUSTER);
        let data = self.offset(l2 + 8);
        let compressed = self.be(l2 + 16 * 8) & ((1 << 58) - 1) & !(CLUSTER - 1);
        let snapshot_data = self.offset(self.offset(self.be(snapshots)) + 16);
        vec![
            0,
            reftable,
            self.be(reftable),
            l1,
            l2,
            snapshots,
            self.be(snapshots),
            data,
            compressed,
            snapshot_data,
            end - CLUSTER,
            end,
            end + CLUSTER,
            1 << 40,
            data + 512,
        ]
    }

    /// The values that a field of this width may be damaged to.
    fn values(&self, (what, at, width): &Field) -> Vec<u64> {
        let old = (0..*width).fold(0, |v, i| v << 8 | u64::from(self.byte(at + i)));
        let mut values = match width {
            8 => {
                let flags = old & !0x00ff_ffff_ffff_fe00;
                let mut v: Vec<u64> = self.places().into_iter().map(|p| p | flags).collect();
                v.extend([
                    1 << 63,
                    old ^ 1 << 63,
                    old ^ 1 << 62,
                    old ^ 1,
                    old ^ 1 << 58,
                    old ^ 1 << 12,
                    u64::MAX,
                ]);
                v
            }
            _ => vec![0, 1, old + 1, old.wrapping_sub(1), old ^ 1 << (width * 8 - 2), u64::MAX],
        };
        if what == "snapshot 0: disk size" || what == "snapshot 1: disk size" {
            values = vec![0, old / 2, old * 2];
        }
        values.iter_mut().for_each(|v| *v &= u64::MAX >> (64 - width * 8));
        values.retain(|v| *v != old);
        values.sort_unstable();
        values.dedup();
        values
    }

    fn damaged(&self, damage: &[(Field, u64)]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for ((_, at, width), value) in damage {
            let at = *at as usize;
            bytes[at..at + *width as usize].copy_from_slice(&value.to_be_bytes()[8 - *width as usize..]);
        }
        bytes
    }
}

/// A repair with all access.
async fn repair(rt: &dolmen_rt::Rt, leaf: Leaf, what: RepairWhat) -> Result<CheckResult> {
    let h = Harness::open(rt, REGISTRY, vec![leaf], node("raw", "leaf"), EVERYTHING).await.unwrap();
    let claim = Claim { needs: EVERYTHING, allows: EVERYTHING };
    let edge = dolmen_graph::ChildEdge { name: "file", role: ChildRole::Metadata, node: h.top(), claim };
    let cx = CreateCx { file: Some(&edge), fixed: false, rt };
    let io = (cx.read().unwrap(), cx.write().unwrap(), cx.resize().unwrap());
    let r = dolmen_formats::qcow2::check_and_repair(io.0, io.1, io.2, what).await;
    drop(edge);
    h.close().await.unwrap();
    r
}

/// Where two views differ although the first could be read.
fn difference(before: &Disks, after: &Disks, lost: bool) -> Option<String> {
    for (name, old) in before {
        let Some(new) = after.get(name) else {
            let readable = old.iter().any(|s| *s != Seen::Damaged);
            if readable && !lost {
                return Some(format!("snapshot {name:?} is gone"));
            }
            continue;
        };
        for (c, seen) in old.iter().enumerate() {
            if *seen != Seen::Damaged && new.get(c) != Some(seen) {
                let brief = |s: &Seen| match s {
                    Seen::Data(d) => format!("{:02x?}", &d[..8]),
                    Seen::Zero | Seen::Below | Seen::Damaged => format!("{s:?}"),
                };
                let new = new.get(c).map_or("gone".into(), brief);
                return Some(format!("{name:?} guest cluster {c}: {} became {new}", brief(seen)));
            }
        }
    }
    None
}

/// Repairs a damaged image and judges what comes of it. The result says whether all is well again.
async fn judge(rt: &dolmen_rt::Rt, base: &Base, damage: &[(Field, u64)], single: bool) -> bool {
    let story = || format!("{:x?}", damage.iter().map(|((w, ..), v)| (w, v)).collect::<Vec<_>>());
    let bytes = base.damaged(damage);
    let before = base.disks(&bytes);
    let disk = MemoryDisk::new(Image::from_bytes(&bytes));
    let result = repair(rt, Leaf::new("leaf", disk.clone()), RepairWhat::All).await;
    let after = disk.image().to_vec();
    let Ok(r) = result else {
        assert!(after == bytes, "{}: a repair that failed changes nothing: {result:?}", story());
        return false;
    };
    let now = base.disks(&after);
    if let Some(d) = difference(&before, &now, r.lost > 0) {
        panic!("{}: {d}\n{:#?}", story(), r.messages);
    }
    assert_eq!(r.corruptions, 0, "{}: {:#?}", story(), r.messages);
    let again = own_check(rt, &disk).await;
    assert_eq!(
        (again.corruptions, again.leaks),
        (r.corruptions, r.leaks),
        "{}: {:#?}",
        story(),
        again.messages
    );
    let contested = View { bytes: &after, backing: 0 }.contested();
    assert_eq!(contested, None, "{}: a write to one destroys the other", story());
    // Whatever was data and is not found any more must not be given to somebody else.
    let counts_damaged = damage.iter().any(|((w, ..), _)| w.starts_with("refcount ") && w.len() < 13);
    if r.lost > 0 && (single || !counts_damaged) {
        let view = View { bytes: &after, backing: 0 };
        for c in (View { bytes: &base.bytes, backing: 0 }).data_clusters() {
            assert!(view.refcount(c) > 0, "{}: the data at cluster {c} would be overwritten", story());
        }
    }
    let path = base.files.put("x.qcow2", &disk);
    let out = run("qemu-img", &[&"check", &"-f", &"qcow2", &path]);
    let sound = if r.leaks > 0 { 3 } else { 0 };
    assert_eq!(out.status.code(), Some(sound), "{}: {:#?}\n{:#?}", story(), r.messages, out);
    r.leaks == 0 && r.lost == 0
}

fn every_field(compat: &str, backed: bool, step: usize) {
    let base = Base::new(compat, backed);
    Sim::run(1, |rt| async move {
        let clean = own_check(&rt, &MemoryDisk::new(Image::from_bytes(&base.bytes))).await;
        assert_eq!((clean.corruptions, clean.leaks), (0, 0), "{:?}", clean.messages);
        let shown = base.disks(&base.bytes);
        assert_eq!(shown.len(), 3);
        assert!(shown.values().flatten().all(|s| *s != Seen::Damaged), "the model reads a sound image");
        let (mut tried, mut well) = (0, 0);
        for field in base.fields() {
            for value in base.values(&field).into_iter().step_by(step) {
                tried += 1;
                well += u32::from(judge(&rt, &base, &[(field.clone(), value)], true).await);
            }
        }
        assert!(tried >= 900 / step as u32 && well > tried / 4, "{well} of {tried} are as good as new");
    });
}

#[test]
fn every_field_damaged() {
    every_field("1.1", true, 1);
}

#[test]
fn every_field_damaged_in_version_2() {
    every_field("0.10", false, 3);
}

#[test]
fn two_fields_damaged() {
    let base = Base::new("1.1", false);
    let mut r = Random::new(6);
    Sim::run(1, |rt| async move {
        let fields = base.fields();
        for _ in 0..400 {
            let mut damage = Vec::new();
            for _ in 0..2 {
                let field = fields[r.below(fields.len() as u64) as usize].clone();
                let values = base.values(&field);
                damage.push((field, values[r.below(values.len() as u64) as usize]));
            }
            judge(&rt, &base, &damage, false).await;
        }
    });
}

/// A power loss at any write of a repair leaves what the damaged image showed, or what the repaired one does.
#[test]
fn a_repair_is_interrupted() {
    let base = Base::new("1.1", false);
    let mut r = Random::new(7);
    Sim::run(1, |rt| async move {
        let fields = base.fields();
        for _ in 0..60 {
            let field = fields[r.below(fields.len() as u64) as usize].clone();
            let values = base.values(&field);
            let damage = [(field, values[r.below(values.len() as u64) as usize])];
            let bytes = base.damaged(&damage);
            let before = base.disks(&bytes);
            let disk = SimDisk::new(Image::from_bytes(&bytes), DiskConfig::default());
            let Ok(repaired) = repair(&rt, Leaf::new("leaf", disk.clone()), RepairWhat::All).await else {
                continue;
            };
            let mut points = CrashPoints::of(&disk);
            for position in 0..=points.events() {
                points.advance(position);
                let crashed = points.crash(r.u64()).to_vec();
                let found = difference(&before, &base.disks(&crashed), repaired.lost > 0);
                assert_eq!(found, None, "{damage:x?} at {position}");
            }
        }
    });
}

/// The story: without a refcount table, or with a snapshot table that can't be read, an image could not be opened at
/// all, although nothing that reading needs was damaged; and it could not be repaired.
#[test]
fn what_only_writing_needs_is_damaged() {
    let base = Base::new("1.1", false);
    Sim::run(1, |rt| async move {
        let snapshots = base.be(64);
        for (what, at, bytes) in [
            ("no refcount table", 56, vec![0; 4]),
            ("refcount table at an odd place", 48, 0x1234u64.to_be_bytes().to_vec()),
            ("refcount table nowhere", 48, (1u64 << 50).to_be_bytes().to_vec()),
            ("snapshot table at an odd place", 64, 0x1234u64.to_be_bytes().to_vec()),
            ("a snapshot's L1 table", snapshots, 0x1234u64.to_be_bytes().to_vec()),
            ("a snapshot's extra data", snapshots + 36, vec![0xff; 4]),
            ("the number of snapshots", 60, vec![0xff; 4]),
            ("the bitmaps extension", base.bitmaps().0 + 16, vec![0xff; 8]),
        ] {
            let mut image = Image::from_bytes(&base.bytes);
            image.write(at, &bytes);
            let disk = MemoryDisk::new(image);
            let leaves = vec![Leaf::read_only("leaf", disk.clone())];
            let options = node("qcow2", "leaf").with("read-only", true);
            let h = Harness::open(&rt, REGISTRY, leaves, options, Actions::D).await;
            let h = h.unwrap_or_else(|e| panic!("{what}: {e}"));
            let seen = h.user().read(0, 6 << 20).await.unwrap();
            h.close().await.unwrap();
            let shown: Vec<u8> = base.disks(&base.bytes)[""]
                .iter()
                .flat_map(|s| match s {
                    Seen::Data(d) => d.clone(),
                    Seen::Zero => vec![0; CLUSTER as usize],
                    Seen::Below | Seen::Damaged => panic!("the active disk is sound and has no backing file"),
                })
                .collect();
            assert!(seen == shown, "{what}");
            let r = repair(&rt, Leaf::new("leaf", disk.clone()), RepairWhat::All).await.unwrap();
            assert_eq!(r.corruptions, 0, "{what}: {:?}", r.messages);
            let h = crate::support::open(&rt, &disk, None).await.unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(h.user().read(0, 6 << 20).await.unwrap() == shown, "{what}");
            h.close().await.unwrap();
        }
    });
}
