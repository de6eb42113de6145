//! The registry rows of `file`, `host_device` and `host_cdrom`: options, and how they open.

use std::fs::Metadata;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use dolmen_graph::option::{Text, Word};
use dolmen_graph::{AccessRule, Class, Common, DriverKind, OpenCx, Opened, Opener, Parsed};
use dolmen_rt::sys::{self, FileKind, OpenHow};
use dolmen_rt::{File, LocalFuture};
use dolmen_types::{Error, ErrorKind, Options, Result, ResultExt, os_name};

use super::create::{CREATE_OPTIONS, create};
use super::driver::{FileDriver, Made};
use super::shared::{EINVAL, no_files, plain};

dolmen_graph::options! {
    struct FileOptions {
        required "filename" filename: Text => "path of the image file";
        default "locking" locking: Word<Locking> = "auto" =>
            "lock the image against other processes; auto locks where the file system can";
        hint "aio" aio: Word<Aio> => "no effect: the runtime chooses once for the whole process";
        optional "x-beneath" beneath: Text =>
            "the file must lie beneath this directory, symbolic links included";
    }
}

/// Registry row of `file`.
pub static FILE: DriverKind = DriverKind {
    create_options: CREATE_OPTIONS,
    create: Some(create),
    protocols: &["file"],
    from_name: Some(|_, name| Ok(Options::new().with("driver", FILE.name).with("filename", name.rest))),
    // Whatever is there, and what is not there yet.
    path: Some(|_, _| 1),
    details: true,
    counts_discards: true,
    ..DriverKind::new("file", Class::Protocol, "a regular file", FileOptions::ROWS, |options, common| {
        parse(options, common, &FILE, FileKind::Regular)
    })
};

/// Registry row of `host_device`.
pub static HOST_DEVICE: DriverKind = DriverKind {
    path: Some(|_, found| if found.is_some_and(is_device) { 2 } else { 0 }),
    counts_discards: true,
    ..DriverKind::new(
        "host_device",
        Class::Protocol,
        "a block device of this host",
        FileOptions::ROWS,
        |options, common| parse(options, common, &HOST_DEVICE, FileKind::Block),
    )
};

/// Registry row of `host_cdrom`.
pub static HOST_CDROM: DriverKind =
    DriverKind {
        path: Some(|path, found| {
            if found.is_some_and(|m| m.file_type().is_block_device()) && is_cdrom(path) { 3 } else { 0 }
        }),
        ..DriverKind::new(
            "host_cdrom",
            Class::Protocol,
            "an optical drive of this host",
            FileOptions::ROWS,
            |options, common| parse(options, common, &HOST_CDROM, FileKind::Block),
        )
    };

fn is_device(found: &Metadata) -> bool {
    found.file_type().is_block_device() || found.file_type().is_char_device()
}

/// Linux names optical drives so.
fn is_cdrom(name: &Path) -> bool {
    let real = std::fs::canonicalize(name).unwrap_or_else(|_| name.to_owned());
    let last = real.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let number = last.strip_prefix("sr").or_else(|| last.strip_prefix("scd"));
    real.starts_with("/dev") && number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

dolmen_graph::words! {
    /// Whether the image is locked.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Locking {
        /// Where the file system can.
        Auto = "auto",
        /// It has to.
        On = "on",
        /// Not at all: other processes are not kept away.
        Off = "off",
    }
}

dolmen_graph::words! {
    /// How requests get to the kernel.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Aio {
        Threads = "threads",
        Native = "native",
        IoUring = "io_uring",
    }
}

struct OpenFile {
    kind: &'static DriverKind,
    wanted: FileKind,
    filename: String,
    beneath: Option<PathBuf>,
    locking: Locking,
}

fn parse(
    options: &mut Options,
    common: &Common,
    kind: &'static DriverKind,
    wanted: FileKind,
) -> Result<Parsed> {
    let FileOptions { filename, locking, aio, beneath } = FileOptions::take(options)?;
    if aio == Some(Aio::Native) && !common.flags.direct {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        )
        .remedy("add cache.direct=on, or leave aio out"));
    }
    let beneath = beneath.map(|dir| PathBuf::from(os_name(&dir)));
    let open = Box::new(OpenFile { kind, wanted, filename: plain(filename), beneath, locking });
    Ok(Parsed { children: Vec::new(), rule: AccessRule::LEAF, relies_down_to: None, open })
}

