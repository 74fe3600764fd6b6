//! What the HTTP seam promises, seen from outside: raw bytes against our servers and clients,
//! hyper as the peer of both, and a pair of sidecars in a row.

// Helpers of tests are tests, though clippy cannot see it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod http1_client;
mod http1_server;
mod http2;
mod interop;
mod pair;
mod support;
