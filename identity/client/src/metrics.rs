//! The series of this crate: Linkerd's names where Linkerd has them, ours for the rest.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use steadfast_process::Clock;

use crate::refusal::{Direction, Refusal};

/// Logs and counts refused connections: each is counted, and one line in a while is logged for
/// each direction and reason, so that a flood of one kind hides no other. All clones are one.
#[derive(Clone)]
pub struct Refusals(Arc<Inner>);

struct Inner {
    counts: Family<RefusalLabels, Counter>,
    clock: Arc<dyn Clock>,
    lines: Mutex<HashMap<(Direction, &'static str), Line>>,
}

/// The allowance of one kind of line.
struct Line {
    since_boot: Duration,
    left: u32,
    kept_back: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    direction: &'static str,
    reason: &'static str,
}

impl Refusals {
    /// Counts in `steadfast_handshake_refusals_total{direction,reason}` of this registry.
    pub fn new(registry: &mut Registry, clock: Arc<dyn Clock>) -> Self {
        let counts = Family::default();
        registry.register(
            "steadfast_handshake_refusals",
            "Connections refused, by us or by the peer",
            counts.clone(),
        );
        Self(Arc::new(Inner { counts, clock, lines: Mutex::default() }))
    }

    /// One refusal: one count, and at most one line. `address` is the peer's.
    pub fn report(&self, address: Option<SocketAddr>, refusal: &Refusal) {
        let labels =
            RefusalLabels { direction: refusal.direction().label(), reason: refusal.label() };
        self.0.counts.get_or_create(&labels).inc();
        let Some(kept_back) = self.allow(refusal) else { return };
        let address = address.map_or_else(|| "unknown".to_owned(), |address| address.to_string());
        tracing::warn!(code = %refusal.code, peer_address = %address, kept_back, "{refusal}");
    }

    /// Whether the line may be logged now, and how many of its kind were kept back before it.
    fn allow(&self, refusal: &Refusal) -> Option<u64> {
        let now = self.0.clock.since_boot();
        let mut lines = self.0.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let line = lines.entry((refusal.direction(), refusal.label())).or_insert_with(|| Line {
            since_boot: now,
            left: LINES_PER_WINDOW,
            kept_back: 0,
        });
        if now.saturating_sub(line.since_boot) >= LINES_WINDOW {
            (line.since_boot, line.left) = (now, LINES_PER_WINDOW);
        }
        if line.left == 0 {
            line.kept_back += 1;
            return None;
        }
        line.left -= 1;
        Some(std::mem::take(&mut line.kept_back))
    }
}

/// The series about our own SVID and bundle.
#[derive(Default)]
pub(crate) struct Metrics {
    expiration: Gauge<f64, AtomicU64>,
    refresh: Gauge<f64, AtomicU64>,
    refreshes: Family<ResultLabels, Counter>,
    not_before: Gauge<f64, AtomicU64>,
    not_after: Gauge<f64, AtomicU64>,
    renew_at: Gauge<f64, AtomicU64>,
    attempts: Family<AttemptLabels, Counter>,
    bundle_seq: Gauge,
    clock_offset: Gauge<f64, AtomicU64>,
    bundles_refused: Family<ReasonLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttemptLabels {
    result: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        // Both results are there from the start: an alert on a rate needs the zero.
        for result in ["ok", "error"] {
            let _ = metrics.refreshes.get_or_create(&ResultLabels { result });
        }
        metrics.register_as_linkerd(registry);
        metrics.register_ours(registry);
        metrics
    }

    fn register_as_linkerd(&self, registry: &mut Registry) {
        registry.register(
            "control_identity_cert_expiration_timestamp_seconds",
            "When the SVID in use ends, in seconds since the epoch",
            self.expiration.clone(),
        );
        registry.register(
            "control_identity_cert_refresh_timestamp_seconds",
            "When the SVID in use was installed, in seconds since the epoch",
            self.refresh.clone(),
        );
        registry.register(
            "control_identity_cert_refreshes",
            "Requests for an SVID by result; failed and hung ones are counted",
            self.refreshes.clone(),
        );
    }

    fn register_ours(&self, registry: &mut Registry) {
        registry.register(
            "steadfast_svid_not_before_timestamp_seconds",
            "When the SVID in use begins",
            self.not_before.clone(),
        );
        registry.register(
            "steadfast_svid_not_after_timestamp_seconds",
            "When the SVID in use ends",
            self.not_after.clone(),
        );
        registry.register(
            "steadfast_svid_renew_at_timestamp_seconds",
            "When the next SVID is asked for",
            self.renew_at.clone(),
        );
        registry.register(
            "steadfast_svid_renewal_attempts",
            "Requests for an SVID by result and reason",
            self.attempts.clone(),
        );
        registry.register(
            "steadfast_bundle_seq",
            "The sequence number of the live bundle",
            self.bundle_seq.clone(),
        );
        registry.register(
            "steadfast_bundles_refused",
            "Bundles that were sent to us and not used",
            self.bundles_refused.clone(),
        );
        registry.register(
            "steadfast_clock_offset_seconds",
            "Our clock less the identity service's",
            self.clock_offset.clone(),
        );
    }

    pub(crate) fn renewed(&self, svid: &crate::OwnSvid, now: steadfast_api::UnixTime) {
        let seconds = |time: steadfast_api::UnixTime| time.as_millis() as f64 / 1000.0;
        self.refreshes.get_or_create(&ResultLabels { result: "ok" }).inc();
        self.attempts.get_or_create(&AttemptLabels { result: "ok", reason: "" }).inc();
        self.expiration.set(seconds(svid.facts().not_after));
        self.not_after.set(seconds(svid.facts().not_after));
        self.not_before.set(seconds(svid.facts().not_before));
        self.refresh.set(seconds(now));
    }

    pub(crate) fn renewal_failed(&self, reason: &'static str) {
        self.refreshes.get_or_create(&ResultLabels { result: "error" }).inc();
        self.attempts.get_or_create(&AttemptLabels { result: "error", reason }).inc();
    }

    pub(crate) fn renews_at(&self, at: steadfast_api::UnixTime) {
        self.renew_at.set(at.as_millis() as f64 / 1000.0);
    }

    pub(crate) fn bundle(&self, seq: u64) {
        self.bundle_seq.set(i64::try_from(seq).unwrap_or(i64::MAX));
    }

    pub(crate) fn bundle_refused(&self, reason: &'static str) {
        self.bundles_refused.get_or_create(&ReasonLabels { reason }).inc();
    }

    pub(crate) fn clock_offset_ms(&self, offset: i64) {
        self.clock_offset.set(offset as f64 / 1000.0);
    }
}

const LINES_PER_WINDOW: u32 = 5;
const LINES_WINDOW: Duration = Duration::from_secs(5);
