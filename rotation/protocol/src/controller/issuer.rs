//! The rotation of an issuer, and the issuer that an anchor needs.

use steadfast_api::{KeyId, UnixTime};

use crate::census::{Demand, FreeOf};
use crate::controller::anchor::SCHEDULE;
use crate::controller::asked::loaded_by;
use crate::controller::{Change, Controller, Now, Observation, Step, Timings, Wait};
use crate::evidence::Asked;
use crate::guard::Loaded;
use crate::issuer::{Again, IssuerPhase};
use crate::recover;
use crate::rotation::Left;
use crate::trust_domain::{AnchorRecord, IssuerRecord, Outcome, TrustDomainState};

impl Controller {
    /// The rotation of the issuer.
    pub(super) fn issuer_step(
        &self,
        state: &mut TrustDomainState,
        now: Now,
        seen: &Observation,
    ) -> Step {
        let changed = Ok((Change::Issuer, None));
        // One that ends sooner than any SVID would signs nothing.
        let active = state.active_anchor();
        let active = active.filter(|active| recover::signs(active, now.wall, self.timings.skew));
        let Some(anchor) = active.map(|anchor| anchor.id) else { return Err(Wait::Nothing) };
        let Some(mut rotation) = state.issuer_rotation.clone() else {
            let due = state.active_issuer().is_none_or(|issuer| {
                issuer.not_after <= self.issuer_due_before(state, issuer, now)
                    || state.denies(issuer.id)
            });
            // Another anchor brings another issuer.
            if !due || seen.keyless.contains(&anchor) {
                return Err(Wait::Nothing);
            }
            state.begin_issuer_rotation(SCHEDULE.to_owned(), None, now.wall);
            return changed;
        };
        let urgent = rotation.urgent;
        let (phase, asked) = match rotation.phase {
            IssuerPhase::Preparing(_)
                if state.active_issuer != rotation.old && urgent.is_none() =>
            {
                // Another anchor was activated meanwhile, with an issuer of its own.
                state.end_issuer_rotation(rotation, Left::default(), Outcome::Overtaken, now.wall);
                return changed;
            }
            IssuerPhase::Preparing(phase) => {
                let ends_after = self.issuer_ends_after(state, anchor, now.wall);
                let Some(next) = state.issuer_of(anchor, ends_after) else {
                    return wish(state, anchor, seen, urgent.is_some());
                };
                let next = self.old_enough(next, now)?;
                let loaded = match state.cannot_issue(now.wall) {
                    true => Loaded { issuer: next },
                    false => loaded_by(seen, next, urgent.is_some())?,
                };
                let activated = phase.activate(state, loaded);
                if urgent.is_none() {
                    state.end_issuer_rotation(rotation, Left::default(), Outcome::Done, now.wall);
                    return changed;
                }
                (Some(IssuerPhase::Activated(activated)), Asked::default())
            }
            IssuerPhase::Activated(phase) => {
                let (fenced, window) = (self.fence_passed(now)?, self.timings.renew_window_urgent);
                let deadline = urgent.unwrap_or_default();
                let draining = phase.drain(state, &fenced, now.wall, window, deadline);
                (Some(IssuerPhase::Draining(draining)), Asked::default())
            }
            IssuerPhase::Draining(phase) => {
                let fenced = self.fence_passed(now)?;
                let free_of = Some(FreeOf::Issuer(rotation.old));
                let demand = Demand { free_of, ..Demand::default() };
                let late = now.wall >= phase.deadline;
                let (_, asked) = self.settled_or_late(state, demand, late, now, seen)?;
                let denied = phase.deny(state, &fenced, rotation.old);
                (Some(IssuerPhase::Denied(denied)), asked)
            }
            IssuerPhase::Denied(_) if rotation.again.is_some() => {
                let again = rotation.again.take();
                state.end_issuer_rotation(rotation, Left::default(), Outcome::Overtaken, now.wall);
                if let Some(Again { by, deadline }) = again {
                    state.begin_issuer_rotation(by, Some(deadline), now.wall);
                }
                return changed;
            }
            IssuerPhase::Denied(phase) => {
                let fenced = self.fence_passed(now)?;
                let (guard, asked) = self.settled(state, Demand::default(), now, seen)?;
                phase.finish(&fenced, guard);
                (None, asked)
            }
        };
        let acked = asked.witnesses.len();
        let step = (rotation.number, rotation.steps.len(), rotation.phase.name());
        let evidence = asked.keep(step, &seen.state, &state.exemptions, now.wall);
        let relied_on = Left { acked, evidence: evidence.as_ref().map(|kept| kept.digest) };
        match phase {
            Some(phase) => {
                rotation.enter(phase, relied_on, now.wall);
                state.issuer_rotation = Some(rotation);
            }
            None => state.end_issuer_rotation(rotation, relied_on, Outcome::Done, now.wall),
        }
        Ok((Change::Issuer, evidence))
    }

    /// An issuer whose beginning is past on every clock: another CA's may begin when it was signed.
    pub(super) fn old_enough(&self, issuer: &IssuerRecord, now: Now) -> Result<KeyId, Wait> {
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
        self.issuer_ends_after(state, issuer.anchor_id, now.wall)
    }

    /// An issuer is used only if it ends after this: near the end of its anchor, any end will do.
    pub(super) fn issuer_ends_after(
        &self,
        state: &TrustDomainState,
        anchor: KeyId,
        now: UnixTime,
    ) -> UnixTime {
        let Timings { skew, issuer_left_min, issuer_life, .. } = self.timings;
        if let Some(anchor) = state.anchor(anchor).filter(|anchor| anchor.is_external()) {
            // It lives as long as its own CA likes: what counts is that its SVIDs can live.
            return now + issuer_left_min.min(anchor.svid_life_max);
        }
        let anchor_ends = state.anchor(anchor).map_or(now, |anchor| anchor.not_after);
        let best = (now + issuer_life).min(anchor_ends - skew);
        (now + issuer_left_min).min(best - issuer_life / 10).max(now)
    }
}

pub(super) fn wish(
    state: &mut TrustDomainState,
    anchor: KeyId,
    seen: &Observation,
    urgent: bool,
) -> Step {
    if seen.keyless.contains(&anchor) {
        return Err(Wait::Key);
    }
    if state.want_issuer(anchor, seen.revision, urgent) {
        return Ok((Change::IssuerStored, None));
    }
    match is_external(state, anchor) {
        true => Err(Wait::Signature { anchor }),
        false => Err(Wait::Issuer { loading: Vec::new(), away: Vec::new() }),
    }
}

pub(super) fn is_external(state: &TrustDomainState, anchor: KeyId) -> bool {
    state.anchor(anchor).is_some_and(AnchorRecord::is_external)
}
