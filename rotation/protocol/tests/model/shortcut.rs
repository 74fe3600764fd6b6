//! The shortcuts that were shown to break a rotation, each as one bent link between the controller
//! and the world, or in the world itself. The controller is the real one throughout.

use std::time::Duration;

use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::census::{Ack, Member, Round};
use steadfast_rotation_protocol::controller::{Controller, Memory, Observation, Timings};
use steadfast_rotation_protocol::rotation::Phase;
use steadfast_rotation_protocol::trust_domain::AnchorState;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shortcut {
    AbortByDropping,
    AckedByPhase,
    AcksFromBeforeTheFence,
    /// A bundle is taken from whoever offers one.
    BundleOfAnybody,
    CensusBeforeTheFenceAtDrain,
    CensusBeforeTheFenceAtStaging,
    CensusBeforeTheFenceAtTheEnd,
    ClocksAreNoMatter,
    CompareRotationAndPhase,
    DeadlineInsideTheFence,
    ExemptionEndsWithTheRotation,
    FailingCanariesAreNoMatter,
    IssuerOutlivesItsAnchor,
    MirrorIsTakenForCurrent,
    /// It is believed in what is known to be withdrawn.
    MountedFileUnfiltered,
    MountedFilesAreNoMatter,
    NoLease,
    NoSkewMargin,
    ReplyCrossesAck,
    /// Nobody remembers how new a state was.
    RevisionsAreNotCompared,
    SvidOutlivesItsIssuer,
    SwapWithoutOverlap,
    TimedWaits,
    UnknownExcuses,
    UnloadedIsTakenForLoaded,
    VanishedIsReleasedAtItsLastAck,
    WatermarkOfAnEarlierActivation,
}

impl Shortcut {
    /// What the controller is shown in the place of what there is.
    pub(crate) fn bend_sight(self, seen: &mut Observation) {
        match self {
            Self::AckedByPhase => {
                let staging = matches!(
                    seen.state.rotation.as_ref().map(|rotation| &rotation.phase),
                    Some(Phase::Staged(_))
                );
                for anchor in seen.state.anchors.iter_mut().filter(|_| !staging) {
                    if anchor.state == AnchorState::Staged {
                        anchor.state = AnchorState::Standby;
                    }
                }
            }
            Self::AcksFromBeforeTheFence => answered_all(seen, |_| {}),
            Self::ClocksAreNoMatter => acks(seen, |ack| ack.clock_offset_ms = 0),
            Self::MirrorIsTakenForCurrent => seen.mirrors_current = true,
            Self::MountedFilesAreNoMatter => acks(seen, |ack| ack.mounted = None),
            Self::UnloadedIsTakenForLoaded => {
                let issuers: Vec<_> = seen.state.issuers.iter().map(|issuer| issuer.id).collect();
                let replicas = seen.round.iter_mut().flat_map(|round| &mut round.replicas);
                replicas.for_each(|replica| replica.loaded = issuers.clone());
            }
            Self::FailingCanariesAreNoMatter => {
                let Some(round) = &mut seen.round else { return };
                let members = round.replicas.iter_mut().flat_map(|replica| &mut replica.members);
                members.flat_map(|member| &mut member.issuers).for_each(|used| used.failed = None);
            }
            Self::TimedWaits => {
                let (seq, digest) = (seen.state.seq, seen.state.digest());
                answered_all(seen, |member| {
                    member.open = true;
                    if let Some(ack) = &mut member.ack {
                        ack.seq = seq;
                        ack.digest = steadfast_api::KeyId::from_slice(&digest);
                        ack.svid = None;
                    }
                });
            }
            Self::UnknownExcuses => {
                if let Some(round) = &mut seen.round {
                    let known: Vec<_> =
                        members(round).map(|m| m.instance.pod_uid.clone()).collect();
                    round.listed.retain(|listed| known.contains(&listed.pod_uid));
                }
            }
            Self::VanishedIsReleasedAtItsLastAck => {
                let now = steadfast_api::UnixTime::from_millis(crate::world::NOW * 1000);
                let Some(round) = &mut seen.round else { return };
                let listed: Vec<_> = round.listed.iter().map(|l| l.pod_uid.clone()).collect();
                for replica in &mut round.replicas {
                    replica.members.retain(|member| {
                        let svid = member.ack.as_ref().and_then(|ack| ack.svid);
                        listed.contains(&member.instance.pod_uid)
                            || svid.is_some_and(|svid| svid.not_after >= now)
                    });
                }
            }
            _ => {}
        }
    }

