//! `img check`: exit code 0 sound, 1 failed, 2 corrupt (or repaired, with something that can't be brought back), 3
//! leaks only, 63 no checks for the format.

use clap::Parser;
use dolmen::Session;
use dolmen::graph::{CheckResult, RepairWhat, Repairing};
use dolmen::session::READ;
use dolmen::types::{Actions, Claim, Options, Value};
use serde_json::{Map, Value as Json};

use super::open::{self, Open, Verb, cache, is_json};
use crate::cli::{self, Failure, Outcome, Persona};
use crate::out;

/// The row.
pub(super) static VERB: Verb = Verb {
    name: "check",
    help: "check an image's metadata, and repair it",
    run: |name, persona, args| cli::parse(name, persona, args).map(|a| run(persona, a)),
};

/// Check an image's metadata, and repair it.
#[derive(Parser, Debug)]
#[command(infer_long_args = true, args_override_self = true, disable_version_flag = true)]
pub(crate) struct Check {
    #[command(flatten)]
    open: Open,
    /// Repair: leaks or all
    #[arg(short, long, value_name = "WHAT")]
    repair: Option<String>,
    /// Cache mode
    #[arg(short = 'T', long, value_name = "CACHE_MODE")]
    cache: Option<String>,
    /// human or json
    #[arg(long, value_name = "FMT")]
    output: Option<String>,
    /// Say nothing but what is wrong
    #[arg(short, long)]
    quiet: bool,
    /// Image
    #[arg(value_name = "FILENAME")]
    filenames: Vec<String>,
}

/// Nobody may write an image that is being checked, as no two formats may have one file.
const CHECKING: Claim =
    Claim { needs: Actions::D, allows: Actions::EVERY.without(Actions::V).without(Actions::S) };
/// A repair writes the file.
const REPAIRING: Claim = Claim {
    needs: Actions::D.with(Actions::V).with(Actions::S),
    allows: Actions::EVERY.without(Actions::V).without(Actions::S),
};

/// Runs it.
fn run(persona: Persona, a: Check) -> Outcome {
    let json = is_json(a.output.as_deref(), "check")?;
    let repair = match a.repair.as_deref() {
        None => None,
        Some("leaks") => Some(RepairWhat::Leaks),
        Some("all") => Some(RepairWhat::All),
        Some(other) => {
            return Err(Failure::usage(
                format!("--repair (-r) expects 'leaks' or 'all' not '{other}'"),
                "check",
            ));
        }
    };
    let Ok([filename]) = <[String; 1]>::try_from(a.filenames.clone()) else {
        return Err(Failure::usage("Expecting one image file name", "check"));
    };
    let cache = cache(a.cache.as_deref(), "source cache")?;
    open::block_on(move |rt| async move {
        let mut session = a.open.session(&rt, persona);
        // A check reads the image's file and opens nothing that it names, so a guess of the
        // format is harmless. A repair of what only looks like an image is not.
        if repair.is_none() {
            session.policy_mut().probe = true;
        }
        let mut source = a.open.source(&filename);
        source.read_only = repair.is_none();
        source.cache = cache;
        let options = source.options(&mut session, persona)?;
        let opened = file_of(&mut session, options.clone()).await;
        let (format, file) = dolmen::session::opening(opened, &filename)?;
        let Some(check) = session.registry().find(&format).ok().and_then(|k| k.check) else {
            // That the image can't be opened is the first thing to be told.
            let mut options = options;
            options.set("driver", format);
            dolmen::session::opening(session.open(options, READ).await, &filename)?;
            session.close().await?;
            return Err(Failure::new("This image format does not support checks").with_code(63));
        };
        let claim = if repair.is_some() { REPAIRING } else { CHECKING };
        let image = dolmen::session::opening(session.open(file, claim).await, &filename)?;
        let result = async {
            let token = image.edge().begin().await?;
            let repairing = match repair {
                None => None,
                Some(what) => Some(Repairing { write: token.write(&rt)?, resize: token.resize(&rt)?, what }),
            };
            check(token.read(&rt)?, repairing).await
        };
        let result = result.await;
        session.close_image(image).await?;
        session.close().await?;
        let result = dolmen::session::opening(result, &filename)?;
        cli::flush();
        for m in &result.messages {
            eprintln!("{m}");
        }
        if json {
            out!("{}", cli::json::pretty(&members(&result, &filename, &format)));
        } else if !a.quiet {
            cli::say(format_args!("{}", human(&result, repair.is_some())));
        }
        Ok(match &result {
            r if r.check_errors > 0 => 1,
            r if r.corruptions > 0 => 2,
            r if r.leaks > 0 => 3,
            // The image is sound again, and not what it was.
            r if r.lost > 0 => 2,
            _ => 0,
        })
    })
}

