//! The rotation of a trust anchor: its phases, and how each becomes the next.
//!
//! A phase is a value of its own type that is consumed by what follows, and takes the guards that
//! it needs by value ([`crate::guard`]); nobody outside of this crate can make one. So an illegal
//! transition has no code to write. An emergency and a recovery have transitions of their own. Each changes
//! the stored state once; [`crate::controller`] persists that before anything else happens. The
//! set of anchors changes by adding or by removing, never by both at once.
//!
//! | phase | bundle | what it waits for |
//! |---|---|---|
//! | generating | {A, B} | the new anchor's key and certificate |
//! | staged | {A, B, S} | fence, census: S is held by all |
//! | preparing | | the next anchor's issuer, loaded by every replica |
//! | canary | | some workloads have it for a while, without a failed handshake |
//! | activated | | fence: nobody issues under the old anchor any more |
//! | draining | | fence, census: nobody has an SVID under it; or all have expired |
//! | withdrawn | {B, S} | fence, census: nobody trusts it |

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, UnixTime};

use crate::canary::Proven;
use crate::guard::{Fenced, Loaded, Settled};
use crate::trust_domain::{
    AnchorRecord, AnchorState, CanaryPlan, Condemned, Label, Outcome, PastRotation, RenewOrder,
    TrustDomainState, WantedIssuer,
};

/// A rotation that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rotation {
    /// The how manieth of this trust domain.
    pub number: u64,
    /// Of the making of its anchor.
    pub attempt: u32,
    /// Who wanted it.
    pub by: String,
    /// When it began.
    pub started: UnixTime,
    /// When its phase began.
    pub since: UnixTime,
    /// What it is for.
    pub goal: Goal,
    /// The anchor that it has added, so far.
    pub added: Option<KeyId>,
    /// Set when a key is in other hands: how long those who do not answer are waited for.
    pub urgent: Option<Duration>,
    /// When they are cut off; set anew by each change of the active anchor.
    pub deadline: Option<UnixTime>,
    /// A person wants it undone.
    pub abort: bool,
    /// No SVID is alive, a person has said: nobody is waited for who could not be asked. See
    /// [`crate::recover`].
    #[serde(default)]
    pub rescue: bool,
    /// It is being undone: the anchor from before is active again, or will be.
    pub turned_back: bool,
    /// Where it stands.
    pub phase: Phase,
    /// What it has gone through.
    pub steps: Vec<Step>,
}

/// What a rotation is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// A standby, since there is none, or in the place of one that would age out.
    Standby {
        /// The one that goes.
        replaces: Option<KeyId>,
    },
    /// Another active anchor.
    Successor {
        /// Which.
        next: Next,
        /// Who goes first.
        canary: Option<CanaryPlan>,
    },
    /// One anchor less, because its key is in other hands and it has never issued.
    Removal,
}

/// The anchor that becomes active.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Next {
    /// The one that this rotation adds.
    Added,
    /// One that was given: it stands in the state as `Generated`.
    Given(KeyId),
    /// One that everybody has acked already.
    Standby(KeyId),
}

/// Where a rotation stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The new anchor is being made.
    Generating(Generating),
    /// It is in the bundle.
    Staged(Staged),
    /// The issuer of the next active anchor is being made and loaded.
    Preparing(Preparing),
    /// Some workloads get SVIDs under it.
    Canary(Canary),
    /// All do.
    Activated(Activated),
    /// Their old SVIDs are replaced.
    Draining(Draining),
    /// The old anchor is out of the bundle.
    Withdrawn(Withdrawn),
}

/// A phase that was left.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Step {
    /// Which.
    pub phase: PhaseName,
    /// When it was left.
    pub at: UnixTime,
    /// How many had settled; 0 where nobody is asked.
    pub acked: usize,
    /// SHA-256 of the evidence: who had settled.
    pub evidence: Option<KeyId>,
}

/// On what a phase was left; nothing where nobody is asked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Left {
    pub(crate) acked: usize,
    pub(crate) evidence: Option<KeyId>,
}

impl Left {
    pub(crate) fn step(self, phase: PhaseName, at: UnixTime) -> Step {
        Step { phase, at, acked: self.acked, evidence: self.evidence }
    }
}

/// The name of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // They are those of [`Phase`], in the order in which they come.
pub enum PhaseName {
    Generating,
    Staged,
    Preparing,
    Canary,
    Activated,
    Draining,
    Withdrawn,
    /// Of the rotation of an issuer alone ([`crate::issuer::IssuerPhase`]).
    Denied,
}

