//! The keys of issuers: made for a wish of the state by one replica, and kept or destroyed.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use steadfast_api::KeyId;
use steadfast_identity::authority::{ISSUER_LIFETIME, make_issuer};
use steadfast_identity::csr;
use steadfast_identity::key::AuthorityKey;
use steadfast_identity::replica::LEASE;
use steadfast_platform::keys::{FileKeys, KeyStore as _, Zeroizing};
use steadfast_platform::store::{ISSUER_REQUESTS_PREFIX, TRUST_DOMAIN_KEY};
use steadfast_platform::{Entry, Store as _};
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{DeniedIssuer, Halt, IssuerRequest, WantedIssuer};
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
    let key = AuthorityKey::from_pkcs8(&pkcs8).unwrap();
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
async fn an_active_issuer_whose_key_was_removed_is_replaced_and_signs_until_then() {
    let mesh = Mesh::start().await;
    let active = mesh.founding.issuer.id;
    keys(&mesh).destroy(active).await.unwrap();
    let state = async || {
        let entry = mesh.store.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap();
        serde_json::from_slice::<TrustDomainState>(&entry.value).unwrap()
    };
    until(async || state().await.issuer_rotation.is_some(), "ordered").await;
    let rotation = state().await.issuer_rotation.unwrap();
    assert_eq!((rotation.old, &*rotation.by), (active, "lost key"));
    let view = mesh.app.certifier.replica.current().unwrap();
    assert_eq!(view.signer().unwrap().id(), active);
}

#[tokio::test]
async fn a_request_whose_key_was_removed_is_posted_anew_with_another() {
    let mesh = Mesh::start().await;
    let (state, wish) = wish(&mesh);
    mesh.store.put_state(&state);
    until(async || !requests(&mesh).await.is_empty(), "posted").await;
    let first = parse(&requests(&mesh).await[0]).key_id;
    keys(&mesh).destroy(first).await.unwrap();
    let again = async || {
        let posted = requests(&mesh).await;
        let second = posted.first().map(|entry| parse(entry).key_id);
        second.is_some_and(|second| second != first)
    };
    until(again, "posted anew").await;
    let second = parse(&requests(&mesh).await[0]);
    assert_eq!(second.number, wish.number);
    assert!(keys(&mesh).exists(second.key_id).await.unwrap());
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
        key_ref: String::new(),
    };
    for number in [0, revision + 1000] {
        let key = format!("{ISSUER_REQUESTS_PREFIX}{number}");
        mesh.store.put(&key, serde_json::to_vec(&request(number)).unwrap());
    }
    until(async || requests(&mesh).await.len() == 1, "deleted").await;
    assert_eq!(parse(&requests(&mesh).await[0]).number, revision + 1000);
}

/// Another issuer of the state, with its key.
async fn issuer(mesh: &Mesh, state: &mut TrustDomainState, lifetime: Duration) -> KeyId {
    let (domain, anchor) = (&state.trust_domain, &mesh.founding.active);
    let now = SystemClock.now();
    let issuer = make_issuer(domain, &anchor.der, &anchor.pkcs8, now, lifetime).unwrap();
    keys(mesh).put_new(issuer.id, Zeroizing::new(issuer.pkcs8.to_vec())).await.unwrap();
    state.issuers.push(issuer.as_issuer(anchor.id));
    issuer.id
}

/// A key that nobody knows of.
async fn orphan(mesh: &Mesh) -> KeyId {
    let (key, pkcs8) = AuthorityKey::generate().unwrap();
    keys(mesh).put_new(key.id(), pkcs8).await.unwrap();
    key.id()
}

/// Lets so much of the boot clock pass, and waits until the replica has looked after it.
async fn pass(mesh: &Mesh, time: Duration) {
    mesh.clock.boot_ms.fetch_add(i64::try_from(time.as_millis()).unwrap(), Ordering::SeqCst);
    mesh.wait(|| mesh.app.certifier.replica.current().is_ok(), "leased").await;
    looked(mesh).await;
}

/// Waits until the replica has looked after its keys: a look that began from now on has ended when
/// the next one has begun. Writing the state as it is wakes it.
async fn looked(mesh: &Mesh) {
    for _ in 0..3 {
        let lists = mesh.store.lists.load(Ordering::SeqCst);
        let entry = mesh.store.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap();
        mesh.store.put(TRUST_DOMAIN_KEY, entry.value);
        mesh.wait(|| mesh.store.lists.load(Ordering::SeqCst) > lists, "looked").await;
    }
}

