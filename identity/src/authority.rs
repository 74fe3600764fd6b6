//! The making of trust anchors and issuers.
//!
//! Two certificates and two keys, never one: the anchor signs issuers and is kept away from the
//! process that talks to workloads; the issuer (pathLen 0) signs SVIDs. No name constraints:
//! rustls-webpki refuses every chain that has them for URIs, so the trust domain is for the
//! verifier to check. `steadfast trust init` and the tests call this; the identity service makes
//! requests for issuers alone ([`issuer_csr`]).

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyUsagePurpose,
    PublicKeyData, SanType,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls_pki_types::CertificateDer;
use steadfast_api::{KeyId, TrustAnchor, TrustDomain, UnixTime};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, AnchorState, IssuerRecord};
use zeroize::Zeroizing;

use crate::csr::CsrError;
use crate::key::{AuthorityKey, KeyError, Point};

/// A new anchor or issuer: its certificate, and its key to be stored.
#[derive(Debug)]
pub struct Authority {
    /// SHA-256 of its SPKI.
    pub id: KeyId,
    /// The certificate.
    pub der: Vec<u8>,
    /// Valid from this second on.
    pub not_before: UnixTime,
    /// Valid to the end of this second.
    pub not_after: UnixTime,
    /// The private key in PKCS#8, DER: 0600 in `keys/anchors/` or `keys/issuers/`.
    pub pkcs8: Zeroizing<Vec<u8>>,
}

/// A trust domain at its beginning: the state to store, and the keys to store first.
#[derive(Debug)]
pub struct Founding {
    /// Seq 1, an active anchor, a standby, and the first issuer under the active one.
    pub state: TrustDomainState,
    /// The anchor that signs issuers.
    pub active: Authority,
    /// The anchor that everyone already trusts for the day the active one must go.
    pub standby: Authority,
    /// The issuer that signs SVIDs.
    pub issuer: Authority,
}

