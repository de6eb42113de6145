//! The `nbd` driver: a disk on an NBD server, over one connection.
//!
//! - `mod` (here): options, the driver, and how graph requests become NBD requests;
//! - `link`: the connection: many requests in flight, replies in any order;
//! - `address`: the `server` option.
//!
//! What the server does not offer is done without, or done in the driver: a write that
//! must be durable becomes write and flush, zeroes become data, unaligned requests are
//! widened when the server insists on a block size.
//!
//! When the connection breaks, the requests in flight fail with `Disconnected`. With
//! `reconnect-delay` they wait instead and are sent again once a new connection stands.
//! Without it, the next request tries to connect once. What is promised across a new
//! connection, and what is refused for it, is in `history`.

mod address;
mod history;
mod link;
mod names;
mod shares;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dolmen_graph::option::{Number, OptionKind, Text};
use dolmen_graph::{
    AccessRule, Class, Common, Cx, Description, Driver, DriverKind, Extent, ImageOps, Limits, Node,
    NodeChange, Op, OpenCx, Opened, Opener, Parsed, Plan, Prepared, RangeLock, Request as GraphRequest, SELF,
    Where,
};
use dolmen_nbd::consts::{STATE_ZERO, cmd};
use dolmen_nbd::{CommandFlags, TransmissionFlags};
use dolmen_rt::{Instant, IoVec, LocalFuture, Memory, Rt};
use dolmen_types::{
    Actions, BlkEvent, Error, ErrorKind, OptionType, Options, ReadFlags, Result, Span, WriteFlags,
};

use address::Address;
use history::History;
use link::{Ask, Link};
use shares::Shares;

use crate::file::Stance;

/// Longest zero write, discard or status request: the largest power of two that fits 32
/// bits with room for any alignment.
const MAX_RANGE: u64 = 1 << 30;

/// Zeroes that are sent as data go in pieces of this size.
const ZERO_PIECE: u64 = 1 << 20;

/// How long connecting and negotiating may take when `open-timeout` does not say.
const CONNECT_MAX: Duration = Duration::from_secs(30);

/// Pause between two attempts to connect.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// The registry row.
pub static NBD: DriverKind = DriverKind {
    protocols: names::PROTOCOLS,
    from_name: Some(|_, name| names::from_name(name)),
    ..DriverKind::new("nbd", Class::Protocol, "a disk on an NBD server", NbdOptions::ROWS, parse)
};

dolmen_graph::options! {
    struct NbdOptions {
        required "server" address: Server => "where the server listens";
        default "export" export: Text = "" => "name of the export";
        default "reconnect-delay" reconnect_delay: Number = "0" =>
            "seconds that requests wait for a new connection when the old one breaks";
        default "open-timeout" open_timeout: Number = "0" =>
            "seconds for which connecting is tried again when opening; with 0 it is tried once";
    }
}

/// The option `server`, in all its spellings.
enum Server {}

impl OptionKind for Server {
    const TYPE: OptionType = OptionType::SocketAddress;
    type Value = Address;
    fn take(options: &mut Options, _: &str) -> Result<Option<Address>> {
        Address::take(options).map(Some)
    }
}

#[derive(Clone, Debug)]
struct Config {
    address: Address,
    export: String,
    reconnect_delay: Duration,
    open_timeout: Duration,
}

fn parse(options: &mut Options, _common: &Common) -> Result<Parsed> {
    let NbdOptions { address, export, reconnect_delay, open_timeout } = NbdOptions::take(options)?;
    let seconds = |n: u64| Duration::from_secs(n.min(u32::MAX.into()));
    let config = Config {
        address,
        export,
        reconnect_delay: seconds(reconnect_delay),
        open_timeout: seconds(open_timeout),
    };
    Ok(Parsed {
        children: Vec::new(),
        rule: AccessRule::LEAF,
        relies_down_to: None,
        open: Box::new(OpenNbd(config)),
    })
}

struct OpenNbd(Config);

