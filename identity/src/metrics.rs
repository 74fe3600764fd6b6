//! What is counted. Ends are absolute times, so that an alert needs no arithmetic on our side.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use steadfast_api::UnixTime;

use crate::replica::View;

/// The metrics of the process. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Metrics {
    /// Requests for an SVID by outcome.
    pub certify: Family<CertifyLabels, Counter>,
    /// From the request to the reply.
    pub certify_seconds: Histogram,
    /// 1 while the view of the trust domain is confirmed.
    pub lease_held: Gauge,
    /// 1 while nothing is issued until a person has looked.
    pub halted: Gauge,
    /// When it was last confirmed, in seconds since the epoch.
    pub lease_confirmed: Gauge,
    /// Of the view.
    pub bundle_seq: Gauge,
    /// Of the issuer that signs.
    pub issuer_not_after: Gauge,
    /// Of our own SVID.
    pub own_svid_not_before: Gauge,
    /// Of our own SVID.
    pub own_svid_not_after: Gauge,
    /// Our own SVIDs that could not be issued.
    pub own_svid_failures: Counter,
    /// Open trust streams.
    pub streams: Gauge,
    /// Trust streams that were refused or closed for a reason.
    pub stream_refusals: Family<RefusalLabels, Counter>,
    /// Calls about the fleet that were refused.
    pub fleet_refusals: Family<RefusalLabels, Counter>,
    /// Open connections.
    pub connections: Gauge,
    /// Connections that ended before a request.
    pub connection_failures: Family<RefusalLabels, Counter>,
    /// 1 while the issuance log can be written.
    pub log_writable: Gauge,
}

/// Of a request for an SVID.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct CertifyLabels {
    /// `linkerd` or `steadfast`.
    pub api: &'static str,
    /// `new`, `renewal`, or `unknown` when it was refused before that was known.
    pub kind: &'static str,
    /// `issued`, or the label of the refusal's code.
    pub reason: &'static str,
    /// `issued` or `refused`.
    pub result: &'static str,
}

/// Of anything else that was refused.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RefusalLabels {
    /// The label of the refusal's code, or what broke.
    pub reason: &'static str,
}

impl Metrics {
    /// Makes all of them known to a registry.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            certify: Family::default(),
            certify_seconds: Histogram::new(SECONDS_BUCKETS),
            lease_held: Gauge::default(),
            halted: Gauge::default(),
            lease_confirmed: Gauge::default(),
            bundle_seq: Gauge::default(),
            issuer_not_after: Gauge::default(),
            own_svid_not_before: Gauge::default(),
            own_svid_not_after: Gauge::default(),
            own_svid_failures: Counter::default(),
            streams: Gauge::default(),
            stream_refusals: Family::default(),
            fleet_refusals: Family::default(),
            connections: Gauge::default(),
            connection_failures: Family::default(),
            log_writable: Gauge::default(),
        };
        let m = &metrics;
        let registry = registry.sub_registry_with_prefix(PREFIX);
        registry.register("certify", "Requests for an SVID", m.certify.clone());
        let help = "Time from request to reply, in seconds";
        registry.register("certify_duration_seconds", help, m.certify_seconds.clone());
        let help = "1 while the view of the trust domain is confirmed by the store";
        registry.register("lease_held", help, m.lease_held.clone());
        let help = "1 while nothing is issued until a person has looked: `steadfast trust recover`";
        registry.register("halted", help, m.halted.clone());
        let help = "When the view was last confirmed, in seconds since the epoch";
        registry.register("lease_confirmed_timestamp_seconds", help, m.lease_confirmed.clone());
        registry.register("bundle_seq", "Sequence number of the bundle", m.bundle_seq.clone());
        let help = "End of the issuer that signs, in seconds since the epoch";
        registry.register("issuer_not_after_timestamp_seconds", help, m.issuer_not_after.clone());
        let help = "Begin of the service's own SVID, in seconds since the epoch";
        let own = m.own_svid_not_before.clone();
        registry.register("own_svid_not_before_timestamp_seconds", help, own);
        let help = "End of the service's own SVID, in seconds since the epoch";
        let own = m.own_svid_not_after.clone();
        registry.register("own_svid_not_after_timestamp_seconds", help, own);
        let help = "Own SVIDs that could not be issued";
        registry.register("own_svid_failures", help, m.own_svid_failures.clone());
        registry.register("streams", "Open trust streams", m.streams.clone());
        let help = "Trust streams that were refused or closed for a reason";
        registry.register("stream_refusals", help, m.stream_refusals.clone());
        let help = "Calls of the rotation controller's API that were refused";
        registry.register("fleet_refusals", help, m.fleet_refusals.clone());
        registry.register("connections", "Open connections", m.connections.clone());
        let help = "Connections that ended before their first request";
        registry.register("connection_failures", help, m.connection_failures.clone());
        let help = "1 while the issuance log can be written";
        registry.register("log_writable", help, m.log_writable.clone());
        metrics
    }

    /// Metrics that nobody reads.
    pub fn unread() -> Self {
        Self::register(&mut Registry::default())
    }

    /// The view was confirmed just now.
    pub(crate) fn view(&self, view: &Arc<View>, now: UnixTime) {
        self.lease_held.set(1);
        self.halted.set(i64::from(view.state.halted.is_some()));
        self.lease_confirmed.set(seconds(now));
        self.bundle_seq.set(i64::try_from(view.state.seq).unwrap_or(i64::MAX));
        let ends = view.own_signer().map_or(0, |signer| seconds(signer.not_after()));
        self.issuer_not_after.set(ends);
    }

    pub(crate) fn own_svid(&self, not_before: UnixTime, not_after: UnixTime) {
        self.own_svid_not_before.set(seconds(not_before));
        self.own_svid_not_after.set(seconds(not_after));
    }
}

fn seconds(time: UnixTime) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

const PREFIX: &str = "steadfast_identity";
const SECONDS_BUCKETS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