/// Why no authority was made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The anchor's certificate is none.
    #[error("the anchor {0}")]
    Anchor(String),
    /// The anchor ends before an issuer could begin.
    #[error("the anchor ends at {0}, too soon for an issuer under it: rotate the anchor first")]
    AnchorEnding(UnixTime),
    /// The certificate could not be encoded or signed.
    #[error("the certificate could not be made")]
    Certificate(#[from] rcgen::Error),
    /// The request for an issuer.
    #[error("the request for an issuer")]
    Csr(#[from] CsrError),
    /// No key, or no random serial number.
    #[error("no key")]
    Key(#[from] KeyError),
    /// The anchor's key is another anchor's.
    #[error("the key {key} is not that of the anchor {anchor}")]
    KeyMismatch {
        /// Of the key given.
        key: KeyId,
        /// Of the certificate given.
        anchor: KeyId,
    },
}

/// Makes the two anchors and the issuer that a trust domain begins with.
///
/// # Errors
/// As [`make_anchor`] and [`make_issuer`].
pub fn found(trust_domain: &TrustDomain, now: UnixTime) -> Result<Founding, AuthorityError> {
    let active = make_anchor(trust_domain, now, ANCHOR_LIFETIME)?;
    let standby = make_anchor(trust_domain, now, ANCHOR_LIFETIME)?;
    let issuer = make_issuer(trust_domain, &active.der, &active.pkcs8, now, ISSUER_LIFETIME)?;
    let anchors =
        vec![active.as_anchor(AnchorState::Active), standby.as_anchor(AnchorState::Standby)];
    let first = issuer.as_issuer(active.id);
    let state = TrustDomainState::founded(trust_domain.clone(), anchors, first, now);
    Ok(Founding { state, active, standby, issuer })
}

/// Makes a trust anchor that lives for `lifetime` from now ([`ANCHOR_LIFETIME`] unless told).
///
/// # Errors
/// [`AuthorityError::Key`] or [`AuthorityError::Certificate`].
pub fn make_anchor(
    trust_domain: &TrustDomain,
    now: UnixTime,
    lifetime: Duration,
) -> Result<Authority, AuthorityError> {
    let (key, pkcs8) = AuthorityKey::generate()?;
    let (der, validity) = self_signed(trust_domain, &key, now, lifetime)?;
    Ok(Authority::of(&der, &key, pkcs8, validity))
}

/// The same of a key that is there already, kept in this place.
///
/// # Errors
/// As [`make_anchor`].
pub fn make_anchor_of(
    trust_domain: &TrustDomain,
    key: &AuthorityKey,
    key_ref: String,
    now: UnixTime,
    lifetime: Duration,
) -> Result<AnchorRecord, AuthorityError> {
    let (der, validity) = self_signed(trust_domain, key, now, lifetime)?;
    Ok(AnchorRecord {
        id: key.id(),
        der,
        not_after: whole(validity.not_after),
        state: AnchorState::Generated,
        taint: None,
        key_ref,
        svid_life_max: SVID_LIFETIME_MAX,
    })
}

fn self_signed(
    trust_domain: &TrustDomain,
    key: &AuthorityKey,
    now: UnixTime,
    lifetime: Duration,
) -> Result<(Vec<u8>, Validity), AuthorityError> {
    let validity = Validity { not_before: now - ANCHOR_BACKDATE, not_after: now + lifetime };
    // Anchor, issuer, SVID: nothing deeper than one issuer.
    let params = params(trust_domain, "trust anchor", key.id(), validity, 1)?;
    Ok((params.self_signed(key)?.der().to_vec(), validity))
}

/// Makes an issuer that lives for `lifetime` from now ([`ISSUER_LIFETIME`] unless told), but no
/// longer than its anchor less [`SKEW`].
///
/// # Errors
/// An anchor that is none, that ends too soon, or that the key is not of.
pub fn make_issuer(
    trust_domain: &TrustDomain,
    anchor_der: &[u8],
    anchor_pkcs8: &[u8],
    now: UnixTime,
    lifetime: Duration,
) -> Result<Authority, AuthorityError> {
    let (key, pkcs8) = AuthorityKey::generate()?;
    let anchor_key = AuthorityKey::from_pkcs8(anchor_pkcs8)?;
    let signed = sign(trust_domain, anchor_der, &anchor_key, &key, now, lifetime)?;
    Ok(Authority::of(&signed.0, &key, pkcs8, signed.1))
}

/// Signs an issuer for the key of a request that identity has made: the key itself is never seen.
///
/// # Errors
/// As [`make_issuer`], and a request that is none or does not prove its key.
pub fn sign_issuer(
    trust_domain: &TrustDomain,
    anchor_der: &[u8],
    anchor_key: &AuthorityKey,
    csr: &[u8],
    now: UnixTime,
    lifetime: Duration,
) -> Result<IssuerRecord, AuthorityError> {
    let key = crate::csr::check_key(csr)?;
    let point = Point(key.point());
    let (der, validity) = sign(trust_domain, anchor_der, anchor_key, &point, now, lifetime)?;
    let anchor = TrustAnchor::parse(anchor_der).map_err(AuthorityError::Anchor)?;
    Ok(IssuerRecord {
        id: key.id(),
        anchor_id: anchor.id(),
        der,
        chain: Vec::new(),
        not_before: whole(validity.not_before),
        not_after: whole(validity.not_after),
        key_ref: format!("keys/issuers/{}.key", key.id()),
    })
}

/// Signs the certificate of an issuer with this key, and verifies the anchor's signature on it.
fn sign(
    trust_domain: &TrustDomain,
    anchor_der: &[u8],
    anchor_key: &AuthorityKey,
    key: &impl PublicKeyData,
    now: UnixTime,
    lifetime: Duration,
) -> Result<(Vec<u8>, Validity), AuthorityError> {
    let anchor = TrustAnchor::parse(anchor_der).map_err(AuthorityError::Anchor)?;
    if anchor.id() != anchor_key.id() {
        return Err(AuthorityError::KeyMismatch { key: anchor_key.id(), anchor: anchor.id() });
    }
    let validity = Validity {
        not_before: (now - ISSUER_BACKDATE).max(anchor.not_before()),
        not_after: (now + lifetime).min(anchor.not_after() - SKEW),
    };
    if validity.not_after <= now {
        return Err(AuthorityError::AnchorEnding(anchor.not_after()));
    }
    let id = KeyId::of_spki(&key.subject_public_key_info());
    let params = params(trust_domain, "issuer", id, validity, 0)?;
    let signer = Issuer::from_ca_cert_der(&CertificateDer::from(anchor_der), anchor_key)?;
    let certificate = params.signed_by(key, &signer)?;
    Ok((certificate.der().to_vec(), validity))
}

/// The request for an issuer with this key: PKCS#10, DER. Whoever signs it takes the key alone and
/// fills in everything else; the name is for people who look at it.
///
/// # Errors
/// [`AuthorityError::Certificate`].
pub fn issuer_csr(
    trust_domain: &TrustDomain,
    key: &AuthorityKey,
) -> Result<Vec<u8>, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = name(trust_domain, "issuer", key.id());
    Ok(params.serialize_request(key)?.der().to_vec())
}

impl Authority {
    fn of(der: &[u8], key: &AuthorityKey, pkcs8: Zeroizing<Vec<u8>>, validity: Validity) -> Self {
        Self {
            id: key.id(),
            der: der.to_vec(),
            not_before: whole(validity.not_before),
            not_after: whole(validity.not_after),
            pkcs8,
        }
    }

    /// As the store's record of an anchor.
    pub fn as_anchor(&self, state: AnchorState) -> AnchorRecord {
        let key_ref = format!("keys/anchors/{}.key", self.id);
        AnchorRecord {
            id: self.id,
            der: self.der.clone(),
            not_after: self.not_after,
            state,
            taint: None,
            key_ref,
            svid_life_max: SVID_LIFETIME_MAX,
        }
    }

    /// As the store's record of an issuer under this anchor.
    pub fn as_issuer(&self, anchor_id: KeyId) -> IssuerRecord {
        IssuerRecord {
            id: self.id,
            anchor_id,
            der: self.der.clone(),
            chain: Vec::new(),
            not_before: self.not_before,
            not_after: self.not_after,
            key_ref: format!("keys/issuers/{}.key", self.id),
        }
    }
}

/// What anchors and issuers have in common.
fn params(
    trust_domain: &TrustDomain,
    role: &str,
    id: KeyId,
    validity: Validity,
    path_len_max: u8,
) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    validity.set(&mut params);
    params.serial_number = Some(serial_number()?.to_vec().into());
    params.distinguished_name = name(trust_domain, role, id);
    // X509-SVID, §4: a signing certificate names its trust domain, without a path.
    let uri = trust_domain.id().as_str().try_into()?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len_max));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Says trust domain, role and key id, so that a person tells two anchors apart and no two
