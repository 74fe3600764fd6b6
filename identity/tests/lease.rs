//! A replica acts under a confirmed view only, and comes back by itself.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use steadfast_api::trust::v1::CertifyRequest;
use steadfast_identity::authority::{ISSUER_LIFETIME, found, make_issuer};
use steadfast_identity::replica::{LEASE, Lease};
use steadfast_platform::Store as _;
use steadfast_platform::keys::{FileKeys, Zeroizing};
use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::Halt;
use support::{Mesh, plain_csr};
use tonic::Code as Grpc;

fn web() -> CertifyRequest {
    CertifyRequest { token: b"web".to_vec(), csr: plain_csr() }
}

async fn certify(mesh: &Mesh) -> Result<(), tonic::Status> {
    mesh.trust().await.certify(web()).await.map(|_| ())
}

#[track_caller]
fn assert_code(result: Result<(), tonic::Status>, code: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.metadata().get("sft-code").unwrap(), code, "{status}");
    assert_eq!(status.code(), Grpc::Unavailable);
}

/// Lets so much of the boot clock pass.
fn pass(mesh: &Mesh, time: Duration) {
    mesh.clock.boot_ms.fetch_add(i64::try_from(time.as_millis()).unwrap(), Ordering::SeqCst);
}

#[test]
fn a_lease_counts_from_the_sending_of_the_newest_answered_read() {
    let (lease, second) = (Lease::default(), Duration::from_secs);
    assert!(!lease.holds(second(0)));
    lease.confirm(second(100), LEASE);
    assert!(lease.holds(second(114)));
    assert!(!lease.holds(second(115)));
    // An older read that is answered later confirms nothing.
    lease.confirm(second(90), LEASE);
    assert!(lease.holds(second(114)));
    lease.confirm(second(110), LEASE);
    assert!(lease.holds(second(124)));
}

#[tokio::test]
async fn past_the_lease_nothing_is_issued_nor_served_until_the_store_answers() {
    let mesh = Mesh::start().await;
    certify(&mesh).await.unwrap();
    mesh.store.down.store(true, Ordering::SeqCst);
    // Within the lease an outage of the store is nobody's business.
    certify(&mesh).await.unwrap();
    pass(&mesh, LEASE);
    mesh.not_ready("trust_domain", "SFT-ID-021").await;
    assert_code(certify(&mesh).await, "SFT-ID-021");
    let status = http_status(&mesh, "/bundle").await;
    assert_eq!(status, 503);
    mesh.store.down.store(false, Ordering::SeqCst);
    mesh.ready().await;
    certify(&mesh).await.unwrap();
    assert_eq!(http_status(&mesh, "/bundle").await, 200);
    assert_eq!(http_status(&mesh, "/jwks").await, 200);
    assert_eq!(http_status(&mesh, "/else").await, 404);
}

#[tokio::test]
async fn a_replica_without_a_trust_domain_says_which_command_makes_one() {
    let mesh = Mesh::start().await;
    mesh.store.delete(TRUST_DOMAIN_KEY);
    mesh.wait(|| mesh.clock.since_boot() > Duration::ZERO, "started").await;
    pass(&mesh, LEASE);
    mesh.not_ready("trust_domain", "steadfast trust init").await;
    mesh.store.put_state(&mesh.founding.state);
    mesh.ready().await;
}

#[tokio::test]
async fn a_store_that_went_back_is_halted_and_believed_once_it_is_recovered() {
    let mesh = Mesh::start().await;
    let at = |seq| TrustDomainState { seq, ..mesh.founding.state.clone() };
    let seq = || mesh.app.certifier.replica.current().map_or(0, |view| view.state.seq);
    let revision = mesh.store.put_state(&at(5));
    mesh.wait(|| seq() == 5, "at seq 5").await;
    // An older seq under a newer revision, and an older revision: both are a backup put back.
    let old = serde_json::to_vec(&at(1)).unwrap();
    let before = steadfast_platform::Revision(revision.0 - 1);
    mesh.store.put_state(&at(1));
    for recovered in [6, 7] {
        mesh.not_ready("issuer", "SFT-ID-026").await;
        assert_code(certify(&mesh).await, "SFT-ID-026");
        let stored = mesh.store.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap();
        let stored: TrustDomainState = serde_json::from_slice(&stored.value).unwrap();
        assert_eq!(stored.halted, Some(Halt::Restored { seen_seq: recovered - 1 }));
        mesh.store.put_state(&at(recovered));
        mesh.ready().await;
        certify(&mesh).await.unwrap();
        assert_eq!(seq(), recovered);
        if recovered == 6 {
            mesh.store.restore(TRUST_DOMAIN_KEY, old.clone(), before);
        }
    }
    // Nobody has recovered it: what has become of it meanwhile is another history.
    mesh.store.restore(TRUST_DOMAIN_KEY, serde_json::to_vec(&at(9)).unwrap(), before);
    mesh.not_ready("issuer", "SFT-ID-026").await;
}

