//! Every bad request gets its own status, code and label, and exactly one log line; and the same
//! request, mended in that one property, gets an SVID.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use linkerd2_proxy_api::identity::CertifyRequest as LinkerdRequest;
use rcgen::{BasicConstraints, IsCa, KeyPair, KeyUsagePurpose, SanType};
use steadfast_api::Code;
use steadfast_api::trust::v1::CertifyRequest;
use steadfast_identity::metrics::CertifyLabels;
use steadfast_platform::TokenRefusal;
use support::{Mesh, WEB_ID, WEB_NAME, csr, empty, plain_csr};
use tonic::Code as Grpc;
use tracing_subscriber::layer::SubscriberExt as _;

/// The log lines that a request gets, as `code message`.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Lines {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{field}={value:?} ");
            }
        }
        if event.metadata().level() <= &tracing::Level::WARN {
            let mut text = Text(String::new());
            event.record(&mut text);
            self.0.lock().unwrap().push(text.0);
        }
    }
}

struct Case {
    what: &'static str,
    token: &'static str,
    csr: Vec<u8>,
    status: Grpc,
    code: Code,
}

fn case(what: &'static str, csr: Vec<u8>, status: Grpc, code: Code) -> Case {
    Case { what, token: "web", csr, status, code }
}

fn token_case(token: &'static str, status: Grpc, code: Code) -> Case {
    Case { what: token, token, csr: plain_csr(), status, code }
}

