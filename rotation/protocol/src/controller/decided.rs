//! What comes out of a decision.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, UnixTime};

use crate::canary::CanaryStanding;
use crate::census::Tally;
use crate::controller::Timings;
use crate::evidence::Kept;
use crate::rotation;
use crate::trust_domain::{Condemned, Halt, Label, TrustDomainState, WantedIssuer};

/// Something to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Destroy keys: nothing names them any more.
    Destroy(Vec<Condemned>),
    /// Make an anchor: its key, found again by the label, and its certificate.
    Generate(Label),
    /// Write the state, if the store still is at this revision. Always the first effect.
    Persist(Box<Persist>),
    /// Ask everybody for an ack with this nonce.
    Query(u64),
    /// Sign an issuer for the CSR that identity has posted for this wish.
    Sign(WantedIssuer),
}

/// A change of the stored state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Persist {
    /// The revision that the store must still be at.
    pub expected: u64,
    /// What is to be stored.
    pub state: TrustDomainState,
    /// In a few words, for the log.
    pub change: Change,
    /// What the state relies on and names by its SHA-256: to be kept before the state is written.
    pub evidence: Option<Kept>,
}

/// What a change of the state is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// What was condemned is destroyed.
    Destroyed,
    /// A stolen key has changed the plan.
    Emergency,
    /// Exemptions are over.
    Healed,
    /// Nothing is issued until a person has looked.
    Halted,
    /// The rotation of the issuer goes on.
    Issuer,
    /// An issuer was added, or wished for.
    IssuerStored,
    /// The rotation goes on: the phase that was left.
    Left(rotation::PhaseName),
    /// A rotation begins.
    Started,
    /// Something that had expired is forgotten.
    Tidied,
}

/// What is waited for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// Our own clock is off the store's.
    Clock {
        /// By so much.
        offset_ms: i64,
    },
    /// The canaries: there are none, or they have not shown yet that they do well, or fail.
    Canary(CanaryStanding),
    /// Those who have not settled.
    Census(Tally),
    /// Holders that cannot ack, by name: they read the bundle once and for all, or so often that
    /// they may not have done so yet.
    Consumers(Vec<String>),
    /// The fence.
    Fence {
        /// How much of it is left.
        left: Duration,
    },
    /// Nothing is issued until a person has looked.
    Halted(Halt),
    /// The issuer is not loaded by these replicas; none of either: it is not made.
    Issuer {
        /// They can be reached, and load it.
        loading: Vec<String>,
        /// They cannot be reached, and somebody must see to them.
        away: Vec<String>,
    },
    /// The new anchor's key.
    Key,
    /// The tool of an operator still lists these anchors as trusted.
    Listed(Vec<KeyId>),
    /// The mirrors of the bundle: these, by name, are behind, as far as it is known whose they are.
    Mirrors(Vec<String>),
    /// Nothing.
    #[default]
    Nothing,
    /// A person has paused it.
    Paused,
    /// An issuer under an external anchor: a person has the request signed that `steadfast issuer
    /// request` prints, and imports the answer.
    Signature {
        /// The anchor.
        anchor: KeyId,
    },
    /// SVIDs of holders that cannot ack.
    Promised {
        /// The last of them ends.
        until: UnixTime,
    },
    /// A first round of answers.
    Round,
    /// The canaries' time, or that of an issuer whose beginning is not past on every clock.
    Until(UnixTime),
}

impl Wait {
    /// In one word, for labels; [`Wait::LABELS`] are all of them.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Clock { .. } => "clock",
            Self::Canary(_) => "canary",
            Self::Census(_) => "census",
            Self::Consumers(_) => "consumers",
            Self::Fence { .. } => "fence",
            Self::Halted(_) => "halted",
            Self::Issuer { .. } => "issuer",
            Self::Key => "key",
            Self::Listed(_) => "listed",
            Self::Mirrors(_) => "mirrors",
            Self::Nothing => "nothing",
            Self::Paused => "paused",
            Self::Promised { .. } => "promised",
            Self::Round => "round",
            Self::Signature { .. } => "signature",
            Self::Until(_) => "until",
        }
    }

    /// Every label.
    pub const LABELS: [&'static str; 16] = [
        "canary",
        "clock",
        "census",
        "consumers",
        "fence",
        "halted",
        "issuer",
        "key",
        "listed",
        "mirrors",
        "nothing",
        "paused",
        "promised",
        "round",
        "signature",
        "until",
    ];
}

/// What is waited for, by what it is for. One waits beside the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Waits {
    /// A rotation of an anchor that is under way, or that there is reason for.
    pub anchor: Wait,
    /// A rotation of the issuer.
    pub issuer: Wait,
}

impl Waits {
    /// Nothing moves at all.
    pub(super) fn both(wait: Wait) -> Self {
        Self { anchor: wait.clone(), issuer: wait }
    }
}

/// How things stand, for displays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standing {
    /// The state as it was seen last.
    pub state: Option<TrustDomainState>,
    /// When that was.
    pub seen_at: UnixTime,
    /// What a rotation of an anchor waits for that is under way, or that there is reason for.
    pub waiting: Option<Wait>,
    /// What a rotation of the issuer waits for.
    pub issuer_waiting: Option<Wait>,
    /// Why the last look came to nothing, if it did.
    pub trouble: Option<String>,
    /// How long things take.
    pub timings: Option<Timings>,
    /// The published anchors of ours whose key is gone, for certain.
    pub keyless: Vec<KeyId>,
    /// Which controller decides; it alone knows what is waited for.
    pub leader: Option<String>,
    /// Whether that is the one that says this.
    pub leads: bool,
}
