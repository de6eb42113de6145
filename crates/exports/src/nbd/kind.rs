//! The type `nbd`: an export at the NBD server of the program.

use std::rc::Rc;
use std::sync::Arc;

use dolmen_graph::UserEdge;
use dolmen_types::{Error, ErrorKind, OptionSpec, OptionType, Result};

use super::offer::{NbdExport, check_texts, taken};
use super::server::NbdServer;
use crate::export::{Common, Export, ExportCx, ExportKind, Proposal};

/// The row.
pub static NBD: ExportKind = ExportKind {
    name: "nbd",
    options: &[
        OptionSpec::optional("name", OptionType::Str, "name that clients ask for (default: node-name)"),
        OptionSpec::optional("description", OptionType::Str, "free text for people, at most 4096 bytes"),
    ],
    parse: |o| {
        Ok(Box::new(Asked {
            name: o.take_str("name")?,
            description: o.take_str("description")?.unwrap_or_default(),
        }))
    },
};

#[derive(Debug)]
struct Asked {
    name: Option<String>,
    description: String,
}

impl Asked {
    fn name<'a>(&'a self, common: &'a Common) -> &'a str {
        self.name.as_ref().unwrap_or(&common.node)
    }
}

impl Proposal for Asked {
    fn check(&self, cx: &ExportCx<'_>, common: &Common) -> Result<()> {
        let server = running(cx)?;
        let name = self.name(common);
        if server.has(name) {
            return Err(taken(name));
        }
        check_texts(name, &self.description)
    }

    fn make(&self, cx: &ExportCx<'_>, common: &Common, edge: Arc<UserEdge>) -> Result<Rc<dyn Export>> {
        let export = NbdExport {
            name: self.name(common).to_owned(),
            description: self.description.clone(),
            edge,
            writable: common.writable,
            writethrough: common.writethrough,
        };
        let server: Option<Rc<NbdServer>> = cx.servers.get();
        let gone = || Error::new(ErrorKind::Disconnected, "NBD server was stopped meanwhile");
        server.ok_or_else(gone)?.export(export)
    }
}

fn running(cx: &ExportCx<'_>) -> Result<Rc<NbdServer>> {
    cx.servers.get().ok_or_else(|| Error::new(ErrorKind::NotFound, "NBD server not running"))
}
