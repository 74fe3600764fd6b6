//! The rotation of an issuer, and the issuer that an anchor needs.

use steadfast_api::{KeyId, UnixTime};

use crate::census::{Demand, FreeOf};
use crate::controller::anchor::SCHEDULE;
use crate::controller::asked::loaded_by;
use crate::controller::{Change, Controller, Now, Observation, Step, Timings, Wait};
use crate::guard::Loaded;
use crate::issuer::{self, IssuerPhase, IssuerRotation};
use crate::recover;
use crate::trust_domain::TrustDomainState;

impl Controller {
    /// The rotation of the issuer.
    pub(super) fn issuer_step(
        &self,
        state: &mut TrustDomainState,
        now: Now,
        seen: &Observation,
    ) -> Step {
        let changed = Ok((Change::Issuer, Vec::new()));
        // One that ends sooner than any SVID would signs nothing.
        let active = state.active_anchor();
        let active = active.filter(|active| recover::signs(active, now.wall, self.timings.skew));
        let Some(anchor) = active.map(|anchor| anchor.id) else { return Err(Wait::Nothing) };
        let Some(mut rotation) = state.issuer_rotation.clone() else {
            let due = state.active_issuer().is_none_or(|issuer| {
                issuer.not_after <= self.issuer_ends_after(state, anchor, now)
                    || state.denies(issuer.id)
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
                let Some(next) = state.issuer_of(anchor, ends_after).map(|issuer| issuer.id) else {
                    return wish(state, anchor, seen.revision, urgent.is_some());
                };
                let loaded = match state.cannot_issue(now.wall) {
                    true => Loaded { issuer: next },
                    false => loaded_by(seen, next, urgent.is_some())?,
                };
                let activated = phase.activate(state, loaded);
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

    /// An issuer is used only if it ends after this: near the end of its anchor, any end will do.
    pub(super) fn issuer_ends_after(
        &self,
        state: &TrustDomainState,
        anchor: KeyId,
        now: Now,
    ) -> UnixTime {
        let Timings { skew, issuer_left_min, issuer_life, .. } = self.timings;
        let anchor_ends = state.anchor(anchor).map_or(now.wall, |anchor| anchor.not_after);
        let best = (now.wall + issuer_life).min(anchor_ends - skew);
        (now.wall + issuer_left_min).min(best - issuer_life / 10).max(now.wall)
    }
}

pub(super) fn wish(
    state: &mut TrustDomainState,
    anchor: KeyId,
    revision: u64,
    urgent: bool,
) -> Step {
    if state.want_issuer(anchor, revision, urgent) {
        return Ok((Change::IssuerStored, Vec::new()));
    }
    Err(Wait::Issuer(Vec::new()))
}
