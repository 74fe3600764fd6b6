//! The keys of issuers: made when the state asks for an issuer.
//!
//! The state's wish is answered with a key that is kept first and a request that is posted then, so
//! that no request can ever be signed whose key is gone. Every replica tries, and the first to post
//! wins. The key of a replica that lost is destroyed where it is certain that nobody was told of
//! it. A request whose wish is over is deleted.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use steadfast_api::KeyId;
use steadfast_platform::keys::{KeyStore, KeyStoreError};
use steadfast_platform::store::ISSUER_REQUESTS_PREFIX;
use steadfast_platform::{Entry, Store, StoreError};
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::trust_domain::{IssuerRequest, WantedIssuer};

use crate::authority::issuer_csr;
use crate::key::AuthorityKey;
use crate::replica::{Replica, View};

/// Makes them.
pub struct IssuerKeys {
    replica: Arc<Replica>,
    store: Arc<dyn Store>,
    keys: Arc<dyn KeyStore>,
    /// The request that this replica wants to post, or has.
    made: Option<Made>,
    /// What was told last, so that what lasts is told once.
    told: Option<String>,
}

/// A request whose key is kept.
struct Made {
    request: IssuerRequest,
    posted: Posted,
}

/// Whether a request is in the store.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Posted {
    /// The store has not said. Somebody may have read it.
    Maybe,
    /// It was never sent.
    No,
    /// It was, or another's was there first: nothing is left to do.
    Over,
}

/// Why a wish was not answered.
#[derive(Debug, thiserror::Error)]
enum IssuerKeyError {
    /// No key, or no request for it.
    #[error("no key could be made for a new issuer: {0}")]
    Key(String),
    /// The key store.
    #[error("the keys of issuers cannot be kept")]
    Keys(#[from] KeyStoreError),
    /// The store.
    #[error("requests for issuers cannot be read or posted")]
    Store(#[from] StoreError),
}

impl IssuerKeys {
    /// For the wishes in this replica's view.
    pub fn new(replica: Arc<Replica>, store: Arc<dyn Store>, keys: Arc<dyn KeyStore>) -> Self {
        Self { replica, store, keys, made: None, told: None }
    }

    /// Follows the view for ever.
    ///
    /// # Errors
    /// None: what fails is told and tried again.
    pub async fn run(mut self) -> Result<(), Infallible> {
        let mut views = self.replica.subscribe();
        loop {
            let done = self.look().await.map_err(|error| ErrorChain(&error).to_string()).err();
            if let Some(error) = done.as_ref().filter(|_| done != self.told) {
                tracing::warn!(%error, "a wish for an issuer cannot be answered");
            }
            self.told = done;
            let looked = tokio::time::timeout(LOOK_EVERY, views.changed()).await;
            if matches!(looked, Ok(Err(_))) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }

    async fn look(&mut self) -> Result<(), IssuerKeyError> {
        let Ok(view) = self.replica.current() else { return Ok(()) };
        let (requests, _) = self.store.list(ISSUER_REQUESTS_PREFIX).await?;
        let wish = view.state.wanted_issuer;
        self.delete_old(&view, &requests).await?;
        match wish {
            Some(wish) => self.answer(&view, wish, &requests).await,
            None => Ok(()),
        }
    }

    /// Deletes requests whose wish is over. A number is the revision of the state that the wish was
    /// made in: one from our view's own on is of a wish that the view does not show yet.
    async fn delete_old(&self, view: &View, requests: &[Entry]) -> Result<(), IssuerKeyError> {
        let wish = view.state.wanted_issuer.map(|wish| wish.number);
        for entry in requests {
            let Some(number) = number_of(&entry.key) else { continue };
            if number >= view.revision.0 || wish == Some(number) {
                continue;
            }
            match self.store.compare_and_swap(&entry.key, Some(entry.revision), None).await {
                Ok(_) => tracing::info!(request = entry.key, "deleted: its wish is over"),
                // Another replica was faster.
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn answer(
        &mut self,
        view: &View,
        wish: WantedIssuer,
        requests: &[Entry],
    ) -> Result<(), IssuerKeyError> {
        let key = format!("{ISSUER_REQUESTS_PREFIX}{}", wish.number);
        let posted = requests.iter().any(|entry| entry.key == key);
        // One that was posted and is not there any more has been deleted: the wish still stands.
        let current = |made: &Made| {
            made.request.number == wish.number && (posted || made.posted != Posted::Over)
        };
        let mut made = match self.made.take().filter(current) {
            Some(made) => made,
            None if posted => return Ok(()),
            None => Made { request: self.make(view, wish).await?, posted: Posted::No },
        };
        let outcome = self.post(&key, &mut made).await;
        self.made = Some(made);
        outcome
    }

    /// A key that is kept, and the request for it. One that is lost to a crash before it is posted
    /// is nobody's: it is found and destroyed as such.
    async fn make(&self, view: &View, wish: WantedIssuer) -> Result<IssuerRequest, IssuerKeyError> {
        let no_key =
            |error: &dyn std::error::Error| IssuerKeyError::Key(ErrorChain(error).to_string());
        let (key, pkcs8) = AuthorityKey::generate().map_err(|error| no_key(&error))?;
        let csr = issuer_csr(&view.state.trust_domain, &key).map_err(|error| no_key(&error))?;
        let WantedIssuer { anchor_id, number } = wish;
        self.keys.put_new(key.id(), pkcs8).await?;
        Ok(IssuerRequest { number, anchor_id, key_id: key.id(), csr })
    }

    async fn post(&self, key: &str, made: &mut Made) -> Result<(), IssuerKeyError> {
        if made.posted == Posted::Over {
            return Ok(());
        }
        let value = serde_json::to_vec(&made.request)
            .map_err(|error| IssuerKeyError::Key(error.to_string()))?;
        let known = std::mem::replace(&mut made.posted, Posted::Maybe) == Posted::Maybe;
        let key_id = made.request.key_id;
        match self.store.compare_and_swap(key, None, Some(Bytes::from(value))).await {
            Ok(_) => {
                tracing::info!(request = key, key = %key_id, "an issuer is asked for");
                made.posted = Posted::Over;
            }
            Err(StoreError::Conflict { .. }) => {
                made.posted = Posted::Over;
                // The one that was there first may be our own, whose first reply was lost.
                if !known && self.winner(key).await? != Some(key_id) {
                    tracing::info!(request = key, key = %key_id, "another replica was first");
                    self.keys.destroy(key_id).await?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    async fn winner(&self, key: &str) -> Result<Option<KeyId>, IssuerKeyError> {
        let entry = self.store.get(key).await?;
        let request =
            entry.and_then(|entry| serde_json::from_slice::<IssuerRequest>(&entry.value).ok());
        Ok(request.map(|request| request.key_id))
    }
}

fn number_of(key: &str) -> Option<u64> {
    key.strip_prefix(ISSUER_REQUESTS_PREFIX)?.parse().ok()
}

/// A wish wakes us; what could not be done is tried again this often.
const LOOK_EVERY: Duration = Duration::from_secs(2);
