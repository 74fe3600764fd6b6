//! The controller of rotations: what is seen goes in, what is to be done comes out.
//!
//! It remembers nothing but its fence. Each time it is told what the store, the replicas and the
//! members are like, and answers with at most one change of the stored state, against the revision
//! that it was shown, and with what else is to be done. A shell persists first; if that fails,
//! nothing else of the same answer is done. So a crash, a pause or a second controller costs time
//! and nothing else.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, UnixTime};

use crate::census::{self, Bounds, Demand, FreeOf, Round, Tally};
use crate::emergency;
use crate::guard::{Fence, Fenced, Settled, loaded};
use crate::issuer::{self, IssuerPhase, IssuerRotation};
use crate::rotation::{
    self, Drained, Generating, Goal, Next, Phase, Preparing, Rotation, Withdrawn,
};
use crate::schedule::Schedule;
use crate::trust_domain::{
    AnchorRecord, AnchorState, Condemned, Exemption, Halt, IssuerRecord, Label, Outcome,
    TrustDomainState, WantedIssuer,
};

/// How long things take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// `Tc`: how long a replica acts on a copy that nobody has confirmed.
    pub lease: Duration,
    /// Clocks may differ by this much.
    pub skew: Duration,
    /// Over how long a drain pulls renewals forward.
    pub renew_window: Duration,
    /// The same when a key is in other hands.
    pub renew_window_urgent: Duration,
    /// How long issuers live.
    pub issuer_life: Duration,
    /// An issuer with less than this left is replaced.
    pub issuer_left_min: Duration,
    /// When anchors are replaced.
    pub schedule: Schedule,
}

/// Both clocks of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Now {
    /// The wall clock.
    pub wall: UnixTime,
    /// Time since boot, sleep included.
    pub boot: Duration,
}

/// What was seen. The round came first, then the state was read: so what members hold was published
/// before, or never by this state.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Observation {
    /// The newest round of queries.
    pub round: Option<Round>,
    /// The stored state.
    pub state: TrustDomainState,
    /// Of the store, when the state was read.
    pub revision: u64,
    /// Our wall clock less the store's, where the store says its time.
    pub clock_offset_ms: Option<i64>,
    /// The anchor that was made for the label asked for: key and certificate are kept, and a test
    /// signature verifies.
    pub made: Option<Made>,
    /// The issuer that was signed as asked.
    pub signed: Option<Signed>,
    /// Whether every mirror of the bundle, read back, shows the published anchors.
    pub mirrors_current: bool,
    /// Keys that are still there though they were to be destroyed.
    pub undestroyed: Vec<Condemned>,
}

/// An anchor that was made.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Made {
    /// What for.
    pub label: Label,
    /// As it is stored; its state is for the controller to say.
    pub anchor: AnchorRecord,
}

/// An issuer that was signed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Signed {
    /// What for.
    pub wanted: WantedIssuer,
    /// As it is stored.
    pub issuer: IssuerRecord,
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Destroy keys: nothing names them any more.
    Destroy(Vec<Condemned>),
    /// Make an anchor: its key, found again by the label, and its certificate.
    Generate(Label),
    /// Write the state, if the store still is at this revision. Always the first effect.
    Persist(Box<Persist>),
    /// Ask everybody for an ack with this nonce.
    Query(u64),
    /// Sign an issuer for the CSR that identity has posted for this wish.
    Sign(WantedIssuer),
}

/// A change of the stored state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Persist {
    /// The revision that the store must still be at.
    pub expected: u64,
    /// What is to be stored.
    pub state: TrustDomainState,
    /// In a few words, for the log.
    pub change: Change,
    /// Who had settled, for the evidence; empty where nobody is asked.
    pub settled: Vec<(String, crate::Instance)>,
}

/// What a change of the state is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// What was condemned is destroyed.
    Destroyed,
    /// A stolen key has changed the plan.
    Emergency,
    /// Exemptions are over.
    Healed,
    /// Nothing is issued until a person has looked.
    Halted,
    /// The rotation of the issuer goes on.
    Issuer,
    /// An issuer was added, or wished for.
    IssuerStored,
    /// The rotation goes on: the phase that was left.
    Left(rotation::PhaseName),
    /// A rotation begins.
    Started,
    /// Something that had expired is forgotten.
    Tidied,
}

