//! Anchors and issuers of somebody else's CA: good ones are taken whatever made them, and whatever
//! would do harm later is refused now, with the value and the fix.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CidrSubnet,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, NameConstraints, PublicKeyData as _, SanType, date_time_ymd,
};
use steadfast_api::trust::v1::CertifyRequest;
use steadfast_api::{KeyId, Svid, TrustDomain, UnixTime};
use steadfast_identity::authority::{Authority, SKEW, found, issuer_csr};
use steadfast_identity::import::{self, ImportError};
use steadfast_identity::key::AuthorityKey;
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{
    AnchorState, EXTERNAL, IssuerRecord, IssuerRequest, WantedIssuer,
};
use support::Mesh;

/// 2030-01-01T00:00:00Z; certificates of these tests are valid from 2026 to 2036 unless said.
const NOW: UnixTime = UnixTime::from_secs(1_893_456_000);
const DAY: Duration = Duration::from_secs(86_400);

#[test]
fn an_anchor_is_taken_whatever_kind_of_key_its_ca_has() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, file) in [
        (["ec", "ec_paramgen_curve:P-256"], "p256"),
        (["ec", "ec_paramgen_curve:P-384"], "p384"),
        (["ec", "ec_paramgen_curve:P-521"], "p521"),
        (["rsa", "rsa_keygen_bits:2048"], "rsa2048"),
        (["rsa", "rsa_keygen_bits:3072"], "rsa3072"),
        (["rsa", "rsa_keygen_bits:4096"], "rsa4096"),
    ] {
        let root = openssl_root(dir.path(), file, kind);
        let now = SystemClock.now();
        let anchor = import::anchor(&domain(), &root, now).unwrap_or_else(|e| panic!("{file} {e}"));
        assert_eq!((anchor.key_ref.as_str(), anchor.state), (EXTERNAL, AnchorState::Generated));
        assert!(anchor.is_external() && anchor.not_after > now + DAY * 3000);
        let key = std::fs::read(dir.path().join(format!("{file}.key"))).unwrap();
        let kept = import::anchor_key(anchor.id, &key);
        if file == "p521" {
            assert!(matches!(kept, Err(ImportError::Key(_))), "nothing of ours signs with it");
        } else {
            assert_eq!(AuthorityKey::from_pkcs8(&kept.unwrap()).unwrap().id(), anchor.id);
        }
    }
    let weak = openssl_root(dir.path(), "rsa1024", ["rsa", "rsa_keygen_bits:1024"]);
    let error = import::anchor(&domain(), &weak, SystemClock.now()).unwrap_err();
    assert!(matches!(error, ImportError::WeakKey { bits: 1024, .. }), "{error}");
}

