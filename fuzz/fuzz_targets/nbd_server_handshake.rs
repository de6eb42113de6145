//! A client sends anything during the negotiation: the server never panics, always makes
//! progress, and asks for no more than its limits.
#![no_main]
use dolmen_nbd::{Catalog, ExportInfo, ServerHandshake, ServerStep, TransmissionFlags, limits};
use libfuzzer_sys::fuzz_target;

struct One;

impl Catalog for One {
    fn list(&self, each: &mut dyn FnMut(&str, &str)) {
        each("disk", "a disk");
    }
    fn find(&self, name: &str) -> Option<ExportInfo> {
        (name == "disk").then(|| ExportInfo {
            name: name.into(),
            description: String::new(),
            size: 1 << 30,
            flags: TransmissionFlags::default(),
            min_block: 1,
            preferred_block: 4096,
            max_block: 32 << 20,
        })
    }
    fn shutting_down(&self) -> bool {
        false
    }
}

fuzz_target!(|data: &[u8]| {
    let mut server = ServerHandshake::new();
    let mut rest = data;
    let mut out = Vec::new();
    loop {
        out.clear();
        match server.step(rest, &One, &mut out) {
            ServerStep::Need(n) => {
                assert!(n > rest.len() && n <= limits::MAX_HANDSHAKE_INPUT);
                break;
            }
            ServerStep::Taken(n) => {
                assert!(n > 0);
                rest = &rest[n..];
            }
            ServerStep::Ready { .. } | ServerStep::Close(_) => break,
        }
    }
});
