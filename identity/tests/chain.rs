//! What is issued: its form, its chain, its times, and what OpenSSL says of it.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::time::Duration;

use steadfast_api::trust::v1::{CertifyRequest, CertifyResponse};
use steadfast_api::{Svid, UnixTime};
use steadfast_identity::authority::{ANCHOR_LIFETIME, SKEW, found, make_anchor, make_issuer};
use steadfast_process::{Clock as _, SystemClock};
use support::{Mesh, WEB_ID, WEB_NAME, plain_csr};

fn web() -> CertifyRequest {
    CertifyRequest { token: b"web".to_vec(), csr: plain_csr() }
}

fn pem(ders: &[&[u8]]) -> String {
    use base64::Engine as _;
    let block = |der: &&[u8]| {
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        let lines: Vec<_> =
            text.as_bytes().chunks(64).map(|c| std::str::from_utf8(c).unwrap()).collect();
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
    };
    ders.iter().map(block).collect()
}

fn openssl_verify(mesh: &Mesh, reply: &CertifyResponse, anchors: &[&[u8]], purpose: &str) -> bool {
    let file = |name: &str, ders: &[&[u8]]| {
        let path = mesh.dir.path().join(name);
        std::fs::write(&path, pem(ders)).unwrap();
        path
    };
    let output = Command::new("openssl")
        .args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"])
        .arg(file("anchors.pem", anchors))
        .arg("-untrusted")
        .arg(file("issuer.pem", &[&reply.chain[1]]))
        .arg(file("svid.pem", &[&reply.chain[0]]))
        .output()
        .unwrap();
    output.status.success()
}

#[tokio::test]
async fn openssl_accepts_the_chain_for_both_sides_and_under_its_own_anchor_only() {
    let mesh = Mesh::start().await;
    let reply = mesh.trust().await.certify(web()).await.unwrap().into_inner();
    let (active, standby) = (&mesh.founding.active.der, &mesh.founding.standby.der);
    for purpose in ["sslserver", "sslclient"] {
        assert!(openssl_verify(&mesh, &reply, &[active, standby], purpose), "{purpose}");
        assert!(!openssl_verify(&mesh, &reply, &[standby], purpose), "{purpose}");
    }
}

#[tokio::test]
async fn openssl_sees_tls_1_3_and_the_services_own_svid_and_gets_the_bundle() {
    let mesh = Mesh::start().await;
    let anchors = mesh.dir.path().join("anchors.pem");
    std::fs::write(&anchors, pem(&[&mesh.founding.active.der])).unwrap();
    let address = mesh.address.to_string();
    let output = tokio::task::spawn_blocking(move || {
        let mut child = Command::new("openssl")
            .args(["s_client", "-connect", &address, "-verify_return_error", "-ign_eof"])
            .args(["-verify_hostname", support::SERVICE_NAME, "-CAfile"])
            .arg(anchors)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let request = b"GET /bundle HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), request).unwrap();
        child.wait_with_output().unwrap()
    })
    .await
    .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    for expected in [
        "TLSv1.3",
        "Verify return code: 0 (ok)",
        "HTTP/1.1 200 OK",
        "content-type: application/json",
        "\"spiffe_sequence\": 1",
    ] {
        assert!(text.contains(expected), "no {expected:?} in {text}");
    }
}

#[tokio::test]
async fn an_svid_has_the_form_of_the_profile_and_both_log_lines() {
    let mesh = Mesh::start().await;
    let before = SystemClock.now();
    let csr = plain_csr();
    let request = CertifyRequest { token: b"web".to_vec(), csr };
    let reply = mesh.trust().await.certify(request).await.unwrap().into_inner();
    let svid = Svid::parse(&reply.chain[0]).unwrap();
    assert_eq!(svid.spiffe_id.as_str(), WEB_ID);
    assert_eq!(svid.dns_names, [WEB_NAME]);
    assert_eq!(reply.seq, 1);
    let issued_at = UnixTime::from(reply.issued_at.unwrap());
    assert!(issued_at >= before);
    assert_eq!(svid.not_before.as_secs(), issued_at.as_secs() - 300);
    assert_eq!(UnixTime::from(reply.not_after.unwrap()), svid.not_after);
    // The renewal is a share of what is left from issue, not of a life that began before it.
    let life = svid.not_after.since(issued_at);
    let renew = UnixTime::from(reply.renew_at.unwrap()).since(issued_at);
    assert!(renew >= life.mul_f64(0.59) && renew <= life.mul_f64(0.71), "{renew:?} of {life:?}");
    let parsed = x509_parser::parse_x509_certificate(&reply.chain[0]).unwrap().1;
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    let constraints = parsed.basic_constraints().unwrap().unwrap();
    assert!(!constraints.value.ca);
    let serial = svid.serial_hex();
    let lines = || {
        let all = mesh.log().into_iter();
        all.filter(|line| line["serial"] == serial.as_str()).collect::<Vec<_>>()
    };
    // The second follows within moments.
    mesh.wait(|| lines().len() == 2, "in the log").await;
    let lines = lines();
    assert_eq!((&lines[0]["event"], &lines[1]["event"]), (&"intent".into(), &"issued".into()));
    for (name, value) in [
        ("spiffe_id", WEB_ID),
        ("namespace", "demo"),
        ("pod", "web-1"),
        ("pod_uid", "uid-of-web-1"),
        ("node", "node-1"),
        ("token_id", "token-of-web-1"),
    ] {
        assert_eq!(lines[0][name], value);
    }
    assert_eq!(lines[0]["key_id"], svid.key_id.to_string());
    assert_eq!(lines[0]["issuer_id"], mesh.founding.issuer.id.to_string());
}