#[test]
fn an_anchor_that_would_do_harm_is_refused_with_what_is_wrong_and_the_fix() {
    let root = |edit: fn(&mut CertificateParams)| Ca::root(edit).pem();
    let (good, other) = (Ca::root(|_| {}), Ca::root(|_| {}));
    let intermediate = good.sign("intermediate", |_| {});
    let sha1_or_unknown = {
        // The signature's algorithm is named twice; in a copy both say SHA-1.
        let (from, to) = (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02], 0x01_u8);
        let mut der = good.der.clone();
        for at in 0..der.len() - from.len() {
            if der[at..].starts_with(from) {
                der[at + 6] = to;
            }
        }
        pem_of(&der)
    };
    let cases: &[(Vec<u8>, &[&str])] = &[
        (Vec::new(), &["no certificate", "BEGIN CERTIFICATE"]),
        (b"hello".to_vec(), &["no certificate"]),
        (good.der.clone(), &["DER", "openssl x509 -inform DER"]),
        ([good.pem(), other.pem()].concat(), &["2 certificates", "issuer import"]),
        ([good.pem(), key_pem(&good.key)].concat(), &["private key"]),
        (b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n".to_vec(), &["X509 CRL"]),
        (
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".to_vec(),
            &["no certificate:"],
        ),
        (vec![b'x'; 100_000], &["too large", "65536"]),
        (intermediate.pem(), &["intermediate", "CN=root", "import the root"]),
        (root(|p| p.is_ca = IsCa::ExplicitNoCa), &["no CA", "CA:true"]),
        (root(|p| p.is_ca = IsCa::NoCa), &["no CA"]),
        (root(|p| p.key_usages = vec![KeyUsagePurpose::CrlSign]), &["keyCertSign"]),
        (root(|p| p.is_ca = path(0)), &["pathlen 0", "1 is needed"]),
        (root(|p| p.not_after = date_time_ymd(2029, 12, 31)), &["ended at 2029-12-31"]),
        (root(|p| p.not_before = date_time_ymd(2030, 1, 2)), &["not valid before 2030-01-02"]),
        (root(|p| p.not_after = date_time_ymd(2030, 1, 7)), &["2030-01-07", "2030-01-08"]),
        (
            root(|p| p.subject_alt_names.push(uri("spiffe://example.org"))),
            &["spiffe://example.org", "spiffe://cluster.local"],
        ),
        (
            root(|p| p.subject_alt_names.push(uri("spiffe://cluster.local/ns/a/sa/b"))),
            &["spiffe://cluster.local/ns/a/sa/b"],
        ),
        (root(|p| p.name_constraints = permitted("example.org")), &["name constraints"]),
        (root(|p| p.name_constraints = excluded("local")), &["name constraints", "local"]),
        (sha1_or_unknown, &["1.2.840.10045.4.1", "SHA-256"]),
    ];
    for (pem, expected) in cases {
        let error = import::anchor(&domain(), pem, NOW).unwrap_err().to_string();
        for text in *expected {
            assert!(error.contains(text), "{text:?} is not in {error:?}");
        }
    }
    // Somebody else signed under the same name.
    let mut forged = good.der.clone();
    *forged.last_mut().unwrap() ^= 1;
    let error = import::anchor(&domain(), &pem_of(&forged), NOW).unwrap_err();
    assert!(
        matches!(error, ImportError::Signature { .. } | ImportError::Malformed { .. }),
        "{error}"
    );
    for fine in [
        root(|_| {}),
        root(|p| p.subject_alt_names.push(uri("spiffe://cluster.local"))),
        root(|p| p.subject_alt_names.push(uri("https://example.org/ca"))),
        root(|p| p.is_ca = path(1)),
        root(|p| p.key_usages.clear()),
        root(|p| p.name_constraints = permitted("local")),
        root(|p| p.name_constraints = permitted(".cluster.local")),
        root(|p| p.name_constraints = excluded("example.org")),
        root(|p| p.name_constraints = addresses()),
        [b"Certificate:\n  text of openssl x509 -text\n".to_vec(), good.pem()].concat(),
    ] {
        import::anchor(&domain(), &fine, NOW).unwrap();
    }
}

#[test]
fn an_anchors_key_is_taken_only_if_it_is_its_own_and_whole() {
    let (root, other) = (Ca::root(|_| {}), Ca::root(|_| {}));
    let key = |pem: &[u8]| import::anchor_key(root.id(), pem);
    key(&key_pem(&root.key)).unwrap();
    let error = key(&key_pem(&other.key)).unwrap_err();
    assert_eq!(error, ImportError::KeyMismatch { found: other.id(), anchor: root.id() });
    let sec1 = "-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n";
    for (pem, expected) in [
        (Vec::new(), "0 PEM blocks"),
        (key_pem(&root.key).repeat(2), "2 PEM blocks"),
        (sec1.into(), "EC PRIVATE KEY"),
        (sec1.replace("EC ", "ENCRYPTED ").into(), "ENCRYPTED PRIVATE KEY"),
        (sec1.replace("EC ", "").into(), "PKCS#8"),
    ] {
        let error = key(&pem).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("openssl pkcs8"), "{error}");
    }
}

