//! Everything about Kubernetes, on a real one.

mod application;
mod cluster;
mod injection;
mod install;
mod rotation;
mod store;
