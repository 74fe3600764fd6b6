//! The control plane as all streams together see it: is it there, and since when not.
//!
//! Hundreds of streams break when it goes; that is one event, logged once, and once more when it is
//! back. The first stream that hears it again wakes those that wait for their next try.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

/// Shared by all streams; all clones are one.
#[derive(Clone, Debug)]
pub(super) struct Link(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// How often the control plane has come back.
    returns: watch::Sender<u64>,
    connected: Gauge,
    targets: Gauge,
    stale: Gauge,
    failures: Family<CodeLabel, Counter>,
    unusable: Family<ReasonLabel, Counter>,
    full: Counter,
}

#[derive(Debug, Default)]
struct State {
    /// Streams that have spoken and not ended.
    live: usize,
    away: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// How one target stands; counted until dropped.
#[derive(Debug)]
pub(super) struct Standing {
    link: Link,
    live: bool,
    /// Known from a stream that has ended.
    stale: bool,
}

impl Link {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let inner = Inner {
            state: Mutex::default(),
            returns: watch::Sender::new(0),
            connected: Gauge::default(),
            targets: Gauge::default(),
            stale: Gauge::default(),
            failures: Family::default(),
            unusable: Family::default(),
            full: Counter::default(),
        };
        let registry = registry.sub_registry_with_prefix("discovery");
        registry.register(
            "connected",
            "Whether a stream of the control plane is heard",
            inner.connected.clone(),
        );
        registry.register("targets", "Names and addresses that are watched", inner.targets.clone());
        registry.register(
            "stale_targets",
            "Targets whose last known endpoints are in use while their stream is down",
            inner.stale.clone(),
        );
        registry.register("stream_failures", "Streams that failed", inner.failures.clone());
        registry.register(
            "unusable_endpoints",
            "Endpoints left out because what the control plane says of them cannot be understood",
            inner.unusable.clone(),
        );
        registry.register(
            "targets_refused",
            "Targets not watched because every place is taken",
            inner.full.clone(),
        );
        Self(Arc::new(inner))
    }

    /// A target that is watched from now on.
    pub(super) fn target(&self) -> Standing {
        self.0.targets.inc();
        Standing { link: self.clone(), live: false, stale: false }
    }

    /// Follows how often the control plane has come back.
    pub(super) fn returns(&self) -> watch::Receiver<u64> {
        self.0.returns.subscribe()
    }

    pub(super) fn unusable(&self, reason: &'static str) {
        self.0.unusable.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(super) fn full(&self) {
        self.0.full.inc();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standing {
    /// Its stream has spoken.
    pub(super) fn heard(&mut self) {
        if std::mem::replace(&mut self.live, true) {
            return;
        }
        self.set_stale(false);
        let mut state = self.link.lock();
        state.live += 1;
        self.link.0.connected.set(1);
        if std::mem::take(&mut state.away) {
            tracing::info!("the control plane is back");
            self.link.0.returns.send_modify(|returns| *returns += 1);
        }
    }

    /// The control plane has said all that it will ever say of it.
    pub(super) fn settled(&mut self) {
        self.heard();
        self.live = false;
        self.link.lock().live -= 1;
    }

    /// Its stream has failed.
    pub(super) fn failed(&mut self, status: &tonic::Status) {
        let code = format!("{:?}", status.code());
        self.link.0.failures.get_or_create(&CodeLabel { code }).inc();
        if std::mem::take(&mut self.live) {
            self.set_stale(true);
            self.link.lock().live -= 1;
        }
        let mut state = self.link.lock();
        if state.live == 0 && !std::mem::replace(&mut state.away, true) {
            self.link.0.connected.set(0);
            let error = steadfast_process::ErrorChain(status);
            tracing::warn!(%error, "the control plane is away; what was last known stays in force");
        }
    }

    fn set_stale(&mut self, stale: bool) {
        if std::mem::replace(&mut self.stale, stale) != stale {
            if stale {
                self.link.0.stale.inc()
            } else {
                self.link.0.stale.dec()
            };
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.set_stale(false);
        self.link.0.targets.dec();
        if self.live {
            self.link.lock().live -= 1;
        }
    }
}