#[test]
fn an_issuer_is_taken_with_its_intermediates_in_any_order_and_with_or_without_its_anchor() {
    let root = Ca::root(|_| {});
    let upper = root.sign("upper", |p| p.is_ca = path(2));
    let lower = upper.sign("lower", |_| {});
    for above in [vec![], vec![&upper], vec![&lower, &upper]] {
        let asked = Asked::of(&root);
        let signer = above.first().copied().unwrap_or(&root);
        let issuer = asked.signed_by(signer, |_| {});
        let mut files = vec![pem_of(&issuer)];
        files.extend(above.iter().map(|ca| ca.pem()));
        for with_root in [false, true] {
            let mut files = files.clone();
            if with_root {
                files.push(root.pem());
            }
            for turn in 0..files.len() {
                let mut turned = files.clone();
                turned.rotate_left(turn);
                let (request, record) = asked.import(&turned.concat()).unwrap();
                assert_eq!(request, asked.request);
                assert_eq!((record.id, record.anchor_id), (asked.key.id(), root.id()));
                let expected: Vec<_> = above.iter().map(|ca| ca.der.clone()).collect();
                assert_eq!((record.der, record.chain), (issuer.clone(), expected));
            }
        }
    }
}

#[test]
fn an_issuer_that_would_do_harm_is_refused_with_what_is_wrong_and_the_fix() {
    let root = Ca::root(|_| {});
    let upper = root.sign("upper", |_| {});
    let stranger = Ca::root(|_| {});
    let asked = Asked::of(&root);
    let direct = |edit: fn(&mut CertificateParams)| pem_of(&asked.signed_by(&root, edit));
    let under = |edit: fn(&mut CertificateParams)| {
        let upper = root.sign("upper", edit);
        [pem_of(&asked.signed_by(&upper, |_| {})), upper.pem()].concat()
    };
    let other_key = Asked::of(&root).signed_by(&root, |_| {});
    let below_upper = pem_of(&asked.signed_by(&upper, |_| {}));
    let (asked_for, anchor) = (asked.key.id().short(), root.id().short());
    let cases: &[(Vec<u8>, &[&str])] = &[
        (pem_of(&other_key), &[&asked_for, "issuer request"]),
        (below_upper.clone(), &["CN=upper", "add the intermediates", &anchor]),
        (pem_of(&asked.signed_by(&stranger, |_| {})), &["does not verify", "CN=root"]),
        ([below_upper, upper.pem(), stranger.pem()].concat(), &["no part of the chain"]),
        (direct(|p| p.is_ca = IsCa::ExplicitNoCa), &["the issuer is no CA"]),
        (direct(|p| p.is_ca = path(1)), &["the issuer has pathlen 1", "0 is needed"]),
        (direct(|p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]), &["keyCertSign"]),
        (direct(|p| p.not_after = date_time_ymd(2036, 1, 1)), &["2036-01-01", "2035-12-31T23:59"]),
        (direct(|p| p.not_after = date_time_ymd(2030, 1, 2)), &["2030-01-02", "2030-01-02T01:00"]),
        (direct(|p| p.not_after = date_time_ymd(2029, 1, 2)), &["ended at 2029-01-02"]),
        (direct(|p| p.not_before = date_time_ymd(2030, 2, 1)), &["not valid before 2030-02-01"]),
        (direct(|p| p.subject_alt_names = vec![uri("spiffe://other")]), &["spiffe://other"]),
        (
            direct(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
            &["extendedKeyUsage", "clientAuth"],
        ),
        (under(|p| p.is_ca = path(0)), &["CN=upper", "pathlen 0", "1 is needed"]),
        (under(|p| p.not_after = date_time_ymd(2031, 1, 1)), &["2030-12-31T23:59", "CN=upper"]),
        (under(|p| p.name_constraints = permitted("example.org")), &["name constraints"]),
        (vec![direct(|_| {}); 6].concat(), &["too large"]),
    ];
    for (pem, expected) in cases {
        let error = asked.import(pem).unwrap_err().to_string();
        for text in *expected {
            assert!(error.contains(text), "{text:?} is not in {error:?}");
        }
    }
    // As cert-manager makes them.
    let unconstrained = direct(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!(asked.import(&unconstrained).unwrap().1.id, asked.key.id());
    // The anchor itself allows one CA below it, and there would be two.
    let narrow = Ca::root(|p| p.is_ca = path(1));
    let upper = narrow.sign("upper", |_| {});
    let asked = Asked::of(&narrow);
    let pem = [pem_of(&asked.signed_by(&upper, |_| {})), upper.pem()].concat();
    let error = asked.import(&pem).unwrap_err().to_string();
    assert!(error.contains("the anchor has pathlen 1, and 2 is needed"), "{error}");
}

#[test]
fn a_chain_of_openssl_is_taken_whatever_kinds_of_keys_are_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = [
        (["ec", "ec_paramgen_curve:P-384"], "p384"),
        (["rsa", "rsa_keygen_bits:4096"], "rsa4096"),
        (["ec", "ec_paramgen_curve:P-256"], "p256"),
    ];
    for (at, (kind, name)) in kinds.into_iter().enumerate() {
        let root = openssl_root(dir.path(), name, kind);
        let now = SystemClock.now();
        let anchor = import::anchor(&domain(), &root, now).unwrap();
        let mut state = found(&domain(), now).unwrap().state;
        state.import_anchor(anchor.clone()).unwrap();
        let asked = Asked::with(state, anchor.id);
        let below = kinds[(at + 1) % kinds.len()];
        let chain = openssl_issuer(dir.path(), name, below, &asked.request.csr);
        let now = SystemClock.now();
        let read = import::issuer(&asked.state, std::slice::from_ref(&asked.request), &chain, now);
        let (_, record) = read.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(record.chain.len(), 1);
    }
}

