//! The rules of the X509-SVID standard, §2 to §5, as a table of certificates: one that is right,
//! and ones that differ from it in a single property.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber, date_time_ymd,
};
use steadfast_api::svid::SvidError;
use steadfast_api::{KeyId, Svid, UnixTime};

const ID: &str = "spiffe://cluster.local/ns/demo/sa/web";
const DNS: &str = "web.demo.serviceaccount.identity.steadfast.cluster.local";

#[test]
fn a_right_svid_tells_its_facts() {
    let key = KeyPair::generate().unwrap();
    let svid = Svid::parse(&certificate(&right(), &key)).unwrap();
    assert_eq!(svid.spiffe_id.as_str(), ID);
    assert_eq!(svid.dns_names, [DNS]);
    assert_eq!(svid.serial_hex(), "0102FF");
    assert_eq!(svid.not_before, UnixTime::from_secs(1_767_225_600));
    assert_eq!(svid.not_after, UnixTime::from_secs(1_767_312_000));
    assert_eq!(svid.key_id, KeyId::of_spki(&key_spki(&key)));
}

/// A change to the right certificate.
type Change = fn(&mut CertificateParams);

#[test]
fn accepted_variants() {
    let variants: [(&str, Change); 6] = [
        ("no DNS name", |params| params.subject_alt_names = vec![uri(ID)]),
        ("the URI before the DNS name", |params| params.subject_alt_names.reverse()),
        ("further names", |params| {
            params.subject_alt_names.extend([
                SanType::DnsName("localhost".try_into().unwrap()),
                SanType::IpAddress([127, 0, 0, 1].into()),
                SanType::Rfc822Name("a@b".try_into().unwrap()),
            ]);
        }),
        ("no basicConstraints", |params| params.is_ca = IsCa::NoCa),
        ("no extendedKeyUsage", |params| params.extended_key_usages.clear()),
        ("further usages", |params| {
            params.key_usages.push(KeyUsagePurpose::KeyAgreement);
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::CodeSigning);
        }),
    ];
    for (what, change) in variants {
        let parsed = parse(change);
        assert!(parsed.is_ok(), "{what}: {parsed:?}");
    }
}

#[test]
fn refused_for_their_names() {
    let cases: [(&str, Change, &str); 10] = [
        ("no SAN at all", |p| p.subject_alt_names.clear(), "uri_sans"),
        ("no URI", |p| p.subject_alt_names.truncate(1), "uri_sans"),
        ("two URIs", |p| p.subject_alt_names.push(uri("spiffe://cluster.local/a")), "uri_sans"),
        ("the same URI twice", |p| p.subject_alt_names.push(uri(ID)), "uri_sans"),
        ("an ID and another URI", |p| p.subject_alt_names.push(uri("https://a/")), "uri_sans"),
        ("another URI", |p| p.subject_alt_names[1] = uri("https://example.org/"), "spiffe_id"),
        ("an upper-case ID", |p| p.subject_alt_names[1] = uri("spiffe://TD/a"), "spiffe_id"),
        ("a trailing slash", |p| p.subject_alt_names[1] = uri("spiffe://td/a/"), "spiffe_id"),
        ("an empty URI", |p| p.subject_alt_names[1] = uri(""), "spiffe_id"),
        ("an ID without a path", |p| p.subject_alt_names[1] = uri("spiffe://td"), "no_path"),
    ];
    refused(&cases);
}

#[test]
fn refused_for_their_usage() {
    let cases: [(&str, Change, &str); 11] = [
        ("CA:true", |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained), "authority"),
        (
            "CA:true with a path length of 0",
            |p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)),
            "authority",
        ),
        ("no keyUsage", |p| p.key_usages.clear(), "key_usage"),
        ("keyUsage that is not critical", not_critical_key_usage, "key_usage"),
        ("keyCertSign", |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign), "key_usage"),
        ("cRLSign", |p| p.key_usages.push(KeyUsagePurpose::CrlSign), "key_usage"),
        (
            "no digitalSignature",
            |p| p.key_usages = vec![KeyUsagePurpose::KeyAgreement],
            "key_usage",
        ),
        ("serverAuth alone", |p| drop(p.extended_key_usages.pop()), "extended_key_usage"),
        ("clientAuth alone", |p| drop(p.extended_key_usages.remove(0)), "extended_key_usage"),
        (
            "neither",
            |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning],
            "extended_key_usage",
        ),
        (
            "any usage, which names neither",
            |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any],
            "extended_key_usage",
        ),
    ];
    refused(&cases);
}

