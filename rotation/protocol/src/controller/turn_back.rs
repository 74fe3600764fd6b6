//! The way back.

use steadfast_api::UnixTime;

use crate::controller::anchor::close;
use crate::rotation::{Generating, Goal, Next, Phase, Preparing, Rotation, Withdrawn};
use crate::trust_domain::{AnchorState, Condemned, Outcome, TrustDomainState};

/// Undoes what can be undone; `false` where nothing can.
pub(super) fn turn_back(
    state: &mut TrustDomainState,
    rotation: &mut Rotation,
    now: UnixTime,
) -> bool {
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
                    state.issuers.retain(|issuer| issuer.anchor_id != added);
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
