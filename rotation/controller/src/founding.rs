//! Founding a trust domain where nobody has called `steadfast trust init`: on Kubernetes.
//!
//! The keys of the anchors are made here and that of the first issuer by identity, as in every
//! rotation. Until there is a state, one record says how far it is: it is written while nothing of
//! any mesh is there, so that a state which somebody has deleted is never taken for one that never
//! was. Each step is one compare-and-swap; two that found at once end with one trust domain.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use steadfast_api::{TrustDomain, UnixTime};
use steadfast_platform::store::{
    ANCHOR_KEYS_PREFIX, EVIDENCE_INDEX_KEY, FOUNDATION_KEY, ISSUER_REQUESTS_PREFIX, LEDGER_KEY,
    TRUST_DOMAIN_KEY,
};
use steadfast_platform::{Entry, Revision, Store, StoreError};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, Foundation, IssuerRequest,
};

use crate::anchors::{Anchors, AnchorsError};

/// What is founded where there is nothing yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Founds {
    /// Its name.
    pub trust_domain: TrustDomain,
    /// How long replicas act on a copy that has not been confirmed.
    pub read_lease: Duration,
}

/// Founds.
pub struct Founder {
    /// Where the state will be.
    pub store: Arc<dyn Store>,
    /// The keys of anchors.
    pub anchors: Anchors,
    /// What is founded.
    pub founds: Founds,
    /// How long its anchors live.
    pub anchor_lifetime: Duration,
    /// How long its first issuer lives.
    pub issuer_lifetime: Duration,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is a trust domain.
    Founded,
    /// Another step can be taken at once.
    Moved,
    /// The anchors are made, and identity has not asked for its first issuer yet.
    WaitsForIdentity,
}

/// Why no trust domain was founded.
#[derive(Debug, thiserror::Error)]
pub enum FoundError {
    /// The anchors, or the issuer under the first.
    #[error("no anchors and no issuer could be made")]
    Anchors(#[from] AnchorsError),
    /// There was a trust domain, and somebody has deleted it.
    #[error(
        "there is no trust domain, but {0} of one: its state was deleted. Put it back from a backup \
         (`kubectl create -f` of the TrustDomain) and run `steadfast trust recover`; nothing is \
         founded beside it"
    )]
    Deleted(String),
    /// What is stored is not ours.
    #[error("{0} in the store does not parse (written by a newer version?)")]
    State(&'static str, #[source] serde_json::Error),
    /// The store.
    #[error("the store cannot be used")]
    Store(#[from] StoreError),
}

impl Founder {
    /// Takes one step, dated `now` by the store's clock.
    ///
    /// # Errors
    /// [`FoundError`]; the next call goes on from where this one was.
    pub async fn step(&self, now: UnixTime) -> Result<Progress, FoundError> {
        let record = self.store.get(FOUNDATION_KEY).await?;
        if self.store.get(TRUST_DOMAIN_KEY).await?.is_some() {
            return self.tidy(record).await;
        }
        let Some(record) = record else { return self.begin().await };
        let foundation = serde_json::from_slice::<Foundation>(&record.value);
        let foundation = foundation.map_err(|error| FoundError::State(FOUNDATION_KEY, error))?;
        if foundation.anchors.is_empty() {
            return self.make_anchors(foundation, record.revision, now).await;
        }
        self.make_issuer(foundation, now).await
    }

    /// Writes down that there was nothing.
    async fn begin(&self) -> Result<Progress, FoundError> {
        let mut traces = Vec::new();
        match self.anchors.kept().await?.len() {
            0 => {}
            keys => traces.push(format!("{keys} keys of anchors")),
        }
        let ledger = format!("{LEDGER_KEY}/");
        for prefix in [ANCHOR_KEYS_PREFIX, &ledger, ISSUER_REQUESTS_PREFIX] {
            match self.store.list(prefix).await?.0.len() {
                0 => {}
                records => traces.push(format!("{records} records {prefix}…")),
            }
        }
        if self.store.get(EVIDENCE_INDEX_KEY).await?.is_some() {
            traces.push("the evidence of rotations".to_owned());
        }
        if !traces.is_empty() {
            return Err(FoundError::Deleted(traces.join(", ")));
        }
        let Founds { trust_domain, read_lease } = self.founds.clone();
        tracing::info!(%trust_domain, "there is no trust domain yet: it is founded");
        let foundation = Foundation { trust_domain, read_lease, anchors: Vec::new() };
        self.write(FOUNDATION_KEY, None, &foundation).await
    }

    /// Makes the anchors. Keys that are there were made here before a crash: there were none when
    /// the record was written.
    async fn make_anchors(
        &self,
        mut foundation: Foundation,
        revision: Revision,
        now: UnixTime,
    ) -> Result<Progress, FoundError> {
        for state in [AnchorState::Active, AnchorState::Standby] {
            let used: Vec<_> = foundation.anchors.iter().map(|anchor| anchor.id).collect();
            let (domain, lifetime) = (&foundation.trust_domain, self.anchor_lifetime);
            let anchor = self.anchors.first(domain, &used, now, lifetime).await?;
            foundation.anchors.push(AnchorRecord { state, ..anchor });
        }
        self.write(FOUNDATION_KEY, Some(revision), &foundation).await
    }

    /// Signs the first issuer, once identity has asked for it, and writes the state.
    async fn make_issuer(
        &self,
        foundation: Foundation,
        now: UnixTime,
    ) -> Result<Progress, FoundError> {
        let Some(wish) = foundation.wish() else { return Ok(Progress::WaitsForIdentity) };
        let key = format!("{ISSUER_REQUESTS_PREFIX}{}", wish.number);
        let Some(entry) = self.store.get(&key).await? else {
            return Ok(Progress::WaitsForIdentity);
        };
        let request = serde_json::from_slice::<IssuerRequest>(&entry.value);
        let request = request.map_err(|error| FoundError::State(ISSUER_REQUESTS_PREFIX, error))?;
        let Foundation { trust_domain, read_lease, anchors } = foundation;
        let (anchor, lifetime) = (&anchors[0], self.issuer_lifetime);
        let issuer = self.anchors.sign(&trust_domain, anchor, &request, now, lifetime).await?;
        let mut state = TrustDomainState::founded(trust_domain, anchors, issuer, now);
        state.read_lease = read_lease;
        let anchor = state.anchors[0].id;
        tracing::info!(%anchor, issuer = %state.active_issuer, "the trust domain is founded");
        self.write(TRUST_DOMAIN_KEY, None, &state).await
    }

    async fn write(
        &self,
        key: &'static str,
        expected: Option<Revision>,
        value: &impl serde::Serialize,
    ) -> Result<Progress, FoundError> {
        let value = serde_json::to_vec(value).map_err(|error| FoundError::State(key, error))?;
        match self.store.compare_and_swap(key, expected, Some(Bytes::from(value))).await {
            // Also when somebody was faster: the next step goes on from what he wrote.
            Ok(_) | Err(StoreError::Conflict { .. }) => Ok(Progress::Moved),
            Err(error) => Err(error.into()),
        }
    }

    /// The record is gone once there is a state: whoever deletes the state has no new one founded.
    async fn tidy(&self, record: Option<Entry>) -> Result<Progress, FoundError> {
        if let Some(record) = record {
            match self.store.compare_and_swap(&record.key, Some(record.revision), None).await {
                Ok(_) | Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Progress::Founded)
    }
}
