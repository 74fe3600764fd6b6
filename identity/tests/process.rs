//! The real process beside a real store: flags, readiness, a certificate for a real token, what it
//! cannot read, and how it stops.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::process::Command;

use steadfast_api::Svid;
use steadfast_api::trust::v1::CertifyRequest;
use steadfast_identity::authority::Founding;
use steadfast_identity::confine::RESTARTED_FLAG;
use support::world::{World, wait};

#[tokio::test(flavor = "multi_thread")]
async fn the_process_certifies_a_real_token_and_stops_when_asked() {
    let world = World::new(env!("CARGO_BIN_EXE_steadfast-identity")).await;
    let mut identity = world.start(&[]).await;
    wait(|| identity.ready().contains("\"ready\":true"), "ready").await;
    let mut trust = identity.trust(&world.founding).await;
    let request = |token: Vec<u8>| CertifyRequest { token, csr: support::plain_csr() };
    let good = world.token("identity.l5d.io", "u1");
    let reply = trust.certify(request(good.clone())).await.unwrap().into_inner();
    let svid = Svid::parse(&reply.chain[0]).unwrap();
    assert_eq!(svid.spiffe_id.as_str(), support::WEB_ID);
    let mut altered = good;
    let middle = altered.len() / 2;
    altered[middle] ^= 1;
    for (token, code) in [
        (world.token("kubernetes", "u1"), "SFT-ID-003"),
        (world.token("identity.l5d.io", "u2"), "SFT-ID-006"),
        (altered, "SFT-ID-002"),
    ] {
        let status = trust.certify(request(token)).await.unwrap_err();
        assert_eq!(status.metadata().get("sft-code").unwrap(), code, "{status}");
    }
    let log = std::fs::read_to_string(world.directory.log().join("issuance.jsonl")).unwrap();
    assert!(log.contains(&svid.serial_hex()));
    let pid = identity.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let status = tokio::task::spawn_blocking(move || {
        let status = identity.child.wait().unwrap();
        (identity, status)
    });
    let (identity, status) = tokio::time::timeout(support::WAIT, status).await.unwrap().unwrap();
    assert!(status.success(), "{}", identity.log());
    world.drain.start();
}

/// A thread that was there before the process confined itself would be bound by nothing: the
/// allocator's is the one that nobody sees.
#[tokio::test(flavor = "multi_thread")]
async fn every_thread_of_the_process_is_confined() {
    let world = World::new(env!("CARGO_BIN_EXE_steadfast-identity")).await;
    let identity = world.start(&[]).await;
    wait(|| identity.log().contains("onfined"), "a word about Landlock").await;
    wait(|| identity.ready().contains("\"ready\":true"), "ready").await;
    if identity.log().contains("not confined") {
        return;
    }
    let tasks = std::fs::read_dir(format!("/proc/{}/task", identity.child.id())).unwrap();
    let statuses: Vec<String> = tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap())
        .collect();
    assert!(statuses.len() > 1, "the service has more threads than its first");
    for status in statuses {
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    }
}

#[test]
fn the_mark_of_a_restart_alone_confines_nobody_and_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_steadfast-identity"))
        .args([RESTARTED_FLAG, "--dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("threads run before the process is confined"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_process_cannot_read_an_anchors_key() {
    let world = World::new(env!("CARGO_BIN_EXE_steadfast-identity")).await;
    let Founding { active, issuer, .. } = &world.founding;
    // The file of the issuer's key leads to the anchor's: whoever can read that one would find a
    // key there, and say that it is another one's.
    let path = world.directory.issuer_keys().join(format!("{}.key", issuer.id));
    std::fs::remove_file(&path).unwrap();
    let anchor = world.directory.anchor_keys().join(format!("{}.key", active.id));
    std::os::unix::fs::symlink(&anchor, &path).unwrap();
    let identity = world.start(&[]).await;
    let confined = || identity.log().contains("onfined");
    wait(confined, "a word about Landlock").await;
    if identity.log().contains("not confined") {
        return;
    }
    assert!(identity.log().contains("is out of reach"), "{}", identity.log());
    wait(|| identity.ready().contains("SFT-ID-022"), "the issuer unusable").await;
    let reasons = identity.ready();
    assert!(reasons.contains("Permission denied"), "{reasons}");
    // Without the confinement the same file can be read: the test would fail otherwise than so.
    assert!(std::fs::read(&path).is_ok());
}

#[test]
fn every_wrong_flag_is_told_at_once_and_nothing_starts() {
    let output = Command::new(env!("CARGO_BIN_EXE_steadfast-identity"))
        .args(["--dir", "/no/such", "--listen", "x", "--plaintext-listen", "0.0.0.0:1"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr);
    for part in ["SFT-CFG-001", "--dir", "--listen", "--plaintext-listen"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
}
