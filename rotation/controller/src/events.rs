//! What has happened between two states of a trust domain, one line each.
//!
//! It is told by what is stored, so that an order of a person is told like a step of the
//! controller's, and nothing is told that did not happen.

use std::convert::Infallible;
use std::fmt;

use steadfast_api::KeyId;
use steadfast_platform::kubernetes::DomainEvents;
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::Standing;
use steadfast_rotation_protocol::rotation::{Rotation, Step};
use steadfast_rotation_protocol::trust_domain::{
    Condemned, Exemption, Halt, Outcome, PastRotation,
};
use tokio::sync::watch;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// An anchor's key is, or may be, in other hands.
    AnchorTainted(KeyId),
    /// No census waits for this instance any more, because it had not answered at a deadline.
    CutOff(Exemption),
    /// The issuer that signs is another one.
    IssuerActivated(KeyId),
    /// An exemption begins.
    ExemptionBegun(Exemption),
    /// An exemption is over.
    ExemptionEnded(Exemption),
    /// Nothing is issued until a person has looked.
    Halted(Halt),
    /// A person has looked.
    HaltEnded,
    /// A key is gone for ever.
    KeyDestroyed(Condemned),
    /// Phases wait for a person.
    Paused,
    /// A phase was left.
    PhaseLeft {
        /// Of this rotation.
        rotation: u64,
        /// On what.
        step: Step,
    },
    /// Phases go on.
    Resumed,
    /// A rotation is over.
    RotationEnded {
        /// Its number.
        rotation: u64,
        /// What it was for.
        kind: String,
        /// How it ended.
        outcome: Outcome,
    },
    /// A rotation begins.
    RotationStarted {
        /// Its number.
        rotation: u64,
        /// What it is for.
        kind: &'static str,
        /// Who wanted it.
        by: String,
    },
}

/// What has happened, in the order in which it is told.
pub fn between(before: &TrustDomainState, after: &TrustDomainState) -> Vec<Event> {
    let mut events = Vec::new();
    started(before, after, &mut events);
    let (left, seen) = (steps(after), steps(before));
    events.extend(
        left.into_iter()
            .filter(|step| !seen.contains(step))
            .map(|(rotation, step)| Event::PhaseLeft { rotation, step }),
    );
    let ended =
        after.past.iter().filter(|past| before.past.iter().all(|p| p.number != past.number));
    events.extend(ended.map(|PastRotation { number, kind, outcome, .. }| Event::RotationEnded {
        rotation: *number,
        kind: kind.clone(),
        outcome: *outcome,
    }));
    if before.active_issuer != after.active_issuer {
        events.push(Event::IssuerActivated(after.active_issuer));
    }
    exemptions(before, after, &mut events);
    let destroyed = before.condemned.iter().filter(|key| !after.condemned.contains(key));
    events.extend(destroyed.copied().map(Event::KeyDestroyed));
    let tainted = after.anchors.iter().filter(|anchor| {
        anchor.taint.is_some() && before.anchor(anchor.id).is_none_or(|b| b.taint.is_none())
    });
    events.extend(tainted.map(|anchor| Event::AnchorTainted(anchor.id)));
    match (before.paused, after.paused) {
        (false, true) => events.push(Event::Paused),
        (true, false) => events.push(Event::Resumed),
        _ => {}
    }
    match (before.halted, after.halted) {
        (None, Some(halt)) => events.push(Event::Halted(halt)),
        (Some(_), None) => events.push(Event::HaltEnded),
        _ => {}
    }
    events
}

fn started(before: &TrustDomainState, after: &TrustDomainState, events: &mut Vec<Event>) {
    let number = |rotation: &Option<Rotation>| rotation.as_ref().map(|rotation| rotation.number);
    if let Some(rotation) = &after.rotation
        && number(&before.rotation) != Some(rotation.number)
    {
        let (kind, by) = (rotation.kind(), rotation.by.clone());
        events.push(Event::RotationStarted { rotation: rotation.number, kind, by });
    }
    if let Some(rotation) = &after.issuer_rotation
        && before.issuer_rotation.as_ref().map(|rotation| rotation.number) != Some(rotation.number)
    {
        let (rotation, by) = (rotation.number, rotation.by.clone());
        events.push(Event::RotationStarted { rotation, kind: "issuer", by });
    }
}

