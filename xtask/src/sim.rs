//! `cargo xtask sim [SEEDS]`: a long run of the crash explorer, optimized.

/// Runs the crash explorer with so many seeds (default 10,000). Its other settings come
/// from the environment: see the head of `crates/control/tests/crash/main.rs`.
pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let seeds = args.first().map_or("10000", String::as_str);
    let status = crate::workspace::cargo()
        .args([
            "test",
            "--release",
            "--locked",
            "-p",
            "dolmen-control",
            "--test",
            "crash",
            "--",
            "--nocapture",
        ])
        .env("DOLMEN_SIM_SEEDS", seeds)
        .status()
        .map_err(|e| format!("cargo test: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("the crash explorer failed ({status})")) }
}
