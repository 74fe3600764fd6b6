//! The machines of identity, as pure functions of values.
//!
//! Time and randomness are arguments, private keys never enter (only a [`steadfast_api::KeyId`]
//! does), and effects are plain data that a shell carries out. Nothing here knows Kubernetes or
//! TLS.

mod server_clock;

pub mod jitter;
pub mod renewal;
pub mod trust_domain;

pub use jitter::Jitter;
pub use renewal::Renewal;
pub use trust_domain::TrustDomainState;
