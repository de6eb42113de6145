//! The header and its extensions (sections "Header" and "Header extensions").
//!
//! Decoding looks at the first cluster only and allocates no more than that. Whatever the header says is checked
//! here: after [`Header::decode`] everything that reading guest data needs is within its limits and every feature
//! known, so nothing above needs to doubt it. What only writing needs (refcounts, snapshots) is checked by
//! [`Header::check_writable`], so that damage there keeps nobody from the data. Unknown extensions are kept as they
//! are and written back.

use dolmen_types::{Error, ErrorKind, Result, bytes, text_of};

use super::layout::{
    Geometry, HostOffset, MAX_BACKING_NAME, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, MAX_CLUSTER_BITS,
    MAX_EXTENSIONS, MAX_L1_BYTES, MAX_REFTABLE_BYTES, MAX_SNAPSHOTS, MIN_CLUSTER_BITS, be32, be64,
    check_table, corrupt, over_limit, put64,
};

/// "QFI\xfb".
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// What a disk writes at once or not at all.
pub(super) const SECTOR: usize = 512;
/// Bytes of a version 2 header.
pub(super) const V2_LENGTH: usize = 72;
/// Bytes of the smallest version 3 header.
pub(super) const V3_LENGTH: usize = 104;
/// Bytes of the version 3 headers that Dolmen writes: with the compression type, padded to 8.
pub(super) const WRITTEN_LENGTH: usize = 112;

/// Incompatible feature 0: refcounts may be wrong (lazy refcounts after a crash).
pub(super) const INCOMPAT_DIRTY: u64 = 1;
/// Incompatible feature 1: metadata are damaged; the image must not be written.
pub(super) const INCOMPAT_CORRUPT: u64 = 2;
/// Incompatible feature 2: guest data live in another file.
pub(super) const INCOMPAT_DATA_FILE: u64 = 4;
/// Incompatible feature 3: the compression type of the header counts.
pub(super) const INCOMPAT_COMPRESSION: u64 = 8;
/// Incompatible feature 4: L2 entries are 16 bytes with subclusters.
pub(super) const INCOMPAT_EXTENDED_L2: u64 = 16;
/// Compatible feature 0: refcounts may be updated lazily.
pub(super) const COMPAT_LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature 0: the bitmaps extension is consistent with the data. All others belong to features that
/// Dolmen does not keep up, so they are cleared with the first change of the image.
pub(super) const AUTOCLEAR_BITMAPS: u64 = 1;

/// QEMU opens no image with a longer name of a format.
const MAX_FORMAT_NAME: usize = 15;
/// Header extension: format of the backing file.
pub(super) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Header extension: names of feature bits.
pub(super) const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// Header extension: where the bitmaps are.
pub(super) const EXT_BITMAPS: u32 = 0x2385_2875;

/// Rows of the feature name table that Dolmen writes: type (0 incompatible, 1 compatible, 2 autoclear), bit, name.
pub(super) const FEATURE_NAMES: &[(u8, u8, &str)] = &[
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// One header extension as it is in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub id: u32,
    /// Its data without the padding.
    pub data: Vec<u8>,
}

/// The bitmaps extension (section "Bitmaps extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Bitmaps in the directory.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_bytes: u64,
    /// Where the directory is.
    pub directory: HostOffset,
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

impl CompressionType {
    /// The name used in options and reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            CompressionType::Zlib => "zlib",
            CompressionType::Zstd => "zstd",
        }
    }
}

/// The header of an image, checked.
///
/// On disk, big-endian: 0 magic, 4 version, 8 backing file offset, 16 backing file name length, 20 cluster bits,
/// 24 size, 32 encryption method, 36 L1 entries, 40 L1 offset, 48 refcount table offset, 56 refcount table
/// clusters, 60 snapshots, 64 snapshot table offset; version 3 also has 72 incompatible features, 80 compatible
/// features, 88 autoclear features, 96 refcount order, 100 header length, 104 compression type, 105-111 padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Virtual size in bytes; a multiple of 512 in images of most writers, but any number is valid.
    pub size: u64,
    /// Encryption method: 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table is.
    pub l1_table: HostOffset,
    /// Where the refcount table is.
    pub reftable: HostOffset,
    /// Size of the refcount table in clusters.
    pub reftable_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table is.
    pub snapshot_table: HostOffset,
    /// Incompatible feature bits; 0 for version 2.
    pub incompatible: u64,
    /// Compatible feature bits; 0 for version 2.
    pub compatible: u64,
    /// Autoclear feature bits; 0 for version 2.
    pub autoclear: u64,
    /// log2 of the refcount width in bits; 4 for version 2.
    pub refcount_order: u32,
    /// How clusters are compressed.
    pub compression: CompressionType,
    /// Name of the backing file; `None` when there is none. Never opened by this module.
    pub backing_file: Option<String>,
    /// Header bytes beyond the ones known here, kept as they are.
    pub unknown_fields: Vec<u8>,
    /// All extensions in their order.
    pub extensions: Vec<Extension>,
}