#[tokio::test]
async fn a_workload_gets_the_whole_chain_and_an_svid_that_outlives_no_part_of_it() {
    // An intermediate that ends before the issuer under it: no import lets it through, but a state
    // is not believed either.
    let now = SystemClock.now();
    let mut founding = found(&domain(), now).unwrap();
    let root = Ca::root(|p| p.not_before = date_time_ymd(2020, 1, 1));
    let ends = now + Duration::from_secs(1800);
    let upper = root.sign("upper", |p| {
        p.not_before = date_time_ymd(2020, 1, 1);
        p.not_after = date_time_ymd(1970, 1, 1) + Duration::from_secs(ends.as_secs());
    });
    let (key, pkcs8) = AuthorityKey::generate().unwrap();
    let csr = issuer_csr(&domain(), &key).unwrap();
    let der = upper.sign_csr(&csr, |p| p.not_before = date_time_ymd(2020, 1, 1));
    let far = UnixTime::from_secs(2_000_000_000);
    let issuer = IssuerRecord {
        id: key.id(),
        anchor_id: root.id(),
        der: der.clone(),
        chain: vec![upper.der.clone()],
        not_before: UnixTime::default(),
        not_after: far,
        key_ref: String::new(),
    };
    let state = &mut founding.state;
    let active = state.anchors.iter_mut().find(|anchor| anchor.state == AnchorState::Active);
    let active = active.unwrap();
    (active.id, active.der, active.not_after) = (root.id(), root.der.clone(), far);
    active.key_ref = EXTERNAL.to_owned();
    (state.active_issuer, state.issuers) = (issuer.id, vec![issuer]);
    (founding.active.id, founding.active.der) = (root.id(), root.der.clone());
    founding.issuer =
        Authority { id: key.id(), der: der.clone(), not_before: now, not_after: far, pkcs8 };
    let mesh = Mesh::start_unready(support::config(), founding).await;
    mesh.ready().await;
    let web = CertifyRequest { token: b"web".to_vec(), csr: support::plain_csr() };
    let reply = mesh.trust().await.certify(web).await.unwrap().into_inner();
    assert_eq!(reply.chain[1..], [der, upper.der.clone()]);
    let svid = Svid::parse(&reply.chain[0]).unwrap();
    assert_eq!(svid.not_after.as_secs(), (ends - SKEW).as_secs());
}