impl PhaseName {
    /// In one word, for labels.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Generating => "generating",
            Self::Staged => "staged",
            Self::Preparing => "preparing",
            Self::Canary => "canary",
            Self::Activated => "activated",
            Self::Draining => "draining",
            Self::Withdrawn => "withdrawn",
            Self::Denied => "denied",
        }
    }
}

/// See [`Phase::Generating`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Generating;

/// See [`Phase::Staged`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Staged {
    /// The anchor that was added.
    pub added: KeyId,
}

/// See [`Phase::Preparing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Preparing {
    /// The anchor that becomes active.
    pub to: KeyId,
}

/// See [`Phase::Canary`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Canary {
    /// The anchor that becomes active.
    pub to: KeyId,
    /// Its issuer.
    pub issuer: KeyId,
    /// Who gets SVIDs of it, and for how long.
    pub plan: CanaryPlan,
    /// The order to them to renew early.
    #[serde(default)]
    pub renew: Option<RenewOrder>,
}

/// See [`Phase::Activated`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Activated;

/// See [`Phase::Draining`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Draining;

/// See [`Phase::Withdrawn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Withdrawn;

impl Generating {
    /// Puts the new anchor into the bundle.
    pub(crate) fn stage(self, domain: &mut TrustDomainState, made: AnchorRecord) -> Staged {
        let added = made.id;
        domain.anchors.retain(|anchor| anchor.id != added);
        domain.anchors.push(AnchorRecord { state: AnchorState::Staged, ..made });
        domain.seq += 1;
        Staged { added }
    }
}

impl Staged {
    /// Everybody holds it.
    pub(crate) fn settle(self, domain: &mut TrustDomainState, _: &Fenced, _: Settled) -> KeyId {
        domain.set_state(self.added, AnchorState::Standby);
        self.added
    }
}

impl Staged {
    /// Nobody has an SVID, so nobody is asked whether he holds it.
    pub(crate) fn unasked(self, domain: &mut TrustDomainState) -> Phase {
        domain.set_state(self.added, AnchorState::Standby);
        Phase::Preparing(Preparing { to: self.added })
    }
}

impl Preparing {
    /// The next anchor becomes the active one, and its issuer signs.
    pub(crate) fn activate(
        self,
        domain: &mut TrustDomainState,
        loaded: Loaded,
        now: UnixTime,
    ) -> Activated {
        switch(domain, self.to, loaded.issuer, now)
    }

    /// Some workloads go first: they renew from `from` on, over a part of their window.
    pub(crate) fn canary(
        self,
        domain: &TrustDomainState,
        plan: CanaryPlan,
        loaded: Loaded,
        from: UnixTime,
        window: Duration,
    ) -> Canary {
        let last = domain.renew.map_or(0, |order| order.id);
        let renew = RenewOrder { id: from.as_millis().max(last + 1), from, window };
        Canary { to: self.to, issuer: loaded.issuer, plan, renew: Some(renew) }
    }
}

impl Canary {
    /// As for them, so for all.
    pub(crate) fn activate(
        self,
        domain: &mut TrustDomainState,
        _: &Fenced,
        _: Settled,
        _: Proven,
        now: UnixTime,
    ) -> Activated {
        switch(domain, self.to, self.issuer, now)
    }

    /// Their issuer ends before they have proved anything: they go first once more, with another.
    pub(crate) fn again(&self) -> Preparing {
        Preparing { to: self.to }
    }

    /// They have SVIDs under it, so it is drained like any other.
    pub(crate) fn turn_back(self, domain: &mut TrustDomainState, now: UnixTime) -> Activated {
        domain.set_state(self.to, AnchorState::Retiring);
        domain.activated_at = now;
        Activated
    }
}

impl Activated {
    /// Nobody issues under the old anchor any more: renewals are pulled forward.
    ///
    /// `w` was stamped before its write, which may have taken any time; what is certain is that it
    /// had been done when the fence began.
    pub(crate) fn drain(
        self,
        domain: &mut TrustDomainState,
        _: &Fenced,
        now: UnixTime,
        lease: Duration,
        window: Duration,
    ) -> Draining {
        domain.activated_at = domain.activated_at.max(now - lease);
        domain.pull_forward(now, window);
        Draining
    }
}

impl Draining {
    /// Nobody has an SVID under it: it leaves the bundle, for ever.
    pub(crate) fn withdraw(self, domain: &mut TrustDomainState, _: Drained) -> Withdrawn {
        let retiring: Vec<_> = domain.in_state(AnchorState::Retiring).map(|a| a.id).collect();
        for id in retiring {
            withdraw(domain, id);
        }
        domain.seq += 1;
        Withdrawn
    }
}

