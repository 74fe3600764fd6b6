//! Certificates to start from: an anchor, an issuer, a good SVID, and SVIDs that break one rule.

use std::sync::OnceLock;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};

/// One small public key infrastructure, made once a process.
pub(crate) struct Pki {
    pub(crate) anchor: Vec<u8>,
    pub(crate) issuer: Vec<u8>,
    pub(crate) svid: Vec<u8>,
    /// Each breaks one rule of X509-SVID.
    pub(crate) others: Vec<Vec<u8>>,
    pub(crate) csr: Vec<u8>,
}

pub(crate) fn pki() -> &'static Pki {
    static PKI: OnceLock<Pki> = OnceLock::new();
    PKI.get_or_init(make)
}

fn make() -> Pki {
    let (anchor_key, issuer_key, key) = (key(), key(), key());
    let anchor_params = authority(BasicConstraints::Unconstrained);
    let anchor = anchor_params.self_signed(&anchor_key).unwrap();
    let anchor_issuer = Issuer::from_params(&anchor_params, &anchor_key);
    let mut issuer_params = authority(BasicConstraints::Constrained(0));
    issuer_params.not_after = date_time_ymd(2035, 1, 1);
    let issuer = issuer_params.signed_by(&issuer_key, &anchor_issuer).unwrap();
    let signer = Issuer::from_params(&issuer_params, &issuer_key);
    let sign = |params: CertificateParams| params.signed_by(&key, &signer).unwrap().der().to_vec();
    let mut others = Vec::new();
    for uris in [vec![], vec![ID, ID], vec!["spiffe://cluster.local"], vec!["https://example.org/"]]
    {
        others.push(sign(leaf(&uris)));
    }
    let mut signing = leaf(&[ID]);
    signing.key_usages.push(KeyUsagePurpose::KeyCertSign);
    others.push(sign(signing));
    let mut ca = leaf(&[ID]);
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    others.push(sign(ca));
    Pki {
        anchor: anchor.der().to_vec(),
        issuer: issuer.der().to_vec(),
        svid: sign(leaf(&[ID])),
        others,
        csr: CertificateParams::default().serialize_request(&key).unwrap().der().to_vec(),
    }
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

fn authority(constraints: BasicConstraints) -> CertificateParams {
    let mut params = dated();
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf(uris: &[&str]) -> CertificateParams {
    let mut params = dated();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let dns = "web.demo.serviceaccount.identity.steadfast.cluster.local";
    params.subject_alt_names = vec![SanType::DnsName(dns.try_into().unwrap())];
    let uris = uris.iter().map(|&uri| SanType::URI(uri.try_into().unwrap()));
    params.subject_alt_names.extend(uris);
    params
}

/// Valid around [`NOW_SECS`].
fn dated() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = date_time_ymd(2026, 1, 1);
    params.not_after = date_time_ymd(2036, 1, 1);
    params
}

pub(crate) const ID: &str = "spiffe://cluster.local/ns/demo/sa/web";
/// 2030-01-01T00:00:00Z.
pub(crate) const NOW_SECS: i64 = 1_893_456_000;
