//! How `steadfast.trust.v1` is spoken: the gRPC stubs of client and server, and the trust stream.
//!
//! This lives apart from the messages (`steadfast_api::trust::v1`) because it brings tokio, and the
//! pure crates must be able to name a message without it.

pub mod stream;

#[allow(
    missing_docs,
    clippy::use_self,
    clippy::or_fun_call,
    unused_qualifications,
    unreachable_pub
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/steadfast.trust.v1.rs"));
}

pub use generated::{fleet_client, fleet_server, trust_client, trust_server};
