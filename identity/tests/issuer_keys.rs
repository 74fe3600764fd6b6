//! The keys of issuers: made for a wish of the state by one replica, and kept or destroyed.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use steadfast_api::KeyId;
use steadfast_identity::csr;
use steadfast_platform::keys::{FileKeys, KeyStore as _};
use steadfast_platform::store::ISSUER_REQUESTS_PREFIX;
use steadfast_platform::{Entry, Store as _};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{IssuerRequest, WantedIssuer};
use support::{Mesh, WAIT};

fn keys(mesh: &Mesh) -> FileKeys {
    FileKeys::open(mesh.dir.path().join("keys/issuers")).unwrap()
}

async fn requests(mesh: &Mesh) -> Vec<Entry> {
    mesh.store.list(ISSUER_REQUESTS_PREFIX).await.unwrap().0
}

/// Waits for what can only be asked for.
async fn until(mut level: impl AsyncFnMut() -> bool, what: &str) {
    let waiting = async {
        while !level().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(WAIT, waiting).await.is_ok(), "never {what}");
}

/// The state with a wish, as the controller makes it: numbered by the revision before.
fn wish(mesh: &Mesh) -> (TrustDomainState, WantedIssuer) {
    let number = mesh.app.certifier.replica.newest().unwrap().revision.0;
    let wish = WantedIssuer { anchor_id: mesh.founding.active.id, number };
    let mut state = mesh.founding.state.clone();
    state.wanted_issuer = Some(wish);
    (state, wish)
}

fn parse(entry: &Entry) -> IssuerRequest {
    serde_json::from_slice(&entry.value).unwrap()
}

#[tokio::test]
async fn a_wish_is_answered_with_a_key_that_is_kept_and_a_request_that_proves_it() {
    let mesh = Mesh::start().await;
    let (state, wish) = wish(&mesh);
    mesh.store.put_state(&state);
    until(async || !requests(&mesh).await.is_empty(), "posted").await;
    let posted = requests(&mesh).await;
    assert_eq!(posted[0].key, format!("trust/issuer-requests/{}", wish.number));
    let request = parse(&posted[0]);
    assert_eq!((request.number, request.anchor_id), (wish.number, wish.anchor_id));
    csr::check(&request.csr).unwrap();
    let pkcs8 = keys(&mesh).load(request.key_id).await.unwrap();
    let key = steadfast_identity::key::AuthorityKey::from_pkcs8(&pkcs8).unwrap();
    assert_eq!(key.id(), request.key_id);
    let der = serde_json::from_slice::<serde_json::Value>(&posted[0].value).unwrap();
    assert_eq!(der["csr"], hex::encode(&request.csr));
    // The wish is over: so is its request.
    mesh.store.put_state(&mesh.founding.state);
    until(async || requests(&mesh).await.is_empty(), "deleted").await;
    assert!(keys(&mesh).exists(mesh.founding.issuer.id).await.unwrap());
}

#[tokio::test]
async fn of_several_replicas_the_first_wins_and_the_others_keep_no_key() {
    let mesh = Mesh::start().await;
    let others = [mesh.beside().await, mesh.beside().await];
    let (state, _) = wish(&mesh);
    mesh.store.put_state(&state);
    // Its own key and the one that was made for the wish: what a loser has made is gone.
    let settled = async || {
        let kept = keys(&mesh).list().await.unwrap();
        let posted = requests(&mesh).await;
        kept.len() == 2 && posted.len() == 1 && kept.contains(&parse(&posted[0]).key_id)
    };
    until(settled, "one key for one request").await;
    let first = requests(&mesh).await;
    // A later change wakes all of them again, and none posts or makes another.
    let mut state = state;
    state.paused = true;
    let revision = mesh.store.put_state(&state);
    for app in others.iter().map(|other| &other.app).chain([&mesh.app]) {
        let newest = || app.certifier.replica.newest().is_some_and(|v| v.revision >= revision);
        mesh.wait(newest, "installed").await;
    }
    assert_eq!(requests(&mesh).await, first);
    until(settled, "one key still").await;
}

#[tokio::test]
async fn a_request_that_could_not_be_posted_is_posted_later_with_the_same_key() {
    let mesh = Mesh::start().await;
    mesh.store.refuse_writes.store(true, Ordering::SeqCst);
    let (state, _) = wish(&mesh);
    mesh.store.put_state(&state);
    until(async || keys(&mesh).list().await.unwrap().len() == 2, "made").await;
    assert!(requests(&mesh).await.is_empty());
    let made = keys(&mesh).list().await.unwrap();
    mesh.store.refuse_writes.store(false, Ordering::SeqCst);
    until(async || !requests(&mesh).await.is_empty(), "posted").await;
    assert_eq!(keys(&mesh).list().await.unwrap(), made);
    assert!(made.contains(&parse(&requests(&mesh).await[0]).key_id));
}

#[tokio::test]
async fn a_request_of_a_wish_that_is_newer_than_the_view_stays() {
    let mesh = Mesh::start().await;
    let revision = mesh.app.certifier.replica.newest().unwrap().revision.0;
    let request = |number| IssuerRequest {
        number,
        anchor_id: mesh.founding.active.id,
        key_id: KeyId::of_spki(b"another replica's"),
        csr: vec![1],
    };
    for number in [0, revision + 1000] {
        let key = format!("{ISSUER_REQUESTS_PREFIX}{number}");
        mesh.store.put(&key, serde_json::to_vec(&request(number)).unwrap());
    }
    until(async || requests(&mesh).await.len() == 1, "deleted").await;
    assert_eq!(parse(&requests(&mesh).await[0]).number, revision + 1000);
}
