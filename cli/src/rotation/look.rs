//! One look at the controller: what it waits for, and what keeps it from its work.
//!
//! The controller tells one wait. While a rotation of an anchor is under way, or about to begin, it
//! is that one's: what a rotation of the issuer waits for is then told from the last round of
//! answers, by the same census.

use std::path::Path;

use steadfast_api::UnixTime;
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::census::{Bounds, Demand, FreeOf, Round, tally};
use steadfast_rotation_protocol::controller::{Standing, Timings, Wait};
use steadfast_rotation_protocol::issuer::{IssuerPhase, IssuerRotation};
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, AnchorState, IssuerRecord};

use crate::controller::{Controller, ControllerArg, ControllerError};

/// What the controller said.
#[derive(Debug)]
pub(crate) struct Look {
    standing: Result<Standing, ControllerError>,
    /// Asked for only where the issuer's wait is told from it.
    round: Option<Round>,
}

impl Look {
    /// Asks, knowing this state of the store.
    pub(crate) async fn at(dir: &Path, arg: &ControllerArg, state: &TrustDomainState) -> Self {
        match Controller::find(dir, arg).await {
            Ok((controller, standing)) => {
                let untold = state.issuer_rotation.is_some() && anchors_are_told(state);
                // Who has just ended tells no round: then nobody is named, and the next look does.
                let round = if untold { controller.round().await.ok().flatten() } else { None };
                Self { standing: Ok(standing), round }
            }
            Err(error) => Self { standing: Err(error), round: None },
        }
    }

    /// What the rotation of an anchor waits for, or the order for one.
    pub(crate) fn wait(&self, state: &TrustDomainState) -> Option<&Wait> {
        let standing = self.standing.as_ref().ok()?;
        standing.waiting.as_ref().filter(|_| same_phase(state, standing))
    }

    /// What the rotation of the issuer waits for.
    pub(crate) fn issuer_wait(&self, state: &TrustDomainState, now: UnixTime) -> Option<Wait> {
        if !anchors_are_told(state) {
            return self.wait(state).cloned();
        }
        let timings = self.standing.as_ref().ok()?.timings?;
        let rotation = state.issuer_rotation.as_ref()?;
        Some(from_round(state, rotation, self.round.as_ref(), timings, now))
    }

    /// What keeps everything where it is: nothing is issued, or the controller cannot do its work,
    /// or none answers.
    pub(crate) fn trouble(&self, state: &TrustDomainState) -> Option<String> {
        let trouble = match &self.standing {
            Ok(standing) => standing.trouble.clone(),
            Err(error) => Some(ErrorChain(error).to_string()),
        };
        state.halted.map(super::waiting::halted).or(trouble)
    }
}

/// Whether the controller's wait is that of a rotation of an anchor.
fn anchors_are_told(state: &TrustDomainState) -> bool {
    let standby = state.in_state(AnchorState::Standby).next();
    state.rotation.is_some() || state.requested.is_some() || standby.is_none()
}

/// What the controller waits for is about what the store holds now.
fn same_phase(state: &TrustDomainState, standing: &Standing) -> bool {
    let phase = |state: &TrustDomainState| {
        let rotation = state.rotation.as_ref().map(|r| (r.number, r.phase.name(), r.turned_back));
        (rotation, state.issuer_rotation.as_ref().map(|r| r.phase), state.paused)
    };
    standing.state.as_ref().is_some_and(|seen| phase(seen) == phase(state))
}

fn from_round(
    state: &TrustDomainState,
    rotation: &IssuerRotation,
    round: Option<&Round>,
    timings: Timings,
    now: UnixTime,
) -> Wait {
    if let Some(halt) = state.halted {
        return Wait::Halted(halt);
    }
    // The fence begins anew with each write of the other rotation: it may last longer.
    let left = timings.lease.saturating_sub(now.since(rotation.since));
    let demand = match rotation.phase {
        IssuerPhase::Preparing(_) => return next_issuer(state, rotation, round),
        IssuerPhase::Activated(_) => return Wait::Fence { left },
        IssuerPhase::Draining(_) | IssuerPhase::Denied(_) if !left.is_zero() => {
            return Wait::Fence { left };
        }
        IssuerPhase::Draining(_) => {
            Demand { free_of: Some(FreeOf::Issuer(rotation.old)), ..Demand::default() }
        }
        IssuerPhase::Denied(_) => Demand::default(),
    };
    let Some(round) = round else { return Wait::Round };
    let lives = state.anchors.iter().map(|anchor| anchor.svid_life_max);
    let bounds = Bounds { skew: timings.skew, svid_life_max: lives.max().unwrap_or_default() };
    Wait::Census(tally(state, demand, round, round.nonce, now, bounds))
}

/// The issuer that follows is to be signed, or made, or loaded.
fn next_issuer(state: &TrustDomainState, rotation: &IssuerRotation, round: Option<&Round>) -> Wait {
    let Some(anchor) = state.active_anchor() else { return Wait::Nothing };
    let follows = |issuer: &&IssuerRecord| {
        issuer.anchor_id == anchor.id && issuer.id != rotation.old && !state.denies(issuer.id)
    };
    let next = state.issuers.iter().filter(follows).max_by_key(|issuer| issuer.not_after);
    match (next, round) {
        (None, _) if AnchorRecord::is_external(anchor) => Wait::Signature { anchor: anchor.id },
        (None, _) => Wait::Issuer(Vec::new()),
        (Some(_), None) => Wait::Round,
        (Some(next), Some(round)) => {
            let without =
                round.replicas.iter().filter(|r| !r.reached || !r.loaded.contains(&next.id));
            Wait::Issuer(without.map(|replica| replica.name.clone()).collect())
        }
    }
}
