//! Compressed clusters (section "Compressed Clusters Descriptor").

use dolmen_types::{Error, ErrorKind, Result};
use flate2::{Decompress, FlushDecompress};

use super::header::CompressionType;
use super::layout::corrupt;

/// Unpacks one cluster. `packed` may go on behind the end of the stream: the image only says how many sectors the
/// stream touches. Takes no more memory than a cluster, whatever the stream says.
pub(super) fn unpack(compression: CompressionType, packed: &[u8], cluster_len: usize) -> Result<Vec<u8>> {
    match compression {
        CompressionType::Zlib => {}
        CompressionType::Zstd => {
            return Err(Error::new(ErrorKind::Unsupported, "the compression type 'zstd' is not supported")
                .remedy("convert the image to one with compression_type=zlib"));
        }
    }
    let mut out = vec![0u8; cluster_len];
    let mut stream = Decompress::new(false);
    loop {
        let (read, written) = (stream.total_in() as usize, stream.total_out() as usize);
        let state = stream
            .decompress(&packed[read..], &mut out[written..], FlushDecompress::None)
            .map_err(|e| corrupt("compressed data are damaged").source(e))?;
        let (read_now, written_now) = (stream.total_in() as usize, stream.total_out() as usize);
        if written_now == cluster_len {
            return Ok(out);
        }
        if state == flate2::Status::StreamEnd || (read_now == read && written_now == written) {
            return Err(corrupt(format!("compressed data end after {written_now} of {cluster_len} bytes")));
        }
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};
    use proptest::prelude::*;

    use super::*;

    fn pack(data: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(data.len() * 2 + 64);
        Compress::new(Compression::fast(), false)
            .compress_vec(data, &mut out, FlushCompress::Finish)
            .unwrap();
        out
    }

    proptest! {
        #[test]
        fn round_trip_with_rubbish_behind(data in prop::collection::vec(0u8..4, 4096), rubbish in prop::collection::vec(any::<u8>(), 0..512)) {
            let mut packed = pack(&data);
            packed.extend(rubbish);
            prop_assert_eq!(unpack(CompressionType::Zlib, &packed, 4096).unwrap(), data);
        }

        #[test]
        fn rubbish_fails_or_fills_the_cluster(data in prop::collection::vec(any::<u8>(), 0..2048)) {
            if let Ok(out) = unpack(CompressionType::Zlib, &data, 4096) {
                prop_assert_eq!(out.len(), 4096);
            }
        }
    }

    #[test]
    fn short_streams_are_refused() {
        let e = unpack(CompressionType::Zlib, &pack(&[1; 100]), 4096).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt);
    }
}
