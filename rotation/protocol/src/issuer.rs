//! The rotation of an issuer under its anchor.
//!
//! A planned one needs no census: the new issuer is made early, loaded by every replica, and then
//! signs. When an issuer's key is stolen, everybody renews at once, and then the old issuer is
//! denied: by the bundle, so with a sequence number of its own.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, UnixTime};

use crate::guard::{Fenced, Loaded, Settled};
use crate::rotation::{Left, PhaseName, Step};
use crate::trust_domain::{
    AnchorState, DeniedIssuer, IssuerRecord, Outcome, PastRotation, TrustDomainState,
};

/// A rotation of the issuer that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IssuerRotation {
    /// The how manieth rotation of this trust domain, those of anchors included; 0: it began under
    /// a version that did not count it.
    #[serde(default)]
    pub number: u64,
    /// The issuer that signs no more when it is over.
    pub old: KeyId,
    /// Who wanted it.
    pub by: String,
    /// When it began.
    pub started: UnixTime,
    /// When its phase began.
    pub since: UnixTime,
    /// Set when the key is in other hands: how long those who do not answer are waited for.
    pub urgent: Option<Duration>,
    /// Where it stands.
    pub phase: IssuerPhase,
    /// What it has gone through.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// The key of the issuer that it has made active is in other hands, too: the next rotation,
    /// which begins as soon as this one has denied the old issuer.
    #[serde(default)]
    pub again: Option<Again>,
    /// The issuer that is to sign, where one was named.
    #[serde(default)]
    pub to: Option<KeyId>,
}

/// An emergency that waits for the one that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Again {
    /// Who wants it.
    pub by: String,
    /// How long those who do not answer are waited for.
    pub deadline: Duration,
}

/// Where a rotation of the issuer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IssuerPhase {
    /// The new one is being made and loaded.
    Preparing(Preparing),
    /// It signs, on every replica once the fence has passed. A planned rotation is over here.
    Activated(Activated),
    /// SVIDs of the stolen one are replaced.
    Draining(Draining),
    /// The stolen one is refused.
    Denied(Denied),
}

/// See [`IssuerPhase::Preparing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Preparing;

/// See [`IssuerPhase::Activated`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Activated;

/// See [`IssuerPhase::Draining`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Draining {
    /// When those who have not answered are cut off.
    pub deadline: UnixTime,
}

/// See [`IssuerPhase::Denied`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Denied;

impl Preparing {
    pub(crate) fn activate(self, domain: &mut TrustDomainState, loaded: Loaded) -> Activated {
        domain.active_issuer = loaded.issuer;
        Activated
    }
}

impl Activated {
    pub(crate) fn drain(
        self,
        domain: &mut TrustDomainState,
        _: &Fenced,
        now: UnixTime,
        window: Duration,
        deadline: Duration,
    ) -> Draining {
        domain.pull_forward(now, window);
        Draining { deadline: now + deadline }
    }
}

impl Draining {
    /// Nobody has an SVID of it any more, or time is up: the fence has passed either way.
    pub(crate) fn deny(self, domain: &mut TrustDomainState, _: &Fenced, old: KeyId) -> Denied {
        let until = domain.issuer(old).map_or(self.deadline, |issuer| issuer.not_after);
        domain.denied_issuers.push(DeniedIssuer { id: old, until });
        domain.seq += 1;
        Denied
    }
}

impl Denied {
    /// Everybody refuses it.
    pub(crate) fn finish(self, _: &Fenced, _: Settled) {}
}

impl IssuerPhase {
    /// Its name.
    pub const fn name(&self) -> PhaseName {
        match self {
            Self::Preparing(_) => PhaseName::Preparing,
            Self::Activated(_) => PhaseName::Activated,
            Self::Draining(_) => PhaseName::Draining,
            Self::Denied(_) => PhaseName::Denied,
        }
    }
}

impl IssuerRotation {
    /// Leaves a phase for the next.
    pub(crate) fn enter(&mut self, phase: IssuerPhase, left: Left, now: UnixTime) {
        self.steps.push(left.step(self.phase.name(), now));
        (self.phase, self.since) = (phase, now);
    }
}

impl TrustDomainState {
    /// The active issuer is to be replaced.
    pub(crate) fn begin_issuer_rotation(
        &mut self,
        by: String,
        urgent: Option<Duration>,
        now: UnixTime,
    ) {
        self.rotations += 1;
        self.issuer_rotation = Some(IssuerRotation {
            number: self.rotations,
            old: self.active_issuer,
            by,
            started: now,
            since: now,
            urgent,
            phase: IssuerPhase::Preparing(Preparing),
            steps: Vec::new(),
            again: None,
            to: None,
        });
    }

    /// It is over: its last phase was left on this.
    pub(crate) fn end_issuer_rotation(
        &mut self,
        mut rotation: IssuerRotation,
        left: Left,
        outcome: Outcome,
        now: UnixTime,
    ) {
        rotation.enter(rotation.phase, left, now);
        self.remember(PastRotation {
            number: rotation.number,
            kind: "issuer".to_owned(),
            by: rotation.by,
            started: rotation.started,
            ended: now,
            outcome,
            steps: rotation.steps,
        });
        self.issuer_rotation = None;
    }

    /// The issuer that an anchor's SVIDs are signed by, or would be: the one that lives longest.
    /// One that a rotation is getting rid of is none, nor is one whose key is gone; one that a
    /// rotation was ordered to is it.
    pub(crate) fn issuer_of(&self, anchor: KeyId, ends_after: UnixTime) -> Option<&IssuerRecord> {
        let rotation = self.issuer_rotation.as_ref();
        let old = rotation.map(|rotation| rotation.old);
        let good = self.issuers.iter().filter(|issuer| {
            issuer.anchor_id == anchor
                && issuer.not_after > ends_after
                && Some(issuer.id) != old
                && !self.denies(issuer.id)
                && !self.lost_issuers.contains(&issuer.id)
        });
        let to = rotation.and_then(|rotation| rotation.to);
        good.max_by_key(|issuer| (Some(issuer.id) == to, issuer.not_after, issuer.id))
    }

    /// Forgets what has expired, or has become of no use; `false` if nothing has. A denied issuer
    /// that is forgotten changes what is published.
    pub(crate) fn tidy(&mut self, now: UnixTime, skew: Duration) -> bool {
        let lengths = |state: &Self| {
            let wanted = state.wanted_external.len();
            (state.issuers.len(), state.denied_issuers.len(), state.promised.len(), wanted)
        };
        let (before, denied) = (lengths(self), self.denied_issuers.len());
        let active = self.active_issuer;
        self.denied_issuers.retain(|denied| now <= denied.until + skew);
        self.issuers.retain(|issuer| issuer.id == active || now <= issuer.not_after + skew);
        self.promised.retain(|promise| now <= promise.not_after + skew);
        if self.denied_issuers.len() != denied {
            self.seq += 1;
        }
        // Nobody signs for an anchor that is gone, or whose key is in other hands.
        let useful: Vec<_> = self
            .anchors
            .iter()
            .filter(|anchor| {
                anchor.is_external()
                    && anchor.state != AnchorState::Withdrawn
                    && anchor.taint.is_none()
            })
            .map(|anchor| anchor.id)
            .collect();
        self.wanted_external.retain(|wanted| useful.contains(&wanted.anchor_id));
        before != lengths(self)
    }
}
