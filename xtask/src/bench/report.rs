//! What is printed and written.

use std::fmt;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::process::Line;
use super::rows::{BACKUP, COMMIT, MIRROR, NULL_1, NULL_5, STREAM};
use super::sample::{Measured, Sample, Side, median};
use super::{Context, Result};

/// The head of the table that [`line()`] fills.
pub(super) const TABLE_HEAD: &str = concat!(
    "                               time per request         CPU per request          system calls\n",
    "row                                ours   theirs  ratio     ours   theirs  ratio     ours  theirs  ratio"
);

/// A line of the table. A ratio is ours divided by theirs: below 1 is less.
pub(super) fn line(m: &Measured) -> String {
    let (o, t) = (m.ours.median(), m.theirs.median());
    let calls = |s: &Side| s.syscalls.map_or("-".to_owned(), |n| format!("{n:.2}"));
    let calls_ratio = match (m.ours.syscalls, m.theirs.syscalls) {
        (Some(o), Some(t)) if t >= 0.005 => format!("{:.2}", o / t),
        _ => "-".to_owned(),
    };
    format!(
        "{:30} {:>8} {:>8} {:>6.2} {:>8} {:>8} {:>6.2} {:>8} {:>7} {calls_ratio:>6}",
        m.name,
        time(o.wall_ns),
        time(t.wall_ns),
        o.wall_ns / t.wall_ns,
        time(o.cpu_ns),
        time(t.cpu_ns),
        o.cpu_ns / t.cpu_ns,
        calls(&m.ours),
        calls(&m.theirs),
    )
}

/// Nanoseconds with a unit, three digits.
fn time(ns: f64) -> String {
    let (value, unit) = match ns {
        n if n < 999.5 => (n, "ns"),
        n if n < 999_500.0 => (n / 1e3, "us"),
        n => (n / 1e6, "ms"),
    };
    let digits = if unit == "ns" || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {unit}")
}

/// What the table's columns mean.
pub(super) fn legend(cx: &Context) -> String {
    format!(
        "Medians of {} alternating rounds (jobs: {}); ratios are ours / theirs, below 1 is less. 4k reads in random order.\n\
         Jobs: a chain of two qcow2 images, {} MiB, half full, in the page cache; time and CPU for each GiB copied.\n\
         CPU time: user and system, all threads; of nbd rows the server's. Start-up is taken off, except in info rows.\n\
         System calls counted with {}.",
        cx.rounds,
        cx.job_rounds,
        cx.chain.size() >> 20,
        cx.counter.name()
    )
}

/// What is compared with what, and on what.
pub(super) fn heading(cx: &Context) -> Result<String> {
    let m = machine()?;
    let theirs = match &cx.against {
        Some(other) => other.display().to_string(),
        None => format!("{} (io_uring: {})", version("qemu-img")?, if cx.their_ring { "yes" } else { "no" }),
    };
    Ok(format!(
        "ours: {}\ntheirs: {theirs}\non: {}\n",
        version(&cx.dolmen)?,
        m.iter().map(|(k, v)| format!("{k} {v}")).collect::<Vec<_>>().join(", ")
    ))
}

fn version(program: impl AsRef<Path>) -> Result<String> {
    let (out, _) = Line::new(program.as_ref(), ["--version"]).run()?;
    Ok(out.lines().next().unwrap_or_default().to_owned())
}

fn machine() -> Result<Vec<(&'static str, String)>> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown".to_owned(), |(_, m)| m.to_owned());
    let cpus = std::thread::available_parallelism()?.get();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    Ok(vec![("kernel", kernel), ("CPUs", cpus.to_string()), ("CPU", model)])
}

/// Something that Dolmen promises about these numbers.
pub(super) struct Goal {
    text: String,
    pub(super) met: bool,
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", if self.met { "met" } else { "MISSED" }, self.text)
    }
}

/// The goals that the measured rows can speak of.
pub(super) fn goals(rows: &[Measured]) -> Vec<Goal> {
    let mut goals = layers(rows);
    goals.extend(rows.iter().filter_map(copying));
    goals
}

/// Jobs: at least as fast for at most 0.8 of the CPU, or clearly better in one of both.
fn copying(m: &Measured) -> Option<Goal> {
    let (o, t) = (m.ours.median(), m.theirs.median());
    let (speed, cpu) = (t.wall_ns / o.wall_ns, o.cpu_ns / t.cpu_ns);
    let (met, wanted) = match m.name {
        MIRROR | COMMIT => (speed >= 1.0 && cpu <= 0.8, "at least 1.0, and at most 0.8"),
        STREAM | BACKUP => (speed >= 1.5 || cpu <= 0.5, "at least 1.5, or at most 0.5"),
        _ => return None,
    };
    let name = m.name.trim_end_matches(", per GiB");
    let text = format!("{name}: {speed:.2} times the throughput for {cpu:.2} of the CPU ({wanted})");
    Some(Goal { text, met })
}

