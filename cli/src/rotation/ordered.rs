//! Which of the rotations is the one that was ordered. Those of anchors and of issuers share their
//! numbers, and the schedule may begin one before it.

use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::PastRotation;

/// A rotation of an anchor that was ordered, or is followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ordered {
    /// The first of this person after this number: the order waits for its turn, and others, of the
    /// schedule, may come before it.
    By { after: u64, by: String },
    /// The first emergency after this number. What was under way before may become it.
    Emergency { after: u64 },
    /// This one: it is under way.
    Number(u64),
}

impl Ordered {
    /// What is under way, or ordered; `None`: nothing is.
    pub(crate) fn in_state(state: &TrustDomainState) -> Option<Self> {
        let under_way = state.rotation.as_ref().map(|rotation| Self::Number(rotation.number));
        under_way.or_else(|| {
            let by = state.requested.as_ref()?.by.clone();
            Some(Self::By { after: state.rotations, by })
        })
    }

    /// Whether this is the one.
    pub(crate) fn is(&self, past: &PastRotation) -> bool {
        self.is_followed(past)
            && match self {
                Self::By { by, .. } => past.by == *by,
                Self::Emergency { .. } => matches!(past.kind.as_str(), "emergency" | "removal"),
                Self::Number(number) => past.number == *number,
            }
    }

    /// How it ended; `None`: it has not, or was taken back before it began.
    pub(crate) fn ended<'a>(&self, state: &'a TrustDomainState) -> Option<&'a PastRotation> {
        state.past.iter().find(|past| self.is(past))
    }

    /// Whether this one is shown on the way: a rotation of an anchor from then on.
    pub(crate) fn is_followed(&self, past: &PastRotation) -> bool {
        let after = match self {
            Self::By { after, .. } | Self::Emergency { after } => *after,
            Self::Number(number) => number.saturating_sub(1),
        };
        past.number > after && past.kind != ISSUER
    }
}

/// The kind of a rotation of an issuer.
pub(crate) const ISSUER: &str = "issuer";

#[cfg(test)]
mod tests {
    use steadfast_api::UnixTime;
    use steadfast_rotation_protocol::trust_domain::{Outcome, Request};

    use super::*;

    /// What has ended, by number, kind and person.
    fn state(past: &[(u64, &str, &str, Outcome)]) -> TrustDomainState {
        let (domain, now) = ("cluster.local".parse().unwrap(), UnixTime::from_secs(1_800_000_000));
        let mut state = steadfast_identity::authority::found(&domain, now).unwrap().state;
        state.past.extend(past.iter().map(|(number, kind, by, outcome)| PastRotation {
            number: *number,
            kind: (*kind).to_owned(),
            by: (*by).to_owned(),
            started: now,
            ended: now,
            outcome: *outcome,
            steps: Vec::new(),
        }));
        state.rotations = past.last().map_or(0, |(number, ..)| *number);
        state
    }

    fn ended(ordered: &Ordered, state: &TrustDomainState) -> Option<u64> {
        ordered.ended(state).map(|past| past.number)
    }

    #[test]
    fn what_an_issuer_or_the_schedule_does_first_is_not_what_was_ordered() {
        let ordered = Ordered::By { after: 4, by: "ann".to_owned() };
        let (done, undone) = (Outcome::Done, Outcome::Aborted);
        let mut past = vec![
            (4, "anchor", "ann", undone),
            (5, "issuer", "ann", Outcome::Overtaken),
            (6, "standby", "schedule", undone),
        ];
        assert_eq!(ended(&ordered, &state(&past)), None);
        past.push((7, "anchor", "ann", done));
        assert_eq!(ended(&ordered, &state(&past)), Some(7));
        let seen: Vec<_> =
            state(&past).past.into_iter().filter(|p| ordered.is_followed(p)).collect();
        let seen: Vec<_> = seen.iter().map(|past| past.number).collect();
        assert_eq!(seen, [6, 7], "the issuer's is no rotation of an anchor");
    }

    #[test]
    fn an_emergency_is_what_it_has_made_of_the_rotation_before_or_one_of_its_own() {
        let ordered = Ordered::Emergency { after: 4 };
        let done = Outcome::Done;
        assert_eq!(ended(&ordered, &state(&[(5, "emergency", "ann", done)])), Some(5));
        let own = [(5, "anchor", "bob", Outcome::Aborted), (6, "removal", "taint", done)];
        assert_eq!(ended(&ordered, &state(&own)), Some(6));
    }

    #[test]
    fn what_is_under_way_goes_before_what_is_ordered() {
        let mut state = state(&[(1, "issuer", "schedule", Outcome::Done)]);
        assert_eq!(Ordered::in_state(&state), None);
        state.requested = Some(Request {
            by: "ann".to_owned(),
            at: UnixTime::from_secs(1_800_000_000),
            anchor: None,
            canary: None,
            replaces: None,
        });
        let ordered = Ordered::By { after: 1, by: "ann".to_owned() };
        assert_eq!(Ordered::in_state(&state), Some(ordered));
    }
}