impl Opener for OpenFile {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let io = cx.rt.io().ok_or_else(no_files)?;
            let flags = cx.common.flags;
            let want = OpenHow { write: !flags.read_only, direct: flags.direct, create: false };
            let old = cx.replaced::<FileDriver>();
            if let Some(old) = old {
                old.check_name(&self.filename)?;
            }
            let retry_read_only = cx.common.auto_read_only;
            let (wanted, locking) = (self.wanted, self.locking);
            let (path, beneath) = (PathBuf::from(os_name(&self.filename)), self.beneath.clone());
            let name = path.clone();
            // Opening may wait for a network file system.
            let made = io
                .blocking_at(&name, move || {
                    let path = path.as_path();
                    let (fd, how) = match open(path, beneath.as_deref(), want) {
                        Err(e) if want.write && retry_read_only && is_read_only(&e) => {
                            let how = OpenHow { write: false, ..want };
                            (open(path, beneath.as_deref(), how)?, how)
                        }
                        other => (other?, want),
                    };
                    let facts = sys::facts(&fd)?;
                    check_kind(wanted, facts.kind)?;
                    let file = File::from_fd(fd);
                    let locking = locking != Locking::Off && can_lock(&file, locking)?;
                    Ok::<_, Error>(Made { file, facts, direct: how.direct, writable: how.write, locking })
                })
                .await
                .context(|| format!("Could not open '{}'", self.filename))?;
            let read_only = want.write && !made.writable;
            if let Some(old) = old {
                old.check_same(&self.filename, &made)?;
            }
            let driver = FileDriver::new(self.kind, self.filename, made, read_only, flags.inactive, old);
            let effect = old.and_then(|old| driver.takes_over(old));
            Ok(Opened { effect, ..Opened::of(driver) })
        })
    }
}

fn open(path: &Path, beneath: Option<&Path>, how: OpenHow) -> Result<std::os::fd::OwnedFd> {
    let opened = match beneath {
        None => sys::open(path, how),
        Some(dir) => {
            let name = path.strip_prefix(dir).unwrap_or(path);
            sys::open_beneath(dir, name, how).map_err(|e| match e.errno() {
                EXDEV => Error::new(
                    ErrorKind::PermissionDenied,
                    format!("it leads out of the directory '{}'", dir.display()),
                ),
                _ => e,
            })
        }
    };
    match opened {
        Err(e) if e.errno() == EINVAL && how.direct => {
            Err(e.context("the file system does not support direct I/O").remedy("leave cache.direct off"))
        }
        other => other,
    }
}

const EXDEV: i32 = 18;

/// The file can't be written, but may well be read.
fn is_read_only(e: &Error) -> bool {
    matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly)
}

fn check_kind(wanted: FileKind, found: FileKind) -> Result<()> {
    match (wanted, found) {
        (FileKind::Regular, FileKind::Regular) | (FileKind::Block, FileKind::Block) => Ok(()),
        (FileKind::Regular, FileKind::Block) => Err(Error::new(
            ErrorKind::InvalidInput,
            "'file' driver requires a regular file, and this is a block device",
        )
        .remedy("use the driver host_device")),
        (FileKind::Regular, FileKind::Other) => {
            Err(Error::new(ErrorKind::InvalidInput, "'file' driver requires a regular file"))
        }
        (FileKind::Block | FileKind::Other, FileKind::Regular) => {
            Err(Error::new(ErrorKind::InvalidInput, "'host_device' driver requires a block device")
                .remedy("use the driver file"))
        }
        // Character devices, pipes: nothing in them has a place.
        (FileKind::Block | FileKind::Other, _) => Err(Error::new(
            ErrorKind::InvalidInput,
            "'host_device' driver requires a block device, and this is of another kind",
        )),
    }
}

/// Whether the file system knows locks of open file descriptions.
fn can_lock(file: &File, locking: Locking) -> Result<bool> {
    match sys::byte_is_locked(file, super::lock::FIRST_NEED) {
        Ok(_) => Ok(true),
        Err(_) if locking == Locking::Auto => Ok(false),
        Err(e) => {
            Err(e.context("the file system cannot lock images").remedy("use locking=auto or locking=off"))
        }
    }
}
