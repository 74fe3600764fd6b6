//! The sidecar: it gives a workload mutual TLS and a name, and is noticed by nobody else.
//!
//! Modules in the order in which they run: what the process is told, what it knows, and then the
//! life of a connection. Only [`inbound`] and [`outbound`] put stages into sequence; a stage takes
//! values and returns a richer one, and calls no other stage.

pub mod app;
pub mod awaiting;
pub mod config;
pub mod target;
pub mod tasks;
pub mod worker;

pub mod balance;
pub mod discovery;
pub mod identity;

pub mod inbound;
pub mod outbound;

pub mod accept;
pub mod answer;
pub mod connect;
pub mod detect;
pub mod forward;
pub mod io;
pub mod lifetime;
pub mod policy;
pub mod refusal;
pub mod standing;
pub mod transport;

pub mod http;

pub mod admin;
pub mod metrics;

#[cfg(test)]
mod fakes;
