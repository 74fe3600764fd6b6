//! The check of a certificate request: size, form, key, proof of possession, and what it asks for.
//!
//! Only the public key is ever taken from a request. What else it asks for is looked at for one
//! reason: to refuse whoever asks to be a CA or to be somebody else, instead of silently handing
//! out something that was not asked for. Any bytes may come in; none panic.

use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use steadfast_api::{Code, KeyId};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256,
};
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension};
use x509_parser::x509::{SubjectPublicKeyInfo, X509Version};

use crate::issue::Subject;

/// A request whose sender holds the key that it carries, and the names that it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedRequest {
    key: WorkloadKey,
    names: Vec<RequestedName>,
}

/// The public key of a workload that has proved to hold it: a point on P-256.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadKey {
    point: [u8; POINT_BYTES],
    id: KeyId,
}

/// A subject alternative name that a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum RequestedName {
    Dns(String),
    Other(String),
    Uri(String),
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// It asks for a certificate that can sign.
    #[error("the certificate request asks for {0}")]
    Authority(&'static str),
    /// A key that gets no SVID.
    #[error("the certificate request has a key of the kind {0}, not ECDSA on P-256")]
    Key(String),
    /// No PKCS#10 request in DER.
    #[error("the certificate request is no PKCS#10 request in DER: {0}")]
    Malformed(String),
    /// A name that is not the workload's own.
    #[error("the certificate request asks for the name {name}; the workload is {own}")]
    Name {
        /// What it asks for.
        name: String,
        /// The SPIFFE ID it may have.
        own: String,
    },
    /// Not signed by the key in it.
    #[error(
        "the certificate request is not signed (ECDSA with SHA-256) by the key that it carries"
    )]
    Signature,
    /// Longer than any honest one.
    #[error("the certificate request is {0} bytes long; at most {CSR_BYTES_MAX} are read")]
    TooLarge(usize),
}

impl CsrError {
    /// Its code.
    pub const fn code(&self) -> Code {
        match self {
            Self::Authority(_) => Code::CSR_AUTHORITY,
            Self::Key(_) => Code::CSR_KEY,
            Self::Malformed(_) => Code::CSR_MALFORMED,
            Self::Name { .. } => Code::CSR_NAMES,
            Self::Signature => Code::CSR_SIGNATURE,
            Self::TooLarge(_) => Code::CSR_TOO_LARGE,
        }
    }
}

/// Checks everything about a request that does not depend on who sent it.
///
/// # Errors
/// The first rule that it breaks, cheap rules first.
pub fn check(der: &[u8]) -> Result<CheckedRequest, CsrError> {
    if der.len() > CSR_BYTES_MAX {
        return Err(CsrError::TooLarge(der.len()));
    }
    let (rest, request) = X509CertificationRequest::from_der(der)
        .map_err(|error| CsrError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(CsrError::Malformed(format!("{} bytes follow it", rest.len())));
    }
    let info = &request.certification_request_info;
    if info.version != X509Version::V1 {
        return Err(CsrError::Malformed(format!("version {} is unknown", info.version.0)));
    }
    let key = workload_key(&info.subject_pki)?;
    let signed = request.signature_algorithm.algorithm == OID_SIG_ECDSA_WITH_SHA256
        && UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &key.point)
            .verify(info.raw, &request.signature_value.data)
            .is_ok();
    if !signed {
        return Err(CsrError::Signature);
    }
    let names = requested_names(&request)?;
    Ok(CheckedRequest { key, names })
}

/// The key of a request for an issuer, checked like any other; the names are our own to give.
///
/// # Errors
/// As [`check`].
pub(crate) fn check_key(der: &[u8]) -> Result<WorkloadKey, CsrError> {
    check(der).map(|request| request.key)
}

impl CheckedRequest {
    /// The key, if the request asks for no name but those of this workload.
    ///
    /// # Errors
    /// [`CsrError::Name`].
    pub fn key_for(self, subject: &Subject) -> Result<WorkloadKey, CsrError> {
        let own = |name: &RequestedName| match name {
            RequestedName::Dns(name) => *name == subject.dns_name(),
            RequestedName::Uri(name) => name == subject.spiffe_id().as_str(),
            RequestedName::Other(_) => false,
        };
        match self.names.iter().find(|name| !own(name)) {
            Some(foreign) => Err(CsrError::Name {
                name: foreign.shown(),
                own: subject.spiffe_id().as_str().to_owned(),
            }),
            None => Ok(self.key),
        }
    }
}

