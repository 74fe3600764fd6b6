//! `steadfast-control`.

fn main() {}
