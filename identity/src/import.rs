//! Anchors and issuers that somebody else's CA has made: the check before they become ours.
//!
//! Everything that would come to light later, at a workload's handshake in the middle of a
//! rotation, is found out here and told with the value and the fix. Signatures are verified with the
//! algorithms that every peer of ours knows, and with no others. What no certificate says of itself
//! (whether the anchor is there already, whether it was withdrawn) is for the state to say; that the
//! whole chain holds is proved once more by each replica, with a test SVID, before it is used.

use std::time::Duration;

use steadfast_api::{KeyId, TrustAnchor, TrustDomain, UnixTime};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, EXTERNAL, IssuerRecord, IssuerRequest,
};
use x509_parser::pem::Pem;
use zeroize::Zeroizing;

use self::certificate::{Certificate, NAME_CHARS_SHOWN, shown};
use crate::authority::{SKEW, SVID_LIFETIME_MAX};
use crate::key::AuthorityKey;

mod certificate;

/// Why a file is not taken: what is wrong, with its value, and the fix. The text follows the name
/// of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// Peers would not verify it.
    #[error(
        "{whose} is signed with the algorithm {signature} by a key of the kind {key}, which no \
         workload verifies: sign it with SHA-256, SHA-384 or SHA-512 by an ECDSA key on P-256, P-384 \
         or P-521, by RSA of 2048 to 8192 bits, or by Ed25519"
    )]
    Algorithm {
        /// Which certificate.
        whose: String,
        /// The algorithm of the signature, as an object identifier.
        signature: String,
        /// That of the signer's key.
        key: String,
    },
    /// Several where one is meant.
    #[error(
        "holds {0} certificates, and an anchor is one, the root: its intermediates come with the \
         issuer (`steadfast issuer import`)"
    )]
    AnchorCount(usize),
    /// A DER file.
    #[error("is no PEM but DER: openssl x509 -inform DER -in FILE -out FILE.pem")]
    Der,
    /// It is not for TLS in both directions.
    #[error(
        "{0} has an extendedKeyUsage without both serverAuth and clientAuth, so no SVID under it \
         would be valid for both ends: leave the extension away, or name both"
    )]
    ExtendedKeyUsage(String),
    /// Over.
    #[error("{whose} ended at {at}: bring one that is valid")]
    Expired {
        /// Which certificate.
        whose: String,
        /// Its end.
        at: UnixTime,
    },
    /// Too little life left.
    #[error("{whose} ends at {at}, and it must last to {needed} at least: {why}")]
    Ending {
        /// Which certificate.
        whose: String,
        /// Its end.
        at: UnixTime,
        /// When it may end.
        needed: UnixTime,
        /// What for.
        why: &'static str,
    },
    /// An intermediate where the root is meant.
    #[error(
        "{whose} is signed by {signer:?}, not by itself, so it is an intermediate: import the root \
         above it as the anchor, and give the intermediate with the issuer (`steadfast issuer import`)"
    )]
    Intermediate {
        /// Which certificate.
        whose: String,
        /// The name of its signer.
        signer: String,
    },
    /// Of no key that was asked for.
    #[error(
        "no certificate in it has a key that this mesh has asked for ({wanted}); it holds {found}: \
         sign the request that `steadfast issuer request` prints, and no other"
    )]
    IssuerKey {
        /// What was asked for.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// The key file is not of this anchor.
    #[error("holds the key {found}, and the anchor's is {anchor}: bring the anchor's own")]
    KeyMismatch {
        /// Of the file.
        found: KeyId,
        /// Of the certificate.
        anchor: KeyId,
    },
    /// No private key that could sign.
    #[error(
        "holds no private key that could be used ({0}): it must be one PKCS#8 key, unencrypted \
         (`openssl pkcs8 -topk8 -nocrypt -in FILE -out FILE.pk8`)"
    )]
    Key(String),
    /// It may not sign.
    #[error(
        "{0} has a keyUsage without keyCertSign, so it signs no certificate: make it with \
         keyUsage=critical,keyCertSign,cRLSign"
    )]
    KeyUsage(String),
    /// No certificate at all.
    #[error("{whose} is no certificate: {reason}")]
    Malformed {
        /// Which.
        whose: String,
        /// What is wrong.
        reason: String,
    },
    /// It forbids the names of SVIDs.
    #[error(
        "{whose} has name constraints ({constraint}) under which no SVID of this trust domain is \
         valid: make it without them, or with a permitted DNS name that the trust domain ends with"
    )]
    NameConstraints {
        /// Which certificate.
        whose: String,
        /// The one in the way.
        constraint: String,
    },
    /// No certificate in it.
    #[error("holds no certificate: expected PEM, -----BEGIN CERTIFICATE-----")]
    NoCertificate,
    /// Not a CA.
    #[error(
        "{0} is no CA certificate (basicConstraints CA:true is missing): make it with \
         basicConstraints=critical,CA:true"
    )]
    NotCa(String),
    /// In the future.
    #[error(
        "{whose} is not valid before {at}: wait, or check the clocks of the CA and of this machine"
    )]
    NotYetValid {
        /// Which certificate.
        whose: String,
        /// Its beginning.
        at: UnixTime,
    },
    /// Something else in PEM.
    #[error("holds a {0:?} beside or instead of certificates: bring certificates alone")]
    OtherPem(String),
    /// Lives longer than what is above it.
    #[error(
        "the issuer ends at {at}, and it must end by {bound}, a minute before {above} does: sign it \
         for a shorter time"
    )]
    Outlives {
        /// The end of the issuer.
        at: UnixTime,
        /// When it may end.
        bound: UnixTime,
        /// What is above it.
        above: String,
    },
    /// Too few levels are allowed below it, or too many.
    #[error(
        "{whose} has pathlen {found}, and {needed} is needed{why}: make it with basicConstraints=critical,CA:true,pathlen:{needed}"
    )]
    PathLength {
        /// Which certificate.
        whose: String,
        /// What it allows.
        found: String,
        /// What it must allow.
        needed: usize,
        /// For whom.
        why: &'static str,
    },
    /// A secret that does not belong here.
    #[error(
        "holds a private key ({0}): take it out, nothing was read from it; only certificates belong \
         in this file"
    )]
    PrivateKey(String),
    /// It does not lead up to the anchor.
    #[error(
        "{whose} is signed by {signer:?}, and that is neither the anchor {anchor} nor in the file: \
         add the intermediates in between, or sign with the anchor itself"
    )]
    SignerMissing {
        /// Which certificate.
        whose: String,
        /// The name of its signer.
        signer: String,
        /// The anchor.
        anchor: String,
    },
    /// Its name leads up, its signature does not.
    #[error(
        "the signature on {whose} does not verify with the key of {signer:?}: it was signed by \
         another key of that name"
    )]
    Signature {
        /// Which certificate.
        whose: String,
        /// The name of its signer.
        signer: String,
    },
    /// Certificates that belong to nothing.
    #[error("{0} is no part of the chain from the issuer to its anchor: take it out")]
    Stray(String),
    /// Longer than any honest one.
    #[error(
        "is too large: at most {FILE_BYTES_MAX} bytes and {CERTIFICATES_MAX} certificates are read"
    )]
    TooLarge,
    /// Of another trust domain.
    #[error(
        "{whose} is of {found}, and this mesh is {ours}: bring one of this trust domain, or without a SPIFFE ID"
    )]
    TrustDomain {
        /// Which certificate.
        whose: String,
        /// What it names.
        found: String,
        /// What we are.
        ours: String,
    },
    /// A key that can be computed.
    #[error(
        "{whose} has an RSA key of {bits} bits, and fewer than 2048 are too weak: make a new key"
    )]
    WeakKey {
        /// Which certificate.
        whose: String,
        /// Its length.
        bits: usize,
    },
}

