//! The machines of identity, as pure functions of values.
//!
//! Time and randomness are arguments, private keys never enter (only a [`steadfast_api::KeyId`]
//! does), and effects are plain data that a shell carries out. Nothing here knows Kubernetes or
//! TLS. In the order in which a rotation reads: the stored state, what a person orders, who is
//! asked and what they say, what must hold, the phases, and the controller that moves them on.

mod server_clock;

pub mod instance;
pub mod jitter;
pub mod renewal;

pub mod trust_domain;

pub mod census;
pub mod controller;
mod emergency;
pub mod guard;
pub mod issuer;
pub mod journal;
pub mod orders;
pub mod recover;
pub mod rotation;
pub mod schedule;

pub use controller::Controller;
pub use instance::Instance;
pub use jitter::Jitter;
pub use renewal::Renewal;
pub use trust_domain::TrustDomainState;