/// What a caller has to read before it can decode a header: reads at least [`V3_LENGTH`] bytes (fewer only when
/// the file is shorter) and learns how long the first cluster is.
pub fn first_cluster_len(prefix: &[u8]) -> Result<usize> {
    if prefix.len() < V2_LENGTH || be32(prefix, 0) != MAGIC {
        return Err(Error::new(ErrorKind::InvalidInput, "Image is not in qcow2 format"));
    }
    let version = be32(prefix, 4);
    if !(2..=3).contains(&version) {
        return Err(Error::new(ErrorKind::Unsupported, format!("Unsupported qcow2 version {version}")));
    }
    let bits = be32(prefix, 20);
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
        return Err(Error::new(ErrorKind::Unsupported, format!("Unsupported cluster size: 2^{bits}")));
    }
    Ok(1 << bits)
}

/// Whether data begin with the magic; what probing asks. The version does not matter: an
/// image of one that this driver does not know must be refused, not taken for a raw disk.
pub fn looks_like_qcow2(prefix: &[u8]) -> bool {
    prefix.len() >= 8 && be32(prefix, 0) == MAGIC
}

impl Header {
    /// Whether the header, with its extensions and the name of the backing file, ends within `head`, the first bytes of
    /// the first cluster: then [`Header::decode`] needs no more of it. Also false for what is no good header.
    pub(super) fn ends_within(head: &[u8]) -> bool {
        let (backing_at, backing_len) = (be64(head, 8), be32(head, 16));
        let extensions_end = match backing_at {
            0 => usize::MAX,
            at if at.saturating_add(backing_len.into()) <= head.len() as u64 => at as usize,
            _ => return false,
        };
        let mut at = if be32(head, 4) < 3 { V2_LENGTH } else { be32(head, 100) as usize };
        while at < extensions_end {
            let Some(extension) = head.get(at..).filter(|rest| rest.len() >= 8) else { return false };
            if be32(extension, 0) == 0 {
                return true;
            }
            at += 8 + (be32(extension, 4) as usize).next_multiple_of(8);
        }
        true
    }

    /// Decodes and checks the header in the first cluster of a file. `cluster` may be shorter than a cluster when
    /// the file is, or when the header ends in it ([`Header::ends_within`]).
    pub fn decode(cluster: &[u8]) -> Result<Header> {
        let cluster_len = first_cluster_len(cluster)?;
        let b = &cluster[..cluster.len().min(cluster_len)];
        let version = be32(b, 4);
        let mut h = Header {
            version,
            cluster_bits: be32(b, 20),
            size: be64(b, 24),
            crypt_method: be32(b, 32),
            l1_entries: be32(b, 36),
            l1_table: HostOffset(be64(b, 40)),
            reftable: HostOffset(be64(b, 48)),
            reftable_clusters: be32(b, 56),
            snapshots: be32(b, 60),
            snapshot_table: HostOffset(be64(b, 64)),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: CompressionType::Zlib,
            backing_file: None,
            unknown_fields: Vec::new(),
            extensions: Vec::new(),
        };
        let mut header_len = V2_LENGTH;
        if version >= 3 {
            if b.len() < V3_LENGTH {
                return Err(corrupt("qcow2 header is cut off"));
            }
            h.incompatible = be64(b, 72);
            h.compatible = be64(b, 80);
            h.autoclear = be64(b, 88);
            h.refcount_order = be32(b, 96);
            header_len = be32(b, 100) as usize;
            if header_len < V3_LENGTH {
                return Err(corrupt(format!("qcow2 header too short: {header_len} bytes")));
            }
            if header_len > b.len() {
                return Err(corrupt("qcow2 header exceeds cluster size"));
            }
            if header_len > WRITTEN_LENGTH {
                h.unknown_fields = b[WRITTEN_LENGTH..header_len].to_vec();
            }
        }

        let backing_at = be64(b, 8);
        let backing_len = be32(b, 16);
        if backing_at > b.len() as u64 {
            return Err(corrupt(format!(
                "backing file name offset {backing_at:#x} lies beyond the first cluster"
            )));
        }
        let extensions_end = if backing_at != 0 { backing_at as usize } else { b.len() };
        h.extensions = decode_extensions(b, header_len, extensions_end)?.0;
        h.check_features()?;
        if version >= 3 {
            h.decode_compression(b, header_len)?;
        }
        if backing_at != 0 {
            h.backing_file = Some(decode_backing_name(b, backing_at as usize, backing_len)?);
        }
        h.check_tables()?;
        Ok(h)
    }