/// What is waited for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// Our own clock is off the store's.
    Clock {
        /// By so much.
        offset_ms: i64,
    },
    /// Those who have not settled.
    Census(Tally),
    /// Holders that cannot ack, by name: they read the bundle once and for all, or so often that
    /// they may not have done so yet.
    Consumers(Vec<String>),
    /// The fence.
    Fence {
        /// How much of it is left.
        left: Duration,
    },
    /// Nothing is issued until a person has looked.
    Halted(Halt),
    /// The issuer is not made, or not loaded by these replicas.
    Issuer(Vec<String>),
    /// The new anchor's key.
    Key,
    /// The mirrors of the bundle.
    Mirrors,
    /// Nothing.
    Nothing,
    /// A person has paused it.
    Paused,
    /// An issuer under an external anchor: a person has the request signed that `steadfast issuer
    /// request` prints, and imports the answer.
    Signature {
        /// The anchor.
        anchor: KeyId,
    },
    /// SVIDs of holders that cannot ack.
    Promised {
        /// The last of them ends.
        until: UnixTime,
    },
    /// A first round of answers.
    Round,
    /// The canaries' time, or that of an issuer whose beginning is not past on every clock.
    Until(UnixTime),
}

/// The controller: its timings, and the fence that it has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    timings: Timings,
    fence: Option<Fence>,
    waiting: Wait,
}

/// What one look at things comes to: a change, or what it waits for.
type Step = Result<(Change, Vec<(String, crate::Instance)>), Wait>;

impl Controller {
    /// A controller that has seen nothing.
    pub fn new(timings: Timings) -> Self {
        Self::resume(timings, None)
    }

    /// A controller with the memory of another, to replay what that one decided.
    pub fn resume(timings: Timings, fence: Option<Fence>) -> Self {
        Self { timings, fence, waiting: Wait::Nothing }
    }

    /// What it waited for when it looked last.
    pub fn waiting(&self) -> &Wait {
        &self.waiting
    }

    /// What volatile memory it has: a restart loses it.
    pub fn fence(&self) -> Option<&Fence> {
        self.fence.as_ref()
    }

    /// Our write was acknowledged: its fence begins.
    pub fn persisted(&mut self, now: Now, revision: u64) {
        self.fence = Some(Fence::new(revision, now.boot));
    }

    /// Decides. `now` was read after the state had been. What is dated is dated by the store's
    /// clock, so that two controllers agree about it.
    pub fn handle(&mut self, mut now: Now, seen: &Observation) -> Vec<Effect> {
        let offset = seen.clock_offset_ms.unwrap_or(0);
        let distance = Duration::from_millis(offset.unsigned_abs());
        now.wall = if offset < 0 { now.wall + distance } else { now.wall - distance };
        if self.fence.as_ref().is_none_or(|fence| fence.revision != seen.revision) {
            self.fence = Some(Fence::new(seen.revision, now.boot));
        }
        if let Some(offset_ms) = seen.clock_offset_ms
            && u128::from(offset_ms.unsigned_abs()) > self.timings.skew.as_millis()
        {
            self.waiting = Wait::Clock { offset_ms };
            return Vec::new();
        }
        let mut state = seen.state.clone();
        match self.look(&mut state, now, seen) {
            Ok((change, settled)) => {
                self.waiting = Wait::Nothing;
                let expected = seen.revision;
                vec![Effect::Persist(Box::new(Persist { expected, state, change, settled }))]
            }
            Err(waiting) => {
                self.waiting = waiting;
                self.besides(now, seen)
            }
        }
    }

    /// The first thing that is to be changed, in the order of importance.
    fn look(&self, state: &mut TrustDomainState, now: Now, seen: &Observation) -> Step {
        if let Some(halt) = state.halted {
            return Err(Wait::Halted(halt));
        }
        if let Some(seen_seq) = unknown_bundle(state, seen) {
            state.halted = Some(Halt::Restored { seen_seq });
            return Ok((Change::Halted, Vec::new()));
        }
        if emergency::replan(state, now.wall) {
            return Ok((Change::Emergency, Vec::new()));
        }
        if self.heal(state, now, seen) {
            return Ok((Change::Healed, Vec::new()));
        }
        if store_issuer(state, seen) {
            return Ok((Change::IssuerStored, Vec::new()));
        }
        if state.tidy(now.wall, self.timings.skew) {
            return Ok((Change::Tidied, Vec::new()));
        }
        let condemned = state.condemned.len();
        state.condemned.retain(|key| seen.undestroyed.contains(key));
        if state.condemned.len() != condemned {
            return Ok((Change::Destroyed, Vec::new()));
        }
        let issuer = self.issuer_step(state, now, seen);
        if issuer.is_ok() {
            return issuer;
        }
        match self.rotation_step(state, now, seen) {
            Err(Wait::Nothing) => issuer,
            step => step,
        }
    }

