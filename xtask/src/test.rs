//! `cargo xtask test`: what a change has to pass, on a developer's machine and in CI.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Debian packages with the tools that tests compare with, and a program of each.
const PACKAGES: &[(&str, &str)] = &[
    ("qemu-utils", "qemu-img"),
    ("libnbd-bin", "nbdinfo"),
    ("nbdkit", "nbdkit"),
    ("e2fsprogs", "mke2fs"),
    ("python3-venv", "python3"),
];

/// Runs everything.
pub(crate) fn run() -> Result<(), String> {
    let started = Instant::now();
    packages()?;
    step("format", crate::workspace::cargo().args(["fmt", "--all", "--check"]))?;
    step(
        "lints",
        crate::workspace::cargo().args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ]),
    )?;
    step(
        "documentation",
        crate::workspace::cargo()
            .args(["doc", "--workspace", "--no-deps", "--locked"])
            // Links to private items are for whoever reads the source.
            .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links"),
    )?;
    let nextest = has_nextest();
    step("tests", &mut tests(nextest, &["--workspace"]))?;
    if nextest {
        // nextest has no documentation tests.
        step(
            "documentation tests",
            crate::workspace::cargo().args(["test", "--workspace", "--doc", "--locked"]),
        )?;
    }
    // The same without io_uring, for the crates that wait for anything.
    let waiting = ["-p", "dolmen-rt", "-p", "dolmen-protocols", "-p", "dolmen-exports", "-p", "dolmen"];
    let mut again = tests(nextest, &waiting);
    if nextest {
        // The pair table is about access control, and takes the longest.
        again.args(["-E", "not binary(pairs)"]);
    }
    step("tests without io_uring", again.env("DOLMEN_IO", "threads"))?;
    println!("\n=== storm");
    crate::storm::short()?;
    println!("\nall steps passed in {} s", started.elapsed().as_secs());
    Ok(())
}

fn tests(nextest: bool, which: &[&str]) -> Command {
    let mut c = crate::workspace::cargo();
    c.args(if nextest { &["nextest", "run"][..] } else { &["test"][..] })
        .args(["--locked", "--no-fail-fast"])
        .args(which);
    c
}

fn has_nextest() -> bool {
    crate::workspace::cargo()
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

fn step(name: &str, command: &mut Command) -> Result<(), String> {
    println!("\n=== {name}");
    let started = Instant::now();
    let status = command.status().map_err(|e| format!("{name}: {e}"))?;
    if !status.success() {
        return Err(format!("{name} failed ({status})"));
    }
    println!("=== {name}: {} s", started.elapsed().as_secs());
    Ok(())
}

/// Installs what is missing, where that is possible. Tests that need a tool that is still
/// not there say so.
fn packages() -> Result<(), String> {
    let missing: Vec<&str> = PACKAGES.iter().filter(|(_, p)| !installed(p)).map(|(n, _)| *n).collect();
    let missing = if venv_works() { missing } else { [&missing[..], &["python3-venv"]].concat() };
    if missing.is_empty() {
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        println!("not installed, and there is no apt-get: {}", missing.join(", "));
        return Ok(());
    }
    let apt = || {
        let mut c = if is_root() {
            Command::new("apt-get")
        } else {
            let mut c = Command::new("sudo");
            c.args(["-n", "apt-get"]);
            c
        };
        c.env("DEBIAN_FRONTEND", "noninteractive");
        c
    };
    println!("installing {}", missing.join(", "));
    step("package lists", apt().args(["update", "-q"]))?;
    let mut install = apt();
    install.args(["install", "-q", "-y", "--no-remove", "--no-install-recommends"]).args(&missing);
    step("packages", &mut install)
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout == b"0\n")
}

fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|d| d.join(program).is_file())
}

/// Debian's python3 has no `ensurepip` without python3-venv.
fn venv_works() -> bool {
    Command::new("python3")
        .args(["-c", "import ensurepip"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}
