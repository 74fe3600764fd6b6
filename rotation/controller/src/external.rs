//! What persons are told who have the keys of external anchors: nobody else can do their part.

use std::collections::{BTreeMap, BTreeSet};

use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::AnchorRecord;

/// What was told, so that each thing is told once.
#[derive(Debug, Default)]
pub struct Told {
    anchors: BTreeSet<KeyId>,
    wishes: BTreeMap<u64, KeyId>,
}

impl Told {
    /// Tells what is new in this state.
    pub fn tell(&mut self, state: &TrustDomainState) {
        let wishes: BTreeMap<_, _> =
            state.wanted_external.iter().map(|wish| (wish.number, wish.anchor_id)).collect();
        for (number, anchor) in
            wishes.iter().filter(|(number, _)| !self.wishes.contains_key(number))
        {
            let ends = issuer_ends(state, *anchor).map(|ends| ends.to_string());
            tracing::warn!(
                request = number, %anchor, issuer_ends = ends,
                "an issuer under an external anchor is wanted: have the request signed that \
                 `steadfast issuer request` prints, then `steadfast issuer import`"
            );
        }
        for (number, anchor) in
            self.wishes.iter().filter(|(number, _)| !wishes.contains_key(number))
        {
            tracing::info!(request = number, %anchor, "a request for an issuer is answered, or over");
        }
        let external = state.anchors.iter().filter(|anchor| anchor.is_external());
        let anchors: BTreeSet<_> = external.map(|anchor: &AnchorRecord| anchor.id).collect();
        for anchor in self.anchors.difference(&anchors) {
            tracing::info!(
                %anchor,
                "an external anchor is gone from this trust domain: its key was never here, and its \
                 owner may destroy it"
            );
        }
        (self.anchors, self.wishes) = (anchors, wishes);
    }
}

/// When the last issuer under an anchor ends, if it has one.
fn issuer_ends(state: &TrustDomainState, anchor: KeyId) -> Option<UnixTime> {
    let issuers = state.issuers.iter().filter(|issuer| issuer.anchor_id == anchor);
    issuers.map(|issuer| issuer.not_after).max()
}
