//! The stored state of a trust domain: one object, changed by one compare-and-swap.
//!
//! It is what every replica serves and every phase change rewrites. Private keys are not in it,
//! only references to them. What a person orders stands here too, beside what is done about it, so
//! that a restart of anything loses nothing. How it changes is for [`crate::rotation`],
//! [`crate::issuer`] and [`crate::orders`] to say; the methods here only read.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::bundle::{BundleError, digest};
use steadfast_api::{KeyId, TrustAnchor, TrustBundle, TrustDomain, UnixTime};

use crate::instance::Instance;
use crate::issuer::IssuerRotation;
use crate::rotation::Rotation;

/// The whole state of a trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TrustDomainState {
    /// Its name.
    pub trust_domain: TrustDomain,
    /// How long a replica acts on a copy of this that the store has not confirmed, and so how long
    /// a fence lasts. It is set when the trust domain is founded and never changed: a replica with
    /// a longer lease than its controller believes in could serve what that one counts as gone.
    #[serde(default = "read_lease_default")]
    pub read_lease: Duration,
    /// +1 on every change of the anchor set or of the denied issuers; 1 at the start.
    pub seq: u64,
    /// Every anchor that is not destroyed.
    pub anchors: Vec<AnchorRecord>,
    /// Every issuer that has not expired.
    pub issuers: Vec<IssuerRecord>,
    /// The issuer that signs SVIDs.
    pub active_issuer: KeyId,
    /// Issuers whose keys are gone: who has one in memory signs with it, and nobody else can.
    #[serde(default)]
    pub lost_issuers: Vec<KeyId>,
    /// Issuers whose SVIDs are refused.
    pub denied_issuers: Vec<DeniedIssuer>,
    /// Anchors that are withdrawn for ever.
    pub tombstones: Vec<KeyId>,
    /// The rotation that is under way; `None`: idle.
    pub rotation: Option<Rotation>,
    /// The rotation of the issuer that is under way.
    pub issuer_rotation: Option<IssuerRotation>,
    /// The rotation that was asked for and has not begun.
    pub requested: Option<Request>,
    /// Whether phases wait for a person.
    pub paused: bool,
    /// Whom no census waits for.
    pub exemptions: Vec<Exemption>,
    /// `w`: when the active anchor was last changed. Every SVID under another anchor was issued
    /// before this plus the read lease.
    pub activated_at: UnixTime,
    /// When a store that was put back was last recovered: whatever stands by may have been active
    /// before, and SVIDs under it may be alive.
    #[serde(default)]
    pub recovered_at: Option<UnixTime>,
    /// Anchors that a recovery publishes only so that they are drained: no census has shown that
    /// everybody holds them, or has since they were perhaps withdrawn.
    #[serde(default)]
    pub unsettled: Vec<KeyId>,
    /// Anchors that a person has turned a rotation back from, the newest last: what lists one as a
    /// proposal does not order it again before a person has.
    #[serde(default)]
    pub unwanted: Vec<KeyId>,
    /// SVIDs of holders that cannot ack.
    pub promised: Vec<Promise>,
    /// Holders that cannot ack.
    pub consumers: Vec<Consumer>,
    /// The newest order to renew early; every replica passes it on.
    pub renew: Option<RenewOrder>,
    /// An issuer that identity is to make: its key and a CSR for it.
    pub wanted_issuer: Option<WantedIssuer>,
    /// The same under external anchors, which persons sign: they take their time, and no issuer
    /// under another anchor waits for them.
    #[serde(default)]
    pub wanted_external: Vec<WantedIssuer>,
    /// Keys to be destroyed: nothing names them any more.
    pub condemned: Vec<Condemned>,
    /// Why nothing is issued until a person has looked.
    pub halted: Option<Halt>,
    /// How many rotations there have been, this one included.
    pub rotations: u64,
    /// The newest finished rotations, the oldest first.
    pub past: Vec<PastRotation>,
}

/// One trust anchor.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AnchorRecord {
    /// SHA-256 of its SPKI.
    pub id: KeyId,
    /// The certificate, DER in hex.
    #[serde(with = "hex_bytes")]
    pub der: Vec<u8>,
    /// Its end.
    pub not_after: UnixTime,
    /// Where it stands in its life.
    pub state: AnchorState,
    /// That its key is, or may be, in other hands.
    pub taint: Option<Taint>,
    /// Where its key store keeps the key; [`EXTERNAL`]: we do not.
    pub key_ref: String,
    /// The longest life of an SVID that was ever promised under it: replicas raise it before they
    /// issue a longer one.
    pub svid_life_max: Duration,
}

