//! `img map`.

use clap::Parser;
use dolmen::Image;
use dolmen::graph::ChainStatus;
use dolmen::session::READ;

use super::open::{self, Open, Verb, is_json};
use crate::cli::{self, Failure, Outcome, Persona};

/// The row.
pub(super) static VERB: Verb = Verb {
    name: "map",
    help: "show where the data of an image are",
    run: |name, persona, args| cli::parse(name, persona, args).map(|a| run(persona, a)),
};

/// Show where the data of an image are.
#[derive(Parser, Debug)]
#[command(infer_long_args = true, args_override_self = true, disable_version_flag = true)]
pub(crate) struct MapArgs {
    #[command(flatten)]
    open: Open,
    /// First byte to look at
    #[arg(short, long, value_name = "OFFSET")]
    start_offset: Option<String>,
    /// How many bytes to look at
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,
    /// human or json
    #[arg(long, value_name = "FMT")]
    output: Option<String>,
    /// Image
    #[arg(value_name = "FILENAME")]
    filenames: Vec<String>,
}

/// A range with one state.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    /// Offset and name of the file that holds it.
    place: Option<(u64, String)>,
}

impl Entry {
    fn new(start: u64, s: &ChainStatus) -> Entry {
        let place = s.place.as_ref().filter(|_| !s.compressed).map(|(node, at)| {
            (*at, node.driver.describe(node).filename.unwrap_or_else(|| node.name.to_string()))
        });
        Entry {
            start,
            length: s.len,
            // What a shorter backing file lacks counts as not present in the image above it.
            depth: s.depth - u32::from(s.past_end),
            present: s.present && !s.past_end,
            zero: s.zero,
            data: s.data,
            compressed: s.compressed,
            place,
        }
    }

    /// Takes `next` in if it only goes on with this range.
    fn absorb(&mut self, next: &Entry) -> bool {
        let same = self.depth == next.depth
            && self.present == next.present
            && self.zero == next.zero
            && self.data == next.data
            && self.compressed == next.compressed
            && match (&self.place, &next.place) {
                (None, None) => true,
                (Some((a, f)), Some((b, g))) => f == g && a + self.length == *b,
                _ => false,
            };
        if same {
            self.length += next.length;
        }
        same
    }

    fn json(&self) -> String {
        let mut s = format!(
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}",
            self.start, self.length, self.depth, self.present, self.zero, self.data, self.compressed
        );
        if let Some((at, _)) = &self.place {
            s.push_str(&format!(", \"offset\": {at}"));
        }
        s.push('}');
        s
    }

    fn human(&self) -> Result<Option<String>, Failure> {
        let hex = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
        if !self.data || self.zero {
            return Ok(None);
        }
        let Some((at, file)) = &self.place else {
            return Err(Failure::new("File contains external, encrypted or compressed clusters."));
        };
        Ok(Some(format!("{:<16}{:<16}{:<16}{file}", hex(self.start), hex(self.length), hex(*at))))
    }
}

/// Runs it.
fn run(persona: Persona, a: MapArgs) -> Outcome {
    let json = is_json(a.output.as_deref(), "map")?;
    let number = |text: &Option<String>, what: &str| match text {
        None => Ok(None),
        Some(t) => cli::parse_size(t)
            .map(Some)
            .ok_or_else(|| Failure::new(format!("Invalid {what} specified: '{t}'."))),
    };
    let start = number(&a.start_offset, "start offset")?.unwrap_or(0);
    let max = number(&a.max_length, "maximum length")?.unwrap_or(u64::MAX);
    let Ok([filename]) = <[String; 1]>::try_from(a.filenames.clone()) else {
        return Err(Failure::usage("Expecting one image file name", "map"));
    };
    open::block_on(move |rt| async move {
        let mut session = a.open.session(&rt, persona);
        let image = a.open.source(&filename).open(&mut session, persona, READ).await?;
        let done = walk(&image, start, max, json).await;
        session.close_image(image).await?;
        session.close().await?;
        done.map(|()| 0)
    })
}

async fn walk(image: &Image, start: u64, max: u64, json: bool) -> Result<(), Failure> {
    let end = image.size().min(start.saturating_add(max));
    let mut first = true;
    let mut emit = |e: &Entry| -> Result<(), Failure> {
        if json {
            cli::say(format_args!("{}{}", if first { "[" } else { ",\n" }, e.json()));
            first = false;
        } else if let Some(line) = e.human()? {
            cli::say(format_args!("{line}\n"));
        }
        Ok(())
    };
    if !json {
        cli::say(format_args!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to"));
    }
    let mut at = start;
    let mut current: Option<Entry> = None;
    while at < end {
        let next = Entry::new(at, &image.status(at, end - at).await?);
        at += next.length;
        if !current.as_mut().is_some_and(|e| e.absorb(&next))
            && let Some(e) = current.replace(next)
        {
            emit(&e)?;
        }
    }
    if let Some(e) = &current {
        emit(e)?;
    }
    if json {
        cli::say(format_args!("{}]\n", if current.is_none() { "[" } else { "" }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start: u64, length: u64, at: u64) -> Entry {
        Entry {
            start,
            length,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            place: Some((at, "ov.qcow2".into())),
        }
    }

    #[test]
    fn lines() {
        // Captured from qemu-img 10.0.2.
        let e = entry(65536, 65536, 327_680);
        assert_eq!(
            e.json(),
            r#"{ "start": 65536, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "compressed": false, "offset": 327680}"#
        );
        assert_eq!(
            e.human().ok().flatten().as_deref(),
            Some("0x10000         0x10000         0x50000         ov.qcow2")
        );
        assert_eq!(
            entry(0, 0x31000, 0).human().ok().flatten().as_deref(),
            Some("0               0x31000         0               ov.qcow2")
        );
        assert!(Entry { place: None, ..entry(0, 1, 0) }.human().is_err());
    }

    #[test]
    fn neighbours_become_one() {
        let mut e = entry(0, 512, 1024);
        assert!(e.absorb(&entry(512, 512, 1536)));
        assert_eq!(e.length, 1024);
        assert!(!e.absorb(&entry(1024, 512, 0)));
        assert!(!e.absorb(&Entry { place: None, ..entry(1024, 512, 0) }));
    }
}
