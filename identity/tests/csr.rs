//! The check of certificate requests: whatever bytes come, nothing panics, and whoever gets an
//! SVID gets their own identity and the key that they have proved to hold.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

use std::sync::LazyLock;
use std::time::Duration;

use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, PublicKeyData as _, SanType};
use steadfast_api::{KeyId, Svid, UnixTime};
use steadfast_identity::authority::{Founding, found};
use steadfast_identity::csr::{self, CsrError};
use steadfast_identity::issue::{Prepared, Subject, Terms};
use steadfast_identity::key::AuthorityKey;
use steadfast_identity::signer::Signer;

const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);
const HOUR: Duration = Duration::from_secs(3600);

static FOUNDING: LazyLock<(Founding, Signer)> = LazyLock::new(|| {
    let founding = found(&"cluster.local".parse().unwrap(), NOW).unwrap();
    let state = &founding.state;
    let record = state.active_issuer().unwrap();
    let bundle = state.bundle().unwrap();
    let key = AuthorityKey::from_pkcs8(&founding.issuer.pkcs8).unwrap();
    let signer = Signer::new(state, &bundle, record, key, NOW).unwrap();
    (founding, signer)
});

/// A request that asks for its own names, and the id of its key.
static VALID: LazyLock<(Vec<u8>, KeyId)> = LazyLock::new(|| {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![
        SanType::DnsName(subject().dns_name().try_into().unwrap()),
        SanType::URI(subject().spiffe_id().as_str().try_into().unwrap()),
    ];
    let der = params.serialize_request(&key).unwrap().der().to_vec();
    (der, KeyId::of_spki(&key.subject_public_key_info()))
});

fn subject() -> Subject {
    Subject::new(&"cluster.local".parse().unwrap(), "steadfast", "demo", "web").unwrap()
}

/// The whole of issuance, without the log.
fn issue(request: &[u8]) -> Result<Svid, CsrError> {
    let signer = &FOUNDING.1;
    let key = csr::check(request)?.key_for(&subject())?;
    let issued = Prepared::new(subject(), key, signer, NOW, Terms::usual(HOUR))
        .and_then(|prepared| prepared.lint(signer))
        .and_then(|linted| linted.sign(signer))
        .and_then(|signed| signed.verify(signer));
    Ok(Svid::parse(&issued.unwrap().der).unwrap())
}

#[test]
fn nothing_is_signed_that_would_be_valid_for_less_than_is_asked_for() {
    let signer = &FOUNDING.1;
    let key = csr::check(&VALID.0).unwrap().key_for(&subject()).unwrap();
    let terms = Terms { least: HOUR, ..Terms::usual(HOUR) };
    let at = |now| Prepared::new(subject(), key.clone(), signer, now, terms).map(drop);
    at(NOW).unwrap();
    let near = at(signer.not_after() - HOUR / 2).unwrap_err().to_string();
    assert!(near.contains("3600 s") && near.contains(&signer.id().to_string()), "{near}");
}

/// If anything is issued at all, it is the caller's own identity for the signer's own key.
fn only_its_own(request: &[u8]) {
    if let Ok(svid) = issue(request) {
        assert_eq!(svid.spiffe_id, *subject().spiffe_id());
        assert_eq!(svid.dns_names, [subject().dns_name()]);
        assert_eq!(svid.key_id, VALID.1);
    }
}

#[test]
fn a_valid_request_gets_its_own_identity() {
    let svid = issue(&VALID.0).unwrap();
    assert_eq!(svid.key_id, VALID.1);
    assert_eq!(svid.not_after, NOW + HOUR);
}

#[test]
fn every_single_byte_that_is_changed_is_refused_or_changes_nothing() {
    for at in 0..VALID.0.len() {
        for bit in 0..8 {
            let mut request = VALID.0.clone();
            request[at] ^= 1 << bit;
            only_its_own(&request);
        }
    }
}

#[test]
fn every_request_that_is_cut_short_is_refused() {
    for end in 0..VALID.0.len() {
        assert!(csr::check(&VALID.0[..end]).is_err(), "cut at {end}");
    }
}

#[test]
fn names_behind_a_second_list_of_extensions_are_seen() {
    // A hand-made attribute list: two extension requests, of which the second asks for another
    // name. Signed by its own key, so that nothing but the name is wrong with it.
    let key = KeyPair::generate().unwrap();
    let foreign = yasna_sans(b"spiffe://cluster.local/ns/demo/sa/api");
    let own = VALID_URI.as_bytes();
    let attributes = [yasna_sans(own), foreign].concat();
    let request = signed_request(&key, &attributes);
    let checked = csr::check(&request).unwrap();
    assert!(matches!(checked.key_for(&subject()), Err(CsrError::Name { .. })));
    let harmless = signed_request(&key, &yasna_sans(own));
    assert!(csr::check(&harmless).unwrap().key_for(&subject()).is_ok());
}

proptest! {
    #[test]
    fn random_bytes_get_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(csr::check(&bytes).is_err());
    }

    #[test]
    fn mutated_requests_never_get_what_is_not_theirs(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
        tail in proptest::collection::vec(any::<u8>(), 0..8),
    ) {
        let mut request = VALID.0.clone();
        for (at, byte) in changes {
            let at = at.index(request.len());
            request[at] = byte;
        }
        if let Some(cut) = cut {
            request.truncate(cut.index(request.len()));
        }
        request.extend(tail);
        only_its_own(&request);
    }

    #[test]
    fn spliced_requests_never_get_what_is_not_theirs(
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
        length in 0_usize..80,
    ) {
        let valid = &VALID.0;
        let (from, to) = (from.index(valid.len()), to.index(valid.len()));
        let piece = &valid[from..(from + length).min(valid.len())];
        let mut request = valid.clone();
        request.splice(to..to, piece.iter().copied());
        only_its_own(&request);
    }
}

const VALID_URI: &str = "spiffe://cluster.local/ns/demo/sa/web";

/// DER: tag, length, content; lengths below 64 KiB.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap();
    let [high, low] = length.to_be_bytes();
    let mut out = match length {
        0..=0x7f => vec![tag, low],
        0x80..=0xff => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    out.extend_from_slice(content);
    out
}

/// One PKCS#9 extension request whose only extension is a subjectAltName with this URI.
fn yasna_sans(uri: &[u8]) -> Vec<u8> {
    let names = der(0x30, &der(0x86, uri));
    let san_oid = [0x06, 0x03, 0x55, 0x1d, 0x11];
    let extension = der(0x30, &[&san_oid[..], &der(0x04, &names)].concat());
    let extensions = der(0x30, &extension);
    let request_oid = [0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x0e];
    der(0x30, &[&request_oid[..], &der(0x31, &extensions)].concat())
}

fn signed_request(key: &KeyPair, attributes: &[u8]) -> Vec<u8> {
    use rcgen::SigningKey as _;
    let info = [
        vec![0x02, 0x01, 0x00],
        der(0x30, &[]),
        key.subject_public_key_info(),
        der(0xa0, attributes),
    ];
    let info = der(0x30, &info.concat());
    let ecdsa_with_sha256 = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    let signature = [vec![0], key.sign(&info).unwrap()].concat();
    let parts = [info, der(0x30, &ecdsa_with_sha256), der(0x03, &signature)];
    der(0x30, &parts.concat())
}