/// A key is, or may be, in other hands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Taint {
    /// Who said so.
    pub by: String,
    /// How long those who do not answer are waited for.
    pub deadline: Duration,
}

/// Where an anchor stands in its life: it goes from top to bottom, and only `Active` and `Retiring`
/// may change places. It is stored, never derived from what else is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IssuerRecord {
    /// SHA-256 of its SPKI.
    pub id: KeyId,
    /// The anchor that signed it.
    pub anchor_id: KeyId,
    /// The certificate, DER in hex.
    #[serde(with = "hex_bytes")]
    pub der: Vec<u8>,
    /// The certificates between it and the anchor, from its own signer up, DER in hex. Only an
    /// external anchor has issuers with any.
    #[serde(with = "hex_list", default, skip_serializing_if = "Vec::is_empty")]
    pub chain: Vec<Vec<u8>>,
    /// Its beginning.
    pub not_before: UnixTime,
    /// Its end.
    pub not_after: UnixTime,
    /// Where its key store keeps the key.
    pub key_ref: String,
}

/// An issuer whose SVIDs are refused until they have all expired.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeniedIssuer {
    /// SHA-256 of its SPKI.
    pub id: KeyId,
    /// Its end.
    pub until: UnixTime,
}

/// What a person, or the schedule, wants.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Request {
    /// Who, for the history.
    pub by: String,
    /// When.
    pub at: UnixTime,
    /// The anchor that becomes active; `None`: the standby. It stands in `anchors` as `Generated`.
    pub anchor: Option<KeyId>,
    /// Who goes first.
    pub canary: Option<CanaryPlan>,
    /// The standby that goes, for a fresh one; the active anchor stays.
    #[serde(default)]
    pub replaces: Option<KeyId>,
}

/// Who gets SVIDs under the next anchor before all others, and for how long.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CanaryPlan {
    /// Which workloads.
    pub selector: Selector,
    /// How long nothing may go wrong.
    pub window: Duration,
}

/// Which workloads are canaries.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selector {
    /// Those of one namespace.
    Namespace(String),
    /// So many in a hundred of all, by a hash of their pods.
    Percent(u8),
}

/// An instance that no census waits for. It ends with an ack that would settle the current phase,
/// or with a new instance: one that has started since.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Exemption {
    /// Which pod, and the newest start of it that had been heard of. A later one may have run by then
    /// that nobody could tell of.
    pub instance: Instance,
    /// When: whatever had started by then is exempt.
    #[serde(default)]
    pub at: UnixTime,
    /// The pod's name, or the replica's; empty where it was exempted by a version that kept none.
    #[serde(default)]
    pub name: String,
    /// Why.
    pub reason: String,
    /// Who said so.
    pub by: String,
    /// Whether a phase was left without it: from then on only its own ack, or a new instance, ends
    /// the exemption.
    pub relied_on: bool,
}

/// SVIDs of holders that cannot ack: nothing under this anchor lives longer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Promise {
    /// Under which anchor.
    pub anchor_id: KeyId,
    /// Who: the kind, or the name it was registered by.
    pub holder: String,
    /// The latest end of an SVID of theirs.
    pub not_after: UnixTime,
}

/// A holder of the bundle that cannot ack.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Consumer {
    /// Its name.
    pub name: String,
    /// How often it reads the bundle; `None`: it has read it once and for all, so that no anchor
    /// can be added before it is restarted or removed.
    pub refresh: Option<Duration>,
}

/// An order to every workload: renew once, at a point of the window of its own choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RenewOrder {
    /// Ascends.
    pub id: u64,
    /// The beginning of the window.
    pub from: UnixTime,
    /// Its length.
    pub window: Duration,
}

/// An issuer that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WantedIssuer {
    /// The anchor that will sign it.
    pub anchor_id: KeyId,
    /// Tells this wish from an earlier one: the revision of the state it was made in.
    pub number: u64,
}

/// What a trust domain is founded on, before it has its first issuer and so before it has a state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foundation {
    /// Its name.
    pub trust_domain: TrustDomain,
    /// As in the state.
    pub read_lease: Duration,
    /// The active anchor and the standby; empty before they are made.
    pub anchors: Vec<AnchorRecord>,
}

