//! Token review of the standalone platform: the issuer's public keys and the watched pods.
//!
//! A review needs no call in the ordinary case: keys and pods are followed. Before a token is
//! refused for what the followed copy says, the store itself is asked, so that a copy that is a
//! moment behind refuses nobody; and a copy that the store has not confirmed for a while answers
//! nothing at all, so that no token outlives its pod.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use k8s_openapi::api::core::v1::Pod;
use steadfast_api::UnixTime;
use steadfast_process::Clock;

use super::claims::{Bound, Claims, ISSUER, subject};
use crate::follow::{Change, follow};
use crate::names::{ObjectName, parse_resource_key, resource_key};
use crate::store::{Entry, Event, Store, StoreError, TOKEN_JWKS_KEY};
use crate::token::{REVIEW_AGE_MAX, ReviewedToken, TokenRefusal, TokenReview};

/// Reviews the tokens that `steadfast-store` has issued.
pub struct Tokens {
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    followed: Mutex<Followed>,
}

/// What is known without asking.
#[derive(Default)]
struct Followed {
    keys: Keys,
    pods: BTreeMap<ObjectName, PodFacts>,
    /// When the store last confirmed the pods, on the boot clock.
    confirmed: Option<Duration>,
    /// When the store was last asked for a key that was not known.
    keys_asked: Option<Duration>,
}

/// The issuer's public keys by their ids.
type Keys = BTreeMap<String, Arc<DecodingKey>>;

/// What a token must agree with.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PodFacts {
    uid: String,
    service_account: String,
    node: Option<String>,
}

impl Tokens {
    /// A reviewer on this store, and the work that follows keys and pods: a service of the
    /// process. Until that has begun, reviews answer [`TokenRefusal::Unavailable`].
    pub fn new(
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
    ) -> (Arc<Self>, impl Future<Output = Result<(), Infallible>> + Send) {
        let tokens = Arc::new(Self {
            store: Arc::clone(&store),
            clock,
            followed: Mutex::new(Followed::default()),
        });
        let (for_keys, for_pods) = (Arc::clone(&tokens), Arc::clone(&tokens));
        let work = async move {
            let keys = follow(Arc::clone(&store), TOKEN_JWKS_KEY, move |change| {
                for_keys.keys_changed(change);
            });
            let pods = follow(store, PODS_PREFIX, move |change| for_pods.pods_changed(change));
            tokio::select! {
                never = keys => match never {},
                never = pods => match never {},
            }
        };
        (tokens, work)
    }

    fn keys_changed(&self, change: Change<'_>) {
        let entry = match &change {
            Change::Event(Event::Put(entry)) => entry,
            Change::Reset(entries, _) => match entries.as_slice() {
                [entry, ..] => entry,
                [] => return,
            },
            // Keys that were deleted or cannot be followed: those that are known stay good.
            Change::Event(_) | Change::Failed(_) => return,
        };
        match parse_keys(entry) {
            Ok(keys) => self.followed().keys = keys,
            Err(error) => tracing::error!(%error, "the token issuer's keys do not parse"),
        }
    }

    fn pods_changed(&self, change: Change<'_>) {
        let now = self.clock.since_boot();
        let mut followed = self.followed();
        match change {
            Change::Event(Event::Deleted { key, .. }) => {
                if let Some((_, name)) = parse_resource_key(&key) {
                    followed.pods.remove(&name);
                }
            }
            Change::Event(Event::Put(entry)) => followed.put(&entry),
            Change::Event(Event::Synced(_)) => {}
            Change::Failed(_) => return,
            Change::Reset(entries, _) => {
                followed.pods.clear();
                entries.iter().for_each(|entry| followed.put(entry));
            }
        }
        followed.confirmed = Some(now);
    }

