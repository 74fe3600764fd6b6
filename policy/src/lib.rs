//! The policy model, and `authorize()`: who may speak to a port, decided from plain values.
//!
//! A [`Policy`] is a list of authorizations, the form into which every kind of policy resource is
//! brought; today Linkerd's default policies are. Nothing here does I/O, and a [`Permit`] has no
//! other source than [`authorize()`].

mod authorize;
mod default;
mod network;

pub use authorize::{
    Clients, Denied, DeniedReason, Facts, LoopbackClients, Name, Permit, Policy, authorize,
};
pub use default::{DefaultPolicy, UnknownPolicy};
pub use network::{Network, NetworkError, Networks};
