//! Everything about Kubernetes, on a real one.

mod cluster;
mod store;
