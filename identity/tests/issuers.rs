//! Several issuers: each is loaded before it is needed, and signs for those whom the state says.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use serde_json::json;
use steadfast_api::KeyId;
use steadfast_api::trust::v1::CertifyRequest;
use steadfast_identity::authority::{Authority, ISSUER_LIFETIME, make_issuer};
use steadfast_platform::keys::{FileKeys, KeyStore as _, Zeroizing};
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::issuer::{Activated, IssuerPhase, IssuerRotation};
use steadfast_rotation_protocol::rotation::{Goal, Next, Phase, Rotation};
use steadfast_rotation_protocol::trust_domain::{
    AnchorState, CanaryPlan, DeniedIssuer, Halt, Selector,
};
use support::{Mesh, plain_csr, token_of};

/// An issuer under this anchor whose key is kept.
async fn issuer(mesh: &Mesh, anchor: &Authority, lifetime: Duration) -> Authority {
    let domain = &mesh.founding.state.trust_domain;
    let now = SystemClock.now();
    let issuer = make_issuer(domain, &anchor.der, &anchor.pkcs8, now, lifetime).unwrap();
    keys(mesh).put_new(issuer.id, Zeroizing::new(issuer.pkcs8.to_vec())).await.unwrap();
    issuer
}

fn keys(mesh: &Mesh) -> FileKeys {
    FileKeys::open(mesh.dir.path().join("keys/issuers")).unwrap()
}

/// The issuer of what a workload is issued now.
async fn signed_by(mesh: &Mesh, token: &str) -> Vec<u8> {
    let request = CertifyRequest { token: token.into(), csr: plain_csr() };
    mesh.trust().await.certify(request).await.unwrap().into_inner().chain[1].clone()
}

fn loaded(mesh: &Mesh) -> Vec<KeyId> {
    let view = mesh.app.certifier.replica.newest().unwrap();
    view.loaded(mesh.clock.now()).collect()
}

async fn put(mesh: &Mesh, state: &TrustDomainState) {
    let revision = mesh.store.put_state(state);
    let newest = || mesh.app.certifier.replica.newest().unwrap().revision >= revision;
    mesh.wait(newest, "installed").await;
}

fn sorted(ids: &[KeyId]) -> Vec<KeyId> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids
}

#[tokio::test]
async fn every_issuer_that_may_be_wanted_is_loaded_before_it_is() {
    let mesh = Mesh::start().await;
    let first = &mesh.founding;
    let next = issuer(&mesh, &first.active, ISSUER_LIFETIME).await;
    let under_standby = issuer(&mesh, &first.standby, ISSUER_LIFETIME).await;
    let denied = issuer(&mesh, &first.active, ISSUER_LIFETIME).await;
    let keyless = issuer(&mesh, &first.active, ISSUER_LIFETIME).await;
    keys(&mesh).destroy(keyless.id).await.unwrap();
    let mut state = first.state.clone();
    for made in [&next, &denied, &keyless] {
        state.issuers.push(made.as_issuer(first.active.id));
    }
    state.issuers.push(under_standby.as_issuer(first.standby.id));
    state.denied_issuers.push(DeniedIssuer { id: denied.id, until: denied.not_after });
    state.seq += 1;
    put(&mesh, &state).await;
    assert_eq!(loaded(&mesh), sorted(&[first.issuer.id, next.id, under_standby.id]));
    assert!(mesh.app.readiness.report().ready, "it signs: what it lacks, the controller asks for");
    assert_eq!(signed_by(&mesh, "web").await, first.issuer.der);

    // A key that comes is found; an anchor that goes takes its issuers along.
    let pkcs8 = Zeroizing::new(keyless.pkcs8.to_vec());
    keys(&mesh).put_new(keyless.id, pkcs8).await.unwrap();
    let with = sorted(&[first.issuer.id, next.id, under_standby.id, keyless.id]);
    mesh.wait(|| loaded(&mesh) == with, "loaded").await;
    state.anchors.retain(|anchor| anchor.id != first.standby.id);
    state.tombstones.push(first.standby.id);
    state.seq += 1;
    put(&mesh, &state).await;
    assert_eq!(loaded(&mesh), sorted(&[first.issuer.id, next.id, keyless.id]));
}

