//! What can be broken on purpose, to see that the simulation finds it.
//!
//! Each is a shortcut that was, or could have been, taken. None is in the code of the product: it is
//! what the world hides from it, or does in its place.

use bytes::Bytes;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{AnchorState, Condemned};

use crate::world::World;

/// A deliberate defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Mutant {
    /// A replica acts on its copy though its read lease has ended.
    NoLease,
    /// The controller takes no fence.
    NoFence,
    /// A reply that was asked for before an ack is used after it.
    ReplyCrossesAck,
    /// The store takes every write.
    NoCompareAndSwap,
    /// The platform's list has only who has a stream.
    ListOfStreams,
    /// Whoever has vanished is forgotten.
    NoLedger,
    /// A workload takes whatever bundle comes.
    AnyBundle,
    /// A workload believes a bundle that nobody published.
    ForeignBundle,
    /// A replica's SVIDs live as long as asked for, whatever is above them.
    EndlessSvids,
    /// Keys of anchors are destroyed when they are withdrawn.
    HastyDestruction,
    /// An anchor is withdrawn without another to stand in.
    EmptyBundle,
    /// A renewal that fails drops the SVID in use.
    DropsSvid,
    /// The anchor that was staged signs before anybody was asked.
    EagerIssuer,
    /// Two anchors change places in one write.
    Swap,
}

impl World {
    /// What a mutant makes of a write of the state.
    pub(crate) fn bend(&self, value: Option<Bytes>) -> Option<Bytes> {
        let Some(mutant) = self.plan.wanted.mutant else { return value };
        let bend = matches!(
            mutant,
            Mutant::EagerIssuer | Mutant::EmptyBundle | Mutant::HastyDestruction | Mutant::Swap
        );
        if !bend {
            return value;
        }
        let mut state: TrustDomainState = serde_json::from_slice(value.as_ref()?).ok()?;
        let phase = state.rotation.as_ref().map(|rotation| rotation.phase.name());
        match mutant {
            Mutant::EagerIssuer => {
                for anchor in &mut state.anchors {
                    if anchor.state == AnchorState::Staged {
                        anchor.state = AnchorState::Standby;
                    }
                }
            }
            Mutant::EmptyBundle if phase == Some(PhaseName::Withdrawn) => {
                for anchor in &mut state.anchors {
                    anchor.state = AnchorState::Withdrawn;
                }
            }
            Mutant::HastyDestruction => {
                let withdrawn = state.in_state(AnchorState::Withdrawn).map(|anchor| anchor.id);
                let withdrawn: Vec<_> = withdrawn.map(Condemned::Anchor).collect();
                state.condemned.extend(withdrawn);
            }
            Mutant::Swap if phase == Some(PhaseName::Staged) => {
                let standby = state.anchors.iter_mut().find(|a| a.state == AnchorState::Standby);
                if let Some(standby) = standby {
                    standby.state = AnchorState::Withdrawn;
                }
            }
            _ => {}
        }
        serde_json::to_vec(&state).ok().map(Bytes::from)
    }
}
