//! The anchors that a rotation makes, and the issuers that they sign.
//!
//! A key is kept before anything names it, and its name is kept by what it was made for, so that a
//! controller that is killed in between finds it again and makes no second one: also one that was
//! killed before it could name it, since a key that nothing names is taken before another is made.
//! Two controllers that make one at the same time end with one: the store's compare-and-swap says
//! whose.

use std::sync::Arc;
use std::time::Duration;

use steadfast_api::{KeyId, TrustDomain, UnixTime};
use steadfast_identity::authority::{AuthorityError, make_anchor_of, sign_issuer};
use steadfast_identity::key::AuthorityKey;
use steadfast_platform::keys::{KeyStore, KeyStoreError, self_test};
use steadfast_platform::store::ANCHOR_KEYS_PREFIX;
use steadfast_platform::{Revision, Store, StoreError};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, Condemned, IssuerRecord, IssuerRequest, Label,
};

/// The keys of anchors.
#[derive(Clone)]
pub struct Anchors {
    /// The first makes new ones.
    places: Vec<Arc<dyn KeyStore>>,
    store: Arc<dyn Store>,
}

/// Why an anchor or issuer was not made.
#[derive(Debug, thiserror::Error)]
pub enum AnchorsError {
    /// The certificate.
    #[error("no certificate could be made")]
    Authority(#[from] AuthorityError),
    /// Keys of this state are in a place that this controller was not given.
    #[error(
        "the key of the anchor {id} is in {place}, and this controller was started without it: give \
         it --anchor-keys pkcs11 and the flags of the token again, until that anchor is gone"
    )]
    Place {
        /// Which anchor.
        id: KeyId,
        /// Where its key is.
        place: String,
    },
    /// A panic.
    #[error("the work with a key ended early: {0}")]
    Died(String),
    /// The place where keys are.
    #[error("the keys of anchors cannot be used")]
    Keys(#[from] KeyStoreError),
    /// The name of a key in the store is none.
    #[error("{0} in the store names no key: delete it, and another key is made")]
    Name(String),
    /// The store.
    #[error("the store cannot be used")]
    Store(#[from] StoreError),
}

impl Anchors {
    /// Keys in these places, found again by this store. New ones are made in the first; the others
    /// have those that were there before, or were imported.
    pub fn new(
        first: Arc<dyn KeyStore>,
        others: impl IntoIterator<Item = Arc<dyn KeyStore>>,
        store: Arc<dyn Store>,
    ) -> Self {
        Self { places: std::iter::once(first).chain(others).collect(), store }
    }

    /// Checks that the keys of this state are in places that are known here: else one that cannot
    /// be found would pass for destroyed.
    ///
    /// # Errors
    /// [`AnchorsError::Place`]
    pub fn check_places(&self, state: &TrustDomainState) -> Result<(), AnchorsError> {
        let ours = state.anchors.iter().filter(|anchor| !anchor.is_external());
        for anchor in ours {
            let known = |place: &Arc<dyn KeyStore>| place.place_of(anchor.id) == anchor.key_ref;
            if !self.places.iter().any(known) {
                let (id, place) = (anchor.id, anchor.key_ref.clone());
                return Err(AnchorsError::Place { id, place });
            }
        }
        Ok(())
    }

    /// Where this key is; the first place, if it is nowhere. Files are asked before a token, which
    /// may be away: what hangs from a key in a file does not wait for it.
    async fn place(&self, id: KeyId) -> Result<(&dyn KeyStore, bool), AnchorsError> {
        for place in self.places.iter().rev() {
            if place.exists(id).await? {
                return Ok((&**place, true));
            }
        }
        Ok((&*self.places[0], false))
    }

    /// The anchor for this label. Its key is made only once; its certificate is made anew for whom
    /// has forgotten it, which is nobody's loss before it is in a bundle.
    ///
    /// # Errors
    /// [`AnchorsError`]
    pub async fn make(
        &self,
        state: &TrustDomainState,
        label: Label,
        now: UnixTime,
        lifetime: Duration,
    ) -> Result<AnchorRecord, AnchorsError> {
        let name = name(label);
        let (known, revision) = self.named(&name).await?;
        let id = match known {
            Some(id) if !is_spent(state, id) && self.place(id).await?.1 => id,
            _ => self.make_key(&name, revision, state).await?,
        };
        self.certified(&state.trust_domain, id, now, lifetime).await
    }

    /// The anchor of a key that is there, with a new certificate for it; `None`: there is none. It
    /// verifies whatever the old certificate did: a chain names its anchor by name and key.
    ///
    /// # Errors
    /// [`AnchorsError`]
    pub async fn made(
        &self,
        trust_domain: &TrustDomain,
        id: KeyId,
        now: UnixTime,
        lifetime: Duration,
    ) -> Result<Option<AnchorRecord>, AnchorsError> {
        if !self.place(id).await?.1 {
            return Ok(None);
        }
        self.certified(trust_domain, id, now, lifetime).await.map(Some)
    }

    /// An anchor of a trust domain that is being founded, none of `used`: of a key that is there,
    /// or of a new one.
    ///
    /// # Errors
    /// [`AnchorsError`]
    pub async fn first(
        &self,
        trust_domain: &TrustDomain,
        used: &[KeyId],
        now: UnixTime,
        lifetime: Duration,
    ) -> Result<AnchorRecord, AnchorsError> {
        let kept = self.kept().await?;
        let id = match kept.into_iter().find(|id| !used.contains(id)) {
            Some(id) => id,
            None => self.places[0].make().await?.id(),
        };
        self.certified(trust_domain, id, now, lifetime).await
    }

    /// The keys of all anchors, of whatever is known.
    ///
    /// # Errors
    /// [`AnchorsError`]
    pub async fn kept(&self) -> Result<Vec<KeyId>, AnchorsError> {
        let mut kept = Vec::new();
        for place in &self.places {
            kept.extend(place.list().await?);
        }
        Ok(kept)
    }

    async fn certified(
        &self,
        trust_domain: &TrustDomain,
        id: KeyId,
        now: UnixTime,
        lifetime: Duration,
    ) -> Result<AnchorRecord, AnchorsError> {
        let (domain, place) = (trust_domain.clone(), self.place(id).await?.0.place_of(id));
        let make = move |key: AuthorityKey| make_anchor_of(&domain, &key, place, now, lifetime);
        self.with_key(id, make).await
    }

    /// Signs an issuer under this anchor for a request of identity's.
    ///
    /// # Errors
    /// [`AnchorsError`]
    pub async fn sign(
        &self,
        trust_domain: &TrustDomain,
        anchor: &AnchorRecord,
        request: &IssuerRequest,
        now: UnixTime,
        lifetime: Duration,
    ) -> Result<IssuerRecord, AnchorsError> {
        let (domain, der) = (trust_domain.clone(), anchor.der.clone());
        let csr = request.csr.clone();
        let sign = move |key: AuthorityKey| sign_issuer(&domain, &der, &key, &csr, now, lifetime);
        let signed = self.with_key(anchor.id, sign).await?;
        // Only identity knows where it keeps the key; one of an older version does not say it.
        let place = Some(&request.key_ref).filter(|place| !place.is_empty()).cloned();
        Ok(IssuerRecord { key_ref: place.unwrap_or_else(|| signed.key_ref.clone()), ..signed })
    }

    /// Works with a key that has just shown that it signs. A device may take its time over it, so
    /// nobody waits on this thread.
    async fn with_key<T: Send + 'static>(
        &self,
        id: KeyId,
        work: impl FnOnce(AuthorityKey) -> Result<T, AuthorityError> + Send + 'static,
    ) -> Result<T, AnchorsError> {
        let key = self.place(id).await?.0.key(id).await?;
        let worked = tokio::task::spawn_blocking(move || {
            self_test(&*key)?;
            Ok(work(AuthorityKey::of(key))?)
        });
        worked.await.unwrap_or_else(|error| Err(AnchorsError::Died(error.to_string())))
    }

    /// Which of these are still there.
    ///
    /// # Errors
    /// [`AnchorsError`]
    pub async fn undestroyed(
        &self,
        condemned: &[Condemned],
    ) -> Result<Vec<Condemned>, AnchorsError> {
        let mut there = Vec::new();
        for key in condemned {
            if let Some(id) = self.id_of(*key).await?
                && self.place(id).await?.1
            {
                there.push(*key);
            }
        }
        Ok(there)
    }

    /// The published anchors of ours whose key is gone.
    ///
    /// # Errors
    /// [`AnchorsError`]
    pub async fn keyless(&self, state: &TrustDomainState) -> Result<Vec<KeyId>, AnchorsError> {
        let mut keyless = Vec::new();
        for anchor in state.published().filter(|anchor| !anchor.is_external()) {
            if !self.place(anchor.id).await?.1 {
                keyless.push(anchor.id);
            }
        }
        Ok(keyless)
    }

    /// Destroys keys, for ever.
    ///
    /// # Errors
    /// [`AnchorsError`]
    pub async fn destroy(&self, condemned: &[Condemned]) -> Result<(), AnchorsError> {
        for key in condemned {
            if let Some(id) = self.id_of(*key).await? {
                self.place(id).await?.0.destroy(id).await?;
                tracing::info!(key = %id, "the key of an anchor is destroyed");
            }
        }
        Ok(())
    }

    async fn id_of(&self, condemned: Condemned) -> Result<Option<KeyId>, AnchorsError> {
        match condemned {
            Condemned::Anchor(id) => Ok(Some(id)),
            Condemned::MadeFor(label) => Ok(self.named(&name(label)).await?.0),
        }
    }

    /// The key of this name, and the revision of the name.
    async fn named(&self, name: &str) -> Result<(Option<KeyId>, Option<Revision>), AnchorsError> {
        let Some(entry) = self.store.get(name).await? else { return Ok((None, None)) };
        let id = serde_json::from_slice(&entry.value);
        let id = id.map_err(|_| AnchorsError::Name(name.to_owned()))?;
        Ok((Some(id), Some(entry.revision)))
    }

    /// A key that was made and never named, so that nothing was ever signed with it. None that an
    /// anchor has or had: what was withdrawn stays so.
    async fn unnamed(&self, state: &TrustDomainState) -> Result<Option<KeyId>, AnchorsError> {
        let (entries, _) = self.store.list(ANCHOR_KEYS_PREFIX).await?;
        let named = entries.iter().map(|entry| {
            let id = serde_json::from_slice(&entry.value);
            id.map_err(|_| AnchorsError::Name(entry.key.clone()))
        });
        let named = named.collect::<Result<Vec<KeyId>, _>>()?;
        let kept = self.places[0].list().await?;
        Ok(kept.into_iter().find(|id| {
            let condemned = state.condemned.contains(&Condemned::Anchor(*id));
            let known = state.anchor(*id).is_some() || state.tombstones.contains(id);
            !named.contains(id) && !known && !condemned
        }))
    }

    /// Makes a key and gives it this name; if somebody else was faster, his is taken.
    async fn make_key(
        &self,
        name: &str,
        revision: Option<Revision>,
        state: &TrustDomainState,
    ) -> Result<KeyId, AnchorsError> {
        let id = match self.unnamed(state).await? {
            Some(id) => id,
            None => self.places[0].make().await?.id(),
        };
        let value = format!("\"{id}\"").into_bytes().into();
        match self.store.compare_and_swap(name, revision, Some(value)).await {
            Ok(_) => {
                tracing::info!(key = %id, name, "a key for an anchor is made");
                Ok(id)
            }
            Err(StoreError::Conflict { .. }) => {
                let (winner, _) = self.named(name).await?;
                let winner = winner.ok_or_else(|| AnchorsError::Name(name.to_owned()))?;
                if winner != id {
                    self.places[0].destroy(id).await?;
                }
                Ok(winner)
            }
            // The name may have been written: the key stays, and the next look finds out.
            Err(error) => Err(error.into()),
        }
    }
}

/// Numbers of rotations come again after the store was put back: what was made for one before may be
/// withdrawn, or in use.
fn is_spent(state: &TrustDomainState, id: KeyId) -> bool {
    state.tombstones.contains(&id) || state.anchor(id).is_some()
}

fn name(label: Label) -> String {
    format!("{ANCHOR_KEYS_PREFIX}{}-{}", label.rotation, label.attempt)
}
