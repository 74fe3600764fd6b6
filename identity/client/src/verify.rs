//! Whether a presented chain is that of a workload we deal with.
//!
//! Pure: a chain, what we believe and a time go in; a [`VerifiedPeer`] or the exact reason against
//! it comes out. Path, signatures and times are checked by rustls-webpki, the form of an SVID by
//! `steadfast-api`; what neither knows is checked here: anchors have an end of their own, issuers
//! can be denied, and the SPIFFE ID must be the expected one.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use rustls::CertificateError;
use rustls_pki_types::CertificateDer;
use steadfast_api::svid::SvidError;
use steadfast_api::{Code, DnsIdentity, KeyId, SpiffeId, Svid, UnixTime};
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};
use x509_parser::prelude::{FromDer as _, ParsedExtension, X509Certificate};

use crate::outcomes::Fingerprint;
use crate::refusal::PeerFacts;
use crate::trust::Trust;

/// What the peer is in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It dialled us.
    Client,
    /// We dialled it.
    Server,
}

/// A peer whose chain was verified and which has proved that it holds the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedPeer {
    /// Its one URI SAN.
    pub id: SpiffeId,
    /// Linkerd's name for it, if its first DNS SAN is one and names the same workload.
    pub dns: Option<DnsIdentity>,
    /// The serial number of its SVID, big-endian.
    pub serial: Vec<u8>,
    /// Its SVID is valid from this second on.
    pub not_before: UnixTime,
    /// Its SVID is valid to the end of this second.
    pub not_after: UnixTime,
    /// The anchor that its chain ends in.
    pub anchor: KeyId,
    /// The key that signed its SVID.
    pub issuer: KeyId,
    /// The keys of all issuers between its SVID and the anchor, its own one first.
    pub issuers: Vec<KeyId>,
}

/// Why a presented chain is not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRefused {
    /// The reason.
    pub code: Code,
    /// What exactly is wrong.
    pub detail: String,
    /// What the chain told all the same.
    pub peer: PeerFacts,
}

/// A path that was built once, and the time in which all of it is valid.
#[derive(Debug)]
pub(crate) struct Path {
    peer: Arc<VerifiedPeer>,
    valid_from: UnixTime,
    valid_to: UnixTime,
}

/// Checks a presented chain; any bytes may be given, none panic.
///
/// That the peer holds the leaf's key is not part of it: the handshake's signature shows that.
///
/// # Errors
/// The first rule that it breaks: form of the certificates, path to an anchor, times, denied
/// issuers, form of an SVID, trust domain, expected identity.
pub fn check_chain(
    role: Role,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    trust: &Trust,
    now: UnixTime,
    expected: Option<&SpiffeId>,
) -> Result<Arc<VerifiedPeer>, Box<PeerRefused>> {
    if intermediates.len() > INTERMEDIATES_MAX {
        let detail = format!(
            "{} certificates were sent; at most {} are read",
            intermediates.len() + 1,
            INTERMEDIATES_MAX + 1
        );
        return Err(refused(Code::PEER_MALFORMED, detail, PeerFacts::default()));
    }
    let fingerprint = fingerprint(role, leaf, intermediates);
    // A path that is known but not valid now is built again: another may be valid.
    let known = trust.outcomes.find(&fingerprint).filter(|path| path.is_valid(now));
    let peer = match known {
        Some(path) => path.peer.clone(),
        None => {
            let path = Arc::new(build_path(role, leaf, intermediates, trust, now)?);
            let peer = path.peer.clone();
            trust.outcomes.add(fingerprint, path);
            peer
        }
    };
    match expected {
        Some(expected) if peer.id != *expected => {
            let detail = format!("it is {}, and {expected} was expected", peer.id);
            Err(refused(Code::PEER_WRONG_IDENTITY, detail, peer.facts()))
        }
        _ => Ok(peer),
    }
}

impl VerifiedPeer {
    /// What a line about it shows.
    pub fn facts(&self) -> PeerFacts {
        PeerFacts {
            id: Some(self.id.clone()),
            anchor: Some(self.anchor),
            issuer: Some(self.issuer),
            not_before: Some(self.not_before),
            not_after: Some(self.not_after),
        }
    }
}

impl PeerRefused {
    /// The error that makes rustls send the alert which fits.
    pub(crate) fn tls_error(&self) -> rustls::Error {
        let error = match self.code {
            Code::PEER_UNKNOWN_ISSUER => CertificateError::UnknownIssuer,
            Code::PEER_EXPIRED => CertificateError::Expired,
            Code::PEER_NOT_YET_VALID => CertificateError::NotValidYet,
            Code::PEER_ISSUER_DENIED => CertificateError::Revoked,
            Code::PEER_BAD_SIGNATURE => CertificateError::BadSignature,
            Code::PEER_NOT_SVID => CertificateError::InvalidPurpose,
            Code::PEER_TRUST_DOMAIN | Code::PEER_WRONG_IDENTITY => {
                CertificateError::ApplicationVerificationFailure
            }
            _ => CertificateError::BadEncoding,
        };
        rustls::Error::InvalidCertificate(error)
    }
}

