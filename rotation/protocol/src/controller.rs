//! The controller of rotations: what is seen goes in, what is to be done comes out.
//!
//! It remembers its fence and the newest state that it saw. Each time it is told what the store, the replicas and the
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

use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, UnixTime};

use self::asked::{DRAINED, withdrawn};
pub use self::decided::{Change, Effect, Persist, Standing, Wait, Waits};
pub use self::seen::{Made, Now, Observation, Signed, Timings};
use crate::census::{self, Demand};
use crate::emergency;
pub use crate::emergency::Remedy;
use crate::evidence::Kept;
use crate::guard::Fence;
use crate::recover;
use crate::rotation::{Goal, Next, Phase};
use crate::trust_domain::{Halt, TrustDomainState, WantedIssuer};

/// The controller: its timings, and what it remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    timings: Timings,
    memory: Memory,
    waits: Waits,
}

/// What a controller remembers between two looks: a restart loses it, and costs time alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Since the newest write.
    pub fence: Option<Fence>,
    /// The newest state there was.
    pub newest: Option<Newest>,
}

/// How new a state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Newest {
    /// Of the store; they ascend.
    pub revision: u64,
    /// When a person last recovered a store that was put back.
    pub recovered_at: Option<UnixTime>,
}

impl Memory {
    /// Whether the store was put back: its revision is before one that was seen, and no person has
    /// recovered it since. It is said again until the state is halted.
    fn compare(&mut self, seen: &Observation) -> bool {
        let now = Newest { revision: seen.revision, recovered_at: seen.state.recovered_at };
        let went_back = self.newest.is_some_and(|newest| {
            now.revision < newest.revision && now.recovered_at <= newest.recovered_at
        });
        if !went_back || seen.state.halted.is_some() {
            self.newest = Some(now);
        }
        went_back
    }
}

/// What one look at things comes to: a change and what it relies on, or what it waits for.
type Step = Result<(Change, Option<Kept>), Wait>;

impl Controller {
    /// A controller that has seen nothing.
    pub fn new(timings: Timings) -> Self {
        Self::resume(timings, Memory::default())
    }

    /// A controller with the memory of another, to replay what that one decided.
    pub fn resume(timings: Timings, memory: Memory) -> Self {
        Self { timings, memory, waits: Waits::default() }
    }

    /// What it waited for when it looked last: for an anchor, else for the issuer.
    pub fn waiting(&self) -> &Wait {
        match &self.waits.anchor {
            Wait::Nothing => &self.waits.issuer,
            anchor => anchor,
        }
    }

    /// The same, by what it is for.
    pub fn waits(&self) -> &Waits {
        &self.waits
    }

    /// What a restart would lose.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What would be done about this anchor if its key were in other hands, for those who plan;
    /// `None`: there is no such anchor. Those in `keyless` have lost their key.
    pub fn remedy(
        &self,
        state: &TrustDomainState,
        anchor: KeyId,
        keyless: &[KeyId],
        now: UnixTime,
    ) -> Option<Remedy> {
        let signs = |state: &TrustDomainState, id| self.signs(state, id, now, keyless);
        let anchor = state.anchor(anchor)?;
        Some(emergency::remedy(state, anchor, now, self.timings.skew, &signs))
    }

    /// Our write was acknowledged: its fence begins.
    pub fn persisted(&mut self, now: Now, revision: u64) {
        self.memory.fence = Some(Fence::new(revision, now.boot));
        if let Some(newest) = &mut self.memory.newest {
            newest.revision = newest.revision.max(revision);
        }
    }

    /// Decides. `now` was read after the state had been. What is dated is dated by the store's
    /// clock, so that two controllers agree about it.
    pub fn handle(&mut self, mut now: Now, seen: &Observation) -> Vec<Effect> {
        let offset = seen.clock_offset_ms.unwrap_or(0);
        let distance = Duration::from_millis(offset.unsigned_abs());
        now.wall = if offset < 0 { now.wall + distance } else { now.wall - distance };
        let went_back = self.memory.compare(seen);
        if self.memory.fence.as_ref().is_none_or(|fence| fence.revision != seen.revision) {
            self.memory.fence = Some(Fence::new(seen.revision, now.boot));
        }
        if let Some(offset_ms) = seen.clock_offset_ms
            && u128::from(offset_ms.unsigned_abs()) > self.timings.skew.as_millis()
        {
            self.waits = Waits::both(Wait::Clock { offset_ms });
            return Vec::new();
        }
        let mut state = seen.state.clone();
        match self.look(&mut state, now, seen, went_back) {
            Ok((change, evidence)) => {
                self.waits = Waits::default();
                let expected = seen.revision;
                vec![Effect::Persist(Box::new(Persist { expected, state, change, evidence }))]
            }
            Err(waits) => {
                self.waits = *waits;
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
    ) -> Result<(Change, Option<Kept>), Box<Waits>> {
        if let Some(halt) = state.halted {
            return Err(Box::new(Waits::both(Wait::Halted(halt))));
        }
        if let Some(seen_seq) = recover::unknown_bundle(state, seen, went_back) {
            state.halted = Some(Halt::Restored { seen_seq });
            return Ok((Change::Halted, None));
        }
        let signs =
            |state: &TrustDomainState, anchor| self.signs(state, anchor, now.wall, &seen.keyless);
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
        let issuer = match self.issuer_step(&mut next, now, seen) {
            Ok(change) => {
                *state = next;
                return Ok(change);
            }
            Err(issuer) => issuer,
        };
        self.rotation_step(state, now, seen).map_err(|anchor| Box::new(Waits { anchor, issuer }))
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
            if let Some(fence) = &mut self.memory.fence {
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
            None | Some(Phase::Withdrawn(_)) => withdrawn(state),
            Some(_) => Demand { unused: false, ..DRAINED },
        };
        let Some(fenced) = self.fenced(now) else { return false };
        let (Some(fence), Some(round)) = (&self.memory.fence, &seen.round) else { return false };
        let Some(floor) = fence.floor(&fenced, round) else { return false };
        let tally = census::tally(state, demand, round, floor, now.wall, self.bounds(state));
        let exempt = state.exemptions.len();
        state.exemptions.retain(|exemption| !tally.healed.contains(&exemption.instance));
        for heard in &tally.heard {
            let mut known = state.exemptions.iter_mut().map(|exemption| &mut exemption.instance);
            if let Some(older) = known.find(|known| known.pod_uid == heard.pod_uid) {
                older.started_at = heard.started_at;
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