/// authorities share a name.
fn name(trust_domain: &TrustDomain, role: &str, id: KeyId) -> DistinguishedName {
    let domain = trust_domain.as_str();
    // X.520 ends a common name at 64 characters; a trust domain is ASCII.
    let domain = &domain[..domain.len().min(DOMAIN_BYTES_SHOWN)];
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, ORGANIZATION);
    name.push(DnType::CommonName, format!("{domain} {role} {}", id.short()));
    name
}

/// The window of a certificate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Validity {
    pub(crate) not_before: UnixTime,
    pub(crate) not_after: UnixTime,
}

/// A certificate has whole seconds: what is said of it is what it says.
pub(crate) fn whole(time: UnixTime) -> UnixTime {
    UnixTime::from_millis(time.as_secs() * 1000)
}

/// 128 random bits. RFC 5280, §4.1.2.2, wants a positive number of at most 20 bytes: rcgen puts a
/// zero byte before a leading one bit.
pub(crate) fn serial_number() -> Result<[u8; 16], KeyError> {
    let mut serial = [0; 16];
    SystemRandom::new().fill(&mut serial).map_err(|_| KeyError::Random)?;
    Ok(serial)
}

impl Validity {
    /// Into rcgen's own kind of time, which it does not export.
    pub(crate) fn set(self, params: &mut CertificateParams) {
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before = epoch + Duration::from_secs(self.not_before.as_secs());
        params.not_after = epoch + Duration::from_secs(self.not_after.as_secs());
    }
}

