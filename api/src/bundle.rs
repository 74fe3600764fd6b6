//! Trust anchors and trust bundles, and the form in which a bundle is published.
//!
//! The form is SPIFFE's: a JWK set with `spiffe_sequence`
//! (<https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE_Trust_Domain_and_Bundle.md>, §4).
//! PEM is read too, because Kubernetes projects a ClusterTrustBundle so.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use x509_parser::oid_registry::OID_SIG_ED25519;
use x509_parser::prelude::X509Certificate;
use x509_parser::public_key::PublicKey;

use crate::svid::parse_certificate;
use crate::{KeyId, TrustDomain, UnixTime};

/// A root certificate that workloads of a trust domain believe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustAnchor {
    id: KeyId,
    der: Vec<u8>,
    not_before: UnixTime,
    not_after: UnixTime,
}

/// What a trust domain believes at one sequence number: never without an anchor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBundle {
    trust_domain: TrustDomain,
    /// +1 on every change of the anchor set or of the denied issuers.
    sequence: u64,
    /// Sorted by id, without duplicates.
    anchors: Vec<TrustAnchor>,
}

/// Why bytes are no trust bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// An anchor that is no CA certificate, or does not parse.
    #[error("trust anchor {index} {reason}")]
    Anchor {
        /// Its place in the bundle, from 0.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// No anchor in it: trusting nobody is never meant.
    #[error("holds no trust anchor")]
    Empty,
    /// Neither a JWK set nor PEM.
    #[error("is neither a SPIFFE bundle (a JWK set) nor PEM certificates: {0}")]
    Format(String),
    /// Larger than a bundle can be.
    #[error("is {0} bytes long; at most {BUNDLE_BYTES_MAX} are read")]
    TooLong(usize),
}

impl TrustAnchor {
    /// Parses one CA certificate.
    ///
    /// # Errors
    /// What is wrong with it, in words that follow "trust anchor".
    pub fn parse(der: &[u8]) -> Result<Self, String> {
        let certificate = parse_certificate(der).map_err(|error| error.to_string())?;
        check_authority(&certificate)?;
        // Published bundles carry the key as a JWK, and nobody could verify another kind anyway.
        if PublicJwk::of(&certificate).is_none() {
            let kind = &certificate.public_key().algorithm.algorithm;
            return Err(format!(
                "has a key of the kind {kind}; EC (P-256, P-384, P-521), RSA and Ed25519 are known"
            ));
        }
        Ok(Self {
            id: KeyId::of_spki(certificate.public_key().raw),
            der: der.to_vec(),
            not_before: UnixTime::from_secs(certificate.validity().not_before.timestamp()),
            not_after: UnixTime::from_secs(certificate.validity().not_after.timestamp()),
        })
    }

    /// SHA-256 of its SPKI.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The certificate.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Valid from this second on.
    pub fn not_before(&self) -> UnixTime {
        self.not_before
    }

    /// Valid to the end of this second.
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }
}

impl TrustBundle {
    /// A bundle of these anchors; one that is there twice is kept once.
    ///
    /// # Errors
    /// [`BundleError::Empty`] without an anchor.
    pub fn new(
        trust_domain: TrustDomain,
        sequence: u64,
        mut anchors: Vec<TrustAnchor>,
    ) -> Result<Self, BundleError> {
        // Of two certificates for one key, the one that ends last is kept, in whatever order they came.
        anchors.sort_by(|a, b| (a.id, b.not_after, &b.der).cmp(&(b.id, a.not_after, &a.der)));
        anchors.dedup_by_key(|anchor| anchor.id);
        if anchors.is_empty() {
            return Err(BundleError::Empty);
        }
        Ok(Self { trust_domain, sequence, anchors })
    }

