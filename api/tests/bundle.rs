//! What is read as a trust bundle and what is not, and how one is published: the rules of the
//! SPIFFE Trust Domain and Bundle standard, §4, and of X509-SVID, §6.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    PKCS_ECDSA_P384_SHA384, PKCS_ED25519, date_time_ymd,
};
use serde_json::{Value, json};
use steadfast_api::bundle::{BundleError, digest, parse_anchors};
use steadfast_api::{KeyId, TrustAnchor, TrustBundle, TrustDomain};

fn trust_domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

fn parse(text: &str) -> Result<TrustBundle, BundleError> {
    TrustBundle::parse(&trust_domain(), text.as_bytes())
}

fn authority() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn anchor() -> Vec<u8> {
    signed(&authority(), &KeyPair::generate().unwrap())
}

fn signed(params: &CertificateParams, key: &KeyPair) -> Vec<u8> {
    params.self_signed(key).unwrap().der().to_vec()
}

fn jwk(der: &[u8]) -> Value {
    json!({ "kty": "EC", "use": "x509-svid", "x5c": [STANDARD.encode(der)] })
}

fn set(keys: impl Into<Value>) -> String {
    json!({ "keys": keys.into(), "spiffe_sequence": 7 }).to_string()
}

fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
}

#[test]
fn accepted_sets() {
    let (one, two) = (anchor(), anchor());
    let with = |more: Value| {
        let mut key = jwk(&one);
        key.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        key
    };
    let no_sequence = json!({ "keys": [jwk(&one)] }).to_string();
    for (what, text, count, sequence) in [
        ("one anchor", set([jwk(&one)]), 1, 7),
        ("two anchors", set([jwk(&one), jwk(&two)]), 2, 7),
        ("one anchor twice", set([jwk(&one), jwk(&one)]), 1, 7),
        ("no sequence", no_sequence, 1, 0),
        ("white space before it", format!(" \n\t{}", set([jwk(&one)])), 1, 7),
        ("parameters that nobody knows", set([with(json!({ "a": 1, "kid": 2, "x": [] }))]), 1, 7),
        ("a key for JWT-SVIDs", set([jwk(&one), with(json!({ "use": "jwt-svid" }))]), 1, 7),
        ("a key for an unknown use", set([jwk(&one), json!({ "kty": "EC", "use": "new" })]), 1, 7),
        (
            "a key in another case of use",
            set([jwk(&two), with(json!({ "use": "X509-SVID" }))]),
            1,
            7,
        ),
        ("a key without a use", set([jwk(&one), json!({ "kty": "EC", "x5c": "?" })]), 1, 7),
        ("a key of an unknown type", set([jwk(&two), with(json!({ "kty": "new" }))]), 1, 7),
        ("a key without a type", set([jwk(&one), json!({ "use": "x509-svid" })]), 1, 7),
        ("a key that is no object", set([jwk(&one), json!("new")]), 1, 7),
    ] {
        let bundle = parse(&text).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!((bundle.anchors().len(), bundle.sequence()), (count, sequence), "{what}");
        assert!(bundle.anchors().windows(2).all(|pair| pair[0].id() < pair[1].id()), "{what}");
    }
}

