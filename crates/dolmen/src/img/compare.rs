//! `img compare`: exit code 0 the same, 1 different, 2 and more an error.

use clap::Parser;
use dolmen::graph::ChainStatus;
use dolmen::rt::Memory;
use dolmen::session::READ;
use dolmen::types::ReadFlags;
use dolmen::{Image, Session};

use super::open::{self, Common, Source, Verb, cache};
use crate::cli::{self, Failure, Outcome, Persona};
use crate::out;

/// The row.
pub(super) static VERB: Verb = Verb {
    name: "compare",
    help: "compare the content of two images",
    run: |name, persona, args| cli::parse(name, persona, args).map(|a| run(persona, a)),
};

/// Compare the content of two images.
#[derive(Parser, Debug)]
#[command(infer_long_args = true, args_override_self = true, disable_version_flag = true)]
pub(crate) struct Compare {
    /// Format of the first image
    #[arg(short = 'f', long, value_name = "FMT")]
    a_format: Option<String>,
    /// Format of the second image
    #[arg(short = 'F', long, value_name = "FMT")]
    b_format: Option<String>,
    /// The images are option strings
    #[arg(long)]
    image_opts: bool,
    /// Sizes and allocation must be the same too
    #[arg(short, long)]
    strict: bool,
    /// Cache mode
    #[arg(short = 'T', long, value_name = "CACHE_MODE")]
    cache: Option<String>,
    /// Show progress
    #[arg(short, long)]
    progress: bool,
    /// Say nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Open although other processes use the images
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    common: Common,
    /// Images
    filenames: Vec<String>,
}

/// How much is read at once, in bytes.
const CHUNK: u64 = 2 << 20;
/// Less progress than this is not shown, in percent.
const PROGRESS_STEP: f64 = 2.0;
/// Differences are reported by this unit.
const SECTOR: usize = 512;

/// Runs it.
fn run(persona: Persona, a: Compare) -> Outcome {
    let Ok([first, second]) = <[String; 2]>::try_from(a.filenames.clone()) else {
        return Err(Failure::usage("Expecting two image file names", "compare"));
    };
    let cache = cache(a.cache.as_deref(), "source cache").map_err(|f| f.with_code(2))?;
    open::block_on(move |rt| async move {
        let mut session = Session::new(&rt, dolmen::registry(), persona.policy(a.common.allow_backing));
        let of = |name, format| Source {
            name,
            format,
            image_opts: a.image_opts,
            force_share: a.force_share,
            read_only: true,
            cache,
        };
        let one = of(&first, a.a_format.as_deref())
            .open(&mut session, persona, READ)
            .await
            .map_err(|f| f.with_code(2))?;
        let two = of(&second, a.b_format.as_deref())
            .open(&mut session, persona, READ)
            .await
            .map_err(|f| f.with_code(2))?;
        // Nothing is shown to those who want to hear nothing.
        let mut progress = Progress { shown: a.progress && !a.quiet, last: None };
        let found = compare(&one, &two, &a, &mut progress).await.map_err(|f| f.with_code(4))?;
        if found.is_none() {
            progress.at(1, 1);
        }
        if !a.quiet {
            out!("{}", found.as_deref().unwrap_or("Images are identical."));
        }
        if progress.shown {
            out!("");
        }
        session.close_image(one).await.map_err(Failure::from).map_err(|f| f.with_code(4))?;
        session.close_image(two).await.map_err(Failure::from).map_err(|f| f.with_code(4))?;
        session.close().await?;
        Ok(u8::from(found.is_some()))
    })
}

/// What differs first, in words; `None` if nothing does.
async fn compare(
    one: &Image,
    two: &Image,
    a: &Compare,
    progress: &mut Progress,
) -> Result<Option<String>, Failure> {
    let (size_one, size_two) = (one.size(), two.size());
    if a.strict && size_one != size_two {
        return Ok(Some("Strict mode: Image size mismatch!".into()));
    }
    let total = size_one.max(size_two);
    let common = size_one.min(size_two);
    let mut at = 0;
    while at < common {
        progress.at(at, total);
        let s1 = one.status(at, common - at).await?;
        let s2 = two.status(at, common - at).await?;
        let len = s1.len.min(s2.len);
        let state = |s: &ChainStatus| (s.present && !s.past_end, s.zero, s.data, s.place.is_some());
        if a.strict && state(&s1) != state(&s2) {
            return Ok(Some(format!("Strict mode: Offset {at} block status mismatch!")));
        }
        if !(s1.zero && s2.zero) {
            let mut done = 0;
            while done < len {
                let n = CHUNK.min(len - done);
                let x = read(one, at + done, n, &s1).await?;
                let y = read(two, at + done, n, &s2).await?;
                if let Some(i) = first_difference(&x, &y) {
                    return Ok(Some(mismatch(at + done, i)));
                }
                done += n;
            }
        }
        at += len;
    }
    if size_one == size_two {
        return Ok(None);
    }
    // The longer one has to be zeroes from here on.
    if !a.quiet {
        out!("Warning: Image size mismatch!");
    }
    let longer = if size_one > size_two { one } else { two };
    while at < total {
        progress.at(at, total);
        let s = longer.status(at, total - at).await?;
        if !s.zero {
            let mut done = 0;
            while done < s.len {
                let n = CHUNK.min(s.len - done);
                let x = read(longer, at + done, n, &s).await?;
                if let Some(i) = x.iter().position(|b| *b != 0) {
                    return Ok(Some(mismatch(at + done, i)));
                }
                done += n;
            }
        }
        at += s.len;
    }
    Ok(None)
}

fn mismatch(offset: u64, i: usize) -> String {
    format!("Content mismatch at offset {}!", offset + (i / SECTOR * SECTOR) as u64)
}

fn first_difference(x: &[u8], y: &[u8]) -> Option<usize> {
    if x == y { None } else { x.iter().zip(y).position(|(a, b)| a != b) }
}

async fn read(image: &Image, at: u64, len: u64, status: &ChainStatus) -> Result<Vec<u8>, Failure> {
    let memory = Memory::zeroed(len as usize);
    if !status.zero {
        image.read(at, &memory.iovec(), ReadFlags::NONE).await.map_err(|e| {
            Failure::new(format!("Error while reading offset {at} of node '{}': {e}", image.node().name))
        })?;
    }
    Ok(memory.to_vec())
}

/// The line that tells how far it is.
struct Progress {
    shown: bool,
    /// What it shows, in percent.
    last: Option<f64>,
}

impl Progress {
    /// Shows that `at` of `total` bytes have been compared, if that is news.
    fn at(&mut self, at: u64, total: u64) {
        let percent = at as f64 * 100.0 / total as f64;
        if self.shown && self.last.is_none_or(|last| percent >= last + PROGRESS_STEP || percent >= 100.0) {
            self.last = Some(percent);
            cli::say(format_args!("    ({percent:.2}/100%)\r"));
            cli::flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_told_by_sector() {
        // Offsets as qemu-img 10.0.2 reports them.
        assert_eq!(mismatch(0, 524_988), "Content mismatch at offset 524800!");
        assert_eq!(mismatch(0, 524_287), "Content mismatch at offset 523776!");
        assert_eq!(first_difference(b"abc", b"abd"), Some(2));
        assert_eq!(first_difference(b"abc", b"abc"), None);
    }
}
