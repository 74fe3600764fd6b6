//! Everything about Kubernetes, on a real one.

mod application;
mod availability;
mod bare;
mod cluster;
mod disaster;
mod external;
mod injection;
mod install;
mod long;
mod rotation;
mod scale;
mod store;
mod trust;
mod upgrade;
