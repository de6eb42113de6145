//! The commands that start a job: one for each kind.

use dolmen_jobs::{JobKind, KINDS};
use dolmen_qmp::QmpError;
use dolmen_qmp::schema::Ty;
use dolmen_types::Options;

use crate::act::Edit;
use crate::jobs::JobStart;
use crate::row::{CommandRow, MakeCx};

fn start(cx: &MakeCx<'_>, o: Options) -> Result<Box<dyn Edit>, QmpError> {
    let kind = KINDS.iter().find(|k| k.command == cx.name);
    let kind = kind.ok_or_else(|| QmpError::generic(format!("'{}' starts no job", cx.name)))?;
    Ok(Box::new(JobStart::read(kind, o)?))
}

const fn row(kind: &JobKind) -> CommandRow {
    let row = CommandRow::edit(kind.command, Ty::Options(kind.options), start, kind.help);
    if kind.in_transactions { row.in_transactions() } else { row }
}

const OF_KINDS: [CommandRow; KINDS.len()] = {
    let mut rows = [row(KINDS[0]); KINDS.len()];
    let mut i = 1;
    while i < rows.len() {
        rows[i] = row(KINDS[i]);
        i += 1;
    }
    rows
};

pub(crate) const ROWS: &[CommandRow] = &OF_KINDS;
