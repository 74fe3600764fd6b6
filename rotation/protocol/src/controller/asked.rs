//! What was asked and answered: fences, and censuses after them.

use steadfast_api::{KeyId, UnixTime};

use crate::census::{self, Bounds, Demand, FreeOf, Replica};
use crate::controller::{Controller, Now, Observation, Wait};
use crate::evidence::Asked;
use crate::guard::{Fenced, Loaded, Settled, loaded, unloaded};
use crate::rotation::Rotation;
use crate::trust_domain::{AnchorState, DEADLINE, Exemption, TrustDomainState};

/// Who has settled, as a guard and by word.
pub(super) type SettledBy = Result<(Settled, Asked), Wait>;

impl Controller {
    pub(super) fn fenced(&self, now: Now) -> Option<Fenced> {
        self.memory.fence.as_ref()?.passed(now.boot, self.timings.lease)
    }

    pub(super) fn fence_passed(&self, now: Now) -> Result<Fenced, Wait> {
        let left = self.memory.fence.as_ref().map(|fence| fence.left(now.boot, self.timings.lease));
        self.fenced(now).ok_or_else(|| Wait::Fence { left: left.unwrap_or(self.timings.lease) })
    }

    /// Everybody has answered as demanded, asked after the fence.
    pub(super) fn settled(
        &self,
        state: &TrustDomainState,
        demand: Demand,
        now: Now,
        seen: &Observation,
    ) -> SettledBy {
        let fenced = self.fence_passed(now)?;
        let (fence, round) = (self.memory.fence.as_ref(), seen.round.as_ref());
        let floor = fence.zip(round).and_then(|(fence, round)| fence.floor(&fenced, round));
        self.settled_since(state, demand, floor, now, seen)
    }

    pub(super) fn settled_since(
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
            Some(guard) => Ok((guard, Asked { floor, witnesses: tally.settled })),
            None => Err(Wait::Census(tally)),
        }
    }

    /// As [`Controller::settled`]; past the deadline, and never before one round of answers, those
    /// who are missing are cut off.
    pub(super) fn settled_or_cut_off(
        &self,
        state: &mut TrustDomainState,
        rotation: &Rotation,
        demand: Demand,
        now: Now,
        seen: &Observation,
    ) -> SettledBy {
        self.settled_or_late(state, demand, past_deadline(rotation, now.wall), now, seen)
    }

    pub(super) fn settled_or_late(
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
                    state.wait_no_more(Exemption {
                        instance: missing.instance,
                        at: now.wall,
                        name: missing.name,
                        reason: "had not answered at the deadline".to_owned(),
                        by: DEADLINE.to_owned(),
                        relied_on: true,
                    });
                }
                self.settled(state, demand, now, seen)
            }
            settled => settled,
        }
    }

    pub(super) fn bounds(&self, state: &TrustDomainState) -> Bounds {
        let lives = state.anchors.iter().map(|anchor| anchor.svid_life_max);
        Bounds { skew: self.timings.skew, svid_life_max: lives.max().unwrap_or_default() }
    }
}

pub(super) fn loaded_by(seen: &Observation, issuer: KeyId, urgent: bool) -> Result<Loaded, Wait> {
    let Some(round) = &seen.round else { return Err(Wait::Round) };
    let exempt = &seen.state.exemptions;
    loaded(round, exempt, issuer, urgent).ok_or_else(|| {
        let without = unloaded(round, exempt, issuer);
        let (loading, away): (Vec<_>, Vec<_>) = without.partition(|replica| replica.reached);
        // When time presses one is enough: nobody waits for who is away while another loads it.
        let away = if urgent && !loading.is_empty() { Vec::new() } else { away };
        let names = |replicas: Vec<&Replica>| replicas.iter().map(|r| r.name.clone()).collect();
        Wait::Issuer { loading: names(loading), away: names(away) }
    })
}

pub(super) fn past_deadline(rotation: &Rotation, now: UnixTime) -> bool {
    rotation.deadline.is_some_and(|deadline| now >= deadline)
}

pub(super) const BUNDLE_AND_CLOCKS: Demand =
    Demand { clocks: true, free_of: None, unused: false, mounted: false };
pub(super) const DRAINED: Demand =
    Demand { clocks: true, free_of: Some(FreeOf::Retiring), unused: true, mounted: false };
/// That nobody believes what is withdrawn. A stolen key may have left an anchor half staged: then it
/// is the census of that, too.
pub(super) fn withdrawn(state: &TrustDomainState) -> Demand {
    let clocks = state.in_state(AnchorState::Staged).next().is_some();
    Demand { clocks, free_of: Some(FreeOf::Retiring), unused: false, mounted: true }
}
