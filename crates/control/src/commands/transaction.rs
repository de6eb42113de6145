//! `transaction`: several commands at one instant, all of them or none.

use dolmen_qmp::QmpError;
use dolmen_qmp::schema::{Field, Shape, Ty};
use dolmen_rt::LocalFuture;
use dolmen_types::{Error, ErrorKind, Options};

use crate::act::{Edit, Proposal};
use crate::row::{CommandRow, Kind, MakeCx};
use crate::world::Done;

/// Its edits share a draft, which is published in one commit.
struct Transaction {
    /// In their order.
    edits: Vec<Box<dyn Edit>>,
    /// Its jobs end together: all of them successfully, or none.
    grouped: bool,
}

impl Transaction {
    fn from_options(cx: &MakeCx<'_>, mut o: Options) -> Result<Transaction, QmpError> {
        let mut properties = o.take_map("properties")?.unwrap_or_default();
        let mode = properties.take_enum("completion-mode", &["individual", "grouped"])?;
        let mut edits: Vec<Box<dyn Edit>> = Vec::new();
        for action in o.take_list("actions")?.unwrap_or_default() {
            let mut action = Options::from_value(action)?;
            let name = action.require_str("type")?;
            let data = action.take_map("data")?.unwrap_or_default();
            edits.push(edit(cx, &name, data)?);
        }
        Ok(Transaction { edits, grouped: mode == Some("grouped") })
    }
}

/// Every action is a command, but for the one that fails on purpose.
fn edit(cx: &MakeCx<'_>, name: &str, data: Options) -> Result<Box<dyn Edit>, QmpError> {
    if name == "abort" {
        return Ok(Box::new(Abort));
    }
    match cx.table.find(name) {
        Ok(CommandRow { schema, kind: Kind::Edit(make), .. }) if schema.in_transactions => {
            make(&MakeCx { name: schema.name, ..*cx }, data)
        }
        _ => {
            let text = format!("a transaction has no action '{name}'");
            Err(Error::new(ErrorKind::InvalidInput, text).into())
        }
    }
}

impl Edit for Transaction {
    fn propose<'a>(self: Box<Self>, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move {
            if self.grouped {
                p.group();
            }
            for edit in self.edits {
                edit.propose(p).await?;
            }
            Ok(())
        })
    }
}

/// Fails.
struct Abort;

impl Edit for Abort {
    fn propose<'a>(self: Box<Self>, _: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async { Err(QmpError::generic("Transaction aborted using Abort action")) })
    }
}

static PROPERTIES: Shape =
    Shape::of(&[Field::optional("completion-mode", Ty::Enum(&["individual", "grouped"]))]);
static ARGUMENTS: Shape = Shape::of(&[
    Field::required("actions", Ty::Array(&Ty::TransactionAction)),
    Field::optional("properties", Ty::Object(&PROPERTIES)),
]);

pub(crate) const ROWS: &[CommandRow] = &[CommandRow::edit(
    "transaction",
    Ty::Object(&ARGUMENTS),
    |cx, o| Ok(Box::new(Transaction::from_options(cx, o)?)),
    "Several commands at one instant: all of them or none; grouped jobs also end together.",
)];