    fn decode_compression(&mut self, b: &[u8], header_len: usize) -> Result<()> {
        let kind = if header_len > V3_LENGTH { b[V3_LENGTH] } else { 0 };
        let flagged = self.incompatible & INCOMPAT_COMPRESSION != 0;
        self.compression = match kind {
            0 => CompressionType::Zlib,
            1 => CompressionType::Zstd,
            k => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("Unknown qcow2 compression type {k}"),
                ));
            }
        };
        if flagged != (kind != 0) {
            return Err(corrupt(format!(
                "compression type {} does not agree with the incompatible feature bit 'compression type'",
                self.compression.as_str()
            )));
        }
        Ok(())
    }

    fn check_features(&self) -> Result<()> {
        let known = INCOMPAT_DIRTY
            | INCOMPAT_CORRUPT
            | INCOMPAT_DATA_FILE
            | INCOMPAT_COMPRESSION
            | INCOMPAT_EXTENDED_L2;
        let unknown = self.incompatible & !known;
        if unknown != 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("Unsupported qcow2 feature(s): {}", self.name_features(unknown).join(", ")),
            )
            .remedy("open the image with a newer version, or convert it with the program that made it"));
        }
        Ok(())
    }

    /// Names of incompatible features, from the image's feature name table where it has them.
    fn name_features(&self, bits: u64) -> Vec<String> {
        let table = self.extensions.iter().find(|e| e.id == EXT_FEATURE_NAMES);
        (0..64u8)
            .filter(|bit| bits & (1 << bit) != 0)
            .map(|bit| {
                let named =
                    table.and_then(|t| t.data.chunks_exact(48).find(|row| row[0] == 0 && row[1] == bit));
                match named {
                    Some(row) => {
                        let end = row[2..].iter().position(|c| *c == 0).unwrap_or(46);
                        String::from_utf8_lossy(&row[2..2 + end]).escape_debug().to_string()
                    }
                    None => format!("Unknown incompatible feature: {:x}", 1u64 << bit),
                }
            })
            .collect()
    }

    fn check_tables(&self) -> Result<()> {
        let geo = self.geometry();
        if self.refcount_order > 6 {
            return Err(corrupt("Reference count entry width too large; may not exceed 64 bits"));
        }
        if self.crypt_method > 2 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("Unsupported encryption method {}", self.crypt_method),
            ));
        }
        check_table(geo, "Active L1 table", self.l1_table.0, u64::from(self.l1_entries) * 8, MAX_L1_BYTES)?;
        let needed = geo.l1_entries_for(self.size);
        if needed > MAX_L1_BYTES / 8 || self.size > i64::MAX as u64 {
            return Err(over_limit(format!("Image is too big: {} bytes", self.size)));
        }
        if u64::from(self.l1_entries) < needed {
            return Err(corrupt(format!(
                "L1 table is too small: {} entries, {needed} are needed for {} bytes",
                self.l1_entries, self.size
            )));
        }
        if self.l1_table.0 == 0 && self.l1_entries != 0 {
            return Err(corrupt("the active L1 table overlaps the header"));
        }
        Ok(())
    }

    /// Checks what is needed to change an image.
    pub fn check_writable(&self) -> Result<()> {
        self.check_reftable()
            .and_then(|()| self.check_snapshot_table())
            .map_err(|e| e.remedy("open the image with read-only=on, or repair it with 'img check -r all'"))
    }

    /// Checks where the refcount table is.
    pub(super) fn check_reftable(&self) -> Result<()> {
        let geo = self.geometry();
        let bytes = u64::from(self.reftable_clusters) * geo.cluster_size();
        check_table(geo, "Refcount table", self.reftable.0, bytes, MAX_REFTABLE_BYTES)?;
        if self.reftable_clusters == 0 {
            return Err(corrupt("Image does not contain a reference count table"));
        }
        if self.reftable.0 == 0 {
            return Err(corrupt("the refcount table overlaps the header"));
        }
        Ok(())
    }

    /// Checks where the snapshot table is.
    pub(super) fn check_snapshot_table(&self) -> Result<()> {
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(over_limit(format!(
                "{} internal snapshots, at most {MAX_SNAPSHOTS} are supported",
                self.snapshots
            )));
        }
        self.check_snapshot_offset()
    }

    /// Checks where the snapshot table begins, if there is one.
    pub(super) fn check_snapshot_offset(&self) -> Result<()> {
        if self.snapshots == 0 {
            return Ok(());
        }
        if self.snapshot_table.0 == 0 {
            return Err(corrupt("the snapshot table overlaps the header"));
        }
        check_table(self.geometry(), "Snapshot table", self.snapshot_table.0, 0, 0)
    }

    /// Refuses what this driver can't do with an image, by name. `check_features` has refused what is unknown.
    pub fn check_supported(&self) -> Result<()> {
        let missing = if self.crypt_method == 1 {
            "AES encryption"
        } else if self.crypt_method == 2 {
            "LUKS encryption"
        } else if self.incompatible & INCOMPAT_DATA_FILE != 0 {
            "external data file"
        } else if self.incompatible & INCOMPAT_EXTENDED_L2 != 0 {
            "extended L2 entries"
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Unsupported, format!("the qcow2 feature '{missing}' is not supported"))
            .remedy("convert the image to one without this feature"))
    }

    /// The numbers that stay the same while the image is open.
    pub const fn geometry(&self) -> Geometry {
        Geometry {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
        }
    }

    /// The format of the backing file, as the image says.
    pub fn backing_format(&self) -> Option<String> {
        self.extension(EXT_BACKING_FORMAT).map(|e| String::from_utf8_lossy(&e.data).into_owned())
    }

    /// The first extension of a type.
    pub fn extension(&self, id: u32) -> Option<&Extension> {
        self.extensions.iter().find(|e| e.id == id)
    }

    /// Sets or removes the backing file and its format.
    pub fn set_backing(&mut self, name: Option<&str>, format: Option<&str>) -> Result<()> {
        let len = name.map_or(1, |n| bytes(n).len());
        if let Some(name) = name
            && (name.is_empty() || len > MAX_BACKING_NAME as usize)
        {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("a backing file name has 1 to {MAX_BACKING_NAME} bytes, not {len}"),
            ));
        }
        if let Some(format) = format.filter(|f| f.len() > MAX_FORMAT_NAME) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "'{format}' is no format that a header can name: it has more than {MAX_FORMAT_NAME} bytes"
                ),
            ));
        }
        self.backing_file = name.map(str::to_owned);
        self.extensions.retain(|e| e.id != EXT_BACKING_FORMAT);
        if let (Some(format), Some(_)) = (format, name) {
            let e = Extension { id: EXT_BACKING_FORMAT, data: format.as_bytes().to_vec() };
            self.extensions.insert(0, e);
        }
        Ok(())
    }

    /// The bitmaps extension, checked; `None` when there is none or when the autoclear bit says that it can't be
    /// relied on.
    pub fn bitmaps(&self) -> Result<Option<BitmapsExtension>> {
        if self.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return Ok(None);
        }
        let Some(e) = self.extension(EXT_BITMAPS) else { return Ok(None) };
        if e.data.len() != 24 {
            return Err(corrupt(format!("bitmaps extension has {} bytes, not 24", e.data.len())));
        }
        let found = BitmapsExtension {
            count: be32(&e.data, 0),
            directory_bytes: be64(&e.data, 8),
            directory: HostOffset(be64(&e.data, 16)),
        };
        if found.count == 0 || found.count > MAX_BITMAPS {
            return Err(corrupt(format!("bitmaps extension with {} bitmaps", found.count)));
        }
        let (at, bytes) = (found.directory.0, found.directory_bytes);
        check_table(self.geometry(), "Bitmap directory", at, bytes, MAX_BITMAP_DIRECTORY_BYTES)?;
        if bytes < u64::from(found.count) * 24 {
            return Err(corrupt(format!("bitmap directory of {bytes} bytes for {} bitmaps", found.count)));
        }
        Ok(Some(found))
    }

    /// The header, its extensions and the backing file name as they go to the start of the file; the rest of the
    /// first cluster is zero. Fails when they do not fit into the cluster.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let cluster_len = self.geometry().cluster_len();
        let mut b = self.encode_head();
        if let Some(name) = &self.backing_file {
            let at = b.len();
            let name = point_to_name(&mut b, at, name);
            b.extend_from_slice(&name);
        }
        if b.len() > cluster_len {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "the header and the backing file name need {} bytes, a cluster has {cluster_len}",
                    b.len()
                ),
            )
            .remedy("use a shorter backing file name or a larger cluster size"));
        }
        b.resize(cluster_len, 0);
        Ok(b)
    }

    /// The header and its extensions, without a backing file name.
    pub(super) fn encode_head(&self) -> Vec<u8> {
        let mut b = vec![0u8; if self.version >= 3 { WRITTEN_LENGTH } else { V2_LENGTH }];
        b[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        b[4..8].copy_from_slice(&self.version.to_be_bytes());
        b[20..24].copy_from_slice(&self.cluster_bits.to_be_bytes());
        b[32..36].copy_from_slice(&self.crypt_method.to_be_bytes());
        if self.version >= 3 {
            put64(&mut b, 80, self.compatible);
            b[96..100].copy_from_slice(&self.refcount_order.to_be_bytes());
            b[V3_LENGTH] = match self.compression {
                CompressionType::Zlib => 0,
                CompressionType::Zstd => 1,
            };
            b.extend_from_slice(&self.unknown_fields);
            let len = b.len() as u32;
            b[100..104].copy_from_slice(&len.to_be_bytes());
        }
        self.patch(&mut b);
        for e in &self.extensions {
            b.extend_from_slice(&e.id.to_be_bytes());
            b.extend_from_slice(&(e.data.len() as u32).to_be_bytes());
            b.extend_from_slice(&e.data);
            b.resize(b.len().next_multiple_of(8), 0);
        }
        // End of the extension area.
        b.extend_from_slice(&[0; 8]);
        b
    }

    /// Stores the fields that change while an image is open into its first sector: one atomic write.
    pub fn patch(&self, sector: &mut [u8]) {
        put64(sector, 24, self.size);
        sector[36..40].copy_from_slice(&self.l1_entries.to_be_bytes());
        put64(sector, 40, self.l1_table.0);
        put64(sector, 48, self.reftable.0);
        sector[56..60].copy_from_slice(&self.reftable_clusters.to_be_bytes());
        sector[60..64].copy_from_slice(&self.snapshots.to_be_bytes());
        put64(sector, 64, self.snapshot_table.0);
        if self.version >= 3 {
            put64(sector, 72, self.incompatible);
            put64(sector, 88, self.autoclear);
        }
    }

    /// The feature name table extension that Dolmen writes.
    pub fn feature_names() -> Extension {
        let mut data = Vec::with_capacity(FEATURE_NAMES.len() * 48);
        for (kind, bit, name) in FEATURE_NAMES {
            let mut row = [0u8; 48];
            row[0] = *kind;
            row[1] = *bit;
            row[2..2 + name.len()].copy_from_slice(name.as_bytes());
            data.extend_from_slice(&row);
        }
        Extension { id: EXT_FEATURE_NAMES, data }
    }
}

