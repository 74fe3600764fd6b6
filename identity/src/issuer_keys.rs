//! The keys of issuers: made when the state asks for an issuer, destroyed when none may use them.
//!
//! The state's wish is answered with a key that is kept first and a request that is posted then, so
//! that no request can ever be signed whose key is gone. Every replica tries, and the first to post
//! wins. The key of a replica that lost is destroyed where it is certain that nobody was told of
//! it. A request whose wish is over is deleted.
//!
//! A key is destroyed once our view has said for longer than the read lease, without a gap, that
//! nobody may use it. So every other replica's view says so too; and whoever made a key for a wish
//! that our view does not show yet has made it within the lease.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use steadfast_api::{KeyId, TrustDomain, UnixTime};
use steadfast_platform::keys::{KeyStore, KeyStoreError};
use steadfast_platform::store::{FOUNDATION_KEY, ISSUER_REQUESTS_PREFIX, TRUST_DOMAIN_KEY};
use steadfast_platform::{Entry, Store, StoreError};
use steadfast_process::{Clock, ErrorChain};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{Foundation, IssuerRequest, WantedIssuer};
use tokio::sync::watch;

use crate::authority::{SKEW, issuer_csr};
use crate::key::AuthorityKey;
use crate::replica::{LEASE, Replica, View};

/// Makes them.
pub struct IssuerKeys {
    replica: Arc<Replica>,
    store: Arc<dyn Store>,
    keys: Arc<dyn KeyStore>,
    /// The requests that this replica wants to post, or has, by their numbers: one for each open
    /// wish.
    made: BTreeMap<u64, Made>,
    /// The key of an issuer that another tool keeps.
    proposed: watch::Receiver<Option<KeyId>>,
    /// Since when keys have been of no use, on the boot clock.
    useless: BTreeMap<KeyId, Duration>,
    clock: Arc<dyn Clock>,
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
pub enum IssuerKeyError {
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
    pub fn new(
        replica: Arc<Replica>,
        store: Arc<dyn Store>,
        keys: Arc<dyn KeyStore>,
        clock: Arc<dyn Clock>,
        proposed: watch::Receiver<Option<KeyId>>,
    ) -> Self {
        Self {
            replica,
            store,
            keys,
            proposed,
            made: BTreeMap::new(),
            useless: BTreeMap::new(),
            clock,
            told: None,
        }
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
                tracing::warn!(%error, "the keys of issuers cannot be looked after");
            }
            self.told = done;
            let looked = tokio::time::timeout(LOOK_EVERY, views.changed()).await;
            if matches!(looked, Ok(Err(_))) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }

    /// Looks once: answers the wish that is open, and destroys what is of no use any more.
    ///
    /// # Errors
    /// [`IssuerKeyError`]; what was not done is tried again with the next look.
    pub async fn look(&mut self) -> Result<(), IssuerKeyError> {
        let Ok(view) = self.replica.current() else {
            self.useless.clear();
            return if self.replica.is_unfounded() { self.found().await } else { Ok(()) };
        };
        let (requests, _) = self.store.list(ISSUER_REQUESTS_PREFIX).await?;
        self.delete_old(&view, &requests).await?;
        let wishes: BTreeMap<_, _> = view.state.wishes().map(|wish| (wish.number, wish)).collect();
        self.made.retain(|number, _| wishes.contains_key(number));
        for wish in wishes.into_values() {
            self.answer(&view.state.trust_domain, wish, &requests).await?;
        }
        let kept = self.keys.list().await?;
        self.replace_lost(&view, &kept).await?;
        self.destroy_useless(&view, &requests, kept).await
    }

