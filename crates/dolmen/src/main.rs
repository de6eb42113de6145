//! The `dolmen` multi-call binary.
fn main() {}
