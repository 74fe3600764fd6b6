//! HTTP/2, both ends of a connection, on the crate h2.
//!
//! What is ours is around it: bodies whose windows open as their data is taken, windows under the
//! process's budget, PINGs that find out when a sidecar is gone, and resets that travel through the
//! proxy in both directions. Many exchanges share a connection; on the server's side they are part
//! of its future, and end with it.

mod client;
mod connection;
mod server;
mod stream;

pub use client::{Client, ConnectError, Driver, connect};
pub use connection::{CONNECTION_WINDOW_BYTES, KEEPALIVE_TIMEOUT, STREAM_WINDOW_BYTES};
pub use server::serve;
