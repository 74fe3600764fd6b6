//! What control counts.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use steadfast_api::UnixTime;

use crate::index::Kind;

/// The metrics; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    resources: Family<KindLabel, Gauge>,
    unreadable: Counter,
    notes: Counter,
    store_connected: Gauge,
    store_lost: Gauge<f64, AtomicU64>,
    streams: Family<MethodLabel, Gauge>,
    messages: Family<MethodLabel, Counter>,
    refused: Family<RefusedLabels, Counter>,
    injections: Family<OutcomeLabel, Counter>,
    not_after: Family<CertificateLabel, Gauge<f64, AtomicU64>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabel {
    method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    method: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CertificateLabel {
    kind: &'static str,
}

/// Counts one open stream until dropped.
#[derive(Debug)]
pub(crate) struct OpenStream {
    open: Gauge,
    messages: Counter,
}

impl Metrics {
    /// Registers what is about discovery under `discovery_`.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let inner = &metrics.0;
        registry.register(
            "injector_reviews",
            "What the API server asked about pods and templates, by what was done",
            inner.injections.clone(),
        );
        registry.register_with_unit(
            "steadfast_cert_not_after_timestamp",
            "When the certificates end that this process serves, but for its SVID",
            Unit::Seconds,
            inner.not_after.clone(),
        );
        let registry = registry.sub_registry_with_prefix("discovery");
        registry.register(
            "resources",
            "Objects of each kind that discovery follows",
            inner.resources.clone(),
        );
        registry.register(
            "resources_unreadable",
            "Objects that did not parse, whose last good form stayed in force",
            inner.unreadable.clone(),
        );
        registry.register(
            "resource_notes",
            "Values in objects that cannot be used or are taken for others; each is logged",
            inner.notes.clone(),
        );
        registry.register(
            "store_connected",
            "Whether the store is heard; if not, what was last known is served",
            inner.store_connected.clone(),
        );
        registry.register_with_unit(
            "store_lost_timestamp",
            "Since when the store is not heard: everything served is as old as that; 0 while it is",
            Unit::Seconds,
            inner.store_lost.clone(),
        );
        registry.register("streams", "Open streams", inner.streams.clone());
        registry.register("stream_messages", "Messages sent", inner.messages.clone());
        registry.register("lookups_refused", "Lookups refused", inner.refused.clone());
        metrics
    }

    pub(crate) fn set_resources(&self, kind: Kind, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.0.resources.get_or_create(&KindLabel { kind: kind.as_str() }).set(count);
    }

    pub(crate) fn unreadable(&self) {
        self.0.unreadable.inc();
    }

    pub(crate) fn note(&self) {
        self.0.notes.inc();
    }

    pub(crate) fn store_heard(&self) {
        self.0.store_connected.set(1);
        self.0.store_lost.set(0.0);
    }

    pub(crate) fn store_silent(&self, now: UnixTime) {
        // Only the first of several failures says since when.
        if self.0.store_connected.set(0) == 1 || self.0.store_lost.get() == 0.0 {
            self.0.store_lost.set(now.as_millis() as f64 / 1000.0);
        }
    }

    pub(crate) fn open(&self, method: &'static str) -> OpenStream {
        let label = MethodLabel { method };
        let open = self.0.streams.get_or_create(&label).clone();
        let messages = self.0.messages.get_or_create(&label).clone();
        open.inc();
        OpenStream { open, messages }
    }

    pub(crate) fn injection(&self, outcome: &'static str) {
        self.0.injections.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    pub(crate) fn webhook_not_after(&self, not_after: UnixTime) {
        let seconds = not_after.as_millis() as f64 / 1000.0;
        self.0.not_after.get_or_create(&CertificateLabel { kind: "webhook" }).set(seconds);
    }

    pub(crate) fn refused(&self, method: &'static str, reason: &'static str) {
        self.0.refused.get_or_create(&RefusedLabels { method, reason }).inc();
    }
}

impl OpenStream {
    pub(crate) fn sent(&self) {
        self.messages.inc();
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.open.dec();
    }
}
