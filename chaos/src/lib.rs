//! Simulated months of rotations with faults, and what they cost.
//!
//! A whole mesh in one thread: a seed tells its history, event by event, and after each event every
//! invariant of the rotation protocol that it can have touched is checked.
//!
//! | real | simulated |
//! |---|---|
//! | the controller's shell, machine, ledger, listing, anchors ([`steadfast_rotation::Shell`]) | its process: killed, frozen, doubled; how often it looks |
//! | identity's copy and read lease, signers, members, orders, keeper of issuer keys, promises | its process, disk, token reviews, rate limits |
//! | the renewal engine with its server clock, the rules for bundles ([`steadfast_rotation_protocol::Renewal`], [`steadfast_identity_client::bundle`]) | TLS handshakes: who would accept whom |
//! | anchors and issuers: keys, certificates, chains, CSRs | SVIDs: issuer, anchor and end, by the real rules |
//! | orders of a person, recovery | store, network, clocks, nodes, platform's list, mounted files |

mod controller;
mod faults;
mod invariants;
mod mutant;
mod operator;
mod ops;
mod parts;
mod plan;
mod replica;
mod report;
mod run;
mod workload;
mod world;

pub use invariants::Violation;
pub use mutant::Mutant;
pub use plan::{Hazard, Plan, Wanted};
pub use report::Counts;
pub use run::{Outcome, run};
pub use world::World;
