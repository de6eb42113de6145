//! The two ways to run operations: io_uring, or a thread pool with epoll where io_uring is forbidden.
//!
//! Chosen once, when the core starts, and visible to the user ([`crate::CoreIo::engine`]). Both give the same results
//! for the same operations; the tests run on both.

use std::fmt;

use dolmen_types::{Error, ErrorKind};

use crate::Result;
use crate::core::{Core, EventFd};
use crate::epoll::Epoll;
use crate::op::Vecs;
use crate::ring::Ring;

/// How operations reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EngineKind {
    /// One io_uring per core for files and sockets.
    IoUring,
    /// A bounded pool of threads for files, epoll for sockets.
    Threads,
}

impl EngineKind {
    /// The name in `DOLMEN_IO` and in messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            EngineKind::IoUring => "io_uring",
            EngineKind::Threads => "threads",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How a core is set up.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// The engine; `None` takes io_uring where the kernel lets us.
    pub engine: Option<EngineKind>,
    /// Whether the loop may watch the completion queue for a moment (about 32 us) before it sleeps, when recent traffic
    /// makes that worthwhile. Has no effect on a single CPU.
    pub spin: bool,
    /// See [`Config::for_tool`].
    pub tool: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config { engine: None, spin: true, tool: false }
    }
}

impl Config {
    /// `DOLMEN_IO=threads` or `DOLMEN_IO=io_uring` forces an engine. Any other value is ignored with a warning on
    /// standard error.
    pub fn from_env() -> Config {
        let engine = match std::env::var("DOLMEN_IO").as_deref() {
            Ok("threads") => Some(EngineKind::Threads),
            Ok("io_uring") => Some(EngineKind::IoUring),
            Ok("" | "auto") | Err(_) => None,
            Ok(other) => {
                eprintln!("warning: DOLMEN_IO={other} is not known; use threads, io_uring or auto");
                None
            }
        };
        Config { engine, ..Config::default() }
    }

    /// The same with this engine.
    #[must_use]
    pub fn with_engine(mut self, engine: EngineKind) -> Config {
        self.engine = Some(engine);
        self
    }

    /// The same with or without spinning.
    #[must_use]
    pub fn with_spin(mut self, spin: bool) -> Config {
        self.spin = spin;
        self
    }

    /// The same for a program that does one thing and ends. Whatever it would do meanwhile waits for the same thing, so
    /// questions about names and files are asked at once and not on other threads; and the engine is set up when the
    /// first operation needs it, which may be never.
    #[must_use]
    pub fn for_tool(mut self) -> Config {
        self.tool = true;
        self
    }
}

/// What the loop wants of the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wait {
    /// There are tasks to run: only submit and look.
    No,
    /// Sleep until something completes, mail comes, or this moment.
    Until(Option<std::time::Instant>),
}

/// Slots and results.
pub(crate) type Completions = Vec<(usize, i64)>;

pub(crate) enum Engine {
    Ring(Box<Ring>),
    Epoll(Epoll),
}

impl Engine {
    /// The engine, and a note for the user why it is this one.
    pub(crate) fn new(config: &Config, bell: &EventFd) -> Result<(Engine, String)> {
        match config.engine {
            Some(EngineKind::Threads) => {
                Ok((Engine::Epoll(Epoll::new(bell)?), "threads (as configured)".into()))
            }
            Some(EngineKind::IoUring) => match Ring::new(config, bell) {
                Ok(ring) => Ok((Engine::Ring(Box::new(ring)), "io_uring (as configured)".into())),
                Err(e) => Err(Error::new(ErrorKind::Unsupported, "io_uring is not available")
                    .source(e)
                    .remedy("leave DOLMEN_IO unset, or set DOLMEN_IO=threads")),
            },
            None => match Ring::new(config, bell) {
                Ok(ring) => Ok((Engine::Ring(Box::new(ring)), "io_uring".into())),
                Err(e) => Ok((
                    Engine::Epoll(Epoll::new(bell)?),
                    format!("threads (io_uring is not available: {e})"),
                )),
            },
        }
    }

    pub(crate) fn kind(&self) -> EngineKind {
        match self {
            Engine::Ring(_) => EngineKind::IoUring,
            Engine::Epoll(_) => EngineKind::Threads,
        }
    }

    /// Takes over the operation in a slot.
    pub(crate) fn submit(&mut self, core: &Core, key: usize) {
        match self {
            Engine::Ring(r) => r.submit(core, key),
            Engine::Epoll(e) => e.submit(core, key),
        }
    }

    /// Asks that an operation completes soon, with whatever result.
    pub(crate) fn cancel(&mut self, core: &Core, key: usize) {
        match self {
            Engine::Ring(r) => r.cancel(core, key),
            Engine::Epoll(e) => e.cancel(key),
        }
    }

    /// Submits, waits as told, and collects what completed.
    pub(crate) fn turn(&mut self, core: &Core, wait: Wait, done: &mut Completions) {
        match self {
            Engine::Ring(r) => r.turn(core, wait, done),
            Engine::Epoll(e) => e.turn(core, wait, done),
        }
    }

    /// Takes memory back for later operations.
    pub(crate) fn recycle(&mut self, vecs: Box<Vecs>) {
        match self {
            Engine::Ring(r) => r.recycle(vecs),
            Engine::Epoll(_) => drop(vecs),
        }
    }
}
