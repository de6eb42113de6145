//! The metadata of a qcow2 image.
#![no_main]
use dolmen_formats::qcow2::codec::{decode_directory, decode_entry};
use dolmen_formats::qcow2::{Geometry, Header, L2Entry};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(h) = Header::decode(data) {
        let _ = h.check_supported();
        // What is accepted and fits can be written again, and means the same.
        if let Ok(again) = h.encode() {
            assert_eq!(Header::decode(&again).expect("our own header"), h);
        }
    }
    for cluster_bits in [9, 16, 21] {
        let geo = Geometry { version: 3, cluster_bits, refcount_order: 4 };
        let _ = decode_entry(data, geo);
        let _ = decode_directory(data, 3, geo);
        for raw in data.chunks_exact(8) {
            let raw = u64::from_be_bytes(raw.try_into().expect("eight bytes"));
            if let Ok(e) = L2Entry::decode(raw, geo) {
                assert_eq!(L2Entry::decode(e.encode(geo), geo), Ok(e));
            }
        }
    }
});
