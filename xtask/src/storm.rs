//! `cargo xtask storm`: random commands under load against the real daemon.
//!
//! The tester is a crate of its own (`crates/storm`), so that nobody waits for it who does not use it.

use crate::bench::target_dir;

/// The part that every change has to pass: these seeds, or as many as a slow machine does in the time.
///
/// A seed fixes the commands, not the order in which concurrent things happen. What is found is printed; the same
/// seeds are run once more then, and what is found again fails.
pub(crate) fn short() -> Result<(), String> {
    let args = ["--seed", "1-12", "--minutes", "1", "--no-shrink"].map(str::to_owned);
    run(&args).or_else(|e| {
        println!("{e}: once more");
        run(&args)
    })
}

/// Builds the daemon and the tester, as they are built for tests, and runs it.
pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let built = crate::workspace::cargo()
        .args(["build", "--quiet", "--locked", "-p", "dolmen", "-p", "dolmen-storm"])
        .status()
        .map_err(|e| format!("cargo build: {e}"))?;
    if !built.success() {
        return Err(format!("the daemon or the tester can't be built ({built})"));
    }
    let programs = target_dir().join("debug");
    let status = std::process::Command::new(programs.join("dolmen-storm"))
        .args(args)
        .env("STORM_DOLMEN", programs.join("dolmen"))
        .status()
        .map_err(|e| format!("dolmen-storm: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("the storm found something ({status})")) }
}
