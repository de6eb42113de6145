//! Reading an image's tables from its file, and access to the file and the backing node.

use std::sync::Arc;

use dolmen_graph::{ChildEdge, CreateCx, Cx, Io, Lease, NodeState, Read, Resize, Stamp, Write};
use dolmen_rt::{IoVec, Rt};
use dolmen_types::{BlkEvent, ChildRole, ReadFlags, Result, Span};

use super::bitmap::{BitmapEntry, decode_directory};
use super::header::{Header, first_cluster_len};
use super::layout::{MAX_SNAPSHOT_EXTRA, corrupt};
use super::snapshot::{self, Snapshot};

/// Access to the image file, from wherever an edge to it is at hand.
#[derive(Clone, Copy)]
pub(super) struct File<'a> {
    edge: &'a ChildEdge,
    rt: &'a Rt,
}

impl<'a> File<'a> {
    /// Access over this edge, as far as it was granted.
    pub(super) fn new(edge: &'a ChildEdge, rt: &'a Rt) -> File<'a> {
        File { edge, rt }
    }

    fn cx(&self) -> CreateCx<'a> {
        CreateCx { file: Some(self.edge), fixed: false, rt: self.rt }
    }

    /// For reading.
    pub(super) fn read(&self) -> Result<Io<'a, Read>> {
        self.cx().read()
    }

    /// For writing.
    pub(super) fn write(&self) -> Result<Io<'a, Write>> {
        self.cx().write()
    }

    /// For resizing.
    pub(super) fn resize(&self) -> Result<Io<'a, Resize>> {
        self.cx().resize()
    }

    /// Size of the file in bytes.
    pub(super) fn size(&self) -> u64 {
        self.edge.node.size()
    }

    /// The edge.
    pub(super) fn edge(&self) -> &'a ChildEdge {
        self.edge
    }

    /// The runtime.
    pub(super) fn rt(&self) -> &'a Rt {
        self.rt
    }
}

/// What the driver works with during a request.
#[derive(Clone, Copy)]
pub(super) struct Env<'a> {
    /// The image file.
    pub file: File<'a>,
    /// The backing node.
    pub backing: Option<&'a ChildEdge>,
    cx: Option<Cx<'a>>,
    state: &'a Arc<NodeState>,
}

impl<'a> Env<'a> {
    /// The environment of a request.
    pub(super) fn of(cx: Cx<'a>) -> Env<'a> {
        Env {
            file: File::new(&cx.node.children[0], cx.rt),
            backing: cx.node.children.iter().find(|c| c.role == ChildRole::Backing),
            cx: Some(cx),
            state: &cx.node.state,
        }
    }

    /// An environment outside of a graph node: the image is being made or repaired.
    pub(super) fn alone(file: File<'a>, state: &'a Arc<NodeState>) -> Env<'a> {
        Env { file, backing: None, cx: None, state }
    }

    /// Size of the backing node; 0 when there is none.
    pub(super) fn backing_size(&self) -> u64 {
        self.backing.map_or(0, |b| b.node.size())
    }

    /// Access to the backing node.
    pub(super) fn read_backing(&self) -> Result<Option<Io<'a, Read>>> {
        let (Some(cx), Some(_)) = (self.cx, self.backing) else { return Ok(None) };
        let index = cx.node.children.iter().position(|c| c.role == ChildRole::Backing);
        index.map(|i| cx.read_backing(i)).transpose()
    }

    /// Keeps host clusters from being reused while it lives.
    pub(super) fn lease(&self) -> Lease<'a> {
        self.state.lease()
    }

    /// What the node keeps over snapshots.
    pub(super) fn state(&self) -> &'a Arc<NodeState> {
        self.state
    }

    /// Whether nobody can use any more what was freed at `stamp`.
    pub(super) fn over(&self, stamp: Stamp) -> bool {
        self.state.epochs.over(stamp)
    }
}

/// Whatever a table refers to lies in the file, to the last byte: a file that is shorter has been cut off, and what
/// is missing must not be taken for zeroes.
pub(super) fn in_file(what: &str, at: u64, len: u64, file_size: u64) -> Result<()> {
    if at.checked_add(len).is_some_and(|end| end <= file_size) {
        return Ok(());
    }
    Err(corrupt(format!(
        "{what} at {at:#x} of the image file, {len} bytes, lies beyond the end of the file at {file_size:#x}: \
         the file has been cut off"
    ))
    .remedy(
        "get the whole file from where it came from, or read what is there with read-only=on; if nothing is \
         missing, lengthen the file with 'truncate -s SIZE FILE'",
    ))
}

