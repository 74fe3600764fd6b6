//! The way back.

use std::time::Duration;

use steadfast_api::UnixTime;

use crate::controller::anchor::close;
use crate::controller::issuer::is_external;
use crate::rotation::{Generating, Goal, Left, Next, Phase, Preparing, Rotation, Withdrawn};
use crate::trust_domain::{AnchorState, Condemned, Outcome, TrustDomainState};

/// Undoes what can be undone; `false` where nothing can.
pub(super) fn turn_back(
    state: &mut TrustDomainState,
    rotation: &mut Rotation,
    now: UnixTime,
    skew: Duration,
) -> bool {
    if rotation.leads_back(state).is_err() {
        return false;
    }
    let phase = match rotation.phase.clone() {
        Phase::Generating(Generating) => {
            if !matches!(rotation.goal, Goal::Successor { next: Next::Given(_), .. }) {
                state.condemned.push(Condemned::MadeFor(rotation.label()));
            }
            close(state)
        }
        // Only the way on, until it is drained, leads back from what was active before the store
        // was put back.
        Phase::Staged(_) | Phase::Preparing(_)
            if rotation.added.is_some_and(|added| state.may_have_issued(added, now, skew)) =>
        {
            return false;
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
        Phase::Canary(canary) => Some(Phase::Activated(canary.turn_back(state, now))),
        Phase::Activated(_) | Phase::Draining(_) => {
            let Some(before) = state.in_state(AnchorState::Retiring).next() else { return false };
            Some(Phase::Preparing(Preparing { to: before.id }))
        }
        Phase::Withdrawn(_) => return false,
    };
    rotation.turned_back = true;
    match phase {
        Some(phase) => {
            rotation.enter(phase, Left::default(), now);
            state.rotation = Some(rotation.clone());
        }
        None => {
            rotation.enter(Phase::Withdrawn(Withdrawn), Left::default(), now);
            state.end_rotation(rotation.clone(), Outcome::Aborted, now);
        }
    }
    true
}