/// Makes a header refer to a name at `at`; the bytes of the name.
pub(super) fn point_to_name(header: &mut [u8], at: usize, name: &str) -> Vec<u8> {
    let name = bytes(name);
    put64(header, 8, at as u64);
    header[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    name.into_owned()
}

/// The extensions from `start` on, and where they end, the mark of their end included.
pub(super) fn decode_extensions(b: &[u8], start: usize, end: usize) -> Result<(Vec<Extension>, usize)> {
    let mut out = Vec::new();
    let mut at = start;
    while at < end {
        if end - at < 8 {
            return Err(corrupt(format!("header extension at {at:#x} is cut off")));
        }
        let (id, len) = (be32(b, at), be32(b, at + 4) as usize);
        at += 8;
        if id == 0 {
            break;
        }
        if len > end - at {
            return Err(corrupt(format!(
                "header extension {id:#010x} at {:#x} is too large: {len} bytes",
                at - 8
            )));
        }
        if out.len() == MAX_EXTENSIONS {
            return Err(over_limit(format!("more than {MAX_EXTENSIONS} header extensions")));
        }
        out.push(Extension { id, data: b[at..at + len].to_vec() });
        at += len.next_multiple_of(8);
    }
    Ok((out, at.min(end)))
}

fn decode_backing_name(b: &[u8], at: usize, len: u32) -> Result<String> {
    if len > MAX_BACKING_NAME || len as usize > b.len() - at {
        return Err(over_limit(format!("backing file name too long: {len} bytes")));
    }
    let name = &b[at..at + len as usize];
    if name.contains(&0) {
        return Err(corrupt("backing file name contains a NUL byte"));
    }
    // A name of the system: any bytes.
    Ok(text_of(name))
}

#[cfg(test)]
impl Header {
    /// A header for tests.
    pub(super) fn sample(version: u32, bits: u32) -> Header {
        Header {
            version,
            cluster_bits: bits,
            size: 1 << 20,
            crypt_method: 0,
            l1_entries: 64,
            l1_table: HostOffset(3 << bits),
            reftable: HostOffset(1 << bits),
            reftable_clusters: 1,
            snapshots: 0,
            snapshot_table: HostOffset(0),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: CompressionType::Zlib,
            backing_file: None,
            unknown_fields: Vec::new(),
            extensions: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(version: u32, bits: u32) -> Header {
        Header::sample(version, bits)
    }

    #[test]
    fn round_trip() {
        for version in [2, 3] {
            for bits in [10, 12, 16, 21] {
                let mut h = sample(version, bits);
                h.set_backing(Some("base.qcow2"), Some("qcow2")).unwrap();
                if version == 3 {
                    h.extensions.push(Header::feature_names());
                    h.extensions.push(Extension { id: 0x1234_5678, data: vec![1, 2, 3] });
                    h.unknown_fields = vec![7; 16];
                }
                let b = h.encode().unwrap();
                assert_eq!(b.len(), 1 << bits);
                assert_eq!(Header::decode(&b).unwrap(), h);
            }
        }
    }

    /// Opening reads the beginning of the first cluster, and the rest only when the header does not end there.
    #[test]
    fn the_part_that_a_header_ends_in_is_enough() {
        for (version, backing) in [(2, None), (2, Some("base")), (3, None), (3, Some("base"))] {
            for extension in [None, Some(0), Some(40), Some(5000)] {
                let mut h = sample(version, 16);
                h.set_backing(backing, backing.and(Some("raw"))).unwrap();
                h.extensions.extend(extension.map(|n| Extension { id: 0x1234_5678, data: vec![9; n] }));
                let whole = h.encode().unwrap();
                let enough = |n: &usize| Header::ends_within(&whole[..*n]);
                let first = (V3_LENGTH..whole.len()).find(enough).expect("a header ends");
                assert!(first > extension.unwrap_or(0) && first < 6000, "{first}");
                for n in [first, first + 1, first + 500] {
                    assert_eq!(Header::decode(&whole[..n]).unwrap(), h, "the first {n} bytes of {whole:?}");
                }
                if backing.is_none() {
                    let mut endless = whole.clone();
                    endless[if version == 2 { V2_LENGTH } else { V3_LENGTH }..].fill(1);
                    assert!(!Header::ends_within(&endless[..4096]));
                }
            }
        }
    }

    #[test]
    fn a_long_name_must_fit_the_first_cluster() {
        let mut h = sample(3, 9);
        h.set_backing(Some(&"x".repeat(500)), None).unwrap();
        assert_eq!(h.encode().unwrap_err().kind(), ErrorKind::NoSpace);
        assert!(h.set_backing(Some(&"x".repeat(1024)), None).is_err());
    }

    #[test]
    fn unknown_features_are_refused_by_the_name_in_the_image() {
        let mut h = sample(3, 16);
        h.incompatible = (1 << 42) | (1 << 63);
        let mut row = vec![0u8; 48];
        row[1] = 42;
        row[2..10].copy_from_slice(b"holodeck");
        h.extensions.push(Extension { id: EXT_FEATURE_NAMES, data: row });
        let e = Header::decode(&h.encode().unwrap()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert_eq!(
            e.to_string(),
            "Unsupported qcow2 feature(s): holodeck, Unknown incompatible feature: 8000000000000000"
        );
    }

    #[test]
    fn known_but_missing_features_are_named() {
        for (bit, name) in
            [(INCOMPAT_DATA_FILE, "external data file"), (INCOMPAT_EXTENDED_L2, "extended L2 entries")]
        {
            let mut h = sample(3, 16);
            h.incompatible = bit;
            let h = Header::decode(&h.encode().unwrap()).unwrap();
            assert!(h.check_supported().unwrap_err().to_string().contains(name));
        }
    }

    /// What only writing needs keeps nobody from reading.
    #[test]
    fn damage_that_reading_does_not_meet() {
        let changes: &[fn(&mut Vec<u8>)] = &[
            |b| b[59] = 0,
            |b| b[55] = 1,
            |b| b[60] = 1,
            |b| (b[63], b[71]) = (1, 7),
            |b| (b[63], b[71]) = (1, 0),
        ];
        for (i, change) in changes.iter().enumerate() {
            let mut b = sample(3, 16).encode().unwrap();
            change(&mut b);
            let h = Header::decode(&b).unwrap();
            assert!(h.check_writable().is_err(), "{i}");
        }
    }

    #[test]
    fn hostile_fields() {
        type Change = (&'static str, fn(&mut Vec<u8>), ErrorKind);
        let cases: &[Change] = &[
            ("magic", |b| b[0] = 0, ErrorKind::InvalidInput),
            ("version", |b| b[7] = 4, ErrorKind::Unsupported),
            ("cluster bits 8", |b| b[23] = 8, ErrorKind::Unsupported),
            ("cluster bits 22", |b| b[23] = 22, ErrorKind::Unsupported),
            ("huge L1", |b| b[36] = 0xff, ErrorKind::Limit),
            ("L1 unaligned", |b| b[47] = 1, ErrorKind::Corrupt),
            ("L1 beyond 56 bits", |b| b[40] = 1, ErrorKind::Corrupt),
            ("L1 too small", |b| put64(b, 24, 1 << 50), ErrorKind::Corrupt),
            ("size of 2^63", |b| put64(b, 24, 1 << 63), ErrorKind::Limit),
            ("huge reftable", |b| b[57] = 0xff, ErrorKind::Limit),
            ("no reftable", |b| b[59] = 0, ErrorKind::Corrupt),
            ("too many snapshots", |b| b[60] = 1, ErrorKind::Limit),
            ("refcount order 7", |b| b[99] = 7, ErrorKind::Corrupt),
            ("header length short", |b| b[103] = 80, ErrorKind::Corrupt),
            ("header length long", |b| b[101] = 2, ErrorKind::Corrupt),
            ("backing name beyond cluster", |b| put64(b, 8, 0xffff_ffff_0000), ErrorKind::Corrupt),
            ("encryption 3", |b| b[35] = 3, ErrorKind::Unsupported),
            ("compression 9", |b| b[104] = 9, ErrorKind::Unsupported),
            ("compression without feature bit", |b| b[104] = 1, ErrorKind::Corrupt),
            (
                "backing name too long",
                |b| {
                    put64(b, 8, 0x200);
                    b[16..20].copy_from_slice(&5000u32.to_be_bytes());
                },
                ErrorKind::Limit,
            ),
        ];
        for (name, change, kind) in cases {
            let mut b = sample(3, 16).encode().unwrap();
            change(&mut b);
            let e = Header::decode(&b).and_then(|h| h.check_writable()).expect_err(name);
            assert_eq!(e.kind(), *kind, "{name}: {e}");
        }
    }

    proptest! {
        #[test]
        fn decoding_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..2048), version in 2u8..=3, bits in 9u8..=12) {
            let _ = Header::decode(&bytes);
            if bytes.len() >= 112 {
                bytes[0..4].copy_from_slice(&MAGIC.to_be_bytes());
                bytes[4..8].copy_from_slice(&[0, 0, 0, version]);
                bytes[20..24].copy_from_slice(&[0, 0, 0, bits]);
                let _ = Header::decode(&bytes);
            }
        }

        #[test]
        fn one_changed_byte_never_panics_and_what_is_accepted_encodes_again(at in 0usize..1024, value: u8) {
            let mut h = sample(3, 10);
            h.set_backing(Some("b"), Some("raw")).unwrap();
            h.extensions.push(Header::feature_names());
            let mut b = h.encode().unwrap();
            b[at] = value;
            if let Ok(h) = Header::decode(&b)
                && h.compatible == 0
                    && let Ok(again) = h.encode() {
                        prop_assert_eq!(Header::decode(&again).unwrap(), h);
                    }
        }
    }
}
