//! The loop: look, decide, do.
//!
//! A look asks the replicas first and reads the store last, so that what members hold was published
//! before what is read, or never by it. The write comes before everything else that was decided;
//! when it fails, nothing else of the same decision is done, and the next look begins anew.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use steadfast_api::{KeyId, UnixTime};
use steadfast_platform::kubernetes::Namespaces;
use steadfast_platform::store::{FINDINGS_KEY, ISSUER_REQUESTS_PREFIX, TRUST_DOMAIN_KEY};
use steadfast_platform::{Entry, Revision, Store, StoreError};
use steadfast_process::readiness::Component;
use steadfast_process::{Clock, ErrorChain};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::census::{self, Held, Listed, Replica, Round};
use steadfast_rotation_protocol::controller::{
    Controller, Effect, Made, Now, Observation, Persist, Signed, Standing, Timings, Wait, Waits,
};
use steadfast_rotation_protocol::journal::Line;
use steadfast_rotation_protocol::recover::Findings;
use steadfast_rotation_protocol::trust_domain::{Condemned, IssuerRequest, Label, WantedIssuer};
use tokio::sync::watch;

use crate::anchors::{Anchors, AnchorsError};
use crate::endings::{self, Ended};
use crate::event_log::{EventLog, EventLogError};
use crate::events;
use crate::evidence::{self, KeepError};
use crate::external::Told;
use crate::leader::{Candidate, LedAt, Role};
use crate::ledger::Ledger;
use crate::listing::{Carries, Listing};
use crate::metrics::{LookResult, Metrics};

/// The replicas of identity.
#[async_trait::async_trait]
pub trait Fleet: Send + Sync + 'static {
    /// Asks everybody for an ack with this nonce, waits until all have answered or a moment has
    /// passed, and tells what each replica knows. A replica that cannot be reached is told as such.
    async fn ask(&self, nonce: u64) -> Vec<Replica>;
}

/// Which anchors of a state the tool of an operator lists.
pub type Lists = Box<dyn Fn(&TrustDomainState) -> Vec<KeyId> + Send + Sync>;

/// What the shell works with.
pub struct Parts {
    /// The store.
    pub store: Arc<dyn Store>,
    /// The keys of anchors.
    pub anchors: Anchors,
    /// The replicas of identity.
    pub fleet: Arc<dyn Fleet>,
    /// The clocks.
    pub clock: Arc<dyn Clock>,
    /// Our wall clock less the store's, where the store says its time.
    pub clock_offset_ms: Box<dyn Fn() -> Option<i64> + Send + Sync>,
    /// The sequence number of the bundle that we use ourselves, and what is in it.
    pub held: Box<dyn Fn() -> Option<(u64, Held)> + Send + Sync>,
    /// How long things take.
    pub timings: Timings,
    /// How long a new anchor lives.
    pub anchor_lifetime: Duration,
    /// Where the processes of the control plane are.
    pub namespaces: Namespaces,
    /// How a pod says that it carries our proxy.
    pub carries: Carries,
    /// Who has ended since it was asked last, as the platform told it.
    pub ended: Box<dyn Fn() -> Ended + Send + Sync>,
    /// Whether every mirror of the bundle shows this sequence number, where mirrors are our affair.
    pub mirrors_show: Box<dyn Fn(u64) -> bool + Send + Sync>,
    /// The anchors of this state that the tool of an operator lists.
    pub listed: Lists,
    /// Where decisions are told with what they were made of.
    pub event_log: EventLog,
    /// By what the other controllers know us; no other process has this name.
    pub name: String,
    /// What is counted.
    pub metrics: Metrics,
}

