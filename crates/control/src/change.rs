//! Changes: what a command means, apart from how it was written.
//!
//! QMP commands and command-line options both become a [`Change`]; the task knows
//! nothing of either.

use std::time::Duration;

use dolmen_qmp::{Request, SocketAddress};
use dolmen_types::{Error, ErrorKind, Options, Result, Value};

use crate::act::device_or_node;
use crate::images::{Drive, SnapshotSync};
use crate::{Ask, JobStart, OperationBegin};

/// Clients that connect to the NBD server at one time, unless said otherwise.
const MAX_CONNECTIONS: u32 = 100;

/// How long the negotiation of an NBD client may take, unless said otherwise.
const HANDSHAKE_SECONDS: u64 = 10;

/// Something that the control task does.
#[derive(Debug)]
pub enum Change {
    /// Opens a node with everything that is defined inside it.
    BlockdevAdd(Options),
    /// Closes a node.
    BlockdevDel {
        /// Its name.
        node: String,
    },
    /// Has the first write beyond an offset announced.
    SetWriteThreshold {
        /// The node's name.
        node: String,
        /// The offset in bytes; 0 for none.
        threshold: u64,
    },
    /// Gives nodes other options and children, in one step.
    BlockdevReopen(Vec<Options>),
    /// Hands images to another process, or takes them over.
    BlockdevSetActive {
        /// The node; all if none is named.
        node: Option<String>,
        /// Takes part from now on.
        active: bool,
    },
    /// Starts the NBD server.
    NbdServerStart(NbdServerStart),
    /// Removes its exports and stops it.
    NbdServerStop,
    /// Adds an export.
    ExportAdd(ExportAdd),
    /// Removes an export.
    ExportDel {
        /// Its id.
        id: String,
        /// Disconnect its clients instead of refusing.
        hard: bool,
    },
    /// Starts a job.
    JobStart(JobStart),
    /// Asks something of a job.
    Ask(Ask),
    /// A job with a target that it opens, or makes, itself.
    Drive(Drive),
    /// Puts an overlay over a node.
    Snapshot {
        /// The node.
        node: String,
        /// The node that is to lie over it.
        overlay: String,
    },
    /// Makes an overlay and puts it over a node.
    SnapshotSync(SnapshotSync),
    /// Has an image name another backing file.
    ChangeBackingFile {
        /// A node at or above the image.
        device: String,
        /// The image's node.
        image: String,
        /// The new name; none if empty.
        file: String,
    },
    /// Changes the size of a node.
    Resize {
        /// Its name.
        node: String,
        /// In bytes.
        size: u64,
    },
    /// Begins an operation of an external tool.
    OperationBegin(OperationBegin),
    /// Ends it.
    OperationEnd {
        /// Its id.
        id: String,
    },
    /// Several changes at one instant: all of them or none.
    Transaction {
        /// In their order.
        actions: Vec<Change>,
        /// Its jobs end together: all of them successfully, or none.
        grouped: bool,
    },
    /// Fails.
    Abort,
    /// What the change would lead to.
    WhatIf(Box<Change>),
    /// What a query changes, when one asks what if.
    Nothing,
    /// Ends the program in an orderly way.
    Quit,
}

/// How the NBD server is to run.
#[derive(Debug)]
pub struct NbdServerStart {
    /// Where it listens.
    pub address: SocketAddress,
    /// Clients at one time; 0 for no limit.
    pub max_connections: u32,
    /// The longest negotiation; zero for no limit.
    pub handshake_max: Duration,
}

/// An export to be made.
#[derive(Debug)]
pub struct ExportAdd {
    /// Unique among all operations.
    pub id: String,
    /// The node to export.
    pub node: String,
    /// Whether clients may change it.
    pub writable: bool,
    /// Whether every write is durable before its reply.
    pub writethrough: bool,
    /// Whether the node may be inactive while it is exported.
    pub allow_inactive: bool,
    /// The name that clients ask for; the node's name if not given.
    pub name: Option<String>,
    /// For people; may be empty.
    pub description: String,
}

impl Change {
    /// The change that a request asks for; `None` for queries.
    ///
    /// # Errors
    /// When arguments do not make sense together.
    pub fn from_request(request: &Request) -> Result<Option<Change>> {
        let mut o = Options::from_value(request.arguments.clone())?;
        Ok(Some(match request.name {
            "blockdev-add" => Change::BlockdevAdd(o),
            "blockdev-del" => Change::BlockdevDel { node: o.require_str("node-name")? },
            "block-set-write-threshold" => Change::SetWriteThreshold {
                node: o.require_str("node-name")?,
                threshold: o.take_size("write-threshold")?.unwrap_or(0),
            },
            "blockdev-reopen" => Change::BlockdevReopen(list(&mut o, "options")?),
            "blockdev-set-active" => Change::BlockdevSetActive {
                node: o.take_str("node-name")?,
                active: o.take_bool("active")?.unwrap_or(true),
            },
            "nbd-server-start" => Change::NbdServerStart(NbdServerStart::from_options(o)?),
            "nbd-server-stop" => Change::NbdServerStop,
            "block-export-add" => Change::ExportAdd(ExportAdd::from_options(o)?),
            "block-export-del" => {
                let hard = o.take_enum("mode", &["safe", "hard"])? == Some("hard");
                Change::ExportDel { id: o.require_str("id")?, hard }
            }
            "quit" => Change::Quit,
            "blockdev-snapshot" => {
                Change::Snapshot { node: o.require_str("node")?, overlay: o.require_str("overlay")? }
            }
            "blockdev-snapshot-sync" => Change::SnapshotSync(SnapshotSync::from_options(o)?),
            "change-backing-file" => Change::ChangeBackingFile {
                device: o.require_str("device")?,
                image: o.require_str("image-node-name")?,
                file: o.require_str("backing-file")?,
            },
            "block_resize" => {
                Change::Resize { node: device_or_node(&mut o)?, size: o.take_size("size")?.unwrap_or(0) }
            }
            "operation-begin" => Change::OperationBegin(OperationBegin::from_options(o)?),
            "operation-end" => Change::OperationEnd { id: o.require_str("id")? },
            "transaction" => transaction(o)?,
            other => {
                if let Some(ask) = Ask::from_options(other, &mut o)? {
                    return Ok(Some(Change::Ask(ask)));
                }
                match Drive::from_options(other, o.clone()) {
                    Some(drive) => Change::Drive(drive),
                    None => return Ok(JobStart::from_options(other, o)?.map(Change::JobStart)),
                }
            }
        }))
    }
}

