//! What must hold before a phase may be left, as values that only a check can make.
//!
//! A transition of [`crate::rotation`] takes the guards that it needs by value, so that one that
//! was not checked cannot be passed.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::KeyId;

use crate::census::{Replica, Round, Tally};
use crate::trust_domain::Exemption;

/// A fence: since this process first saw a revision of the stored state, on its own boot clock. A
/// restart, and every write by anybody, begins it again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fence {
    /// Of which revision.
    pub revision: u64,
    /// When it was first seen, on the boot clock.
    pub since: Duration,
    /// What was asked since.
    pub queries: Queries,
}

/// Which queries were asked since then, by their nonces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Queries {
    /// The first.
    pub first: Option<u64>,
    /// The first after the fence had passed.
    pub first_fenced: Option<u64>,
    /// The last; 0: none.
    pub last: u64,
}

/// Every replica has the state of this revision, or acts on none: the read lease has run out
/// since it was written.
#[derive(Debug)]
pub struct Fenced(());

/// Everybody who is asked has answered as the phase demands.
#[derive(Debug)]
pub struct Settled(());

/// An issuer can sign on every replica that must.
#[derive(Debug)]
pub struct Loaded {
    pub(crate) issuer: KeyId,
}

impl Fence {
    /// A revision that is seen for the first time at this time of the boot clock.
    pub fn new(revision: u64, boot: Duration) -> Self {
        Self { revision, since: boot, queries: Queries::default() }
    }

    /// Whether the lease has run out for every older copy.
    pub fn passed(&self, boot: Duration, lease: Duration) -> Option<Fenced> {
        self.left(boot, lease).is_zero().then_some(Fenced(()))
    }

    /// How much of it is left.
    pub fn left(&self, boot: Duration, lease: Duration) -> Duration {
        self.since.saturating_add(lease).saturating_sub(boot)
    }

    /// The next query: above every one that is known, and about the time of day in microseconds.
    pub fn next_query(&mut self, fenced: Option<&Fenced>, now_us: u64, newest: u64) -> u64 {
        let queries = &mut self.queries;
        if newest > queries.last {
            // A query of somebody else, which may have been asked before our fence had passed: its
            // answers would pass for answers to ours.
            *queries = Queries::default();
        }
        let nonce = now_us.max(queries.last + 1).max(newest + 1);
        queries.first.get_or_insert(nonce);
        if fenced.is_some() {
            queries.first_fenced.get_or_insert(nonce);
        }
        queries.last = nonce;
        nonce
    }

    /// Answers to queries from this one on were asked for after the fence, if the round is ours.
    pub fn floor(&self, _: &Fenced, round: &Round) -> Option<u64> {
        self.queries
            .first_fenced
            .filter(|first| (*first..=self.queries.last).contains(&round.nonce))
    }

    /// The same without the fence: since this revision was seen.
    pub fn floor_unfenced(&self, round: &Round) -> Option<u64> {
        self.queries.first.filter(|first| (*first..=self.queries.last).contains(&round.nonce))
    }
}

impl Tally {
    /// Everybody has settled, asked after the fence or, where a phase has none, without it.
    pub(crate) fn guard(&self) -> Option<Settled> {
        self.is_settled().then_some(Settled(()))
    }
}

/// Whether the replicas have loaded an issuer: every one that nobody has exempted, and one at least;
/// or, when time presses, one. Who has not loaded it signs nothing.
pub(crate) fn loaded(
    round: &Round,
    exempt: &[Exemption],
    issuer: KeyId,
    urgent: bool,
) -> Option<Loaded> {
    let all = || unloaded(round, exempt, issuer).next().is_none();
    let enough = round.replicas.iter().any(|r| has_loaded(r, issuer)) && (urgent || all());
    enough.then_some(Loaded { issuer })
}

/// The replicas that nobody has exempted and that have not loaded an issuer, as far as it is known.
pub(crate) fn unloaded<'a>(
    round: &'a Round,
    exempt: &'a [Exemption],
    issuer: KeyId,
) -> impl Iterator<Item = &'a Replica> {
    let exempt = |replica: &Replica| exempt.iter().any(|e| e.instance.pod_uid == replica.name);
    round.replicas.iter().filter(move |r| !has_loaded(r, issuer) && !exempt(r))
}

fn has_loaded(replica: &Replica, issuer: KeyId) -> bool {
    replica.reached && replica.loaded.contains(&issuer)
}
