//! No SVID outlives what the state promises of its anchor.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use steadfast_identity::app::App;
use steadfast_identity::certify::{Proof, Request};
use steadfast_identity::config::Config;
use steadfast_platform::Store as _;
use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::Promise;
use support::{Mesh, plain_csr};

/// The life of the SVID that a replica issues now.
async fn life(app: &App) -> Duration {
    let csr = plain_csr();
    let request = Request {
        api: "steadfast",
        identity: None,
        proof: Proof::Token(b"web"),
        csr: &csr,
        peer: None,
        terms: None,
    };
    let issued = app.certifier.certify(request).await.unwrap().issued;
    issued.not_after.since(issued.issued_at)
}

async fn stored(mesh: &Mesh) -> serde_json::Value {
    let entry = mesh.store.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap();
    serde_json::from_slice(&entry.value).unwrap()
}

async fn lives(mesh: &Mesh) -> Vec<Duration> {
    let state: TrustDomainState = serde_json::from_value(stored(mesh).await).unwrap();
    state.anchors.iter().map(|anchor| anchor.svid_life_max).collect()
}

fn longer() -> Config {
    Config { svid_ttl: DAY * 3, ..support::config() }
}

#[tokio::test]
async fn a_longer_life_is_promised_of_every_anchor_before_it_is_issued() {
    let mesh = Mesh::start().await;
    // Until the store takes it, SVIDs live as long as was promised before.
    mesh.store.refuse_writes.store(true, Ordering::SeqCst);
    let mut state = mesh.founding.state.clone();
    state.anchors[1].svid_life_max = DAY * 5;
    let mut written = serde_json::to_value(&state).unwrap();
    written["of a newer version"] = 7.into();
    mesh.store.put(TRUST_DOMAIN_KEY, serde_json::to_vec(&written).unwrap());
    let replica = mesh.beside_with(longer()).await;
    assert!(life(&replica.app).await <= DAY);
    assert_eq!(lives(&mesh).await, [DAY, DAY * 5]);
    mesh.store.refuse_writes.store(false, Ordering::SeqCst);
    let promised = || {
        let view = replica.app.certifier.replica.newest().unwrap();
        view.state.anchors[0].svid_life_max == DAY * 3
    };
    mesh.wait(promised, "promised").await;
    assert_eq!(lives(&mesh).await, [DAY * 3, DAY * 5], "raised, and what is longer stays");
    assert_eq!(stored(&mesh).await["of a newer version"], 7, "nothing else is touched");
    let lived = life(&replica.app).await;
    assert!(lived > DAY * 3 - SECOND && lived <= DAY * 3, "{lived:?}");
    // The one that is told to issue shorter ones goes on doing so, and lowers nothing.
    assert!(life(&mesh.app).await <= Duration::from_secs(3600));
    assert_eq!(lives(&mesh).await, [DAY * 3, DAY * 5]);
}

#[tokio::test]
async fn an_anchor_that_comes_with_a_shorter_promise_is_raised_too() {
    let mesh = Mesh::start_with(longer()).await;
    let promised = async |mesh: &Mesh| {
        let all = async {
            while lives(mesh).await != [DAY * 3, DAY * 3] {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(support::WAIT, all).await.unwrap();
    };
    promised(&mesh).await;
    let mut state: TrustDomainState = serde_json::from_value(stored(&mesh).await).unwrap();
    state.anchors[1].svid_life_max = SECOND;
    mesh.store.put_state(&state);
    promised(&mesh).await;
}

#[tokio::test]
async fn what_a_holder_that_cannot_ack_gets_is_promised_before_and_once_for_an_hour() {
    let mesh = Mesh::start().await;
    let csr = plain_csr();
    let ask = async |api| {
        let request = Request {
            api,
            identity: None,
            proof: Proof::Token(b"web"),
            csr: &csr,
            peer: None,
            terms: None,
        };
        mesh.app.certifier.certify(request).await
    };
    let promised = async || {
        let state: TrustDomainState = serde_json::from_value(stored(&mesh).await).unwrap();
        state.promised
    };
    // Ours acks: nothing is promised, and nothing written.
    mesh.store.refuse_writes.store(true, Ordering::SeqCst);
    ask("steadfast").await.unwrap();
    let refused = ask("linkerd").await.unwrap_err();
    assert_eq!(refused.code, steadfast_api::Code::STORE_UNAVAILABLE, "{refused:?}");
    assert!(promised().await.is_empty());
    mesh.store.refuse_writes.store(false, Ordering::SeqCst);
    let revision = async || mesh.store.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap().revision;
    let issued = ask("linkerd").await.unwrap().issued;
    let written = revision().await;
    let [promise]: [Promise; 1] = promised().await.try_into().unwrap();
    assert_eq!(promise.holder, "linkerd");
    assert_eq!(promise.anchor_id, mesh.founding.active.id);
    assert!(promise.not_after >= issued.not_after);
    assert!(promise.not_after < issued.not_after + Duration::from_secs(2 * 3600));
    ask("linkerd").await.unwrap();
    let again = promised().await;
    // The hour may turn between the two, and then there is one write more.
    assert_eq!(again.len(), 1);
    assert!(revision().await == written || again[0].not_after > promise.not_after);
}

const DAY: Duration = Duration::from_secs(86_400);
const SECOND: Duration = Duration::from_secs(1);
