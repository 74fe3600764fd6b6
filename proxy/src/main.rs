//! `steadfast-proxy`.

fn main() {}
