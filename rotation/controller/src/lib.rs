//! The controller of rotations: the shell around the pure machine of `rotation/protocol`.
//!
//! It looks (at the store, the platform's list of workloads, the replicas of identity, its keys),
//! lets the machine decide, and does what that says, the write first. It keeps nothing that a
//! restart may not lose. Modules stand in the order in which a look goes.

pub mod app;
pub mod conditions;
pub mod config;

pub mod endings;
pub mod fleet;
pub mod founding;
pub mod leader;
pub mod ledger;
pub mod listing;
pub mod shell;

pub mod event_log;
pub mod events;
pub mod evidence;
pub mod metrics;
pub mod mirror;
pub mod proposals;

pub mod anchors;
pub mod external;
pub mod token;

pub use anchors::Anchors;
pub use app::run;
pub use shell::{Fleet, Shell};
