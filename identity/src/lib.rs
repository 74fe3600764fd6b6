//! The CA and the identity service.
//!
//! An issuer signs SVIDs for workloads that prove who they are by a bound token; this crate makes
//! the issuer, checks and signs the requests, writes each SVID into the issuance log, and serves
//! all of it. The process never reads an anchor's key: only the making of anchors and issuers,
//! which `steadfast trust init` calls, ever sees one.

pub mod authority;
pub mod key;
