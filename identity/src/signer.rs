//! The issuer that signs SVIDs: certificate and key, checked against each other and against the
//! published bundle before anything is signed.
//!
//! A signer that exists has passed a test: a throw-away SVID was signed and its whole chain was
//! verified up to the anchor. What can change later (the clock, the anchor's state) is asked anew.

use std::time::Duration;

use rcgen::Issuer;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use steadfast_api::{KeyId, TrustBundle, UnixTime};
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::IssuerRecord;
use webpki::anchor_from_trusted_cert;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::authority::{SKEW, Validity};
use crate::csr::WorkloadKey;
use crate::issue::{IssueError, Prepared, Subject, Terms, verify_chain};
use crate::key::AuthorityKey;

/// An issuer that can sign.
pub struct Signer {
    issuer: Issuer<'static, AuthorityKey>,
    /// The issuer's certificate, and those between it and the anchor, from the issuer up.
    chain: Vec<CertificateDer<'static>>,
    anchor: CertificateDer<'static>,
    /// The issuer itself, as what a new SVID's signature is verified against.
    verifier: TrustAnchor<'static>,
    id: KeyId,
    anchor_id: KeyId,
    /// Of the issuer itself.
    not_before: UnixTime,
    not_after: UnixTime,
    /// The earliest end of what is above it: the certificates in between, and the anchor.
    above_not_after: UnixTime,
}

/// Why there is no signer, or it cannot sign now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignerError {
    /// Its anchor is not in the published bundle.
    #[error("the anchor {anchor} of the issuer {issuer} is not in the published bundle")]
    AnchorUnpublished {
        /// The issuer.
        issuer: KeyId,
        /// The anchor that the state names for it.
        anchor: KeyId,
    },
    /// Its certificate is none of an issuer.
    #[error("the certificate of the issuer {id} {reason}")]
    Certificate {
        /// Which issuer.
        id: KeyId,
        /// What is wrong.
        reason: String,
    },
    /// What it signed does not verify.
    #[error("a test SVID of the issuer {id} does not verify: {reason}")]
    Chain {
        /// Which issuer.
        id: KeyId,
        /// What the verifier says.
        reason: String,
    },
    /// It is denied.
    #[error("the issuer {0} has been denied")]
    Denied(KeyId),
    /// It, or something above it, ends before an SVID could.
    #[error("the issuer {id}, or what it hangs from, ends at {ends}: too soon for an SVID")]
    Ending {
        /// Which issuer.
        id: KeyId,
        /// The earliest of these ends.
        ends: UnixTime,
    },
    /// Too little of what is asked for fits in between its beginning and the ends.
    #[error(
        "nothing that is valid for {} s can be made now: the issuer {id}, with what it hangs from, \
         is valid from {begins} to {ends}, and SVIDs live for {} s at most (--svid-ttl)",
        least.as_secs(), most.as_secs()
    )]
    Short {
        /// Which issuer.
        id: KeyId,
        /// Its beginning.
        begins: UnixTime,
        /// The earliest end of what an SVID hangs from.
        ends: UnixTime,
        /// The longest life of any SVID.
        most: Duration,
        /// What is asked for.
        least: Duration,
    },
    /// The key file is missing, unreadable or no key.
    #[error("the key of the issuer {id} cannot be used: {reason}")]
    Key {
        /// Which issuer.
        id: KeyId,
        /// What is wrong.
        reason: String,
    },
    /// The state names no active issuer.
    #[error("the trust domain's state has no issuer {0}, though it names it as the active one")]
    Unknown(KeyId),
}

