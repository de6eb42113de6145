//! `img bench`: so many requests on an image, so many of them in flight.

use std::cell::Cell;
use std::rc::Rc;

use clap::Parser;
use dolmen::Image;
use dolmen::graph::UserEdge;
use dolmen::rt::{Counters, Memory, Rt};
use dolmen::session::{READ, WRITE};
use dolmen::types::{ReadFlags, Result, WriteFlags};

use super::open::{self, Open, Verb, cache};
use crate::cli::{self, Failure, Outcome, Persona};
use crate::out;

/// The row.
pub(super) static VERB: Verb = Verb {
    name: "bench",
    help: "measure requests on an image",
    run: |name, persona, args| cli::parse(name, persona, args).map(|a| run(persona, a)),
};

/// Measure requests on an image.
#[derive(Parser, Debug)]
#[command(infer_long_args = true, args_override_self = true, disable_version_flag = true)]
pub(crate) struct Bench {
    #[command(flatten)]
    open: Open,
    /// How many requests
    #[arg(short, long, default_value_t = 75_000)]
    count: u64,
    /// How many in flight
    #[arg(short, long, default_value_t = 64)]
    depth: u64,
    /// Bytes of each request
    #[arg(short = 's', long, default_value = "4k")]
    buffer_size: String,
    /// Distance from one request to the next; 0 for the buffer size
    #[arg(short = 'S', long, default_value = "0")]
    step_size: String,
    /// First offset
    #[arg(short, long, default_value = "0")]
    offset: String,
    /// Write (default: read)
    #[arg(short, long)]
    write: bool,
    /// Byte to write
    #[arg(long, default_value_t = 0)]
    pattern: u8,
    /// Flush after so many requests
    #[arg(long, default_value_t = 0)]
    flush_interval: u64,
    /// Accepted: a flush covers what was acknowledged, and waits for nothing else
    #[arg(long)]
    no_drain: bool,
    /// Cache mode
    #[arg(short = 't', long)]
    cache: Option<String>,
    /// Accepted; the ring is chosen at start-up
    #[arg(short = 'i', long)]
    aio: Option<String>,
    /// Accepted
    #[arg(short = 'n', long)]
    native: bool,
    /// Say less
    #[arg(short, long)]
    quiet: bool,
    /// Random offsets, the same in every run (not an option of qemu-img)
    #[arg(long)]
    random: bool,
    /// Print CPU time, system calls and batches per request (not an option of qemu-img)
    #[arg(long)]
    counters: bool,
    /// Image
    #[arg(value_name = "FILENAME")]
    filenames: Vec<String>,
}

/// What the tasks share. All of it stays on one core.
struct Shared {
    edge: std::sync::Arc<UserEdge>,
    rt: Rt,
    next: Cell<u64>,
    seed: Cell<u64>,
    failed: std::cell::RefCell<Option<dolmen::types::Error>>,
    plan: Plan,
}

struct Plan {
    count: u64,
    size: u64,
    step: u64,
    first: u64,
    image: u64,
    write: bool,
    random: bool,
    flush_interval: u64,
}

impl Shared {
    /// Offset of the request number `n`: steps from the first offset, around the end.
    fn offset(&self, n: u64) -> u64 {
        let p = &self.plan;
        let slots = p.image.saturating_sub(p.size) / p.step + 1;
        if p.random {
            // xorshift: only the distribution matters.
            let mut x = self.seed.get();
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            self.seed.set(x);
            return x % slots * p.step;
        }
        let at = p.first + n * p.step;
        if at + p.size <= p.image { at } else { at % (slots * p.step) }
    }
}

