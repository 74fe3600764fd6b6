//! The rotation of an anchor: whether one begins, and whether its phase may be left.

use steadfast_api::{KeyId, UnixTime};

use crate::canary::{self, CanaryStanding, Unproven};
use crate::census;
use crate::controller::asked::{BUNDLE_AND_CLOCKS, DRAINED, loaded_by, past_deadline, withdrawn};
use crate::controller::issuer::{is_external, wish};
use crate::controller::turn_back::turn_back;
use crate::controller::{Change, Controller, Now, Observation, Step, Timings, Wait};
use crate::evidence::Asked;
use crate::guard::Loaded;
use crate::orders::LOST_KEY;
use crate::rotation::{
    self, Activated, Canary, Drained, Generating, Goal, Left, Next, Phase, PhaseName, Preparing,
    Rotation, Withdrawn,
};
use crate::trust_domain::{
    AnchorRecord, AnchorState, CanaryPlan, KUBELET_REFRESH, Outcome, POD_CERTIFICATES,
    TrustDomainState,
};

impl Controller {
    /// Phase 0: whether one begins.
    pub(super) fn start(&self, state: &mut TrustDomainState, now: Now, seen: &Observation) -> Step {
        let Some((by, goal)) = self.starts(state, now, seen) else { return Err(Wait::Nothing) };
        if state.paused {
            return Err(Wait::Paused);
        }
        let (fence, round) = (self.memory.fence.as_ref(), seen.round.as_ref());
        let floor = fence.zip(round).and_then(|(fence, round)| fence.floor_unfenced(round));
        self.settled_since(state, BUNDLE_AND_CLOCKS, floor, now, seen)?;
        state.rotations += 1;
        state.requested = None;
        state.rotation = Some(Rotation::begin(state.rotations, by, goal, now.wall));
        Ok((Change::Started, None))
    }

    /// What there is reason for: a standby before all else.
    pub(super) fn starts(
        &self,
        state: &TrustDomainState,
        now: Now,
        seen: &Observation,
    ) -> Option<(String, Goal)> {
        let keyless = |anchor: &&AnchorRecord| seen.keyless.contains(&anchor.id);
        let standby = || state.in_state(AnchorState::Standby);
        let lost = standby().find(keyless).map(|anchor| anchor.id);
        let Some(standby) = standby().find(|anchor| !keyless(anchor)) else {
            let by = if lost.is_some() { LOST_KEY } else { SCHEDULE };
            return Some((by.to_owned(), Goal::Standby { replaces: lost }));
        };
        if let Some(request) = &state.requested {
            let goal = match request.replaces {
                Some(standby) => Goal::Standby { replaces: Some(standby) },
                None => Goal::Successor {
                    next: request.anchor.map_or(Next::Standby(standby.id), Next::Given),
                    canary: request.canary.clone(),
                },
            };
            return Some((request.by.clone(), goal));
        }
        if state.active_anchor().filter(keyless).is_some() {
            let goal = Goal::Successor { next: Next::Standby(standby.id), canary: None };
            return Some((LOST_KEY.to_owned(), goal));
        }
        if lost.is_some() {
            return Some((LOST_KEY.to_owned(), Goal::Standby { replaces: lost }));
        }
        // It must live for a period when its turn comes.
        let schedule = self.timings.schedule;
        let hour = schedule.window.is_none_or(|window| window.holds(now.wall));
        if hour && standby.not_after < now.wall + schedule.anchor_period {
            return Some((SCHEDULE.to_owned(), Goal::Standby { replaces: Some(standby.id) }));
        }
        let goal = Goal::Successor { next: Next::Standby(standby.id), canary: None };
        schedule
            .is_due(state, now.wall, self.timings.slow_path(state))
            .then(|| (SCHEDULE.to_owned(), goal))
    }

