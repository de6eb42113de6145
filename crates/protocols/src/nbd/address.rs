//! The `server` option: where an NBD server listens.

use std::fmt;

use dolmen_graph::encode_uri;
use dolmen_rt::Addr;
use dolmen_types::{Error, ErrorKind, Options, Result, os_name, text_of_os};

/// The port that is registered for NBD.
const DEFAULT_PORT: u16 = 10809;

/// An address; unlike the runtime's it can be written as a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address(Addr);

impl Address {
    /// Takes `server` out, as an object or as dotted keys; or the flat options `path`, or
    /// `host` and `port`, that older command lines use.
    pub(super) fn take(options: &mut Options) -> Result<Address> {
        let mut server = options.take_map("server")?.unwrap_or_default();
        for (dotted, key) in [
            ("server.type", "type"),
            ("server.path", "path"),
            ("server.host", "host"),
            ("server.port", "port"),
            ("path", "path"),
            ("host", "host"),
            ("port", "port"),
        ] {
            if let Some(v) = options.take(dotted) {
                server.set(key, v);
            }
        }
        let kind = match server.take_enum("type", &["inet", "unix"])? {
            Some(kind) => kind,
            None if server.has("path") => "unix",
            None => "inet",
        };
        let address = if kind == "unix" {
            let path = server.require_str("path").map_err(|e| e.context("server"))?;
            Addr::Unix(os_name(&path).into())
        } else {
            let host = server.require_str("host").map_err(|e| e.context("server"))?;
            let port = match server.take_size("port")? {
                None => DEFAULT_PORT,
                Some(n) => u16::try_from(n).map_err(|_| {
                    Error::new(ErrorKind::InvalidInput, format!("server.port: {n} is not a TCP port"))
                })?,
            };
            Addr::Inet { host, port }
        };
        server.finish("server")?;
        Ok(Address(address))
    }

    /// For connecting.
    pub(super) fn addr(&self) -> Addr {
        self.0.clone()
    }

    /// The export as a URL.
    pub(super) fn url(&self, export: &str) -> String {
        let export = encode_uri(export);
        match &self.0 {
            Addr::Unix(path) => {
                format!("nbd+unix:///{export}?socket={}", encode_uri(&text_of_os(path.as_os_str())))
            }
            Addr::Inet { host, port } if host.contains(':') => format!("nbd://[{host}]:{port}/{export}"),
            Addr::Inet { host, port } => format!("nbd://{host}:{port}/{export}"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let unix = Options::new().with("type", "unix").with("path", "/s");
        let mut o = Options::new().with("server", unix.into_value());
        let address = Address::take(&mut o).unwrap();
        assert_eq!(address.url("e"), "nbd+unix:///e?socket=/s");
        assert_eq!(address.url("50% of a b?"), "nbd+unix:///50%25 of a b%3F?socket=/s");
        let mut o =
            Options::new().with("server.type", "inet").with("server.host", "::1").with("server.port", "7");
        assert_eq!(Address::take(&mut o).unwrap().url(""), "nbd://[::1]:7/");
        assert!(o.is_empty());
        let mut o = Options::new().with("host", "h");
        assert_eq!(Address::take(&mut o).unwrap().url("x"), "nbd://h:10809/x");
        for bad in [
            Options::new(),
            Options::new().with("server.type", "unix"),
            Options::new().with("server.type", "vsock"),
            Options::new().with("host", "h").with("port", "65536"),
        ] {
            assert!(Address::take(&mut bad.clone()).is_err(), "{bad:?}");
        }
    }
}
