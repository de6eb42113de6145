//! Image locks: against the byte table, against live tools in both directions, and between nodes.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use dolmen_graph::{Implicit, NewImage, NodeOpener, OpenPolicy, Registry, create_image};
use dolmen_rt::Config;
use dolmen_rt::sys::{LockHolder, lock_holders};
use dolmen_types::{Actions, ErrorKind, Options};

use crate::world::{World, on_both};

const D: Actions = Actions::D;
const V: Actions = Actions::V;
const M: Actions = Actions::M;
const S: Actions = Actions::S;
const ALL: Actions = Actions::DATA;

fn file(path: &Path) -> Options {
    Options::new().with("driver", "file").with("node-name", "disk").with("filename", path.to_str().unwrap())
}

fn image() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    (dir, path)
}

/// The locks on a file, as the kernel shows them to everybody.
fn holders(path: &Path) -> Vec<LockHolder> {
    lock_holders(std::fs::File::open(path).unwrap())
}

fn bytes(path: &Path) -> Vec<u64> {
    let mut all: Vec<u64> =
        holders(path).iter().flat_map(|h| &h.ranges).flat_map(|r| r.first..=r.last).collect();
    all.sort_unstable();
    // A process that another test is about to start shares our descriptors until it has.
    all.dedup();
    all
}

/// Every row of the table: what a parent needs and allows, and the bytes that are held.
#[test]
fn the_byte_table() {
    on_both(async |mut w| {
        let (_dir, path) = image();
        w.open(file(&path)).await.unwrap();
        assert_eq!(bytes(&path), [], "a node without parents holds nothing");
        let rows: &[(&str, Actions, Actions, &[u64])] = &[
            ("qcow2, writable", D | V | S, D | M, &[100, 101, 103, 201, 203]),
            ("its backing image", D, D | M, &[100, 201, 203]),
            ("copy-on-read over qcow2", D | V | M | S, D | M, &[100, 101, 102, 103, 201, 203]),
            ("raw under a read-only export", D, ALL - S, &[100, 203]),
            ("raw under a writable export", D | V, ALL - S, &[100, 101, 203]),
            ("nothing allowed", D, Actions::NONE, &[100, 200, 201, 202, 203]),
            ("write unchanged only", M, ALL, &[102]),
        ];
        for (row, needs, allows, want) in rows {
            let edge = w.attach("disk", *needs, *allows).await.unwrap();
            assert_eq!(bytes(&path), *want, "{row}");
            w.detach(&edge).await;
            assert_eq!(bytes(&path), [], "{row}: loosened");
        }
        // Two users: needs are united, allows cut.
        let a = w.attach("disk", D, ALL - S).await.unwrap();
        let b = w.attach("disk", D | V, ALL - S).await.unwrap();
        assert_eq!(bytes(&path), [100, 101, 203]);
        w.detach(&b).await;
        assert_eq!(bytes(&path), [100, 203]);
        w.detach(&a).await;
        w.owner.close().await.unwrap();
        assert_eq!(bytes(&path), []);
    });
}

/// The story: drafts that were given up put back what was held when they began, also what another draft had taken
/// since: a question about one change let go of the locks that another one had just got.
#[test]
fn drafts_end_in_any_order() {
    on_both(async |mut w| {
        let (_dir, path) = image();
        w.open(file(&path)).await.unwrap();
        // Each by itself is possible; whether both may be published is the solver's business.
        let writer = async |w: &World| w.prepared("disk", D | V, ALL).await.unwrap().0;
        let alone = async |w: &World| w.prepared("disk", D, ALL - V).await.unwrap();

        let (a, (b, _)) = (writer(&w).await, alone(&w).await);
        assert_eq!(bytes(&path), [100, 101, 201], "what either wants");
        drop(a);
        assert_eq!(bytes(&path), [100, 201]);
        drop(b);
        assert_eq!(bytes(&path), []);

        let (a, (b, _)) = (writer(&w).await, alone(&w).await);
        drop(b);
        assert_eq!(bytes(&path), [100, 101]);
        drop(a);
        assert_eq!(bytes(&path), []);

        let (a, (b, op)) = (writer(&w).await, alone(&w).await);
        w.owner.commit(b).await.unwrap();
        drop(a);
        assert_eq!(bytes(&path), [100, 201], "what was published stays");
        let edge = w.owner.edges(&op).next().unwrap();
        w.detach(&edge).await;
        assert_eq!(bytes(&path), []);
    });
}