/// What layers cost.
fn layers(rows: &[Measured]) -> Vec<Goal> {
    let row = |name: &str| rows.iter().find(|m| m.name == name);
    let (Some(one), Some(five)) = (row(NULL_1), row(NULL_5)) else { return Vec::new() };
    // Both were measured in the same rounds: the ratio of each round is steadier than
    // that of the medians. CPU time decides: these requests wait for nothing, so what
    // more the clock says went to other processes.
    let ratio = |a: &Side, b: &Side, f: fn(&Sample) -> f64| {
        median(a.samples.iter().zip(&b.samples).map(|(a, b)| f(a) / f(b)))
    };
    let growth = ratio(&five.ours, &one.ours, |s| s.cpu_ns);
    let wall = ratio(&five.ours, &one.ours, |s| s.wall_ns);
    let against = ratio(&five.ours, &one.theirs, |s| s.cpu_ns);
    vec![
        Goal {
            text: format!(
                "five layers cost {growth:.2} times what one layer costs per request (at most 1.3; {wall:.2} by the clock)"
            ),
            met: growth <= 1.3,
        },
        Goal {
            text: format!(
                "five layers cost {against:.2} of the CPU that {} takes for one (less than 1)",
                one.peer
            ),
            met: against < 1.0,
        },
    ]
}

/// Writes everything that was measured, each round of it.
pub(super) fn write_json(path: &Path, cx: &Context, rows: &[Measured], goals: &[Goal]) -> Result<()> {
    let side = |s: &Side| {
        let m = s.median();
        json!({
            "requests": s.requests,
            "wall_ns": m.wall_ns,
            "cpu_ns": m.cpu_ns,
            "syscalls": s.syscalls,
            "rounds": s.samples.iter().map(|s| json!([s.wall_ns, s.cpu_ns])).collect::<Vec<_>>(),
        })
    };
    let rows: Vec<Value> = rows
        .iter()
        .map(|m| {
            let (o, t) = (m.ours.median(), m.theirs.median());
            json!({
                "name": m.name,
                "peer": m.peer,
                "ours": side(&m.ours),
                "theirs": side(&m.theirs),
                "ratio": { "wall": o.wall_ns / t.wall_ns, "cpu": o.cpu_ns / t.cpu_ns },
            })
        })
        .collect();
    let machine: serde_json::Map<String, Value> =
        machine()?.into_iter().map(|(k, v)| (k.to_lowercase(), v.into())).collect();
    let all = json!({
        "machine": machine,
        "image_bytes": cx.images.size(),
        "syscalls_counted_with": cx.counter.name(),
        "rows": rows,
        "goals": goals.iter().map(|g| json!({ "text": g.text, "met": g.met })).collect::<Vec<_>>(),
    });
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::write(path, serde_json::to_string_pretty(&all)? + "\n")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        assert_eq!(time(7.4), "7 ns");
        assert_eq!(time(999.6), "1.00 us");
        assert_eq!(time(12_340.0), "12.3 us");
        assert_eq!(time(123_400.0), "123 us");
        assert_eq!(time(21_000_000.0), "21.0 ms");
    }

    #[test]
    fn goals_compare_rounds() {
        let side = |v: &[f64]| Side {
            requests: 1,
            samples: v.iter().map(|n| Sample { wall_ns: *n, cpu_ns: *n }).collect(),
            syscalls: None,
        };
        let row = |name, ours: &[f64], theirs: &[f64]| Measured {
            name,
            peer: "peer",
            ours: side(ours),
            theirs: side(theirs),
        };
        let met = |one: &[f64], five: &[f64], theirs: &[f64]| -> Vec<bool> {
            goals(&[row(NULL_1, one, theirs), row(NULL_5, five, theirs)]).iter().map(|g| g.met).collect()
        };
        assert_eq!(met(&[100.0, 200.0], &[120.0, 240.0], &[300.0, 300.0]), [true, true]);
        assert_eq!(met(&[100.0, 100.0], &[140.0, 140.0], &[300.0, 300.0]), [false, true]);
        assert_eq!(met(&[100.0, 100.0], &[110.0, 110.0], &[50.0, 50.0]), [true, false]);
        assert!(goals(&[]).is_empty());
        // Nearly as fast is not enough for one, half the CPU is for the other.
        let (ours, theirs) = (side(&[51.0]), side(&[50.0]));
        let job = |name| Measured { name, peer: "peer", ours: ours.clone(), theirs: theirs.clone() };
        assert_eq!(goals(&[job(COMMIT), job(STREAM)]).iter().map(|g| g.met).collect::<Vec<_>>(), [false; 2]);
        let cheap = |name| Measured {
            ours: Side { samples: vec![Sample { wall_ns: 50.0, cpu_ns: 25.0 }], ..ours.clone() },
            ..job(name)
        };
        assert_eq!(
            goals(&[cheap(MIRROR), cheap(BACKUP)]).iter().map(|g| g.met).collect::<Vec<_>>(),
            [true; 2]
        );
    }
}
