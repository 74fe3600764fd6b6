//! Token review with a cache: who holds a token, asked of the platform once in a while.
//!
//! A review is believed for [`REVIEW_AGE_MAX`], never past the token's end and never past its
//! pod's: every change of a pod forgets what was said about its tokens, and while the pods cannot
//! be followed nothing is remembered at all. No lock and no queue is held across a review.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use sha2::{Digest as _, Sha256};
use steadfast_platform::store::{Event, RESOURCES_PREFIX, TRUST_DOMAIN_KEY};
use steadfast_platform::token::REVIEW_AGE_MAX;
use steadfast_platform::{ReviewedToken, Store, StoreError, TokenRefusal, TokenReview};
use steadfast_process::Clock;

/// A reviewer that remembers.
pub struct Reviews {
    inner: Arc<dyn TokenReview>,
    audience: String,
    clock: Arc<dyn Clock>,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    /// By SHA-256 of the token: a token itself is never kept.
    reviews: HashMap<[u8; 32], Remembered>,
    /// Goes up whenever something is forgotten: a review that began before is not remembered.
    generation: u64,
    /// Whether changes of pods are being told.
    following: bool,
}

struct Remembered {
    reviewed: Arc<ReviewedToken>,
    /// On the boot clock.
    until: Duration,
}

impl Reviews {
    /// A cache in front of this reviewer, for tokens of this audience.
    pub fn new(inner: Arc<dyn TokenReview>, audience: String, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { inner, audience, clock, cache: Mutex::default() })
    }

    /// Who holds this token.
    ///
    /// # Errors
    /// As [`TokenReview::review`]; a review that takes too long is `Unavailable`.
    pub async fn review(&self, token: &[u8]) -> Result<Arc<ReviewedToken>, TokenRefusal> {
        let token = token.trim_ascii();
        if token.is_empty() {
            return Err(TokenRefusal::Missing);
        }
        let hash: [u8; 32] = Sha256::digest(token).into();
        let generation = {
            let cache = self.cache();
            if let Some(reviewed) = self.remembered(&cache, &hash) {
                return Ok(reviewed);
            }
            cache.generation
        };
        let review = self.inner.review(token, &self.audience);
        let reviewed = tokio::time::timeout(REVIEW_TIMEOUT, review).await.map_err(|_| {
            TokenRefusal::Unavailable(format!("no answer within {REVIEW_TIMEOUT:?}"))
        })??;
        let reviewed = Arc::new(reviewed);
        self.remember(hash, &reviewed, generation);
        Ok(reviewed)
    }

    fn remembered(&self, cache: &Cache, hash: &[u8; 32]) -> Option<Arc<ReviewedToken>> {
        let found = cache.reviews.get(hash)?;
        let fresh =
            self.clock.since_boot() < found.until && self.clock.now() < found.reviewed.expires;
        fresh.then(|| Arc::clone(&found.reviewed))
    }

    fn remember(&self, hash: [u8; 32], reviewed: &Arc<ReviewedToken>, generation: u64) {
        let now = self.clock.since_boot();
        let mut cache = self.cache();
        if !cache.following || cache.generation != generation {
            return;
        }
        if cache.reviews.len() >= REVIEWS_MAX {
            cache.reviews.retain(|_, remembered| now < remembered.until);
        }
        // Still full: whoever comes is reviewed each time.
        if cache.reviews.len() < REVIEWS_MAX {
            let remembered =
                Remembered { reviewed: Arc::clone(reviewed), until: now + REVIEW_AGE_MAX };
            cache.reviews.insert(hash, remembered);
        }
    }

    /// Forgets the tokens of pods that change, for ever.
    ///
    /// # Errors
    /// None: what fails is tried again.
    pub async fn run(self: Arc<Self>, store: Arc<dyn Store>) -> Result<(), Infallible> {
        loop {
            let error = self.follow_pods(&*store).await;
            self.forget_all(false);
            tracing::debug!(%error, "pods cannot be followed: every token is reviewed anew");
            tokio::time::sleep(FOLLOW_PAUSE).await;
        }
    }

    async fn follow_pods(&self, store: &dyn Store) -> StoreError {
        // Only the revision of the store is wanted; the pods themselves are the reviewer's affair.
        let from = match store.list(TRUST_DOMAIN_KEY).await {
            Ok((_, revision)) => revision,
            Err(error) => return error,
        };
        let prefix = format!("{RESOURCES_PREFIX}Pod/");
        let mut events = match store.watch(&prefix, from).await {
            Ok(events) => events,
            Err(error) => return error,
        };
        self.forget_all(true);
        loop {
            match events.next().await {
                Some(Ok(Event::Deleted { key, .. })) => self.forget(key.strip_prefix(&prefix)),
                Some(Ok(Event::Put(entry))) => self.forget(entry.key.strip_prefix(&prefix)),
                Some(Ok(Event::Synced(_))) => {}
                Some(Err(error)) => return error,
                None => return StoreError::Unavailable("the watch of pods ended".to_owned()),
            }
        }
    }

    /// Forgets the tokens of one pod: `<namespace>/<name>`.
    fn forget(&self, pod: Option<&str>) {
        let Some((namespace, name)) = pod.and_then(|pod| pod.split_once('/')) else { return };
        let mut cache = self.cache();
        cache.generation += 1;
        cache.reviews.retain(|_, remembered| {
            let reviewed = &remembered.reviewed;
            reviewed.pod_name != name || reviewed.namespace != namespace
        });
    }

    fn forget_all(&self, following: bool) {
        let mut cache = self.cache();
        cache.generation += 1;
        cache.following = following;
        cache.reviews.clear();
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // Every change is one assignment: a panic between two leaves nothing half done.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
const REVIEWS_MAX: usize = 16_384;
const FOLLOW_PAUSE: Duration = Duration::from_millis(500);