#[test]
fn force_share_and_locking_off() {
    on_both(async |mut w| {
        let (_dir, path) = image();
        w.open(file(&path).with("read-only", true).with("force-share", true)).await.unwrap();
        w.attach("disk", D, D).await.unwrap();
        assert_eq!(bytes(&path), [100]);
        w.owner.close().await.unwrap();
        w.open(file(&path).with("locking", "off")).await.unwrap();
        w.attach("disk", D | V, D).await.unwrap();
        assert_eq!(bytes(&path), []);
    });
}

/// A live tool that holds an image, until it is dropped.
struct Peer {
    child: Child,
}

impl Peer {
    /// An interactive qemu-io with the image open.
    fn io(args: &[&str], path: &Path) -> Peer {
        let mut child = Command::new("qemu-io")
            .args(["-f", "raw"])
            .args(args)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io is installed");
        // It answers once the image is open.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        while !line.contains("1 MiB") {
            line.clear();
            assert!(out.read_line(&mut line).unwrap() > 0, "qemu-io ended");
        }
        child.stdout = Some(out.into_inner());
        Peer { child }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tools_are_here() -> bool {
    let here = Command::new("qemu-io").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !here {
        eprintln!("skipped: qemu-io is not installed");
    }
    here
}

/// A live tool holds the image: we refuse, name it, and leave no lock behind.
#[test]
fn a_tool_holds_the_image() {
    if !tools_are_here() {
        return;
    }
    on_both(async |mut w| {
        let (_dir, path) = image();
        let peer = Peer::io(&[], &path);
        let before = bytes(&path);
        assert!(before.contains(&101), "{before:?}");
        w.open(file(&path)).await.unwrap();
        let e = w.attach("disk", D | V, ALL - V).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Locked);
        let c = e.conflict().expect("both parties as data");
        assert_eq!(c.actions, V);
        assert_eq!(c.asks.id, peer.child.id().to_string());
        assert!(c.asks.detail.contains("qemu-io"), "{e}");
        assert!(c.asks.needs.contains(V));
        assert_eq!(c.denies.kind, "node");
        assert!(e.to_string().contains(&peer.child.id().to_string()), "{e}");
        assert_eq!(bytes(&path), before, "nothing of ours is left");
        // What gets along is granted.
        w.attach("disk", D | V, ALL).await.unwrap();
        drop(peer);
        w.attach("disk", D, ALL - S).await.unwrap();
    });
}

/// A storage daemon, until it is dropped.
struct Daemon {
    pid: String,
}

impl Daemon {
    fn start(dir: &Path, args: &[String]) -> Daemon {
        let pidfile = dir.join("daemon.pid");
        // It returns once everything is set up.
        let status = Command::new("qemu-storage-daemon")
            .arg("--daemonize")
            .arg("--pidfile")
            .arg(&pidfile)
            .args(args)
            .status()
            .unwrap();
        assert!(status.success());
        Daemon { pid: std::fs::read_to_string(&pidfile).unwrap().trim().to_owned() }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-KILL", &self.pid]).status();
    }
}