/// The shell, between two looks.
pub struct Shell {
    parts: Parts,
    controller: Controller,
    candidate: Candidate,
    /// Whether we led at the last turn.
    led: bool,
    standing: watch::Sender<Standing>,
    /// The newest round.
    round: watch::Sender<Option<Arc<Round>>>,
    /// When everybody was asked last, on the boot clock.
    asked: Option<Duration>,
    /// The newest query that any replica knew then.
    newest_nonce: u64,
    /// Whether a person is to look.
    halted: bool,
    /// Whether what was found out while it was is still there.
    has_findings: bool,
    told: Told,
    /// What was in the way last, so that what lasts is told once.
    trouble: Option<String>,
    /// The published anchors whose key was gone then.
    keyless: Vec<KeyId>,
    /// The query to ask with the next look.
    query: Option<u64>,
    /// How often everybody was asked since the state has changed, [`IN_VAIN_MAX`] at most.
    in_vain: u32,
    made: Option<Made>,
    signed: Option<Signed>,
    listing: Listing,
    ledger: Option<Ledger>,
    /// When we were last sure to lead.
    led_at: Arc<LedAt>,
    /// Who has ended, until it is written down.
    ended: Vec<Listed>,
    /// When who has ended was written down last, on the boot clock.
    settled: Option<Duration>,
    /// The newest rotation of the past when evidence was tidied last.
    past: Option<u64>,
    /// The state as it was seen last, for what has happened since.
    before: Option<(u64, TrustDomainState)>,
}

