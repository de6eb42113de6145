//! Checking an image and repairing it.
//!
//! The references that the metadata hold are counted, then compared with the refcounts ([`scan`]). Memory is
//! bounded: counts live in sparse maps of pages, so they grow with the metadata that there really are and not with
//! the offsets that they name. The large ones are what is referred to, what is counted and, for a repair, what the
//! new counts are, each within a budget of 512 MiB; what is kept about single tables is a few dozen bytes for each
//! cluster of metadata. Every L2 table is read once (a repair reads it again), however many L1 tables share it.
//!
//! A repair never gives back what a damaged entry may have referred to: as long as there are such entries, leaks stay.
//!
//! Leaks are repaired by lowering refcounts in place. Repairing anything else writes what has to change to unused
//! clusters and switches to it with one write of the header ([`repair`]).

mod counts;
mod entries;
mod repair;
mod scan;

use dolmen_graph::{CheckResult, Io, Read, RepairWhat, Resize, Write};
use dolmen_types::{Error, ErrorKind, Result, WriteFlags};

use super::header::{AUTOCLEAR_BITMAPS, Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use super::image::read_bytes;
use scan::Scan;

/// Bytes of L1 tables of all snapshots together.
const MAX_ALL_L1_BYTES: u64 = 4 << 30;
/// Steps of a repair, each followed by another look: lowering counts may show copied flags that are wrong then.
const MAX_STEPS: usize = 4;

async fn write_header_fields(io: Io<'_, Read>, write: Io<'_, Write>, h: &Header) -> Result<()> {
    let mut sector = [0u8; 512];
    read_bytes(io, 0, &mut sector).await?;
    h.patch(&mut sector);
    write.write_bytes(0, &sector, WriteFlags::NONE).await?;
    write.flush().await
}

/// Checks an image. Nobody may be writing it.
///
/// # Errors
/// `InvalidInput` when it is not a qcow2 image, `Limit` when it is too large to be checked, or what reading says.
/// Damage is no error but a result.
pub async fn check(read: Io<'_, Read>) -> Result<CheckResult> {
    Ok(Scan::of(read).await?.result)
}

/// Checks an image and repairs what is asked for. Nobody else may be using it.
///
/// # Errors
/// As [`check`], and what writing says. The image then is as it was, with leaks at worst.
pub async fn check_and_repair(
    read: Io<'_, Read>,
    write: Io<'_, Write>,
    resize: Io<'_, Resize>,
    repair: RepairWhat,
) -> Result<CheckResult> {
    let scan = Scan::of(read).await?;
    carry_out(scan, write, resize, repair).await
}

/// Repairs an image that is about to be written and was not closed by who wrote it last: its refcounts are behind.
/// Anything worse is for a person to decide.
///
/// # Errors
/// As [`check_and_repair`]; `Corrupt` when there is more to it.
pub(super) async fn recount(read: Io<'_, Read>, write: Io<'_, Write>, resize: Io<'_, Resize>) -> Result<()> {
    let scan = Scan::of(read).await?;
    check_loss(&scan)?;
    let result = carry_out(scan, write, resize, RepairWhat::All).await?;
    if result.corruptions == 0 { Ok(()) } else { Err(damaged(&result)) }
}

/// Finds out whether [`recount`] can be done, and changes nothing.
///
/// # Errors
/// As [`recount`].
pub(super) async fn check_recount(read: Io<'_, Read>) -> Result<()> {
    check_loss(&Scan::of(read).await?)
}

fn check_loss(scan: &Scan<'_>) -> Result<()> {
    if scan.lost == 0 { Ok(()) } else { Err(damaged(&scan.result)) }
}

fn damaged(result: &CheckResult) -> Error {
    let first = result.messages.first().map_or("", String::as_str);
    Error::new(
        ErrorKind::Corrupt,
        format!("the image was not closed properly, and more than its refcounts is damaged: {first}"),
    )
    .remedy("open it with read-only=on, or repair it with 'img check -r all'")
}

async fn carry_out(
    mut scan: Scan<'_>,
    write: Io<'_, Write>,
    resize: Io<'_, Resize>,
    repair: RepairWhat,
) -> Result<CheckResult> {
    let read = scan.io;
    let before = scan.result.clone();
    let unclean = scan.header.incompatible & (INCOMPAT_DIRTY | INCOMPAT_CORRUPT) != 0;
    if before.corruptions == 0 && before.leaks == 0 && !unclean {
        return Ok(before);
    }
    let (lost, mut notes) = (scan.lost, std::mem::take(&mut scan.losses));
    let bitmaps = scan.header.autoclear & AUTOCLEAR_BITMAPS;
    let mut rewritten = false;
    let mut left = u64::MAX;
    for _ in 0..MAX_STEPS {
        let damaged = scan.result.corruptions;
        if damaged > 0 && damaged < left && repair == RepairWhat::All {
            left = damaged;
            repair::rewrite(&scan, write, resize).await?;
            rewritten = true;
        } else if scan.result.leaks > 0 && lost == 0 && !scan.structures_damaged {
            // Features that Dolmen does not know must not be trusted once the image has changed.
            if scan.header.autoclear & !AUTOCLEAR_BITMAPS != 0 {
                scan.header.clear_unknown();
                write_header_fields(read, write, &scan.header).await?;
            }
            repair::lower_refcounts(&scan, write).await?;
        } else {
            break;
        }
        scan = Scan::of(read).await?;
    }
    if scan.result.corruptions == 0 && unclean {
        scan.header.incompatible &= !(INCOMPAT_DIRTY | INCOMPAT_CORRUPT);
        scan.header.clear_unknown();
        write_header_fields(read, write, &scan.header).await?;
    }
    if bitmaps != 0 && scan.header.autoclear & AUTOCLEAR_BITMAPS == 0 {
        notes.push("the image's bitmaps were damaged and are not valid any more".into());
    }
    let mut result = std::mem::take(&mut scan.result);
    result.corruptions_fixed = before.corruptions.saturating_sub(result.corruptions);
    result.leaks_fixed = before.leaks.saturating_sub(result.leaks);
    result.messages = before.messages;
    result.messages.append(&mut notes);
    if rewritten && lost > 0 {
        result.lost = lost;
        let now = match scan.header.version < 3 && scan.header.backing_file.is_some() {
            true => "shows what the backing file has",
            false => "reads as zeroes",
        };
        result.messages.push(format!(
            "{lost} entries referred to something that can't be found: what they held {now} now, or is gone"
        ));
    }
    if lost > 0 && result.leaks > 0 {
        result.messages.push(format!(
            "{} leaked clusters are kept: {lost} entries referred to something that can't be found, and it may be \
             among them. Copy what can still be found first: the next repair, with 'all' or 'leaks', gives them back",
            result.leaks
        ));
    }
    Ok(result)
}