impl Path {
    fn is_valid(&self, now: UnixTime) -> bool {
        // X.509 times are whole seconds, and the last one counts.
        (self.valid_from.as_secs()..=self.valid_to.as_secs()).contains(&now.as_secs())
    }
}

/// SHA-256 over the role and the length and bytes of each certificate.
fn fingerprint(
    role: Role,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> Fingerprint {
    let mut hash = Context::new(&SHA256);
    hash.update(&[role as u8]);
    for certificate in std::iter::once(leaf).chain(intermediates) {
        hash.update(&(certificate.len() as u64).to_be_bytes());
        hash.update(certificate);
    }
    let mut fingerprint = [0; 32];
    fingerprint.copy_from_slice(hash.finish().as_ref());
    fingerprint
}

fn build_path(
    role: Role,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    trust: &Trust,
    now: UnixTime,
) -> Result<Path, Box<PeerRefused>> {
    let svid = Svid::parse(leaf);
    let facts = presented_facts(svid.as_ref().ok(), intermediates);
    let refuse = |error| explain(error, leaf, intermediates, trust, now, facts.clone());
    let certificate = EndEntityCert::try_from(leaf).map_err(refuse)?;
    let usage = match role {
        Role::Client => KeyUsage::client_auth(),
        Role::Server => KeyUsage::server_auth(),
    };
    let time = rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()));
    let beyond_webpki = |path: &VerifiedPath<'_>| check_candidate(path, trust, now);
    let path = certificate
        .verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &trust.roots,
            intermediates,
            time,
            usage,
            None,
            Some(&beyond_webpki),
        )
        .map_err(refuse)?;
    let svid = svid.map_err(|error| {
        let code = match error {
            SvidError::Malformed(_) => Code::PEER_MALFORMED,
            _ => Code::PEER_NOT_SVID,
        };
        refused(code, format!("it {error}"), facts.clone())
    })?;
    let path = accepted(&svid, &path, trust)
        .ok_or_else(|| refused(Code::PEER_MALFORMED, "an issuer".to_owned(), facts.clone()))?;
    if !svid.spiffe_id.is_member_of(trust.trust_domain()) {
        let detail =
            format!("it is of {:?}, we of {}", svid.spiffe_id.trust_domain(), trust.trust_domain());
        return Err(refused(Code::PEER_TRUST_DOMAIN, detail, path.peer.facts()));
    }
    Ok(path)
}

/// What webpki does not look at. An error makes it try another path, if there is one.
fn check_candidate(
    path: &VerifiedPath<'_>,
    trust: &Trust,
    now: UnixTime,
) -> Result<(), webpki::Error> {
    let denied = |id: KeyId| trust.denied().contains(&id);
    if path.intermediate_certificates().any(|c| denied(id_of(c))) {
        return Err(webpki::Error::CertRevoked);
    }
    // A root is trusted, but not beyond its end: webpki takes roots as mere keys.
    let Some(anchor) = anchor_index(path, trust).and_then(|index| trust.anchors().get(index))
    else {
        return Err(webpki::Error::UnknownIssuer);
    };
    let seconds = |time: UnixTime| {
        rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_secs(time.as_secs()))
    };
    let (time, not_after) = (seconds(now), seconds(anchor.not_after()));
    let not_before = seconds(anchor.not_before());
    if time > not_after {
        return Err(webpki::Error::CertExpired { time, not_after });
    }
    if time < not_before {
        return Err(webpki::Error::CertNotValidYet { time, not_before });
    }
    Ok(())
}

/// The facts of a path that holds, with the time in which every part of it is valid.
fn accepted(svid: &Svid, path: &VerifiedPath<'_>, trust: &Trust) -> Option<Path> {
    let anchor = trust.anchors().get(anchor_index(path, trust)?)?;
    let mut valid_from = svid.not_before.max(anchor.not_before());
    let mut valid_to = svid.not_after.min(anchor.not_after());
    for certificate in path.intermediate_certificates() {
        let der = certificate.der();
        let (_, parsed) = X509Certificate::from_der(&der).ok()?;
        let validity = parsed.validity();
        valid_from = valid_from.max(UnixTime::from_secs(validity.not_before.timestamp()));
        valid_to = valid_to.min(UnixTime::from_secs(validity.not_after.timestamp()));
    }
    let issuers: Vec<_> = path.intermediate_certificates().map(id_of).collect();
    let dns = svid.dns_names.first().and_then(|name| name.parse::<DnsIdentity>().ok());
    let peer = VerifiedPeer {
        id: svid.spiffe_id.clone(),
        dns: dns.filter(|dns| dns.spiffe_id() == svid.spiffe_id),
        serial: svid.serial.clone(),
        not_before: svid.not_before,
        not_after: svid.not_after,
        anchor: anchor.id(),
        issuer: issuers.first().copied().unwrap_or_else(|| anchor.id()),
        issuers,
    };
    Some(Path { peer: Arc::new(peer), valid_from, valid_to })
}

fn anchor_index(path: &VerifiedPath<'_>, trust: &Trust) -> Option<usize> {
    trust.roots.iter().position(|root| std::ptr::eq(root, path.anchor()))
}