    /// What is done without a change of the state.
    fn besides(&mut self, now: Now, seen: &Observation) -> Vec<Effect> {
        let (state, mut effects) = (&seen.state, Vec::new());
        if !seen.undestroyed.is_empty() {
            effects.push(Effect::Destroy(seen.undestroyed.clone()));
        }
        if let Some(rotation) = &state.rotation
            && matches!(rotation.phase, Phase::Generating(_))
            && !rotation.abort
            && !matches!(rotation.goal, Goal::Successor { next: Next::Given(_), .. })
        {
            effects.push(Effect::Generate(rotation.label()));
        }
        if let Some(wanted) = state.wanted_issuer {
            effects.push(Effect::Sign(wanted));
        }
        let fence_passed = self.fenced(now);
        let fenced = fence_passed.is_some();
        let asks = match &state.rotation {
            Some(rotation) => fenced && !matches!(rotation.phase, Phase::Generating(_)),
            None => state.requested.is_some() || self.starts(state, now).is_some(),
        };
        let asks_issuer = state.issuer_rotation.is_some();
        let asks_exempt = fenced && !state.exemptions.is_empty();
        if (asks || asks_issuer || asks_exempt) && state.halted.is_none() {
            let newest = seen.round.iter().flat_map(|round| &round.replicas);
            let newest = newest.map(|replica| replica.newest_nonce).max().unwrap_or(0);
            let now_us = now.wall.as_millis().saturating_mul(1000);
            if let Some(fence) = &mut self.fence {
                effects.push(Effect::Query(fence.next_query(
                    fence_passed.as_ref(),
                    now_us,
                    newest,
                )));
            }
        }
        effects
    }

    /// Takes exemptions back from those who have settled by what the current phase demands.
    fn heal(&self, state: &mut TrustDomainState, now: Now, seen: &Observation) -> bool {
        if state.exemptions.is_empty() {
            return false;
        }
        // Whoever is asked again must not be one whom the phases before would have waited for.
        let demand = match state.rotation.as_ref().map(|rotation| &rotation.phase) {
            None | Some(Phase::Withdrawn(_)) => WITHDRAWN,
            Some(_) => Demand { unused: false, ..DRAINED },
        };
        let Some(fenced) = self.fenced(now) else { return false };
        let (Some(fence), Some(round)) = (&self.fence, &seen.round) else { return false };
        let Some(floor) = fence.floor(&fenced, round) else { return false };
        let tally = census::tally(state, demand, round, floor, now.wall, self.bounds(state));
        let exempt = state.exemptions.len();
        state.exemptions.retain(|exemption| !tally.healed.contains(&exemption.instance));
        state.exemptions.len() != exempt
    }

    fn rotation_step(&self, state: &mut TrustDomainState, now: Now, seen: &Observation) -> Step {
        match state.rotation.clone() {
            Some(rotation) => self.advance(state, rotation, now, seen),
            None => self.start(state, now, seen),
        }
    }

    /// Phase 0: whether one begins.
    fn start(&self, state: &mut TrustDomainState, now: Now, seen: &Observation) -> Step {
        let Some((by, goal)) = self.starts(state, now) else { return Err(Wait::Nothing) };
        if state.paused {
            return Err(Wait::Paused);
        }
        let (fence, round) = (self.fence.as_ref(), seen.round.as_ref());
        let floor = fence.zip(round).and_then(|(fence, round)| fence.floor_unfenced(round));
        let (_, settled) = self.settled_since(state, BUNDLE_AND_CLOCKS, floor, now, seen)?;
        state.rotations += 1;
        state.requested = None;
        state.rotation = Some(Rotation::begin(state.rotations, by, goal, now.wall));
        Ok((Change::Started, settled))
    }

