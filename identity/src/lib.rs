//! The CA and the identity service.
//!
//! An issuer signs SVIDs for workloads that prove who they are by a bound token; this crate makes
//! the issuer, checks and signs the requests, writes each SVID into the issuance log, and serves
//! all of it. The process never reads an anchor's key: only the making of anchors and issuers,
//! which `steadfast trust init` calls, ever sees one. Modules stand in the order in which a
//! request meets them.

pub mod admin;
pub mod app;
pub mod config;
pub mod confine;
pub mod server;

pub mod front;
pub mod service;

pub mod fleet;
pub mod member;
pub mod members;
pub mod orders;
pub mod streams;

pub mod certify;
pub mod csr;
pub mod holders;
pub mod issuance_log;
pub mod issue;
pub mod limits;
pub mod pod_certificates;
pub mod promise;
pub mod replica;
pub mod review;
pub mod signer;
pub mod signers;

pub mod authority;
pub mod import;
pub mod issuer_keys;
pub mod issuer_source;
pub mod key;
pub mod own;

pub mod metrics;
pub mod refusal;