proptest! {
    #[test]
    fn no_file_makes_the_import_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
        at in any::<proptest::sample::Index>(),
        label in "(CERTIFICATE|PRIVATE KEY|X)",
        cut in any::<bool>(),
    ) {
        let root = ROOT.with(|root| root.clone());
        // Anything; anything in PEM; and a good certificate with some bytes of it replaced.
        let mut bent = root;
        let at = at.index(bent.len());
        match cut {
            true => bent.truncate(at),
            false => bent.iter_mut().skip(at).zip(&bytes).take(3).for_each(|(b, new)| *b = *new),
        }
        let in_pem = |der: &[u8]| pem::encode(&pem::Pem::new(label.as_str(), der)).into_bytes();
        for file in [bytes.clone(), in_pem(&bytes), pem_of(&bent)] {
            let _ = import::anchor(&domain(), &file, NOW);
            let _ = import::anchor_key(KeyId::of_spki(b""), &file);
            let state = found(&domain(), NOW).unwrap().state;
            let _ = import::issuer(&state, &[], &file, NOW);
        }
    }
}

thread_local! {
    static ROOT: Vec<u8> = Ca::root(|_| {}).der;
}

/// A CA of somebody else.
struct Ca {
    der: Vec<u8>,
    params: CertificateParams,
    key: KeyPair,
}

impl Ca {
    fn root(edit: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = authority("root", edit);
        Self { der: params.self_signed(&key).unwrap().der().to_vec(), params, key }
    }

    fn sign(&self, name: &str, edit: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = authority(name, |params| {
            params.not_after = date_time_ymd(2035, 6, 1);
            edit(params);
        });
        let signer = Issuer::from_params(&self.params, &self.key);
        Self { der: params.signed_by(&key, &signer).unwrap().der().to_vec(), params, key }
    }

    /// As a CA signs a request: its key, and the CA's own idea of the rest.
    fn sign_csr(&self, csr: &[u8], edit: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let request = CertificateSigningRequestParams::from_der(&csr.to_vec().into()).unwrap();
        let params = authority("issuer", |params| {
            params.is_ca = path(0);
            params.not_after = date_time_ymd(2035, 1, 1);
            edit(params);
        });
        let signer = Issuer::from_params(&self.params, &self.key);
        params.signed_by(&request.public_key, &signer).unwrap().der().to_vec()
    }

    fn id(&self) -> KeyId {
        KeyId::of_spki(&self.key.subject_public_key_info())
    }

    fn pem(&self) -> Vec<u8> {
        pem_of(&self.der)
    }
}

/// A mesh that has asked for an issuer under an anchor.
struct Asked {
    state: TrustDomainState,
    key: AuthorityKey,
    request: IssuerRequest,
}

impl Asked {
    fn of(root: &Ca) -> Self {
        let mut state = found(&domain(), NOW).unwrap().state;
        state.import_anchor(import::anchor(&domain(), &root.pem(), NOW).unwrap()).unwrap();
        Self::with(state, root.id())
    }

    fn with(mut state: TrustDomainState, anchor_id: KeyId) -> Self {
        let WantedIssuer { number, .. } = state.request_issuer(anchor_id, 7).unwrap();
        let (key, _) = AuthorityKey::generate().unwrap();
        let csr = issuer_csr(&domain(), &key).unwrap();
        let request =
            IssuerRequest { number, anchor_id, key_id: key.id(), csr, key_ref: String::new() };
        Self { state, key, request }
    }