#[test]
fn refused_sets() {
    let one = anchor();
    let leaf = signed(&CertificateParams::default(), &KeyPair::generate().unwrap());
    let x5c = |x5c: Value| set([json!({ "kty": "EC", "use": "x509-svid", "x5c": x5c })]);
    let good = STANDARD.encode(&one);
    let bad_second = set([jwk(&one), jwk(&one[..100])]);
    for (what, text, why) in [
        ("no key", set(Value::Array(Vec::new())), "holds no trust anchor"),
        ("keys for others alone", set([json!({ "use": "jwt-svid" })]), "holds no trust anchor"),
        ("no member \"keys\"", "{}".to_owned(), "missing field `keys`"),
        ("keys that are no array", set(json!({})), "expected a sequence"),
        ("a sequence below 0", r#"{"keys":[],"spiffe_sequence":-1}"#.to_owned(), "-1"),
        ("a sequence of text", r#"{"keys":[],"spiffe_sequence":"1"}"#.to_owned(), "string"),
        ("half a set", set([jwk(&one)])[..200].to_owned(), "EOF"),
        ("something behind it", set([jwk(&one)]) + "x", "trailing characters"),
        ("no x5c", set([json!({ "kty": "EC", "use": "x509-svid" })]), "trust anchor 0 has 0"),
        ("an empty x5c", x5c(json!([])), "trust anchor 0 has 0"),
        ("two certificates", x5c(json!([good, good])), "trust anchor 0 has 2"),
        ("an x5c of text", x5c(json!(good)), "trust anchor 0 has 0"),
        ("bad base64", x5c(json!(["a*b"])), "no base64"),
        ("base64 for URLs", x5c(json!([URL_SAFE_NO_PAD.encode([255; 64])])), "no base64"),
        ("base64 of nothing", x5c(json!([""])), "no X.509 certificate"),
        ("a certificate cut short", bad_second, "trust anchor 1"),
        ("bytes behind it", set([jwk(&[&one[..], &[0]].concat())]), "1 bytes follow it"),
        ("a leaf", set([jwk(&leaf)]), "no CA certificate"),
    ] {
        let error = parse(&text).expect_err(what).to_string();
        assert!(error.contains(why), "{what}: {error}");
    }
}

#[test]
fn pem_is_read_too() {
    let (one, two) = (anchor(), anchor());
    let (first, second) = (pem("CERTIFICATE", &one), pem("CERTIFICATE", &two));
    for (what, text, count) in [
        ("one", first.clone(), 1),
        ("two", first.clone() + &second, 2),
        ("one twice", first.clone() + &first, 1),
        ("comments around it", format!("# ours\n{first}\n# theirs\n{second}\n"), 2),
        ("CRLF", first.replace('\n', "\r\n"), 1),
    ] {
        let bundle = parse(&text).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!((bundle.anchors().len(), bundle.sequence()), (count, 0), "{what}");
    }
    let key = pem("PRIVATE KEY", &KeyPair::generate().unwrap().serialize_der());
    for (what, text, why) in [
        ("a private key", key.clone(), "PRIVATE KEY"),
        ("a private key behind an anchor", first.clone() + &key, "PRIVATE KEY"),
        ("another kind", pem("CERTIFICATE REQUEST", &one), "CERTIFICATE REQUEST"),
        ("no end", first[..first.len() - 40].to_owned(), "PEM"),
        ("nothing", String::new(), "holds no trust anchor"),
        ("text", "trust me".to_owned(), "holds no trust anchor"),
        ("a JSON array", "[]".to_owned(), "holds no trust anchor"),
    ] {
        let error = parse(&text).expect_err(what).to_string();
        assert!(error.contains(why), "{what}: {error}");
        assert!(!error.contains("MIG"), "an error never shows a key: {error}");
    }
}

#[test]
fn a_huge_bundle_is_refused_by_its_size_alone() {
    let huge = " ".repeat((1 << 20) + 1);
    assert_eq!(parse(&huge), Err(BundleError::TooLong((1 << 20) + 1)));
    assert_eq!(parse(&huge[1..]), Err(BundleError::Empty));
}

#[test]
fn anchors_that_could_not_be_used_are_refused() {
    let signed_by_new_key = |params: &CertificateParams| {
        TrustAnchor::parse(&signed(params, &KeyPair::generate().unwrap()))
    };
    let mut no_usage = authority();
    no_usage.key_usages.clear();
    assert!(signed_by_new_key(&no_usage).is_ok(), "nothing is forbidden");
    let mut other_usage = authority();
    other_usage.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    assert!(signed_by_new_key(&other_usage).unwrap_err().contains("keyCertSign"));
}

/// Renewed with the same key, an anchor has two certificates and one id.
#[test]
fn of_two_certificates_for_one_key_the_one_that_ends_last_is_kept() {
    let key = KeyPair::generate().unwrap();
    let until = |year| {
        let mut params = authority();
        params.not_after = date_time_ymd(year, 1, 1);
        TrustAnchor::parse(&signed(&params, &key)).unwrap()
    };
    let (old, new) = (until(2030), until(2035));
    for anchors in [vec![old.clone(), new.clone()], vec![new.clone(), old]] {
        let bundle = TrustBundle::new(trust_domain(), 1, anchors).unwrap();
        assert_eq!(bundle.anchors(), std::slice::from_ref(&new));
    }
}

#[test]
fn a_published_key_has_what_its_type_demands() {
    for (algorithm, kty, crv, lengths) in [
        (&PKCS_ECDSA_P256_SHA256, "EC", "P-256", [("x", 32), ("y", 32)].as_slice()),
        (&PKCS_ECDSA_P384_SHA384, "EC", "P-384", &[("x", 48), ("y", 48)]),
        (&PKCS_ED25519, "OKP", "Ed25519", &[("x", 32)]),
    ] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let published = published(&signed(&authority(), &key));
        assert_eq!((&published["kty"], &published["crv"]), (&json!(kty), &json!(crv)));
        assert_eq!(published["use"], "x509-svid");
        for (name, length) in lengths {
            let number = published[name].as_str().unwrap();
            assert_eq!(URL_SAFE_NO_PAD.decode(number).unwrap().len(), *length, "{kty} {name}");
        }
    }
}

/// Made by OpenSSL: `openssl req -x509 -newkey rsa:2048 -nodes -days 36500 -subj /CN=rsa`.
#[test]
fn an_rsa_anchor_is_published_with_modulus_and_exponent() {
    let der = STANDARD.decode(RSA_ANCHOR.replace('\n', "")).unwrap();
    let published = published(&der);
    assert_eq!(published["kty"], "RSA");
    assert_eq!(published["e"], "AQAB");
    let modulus = URL_SAFE_NO_PAD.decode(published["n"].as_str().unwrap()).unwrap();
    assert_eq!(modulus.len(), 256, "without the sign byte that DER puts before it");
    assert!(published.get("crv").is_none());
}

fn published(der: &[u8]) -> Value {
    let bundle = TrustBundle::new(trust_domain(), 3, parse_anchors(&[der]).unwrap()).unwrap();
    let text = bundle.to_jwks();
    assert_eq!(parse(&text).unwrap(), bundle);
    let set: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(set["spiffe_sequence"], 3);
    assert!(set["spiffe_refresh_hint"].is_u64());
    set["keys"][0].clone()
}

fn ids() -> impl Strategy<Value = Vec<KeyId>> {
    prop::collection::vec(any::<[u8; 4]>().prop_map(|seed| KeyId::of_spki(&seed)), 0..6)
}

proptest! {
    #[test]
    fn a_digest_knows_no_order_and_no_repetition(
        anchors in ids(), denied in ids(), turn in 0..6_usize,
    ) {
        let expected = digest(anchors.clone(), denied.clone());
        let turned = |ids: &[KeyId]| {
            let mut ids = [ids, ids].concat();
            let turn = turn % ids.len().max(1);
            ids.rotate_left(turn);
            ids.reverse();
            ids
        };
        prop_assert_eq!(digest(turned(&anchors), turned(&denied)), expected);
    }

    #[test]
    fn a_digest_tells_anchors_from_denied_issuers_and_more_from_fewer(
        mut anchors in ids(), mut denied in ids(), one: [u8; 8],
    ) {
        let one = KeyId::of_spki(&one);
        let before = digest(anchors.clone(), denied.clone());
        anchors.push(one);
        let more = digest(anchors.clone(), denied.clone());
        prop_assert_ne!(before, more);
        anchors.pop();
        denied.push(one);
        prop_assert_ne!(more, digest(anchors, denied));
    }

    #[test]
    fn any_bytes_are_a_bundle_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = TrustBundle::parse(&trust_domain(), &bytes);
        let _ = TrustAnchor::parse(&bytes);
    }

    #[test]
    fn any_json_is_a_bundle_or_an_error(
        kty in "EC|RSA|OKP|[a-z]{0,3}", use_ in "x509-svid|[a-z]{0,3}", x5c in ".{0,40}",
    ) {
        let key = json!({ "kty": kty, "use": use_, "x5c": [x5c] });
        prop_assert!(parse(&set([key])).is_err());
    }
}