    /// The key that signed a token, asked of the store if it is not known yet: but not for every
    /// token that names a key of its own invention.
    async fn key(&self, id: &str) -> Result<Arc<DecodingKey>, TokenRefusal> {
        let unknown = || TokenRefusal::Malformed(format!("it is signed by an unknown key {id:?}"));
        {
            let mut followed = self.followed();
            if let Some(key) = followed.keys.get(id) {
                return Ok(Arc::clone(key));
            }
            let now = self.clock.since_boot();
            if followed.keys_asked.is_some_and(|asked| now < asked + KEYS_ASKED_EVERY) {
                return Err(unknown());
            }
            followed.keys_asked = Some(now);
        }
        let entry = self.store.get(TOKEN_JWKS_KEY).await.map_err(unavailable)?;
        let entry = entry.ok_or_else(unknown)?;
        let keys = parse_keys(&entry)
            .map_err(|error| TokenRefusal::Unavailable(format!("the issuer's keys: {error}")))?;
        let key = keys.get(id).cloned();
        self.followed().keys = keys;
        key.ok_or_else(unknown)
    }

    /// The pod that a token is bound to, if it is there and is the same.
    async fn pod(&self, claims: &Claims, bound: &Bound) -> Result<PodFacts, TokenRefusal> {
        let Some(pod) = &bound.pod else { return Err(TokenRefusal::Unbound) };
        let name = ObjectName::new(&bound.namespace, &pod.name);
        let known = {
            let followed = self.followed();
            let now = self.clock.since_boot();
            let fresh =
                followed.confirmed.is_some_and(|at| now.saturating_sub(at) < REVIEW_AGE_MAX);
            fresh.then(|| followed.pods.get(&name).cloned()).flatten()
        };
        if let Some(facts) = known
            && facts.agree(&name, claims, bound).is_ok()
        {
            return Ok(facts);
        }
        // Not known, not the same, or not confirmed for too long: the store itself decides.
        let entry = self.store.get(&resource_key("Pod", &name)).await.map_err(unavailable)?;
        let gone = |why| TokenRefusal::WorkloadGone(why);
        let entry = entry.ok_or_else(|| gone(format!("there is no pod {name}")))?;
        let facts = PodFacts::of(&entry)
            .ok_or_else(|| TokenRefusal::Unavailable(format!("the pod {name} does not parse")))?;
        facts.agree(&name, claims, bound).map_err(gone)?;
        Ok(facts)
    }

    fn followed(&self) -> MutexGuard<'_, Followed> {
        // Every change is one assignment: a panic between two leaves nothing half done.
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait::async_trait]
impl TokenReview for Tokens {
    async fn review(&self, token: &[u8], audience: &str) -> Result<ReviewedToken, TokenRefusal> {
        // 1. What it is.
        let token = token.trim_ascii();
        if token.is_empty() {
            return Err(TokenRefusal::Missing);
        }
        if token.len() > TOKEN_BYTES_MAX {
            let why =
                format!("it is {} bytes long, at most {TOKEN_BYTES_MAX} are read", token.len());
            return Err(TokenRefusal::Malformed(why));
        }
        let malformed = |why: &dyn std::fmt::Display| TokenRefusal::Malformed(why.to_string());
        let header = jsonwebtoken::decode_header(token).map_err(|error| malformed(&error))?;
        let key_id = header.kid.ok_or_else(|| malformed(&"it names no key"))?;
        // 2. Who signed it.
        let key = self.key(&key_id).await?;
        let claims = jsonwebtoken::decode::<Claims>(token, &key, &signature_only())
            .map_err(|error| malformed(&error))?
            .claims;
        // 3. When, by whom and for whom.
        check_claims(&claims, self.clock.now(), audience)?;
        // 4. Whose.
        let Some(bound) = &claims.bound else { return Err(TokenRefusal::Unbound) };
        let facts = self.pod(&claims, bound).await?;
        let pod_name = bound.pod.as_ref().map(|pod| pod.name.clone()).unwrap_or_default();
        Ok(ReviewedToken {
            namespace: bound.namespace.clone(),
            service_account: facts.service_account,
            pod_name,
            pod_uid: facts.uid,
            node: facts.node,
            expires: UnixTime::from_secs(claims.exp),
            token_id: claims.jti,
        })
    }
}

