//! What a driver notices by itself, on its way to whoever manages the graph.
//!
//! A request that meets damage answers its own caller; everybody else learns of it here.
//! Requests may run on any core, so the list is shared; it is bounded, because a broken
//! image can be asked about for ever and nobody may be listening.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use dolmen_types::NodeName;
use event_listener::Event;

/// Notices kept for a listener that is late; later ones are dropped.
const MAX_WAITING: usize = 256;

/// Something a driver noticed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The image's metadata are damaged; it can't be written any more.
    Corrupted {
        /// What is wrong.
        message: String,
    },
    /// The first write has made the image's bitmaps invalid, as the driver does not keep them up.
    BitmapsInvalid {
        /// Their names; none when their list can't be read.
        bitmaps: Vec<String>,
    },
    /// A write has reached beyond the node's threshold, which is gone now.
    WriteThreshold {
        /// The threshold, in bytes from the start of the node.
        threshold: u64,
        /// How many bytes the write reached beyond it.
        exceeded: u64,
    },
}

impl Notice {
    /// What a person has to be told of an image, if anything.
    pub fn warning(&self, image: &str) -> Option<String> {
        match self {
            Notice::BitmapsInvalid { bitmaps } => Some(format!(
                "the bitmaps of '{image}' ({}) are not valid any more: the image is being written, and Dolmen does not \
                 keep them up. What relies on them, as incremental backups do, has to begin anew",
                if bitmaps.is_empty() { "their list is damaged".to_owned() } else { bitmaps.join(", ") }
            )),
            // Who asked for them hears of these.
            Notice::Corrupted { .. } | Notice::WriteThreshold { .. } => None,
        }
    }
}

/// The notices of all nodes of a graph.
#[derive(Debug, Default)]
pub struct Notices {
    waiting: Mutex<VecDeque<(NodeName, Notice)>>,
    raised: Event,
}

impl Notices {
    pub(crate) fn raise(&self, node: &NodeName, notice: Notice) {
        let mut waiting = self.waiting.lock().expect("notices");
        if waiting.len() < MAX_WAITING {
            waiting.push_back((node.clone(), notice));
        }
        drop(waiting);
        self.raised.notify(usize::MAX);
    }

    /// The next notice if there is one already.
    pub fn take(&self) -> Option<(NodeName, Notice)> {
        self.waiting.lock().expect("notices").pop_front()
    }

    /// The next notice and the node that it is about. Dropping the future loses nothing.
    pub async fn next(&self) -> (NodeName, Notice) {
        loop {
            let listener = self.raised.listen();
            if let Some(n) = self.waiting.lock().expect("notices").pop_front() {
                return n;
            }
            listener.await;
        }
    }
}

/// A node's way to the list.
#[derive(Clone, Debug)]
pub(crate) struct NoticeSink {
    pub(crate) node: NodeName,
    pub(crate) notices: Arc<Notices>,
}
