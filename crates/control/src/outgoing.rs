//! Lines on their way to the client of a monitor.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use dolmen_qmp::json;
use dolmen_rt::Stream;
use dolmen_types::Result;
use event_listener::Event;
use serde_json::Value as Json;

/// Bytes that may wait at all.
const MAX_QUEUED: usize = 16 << 20;

/// How a monitor behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MonitorOptions {
    /// Replies over several lines, for people.
    pub pretty: bool,
}

/// Lines on their way to a client.
pub(crate) struct Outgoing {
    lines: RefCell<VecDeque<String>>,
    /// Bytes in `lines`, and in the piece that is being sent.
    pub(crate) bytes: Cell<usize>,
    /// A command is being executed: its reply is still to come.
    pub(crate) busy: Cell<bool>,
    /// Events may be sent.
    pub(crate) negotiated: Cell<bool>,
    /// Nothing more is taken in.
    pub(crate) closed: Cell<bool>,
    options: MonitorOptions,
    changed: Event,
}

impl Outgoing {
    pub(crate) fn new(options: MonitorOptions) -> Rc<Outgoing> {
        Rc::new(Outgoing {
            lines: RefCell::default(),
            bytes: Cell::new(0),
            busy: Cell::new(false),
            negotiated: Cell::new(false),
            closed: Cell::new(false),
            options,
            changed: Event::new(),
        })
    }

    pub(crate) fn push(&self, value: &Json) {
        if self.closed.get() {
            return;
        }
        let mut line = json::to_text(value, self.options.pretty);
        line.push_str("\r\n");
        self.bytes.set(self.bytes.get() + line.len());
        self.lines.borrow_mut().push_back(line);
        self.changed.notify(usize::MAX);
    }

    pub(crate) fn event(&self, event: &Json) {
        if !self.negotiated.get() {
            return;
        }
        if self.bytes.get() > MAX_QUEUED {
            self.close();
            return;
        }
        self.push(event);
    }

    pub(crate) fn close(&self) {
        self.closed.set(true);
        self.changed.notify(usize::MAX);
    }

    pub(crate) async fn until(&self, ready: impl Fn(&Outgoing) -> bool) {
        while !ready(self) {
            let listener = self.changed.listen();
            if !ready(self) {
                listener.await;
            }
        }
    }

    /// Completes when every reply has been sent, or never will be.
    pub(crate) async fn emptied(&self) {
        self.until(|o| (o.bytes.get() == 0 && !o.busy.get()) || o.closed.get()).await;
    }

    /// Sends lines until the queue is closed.
    pub(crate) async fn send_all(&self, stream: &Stream) -> Result<()> {
        loop {
            self.until(|o| o.closed.get() || !o.lines.borrow().is_empty()).await;
            let batch: String = self.lines.borrow_mut().drain(..).collect();
            if batch.is_empty() {
                return Ok(());
            }
            stream.send_bytes(batch.as_bytes()).await?;
            self.bytes.set(self.bytes.get() - batch.len());
            self.changed.notify(usize::MAX);
        }
    }
}
