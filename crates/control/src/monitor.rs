//! One monitor: a connection that speaks QMP.
//!
//! Three parts share two queues: the reader queues commands; they are executed one after the other
//! and their replies queued; the writer sends these. Events go into the same
//! queue, so that an event raised by a command comes before the command's reply.
//!
//! A client that does not read is no danger to others: commands wait until its replies
//! are below [`HIGH_WATER`], and when its events reach a limit it is disconnected.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use dolmen_qmp::{Session, Step, reply_error, reply_ok};
use dolmen_rt::{Instant, Memory, Stream};
use dolmen_types::Result;
use event_listener::Event;

use crate::handle::Control;
use crate::outgoing::{MonitorOptions, Outgoing};

/// Bytes of replies that may wait before the next command is looked at.
const HIGH_WATER: usize = 256 << 10;

/// Commands that are looked at before their turn.
const MAX_AHEAD: usize = 64;

/// How long a command may take while a `quit` of the same client waits behind it.
const QUIT_WAITS: Duration = Duration::from_secs(5);

/// Bytes received at a time.
const RECEIVE: usize = 64 << 10;

/// Takes a monitor off the list when its connection ends, however it ends.
struct Registered<'a>(&'a Control, Rc<Outgoing>);

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.1.close();
        self.0.world().monitors.borrow_mut().retain(|m| !Rc::ptr_eq(m, &self.1));
    }
}

/// Serves one connection until the client goes away or everything has ended.
///
/// # Errors
/// What the connection says.
pub async fn serve_monitor(control: &Control, stream: Stream, options: MonitorOptions) -> Result<()> {
    let out = Outgoing::new(options);
    control.world().monitors.borrow_mut().push(out.clone());
    let registered = Registered(control, out.clone());
    let ended = async {
        control.ended().await;
        Ok(())
    };
    let reader = read_commands(control, &stream, &out);
    let served = futures_lite::future::or(
        futures_lite::future::or(reader, ended),
        // Ends first only when sending fails or the client does not read.
        out.send_all(&stream),
    )
    .await;
    drop(registered);
    stream.shutdown();
    served
}

/// Commands that have been received and not executed yet.
#[derive(Default)]
struct Incoming {
    steps: RefCell<VecDeque<(Step, bool)>>,
    /// The command that is being executed, and since when.
    running: Cell<Option<(u64, Instant)>>,
    /// The client has said everything.
    ended: Cell<bool>,
    changed: Event,
}

impl Incoming {
    fn changed(&self) {
        self.changed.notify(usize::MAX);
    }

    async fn until(&self, ready: impl Fn(&Incoming) -> bool) {
        while !ready(self) {
            let listener = self.changed.listen();
            if !ready(self) {
                listener.await;
            }
        }
    }
}

/// Receives and executes at the same time: who wants to end the program must be heard while a command waits for
/// storage that does not answer.
async fn read_commands(control: &Control, stream: &Stream, out: &Outgoing) -> Result<()> {
    let mut session = Session::new(control.world().version.clone());
    out.push(&session.greeting());
    let incoming = Incoming::default();
    let executed = execute_all(control, &incoming, out);
    let minded = async {
        mind_quit(control, &incoming).await;
        std::future::pending().await
    };
    let received = async {
        receive_all(control, stream, &mut session, &incoming).await?;
        incoming.ended.set(true);
        incoming.changed();
        std::future::pending().await
    };
    futures_lite::future::or(executed, futures_lite::future::or(minded, received)).await
}

async fn receive_all(
    control: &Control,
    stream: &Stream,
    session: &mut Session,
    incoming: &Incoming,
) -> Result<()> {
    let mut memory = Memory::zeroed(RECEIVE);
    loop {
        let n = stream.recv_buf(&memory.share()).await?;
        if n == 0 {
            return Ok(());
        }
        let received = match memory.bytes() {
            Some(b) => b[..n].to_vec(),
            None => memory.to_vec()[..n].to_vec(),
        };
        let mut rest = &received[..];
        loop {
            let fed = session.feed(rest);
            rest = &rest[fed..];
            while let Some(step) = session.next_step(control.schema()) {
                incoming.steps.borrow_mut().push_back((step, session.is_negotiated()));
                incoming.changed();
                incoming.until(|i| i.steps.borrow().len() < MAX_AHEAD).await;
            }
            if rest.is_empty() {
                break;
            }
        }
    }
}

/// Executes commands one after the other, until the client has said everything and has its replies.
async fn execute_all(control: &Control, incoming: &Incoming, out: &Outgoing) -> Result<()> {
    let mut number = 0;
    loop {
        incoming.until(|i| i.ended.get() || !i.steps.borrow().is_empty()).await;
        let Some((step, negotiated)) = incoming.steps.borrow_mut().pop_front() else {
            // The client may have ended its direction only, and wait for its replies; if the program
            // ends, also for the events of that.
            out.emptied().await;
            if control.is_ending() {
                control.ended().await;
            }
            return Ok(());
        };
        out.busy.set(true);
        number += 1;
        incoming.running.set(Some((number, control.rt().now())));
        incoming.changed();
        let reply = match step {
            Step::Reply(reply) => reply,
            Step::Execute(request) => match control.execute(&request).await {
                Ok(value) => reply_ok(value, request.id.as_ref()),
                Err(e) => reply_error(&e, request.id.as_ref()),
            },
        };
        incoming.running.set(None);
        out.push(&reply);
        out.busy.set(false);
        out.negotiated.set(negotiated);
        // A client that sends many commands at once has no more than its turn.
        control.rt().yield_now().await;
        out.until(|o| o.bytes.get() < HIGH_WATER || o.closed.get()).await;
    }
}

/// Minds a command that ends the program and waits behind another one of the same client. Commands before it are executed as usual; but one that
/// does not come to an end is given up.
async fn mind_quit(control: &Control, incoming: &Incoming) {
    let is_quit = |(step, _): &(Step, bool)| matches!(step, Step::Execute(r) if control.ends(r));
    loop {
        incoming.until(|i| i.running.get().is_some() && i.steps.borrow().iter().any(is_quit)).await;
        let Some((number, since)) = incoming.running.get() else { continue };
        control.rt().sleep_until(since + QUIT_WAITS).await;
        if incoming.running.get().is_some_and(|(n, _)| n == number) {
            return control.hurry();
        }
    }
}
