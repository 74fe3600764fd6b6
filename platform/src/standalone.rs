//! The standalone platform: what Kubernetes' API server and kubelet are elsewhere.
//!
//! `steadfast-store` alone opens the store's file and serves it over a unix socket; it watches the
//! manifests, makes the EndpointSlices that nobody wrote, issues tokens and keeps them in each
//! pod's directory. The other processes are its clients: [`Client`], [`Tokens`].

mod claims;
pub mod client;
pub mod directory;
mod endpoints;
pub mod engine;
mod issuer;
pub mod manifests;
pub mod metrics;
pub mod process;
pub mod projection;
pub mod server;
pub mod tokens;
mod wire;

pub use client::Client;
pub use directory::Directory;
pub use engine::Engine;
pub use manifests::Manifests;
pub use projection::Projection;
pub use server::Server;
pub use tokens::Tokens;