/// Runs it.
fn run(persona: Persona, a: Bench) -> Outcome {
    let number = |text: &str, what: &str| {
        cli::parse_size(text).ok_or_else(|| Failure::new(format!("Invalid {what} specified: '{text}'.")))
    };
    let size = number(&a.buffer_size, "buffer size")?;
    let step = match number(&a.step_size, "step size")? {
        0 => size,
        n => n,
    };
    let first = number(&a.offset, "offset")?;
    if size == 0 || a.depth == 0 || a.count == 0 {
        return Err(Failure::new("count, depth and buffer size must not be 0"));
    }
    let cache = cache(a.cache.as_deref(), "cache")?;
    let Ok([filename]) = <[String; 1]>::try_from(a.filenames.clone()) else {
        return Err(Failure::usage("Expecting one image file name", "bench"));
    };
    open::block_on(move |rt| async move {
        let mut session = a.open.session(&rt, persona);
        let mut source = a.open.source(&filename);
        source.read_only = !a.write;
        source.cache = cache;
        let image = source.open(&mut session, persona, if a.write { WRITE } else { READ }).await?;
        if first.saturating_add(size) > image.size() {
            return Err(Failure::new("the image is smaller than one request"));
        }
        out!(
            "Sending {} {} requests, {size} bytes each, {} in parallel (starting at offset {first}, step size {step})",
            a.count,
            if a.write { "write" } else { "read" },
            a.depth
        );
        if a.flush_interval > 0 {
            out!("Sending flush every {} requests", a.flush_interval);
        }
        cli::flush();
        let plan = Plan {
            count: a.count,
            size,
            step,
            first,
            image: image.size(),
            write: a.write,
            random: a.random,
            flush_interval: a.flush_interval,
        };
        let before = (rt.io().map(|io| io.counters()), cpu_seconds());
        let started = rt.now();
        measure(&rt, &image, plan, a.depth, a.pattern).await?;
        let elapsed = rt.now() - started;
        out!("Run completed in {:.3} seconds.", elapsed.as_secs_f64());
        if a.counters {
            let (user, system) = cpu_seconds();
            let (user0, system0) = before.1;
            let per = 1e9 / a.count as f64;
            out!(
                "CPU per request: {:.0} ns user, {:.0} ns system",
                (user - user0) * per,
                (system - system0) * per
            );
            if let (Some(b), Some(io)) = (before.0, rt.io()) {
                out!("{}", counters(&b, &io.counters(), a.count));
            }
        }
        for w in session.warnings() {
            eprintln!("warning: {w}");
        }
        session.close_image(image).await?;
        session.close().await?;
        Ok(0)
    })
}

async fn measure(rt: &Rt, image: &Image, plan: Plan, depth: u64, pattern: u8) -> Result<()> {
    let depth = depth.min(plan.count);
    let shared = Rc::new(Shared {
        edge: image.edge().clone(),
        rt: rt.clone(),
        next: Cell::new(0),
        seed: Cell::new(0x9e37_79b9_7f4a_7c15),
        failed: std::cell::RefCell::new(None),
        plan,
    });
    let (done, finished) = (Rc::new(Cell::new(0)), Rc::new(event_listener::Event::new()));
    for _ in 0..depth {
        let (shared, done, finished) = (shared.clone(), done.clone(), finished.clone());
        rt.spawn(async move {
            if let Err(e) = worker(&shared, pattern).await {
                shared.failed.borrow_mut().get_or_insert(e);
                shared.next.set(shared.plan.count);
            }
            done.set(done.get() + 1);
            finished.notify(usize::MAX);
        });
    }
    while done.get() < depth {
        let listener = finished.listen();
        if done.get() < depth {
            listener.await;
        }
    }
    let failed = shared.failed.borrow_mut().take();
    failed.map_or(Ok(()), Err)
}

async fn worker(s: &Shared, pattern: u8) -> Result<()> {
    let memory = Memory::zeroed(s.plan.size as usize);
    let iov = memory.iovec();
    iov.fill(pattern);
    loop {
        let n = s.next.get();
        if n >= s.plan.count {
            return Ok(());
        }
        s.next.set(n + 1);
        let token = s.edge.begin().await?;
        let span = token.check(s.offset(n), s.plan.size)?;
        if s.plan.write {
            let io = token.write(&s.rt)?;
            io.write(span, &iov, WriteFlags::NONE).await?;
            if s.plan.flush_interval > 0 && (n + 1).is_multiple_of(s.plan.flush_interval) {
                io.flush().await?;
            }
        } else {
            token.read(&s.rt)?.read(span, &iov, ReadFlags::NONE).await?;
        }
    }
}

/// CPU time of this process so far: user, system, in seconds. The kernel counts it in
/// hundredths.
fn cpu_seconds() -> (f64, f64) {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The command's name may hold blanks; fields are counted from the parenthesis after it.
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0) / 100.0;
    (ticks(11), ticks(12))
}

/// What the loop did per request.
fn counters(before: &Counters, after: &Counters, count: u64) -> String {
    let d = *after - *before;
    let per = |n: u64| n as f64 / count as f64;
    format!(
        "Per request: {:.3} system calls of the loop, {:.3} ring operations, {:.3} inline reads, {:.3} pool jobs, {:.3} polls, {:.0} bytes copied",
        per(d.enters + d.inline_reads + d.inline_misses + d.direct_calls),
        per(d.submissions),
        per(d.inline_reads),
        per(d.pool_jobs),
        per(d.polls),
        per(d.bytes_copied)
    )
}
