use dolmen_sim::{Harness, Leaf, MemoryDisk, Sim, SimDisk};
use dolmen_types::{Actions, Claim, OpKind, Options, Span, Value, WriteFlags};

use super::overlay::CLUSTER;
use super::{REGISTRY, clusters, cor, disk, overlay};

fn blkdebug(image: &str) -> Options {
    Options::new().with("driver", "blkdebug").with("image", image)
}

fn rules(list: &[Options]) -> Value {
    Value::List(list.iter().cloned().map(Options::into_value).collect())
}

fn on(event: &str) -> Options {
    Options::new().with("event", event)
}

const ALL: Actions = Actions::DATA;

#[test]
fn requests_fail_as_the_rules_say() {
    let (_, leaf) = disk("d", 1, 7);
    Sim::run(0, |rt| async move {
        let options = blkdebug("d").with(
            "inject-error",
            rules(&[
                on("none").with("iotype", "read").with("sector", 2).with("once", true).with("errno", 28),
                on("flush_to_disk").with("iotype", "flush").with("immediately", true),
            ]),
        );
        let h = Harness::open(&rt, REGISTRY, vec![leaf], options, ALL).await.unwrap();
        let user = h.user();
        assert_eq!(user.read(0, 1024).await.unwrap(), vec![7; 1024]);
        user.write(1024, &[8; 512], WriteFlags::NONE).await.unwrap();
        let e = user.read(1000, 100).await.unwrap_err();
        assert_eq!(e.errno(), 28);
        assert!(e.to_string().contains("injected error in a read"), "{e}");
        assert_eq!(user.read(1024, 512).await.unwrap(), vec![8; 512]);
        assert_eq!(user.flush().await.unwrap_err().errno(), 5);
        user.resize(8192).await.unwrap();
        assert_eq!(user.size(), 8192);
    });
}

/// The event comes from above, through a filter: the write of a copy fails, and with it the read.
#[test]
fn events_come_from_the_node_above() {
    let (_, base) = disk("base", 2, 1);
    let (_, file) = disk("f", 2, 0);
    Sim::run(0, |rt| async move {
        let pass = Options::new().with("driver", "blkdebug").with("image", "f").into_value();
        let debug = blkdebug("f")
            .with("image", pass)
            .with("node-name", "debug")
            .with("inject-error", rules(&[on("write_aio").with("once", true).with("iotype", "write")]));
        let backing = overlay("b", "base", None, &[0, 1]);
        let mut top = overlay("top", "debug", Some(backing), &[]);
        top.set("file", debug.into_value());
        let h = Harness::open(&rt, REGISTRY, vec![base, file], cor(top), Actions::D).await.unwrap();
        let user = h.user();
        user.read(0, 512).await.unwrap_err();
        assert_eq!(user.read(0, 512).await.unwrap(), vec![1; 512]);
    });
}

/// Between copy-on-read and the image: what fails is the write of the copy, and of the rest of what is read nothing.
#[test]
fn the_write_of_a_copy_fails_where_copies_would_pass() {
    let read = |errors: Vec<Options>, at: u64, len: usize| {
        let (_, base) = disk("base", 4, 1);
        let (top, file) = disk("f", 4, 0);
        let outcome = Sim::run(0, move |rt| async move {
            let backing = overlay("b", "base", None, &[0, 1, 2, 3]);
            let image = overlay("top", "f", Some(backing), &[1]);
            let debug = blkdebug("").with("image", image.into_value()).with("inject-error", rules(&errors));
            let h = Harness::open(&rt, REGISTRY, vec![base, file], cor(debug), Actions::D).await.unwrap();
            h.user().read(at, len).await.map_err(|e| e.errno())
        });
        (outcome, clusters(&top))
    };
    let c = CLUSTER as usize;
    let write = |sector: u64| vec![on("cor_write").with("once", true).with("sector", sector)];
    let (sectors, mid) = (CLUSTER / 512, CLUSTER + 512);
    // A byte in the first cluster: all of it is copied.
    assert_eq!(read(write(sectors - 1), 0, 1), (Err(5), vec![0; 4]));
    assert_eq!(read(vec![on("cor_write").with("iotype", "read")], 0, 1).0, Ok(vec![1]));
    // What is there is not written again: the rule about it waits in vain.
    let (data, on_disk) = read(write(sectors), mid, c);
    assert_eq!(data.unwrap()[..c - 512], vec![0; c - 512]);
    assert_eq!(on_disk, [0, 0, 1, 0]);
    assert_eq!(read(write(2 * sectors), mid, c), (Err(5), vec![0; 4]));
    // Rules that are active anyway meet the copy, too.
    let any = |io: &str| vec![on("none").with("iotype", io).with("errno", 28)];
    assert_eq!(read(any("write"), 0, 1).0, Err(28));
    assert_eq!(read(any("read"), 0, 1).0, Err(28));
    assert_eq!(read(any("discard"), 0, 1).0, Ok(vec![1]));
}

