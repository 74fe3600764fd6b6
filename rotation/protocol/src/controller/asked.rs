//! What was asked and answered: fences, and censuses after them.

use steadfast_api::{KeyId, UnixTime};

use crate::census::{self, Bounds, Demand, FreeOf};
use crate::controller::{Controller, Now, Observation, Wait};
use crate::evidence::Asked;
use crate::guard::{Fenced, Loaded, Settled, loaded};
use crate::rotation::Rotation;
use crate::trust_domain::{DEADLINE, Exemption, TrustDomainState};

/// Who has settled, as a guard and by word.
pub(super) type SettledBy = Result<(Settled, Asked), Wait>;

impl Controller {
    pub(super) fn fenced(&self, now: Now) -> Option<Fenced> {
        self.fence.as_ref()?.passed(now.boot, self.timings.lease)
    }

    pub(super) fn fence_passed(&self, now: Now) -> Result<Fenced, Wait> {
        let left = self.fence.as_ref().map(|fence| fence.left(now.boot, self.timings.lease));
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
        let (fence, round) = (self.fence.as_ref(), seen.round.as_ref());
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
                    let pod = &missing.instance.pod_uid;
                    state.exemptions.retain(|exemption| exemption.instance.pod_uid != *pod);
                    state.exemptions.push(Exemption {
                        instance: missing.instance,
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
        let without = round.replicas.iter().filter(|r| !r.reached || !r.loaded.contains(&issuer));
        Wait::Issuer(without.map(|replica| replica.name.clone()).collect())
    })
}

pub(super) fn past_deadline(rotation: &Rotation, now: UnixTime) -> bool {
    rotation.deadline.is_some_and(|deadline| now >= deadline)
}

pub(super) const BUNDLE_AND_CLOCKS: Demand =
    Demand { clocks: true, free_of: None, unused: false, mounted: false };
pub(super) const DRAINED: Demand =
    Demand { clocks: true, free_of: Some(FreeOf::Retiring), unused: true, mounted: false };
pub(super) const WITHDRAWN: Demand =
    Demand { clocks: false, free_of: Some(FreeOf::Retiring), unused: false, mounted: true };
