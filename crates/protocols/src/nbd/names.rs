//! Names of disks on NBD servers: `nbd:HOST:PORT`, `nbd://HOST/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`.

use dolmen_graph::ProtocolName;
use dolmen_types::{Error, ErrorKind, Options, Result, text_of};
use percent_encoding::percent_decode;

/// What names begin with.
pub(super) const PROTOCOLS: &[&str] = &["nbd", "nbd+tcp", "nbd+unix"];

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

/// The options that a name stands for.
pub(super) fn from_name(name: ProtocolName<'_>) -> Result<Options> {
    let ProtocolName { whole, protocol, rest } = name;
    if protocol == "nbd" && !rest.starts_with("//") {
        return legacy_nbd(rest);
    }
    let uri = rest.strip_prefix("//").ok_or_else(|| name.unknown())?;
    nbd_uri(uri, protocol == "nbd+unix").map_err(|why| {
        invalid("No valid URL specified").source(format!("'{whole}': {why}")).remedy(
            "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, with %XX for special characters",
        )
    })
}

fn nbd(server: Options, export: &str) -> Options {
    Options::new().with("driver", "nbd").with("server", server.into_value()).with("export", export)
}

fn unix(path: &str) -> Options {
    Options::new().with("type", "unix").with("path", path)
}

fn inet(host: &str, port: &str) -> Options {
    Options::new().with("type", "inet").with("host", host).with("port", port)
}

/// `unix:PATH[:exportname=NAME]` and `HOST:PORT[:exportname=NAME]`, in which nothing is encoded.
fn legacy_nbd(rest: &str) -> Result<Options> {
    let (address, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let server = match address.strip_prefix("unix:") {
        Some(path) => unix(path),
        None => {
            let (host, port) =
                host_and_port(address).filter(|(_, port)| port.is_some()).ok_or_else(|| {
                    invalid(format!("'nbd:{rest}' has no port"))
                        .remedy("write nbd:HOST:PORT, nbd:unix:PATH or nbd://HOST/EXPORT")
                })?;
            inet(host, port.unwrap_or_default())
        }
    };
    Ok(nbd(server, export))
}

/// `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`.
fn host_and_port(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, after) = rest.split_once(']')?;
        return match after.strip_prefix(':') {
            Some(port) => Some((host, Some(port))),
            None => after.is_empty().then_some((host, None)),
        };
    }
    match text.split_once(':') {
        Some((host, port)) => Some((host, Some(port))),
        None => Some((text, None)),
    }
}

/// What comes after `nbd://` or `nbd+unix://`.
fn nbd_uri(uri: &str, is_unix: bool) -> Result<Options, &'static str> {
    let uri = uri.split_once('#').map_or(uri, |(uri, _)| uri);
    let (place, query) = match uri.split_once('?') {
        Some((place, query)) => (place, Some(query)),
        None => (uri, None),
    };
    let (authority, path) = place.split_once('/').unwrap_or((place, ""));
    // NBD's names are UTF-8.
    let export = String::from_utf8(decode(path)?).map_err(|_| "the export's name is not valid UTF-8")?;
    // Whoever the user is, the protocol does not ask.
    let server = authority.rsplit_once('@').map_or(authority, |(_, server)| server);
    if is_unix {
        if !server.is_empty() {
            return Err("a Unix socket has no host");
        }
        let socket = query.and_then(|q| q.strip_prefix("socket=")).filter(|q| !q.contains('&'));
        let socket = decode(socket.ok_or("it needs '?socket=PATH' and nothing else")?)?;
        return Ok(nbd(unix(&text_of(&socket)), &export));
    }
    if query.is_some_and(|q| !q.is_empty()) {
        return Err("it takes nothing after '?'");
    }
    let (host, port) = host_and_port(server).ok_or("the address is not complete")?;
    if host.is_empty() {
        return Err("it names no host");
    }
    let host = String::from_utf8(decode(host)?).map_err(|_| "the host's name is not valid UTF-8")?;
    let port = port.filter(|p| !p.is_empty()).unwrap_or("10809");
    if port.parse::<u16>().is_err() {
        return Err("the port is not a number below 65536");
    }
    Ok(nbd(inet(&host, port), &export))
}

