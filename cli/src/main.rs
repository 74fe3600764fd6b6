//! `steadfast`.

fn main() {}