fn exemptions(before: &TrustDomainState, after: &TrustDomainState, events: &mut Vec<Event>) {
    let missing = |of: &TrustDomainState, exemption: &Exemption| {
        // By its pod: that a later start is the one that is exempt ends nothing.
        of.exemptions.iter().all(|other| other.instance.pod_uid != exemption.instance.pod_uid)
    };
    for exemption in after.exemptions.iter().filter(|exemption| missing(before, exemption)) {
        events.push(match exemption.is_cut_off() {
            true => Event::CutOff(exemption.clone()),
            false => Event::ExemptionBegun(exemption.clone()),
        });
    }
    let ended = before.exemptions.iter().filter(|exemption| missing(after, exemption));
    events.extend(ended.cloned().map(Event::ExemptionEnded));
}

/// Every step that a state tells of, of rotations under way and of those that are over.
fn steps(state: &TrustDomainState) -> Vec<(u64, Step)> {
    let anchor = state.rotation.iter().map(|rotation| (rotation.number, &rotation.steps));
    let issuer = state.issuer_rotation.iter().map(|rotation| (rotation.number, &rotation.steps));
    let past = state.past.iter().map(|past| (past.number, &past.steps));
    let all = past.chain(anchor).chain(issuer);
    all.flat_map(|(number, steps)| steps.iter().map(move |step| (number, step.clone()))).collect()
}

impl Event {
    /// Its name in the log, which stays the same.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::AnchorTainted(_) => "anchor_tainted",
            Self::CutOff(_) => "member_cut_off",
            Self::IssuerActivated(_) => "issuer_activated",
            Self::ExemptionBegun(_) => "exemption_begun",
            Self::ExemptionEnded(_) => "exemption_ended",
            Self::Halted(_) => "halted",
            Self::HaltEnded => "halt_ended",
            Self::KeyDestroyed(_) => "key_destroyed",
            Self::Paused => "paused",
            Self::PhaseLeft { .. } => "phase_left",
            Self::Resumed => "resumed",
            Self::RotationEnded { .. } => "rotation_ended",
            Self::RotationStarted { .. } => "rotation_started",
        }
    }

    /// In one CamelCase word, as Kubernetes has it.
    pub fn reason(&self) -> String {
        let words = self.name().split('_');
        words.map(|word| word[..1].to_uppercase() + &word[1..]).collect()
    }

    /// Whether somebody should look.
    pub const fn is_warning(&self) -> bool {
        matches!(self, Self::AnchorTainted(_) | Self::CutOff(_) | Self::Halted(_))
    }

    /// One line.
    pub fn log(&self) {
        let code = matches!(self, Self::Halted(_)).then_some(steadfast_api::Code::HALTED);
        match code {
            Some(code) => tracing::warn!(event = self.name(), %code, "{self}"),
            None => tracing::info!(event = self.name(), "{self}"),
        }
    }
}

