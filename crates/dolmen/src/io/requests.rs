//! The commands of `io` that move data, and what they report.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use dolmen::Image;
use dolmen::graph::{Prealloc, own_status};
use dolmen::rt::{IoVec, Memory, Rt};
use dolmen::types::{Error, ErrorKind, ReadFlags, Result, Span, WriteFlags};
use event_listener::Event;

use super::getopt::Parsed;
use super::table::Row;
use super::{Done, Failed, Shell, errno_text, number, usage};
use crate::cli::units::{io_size, io_time};
use crate::{cli, out};

/// The largest request of QEMU's tool.
const MAX_REQUEST: u64 = (1 << 31) - 512;
/// What write buffers hold unless a pattern is given.
const WRITE_FILL: u8 = 0xcd;
/// What read buffers hold before the read, so that unread bytes show.
const READ_FILL: u8 = 0xab;

/// Requests in the background.
#[derive(Default)]
pub(super) struct Background {
    running: Cell<usize>,
    ended: Event,
}

impl Background {
    fn spawn(self: &Rc<Self>, rt: &Rt, task: impl Future<Output = ()> + 'static) {
        self.running.set(self.running.get() + 1);
        let me = self.clone();
        rt.spawn(async move {
            task.await;
            me.running.set(me.running.get() - 1);
            me.ended.notify(usize::MAX);
        });
    }

    /// Waits until none is left.
    pub(super) async fn finish(&self) {
        while self.running.get() > 0 {
            let listener = self.ended.listen();
            if self.running.get() > 0 {
                listener.await;
            }
        }
    }
}

/// How a request is reported.
#[derive(Clone, Copy)]
struct Report {
    quiet: bool,
    /// In a form for programs.
    columns: bool,
}

impl Report {
    fn of(o: &Parsed) -> Report {
        Report { quiet: o.has('q'), columns: o.has('C') }
    }

    fn print(self, op: &str, t: Duration, offset: u64, len: u64) {
        if !self.quiet {
            cli::say(format_args!("{}", self.text(op, t, offset, len)));
        }
    }

    fn text(self, op: &str, t: Duration, offset: u64, len: u64) -> String {
        let secs = t.as_secs_f64().max(1e-9);
        let (bytes, ops) = (len as f64 / secs, 1.0 / secs);
        if self.columns {
            return format!("{len},1,{},{bytes:.3},{ops:.3}\n", io_time(t, true));
        }
        let unit = if t.as_secs() < 60 { " sec" } else { "" };
        format!(
            "{op} {len}/{len} bytes at offset {offset}\n{}, 1 ops; {}{unit} ({}/sec and {ops:.4} ops/sec)\n",
            io_size(len as f64),
            io_time(t, false),
            io_size(bytes)
        )
    }
}

/// A pattern byte, in C's notations.
fn pattern(text: &str) -> Result<u8, Failed> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u8::from_str_radix(hex, 16),
        None if text.len() > 1 && text.starts_with('0') => u8::from_str_radix(&text[1..], 8),
        None => text.parse(),
    };
    parsed.map_err(|_| {
        out!("{text} is not a valid pattern byte");
        Failed
    })
}

/// `off len [len..]`: the offset, and a buffer of segments.
fn lengths(args: &[String], fill: u8) -> Result<(u64, IoVec), Failed> {
    let Some((offset, lens)) = args.split_first() else { return Err(Failed) };
    let offset = number(offset)?;
    let mut iov = IoVec::new();
    let mut total = 0u64;
    for text in lens {
        let len = number(text)?;
        total = total.saturating_add(len);
        if total > MAX_REQUEST {
            out!("length cannot exceed {MAX_REQUEST}, given {text}");
            return Err(Failed);
        }
        iov.push(Memory::zeroed(len as usize).share());
    }
    iov.fill(fill);
    Ok((offset, iov))
}