/// The rows of the table are what QEMU's daemon holds. Then we ask for the same, and where that gets along the
/// bytes stay the same.
#[test]
fn the_table_is_the_daemon_s() {
    if !tools_are_here() {
        return;
    }
    let export =
        |node: &str, writable: &str| format!("type=nbd,id=e,node-name={node},name=e,writable={writable}");
    let rows: [(&str, &str, &[u64]); 4] = [
        ("raw", "off", &[100, 203]),
        ("raw", "on", &[100, 101, 203]),
        ("qcow2", "off", &[100, 101, 103, 201, 203]),
        ("qcow2", "on", &[100, 101, 103, 201, 203]),
    ];
    for (format, writable, want) in rows {
        let (dir, path) = image();
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&path)
            .arg("1M")
            .status()
            .unwrap();
        assert!(made.success());
        let daemon = Daemon::start(
            dir.path(),
            &[
                "--blockdev".into(),
                format!("driver=file,node-name=f,filename={}", path.display()),
                "--blockdev".into(),
                format!("driver={format},node-name=n,file=f"),
                "--nbd-server".into(),
                format!("addr.type=unix,addr.path={}", dir.path().join("s").display()),
                "--export".into(),
                export("n", writable),
            ],
        );
        assert_eq!(bytes(&path), want, "{format}, writable={writable}");
        let pid = daemon.pid.clone();
        dolmen_rt::block_on(|rt| async move {
            let mut w = World::new(rt);
            w.open(file(&path)).await.unwrap();
            let shares_writing = !want.contains(&201);
            match w.attach("disk", D | V, ALL - S).await {
                Ok(edge) => {
                    assert!(shares_writing);
                    assert_eq!(bytes(&path), [100, 101, 203]);
                    w.detach(&edge).await;
                    assert_eq!(bytes(&path), want);
                }
                Err(e) => {
                    assert!(!shares_writing, "{e}");
                    assert_eq!(e.conflict().unwrap().denies.id, pid);
                    assert_eq!(bytes(&path), want);
                }
            }
        });
    }
}

/// The other way round: a tool is refused what we do not allow, and gets what we do.
#[test]
fn we_hold_the_image() {
    if !tools_are_here() {
        return;
    }
    on_both(async |mut w| {
        let (_dir, path) = image();
        w.open(file(&path)).await.unwrap();
        let edge = w.attach("disk", D | V | S, D | M).await.unwrap();
        let run = |args: &[&str]| {
            let out = Command::new("qemu-io")
                .args(["-f", "raw"])
                .args(args)
                .args(["-c", "length"])
                .arg(&path)
                .output()
                .unwrap();
            (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
        };
        let (ok, text) = run(&[]);
        assert!(!ok && text.contains("Failed to get \"write\" lock"), "{text}");
        let (ok, text) = run(&["-r", "-U"]);
        assert!(ok, "{text}");
        w.detach(&edge).await;
        let (ok, text) = run(&[]);
        assert!(ok, "{text}");
    });
}

/// A program with the whole file locked exclusively.
#[test]
fn a_tool_that_locks_everything() {
    if !tools_are_here() {
        return;
    }
    on_both(async |mut w| {
        let (_dir, path) = image();
        let mut child = Command::new("python3")
            .arg("-c")
            .arg("import fcntl,sys; f=open(sys.argv[1],'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); print('ready', flush=True); sys.stdin.read()")
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        w.open(file(&path)).await.unwrap();
        let e = w.attach("disk", D, ALL).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Locked);
        assert!(e.to_string().contains(&child.id().to_string()), "{e}");
        drop(child.stdin.take());
        child.wait().unwrap();
        w.attach("disk", D, ALL).await.unwrap();
    });
}