    /// What there is reason for: a standby before all else.
    fn starts(&self, state: &TrustDomainState, now: Now) -> Option<(String, Goal)> {
        let standby = state.in_state(AnchorState::Standby).next();
        let Some(standby) = standby else {
            return Some((SCHEDULE.to_owned(), Goal::Standby { replaces: None }));
        };
        if let Some(request) = &state.requested {
            let next = request.anchor.map_or(Next::Standby(standby.id), Next::Given);
            let goal = Goal::Successor { next, canary: request.canary.clone() };
            return Some((request.by.clone(), goal));
        }
        // It must live for a period when its turn comes.
        let Timings { lease, skew, schedule, .. } = self.timings;
        if standby.not_after < now.wall + schedule.anchor_period {
            return Some((SCHEDULE.to_owned(), Goal::Standby { replaces: Some(standby.id) }));
        }
        let life = state.anchors.iter().map(|anchor| anchor.svid_life_max).max();
        let slow_path = lease + life.unwrap_or_default() + skew;
        let goal = Goal::Successor { next: Next::Standby(standby.id), canary: None };
        schedule.is_due(state, now.wall, slow_path).then(|| (SCHEDULE.to_owned(), goal))
    }

    /// One phase on, or what is in the way.
    fn advance(
        &self,
        state: &mut TrustDomainState,
        mut rotation: Rotation,
        now: Now,
        seen: &Observation,
    ) -> Step {
        let left = Change::Left(rotation.phase.name());
        if rotation.abort && !rotation.turned_back && turn_back(state, &mut rotation, now.wall) {
            return Ok((left, Vec::new()));
        }
        if state.paused {
            return Err(Wait::Paused);
        }
        let (phase, settled) = match rotation.phase.clone() {
            Phase::Generating(phase) => {
                let staged = phase.stage(state, made(state, &rotation, seen)?);
                rotation.added = Some(staged.added);
                (Some(Phase::Staged(staged)), Vec::new())
            }
            Phase::Staged(phase) => {
                let fenced = self.fence_passed(now)?;
                let (guard, settled) =
                    self.settled_or_cut_off(state, &rotation, BUNDLE_AND_CLOCKS, now, seen)?;
                consumers(state, &rotation, now.wall)?;
                if !seen.mirrors_current {
                    return Err(Wait::Mirrors);
                }
                let added = phase.settle(state, &fenced, guard);
                (after_staged(state, &rotation, added), settled)
            }
            Phase::Preparing(phase) => {
                let urgent = rotation.urgent.is_some();
                let ends_after = self.issuer_ends_after(state, phase.to, now);
                let Some(issuer) = state.issuer_of(phase.to, ends_after) else {
                    return wish(state, phase.to, seen.revision, urgent);
                };
                let loaded = loaded_by(seen, self.old_enough(issuer, now)?, urgent)?;
                match &rotation.goal {
                    Goal::Successor { canary: Some(plan), .. } if !rotation.turned_back => {
                        (Some(Phase::Canary(phase.canary(plan.clone(), loaded))), Vec::new())
                    }
                    _ => {
                        rotation.restart_deadline(now.wall);
                        (
                            Some(Phase::Activated(phase.activate(state, loaded, now.wall))),
                            Vec::new(),
                        )
                    }
                }
            }
            Phase::Canary(phase) => {
                let until = rotation.since + phase.plan.window;
                if now.wall < until {
                    return Err(Wait::Until(until));
                }
                let fenced = self.fence_passed(now)?;
                let (guard, settled) = self.settled(state, BUNDLE_AND_CLOCKS, now, seen)?;
                let activated = phase.activate(state, &fenced, guard, now.wall);
                (Some(Phase::Activated(activated)), settled)
            }
            Phase::Activated(phase) => {
                let fenced = self.fence_passed(now)?;
                let window = match rotation.urgent {
                    Some(_) => self.timings.renew_window_urgent,
                    None => self.timings.renew_window,
                };
                let lease = self.timings.lease;
                let draining = phase.drain(state, &fenced, now.wall, lease, window);
                (Some(Phase::Draining(draining)), Vec::new())
            }
            Phase::Draining(phase) => {
                let (drained, settled) = self.drained(state, &rotation, now, seen)?;
                (Some(Phase::Withdrawn(phase.withdraw(state, drained))), settled)
            }
            Phase::Withdrawn(phase) => {
                let fenced = self.fence_passed(now)?;
                let (guard, settled) = self.settled(state, WITHDRAWN, now, seen)?;
                phase.finish(state, &fenced, guard);
                // The same census was about an anchor that a stolen key has left half staged.
                let staged: Vec<_> = state.in_state(AnchorState::Staged).map(|a| a.id).collect();
                for id in staged {
                    state.set_state(id, AnchorState::Standby);
                }
                (None, settled)
            }
        };
        for exemption in &mut state.exemptions {
            exemption.relied_on = true;
        }
        match phase {
            Some(phase) => {
                rotation.enter(phase, settled.len(), now.wall);
                state.rotation = Some(rotation);
            }
            None => {
                let aborted = rotation.turned_back || rotation.abort;
                let outcome = if aborted { Outcome::Aborted } else { Outcome::Done };
                rotation.enter(Phase::Withdrawn(Withdrawn), settled.len(), now.wall);
                state.end_rotation(rotation, outcome, now.wall);
            }
        }
        Ok((left, settled))
    }