fn dump(offset: u64, data: &[u8]) -> String {
    let mut s = String::new();
    for (i, row) in data.chunks(16).enumerate() {
        s.push_str(&format!("{:08x}:  ", offset + 16 * i as u64));
        row.iter().for_each(|b| s.push_str(&format!("{b:02x} ")));
        s.push(' ');
        s.extend(row.iter().map(|b| if b.is_ascii_alphanumeric() { *b as char } else { '.' }));
        s.push('\n');
    }
    s
}

/// What a read is checked against: pattern, offset in the data, length.
type Check = Option<(u8, u64, u64)>;

/// Says what a read came to. False if it has not the expected content.
fn read_done(iov: &IoVec, offset: u64, t: Duration, check: Check, verbose: bool, report: Report) -> bool {
    let mut as_expected = true;
    let data = if check.is_some() || (verbose && !report.quiet) { iov.to_vec() } else { Vec::new() };
    if let Some((byte, at, len)) = check
        && data[at as usize..(at + len) as usize].iter().any(|b| *b != byte)
    {
        out!("Pattern verification failed at offset {}, {len} bytes", offset + at);
        as_expected = false;
    }
    if verbose && !report.quiet {
        cli::say(format_args!("{}", dump(offset, &data)));
    }
    report.print("read", t, offset, iov.len() as u64);
    as_expected
}

/// A write, taken from the command's options.
struct WriteJob {
    offset: u64,
    /// `None` for a zero write of so many bytes.
    data: Option<IoVec>,
    len: u64,
    flags: WriteFlags,
}

impl WriteJob {
    async fn run(&self, image: &Image) -> Result<()> {
        match &self.data {
            Some(iov) => image.write(self.offset, iov, self.flags).await,
            None => image.write_zeroes(self.offset, self.len, self.flags).await,
        }
    }
}

impl Shell {
    pub(super) async fn read(&self, row: &Row, o: &Parsed, several: bool) -> Done {
        let checked = match o.value('P') {
            Some(p) => Some(pattern(p)?),
            None if o.has('s') || o.has('l') => return usage(row),
            None => None,
        };
        if !several && o.rest.len() != 2 || o.rest.len() < 2 {
            return usage(row);
        }
        if o.has('b') {
            // The VM state lies behind the disk; nothing of it is read before it exists.
            return self.no_vm_state();
        }
        let (offset, iov) = lengths(&o.rest, READ_FILL)?;
        let total = iov.len() as u64;
        let check = match checked {
            None => None,
            Some(byte) => {
                let at = o.value('s').map_or(Ok(0), number)?;
                let len = o.value('l').map_or(Ok(total.saturating_sub(at)), number)?;
                if at.checked_add(len).is_none_or(|end| end > total) {
                    out!("pattern verification range exceeds end of read data");
                    return Err(Failed);
                }
                Some((byte, at, len))
            }
        };
        let image = self.image()?;
        let start = image.rt().now();
        let done = image.read(offset, &iov, ReadFlags::NONE).await;
        let t = image.rt().now() - start;
        match done {
            Err(e) => Err(self.failed(row.name, &e)),
            Ok(()) if read_done(&iov, offset, t, check, o.has('v'), Report::of(o)) => Ok(()),
            Ok(()) => Err(Failed),
        }
    }

    fn no_vm_state(&self) -> Done {
        out!("the VM state of an image is not available");
        Err(Failed)
    }

    /// In the background a request counts as done when it has been submitted.
    pub(super) fn aio_read(&self, row: &Row, o: &Parsed) -> Done {
        let checked = o.value('P').map(pattern).transpose()?;
        if o.rest.len() < 2 {
            return usage(row);
        }
        let (offset, iov) = lengths(&o.rest, READ_FILL)?;
        let check = checked.map(|byte| (byte, 0, iov.len() as u64));
        let (verbose, report) = (o.has('v'), Report::of(o));
        let image = self.image()?;
        self.background.spawn(&image.rt().clone(), async move {
            let start = image.rt().now();
            match image.read(offset, &iov, ReadFlags::NONE).await {
                Ok(()) => {
                    read_done(&iov, offset, image.rt().now() - start, check, verbose, report);
                }
                Err(e) => out!("aio_read failed: {}", errno_text(&e)),
            }
        });
        Ok(())
    }

