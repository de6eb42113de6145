//! The registry row: options, and how an image is opened.

use std::sync::Arc;

use dolmen_graph::option::{Child, ChildOrNull, Flag, Size, Word};
use dolmen_graph::{
    AccessRule, CheckResult, ChildDef, ChildSpec, Class, Common, DriverKind, Duty, ImplicitChild, Io, OpenCx,
    Opened, Opener, Parsed, Read, Repair, Repairing,
};
use dolmen_rt::LocalFuture;
use dolmen_types::{ChildRole, Error, ErrorKind, Options, Result};

use super::check::{check, check_and_repair};
use super::create;
use super::driver::{Core, Qcow2, Recount, Reopened};
use super::header::looks_like_qcow2;
use super::image::File;

/// The registry row of qcow2.
pub static QCOW2: DriverKind = DriverKind {
    create_options: create::CREATE_OPTIONS,
    maps: true,
    probe: Some(|header, _| if looks_like_qcow2(header) { 100 } else { 0 }),
    create: Some(create::create),
    check: Some(check_image),
    change_backing: Some(|read, write, to| Box::pin(create::change_backing(read, write, to))),
    duties: &[Duty::Overlay],
    create_report: CREATE_REPORT,
    closes_before_reopen: true,
    details: true,
    ..DriverKind::new(
        "qcow2",
        Class::Format,
        "copy-on-write image with backing file, snapshots and compression (versions 2 and 3)",
        Qcow2Options::ROWS,
        parse,
    )
};

/// As QEMU's tool lists them.
const CREATE_REPORT: &[(&str, Option<&str>)] = &[
    ("cluster_size", Some("65536")),
    ("extended_l2", Some("off")),
    ("preallocation", None),
    ("compression_type", Some("zlib")),
    ("size", None),
    ("compat", None),
    ("data_file", None),
    ("backing_file", None),
    ("backing_fmt", None),
    ("data_file_raw", None),
    ("lazy_refcounts", Some("off")),
    ("refcount_bits", Some("16")),
];

fn check_image<'a>(
    read: Io<'a, Read>,
    repairing: Option<Repairing<'a>>,
) -> LocalFuture<'a, Result<CheckResult>> {
    Box::pin(async move {
        match repairing {
            None => check(read).await,
            Some(r) => check_and_repair(read, r.write, r.resize, r.what).await,
        }
    })
}

dolmen_graph::options! {
    struct Qcow2Options {
        required "file" file: Child => "the image file";
        optional "backing" backing: ChildOrNull =>
            "the backing node, or null for none (default: as the image says)";
        default "x-backing-may-change" backing_may_change: Flag = "off" =>
            "others may write and resize the backing node while this one is read: what it shows changes then";
        hint "lazy-refcounts" lazy: Flag =>
            "no effect: refcounts are always kept up to date at each flush";
        optional "pass-discard-request" pass_discard: Flag =>
            "discard freed clusters in the file (default: as the node's discard option)";
        hint "overlap-check" : Word<OverlapCheck> =>
            "no effect: writes are always checked against all active metadata";
        hint "l2-cache-size" : Size => "no effect: the cache of mappings has 32 MiB";
        hint "cache-size" : Size => "no effect: the caches have their sizes";
        hint "refcount-cache-size" : Size => "no effect: the cache of refcounts has 4 MiB";
        hint "l2-cache-entry-size" : Size => "no effect: mappings are cached in whole clusters";
        hint "cache-clean-interval" : Size => "no effect: the caches keep what they have";
        hint "pass-discard-snapshot" : Flag => "no effect: snapshots are not deleted while a node is open";
        hint "pass-discard-other" : Flag => "no effect: freed metadata clusters are used again";
    }
}

dolmen_graph::words! {
    enum OverlapCheck { None = "none", Constant = "constant", Cached = "cached", All = "all" }
}

fn parse(options: &mut Options, common: &Common) -> Result<Parsed> {
    let given = Qcow2Options::take(options)?;
    let backing = given.backing.unwrap_or(ChildDef::FromImage);
    let rule = match given.backing_may_change {
        true => AccessRule::FORMAT_OVER_CHANGING,
        false => AccessRule::FORMAT,
    };
    let pass_discard = given.pass_discard.unwrap_or(common.flags.unmap);
    let lazy = given.lazy.unwrap_or(false);
    Ok(Parsed {
        children: vec![
            ChildSpec { name: "file", role: ChildRole::Metadata, def: given.file },
            ChildSpec { name: "backing", role: ChildRole::Backing, def: backing.clone() },
        ],
        rule,
        relies_down_to: None,
        open: Box::new(Open { pass_discard, lazy, rule, backing_from_image: backing == ChildDef::FromImage }),
    })
}

struct Open {
    pass_discard: bool,
    lazy: bool,
    rule: AccessRule,
    backing_from_image: bool,
}

impl Open {
    /// Refuses what images of this version can't have.
    fn check(&self, version: u32) -> Result<()> {
        if self.lazy && version < 3 {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            )
            .remedy("leave out lazy-refcounts: this image is of version 2"));
        }
        Ok(())
    }
}

impl Opener for Open {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            // An inactive image is only looked at: another process may be writing it.
            let writable = !cx.common.flags.read_only && !cx.common.flags.inactive;
            // What a writable image has in memory goes on; of a read-only one there is nothing that is
            // not on disk, so it is read anew. One that becomes inactive has no need to be read at all.
            if let Some(old) = cx.replaced::<Qcow2>()
                && (old.core.writable() || cx.common.flags.inactive)
            {
                let core = old.core.clone();
                self.check(core.geo.version)?;
                let effect = Reopened { core: core.clone(), writable, pass_discard: self.pass_discard };
                return Ok(Opened {
                    effect: Some(Box::new(effect)),
                    ..Opened::of(Arc::new(Qcow2 { kind: &QCOW2, core, rule: self.rule }))
                });
            }
            let core = Core::open(File::new(cx.child("file")?, cx.rt), writable, self.pass_discard).await?;
            self.check(core.geo.version)?;
            let mut implicit = Vec::new();
            let m = core.meta();
            if let (Some(name), true) = (&m.header.backing_file, self.backing_from_image) {
                implicit.push(ImplicitChild {
                    child: "backing",
                    role: ChildRole::Backing,
                    filename: name.clone(),
                    format: m.header.backing_format(),
                });
            }
            drop(m);
            let repair = core.is_dirty().then(|| Box::new(Recount { core: core.clone() }) as Box<dyn Repair>);
            Ok(Opened {
                implicit,
                repair,
                ..Opened::of(Arc::new(Qcow2 { kind: &QCOW2, core, rule: self.rule }))
            })
        })
    }
}