    /// Whether the old anchor may go: asked and answered, or outlived, or at the deadline.
    fn drained(
        &self,
        state: &mut TrustDomainState,
        rotation: &Rotation,
        now: Now,
        seen: &Observation,
    ) -> Result<(Drained, Vec<(String, crate::Instance)>), Wait> {
        let Timings { lease, skew, .. } = self.timings;
        let retiring = || state.in_state(AnchorState::Retiring);
        let promised = state.promised.iter();
        let promised = promised.filter(|promise| retiring().any(|a| a.id == promise.anchor_id));
        let promised = promised.map(|promise| promise.not_after + skew).max();
        let life = retiring().map(|anchor| anchor.svid_life_max).max().unwrap_or_default();
        let outlived = state.activated_at + lease + life + skew;
        let promise_over = promised.is_none_or(|until| now.wall > until);
        if now.wall > outlived && promise_over {
            return Ok((Drained::Expired, Vec::new()));
        }
        let fenced = self.fence_passed(now)?;
        let (guard, settled) = self.settled_or_cut_off(state, rotation, DRAINED, now, seen)?;
        match promised.filter(|_| !promise_over && !past_deadline(rotation, now.wall)) {
            Some(until) => Err(Wait::Promised { until }),
            None => Ok((Drained::Acked(fenced, guard), settled)),
        }
    }

    /// The rotation of the issuer.
    fn issuer_step(&self, state: &mut TrustDomainState, now: Now, seen: &Observation) -> Step {
        let changed = Ok((Change::Issuer, Vec::new()));
        let Some(anchor) = state.active_anchor().map(|anchor| anchor.id) else {
            return Err(Wait::Nothing);
        };
        let Some(mut rotation) = state.issuer_rotation.clone() else {
            let due = state.active_issuer().is_none_or(|issuer| {
                issuer.not_after <= self.issuer_due_before(state, issuer, now)
            });
            if !due {
                return Err(Wait::Nothing);
            }
            state.issuer_rotation = Some(IssuerRotation {
                old: state.active_issuer,
                by: SCHEDULE.to_owned(),
                started: now.wall,
                since: now.wall,
                urgent: None,
                phase: IssuerPhase::Preparing(issuer::Preparing),
            });
            return changed;
        };
        let urgent = rotation.urgent;
        let (phase, settled) = match rotation.phase {
            IssuerPhase::Preparing(_)
                if state.active_issuer != rotation.old && urgent.is_none() =>
            {
                // Another anchor was activated meanwhile, with an issuer of its own.
                state.issuer_rotation = None;
                return changed;
            }
            IssuerPhase::Preparing(phase) => {
                let ends_after = self.issuer_ends_after(state, anchor, now);
                let Some(next) = state.issuer_of(anchor, ends_after) else {
                    return wish(state, anchor, seen.revision, urgent.is_some());
                };
                let next = self.old_enough(next, now)?;
                let activated = phase.activate(state, loaded_by(seen, next, urgent.is_some())?);
                if urgent.is_none() {
                    state.issuer_rotation = None;
                    return changed;
                }
                (IssuerPhase::Activated(activated), Vec::new())
            }
            IssuerPhase::Activated(phase) => {
                let (fenced, window) = (self.fence_passed(now)?, self.timings.renew_window_urgent);
                let deadline = urgent.unwrap_or_default();
                let draining = phase.drain(state, &fenced, now.wall, window, deadline);
                (IssuerPhase::Draining(draining), Vec::new())
            }
            IssuerPhase::Draining(phase) => {
                let fenced = self.fence_passed(now)?;
                let free_of = Some(FreeOf::Issuer(rotation.old));
                let demand = Demand { free_of, ..Demand::default() };
                let late = now.wall >= phase.deadline;
                let (_, settled) = self.settled_or_late(state, demand, late, now, seen)?;
                (IssuerPhase::Denied(phase.deny(state, &fenced, rotation.old)), settled)
            }
            IssuerPhase::Denied(phase) => {
                let fenced = self.fence_passed(now)?;
                let (guard, settled) = self.settled(state, Demand::default(), now, seen)?;
                phase.finish(state, &fenced, guard);
                return Ok((Change::Issuer, settled));
            }
        };
        (rotation.phase, rotation.since) = (phase, now.wall);
        state.issuer_rotation = Some(rotation);
        Ok((Change::Issuer, settled))
    }

