//! A guest of a schedule: it reads, writes, flushes, and gives up.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use dolmen_graph::UserEdge;
use dolmen_sim::{GuestOp, Random, SECTOR, TagPattern, User, ZERO_TAG};
use dolmen_types::{Error, ErrorKind, Span, WriteFlags};

use crate::world::World;

/// Starts a guest that makes so many requests.
pub(crate) fn start_guest(
    world: &Rc<World>,
    edge: Arc<UserEdge>,
    random: Random,
    requests: u64,
    writes: bool,
) {
    let guest = Guest { user: User::new(edge, world.rt.clone()), world: world.clone(), random, writes };
    world.guests.set(world.guests.get() + 1);
    world.rt.spawn(async move {
        let world = guest.world.clone();
        guest.run(requests).await;
        world.guests.set(world.guests.get() - 1);
    });
}

/// One request after the other.
struct Guest {
    user: User,
    world: Rc<World>,
    random: Random,
    writes: bool,
}

impl Guest {
    async fn run(mut self, requests: u64) {
        for _ in 0..requests {
            self.world.rt.sleep(Duration::from_nanos(self.random.below(600_000))).await;
            if self.world.stop.get() {
                return;
            }
            if self.world.rest.get() {
                continue;
            }
            self.world.look();
            self.world.busy.set(self.world.busy.get() + 1);
            let answered = self.request().await;
            self.world.busy.set(self.world.busy.get() - 1);
            if !answered {
                return;
            }
            self.world.look();
        }
    }

    /// Makes a request. `false` when nobody answers any more.
    async fn request(&mut self) -> bool {
        let size = self.user.size() / SECTOR;
        let first = self.random.below(size);
        let longest = if self.random.percent(60) { 4 } else { 40 };
        let at = Span::new(first, self.random.between(1, longest.min(size - first)));
        let bytes = Span::new(at.offset() * SECTOR, at.len() * SECTOR);
        let (user, world) = (self.user.clone(), self.world.clone());
        let dice = if self.writes { self.random.below(100) } else { 70 };
        if std::env::var_os("DOLMEN_SIM_TRACE").is_some() {
            eprintln!("{}: guest {dice} at sectors {at:?}", world.position());
        }
        match dice {
            0..45 => {
                let fua = self.random.percent(10);
                let tag = world.oracle.borrow_mut().fresh_tag();
                let mut data = vec![0; bytes.len() as usize];
                TagPattern::fill(tag, at.offset(), &mut data);
                let op = world.oracle.borrow_mut().write(at, tag, fua, world.position());
                let flags = if fua { WriteFlags::FUA } else { WriteFlags::NONE };
                let result = self.attempt(user.write(bytes.offset(), &data, flags)).await;
                self.complete("write", op, result)
            }
            45..55 => {
                let flags = if self.random.percent(50) { WriteFlags::MAY_UNMAP } else { WriteFlags::NONE };
                let op = world.oracle.borrow_mut().write(at, ZERO_TAG, false, world.position());
                let result = self.attempt(user.write_zeroes(bytes, flags)).await;
                self.complete("write zeroes", op, result)
            }
            55..63 => {
                let op = world.oracle.borrow_mut().discard(at, world.position());
                let result = self.attempt(user.discard(bytes)).await;
                self.complete("discard", op, result)
            }
            63..80 => {
                let mark = world.oracle.borrow_mut().read();
                match self.attempt(user.read(bytes.offset(), bytes.len() as usize)).await {
                    None => true,
                    Some(Ok(found)) => {
                        let judged = world.oracle.borrow_mut().check_read(mark, at.offset(), &found);
                        judged.unwrap_or_else(|v| panic!("at {}: {v}", world.position()));
                        true
                    }
                    Some(Err(e)) => self.bear("read", &e),
                }
            }
            _ => {
                let op = world.oracle.borrow_mut().flush(world.position());
                let Some(result) = self.attempt(user.flush()).await else { return true };
                world.oracle.borrow_mut().flushed(op, &result, world.position());
                match result {
                    Ok(()) => true,
                    Err(e) => self.bear("flush", &e),
                }
            }
        }
    }

    /// Waits for a request, or gives it up after a while (`None`).
    async fn attempt<T>(
        &mut self,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Option<Result<T, Error>> {
        if !self.world.cancels.get() || !self.random.percent(15) {
            return Some(request.await);
        }
        let patience = self.world.rt.sleep(Duration::from_nanos(self.random.below(400_000)));
        let result = futures_lite::future::or(async { Some(request.await) }, async {
            patience.await;
            None
        })
        .await;
        if result.is_none() {
            self.world.given_up.set(self.world.given_up.get() + 1);
        }
        result
    }

    /// A request that was given up may have happened, or happen later: for the oracle it never completes.
    fn complete(&self, what: &str, op: GuestOp, result: Option<Result<(), Error>>) -> bool {
        let Some(result) = &result else { return true };
        if std::env::var_os("DOLMEN_SIM_TRACE").is_some() {
            eprintln!("{}: {what} {op:?} {:?}", self.world.position(), result.is_ok());
        }
        self.world.oracle.borrow_mut().complete(op, result, self.world.position());
        match result {
            Ok(()) => true,
            Err(e) => self.bear(what, e),
        }
    }

    /// Whether to go on after an error; panics if there must not be one.
    fn bear(&self, what: &str, e: &Error) -> bool {
        let gone = e.kind() == ErrorKind::Disconnected;
        // What was acknowledged can be written out, however full the disk is.
        assert!(what != "flush" || !self.world.only_full.get() || gone, "flush of a full disk: {e:?}");
        assert!(gone || self.world.errors, "{what} failed at {}: {e:?}", self.world.position());
        !gone
    }
}