#[tokio::test]
async fn what_is_loaded_is_not_loaded_again() {
    let mesh = Mesh::start().await;
    let next = issuer(&mesh, &mesh.founding.active, ISSUER_LIFETIME).await;
    let mut state = mesh.founding.state.clone();
    state.issuers.push(next.as_issuer(mesh.founding.active.id));
    put(&mesh, &state).await;
    let both = sorted(&[mesh.founding.issuer.id, next.id]);
    assert_eq!(loaded(&mesh), both);
    // Whoever would read the keys again would fail.
    let directory = mesh.dir.path().join("keys/issuers");
    for id in &both {
        let open = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(directory.join(format!("{id}.key")), open).unwrap();
    }
    state.active_issuer = next.id;
    put(&mesh, &state).await;
    assert_eq!(loaded(&mesh), both);
    assert_eq!(signed_by(&mesh, "web").await, next.der);
}

#[tokio::test]
async fn canaries_get_their_svids_of_another_issuer_and_nobody_else_does() {
    let mesh = Mesh::start().await;
    let (active, standby) = (&mesh.founding.active, &mesh.founding.standby);
    let next = issuer(&mesh, standby, ISSUER_LIFETIME).await;
    let mut state = mesh.founding.state.clone();
    state.issuers.push(next.as_issuer(standby.id));
    let selector = Selector::Namespace("demo".into());
    let plan = CanaryPlan { selector, window: Duration::from_secs(60) };
    let canary = json!({"to": standby.id, "issuer": next.id, "plan": plan, "renew": null});
    let phase = serde_json::from_value(json!({"canary": canary})).unwrap();
    let now = mesh.clock.now();
    state.rotation = Some(Rotation {
        number: 1,
        attempt: 0,
        by: "test".into(),
        started: now,
        since: now,
        goal: Goal::Successor { next: Next::Standby(standby.id), canary: Some(plan) },
        added: None,
        urgent: None,
        deadline: None,
        abort: false,
        rescue: false,
        turned_back: false,
        phase,
        steps: Vec::new(),
    });
    put(&mesh, &state).await;
    assert_eq!(signed_by(&mesh, "web").await, next.der);
    assert_eq!(signed_by(&mesh, "controller").await, mesh.founding.issuer.der);
    // Its own namespace as the canary: the service itself stays with the active issuer.
    let rotation = state.rotation.as_mut().unwrap();
    let Phase::Canary(canary) = &mut rotation.phase else { panic!("no canary") };
    canary.plan.selector = Selector::Namespace("steadfast".into());
    put(&mesh, &state).await;
    let control = token_of("steadfast", "steadfast-control", "control-1");
    mesh.tokens.known.lock().unwrap().insert("control".into(), Ok(control));
    assert_eq!(signed_by(&mesh, "web").await, mesh.founding.issuer.der);
    assert_eq!(signed_by(&mesh, "control").await, next.der);
    let view = mesh.app.certifier.replica.current().unwrap();
    assert_eq!(view.signer().unwrap().id(), mesh.founding.issuer.id);
    // The canary's issuer cannot be used: no issuer of another anchor stands in for it.
    state.issuers.retain(|issuer| issuer.id != next.id);
    put(&mesh, &state).await;
    let request = CertifyRequest { token: b"control".to_vec(), csr: plain_csr() };
    let status = mesh.trust().await.certify(request).await.unwrap_err();
    assert_eq!(status.metadata().get("sft-code").unwrap(), "SFT-ID-022", "{status}");
    assert_eq!(signed_by(&mesh, "web").await, mesh.founding.issuer.der);
    assert_eq!(state.in_state(AnchorState::Active).next().unwrap().id, active.id);
}

