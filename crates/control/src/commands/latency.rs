//! `block-latency-histogram-set`: how many requests of an export took how long.
//!
//! The bins are counted by an observer of the export's edge, which is there only while a client wants to know.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use dolmen_graph::{Observer, UserEdge};
use dolmen_qmp::schema::{Field, Shape, Ty};
use dolmen_qmp::{ErrorClass, QmpError, model, reply};
use dolmen_rt::LocalFuture;
use dolmen_types::{Error, ErrorKind, OpKind, Options, Result, Value};
use serde_json::{Value as Json, json};

use crate::act::{Act, Proposal, Wait};
use crate::counter::CounterRow;
use crate::guard::Guard;
use crate::row::CommandRow;
use crate::world::{Answer, Done, World};

/// The most boundaries of a histogram: a request looks among them, and each has a counter. More than a screen shows.
const MAX_BOUNDARIES: usize = 1024;

reply! {
    /// A histogram, as `query-blockstats` shows it.
    #[derive(Clone, Debug)]
    struct BlockLatencyHistogramInfo {
        /// In nanoseconds, ascending: the first interval begins at 0, the last one has no end.
        "boundaries" boundaries: Vec<u64>,
        /// Requests in each interval: one more than there are boundaries.
        "bins" bins: Vec<u64>,
    }
}

/// Requests of one kind.
struct Histogram {
    boundaries: Vec<u64>,
    bins: Vec<AtomicU64>,
}

impl Histogram {
    fn new(boundaries: &[u64]) -> Arc<Histogram> {
        let bins = (0..=boundaries.len()).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Histogram { boundaries: boundaries.to_vec(), bins })
    }

    /// An interval holds its lower boundary.
    fn count(&self, nanos: u64) {
        let bin = self.boundaries.partition_point(|b| *b <= nanos);
        self.bins[bin].fetch_add(1, Relaxed);
    }

    fn info(&self) -> BlockLatencyHistogramInfo {
        let bins = self.bins.iter().map(|n| n.load(Relaxed)).collect();
        BlockLatencyHistogramInfo { boundaries: self.boundaries.clone(), bins }
    }
}

/// What is told apart, in the order of [`KINDS`].
#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
    /// Nothing is appended to zones here: its histogram stays empty.
    ZoneAppend,
    Flush,
}

/// The arguments with the boundaries of one kind.
const KINDS: [&str; 4] = ["boundaries-read", "boundaries-write", "boundaries-zap", "boundaries-flush"];

/// Those of an export; none of some kinds.
#[derive(Clone, Default)]
struct Histograms([Option<Arc<Histogram>>; KINDS.len()]);

impl Observer for Histograms {
    fn ended(&self, kind: OpKind, took: Duration) {
        let kind = match kind {
            OpKind::Read => Kind::Read,
            OpKind::Write | OpKind::WriteZeroes => Kind::Write,
            OpKind::Flush => Kind::Flush,
            OpKind::Discard | OpKind::Resize => return,
        };
        if let Some(histogram) = &self.0[kind as usize] {
            histogram.count(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        }
    }
}

/// New histograms of an export, or none any more.
struct Set {
    id: String,
    /// Of all kinds.
    all: Option<Vec<u64>>,
    /// Of one kind each.
    own: [Option<Vec<u64>>; KINDS.len()],
}

impl Set {
    fn from_options(mut o: Options) -> Result<Set> {
        let mut own: [Option<Vec<u64>>; KINDS.len()] = Default::default();
        for (own, name) in own.iter_mut().zip(KINDS) {
            *own = boundaries(&mut o, name)?;
        }
        Ok(Set { id: o.require_str("id")?, all: boundaries(&mut o, "boundaries")?, own })
    }

    /// The edge of the export.
    fn edge(&self, world: &World) -> Result<Arc<UserEdge>, QmpError> {
        let exports = world.exports.borrow();
        let edge =
            exports.iter().find(|e| e.id.as_str() == self.id).and_then(|e| world.owner.edges(&e.id).next());
        edge.ok_or_else(|| {
            let e = Error::new(ErrorKind::NotFound, format!("Device '{}' not found", self.id))
                .remedy("query-block lists the exports, which are the devices here");
            QmpError::from(e).with_class(ErrorClass::DeviceNotFound)
        })
    }

    /// What is there from now on. Kinds that are not asked about keep what they have.
    fn histograms(&self, now: Histograms) -> Option<Histograms> {
        if self.all.is_none() && self.own.iter().all(Option::is_none) {
            return None;
        }
        let mut out = now;
        for (histogram, own) in out.0.iter_mut().zip(&self.own) {
            if let Some(boundaries) = own.as_ref().or(self.all.as_ref()) {
                *histogram = Some(Histogram::new(boundaries));
            }
        }
        Some(out)
    }
}

/// A list of boundaries: each greater than the one before.
fn boundaries(o: &mut Options, name: &str) -> Result<Option<Vec<u64>>> {
    let Some(list) = o.take_list(name)? else { return Ok(None) };
    let wrong = |text: String| Error::new(ErrorKind::InvalidInput, text);
    if list.is_empty() || list.len() > MAX_BOUNDARIES {
        let text = format!("'{name}' has {} boundaries", list.len());
        return Err(wrong(text).remedy(format!("name between 1 and {MAX_BOUNDARIES} boundaries")));
    }
    let mut out: Vec<u64> = Vec::with_capacity(list.len());
    for value in list {
        let boundary = match value {
            Value::Int(n) => u64::try_from(n).ok(),
            _ => None,
        };
        let last = out.last().copied().unwrap_or(0);
        match boundary.filter(|b| *b > last) {
            Some(b) => out.push(b),
            None => {
                return Err(wrong(format!("the boundaries in '{name}' do not ascend from above 0")).remedy(
                    "name them in nanoseconds, each greater than the one before, such as [10000, 100000]",
                ));
            }
        }
    }
    Ok(Some(out))
}

impl Act for Set {
    fn wait(&self, _: &World) -> Wait {
        Wait::Nothing
    }

