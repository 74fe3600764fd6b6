//! `steadfast-store`.

fn main() {}
