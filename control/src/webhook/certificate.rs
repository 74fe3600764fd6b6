//! The webhook's serving certificates: each replica makes its own, which signs itself, and never
//! lets its key out of its memory. What the API server trusts (`caBundle`) are the certificates of
//! all replicas: each puts its own in and takes out what has expired.

use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyIdMethod,
    KeyUsagePurpose, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use steadfast_api::UnixTime;
use steadfast_identity_client::{KeyError, SvidKey};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A serving certificate of this replica.
#[derive(Clone, Debug)]
pub(super) struct Serving {
    pub(super) key: Arc<CertifiedKey>,
    pub(super) renew_at: UnixTime,
    pub(super) not_after: UnixTime,
}

/// Why none could be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum MakeError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("the webhook's certificate cannot be made")]
    Sign(#[from] rcgen::Error),
}

impl Serving {
    /// A new one, for this DNS name, of this replica.
    pub(super) fn make(host: &str, replica: &str, now: UnixTime) -> Result<Self, MakeError> {
        let key = SvidKey::generate()?;
        let not_after = now + LIFETIME;
        let mut params = CertificateParams::new([host.to_owned()])?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name(replica));
        params.not_before = std::time::SystemTime::from(now - BACKDATED).into();
        params.not_after = std::time::SystemTime::from(not_after).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        // Unlike any other's, as the key is.
        params.serial_number = Some(SerialNumber::from_slice(&key.id().as_bytes()[..16]));
        params.key_identifier_method =
            KeyIdMethod::PreSpecified(key.id().as_bytes()[..20].to_vec());
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            key: Arc::new(CertifiedKey::new(vec![certificate.der().clone()], Arc::new(key))),
            renew_at: now + LIFETIME * 2 / 3,
            not_after,
        })
    }

    pub(super) fn der(&self) -> &CertificateDer<'static> {
        // It was made with one.
        &self.key.cert[0]
    }
}

/// What the API server has to trust, as PEM, where it is not what it trusts already: its own bundle
/// less what has expired, what cannot be read, and what this replica has served before; and what this
/// replica serves.
pub(super) fn wanted_bundle(
    found: &[u8],
    replica: &str,
    own: &[&Serving],
    now: UnixTime,
) -> Option<Vec<u8>> {
    let own: Vec<_> = own.iter().map(|serving| serving.der().as_ref()).collect();
    let others = pem::parse_many(found).unwrap_or_default();
    let others = others.into_iter().map(pem::Pem::into_contents);
    let mut all: Vec<_> =
        others.filter(|der| own.contains(&&**der) || stays(der, replica, now)).collect();
    for der in own {
        if !all.iter().any(|known| known == der) {
            all.push(der.to_vec());
        }
    }
    let all: Vec<_> = all.into_iter().map(|der| pem::Pem::new("CERTIFICATE", der)).collect();
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    let wanted = pem::encode_many_config(&all, config).into_bytes();
    (wanted != found).then_some(wanted)
}

/// Whether somebody else's certificate may serve still.
fn stays(der: &[u8], replica: &str, now: UnixTime) -> bool {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return false };
    let mut names = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
    let lives = UnixTime::from_secs(certificate.validity().not_after.timestamp()) > now;
    lives && !names.any(|name| name == common_name(replica))
}

/// X.509 allows 64 characters; the end of a pod's name is what tells it from its siblings.
fn common_name(replica: &str) -> String {
    let surplus = replica.chars().count().saturating_sub(64);
    replica.chars().skip(surplus).collect()
}

/// As an SVID.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The API server's clock may be behind.
const BACKDATED: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);

    fn make(replica: &str, now: UnixTime) -> Serving {
        Serving::make("steadfast-control.steadfast.svc", replica, now).unwrap()
    }

    fn count(bundle: &[u8]) -> usize {
        pem::parse_many(bundle).unwrap().len()
    }

    #[test]
    fn the_bundle_is_of_all_replicas_that_live() {
        let (one, other) = (make("control-a", NOW), make("control-b", NOW));
        let first = wanted_bundle(b"", "control-a", &[&one], NOW).unwrap();
        let both = wanted_bundle(&first, "control-b", &[&other], NOW).unwrap();
        assert_eq!(count(&both), 2);
        assert_eq!(wanted_bundle(&both, "control-a", &[&one], NOW), None);
        assert_eq!(wanted_bundle(&both, "control-b", &[&other], NOW), None);

        // One that starts anew takes out what it served before.
        let anew = make("control-a", NOW);
        let bundle = wanted_bundle(&both, "control-a", &[&anew], NOW).unwrap();
        assert_eq!(count(&bundle), 2);
        assert!(
            !pem::parse_many(&bundle)
                .unwrap()
                .iter()
                .any(|one_| one_.contents() == one.der().as_ref())
        );

        // While one is exchanged, both of a replica are trusted.
        let next = make("control-b", NOW + LIFETIME / 2);
        let bundle = wanted_bundle(&both, "control-b", &[&other, &next], NOW).unwrap();
        assert_eq!(count(&bundle), 3);

        // What has expired goes, and so does what is no certificate.
        let later = NOW + LIFETIME;
        let last = make("control-c", later);
        let bundle = wanted_bundle(&both, "control-c", &[&last], later).unwrap();
        assert_eq!(count(&bundle), 1);
        let broken =
            [&first[..], b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"];
        assert_eq!(count(&wanted_bundle(&broken.concat(), "control-a", &[&one], NOW).unwrap()), 1);
        assert_eq!(count(&wanted_bundle(b"garbage", "control-a", &[&one], NOW).unwrap()), 1);
    }

    #[test]
    fn a_certificate_is_for_the_webhooks_name_and_signs_nothing_else() {
        let long = "steadfast-control-".repeat(8) + "x7k2p";
        let serving = make(&long, NOW);
        let (_, certificate) = X509Certificate::from_der(serving.der()).unwrap();
        certificate.verify_signature(None).unwrap();
        let san = certificate.subject_alternative_name().unwrap().unwrap();
        assert_eq!(
            format!("{:?}", san.value.general_names),
            r#"[DNSName("steadfast-control.steadfast.svc")]"#
        );
        assert!(!certificate.is_ca());
        let name = certificate.subject().iter_common_name().next().unwrap().as_str().unwrap();
        assert!(name.len() == 64 && name.ends_with("x7k2p"), "{name}");
        assert!(serving.renew_at < serving.not_after);
    }
}
