//! Images of the installed tools.

use dolmen_sim::Sim;
use dolmen_types::Options;

use crate::support::{Files, assert_clean, create, must, open, own_check};

#[test]
fn images_of_the_installed_tool_are_read_and_written() {
    for bits in 9..=21u32 {
        let files = Files::new();
        let path = files.path("x.qcow2");
        let cluster = format!("cluster_size={}", 1u64 << bits);
        must("qemu-img", &[&"create", &"-f", &"qcow2", &"-o", &cluster, &path, &"5M"]);
        must(
            "qemu-io",
            &[
                &"-f",
                &"qcow2",
                &"-c",
                &"write -P 17 100k 300k",
                &"-c",
                &"write -z 200k 64k",
                &"-c",
                &"write -P 19 4M 1M",
                &path,
            ],
        );
        let disk = files.get("x.qcow2");
        Sim::run(1, |rt| async move {
            let check = own_check(&rt, &disk).await;
            assert_eq!((check.corruptions, check.leaks), (0, 0), "{:?}", check.messages);
            let h = open(&rt, &disk, None).await.unwrap();
            let user = h.user();
            let mut want = vec![0u8; 5 << 20];
            want[100 << 10..400 << 10].fill(17);
            want[200 << 10..264 << 10].fill(0);
            want[4 << 20..].fill(19);
            assert!(user.read(0, 5 << 20).await.unwrap() == want);
            user.write(150 << 10, &[5; 5000], Default::default()).await.unwrap();
            user.write(2 << 20, &[6; 70000], Default::default()).await.unwrap();
            drop(user);
            h.close().await.unwrap();
            files.put("x.qcow2", &disk);
            assert_clean(&files.path("x.qcow2"));
            must(
                "qemu-io",
                &[
                    &"-f",
                    &"qcow2",
                    &"-c",
                    &"read -P 5 150k 5000",
                    &"-c",
                    &"read -P 6 2M 70000",
                    &"-c",
                    &"read -P 17 100k 50k",
                    &"-c",
                    &"read -P 19 4M 1M",
                    &files.path("x.qcow2"),
                ],
            );
        });
    }
}

#[test]
fn new_images_are_what_the_installed_tool_expects() {
    for (options, expect) in [
        (Options::new(), "\"compat\": \"1.1\""),
        (Options::new().with("compat", "0.10"), "\"compat\": \"0.10\""),
        (Options::new().with("lazy_refcounts", true), "\"lazy-refcounts\": true"),
        (Options::new().with("refcount_bits", 1u64), "\"refcount-bits\": 1"),
        (Options::new().with("preallocation", "metadata"), "\"virtual-size\": 104857600"),
        (
            Options::new().with("preallocation", "metadata").with("cluster_size", 512u64),
            "\"cluster-size\": 512",
        ),
        (Options::new().with("preallocation", "falloc").with("compat", "v2"), "\"compat\": \"0.10\""),
        (
            Options::new().with("preallocation", "full").with("cluster_size", "2M"),
            "\"cluster-size\": 2097152",
        ),
    ] {
        let files = Files::new();
        let o = options.clone().with("size", "100M");
        let disk = Sim::run(1, |rt| async move { create(&rt, o).await.unwrap() });
        let path = files.put("x.qcow2", &disk);
        assert_clean(&path);
        let info = must("qemu-img", &[&"info", &"--output=json", &path]);
        assert!(info.contains(expect), "{info}");
    }
}
