//! Socket addresses as QMP and command lines write them.

use std::fmt;

use dolmen_types::{Error, ErrorKind, Options, Result, Value};

/// Where a server listens or a client connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketAddress {
    /// TCP.
    Inet {
        /// Name or address; empty for every local address.
        host: String,
        /// A number, as text.
        port: String,
    },
    /// A Unix socket with a path.
    Unix {
        /// The path.
        path: String,
    },
}

impl SocketAddress {
    /// Reads either form: flat (`{type, path}`, command line and drivers) or with
    /// the members in `data` (`nbd-server-start`).
    ///
    /// # Errors
    /// When a member is missing, has the wrong type or is not known.
    pub fn from_value(value: Value) -> Result<SocketAddress> {
        let mut o = Options::from_value(value)?;
        let ty = o.require_str("type")?;
        if let Some(data) = o.take_map("data")? {
            o.finish("socket address")?;
            o = data;
        }
        let out = match ty.as_str() {
            "inet" => SocketAddress::Inet { host: o.require_str("host")?, port: o.require_str("port")? },
            "unix" => SocketAddress::Unix { path: o.require_str("path")? },
            other => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("Parameter 'type' does not accept value '{other}'"),
                )
                .remedy("use one of: inet, unix"));
            }
        };
        o.finish("socket address")?;
        Ok(out)
    }
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketAddress::Inet { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            SocketAddress::Inet { host, port } => write!(f, "{host}:{port}"),
            SocketAddress::Unix { path } => f.write_str(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::to_value;
    use serde_json::json;

    #[test]
    fn both_forms() {
        let read = |j| SocketAddress::from_value(to_value(j, "").unwrap());
        let unix = SocketAddress::Unix { path: "/x".into() };
        assert_eq!(read(json!({"type": "unix", "path": "/x"})).unwrap(), unix);
        assert_eq!(read(json!({"type": "unix", "data": {"path": "/x"}})).unwrap(), unix);
        assert_eq!(
            read(json!({"type": "inet", "host": "::1", "port": "10809"})).unwrap().to_string(),
            "[::1]:10809"
        );
        assert!(read(json!({"type": "unix", "path": "/x", "zork": 1})).is_err());
        assert!(read(json!({"type": "vsock"})).is_err());
    }
}
