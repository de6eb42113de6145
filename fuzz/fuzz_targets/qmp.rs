//! Bytes from a QMP client, in two packets.
#![no_main]
use dolmen_qmp::{Framer, json};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut framer = Framer::new();
    let cut = data.first().map_or(0, |b| *b as usize % (data.len() + 1));
    for mut packet in [&data[..cut], &data[cut..]] {
        while !packet.is_empty() {
            let n = framer.feed(packet);
            packet = &packet[n..];
            let mut got = n;
            while let Some(text) = framer.next_text() {
                got += 1;
                if let Ok(text) = text {
                    let _ = json::parse(&text);
                }
            }
            assert!(got > 0, "neither took bytes nor gave a text");
        }
    }
});
