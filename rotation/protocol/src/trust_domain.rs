//! The stored state of a trust domain: one object, changed by one compare-and-swap.
//!
//! It is what every replica serves and every phase change rewrites. Private keys are not in it,
//! only references to them.

use serde::{Deserialize, Serialize};
use steadfast_api::bundle::{BundleError, digest};
use steadfast_api::{KeyId, TrustAnchor, TrustBundle, TrustDomain, UnixTime};

/// The whole state of a trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustDomainState {
    /// Its name.
    pub trust_domain: TrustDomain,
    /// +1 on every change of the anchor set or of the denied issuers; 1 at the start.
    pub seq: u64,
    /// Every anchor that is not destroyed.
    pub anchors: Vec<AnchorRecord>,
    /// Every issuer that has not expired.
    pub issuers: Vec<IssuerRecord>,
    /// The issuer that signs SVIDs.
    pub active_issuer: KeyId,
    /// Issuers whose SVIDs are refused.
    #[serde(default)]
    pub denied_issuers: Vec<DeniedIssuer>,
    /// Anchors that are withdrawn for ever.
    #[serde(default)]
    pub tombstones: Vec<KeyId>,
}

/// One trust anchor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnchorRecord {
    /// SHA-256 of its SPKI.
    pub id: KeyId,
    /// The certificate, DER in hex.
    #[serde(with = "hex_bytes")]
    pub der: Vec<u8>,
    /// Where it stands in its life.
    pub state: AnchorState,
    /// Where its key store keeps the key.
    pub key_ref: String,
}

/// Where an anchor stands in its life: it goes from top to bottom, and only `Active` and `Retiring`
/// may change places. It is stored, never derived from what else is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AnchorState {
    /// Its key exists; it is in no bundle.
    Generated,
    /// In the bundle; not everyone has acked it.
    Staged,
    /// In the bundle, acked by everyone, signs nothing.
    Standby,
    /// Signs the active issuer.
    Active,
    /// In the bundle, signs no new issuer.
    Retiring,
    /// Out of the bundle, for ever.
    Withdrawn,
}

/// One issuer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuerRecord {
    /// SHA-256 of its SPKI.
    pub id: KeyId,
    /// The anchor that signed it.
    pub anchor_id: KeyId,
    /// The certificate, DER in hex.
    #[serde(with = "hex_bytes")]
    pub der: Vec<u8>,
    /// Its end.
    pub not_after: UnixTime,
    /// Where its key store keeps the key.
    pub key_ref: String,
}

/// An issuer whose SVIDs are refused until they have all expired.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeniedIssuer {
    /// SHA-256 of its SPKI.
    pub id: KeyId,
    /// Its end.
    pub until: UnixTime,
}

impl AnchorState {
    /// Whether an anchor in this state is in the published bundle.
    pub const fn published(self) -> bool {
        matches!(self, Self::Staged | Self::Standby | Self::Active | Self::Retiring)
    }
}

impl TrustDomainState {
    /// The bundle that this state publishes.
    ///
    /// # Errors
    /// An anchor that does not parse, or no published anchor at all.
    pub fn bundle(&self) -> Result<TrustBundle, BundleError> {
        let anchors = self.published().enumerate().map(|(index, record)| {
            TrustAnchor::parse(&record.der).map_err(|reason| BundleError::Anchor { index, reason })
        });
        TrustBundle::new(self.trust_domain.clone(), self.seq, anchors.collect::<Result<_, _>>()?)
    }

    /// What an ack must name to count for this state.
    pub fn digest(&self) -> [u8; 32] {
        digest(self.published().map(|a| a.id), self.denied_issuers.iter().map(|d| d.id))
    }

    /// The issuer that signs SVIDs.
    pub fn active_issuer(&self) -> Option<&IssuerRecord> {
        self.issuers.iter().find(|issuer| issuer.id == self.active_issuer)
    }

    /// The anchors that stand in the bundle.
    pub fn published(&self) -> impl Iterator<Item = &AnchorRecord> {
        self.anchors
            .iter()
            .filter(|anchor| anchor.state.published() && !self.tombstones.contains(&anchor.id))
    }
}

/// Bytes as hex in JSON.
mod hex_bytes {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        hex::decode(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}
