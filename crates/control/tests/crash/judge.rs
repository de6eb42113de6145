//! Crashes of a run, and whether what they leave is right.

use dolmen_formats::qcow2;
use dolmen_sim::{CrashPoints, Harness, Image, Leaf, MemoryDisk, Random, SECTOR, Sim, TagPattern};
use dolmen_types::{Actions, Error, Options, WriteFlags};

use crate::workload::{REGISTRY, Run, Scenario};

/// What the crashes of some runs had to show.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) crashes: u64,
    /// Crashes while something was not durable.
    pub(crate) with_unflushed: u64,
    /// Crashes after a flush.
    pub(crate) with_flushed: u64,
    /// Images with leaked clusters.
    pub(crate) leaks: u64,
    /// Images that were used on after the crash.
    pub(crate) used_on: u64,
    /// Images that a stream had made independent of their backing file.
    pub(crate) streamed: u64,
    /// Events in the disks' logs.
    pub(crate) events: u64,
}

impl Found {
    pub(crate) fn add(&mut self, other: &Found) {
        self.crashes += other.crashes;
        self.with_unflushed += other.with_unflushed;
        self.with_flushed += other.with_flushed;
        self.leaks += other.leaks;
        self.used_on += other.used_on;
        self.streamed += other.streamed;
        self.events += other.events;
    }
}

/// Draws crashes of a run and judges them. The error tells which crash was wrong, and how.
pub(crate) fn judge(scenario: &Scenario, run: &Run, seed: u64, crashes: u64) -> Result<Found, String> {
    let mut random = Random::new(seed ^ 0xc4a5);
    let mut points = CrashPoints::of(&run.disk);
    let events = points.events();
    let mut positions: Vec<usize> = (0..crashes).map(|_| random.below(events as u64 + 1) as usize).collect();
    positions.sort_unstable();
    let mut found = Found { events: events as u64, ..Found::default() };
    for position in positions {
        points.advance(position);
        let image = points.crash(random.u64());
        found.crashes += 1;
        found.with_unflushed += u64::from(points.unflushed() > 0);
        found.with_flushed += u64::from(run.oracle.has_flushed(position));
        // Going on after a crash must not turn a leak into a corruption.
        let use_on = random.percent(25);
        found.used_on += u64::from(use_on);
        let leaves = Leaves { image: image.clone(), base: scenario.base_leaf() };
        let (stack, without, after) = (scenario.stack(), scenario.without_base(), random.fork());
        let result = Sim::run(seed, move |rt| async move {
            // A stream may have made the image independent before the crash.
            let alone = match &without {
                Some(alone) => !names_a_base(&rt, &leaves.image, alone.clone()).await?,
                None => false,
            };
            let stack = if alone { without.unwrap_or(stack) } else { stack };
            reopen(&rt, leaves, stack, use_on, after).await.map(|(leaks, bytes)| (alone, leaks, bytes))
        });
        let verdict = result.map_err(|e| e.to_string()).and_then(|(alone, leaks, bytes)| {
            found.streamed += u64::from(alone);
            found.leaks += u64::from(leaks > 0);
            run.oracle.check_crash(position, &bytes).map_err(|v| v.to_string())
        });
        if let Err(what) = verdict {
            if std::env::var_os("DOLMEN_SIM_TRACE").is_some() {
                eprintln!("{}", run.disk.log_text());
            }
            return Err(format!("crash at {position} of {events}: {what}{}", keep(&image, seed, position)));
        }
    }
    Ok(found)
}

/// Keeps an image for looking at it, if asked to.
fn keep(image: &Image, seed: u64, position: usize) -> String {
    let Ok(dir) = std::env::var("DOLMEN_SIM_KEEP") else { return String::new() };
    let path = format!("{dir}/seed-{seed}-at-{position}.qcow2");
    match std::fs::write(&path, image.to_vec()) {
        Ok(()) => format!(" ({path})"),
        Err(e) => format!(" ({path}: {e})"),
    }
}

struct Leaves {
    image: Image,
    base: Option<Leaf>,
}

/// Whether the header of a crashed image names a backing file.
async fn names_a_base(rt: &dolmen_rt::Rt, image: &Image, alone: Options) -> Result<bool, Error> {
    let leaf = Leaf::new("disk", MemoryDisk::new(Image::from_bytes(&image.to_vec())));
    let harness = Harness::open(rt, REGISTRY, vec![leaf], alone, Actions::D).await?;
    let mut node = harness.edge.node();
    while let Some(below) = node.filtered().cloned() {
        node = below;
    }
    let named = node.driver.describe(&node).backing.is_some();
    drop(node);
    harness.close().await?;
    Ok(named)
}

/// Checks and opens a crashed image. Returns the leaked clusters, and what a reader finds.
async fn reopen(
    rt: &dolmen_rt::Rt,
    leaves: Leaves,
    stack: Options,
    use_on: bool,
    mut random: Random,
) -> Result<(u64, Vec<u8>), Error> {
    let disk = MemoryDisk::new(leaves.image);
    let leaks = check(rt, &disk).await.map_err(|e| e.context("after the crash"))?;
    let all = leaves.base.into_iter().chain([Leaf::new("disk", disk.clone())]).collect();
    let harness = Harness::open(rt, REGISTRY, all, stack, Actions::D | Actions::V).await?;
    let user = harness.user();
    let size = user.size() as usize;
    let found = user.read(0, size).await?;
    if use_on {
        let mut expected = found.clone();
        for tag in 0..10 {
            let first = random.below(size as u64 / SECTOR);
            let sectors = random.between(1, 16).min(size as u64 / SECTOR - first);
            let at = (first * SECTOR) as usize;
            let part = &mut expected[at..at + (sectors * SECTOR) as usize];
            // Above all tags of the workload.
            TagPattern::fill((1 << 20) + tag, first, part);
            user.write(at as u64, part, WriteFlags::NONE).await?;
        }
        user.flush().await?;
        if user.read(0, size).await? != expected {
            return Err(wrong("after the crash, writing changed other data"));
        }
    }
    harness.close().await?;
    if use_on {
        check(rt, &disk).await.map_err(|e| e.context("after going on after the crash"))?;
    }
    Ok((leaks, found))
}

/// Runs the format's check; anything worse than a leak is an error. Returns the leaks.
pub(crate) async fn check(rt: &dolmen_rt::Rt, disk: &MemoryDisk) -> Result<u64, Error> {
    let harness = Harness::on_leaf(rt, Leaf::read_only("disk", disk.clone()), Actions::D).await?;
    let token = harness.edge.begin().await?;
    let result = qcow2::check(token.read(rt)?).await?;
    if result.corruptions > 0 || result.check_errors > 0 {
        return Err(wrong(&format!("the image is corrupt: {result:?}")));
    }
    drop(token);
    Ok(result.leaks)
}

fn wrong(what: &str) -> Error {
    Error::new(dolmen_types::ErrorKind::Corrupt, what)
}
