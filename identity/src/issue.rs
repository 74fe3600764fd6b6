//! Issuance, from a checked key to a verified SVID, as steps that consume one another.
//!
//! `prepare` fills in our profile, `lint` checks the template against the rules, `sign` signs what
//! was linted and nothing else, `verify` parses the result with a second parser and verifies the
//! chain with a second library. Only an [`Issued`] has bytes to hand out. Nothing here does I/O;
//! the caller records the intent between `lint` and `sign`.

use std::time::Duration;

use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
    SanType,
};
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor};
use steadfast_api::spiffe::SpiffeError;
use steadfast_api::svid::SvidError;
use steadfast_api::{Code, DnsIdentity, KeyId, SpiffeId, Svid, TrustDomain, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::authority::{ORGANIZATION, SKEW, Validity, serial_number, whole};
use crate::csr::WorkloadKey;
use crate::key::{KeyError, Point};
use crate::signer::{Signer, SignerError};

/// Whom an SVID is for: both names of one service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    spiffe_id: SpiffeId,
    dns: DnsIdentity,
}

/// How long an SVID is to be valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// From now on.
    pub lifetime: Duration,
    /// So long before now it begins, for peers whose clocks are behind.
    pub backdate: Duration,
    /// It is valid for no less than this from its beginning on, or nothing is signed.
    pub least: Duration,
}

impl Terms {
    /// Those of every SVID that a workload asks for itself.
    pub const fn usual(lifetime: Duration) -> Self {
        Self { lifetime, backdate: SVID_BACKDATE, least: Duration::ZERO }
    }
}

/// Step 1: a template from our profile. Nothing of the request is in it but the key.
#[derive(Debug)]
pub struct Prepared(Template);

/// Step 2: a template that obeys the rules. What is signed is exactly this.
#[derive(Debug)]
pub struct Linted(Template);

/// Step 3: a certificate that nobody has looked at yet.
#[derive(Debug)]
pub struct Signed {
    template: Template,
    der: CertificateDer<'static>,
}

/// Step 4: an SVID that may be handed out.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The SVID.
    pub der: CertificateDer<'static>,
    /// The issuer, and what is between it and the anchor, to be sent after it.
    pub issuers: Vec<CertificateDer<'static>>,
    /// Its serial number.
    pub serial: Serial,
    /// When it was made.
    pub issued_at: UnixTime,
    /// Valid from this second on.
    pub not_before: UnixTime,
    /// Valid to the end of this second.
    pub not_after: UnixTime,
}

/// 128 random bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Serial([u8; 16]);

#[derive(Clone, Debug)]
struct Template {
    subject: Subject,
    key: WorkloadKey,
    serial: Serial,
    issued_at: UnixTime,
    validity: Validity,
    issuer: KeyId,
    params: CertificateParams,
}