fn openssl_csr(arguments: &[&str]) -> Vec<u8> {
    let common = ["req", "-new", "-nodes", "-keyout", "/dev/null", "-subj", "/", "-outform", "DER"];
    let output =
        std::process::Command::new("openssl").args(common).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn with_sans(sans: Vec<SanType>) -> Vec<u8> {
    let mut params = empty();
    params.subject_alt_names = sans;
    csr(&params)
}

fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

fn uri(name: &str) -> SanType {
    SanType::URI(name.try_into().unwrap())
}

fn bad_csrs() -> Vec<Case> {
    let mut signature = plain_csr();
    *signature.last_mut().unwrap() ^= 1;
    let mut trailing = plain_csr();
    trailing.push(0);
    let authority = |change: &dyn Fn(&mut rcgen::CertificateParams)| {
        let mut params = empty();
        change(&mut params);
        csr(&params)
    };
    let ca = authority(&|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    let cert_sign = authority(&|p| p.key_usages = vec![KeyUsagePurpose::KeyCertSign]);
    let p384 = empty()
        .serialize_request(&KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap())
        .unwrap()
        .der()
        .to_vec();
    let ed25519 = empty()
        .serialize_request(&KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap())
        .unwrap()
        .der()
        .to_vec();
    let rsa = openssl_csr(&["-newkey", "rsa:1024"]);
    let other_curve = openssl_csr(&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp256k1"]);
    let ip = SanType::IpAddress("10.0.0.1".parse().unwrap());
    let long = with_sans(vec![dns(&"a.".repeat(100)); 60]);
    let stranger = "spiffe://cluster.local/ns/demo/sa/api";
    vec![
        case("no CSR", vec![], Grpc::InvalidArgument, Code::CSR_MALFORMED),
        case("garbage", b"garbage bytes".to_vec(), Grpc::InvalidArgument, Code::CSR_MALFORMED),
        case("bytes behind it", trailing, Grpc::InvalidArgument, Code::CSR_MALFORMED),
        case("over 8 KiB", long, Grpc::OutOfRange, Code::CSR_TOO_LARGE),
        case("a bad signature", signature, Grpc::InvalidArgument, Code::CSR_SIGNATURE),
        case("RSA-1024", rsa, Grpc::InvalidArgument, Code::CSR_KEY),
        case("P-384", p384, Grpc::InvalidArgument, Code::CSR_KEY),
        case("secp256k1", other_curve, Grpc::InvalidArgument, Code::CSR_KEY),
        case("Ed25519", ed25519, Grpc::InvalidArgument, Code::CSR_KEY),
        case("CA:true", ca, Grpc::PermissionDenied, Code::CSR_AUTHORITY),
        case("keyCertSign", cert_sign, Grpc::PermissionDenied, Code::CSR_AUTHORITY),
        case("a DNS name", with_sans(vec![dns("x.y")]), Grpc::PermissionDenied, Code::CSR_NAMES),
        case("an ID", with_sans(vec![uri(stranger)]), Grpc::PermissionDenied, Code::CSR_NAMES),
        case("an address", with_sans(vec![ip]), Grpc::PermissionDenied, Code::CSR_NAMES),
        case(
            "its own name and another",
            with_sans(vec![dns(WEB_NAME), uri(WEB_ID), uri(stranger)]),
            Grpc::PermissionDenied,
            Code::CSR_NAMES,
        ),
    ]
}

fn bad_tokens(mesh: &Mesh) -> Vec<Case> {
    let refusals = [
        (
            "wrong audience",
            TokenRefusal::Audience { found: vec!["api".into()], expected: "identity".into() },
        ),
        ("expired", TokenRefusal::Expired(steadfast_api::UnixTime::from_secs(1))),
        ("malformed", TokenRefusal::Malformed("test".into())),
        ("unbound", TokenRefusal::Unbound),
        ("of a gone workload", TokenRefusal::WorkloadGone("test".into())),
        ("unreviewable", TokenRefusal::Unavailable("test".into())),
    ];
    let mut known = mesh.tokens.known.lock().unwrap();
    for (token, refusal) in refusals {
        known.insert(token.into(), Err(refusal));
    }
    vec![
        token_case("", Grpc::Unauthenticated, Code::TOKEN_MISSING),
        token_case(" \n", Grpc::Unauthenticated, Code::TOKEN_MISSING),
        token_case("wrong audience", Grpc::Unauthenticated, Code::TOKEN_AUDIENCE),
        token_case("expired", Grpc::Unauthenticated, Code::TOKEN_EXPIRED),
        token_case("malformed", Grpc::Unauthenticated, Code::TOKEN_MALFORMED),
        token_case("unbound", Grpc::FailedPrecondition, Code::TOKEN_UNBOUND),
        token_case("of a gone workload", Grpc::NotFound, Code::TOKEN_WORKLOAD_GONE),
        token_case("unreviewable", Grpc::Unavailable, Code::STORE_UNAVAILABLE),
    ]
}

#[track_caller]
fn check_status(case: &Case, status: &tonic::Status) {
    let Case { what, status: expected, code, .. } = case;
    assert_eq!(status.code(), *expected, "{what}: {status}");
    assert!(status.message().starts_with(&format!("{code}: ")), "{what}: {status}");
    assert!(status.message().ends_with(code.fix()), "{what}: {status}");
    assert_eq!(status.metadata().get("sft-code").unwrap(), code.as_str(), "{what}");
}

#[tokio::test]
async fn each_bad_request_is_refused_for_its_own_reason_and_logged_once() {
    let lines = Lines::default();
    let subscriber = tracing_subscriber::registry().with(lines.clone());
    let _guard = tracing::subscriber::set_default(subscriber);
    let mesh = Mesh::start().await;
    let mut trust = mesh.trust().await;
    let cases: Vec<_> = bad_csrs().into_iter().chain(bad_tokens(&mesh)).collect();
    let logged_before = mesh.log().len();
    for case in &cases {
        lines.0.lock().unwrap().clear();
        let label = case.code.label();
        let labels = ["new", "renewal", "unknown"].map(|kind| CertifyLabels {
            api: "steadfast",
            kind,
            reason: label,
            result: "refused",
        });
        let counted = || {
            let count = |l| mesh.app.certifier.metrics.certify.get_or_create(l).get();
            labels.iter().map(count).sum::<u64>()
        };
        let before = counted();
        let request = CertifyRequest { token: case.token.into(), csr: case.csr.clone() };
        let status = trust.certify(request).await.unwrap_err();
        check_status(case, &status);
        assert_eq!(counted(), before + 1, "{}", case.what);
        let logged = lines.0.lock().unwrap().clone();
        assert_eq!(logged.len(), 1, "{}: {logged:?}", case.what);
        assert!(logged[0].contains(&format!("code={} ", case.code)), "{}: {logged:?}", case.what);
        assert!(logged[0].contains("peer=127.0.0.1:"), "{}: {logged:?}", case.what);
    }
    // Nothing of all that has reached the issuance log.
    assert_eq!(mesh.log().len(), logged_before);
    let mended = CertifyRequest { token: b"web".to_vec(), csr: plain_csr() };
    trust.certify(mended).await.unwrap();
    mesh.wait(|| mesh.log().len() == logged_before + 2, "in the log").await;
}

#[tokio::test]
async fn a_client_that_refuses_the_services_svid_is_told_and_counted_without_a_flood() {
    let lines = Lines::default();
    let subscriber = tracing_subscriber::registry().with(lines.clone());
    let _guard = tracing::subscriber::set_default(subscriber);
    let (mesh, foreign) = (Mesh::start().await, Mesh::start().await);
    lines.0.lock().unwrap().clear();
    let config = support::client_config([&foreign.founding.active, &foreign.founding.standby]);
    for _ in 0..30 {
        assert!(support::try_connect(mesh.address, &config).await.is_err());
    }
    let reason = Code::PEER_REFUSED_US.label();
    let labels = steadfast_identity::metrics::RefusalLabels { reason };
    let failures = &mesh.app.certifier.metrics.connection_failures;
    mesh.wait(|| failures.get_or_create(&labels).get() == 30, "counted").await;
    let told = lines.0.lock().unwrap().clone();
    assert!((1..=12).contains(&told.len()), "{told:?}");
    assert!(told[0].contains("code=SFT-TLS-010 ") && told[0].contains("UnknownCA"), "{told:?}");
}

#[tokio::test]
async fn linkerds_request_must_name_the_tokens_own_identity() {
    let mesh = Mesh::start().await;
    let mut linkerd = mesh.linkerd().await;
    let names = [
        "api.demo.serviceaccount.identity.steadfast.cluster.local",
        "web.demo.serviceaccount.identity.linkerd.cluster.local",
        "WEB.demo.serviceaccount.identity.steadfast.cluster.local",
        WEB_ID,
        "",
    ];
    for name in names {
        let request = LinkerdRequest {
            identity: name.into(),
            token: b"web".to_vec(),
            certificate_signing_request: plain_csr(),
        };
        let status = linkerd.certify(request).await.unwrap_err();
        let case = case("name", vec![], Grpc::PermissionDenied, Code::IDENTITY_MISMATCH);
        check_status(&case, &status);
    }
    // What Linkerd's own proxy asks for: its name, also in the CSR.
    let mut params = empty();
    params.subject_alt_names = vec![dns(WEB_NAME)];
    let request = LinkerdRequest {
        identity: WEB_NAME.into(),
        token: b"web\n".to_vec(),
        certificate_signing_request: csr(&params),
    };
    let reply = linkerd.certify(request).await.unwrap().into_inner();
    let svid = steadfast_api::Svid::parse(&reply.leaf_certificate).unwrap();
    assert_eq!(svid.spiffe_id.as_str(), WEB_ID);
    assert_eq!(reply.intermediate_certificates.concat(), mesh.founding.issuer.der);
    let valid_until = steadfast_api::UnixTime::from(reply.valid_until.unwrap());
    assert_eq!(valid_until, svid.not_after);
}

#[tokio::test]
async fn a_workload_that_asks_too_often_is_told_to_wait() {
    let mut config = support::config();
    config.rates.workload_per_minute = std::num::NonZeroU32::new(3).unwrap();
    let mesh = Mesh::start_with(config).await;
    let mut trust = mesh.trust().await;
    let request = || CertifyRequest { token: b"web".to_vec(), csr: plain_csr() };
    for _ in 0..3 {
        trust.certify(request()).await.unwrap();
    }
    let status = trust.certify(request()).await.unwrap_err();
    let case = case("too often", vec![], Grpc::ResourceExhausted, Code::RATE_LIMITED);
    check_status(&case, &status);
    let other = CertifyRequest { token: b"api".to_vec(), csr: plain_csr() };
    trust.certify(other).await.unwrap();
}

#[tokio::test]
async fn a_log_that_cannot_be_written_stops_issuing_until_it_can() {
    let mesh = Mesh::start().await;
    let mut trust = mesh.trust().await;
    let request = || CertifyRequest { token: b"web".to_vec(), csr: plain_csr() };
    // The file is rotated into a place that takes nothing.
    let path = mesh.dir.path().join("log/issuance.jsonl");
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    let refused = async {
        loop {
            // Until the writer notices that its file was taken away, its lines go to the old one.
            match trust.certify(request()).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(status) => return status,
            }
        }
    };
    let status = tokio::time::timeout(support::WAIT, refused).await.unwrap();
    let case = case("log", vec![], Grpc::Unavailable, Code::LOG_UNWRITABLE);
    check_status(&case, &status);
    mesh.not_ready("issuance_log", "SFT-ID-024").await;
    std::fs::remove_file(&path).unwrap();
    mesh.ready().await;
    trust.certify(request()).await.unwrap();
    assert!(mesh.log().iter().any(|line| line["event"] == "recovered"));
}