    /// Parses a SPIFFE bundle or PEM certificates. PEM carries no sequence; it then is 0.
    ///
    /// # Errors
    /// What is wrong with it, in words that follow the name of the file or peer. Any bytes may be
    /// given; none panic.
    pub fn parse(trust_domain: &TrustDomain, bytes: &[u8]) -> Result<Self, BundleError> {
        if bytes.len() > BUNDLE_BYTES_MAX {
            return Err(BundleError::TooLong(bytes.len()));
        }
        let (sequence, ders) = if bytes.trim_ascii_start().starts_with(b"{") {
            let set: JwkSet<serde_json::Value> =
                serde_json::from_slice(bytes).map_err(|e| BundleError::Format(e.to_string()))?;
            (set.spiffe_sequence.unwrap_or(0), set.anchor_ders()?)
        } else {
            (0, pem_ders(bytes)?)
        };
        let anchors = parse_anchors(&ders)?;
        Self::new(trust_domain.clone(), sequence, anchors)
    }

    /// The form in which a bundle is published: a JWK set in JSON.
    pub fn to_jwks(&self) -> String {
        let keys = self.anchors.iter().map(Jwk::of_anchor).collect();
        let set = JwkSet {
            keys,
            spiffe_sequence: Some(self.sequence),
            spiffe_refresh_hint: Some(REFRESH_HINT_SECS),
        };
        // Strings and numbers alone: serialising them cannot fail.
        serde_json::to_string_pretty(&set).unwrap_or_default()
    }

    /// Whose bundle it is.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Its sequence number.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Its anchors, sorted by id.
    pub fn anchors(&self) -> &[TrustAnchor] {
        &self.anchors
    }

    /// The anchor with this id.
    pub fn anchor(&self, id: KeyId) -> Option<&TrustAnchor> {
        self.anchors.iter().find(|anchor| anchor.id == id)
    }
}

/// What an ack names as the bundle a workload uses: SHA-256 over the sorted anchor ids, a
/// separator, and the sorted ids of the denied issuers.
pub fn digest(
    anchors: impl IntoIterator<Item = KeyId>,
    denied: impl IntoIterator<Item = KeyId>,
) -> [u8; 32] {
    let sorted = |ids: Vec<KeyId>| {
        let mut ids = ids;
        ids.sort();
        ids.dedup();
        ids
    };
    let mut hash = Sha256::new();
    for id in sorted(anchors.into_iter().collect()) {
        hash.update(id.as_bytes());
    }
    // 32 zero bytes divide the lists: no key has that hash.
    hash.update([0; 32]);
    for id in sorted(denied.into_iter().collect()) {
        hash.update(id.as_bytes());
    }
    hash.finalize().into()
}

/// Parses anchors that arrived as DER, naming the one that is wrong by its place.
///
/// # Errors
/// The first that is no CA certificate.
pub fn parse_anchors<D: AsRef<[u8]>>(ders: &[D]) -> Result<Vec<TrustAnchor>, BundleError> {
    ders.iter()
        .enumerate()
        .map(|(index, der)| {
            TrustAnchor::parse(der.as_ref()).map_err(|reason| BundleError::Anchor { index, reason })
        })
        .collect()
}

fn pem_ders(bytes: &[u8]) -> Result<Vec<Vec<u8>>, BundleError> {
    x509_parser::pem::Pem::iter_from_buffer(bytes)
        .map(|block| match block {
            Ok(pem) if pem.label == "CERTIFICATE" => Ok(pem.contents),
            Ok(pem) => Err(BundleError::Format(format!("a PEM block is a {:?}", pem.label))),
            Err(error) => Err(BundleError::Format(error.to_string())),
        })
        .collect()
}

/// X509-SVID, §4.1 and §4.3: a signing certificate says that it is one.
fn check_authority(certificate: &X509Certificate<'_>) -> Result<(), String> {
    let is_ca = certificate
        .basic_constraints()
        .map_err(|_| "has a malformed or repeated basicConstraints extension")?
        .is_some_and(|extension| extension.value.ca);
    if !is_ca {
        return Err("is no CA certificate (basicConstraints CA:true is missing)".to_owned());
    }
    let usage =
        certificate.key_usage().map_err(|_| "has a malformed or repeated keyUsage extension")?;
    // Old roots of companies have no keyUsage at all, which forbids nothing.
    if usage.is_some_and(|extension| !extension.value.key_cert_sign()) {
        return Err("has a keyUsage without keyCertSign".to_owned());
    }
    Ok(())
}