#[test]
fn refused_for_broken_extensions() {
    let cases: [(&str, Change, &str); 6] = [
        ("a SAN of garbage", |p| replaced_san(p, &[0xff, 0xff, 0xff]), "extension"),
        ("an empty SAN", |p| replaced_san(p, &[]), "extension"),
        // [6] is a URI, and its bytes are no IA5String.
        (
            "a URI that is no ASCII",
            |p| replaced_san(p, &[0x30, 4, 0x86, 2, 0xc3, 0xa4]),
            "spiffe_id",
        ),
        ("a second SAN", |p| extra(p, SAN, &[0x30, 3, 0x86, 1, 0x61]), "extension"),
        ("a second keyUsage", |p| extra(p, KEY_USAGE, &[3, 2, 7, 0x80]), "extension"),
        ("a second basicConstraints", |p| extra(p, BASIC_CONSTRAINTS, &[0x30, 0]), "extension"),
    ];
    refused(&cases);
}

#[test]
fn refused_for_their_bytes() {
    let der = certificate(&right(), &KeyPair::generate().unwrap());
    for (what, bytes) in [
        ("nothing", vec![]),
        ("one byte", vec![0x30]),
        ("text", b"-----BEGIN CERTIFICATE-----".to_vec()),
        ("one byte more", [&der[..], &[0]].concat()),
        ("itself twice", [&der[..], &der[..]].concat()),
        ("one byte less", der[..der.len() - 1].to_vec()),
    ] {
        let error = Svid::parse(&bytes).expect_err(what);
        assert!(matches!(error, SvidError::Malformed(_)), "{what}: {error}");
        assert!(error.to_string().len() < 400, "{what}: {error}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_an_svid_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = Svid::parse(&bytes);
    }

    #[test]
    fn one_changed_byte_never_panics(at in 0..700_usize, bit in 0..8_u8) {
        let mut der = certificate(&right(), &key());
        let at = at % der.len();
        der[at] ^= 1 << bit;
        let _ = Svid::parse(&der);
    }
}

fn refused(cases: &[(&str, Change, &str)]) {
    for (what, change, label) in cases {
        let error = parse(*change).expect_err(what);
        assert_eq!(error.label(), *label, "{what}: {error}");
    }
}

fn parse(change: Change) -> Result<Svid, SvidError> {
    let mut params = right();
    change(&mut params);
    Svid::parse(&certificate(&params, &key()))
}

fn right() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = date_time_ymd(2026, 1, 1);
    params.not_after = date_time_ymd(2026, 1, 2);
    params.serial_number = Some(SerialNumber::from_slice(&[1, 2, 0xff]));
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![SanType::DnsName(DNS.try_into().unwrap()), uri(ID)];
    params
}

fn certificate(params: &CertificateParams, key: &KeyPair) -> Vec<u8> {
    params.self_signed(key).unwrap().der().to_vec()
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

fn key_spki(key: &KeyPair) -> Vec<u8> {
    use rcgen::PublicKeyData as _;
    key.subject_public_key_info()
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn not_critical_key_usage(params: &mut CertificateParams) {
    params.key_usages.clear();
    extra(params, KEY_USAGE, &[3, 2, 7, 0x80]);
}

fn replaced_san(params: &mut CertificateParams, content: &[u8]) {
    params.subject_alt_names.clear();
    extra(params, SAN, content);
}

/// One more extension, which is not critical.
fn extra(params: &mut CertificateParams, oid: &[u64], content: &[u8]) {
    let extension = CustomExtension::from_oid_content(oid, content.to_vec());
    params.custom_extensions.push(extension);
}

const KEY_USAGE: &[u64] = &[2, 5, 29, 15];
const SAN: &[u64] = &[2, 5, 29, 17];
const BASIC_CONSTRAINTS: &[u64] = &[2, 5, 29, 19];
