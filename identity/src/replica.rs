//! This replica's copy of the trust domain, and the lease under which it may act on it.
//!
//! The copy comes from reads of the store. A read that was answered confirms it for [`LEASE`], or
//! for as long as the state itself says if that is less, counted on the boot clock from the moment
//! the read was *sent*; a watch event is no read, it only makes the next one come at once. Past the lease nothing is issued and no bundle is served:
//! a rotation counts on that when it waits out a fence. Nor is anything while our wall clock and
//! the store's are too far apart, or while the store shows an older state than it has shown before.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use prost::Message as _;
use steadfast_api::trust::v1;
use steadfast_api::trust::v1::stream_response::Message;
use steadfast_api::{Code, KeyId, TrustBundle, UnixTime};
use steadfast_platform::keys::KeyStore;
use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_platform::{Entry, Revision, Store, StoreError};
use steadfast_process::Clock;
use steadfast_process::readiness::Component;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{Halt, READ_LEASE};
use tokio::sync::{Notify, watch};

use crate::authority::SKEW;
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::signer::{Signer, SignerError};
use crate::signers::Signers;

/// The trust domain as it was at one revision, ready to be served.
#[derive(Clone, Debug)]
pub struct View {
    /// As stored.
    pub state: TrustDomainState,
    /// The write that made it so.
    pub revision: Revision,
    /// What is published.
    pub bundle: TrustBundle,
    /// What an ack must name.
    pub digest: [u8; 32],
    /// The bundle as the trust stream sends it.
    pub message: v1::Bundle,
    /// The same, encoded once for all streams: a field of their `StreamResponse`.
    pub encoded: Bytes,
    /// The bundle as a SPIFFE bundle endpoint serves it.
    pub jwks: String,
    /// The issuers that are loaded.
    signers: Signers,
}

/// The copy and its lease.
pub struct Replica {
    views: watch::Sender<Option<Arc<View>>>,
    lease: Lease,
    /// Why the last read confirmed nothing.
    trouble: Mutex<Refusal>,
    /// Whether the last read has warned of the clock.
    drifting: AtomicBool,
    /// Whether the last read that was answered has found no trust domain.
    unfounded: AtomicBool,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
}

/// What the replica works with: where the state is, where the keys are, how far our clock is off.
pub struct Sources {
    /// The store.
    pub store: Arc<dyn Store>,
    /// The keys of issuers.
    pub keys: Arc<dyn KeyStore>,
    /// Our wall clock less the store's, in milliseconds, where the store says its time.
    pub clock_offset_ms: Box<dyn Fn() -> Option<i64> + Send + Sync>,
}

/// Until when the copy may be acted on: the sending of the last answered read plus [`LEASE`].
#[derive(Debug, Default)]
pub struct Lease {
    /// Milliseconds on the boot clock; 0: never confirmed.
    ends_ms: AtomicU64,
}

impl Lease {
    /// A read that was sent at this time has been answered; what it showed may be acted on for so
    /// long.
    pub fn confirm(&self, sent: Duration, lease: Duration) {
        let ends = sent.saturating_add(lease);
        self.ends_ms.fetch_max(u64::try_from(ends.as_millis()).unwrap_or(0), Ordering::AcqRel);
    }

    /// Whether it holds at this time of the boot clock.
    pub fn holds(&self, now: Duration) -> bool {
        now.as_millis() < u128::from(self.ends_ms.load(Ordering::Acquire))
    }
}

impl View {
    /// What signs for whoever no canary is chosen from, this service itself among them: the active
    /// issuer, or what stands in for it.
    ///
    /// # Errors
    /// Why the active issuer cannot, when no other may stand in for it.
    pub fn signer(&self) -> Result<&Arc<Signer>, Refusal> {
        self.check_halt()?;
        Ok(self.signers.active(&self.state)?)
    }