fn id_of(certificate: &webpki::Cert<'_>) -> KeyId {
    KeyId::of_spki(&certificate.subject_public_key_info())
}

/// The id of the key in a certificate, if it is one.
pub(crate) fn spki_id(der: &[u8]) -> Option<KeyId> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(KeyId::of_spki(certificate.public_key().raw))
}

/// What the presented certificates say about themselves, true or not.
fn presented_facts(svid: Option<&Svid>, intermediates: &[CertificateDer<'_>]) -> PeerFacts {
    PeerFacts {
        id: svid.map(|svid| svid.spiffe_id.clone()),
        anchor: None,
        issuer: intermediates.first().and_then(|der| spki_id(der)),
        not_before: svid.map(|svid| svid.not_before),
        not_after: svid.map(|svid| svid.not_after),
    }
}

/// Turns webpki's reason into ours.
fn explain(
    error: webpki::Error,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    trust: &Trust,
    now: UnixTime,
    facts: PeerFacts,
) -> Box<PeerRefused> {
    use webpki::Error as E;
    let whose = |at: u64, of_leaf: Option<UnixTime>| match of_leaf {
        Some(time) if time.as_secs() == at => "the SVID",
        _ => "its issuer or anchor",
    };
    let (code, detail) = match &error {
        E::CertExpired { not_after, .. } => {
            let at = not_after.as_secs();
            let ago = now.as_secs().saturating_sub(at);
            (Code::PEER_EXPIRED, format!("{} ended {ago} s ago", whose(at, facts.not_after)))
        }
        E::CertNotValidYet { not_before, .. } => {
            let at = not_before.as_secs();
            let ahead = at.saturating_sub(now.as_secs());
            let whose = whose(at, facts.not_before);
            (Code::PEER_NOT_YET_VALID, format!("{whose} begins in {ahead} s"))
        }
        E::CertRevoked => (Code::PEER_ISSUER_DENIED, String::new()),
        E::UnknownIssuer => (Code::PEER_UNKNOWN_ISSUER, believed(trust)),
        // Two meshes may give their authorities the same name: only the key tells them apart.
        E::InvalidSignatureForPublicKey if names_a_stranger(leaf, intermediates, trust) => {
            (Code::PEER_UNKNOWN_ISSUER, believed(trust))
        }
        E::InvalidSignatureForPublicKey
        | E::SignatureAlgorithmMismatch
        | E::UnsupportedSignatureAlgorithmContext(_)
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
            (Code::PEER_BAD_SIGNATURE, error.to_string())
        }
        E::CaUsedAsEndEntity
        | E::EmptyEkuExtension
        | E::EndEntityUsedAsCa
        | E::NameConstraintViolation
        | E::PathLenConstraintViolated
        | E::RequiredEkuNotFoundContext(_)
        | E::UnsupportedCriticalExtension => (Code::PEER_NOT_SVID, error.to_string()),
        _ => (Code::PEER_MALFORMED, error.to_string()),
    };
    refused(code, detail, facts)
}

fn believed(trust: &Trust) -> String {
    let ids: Vec<String> = trust.anchors().iter().map(|anchor| anchor.id().short()).collect();
    format!("we believe {} at seq {}", ids.join(", "), trust.sequence())
}

/// Whether a certificate of the chain names as its signer a key that is neither in the chain nor
/// an anchor of ours.
fn names_a_stranger(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    trust: &Trust,
) -> bool {
    let parsed: Vec<_> = std::iter::once(leaf)
        .chain(intermediates)
        .filter_map(|der| X509Certificate::from_der(der).ok())
        .map(|(_, certificate)| certificate)
        .collect();
    // An authority without an identifier could be the one that is named.
    let authorities = parsed.get(1..).unwrap_or_default();
    let mut known = trust.key_identifiers.clone();
    known.extend(authorities.iter().map(|certificate| identifier(certificate, Identifier::Own)));
    let Some(known) = known.into_iter().collect::<Option<Vec<_>>>() else { return false };
    let mut signers = parsed.iter().filter_map(|c| identifier(c, Identifier::Signer));
    signers.any(|signer| !known.contains(&signer))
}

#[derive(Clone, Copy)]
enum Identifier {
    Own,
    Signer,
}

fn identifier(certificate: &X509Certificate<'_>, which: Identifier) -> Option<Vec<u8>> {
    certificate.extensions().iter().find_map(|extension| {
        match (which, extension.parsed_extension()) {
            (Identifier::Own, ParsedExtension::SubjectKeyIdentifier(id)) => Some(id.0.to_vec()),
            (Identifier::Signer, ParsedExtension::AuthorityKeyIdentifier(id)) => {
                id.key_identifier.as_ref().map(|id| id.0.to_vec())
            }
            _ => None,
        }
    })
}

fn refused(code: Code, detail: String, peer: PeerFacts) -> Box<PeerRefused> {
    Box::new(PeerRefused { code, detail, peer })
}

/// An SVID has one issuer; federation and cross-signing may add some.
const INTERMEDIATES_MAX: usize = 7;
