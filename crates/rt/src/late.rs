//! What is put off because it may wait for somebody who does not answer.
//!
//! Some things are done where nobody can wait: a file is closed when its last handle is dropped, locks are given back when
//! a change is published. Where that may block, it is done on a thread for such calls. Whoever tells others that it is done
//! waits for it: [`put_off`].

use std::cell::RefCell;
use std::fmt;

use crate::WaitsFor;
use crate::executor::{Receiver, oneshot};
use crate::workers;

thread_local! {
    /// What has been put off within [`put_off`], which may be nested.
    static COLLECTING: RefCell<Vec<Vec<Receiver<()>>>> = const { RefCell::new(Vec::new()) };
}

/// Does it soon, on a thread for calls that wait for this.
pub(crate) fn put_off_to(what: WaitsFor, f: impl FnOnce() + Send + 'static) {
    let (tx, rx) = oneshot();
    // Without the thread's memory the thread is ending, and waits for nothing.
    let _ = COLLECTING.try_with(|c| {
        if let Some(collecting) = c.borrow_mut().last_mut() {
            collecting.push(rx);
        }
    });
    workers::submit(
        what,
        Box::new(move || {
            f();
            tx.send(());
        }),
    );
}

/// Does something, and says what it has put off.
pub fn put_off<T>(f: impl FnOnce() -> T) -> (T, PutOff) {
    let begun = COLLECTING.try_with(|c| c.borrow_mut().push(Vec::new())).is_ok();
    // A panic in it ends the runtime; what is left on the list then harms nobody.
    let out = f();
    let collected = COLLECTING.try_with(|c| if begun { c.borrow_mut().pop() } else { None });
    (out, PutOff(collected.ok().flatten().unwrap_or_default()))
}

/// What has been put off.
#[derive(Default)]
#[must_use = "it says when what was put off is done"]
pub struct PutOff(Vec<Receiver<()>>);

impl PutOff {
    /// Whether nothing was.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Completes when all of it is done.
    pub async fn done(self) {
        for rx in self.0 {
            rx.await;
        }
    }
}

impl fmt::Debug for PutOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PutOff({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_knows_when_it_is_done() {
        let (tx, rx) = std::sync::mpsc::channel();
        let (nested, all) = put_off(|| {
            put_off_to(WaitsFor::Host, move || tx.send(1).expect("somebody waits"));
            put_off(|| put_off_to(WaitsFor::Host, || ())).1
        });
        assert!(!nested.is_empty() && !all.is_empty());
        futures_lite::future::block_on(async {
            nested.done().await;
            all.done().await;
        });
        assert_eq!(rx.try_recv(), Ok(1));
        assert!(put_off(|| ()).1.is_empty());
    }
}
