//! blkdebug under a real format: the format comes to its events on every request, also
//! when it could answer from memory.

use dolmen_formats::QCOW2;
use dolmen_graph::Registry;
use dolmen_sim::{Harness, Image, Leaf, MemoryDisk, Sim, create};
use dolmen_types::{Actions, Options, Value, WriteFlags};

static REGISTRY: Registry = Registry::new(&[&QCOW2, &dolmen_filters::BLKDEBUG]);

fn on(event: &str) -> Options {
    Options::new().with("event", event)
}

fn list(rules: Vec<Options>) -> Value {
    Value::List(rules.into_iter().map(Options::into_value).collect())
}

/// What a series of reads (`r`) and writes (`w`) of one sector ends with: `.` success, `!` an
/// error.
fn outcome(set_state: Vec<Options>, inject: Vec<Options>, requests: &'static str) -> String {
    Sim::run(0, move |rt| async move {
        let disk = MemoryDisk::new(Image::new(0));
        let options = Options::new().with("size", 1 << 20);
        create(&rt, &QCOW2, Leaf::new("disk", disk.clone()), options).await.unwrap();
        for debug in [false, true] {
            let mut file = Options::new().with("driver", "blkdebug").with("image", "disk");
            if debug {
                file.set("set-state", list(set_state.clone()));
                file.set("inject-error", list(inject.clone()));
            }
            let stack = Options::new()
                .with("driver", "qcow2")
                .with("file", file.into_value())
                .with("backing", Value::Null);
            let leaves = vec![Leaf::new("disk", disk.clone())];
            let h = Harness::open(&rt, REGISTRY, leaves, stack, Actions::D | Actions::V).await.unwrap();
            let user = h.user();
            if !debug {
                // Allocated, so that nothing else happens in the run that counts.
                user.write(0, &[1; 512], WriteFlags::NONE).await.unwrap();
                h.close().await.unwrap();
                continue;
            }
            let mut out = String::new();
            for request in requests.chars() {
                let ok = match request {
                    'r' => user.read(0, 512).await.is_ok(),
                    _ => user.write(0, &[2; 512], WriteFlags::NONE).await.is_ok(),
                };
                out.push(if ok { '.' } else { '!' });
            }
            return out;
        }
        unreachable!("the second round returns")
    })
}

#[test]
fn states_advance_with_every_read() {
    let step = |from: u64, to: u64| on("read_aio").with("state", from).with("new_state", to);
    let fail = on("read_aio").with("state", 3);
    assert_eq!(outcome(vec![step(1, 2), step(2, 3)], vec![fail], "rrrr"), "..!!");
}

#[test]
fn an_event_with_rules_replaces_what_was_active() {
    let rules = || vec![on("read_aio").with("iotype", "write"), on("write_aio").with("iotype", "read")];
    assert_eq!(outcome(vec![], rules(), "rwr"), "...");
    let once = || vec![on("read_aio").with("once", true), on("write_aio").with("errno", 28)];
    assert_eq!(outcome(vec![], once(), "rrw"), "!.!");
}