impl Opener for OpenNbd {
    fn open<'a>(self: Box<Self>, cx: OpenCx<'a>) -> LocalFuture<'a, Result<Opened>> {
        Box::pin(async move {
            let config = self.0;
            if let Some(old) = cx.replaced::<Nbd>() {
                return Ok(Opened::of(Arc::new(old.with_options(config, cx.common)?)));
            }
            let deadline = cx.rt.now() + config.open_timeout;
            let link = connect_until(cx.rt, &config, deadline).await?;
            let read_only = link.offers(TransmissionFlags::READ_ONLY);
            let flags = cx.common.flags;
            if read_only && !flags.read_only && !cx.common.auto_read_only {
                link.close();
                return Err(Error::new(
                    ErrorKind::ReadOnly,
                    format!("the export '{}' at {} is read-only", config.export, config.address),
                )
                .remedy("open it with read-only=on"));
            }
            let url = config.address.url(&config.export);
            let shares = Shares::of(cx.rt, &config.address.addr(), url, &config.export).await;
            let e = &link.session.export;
            let driver = Nbd {
                size: e.size,
                min_block: e.min_block,
                max_block: e.max_block,
                flags: e.flags,
                status: link.session.base_allocation.is_some(),
                read_only: read_only || flags.read_only,
                unmap: flags.unmap,
                no_flush: flags.no_flush,
                config,
                line: Arc::new(Line {
                    current: Mutex::new(Current {
                        link,
                        broken_since: None,
                        failed: 0,
                        last_failure: None,
                        history: History::default(),
                    }),
                    connecting: async_lock::Mutex::new(()),
                    unaligned: RangeLock::new(),
                    shares: Arc::new(shares),
                }),
            };
            Ok(Opened::of(Arc::new(driver)))
        })
    }
}

async fn connect(rt: &Rt, config: &Config) -> Result<Arc<Link>> {
    let limit = if config.open_timeout.is_zero() { CONNECT_MAX } else { config.open_timeout };
    rt.timeout(limit, Link::open(rt, &config.address, &config.export))
        .await
        .unwrap_or_else(|| {
            Err(Error::new(ErrorKind::TimedOut, format!("no answer within {} s", limit.as_secs())))
        })
        .map_err(|e| match e.to_string().starts_with("Failed to connect") {
            true => e,
            false => e.context(format!("NBD server at {}", config.address)),
        })
}

/// Connects; tries again until `deadline` as long as nobody answers. A server that
/// answers and refuses is not asked again.
async fn connect_until(rt: &Rt, config: &Config, deadline: Instant) -> Result<Arc<Link>> {
    loop {
        let e = match connect(rt, config).await {
            Ok(link) => return Ok(link),
            Err(e) => e,
        };
        let hopeless = matches!(
            e.kind(),
            ErrorKind::InvalidInput
                | ErrorKind::Unsupported
                | ErrorKind::Corrupt
                | ErrorKind::PermissionDenied
        );
        let now = rt.now();
        if hopeless || now >= deadline {
            return Err(e);
        }
        // The last attempt is made at the deadline, not up to a pause before it.
        rt.sleep(deadline.since(now).min(RETRY_PAUSE)).await;
    }
}

/// The connection in use. The lock is held for the time of a look or an exchange.
#[derive(Debug)]
struct Current {
    link: Arc<Link>,
    broken_since: Option<Instant>,
    /// Attempts at a new connection that failed, and how the last one did.
    failed: u64,
    last_failure: Option<Error>,
    history: History,
}

#[derive(Debug)]
struct Nbd {
    config: Config,
    size: u64,
    min_block: u32,
    max_block: u32,
    flags: TransmissionFlags,
    status: bool,
    read_only: bool,
    unmap: bool,
    no_flush: bool,
    line: Arc<Line>,
}

/// The way to the server. It stays when the node is reopened with other options: on a new
/// connection a server need not know what was written on the old one and not flushed.
#[derive(Debug)]
struct Line {
    current: Mutex<Current>,
    /// One task at a time makes a new connection. Nothing else is locked meanwhile.
    connecting: async_lock::Mutex<()>,
    /// Writes that have to read first exclude each other where they meet.
    unaligned: RangeLock,
    /// What the node wants of the export, for others that have it open.
    shares: Arc<Shares>,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.current.get_mut().unwrap_or_else(PoisonError::into_inner).link.close();
    }
}