/// Reads guest data from the file.
pub(super) async fn read_data(io: Io<'_, Read>, at: u64, to: &IoVec) -> Result<()> {
    let len = to.len() as u64;
    in_file("a data cluster", at, len, io.size())?;
    io.read(Span::new(at, len), to, ReadFlags::NONE).await
}

/// Reads into a slice; what lies beyond the end of the file reads as zeroes.
pub(super) async fn read_bytes(io: Io<'_, Read>, at: u64, out: &mut [u8]) -> Result<()> {
    let have = io.size().saturating_sub(at).min(out.len() as u64) as usize;
    out[have..].fill(0);
    if have > 0 {
        io.read_bytes(at, &mut out[..have]).await?;
    }
    Ok(())
}

/// Reads a table of big-endian numbers.
pub(super) async fn read_table(io: Io<'_, Read>, at: u64, entries: usize) -> Result<Vec<u64>> {
    // What lies beyond the end of the file need not be read, however large the header says that the table is.
    const CHUNK: usize = 1 << 20;
    let mut out = vec![0u64; entries];
    let mut bytes = vec![0u8; CHUNK.min(entries * 8)];
    for (i, part) in out.chunks_mut(CHUNK / 8).enumerate() {
        let from = at + (i * CHUNK) as u64;
        if from >= io.size() {
            break;
        }
        let b = &mut bytes[..part.len() * 8];
        read_bytes(io, from, b).await?;
        for (e, raw) in part.iter_mut().zip(b.chunks_exact(8)) {
            *e = u64::from_be_bytes(raw.try_into().expect("eight bytes"));
        }
    }
    Ok(out)
}

/// What is read of the first cluster at first: a header is rarely longer.
const HEAD: u64 = 4096;

/// The header and the first sector of an image.
pub(super) async fn load_header(io: Io<'_, Read>) -> Result<(Header, [u8; 512])> {
    let mut head = vec![0u8; io.size().min(HEAD) as usize];
    read_bytes(io, 0, &mut head).await?;
    let cluster = io.size().min(first_cluster_len(&head)? as u64) as usize;
    head.truncate(cluster);
    if head.len() < cluster && !Header::ends_within(&head) {
        head.resize(cluster, 0);
        read_bytes(io, 0, &mut head).await?;
    }
    let header = Header::decode(&head)?;
    let mut sector = [0u8; 512];
    let n = head.len().min(512);
    sector[..n].copy_from_slice(&head[..n]);
    Ok((header, sector))
}

/// The active L1 table.
pub(super) async fn load_l1(io: Io<'_, Read>, h: &Header) -> Result<Vec<u64>> {
    read_table(io, h.l1_table.0, h.l1_entries as usize).await
}

/// The refcount table.
pub(super) async fn load_reftable(io: Io<'_, Read>, h: &Header) -> Result<Vec<u64>> {
    h.check_reftable()?;
    let entries = (u64::from(h.reftable_clusters) << h.cluster_bits) / 8;
    io.event(BlkEvent::ReftableLoad)?;
    read_table(io, h.reftable.0, entries as usize).await
}

/// The snapshot table, and the bytes that it takes.
pub(super) async fn load_snapshots(io: Io<'_, Read>, h: &Header) -> Result<(Vec<Snapshot>, u64)> {
    let mut out = Vec::new();
    let mut at = 0u64;
    let geo = h.geometry();
    h.check_snapshot_table()?;
    for _ in 0..h.snapshots {
        let mut want = 64 + MAX_SNAPSHOT_EXTRA as usize;
        loop {
            let mut b = vec![0u8; want];
            read_bytes(io, h.snapshot_table.0 + at, &mut b).await?;
            match snapshot::decode_entry(&b, geo)? {
                snapshot::Step::NeedBytes(n) => want = n,
                snapshot::Step::Entry(s, used) => {
                    out.push(*s);
                    at += used as u64;
                    break;
                }
            }
        }
        snapshot::check_table_len(at)?;
    }
    Ok((out, at))
}

/// The bitmap directory.
pub(super) async fn load_bitmaps(io: Io<'_, Read>, h: &Header) -> Result<Vec<BitmapEntry>> {
    let Some(ext) = h.bitmaps()? else { return Ok(Vec::new()) };
    if io.size().saturating_sub(ext.directory.0) < ext.directory_bytes {
        return Err(corrupt("the bitmap directory lies beyond the end of the file"));
    }
    let mut b = vec![0u8; ext.directory_bytes as usize];
    read_bytes(io, ext.directory.0, &mut b).await?;
    decode_directory(&b, ext.count, h.geometry())
}