/// Tells what happens as Events of the API server, for ever, while we lead: also what another tool
/// proposes and is held.
pub async fn publish(
    events: DomainEvents,
    mut standing: watch::Receiver<Standing>,
    mut held: watch::Receiver<Vec<String>>,
) -> Infallible {
    let (mut before, mut known): (Option<TrustDomainState>, Vec<String>) = Default::default();
    loop {
        // The other ends go with the process.
        tokio::select! {
            _ = standing.changed() => {}
            Ok(()) = held.changed() => {}
        }
        let Standing { state, leads, .. } = standing.borrow_and_update().clone();
        let Some(after) = state.filter(|_| leads) else {
            before = None;
            continue;
        };
        let happened = before.iter().flat_map(|before| between(before, &after));
        let mut told: Vec<_> =
            happened.map(|event| (event.is_warning(), event.reason(), event.to_string())).collect();
        let holds = held.borrow_and_update().clone();
        let new = holds.iter().filter(|held| !known.contains(held));
        told.extend(new.map(|held| (true, "ProposalHeld".to_owned(), held.clone())));
        (before, known) = (Some(after), holds);
        for (warning, reason, note) in told {
            if let Err(error) = events.publish(warning, &reason, &note).await {
                tracing::warn!(error = %ErrorChain(&error), reason, "an Event cannot be published");
            }
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnchorTainted(id) => {
                write!(f, "the key of anchor {} is, or may be, in other hands", id.short())
            }
            Self::CutOff(exemption) => {
                write!(f, "{} is cut off: it {}", exemption.shown_name(), exemption.reason)
            }
            Self::IssuerActivated(id) => write!(f, "issuer {} signs from now on", id.short()),
            Self::ExemptionBegun(exemption) => {
                let (name, Exemption { reason, by, .. }) = (exemption.shown_name(), exemption);
                write!(f, "nobody waits for {name} any more, by {by}: {reason}")
            }
            Self::ExemptionEnded(exemption) => {
                write!(f, "{} counts again", exemption.shown_name())
            }
            Self::Halted(Halt::Restored { seen_seq }) => write!(
                f,
                "nothing is issued any more: a workload holds the bundle of seq {seen_seq}, which \
                 this store has never published"
            ),
            Self::HaltEnded => f.write_str("issuing goes on"),
            Self::KeyDestroyed(Condemned::Anchor(id)) => {
                write!(f, "the key of anchor {} is destroyed", id.short())
            }
            Self::KeyDestroyed(Condemned::MadeFor(label)) => {
                write!(f, "the key that rotation {} had made is destroyed", label.rotation)
            }
            Self::Paused => f.write_str("phases wait for a person"),
            Self::PhaseLeft { rotation, step } => {
                write!(f, "rotation {rotation} has left {}", step.phase.label())?;
                match step.acked {
                    0 => Ok(()),
                    acked => write!(f, ", {acked} had settled"),
                }
            }
            Self::Resumed => f.write_str("phases go on"),
            Self::RotationEnded { rotation, kind, outcome } => {
                write!(f, "rotation {rotation} ({kind}) is over: {}", outcome.label())
            }
            Self::RotationStarted { rotation, kind, by } => {
                write!(f, "rotation {rotation} ({kind}) begins, by {by}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use steadfast_api::UnixTime;
    use steadfast_rotation_protocol::Instance;
    use steadfast_rotation_protocol::trust_domain::IssuerRecord;

    use super::*;

    fn state() -> TrustDomainState {
        let issuer = IssuerRecord {
            id: KeyId::of_spki(b"issuer"),
            anchor_id: KeyId::of_spki(b"anchor"),
            der: Vec::new(),
            chain: Vec::new(),
            not_before: UnixTime::default(),
            not_after: UnixTime::default(),
            key_ref: String::new(),
        };
        TrustDomainState::founded("m".parse().unwrap(), Vec::new(), issuer, UnixTime::default())
    }

    fn names(before: &TrustDomainState, after: &TrustDomainState) -> Vec<&'static str> {
        between(before, after).iter().map(Event::name).collect()
    }

    #[test]
    fn a_state_that_is_the_same_tells_nothing() {
        assert!(between(&state(), &state()).is_empty());
    }

    #[test]
    fn each_event_is_told_once_by_its_name() {
        let (before, mut after) = (state(), state());
        after.rotate_issuer("a person".to_owned(), None, UnixTime::default()).unwrap();
        after.pause(true);
        let instance = Instance { pod_uid: "u".to_owned(), started_at: UnixTime::default() };
        let [name, reason, by] = ["demo/web-0", "away", "a person"].map(str::to_owned);
        after.exempt(instance, name, reason, by, UnixTime::default());
        let told = names(&before, &after);
        assert_eq!(told, ["rotation_started", "exemption_begun", "paused"]);
        assert_eq!(between(&before, &after)[1].reason(), "ExemptionBegun");
        assert_eq!(names(&after, &before), ["exemption_ended", "resumed"]);
        let mut newer = after.clone();
        newer.exemptions[0].instance.started_at = UnixTime::from_secs(1);
        assert_eq!(names(&after, &newer), [""; 0], "it is exempt as before");
        let line = between(&before, &after)[1].to_string();
        assert_eq!(line, "nobody waits for demo/web-0 any more, by a person: away");
    }

    #[test]
    fn a_halt_and_a_destroyed_key_are_told() {
        let (mut before, mut after) = (state(), state());
        before.condemned.push(Condemned::Anchor(KeyId::of_spki(b"anchor")));
        after.halted = Some(Halt::Restored { seen_seq: 9 });
        assert_eq!(names(&before, &after), ["key_destroyed", "halted"]);
    }
}