    fn propose<'a>(&'a mut self, p: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async move { self.edge(p.world).map(drop) })
    }

    fn perform(self: Box<Self>, world: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async move {
            let edge = self.edge(&world)?;
            let now = edge.observed_by(Histograms::clone).unwrap_or_default();
            edge.observe(self.histograms(now).map(|h| Box::new(h) as Box<dyn Observer>));
            Ok(json!({}))
        })
    }
}

fn shown(edge: &UserEdge, kind: Kind) -> Option<Json> {
    let histogram = edge.observed_by(|h: &Histograms| h.0[kind as usize].clone())??;
    Some(model::to_json(&histogram.info()))
}

const INFO: Ty = BlockLatencyHistogramInfo::TY;

pub(crate) const COUNTERS: &[CounterRow] = &[
    CounterRow { name: "rd_latency_histogram", ty: INFO, read: |edge| shown(edge, Kind::Read) },
    CounterRow { name: "wr_latency_histogram", ty: INFO, read: |edge| shown(edge, Kind::Write) },
    CounterRow {
        name: "zone_append_latency_histogram",
        ty: INFO,
        read: |edge| shown(edge, Kind::ZoneAppend),
    },
    CounterRow { name: "flush_latency_histogram", ty: INFO, read: |edge| shown(edge, Kind::Flush) },
];

const BOUNDARIES: Ty = Ty::Array(&Ty::Int);
static ARGUMENTS: Shape = Shape::of(&[
    Field::required("id", Ty::Str),
    Field::optional("boundaries", BOUNDARIES),
    Field::optional(KINDS[0], BOUNDARIES),
    Field::optional(KINDS[1], BOUNDARIES),
    Field::optional(KINDS[2], BOUNDARIES),
    Field::optional(KINDS[3], BOUNDARIES),
]);

pub(crate) const ROWS: &[CommandRow] = &[CommandRow::verb(
    "block-latency-histogram-set",
    Ty::Object(&ARGUMENTS),
    |_, o| Ok(Box::new(Set::from_options(o)?)),
    "Counts the requests of an export by how long they take, in query-blockstats: boundaries in nanoseconds for all kinds, \
     or for one kind; without any the histograms go.",
)];

#[cfg(test)]
mod tests {
    use super::*;

    fn ints(list: &[i128]) -> Value {
        Value::List(list.iter().map(|n| Value::Int(*n)).collect())
    }

    #[test]
    fn an_interval_holds_its_lower_boundary() {
        let h = Histogram::new(&[10, 50, 100]);
        [0, 9, 10, 49, 50, 99, 100, u64::MAX].iter().for_each(|n| h.count(*n));
        assert_eq!(h.info().bins, [2, 2, 2, 2]);
    }

    #[test]
    fn boundaries_ascend_from_above_zero() {
        let read =
            |list: &[i128]| boundaries(&mut Options::new().with("boundaries", ints(list)), "boundaries");
        assert_eq!(read(&[1, 2, i128::from(u64::MAX)]).expect("ascend"), Some(vec![1, 2, u64::MAX]));
        for wrong in [&[][..], &[0], &[1, 1], &[2, 1], &[-1], &[1 << 64]] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
        let many = |n: usize| (1..=n as i128).collect::<Vec<_>>();
        assert!(read(&many(MAX_BOUNDARIES)).is_ok());
        assert!(read(&many(MAX_BOUNDARIES + 1)).is_err());
        assert_eq!(boundaries(&mut Options::new(), "boundaries").expect("none"), None);
    }

    /// What is not named keeps its counts; what is named begins anew; nothing named ends all.
    #[test]
    fn each_kind_has_its_own() {
        let set = |o: Options| Set::from_options(o.with("id", "e")).expect("reads");
        let all = set(Options::new().with("boundaries", ints(&[10])).with(KINDS[1], ints(&[5, 6])));
        let first = all.histograms(Histograms::default()).expect("there");
        first.ended(OpKind::Read, Duration::from_nanos(10));
        first.ended(OpKind::WriteZeroes, Duration::from_nanos(5));
        first.ended(OpKind::Discard, Duration::from_nanos(5));
        let bins = |h: &Histograms| h.0.each_ref().map(|h| h.as_ref().map(|h| h.info().bins));
        let counted = [Some(vec![0, 1]), Some(vec![0, 1, 0]), Some(vec![0, 0]), Some(vec![0, 0])];
        assert_eq!(bins(&first), counted);
        let second = set(Options::new().with(KINDS[0], ints(&[7]))).histograms(first).expect("there");
        assert_eq!(bins(&second)[..2], [Some(vec![0, 0]), Some(vec![0, 1, 0])]);
        assert!(set(Options::new()).histograms(second).is_none());
    }
}