    /// Says which issuers' keys are gone, and has the active one replaced if its is: replicas that
    /// have it sign on, and one that starts anew cannot.
    async fn replace_lost(&self, view: &View, kept: &[KeyId]) -> Result<(), IssuerKeyError> {
        let (now, mut lost) = (self.clock.now(), Vec::new());
        for id in view.state.own_issuers(now).filter(|id| !kept.contains(id)) {
            if !self.keys.exists(id).await? {
                lost.push(id);
            }
        }
        let mut state = view.state.clone();
        if !state.set_lost_issuers(lost, now) {
            return Ok(());
        }
        // As it is stored, not as it was parsed: a newer version may have put more into it.
        let Some(entry) = self.store.get(TRUST_DOMAIN_KEY).await? else { return Ok(()) };
        if entry.revision != view.revision {
            return Ok(());
        }
        let value = with_lost(&entry.value, &state);
        let value = value.map_err(|error| IssuerKeyError::Key(error.to_string()))?;
        match self.store.compare_and_swap(TRUST_DOMAIN_KEY, Some(entry.revision), Some(value)).await
        {
            Ok(_) => {
                for id in &state.lost_issuers {
                    let place = self.keys.place_of(*id);
                    tracing::warn!(issuer = %id, active = *id == state.active_issuer, place,
                        "the key of this issuer is gone: put it back, or another takes its place");
                }
                Ok(())
            }
            // Another replica was faster, or the state is another.
            Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes requests whose wish is over. A number is the revision of the state that the wish was
    /// made in: one from our view's own on is of a wish that the view does not show yet.
    async fn delete_old(&self, view: &View, requests: &[Entry]) -> Result<(), IssuerKeyError> {
        let wished = |number| view.state.wishes().any(|wish| wish.number == number);
        for entry in requests {
            let Some(number) = number_of(&entry.key) else { continue };
            if number >= view.revision.0 || wished(number) {
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

    /// Asks for the first issuer of a trust domain that is being founded, if one is. Keys of others
    /// who did so too are destroyed once there is a state that does not name them.
    async fn found(&mut self) -> Result<(), IssuerKeyError> {
        let Some(entry) = self.store.get(FOUNDATION_KEY).await? else { return Ok(()) };
        let Ok(foundation) = serde_json::from_slice::<Foundation>(&entry.value) else {
            return Err(IssuerKeyError::Key(format!("{FOUNDATION_KEY} does not parse")));
        };
        let Some(wish) = foundation.wish() else { return Ok(()) };
        let (requests, _) = self.store.list(ISSUER_REQUESTS_PREFIX).await?;
        self.answer(&foundation.trust_domain, wish, &requests).await
    }

    async fn answer(
        &mut self,
        trust_domain: &TrustDomain,
        wish: WantedIssuer,
        requests: &[Entry],
    ) -> Result<(), IssuerKeyError> {
        let key = format!("{ISSUER_REQUESTS_PREFIX}{}", wish.number);
        let entry = requests.iter().find(|entry| entry.key == key);
        if let Some(entry) = entry
            && let Some(request) = request(entry)
            && !self.keys.exists(request.key_id).await?
        {
            return self.withdraw(entry, request.key_id).await;
        }
        let posted = entry.is_some();
        // One that was posted and is not there any more has been deleted: the wish still stands.
        let current = |made: &Made| posted || made.posted != Posted::Over;
        let mut made = match self.made.remove(&wish.number).filter(current) {
            Some(made) => made,
            None if posted => return Ok(()),
            None => Made { request: self.make(trust_domain, wish).await?, posted: Posted::No },
        };
        let outcome = self.post(&key, &mut made).await;
        self.made.insert(wish.number, made);
        outcome
    }

    /// Takes a request back whose key somebody has removed: what would be signed for it could sign
    /// nothing. The wish stands, and the next look answers it with another key.
    async fn withdraw(&mut self, entry: &Entry, key_id: KeyId) -> Result<(), IssuerKeyError> {
        self.made.retain(|_, made| made.request.key_id != key_id);
        match self.store.compare_and_swap(&entry.key, Some(entry.revision), None).await {
            Ok(_) => {
                tracing::warn!(request = entry.key, key = %key_id,
                    "the key of a request for an issuer is gone: another one is made");
                Ok(())
            }
            // Another replica was faster.
            Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// A key that is kept, and the request for it. One that is lost to a crash before it is posted
    /// is nobody's: it is found and destroyed as such.
    async fn make(
        &self,
        trust_domain: &TrustDomain,
        wish: WantedIssuer,
    ) -> Result<IssuerRequest, IssuerKeyError> {
        let key = AuthorityKey::of(self.keys.make().await?);
        let csr = issuer_csr(trust_domain, &key)
            .map_err(|error| IssuerKeyError::Key(ErrorChain(&error).to_string()))?;
        let WantedIssuer { anchor_id, number } = wish;
        let key_id = key.id();
        Ok(IssuerRequest { number, anchor_id, key_id, csr, key_ref: self.keys.place_of(key_id) })
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

    async fn destroy_useless(
        &mut self,
        view: &View,
        requests: &[Entry],
        kept: Vec<KeyId>,
    ) -> Result<(), IssuerKeyError> {
        let requests: Vec<_> = requests.iter().filter_map(request).collect();
        let (wall, boot) = (self.clock.now(), self.clock.since_boot());
        let proposed = *self.proposed.borrow();
        let useless = kept.into_iter().filter(|id| {
            let spared = proposed == Some(*id) && !view.state.denies(*id);
            !spared && is_useless(&view.state, &requests, *id, wall)
        });
        // Whatever was of use in between begins anew.
        let since = |id| (id, self.useless.get(&id).copied().unwrap_or(boot));
        self.useless = useless.map(since).collect();
        let due = self.useless.iter().filter(|(_, since)| boot.saturating_sub(**since) > LEASE);
        for id in due.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.keys.destroy(id).await?;
            tracing::info!(key = %id, denied = view.state.denies(id), "an issuer's key is destroyed");
            self.useless.remove(&id);
        }
        Ok(())
    }

    async fn winner(&self, key: &str) -> Result<Option<KeyId>, IssuerKeyError> {
        let entry = self.store.get(key).await?;
        Ok(entry.as_ref().and_then(request).map(|request| request.key_id))
    }
}

/// What is stored, with what this state says of issuers that are lost.
fn with_lost(stored: &[u8], state: &TrustDomainState) -> Result<Bytes, serde_json::Error> {
    let mut stored: serde_json::Value = serde_json::from_slice(stored)?;
    stored["lost_issuers"] = serde_json::to_value(&state.lost_issuers)?;
    stored["issuer_rotation"] = serde_json::to_value(&state.issuer_rotation)?;
    stored["rotations"] = state.rotations.into();
    serde_json::to_vec(&stored).map(Bytes::from)
}

/// Whether nobody may use a key any more, by this state. The active issuer's key is kept past its
/// end: that an issuer has expired is the word of a clock alone, and a clock that is wrong must not
/// cost the mesh its last issuer. While a wish is open, a key that nothing names may have been made
/// for it a moment ago, though not once a person's wish has its request; while a person is to look,
/// it may be of the state that is then put back.
fn is_useless(
    state: &TrustDomainState,
    requests: &[IssuerRequest],
    id: KeyId,
    now: UnixTime,
) -> bool {
    if state.halted.is_some() {
        return false;
    }
    if state.denies(id) {
        return true;
    }
    match state.issuer(id) {
        Some(issuer) => id != state.active_issuer && now > issuer.not_after + SKEW,
        None => {
            let posted = |wish: &WantedIssuer| requests.iter().any(|r| r.number == wish.number);
            let open = state.wanted_issuer.is_some() || !state.wanted_external.iter().all(posted);
            !open && requests.iter().all(|request| request.key_id != id)
        }
    }
}

fn request(entry: &Entry) -> Option<IssuerRequest> {
    serde_json::from_slice(&entry.value).ok()
}

fn number_of(key: &str) -> Option<u64> {
    key.strip_prefix(ISSUER_REQUESTS_PREFIX)?.parse().ok()
}

/// A wish wakes us; what could not be done is tried again this often.
const LOOK_EVERY: Duration = Duration::from_secs(2);
