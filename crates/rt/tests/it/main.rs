//! The runtime from outside. Every test runs on both engines.

mod cancel;
mod executor;
mod fallback;
mod files;
mod late;
mod sockets;

use std::future::Future;

use dolmen_rt::{Config, CoreIo, EngineKind, File, Rt, block_on_with};

/// Both engines; only the thread engine where io_uring is forbidden.
fn engines() -> Vec<EngineKind> {
    let ring = Config::default().with_engine(EngineKind::IoUring);
    let mut engines = vec![EngineKind::Threads];
    if block_on_with(&ring, |_| async {}).is_ok() {
        engines.push(EngineKind::IoUring);
    }
    engines
}

/// Runs a test on both engines.
fn on_both<F, Fut>(test: F)
where
    F: Fn(Rt, CoreIo) -> Fut,
    Fut: Future<Output = ()> + 'static,
{
    for engine in engines() {
        let config = Config::default().with_engine(engine);
        block_on_with(&config, |rt| {
            let io = rt.io().expect("the production runtime has files").clone();
            assert_eq!(io.engine(), engine);
            test(rt, io)
        })
        .expect("the engine was there a moment ago");
    }
}

/// A file without a name.
fn temp_file() -> File {
    tempfile::tempfile().expect("a temporary file").into()
}
