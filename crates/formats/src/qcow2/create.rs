//! Making an image, and changing its backing file without looking at the data.

use std::sync::Arc;

use dolmen_graph::option::{Flag, Number, OptionKind, Size, Text, Word};
use dolmen_graph::{BackingName, CreateCx, Creation, Io, NodeState, Prealloc, Read, Write};
use dolmen_rt::LocalFuture;
use dolmen_types::{Error, ErrorKind, OptionSpec, OptionType, Options, Result, Span, WriteFlags};

use super::driver::Core;
use super::entry::refcount_set;
use super::header::{COMPAT_LAZY_REFCOUNTS, CompressionType, EXT_BACKING_FORMAT, Header};
use super::image::{Env, File, load_header, read_bytes};
use super::layout::{Geometry, HostOffset, put64};
use super::replace::Replacement;

dolmen_graph::options! {
    struct NewQcow2Options {
        required "size" size: Size => "virtual size in bytes, rounded up to 512";
        optional "compat" compat: Word<Compat> => "version: 0.10 or v2, 1.1 or v3 (default 1.1)";
        optional "version" version: Word<Version> => "the same as compat";
        optional "backing_file" backing_file: Text => "name of the backing file, stored as it is";
        optional "backing_fmt" backing_fmt: Text => "format of the backing file";
        default "cluster_size" cluster_size: Size = "64k" => "power of two from 512 to 2M";
        default "preallocation" preallocation: Word<Space> = "off" =>
            "off, metadata (mapping only), falloc (reserve space), full (write zeroes)";
        default "lazy_refcounts" lazy_refcounts: Flag = "off" => "let other programs postpone refcounts";
        default "refcount_bits" refcount_bits: Number = "16" => "width of a refcount: 1 to 64, power of two";
        default "compression_type" compression_type: Compression = "zlib" =>
            "how compressed clusters are to be stored";
        default "extended_l2" extended_l2: Flag = "off" => "subclusters: only off can be had";
        default "data_file_raw" data_file_raw: Flag = "off" => "external data file: only off can be had";
        default "encryption" encryption: Flag = "off" => "only off can be had";
    }
}

/// The rows.
pub(super) const CREATE_OPTIONS: &[OptionSpec] = NewQcow2Options::ROWS;

dolmen_graph::words! {
    enum Compat { Old = "0.10" | "v2", New = "1.1" | "v3" }
}

dolmen_graph::words! {
    enum Version { Two = "v2", Three = "v3" }
}

dolmen_graph::words! {
    enum Space { Off = "off", Metadata = "metadata", Falloc = "falloc", Full = "full" }
}

/// A word that this program knows and a word that the format knows.
enum Compression {}

impl OptionKind for Compression {
    const TYPE: OptionType = OptionType::Enum(&["zlib"]);
    type Value = String;
    fn take(options: &mut Options, name: &str) -> Result<Option<String>> {
        options.take_str(name)
    }
}

/// What the options mean.
#[derive(Debug)]
struct Wanted {
    geo: Geometry,
    size: u64,
    backing: Option<(String, Option<String>)>,
    lazy: bool,
    prealloc: Prealloc,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

/// What the format has and this driver can't make.
fn not_yet(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("qcow2 images with {what} can't be created here"))
        .remedy(format!("leave {what} out"))
}

fn understand(mut o: Options) -> Result<Wanted> {
    if !o.has("size") {
        return Err(invalid("Image creation needs a size parameter"));
    }
    let given = NewQcow2Options::take(&mut o)?;
    let version = match (given.compat, given.version) {
        (Some(Compat::Old), _) | (None, Some(Version::Two)) => 2,
        (Some(Compat::New), _) | (None, Some(Version::Three) | None) => 3,
    };
    let (size, cluster, format) = (given.size, given.cluster_size, given.backing_fmt);
    let name = given.backing_file.filter(|n| !n.is_empty());
    if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
        return Err(invalid("Cluster size must be a power of two between 512 and 2048k"));
    }
    let prealloc = match given.preallocation {
        Space::Off => Prealloc::Off,
        Space::Metadata => Prealloc::Metadata,
        Space::Falloc => Prealloc::Falloc,
        Space::Full => Prealloc::Full,
    };
    let lazy = given.lazy_refcounts;
    if lazy && version < 3 {
        return Err(invalid(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        ));
    }
    let bits = given.refcount_bits;
    if !bits.is_power_of_two() || bits > 64 {
        return Err(invalid("Refcount width must be a power of two and may not exceed 64 bits"));
    }
    if bits != 16 && version < 3 {
        return Err(invalid(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or \
             greater)",
        ));
    }
    match given.compression_type.as_str() {
        "zlib" => {}
        "zstd" => return Err(not_yet("compression type zstd")),
        other => return Err(invalid(format!("Invalid parameter '{other}'"))),
    }
    for (asked, what) in [
        (given.extended_l2, "extended_l2"),
        (given.data_file_raw, "data_file_raw"),
        (given.encryption, "encryption"),
    ] {
        if asked {
            return Err(not_yet(what));
        }
    }
    if format.is_some() && name.is_none() {
        return Err(invalid("Backing format cannot be used without backing file"));
    }
    if name.is_some() && prealloc != Prealloc::Off {
        return Err(invalid("Backing file and preallocation cannot be used at the same time"));
    }
    o.finish("format 'qcow2'")?;
    let geo =
        Geometry { version, cluster_bits: cluster.trailing_zeros(), refcount_order: bits.trailing_zeros() };
    let size = size.checked_next_multiple_of(512).filter(|s| *s <= geo.max_size()).ok_or_else(|| {
        Error::new(ErrorKind::Limit, format!("the image can't have {size} bytes"))
            .remedy("use a larger cluster size")
    })?;
    Ok(Wanted { geo, size, backing: name.map(|n| (n, format)), lazy, prealloc })
}

