//! What travels between the processes of Steadfast, as values.
//!
//! SPIFFE IDs and trust domains, X.509-SVIDs and their rules, trust bundles, error codes and the
//! messages of `steadfast.trust.v1`. Nothing here does I/O, reads a clock or draws a random
//! number; bytes from a peer are parsed once, strictly, and a value that exists is valid.

pub mod bundle;
pub mod code;
pub mod id;
pub mod spiffe;
pub mod svid;
pub mod time;

/// The messages of the trust service; its stubs are in `steadfast-api-grpc`.
pub mod trust {
    /// `steadfast.trust.v1`.
    #[allow(
        missing_docs,
        clippy::large_enum_variant,
        clippy::use_self,
        clippy::or_fun_call,
        unused_qualifications,
        unreachable_pub
    )]
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/steadfast.trust.v1.rs"));
    }
}

pub use bundle::{TrustAnchor, TrustBundle};
pub use code::Code;
pub use id::KeyId;
pub use spiffe::{DnsIdentity, SpiffeId, TrustDomain};
pub use svid::Svid;
pub use time::UnixTime;
