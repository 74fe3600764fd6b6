//! The store: entries with revisions, changed by compare-and-swap, watched from a revision.
//!
//! What the API server is on Kubernetes. Revisions are of the whole store: every write gets the
//! next one, without holes, so that a watch which resumes from a revision misses nothing.

use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use steadfast_api::UnixTime;

/// The revision of one write; 0 is before the first.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// A value as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its key, with `/` between the parts.
    pub key: String,
    /// Its bytes.
    pub value: Bytes,
    /// The write that made it so.
    pub revision: Revision,
}

/// One change that a watch reports, in the order of revisions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The key was deleted by the write with this revision.
    Deleted {
        /// Which key.
        key: String,
        /// By which write.
        revision: Revision,
    },
    /// The key was made or changed.
    Put(Entry),
    /// Everything up to this revision has been reported: the watch is up to date.
    Synced(Revision),
}

/// Why the store did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The history that a watch wants to resume from is no longer kept: list again.
    #[error("the store no longer has revision {0:?}; list again and watch from there")]
    Compacted(Revision),
    /// Somebody else wrote since the expected revision.
    #[error("{key:?} is at revision {actual:?}, not {expected:?}: somebody else has changed it")]
    Conflict {
        /// Which key.
        key: String,
        /// What the writer had read; `None`: the key should not exist.
        expected: Option<Revision>,
        /// What it is; `None`: the key does not exist.
        actual: Option<Revision>,
    },
    /// The caller may not do that.
    #[error("not permitted: {0}")]
    Denied(String),
    /// The API server has no such objects.
    #[error("the API server knows nothing of {0}: `steadfast install --crds | kubectl apply -f -`")]
    NoSuchKind(String),
    /// Somebody else has changed an object of ours so that it says nothing.
    #[error("{key:?} in the store cannot be read: {why}; put it back from a backup")]
    Unreadable {
        /// Which key.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// The store cannot be reached or did not answer in time.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// The disk refused the write; nothing has changed.
    #[error("the store could not write: {0}")]
    WriteFailed(String),
}

/// A store, near or far.
#[async_trait::async_trait]
pub trait Store: Send + Sync + 'static {
    /// The entry of a key, read from the store itself and never from a cache: an answer confirms
    /// a read lease.
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError>;

    /// All entries whose key begins with `prefix`, in the order of their keys, and the revision
    /// that they are the state of.
    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError>;

    /// The same, a part at a time and in any order: what would be too much to be held at once.
    async fn list_parts(
        &self,
        prefix: &str,
        part: &mut (dyn FnMut(Vec<Entry>) + Send),
    ) -> Result<Revision, StoreError> {
        let (entries, revision) = self.list(prefix).await?;
        part(entries);
        Ok(revision)
    }

    /// Writes (or, without a value, deletes) a key that still is at `expected`; `None` is a key
    /// that does not exist. Acknowledged means durable.
    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Option<Bytes>,
    ) -> Result<Revision, StoreError>;

    /// Every change after `from` of keys that begin with `prefix`, without a hole, for ever: the
    /// stream ends with an error only. What was told at once is followed by [`Event::Synced`], from
    /// where another watch goes on.
    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<Event, StoreError>>, StoreError>;
}

/// Where the state of the trust domain is kept: `TrustDomainState` in JSON.
pub const TRUST_DOMAIN_KEY: &str = "trust/domain";

/// The prefix of requests for issuers, `trust/issuer-requests/<number>`: each an `IssuerRequest` in
/// JSON, which identity posts and the rotation controller signs.
pub const ISSUER_REQUESTS_PREFIX: &str = "trust/issuer-requests/";

/// Where identity posts what another tool keeps as the issuer: an `IssuerProposal` in JSON.
pub const ISSUER_PROPOSAL_KEY: &str = "trust/issuer-proposal";

/// Where it is kept how far the founding of a trust domain is: a `Foundation` in JSON. There is none
/// once there is a trust domain.
pub const FOUNDATION_KEY: &str = "trust/foundation";

/// The prefix of what finds an anchor's key again that was made before a crash:
/// `trust/anchor-keys/<rotation>-<attempt>`, the key's id in JSON.
pub const ANCHOR_KEYS_PREFIX: &str = "trust/anchor-keys/";

/// Where the ledger of instances is kept, so that nobody is forgotten who has vanished: in pieces,
/// `trust/ledger/<piece>`.
pub const LEDGER_KEY: &str = "trust/ledger";

/// The prefix of the evidence of rotations,
/// `trust/evidence/<rotation>/<step>/<digest>/<piece>`: who acked what before a phase was left.
pub const EVIDENCE_PREFIX: &str = "trust/evidence/";

/// Where it is written down which evidence there is.
pub const EVIDENCE_INDEX_KEY: &str = "trust/evidence-index";

/// Which controller of rotations leads, as it is kept at [`LEADER_KEY`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderLease {
    /// Which process.
    pub holder: String,
    /// When it was taken or renewed last, by the store's clock.
    pub renewed_at: UnixTime,
    /// How long it holds from then on.
    pub duration: Duration,
}

/// Where it is kept which controller of rotations leads: a [`LeaderLease`] in JSON.
pub const LEADER_KEY: &str = "trust/rotation-leader";

/// What workloads hold, as long as the trust domain is halted: the `Findings` of the rotation
/// controller in JSON, which `steadfast trust recover` reads.
pub const FINDINGS_KEY: &str = "trust/findings";

/// The prefix of mirrors of the bundle, `mirrors/<namespace>`: their files by name, in JSON. On
/// Kubernetes each is a ConfigMap.
pub const MIRRORS_PREFIX: &str = "mirrors/";

/// The prefix of resources: `resources/<kind>/<namespace>/<name>`, each a Kubernetes object in
/// JSON; the namespace of a cluster-wide object is empty.
pub const RESOURCES_PREFIX: &str = "resources/";

/// Where the public keys of the token issuer are kept, as a JWK set.
pub const TOKEN_JWKS_KEY: &str = "tokens/jwks";