    fn fenced(&self, now: Now) -> Option<Fenced> {
        self.fence.as_ref()?.passed(now.boot, self.timings.lease)
    }

    fn fence_passed(&self, now: Now) -> Result<Fenced, Wait> {
        let left = self.fence.as_ref().map(|fence| fence.left(now.boot, self.timings.lease));
        self.fenced(now).ok_or_else(|| Wait::Fence { left: left.unwrap_or(self.timings.lease) })
    }

    /// Everybody has answered as demanded, asked after the fence.
    fn settled(
        &self,
        state: &TrustDomainState,
        demand: Demand,
        now: Now,
        seen: &Observation,
    ) -> SettledBy {
        let fenced = self.fence_passed(now)?;
        let (fence, round) = (self.fence.as_ref(), seen.round.as_ref());
        let floor = fence.zip(round).and_then(|(fence, round)| fence.floor(&fenced, round));
        self.settled_since(state, demand, floor, now, seen)
    }

    fn settled_since(
        &self,
        state: &TrustDomainState,
        demand: Demand,
        floor: Option<u64>,
        now: Now,
        seen: &Observation,
    ) -> SettledBy {
        let (Some(floor), Some(round)) = (floor, &seen.round) else { return Err(Wait::Round) };
        let tally = census::tally(state, demand, round, floor, now.wall, self.bounds(state));
        match tally.guard() {
            Some(guard) => Ok((guard, tally.settled)),
            None => Err(Wait::Census(tally)),
        }
    }

    /// As [`Controller::settled`]; past the deadline, and never before one round of answers, those
    /// who are missing are cut off.
    fn settled_or_cut_off(
        &self,
        state: &mut TrustDomainState,
        rotation: &Rotation,
        demand: Demand,
        now: Now,
        seen: &Observation,
    ) -> SettledBy {
        self.settled_or_late(state, demand, past_deadline(rotation, now.wall), now, seen)
    }

    fn settled_or_late(
        &self,
        state: &mut TrustDomainState,
        demand: Demand,
        late: bool,
        now: Now,
        seen: &Observation,
    ) -> SettledBy {
        match self.settled(state, demand, now, seen) {
            Err(Wait::Census(tally)) if late => {
                for missing in tally.missing {
                    let pod = &missing.instance.pod_uid;
                    state.exemptions.retain(|exemption| exemption.instance.pod_uid != *pod);
                    state.exemptions.push(Exemption {
                        instance: missing.instance,
                        reason: format!("{} had not answered at the deadline", missing.name),
                        by: DEADLINE.to_owned(),
                        relied_on: true,
                    });
                }
                self.settled(state, demand, now, seen)
            }
            settled => settled,
        }
    }

    fn bounds(&self, state: &TrustDomainState) -> Bounds {
        let lives = state.anchors.iter().map(|anchor| anchor.svid_life_max);
        Bounds { skew: self.timings.skew, svid_life_max: lives.max().unwrap_or_default() }
    }

    /// An issuer whose beginning is past on every clock: another CA's may begin when it was signed.
    fn old_enough(&self, issuer: &IssuerRecord, now: Now) -> Result<KeyId, Wait> {
        let from = issuer.not_before + self.timings.skew;
        if now.wall < from { Err(Wait::Until(from)) } else { Ok(issuer.id) }
    }