    /// What signs for a workload: the canary's issuer, for one that is, else the active one.
    ///
    /// # Errors
    /// Why that issuer cannot, when no other may stand in for it.
    pub fn signer_for(&self, namespace: &str, pod_uid: &str) -> Result<&Arc<Signer>, Refusal> {
        self.check_halt()?;
        Ok(self.signers.of(&self.state, self.state.issuer_for(namespace, pod_uid))?)
    }

    /// How long an SVID of this signer may live that should live for `wanted`: no longer than what
    /// the state promises of its anchor, since a rotation that waits for SVIDs to end counts on it.
    pub fn svid_life(&self, signer: &Signer, wanted: Duration) -> Duration {
        let promised = self.state.anchor(signer.anchor_id()).map(|anchor| anchor.svid_life_max);
        promised.unwrap_or_default().min(wanted)
    }

    /// The longest life of an SVID under any anchor: what is older has ended.
    pub fn longest_life(&self) -> Duration {
        let lives = self.state.anchors.iter().map(|anchor| anchor.svid_life_max);
        lives.max().unwrap_or_default()
    }

    /// Whether anything may be issued at all.
    fn check_halt(&self) -> Result<(), Refusal> {
        match self.state.halted {
            Some(Halt::Restored { seen_seq }) => {
                let what = format!(
                    "seq {seen_seq} has been published and seen, and the stored trust domain (seq \
                     {}) does not know it: the store was put back",
                    self.state.seq
                );
                Err(Refusal::new(Code::HALTED, what))
            }
            None => Ok(()),
        }
    }

    /// As [`View::signer`], for this service's own SVID: halted or not, bundles are served, and
    /// what workloads hold is asked.
    ///
    /// # Errors
    /// As [`View::signer`], but for the halt.
    pub fn own_signer(&self) -> Result<&Arc<Signer>, Refusal> {
        Ok(self.signers.active(&self.state)?)
    }

    /// How long a read of this state may be acted on.
    fn lease(&self) -> Duration {
        self.state.read_lease.min(LEASE)
    }

    /// Why nothing is issued, or soon cannot be.
    fn trouble(&self, now: UnixTime) -> Option<Refusal> {
        let trouble = self.check_halt().err();
        trouble.or_else(|| signer_trouble(self, now).map(Refusal::from))
    }

    /// The issuers that can sign.
    pub fn loaded(&self, now: UnixTime) -> impl Iterator<Item = KeyId> {
        let usable = self.signers.loaded().filter(move |signer| signer.not_after() > now);
        usable.map(|signer| signer.id())
    }
}

impl Replica {
    /// A replica that knows nothing yet.
    pub fn new(clock: Arc<dyn Clock>, metrics: Metrics) -> Arc<Self> {
        let trouble = Refusal::new(Code::LEASE_EXPIRED, "the store has not been read yet");
        Arc::new(Self {
            views: watch::Sender::new(None),
            lease: Lease::default(),
            trouble: Mutex::new(trouble),
            drifting: AtomicBool::new(false),
            unfounded: AtomicBool::new(false),
            clock,
            metrics,
        })
    }

    /// The view, while it may be acted on.
    ///
    /// # Errors
    /// [`Code::LEASE_EXPIRED`], or what stands in the way of a lease.
    pub fn current(&self) -> Result<Arc<View>, Refusal> {
        let view = self.views.borrow().clone();
        match view {
            Some(view) if self.lease.holds(self.clock.since_boot()) => Ok(view),
            _ => Err(self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()),
        }
    }

    /// Whether the store has said that there is no trust domain.
    pub fn is_unfounded(&self) -> bool {
        self.unfounded.load(Ordering::Acquire)
    }

    /// The newest view there has been: to be told of, never to be acted on.
    pub fn newest(&self) -> Option<Arc<View>> {
        self.views.borrow().clone()
    }