/// The anchor in a PEM file: one root, as the state will know it. Its key is external.
///
/// # Errors
/// The first thing about it that would do harm later.
pub fn anchor(
    trust_domain: &TrustDomain,
    pem: &[u8],
    now: UnixTime,
) -> Result<AnchorRecord, ImportError> {
    let ders = certificates(pem)?;
    let [der] = ders.as_slice() else { return Err(ImportError::AnchorCount(ders.len())) };
    let root = Certificate::parse(der, "the certificate")?;
    if root.parsed.subject().as_raw() != root.parsed.issuer().as_raw() {
        let (whose, signer) = (root.whose.clone(), root.signer());
        return Err(ImportError::Intermediate { whose, signer });
    }
    root.check_signed_by(&root)?;
    root.check_authority(trust_domain, now)?;
    // Issuers are CAs too.
    root.check_path_length(1)?;
    let needed = now + ANCHOR_LEFT_MIN;
    if root.not_after() < needed {
        let (whose, at) = (root.whose.clone(), root.not_after());
        let why = "a rotation to it and one away from it must fit in, by the slow path";
        return Err(ImportError::Ending { whose, at, needed, why });
    }
    let malformed = |reason| ImportError::Malformed {
        whose: root.whose.clone(),
        reason: format!("it {reason}"),
    };
    let anchor = TrustAnchor::parse(der).map_err(malformed)?;
    Ok(AnchorRecord {
        id: anchor.id(),
        der: der.clone(),
        not_after: anchor.not_after(),
        state: AnchorState::Generated,
        taint: None,
        key_ref: EXTERNAL.to_owned(),
        svid_life_max: SVID_LIFETIME_MAX,
    })
}

