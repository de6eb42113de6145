//! The list of the kinds of jobs. Adding one is a module, with its row below its code, and a line here.

use crate::backup::BACKUP;
use crate::commit::COMMIT;
use crate::create::CREATE;
use crate::mirror::MIRROR;
use crate::prefetch::PREFETCH;
use crate::stream::STREAM;
use crate::work::JobKind;

/// Every kind.
pub static KINDS: &[&JobKind] = &[&COMMIT, &STREAM, &MIRROR, &BACKUP, &CREATE, &PREFETCH];

/// Kinds that QEMU has and that do not exist here; clients look for their names.
pub static OF_QEMU_ONLY: &[&str] = &["amend", "snapshot-load", "snapshot-save", "snapshot-delete"];