impl WorkloadKey {
    /// The key of a request that this process made itself, for its own SVID.
    pub(crate) fn own(key: &crate::key::AuthorityKey) -> Option<Self> {
        use rcgen::PublicKeyData as _;
        let point = key.der_bytes().try_into().ok()?;
        Some(Self { point, id: key.id() })
    }

    /// The uncompressed point.
    pub fn point(&self) -> &[u8] {
        &self.point
    }

    /// SHA-256 of its SPKI.
    pub fn id(&self) -> KeyId {
        self.id
    }
}

impl RequestedName {
    fn shown(&self) -> String {
        let (Self::Dns(text) | Self::Uri(text) | Self::Other(text)) = self;
        // A peer chose this text, up to 8 KiB of it: a log line shows its beginning.
        let shown: String = text.chars().take(NAME_CHARS_SHOWN).collect();
        format!("{shown:?}")
    }
}

/// A P-256 key as an uncompressed point; anything else is a key that gets no SVID. Whether the
/// point is on the curve is seen when the signature is verified with it.
fn workload_key(spki: &SubjectPublicKeyInfo<'_>) -> Result<WorkloadKey, CsrError> {
    let curve = spki.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
    let kind = &spki.algorithm.algorithm;
    if *kind != OID_KEY_TYPE_EC_PUBLIC_KEY {
        return Err(CsrError::Key(format!("{kind}")));
    }
    if curve.as_ref() != Some(&OID_EC_P256) {
        let curve = curve.map_or_else(|| "of no name".to_owned(), |oid| oid.to_string());
        return Err(CsrError::Key(format!("ECDSA on the curve {curve}")));
    }
    let bits = &spki.subject_public_key;
    match <[u8; POINT_BYTES]>::try_from(&*bits.data) {
        Ok(point) if point[0] == UNCOMPRESSED && bits.unused_bits == 0 => {
            Ok(WorkloadKey { point, id: KeyId::of_spki(spki.raw) })
        }
        _ => Err(CsrError::Key("ECDSA on P-256 as no uncompressed point".to_owned())),
    }
}

/// The names that the request asks for, unless it asks to be a CA. Attributes and extensions that
/// are not known ask for nothing we hand out, and are passed over.
fn requested_names(request: &X509CertificationRequest<'_>) -> Result<Vec<RequestedName>, CsrError> {
    let malformed = |what: &str| CsrError::Malformed(what.to_owned());
    let mut names = Vec::new();
    // Every list of extensions is looked at: a second one could hide what the first does not ask.
    let extensions = request
        .certification_request_info
        .iter_attributes()
        .filter_map(|attribute| match attribute.parsed_attribute() {
            ParsedCriAttribute::ExtensionRequest(requested) => Some(&requested.extensions),
            _ => None,
        })
        .flatten();
    for extension in extensions {
        match extension.parsed_extension() {
            ParsedExtension::BasicConstraints(constraints) if constraints.ca => {
                return Err(CsrError::Authority("basicConstraints CA:true"));
            }
            ParsedExtension::KeyUsage(usage) if usage.key_cert_sign() || usage.crl_sign() => {
                return Err(CsrError::Authority("a key usage that signs certificates or CRLs"));
            }
            ParsedExtension::SubjectAlternativeName(list) => {
                names.extend(list.general_names.iter().map(requested_name));
            }
            ParsedExtension::ParseError { .. } => {
                return Err(malformed("an extension does not parse"));
            }
            _ => {}
        }
    }
    Ok(names)
}

fn requested_name(name: &GeneralName<'_>) -> RequestedName {
    match name {
        GeneralName::DNSName(name) => RequestedName::Dns((*name).to_owned()),
        GeneralName::URI(name) => RequestedName::Uri((*name).to_owned()),
        other => RequestedName::Other(format!("{other:?}")),
    }
}

/// An honest request has a few hundred bytes.
pub const CSR_BYTES_MAX: usize = 8 * 1024;
/// 0x04, x and y.
const POINT_BYTES: usize = 65;
/// SEC 1, §2.3.3.
const UNCOMPRESSED: u8 = 4;
const NAME_CHARS_SHOWN: usize = 120;