/// Keys are read as any JSON first: one that is not for us may have any form.
#[derive(Serialize, Deserialize)]
struct JwkSet<K> {
    keys: Vec<K>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_sequence: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_refresh_hint: Option<u64>,
}

#[derive(Serialize)]
struct Jwk {
    #[serde(flatten)]
    key: Option<PublicJwk>,
    #[serde(rename = "use")]
    use_: &'static str,
    x5c: [String; 1],
}

/// A public key in the words of RFC 7518, §6, and RFC 8037, §2.
#[derive(Serialize)]
#[serde(tag = "kty")]
enum PublicJwk {
    #[serde(rename = "EC")]
    Ec { crv: &'static str, x: String, y: String },
    #[serde(rename = "OKP")]
    Okp { crv: &'static str, x: String },
    #[serde(rename = "RSA")]
    Rsa { n: String, e: String },
}

impl JwkSet<serde_json::Value> {
    /// The certificates of the keys that are meant for X.509-SVIDs. A key of another type or for
    /// another use is passed over, as the standard wants (§4.1.3).
    fn anchor_ders(&self) -> Result<Vec<Vec<u8>>, BundleError> {
        let for_us = |key: &&serde_json::Value| {
            key.get("use").is_some_and(|use_| use_ == X509_SVID_USE)
                && key.get("kty").is_some_and(|kty| KEY_TYPES.iter().any(|known| kty == known))
        };
        let keys = self.keys.iter().filter(for_us).enumerate();
        keys.map(|(index, key)| {
            let fail = |reason: String| BundleError::Anchor { index, reason };
            // X509-SVID, §6.2: exactly one certificate, the anchor's own.
            let x5c = key.get("x5c").and_then(|x5c| x5c.as_array()).map(Vec::as_slice);
            let Some([serde_json::Value::String(x5c)]) = x5c else {
                let count = x5c.map_or(0, <[_]>::len);
                return Err(fail(format!("has {count} certificates in x5c, not one")));
            };
            STANDARD.decode(x5c).map_err(|e| fail(format!("has an x5c that is no base64: {e}")))
        })
        .collect()
    }
}

impl Jwk {
    fn of_anchor(anchor: &TrustAnchor) -> Self {
        Self {
            // The certificate parsed, and its key was known, when the anchor was made.
            key: parse_certificate(&anchor.der).ok().and_then(|c| PublicJwk::of(&c)),
            use_: X509_SVID_USE,
            x5c: [STANDARD.encode(&anchor.der)],
        }
    }
}

impl PublicJwk {
    fn of(certificate: &X509Certificate<'_>) -> Option<Self> {
        let spki = certificate.public_key();
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match spki.parsed().ok()? {
            // An uncompressed point is 4, x, y; its length tells the curve.
            PublicKey::EC(point) => {
                let xy = point.data().strip_prefix(&[4])?;
                let crv = match xy.len() {
                    64 => "P-256",
                    96 => "P-384",
                    132 => "P-521",
                    _ => return None,
                };
                let (x, y) = xy.split_at(xy.len() / 2);
                Some(Self::Ec { crv, x: encode(x), y: encode(y) })
            }
            PublicKey::RSA(key) => {
                // A sign byte of DER is no part of the number.
                let number = |bytes: &[u8]| {
                    let zeroes = bytes.iter().take_while(|&&byte| byte == 0).count();
                    encode(&bytes[zeroes..])
                };
                Some(Self::Rsa { n: number(key.modulus), e: number(key.exponent) })
            }
            _ if spki.algorithm.algorithm == OID_SIG_ED25519 => {
                let x = encode(&spki.subject_public_key.data);
                Some(Self::Okp { crv: "Ed25519", x })
            }
            _ => None,
        }
    }
}

const X509_SVID_USE: &str = "x509-svid";
/// The key types of RFC 7518, §6.1, and RFC 8037 that a certificate's key can have.
const KEY_TYPES: [&str; 3] = ["EC", "OKP", "RSA"];
/// How often a consumer should look for changes; a mounted bundle is read again as often.
const REFRESH_HINT_SECS: u64 = 60;
/// A bundle of a hundred anchors is some 150 KiB.
const BUNDLE_BYTES_MAX: usize = 1 << 20;
