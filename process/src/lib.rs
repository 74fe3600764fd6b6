//! What every process of ours has around its work, in the order in which a `main` meets it.
//!
//! The log, the limits of the process, the clock, the owner of its tasks, its way to stop, its
//! readiness and its admin port. Nothing here knows of certificates, stores or traffic.

pub mod admin;
pub mod clock;
pub mod drain;
pub mod duration;
pub mod error;
pub mod flags;
pub mod limits;
pub mod log;
pub mod readiness;
pub mod tasks;

pub use clock::{Clock, SystemClock};
pub use drain::Drain;
pub use error::ErrorChain;
pub use readiness::Readiness;
pub use tasks::Tasks;

/// The name of this machine; in a pod, the pod's.
pub fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}