impl Followed {
    fn put(&mut self, entry: &Entry) {
        let Some((_, name)) = parse_resource_key(&entry.key) else { return };
        match PodFacts::of(entry) {
            Some(facts) => drop(self.pods.insert(name, facts)),
            // Not believed any more, whoever it was: a review then asks the store.
            None => drop(self.pods.remove(&name)),
        }
    }
}

impl PodFacts {
    fn of(entry: &Entry) -> Option<Self> {
        let pod: Pod = serde_json::from_slice(&entry.value).ok()?;
        let spec = pod.spec?;
        Some(Self {
            uid: pod.metadata.uid?,
            service_account: spec.service_account_name?,
            node: spec.node_name,
        })
    }

    /// Whether a token's claims are of this pod, or what differs.
    fn agree(&self, name: &ObjectName, claims: &Claims, bound: &Bound) -> Result<(), String> {
        let claimed = bound.pod.as_ref().and_then(|pod| pod.uid.as_deref()).unwrap_or_default();
        if claimed != self.uid {
            let uid = &self.uid;
            return Err(format!("the pod {name} has the UID {uid}, the token is of {claimed:?}"));
        }
        let (own, theirs) = (&self.service_account, &bound.serviceaccount.name);
        if own != theirs || claims.sub != subject(&bound.namespace, own) {
            let sub = &claims.sub;
            return Err(format!("the pod {name} is of the service account {own}, not of {sub:?}"));
        }
        match &bound.node {
            Some(node) if self.node.as_ref() != Some(&node.name) => {
                let (own, theirs) = (&self.node, &node.name);
                Err(format!("the pod {name} is on the node {own:?}, the token is of {theirs:?}"))
            }
            _ => Ok(()),
        }
    }
}

/// Times, issuer and audience of a token whose signature is good.
fn check_claims(claims: &Claims, now: UnixTime, audience: &str) -> Result<(), TokenRefusal> {
    if claims.iss != ISSUER {
        let issuer = &claims.iss;
        return Err(TokenRefusal::Malformed(format!("its issuer is {issuer:?}, not {ISSUER:?}")));
    }
    let expires = UnixTime::from_secs(claims.exp);
    if now > expires + LEEWAY {
        return Err(TokenRefusal::Expired(expires));
    }
    let begins = UnixTime::from_secs(claims.nbf);
    if now + LEEWAY < begins {
        let why = format!("it is not valid before {begins}, and it is {now}: the clocks differ");
        return Err(TokenRefusal::Malformed(why));
    }
    if !claims.aud.iter().any(|for_whom| for_whom == audience) {
        let (found, expected) = (claims.aud.clone(), audience.to_owned());
        return Err(TokenRefusal::Audience { found, expected });
    }
    Ok(())
}

/// The library checks the signature alone: times are compared with our clock, and every refusal is
/// told apart.
pub(super) fn signature_only() -> Validation {
    let mut validation = Validation::new(Algorithm::ES256);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    validation
}

fn parse_keys(entry: &Entry) -> Result<Keys, String> {
    let set: JwkSet = serde_json::from_slice(&entry.value).map_err(|error| error.to_string())?;
    let keys = set.keys.iter().map(|jwk| {
        let id = jwk.common.key_id.clone().ok_or("a key has no id")?;
        let key = DecodingKey::from_jwk(jwk).map_err(|error| format!("key {id:?}: {error}"))?;
        Ok((id, Arc::new(key)))
    });
    keys.collect()
}

fn unavailable(error: StoreError) -> TokenRefusal {
    TokenRefusal::Unavailable(error.to_string())
}

/// The pods among [`crate::store::RESOURCES_PREFIX`].
const PODS_PREFIX: &str = "resources/Pod/";

/// One for the difference between the clocks of two processes of one machine, and rounding.
const LEEWAY: Duration = Duration::from_secs(10);

const TOKEN_BYTES_MAX: usize = 16 * 1024;

const KEYS_ASKED_EVERY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