/// Where the tables of a new image go: header, refcount table, refcount blocks, L1 table.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    reftable: u64,
    blocks: u64,
    l1: u64,
}

impl Plan {
    fn new(geo: Geometry, size: u64) -> Plan {
        let l1 = geo.clusters_for(geo.l1_entries_for(size) * 8);
        let mut p = Plan { reftable: 1, blocks: 1, l1 };
        loop {
            let blocks = p.clusters().div_ceil(geo.refblock_entries());
            let reftable = geo.clusters_for(blocks * 8);
            if blocks <= p.blocks && reftable <= p.reftable {
                return p;
            }
            p.blocks = p.blocks.max(blocks);
            p.reftable = p.reftable.max(reftable);
        }
    }

    fn clusters(&self) -> u64 {
        1 + self.reftable + self.blocks + self.l1
    }
}

/// An image to be made in a file that is empty, or whose old content counts for nothing.
struct NewQcow2 {
    wanted: Wanted,
    plan: Plan,
    /// The first cluster, which a long name of a backing file may not fit into.
    header: Vec<u8>,
}

/// See `DriverKind::create`.
pub(super) fn create(options: Options) -> Result<Box<dyn Creation>> {
    let wanted = understand(options)?;
    let plan = Plan::new(wanted.geo, wanted.size);
    let header = header(&wanted, &plan)?;
    Ok(Box::new(NewQcow2 { wanted, plan, header }))
}

impl Creation for NewQcow2 {
    fn room(&self) -> u64 {
        let Wanted { geo, size, prealloc, .. } = &self.wanted;
        let mapped = match prealloc {
            Prealloc::Off => 0,
            // A place for every cluster, and the tables that say where. (Their refcounts take a little more.)
            Prealloc::Metadata | Prealloc::Falloc | Prealloc::Full => {
                geo.clusters_for(*size) + geo.l1_entries_for(*size)
            }
        };
        (self.plan.clusters() + mapped) << geo.cluster_bits
    }

    fn space(&self) -> u64 {
        let Wanted { geo, size, prealloc, .. } = &self.wanted;
        match prealloc {
            Prealloc::Off => self.plan.clusters() << geo.cluster_bits,
            Prealloc::Metadata => (self.plan.clusters() + geo.l1_entries_for(*size)) << geo.cluster_bits,
            Prealloc::Falloc | Prealloc::Full => self.room(),
        }
    }

    fn backing(&self) -> Option<BackingName<'_>> {
        let (name, format) = self.wanted.backing.as_ref()?;
        Some(BackingName { name, format: format.as_deref() })
    }

    fn make<'a>(&'a self, cx: CreateCx<'a>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            self.write(cx).await?;
            if self.wanted.prealloc != Prealloc::Off {
                preallocate(cx, &self.wanted).await?;
            }
            Ok(())
        })
    }
}

fn header(w: &Wanted, plan: &Plan) -> Result<Vec<u8>> {
    let geo = w.geo;
    let bits = geo.cluster_bits;
    let mut header = Header {
        version: geo.version,
        cluster_bits: bits,
        size: w.size,
        crypt_method: 0,
        l1_entries: u32::try_from(geo.l1_entries_for(w.size)).expect("below the limit"),
        l1_table: HostOffset((1 + plan.reftable + plan.blocks) << bits),
        reftable: HostOffset(1 << bits),
        reftable_clusters: u32::try_from(plan.reftable).expect("small"),
        snapshots: 0,
        snapshot_table: HostOffset(0),
        incompatible: 0,
        compatible: if w.lazy { COMPAT_LAZY_REFCOUNTS } else { 0 },
        autoclear: 0,
        refcount_order: geo.refcount_order,
        compression: CompressionType::Zlib,
        backing_file: None,
        unknown_fields: Vec::new(),
        extensions: Vec::new(),
    };
    if let Some((name, format)) = &w.backing {
        header.set_backing(Some(name), format.as_deref())?;
    }
    encode_with_names(&mut header)
}