    /// One phase on, or what is in the way.
    pub(super) fn advance(
        &self,
        state: &mut TrustDomainState,
        mut rotation: Rotation,
        now: Now,
        seen: &Observation,
    ) -> Step {
        let left = Change::Left(rotation.phase.name());
        let skew = self.timings.skew;
        if rotation.abort
            && !rotation.turned_back
            && turn_back(state, &mut rotation, now.wall, skew)
        {
            return Ok((left, None));
        }
        if state.paused {
            return Err(Wait::Paused);
        }
        let (phase, asked) = match rotation.phase.clone() {
            Phase::Generating(phase) => {
                let staged = phase.stage(state, made(state, &rotation, seen)?);
                rotation.added = Some(staged.added);
                let next = match rotation.rescue {
                    true => staged.unasked(state),
                    false => Phase::Staged(staged),
                };
                (Some(next), Asked::default())
            }
            Phase::Staged(phase) => {
                let fenced = self.fence_passed(now)?;
                let (guard, asked) =
                    self.settled_or_cut_off(state, &rotation, BUNDLE_AND_CLOCKS, now, seen)?;
                if !past_deadline(&rotation, now.wall) {
                    consumers(state, &rotation, now.wall)?;
                }
                if !seen.mirrors_current {
                    let behind = |round| census::mirrors_behind(state, round);
                    return Err(Wait::Mirrors(seen.round.as_ref().map(behind).unwrap_or_default()));
                }
                let added = phase.settle(state, &fenced, guard);
                (self.after_staged(state, &mut rotation, added, now.wall), asked)
            }
            Phase::Preparing(phase)
                if seen.keyless.contains(&phase.to)
                    && !self.signs(state, phase.to, now.wall, &seen.keyless) =>
            {
                (Some(self.another(state, &mut rotation, now, seen)), Asked::default())
            }
            Phase::Preparing(phase) => {
                let urgent = rotation.urgent.is_some();
                let ends_after = self.issuer_ends_after(state, phase.to, now.wall);
                let Some(issuer) = state.issuer_of(phase.to, ends_after) else {
                    return wish(state, phase.to, seen, urgent);
                };
                let issuer = self.old_enough(issuer, now)?;
                let loaded = match state.cannot_issue(now.wall) {
                    true => Loaded { issuer },
                    false => loaded_by(seen, issuer, urgent)?,
                };
                match &rotation.goal {
                    Goal::Successor { canary: Some(plan), .. } if !rotation.turned_back => (
                        Some(self.canary(state, phase, plan, loaded, now, seen)?),
                        Asked::default(),
                    ),
                    _ => {
                        rotation.restart_deadline(now.wall);
                        (
                            Some(Phase::Activated(phase.activate(state, loaded, now.wall))),
                            Asked::default(),
                        )
                    }
                }
            }
            Phase::Canary(phase) if !self.lasts(state, &phase, now) => {
                let ends_after = self.issuer_ends_after(state, phase.to, now.wall);
                let Some(issuer) = state.issuer_of(phase.to, ends_after) else {
                    return wish(state, phase.to, seen, false);
                };
                let loaded = loaded_by(seen, self.old_enough(issuer, now)?, false)?;
                let again = self.canary(state, phase.again(), &phase.plan, loaded, now, seen)?;
                (Some(again), Asked::default())
            }
            Phase::Canary(phase) => {
                let fenced = self.fence_passed(now)?;
                let Some(round) = &seen.round else { return Err(Wait::Round) };
                loaded_by(seen, phase.issuer, false)?;
                let proven = canary::judge(state, &phase, round, rotation.since, now.wall);
                let proven = proven.map_err(|unproven| match unproven {
                    Unproven::Standing(standing) => Wait::Canary(standing),
                    Unproven::Until(until) => Wait::Until(until),
                })?;
                let (guard, asked) = self.settled(state, BUNDLE_AND_CLOCKS, now, seen)?;
                let activated = phase.activate(state, &fenced, guard, proven, now.wall);
                (Some(Phase::Activated(activated)), asked)
            }
            Phase::Activated(phase) => {
                let fenced = self.fence_passed(now)?;
                let window = match rotation.urgent {
                    Some(_) => self.timings.renew_window_urgent,
                    None => self.timings.renew_window,
                };
                let lease = self.timings.lease;
                let draining = phase.drain(state, &fenced, now.wall, lease, window);
                (Some(Phase::Draining(draining)), Asked::default())
            }
            Phase::Draining(phase) => {
                still_listed(state, &rotation, seen)?;
                let (drained, asked) = self.drained(state, &rotation, now, seen)?;
                (Some(Phase::Withdrawn(phase.withdraw(state, drained))), asked)
            }
            Phase::Withdrawn(phase) => {
                let fenced = self.fence_passed(now)?;
                let staged: Vec<_> = state.in_state(AnchorState::Staged).map(|a| a.id).collect();
                let (guard, asked) = self.settled(state, withdrawn(state), now, seen)?;
                if !staged.is_empty() {
                    consumers(state, &rotation, now.wall)?;
                }
                phase.finish(state, &fenced, guard);
                for id in staged {
                    state.set_state(id, AnchorState::Standby);
                }
                (None, asked)
            }
        };
        // These two are left without anybody's word.
        if !matches!(left, Change::Left(PhaseName::Generating | PhaseName::Activated)) {
            for exemption in &mut state.exemptions {
                exemption.relied_on = true;
            }
        }
        let acked = asked.witnesses.len();
        let step = (rotation.number, rotation.steps.len(), rotation.phase.name());
        let evidence = asked.keep(step, &seen.state, &state.exemptions, now.wall);
        let digest = evidence.as_ref().map(|evidence| evidence.digest);
        let relied_on = Left { acked, evidence: digest };
        match phase {
            Some(phase) => {
                rotation.enter(phase, relied_on, now.wall);
                state.rotation = Some(rotation);
            }
            None => {
                let outcome = if rotation.turned_back { Outcome::Aborted } else { Outcome::Done };
                rotation.enter(Phase::Withdrawn(Withdrawn), relied_on, now.wall);
                state.end_rotation(rotation, outcome, now.wall);
            }
        }
        Ok((left, evidence))
    }

