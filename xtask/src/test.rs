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
    test_step("tests", &mut tests(nextest, &["--workspace"]))?;
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
    test_step("tests without io_uring", again.env("DOLMEN_IO", "threads"))?;
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

/// A step that runs tests: what it prints is passed on, and the names of those that fail are what is said last.
fn test_step(name: &str, command: &mut Command) -> Result<(), String> {
    println!("\n=== {name}");
    let started = Instant::now();
    let spawned = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|e| format!("{name}: {e}"))?;
    let (out, err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let errors = std::thread::spawn(move || pass_on(err, |l| eprintln!("{l}")));
    let mut failed = pass_on(out, |l| println!("{l}"));
    failed.extend(errors.join().map_err(|_| format!("{name}: its output can't be read"))?);
    let status = child.wait().map_err(|e| format!("{name}: {e}"))?;
    if !status.success() {
        failed.sort();
        failed.dedup();
        let names = if failed.is_empty() { status.to_string() } else { failed.join(", ") };
        return Err(format!("{name} failed: {names}"));
    }
    println!("=== {name}: {} s", started.elapsed().as_secs());
    Ok(())
}

fn pass_on(from: impl std::io::Read, say: impl Fn(&str)) -> Vec<String> {
    let lines = std::io::BufRead::lines(std::io::BufReader::new(from)).map_while(Result::ok);
    lines.inspect(|l| say(l)).filter_map(|l| failed_test(&l)).collect()
}

/// The test that a line of cargo's or of nextest's reports as failed.
fn failed_test(line: &str) -> Option<String> {
    if let Some(name) = line.strip_prefix("test ").and_then(|l| l.strip_suffix(" ... FAILED")) {
        return Some(name.to_owned());
    }
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        // `FAIL [   1.2s] (3/9) dolmen::it serve::name`
        ["FAIL" | "TIMEOUT" | "SIGABRT" | "SIGSEGV", .., krate, name] => Some(format!("{krate} {name}")),
        _ => None,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_tests_are_found_in_both_outputs() {
        assert_eq!(failed_test("test serve::a_name ... FAILED").as_deref(), Some("serve::a_name"));
        assert_eq!(
            failed_test("        FAIL [   1.234s] (12/99) dolmen::it serve::a_name").as_deref(),
            Some("dolmen::it serve::a_name")
        );
        for fine in ["test serve::a_name ... ok", "PASS [ 1s] dolmen::it x", "failures:", "a test FAILED"] {
            assert_eq!(failed_test(fine), None, "{fine}");
        }
        let seen = std::cell::Cell::new(0);
        let text = &b"test a ... ok\ntest b ... FAILED\n"[..];
        assert_eq!(pass_on(text, |_| seen.set(seen.get() + 1)), ["b"]);
        assert_eq!(seen.get(), 2);
    }
}
