//! X.509-SVIDs: the facts of a leaf certificate, and the rules that make it an SVID.
//!
//! The rules are those of the X509-SVID standard
//! (<https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md>, §2 to §5). A [`Svid`] has
//! been checked for its *form* only; that its chain ends in a trust anchor, and that it is valid
//! now, is for a verifier to say.

use x509_parser::prelude::*;

use crate::{KeyId, SpiffeId, UnixTime};

/// A leaf certificate that has the form of an X.509-SVID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Svid {
    /// The one URI SAN.
    pub spiffe_id: SpiffeId,
    /// The DNS SANs in their order; ours carry Linkerd's DNS identity as the first.
    pub dns_names: Vec<String>,
    /// The serial number, big-endian, without leading zeroes.
    pub serial: Vec<u8>,
    /// Valid from this second on.
    pub not_before: UnixTime,
    /// Valid to the end of this second.
    pub not_after: UnixTime,
    /// The id of the workload's key.
    pub key_id: KeyId,
}

/// Why a certificate is no X.509-SVID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SvidError {
    /// basicConstraints says CA, which only a signing certificate may.
    #[error("is a CA certificate (basicConstraints CA:true); an SVID is a leaf")]
    Authority,
    /// An extension that is there twice or does not parse.
    #[error("has a malformed or repeated {0} extension")]
    Extension(&'static str),
    /// extendedKeyUsage that lacks server or client.
    #[error("has an extendedKeyUsage without both serverAuth and clientAuth")]
    ExtendedKeyUsage,
    /// keyUsage that is missing, not critical, or of a signing certificate.
    #[error("has a keyUsage that is {0}")]
    KeyUsage(&'static str),
    /// Not DER, or bytes after the certificate.
    #[error("is no X.509 certificate in DER: {0}")]
    Malformed(String),
    /// The URI SAN is the trust domain's own ID.
    #[error("names the trust domain itself ({0}); a workload's ID has a path")]
    NoPath(SpiffeId),
    /// A URI SAN that is no SPIFFE ID. The reason is a part of the sentence, so it is no source.
    #[error("has a URI SAN that is no SPIFFE ID: {0}")]
    SpiffeId(crate::spiffe::SpiffeError),
    /// None or several URI SANs.
    #[error("has {0} URI SANs; an SVID has exactly one")]
    UriSans(usize),
}

impl From<crate::spiffe::SpiffeError> for SvidError {
    fn from(error: crate::spiffe::SpiffeError) -> Self {
        Self::SpiffeId(error)
    }
}

impl SvidError {
    /// The label that counts this refusal.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Authority => "authority",
            Self::Extension(_) => "extension",
            Self::ExtendedKeyUsage => "extended_key_usage",
            Self::KeyUsage(_) => "key_usage",
            Self::Malformed(_) => "malformed",
            Self::NoPath(_) => "no_path",
            Self::SpiffeId(_) => "spiffe_id",
            Self::UriSans(_) => "uri_sans",
        }
    }
}

impl Svid {
    /// Parses one certificate and checks that it has the form of an SVID.
    ///
    /// # Errors
    /// The first rule that it breaks. Any bytes may be given; none panic.
    pub fn parse(der: &[u8]) -> Result<Self, SvidError> {
        let certificate = parse_certificate(der)?;
        let (uris, dns_names) = subject_alternative_names(&certificate)?;
        let [uri] = uris.as_slice() else { return Err(SvidError::UriSans(uris.len())) };
        let spiffe_id: SpiffeId = uri.parse()?;
        if spiffe_id.path().is_empty() {
            return Err(SvidError::NoPath(spiffe_id));
        }
        check_leaf(&certificate)?;
        Ok(Self {
            spiffe_id,
            dns_names,
            serial: certificate.serial.to_bytes_be(),
            not_before: UnixTime::from_secs(certificate.validity().not_before.timestamp()),
            not_after: UnixTime::from_secs(certificate.validity().not_after.timestamp()),
            key_id: KeyId::of_spki(certificate.public_key().raw),
        })
    }

    /// The serial number as OpenSSL prints it: hex, upper case.
    pub fn serial_hex(&self) -> String {
        hex::encode_upper(&self.serial)
    }
}

/// One certificate and nothing behind it.
pub(crate) fn parse_certificate(der: &[u8]) -> Result<X509Certificate<'_>, SvidError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok((rest, _)) => Err(SvidError::Malformed(format!("{} bytes follow it", rest.len()))),
        Err(error) => Err(SvidError::Malformed(error.to_string())),
    }
}

/// The URI and DNS names of a certificate, in their order.
fn subject_alternative_names(
    certificate: &X509Certificate<'_>,
) -> Result<(Vec<String>, Vec<String>), SvidError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| SvidError::Extension("subjectAltName"))?;
    let (mut uris, mut dns) = (Vec::new(), Vec::new());
    for name in names.iter().flat_map(|extension| &extension.value.general_names) {
        match name {
            GeneralName::URI(uri) => uris.push((*uri).to_owned()),
            GeneralName::DNSName(name) => dns.push((*name).to_owned()),
            GeneralName::Invalid(..) => return Err(SvidError::Extension("subjectAltName")),
            _ => {}
        }
    }
    Ok((uris, dns))
}

/// X509-SVID, §4.1 and §4.3: a leaf signs nothing but handshakes.
fn check_leaf(certificate: &X509Certificate<'_>) -> Result<(), SvidError> {
    let constraints =
        certificate.basic_constraints().map_err(|_| SvidError::Extension("basicConstraints"))?;
    if constraints.is_some_and(|extension| extension.value.ca) {
        return Err(SvidError::Authority);
    }
    let usage = certificate
        .key_usage()
        .map_err(|_| SvidError::Extension("keyUsage"))?
        .ok_or(SvidError::KeyUsage("missing"))?;
    if !usage.critical {
        return Err(SvidError::KeyUsage("not critical"));
    }
    if usage.value.key_cert_sign() || usage.value.crl_sign() {
        return Err(SvidError::KeyUsage("that of a signing certificate"));
    }
    if !usage.value.digital_signature() {
        return Err(SvidError::KeyUsage("without digitalSignature"));
    }
    let extended =
        certificate.extended_key_usage().map_err(|_| SvidError::Extension("extendedKeyUsage"))?;
    match extended {
        Some(e) if !(e.value.server_auth && e.value.client_auth) => {
            Err(SvidError::ExtendedKeyUsage)
        }
        _ => Ok(()),
    }
}
