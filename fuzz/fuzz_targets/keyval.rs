//! Command-line notation of options.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = dolmen_qmp::keyval::parse_value(text, Some("driver"));
    let _ = dolmen_qmp::keyval::parse_flat(text, None);
});
