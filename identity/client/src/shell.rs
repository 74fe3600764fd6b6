//! The shell around the renewal machine: everything that happens becomes an event, everything the
//! machine decides is carried out here, in its order.
//!
//! One task owns all state. Requests and the trust stream run beside it and only tell it things,
//! so a bundle, an SVID and an ack can never overtake one another. Keys live in the request that
//! made them until their SVID is installed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use steadfast_api::trust::v1::stream_response::Message;
use steadfast_api::trust::v1::{Bundle, Instance, Renew, StreamRequest, StreamResponse};
use steadfast_api::{Code, KeyId, TrustAnchor, UnixTime};
use steadfast_process::readiness::Component;
use steadfast_process::{Clock, Drain, ErrorChain};
use steadfast_rotation_protocol::renewal::{
    Alarm, Effect, Event, Failure, Issued, Renewal, RequestId,
};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinError, JoinSet};

use crate::ack;
use crate::bundle;
use crate::certify::{CertifyError, Reply, Request, certify};
use crate::dial::Dialer;
use crate::identity::{Config, IdentityError};
use crate::metrics::Metrics;
use crate::observed::server_time;
use crate::status::{self, Status};
use crate::svid::{Candidate, Lapse};
use crate::token;
use crate::trust_stream::{StreamEvent, TrustStream};
use crate::{OwnSvid, Trust, random_jitter};

/// The owner of an identity's state.
pub(crate) struct Shell {
    config: Config,
    dialer: Arc<Dialer>,
    clock: Arc<dyn Clock>,
    started_at: UnixTime,
    machine: Renewal,
    requests: JoinSet<(RequestId, Result<Reply, CertifyError>)>,
    under_way: BTreeMap<RequestId, AbortHandle>,
    /// What was issued and waits to be installed.
    held: BTreeMap<RequestId, Candidate>,
    /// Where the trust stream goes.
    address: Option<SocketAddr>,
    stream: Option<Stream>,
    /// The ack to send, by the newest nonce that it answers.
    owed: Option<u64>,
    /// What is used is not what was sent last on this stream.
    differs: bool,
    /// Anchors that were withdrawn while we ran, and are still in the mounted file.
    leaving: BTreeSet<KeyId>,
    trouble: Trouble,
    told: Told,
}

/// The open trust stream.
struct Stream {
    instance: Instance,
    requests: mpsc::Sender<StreamRequest>,
}

/// What last went wrong, for the reason of `/ready`.
#[derive(Default)]
struct Trouble {
    stream: Option<String>,
    renewal: Option<&'static str>,
    /// The identity service's chain fits no bundle that we have.
    stale: bool,
}

/// Where people look.
struct Told {
    component: Component,
    metrics: Metrics,
    status: watch::Sender<Status>,
    renewals: u64,
    failures: u64,
    last_failure: Option<String>,
    /// Anchors that were put back though they are withdrawn, by who did.
    withdrawn: BTreeMap<&'static str, BTreeSet<KeyId>>,
}

impl Shell {
    pub(crate) fn new(
        config: Config,
        dialer: Arc<Dialer>,
        clock: Arc<dyn Clock>,
        component: Component,
        metrics: Metrics,
        status: watch::Sender<Status>,
    ) -> Self {
        let told = Told {
            component,
            metrics,
            status,
            renewals: 0,
            failures: 0,
            last_failure: None,
            withdrawn: BTreeMap::new(),
        };
        Self {
            started_at: clock.now(),
            config,
            dialer,
            clock,
            machine: Renewal::new(),
            requests: JoinSet::new(),
            under_way: BTreeMap::new(),
            held: BTreeMap::new(),
            address: None,
            stream: None,
            owed: None,
            differs: false,
            leaving: BTreeSet::new(),
            trouble: Trouble::default(),
            told,
        }
    }