    fn signed_by(&self, ca: &Ca, edit: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        ca.sign_csr(&self.request.csr, edit)
    }

    fn import(&self, pem: &[u8]) -> Result<(IssuerRequest, IssuerRecord), ImportError> {
        import::issuer(&self.state, std::slice::from_ref(&self.request), pem, NOW)
    }
}

fn authority(name: &str, edit: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = date_time_ymd(2026, 1, 1);
    params.not_after = date_time_ymd(2036, 1, 1);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    edit(&mut params);
    params
}

fn path(length: u8) -> IsCa {
    IsCa::Ca(BasicConstraints::Constrained(length))
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn permitted(name: &str) -> Option<NameConstraints> {
    let permitted_subtrees = vec![GeneralSubtree::DnsName(name.to_owned())];
    Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() })
}

fn excluded(name: &str) -> Option<NameConstraints> {
    let excluded_subtrees = vec![GeneralSubtree::DnsName(name.to_owned())];
    Some(NameConstraints { permitted_subtrees: Vec::new(), excluded_subtrees })
}

fn addresses() -> Option<NameConstraints> {
    let subnet = CidrSubnet::from_addr_prefix([10, 0, 0, 0].into(), 8);
    let permitted_subtrees = vec![GeneralSubtree::IpAddress(subnet)];
    Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() })
}

fn pem_of(der: &[u8]) -> Vec<u8> {
    pem::encode(&pem::Pem::new("CERTIFICATE", der)).into_bytes()
}

fn key_pem(key: &KeyPair) -> Vec<u8> {
    pem::encode(&pem::Pem::new("PRIVATE KEY", key.serialize_der())).into_bytes()
}

fn domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

/// A root as an operator makes it; its key is beside it.
fn openssl_root(dir: &Path, name: &str, [algorithm, option]: [&str; 2]) -> Vec<u8> {
    openssl(
        dir,
        &format!(
            "req -x509 -newkey {algorithm} -pkeyopt {option} -nodes -days 3650 -keyout {name}.key \
             -out {name}.pem -subj /CN={name} -addext basicConstraints=critical,CA:true \
             -addext keyUsage=critical,keyCertSign,cRLSign"
        ),
    );
    std::fs::read(dir.join(format!("{name}.pem"))).unwrap()
}

/// An issuer for a request, with one intermediate between it and its root.
fn openssl_issuer(
    dir: &Path,
    root: &str,
    ([algorithm, option], name): ([&str; 2], &str),
    csr: &[u8],
) -> Vec<u8> {
    let write = |name: &str, text: &[u8]| std::fs::write(dir.join(name), text).unwrap();
    write("issuer.csr", pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", csr)).as_bytes());
    let usage = "keyUsage=critical,keyCertSign,cRLSign\nauthorityKeyIdentifier=keyid\n";
    write("issuer.ext", format!("basicConstraints=critical,CA:true,pathlen:0\n{usage}").as_bytes());
    write("middle.ext", format!("basicConstraints=critical,CA:true,pathlen:1\n{usage}").as_bytes());
    openssl(
        dir,
        &format!(
            "req -new -newkey {algorithm} -pkeyopt {option} -nodes -keyout middle.key \
             -out middle.csr -subj /CN=middle-{name}"
        ),
    );
    let sign = "x509 -req -CAcreateserial -sha384 -days";
    openssl(
        dir,
        &format!(
            "{sign} 900 -in middle.csr -CA {root}.pem -CAkey {root}.key -extfile middle.ext \
             -out middle.pem"
        ),
    );
    openssl(
        dir,
        &format!(
            "{sign} 90 -in issuer.csr -CA middle.pem -CAkey middle.key -extfile issuer.ext \
             -out issuer.pem"
        ),
    );
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    [read("issuer.pem"), read("middle.pem")].concat()
}

fn openssl(dir: &Path, args: &str) {
    let output = Command::new("openssl").args(args.split(' ')).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
}
