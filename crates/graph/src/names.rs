//! Names with a protocol, as users type them and images record them: `nbd://host/export`. What comes after the
//! protocol is the business of the driver that has it ([`DriverKind::from_name`]).

use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};

use dolmen_rt::Rt;
use dolmen_types::{Options, Result, os_name};
use percent_encoding::{AsciiSet, CONTROLS, percent_encode, utf8_percent_encode};

use crate::{DriverKind, ProtocolName, Registry};

impl Registry {
    /// The options that a name with a protocol stands for.
    ///
    /// # Errors
    /// `Unsupported` for a protocol that no driver has, `InvalidInput` for a name that makes no sense.
    pub fn protocol_name(self, name: &str) -> Result<Options> {
        let (protocol, rest) = name.split_once(':').unwrap_or((name, ""));
        let name = ProtocolName { whole: name, protocol, rest };
        let row = self.rows().iter().find(|d| d.protocols.contains(&protocol));
        match row.and_then(|d| d.from_name) {
            Some(from_name) => from_name(self, name),
            None => Err(name.unknown()),
        }
    }

    /// The options of a plain file name: the driver is chosen by what the name leads to. May wait for
    /// the file system.
    pub fn path_options(self, name: &str) -> Options {
        let path = os_name(name);
        self.path_options_for(name, fs::metadata(Path::new(&path)).ok().as_ref())
    }

    /// The same, knowing what the name leads to.
    pub(crate) fn path_options_for(self, name: &str, found: Option<&Metadata>) -> Options {
        match self.opens_path(Path::new(&os_name(name)), found) {
            Some(kind) => Options::new().with("driver", kind.name).with("filename", name),
            None => Options::new().with("filename", name),
        }
    }

    /// The driver of files that are not there yet.
    pub fn host_file(self) -> Option<&'static DriverKind> {
        self.opens_path(Path::new(""), None)
    }

    fn opens_path(self, path: &Path, found: Option<&Metadata>) -> Option<&'static DriverKind> {
        let sure = |d: &'static DriverKind| Some((d.path?(path, found), d));
        let surest = self.rows().iter().filter_map(|d| sure(d)).max_by_key(|(sure, _)| *sure);
        surest.filter(|(sure, _)| *sure > 0).map(|(_, kind)| kind)
    }
}

/// [`Registry::path_options`] in a task.
pub(crate) async fn path_options_in(registry: Registry, rt: &Rt, name: &str) -> Options {
    let Some(io) = rt.io() else {
        return registry.path_options_for(name, None);
    };
    let (path, name) = (PathBuf::from(os_name(name)), name.to_owned());
    io.blocking_at(&path, move || registry.path_options(&name)).await
}

/// Text as a part of a URI, as QEMU writes it: only what would end the part becomes `%XX`, and what is no text.
pub fn encode_uri(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for chunk in dolmen_types::bytes(text).utf8_chunks() {
        out.extend(utf8_percent_encode(chunk.valid(), ENDS));
        out.extend(percent_encode(chunk.invalid(), ENDS));
    }
    out
}

/// What has a meaning in a URI.
const ENDS: &AsciiSet = &CONTROLS.add(b'%').add(b'?').add(b'#').add(b'&');