    /// An issuer is replaced once it ends before this. A person has the whole time to sign one that
    /// is external, and may have given the old one a life of any length.
    fn issuer_due_before(
        &self,
        state: &TrustDomainState,
        issuer: &IssuerRecord,
        now: Now,
    ) -> UnixTime {
        if is_external(state, issuer.anchor_id) {
            let third = issuer.not_after.since(issuer.not_before) / 3;
            return now.wall + self.timings.issuer_left_min.min(third);
        }
        self.issuer_ends_after(state, issuer.anchor_id, now)
    }

    /// An issuer is used only if it ends after this: near the end of its anchor, any end will do.
    fn issuer_ends_after(&self, state: &TrustDomainState, anchor: KeyId, now: Now) -> UnixTime {
        let Timings { skew, issuer_left_min, issuer_life, .. } = self.timings;
        if let Some(anchor) = state.anchor(anchor).filter(|anchor| anchor.is_external()) {
            // It lives as long as its own CA likes: what counts is that its SVIDs can live.
            return now.wall + issuer_left_min.min(anchor.svid_life_max);
        }
        let anchor_ends = state.anchor(anchor).map_or(now.wall, |anchor| anchor.not_after);
        let best = (now.wall + issuer_life).min(anchor_ends - skew);
        (now.wall + issuer_left_min).min(best - issuer_life / 10).max(now.wall)
    }
}

/// Who has settled, as a guard and by name.
type SettledBy = Result<(Settled, Vec<(String, crate::Instance)>), Wait>;

/// Somebody holds a bundle that this state never published.
fn unknown_bundle(state: &TrustDomainState, seen: &Observation) -> Option<u64> {
    let digest = KeyId::from_slice(&state.digest());
    let members = seen.round.iter().flat_map(|round| &round.replicas).flat_map(|r| &r.members);
    let acks = members.filter(|member| member.open).filter_map(|member| member.ack.as_ref());
    let unknown = acks.filter(|ack| {
        ack.seq > state.seq || (ack.seq == state.seq && ack.seq > 0 && ack.digest != digest)
    });
    unknown.map(|ack| ack.seq).max()
}

/// Stores the issuer that was wished for and is signed.
fn store_issuer(state: &mut TrustDomainState, seen: &Observation) -> bool {
    let signed = seen.signed.as_ref().filter(|signed| state.wanted_issuer == Some(signed.wanted));
    let Some(signed) = signed else { return false };
    state.wanted_issuer = None;
    let published = state.anchor(signed.issuer.anchor_id).is_some_and(|a| a.state.published());
    if published && state.issuer(signed.issuer.id).is_none() {
        state.issuers.push(signed.issuer.clone());
    }
    true
}

fn wish(state: &mut TrustDomainState, anchor: KeyId, revision: u64, urgent: bool) -> Step {
    if state.want_issuer(anchor, revision, urgent) {
        return Ok((Change::IssuerStored, Vec::new()));
    }
    match is_external(state, anchor) {
        true => Err(Wait::Signature { anchor }),
        false => Err(Wait::Issuer(Vec::new())),
    }
}

fn is_external(state: &TrustDomainState, anchor: KeyId) -> bool {
    state.anchor(anchor).is_some_and(AnchorRecord::is_external)
}

fn loaded_by(
    seen: &Observation,
    issuer: KeyId,
    urgent: bool,
) -> Result<crate::guard::Loaded, Wait> {
    let Some(round) = &seen.round else { return Err(Wait::Round) };
    loaded(round, issuer, urgent).ok_or_else(|| {
        let without = round.replicas.iter().filter(|r| !r.reached || !r.loaded.contains(&issuer));
        Wait::Issuer(without.map(|replica| replica.name.clone()).collect())
    })
}

/// The new anchor: made for this rotation, or given.
fn made(
    state: &TrustDomainState,
    rotation: &Rotation,
    seen: &Observation,
) -> Result<AnchorRecord, Wait> {
    if let Goal::Successor { next: Next::Given(id), .. } = &rotation.goal {
        return state.anchor(*id).cloned().ok_or(Wait::Key);
    }
    let made = seen.made.as_ref().filter(|made| made.label == rotation.label());
    made.map(|made| made.anchor.clone()).ok_or(Wait::Key)
}