    /// Whether this anchor has an issuer that lasts, or gets one without a person: its key is ours,
    /// and there.
    pub(super) fn signs(
        &self,
        state: &TrustDomainState,
        anchor: KeyId,
        now: UnixTime,
        keyless: &[KeyId],
    ) -> bool {
        let ours = !is_external(state, anchor) && !keyless.contains(&anchor);
        ours || state.issuer_of(anchor, self.issuer_ends_after(state, anchor, now)).is_some()
    }

    /// In the place of one that will never sign: what the rotation has staged, else a fresh one.
    fn another(
        &self,
        state: &TrustDomainState,
        rotation: &mut Rotation,
        now: Now,
        seen: &Observation,
    ) -> Phase {
        if let Goal::Successor { next, .. } = &mut rotation.goal {
            *next = Next::Added;
        }
        let staged = rotation.added.and_then(|added| state.anchor(added)).filter(|anchor| {
            anchor.state == AnchorState::Standby
                && self.signs(state, anchor.id, now.wall, &seen.keyless)
        });
        match staged {
            Some(staged) => Phase::Preparing(Preparing { to: staged.id }),
            None => {
                rotation.attempt += 1;
                Phase::Generating(Generating)
            }
        }
    }

    /// Some go first, if there are any.
    fn canary(
        &self,
        state: &TrustDomainState,
        phase: Preparing,
        plan: &CanaryPlan,
        loaded: Loaded,
        now: Now,
        seen: &Observation,
    ) -> Result<Phase, Wait> {
        let Some(round) = &seen.round else { return Err(Wait::Round) };
        if canary::selected(plan, round).is_empty() {
            return Err(Wait::Canary(CanaryStanding::default()));
        }
        // Before the fence has passed a replica would give them what they have.
        let from = now.wall + self.timings.lease * 2;
        let window = self.timings.renew_window.min(plan.window / 2);
        Ok(Phase::Canary(phase.canary(state, plan.clone(), loaded, from, window)))
    }

    /// Whether the issuer of these canaries lives for as long as one that would be active.
    fn lasts(&self, state: &TrustDomainState, phase: &Canary, now: Now) -> bool {
        let ends_after = self.issuer_ends_after(state, phase.to, now.wall);
        state.issuer(phase.issuer).is_some_and(|issuer| issuer.not_after > ends_after)
    }

    /// What follows when everybody holds the new anchor; `None`: the end.
    fn after_staged(
        &self,
        state: &mut TrustDomainState,
        rotation: &mut Rotation,
        added: KeyId,
        now: UnixTime,
    ) -> Option<Phase> {
        match rotation.goal {
            Goal::Successor { next: Next::Added, .. } => {
                Some(Phase::Preparing(Preparing { to: added }))
            }
            Goal::Successor { next: Next::Given(to) | Next::Standby(to), .. } => {
                Some(Phase::Preparing(Preparing { to }))
            }
            Goal::Standby { replaces: Some(old) }
                if state.may_have_issued(old, now, self.timings.skew) =>
            {
                state.set_state(old, AnchorState::Retiring);
                rotation.goal = Goal::Removal;
                Some(Phase::Activated(Activated))
            }
            Goal::Standby { replaces: Some(old) } if old != added => {
                rotation::withdraw(state, old);
                state.seq += 1;
                Some(Phase::Withdrawn(Withdrawn))
            }
            Goal::Standby { .. } | Goal::Removal => close(state),
        }
    }

