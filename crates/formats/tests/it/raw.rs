//! The raw driver: a pass-through, a window, and a guess that must stay true.

use dolmen_sim::{Harness, Image, Leaf, MemoryDisk, Sim};
use dolmen_types::{ErrorKind, Options, Result, WriteFlags};

use crate::support::{EVERYTHING, REGISTRY, node};

async fn open(rt: &dolmen_rt::Rt, disk: &MemoryDisk, options: Options) -> Result<Harness> {
    Harness::open(rt, REGISTRY, vec![Leaf::new("leaf", disk.clone())], options, EVERYTHING).await
}

#[test]
fn a_window_shows_its_part_and_no_more() {
    Sim::run(1, |rt| async move {
        let disk = MemoryDisk::new(Image::from_bytes(&[1; 4096]));
        let h = open(&rt, &disk, node("raw", "leaf").with("offset", 1024u64).with("size", 2048u64))
            .await
            .unwrap();
        let user = h.user();
        assert_eq!(user.size(), 2048);
        user.write(0, &[2; 2048], WriteFlags::NONE).await.unwrap();
        assert!(user.read(2000, 100).await.is_err(), "beyond the window");
        assert_eq!(user.resize(4096).await.unwrap_err().kind(), ErrorKind::Unsupported);
        drop(user);
        h.close().await.unwrap();
        let bytes = disk.image().to_vec();
        assert!(bytes[..1024].iter().chain(&bytes[3072..]).all(|b| *b == 1));
        assert!(bytes[1024..3072].iter().all(|b| *b == 2));
        for (offset, size) in [(4097u64, 0u64), (4000, 97), (u64::MAX >> 1, 1)] {
            let e = open(&rt, &disk, node("raw", "leaf").with("offset", offset).with("size", size)).await;
            assert_eq!(e.unwrap_err().kind(), ErrorKind::InvalidInput, "{offset}+{size}");
        }
    });
}

#[test]
fn a_window_without_a_size_grows_with_its_file() {
    Sim::run(1, |rt| async move {
        let disk = MemoryDisk::new(Image::from_bytes(&[1; 4096]));
        let h = open(&rt, &disk, node("raw", "leaf").with("offset", 1024u64)).await.unwrap();
        assert_eq!(h.user().size(), 3072);
        h.user().resize(5120).await.unwrap();
        assert_eq!((h.user().size(), disk.image().size()), (5120, 6144));
        h.close().await.unwrap();
    });
}

#[test]
fn a_guessed_raw_image_can_not_become_another_format() {
    Sim::run(1, |rt| async move {
        let disk = MemoryDisk::new(Image::from_bytes(&[0; 4096]));
        let h = open(&rt, &disk, node("raw", "leaf").with("x-probed", true)).await.unwrap();
        let user = h.user();
        let e = user.write(0, b"QFI\xfb\0\0\0\x03", WriteFlags::NONE).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::PermissionDenied);
        assert_eq!(e.remedy_text(), Some("open the image with driver=raw"));
        // Not in two halves either.
        user.write(0, b"QF", WriteFlags::NONE).await.unwrap();
        assert!(user.write(2, b"I\xfb", WriteFlags::NONE).await.is_err());
        user.write(2, b"xx", WriteFlags::NONE).await.unwrap();
        user.write(512, b"QFI\xfb", WriteFlags::NONE).await.unwrap();
        drop(user);
        h.close().await.unwrap();
        let h = open(&rt, &disk, node("raw", "leaf")).await.unwrap();
        h.user().write(0, b"QFI\xfb", WriteFlags::NONE).await.unwrap();
        h.close().await.unwrap();
    });
}
