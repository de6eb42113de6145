//! `img rebase -u`: changes the backing file that an image names, and nothing else.

use clap::Parser;
use dolmen::graph::BackingName;
use dolmen::types::{Actions, Claim, ErrorKind};

use super::check::file_of;
use super::open::{self, Open, Verb, cache};
use crate::cli::{self, Failure, Outcome, Persona};
use crate::out;

/// The row.
pub(super) static VERB: Verb = Verb {
    name: "rebase",
    help: "change the backing file that an image names",
    run: |name, persona, args| cli::parse(name, persona, args).map(|a| run(persona, a)),
};

/// Change the backing file that an image names.
#[derive(Parser, Debug)]
#[command(infer_long_args = true, args_override_self = true, disable_version_flag = true)]
pub(crate) struct Rebase {
    #[command(flatten)]
    open: Open,
    /// New backing file, "" for none
    #[arg(short, long, value_name = "BACKING_FILENAME")]
    backing: Option<String>,
    /// Format of the new backing file
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// Do not look at the data: the new backing file has the same content
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Cache mode
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// Cache mode of the backing file; accepted, it is not opened
    #[arg(short = 'T', long, value_name = "CACHE")]
    backing_cache: Option<String>,
    /// Accepted; no data are written
    #[arg(short, long)]
    compress: bool,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Image
    #[arg(value_name = "FILENAME")]
    filenames: Vec<String>,
}

/// The header is changed in place: nobody may write the file, or rely on what it names.
const CHANGING: Claim = Claim {
    needs: Actions::D.with(Actions::V),
    allows: Actions::EVERY.without(Actions::V).without(Actions::S),
};

/// Runs it.
fn run(persona: Persona, a: Rebase) -> Outcome {
    let Ok([filename]) = <[String; 1]>::try_from(a.filenames.clone()) else {
        return Err(Failure::usage("Expecting one image file name", "rebase"));
    };
    if !a.backing_unsafe {
        if a.backing.is_none() {
            return Err(Failure::usage("Must specify backing file (-b) or use unsafe mode (-u)", "rebase"));
        }
        return Err(Failure {
            hint: Some("If both backing files have the same content, use -u.".into()),
            ..Failure::new("Rebasing with a copy of the differences is not available")
        });
    }
    let cache = {
        let of_backing = open::cache(a.backing_cache.as_deref(), "source cache");
        let of_image = cache(a.cache.as_deref(), "cache")?;
        of_backing.map(|_| of_image)?
    };
    let backing = a.backing.clone().filter(|b| !b.is_empty());
    open::block_on(move |rt| async move {
        let mut session = a.open.session(&rt, persona);
        let mut source = a.open.source(&filename);
        source.read_only = false;
        source.cache = cache;
        let options = source.options(&mut session, persona)?;
        let (format, file) = dolmen::session::opening(file_of(&mut session, options).await, &filename)?;
        let image = dolmen::session::opening(session.open(file, CHANGING).await, &filename)?;
        if let Some(f) = &a.backing_format {
            session.registry().find(f).map_err(|_| Failure::new(format!("Invalid format name: '{f}'")))?;
        }
        let failed = |why: String| {
            Failure::new(format!(
                "Could not change the backing file to '{}': {why}",
                backing.as_deref().unwrap_or_default()
            ))
        };
        if backing.is_some() && a.backing_format.is_none() {
            return Err(failed("backing format must be specified".into()));
        }
        let Some(change_backing) = session.registry().find(&format).ok().and_then(|k| k.change_backing)
        else {
            return Err(failed("Operation not supported".into()));
        };
        if let Some(name) = &backing {
            let to = BackingName { name, format: a.backing_format.as_deref() };
            session.check_backing(&image, to).await?;
        }
        if a.progress && !a.quiet {
            cli::say(format_args!("    (0.00/100%)\r"));
        }
        let changed = async {
            let token = image.edge().begin().await?;
            let (read, write) = (token.read(&rt)?, token.write(&rt)?);
            let to = backing.as_deref().map(|name| BackingName { name, format: a.backing_format.as_deref() });
            change_backing(read, write, to).await
        };
        let changed = changed.await;
        session.close_image(image).await?;
        session.close().await?;
        changed.map_err(|e| match e.kind() {
            ErrorKind::NoSpace | ErrorKind::InvalidInput => failed("Invalid argument".into()),
            _ => failed(e.to_string()),
        })?;
        if a.progress && !a.quiet {
            out!("    (100.00/100%)");
        }
        Ok(0)
    })
}
