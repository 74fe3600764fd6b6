//! Real processes, real sockets, real namespaces: what the tests that cross crates stand on.
//!
//! A [`Mesh`] is a standalone mesh in a directory of its own, with store, identity and control as
//! separate processes; a [`Pod`] is a workload in it with a sidecar process. Everything ends when
//! it is dropped, also when a test panics, and is killed by the kernel when the test is killed.
//! Nothing here sleeps for luck: [`until`] waits for a state, with a deadline.

pub mod app;
pub mod cluster;
pub mod load;
pub mod mesh;
pub mod metrics;
pub mod namespaces;
pub mod netns;
pub mod peer;
pub mod process;
pub mod redirected;
pub mod subscribers;
pub mod swarm;
pub mod wait;

/// The gRPC service of the tests.
#[allow(
    missing_docs,
    clippy::use_self,
    clippy::or_fun_call,
    unused_qualifications,
    unreachable_pub
)]
pub mod echo {
    include!(concat!(env!("OUT_DIR"), "/steadfast.test.echo.v1.rs"));
}

pub use load::{Load, Report};
pub use mesh::{Mesh, MeshConfig, Pod, PodSpec};
pub use process::{Process, free_port};
pub use wait::until;
