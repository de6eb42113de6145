//! Making new images: a file, and a format in it.

use dolmen_rt::Rt;
use dolmen_types::{Actions, ChildRole, Claim, Error, ErrorKind, OpId, Options, Result};

use crate::{
    ChildEdge, CreateCx, GraphOwner, Implicit, NodeOpener, OpInfo, OpenPolicy, Registry, has_protocol,
    protocol_name,
};

/// Nothing that the new file may hold is looked at.
const NOTHING_IMPLICIT: OpenPolicy =
    OpenPolicy { implicit: Implicit::Deny, probe: false, permit_with: "", probe_with: "" };

/// Makes a new image of `format` in the file `filename`, which is replaced if it exists,
/// unless somebody uses it. `options` are the format's and the file driver's create
/// options, with `size` in bytes.
///
/// # Errors
/// `Unsupported` when the format can't be created; `Locked`; what the drivers say. A file
/// that has been made by then stays.
pub async fn create_image(
    registry: Registry,
    rt: &Rt,
    filename: &str,
    format: &str,
    mut options: Options,
) -> Result<()> {
    let kind = registry.find(format)?;
    let unsupported = |who: &str, name: &str| {
        Error::new(ErrorKind::Unsupported, format!("{who} driver '{name}' does not support image creation"))
    };
    let create = kind.create.ok_or_else(|| unsupported("Format", format))?;
    if let (true, Some((protocol, _))) = (has_protocol(filename), filename.split_once(':')) {
        return Err(unsupported("Protocol", protocol));
    }
    let file = registry.find("file")?;
    let create_file = file.create.ok_or_else(|| unsupported("Protocol", "file"))?;
    let mut of_file = Options::new().with("filename", filename);
    for spec in file.create_options {
        let known = kind.create_options.iter().any(|s| s.name == spec.name);
        if spec.name != "filename"
            && !known
            && let Some(v) = options.take(spec.name)
        {
            of_file.set(spec.name, v);
        }
    }
    of_file.set("size", 0u64);
    create_file(CreateCx { file: None, rt }, of_file).await?;

    let mut owner = GraphOwner::new(rt.clone());
    let opener = NodeOpener { registry, policy: NOTHING_IMPLICIT, names: protocol_name, rt };
    let mut draft = owner.draft();
    let op = OpId::internal("create");
    draft.add_op(OpInfo {
        id: op.clone(),
        kind: "command".into(),
        detail: format!("creation of '{filename}'"),
        since: None,
        ends_with: None,
        instead_of_writing: None,
    })?;
    let leaf = Options::new().with("driver", "file").with("filename", filename);
    let node = opener.open(&mut draft, leaf, true).await?;
    draft.add_user(&op, &node, Claim { needs: Actions::DATA, allows: Actions::NONE })?;
    owner.commit(draft).await?;
    let made = match owner.edges(&op).next() {
        Some(user) => {
            let edge =
                ChildEdge { name: "file", role: ChildRole::Metadata, node: user.node(), claim: user.claim() };
            create(CreateCx { file: Some(&edge), rt }, options).await
        }
        None => Err(unsupported("Format", format)),
    };
    let closed = owner.close().await;
    made.and(closed)
}