/// Clocks may differ by this much: nothing outlives what it hangs from, less this.
pub const SKEW: Duration = Duration::from_secs(60);
/// 25 months: an anchor is rotated yearly and lives two periods and some slow paths.
pub const ANCHOR_LIFETIME: Duration = Duration::from_secs(761 * 86_400);
/// An issuer is rotated when 10 of its 30 days are left.
pub const ISSUER_LIFETIME: Duration = Duration::from_secs(30 * 86_400);
/// SVIDs live no longer unless a replica has said so before.
pub const SVID_LIFETIME_MAX: Duration = Duration::from_secs(86_400);
/// The organisation in every name.
pub(crate) const ORGANIZATION: &str = "Steadfast";
/// Anchors begin this long ago, so that no clock within a day of ours finds them in the future.
const ANCHOR_BACKDATE: Duration = Duration::from_secs(86_400);
/// Issuers begin this long ago.
const ISSUER_BACKDATE: Duration = Duration::from_secs(3_600);
/// Leaves room for role and key id in the 64 characters of a common name.
const DOMAIN_BYTES_SHOWN: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;
    use x509_parser::prelude::*;

    fn trust_domain() -> TrustDomain {
        "cluster.local".parse().unwrap()
    }

    const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);

    #[test]
    fn a_founding_has_two_anchors_and_one_issuer_each_with_a_key_of_its_own() {
        let founding = found(&trust_domain(), NOW).unwrap();
        let bundle = founding.state.bundle().unwrap();
        assert_eq!(bundle.anchors().len(), 2);
        assert_eq!(founding.state.active_issuer().unwrap().anchor_id, founding.active.id);
        for authority in [&founding.active, &founding.standby, &founding.issuer] {
            let key = AuthorityKey::from_pkcs8(&authority.pkcs8).unwrap();
            assert_eq!(key.id(), authority.id);
        }
        assert_ne!(founding.active.id, founding.standby.id);
        assert_ne!(founding.active.id, founding.issuer.id);
    }

    #[test]
    fn an_anchor_has_the_form_of_a_signing_certificate() {
        let anchor = make_anchor(&trust_domain(), NOW, ANCHOR_LIFETIME).unwrap();
        let parsed = X509Certificate::from_der(&anchor.der).unwrap().1;
        let usage = parsed.key_usage().unwrap().unwrap();
        assert!(usage.critical && usage.value.key_cert_sign());
        assert!(!usage.value.digital_signature());
        let names = parsed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names, [GeneralName::URI("spiffe://cluster.local")]);
        assert!(parsed.name_constraints().unwrap().is_none());
        assert_eq!(parsed.validity().not_before.timestamp(), 1_800_000_000 - 86_400);
        assert_eq!(
            parsed.subject().to_string(),
            format!("O=Steadfast, CN=cluster.local trust anchor {}", anchor.id.short())
        );
        let identifiers: Vec<_> = parsed
            .iter_extensions()
            .filter_map(|extension| match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    id.key_identifier.as_ref().map(|id| id.0.to_vec())
                }
                _ => None,
            })
            .collect();
        assert_eq!(identifiers.len(), 2);
        assert_eq!(identifiers[0], identifiers[1]);
    }

    #[test]
    fn an_issuer_signs_leaves_only_and_ends_before_its_anchor() {
        let anchor = make_anchor(&trust_domain(), NOW, Duration::from_secs(86_400)).unwrap();
        let issuer =
            make_issuer(&trust_domain(), &anchor.der, &anchor.pkcs8, NOW, ISSUER_LIFETIME).unwrap();
        let parsed = X509Certificate::from_der(&issuer.der).unwrap().1;
        let constraints = parsed.basic_constraints().unwrap().unwrap().value;
        assert_eq!((constraints.ca, constraints.path_len_constraint), (true, Some(0)));
        assert_eq!(issuer.not_after, anchor.not_after - SKEW);
        assert_eq!(parsed.validity().not_after.timestamp() as u64, issuer.not_after.as_secs());
    }

    #[test]
    fn no_issuer_is_made_under_an_ending_anchor_or_with_another_ones_key() {
        let anchor = make_anchor(&trust_domain(), NOW, SKEW).unwrap();
        let other = make_anchor(&trust_domain(), NOW, ANCHOR_LIFETIME).unwrap();
        let make = |der: &[u8], key: &[u8]| {
            make_issuer(&trust_domain(), der, key, NOW, ISSUER_LIFETIME).unwrap_err()
        };
        assert!(matches!(make(&anchor.der, &anchor.pkcs8), AuthorityError::AnchorEnding(_)));
        assert!(matches!(make(&other.der, &anchor.pkcs8), AuthorityError::KeyMismatch { .. }));
        assert!(matches!(make(b"none", &anchor.pkcs8), AuthorityError::Anchor(_)));
    }

    #[test]
    fn the_longest_trust_domain_leaves_a_common_name_of_at_most_64_characters() {
        let domain: TrustDomain = "a".repeat(255).parse().unwrap();
        let anchor = make_anchor(&domain, NOW, ANCHOR_LIFETIME).unwrap();
        let parsed = X509Certificate::from_der(&anchor.der).unwrap().1;
        let name = parsed.subject().iter_common_name().next().unwrap().as_str().unwrap();
        assert!(name.len() <= 64, "{name}");
    }
}
