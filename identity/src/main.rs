//! `steadfast-identity`.

fn main() {}