impl Signer {
    /// The signer of an issuer under this bundle.
    ///
    /// # Errors
    /// The first thing about it that cannot be used.
    pub fn new(
        state: &TrustDomainState,
        bundle: &TrustBundle,
        record: &IssuerRecord,
        key: AuthorityKey,
        now: UnixTime,
    ) -> Result<Self, SignerError> {
        let id = record.id;
        if state.denies(id) {
            return Err(SignerError::Denied(id));
        }
        let anchor = bundle
            .anchor(record.anchor_id)
            .ok_or(SignerError::AnchorUnpublished { issuer: id, anchor: record.anchor_id })?;
        if key.id() != id {
            let reason = format!("it is the key {}", key.id());
            return Err(SignerError::Key { id, reason });
        }
        let validity = check_certificate(record)?;
        let above =
            record.chain.iter().map(|der| end_of(id, der)).collect::<Result<Vec<_>, _>>()?;
        let above_not_after = above.into_iter().fold(anchor.not_after(), UnixTime::min);
        let certificate = CertificateDer::from(record.der.clone());
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| SignerError::Certificate { id, reason: error.to_string() })?;
        let verifier = anchor_from_trusted_cert(&certificate)
            .map_err(|error| SignerError::Certificate { id, reason: error.to_string() })?
            .to_owned();
        let above = record.chain.iter().map(|der| CertificateDer::from(der.clone()));
        let signer = Self {
            issuer,
            verifier,
            chain: std::iter::once(certificate).chain(above).collect(),
            anchor: CertificateDer::from(anchor.der().to_vec()),
            id,
            anchor_id: record.anchor_id,
            not_before: validity.not_before,
            not_after: validity.not_after,
            above_not_after,
        };
        signer.test(state, now)?;
        Ok(signer)
    }

    /// Signs a throw-away SVID and verifies it, so that a broken issuer is found before a workload
    /// asks. It is handed to nobody and its key is dropped.
    fn test(&self, state: &TrustDomainState, now: UnixTime) -> Result<(), SignerError> {
        let broken = |reason: String| SignerError::Chain { id: self.id, reason };
        let subject = Subject::new(&state.trust_domain, "self-test", "self-test", "self-test");
        let subject = subject.map_err(|error| broken(error.to_string()))?;
        let (key, _) = AuthorityKey::generate().map_err(|error| broken(error.to_string()))?;
        let key = WorkloadKey::own(&key).ok_or_else(|| broken("no key".to_owned()))?;
        let issued = Prepared::new(subject, key, self, now, Terms::usual(TEST_LIFETIME))
            .and_then(|prepared| prepared.lint(self))
            .and_then(|linted| linted.sign(self))
            .and_then(|signed| signed.verify(self));
        match issued {
            // Once for all that it will sign: issuer and anchor stay the same bytes.
            Ok(issued) => {
                verify_chain(&issued.der, self, now).map_err(|error| broken(error.to_string()))
            }
            Err(IssueError::Signer(error)) => Err(error),
            Err(error) => Err(broken(ErrorChain(&error).to_string())),
        }
    }

    /// Whether it is still this issuer of this state, under an anchor that is published, and not
    /// denied.
    pub fn serves(
        &self,
        record: &IssuerRecord,
        state: &TrustDomainState,
        bundle: &TrustBundle,
    ) -> bool {
        record.id == self.id
            && record.anchor_id == self.anchor_id
            && std::iter::once(&record.der)
                .chain(&record.chain)
                .map(Vec::as_slice)
                .eq(self.chain.iter().map(AsRef::as_ref))
            && bundle.anchor(self.anchor_id).is_some_and(|anchor| anchor.der() == &*self.anchor)
            && !state.denies(self.id)
    }

    /// The window of an SVID on these terms that is made now: it ends before everything above it,
    /// less the clocks' skew.
    ///
    /// # Errors
    /// [`SignerError::Ending`] when nothing would be left of it, [`SignerError::Short`] when too
    /// little would.
    pub(crate) fn window(&self, now: UnixTime, terms: Terms) -> Result<Validity, SignerError> {
        let ends = self.ends();
        let not_after = (now + terms.lifetime).min(ends - SKEW);
        if not_after <= now || now < self.not_before {
            return Err(SignerError::Ending { id: self.id, ends });
        }
        let not_before = (now - terms.backdate).max(self.not_before);
        if not_after.since(not_before) < terms.least {
            let (begins, most, least) = (self.not_before, terms.lifetime, terms.least);
            return Err(SignerError::Short { id: self.id, begins, ends, most, least });
        }
        Ok(Validity { not_before, not_after })
    }

    /// The end of an SVID of this lifetime that is made now.
    ///
    /// # Errors
    /// [`SignerError::Ending`] when nothing would be left of it.
    pub fn end(&self, now: UnixTime, lifetime: Duration) -> Result<UnixTime, SignerError> {
        self.window(now, Terms::usual(lifetime)).map(|validity| validity.not_after)
    }

    /// SHA-256 of the issuer's SPKI.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The anchor above it.
    pub fn anchor_id(&self) -> KeyId {
        self.anchor_id
    }

    /// The end of the issuer's certificate.
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }

    /// The earliest end of all certificates that its SVIDs hang from.
    pub(crate) fn ends(&self) -> UnixTime {
        self.not_after.min(self.above_not_after)
    }

    /// What is sent after each SVID: the issuer's certificate, and those between it and the anchor.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// What the signature of a new SVID is verified against.
    pub(crate) fn verifier(&self) -> &TrustAnchor<'static> {
        &self.verifier
    }

    /// The certificate of the anchor above it.
    pub(crate) fn anchor(&self) -> &CertificateDer<'static> {
        &self.anchor
    }

    pub(crate) fn issuer(&self) -> &Issuer<'static, AuthorityKey> {
        &self.issuer
    }
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Signer({} under {})", self.id, self.anchor_id)
    }
}

/// Its certificate must be of its key, and of a CA whose SVIDs sign nothing.
fn check_certificate(record: &IssuerRecord) -> Result<Validity, SignerError> {
    let refuse = |reason: &str| SignerError::Certificate { id: record.id, reason: reason.into() };
    let (rest, certificate) = X509Certificate::from_der(&record.der)
        .map_err(|error| refuse(&format!("does not parse: {error}")))?;
    if !rest.is_empty() {
        return Err(refuse("has bytes behind it"));
    }
    if KeyId::of_spki(certificate.public_key().raw) != record.id {
        return Err(refuse("is of another key"));
    }
    let constraints = certificate.basic_constraints().ok().flatten().map(|found| found.value);
    match constraints {
        Some(found) if found.ca && found.path_len_constraint.is_none_or(|most| most == 0) => {}
        _ => return Err(refuse("is not that of an issuer (CA:true, pathLen 0 or none)")),
    }
    Ok(Validity {
        not_before: UnixTime::from_secs(certificate.validity().not_before.timestamp()),
        not_after: UnixTime::from_secs(certificate.validity().not_after.timestamp()),
    })
}

/// The end of a certificate between an issuer and its anchor.
fn end_of(id: KeyId, der: &[u8]) -> Result<UnixTime, SignerError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|error| {
        let reason = format!("stands under one that does not parse: {error}");
        SignerError::Certificate { id, reason }
    })?;
    Ok(UnixTime::from_secs(certificate.validity().not_after.timestamp()))
}

const TEST_LIFETIME: Duration = Duration::from_secs(60);