    /// Runs until the drain has started and nobody holds it.
    pub(crate) async fn run(mut self, drain: Drain) -> Result<(), IdentityError> {
        let done = async {
            drain.wait().await;
            drain.finished(FOREVER).await
        };
        tokio::pin!(done);
        self.tell();
        tokio::select! {
            () = token::projected(&self.config.token_file) => {}
            _ = &mut done => return Ok(()),
        }
        let (events, mut stream_events) = mpsc::channel(EVENTS_MAX);
        let stream = TrustStream {
            dialer: self.dialer.clone(),
            token_file: self.config.token_file.clone(),
            version: self.config.version.clone(),
            started_at: self.started_at,
            events,
        };
        let mut carrier = JoinSet::new();
        carrier.spawn(stream.run());
        let start_by = tokio::time::Instant::now() + START_WAIT_MAX;
        let mut started = false;
        let mut acks = tokio::time::interval(ACK_INTERVAL);
        let contexts = self.dialer.clone();
        let observed = contexts.contexts.observed();
        loop {
            let wakeup = self.until_wakeup();
            tokio::select! {
                Some(event) = stream_events.recv() => {
                    // The first request goes where the stream does, if that comes about.
                    let reached = matches!(event, StreamEvent::Connected(_) | StreamEvent::Down { .. });
                    self.on_stream(event)?;
                    if reached && !std::mem::replace(&mut started, true) {
                        self.feed(Event::Started)?;
                    }
                }
                () = tokio::time::sleep_until(start_by), if !started => {
                    started = true;
                    self.feed(Event::Started)?;
                }
                Some(ended) = self.requests.join_next() => self.on_reply(ended)?,
                _ = acks.tick() => {
                    // Whoever puts an anchor back may have taken the service away, too.
                    self.look_at_mounted();
                    self.owe(UNASKED);
                }
                // A worker may have been the last to use what an ack is about.
                () = observed.followed() => {}
                // It ends after the shell, or in a panic.
                Some(Err(panic)) = carrier.join_next() => return Err(IdentityError::Stream(panic)),
                () = tokio::time::sleep(wakeup) => self.feed(Event::Tick)?,
                _ = &mut done => return Ok(()),
            }
            self.send_owed()?;
            self.tell();
        }
    }

    /// The machine's hint, in the time that timers have. Bounded: timers stand still while the
    /// machine sleeps, so the wall clock is looked at again soon after it wakes.
    fn until_wakeup(&self) -> Duration {
        let now = self.clock.now();
        self.machine.next_wakeup().map_or(WAKEUP_MAX, |at| at.since(now)).min(WAKEUP_MAX)
    }

