//! What comes out of a decision.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::UnixTime;

use super::seen::Timings;
use crate::census::Tally;
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
    /// Who had settled, for the evidence; empty where nobody is asked.
    pub settled: Vec<(String, crate::Instance)>,
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// Our own clock is off the store's.
    Clock {
        /// By so much.
        offset_ms: i64,
    },
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
    /// The issuer is not made, or not loaded by these replicas.
    Issuer(Vec<String>),
    /// The new anchor's key.
    Key,
    /// The mirrors of the bundle.
    Mirrors,
    /// Nothing.
    Nothing,
    /// A person has paused it.
    Paused,
    /// SVIDs of holders that cannot ack.
    Promised {
        /// The last of them ends.
        until: UnixTime,
    },
    /// A first round of answers.
    Round,
    /// The canaries' time.
    Until(UnixTime),
}

/// How things stand, for displays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Standing {
    /// The state as it was seen last.
    pub state: Option<TrustDomainState>,
    /// When that was.
    pub seen_at: UnixTime,
    /// What is waited for.
    pub waiting: Option<Wait>,
    /// Why the last look came to nothing, if it did.
    pub trouble: Option<String>,
    /// How long things take.
    pub timings: Option<Timings>,
}
