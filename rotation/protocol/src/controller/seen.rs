//! What goes into a decision.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, UnixTime};

use crate::census::Round;
use crate::schedule::Schedule;
use crate::trust_domain::{
    AnchorRecord, Condemned, IssuerRecord, Label, TrustDomainState, WantedIssuer,
};

/// How long things take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// `Tc`: how long a replica acts on a copy that nobody has confirmed.
    pub lease: Duration,
    /// Clocks may differ by this much.
    pub skew: Duration,
    /// Over how long a drain pulls renewals forward.
    pub renew_window: Duration,
    /// The same when a key is in other hands.
    pub renew_window_urgent: Duration,
    /// How long issuers live.
    pub issuer_life: Duration,
    /// An issuer with less than this left is replaced.
    pub issuer_left_min: Duration,
    /// When anchors are replaced.
    pub schedule: Schedule,
}

impl Timings {
    /// After so long every SVID has ended that was issued before the active anchor changed.
    pub fn slow_path(&self, state: &TrustDomainState) -> Duration {
        let life = state.anchors.iter().map(|anchor| anchor.svid_life_max).max();
        self.lease + life.unwrap_or_default() + self.skew
    }
}

/// Both clocks of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Now {
    /// The wall clock.
    pub wall: UnixTime,
    /// Time since boot, sleep included.
    pub boot: Duration,
}

/// What was seen. The round came first, then the state was read: so what members hold was published
/// before, or never by this state.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Observation {
    /// The newest round of queries.
    pub round: Option<Round>,
    /// The stored state.
    pub state: TrustDomainState,
    /// Of the store, when the state was read.
    pub revision: u64,
    /// Our wall clock less the store's, where the store says its time.
    pub clock_offset_ms: Option<i64>,
    /// The anchor that was made for the label asked for: key and certificate are kept, and a test
    /// signature verifies.
    pub made: Option<Made>,
    /// The issuer that was signed as asked.
    pub signed: Option<Signed>,
    /// Whether every mirror of the bundle, read back, shows the published anchors.
    pub mirrors_current: bool,
    /// Keys that are still there though they were to be destroyed.
    pub undestroyed: Vec<Condemned>,
    /// Anchors of ours that are published and whose key is gone, for certain.
    #[serde(default)]
    pub keyless: Vec<KeyId>,
    /// Anchors that the tool of an operator still lists as trusted.
    #[serde(default)]
    pub listed: Vec<KeyId>,
}

/// An anchor that was made.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Made {
    /// What for.
    pub label: Label,
    /// As it is stored; its state is for the controller to say.
    pub anchor: AnchorRecord,
}

/// An issuer that was signed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Signed {
    /// What for.
    pub wanted: WantedIssuer,
    /// As it is stored.
    pub issuer: IssuerRecord,
}
