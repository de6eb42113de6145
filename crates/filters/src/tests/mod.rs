//! Tests of the filters in the simulated runtime, over disks in memory and a stand-in for
//! a format.

mod blkdebug;
mod blkverify;
mod copy_on_read;
mod overlay;
mod preallocate;

use dolmen_graph::Registry;
use dolmen_sim::{Image, Leaf, MEMORY, MemoryDisk};
use dolmen_types::{Options, Value};

static REGISTRY: Registry = Registry::new(&[
    &crate::COPY_ON_READ,
    &crate::BLKDEBUG,
    &crate::BLKVERIFY,
    &crate::PREALLOCATE,
    &overlay::OVERLAY,
    &MEMORY,
]);

/// A disk of `clusters` clusters filled with `byte`, and the leaf for it.
fn disk(name: &'static str, clusters: u64, byte: u8) -> (MemoryDisk, Leaf) {
    let bytes = vec![byte; (clusters * overlay::CLUSTER) as usize];
    let disk = MemoryDisk::new(Image::from_bytes(&bytes));
    (disk.clone(), Leaf::new(name, disk))
}

/// An `overlay` node over leaf `file`.
fn overlay(name: &str, file: &str, backing: Option<Options>, allocated: &[u64]) -> Options {
    let list = allocated.iter().map(|n| Value::from(*n)).collect();
    let options = Options::new()
        .with("driver", "overlay")
        .with("node-name", name)
        .with("file", file)
        .with("allocated", Value::List(list));
    match backing {
        Some(backing) => options.with("backing", backing.into_value()),
        None => options,
    }
}

fn cor(file: Options) -> Options {
    Options::new().with("driver", "copy-on-read").with("file", file.into_value())
}

/// The first byte of each cluster of a disk.
fn clusters(disk: &MemoryDisk) -> Vec<u8> {
    disk.image().to_vec().chunks(overlay::CLUSTER as usize).map(|c| c[0]).collect()
}
