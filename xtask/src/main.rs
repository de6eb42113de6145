//! Developer tasks: `cargo xtask TASK`.
#![forbid(unsafe_code)]

mod bench;
mod deps;
mod dist;
mod sim;
mod storm;
mod test;
mod tidy;
mod workspace;

use std::process::ExitCode;

const HELP: &str = "\
Usage: cargo xtask TASK

  test    what a change has to pass: packages, format, lints, documentation, tests
  deps    only the test of who depends on whom
  tidy    only the test of circles, names, sizes and unused dependencies
  dist    the release binary, with its debug information beside it
  sim     the long simulation: random work, crashes, an oracle
  storm   random commands under load against the real daemon ('storm --help' for options)
  bench   measures against the installed tools ('bench --help' for options)
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.first().map(String::as_str) {
        Some("test") => test::run(),
        Some("deps") => deps::run(),
        Some("tidy") => tidy::run(),
        Some("dist") => dist::run(),
        Some("bench") => return bench::main(&args[1..]),
        Some("sim") => sim::run(&args[1..]),
        Some("storm") => storm::run(&args[1..]),
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e}");
            ExitCode::FAILURE
        }
    }
}
