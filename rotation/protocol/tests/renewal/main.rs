//! The promises of SVID renewal, held against a small world of clocks, a shell and a CA.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "the world is a test as a whole")]

mod model;
mod scenarios;
mod world;