impl Withdrawn {
    /// Nobody trusts it: its key is destroyed.
    pub(crate) fn finish(self, domain: &mut TrustDomainState, _: &Fenced, _: Settled) {
        let gone: Vec<_> = domain.in_state(AnchorState::Withdrawn).map(|a| a.id).collect();
        // An external key is its owner's to destroy.
        let ours = gone.iter().filter(|id| domain.anchor(**id).is_some_and(|a| !a.is_external()));
        let ours: Vec<_> = ours.map(|id| Condemned::Anchor(*id)).collect();
        domain.condemned.extend(ours);
        domain.anchors.retain(|anchor| !gone.contains(&anchor.id));
        domain.issuers.retain(|issuer| !gone.contains(&issuer.anchor_id));
        domain.promised.retain(|promise| !gone.contains(&promise.anchor_id));
        // Everybody holds what is published.
        domain.unsettled.clear();
    }
}

/// Why an anchor may go: no SVID under it is valid, by one of these.
#[derive(Debug)]
pub(crate) enum Drained {
    /// Everybody said so, asked after the fence.
    Acked(#[allow(dead_code)] Fenced, #[allow(dead_code)] Settled),
    /// All that there were have expired.
    Expired,
}

fn switch(domain: &mut TrustDomainState, to: KeyId, issuer: KeyId, now: UnixTime) -> Activated {
    for anchor in &mut domain.anchors {
        if anchor.state == AnchorState::Active {
            anchor.state = AnchorState::Retiring;
        }
    }
    domain.set_state(to, AnchorState::Active);
    domain.active_issuer = issuer;
    domain.activated_at = now;
    Activated
}

/// Takes an anchor out of the bundle; the caller raises seq, once for all that go.
pub(crate) fn withdraw(domain: &mut TrustDomainState, id: KeyId) {
    domain.set_state(id, AnchorState::Withdrawn);
    domain.unsettled.retain(|unsettled| *unsettled != id);
    if !domain.tombstones.contains(&id) {
        domain.tombstones.push(id);
    }
}

impl TrustDomainState {
    pub(crate) fn set_state(&mut self, id: KeyId, state: AnchorState) {
        for anchor in self.anchors.iter_mut().filter(|anchor| anchor.id == id) {
            anchor.state = state;
        }
    }

    /// Every workload is to renew once, from now on.
    pub(crate) fn pull_forward(&mut self, now: UnixTime, window: Duration) {
        let last = self.renew.map_or(0, |order| order.id);
        self.renew = Some(RenewOrder { id: now.as_millis().max(last + 1), from: now, window });
    }

    /// Takes an anchor back that has never issued, with its issuers.
    pub(crate) fn take_back(&mut self, id: KeyId) {
        if self.anchor(id).is_some_and(|anchor| anchor.state.published()) {
            self.seq += 1;
        }
        if self.anchor(id).is_none_or(|anchor| !anchor.is_external()) {
            self.condemned.push(Condemned::Anchor(id));
        }
        self.anchors.retain(|anchor| anchor.id != id);
        self.issuers.retain(|issuer| issuer.anchor_id != id);
        self.wanted_issuer = self.wanted_issuer.filter(|wanted| wanted.anchor_id != id);
    }

    /// Asks identity for an issuer under this anchor, unless it has been asked already.
    /// One wish at a time, but for an urgent one; and one more for each external anchor.
    pub(crate) fn want_issuer(&mut self, anchor_id: KeyId, revision: u64, urgent: bool) -> bool {
        if self.anchor(anchor_id).is_some_and(AnchorRecord::is_external) {
            let asked = self.wanted_external.iter().any(|wanted| wanted.anchor_id == anchor_id);
            if !asked {
                self.wanted_external.push(WantedIssuer { anchor_id, number: revision });
            }
            return !asked;
        }
        let wanted = self.wanted_issuer;
        if wanted.is_some_and(|wanted| wanted.anchor_id == anchor_id || !urgent) {
            return false;
        }
        self.wanted_issuer = Some(WantedIssuer { anchor_id, number: revision });
        true
    }

    /// The rotation is over.
    pub(crate) fn end_rotation(&mut self, rotation: Rotation, outcome: Outcome, now: UnixTime) {
        self.remember(PastRotation {
            number: rotation.number,
            kind: rotation.kind().to_owned(),
            by: rotation.by,
            started: rotation.started,
            ended: now,
            outcome,
            steps: rotation.steps,
        });
        self.rotation = None;
    }

