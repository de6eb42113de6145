//! `cargo xtask dist`: the binary as it is shipped, and its debug information beside it.
//!
//! The release profile strips the binary. Here it is built without stripping, which is the same code, and taken apart: the small
//! part names the other by a link that debuggers follow.

use std::process::Command;

use crate::workspace::{cargo, root};

/// Builds both files in `target/dist`.
pub(crate) fn run() -> Result<(), String> {
    let target = crate::bench::target_dir().join("dist");
    let mut build = cargo();
    build.args([
        "build",
        "--release",
        "--locked",
        "-p",
        "dolmen",
        "--config",
        "profile.release.strip=\"none\"",
    ]);
    build.arg("--target-dir").arg(target.join("build"));
    done(&mut build)?;
    let built = target.join("build/release/dolmen");
    let objcopy = |args: &[&str]| done(Command::new("objcopy").args(args).current_dir(&target));
    let built = built.to_str().ok_or("the target directory has a name that is not text")?;
    objcopy(&["--only-keep-debug", built, "dolmen.debug"])?;
    objcopy(&["--strip-all", "--add-gnu-debuglink=dolmen.debug", built, "dolmen"])?;
    let shown = target.strip_prefix(root()).unwrap_or(&target).join("dolmen");
    println!("{} and {}.debug", shown.display(), shown.display());
    Ok(())
}

fn done(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().map_err(|e| format!("{program}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{program} failed ({status})")) }
}