    fn write_job(&self, row: &Row, o: &Parsed, several: bool) -> Result<WriteJob, Failed> {
        if ["z", "P", "s"].iter().filter(|c| o.has(c.chars().next().unwrap_or('z'))).count() > 1 {
            out!("Only one of -z, -P, and -s can be specified at the same time");
            return Err(Failed);
        }
        for c in ['u', 'n'] {
            if o.has(c) && !o.has('z') {
                out!("-{c} requires -z to be specified");
                return Err(Failed);
            }
        }
        if o.has('c') && !o.has('z') {
            // Storing the data uncompressed would not be what was asked for.
            let e = Error::new(ErrorKind::Unsupported, "writing compressed clusters is not available");
            return Err(self.failed(row.name, &e));
        }
        if o.rest.len() < 2 || (!several || o.has('z')) && o.rest.len() != 2 {
            return Err(usage(row).err().unwrap_or(Failed));
        }
        let mut flags = WriteFlags::NONE;
        let writethrough = self.image.as_ref().is_some_and(|i| i.writethrough);
        for (set, flag) in [
            (o.has('f') || writethrough, WriteFlags::FUA),
            (o.has('u'), WriteFlags::MAY_UNMAP),
            (o.has('n'), WriteFlags::NO_FALLBACK),
        ] {
            if set {
                flags = flags | flag;
            }
        }
        if o.has('z') {
            let (offset, len) = (number(&o.rest[0])?, number(&o.rest[1])?);
            return Ok(WriteJob { offset, data: None, len, flags });
        }
        let fill = o.value('P').map_or(Ok(WRITE_FILL), pattern)?;
        let (offset, iov) = lengths(&o.rest, fill)?;
        if let Some(file) = o.value('s') {
            let data = std::fs::read(dolmen::types::os_name(file)).ok().filter(|d| !d.is_empty());
            let Some(data) = data else {
                out!("{file}: cannot be read, or is empty");
                return Err(Failed);
            };
            let all: Vec<u8> = data.iter().copied().cycle().take(iov.len()).collect();
            iov.copy_from_slice(0, &all);
        }
        Ok(WriteJob { offset, len: iov.len() as u64, data: Some(iov), flags })
    }

    /// A write to an image that was opened for reading is refused before it is tried.
    fn writable(&self) -> Done {
        if self.image.as_ref().is_some_and(|i| i.how.read_only) {
            return Err(self.say(cli::Failure::new("Block node is read-only")));
        }
        Ok(())
    }

    pub(super) async fn write(&self, row: &Row, o: &Parsed, several: bool) -> Done {
        let job = self.write_job(row, o, several)?;
        if o.has('b') {
            return self.no_vm_state();
        }
        self.writable()?;
        let image = self.image()?;
        let start = image.rt().now();
        match job.run(&image).await {
            Err(e) => Err(self.failed(row.name, &e)),
            Ok(()) => {
                Report::of(o).print("wrote", image.rt().now() - start, job.offset, job.len);
                Ok(())
            }
        }
    }

    pub(super) fn aio_write(&self, row: &Row, o: &Parsed) -> Done {
        let job = self.write_job(row, o, true)?;
        self.writable()?;
        let report = Report::of(o);
        let image = self.image()?;
        self.background.spawn(&image.rt().clone(), async move {
            let start = image.rt().now();
            match job.run(&image).await {
                Ok(()) => report.print("wrote", image.rt().now() - start, job.offset, job.len),
                Err(e) => out!("aio_write failed: {}", errno_text(&e)),
            }
        });
        Ok(())
    }

    pub(super) async fn discard(&self, row: &Row, o: &Parsed) -> Done {
        let [offset, len] = o.rest.as_slice() else { return usage(row) };
        let (offset, len) = (number(offset)?, number(len)?);
        self.writable()?;
        let image = self.image()?;
        let start = image.rt().now();
        match image.discard(offset, len).await {
            Err(e) => Err(self.failed("discard", &e)),
            Ok(()) => {
                Report::of(o).print("discard", image.rt().now() - start, offset, len);
                Ok(())
            }
        }
    }