async fn exist(mesh: &Mesh, ids: &[KeyId]) -> Vec<bool> {
    let kept = keys(mesh).list().await.unwrap();
    ids.iter().map(|id| kept.contains(id)).collect()
}

#[tokio::test]
async fn keys_that_nobody_may_use_are_destroyed_past_the_lease_and_no_others() {
    let mesh = Mesh::start().await;
    let mut state = mesh.founding.state.clone();
    let next = issuer(&mesh, &mut state, ISSUER_LIFETIME).await;
    let denied = issuer(&mesh, &mut state, ISSUER_LIFETIME).await;
    let expired = issuer(&mesh, &mut state, SECOND).await;
    let orphan = orphan(&mesh).await;
    state.denied_issuers.push(DeniedIssuer { id: denied, until: mesh.founding.issuer.not_after });
    state.seq = 2;
    mesh.store.put_state(&state);
    let ids = [mesh.founding.issuer.id, next, denied, expired, orphan];
    mesh.clock.wall_ms.store(120_000, Ordering::SeqCst);
    looked(&mesh).await;
    pass(&mesh, LEASE - SECOND * 10).await;
    assert_eq!(exist(&mesh, &ids).await, [true; 5], "another replica may not know yet");
    pass(&mesh, SECOND * 8).await;
    pass(&mesh, SECOND * 8).await;
    until(
        async || exist(&mesh, &ids).await == [true, true, false, false, false],
        "of those that may be used only",
    )
    .await;
    // The state names the next no more: so it goes, too; what signs stays past its own end.
    state.issuers.retain(|issuer| issuer.id != next);
    mesh.store.put_state(&state);
    let month = i64::try_from(ISSUER_LIFETIME.as_millis()).unwrap();
    mesh.clock.wall_ms.store(month + 120_000, Ordering::SeqCst);
    looked(&mesh).await;
    pass(&mesh, SECOND * 8).await;
    pass(&mesh, SECOND * 8).await;
    until(async || exist(&mesh, &ids).await == [true, false, false, false, false], "one").await;
}

#[tokio::test]
async fn while_a_wish_is_open_or_a_person_is_to_look_no_unknown_key_is_destroyed() {
    let mesh = Mesh::start().await;
    let orphan = orphan(&mesh).await;
    let (mut state, _) = wish(&mesh);
    mesh.store.put_state(&state);
    until(async || !requests(&mesh).await.is_empty(), "posted").await;
    let made = parse(&requests(&mesh).await[0]).key_id;
    for _ in 0..4 {
        pass(&mesh, SECOND * 8).await;
    }
    assert_eq!(exist(&mesh, &[orphan, made]).await, [true, true]);
    state.wanted_issuer = None;
    state.halted = Some(Halt::Restored { seen_seq: 5 });
    mesh.store.put_state(&state);
    looked(&mesh).await;
    for _ in 0..4 {
        pass(&mesh, SECOND * 8).await;
    }
    assert_eq!(exist(&mesh, &[orphan, made]).await, [true, true]);
    // It counts from now on, not from when it was first seen.
    state.halted = None;
    mesh.store.put_state(&state);
    looked(&mesh).await;
    pass(&mesh, SECOND * 8).await;
    assert_eq!(exist(&mesh, &[orphan, made]).await, [true, true]);
    pass(&mesh, SECOND * 8).await;
    until(async || exist(&mesh, &[orphan, made]).await == [false, false], "destroyed").await;
    assert_eq!(exist(&mesh, &[mesh.founding.issuer.id]).await, [true]);
}

#[tokio::test]
async fn a_replica_without_a_lease_destroys_nothing_and_then_counts_anew() {
    let mesh = Mesh::start().await;
    let orphan = orphan(&mesh).await;
    looked(&mesh).await;
    mesh.store.down.store(true, Ordering::SeqCst);
    let hour = i64::try_from((SECOND * 3600).as_millis()).unwrap();
    mesh.clock.boot_ms.fetch_add(hour, Ordering::SeqCst);
    mesh.not_ready("trust_domain", "SFT-ID-021").await;
    mesh.store.down.store(false, Ordering::SeqCst);
    mesh.ready().await;
    looked(&mesh).await;
    assert_eq!(exist(&mesh, &[orphan]).await, [true]);
    pass(&mesh, SECOND * 8).await;
    pass(&mesh, SECOND * 8).await;
    until(async || exist(&mesh, &[orphan]).await == [false], "destroyed").await;
}

const SECOND: Duration = Duration::from_secs(1);