    /// The newest of each kind are kept: issuers are many, and anchors are what is asked about years
    /// later.
    pub(crate) fn remember(&mut self, past: PastRotation) {
        let alike = |other: &PastRotation| other.kind == past.kind;
        if self.past.iter().filter(|other| alike(other)).count() >= PAST_OF_KIND_MAX
            && let Some(oldest) = self.past.iter().position(alike)
        {
            self.past.remove(oldest);
        }
        self.past.push(past);
    }
}

impl Rotation {
    /// Whether there is a way back from where it stands.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn leads_back(&self, domain: &TrustDomainState) -> Result<(), &'static str> {
        let retiring: Vec<_> = domain.in_state(AnchorState::Retiring).collect();
        if let Phase::Withdrawn(_) = self.phase {
            return Err(WITHDRAWN);
        }
        if self.urgent.is_some() || retiring.iter().any(|anchor| anchor.taint.is_some()) {
            return Err(IN_OTHER_HANDS);
        }
        let there_is = match self.phase {
            Phase::Staged(_) | Phase::Preparing(_) => self.added.is_some(),
            Phase::Activated(_) | Phase::Draining(_) => {
                // One that only a recovery has published is not held by all.
                let held = matches!(&retiring[..], [before] if domain.acked(before.id));
                held && self.goal != Goal::Removal
            }
            Phase::Generating(_) | Phase::Canary(_) | Phase::Withdrawn(_) => true,
        };
        there_is.then_some(()).ok_or(MENDS)
    }

    /// A rotation that begins now.
    pub(crate) fn begin(number: u64, by: String, goal: Goal, now: UnixTime) -> Self {
        Self {
            number,
            attempt: 1,
            by,
            started: now,
            since: now,
            goal,
            added: None,
            urgent: None,
            deadline: None,
            abort: false,
            rescue: false,
            turned_back: false,
            phase: Phase::Generating(Generating),
            steps: Vec::new(),
        }
    }

    /// By what the key of its anchor is found again.
    pub fn label(&self) -> Label {
        Label { rotation: self.number, attempt: self.attempt }
    }

    /// The canaries, while they are the only ones.
    pub fn canary(&self) -> Option<&Canary> {
        match &self.phase {
            Phase::Canary(canary) => Some(canary),
            _ => None,
        }
    }

    /// Whether this anchor has been given to it as the next active one.
    pub fn aims_at(&self, id: KeyId) -> bool {
        matches!(&self.goal, Goal::Successor { next: Next::Given(given), .. } if *given == id)
    }

    /// The anchor that becomes active by it; `None`: none does, or it is not made yet.
    pub fn next_anchor(&self) -> Option<KeyId> {
        match self.goal {
            Goal::Successor { next: Next::Given(id) | Next::Standby(id), .. } => Some(id),
            Goal::Successor { next: Next::Added, .. } => self.added,
            Goal::Standby { .. } | Goal::Removal => None,
        }
    }

    /// What it is for, in a word.
    pub fn kind(&self) -> &'static str {
        match (&self.goal, self.urgent) {
            (_, Some(_)) => "emergency",
            (Goal::Standby { .. }, None) => "standby",
            (Goal::Successor { .. }, None) => "anchor",
            (Goal::Removal, None) => "removal",
        }
    }

    /// Leaves a phase for the next.
    pub(crate) fn enter(&mut self, phase: Phase, left: Left, now: UnixTime) {
        self.steps.push(left.step(self.phase.name(), now));
        self.phase = phase;
        self.since = now;
    }

    /// A change of the active anchor gives everybody the whole time once more.
    pub(crate) fn restart_deadline(&mut self, now: UnixTime) {
        self.deadline = self.urgent.map(|urgent| now + urgent);
    }
}

impl Phase {
    /// Its name.
    pub const fn name(&self) -> PhaseName {
        match self {
            Self::Generating(_) => PhaseName::Generating,
            Self::Staged(_) => PhaseName::Staged,
            Self::Preparing(_) => PhaseName::Preparing,
            Self::Canary(_) => PhaseName::Canary,
            Self::Activated(_) => PhaseName::Activated,
            Self::Draining(_) => PhaseName::Draining,
            Self::Withdrawn(_) => PhaseName::Withdrawn,
        }
    }
}

const WITHDRAWN: &str =
    "the old anchor is withdrawn, for ever: the way back is a new rotation, to a new key";
const IN_OTHER_HANDS: &str =
    "the old anchor's key is in other hands: it must go, and nothing leads back to it";
const MENDS: &str = "it mends what was broken: there is nothing good to go back to";
/// Of finished rotations kept in the state, and the evidence of these beside it.
const PAST_OF_KIND_MAX: usize = 16;