impl Nbd {
    /// The same disk over the same connection, with other options.
    fn with_options(&self, config: Config, common: &Common) -> Result<Nbd> {
        for (option, same) in [
            ("server", self.config.address == config.address),
            ("export", self.config.export == config.export),
        ] {
            if !same {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("Cannot change the option '{option}'"),
                )
                .remedy("add a node for the other export, and link that instead"));
            }
        }
        let read_only = self.offers(TransmissionFlags::READ_ONLY);
        if read_only && !common.flags.read_only && !common.auto_read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("the export '{}' at {} is read-only", config.export, config.address),
            )
            .remedy("leave read-only=on"));
        }
        Ok(Nbd {
            config,
            size: self.size,
            min_block: self.min_block,
            max_block: self.max_block,
            flags: self.flags,
            status: self.status,
            read_only: read_only || common.flags.read_only,
            unmap: common.flags.unmap,
            no_flush: common.flags.no_flush,
            line: self.line.clone(),
        })
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        // Each use leaves it whole, so a panic elsewhere does no harm.
        self.line.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self) -> Arc<Link> {
        self.current().link.clone()
    }

    /// A connection that works, or an error that says why there is none.
    async fn working_link(&self, rt: &Rt) -> Result<Arc<Link>> {
        let (link, failed) = {
            let c = self.current();
            (c.link.clone(), c.failed)
        };
        if link.broken().is_none() {
            return Ok(link);
        }
        let _turn = self.line.connecting.lock().await;
        let (link, since) = {
            let mut c = self.current();
            if c.link.broken().is_none() {
                return Ok(c.link.clone());
            }
            // Everybody who waited for an attempt shares its end; else each of them would
            // wait for an attempt of its own, one after the other.
            if let Some(e) = c.last_failure.as_ref().filter(|_| c.failed != failed) {
                return Err(e.duplicate());
            }
            (c.link.clone(), *c.broken_since.get_or_insert(rt.now()))
        };
        let result = self.reconnect(rt, &link, since).await;
        let mut c = self.current();
        match result {
            Ok(new) => {
                c.history.reconnected(&link.unanswered());
                (c.link, c.broken_since, c.last_failure) = (new.clone(), None, None);
                Ok(new)
            }
            Err(e) => {
                c.failed += 1;
                c.last_failure = Some(e.duplicate());
                Err(e)
            }
        }
    }

    async fn reconnect(&self, rt: &Rt, link: &Link, since: Instant) -> Result<Arc<Link>> {
        if link.is_closing() {
            return Err(Error::new(ErrorKind::Disconnected, "the NBD node is being closed"));
        }
        let new =
            connect_until(rt, &self.config, since + self.config.reconnect_delay).await.map_err(|e| {
                let why = link.broken().map_or_else(String::new, |b| b.to_string());
                Error::new(ErrorKind::Disconnected, format!("{why}, and there is no new one")).source(e)
            })?;
        let (old, now) = (&link.session.export, &new.session.export);
        let same_status = new.session.base_allocation.is_some() == link.session.base_allocation.is_some();
        let fits = now.size == old.size && now.min_block <= old.min_block && now.max_block >= old.max_block;
        if !fits || !same_status || now.flags != old.flags {
            new.close();
            return Err(Error::new(
                ErrorKind::Disconnected,
                format!("the NBD server at {} now serves something else", self.config.address),
            )
            .remedy("close the node and open it again"));
        }
        Ok(new)
    }

    /// Sends a request, again over a new connection if there may be one.
    async fn ask(&self, rt: &Rt, ask: Ask) -> Result<Option<dolmen_nbd::Extent>> {
        let changes = ask.changes();
        let number = changes.map_or(0, |_| self.current().history.number());
        let ask = ask.numbered(number);
        let mut link = self.working_link(rt).await?;
        loop {
            if let Some(span) = changes {
                self.current().history.check(number, span)?;
            }
            match link.request(ask.clone()).await {
                Err(e) if e.kind() == ErrorKind::Disconnected && link.broken().is_some() => {
                    if self.config.reconnect_delay.is_zero() {
                        return Err(e);
                    }
                    link = self.working_link(rt).await?;
                }
                Ok(answer) => {
                    if changes.is_some() && !ask.is_durable() {
                        self.acknowledged(&link);
                    }
                    return Ok(answer);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Remembers a change that has to be flushed over the connection that it was made on.
    fn acknowledged(&self, link: &Arc<Link>) {
        let mut c = self.current();
        let same = Arc::ptr_eq(&c.link, link);
        c.history.acknowledged(same);
    }

    fn offers(&self, flag: TransmissionFlags) -> bool {
        self.flags.has(flag)
    }

    fn check_size(&self, size: u64) -> Result<()> {
        if size == self.size {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, "the size of an NBD export can't be changed by a client"))
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the NBD export is read-only"));
        }
        Ok(())
    }

    /// Cuts off what lies beyond the end of the export: sizes of nodes are rounded up to a sector.
    fn inside(&self, span: Span) -> Span {
        span.prefix(self.size.saturating_sub(span.offset()))
    }

    async fn read(&self, rt: &Rt, span: Span, to: &IoVec) -> Result<()> {
        let inside = self.inside(span);
        if inside.len() < span.len() {
            let here = usize_of(inside.len());
            to.slice(here, to.len() - here).fill(0);
            if inside.is_empty() {
                return Ok(());
            }
            return Box::pin(self.read(rt, inside, &to.slice(0, here))).await;
        }
        let block = u64::from(self.min_block);
        if !self.fits(span) {
            // The server insists on whole blocks.
            let wide = self.widen(span);
            let memory = Memory::zeroed(usize_of(wide.len()));
            self.read_blocks(rt, wide, &memory.iovec()).await?;
            debug_assert!(block > 1);
            to.copy_from(&memory.iovec().slice(usize_of(span.offset() - wide.offset()), to.len()));
            return Ok(());
        }
        self.read_blocks(rt, span, to).await
    }

    async fn read_blocks(&self, rt: &Rt, span: Span, to: &IoVec) -> Result<()> {
        let mut done = 0;
        for piece in self.pieces(span, self.max_transfer()) {
            let part = to.slice(done, usize_of(piece.len()));
            done += usize_of(piece.len());
            self.ask(rt, Ask::read(piece, part)).await?;
        }
        Ok(())
    }

    async fn write(&self, rt: &Rt, span: Span, from: &IoVec, fua: bool) -> Result<()> {
        let inside = self.inside(span);
        if inside.len() < span.len() {
            let here = usize_of(inside.len());
            if !from.slice(here, from.len() - here).is_zero() {
                return Err(self.beyond_the_end());
            }
            if inside.is_empty() {
                return Ok(());
            }
            return Box::pin(self.write(rt, inside, &from.slice(0, here), fua)).await;
        }
        if self.fits(span) {
            // Whoever widens a write nearby must not put old data over these.
            let _guard = if self.min_block > 1 {
                Some(self.line.unaligned.lock(self.widen(span)).await)
            } else {
                None
            };
            return self.write_blocks(rt, span, from, fua).await;
        }
        let wide = self.widen(span);
        let _guard = self.line.unaligned.lock(wide).await;
        let memory = Memory::zeroed(usize_of(wide.len()));
        let all = memory.iovec();
        let block = u64::from(self.min_block);
        let first = wide.prefix(block);
        let last = Span::from_range((wide.end() - 1) / block * block, wide.end());
        self.read_blocks(rt, first, &all.slice(0, usize_of(first.len()))).await?;
        if last.offset() != first.offset() {
            let at = usize_of(last.offset() - wide.offset());
            self.read_blocks(rt, last, &all.slice(at, usize_of(last.len()))).await?;
        }
        all.slice(usize_of(span.offset() - wide.offset()), from.len()).copy_from(from);
        self.write_blocks(rt, wide, &all, fua).await
    }

    async fn write_blocks(&self, rt: &Rt, span: Span, from: &IoVec, fua: bool) -> Result<()> {
        let mut done = 0;
        for piece in self.pieces(span, self.max_transfer()) {
            let part = from.slice(done, usize_of(piece.len()));
            done += usize_of(piece.len());
            let flags = self.fua_flag(fua);
            self.ask(rt, Ask::write(piece, part, flags)).await?;
        }
        self.durable_otherwise(rt, fua).await
    }

    /// The rest of the last sector reads as zeroes, and can be nothing else.
    fn beyond_the_end(&self) -> Error {
        Error::new(
            ErrorKind::NoSpace,
            format!(
                "the NBD export ends at {}, within a sector of 512 bytes, and can't hold more",
                self.size
            ),
        )
        .remedy("let the server export a multiple of 512 bytes")
    }

    async fn write_zeroes(&self, rt: &Rt, span: Span, flags: WriteFlags) -> Result<()> {
        let span = self.inside(span);
        if span.is_empty() {
            return Ok(());
        }
        let fua = flags.has(WriteFlags::FUA);
        let offered = self.offers(TransmissionFlags::SEND_WRITE_ZEROES);
        let fast = flags.has(WriteFlags::NO_FALLBACK);
        if fast && !(offered && self.offers(TransmissionFlags::SEND_FAST_ZERO) && self.fits(span)) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the NBD server does not offer zero writes that are faster than writes",
            ));
        }
        if offered && self.fits(span) {
            let _guard = if self.min_block > 1 {
                Some(self.line.unaligned.lock(self.widen(span)).await)
            } else {
                None
            };
            let wire = self
                .fua_flag(fua)
                .with_if(!flags.has(WriteFlags::MAY_UNMAP), CommandFlags::NO_HOLE)
                .with_if(fast, CommandFlags::FAST_ZERO);
            for piece in self.pieces(span, MAX_RANGE) {
                self.ask(rt, Ask::range(cmd::WRITE_ZEROES, piece, wire)).await?;
            }
            return self.durable_otherwise(rt, fua).await;
        }
        let zeroes = Memory::zeroed(usize_of(span.len().min(ZERO_PIECE)));
        for piece in self.pieces(span, ZERO_PIECE) {
            let part = zeroes.share().slice(0, usize_of(piece.len())).into();
            self.write(rt, piece, &part, fua).await?;
        }
        Ok(())
    }

    async fn discard(&self, rt: &Rt, span: Span, flags: WriteFlags) -> Result<()> {
        if !self.unmap || !self.offers(TransmissionFlags::SEND_TRIM) {
            return Ok(());
        }
        // Parts of blocks are left alone.
        let span = self.inside(span);
        let block = u64::from(self.min_block);
        let start = span.offset().next_multiple_of(block);
        let end = if span.end() == self.size { span.end() } else { span.end() / block * block };
        if start >= end {
            return Ok(());
        }
        let fua = flags.has(WriteFlags::FUA);
        for piece in self.pieces(Span::from_range(start, end), MAX_RANGE) {
            self.ask(rt, Ask::range(cmd::TRIM, piece, self.fua_flag(fua))).await?;
        }
        self.durable_otherwise(rt, fua).await
    }

    async fn flush(&self, rt: &Rt) -> Result<()> {
        if self.no_flush {
            return Ok(());
        }
        // A connection that is broken by now is looked at once more after a new one stands.
        let mark = self.current().history.flushing()?;
        if self.offers(TransmissionFlags::SEND_FLUSH) {
            self.ask(rt, Ask::range(cmd::FLUSH, Span::new(0, 0), CommandFlags(0))).await?;
        }
        self.current().history.flushed(mark)
    }

    fn fua_flag(&self, fua: bool) -> CommandFlags {
        CommandFlags(0).with_if(fua && self.offers(TransmissionFlags::SEND_FUA), CommandFlags::FUA)
    }

    /// What FUA means to a server that does not know it.
    async fn durable_otherwise(&self, rt: &Rt, fua: bool) -> Result<()> {
        if fua && !self.offers(TransmissionFlags::SEND_FUA) { self.flush(rt).await } else { Ok(()) }
    }

    /// Whether the server takes the span as it is.
    fn fits(&self, span: Span) -> bool {
        let block = u64::from(self.min_block);
        block == 1
            || (span.offset().is_multiple_of(block)
                && (span.end().is_multiple_of(block) || span.end() == self.size))
    }

    /// The blocks that a span touches, the last of them as far as the export reaches.
    fn widen(&self, span: Span) -> Span {
        self.inside(span.align_out(u64::from(self.min_block)))
    }

    /// Largest read or write, a multiple of the block size.
    fn max_transfer(&self) -> u64 {
        u64::from(self.max_block / self.min_block * self.min_block)
    }

    /// The span in pieces of at most `max` bytes, which end between blocks of the server's storage: it says nothing of
    /// them, but they are powers of two.
    fn pieces(&self, span: Span, max: u64) -> impl Iterator<Item = Span> + use<> {
        let mut rest = span;
        let unit = Span::LARGEST_UNIT.min(1 << max.max(1).ilog2());
        std::iter::from_fn(move || {
            let piece = rest.prefix_to(max, unit);
            rest = rest.skip(piece.len());
            (!piece.is_empty()).then_some(piece)
        })
    }
}