    /// Takes a fence for passed that has not.
    pub(crate) fn bend_fence(
        self,
        controller: &mut Controller,
        seen: &Observation,
        timings: Timings,
    ) {
        let rotation = seen.state.rotation.as_ref();
        let applies = rotation.is_some_and(|rotation| match (self, &rotation.phase) {
            (Self::CensusBeforeTheFenceAtStaging, Phase::Staged(_))
            | (Self::CensusBeforeTheFenceAtTheEnd, Phase::Withdrawn(_))
            | (Self::CensusBeforeTheFenceAtDrain, Phase::Activated(_) | Phase::Draining(_)) => true,
            (Self::DeadlineInsideTheFence, Phase::Activated(_) | Phase::Draining(_)) => {
                rotation.deadline.is_some()
            }
            _ => false,
        });
        let Some(fence) = controller.memory().fence.as_ref().filter(|_| applies) else { return };
        let mut fence = fence.clone();
        fence.since = fence.since.saturating_sub(timings.lease).max(Duration::from_millis(1));
        *controller = Controller::resume(timings, Memory { fence: Some(fence), newest: None });
    }

    /// What is stored in the place of what the controller decided.
    pub(crate) fn bend_write(self, before: &TrustDomainState, state: &mut TrustDomainState) {
        let turned_back = |state: &TrustDomainState| {
            state.rotation.as_ref().is_some_and(|rotation| rotation.turned_back)
        };
        match self {
            Self::AbortByDropping if turned_back(state) && !turned_back(before) => {
                let active = state.active_anchor().map(|anchor| anchor.id);
                let Some(retiring) = state.in_state(AnchorState::Retiring).next().map(|a| a.id)
                else {
                    return;
                };
                for anchor in &mut state.anchors {
                    if Some(anchor.id) == active {
                        anchor.state = AnchorState::Withdrawn;
                    } else if anchor.id == retiring {
                        anchor.state = AnchorState::Active;
                    }
                }
                state.tombstones.extend(active);
                state.seq += 1;
                let issuer = state.issuers.iter().find(|issuer| issuer.anchor_id == retiring);
                state.active_issuer = issuer.map_or(state.active_issuer, |issuer| issuer.id);
                // No code outside of the protocol can make a phase; a stored state can.
                let withdrawn = serde_json::from_str(r#"{"withdrawn":null}"#);
                if let (Some(rotation), Ok(withdrawn)) = (&mut state.rotation, withdrawn) {
                    rotation.phase = withdrawn;
                }
            }
            Self::ExemptionEndsWithTheRotation if state.rotation.is_none() => {
                state.exemptions.clear()
            }
            Self::SwapWithoutOverlap => {
                let staged = |state: &TrustDomainState| state.in_state(AnchorState::Staged).count();
                if staged(state) > staged(before) {
                    state.anchors.retain(|anchor| anchor.state == AnchorState::Staged);
                }
            }
            Self::WatermarkOfAnEarlierActivation if turned_back(state) => {
                state.activated_at = before.activated_at;
            }
            _ => {}
        }
    }
}

/// Shows every ack as if it had answered the newest query twice.
fn answered_all(seen: &mut Observation, bend: impl Fn(&mut Member)) {
    let Some(round) = &mut seen.round else { return };
    let nonce = round.nonce;
    for replica in &mut round.replicas {
        for member in &mut replica.members {
            (member.answered, member.answered_before) = (nonce, nonce);
            bend(member);
        }
    }
}

/// Shows every ack bent.
fn acks(seen: &mut Observation, bend: impl Fn(&mut Ack)) {
    let replicas = seen.round.iter_mut().flat_map(|round| &mut round.replicas);
    let members = replicas.flat_map(|replica| &mut replica.members);
    members.filter_map(|member| member.ack.as_mut()).for_each(bend);
}

fn members(round: &Round) -> impl Iterator<Item = &Member> {
    round.replicas.iter().flat_map(|replica| &replica.members)
}