/// Holders that cannot ack must have read the bundle meanwhile.
fn consumers(state: &TrustDomainState, rotation: &Rotation, now: UnixTime) -> Result<(), Wait> {
    let late = past_deadline(rotation, now);
    let behind = state.consumers.iter().filter(|consumer| {
        consumer.refresh.is_none_or(|refresh| now < rotation.since + refresh * REFRESHES)
    });
    let behind: Vec<_> = behind.map(|consumer| consumer.name.clone()).collect();
    if behind.is_empty() || late { Ok(()) } else { Err(Wait::Consumers(behind)) }
}

fn past_deadline(rotation: &Rotation, now: UnixTime) -> bool {
    rotation.deadline.is_some_and(|deadline| now >= deadline)
}

/// What follows when everybody holds the new anchor; `None`: the end.
fn after_staged(state: &mut TrustDomainState, rotation: &Rotation, added: KeyId) -> Option<Phase> {
    match rotation.goal {
        Goal::Successor { next: Next::Added, .. } => {
            Some(Phase::Preparing(Preparing { to: added }))
        }
        Goal::Successor { next: Next::Given(to) | Next::Standby(to), .. } => {
            Some(Phase::Preparing(Preparing { to }))
        }
        Goal::Standby { replaces: Some(old) } if old != added => {
            rotation::withdraw(state, old);
            state.seq += 1;
            Some(Phase::Withdrawn(Withdrawn))
        }
        Goal::Standby { .. } | Goal::Removal => close(state),
    }
}

/// The end, unless an anchor that is gone has not been counted out yet.
fn close(state: &TrustDomainState) -> Option<Phase> {
    let gone = state.in_state(AnchorState::Withdrawn).next().is_some();
    gone.then_some(Phase::Withdrawn(Withdrawn))
}

/// Undoes what can be undone; `false` where nothing can.
fn turn_back(state: &mut TrustDomainState, rotation: &mut Rotation, now: UnixTime) -> bool {
    let phase = match rotation.phase.clone() {
        Phase::Generating(Generating) => {
            if !matches!(rotation.goal, Goal::Successor { next: Next::Given(_), .. }) {
                state.condemned.push(Condemned::MadeFor(rotation.label()));
            }
            close(state)
        }
        // Nothing under it exists.
        Phase::Staged(_) | Phase::Preparing(_) => {
            match (rotation.added, &rotation.goal) {
                (Some(added), Goal::Successor { next: Next::Given(_), .. }) => {
                    state.set_state(added, AnchorState::Generated);
                    // A person would have to have another one signed.
                    if !is_external(state, added) {
                        state.issuers.retain(|issuer| issuer.anchor_id != added);
                    }
                    state.seq += 1;
                }
                (Some(added), _) => state.take_back(added),
                (None, _) => return false,
            }
            close(state)
        }
        Phase::Canary(canary) => {
            rotation.turned_back = true;
            Some(Phase::Activated(canary.turn_back(state, now)))
        }
        Phase::Activated(_) | Phase::Draining(_) => {
            let mut retiring = state.in_state(AnchorState::Retiring);
            let (Some(before), None) = (retiring.next(), retiring.next()) else { return false };
            if rotation.urgent.is_some() || before.taint.is_some() {
                return false;
            }
            let to = before.id;
            rotation.turned_back = true;
            Some(Phase::Preparing(Preparing { to }))
        }
        Phase::Withdrawn(_) => return false,
    };
    match phase {
        Some(phase) => {
            rotation.enter(phase, 0, now);
            state.rotation = Some(rotation.clone());
        }
        None => {
            rotation.enter(Phase::Withdrawn(Withdrawn), 0, now);
            state.end_rotation(rotation.clone(), Outcome::Aborted, now);
        }
    }
    true
}

const BUNDLE_AND_CLOCKS: Demand =
    Demand { clocks: true, free_of: None, unused: false, mounted: false };
const DRAINED: Demand =
    Demand { clocks: true, free_of: Some(FreeOf::Retiring), unused: true, mounted: false };
const WITHDRAWN: Demand =
    Demand { clocks: false, free_of: Some(FreeOf::Retiring), unused: false, mounted: true };
/// Holders that cannot ack are given so many of their own periods.
const REFRESHES: u32 = 4;
const SCHEDULE: &str = "schedule";
const DEADLINE: &str = "deadline";
