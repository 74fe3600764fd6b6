//! What a run came to, in numbers.

use std::collections::BTreeMap;

use serde::Serialize;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::Outcome;

/// What happened, how often.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Counts {
    /// Simulated seconds.
    pub simulated_seconds: u64,
    /// Events.
    pub events: u64,
    /// SVIDs issued.
    pub svids: u64,
    /// SVIDs installed.
    pub installs: u64,
    /// Requests for an SVID that were refused or did not arrive.
    pub refused: u64,
    /// SVIDs that ended before another had come.
    pub expired: u64,
    /// Bundles installed.
    pub bundles: u64,
    /// Bundles refused.
    pub bundles_refused: u64,
    /// Acks that arrived.
    pub acks: u64,
    /// Queries asked.
    pub queries: u64,
    /// Handshakes between two workloads.
    pub handshakes: u64,
    /// Writes of the state.
    pub writes: u64,
    /// Writes of the controller by their kind, where each is deadly.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub deadly_writes: BTreeMap<String, u64>,
    /// Writes of the state that came too late.
    pub conflicts: u64,
    /// Keys destroyed.
    pub destroyed: u64,
    /// Workloads started anew or replaced.
    pub churned: u64,
    /// Controllers killed.
    pub killed: u64,
    /// Rotations by kind and outcome.
    pub rotations: BTreeMap<String, u64>,
    /// Faults by kind.
    pub faults: BTreeMap<String, u64>,
    /// Orders of a person by kind.
    pub orders: BTreeMap<String, u64>,
    /// Checks by invariant.
    pub checks: BTreeMap<String, u64>,
}

impl Counts {
    pub(crate) fn written(&mut self, before: &TrustDomainState, after: &TrustDomainState) {
        self.writes += 1;
        if let (Some(_), None, Some(past)) = (&before.rotation, &after.rotation, after.past.last())
        {
            let outcome = if past.outcome == Outcome::Done { "done" } else { "aborted" };
            *self.rotations.entry(format!("{} {outcome}", past.kind)).or_default() += 1;
        }
        if before.active_issuer != after.active_issuer && before.rotation == after.rotation {
            *self.rotations.entry("issuer".to_owned()).or_default() += 1;
        }
    }

    /// Adds another run's.
    pub fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.simulated_seconds, other.simulated_seconds),
            (&mut self.events, other.events),
            (&mut self.svids, other.svids),
            (&mut self.installs, other.installs),
            (&mut self.refused, other.refused),
            (&mut self.expired, other.expired),
            (&mut self.bundles, other.bundles),
            (&mut self.bundles_refused, other.bundles_refused),
            (&mut self.acks, other.acks),
            (&mut self.queries, other.queries),
            (&mut self.handshakes, other.handshakes),
            (&mut self.writes, other.writes),
            (&mut self.conflicts, other.conflicts),
            (&mut self.destroyed, other.destroyed),
            (&mut self.churned, other.churned),
            (&mut self.killed, other.killed),
        ];
        for (mine, theirs) in pairs {
            *mine += theirs;
        }
        let maps = [
            (&mut self.rotations, &other.rotations),
            (&mut self.faults, &other.faults),
            (&mut self.orders, &other.orders),
            (&mut self.checks, &other.checks),
            (&mut self.deadly_writes, &other.deadly_writes),
        ];
        for (mine, theirs) in maps {
            for (key, count) in theirs {
                *mine.entry(key.clone()).or_default() += count;
            }
        }
    }

    /// Of all invariants.
    pub fn checks_done(&self) -> u64 {
        self.checks.values().sum()
    }
}