#[tokio::test]
async fn a_wall_clock_that_is_off_the_stores_stops_issuing() {
    let mesh = Mesh::start().await;
    mesh.clock_offset_ms.store(-60_001, Ordering::SeqCst);
    pass(&mesh, LEASE);
    mesh.not_ready("trust_domain", "SFT-ID-025").await;
    assert_code(certify(&mesh).await, "SFT-ID-025");
    mesh.clock_offset_ms.store(60_000, Ordering::SeqCst);
    mesh.ready().await;
    certify(&mesh).await.unwrap();
}

#[tokio::test]
async fn a_new_issuer_is_used_at_once_and_renews_the_services_own_svid() {
    let mesh = Mesh::start().await;
    let (state, issuer) = second_issuer(&mesh);
    keys(&mesh).put_new(issuer.id, Zeroizing::new(issuer.pkcs8.to_vec())).await.unwrap();
    mesh.store.put_state(&state);
    let active = || {
        let view = mesh.app.certifier.replica.current().unwrap();
        view.signer().map(|signer| signer.id()).ok()
    };
    mesh.wait(|| active() == Some(issuer.id), "under the new issuer").await;
    let reply = mesh.trust().await.certify(web()).await.unwrap().into_inner();
    assert_eq!(reply.chain[1], issuer.der);
    let own = || {
        mesh.log().iter().any(|line| {
            line["event"] == "intent"
                && line["token_id"] == "own"
                && line["issuer_id"] == issuer.id.to_string()
        })
    };
    mesh.wait(own, "an own SVID of the new issuer").await;
}

/// A host that boots a day ahead: NTP sets the clock back when the SVID was issued already.
#[tokio::test]
async fn a_clock_that_is_set_back_renews_the_services_own_svid() {
    const DAY_MS: i64 = 86_400_000;
    let mesh = Mesh::start().await;
    let own = || {
        let id = "spiffe://cluster.local/ns/steadfast/sa/steadfast-identity";
        let is_own =
            |line: &&serde_json::Value| line["event"] == "issued" && line["spiffe_id"] == id;
        mesh.log().iter().filter(is_own).count()
    };
    mesh.wait(|| own() > 0, "the first").await;
    let before = own();
    mesh.clock.wall_ms.store(DAY_MS, Ordering::SeqCst);
    mesh.wait(|| own() > before, "renewed a day ahead").await;
    mesh.ready().await;
    let ahead = own();
    // While nothing can be signed, it is not ready: nobody takes an SVID from the future.
    mesh.clock_offset_ms.store(60_001, Ordering::SeqCst);
    pass(&mesh, LEASE);
    mesh.not_ready("trust_domain", "SFT-ID-025").await;
    mesh.clock.wall_ms.store(0, Ordering::SeqCst);
    mesh.not_ready("own_svid", "not valid before").await;
    mesh.clock_offset_ms.store(0, Ordering::SeqCst);
    mesh.wait(|| own() > ahead, "renewed after the step back").await;
    mesh.ready().await;
    certify(&mesh).await.unwrap();
}

#[tokio::test]
async fn an_active_issuer_without_a_key_is_told_and_the_last_one_stands_in() {
    let mesh = Mesh::start().await;
    let (state, issuer) = second_issuer(&mesh);
    mesh.store.put_state(&state);
    mesh.not_ready("issuer", "SFT-ID-022").await;
    let reply = mesh.trust().await.certify(web()).await.unwrap().into_inner();
    assert_eq!(reply.chain[1], mesh.founding.issuer.der);
    // The key comes: it is found without a restart.
    keys(&mesh).put_new(issuer.id, Zeroizing::new(issuer.pkcs8.to_vec())).await.unwrap();
    mesh.ready().await;
    let reply = mesh.trust().await.certify(web()).await.unwrap().into_inner();
    assert_eq!(reply.chain[1], issuer.der);
}