    /// Tells the machine, and carries out what it decides; what that leads to is told in turn.
    fn feed(&mut self, event: Event) -> Result<(), IdentityError> {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for effect in self.machine.handle(self.clock.now(), random_jitter(), event) {
                events.extend(self.carry_out(effect)?);
            }
        }
        if let Some(offset) = self.machine.clock_offset_millis() {
            self.dialer.contexts.observed().set_clock_offset_ms(offset);
            self.told.metrics.clock_offset_ms(offset);
        }
        Ok(())
    }

    fn carry_out(&mut self, effect: Effect) -> Result<Option<Event>, IdentityError> {
        match effect {
            Effect::Alarm(alarm) => self.alarm(alarm),
            Effect::Cancel { id } => {
                if let Some(request) = self.under_way.remove(&id) {
                    request.abort();
                }
            }
            Effect::Discard { id } => {
                self.held.remove(&id);
            }
            // It is held from the moment it arrives.
            Effect::Hold { .. } => {}
            Effect::Install { id } => return self.install(id),
            // Told from what is really published, after each event.
            Effect::Readiness(_) => {}
            Effect::Request { id, attempt, timeout } => self.request(id, attempt, timeout),
        }
        Ok(None)
    }

    fn request(&mut self, id: RequestId, attempt: u32, timeout: Duration) {
        let request = Request {
            local: self.config.local.spiffe_id(),
            token_file: self.config.token_file.clone(),
            // Whoever did not answer once is not asked again at once.
            attempt,
            address: self.address,
            timeout,
        };
        let dialer = self.dialer.clone();
        let handle = self.requests.spawn(async move { (id, certify(&dialer, request).await) });
        self.under_way.insert(id, handle);
    }

    fn on_reply(
        &mut self,
        ended: Result<(RequestId, Result<Reply, CertifyError>), JoinError>,
    ) -> Result<(), IdentityError> {
        let (id, reply) = match ended {
            Ok(ended) => ended,
            // Cancelled by us: the machine has gone on already.
            Err(error) if error.is_cancelled() => return Ok(()),
            Err(error) => {
                // The machine gives the request up at its deadline.
                tracing::error!(%error, "a request for an SVID panicked");
                return Ok(());
            }
        };
        // A reply that came just as its request was cancelled is no reply.
        if self.under_way.remove(&id).is_none() {
            return Ok(());
        }
        let event = match reply.and_then(|reply| self.examine(id, reply)) {
            Ok(issued) => Event::Issued(issued),
            Err(error) => {
                self.trouble.renewal = Some(error.label());
                self.trouble.stale |= error.label() == STALE;
                Event::Failed { id, reason: ErrorChain(&error).to_string() }
            }
        };
        self.feed(event)
    }

    /// Whether what was issued can be used, as far as the bundle in use can tell.
    fn examine(&mut self, id: RequestId, reply: Reply) -> Result<Issued, CertifyError> {
        let Reply { candidate, issued_at, renew_at, server_time, seq } = reply;
        let bundle = self.trust().filter(|bundle| bundle.sequence() >= seq);
        let issuer = match bundle {
            // By the service's clock: ours may be off by more than the five minutes of grace.
            Some(bundle) => candidate.verify(&bundle, server_time)?.issuer(),
            // Its bundle is on its way; the chain is checked when it is installed.
            None => candidate.presented_issuer().ok_or(CertifyError::Reply("issuer"))?,
        };
        let not_after = candidate.facts().not_after;
        self.held.insert(id, candidate);
        Ok(Issued { id, issued_at, not_after, renew_at, server_time, seq, issuer })
    }

    /// Publishes the SVID of this request together with the bundle in use.
    fn install(&mut self, id: RequestId) -> Result<Option<Event>, IdentityError> {
        let (Some(candidate), Some(bundle)) = (self.held.remove(&id), self.trust()) else {
            self.trouble.renewal = Some("not_held");
            let reason = "what was to be installed is not held".to_owned();
            return Ok(Some(Event::InstallFailed { id, reason }));
        };
        match candidate.verify(&bundle, self.server_now()) {
            Ok(svid) => {
                let svid = Arc::new(svid);
                self.dialer.contexts.publish(Some(svid.clone()), bundle)?;
                self.told_installed(&svid);
                Ok(None)
            }
            Err(error) => {
                // A replica that signs under an anchor it does not publish: the machine asks again,
                // and elsewhere.
                let error = CertifyError::from(error);
                self.trouble.renewal = Some(error.label());
                let reason = ErrorChain(&error).to_string();
                Ok(Some(Event::InstallFailed { id, reason }))
            }
        }
    }

    fn on_stream(&mut self, event: StreamEvent) -> Result<(), IdentityError> {
        match event {
            StreamEvent::Connected(address) => {
                self.address = Some(address);
                self.trouble.stale = false;
            }
            StreamEvent::Up { instance, requests } => {
                if self.trouble.stream.take().is_some() {
                    tracing::info!("the trust stream stands again");
                }
                self.stream = Some(Stream { instance, requests });
                self.owe(UNASKED);
                self.feed(Event::StreamCameBack)?;
            }
            StreamEvent::Down { reason, stale } => {
                // A query that was not answered comes again with the next stream.
                (self.address, self.stream, self.owed) = (None, None, None);
                self.differs = false;
                self.trouble.stale = stale;
                if self.trouble.stream.replace(reason.clone()).as_ref() != Some(&reason) {
                    tracing::warn!(reason, "the trust stream is down; it is opened again");
                }
            }
            StreamEvent::Message(message) => self.on_message(*message)?,
        }
        Ok(())
    }

    fn on_message(&mut self, message: StreamResponse) -> Result<(), IdentityError> {
        if let Some(time) = message.server_time {
            self.feed(Event::ServerTime(time.into()))?;
        }
        match message.message {
            Some(Message::Bundle(bundle)) => self.on_bundle(&bundle),
            Some(Message::Query(query)) => {
                self.owe(query.nonce);
                Ok(())
            }
            Some(Message::Renew(renew)) => self.on_renew(&renew),
            // A message of a newer service, or its time alone. The end is the carrier's.
            Some(Message::End(_)) | None => Ok(()),
        }
    }

    fn on_bundle(&mut self, sent: &Bundle) -> Result<(), IdentityError> {
        let held = self.trust();
        let next = bundle::next(held.as_deref(), self.config.local.trust_domain(), sent);
        let used = match &next {
            Ok(Some(next)) => Some(next),
            Ok(None) | Err(_) => held.as_deref(),
        };
        self.differs = used.is_some_and(|used| !bundle::is_as_sent(used, sent));
        match next {
            Ok(None) => Ok(()),
            Ok(Some(trust)) => {
                let (seq, anchors) = (trust.sequence(), trust.anchors().len());
                let denied: Vec<KeyId> = trust.denied().iter().copied().collect();
                let before = held.iter().flat_map(|held| held.anchors());
                let gone = before.map(TrustAnchor::id).filter(|id| trust.tombstones().contains(id));
                self.leaving.extend(gone);
                let svid = self.dialer.contexts.current().svid.clone();
                self.dialer.contexts.publish(svid, Arc::new(trust))?;
                self.told.metrics.bundle(seq);
                tracing::info!(seq, anchors, denied = denied.len(), "bundle installed");
                if self.differs {
                    self.tell_withdrawn(
                        "the published bundle",
                        bundle::withdrawn(sent, self.trust()),
                    );
                }
                self.feed(Event::BundleInstalled { seq, denied })?;
                self.owe(UNASKED);
                Ok(())
            }
            Err(refused) => {
                let code = refused.code();
                self.told.metrics.bundle_refused(code.label());
                tracing::warn!(%code, "{}; the bundle in use stays", ErrorChain(&refused));
                self.owe(UNASKED);
                Ok(())
            }
        }
    }

    fn on_renew(&mut self, renew: &Renew) -> Result<(), IdentityError> {
        let (Some(from), Some(window), Some(stream)) = (renew.from, renew.window, &self.stream)
        else {
            return Ok(());
        };
        let event = Event::PulledForward {
            id: renew.id,
            from: from.into(),
            // A window that ends before it begins is none.
            window: Duration::try_from(window).unwrap_or_default(),
            share: ack::share(&stream.instance),
        };
        self.feed(event)
    }

    /// An ack is to be sent; the newest query is answered for all before it.
    fn owe(&mut self, nonce: u64) {
        self.owed = Some(self.owed.map_or(nonce, |owed| owed.max(nonce)));
    }

    /// Sends the ack that is owed, once there is room for it and every worker uses what it is
    /// about. Until then it stays owed.
    fn send_owed(&mut self) -> Result<(), IdentityError> {
        let (Some(nonce), Some(stream)) = (self.owed, &self.stream) else { return Ok(()) };
        let context = self.dialer.contexts.current();
        if !self.dialer.contexts.observed().all_use(context.generation) {
            return Ok(());
        }
        let Ok(room) = stream.requests.clone().try_reserve_owned() else { return Ok(()) };
        let instance = stream.instance.clone();
        if nonce != UNASKED {
            // What was asked for before this ack is given up before the ack is sent: else a reply
            // under way could bring back what the ack says is gone.
            self.feed(Event::AckSent)?;
        }
        let mounted = self.look_at_mounted();
        let observed = self.dialer.contexts.observed();
        let counted = observed.take_counted();
        room.send(ack::of(&context, nonce, &instance, mounted, observed, &counted, self.differs));
        self.owed = None;
        Ok(())
    }

    /// What an ack names as the mounted file, which is told of if it brings back what is withdrawn.
    fn look_at_mounted(&mut self) -> Vec<u8> {
        let trust = self.trust();
        let none = BTreeSet::new();
        let tombstones = trust.as_deref().map_or(&none, Trust::tombstones);
        let (digest, there) = self.dialer.mounted.look(tombstones);
        // The file follows a withdrawal a moment later.
        self.leaving.retain(|id| there.contains(id));
        let put_back = there.difference(&self.leaving).copied().collect();
        self.tell_withdrawn("the mounted bundle", put_back);
        digest
    }

    /// Somebody has put an anchor back that was withdrawn: it is not believed, and told once.
    fn tell_withdrawn(&mut self, origin: &'static str, anchors: BTreeSet<KeyId>) {
        if self.told.withdrawn.insert(origin, anchors.clone()).as_ref() == Some(&anchors) {
            return;
        }
        for anchor in anchors {
            tracing::warn!(
                code = %Code::ANCHOR_PUT_BACK, %anchor, origin,
                "an anchor was put back that is withdrawn for ever: it is not believed"
            );
        }
    }

    fn trust(&self) -> Option<Arc<Trust>> {
        self.dialer.contexts.current().bundle.clone()
    }

    /// Our best guess at the service's clock.
    fn server_now(&self) -> UnixTime {
        server_time(self.clock.now(), self.machine.clock_offset_millis())
    }

    fn alarm(&mut self, alarm: Alarm) {
        match alarm {
            Alarm::RenewalFailed { attempt, failure, next_try, not_after } => {
                let reason = match &failure {
                    Failure::IssuerDenied(_) => "issuer_denied",
                    Failure::NoLife { .. } => "no_life",
                    Failure::Request(_) => self.trouble.renewal.unwrap_or("unknown"),
                    Failure::TimedOut(_) => "timeout",
                };
                self.trouble.renewal = Some(reason);
                self.told.metrics.renewal_failed(reason);
                self.told.failures += 1;
                self.told.last_failure = Some(failure.to_string());
                let hurts = not_after.map_or_else(
                    || "now: there is no SVID".to_owned(),
                    |not_after| format!("at {not_after}, when the SVID ends"),
                );
                tracing::warn!(
                    code = %Code::RENEWAL_FAILED, reason, attempt, %next_try, hurts,
                    "the SVID was not renewed: {failure}"
                );
            }
            Alarm::Expired { not_after } => tracing::error!(
                code = %Code::SVID_EXPIRED, %not_after,
                "the SVID has expired: new connections are refused until it is renewed"
            ),
            Alarm::BundleBehind { needed_seq, installed_seq } => tracing::info!(
                needed_seq,
                ?installed_seq,
                "a new SVID waits for the bundle it was issued under"
            ),
            Alarm::ClockJumped { by_millis } => {
                tracing::warn!(by_millis, "the wall clock jumped: renewing soon");
            }
            Alarm::ClockOff { offset_millis } => tracing::warn!(
                offset_millis,
                "our clock is far from the identity service's: certificates will be refused"
            ),
        }
    }

    fn told_installed(&mut self, svid: &OwnSvid) {
        let first = self.told.status.borrow().serial.is_none();
        self.told.renewals += u64::from(!first);
        self.told.last_failure = None;
        (self.trouble.renewal, self.trouble.stale) = (None, false);
        self.told.metrics.renewed(svid, self.clock.now());
        tracing::info!(
            spiffe_id = %svid.id(),
            serial = %svid.facts().serial_hex(),
            not_after = %svid.facts().not_after,
            next_renewal = %Shown(self.machine.next_renewal()),
            issuer = %svid.issuer().short(),
            anchor = %svid.anchor().short(),
            renewals = self.told.renewals,
            "{}", if first { "SVID issued" } else { "SVID renewed" }
        );
        self.told.status.send_modify(|status| {
            status.spiffe_id = Some(svid.id().clone());
            status.serial = Some(svid.facts().serial_hex());
            status.chain_pem = status::pem(svid.chain());
            status.issued_at = Some(svid.issued_at());
            status.not_before = Some(svid.facts().not_before);
            status.not_after = Some(svid.facts().not_after);
            status.anchor = Some(svid.anchor());
            status.issuer = Some(svid.issuer());
        });
    }

    /// Brings readiness, status and gauges up to date with the machine.
    fn tell(&mut self) {
        self.tell_readiness();
        let next_renewal = self.machine.next_renewal();
        if let Some(at) = next_renewal {
            self.told.metrics.renews_at(at);
        }
        let bundle = self.trust();
        let next = Status {
            next_renewal,
            renewals: self.told.renewals,
            failures: self.told.failures,
            last_failure: self.told.last_failure.clone(),
            bundle_seq: bundle.as_ref().map(|bundle| bundle.sequence()),
            bundle_anchors: bundle
                .iter()
                .flat_map(|bundle| bundle.anchors())
                .map(TrustAnchor::id)
                .collect(),
            clock_offset_ms: self.machine.clock_offset_millis(),
            ..self.told.status.borrow().clone()
        };
        self.told.status.send_if_modified(|status| {
            let changed = *status != next;
            *status = next;
            changed
        });
    }

    /// One failed renewal unreadies nobody: only an SVID that is over, or nothing to show at all.
    fn tell_readiness(&self) {
        let context = self.dialer.contexts.current();
        let state = match (&context.bundle, &context.svid) {
            (None, _) => "no live bundle yet".to_owned(),
            (_, None) => "no SVID yet".to_owned(),
            (_, Some(svid)) => match self.lapsed(svid) {
                Some(reason) => reason,
                None => return self.told.component.ready(),
            },
        };
        let trouble = &self.trouble;
        let mut reason = state;
        if trouble.stale {
            let code = Code::BOOTSTRAP_BUNDLE_STALE;
            reason = format!("{code} {}: {reason}", code.label());
        }
        if let Some(failure) = &self.told.last_failure {
            reason.push_str("; ");
            reason.push_str(failure);
        } else if let Some(stream) = &trouble.stream {
            reason.push_str("; ");
            reason.push_str(stream);
        }
        self.told.component.not_ready(&reason);
    }

    /// Why the SVID in use is of no use, by the same rule as handshakes have.
    fn lapsed(&self, svid: &OwnSvid) -> Option<String> {
        let offset_ms = self.machine.clock_offset_millis();
        let lapse = svid.lapse(self.clock.now(), offset_ms)?;
        let offset_ms = offset_ms.unwrap_or(0);
        let direction = if offset_ms < 0 { "behind" } else { "ahead of" };
        let off = Duration::from_millis(offset_ms.unsigned_abs()).as_secs();
        let here = format!("by our clock, which is {off} s {direction} the identity service's");
        let (code, label) = (Code::SVID_EXPIRED, Code::SVID_EXPIRED.label());
        let facts = svid.facts();
        Some(match lapse {
            Lapse::Expired => format!("{code} {label}: the SVID expired at {}", facts.not_after),
            Lapse::ExpiredHere => {
                format!("{code} {label}: the SVID expired at {} {here}", facts.not_after)
            }
            Lapse::NotYetValidHere => {
                format!("the SVID is not valid before {} {here}", facts.not_before)
            }
        })
    }
}

/// A time, or that there is none.
struct Shown(Option<UnixTime>);

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(time) => time.fmt(f),
            None => f.write_str("none"),
        }
    }
}

/// The nonce of an ack that answers no query.
const UNASKED: u64 = 0;
const STALE: &str = "bootstrap_bundle_stale";
const ACK_INTERVAL: Duration = Duration::from_secs(30);
const WAKEUP_MAX: Duration = Duration::from_secs(30);
/// The first request waits so long for the stream, and then finds its own way.
const START_WAIT_MAX: Duration = Duration::from_secs(1);
/// Messages of the stream that wait to be read; then the service waits.
const EVENTS_MAX: usize = 16;
/// The process's own deadline ends a drain; this only must not come before it.
const FOREVER: Duration = Duration::from_secs(366 * 24 * 3600);