fn usize_of(n: u64) -> usize {
    usize::try_from(n).expect("a request's data fit into memory")
}

impl Driver for Nbd {
    fn kind(&self) -> &'static DriverKind {
        &NBD
    }

    fn size(&self, _node: &Node) -> u64 {
        self.size
    }

    fn limits(&self, _node: &Node) -> Limits {
        Limits {
            request_alignment: self.min_block,
            max_transfer: self.max_block,
            opt_discard: 0,
            cluster_size: 0,
            cluster_start: 0,
            fast_zeroes: self.offers(TransmissionFlags::SEND_FAST_ZERO),
            discards: self.offers(TransmissionFlags::SEND_TRIM),
        }
    }

    fn access_rule(&self) -> AccessRule {
        AccessRule::LEAF
    }

    fn plan(&self, _node: &Node, _request: GraphRequest, _span: Span) -> Plan {
        Plan::Slow
    }

    fn run<'a>(&'a self, cx: Cx<'a>, op: Op<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            match op {
                Op::Read { span, to, flags } => {
                    if flags.has(ReadFlags::PREFETCH) {
                        // A hint, and nothing here is cached.
                        return Ok(());
                    }
                    self.read(cx.rt, span, to).await
                }
                Op::Write { span, from, flags } => {
                    self.check_writable()?;
                    self.write(cx.rt, span, from, flags.has(WriteFlags::FUA)).await
                }
                Op::WriteZeroes { span, flags } => {
                    self.check_writable()?;
                    self.write_zeroes(cx.rt, span, flags).await
                }
                Op::Discard { span, flags } => {
                    self.check_writable()?;
                    self.discard(cx.rt, span, flags).await
                }
                Op::Flush => self.flush(cx.rt).await,
                Op::Resize { size, .. } => self.check_size(size),
            }
        })
    }

    fn status<'a>(&'a self, cx: Cx<'a>, span: Span) -> LocalFuture<'a, Result<Extent>> {
        Box::pin(async move {
            let data = |len| Extent {
                len,
                place: Where::Data { child: SELF, at: Some(span.offset()), compressed: false },
            };
            if !self.status || span.is_empty() {
                return Ok(data(span.len()));
            }
            if span.offset() >= self.size {
                return Ok(Extent { len: span.len(), place: Where::Zero { at: None } });
            }
            // Servers need not answer for a part of a block, not even for the last one.
            let span = self.inside(span);
            let end = self.size / u64::from(self.min_block) * u64::from(self.min_block);
            if span.offset() >= end {
                return Ok(data(span.len()));
            }
            let asked = self.widen(Span::from_range(span.offset(), span.end().min(end))).prefix(MAX_RANGE);
            let found = self.ask(cx.rt, Ask::status(asked)).await?;
            let Some(e) = found else { return Ok(data(span.len())) };
            // The answer begins where the question did, which may be before the span.
            let before = span.offset() - asked.offset();
            let len = u64::from(e.len).saturating_sub(before).min(span.len());
            if len == 0 {
                return Ok(data(span.len().min(before.max(1))));
            }
            Ok(if e.flags & STATE_ZERO != 0 {
                // As for holes of a file: there is nothing at that place, but it is this place.
                Extent { len, place: Where::Zero { at: Some((SELF, span.offset())) } }
            } else {
                data(len)
            })
        })
    }

    fn event(&self, _node: &Node, _event: BlkEvent) -> Result<()> {
        Ok(())
    }

    fn prepare<'a>(
        &'a self,
        cx: Cx<'a>,
        change: &'a NodeChange,
    ) -> LocalFuture<'a, Result<Box<dyn Prepared>>> {
        Box::pin(async move {
            match *change {
                NodeChange::Access { needs, allows } => {
                    if needs.intersects(Actions::V | Actions::M) {
                        self.check_writable()?;
                    }
                    let stance = Stance::of(needs, allows, cx.node.flags.force_share);
                    self.line.shares.prepare(cx.node.name.as_str(), stance)
                }
                NodeChange::Resize { size } => {
                    self.check_size(size)?;
                    dolmen_graph::prepare_nothing(cx, change).await
                }
                NodeChange::Backing(_) => dolmen_graph::prepare_nothing(cx, change).await,
            }
        })
    }

    fn close<'a>(&'a self, cx: Cx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            // Nobody else does: what closes a node above may have nothing of its own to write out.
            let owed = !cx.node.flags.no_flush && self.current().history.is_owed_a_flush();
            let flushed = if owed { self.flush(cx.rt).await } else { Ok(()) };
            self.link().say_goodbye(cx.rt).await;
            flushed
        })
    }

    fn image(&self) -> Option<&dyn ImageOps> {
        None
    }

    fn describe(&self, _node: &Node) -> Description {
        Description {
            filename: Some(self.config.address.url(&self.config.export)),
            read_only: self.offers(TransmissionFlags::READ_ONLY),
            ..Description::default()
        }
    }
}