impl NewQcow2 {
    async fn write(&self, cx: CreateCx<'_>) -> Result<()> {
        let NewQcow2 { wanted, plan, header } = self;
        let geo = wanted.geo;
        let bits = geo.cluster_bits;
        let io = cx.write()?;
        let end = plan.clusters() << bits;
        if io.size() < end {
            cx.resize()?.resize(end, Prealloc::Off).await?;
        }
        let mut reftable = vec![0u8; (plan.reftable << bits) as usize];
        for b in 0..plan.blocks {
            let at = (1 + plan.reftable + b) << bits;
            put64(&mut reftable, b as usize * 8, at);
            let mut block = vec![0u8; geo.cluster_len()];
            let base = b * geo.refblock_entries();
            for i in 0..geo.refblock_entries().min(plan.clusters().saturating_sub(base)) {
                refcount_set(&mut block, geo.refcount_order, i as usize, 1);
            }
            io.write_bytes(at, &block, WriteFlags::NONE).await?;
        }
        io.write_bytes(1 << bits, &reftable, WriteFlags::NONE).await?;
        let l1_at = (1 + plan.reftable + plan.blocks) << bits;
        if plan.l1 > 0 {
            io.write_zeroes(Span::new(l1_at, plan.l1 << bits), WriteFlags::NONE).await?;
        }
        io.flush().await?;
        // Last, so that a file with a header is a complete image.
        io.write_bytes(0, header, WriteFlags::NONE).await?;
        io.flush().await
    }
}

/// Encodes a header with the table of feature names, or without where that does not fit the cluster.
fn encode_with_names(header: &mut Header) -> Result<Vec<u8>> {
    if header.version < 3 {
        return header.encode();
    }
    header.extensions.push(Header::feature_names());
    if let Ok(b) = header.encode() {
        return Ok(b);
    }
    header.extensions.retain(|e| e.id != super::header::EXT_FEATURE_NAMES);
    header.encode()
}

async fn preallocate(cx: CreateCx<'_>, w: &Wanted) -> Result<()> {
    let Some(edge) = cx.file else { return Err(invalid("a format is created in a file")) };
    let file = File::new(edge, cx.rt);
    let core = Core::open(file, true, false).await?;
    let state = Arc::new(NodeState::default());
    let env = Env::alone(file, &state);
    core.preallocate(env, Span::new(0, w.size), w.prealloc).await?;
    core.close(env).await
}

/// Changes the name and format of the backing file in an image's header; `None` removes them. The data are not
/// looked at: the caller says that the new backing file has the same content. Nobody else may be using the image.
///
/// # Errors
/// `NoSpace` when the name does not fit the first cluster, or what the file says.
pub async fn change_backing(
    read: Io<'_, Read>,
    write: Io<'_, Write>,
    to: Option<BackingName<'_>>,
) -> Result<()> {
    let (name, format) = (to.map(|b| b.name), to.and_then(|b| b.format));
    let (mut header, _) = load_header(read).await?;
    header.check_supported()?;
    header.clear_unknown();
    header.set_backing(name, format)?;
    if name.is_none() {
        header.extensions.retain(|e| e.id != EXT_BACKING_FORMAT);
    }
    let mut old = vec![0; header.geometry().cluster_len()];
    read_bytes(read, 0, &mut old).await?;
    let Replacement { ahead, sector } = header.replace(&old)?;
    if let Some((at, bytes)) = ahead {
        write.write_bytes(at, &bytes, WriteFlags::NONE).await?;
        write.flush().await?;
    }
    write.write_bytes(0, &sector, WriteFlags::NONE).await?;
    write.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ok(o: Options) -> Wanted {
        understand(o.with("size", "1M")).unwrap()
    }

    #[test]
    fn options() {
        let w = ok(Options::new());
        assert_eq!((w.geo.version, w.geo.cluster_bits, w.geo.refcount_order, w.size), (3, 16, 4, 1 << 20));
        let w = ok(Options::new().with("compat", "0.10").with("cluster-size", "4k"));
        assert_eq!((w.geo.version, w.geo.cluster_bits), (2, 12));
        for bad in [
            Options::new().with("cluster_size", "1000"),
            Options::new().with("cluster_size", "4M"),
            Options::new().with("refcount_bits", "3"),
            Options::new().with("refcount_bits", "8").with("compat", "v2"),
            Options::new().with("lazy_refcounts", true).with("compat", "v2"),
            Options::new().with("nonsense", "1"),
            Options::new().with("backing_fmt", "raw"),
        ] {
            assert!(understand(bad.with("size", "1M")).is_err());
        }
        assert!(understand(Options::new()).is_err());
        assert_eq!(understand(Options::new().with("size", "1000")).unwrap().size, 1024);
        let e = understand(Options::new().with("size", "1E").with("cluster_size", "512")).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Limit);
    }

    #[test]
    fn tables_count_themselves() {
        for bits in [9, 12, 16, 21] {
            for order in 0..=6 {
                let geo = Geometry { version: 3, cluster_bits: bits, refcount_order: order };
                for size in [0, 512, 1 << 30, geo.max_size().min(1 << 40)] {
                    let p = Plan::new(geo, size);
                    assert!(p.blocks * geo.refblock_entries() >= p.clusters());
                    assert!(p.reftable * geo.cluster_size() >= p.blocks * 8);
                }
            }
        }
    }
}