/// Replaces `%XX`.
fn decode(text: &str) -> Result<Vec<u8>, &'static str> {
    let digits = |after: &str| after.len() >= 2 && after.bytes().take(2).all(|b| b.is_ascii_hexdigit());
    if !text.split('%').skip(1).all(|after| digits(after) && !after.starts_with("00")) {
        return Err("a '%' is followed by two hexadecimal digits, not 00");
    }
    Ok(percent_decode(&dolmen_types::bytes(text)).collect())
}

#[cfg(test)]
mod tests {
    use dolmen_graph::{DriverKind, Registry, encode_uri};

    use super::super::NBD;

    const ROWS: Registry = {
        static ROWS: &[&DriverKind] = &[&NBD];
        Registry::new(ROWS)
    };

    fn text(name: &str) -> String {
        match ROWS.protocol_name(name) {
            Ok(o) => o.into_value().to_string(),
            Err(e) => format!("error: {e}"),
        }
    }

    /// As qemu-img 10.0.2 was seen to understand them.
    #[test]
    fn nbd_names() {
        let inet = |host: &str, port: &str, export: &str| {
            format!(
                r#"{{"driver": "nbd", "server": {{"type": "inet", "host": "{host}", "port": "{port}"}}, "export": "{export}"}}"#
            )
        };
        let unix = |path: &str, export: &str| {
            format!(
                r#"{{"driver": "nbd", "server": {{"type": "unix", "path": "{path}"}}, "export": "{export}"}}"#
            )
        };
        for (name, expected) in [
            ("nbd:unix:/tmp/s:exportname=e", unix("/tmp/s", "e")),
            ("nbd:unix:/tmp/s:exportname=a%20b", unix("/tmp/s", "a%20b")),
            ("nbd:unix:/tmp/s:exportname=a:b", unix("/tmp/s", "a:b")),
            ("nbd:localhost:10809", inet("localhost", "10809", "")),
            ("nbd:[::1]:1:exportname=x", inet("::1", "1", "x")),
            ("nbd+unix:///e?socket=/tmp/s", unix("/tmp/s", "e")),
            ("nbd+unix:///a%20b?socket=/none%20x", unix("/none x", "a b")),
            ("nbd+unix:////a?socket=%2Ftmp/s", unix("/tmp/s", "/a")),
            ("nbd+unix:///a%2Fb+c?socket=/s", unix("/s", "a/b+c")),
            ("nbd+unix://?socket=/s", unix("/s", "")),
            ("nbd+tcp://h:5/e", inet("h", "5", "e")),
            ("nbd://user@h:5/e", inet("h", "5", "e")),
            ("nbd://[::1]/x", inet("::1", "10809", "x")),
            ("nbd://[::1]:7/x", inet("::1", "7", "x")),
            ("nbd://user@[::1]:7", inet("::1", "7", "")),
            ("nbd://h/x#frag", inet("h", "10809", "x")),
            ("nbd://h%41:/x", inet("hA", "10809", "x")),
            ("nbd://user@h:5//e/f", inet("h", "5", "/e/f")),
            ("nbd://[fe80::1%25eth0]:7/", inet("fe80::1%eth0", "7", "")),
            ("nbd+unix://user@/e?socket=s", unix("s", "e")),
            ("nbd+unix:///a b?socket=/no ne", unix("/no ne", "a b")),
        ] {
            assert_eq!(text(name), expected, "{name}");
        }
        for bad in [
            "nbd:nonsense",
            "nbd+unix:///a?socket=/none&b=1",
            "nbd+unix://host/x?socket=/none",
            "nbd+unix:///x",
            "nbd://h:1/x?socket=/y",
            "nbd://h:99999/x",
            "nbd+tcp://h:1/a%2",
            "nbd+tcp://h:1/a%zz",
            "nbd+tcp://h:1/a%00",
            "nbd://",
            "nbd:///x",
            "nbd://[::1/x",
            "nbd+unix:///%ff?socket=/none",
            "nbd+foo://h",
            "gopher://x",
        ] {
            assert!(ROWS.protocol_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for export in ["plain", "a b", "50%", "a?b#c&d", "gr\u{fc}n", "/x//y"] {
            let name = format!("nbd+unix:///{}?socket={}", encode_uri(export), encode_uri("/a b%"));
            let mut o = ROWS.protocol_name(&name).expect("a name");
            assert_eq!(o.require_str("export").expect("text"), export);
            let mut server = o.take_map("server").expect("a map").expect("there");
            assert_eq!(server.require_str("path").expect("text"), "/a b%");
        }
        assert_eq!(encode_uri("/run/vm-1_disk.sock"), "/run/vm-1_disk.sock");
    }
}