#[tokio::test]
async fn a_halted_trust_domain_issues_nothing_and_still_serves_its_bundle() {
    let mesh = Mesh::start().await;
    let mut state = mesh.founding.state.clone();
    state.halted = Some(Halt::Restored { seen_seq: 9 });
    put(&mesh, &state).await;
    mesh.not_ready("issuer", "SFT-ID-026").await;
    mesh.not_ready("issuer", "seq 9").await;
    let request = || CertifyRequest { token: b"web".to_vec(), csr: plain_csr() };
    let status = mesh.trust().await.certify(request()).await.unwrap_err();
    assert_eq!(status.metadata().get("sft-code").unwrap(), "SFT-ID-026", "{status}");
    assert_eq!(status.code(), tonic::Code::Unavailable);
    let mut proxy = support::proxy::web(&mesh).await;
    assert_eq!(proxy.bundle().await.seq, 1);
    // Its own SVID is renewed all the same: else nobody could be served, nor asked what he holds.
    let own = || mesh.log().iter().filter(|line| line["token_id"] == "own").count();
    let before = own();
    let ahead = i64::try_from(Duration::from_secs(3600 * 4 / 5).as_millis()).unwrap();
    mesh.clock.wall_ms.store(ahead, std::sync::atomic::Ordering::SeqCst);
    mesh.wait(|| own() > before, "renewed").await;
    // So is that of a replica which is started meanwhile.
    let beside = mesh.beside().await;
    assert!(beside.app.own.issuer().is_some());
    mesh.clock.wall_ms.store(0, std::sync::atomic::Ordering::SeqCst);
    // A person has looked.
    put(&mesh, &mesh.founding.state).await;
    mesh.ready().await;
    mesh.trust().await.certify(request()).await.unwrap();
}

#[tokio::test]
async fn an_issuer_stands_in_unless_its_own_key_is_stolen() {
    let mesh = Mesh::start().await;
    let next = issuer(&mesh, &mesh.founding.active, ISSUER_LIFETIME).await;
    keys(&mesh).destroy(next.id).await.unwrap();
    let mut state = mesh.founding.state.clone();
    state.issuers.push(next.as_issuer(mesh.founding.active.id));
    state.active_issuer = next.id;
    let now = mesh.clock.now();
    let mut rotation = IssuerRotation {
        again: None,
        number: 1,
        steps: Vec::new(),
        old: mesh.founding.issuer.id,
        by: "test".into(),
        started: now,
        since: now,
        urgent: None,
        phase: IssuerPhase::Activated(Activated),
        to: None,
    };
    state.issuer_rotation = Some(rotation.clone());
    put(&mesh, &state).await;
    assert_eq!(signed_by(&mesh, "web").await, mesh.founding.issuer.der);
    rotation.urgent = Some(Duration::from_secs(60));
    state.issuer_rotation = Some(rotation);
    put(&mesh, &state).await;
    let request = CertifyRequest { token: b"web".to_vec(), csr: plain_csr() };
    let status = mesh.trust().await.certify(request).await.unwrap_err();
    assert_eq!(status.metadata().get("sft-code").unwrap(), "SFT-ID-022", "{status}");
}

#[tokio::test]
async fn while_it_is_halted_the_service_goes_on_showing_what_it_was_recognised_by() {
    let mesh = Mesh::start().await;
    // As after a restore: the stored issuer is another than the one that was in use.
    let shown = mesh.app.own.issuer().unwrap().0;
    let older = issuer(&mesh, &mesh.founding.active, ISSUER_LIFETIME).await;
    let mut state = mesh.founding.state.clone();
    state.issuers.push(older.as_issuer(mesh.founding.active.id));
    state.active_issuer = older.id;
    state.halted = Some(Halt::Restored { seen_seq: 9 });
    put(&mesh, &state).await;
    mesh.not_ready("issuer", "SFT-ID-026").await;
    // A replica that is started now has nothing else to show: meanwhile the first one has looked.
    let beside = mesh.beside().await;
    assert_eq!(beside.app.own.issuer().unwrap().0, older.id);
    assert_eq!(mesh.app.own.issuer().unwrap().0, shown);
    // It is another matter once a person has looked.
    state.halted = None;
    put(&mesh, &state).await;
    mesh.wait(|| mesh.app.own.issuer().unwrap().0 == older.id, "under the stored issuer").await;
}
