//! Requests and replies of the transmission phase, from a hostile peer.
#![no_main]
use dolmen_nbd::request::RequestStep;
use dolmen_nbd::{ReplyHead, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let RequestStep::Got(request, _) = Request::decode(data) {
        let again = request.encode();
        assert!(matches!(Request::decode(&again), RequestStep::Got(r, _) if r == request));
    }
    let _ = ReplyHead::decode(data);
});
