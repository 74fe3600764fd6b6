//! The issuers that this replica can sign with: every one that the state may want to be used.
//!
//! All of them are loaded and tested before they are needed, since a rotation makes one active only
//! once every replica has reported it. A key is read once; what is loaded stays loaded for as long
//! as the state allows it, whatever becomes of its file.

use std::collections::BTreeMap;
use std::sync::Arc;

use steadfast_api::{Code, KeyId, TrustBundle, UnixTime};
use steadfast_platform::keys::KeyStore;
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::IssuerRecord;

use crate::key::AuthorityKey;
use crate::signer::{Signer, SignerError};

/// The issuers that can sign under one state, and why others cannot.
#[derive(Clone, Debug, Default)]
pub struct Signers {
    loaded: BTreeMap<KeyId, Arc<Signer>>,
    failed: BTreeMap<KeyId, SignerError>,
    /// What signs for the active issuer: itself, or what stands in for it.
    active: Option<Arc<Signer>>,
}

impl Signers {
    /// Loads what this state may want: every issuer that is neither denied nor expired and whose
    /// anchor is published; and the active one in any case, to say what is wrong with it. What
    /// `held` has loaded is not loaded again.
    pub(crate) async fn load(
        state: &TrustDomainState,
        bundle: &TrustBundle,
        held: Option<&Self>,
        keys: &dyn KeyStore,
        now: UnixTime,
    ) -> Self {
        let (mut loaded, mut failed) = (BTreeMap::new(), BTreeMap::new());
        for record in state.issuers.iter().filter(|record| wanted(state, bundle, record, now)) {
            let known = held.and_then(|held| held.loaded.get(&record.id));
            let signer = match known.filter(|signer| signer.serves(record, state, bundle)) {
                Some(signer) => Ok(Arc::clone(signer)),
                None => load(state, bundle, record, keys, now).await.map(Arc::new),
            };
            match signer {
                Ok(signer) => drop(loaded.insert(record.id, signer)),
                Err(error) => drop(failed.insert(record.id, error)),
            }
        }
        let active = state.active_issuer;
        if state.active_issuer().is_none() {
            failed.insert(active, SignerError::Unknown(active));
        }
        let mut signers = Self { loaded, failed, active: None };
        let before = held.and_then(|held| held.active.as_ref());
        signers.active = signers.signing_for(state, active, before).cloned();
        signers
    }

    /// What signs for the active issuer.
    ///
    /// # Errors
    /// Why it cannot, when no other may stand in for it.
    pub fn active(&self, state: &TrustDomainState) -> Result<&Arc<Signer>, SignerError> {
        self.active.as_ref().ok_or_else(|| self.reason(state.active_issuer))
    }

    /// What signs for this issuer.
    ///
    /// # Errors
    /// Why it cannot, when no other may stand in for it.
    pub fn of(&self, state: &TrustDomainState, id: KeyId) -> Result<&Arc<Signer>, SignerError> {
        if id == state.active_issuer {
            return self.active(state);
        }
        self.signing_for(state, id, None).ok_or_else(|| self.reason(id))
    }

    /// All that are loaded.
    pub fn loaded(&self) -> impl Iterator<Item = &Arc<Signer>> {
        self.loaded.values()
    }

    /// Why those cannot sign that should be loaded.
    pub(crate) fn failed(&self) -> &BTreeMap<KeyId, SignerError> {
        &self.failed
    }

    /// Whether the same issuers are loaded and the same are not, for the same reasons.
    pub(crate) fn same(&self, other: &Self) -> bool {
        self.loaded.keys().eq(other.loaded.keys()) && self.failed == other.failed
    }

    /// Says of those that are newly loaded, or newly fail, that they are; once.
    pub(crate) fn tell(&self, before: Option<&Self>) {
        for (id, signer) in &self.loaded {
            if before.is_none_or(|before| !before.loaded.contains_key(id)) {
                tracing::info!(issuer = %id, anchor = %signer.anchor_id(), "issuer loaded");
            }
        }
        for (id, error) in &self.failed {
            if before.is_none_or(|before| before.failed.get(id) != Some(error)) {
                tracing::warn!(code = %Code::ISSUER_UNUSABLE, issuer = %id, %error,
                    "an issuer cannot be used");
            }
        }
    }

    /// The issuer itself, or another that stands in while it cannot be used: the one that did
    /// before, else the one that lives longest. Only one under the same anchor may, since every
    /// anchor's SVIDs are counted from the moment the active anchor changed.
    fn signing_for<'a>(
        &'a self,
        state: &TrustDomainState,
        id: KeyId,
        before: Option<&Arc<Signer>>,
    ) -> Option<&'a Arc<Signer>> {
        if let Some(signer) = self.loaded.get(&id) {
            return Some(signer);
        }
        let anchor = state.issuer(id)?.anchor_id;
        let stolen = state.issuer_rotation.as_ref().filter(|rotation| rotation.urgent.is_some());
        let stolen = stolen.map(|rotation| rotation.old);
        let others = self
            .loaded
            .values()
            .filter(|signer| signer.anchor_id() == anchor && Some(signer.id()) != stolen);
        let before = before.map(|signer| signer.id());
        others.max_by_key(|signer| (Some(signer.id()) == before, signer.not_after(), signer.id()))
    }

    fn reason(&self, id: KeyId) -> SignerError {
        self.failed.get(&id).cloned().unwrap_or(SignerError::Unknown(id))
    }
}

fn wanted(
    state: &TrustDomainState,
    bundle: &TrustBundle,
    record: &IssuerRecord,
    now: UnixTime,
) -> bool {
    let usable = !state.denies(record.id)
        && record.not_after > now
        && bundle.anchor(record.anchor_id).is_some();
    usable || record.id == state.active_issuer
}

async fn load(
    state: &TrustDomainState,
    bundle: &TrustBundle,
    record: &IssuerRecord,
    keys: &dyn KeyStore,
    now: UnixTime,
) -> Result<Signer, SignerError> {
    let id = record.id;
    let key = keys
        .key(id)
        .await
        .map_err(|error| SignerError::Key { id, reason: ErrorChain(&error).to_string() })?;
    Signer::new(state, bundle, record, AuthorityKey::of(key), now)
}
