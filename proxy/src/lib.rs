//! The sidecar

pub mod discovery;
pub mod balance;