    /// Whether the old anchor may go: asked and answered, or outlived, or at the deadline.
    fn drained(
        &self,
        state: &mut TrustDomainState,
        rotation: &Rotation,
        now: Now,
        seen: &Observation,
    ) -> Result<(Drained, Asked), Wait> {
        let Timings { lease, skew, .. } = self.timings;
        let retiring = || state.in_state(AnchorState::Retiring);
        let promised = state.promised.iter();
        let promised = promised.filter(|promise| retiring().any(|a| a.id == promise.anchor_id));
        let promised = promised.map(|promise| promise.not_after + skew).max();
        let life = retiring().map(|anchor| anchor.svid_life_max).max().unwrap_or_default();
        // Nothing outlives its anchor; who says so without a rescue may have a wrong clock.
        let over = rotation.rescue && retiring().all(|anchor| anchor.not_after < now.wall);
        let outlived = match over {
            true => UnixTime::default(),
            false => state.activated_at + lease + life + skew,
        };
        let promise_over = promised.is_none_or(|until| now.wall > until);
        if now.wall > outlived && promise_over {
            return Ok((Drained::Expired, Asked::default()));
        }
        let fenced = self.fence_passed(now)?;
        let (guard, asked) = self.settled_or_cut_off(state, rotation, DRAINED, now, seen)?;
        match promised.filter(|_| !promise_over && !past_deadline(rotation, now.wall)) {
            Some(until) => Err(Wait::Promised { until }),
            None => Ok((Drained::Acked(fenced, guard), asked)),
        }
    }
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
    // After the store was put back, numbers of rotations come again, and what was made for one
    // before may be withdrawn, or stand in the state already.
    let made = seen.made.as_ref().filter(|made| {
        let id = made.anchor.id;
        let spent = state.tombstones.contains(&id) || state.anchor(id).is_some();
        made.label == rotation.label() && !spent
    });
    made.map(|made| made.anchor.clone()).ok_or(Wait::Key)
}

/// What the tool of an operator lists as trusted goes once it lists it no more: until then the way
/// back is open. In an emergency nobody waits for that, nor once a person has turned back.
fn still_listed(
    state: &TrustDomainState,
    rotation: &Rotation,
    seen: &Observation,
) -> Result<(), Wait> {
    if rotation.urgent.is_some() || rotation.rescue || rotation.turned_back {
        return Ok(());
    }
    let retiring = state.in_state(AnchorState::Retiring).filter(|anchor| anchor.taint.is_none());
    let listed = retiring.map(|anchor| anchor.id).filter(|id| seen.listed.contains(id));
    let listed: Vec<_> = listed.collect();
    if listed.is_empty() { Ok(()) } else { Err(Wait::Listed(listed)) }
}

/// Holders that cannot ack must have read the bundle meanwhile.
fn consumers(state: &TrustDomainState, rotation: &Rotation, now: UnixTime) -> Result<(), Wait> {
    let behind = state.consumers.iter().filter(|consumer| {
        consumer.refresh.is_none_or(|refresh| now < rotation.since + refresh * REFRESHES)
    });
    let mut behind: Vec<_> = behind.map(|consumer| consumer.name.clone()).collect();
    let by_kubelets = state.promised.iter().any(|promise| promise.holder == POD_CERTIFICATES);
    if by_kubelets && now < rotation.since + KUBELET_REFRESH * REFRESHES {
        behind.push(POD_CERTIFICATES.to_owned());
    }
    if behind.is_empty() { Ok(()) } else { Err(Wait::Consumers(behind)) }
}

/// The end, unless an anchor that is gone has not been counted out yet.
pub(super) fn close(state: &TrustDomainState) -> Option<Phase> {
    let gone = state.in_state(AnchorState::Withdrawn).next().is_some();
    gone.then_some(Phase::Withdrawn(Withdrawn))
}

/// Holders that cannot ack are given so many of their own periods.
const REFRESHES: u32 = 4;
pub(super) const SCHEDULE: &str = "schedule";
