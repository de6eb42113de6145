//! Makes the unwinder (libgcc) a part of the programs where the C compiler has it as an archive. As a shared library it
//! costs every start a sixth of the time that the tools take for themselves: it is found, mapped and relocated, and asks
//! the processor what it is, which traps in a virtual machine.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CC");
    let var = |name: &str| std::env::var(name).unwrap_or_default();
    let is_static = var("CARGO_CFG_TARGET_FEATURE").split(',').any(|f| f == "crt-static");
    if var("CARGO_CFG_TARGET_ENV") != "gnu" || is_static || var("HOST") != var("TARGET") {
        return;
    }
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let Ok(out) = Command::new(cc).arg("-print-file-name=libgcc_eh.a").output() else { return };
    // Only a name comes back where there is no such file.
    let archive = String::from_utf8_lossy(&out.stdout);
    let archive = Path::new(archive.trim());
    if let Some(dir) = archive.parent().filter(|_| archive.is_absolute()) {
        println!("cargo::rustc-link-search=native={}", dir.display());
        // All of it, before the standard library asks for the shared one.
        println!("cargo::rustc-link-lib=static:+whole-archive,-bundle=gcc_eh");
    }
}
