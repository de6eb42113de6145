//! Images in memory, the installed tools, and files between them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use dolmen_formats::{DRIVERS, QCOW2};
use dolmen_graph::{ChildEdge, CreateCx, Registry};
use dolmen_rt::Rt;
use dolmen_sim::{Harness, Image, Leaf, MemoryDisk};
use dolmen_types::{Actions, ChildRole, Claim, Options, Result, Value};

pub(crate) const REGISTRY: Registry = Registry::new(DRIVERS);

/// D, V, M and S.
pub(crate) const EVERYTHING: Actions = Actions::DATA;

pub(crate) fn node(driver: &str, file: &str) -> Options {
    Options::new().with("driver", driver).with("file", file)
}

/// An edge to a leaf with every access, as image tools have it.
pub(crate) async fn edge_to(rt: &Rt, disk: &MemoryDisk) -> (Harness, ChildEdge) {
    let leaves = vec![Leaf::new("leaf", disk.clone())];
    let h = Harness::open(rt, REGISTRY, leaves, node("raw", "leaf"), EVERYTHING).await.unwrap();
    let claim = Claim { needs: EVERYTHING, allows: EVERYTHING };
    let edge = ChildEdge { name: "file", role: ChildRole::Metadata, node: h.top(), claim };
    (h, edge)
}

/// Makes an image in a new disk.
pub(crate) async fn create(rt: &Rt, options: Options) -> Result<MemoryDisk> {
    let disk = MemoryDisk::new(Image::new(0));
    let (h, edge) = edge_to(rt, &disk).await;
    let create = QCOW2.create.expect("qcow2 can be created");
    let cx = CreateCx { file: Some(&edge), fixed: false, rt };
    let result = match create(options) {
        Ok(creation) => creation.make(cx).await,
        Err(e) => Err(e),
    };
    drop(edge);
    h.close().await?;
    result.map(|()| disk)
}

/// Opens an image in a disk, over a raw backing disk if there is one.
pub(crate) async fn open(rt: &Rt, disk: &MemoryDisk, base: Option<&MemoryDisk>) -> Result<Harness> {
    let mut leaves = vec![Leaf::new("leaf", disk.clone())];
    let mut options = node("qcow2", "leaf").with("node-name", "top").with("discard", "unmap");
    match base {
        Some(base) => {
            leaves.push(Leaf::read_only("base", base.clone()));
            options.set("backing", node("raw", "base").with("read-only", true).into_value());
        }
        None => options.set("backing", Value::Null),
    }
    Harness::open(rt, REGISTRY, leaves, options, EVERYTHING).await
}

/// A private directory with images for the tools.
pub(crate) struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    pub(crate) fn new() -> Files {
        Files { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes what a disk holds to a file.
    pub(crate) fn put(&self, name: &str, disk: &MemoryDisk) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, disk.image().to_vec()).unwrap();
        path
    }

    /// A disk with the content of a file.
    pub(crate) fn get(&self, name: &str) -> MemoryDisk {
        MemoryDisk::new(Image::from_bytes(&std::fs::read(self.path(name)).unwrap()))
    }
}

/// Runs a tool and returns what came of it.
pub(crate) fn run(tool: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let mut c = Command::new(tool);
    for a in args {
        c.arg(a.as_ref());
    }
    c.output().unwrap_or_else(|e| panic!("{tool} is needed for this test: {e}"))
}

/// Runs a tool that must succeed, and returns its output.
pub(crate) fn must(tool: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let out = run(tool, args);
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{tool} failed with {}:\n{text}", out.status);
    text
}

/// The installed tool finds nothing wrong with an image.
pub(crate) fn assert_clean(path: &Path) {
    must("qemu-img", &[&"check", &"-f", &"qcow2", &path]);
}

/// What a guest reads from an image, according to the installed tool.
pub(crate) fn guest_view(files: &Files, path: &Path) -> Vec<u8> {
    let raw = files.path("guest.raw");
    must("qemu-img", &[&"convert", &"-f", &"qcow2", &"-O", &"raw", &path, &raw]);
    std::fs::read(raw).unwrap()
}

/// The result of Dolmen's own check.
pub(crate) async fn own_check(rt: &Rt, disk: &MemoryDisk) -> dolmen_graph::CheckResult {
    let (h, edge) = edge_to(rt, disk).await;
    let cx = CreateCx { file: Some(&edge), fixed: false, rt };
    let r = dolmen_formats::qcow2::check(cx.read().unwrap()).await.unwrap();
    drop(edge);
    h.close().await.unwrap();
    r
}

/// The same with repairs.
pub(crate) async fn own_repair(
    rt: &Rt,
    disk: &MemoryDisk,
    repair: dolmen_graph::RepairWhat,
) -> dolmen_graph::CheckResult {
    let (h, edge) = edge_to(rt, disk).await;
    let cx = CreateCx { file: Some(&edge), fixed: false, rt };
    let io = (cx.read().unwrap(), cx.write().unwrap(), cx.resize().unwrap());
    let r = dolmen_formats::qcow2::check_and_repair(io.0, io.1, io.2, repair).await.unwrap();
    drop(edge);
    h.close().await.unwrap();
    r
}
