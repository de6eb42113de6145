//! Image files that end early.
//!
//! The story: what a table referred to behind the end of the file read as zeroes, as an image was said to end within
//! its last cluster; so a copy of half an image succeeded, and its second half was empty.

use dolmen_rt::Rt;
use dolmen_sim::{Harness, Image, Leaf, MemoryDisk, Sim};
use dolmen_types::{Actions, Result, WriteFlags};

use crate::repair::{Base, CLUSTER};
use crate::support::{REGISTRY, node, open};
use crate::view::Seen;

async fn open_to_read(rt: &Rt, disk: &MemoryDisk, base: Option<&MemoryDisk>) -> Result<Harness> {
    let mut leaves = vec![Leaf::read_only("leaf", disk.clone())];
    let mut options = node("qcow2", "leaf").with("node-name", "top").with("read-only", true);
    if let Some(base) = base {
        leaves.push(Leaf::read_only("base", base.clone()));
        options.set("backing", node("raw", "base").with("read-only", true).into_value());
    }
    Harness::open(rt, REGISTRY, leaves, options, Actions::D).await
}

/// Every cluster reads as it was, or fails. How many failed.
async fn compare(h: &Harness, was: &[Seen], but: Option<usize>, what: &str) -> usize {
    let mut failed = 0;
    for (i, was) in was.iter().enumerate().filter(|(i, _)| Some(*i) != but) {
        let Ok(got) = h.user().read(i as u64 * CLUSTER, CLUSTER as usize).await else {
            failed += 1;
            continue;
        };
        match was {
            Seen::Data(bytes) => assert!(&got == bytes, "{what}: cluster {i} is something else"),
            Seen::Zero => assert!(got.iter().all(|b| *b == 0), "{what}: cluster {i} is not zero"),
            Seen::Below => {
                assert!(got.iter().all(|b| *b == 11), "{what}: cluster {i} is not the backing file's")
            }
            Seen::Damaged => panic!("{what}: the image was sound"),
        }
    }
    failed
}

#[test]
fn what_is_missing_is_never_zero() {
    for (compat, backed) in [("0.10", false), ("1.1", true)] {
        let image = Base::new(compat, backed);
        let was = std::rc::Rc::new(image.disks(&image.bytes).remove("").expect("the active disk"));
        let base = backed.then(|| MemoryDisk::new(Image::from_bytes(&vec![11; 3 << 20])));
        let mut seen = [0; 4];
        let cuts = (CLUSTER as usize..image.bytes.len()).step_by(CLUSTER as usize);
        for at in cuts.flat_map(|at| [at, at + 1000]).filter(|at| *at < image.bytes.len()) {
            let what = format!("{compat}, cut at {at:#x}");
            let disk = MemoryDisk::new(Image::from_bytes(&image.bytes[..at]));
            let (base, was, said) = (base.clone(), was.clone(), what.clone());
            let came = Sim::run(1, |rt| async move {
                let (base, was, what) = (base.as_ref(), &was[..], &said[..]);
                let read = match open_to_read(&rt, &disk, base).await {
                    Ok(h) => {
                        let failed = compare(&h, was, None, what).await;
                        h.close().await.unwrap();
                        Some(failed)
                    }
                    Err(_) => None,
                };
                // Where it can be written, nothing becomes something else by that.
                let Ok(h) = open(&rt, &disk, base).await else { return (read, false) };
                let last = was.len() - 1;
                let wrote = h.user().write(last as u64 * CLUSTER, &[3; 4096], WriteFlags::NONE).await;
                let _ = h.user().flush().await;
                let _ = h.close().await;
                let h = open_to_read(&rt, &disk, base).await.unwrap();
                compare(&h, was, Some(last), what).await;
                if wrote.is_ok() {
                    assert_eq!(
                        h.user().read(last as u64 * CLUSTER, 4096).await.unwrap(),
                        [3; 4096],
                        "{what}"
                    );
                }
                h.close().await.unwrap();
                (read, wrote.is_ok())
            });
            seen[match came {
                (None, _) => 0,
                (Some(0), false) => 1,
                (Some(0), true) => 2,
                (Some(_), false) => 3,
                (Some(n), true) => panic!("{what}: {n} clusters are missing, and it was written"),
            }] += 1;
        }
        // Cut behind all data, and in the middle of them.
        assert!(seen[0] > 2 && seen[3] > 20, "{seen:?}");
    }
}