/// Two nodes on one file meet by name, also without locks.
#[test]
fn two_nodes_on_one_file() {
    on_both(async |mut w| {
        for locking in ["on", "off"] {
            let (_dir, path) = image();
            w.open(file(&path).with("locking", locking)).await.unwrap();
            w.open(file(&path).with("node-name", "again").with("locking", locking)).await.unwrap();
            let writer = w.attach("disk", D | V, ALL - V).await.unwrap();
            let e = w.attach("again", D | V, ALL).await.unwrap_err();
            let c = e.conflict().unwrap();
            assert_eq!((c.asks.id.as_str(), c.denies.id.as_str()), ("again", "disk"), "{e}");
            // Reading gets along with that.
            let reader = w.attach("again", D, ALL).await.unwrap();
            w.detach(&writer).await;
            w.detach(&reader).await;
            w.attach("again", D | V, ALL).await.unwrap();
            w.attach("disk", D | V, ALL).await.unwrap();
            w.owner.close().await.unwrap();
        }
    });
}

/// Two processes that start at the same moment: taking before testing lets them see each other and both fail, so both
/// try again. In the end exactly one has the image.
#[test]
fn simultaneous_starters() {
    let (_dir, path) = image();
    for _ in 0..5 {
        // Real processes: the table of one process would tell its nodes apart at once.
        let start = |_: u32| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "locks::helper_take_and_hold", "--ignored", "--nocapture"])
                .env("DOLMEN_TEST_IMAGE", &path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let mut children: Vec<Child> = (0..2).map(start).collect();
        let mut outs: Vec<_> =
            children.iter_mut().map(|c| BufReader::new(c.stdout.take().unwrap()).lines()).collect();
        let mut granted = 0;
        for out in &mut outs {
            let answer = out
                .by_ref()
                .map_while(Result::ok)
                .find_map(|l| l.split("answer: ").nth(1).map(str::to_owned))
                .expect("an answer");
            granted += u32::from(answer == "granted");
        }
        for c in &mut children {
            drop(c.stdin.take());
        }
        outs.into_iter().for_each(|o| o.for_each(drop));
        children.iter_mut().for_each(|c| assert!(c.wait().unwrap().success()));
        assert_eq!(granted, 1, "exactly one of two writers gets the image");
    }
}

/// Not a test of its own: one process of [`simultaneous_starters`].
#[test]
#[ignore = "run by simultaneous_starters"]
fn helper_take_and_hold() {
    let Some(path) = std::env::var_os("DOLMEN_TEST_IMAGE") else { return };
    dolmen_rt::block_on_with(&Config::default(), |rt| async move {
        let mut w = World::new(rt);
        w.open(file(Path::new(&path))).await.unwrap();
        let answer = match w.attach("disk", D | V, ALL - V).await {
            Ok(_) => "granted",
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::Locked);
                "refused"
            }
        };
        println!("answer: {answer}");
        // Until the other one has its answer as well.
        w.io()
            .blocking(dolmen_rt::WaitsFor::Host, || std::io::stdin().read_line(&mut String::new()))
            .await
            .unwrap();
    })
    .unwrap();
}

/// A file that is in use is not emptied, and whatever is wrong is found before the file is touched.
#[test]
fn creating_over_an_image_in_use() {
    on_both(async |mut w| {
        let (_dir, path) = image();
        std::fs::write(&path, b"precious").unwrap();
        w.open(file(&path)).await.unwrap();
        let edge = w.attach("disk", D, D).await.unwrap();
        let rt = w.rt.clone();
        let policy = OpenPolicy { implicit: Implicit::Deny, probe: false, permit_with: "", probe_with: "" };
        let registry = Registry::new(dolmen_protocols::DRIVERS);
        let opener = NodeOpener { registry, policy, names: dolmen_graph::Registry::protocol_name, rt: &rt };
        let image = |options: Options| NewImage {
            beneath: None,
            file: Options::new().with("driver", "file").with("filename", path.to_str().unwrap()),
            format: None,
            options,
        };
        let sized = || Options::new().with("size", "64k");
        let e = create_image(&opener, image(sized())).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Locked, "{e}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        w.detach(&edge).await;
        w.owner.close().await.unwrap();
        let e = create_image(&opener, image(sized().with("nonsense", 1u64))).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        create_image(&opener, image(sized())).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![0; 65536]);
        assert_eq!(bytes(&path), []);
    });
}
