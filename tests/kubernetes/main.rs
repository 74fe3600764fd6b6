//! Everything about Kubernetes, on a real one.

mod cluster;
mod install;
mod store;
