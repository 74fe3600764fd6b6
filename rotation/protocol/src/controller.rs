//! The controller of rotations: what is seen goes in, what is to be done comes out.
//!
//! It remembers nothing but its fence. Each time it is told what the store, the replicas and the
//! members are like, and answers with at most one change of the stored state, against the revision
//! that it was shown, and with what else is to be done. A shell persists first; if that fails,
//! nothing else of the same answer is done. So a crash, a pause or a second controller costs time
//! and nothing else.

mod anchor;
mod asked;
mod decided;
mod issuer;
mod seen;
mod turn_back;

use std::time::Duration;

use self::asked::{DRAINED, WITHDRAWN};
pub use self::decided::{Change, Effect, Persist, Standing, Wait};
pub use self::seen::{Made, Now, Observation, Signed, Timings};
use crate::census::{self, Demand};
use crate::emergency;
use crate::evidence::Kept;
use crate::guard::Fence;
use crate::recover;
use crate::rotation::{Goal, Next, Phase};
use crate::trust_domain::{Halt, TrustDomainState, WantedIssuer};

/// The controller: its timings, and the fence that it has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    timings: Timings,
    fence: Option<Fence>,
    waiting: Wait,
}

/// What one look at things comes to: a change and what it relies on, or what it waits for.
type Step = Result<(Change, Option<Kept>), Wait>;

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
        // Revisions ascend: one before what was seen is of a store that was put back.
        let went_back = self.fence.as_ref().is_some_and(|fence| seen.revision < fence.revision);
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
        match self.look(&mut state, now, seen, went_back) {
            Ok((change, evidence)) => {
                self.waiting = Wait::Nothing;
                let expected = seen.revision;
                vec![Effect::Persist(Box::new(Persist { expected, state, change, evidence }))]
            }
            Err(waiting) => {
                self.waiting = waiting;
                self.besides(now, seen)
            }
        }
    }

    /// The first thing that is to be changed, in the order of importance.
    fn look(
        &self,
        state: &mut TrustDomainState,
        now: Now,
        seen: &Observation,
        went_back: bool,
    ) -> Step {
        if let Some(halt) = state.halted {
            return Err(Wait::Halted(halt));
        }
        if let Some(seen_seq) = recover::unknown_bundle(state, seen, went_back) {
            state.halted = Some(Halt::Restored { seen_seq });
            return Ok((Change::Halted, None));
        }
        let signs = |state: &TrustDomainState, anchor| self.signs(state, anchor, now, seen);
        if emergency::replan(state, now.wall, &self.timings, &signs) {
            return Ok((Change::Emergency, None));
        }
        if self.heal(state, now, seen) {
            return Ok((Change::Healed, None));
        }
        if store_issuer(state, seen) {
            return Ok((Change::IssuerStored, None));
        }
        let keyless = |wanted: &WantedIssuer| seen.keyless.contains(&wanted.anchor_id);
        if state.wanted_issuer.take_if(|wanted| keyless(wanted)).is_some() {
            return Ok((Change::Tidied, None));
        }
        if state.tidy(now.wall, self.timings.skew) {
            return Ok((Change::Tidied, None));
        }
        let condemned = state.condemned.len();
        state.condemned.retain(|key| seen.undestroyed.contains(key));
        if state.condemned.len() != condemned {
            return Ok((Change::Destroyed, None));
        }
        // What a step has changed before it found something in its way is not stored.
        let mut next = state.clone();
        let issuer = self.issuer_step(&mut next, now, seen);
        if issuer.is_ok() {
            *state = next;
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
            // That an issuer is loaded is asked without a fence.
            Some(rotation) => match rotation.phase {
                Phase::Generating(_) => false,
                Phase::Preparing(_) => true,
                _ => fenced,
            },
            None => state.requested.is_some() || self.starts(state, now, seen).is_some(),
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
        for heard in &tally.heard {
            let mut known = state.exemptions.iter_mut().map(|exemption| &mut exemption.instance);
            if let Some(unheard) = known.find(|known| known.pod_uid == heard.pod_uid) {
                unheard.started_at = heard.started_at;
            }
        }
        state.exemptions.len() != exempt || !tally.heard.is_empty()
    }

    fn rotation_step(&self, state: &mut TrustDomainState, now: Now, seen: &Observation) -> Step {
        match state.rotation.clone() {
            Some(rotation) => self.advance(state, rotation, now, seen),
            None => self.start(state, now, seen),
        }
    }
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
