//! What `steadfast-store` counts.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::store::{Revision, StoreError};

/// The metrics of the store. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) revision: Gauge,
    writes: Family<ResultLabels, Counter>,
    write_seconds: Histogram,
    pub(super) connections: Gauge,
    pub(super) connections_refused: Counter,
    pub(super) watches: Gauge,
    pub(super) manifest_errors: Family<FileLabels, Gauge>,
    pub(super) resources: Gauge,
    pub(super) token_renewals: Family<ResultLabels, Counter>,
    pub(super) projection_failures: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ResultLabels {
    pub(super) result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct FileLabels {
    pub(super) file: String,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            revision: Gauge::default(),
            writes: Family::default(),
            // From 100 µs to 3.3 s: a sync of a good disk to one that is about to fail.
            write_seconds: Histogram::new(exponential_buckets(0.0001, 2.0, 16)),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            watches: Gauge::default(),
            manifest_errors: Family::default(),
            resources: Gauge::default(),
            token_renewals: Family::default(),
            projection_failures: Gauge::default(),
        }
    }
}

impl Metrics {
    pub(super) fn wrote(&self, reply: &Result<Vec<Revision>, StoreError>, taken: Duration) {
        let result = match reply {
            Ok(_) => "ok",
            Err(StoreError::Conflict { .. }) => "conflict",
            Err(_) => "failed",
        };
        self.writes.get_or_create(&ResultLabels { result }).inc();
        self.write_seconds.observe(taken.as_secs_f64());
    }

    /// Adds them to what the admin port shows.
    pub fn register(&self, registry: &mut Registry) {
        let store = registry.sub_registry_with_prefix("steadfast_store");
        store.register("revision", "Newest revision of the store", self.revision.clone());
        store.register("writes", "Writes by result", self.writes.clone());
        store.register(
            "write_seconds",
            "Time from a write's turn to its acknowledgement",
            self.write_seconds.clone(),
        );
        store.register("connections", "Open client connections", self.connections.clone());
        store.register(
            "connections_refused",
            "Connections refused for their peer credentials or their number",
            self.connections_refused.clone(),
        );
        store.register("watches", "Open watches", self.watches.clone());
        store.register("resources", "Resources in force", self.resources.clone());
        let steadfast = registry.sub_registry_with_prefix("steadfast");
        steadfast.register(
            "manifest_errors",
            "1 for each manifest file whose last good version stays in force",
            self.manifest_errors.clone(),
        );
        steadfast.register(
            "token_renewals",
            "Tokens written for pods, by result",
            self.token_renewals.clone(),
        );
        steadfast.register(
            "projection_failures",
            "Pods whose token or bundle could not be brought up to date",
            self.projection_failures.clone(),
        );
    }
}