/// The private key of an anchor, from a PEM file: PKCS#8 in DER, to be kept.
///
/// # Errors
/// No usable key, or another one's.
pub fn anchor_key(anchor: KeyId, pem: &[u8]) -> Result<Zeroizing<Vec<u8>>, ImportError> {
    let blocks: Vec<_> = Pem::iter_from_buffer(pem).collect::<Result<_, _>>().unwrap_or_default();
    let blocks: Vec<_> =
        blocks.into_iter().map(|pem| (pem.label, Zeroizing::new(pem.contents))).collect();
    let [(label, pkcs8)] = blocks.as_slice() else {
        return Err(ImportError::Key(format!("{} PEM blocks", blocks.len())));
    };
    if label != "PRIVATE KEY" {
        return Err(ImportError::Key(format!("a {label:?}")));
    }
    let key =
        AuthorityKey::from_pkcs8(pkcs8).map_err(|error| ImportError::Key(error.to_string()))?;
    if key.id() != anchor {
        return Err(ImportError::KeyMismatch { found: key.id(), anchor });
    }
    Ok(pkcs8.clone())
}

/// The issuer in a PEM file, and which request it answers: its certificate in any place, beside the
/// intermediates between it and its anchor. The anchor itself may be there too.
///
/// # Errors
/// The first thing about any of them that would do harm later.
pub fn issuer(
    state: &TrustDomainState,
    requests: &[IssuerRequest],
    pem: &[u8],
    now: UnixTime,
) -> Result<(IssuerRequest, IssuerRecord), ImportError> {
    let ders = certificates(pem)?;
    let mut rest = Vec::new();
    for (index, der) in ders.iter().enumerate() {
        rest.push(Certificate::parse(der, &format!("certificate {} of the file", index + 1))?);
    }
    // 1. The one whose key we have.
    let mine = |certificate: &Certificate<'_>| {
        requests.iter().find(|request| request.key_id == certificate.id())
    };
    let found = rest.iter().enumerate().find_map(|(at, c)| mine(c).map(|request| (at, request)));
    let Some((at, request)) = found else {
        let list = |ids: Vec<KeyId>| ids.iter().map(KeyId::short).collect::<Vec<_>>().join(", ");
        let wanted = list(requests.iter().map(|request| request.key_id).collect());
        let found = list(rest.iter().map(Certificate::id).collect());
        return Err(ImportError::IssuerKey { wanted, found });
    };
    let issuer = rest.swap_remove(at).named("the issuer");
    let known = state.anchor(request.anchor_id);
    let svid_life = known.map_or(SVID_LIFETIME_MAX, |anchor| anchor.svid_life_max);
    let anchor = known.map(|anchor| anchor.der.as_slice()).unwrap_or_default();
    let anchor = Certificate::parse(anchor, "the anchor")?;
    rest.retain(|certificate| certificate.id() != anchor.id());
    // 2. The way up.
    let chain = way_up(&issuer, rest, &anchor)?;
    // 3. What each of them is.
    let (domain, authorities) = (&state.trust_domain, std::iter::once(&issuer).chain(&chain));
    for certificate in authorities {
        certificate.check_authority(domain, now)?;
        certificate.check_below_anchor()?;
    }
    for (below, certificate) in chain.iter().chain([&anchor]).enumerate() {
        certificate.check_path_length(below + 1)?;
        certificate.check_names(domain)?;
    }
    // cert-manager leaves it away.
    if let Some(found) = issuer.path_length().filter(|most| *most > 0) {
        let (found, why) = (found.to_string(), ", since an SVID signs nothing");
        return Err(ImportError::PathLength { whose: issuer.whose, found, needed: 0, why });
    }
    // 4. Nothing outlives what it hangs from, and it lasts long enough to be used.
    let above = chain.iter().chain([&anchor]).min_by_key(|certificate| certificate.not_after());
    if let Some(above) = above.filter(|above| issuer.not_after() > above.not_after() - SKEW) {
        let (at, bound) = (issuer.not_after(), above.not_after() - SKEW);
        return Err(ImportError::Outlives { at, bound, above: above.whose.clone() });
    }
    let needed = now + svid_life + USED_WITHIN;
    if issuer.not_after() < needed {
        let (whose, at) = (issuer.whose.clone(), issuer.not_after());
        let why = "the life of an SVID, and an hour until it signs the first";
        return Err(ImportError::Ending { whose, at, needed, why });
    }
    // What is above it may be younger.
    let begins = chain.iter().chain([&anchor]).map(Certificate::not_before).max();
    let id = issuer.id();
    let record = IssuerRecord {
        id,
        anchor_id: request.anchor_id,
        der: issuer.der.to_vec(),
        chain: chain.iter().map(|certificate| certificate.der.to_vec()).collect(),
        not_before: begins.unwrap_or_default().max(issuer.not_before()),
        not_after: issuer.not_after(),
        key_ref: format!("keys/issuers/{id}.key"),
    };
    Ok((request.clone(), record))
}