/// Why no SVID was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The new SVID does not verify against its own chain.
    #[error("the new SVID does not verify")]
    Chain(#[source] webpki::Error),
    /// The certificate could not be encoded or signed.
    #[error("the SVID could not be made")]
    Certificate(#[from] rcgen::Error),
    /// The new SVID has not the form of one.
    #[error("the new SVID has not the form of one")]
    Form(#[from] SvidError),
    /// The template breaks a rule.
    #[error("the template of the SVID {0}")]
    Lint(&'static str),
    /// What was signed is not what was asked for.
    #[error("the new SVID has another {0} than its template")]
    Mismatch(&'static str),
    /// No random serial number.
    #[error("no serial number")]
    Serial(#[from] KeyError),
    /// The issuer cannot sign now.
    #[error(transparent)]
    Signer(#[from] SignerError),
}

impl IssueError {
    /// Its code: everything but an issuer's end is a defect, for the request was checked before.
    pub const fn code(&self) -> Code {
        match self {
            Self::Signer(_) => Code::ISSUER_UNUSABLE,
            _ => Code::SELF_CHECK_FAILED,
        }
    }
}

impl Subject {
    /// The names of a service account.
    ///
    /// # Errors
    /// Names that fit no SPIFFE ID or DNS name.
    pub fn new(
        trust_domain: &TrustDomain,
        control_namespace: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeError> {
        let dns = DnsIdentity::new(service_account, namespace, control_namespace, trust_domain)?;
        let spiffe_id = SpiffeId::for_service_account(trust_domain, namespace, service_account)?;
        Ok(Self { spiffe_id, dns })
    }

    /// The one URI SAN.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.spiffe_id
    }

    /// Linkerd's name, the first SAN.
    pub fn dns_name(&self) -> String {
        self.dns.to_string()
    }
}

impl Prepared {
    /// Fills in our profile for a workload.
    ///
    /// # Errors
    /// An issuer that ends too soon, or no random serial number.
    pub fn new(
        subject: Subject,
        key: WorkloadKey,
        signer: &Signer,
        now: UnixTime,
        terms: Terms,
    ) -> Result<Self, IssueError> {
        let validity = signer.window(now, terms)?;
        let serial = Serial(serial_number()?);
        let mut params = CertificateParams::default();
        validity.set(&mut params);
        params.serial_number = Some(serial.0.to_vec().into());
        params.distinguished_name = common_name(&subject);
        // The DNS name first: Linkerd's proxy takes the first SAN of a client as its identity.
        params.subject_alt_names = vec![
            SanType::DnsName(subject.dns_name().try_into()?),
            SanType::URI(subject.spiffe_id.as_str().try_into()?),
        ];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let issuer = signer.id();
        Ok(Self(Template { subject, key, serial, issued_at: now, validity, issuer, params }))
    }

    /// Checks the template against the rules that no change of the profile may break.
    ///
    /// # Errors
    /// [`IssueError::Lint`].
    pub fn lint(self, signer: &Signer) -> Result<Linted, IssueError> {
        let Template { params, validity, issued_at, .. } = &self.0;
        let uris = params.subject_alt_names.iter().filter(|san| matches!(san, SanType::URI(_)));
        let ends = signer.ends() - SKEW;
        let rules = [
            (uris.count() == 1, "has not exactly one URI SAN"),
            (
                matches!(params.subject_alt_names.first(), Some(SanType::DnsName(_))),
                "has not the DNS identity as its first SAN",
            ),
            (params.is_ca == IsCa::ExplicitNoCa, "is not that of a leaf"),
            (params.key_usages == [KeyUsagePurpose::DigitalSignature], "has another key usage"),
            (params.name_constraints.is_none(), "has name constraints"),
            (params.custom_extensions.is_empty(), "has extensions beside the profile's"),
            (validity.not_after <= ends, "outlives what it hangs from"),
            (validity.not_before <= *issued_at, "begins in the future"),
            (self.0.issuer == signer.id(), "is for another issuer"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, broken)) => Err(IssueError::Lint(broken)),
            None => Ok(Linted(self.0)),
        }
    }
}

impl Linted {
    /// Signs.
    ///
    /// # Errors
    /// [`IssueError::Certificate`].
    pub fn sign(self, signer: &Signer) -> Result<Signed, IssueError> {
        let Self(template) = self;
        let certificate =
            template.params.signed_by(&Point(template.key.point()), signer.issuer())?;
        Ok(Signed { template, der: certificate.into() })
    }

    /// Its serial number, for the record of the intent.
    pub fn serial(&self) -> Serial {
        self.0.serial
    }

    /// Whom it is for.
    pub fn subject(&self) -> &Subject {
        &self.0.subject
    }

    /// The key it is for.
    pub fn key_id(&self) -> KeyId {
        self.0.key.id()
    }

    /// When it was prepared.
    pub fn issued_at(&self) -> UnixTime {
        self.0.issued_at
    }

    /// Valid from this second on.
    pub fn not_before(&self) -> UnixTime {
        self.0.validity.not_before
    }

    /// Valid to the end of this second.
    pub fn not_after(&self) -> UnixTime {
        self.0.validity.not_after
    }
}

impl Signed {
    /// Parses what was signed with the parser that every peer uses, compares it with the template,
    /// and verifies its signature as a peer would. The chain above it, issuer and anchor, was
    /// verified when the signer was made and is the same bytes for every SVID; verifying it for
    /// each would take an eighth of all the time.
    ///
    /// # Errors
    /// A difference, or a chain that does not verify: nothing may be handed out.
    pub fn verify(self, signer: &Signer) -> Result<Issued, IssueError> {
        let Self { template, der } = self;
        let svid = Svid::parse(&der)?;
        let expected = &template.subject;
        let facts = [
            (svid.spiffe_id == expected.spiffe_id, "SPIFFE ID"),
            (svid.dns_names == [expected.dns_name()], "DNS identity"),
            (svid.key_id == template.key.id(), "key"),
            (svid.serial == template.serial.bytes(), "serial number"),
            (svid.not_after.as_secs() == template.validity.not_after.as_secs(), "end"),
        ];
        if let Some((_, what)) = facts.iter().find(|(same, _)| !same) {
            return Err(IssueError::Mismatch(what));
        }
        let verifier = std::slice::from_ref(signer.verifier());
        verify(OURS, &der, verifier, &[], template.issued_at).map_err(IssueError::Chain)?;
        Ok(Issued {
            der,
            issuers: signer.chain().to_vec(),
            serial: template.serial,
            issued_at: template.issued_at,
            not_before: whole(template.validity.not_before),
            not_after: svid.not_after,
        })
    }
}

impl Issued {
    /// The same in PEM.
    pub fn chain_pem(&self) -> String {
        let chain = self.chain().map(|der| pem::Pem::new("CERTIFICATE", der.to_vec()));
        let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        pem::encode_many_config(&chain.collect::<Vec<_>>(), config)
    }

    /// The SVID first, then what is sent after it, in DER.
    pub fn chain(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        std::iter::once(&self.der).chain(&self.issuers)
    }
}

impl Serial {
    /// Big-endian without leading zeroes, as a parser gives it.
    fn bytes(&self) -> &[u8] {
        let zeroes = self.0.iter().take_while(|&&byte| byte == 0).count();
        &self.0[zeroes..]
    }

    /// A number between 0 and 1 from its random bits.
    pub fn fraction(self) -> f64 {
        f64::from(u16::from_be_bytes([self.0[0], self.0[1]])) / f64::from(u16::MAX)
    }
}

/// As OpenSSL prints it: hex, upper case.
impl std::fmt::Display for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode_upper(self.bytes()))
    }
}

/// SVID, issuer, what is in between, anchor: with another library than the one that signed.
pub(crate) fn verify_chain(
    svid: &CertificateDer<'_>,
    signer: &Signer,
    now: UnixTime,
) -> Result<(), webpki::Error> {
    let anchors = [anchor_from_trusted_cert(signer.anchor())?];
    // What is above the issuer may be an operator's own, in any algorithm that every peer knows.
    verify(webpki::ALL_VERIFICATION_ALGS, svid, &anchors, signer.chain(), now)
}

fn verify(
    algorithms: &[&dyn SignatureVerificationAlgorithm],
    svid: &CertificateDer<'_>,
    anchors: &[TrustAnchor<'_>],
    issuers: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), webpki::Error> {
    EndEntityCert::try_from(svid)?.verify_for_usage(
        algorithms,
        anchors,
        issuers,
        rustls_pki_types::UnixTime::since_unix_epoch(Duration::from_millis(now.as_millis())),
        // Svid::parse has seen both usages; one is enough to verify the path.
        KeyUsage::client_auth(),
        None,
        None,
    )?;
    Ok(())
}

/// Service account and namespace, which a person recognises. A longer common name than X.520
/// allows is left out: the SANs are what counts.
fn common_name(subject: &Subject) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, ORGANIZATION);
    let common = format!("{}.{}", subject.dns.service_account(), subject.dns.namespace());
    if common.len() <= COMMON_NAME_BYTES_MAX {
        name.push(DnType::CommonName, common);
    }
    name
}

/// Of a workload's own request.
const SVID_BACKDATE: Duration = Duration::from_secs(300);
/// What we sign with, and nothing else.
const OURS: &[&dyn SignatureVerificationAlgorithm] = &[webpki::aws_lc_rs::ECDSA_P256_SHA256];
/// X.520, ub-common-name.
const COMMON_NAME_BYTES_MAX: usize = 64;