/// Why a look came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// Keys or certificates.
    #[error(transparent)]
    Anchors(#[from] AnchorsError),
    /// The event log.
    #[error(transparent)]
    EventLog(#[from] EventLogError),
    /// Evidence.
    #[error("the evidence of a rotation cannot be kept, so no phase is left")]
    Evidence(#[from] KeepError),
    /// Another trust domain than the one we were started for.
    #[error(
        "the stored trust domain has a read lease of {stored:?}, and this process was started with \
         one of {ours:?}: restart it"
    )]
    Lease {
        /// Of the stored state.
        stored: Duration,
        /// Of this process.
        ours: Duration,
    },
    /// There is no trust domain.
    #[error("the store holds no trust domain yet: run `steadfast trust init`")]
    NoTrustDomain,
    /// What is stored is no state of ours.
    #[error("{0} in the store does not parse (written by a newer version?)")]
    State(String, #[source] serde_json::Error),
    /// The store.
    #[error("the store cannot be used")]
    Store(#[from] StoreError),
}

/// What came of a look.
#[derive(Debug)]
pub struct Looked {
    /// What was changed in the store, if anything was.
    pub changed: bool,
    /// The state as it was seen.
    pub state: TrustDomainState,
    /// What could not be done with a key; all else was.
    pub trouble: Option<LookError>,
}

impl Shell {
    /// A shell that has seen nothing.
    pub fn new(parts: Parts) -> Self {
        let controller = Controller::new(parts.timings);
        let standing =
            watch::Sender::new(Standing { timings: Some(parts.timings), ..Standing::default() });
        let candidate = Candidate::new(parts.name.clone());
        let listing = Listing::new(parts.carries);
        Self {
            parts,
            controller,
            candidate,
            led: false,
            standing,
            round: watch::Sender::default(),
            asked: None,
            newest_nonce: 0,
            halted: false,
            has_findings: true,
            told: Told::default(),
            trouble: None,
            keyless: Vec::new(),
            query: None,
            in_vain: 0,
            made: None,
            signed: None,
            listing,
            ledger: None,
            led_at: Arc::default(),
            ended: Vec::new(),
            settled: None,
            past: None,
            before: None,
        }
    }

    /// Follows how things stand.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// When we were last sure to lead.
    pub fn led_at(&self) -> Arc<LedAt> {
        Arc::clone(&self.led_at)
    }

    /// Follows what everybody answered last.
    pub fn newest_round(&self) -> watch::Receiver<Option<Arc<Round>>> {
        self.round.subscribe()
    }

    /// What it waited for when it looked last.
    pub fn waiting(&self) -> &Wait {
        self.controller.waiting()
    }

    /// Does what its part is: looks, where we lead, and otherwise tells what is stored alone.
    ///
    /// # Errors
    /// [`LookError`]; nothing is lost by it, the next turn begins anew.
    pub async fn turn(&mut self) -> Result<Looked, LookError> {
        // Whoever cannot work with it leaves the lead to one that can.
        let (state, revision) = self.state().await?;
        let now = Now { wall: self.store_time(), ..self.now() };
        let role = self.candidate.role(&*self.parts.store, now).await;
        let leads = matches!(role, Ok(Role::Leads));
        if leads {
            self.led_at.confirm(now.boot);
        }
        if leads != self.led {
            self.begin_anew(leads);
        }
        if leads
            && self.settles()
            && let Err(error) = self.settle().await
        {
            tracing::debug!(error = %ErrorChain(&error), "who has ended is written down later");
        }
        match role? {
            Role::Leads if self.rests(revision) => {
                self.standing.send_modify(|standing| standing.seen_at = now.wall);
                Ok(Looked { changed: false, state, trouble: None })
            }
            Role::Leads => {
                let looked = self.look().await?;
                let trouble = looked.trouble.as_ref().map(|error| ErrorChain(error).to_string());
                self.tell(&looked.state, Some(self.candidate.name().to_owned()), trouble);
                Ok(looked)
            }
            Role::Follows { leader } => {
                self.before = Some((revision.0, state.clone()));
                self.tell(&state, Some(leader).filter(|leader| !leader.is_empty()), None);
                Ok(Looked { changed: false, state, trouble: None })
            }
        }
    }

    /// What was known while somebody else led, or while we did, is old.
    fn begin_anew(&mut self, leads: bool) {
        tracing::info!(event = if leads { "leads" } else { "follows" }, "who decides has changed");
        self.led = leads;
        // The controller stays: its fence is of a revision, and it knows the newest there has been.
        (self.query, self.ledger, self.has_findings) = (None, None, true);
        self.round.send_replace(None);
    }

    /// Whether who has ended is to be written down now.
    fn settles(&self) -> bool {
        let now = self.parts.clock.since_boot();
        self.settled.is_none_or(|settled| now.saturating_sub(settled) >= SETTLE_EVERY)
    }

    /// Writes down who has ended, and how far that is known: a controller that starts goes on there.
    async fn settle(&mut self) -> Result<(), LookError> {
        let store = Arc::clone(&self.parts.store);
        self.settled = Some(self.parts.clock.since_boot());
        let Ended { pods, seen: Some(seen) } = (self.parts.ended)() else { return Ok(()) };
        self.ended.extend(pods);
        let mut ledger = match self.ledger.take() {
            Some(known) => known,
            None => Ledger::read(&*store).await?,
        };
        ledger.end(&self.ended, self.store_time());
        if let Err(error) = ledger.write(&*store).await {
            self.read_again(ledger).await;
            return Err(error);
        }
        self.ledger = Some(ledger);
        self.ended.clear();
        Ok(endings::keep(&*store, seen).await?)
    }

    /// Somebody else may decide, at once.
    pub async fn resign(&mut self) {
        if self.led {
            match tokio::time::timeout(SETTLE_TIMEOUT, self.settle()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    let error = ErrorChain(&error);
                    tracing::warn!(%error, "who has ended just now may count as vanished");
                }
                Err(_) => tracing::warn!("who has ended just now may count as vanished"),
            }
        }
        let resigning = self.candidate.resign(&*self.parts.store);
        match tokio::time::timeout(RESIGN_TIMEOUT, resigning).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the lead lapses by itself, in seconds"),
            Err(_) => tracing::warn!("the lead lapses by itself, in seconds"),
        }
    }

    /// Looks once and does what there is to do.
    ///
    /// # Errors
    /// [`LookError`]; nothing is lost by it, the next look begins anew.
    pub async fn look(&mut self) -> Result<Looked, LookError> {
        // 1. Ask everybody, and list who that is.
        let query = self.query.take().or_else(|| self.unordered_query());
        let round = match query {
            Some(nonce) => Some(self.round(nonce).await?),
            None => None,
        };
        // 2. Read the state, last: nothing that was answered is newer.
        let (state, revision) = self.state().await?;
        self.told.tell(&state);
        // Keys that cannot be looked for are in no phase's way: they may be there.
        let (keyless, undestroyed, mut trouble) = self.keys(&state).await;
        let mut seen = Observation {
            made: self.made.clone(),
            signed: self.signed.clone(),
            keyless,
            undestroyed,
            listed: (self.parts.listed)(&state),
            mirrors_current: (self.parts.mirrors_show)(state.seq)
                && round
                    .as_ref()
                    .is_some_and(|round| census::mirrors_behind(&state, round).is_empty()),
            clock_offset_ms: (self.parts.clock_offset_ms)(),
            round,
            state,
            revision: revision.0,
        };
        self.happened(seen.revision, &seen.state);
        self.tidy_evidence(&seen.state).await?;
        self.find_out(&seen).await?;
        // 3. Decide, and say on what.
        let (now, memory) = (self.now(), self.controller.memory().clone());
        let effects = self.controller.handle(now, &seen);
        if self.parts.event_log.wants(&effects) {
            let (timings, effects) = (self.parts.timings, effects.clone());
            let line = Line { timings, now, memory, seen: seen.clone(), effects };
            let added = self.parts.event_log.add(&line).await;
            trouble = trouble.or_else(|| added.err().map(LookError::from));
        }
        if let Some(round) = seen.round.take() {
            self.in_vain = self.in_vain.saturating_add(1).min(IN_VAIN_MAX);
            self.round.send_replace(Some(Arc::new(round)));
        }
        // 4. Do, the write first. A key that cannot be used keeps nothing else from being done.
        let mut changed = false;
        for effect in effects {
            let done = match effect {
                Effect::Persist(persist) => {
                    self.persist(*persist).await?;
                    changed = true;
                    Ok(())
                }
                Effect::Destroy(condemned) => {
                    self.parts.anchors.destroy(&condemned).await.map_err(LookError::from)
                }
                Effect::Generate(label) => self.generate(&seen.state, label).await,
                Effect::Query(nonce) => {
                    self.query = Some(nonce);
                    Ok(())
                }
                Effect::Sign(wanted) => self.sign(&seen.state, wanted).await,
            };
            trouble = trouble.or_else(|| done.err());
        }
        Ok(Looked { changed, state: seen.state, trouble })
    }

    /// Which published anchors have lost their key, which keys are still to be destroyed, and what
    /// kept us from finding out.
    async fn keys(
        &mut self,
        state: &TrustDomainState,
    ) -> (Vec<KeyId>, Vec<Condemned>, Option<LookError>) {
        let anchors = &self.parts.anchors;
        let (keyless, lost) = match anchors.keyless(state).await {
            Ok(keyless) => (keyless, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        for anchor in state.anchors.iter().filter(|anchor| keyless.contains(&anchor.id)) {
            if !self.keyless.contains(&anchor.id) {
                let (anchor, place) = (anchor.id, &anchor.key_ref);
                tracing::warn!(%anchor, place, "the key of this anchor is gone: put it back, or \
                    another anchor takes its place");
            }
        }
        self.keyless.clone_from(&keyless);
        let (undestroyed, unknown) = match anchors.undestroyed(&state.condemned).await {
            Ok(undestroyed) => (undestroyed, None),
            Err(error) => (state.condemned.clone(), Some(error)),
        };
        (keyless, undestroyed, lost.or(unknown).map(LookError::from))
    }

    /// Whether the next query waits for a while. Asking ten thousand and counting their answers is
    /// work: it is done at once when the state has changed, and the less often the more there are
    /// and the longer they have been asked in vain.
    fn rests(&self, revision: Revision) -> bool {
        let seen = self.before.as_ref().is_some_and(|(seen, _)| *seen == revision.0);
        let Some(asked) = self.asked.filter(|_| seen && self.query.is_some()) else { return false };
        let members = self.round.borrow().as_ref().map_or(0, |round| round.listed.len());
        let members = u32::try_from(members).unwrap_or(u32::MAX);
        let rest = REST_PER_MEMBER.saturating_mul(members).saturating_mul(self.in_vain);
        self.parts.clock.since_boot().saturating_sub(asked) < rest
    }

    /// A query that no phase needs: whoever holds what this state has never published shows only
    /// when somebody asks.
    fn unordered_query(&self) -> Option<u64> {
        let boot = self.parts.clock.since_boot();
        let every = if self.halted { ASK_EVERY_HALTED } else { ASK_EVERY };
        let due = self.asked.is_none_or(|asked| boot.saturating_sub(asked) >= every);
        let now_us = self.wall().as_millis().saturating_mul(1000);
        due.then(|| now_us.max(self.newest_nonce.saturating_add(1)))
    }

    /// While the state is halted: what workloads hold, kept for `steadfast trust recover`.
    async fn find_out(&mut self, seen: &Observation) -> Result<(), LookError> {
        let store = Arc::clone(&self.parts.store);
        self.halted = seen.state.halted.is_some();
        if !self.halted {
            // Also what another controller, or the one before a restart, had found.
            if std::mem::take(&mut self.has_findings)
                && let Some(entry) = store.get(FINDINGS_KEY).await?
            {
                store.compare_and_swap(FINDINGS_KEY, Some(entry.revision), None).await?;
            }
            return Ok(());
        }
        if !std::mem::replace(&mut self.has_findings, true)
            && let Some(ledger) = self.ledger.take()
        {
            self.read_again(ledger).await;
        }
        let Some(round) = &seen.round else { return Ok(()) };
        let mut found = Findings::of(&seen.state, round, self.store_time());
        found.revision = seen.revision;
        if let Some((seq, own)) = (self.parts.held)() {
            found.and_own(&seen.state, seq, &own);
        }
        let (anchors, lifetime) = (&self.parts.anchors, self.parts.anchor_lifetime);
        found.and_kept(&seen.state, &anchors.kept().await?);
        let forgotten: Vec<_> = found.forgotten(&seen.state).map(|held| held.id).collect();
        for held in found.anchors.iter_mut().filter(|held| forgotten.contains(&held.id)) {
            // Ours is what we have the key of: a workload's word brings no anchor into a bundle.
            let domain = &seen.state.trust_domain;
            held.record = anchors.made(domain, held.id, self.wall(), lifetime).await?;
        }
        let stored = store.get(FINDINGS_KEY).await?;
        let known = stored.as_ref().and_then(|entry| parse::<Findings>(entry).ok());
        if known.is_some_and(|known| Findings { at: known.at, ..found.clone() } == known) {
            return Ok(());
        }
        tracing::info!(told = found.told, silent = ?found.silent, seq = found.seq,
            "what workloads hold is kept for `steadfast trust recover`");
        let value = serde_json::to_vec(&found);
        let value = value.map_err(|error| LookError::State(FINDINGS_KEY.to_owned(), error))?;
        let expected = stored.map(|entry| entry.revision);
        store.compare_and_swap(FINDINGS_KEY, expected, Some(value.into())).await?;
        Ok(())
    }

    fn now(&self) -> Now {
        Now { wall: self.parts.clock.now(), boot: self.parts.clock.since_boot() }
    }

    /// Our clock, put right by how far it was off the store's at its last reply.
    fn store_time(&self) -> UnixTime {
        let offset = (self.parts.clock_offset_ms)().unwrap_or(0);
        let distance = Duration::from_millis(offset.unsigned_abs());
        if offset < 0 { self.wall() + distance } else { self.wall() - distance }
    }

    fn wall(&self) -> UnixTime {
        self.parts.clock.now()
    }

    /// The state, if it is one that we can work with.
    async fn state(&self) -> Result<(TrustDomainState, Revision), LookError> {
        let entry = self.parts.store.get(TRUST_DOMAIN_KEY).await?;
        let entry = entry.ok_or(LookError::NoTrustDomain)?;
        let state: TrustDomainState = parse(&entry)?;
        // Replicas go by what is stored: a fence that is shorter would be none.
        let (stored, ours) = (state.read_lease, self.parts.timings.lease);
        if stored != ours {
            return Err(LookError::Lease { stored, ours });
        }
        self.parts.anchors.check_places(&state)?;
        Ok((state, entry.revision))
    }

    async fn round(&mut self, nonce: u64) -> Result<Round, LookError> {
        let replicas = self.parts.fleet.ask(nonce).await;
        self.asked = Some(self.parts.clock.since_boot());
        self.newest_nonce = replicas.iter().map(|r| r.newest_nonce).max().unwrap_or(0).max(nonce);
        let (store, namespaces) = (&*self.parts.store, &self.parts.namespaces);
        let mut listed = self.listing.list(store, namespaces).await?;
        let (state, _) = self.state().await?;
        let lives = state.anchors.iter().map(|anchor| anchor.svid_life_max).max();
        let kept = lives.unwrap_or_default() + self.parts.timings.skew;
        let mut ledger = match self.ledger.take() {
            Some(known) => known,
            None => Ledger::read(&*self.parts.store).await?,
        };
        // By the store's clock: by one that is ahead, nobody would owe anything any more. While it is
        // halted, what is known may be of a copy of any age.
        let now = self.store_time();
        let since = if state.halted.is_some() { Some(now) } else { state.recovered_at };
        self.ended.extend((self.parts.ended)().pods);
        ledger.end(&self.ended, now);
        ledger.note(&listed, &replicas, now, since.unwrap_or_default(), kept);
        // Before anybody is counted: a restart must not forget who was counted on.
        if let Err(error) = ledger.write(&*self.parts.store).await {
            // Somebody else has written, or the store was put back: what either knows counts.
            self.read_again(ledger).await;
            return Err(error);
        }
        self.ended.clear();
        let vanished = ledger.vanished(&listed);
        listed.extend(ledger.ended(&listed));
        self.ledger = Some(ledger);
        Ok(Round { nonce, listed, replicas, vanished })
    }

    /// Puts together what is known of instances and what is stored of them.
    async fn read_again(&mut self, mut known: Ledger) {
        if let Ok(mut stored) = Ledger::read(&*self.parts.store).await {
            stored.merge(std::mem::take(&mut known));
            known = stored;
        }
        self.ledger = Some(known);
    }

    async fn persist(&mut self, persist: Persist) -> Result<(), LookError> {
        let Persist { expected, state, change, evidence } = persist;
        // What the state relies on is there before the state says so.
        if let Some(kept) = &evidence {
            evidence::keep(&*self.parts.store, kept).await?;
        }
        let value = serde_json::to_vec(&state);
        let value = value.map_err(|error| LookError::State(TRUST_DOMAIN_KEY.to_owned(), error))?;
        let expected = Some(Revision(expected));
        let store = &self.parts.store;
        let revision =
            store.compare_and_swap(TRUST_DOMAIN_KEY, expected, Some(value.into())).await?;
        self.controller.persisted(self.now(), revision.0);
        let phase = state.rotation.as_ref().map(|rotation| rotation.phase.name());
        tracing::info!(?change, ?phase, halted = ?state.halted, seq = state.seq, revision = revision.0, "state changed");
        Ok(())
    }

    /// One line for each event since the last look.
    fn happened(&mut self, revision: u64, state: &TrustDomainState) {
        if self.before.as_ref().is_some_and(|(before, _)| *before == revision) {
            return;
        }
        self.in_vain = 0;
        let before = self.before.replace((revision, state.clone()));
        for event in before.iter().flat_map(|(_, before)| events::between(before, state)) {
            event.log();
        }
    }

    /// Once after each change of the past, and after a start.
    async fn tidy_evidence(&mut self, state: &TrustDomainState) -> Result<(), LookError> {
        let newest = state.past.last().map_or(0, |past| past.number);
        if self.past == Some(newest) {
            return Ok(());
        }
        match evidence::tidy(&*self.parts.store, state).await {
            // Somebody else has written to it: the next look finds what is left.
            Err(KeepError::Store(StoreError::Conflict { .. })) => return Ok(()),
            Err(KeepError::Store(error)) => return Err(error.into()),
            // It only takes room: no phase waits for that.
            Err(error) => tracing::warn!(error = %ErrorChain(&error), "old evidence stays"),
            Ok(0) => {}
            Ok(deleted) => tracing::info!(deleted, "evidence that nothing names any more is gone"),
        }
        self.past = Some(newest);
        Ok(())
    }

    async fn generate(&mut self, state: &TrustDomainState, label: Label) -> Result<(), LookError> {
        let (now, lifetime) = (self.wall(), self.parts.anchor_lifetime);
        let anchor = self.parts.anchors.make(state, label, now, lifetime).await?;
        self.made = Some(Made { label, anchor });
        Ok(())
    }

    /// Signs what identity has posted for this wish; before that there is nothing to do.
    async fn sign(
        &mut self,
        state: &TrustDomainState,
        wanted: WantedIssuer,
    ) -> Result<(), LookError> {
        if self.signed.as_ref().is_some_and(|signed| signed.wanted == wanted) {
            return Ok(());
        }
        let key = format!("{ISSUER_REQUESTS_PREFIX}{}", wanted.number);
        let Some(entry) = self.parts.store.get(&key).await? else { return Ok(()) };
        let request: IssuerRequest = parse(&entry)?;
        let Some(anchor) = state.anchor(wanted.anchor_id) else { return Ok(()) };
        let (now, lifetime) = (self.wall(), self.parts.timings.issuer_life);
        let anchors = &self.parts.anchors;
        let issuer = anchors.sign(&state.trust_domain, anchor, &request, now, lifetime).await?;
        self.signed = Some(Signed { wanted, issuer });
        Ok(())
    }

    /// Looks for ever: at once after a change, and a few times a second otherwise.
    pub async fn run(&mut self, ready: &Component) -> Infallible {
        loop {
            let looked = self.turn().await;
            let conflict = matches!(&looked, Err(LookError::Store(StoreError::Conflict { .. })));
            let pause = match &looked {
                Ok(looked) if looked.changed => Duration::ZERO,
                // Somebody else was faster: what he wrote is looked at.
                Err(_) if conflict => Duration::ZERO,
                _ => LOOK_EVERY,
            };
            let looked = looked.and_then(|looked| looked.trouble.map_or(Ok(()), Err));
            self.parts.metrics.looked(match &looked {
                Ok(()) => LookResult::Ok,
                Err(_) if conflict => LookResult::Conflict,
                Err(_) => LookResult::Failed,
            });
            match looked {
                Ok(()) => {
                    ready.ready();
                    self.trouble = None;
                }
                Err(_) if conflict => {}
                Err(error) => self.tell_trouble(ErrorChain(&error).to_string(), ready),
            }
            tokio::time::sleep(pause).await;
        }
    }

    fn tell(&mut self, state: &TrustDomainState, leader: Option<String>, trouble: Option<String>) {
        let leads = self.led;
        let Waits { anchor, issuer } = self.controller.waits().clone();
        let standing = Standing {
            state: Some(state.clone()),
            seen_at: self.wall(),
            waiting: leads.then_some(anchor),
            issuer_waiting: leads.then_some(issuer),
            trouble,
            timings: Some(self.parts.timings),
            // Who does not lead looks for no key.
            keyless: if leads { self.keyless.clone() } else { Vec::new() },
            leader,
            leads,
        };
        let offset_ms = (self.parts.clock_offset_ms)();
        let round = self.round.borrow().clone();
        self.parts.metrics.show(&standing, round.as_deref(), offset_ms);
        self.standing.send_replace(standing);
    }

    fn tell_trouble(&mut self, trouble: String, ready: &Component) {
        ready.not_ready(&trouble);
        if self.trouble.as_ref() != Some(&trouble) {
            tracing::warn!(error = trouble, "not all could be done; it is tried again");
            self.standing.send_modify(|standing| standing.trouble = Some(trouble.clone()));
            self.trouble = Some(trouble);
        }
    }
}

fn parse<T: serde::de::DeserializeOwned>(entry: &Entry) -> Result<T, LookError> {
    serde_json::from_slice(&entry.value).map_err(|error| LookError::State(entry.key.clone(), error))
}

/// The API server forgets what has happened some minutes ago.
const SETTLE_EVERY: Duration = Duration::from_secs(30);
const RESIGN_TIMEOUT: Duration = Duration::from_secs(1);
const SETTLE_TIMEOUT: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Ten thousand are left in peace for 1.5 s, then for 3 s, and in the end for 30 s: little, in ten
/// minutes of renewals.
const REST_PER_MEMBER: Duration = Duration::from_micros(150);
const IN_VAIN_MAX: u32 = 20;
/// Everybody is asked so often though no phase waits for it; more often when a person waits.
const ASK_EVERY: Duration = Duration::from_secs(10);
const ASK_EVERY_HALTED: Duration = Duration::from_secs(3);
