//! Block status across a chain: which layer holds a range, and what it reads as.

use std::sync::Arc;

use dolmen_rt::Rt;
use dolmen_types::{Result, Span};

use crate::io::status;
use crate::{Node, SELF, Where};

/// The state of the first `len` bytes of a span, seen from the top of a chain.
#[derive(Clone, Debug)]
pub struct ChainStatus {
    /// How many bytes the answer holds for; at least 1 for a non-empty span.
    pub len: u64,
    /// Backing links walked from the top to the layer that holds the range; when nobody
    /// holds it, the last layer looked at.
    pub depth: u32,
    /// Some layer (down to the last one looked at) holds the range.
    pub present: bool,
    /// Reads as zeroes.
    pub zero: bool,
    /// Holds data (may still be zeroes).
    pub data: bool,
    /// Stored compressed.
    pub compressed: bool,
    /// The range lies past the end of the layer at `depth`, which is shorter than the one
    /// above: that is why it reads as zeroes.
    pub past_end: bool,
    /// The leaf that holds the bytes, and where in it.
    pub place: Option<(Arc<Node>, u64)>,
}

/// What one layer says about a span.
enum Layer {
    Held {
        zero: bool,
        data: bool,
        compressed: bool,
        place: Option<(Arc<Node>, u64)>,
        /// The child that holds the bytes, where in it, and in which unit the node
        /// allocates, if the bytes are not a leaf's own.
        inside: Option<(Arc<Node>, u64, u64)>,
    },
    /// The layer does not hold it: look at this offset of this backing node, if any.
    Below(Option<Arc<Node>>, u64),
}

/// Goes through filters to the node that owns the allocation. Returns the length that the
/// answer holds for.
async fn layer(top: &Arc<Node>, rt: &Rt, mut span: Span) -> Result<(u64, Layer)> {
    let mut node = top.clone();
    // Set once a `raw` or format said where its data are: from then on only "is it
    // zero?" is of interest.
    loop {
        let e = status(&node, rt, span).await?;
        span = span.prefix(e.len);
        match e.place {
            Where::Through { child, at } => {
                span = Span::new(at, e.len);
                let next = node.children[child as usize].node.clone();
                node = next;
            }
            Where::Data { child: SELF, at, compressed } => {
                let place = at.map(|at| (node.clone(), at));
                return Ok((e.len, Layer::Held { zero: false, data: true, compressed, place, inside: None }));
            }
            Where::Data { child, at, compressed } => {
                let unit = u64::from(node.driver.limits(&node).cluster_size).max(1);
                let inside = at.map(|at| (node.children[child as usize].node.clone(), at, unit));
                let place = inside.as_ref().map(|(file, at, _)| leaf_of(file, *at));
                return Ok((e.len, Layer::Held { zero: false, data: true, compressed, place, inside }));
            }
            Where::Zero { at } => {
                let place = at.map(|(child, at)| {
                    if child == SELF {
                        (node.clone(), at)
                    } else {
                        leaf_of(&node.children[child as usize].node, at)
                    }
                });
                return Ok((
                    e.len,
                    Layer::Held { zero: true, data: false, compressed: false, place, inside: None },
                ));
            }
            Where::Unallocated => {
                return Ok((e.len, Layer::Below(node.backing().cloned(), span.offset())));
            }
        }
    }
}

/// Whether data that a format keeps in `file` lie in a hole there (space that was mapped in
/// advance and never written), and for how many bytes of `span` that holds. Only holes of
/// whole units count: the unwritten rest of a cluster is not worth an extent of its own.
///
/// What lies beyond the end of the file is missing. Whoever reads it gets an error, so it is no hole.
async fn hole(file: &Arc<Node>, rt: &Rt, span: Span, unit: u64) -> Result<(bool, u64)> {
    let size = file.size();
    if span.offset() >= size {
        return Ok((false, span.len()));
    }
    let span = span.prefix(size - span.offset());
    let (len, found) = layer(file, rt, span).await?;
    let end = span.offset() + len;
    let zero = matches!(found, Layer::Held { zero: true, .. });
    if zero && end >= span.end() {
        return Ok((true, span.len()));
    }
    let whole = end / unit * unit;
    if zero && whole > span.offset() {
        return Ok((true, whole - span.offset()));
    }
    Ok((false, span.len().min(end.next_multiple_of(unit) - span.offset())))
}

/// The node that a format's file offset is reported for: the format's file itself, or
/// what lies below plain filters and `raw` at the same offset.
fn leaf_of(node: &Arc<Node>, at: u64) -> (Arc<Node>, u64) {
    let mut node = node.clone();
    while let Some(next) = node.filtered() {
        node = next.clone();
    }
    (node, at)
}

/// The state of the start of `span` along the chain below `top`, down to but without
/// `base` (in whatever snapshot it is given).
///
/// # Errors
/// What reading metadata says.
pub async fn chain_status(top: &Arc<Node>, rt: &Rt, span: Span, base: Option<&Node>) -> Result<ChainStatus> {
    let mut node = top.clone();
    let mut at = span.offset();
    let mut len = span.len();
    let mut depth = 0;
    loop {
        let size = node.size();
        if at >= size {
            // Past the end of a shorter backing file: zeroes that this layer supplies.
            return Ok(ChainStatus {
                len,
                depth,
                present: depth > 0,
                zero: true,
                data: false,
                compressed: false,
                past_end: depth > 0,
                place: None,
            });
        }
        let part = Span::new(at, len.min(size - at));
        let (n, found) = layer(&node, rt, part).await?;
        len = n;
        match found {
            Layer::Held { mut zero, data, compressed, place, inside } => {
                if let Some((file, at, unit)) = inside {
                    let (hole, n) = hole(&file, rt, Span::new(at, len), unit).await?;
                    zero |= hole;
                    len = n;
                }
                return Ok(ChainStatus {
                    len,
                    depth,
                    present: true,
                    zero,
                    data,
                    compressed,
                    past_end: false,
                    place,
                });
            }
            Layer::Below(next, offset) => {
                let next = next.filter(|n| base.is_none_or(|b| !Arc::ptr_eq(&n.state, &b.state)));
                let Some(next) = next else {
                    return Ok(ChainStatus {
                        len,
                        depth,
                        present: false,
                        zero: true,
                        data: false,
                        compressed: false,
                        past_end: false,
                        place: None,
                    });
                };
                depth += 1;
                at = offset;
                node = next;
            }
        }
    }
}

/// Where the layer of `node` itself (through the filters above it) holds anything first.
///
/// # Errors
/// What reading metadata says.
pub async fn first_allocated(node: &Arc<Node>, rt: &Rt) -> Result<Option<u64>> {
    let mut rest = Span::new(0, node.size());
    while !rest.is_empty() {
        let (allocated, len) = own_status(node, rt, rest).await?;
        if allocated {
            return Ok(Some(rest.offset()));
        }
        rest = rest.skip(len.clamp(1, rest.len()));
    }
    Ok(None)
}

/// Whether the start of `span` is allocated in the layer of `node` itself (through the
/// filters above it), and for how many bytes that holds.
///
/// # Errors
/// What reading metadata says.
pub async fn own_status(node: &Arc<Node>, rt: &Rt, span: Span) -> Result<(bool, u64)> {
    let (len, found) = layer(node, rt, span).await?;
    Ok((matches!(found, Layer::Held { .. }), len))
}