impl Foundation {
    /// The issuer that identity is to make; `None` before there are anchors. No state has its
    /// number.
    pub fn wish(&self) -> Option<WantedIssuer> {
        self.anchors.first().map(|anchor| WantedIssuer { anchor_id: anchor.id, number: 0 })
    }
}

/// The answer to a [`WantedIssuer`]: identity has made the key and keeps it. It is an object of its
/// own, under its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuerRequest {
    /// Of the wish.
    pub number: u64,
    /// Of the wish.
    pub anchor_id: KeyId,
    /// SHA-256 of the new key's SPKI.
    pub key_id: KeyId,
    /// PKCS#10, DER in hex: its signature shows that identity holds the key.
    #[serde(with = "hex_bytes")]
    pub csr: Vec<u8>,
    /// Where identity keeps it, for people.
    #[serde(default)]
    pub key_ref: String,
}

/// A key that is to be destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Condemned {
    /// An anchor's.
    Anchor(KeyId),
    /// The anchor's that was made for this label, if it was.
    MadeFor(Label),
}

/// By what a key is found again that was made before a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Label {
    /// The rotation it was made for.
    pub rotation: u64,
    /// The second try of a rotation whose first anchor was stolen has another number.
    pub attempt: u32,
}

/// Why nothing is issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Halt {
    /// A workload holds a bundle that this state has never published: the store was restored.
    Restored {
        /// The highest sequence number that was seen.
        seen_seq: u64,
    },
}

/// A rotation that is over.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PastRotation {
    /// Its number.
    pub number: u64,
    /// What it was for.
    pub kind: String,
    /// Who wanted it.
    pub by: String,
    /// When it began.
    pub started: UnixTime,
    /// When it ended.
    pub ended: UnixTime,
    /// How it ended.
    pub outcome: Outcome,
    /// What it went through, with the digest of what was seen at each step.
    pub steps: Vec<crate::rotation::Step>,
}

/// How a rotation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As a person wished, back where it had begun, with another standby at most.
    Aborted,
    /// As planned.
    Done,
    /// Something else has done meanwhile what it was for.
    Overtaken,
}

impl Outcome {
    /// In one word, for labels.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Aborted => "aborted",
            Self::Done => "done",
            Self::Overtaken => "overtaken",
        }
    }
}

impl Exemption {
    /// By what people know it.
    pub fn shown_name(&self) -> &str {
        if self.name.is_empty() { &self.instance.pod_uid } else { &self.name }
    }

    /// Whether it is of somebody who had not answered at the deadline of an emergency.
    pub fn is_cut_off(&self) -> bool {
        self.by == DEADLINE
    }
}

impl AnchorRecord {
    /// Whether its key is elsewhere: a person has its issuers signed, and destroys it.
    pub fn is_external(&self) -> bool {
        self.key_ref == EXTERNAL
    }
}

impl AnchorState {
    /// In one word, for labels.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Generated => "generated",
            Self::Staged => "staged",
            Self::Standby => "standby",
            Self::Active => "active",
            Self::Retiring => "retiring",
            Self::Withdrawn => "withdrawn",
        }
    }

    /// Whether an anchor in this state is in the published bundle.
    pub const fn published(self) -> bool {
        matches!(self, Self::Staged | Self::Standby | Self::Active | Self::Retiring)
    }

    /// Whether everyone who is asked has acked an anchor in this state, unless it is
    /// [`unsettled`](TrustDomainState::unsettled).
    const fn acked(self) -> bool {
        matches!(self, Self::Standby | Self::Active | Self::Retiring)
    }
}

impl TrustDomainState {
    /// Whether everyone who is asked has acked this anchor.
    pub fn acked(&self, id: KeyId) -> bool {
        self.anchor(id).is_some_and(|anchor| anchor.state.acked()) && !self.unsettled.contains(&id)
    }

