//! What README.md says, done: its shell lines in an empty directory, and its program.

use std::process::{Command, Stdio};

const README: &str = include_str!("../../../../README.md");

/// The blocks of a language, in their order.
fn blocks(language: &str) -> Vec<String> {
    let start = format!("```{language}\n");
    README.split(&start).skip(1).filter_map(|rest| rest.split_once("```")).map(|b| b.0.to_owned()).collect()
}

#[test]
fn every_shell_line_works_in_order() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let bin = tempfile::tempdir().expect("a temporary directory");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_dolmen"), bin.path().join("dolmen")).expect("a link");
    let script = blocks("sh").concat();
    assert!(
        script.contains("dolmen serve") && script.contains("dolmen img"),
        "the lines are found: {script}"
    );
    let path = std::env::var("PATH").expect("a path");
    let out = Command::new("sh")
        .args(["-eux", "-c", &script])
        .current_dir(dir.path())
        .env("PATH", format!("{}:{path}", bin.path().display()))
        .stdin(Stdio::null())
        .output()
        .expect("a shell");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    assert!(
        text(&out.stdout).contains("\"data\": true") || text(&out.stdout).contains("0x"),
        "a map is shown"
    );
    // The lines end the daemon that they start.
    assert!(!dir.path().join("dolmen.pid").exists(), "{}", text(&out.stderr));
}

/// It is compiled with the tests, as an example.
#[test]
fn the_program_is_an_example() {
    let program = blocks("rust");
    let example = include_str!("../../examples/image.rs");
    assert_eq!(program.len(), 1);
    assert!(example.contains(&program[0]), "README.md shows another program than examples/image.rs");
}