/// The intermediates between an issuer and its anchor, from the issuer up; all of the rest.
fn way_up<'a>(
    issuer: &Certificate<'a>,
    mut rest: Vec<Certificate<'a>>,
    anchor: &Certificate<'a>,
) -> Result<Vec<Certificate<'a>>, ImportError> {
    let mut chain: Vec<Certificate<'a>> = Vec::new();
    loop {
        let last = chain.last().unwrap_or(issuer);
        if last.is_named_by(anchor) && (last.check_signed_by(anchor).is_ok() || rest.is_empty()) {
            last.check_signed_by(anchor)?;
            break;
        }
        let Some(at) = rest.iter().position(|signer| last.is_named_by(signer)) else {
            let (whose, signer) = (last.whose.clone(), last.signer());
            let anchor = anchor.id().short();
            return Err(ImportError::SignerMissing { whose, signer, anchor });
        };
        let signer = rest.swap_remove(at);
        last.check_signed_by(&signer)?;
        let name = format!("the intermediate {:?}", shown(signer.parsed.subject()));
        chain.push(signer.named(&name));
    }
    match rest.first() {
        Some(stray) => Err(ImportError::Stray(stray.whose.clone())),
        None => Ok(chain),
    }
}

/// The certificates in a PEM file.
fn certificates(pem: &[u8]) -> Result<Vec<Vec<u8>>, ImportError> {
    if pem.len() > FILE_BYTES_MAX {
        return Err(ImportError::TooLarge);
    }
    if pem.first() == Some(&SEQUENCE) {
        return Err(ImportError::Der);
    }
    let mut ders = Vec::new();
    for block in Pem::iter_from_buffer(pem) {
        let malformed = |error: &dyn std::fmt::Display| ImportError::Malformed {
            whose: format!("PEM block {}", ders.len() + 1),
            reason: error.to_string(),
        };
        let block = block.map_err(|error| malformed(&error))?;
        match block.label.as_str() {
            "CERTIFICATE" => ders.push(block.contents),
            label if label.contains("PRIVATE KEY") => {
                drop(Zeroizing::new(block.contents));
                let label = label.chars().take(NAME_CHARS_SHOWN).collect();
                return Err(ImportError::PrivateKey(label));
            }
            label => {
                let label = label.chars().take(NAME_CHARS_SHOWN).collect();
                return Err(ImportError::OtherPem(label));
            }
        }
    }
    match ders.len() {
        0 => Err(ImportError::NoCertificate),
        1..=CERTIFICATES_MAX => Ok(ders),
        _ => Err(ImportError::TooLarge),
    }
}

/// An anchor is published, used and withdrawn again by phases that may each take a day and more.
pub const ANCHOR_LEFT_MIN: Duration = Duration::from_secs(7 * 86_400);
/// Until an issuer that was imported signs.
const USED_WITHIN: Duration = Duration::from_secs(3600);
/// An issuer and three intermediates, the anchor beside them.
const CERTIFICATES_MAX: usize = 5;
/// Five RSA-4096 certificates with a lot of text around them.
const FILE_BYTES_MAX: usize = 64 * 1024;
/// What DER begins with.
const SEQUENCE: u8 = 0x30;
