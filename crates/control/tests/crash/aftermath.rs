//! What a schedule leaves: after crashes, and after its end.

use dolmen_sim::{CrashPoints, DiskConfig, Image, MemoryDisk, Random, Sim, SimDisk};

use crate::judge::check;
use crate::schedule::Ran;
use crate::world::{plug, read_image};

/// What the crashes of some schedules had to show.
#[derive(Debug, Default)]
pub(crate) struct Left {
    pub(crate) crashes: u64,
    /// Crashes while something was not durable.
    pub(crate) with_unflushed: u64,
    /// Crashes after a flush.
    pub(crate) with_flushed: u64,
    /// Crashes with leaked clusters.
    pub(crate) leaks: u64,
    /// Crashes after the root of the chain had changed.
    pub(crate) after_pivot: u64,
}

impl Left {
    pub(crate) fn add(&mut self, other: &Left) {
        self.crashes += other.crashes;
        self.with_unflushed += other.with_unflushed;
        self.with_flushed += other.with_flushed;
        self.leaks += other.leaks;
        self.after_pivot += other.after_pivot;
    }
}

/// Draws crashes of a schedule and judges them.
pub(crate) fn judge(ran: &Ran, seed: u64, crashes: u64) -> Result<Left, String> {
    let mut random = Random::new(seed ^ 0xc4a5);
    let mut points: Vec<CrashPoints> = ran.disks.iter().map(|d| CrashPoints::of(&d.1)).collect();
    let events = ran.journal.position();
    let mut positions: Vec<usize> = (0..crashes).map(|_| random.below(events as u64 + 1) as usize).collect();
    positions.sort_unstable();
    let mut left = Left::default();
    for position in positions {
        let lengths = ran.journal.positions(position, points.len());
        let mut images = Vec::new();
        for ((point, length), (name, _)) in points.iter_mut().zip(lengths).zip(&ran.disks) {
            point.advance(length);
            images.push((name.clone(), point.crash(random.u64())));
        }
        let roots = ran.roots(position);
        left.crashes += 1;
        left.with_unflushed += u64::from(points.iter().any(|p| p.unflushed() > 0));
        left.with_flushed += u64::from(ran.oracle.has_flushed(position));
        left.after_pivot += u64::from(ran.seen.first().is_some_and(|s| !roots.contains(&s.root)));
        let mut verdict = clean(seed, &images).map(|leaks| left.leaks += u64::from(leaks > 0));
        if verdict.is_ok() {
            // While the root is being changed, either may be what the one who comes next knows of.
            let mut wrong: Vec<String> = Vec::new();
            for root in &roots {
                let held = open(seed, &images, root)
                    .and_then(|bytes| ran.oracle.check_crash(position, &bytes).map_err(|v| v.to_string()));
                wrong.extend(held.err().map(|e| format!("root '{root}': {e}")));
            }
            if wrong.len() == roots.len() {
                verdict = Err(wrong.join("; "));
            }
        }
        if let Err(what) = verdict {
            return Err(format!("crash at {position} of {events}: {what}{}", keep(&images, seed, position)));
        }
    }
    Ok(left)
}

/// Judges what the end of a schedule without a crash leaves on the disks.
pub(crate) fn judge_end(ran: &Ran, seed: u64) -> Result<(), String> {
    let images: Vec<_> = ran.disks.iter().map(|d| (d.0.clone(), d.1.image())).collect();
    let end = ran.journal.position();
    let root = &ran.seen.last().expect("the guest was attached").root;
    clean(seed, &images)
        .and_then(|_| open(seed, &images, root))
        .and_then(|bytes| {
            if ran.errors {
                ran.oracle.check_crash(end, &bytes).map_err(|v| v.to_string())
            } else {
                ran.oracle.check_end(&bytes).map_err(|v| v.to_string())
            }
        })
        .map_err(|e| format!("at the end, root '{root}': {e}{}", keep(&images, seed, end)))
}

/// Checks every image. Returns the leaked clusters.
fn clean(seed: u64, images: &[(String, Image)]) -> Result<u64, String> {
    let mut leaks = 0;
    for (name, image) in images {
        let disk = MemoryDisk::new(image.clone());
        let result = Sim::run(seed, |rt| async move { check(&rt, &disk).await });
        leaks += result.map_err(|e| format!("image '{name}': {e}"))?;
    }
    Ok(leaks)
}

/// Opens an image by what it and those below it name, and reads it.
fn open(seed: u64, images: &[(String, Image)], root: &str) -> Result<Vec<u8>, String> {
    let config = DiskConfig { latency_ns_max: 0, log: false, ..DiskConfig::default() };
    plug(images.iter().map(|i| (i.0.clone(), SimDisk::new(i.1.clone(), config))).collect());
    let root = root.to_owned();
    Sim::run(seed, |rt| async move { read_image(&rt, &root).await }).map_err(|e| e.to_string())
}

/// Keeps images for looking at them, if asked to.
fn keep(images: &[(String, Image)], seed: u64, position: usize) -> String {
    let Ok(dir) = std::env::var("DOLMEN_SIM_KEEP") else { return String::new() };
    let mut out = String::new();
    for (name, image) in images {
        let path = format!("{dir}/seed-{seed}-at-{position}-{name}.qcow2");
        match std::fs::write(&path, image.to_vec()) {
            Ok(()) => out += &format!(" ({path})"),
            Err(e) => out += &format!(" ({path}: {e})"),
        }
    }
    out
}