    /// A trust domain at its beginning: an active anchor, the issuer under it, and a standby.
    pub fn founded(
        trust_domain: TrustDomain,
        anchors: Vec<AnchorRecord>,
        issuer: IssuerRecord,
        now: UnixTime,
    ) -> Self {
        Self {
            trust_domain,
            read_lease: READ_LEASE,
            seq: 1,
            anchors,
            active_issuer: issuer.id,
            lost_issuers: Vec::new(),
            issuers: vec![issuer],
            denied_issuers: Vec::new(),
            tombstones: Vec::new(),
            rotation: None,
            issuer_rotation: None,
            requested: None,
            paused: false,
            exemptions: Vec::new(),
            activated_at: now,
            recovered_at: None,
            unsettled: Vec::new(),
            unwanted: Vec::new(),
            promised: Vec::new(),
            consumers: Vec::new(),
            renew: None,
            wanted_issuer: None,
            wanted_external: Vec::new(),
            condemned: Vec::new(),
            halted: None,
            rotations: 0,
            past: Vec::new(),
        }
    }

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

    /// What an ack must name as the digest of the mounted file.
    pub fn mounted_digest(&self) -> [u8; 32] {
        digest(self.published().map(|a| a.id), [])
    }

    /// The issuer that signs SVIDs.
    pub fn active_issuer(&self) -> Option<&IssuerRecord> {
        self.issuer(self.active_issuer)
    }

    /// The issuer with this id.
    pub fn issuer(&self, id: KeyId) -> Option<&IssuerRecord> {
        self.issuers.iter().find(|issuer| issuer.id == id)
    }

    /// Whether the SVIDs of this issuer are refused.
    pub fn denies(&self, issuer: KeyId) -> bool {
        self.denied_issuers.iter().any(|denied| denied.id == issuer)
    }

    /// The anchor that signs the active issuer.
    pub fn active_anchor(&self) -> Option<&AnchorRecord> {
        self.anchors.iter().find(|anchor| anchor.state == AnchorState::Active)
    }

    /// The anchor with this id.
    pub fn anchor(&self, id: KeyId) -> Option<&AnchorRecord> {
        self.anchors.iter().find(|anchor| anchor.id == id)
    }

    /// The anchors that stand in the bundle.
    pub fn published(&self) -> impl Iterator<Item = &AnchorRecord> {
        self.anchors
            .iter()
            .filter(|anchor| anchor.state.published() && !self.tombstones.contains(&anchor.id))
    }

    /// The anchors in this state.
    pub fn in_state(&self, state: AnchorState) -> impl Iterator<Item = &AnchorRecord> {
        self.anchors.iter().filter(move |anchor| anchor.state == state)
    }

    /// The issuer for a workload: the canary's, for one that is, else the active one.
    pub fn issuer_for(&self, namespace: &str, pod_uid: &str) -> KeyId {
        match self.rotation.as_ref().and_then(Rotation::canary) {
            Some(canary) if canary.plan.selector.selects(namespace, pod_uid) => canary.issuer,
            _ => self.active_issuer,
        }
    }
}

impl Selector {
    /// Whether this workload is a canary.
    pub fn selects(&self, namespace: &str, pod_uid: &str) -> bool {
        match self {
            Self::Namespace(canaries) => canaries == namespace,
            // Any hash does: the same pod always falls on the same side.
            Self::Percent(percent) => {
                let hash = KeyId::of_spki(pod_uid.as_bytes());
                let first = hash.as_bytes().first_chunk().copied().unwrap_or_default();
                u32::from_be_bytes(first) % 100 < u32::from(*percent)
            }
        }
    }
}

/// By whom those are exempt who had not answered at a deadline.
pub(crate) const DEADLINE: &str = "deadline";
fn read_lease_default() -> Duration {
    READ_LEASE
}

/// `Tc`: the read lease, unless a shorter one is chosen when the trust domain is founded.
pub const READ_LEASE: Duration = Duration::from_secs(15);
/// Below, a store that is slow for a moment stops the issuing.
pub const READ_LEASE_MIN: Duration = Duration::from_secs(3);

/// The kind of holder that a pod is whose certificate its kubelet asks for: it has no trust stream.
pub const POD_CERTIFICATES: &str = "pod certificates";
/// How often a kubelet reads the bundle anew that such a pod has mounted.
pub const KUBELET_REFRESH: Duration = Duration::from_secs(90);

/// Where the key of an anchor is that is not ours to keep.
pub const EXTERNAL: &str = "external";

/// A list of bytes as hex in JSON.
mod hex_list {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        list: &[Vec<u8>],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(hex::encode))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Vec<u8>>, D::Error> {
        let list = Vec::<String>::deserialize(deserializer)?;
        list.iter().map(hex::decode).collect::<Result<_, _>>().map_err(serde::de::Error::custom)
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
