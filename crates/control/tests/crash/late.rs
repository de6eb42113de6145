//! Commands while a write that was given up is still on its way to the disk.

use std::time::Duration;

use dolmen_sim::{DiskConfig, Oracle, Sim, SimDisk, User};
use dolmen_types::{Actions, Options, Span, Value, WriteFlags};

use crate::world::{World, image_node, make_image};

const CLUSTER: u64 = 4096;
const SIZE: u64 = 16 * CLUSTER;
/// A second of the simulation.
const LONG: Duration = Duration::from_secs(1);

/// What is asked for, as a command; `None` for the end of the program.
type Ask = Option<(&'static str, fn() -> Options)>;

fn by_name() -> Options {
    Options::new().with("node-name", "a")
}

/// The same images, but read-only.
fn read_only() -> Options {
    let option = image_node("a").with("backing", Value::Null).with("read-only", true).into_value();
    Options::new().with("options", Value::List(vec![option]))
}

const COMMANDS: [(&str, bool, Ask); 5] = [
    ("reopen", true, Some(("blockdev-reopen", read_only))),
    ("hand over", true, Some(("blockdev-set-active", || by_name().with("active", false)))),
    ("remove", true, Some(("blockdev-del", by_name))),
    (
        "snapshot",
        false,
        Some(("blockdev-snapshot", || Options::new().with("node", "a").with("overlay", "b"))),
    ),
    ("quit", false, None),
];

/// The story: a guest gave up a write, and while the disk still had it the node was reopened, handed to another process,
/// removed, or the program ended: the data landed on a disk that belonged to somebody else by then.
#[test]
fn commands_wait_for_what_was_given_up() {
    for (what, gone, ask) in COMMANDS {
        Sim::run(1, move |rt| async move {
            let world = World::new(&rt, Oracle::new(Vec::new()), DiskConfig::default(), false);
            let image =
                make_image(&rt, CLUSTER, SIZE, None, &[(0, vec![1; CLUSTER as usize])]).await.unwrap();
            world.add_disk("a", image);
            let image = make_image(&rt, CLUSTER, SIZE, Some("a"), &[]).await.unwrap();
            world.add_disk("b", image);
            for node in ["a", "b"] {
                let options = image_node(node).with("backing", Value::Null);
                world.ask("blockdev-add", options).await.unwrap().unwrap();
            }
            let edge = world.attach("guest", "a", Actions::D | Actions::V).await.unwrap();
            let disk: SimDisk = world.disks.borrow()[0].1.clone();
            let user = User::new(edge.clone(), rt.clone());
            // The disk has it, and takes its time.
            disk.hold(Span::new(0, 1 << 40));
            let held = async {
                while disk.held() == 0 {
                    rt.sleep(Duration::from_nanos(10)).await;
                }
                Ok(())
            };
            let write = user.write(0, &[2; 512], WriteFlags::NONE);
            futures_lite::future::or(write, held).await.unwrap();
            disk.hold_no_more();
            drop(user);
            assert_eq!(edge.given_up(), 1);
            let before = disk.image().to_vec();
            let (began, later, lets_go) = (rt.now(), rt.clone(), disk.clone());
            rt.spawn(async move {
                later.sleep(LONG).await;
                assert!(lets_go.image().to_vec() == before, "it has not landed yet");
                lets_go.let_go();
            });
            if gone {
                // The user goes, too. What it has given up is in flight all the same.
                drop(edge);
                world.detach("guest").await;
            }
            match ask {
                Some((name, arguments)) => {
                    world
                        .ask(name, arguments())
                        .await
                        .unwrap()
                        .unwrap_or_else(|e| panic!("{what}: {}", e.desc));
                }
                None => {
                    world.control.quit();
                    world.control.ended().await;
                }
            }
            assert!(rt.now().since(began) >= LONG, "{what} came before the write had landed");
            assert_eq!(disk.held(), 0);
        });
    }
}
