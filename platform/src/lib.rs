//! Everything that differs between a laptop and Kubernetes, behind one small set of traits.
//!
//! The standalone platform is here in full: `steadfast-store` opens the store's file and serves it
//! to the other processes over a unix socket, watches the manifests, issues tokens and projects
//! them for each workload. On Kubernetes the API server is the store.

pub mod access;
pub mod bundle_file;
pub mod follow;
pub mod keys;
pub mod kubernetes;
pub mod names;
pub mod standalone;
pub mod store;
pub mod token;

pub use store::{Entry, Revision, Store, StoreError};
pub use token::{ReviewedToken, TokenRefusal, TokenReview};
