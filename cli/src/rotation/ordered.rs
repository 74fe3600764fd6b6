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
