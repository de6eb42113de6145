//! The `dolmen` multi-call binary.
//!
//! ```text
//!   dolmen img ...     qemu-img ...               create, inspect and compare images
//!   dolmen io ...      qemu-io ...                read and write an image, for tests
//!   dolmen serve ...   qemu-storage-daemon ...    the storage daemon
//!   dolmen tour                                   shows what Dolmen does
//! ```
//!
//! Called by one of QEMU's names (a symbolic link will do) it takes that tool's
//! options and gives its exit codes and output. The native names differ in one thing:
//! they do not trust images (see `cli::Persona`).
#![forbid(unsafe_code)]

mod cli;
mod img;
mod io;
mod serve;
mod tour;

use std::ffi::OsString;
use std::process::ExitCode;

use cli::Persona;

const HELP: &str = "\
Dolmen: a block layer, storage daemon and image tool.

Usage: dolmen COMMAND [OPTIONS]

Commands:
  img     create, inspect and compare images (also when called as qemu-img)
  io      read and write an image, for tests (qemu-io)
  serve   the storage daemon (qemu-storage-daemon)
  tour    shows what Dolmen does, in under a minute

  -h, --help      this help; 'dolmen COMMAND --help' for more
  -V, --version   the version
";

fn main() -> ExitCode {
    // From here on everything is text, file names of any bytes included.
    let mut args: Vec<OsString> = std::env::args_os().map(|a| dolmen::types::text_of_os(&a).into()).collect();
    let name = args
        .first()
        .map(|a| std::path::Path::new(a).file_name().unwrap_or(a).to_string_lossy().into_owned())
        .unwrap_or_default();
    let (program, persona) = match name.as_str() {
        "qemu-img" | "qemu-io" | "qemu-storage-daemon" => (name, Persona::Established),
        _ => {
            if args.len() < 2 {
                eprint!("{HELP}");
                return ExitCode::from(1);
            }
            let command = args.remove(1).to_string_lossy().into_owned();
            (format!("dolmen {command}"), Persona::Native)
        }
    };
    let code = match program.as_str() {
        "qemu-img" | "dolmen img" => img::main(&program, persona, args),
        "qemu-io" | "dolmen io" => io::main(&program, persona, args),
        "qemu-storage-daemon" | "dolmen serve" => serve::main(&program, persona, args),
        "dolmen tour" => tour::main(&args[1..]),
        "dolmen --help" | "dolmen -h" | "dolmen help" => {
            cli::say(format_args!("{HELP}"));
            0
        }
        "dolmen --version" | "dolmen -V" => {
            out!("dolmen {}", env!("CARGO_PKG_VERSION"));
            0
        }
        _ => {
            eprintln!("{program}: there is no such command\n\n{HELP}");
            1
        }
    };
    cli::flush();
    ExitCode::from(code)
}
