//! NBD URIs, as the NBD project specifies them (nbd/doc/uri.md): `nbd://[USER@]HOST[:PORT]/EXPORT` and
//! `nbd+unix://[USER@]/EXPORT?socket=PATH`. Everything but the delimiters may be percent-encoded.

use dolmen_types::{Error, ErrorKind, Options, Result};
use percent_encoding::percent_decode_str;

/// The port that is registered for NBD.
const DEFAULT_PORT: &str = "10809";

/// The options that a URI stands for; `None` when the name is no NBD URI.
pub(crate) fn nbd_uri(name: &str) -> Option<Result<Options>> {
    let (unix, rest) = match name.strip_prefix("nbd+unix://") {
        Some(rest) => (true, rest),
        None => (false, name.strip_prefix("nbd://").or_else(|| name.strip_prefix("nbd+tcp://"))?),
    };
    Some(parse(unix, rest).map_err(|why| {
        Error::new(ErrorKind::InvalidInput, format!("'{name}' is no NBD URI: {why}"))
            .remedy("write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")
    }))
}

fn parse(unix: bool, rest: &str) -> std::result::Result<Options, String> {
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    // The user is for TLS with pre-shared keys, and means nothing without.
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let server = if unix {
        let path = query.strip_prefix("socket=").ok_or("it names no socket")?;
        if path.contains('&') {
            return Err("it has parameters besides socket".to_owned());
        }
        if !host.is_empty() {
            return Err(format!("a Unix socket has no host ('{host}')"));
        }
        Options::new().with("type", "unix").with("path", decode(path)?)
    } else {
        if !query.is_empty() {
            return Err(format!("it has parameters ('{query}')"));
        }
        let (host, port) = match host.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest.split_once(']').ok_or("a bracket is not closed")?;
                (address, port)
            }
            None => host.find(':').map_or((host, ""), |at| host.split_at(at)),
        };
        let port = match port.strip_prefix(':') {
            Some("") => DEFAULT_PORT,
            Some(port) => port,
            None if port.is_empty() => DEFAULT_PORT,
            None => return Err(format!("'{port}' is no port")),
        };
        // An empty host is this one, as with QEMU.
        let host = if host.is_empty() { "localhost".to_owned() } else { decode(host)? };
        Options::new().with("type", "inet").with("host", host).with("port", port)
    };
    let export = decode(export.trim_start_matches('/'))?;
    Ok(Options::new().with("driver", "nbd").with("server", server.into_value()).with("export", export))
}

fn decode(text: &str) -> std::result::Result<String, String> {
    percent_decode_str(text)
        .decode_utf8()
        .map(|s| s.into_owned())
        .map_err(|_| format!("'{text}' is not UTF-8 when it is decoded"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris() {
        let inet = |host: &str, port: &str, export: &str| {
            let server = Options::new().with("type", "inet").with("host", host).with("port", port);
            Some(
                Options::new()
                    .with("driver", "nbd")
                    .with("server", server.into_value())
                    .with("export", export),
            )
        };
        let unix = |path: &str, export: &str| {
            let server = Options::new().with("type", "unix").with("path", path);
            Some(
                Options::new()
                    .with("driver", "nbd")
                    .with("server", server.into_value())
                    .with("export", export),
            )
        };
        for (uri, expected) in [
            ("nbd://h/e", inet("h", "10809", "e")),
            ("nbd+tcp://h:5", inet("h", "5", "")),
            ("nbd://user@h:5//e/f", inet("h", "5", "e/f")),
            ("nbd://[::1]/e", inet("::1", "10809", "e")),
            ("nbd://[fe80::1%25eth0]:7/", inet("fe80::1%eth0", "7", "")),
            ("nbd:///e", inet("localhost", "10809", "e")),
            ("nbd://h/a%20b%2Fc%3F", inet("h", "10809", "a b/c?")),
            ("nbd+unix:///a%20b?socket=%2Ftmp%2Fx", unix("/tmp/x", "a b")),
            ("nbd+unix://user@/e?socket=s", unix("s", "e")),
            ("nbd+unix://?socket=s", unix("s", "")),
            ("nbd+unix:///e", None),
            ("nbd+unix:///e?socket=s&tls=x", None),
            ("nbd+unix://host/e?socket=s", None),
            ("nbd://h/e?socket=s", None),
            ("nbd://[::1/e", None),
            ("nbd://[::1]x/e", None),
            ("nbd://h/%ff", None),
        ] {
            assert_eq!(nbd_uri(uri).expect("a URI").ok(), expected, "{uri}");
        }
        assert!(nbd_uri("nbds://h/e").is_none() && nbd_uri("nbd:h:5").is_none());
    }
}