#[tokio::test]
async fn serial_numbers_are_long_and_never_the_same() {
    let mesh = Mesh::start().await;
    let mut trust = mesh.trust().await;
    let mut serials = HashSet::new();
    for _ in 0..200 {
        let reply = trust.certify(web()).await.unwrap().into_inner();
        let serial = Svid::parse(&reply.chain[0]).unwrap().serial;
        // 128 random bits: fewer than 96 would be a wonder.
        assert!(serial.len() >= 12, "{serial:?}");
        assert!(serials.insert(serial));
    }
}

#[tokio::test]
async fn an_svid_ends_before_its_issuer_and_its_anchor() {
    let domain = "cluster.local".parse().unwrap();
    let now = SystemClock.now();
    let hour = Duration::from_secs(3600);
    // An issuer that ends before the anchor, and an anchor that ends first of all (its issuer is
    // from outside and outlives it).
    let mut short_issuer = found(&domain, now).unwrap();
    let issuer = make_issuer(
        &domain,
        &short_issuer.active.der,
        &short_issuer.active.pkcs8,
        now,
        Duration::from_secs(600),
    )
    .unwrap();
    short_issuer.state.issuers = vec![issuer.as_issuer(short_issuer.active.id)];
    short_issuer.state.active_issuer = issuer.id;
    short_issuer.issuer = issuer;
    let ends = short_issuer.issuer.not_after;
    let mesh = Mesh::start_unready(support::config(), short_issuer).await;
    mesh.ready().await;
    let reply = mesh.trust().await.certify(web()).await.unwrap().into_inner();
    let svid = Svid::parse(&reply.chain[0]).unwrap();
    assert!(svid.not_after.since(now) < hour);
    assert_eq!(svid.not_after, ends - SKEW);
}

#[tokio::test]
async fn an_issuer_that_is_about_to_end_issues_nothing() {
    let mesh = Mesh::start().await;
    let mut trust = mesh.trust().await;
    trust.certify(web()).await.unwrap();
    // Thirty days less the skew: the last moment at which an SVID would have no life left.
    let ahead = i64::try_from((Duration::from_secs(30 * 86_400) - SKEW).as_millis()).unwrap();
    mesh.clock.wall_ms.store(ahead, std::sync::atomic::Ordering::SeqCst);
    let status = trust.certify(web()).await.unwrap_err();
    assert_eq!(status.metadata().get("sft-code").unwrap(), "SFT-ID-022", "{status}");
    mesh.not_ready("issuer", "SFT-ID-022").await;
    let anchor = make_anchor(&"cluster.local".parse().unwrap(), SystemClock.now(), ANCHOR_LIFETIME);
    assert!(anchor.unwrap().not_after > SystemClock.now() + Duration::from_secs(700 * 86_400));
}

#[tokio::test]
async fn plaintext_and_tls_serve_the_same_and_two_requests_make_two_keys() {
    let mesh = Mesh::start().await;
    let uri = format!("http://{}", mesh.plaintext);
    let channel = tonic::transport::Endpoint::from_shared(uri).unwrap().connect().await.unwrap();
    let mut plain = steadfast_api_grpc::trust_client::TrustClient::new(channel);
    let one = plain.certify(web()).await.unwrap().into_inner();
    let two = mesh.trust().await.certify(web()).await.unwrap().into_inner();
    assert_ne!(support::key_id(&one.chain[0]), support::key_id(&two.chain[0]));
    assert_eq!(one.chain[1], two.chain[1]);
}