const RSA_ANCHOR: &str = "
MIIC/zCCAeegAwIBAgIUAwxatSQYxVaXphBp/pkmMWodbuYwDQYJKoZIhvcNAQELBQAwDjEMMAoGA1UEAwwDcnNhMCAXDTI2
MTEyMTE0MzAzOFoYDzIxMjYxMDI4MTQzMDM4WjAOMQwwCgYDVQQDDANyc2EwggEiMA0GCSqGSIb3DQEBAQUAA4IBDwAwggEK
AoIBAQDPE6gUO8UQcjPKQN10uG98aRrdmO/RrTKCxik7jm3ROV2Gkj1WhbjDIN1d29BV+WiLRGXQiHSJeD2im4W8GMkCoV62
M/3VW9iZCijZybU+7oP+kb/2PmEo/d51b3pDq+PRNJY3IRk3LJ3K8qvJXf5rdp7P0qkxueCzu66OdW/MXiIkmh3Yu7rwqteo
czKuOkE0WZVvzGrJjCmdOeliMzrK9qKKP7rY3WEAHV6kg9Ao7EcZt7jsMOVQcBpt9bBzoXlASj0bi47bgni9ddqqXCnng1KV
h0KKybMYPGb700s4suAwhOsomEJZlv/1OCNpEeKoBDuwFk2kjwkPXZ3ygAgZAgMBAAGjUzBRMB0GA1UdDgQWBBQvH4Hrf58e
L1uJF8RaUShkSKmQNDAfBgNVHSMEGDAWgBQvH4Hrf58eL1uJF8RaUShkSKmQNDAPBgNVHRMBAf8EBTADAQH/MA0GCSqGSIb3
DQEBCwUAA4IBAQBPnecFczP9xLwR0tz4QWPHJTeNj2ZLOYX1MeFEwvqgGnLPI7Iv5kRUI1001/nZaMxh2rnNl1Pfj5qnNEbc
wY8iluYvC7RTJ17hVIkeK2wsLMcW4mMg1ZUMt0ucVwMF/vt9/bB35bM0aEr9gqr2zxrGyxmBtJb3KGfSnvXYyRmCEa9Jf6Pk
EWu1DJ+CROE5VaHTp6S62+6fOGE7VnEBGqTSuWVm3mrVAaTNfW2JhWvtfL9xf9ramMmyG46fe0XmM5vQN6jiW1wQ5wB3tiai
49AnzCiSZFyFXgcsbDtf/XeXvqsbIf3TBpgt1eq2A1ugictPQ+89PXTjYlN9jBrtjIgz
";