    pub(super) async fn truncate(&self, row: &Row, o: &Parsed) -> Done {
        let [size] = o.rest.as_slice() else { return usage(row) };
        let prealloc = match o.value('m') {
            None | Some("off") => Prealloc::Off,
            Some("metadata") => Prealloc::Metadata,
            Some("falloc") => Prealloc::Falloc,
            Some("full") => Prealloc::Full,
            Some(m) => return Err(self.say(cli::Failure::new(format!("invalid parameter value: {m}")))),
        };
        let size = number(size)?;
        self.writable()?;
        self.image()?.resize(size, prealloc).await.map_err(|e| self.say(e))
    }

    pub(super) async fn alloc(&self, args: &[String]) -> Done {
        let Some(first) = args.first() else { return Err(Failed) };
        let offset = number(first)?;
        let count = args.get(1).map_or(Ok(512), |a| number(a))?;
        let image = self.image()?;
        let count = count.min(image.size().saturating_sub(offset));
        let node = image.node();
        let (mut at, mut allocated) = (offset, 0);
        while at < offset + count {
            match own_status(&node, image.rt(), Span::from_range(at, offset + count)).await {
                Ok((held, len)) => {
                    allocated += if held { len } else { 0 };
                    at += len;
                }
                Err(e) => return Err(self.failed("is_allocated", &e)),
            }
        }
        out!("{allocated}/{count} bytes allocated at offset {}", io_size(offset as f64));
        Ok(())
    }

    pub(super) async fn map(&self) -> Done {
        let image = self.image()?;
        let (node, size) = (image.node(), image.size());
        let (mut at, mut current): (u64, Option<(u64, u64, bool)>) = (0, None);
        let print = |(start, len, held): (u64, u64, bool)| {
            let word = if held { "    allocated" } else { "not allocated" };
            let (l, s) = (io_size(len as f64), io_size(start as f64));
            out!("{l} ({len:#x}) bytes {word} at offset {s} ({start:#x})");
        };
        while at < size {
            match own_status(&node, image.rt(), Span::from_range(at, size)).await {
                Ok((held, len)) => {
                    match &mut current {
                        Some((_, l, h)) if *h == held => *l += len,
                        _ => {
                            if let Some(c) = current.replace((at, len, held)) {
                                print(c);
                            }
                        }
                    }
                    at += len;
                }
                Err(e) => return Err(self.failed("map", &e)),
            }
        }
        if let Some(c) = current {
            print(c);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports() {
        // The forms of qemu-io 10.0.2.
        let r = Report { quiet: false, columns: false };
        assert_eq!(
            r.text("wrote", Duration::from_millis(20), 65536, 1500),
            "wrote 1500/1500 bytes at offset 65536\n1.465 KiB, 1 ops; 00.02 sec (73.242 KiB/sec and 50.0000 ops/sec)\n"
        );
        let r = Report { quiet: false, columns: true };
        assert_eq!(r.text("read", Duration::from_millis(500), 0, 4096), "4096,1,0:00:00.50,8192.000,2.000\n");
    }

    #[test]
    fn dumps() {
        let mut data = vec![0xcd; 6];
        data.extend(*b"ab 1~\0\0\0\0\0\0");
        assert_eq!(
            dump(4090, &data),
            "00000ffa:  cd cd cd cd cd cd 61 62 20 31 7e 00 00 00 00 00  ......ab.1......\n0000100a:  00  .\n"
        );
    }

    #[test]
    fn patterns() {
        assert_eq!(pattern("0xab").ok(), Some(0xab));
        assert_eq!(pattern("017").ok(), Some(15));
        assert_eq!(pattern("255").ok(), Some(255));
        assert!(pattern("300").is_err());
        assert!(pattern("-1").is_err());
    }
}