    /// Wakes on every new view, and when a lease that had ended is confirmed again. What is seen
    /// there may be acted on only if [`Replica::current`] gives it.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<View>>> {
        self.views.subscribe()
    }

    /// Follows the store for ever.
    pub async fn run(
        self: Arc<Self>,
        sources: Sources,
        leased: Component,
        issuer: Component,
    ) -> Result<(), Infallible> {
        let changed = Notify::new();
        tokio::select! {
            never = watch_store(&*sources.store, &changed) => match never {},
            never = self.read_for_ever(&sources, &changed, &leased, &issuer) => match never {},
        }
    }

    async fn read_for_ever(
        &self,
        sources: &Sources,
        changed: &Notify,
        leased: &Component,
        issuer: &Component,
    ) -> Infallible {
        loop {
            let read = self.read(sources).await;
            self.report(read, leased, issuer);
            let pause = match self.current() {
                Ok(view) => view.lease().mul_f32(READ_EVERY),
                Err(_) => READ_EVERY_UNLEASED,
            };
            tokio::select! {
                () = changed.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// One read: installs what it shows and confirms the lease, or says why not.
    ///
    /// # Errors
    /// What stands in the way.
    pub async fn read(&self, sources: &Sources) -> Result<(), Refusal> {
        let sent = self.clock.since_boot();
        let lease = self.newest().map_or(LEASE, |view| view.lease());
        let patience = lease.mul_f32(READ_TIMEOUT);
        let read = tokio::time::timeout(patience, sources.store.get(TRUST_DOMAIN_KEY)).await;
        let refuse = |what: String| Refusal::new(Code::LEASE_EXPIRED, what);
        let entry = match read {
            Ok(Ok(Some(entry))) => entry,
            Ok(Ok(None)) => {
                self.unfounded.store(true, Ordering::Release);
                return Err(refuse(NO_TRUST_DOMAIN.to_owned()));
            }
            Ok(Err(error)) => return Err(refuse(error.to_string())),
            Err(_) => {
                return Err(refuse(format!("the store has not answered in {patience:?}")));
            }
        };
        self.unfounded.store(false, Ordering::Release);
        self.answered(sent, &entry, sources).await
    }

    /// A read that was sent at this time of the boot clock was answered with this entry: installs
    /// what it shows, and confirms the lease from then on.
    ///
    /// # Errors
    /// What stands in the way.
    pub async fn answered(
        &self,
        sent: Duration,
        entry: &Entry,
        sources: &Sources,
    ) -> Result<(), Refusal> {
        let refuse = |what: String| Refusal::new(Code::LEASE_EXPIRED, what);
        let offset_ms = (sources.clock_offset_ms)();
        let drifted = self.drifting.swap(drifts(offset_ms), Ordering::AcqRel);
        if drifts(offset_ms) && !drifted {
            tracing::warn!(offset_ms, "this machine's clock drifts from the store's");
        }
        check_clock(offset_ms)?;
        self.install(entry, sources).await.map_err(refuse)?;
        let held = self.lease.holds(self.clock.since_boot());
        self.lease.confirm(sent, self.newest().map_or(Duration::ZERO, |view| view.lease()));
        if !held {
            // Whoever waits for a lease waits on the views.
            self.views.send_modify(|_| {});
        }
        Ok(())
    }

    /// Makes a newer entry the view; the same entry again only tries missing issuers again.
    async fn install(&self, entry: &Entry, sources: &Sources) -> Result<(), String> {
        let held = self.views.borrow().clone();
        if let Some(held) = &held {
            let (revision, known) = (entry.revision.0, held.revision.0);
            if revision == known {
                if !held.signers.failed().is_empty() {
                    self.load_again(held, sources).await;
                }
                return Ok(());
            }
        }
        let state: TrustDomainState = serde_json::from_slice(&entry.value)
            .map_err(|error| format!("{TRUST_DOMAIN_KEY} in the store does not parse: {error}"))?;
        if let Some(held) = &held {
            self.check_not_back(held, &state, entry, sources).await?;
        }
        tell_put_back(&state);
        let view = self.view(state, entry.revision, held.as_deref(), sources).await?;
        let (seq, revision) = (view.state.seq, view.revision.0);
        tracing::info!(seq, revision, issuer = %view.state.active_issuer, "trust domain installed");
        self.views.send_replace(Some(Arc::new(view)));
        Ok(())
    }

    /// A store that was put back shows an older revision, or an older seq. What it says is taken if
    /// it is halted, since nothing is issued by it and its bundle is refused by whoever holds a
    /// newer one; and if a person has recovered it since.
    /// Else it is made to say that it is halted, as nobody but us may have seen it.
    async fn check_not_back(
        &self,
        held: &View,
        state: &TrustDomainState,
        entry: &Entry,
        sources: &Sources,
    ) -> Result<(), String> {
        let (known, seq, revision) = (held.revision, held.state.seq, entry.revision);
        let recovered = state.recovered_at > held.state.recovered_at;
        if state.halted.is_some() || recovered || (revision > known && state.seq >= seq) {
            return Ok(());
        }
        // As it is stored, not as it was parsed: a newer version may have put more into it.
        let halted = || {
            let mut stored: serde_json::Value = serde_json::from_slice(&entry.value)?;
            stored["halted"] = serde_json::to_value(Halt::Restored { seen_seq: seq })?;
            serde_json::to_vec(&stored)
        };
        let halted = halted().map_err(|error| error.to_string())?;
        let store = &sources.store;
        match store.compare_and_swap(TRUST_DOMAIN_KEY, Some(revision), Some(halted.into())).await {
            Ok(_) => tracing::error!(code = %Code::HALTED, known = known.0, revision = revision.0,
                "the store was put back: nothing is issued before `steadfast trust recover`"),
            Err(error) => tracing::debug!(%error, "the trust domain could not be halted"),
        }
        let (sent, revision, known) = (state.seq, revision.0, known.0);
        Err(format!(
            "the store went back from revision {known} (seq {seq}) to {revision} (seq {sent})"
        ))
    }

    async fn view(
        &self,
        state: TrustDomainState,
        revision: Revision,
        held: Option<&View>,
        sources: &Sources,
    ) -> Result<View, String> {
        let bundle = state.bundle().map_err(|error| format!("the stored bundle {error}"))?;
        let (held, now) = (held.map(|view| &view.signers), self.clock.now());
        let signers = Signers::load(&state, &bundle, held, &*sources.keys, now).await;
        signers.tell(held);
        let message = message(&state, &bundle);
        Ok(View {
            digest: state.digest(),
            encoded: encoded(message.clone()),
            message,
            jwks: bundle.to_jwks(),
            state,
            revision,
            bundle,
            signers,
        })
    }

    /// A key that was missing may have come: a view that is the same but for it wakes everyone.
    async fn load_again(&self, held: &Arc<View>, sources: &Sources) {
        let View { state, bundle, signers, .. } = &**held;
        let (keys, now) = (&*sources.keys, self.clock.now());
        let again = Signers::load(state, bundle, Some(signers), keys, now).await;
        if !again.same(signers) {
            again.tell(Some(signers));
            self.views.send_replace(Some(Arc::new(View { signers: again, ..View::clone(held) })));
        }
    }

    /// Tells `/ready`, the log (on change) and the metrics how the last read went.
    fn report(&self, read: Result<(), Refusal>, leased: &Component, issuer: &Component) {
        let failed = read.is_err();
        let refusal = read.err().unwrap_or_else(|| {
            let lease = self.newest().map_or(LEASE, |view| view.lease());
            let what = format!("the store has confirmed nothing for {lease:?}");
            Refusal::new(Code::LEASE_EXPIRED, what)
        });
        {
            let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            if failed && *trouble != refusal {
                tracing::warn!(code = %refusal.code, error = %refusal.what,
                    "the view of the trust domain is not confirmed");
            }
            *trouble = refusal;
        }
        let now = self.clock.now();
        match self.current() {
            Ok(view) => {
                leased.ready();
                match view.trouble(now) {
                    None => issuer.ready(),
                    Some(refusal) => issuer.not_ready(&refusal.to_string()),
                }
                self.metrics.view(&view, now);
            }
            Err(refusal) => {
                leased.not_ready(&refusal.to_string());
                self.metrics.lease_held.set(0);
            }
        }
    }
}

/// Why the active issuer does not sign, or soon cannot.
fn signer_trouble(view: &View, now: UnixTime) -> Option<SignerError> {
    if let Some(error) = view.signers.failed().get(&view.state.active_issuer) {
        return Some(error.clone());
    }
    view.signers.active(&view.state).and_then(|signer| signer.end(now, SKEW).map(drop)).err()
}

/// An anchor that was withdrawn for ever and stands in the state as if it were not.
fn tell_put_back(state: &TrustDomainState) {
    for anchor in state.anchors.iter().filter(|anchor| anchor.state.published()) {
        if state.tombstones.contains(&anchor.id) {
            tracing::warn!(code = %Code::ANCHOR_PUT_BACK, anchor = %anchor.id, origin = "the store",
                "an anchor was put back that is withdrawn for ever: it is not believed");
        }
    }
}

/// Every event is a reason to read now.
async fn watch_store(store: &dyn Store, changed: &Notify) -> Infallible {
    loop {
        let error = watch_once(store, changed).await;
        tracing::debug!(%error, "the watch of the trust domain broke off");
        tokio::time::sleep(READ_EVERY_UNLEASED).await;
    }
}

async fn watch_once(store: &dyn Store, changed: &Notify) -> StoreError {
    let from = match store.list(TRUST_DOMAIN_KEY).await {
        Ok((_, revision)) => revision,
        Err(error) => return error,
    };
    let mut events = match store.watch(TRUST_DOMAIN_KEY, from).await {
        Ok(events) => events,
        Err(error) => return error,
    };
    loop {
        match events.next().await {
            Some(Ok(steadfast_platform::store::Event::Synced(_))) => {}
            Some(Ok(_)) => changed.notify_one(),
            Some(Err(error)) => return error,
            None => return StoreError::Unavailable("the watch ended".to_owned()),
        }
    }
}

/// Our wall clock must agree with the store's before anything is dated by it.
fn check_clock(offset_ms: Option<i64>) -> Result<(), Refusal> {
    let Some(offset) = offset_ms else { return Ok(()) };
    let skew_ms = i64::try_from(SKEW.as_millis()).unwrap_or(i64::MAX);
    if offset.unsigned_abs() > skew_ms.unsigned_abs() {
        let what = format!("this machine's clock is {offset} ms off the store's, over {skew_ms}");
        return Err(Refusal::new(Code::CLOCK_OFF, what));
    }
    Ok(())
}

/// Half way to where nothing is issued any more.
fn drifts(offset_ms: Option<i64>) -> bool {
    offset_ms.is_some_and(|offset| u128::from(offset.unsigned_abs()) > SKEW.as_millis() / 2)
}

fn message(state: &TrustDomainState, bundle: &TrustBundle) -> v1::Bundle {
    v1::Bundle {
        trust_domain: state.trust_domain.as_str().to_owned(),
        seq: state.seq,
        anchors: bundle.anchors().iter().map(|anchor| anchor.der().to_vec()).collect(),
        denied_issuers: state
            .denied_issuers
            .iter()
            .map(|denied| v1::DeniedIssuer {
                issuer_id: denied.id.as_bytes().to_vec(),
                until: Some(denied.until.into()),
            })
            .collect(),
        tombstones: state.tombstones.iter().map(|id| id.as_bytes().to_vec()).collect(),
    }
}

fn encoded(bundle: v1::Bundle) -> Bytes {
    let message = Some(Message::Bundle(bundle));
    v1::StreamResponse { server_time: None, message }.encode_to_vec().into()
}

/// Tc of the rotation protocol, unless a trust domain was founded with a shorter one.
pub const LEASE: Duration = READ_LEASE;
/// In leases: several tries fit into one.
const READ_EVERY: f32 = 2.0 / 15.0;
const READ_EVERY_UNLEASED: Duration = Duration::from_millis(250);
/// In leases.
const READ_TIMEOUT: f32 = 0.2;
const NO_TRUST_DOMAIN: &str =
    "the store holds no trust domain yet: run `steadfast trust init --dir DIR`";