/// The format of an image, and the options of the file below it.
pub(crate) async fn file_of(
    session: &mut Session,
    mut options: Options,
) -> dolmen::types::Result<(String, Options)> {
    let flags: Vec<(String, Value)> = ["read-only", "force-share", "cache"]
        .into_iter()
        .filter_map(|n| Some((n.to_owned(), options.get(n)?.clone())))
        .collect();
    let mut file = options.take_map("file")?.unwrap_or_default();
    for (n, v) in flags {
        if !file.has(&n) {
            file.set(&n, v);
        }
    }
    match options.take_str("driver")? {
        Some(format) => Ok((format, file)),
        None => {
            session.may_probe()?;
            let mut for_reading = file.clone();
            for_reading.set("read-only", true);
            Ok((session.probe(for_reading).await?.to_owned(), file))
        }
    }
}

/// Members in QEMU's order; counts that are zero are left out where they are
/// left out there.
fn members(r: &CheckResult, filename: &str, format: &str) -> Json {
    let mut m = Map::new();
    let mut some = |name: &str, n: u64| {
        if n > 0 {
            m.insert(name.into(), n.into());
        }
    };
    some("image-end-offset", r.image_end_offset);
    some("compressed-clusters", r.compressed_clusters);
    some("total-clusters", r.total_clusters);
    some("corruptions", r.corruptions);
    some("corruptions-fixed", r.corruptions_fixed);
    m.insert("check-errors".into(), r.check_errors.into());
    let mut some = |name: &str, n: u64| {
        if n > 0 {
            m.insert(name.into(), n.into());
        }
    };
    some("leaks", r.leaks);
    some("leaks-fixed", r.leaks_fixed);
    some("allocated-clusters", r.allocated_clusters);
    m.insert("filename".into(), filename.into());
    m.insert("format".into(), format.into());
    if r.fragmented_clusters > 0 {
        m.insert("fragmented-clusters".into(), r.fragmented_clusters.into());
    }
    Json::Object(m)
}

fn human(r: &CheckResult, repair: bool) -> String {
    let mut s = String::new();
    if repair && r.corruptions_fixed + r.leaks_fixed > 0 {
        s.push_str(&format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
             Double checking the fixed image now...\n",
            r.leaks_fixed, r.corruptions_fixed
        ));
    }
    if r.corruptions + r.leaks + r.check_errors == 0 {
        s.push_str(&match r.lost {
            0 => "No errors were found on the image.\n".to_owned(),
            n => format!("The image is consistent now, but what {n} damaged entries referred to is lost.\n"),
        });
    } else {
        if r.corruptions > 0 {
            s.push_str(&format!(
                "\n{} errors were found on the image.\n\
                 Data may be corrupted, or further writes to the image may corrupt it.\n",
                r.corruptions
            ));
        }
        if r.leaks > 0 {
            s.push_str(&format!(
                "\n{} leaked clusters were found on the image.\n\
                 This means waste of disk space, but no harm to data.\n",
                r.leaks
            ));
        }
        if r.check_errors > 0 {
            s.push_str(&format!("\n{} internal errors have occurred during the check.\n", r.check_errors));
        }
    }
    if r.total_clusters > 0 && r.allocated_clusters > 0 {
        let percent = |n: u64, of: u64| if of == 0 { 0.0 } else { n as f64 * 100.0 / of as f64 };
        s.push_str(&format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            r.allocated_clusters,
            r.total_clusters,
            percent(r.allocated_clusters, r.total_clusters),
            percent(r.fragmented_clusters, r.allocated_clusters),
            percent(r.compressed_clusters, r.allocated_clusters)
        ));
    }
    if r.image_end_offset > 0 {
        s.push_str(&format!("Image end offset: {}\n", r.image_end_offset));
    }
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> CheckResult {
        CheckResult {
            image_end_offset: 1_703_936,
            total_clusters: 160,
            allocated_clusters: 15,
            fragmented_clusters: 1,
            ..CheckResult::default()
        }
    }

    #[test]
    fn for_people() {
        // Captured from qemu-img 10.0.2.
        assert_eq!(
            human(&sound(), false),
            "No errors were found on the image.\n\
             15/160 = 9.38% allocated, 6.67% fragmented, 0.00% compressed clusters\n\
             Image end offset: 1703936\n"
        );
        let broken = CheckResult {
            corruptions: 2,
            leaks: 1,
            allocated_clusters: 16,
            fragmented_clusters: 2,
            ..sound()
        };
        assert_eq!(
            human(&broken, false),
            "\n2 errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n\
             \n1 leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n\
             16/160 = 10.00% allocated, 12.50% fragmented, 0.00% compressed clusters\n\
             Image end offset: 1703936\n"
        );
        let fixed = CheckResult { leaks_fixed: 1, ..sound() };
        assert!(human(&fixed, true).starts_with(
            "The following inconsistencies were found and repaired:\n\n    1 leaked clusters\n    0 corruptions\n\n\
             Double checking the fixed image now...\nNo errors were found on the image.\n"
        ));
    }

    #[test]
    fn for_programs() {
        let r = CheckResult { leaks: 1, ..sound() };
        let text = serde_json::to_string(&members(&r, "x", "qcow2")).unwrap_or_default();
        assert_eq!(
            text,
            r#"{"image-end-offset":1703936,"total-clusters":160,"check-errors":0,"leaks":1,"allocated-clusters":15,"filename":"x","format":"qcow2","fragmented-clusters":1}"#
        );
    }
}