#[tokio::test]
async fn no_issuer_of_another_anchor_stands_in() {
    let mesh = Mesh::start().await;
    let standby = &mesh.founding.standby;
    let domain = &mesh.founding.state.trust_domain;
    let now = SystemClock.now();
    let issuer = make_issuer(domain, &standby.der, &standby.pkcs8, now, ISSUER_LIFETIME).unwrap();
    let mut state = mesh.founding.state.clone();
    state.issuers.push(issuer.as_issuer(standby.id));
    state.active_issuer = issuer.id;
    mesh.store.put_state(&state);
    mesh.not_ready("issuer", "SFT-ID-022").await;
    assert_code(certify(&mesh).await, "SFT-ID-022");
}

#[tokio::test]
async fn a_denied_issuer_signs_nothing() {
    let mesh = Mesh::start().await;
    let mut state = mesh.founding.state.clone();
    state.seq += 1;
    state.denied_issuers.push(steadfast_rotation_protocol::trust_domain::DeniedIssuer {
        id: mesh.founding.issuer.id,
        until: mesh.founding.issuer.not_after,
    });
    mesh.store.put_state(&state);
    mesh.not_ready("issuer", "has been denied").await;
    assert_code(certify(&mesh).await, "SFT-ID-022");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_ends_while_the_log_is_written_hands_out_nothing() {
    // The log is a pipe: once it is full, whoever writes waits until the test reads.
    let domain = "cluster.local".parse().unwrap();
    let founding = found(&domain, SystemClock.now()).unwrap();
    let mkfifo = |directory: &std::path::Path| {
        let path = directory.join("issuance.jsonl");
        let made = std::process::Command::new("mkfifo").arg(path).status().unwrap();
        assert!(made.success());
    };
    let mesh = Mesh::start_prepared(support::config(), founding, mkfifo).await;
    let pipe = mesh.dir.path().join("log/issuance.jsonl");
    let mut pipe = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(NONBLOCK)
        .open(pipe)
        .unwrap();
    let own = || !mesh.app.readiness.report().reasons.contains_key("own_svid");
    mesh.wait(own, "with an SVID of its own").await;
    let mut trust = mesh.trust().await;
    while pipe.write(&[b'\n'; 512]).is_ok() {}
    let asked = trust.certify(web());
    let mut asked = std::pin::pin!(asked);
    let reviewed = async {
        while mesh.tokens.reviews.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        _ = asked.as_mut() => panic!("nothing was written, and yet there is an answer"),
        () = reviewed => {}
    }
    let mut text = String::new();
    let mut read = |until: &str| {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut bytes) {
            text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        }
        text.lines().any(|line| line.contains(until) && line.contains(support::WEB_ID))
    };
    // The review and the first look at the lease are one step, so the request now waits for the
    // log: the lease ends, and then the pipe is read.
    let mut lost = false;
    let status = loop {
        tokio::select! {
            answer = asked.as_mut() => break answer.unwrap_err(),
            () = tokio::time::sleep(Duration::from_millis(5)) => {
                if !lost {
                    mesh.store.down.store(true, Ordering::SeqCst);
                    pass(&mesh, LEASE);
                    lost = true;
                }
                read("intent");
            }
        }
    };
    assert_eq!(status.metadata().get("sft-code").unwrap(), "SFT-ID-021", "{status}");
    assert!(read("intent"), "it was refused before it was in the log: {text}");
    assert!(read("failed") && !read("issued"), "{text}");
}

fn second_issuer(mesh: &Mesh) -> (TrustDomainState, steadfast_identity::authority::Authority) {
    let active = &mesh.founding.active;
    let domain = &mesh.founding.state.trust_domain;
    let now = SystemClock.now();
    let issuer = make_issuer(domain, &active.der, &active.pkcs8, now, ISSUER_LIFETIME).unwrap();
    let mut state = mesh.founding.state.clone();
    state.issuers.push(issuer.as_issuer(active.id));
    state.active_issuer = issuer.id;
    (state, issuer)
}

fn keys(mesh: &Mesh) -> FileKeys {
    FileKeys::open(mesh.dir.path().join("keys/issuers")).unwrap()
}

async fn http_status(mesh: &Mesh, path: &str) -> u16 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(mesh.plaintext).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

/// O_NONBLOCK on Linux.
const NONBLOCK: i32 = 0o4000;