#[test]
fn permissions_are_taken_and_kept_from_others() {
    let attempt = |held: &'static str, words: &'static [&'static str], other: Actions| {
        let (_, leaf) = disk("d", 1, 7);
        Sim::run(0, move |rt| async move {
            let words = Value::List(words.iter().map(|w| Value::from(*w)).collect());
            let options = blkdebug("d").with("node-name", "debug").with(held, words);
            let h = Harness::open(&rt, REGISTRY, vec![leaf], options, Actions::NONE).await.unwrap();
            let edge = h.top().children[0].claim;
            (edge.needs, Actions::DATA - edge.allows, edge.denied_by(Claim { needs: other, allows: !other }))
        })
    };
    const D: Actions = Actions::D;
    let (needs, denies, denied) = attempt("take-child-perms", &["write", "write", "resize"], Actions::V);
    assert_eq!((needs, denies), (Actions::V | Actions::S, Actions::NONE));
    assert_eq!(denied, Actions::V, "who does not allow writes is in its way");
    let (needs, denies, _) = attempt("unshare-child-perms", &["consistent-read", "write-unchanged"], D);
    assert_eq!((needs, denies), (Actions::NONE, D | Actions::M));
    assert_eq!(attempt("take-child-perms", &[], D).0, Actions::NONE);
}

#[test]
fn alignment_and_limits_shape_what_the_child_sees() {
    let sim = SimDisk::new(dolmen_sim::Image::from_bytes(&[7; 16384]), Default::default());
    let seen = sim.clone();
    Sim::run(0, |rt| async move {
        let options = blkdebug("d").with("align", 4096).with("max-transfer", 4096).with("max-discard", "8k");
        let leaf = Leaf::new("d", sim);
        let h = Harness::open(&rt, REGISTRY, vec![leaf], options, ALL).await.unwrap();
        assert_eq!(h.top().driver.limits(&h.top()).request_alignment, 4096);
        let user = h.user();
        user.read(0, 16384).await.unwrap();
        assert_eq!(seen.count(OpKind::Read), 4);
        // The last byte of one block, a whole one, and the first of another: two blocks are
        // read, changed and written.
        user.write(4095, &[1; 4098], WriteFlags::NONE).await.unwrap();
        assert_eq!((seen.count(OpKind::Read), seen.count(OpKind::Write)), (6, 3));
        let mut expected = vec![7; 16384];
        expected[4095..8193].fill(1);
        assert_eq!(user.read(0, 16384).await.unwrap(), expected);
        user.write_zeroes(Span::new(8192, 100), WriteFlags::NONE).await.unwrap();
        expected[8192..8292].fill(0);
        assert_eq!(user.read(8190, 1000).await.unwrap(), expected[8190..9190]);
        // Parts of blocks can't be discarded, whole ones can.
        user.discard(Span::new(1, 16383)).await.unwrap();
        assert_eq!(seen.count(OpKind::Discard), 2);
    });
}

#[test]
fn wrong_options_are_refused() {
    let refused = |options: Options| {
        Sim::run(0, |rt| async move {
            let leaf = Leaf::new("d", MemoryDisk::new(dolmen_sim::Image::new(512)));
            Harness::open(&rt, REGISTRY, vec![leaf], options, Actions::D).await.unwrap_err().to_string()
        })
    };
    for (options, says) in [
        (blkdebug("d").with("align", 1000), "Cannot meet constraints with align 1000"),
        (blkdebug("d").with("align", 4096).with("max-transfer", 2048), "with max-transfer 2048"),
        (blkdebug("d").with("opt-write-zero", 65536).with("max-write-zero", 1000), "max-write-zero 1000"),
        (
            blkdebug("d").with("take-child-perms", Value::List(vec!["bogus".into()])),
            "'take-child-perms' does not accept value 'bogus'",
        ),
        (blkdebug("d").with("inject-error", rules(&[on("bogus")])), "invalid parameter value: bogus"),
        (blkdebug("d").with("config", "/x"), "Could not read blkdebug config file"),
        (blkdebug("d").with("bogus", true), "has no option 'bogus'"),
    ] {
        let e = refused(options);
        assert!(e.contains(says), "{e}");
    }
}

/// The one thing that needs real files.
#[test]
fn rules_come_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rules.cfg");
    std::fs::write(&path, "[inject-error]\nevent = \"none\"\niotype = \"write\"\nerrno = \"28\"\n").unwrap();
    let config = path.to_str().unwrap().to_owned();
    dolmen_rt::block_on(|rt| async move {
        let (_, leaf) = disk("d", 1, 7);
        let options = blkdebug("d").with("config", config.as_str());
        let h = Harness::open(&rt, REGISTRY, vec![leaf], options, ALL).await.unwrap();
        assert_eq!(h.user().write(0, &[1; 512], WriteFlags::NONE).await.unwrap_err().errno(), 28);
        assert_eq!(h.user().read(0, 512).await.unwrap(), vec![7; 512]);
        h.close().await.unwrap();

        let (_, leaf) = disk("d", 1, 7);
        let options = blkdebug("d").with("config", format!("{config}.not"));
        let e = Harness::open(&rt, REGISTRY, vec![leaf], options, ALL).await.unwrap_err();
        assert!(e.to_string().contains("Could not read blkdebug config file"), "{e}");
        assert_eq!(e.errno(), 2);
    });
}
