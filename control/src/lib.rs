//! Discovery on Linkerd's destination API: where a service's endpoints are, and who must answer
//! there.
//!
//! In the order in which data flows: the store is followed (`feed`), its objects become immutable
//! snapshots (`index`, pure), which are handed to whoever has subscribed (`board`); a stream
//! (`server`) asks for a `target` and sends what has changed since it last spoke (`wire`,
//! `profile`, both pure). Nothing here holds a key but its own SVID's, and nothing is written to
//! the store. `webhook` is what the API server asks about pods that are created. What becomes of a pod that is created in a mesh is decided by `inject`, and
//! by which rules its connections pass through its sidecar by `redirect`, both pure.

pub mod app;
mod board;
pub mod config;
mod feed;
pub mod index;
pub mod inject;
mod metrics;
mod profile;
pub mod redirect;
mod server;
mod target;
mod webhook;
mod wire;

pub use app::{AppError, run, serve};
pub use board::Board;
pub use feed::follow;
pub use metrics::Metrics;
pub use server::{Destination, DestinationSettings};