/// Every action is a command; one that fails on purpose has no command.
fn transaction(mut o: Options) -> Result<Change> {
    let properties = o.take_map("properties")?.unwrap_or_default();
    let mut properties = properties;
    let grouped = properties.take_enum("completion-mode", &["individual", "grouped"])? == Some("grouped");
    let mut actions = Vec::new();
    for action in list(&mut o, "actions")? {
        let mut action = action;
        let kind = action.require_str("type")?;
        let data = action.take_map("data")?.unwrap_or_default();
        actions.push(match kind.as_str() {
            "abort" => Change::Abort,
            "blockdev-snapshot" => {
                let mut data = data;
                Change::Snapshot { node: data.require_str("node")?, overlay: data.require_str("overlay")? }
            }
            "blockdev-snapshot-sync" => Change::SnapshotSync(SnapshotSync::from_options(data)?),
            other => match Drive::from_options(other, data.clone()) {
                Some(drive) => Change::Drive(drive),
                None => match JobStart::from_options(other, data)? {
                    Some(start) => Change::JobStart(start),
                    None => {
                        return Err(Error::new(
                            ErrorKind::InvalidInput,
                            format!("a transaction has no action '{other}'"),
                        ));
                    }
                },
            },
        });
    }
    Ok(Change::Transaction { actions, grouped })
}

impl NbdServerStart {
    /// Reads checked options, of `nbd-server-start` or `--nbd-server`.
    ///
    /// # Errors
    /// When a member is missing or out of range.
    pub fn from_options(mut o: Options) -> Result<NbdServerStart> {
        let address = SocketAddress::from_value(o.take("addr").unwrap_or(Value::Null))?;
        let max_connections = match o.take_size("max-connections")? {
            None => MAX_CONNECTIONS,
            Some(n) => u32::try_from(n).map_err(|_| out_of_range("max-connections"))?,
        };
        let seconds = o.take_size("handshake-max-seconds")?.unwrap_or(HANDSHAKE_SECONDS);
        if seconds > u32::MAX.into() {
            return Err(out_of_range("handshake-max-seconds"));
        }
        o.finish("nbd-server-start")?;
        Ok(NbdServerStart { address, max_connections, handshake_max: Duration::from_secs(seconds) })
    }
}

impl ExportAdd {
    /// Reads checked options, of `block-export-add` or `--export`.
    ///
    /// # Errors
    /// When a member is missing.
    pub fn from_options(mut o: Options) -> Result<ExportAdd> {
        // The schema knows one type so far, so there is nothing to choose between.
        o.take_enum("type", &["nbd"])?;
        let out = ExportAdd {
            id: o.require_str("id")?,
            node: o.require_str("node-name")?,
            writable: o.take_bool("writable")?.unwrap_or(false),
            writethrough: o.take_bool("writethrough")?.unwrap_or(false),
            allow_inactive: o.take_bool("allow-inactive")?.unwrap_or(false),
            name: o.take_str("name")?,
            description: o.take_str("description")?.unwrap_or_default(),
        };
        o.finish("block-export-add")?;
        Ok(out)
    }
}

/// A checked array of node definitions.
fn list(o: &mut Options, name: &str) -> Result<Vec<Options>> {
    match o.take(name) {
        Some(Value::List(items)) => items.into_iter().map(Options::from_value).collect(),
        _ => Err(Error::new(ErrorKind::InvalidInput, format!("Parameter '{name}' is missing"))),
    }
}

fn out_of_range(name: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("Parameter '{name}' is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(name: &'static str, members: &[(&str, Value)]) -> Request {
        let arguments = Value::Map(members.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect());
        Request { name, arguments, id: None }
    }

    #[test]
    fn queries_change_nothing() {
        assert!(Change::from_request(&request("query-version", &[])).expect("reads").is_none());
    }

    #[test]
    fn removal_is_safe_by_default() {
        let id = ("id", Value::from("e"));
        let change =
            Change::from_request(&request("block-export-del", std::slice::from_ref(&id))).expect("reads");
        assert!(matches!(change, Some(Change::ExportDel { hard: false, .. })));
        let hard = request("block-export-del", &[id, ("mode", "hard".into())]);
        assert!(matches!(
            Change::from_request(&hard).expect("reads"),
            Some(Change::ExportDel { hard: true, .. })
        ));
    }

    #[test]
    fn limits_of_the_server() {
        let addr = Value::Map(vec![("type".into(), "unix".into()), ("path".into(), "/x".into())]);
        let o = Options::new().with("addr", addr);
        let start = NbdServerStart::from_options(o.clone()).expect("reads");
        assert_eq!(start.max_connections, MAX_CONNECTIONS);
        assert_eq!(start.handshake_max, Duration::from_secs(HANDSHAKE_SECONDS));
        assert!(NbdServerStart::from_options(o.with("max-connections", 1u64 << 32)).is_err());
    }
}
