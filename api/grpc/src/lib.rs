//! The gRPC stubs of `steadfast.trust.v1`: client and server.
//!
//! They live apart from the messages (`steadfast_api::trust::v1`) because tonic brings tokio,
//! and the pure crates must be able to name a message without it.

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
