//! A server answers anything during the negotiation.
#![no_main]
use dolmen_nbd::{ClientHandshake, ClientStep, Goal, limits};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let goal = match data.first() {
        Some(0) => Goal::List,
        _ => Goal::Use { export: "disk".into(), structured: true, status: true },
    };
    let mut client = ClientHandshake::new(goal);
    let mut rest = data.get(1..).unwrap_or_default();
    let mut out = Vec::new();
    loop {
        out.clear();
        match client.step(rest, &mut out) {
            ClientStep::Need(n) => {
                assert!(n > rest.len() && n <= limits::MAX_HANDSHAKE_INPUT);
                break;
            }
            ClientStep::Taken(n) => {
                assert!(n > 0);
                rest = &rest[n..];
            }
            _ => break,
        }
    }
});
