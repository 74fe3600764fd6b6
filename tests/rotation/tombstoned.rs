//! Promise: an anchor that was withdrawn comes back by no way: not by the mounted file, not by the
//! environment of a manifest, and not by the store. Each is refused and said, with a code.

use std::fs;

use steadfast_api::{TrustAnchor, TrustBundle};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, AnchorState};
use steadfast_test_rig::mesh::TRUST_DOMAIN;
use steadfast_test_rig::peer::{Leaf, Peer, TestIssuer, dns_identity};
use steadfast_test_rig::{MeshConfig, Pod, PodSpec};

use crate::support::{
    DEADLINE, Field, assert_idle, in_state, over, rotate, without_a_failed_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_withdrawn_anchor_that_somebody_puts_back_is_refused_and_said() {
    let mut field = Field::start(MeshConfig::rotating()).await;
    let old = in_state(&field.mesh.trust_domain().await.0, AnchorState::Active);
    let (thief, _) = TestIssuer::under_anchor(field.mesh.dir(), &old);
    let id = old.id.to_string();
    let state = without_a_failed_request(field.load(), async {
        rotate(&field.mesh).await;
        let (state, _) = over(&field.mesh, 1).await;

        // 1. Into the file that api has mounted, while there is nobody who could put it right.
        field.mesh.store.freeze();
        field.mesh.identity.kill();
        let file = field.mesh.dir().join("pods/demo/api-0/bundle.json");
        fs::write(&file, with(&state, &old).to_jwks()).expect("it is put back");
        let said = ["SFT-TRU-009", "the mounted bundle", &id];
        field.api.proxy.logged(&said, DEADLINE).await;
        field.mesh.store.thaw();
        field.mesh.identity.restart();
        let mesh = &field.mesh;
        refused(field.peer(&thief)).await;

        // 2. Into the environment of a new workload, as an old manifest would.
        let env = vec![
            ("LINKERD2_PROXY_IDENTITY_TRUST_ANCHORS".to_owned(), pem(&with(&state, &old))),
            ("STEADFAST_PROXY_BUNDLE_FILE".to_owned(), String::new()),
        ];
        let ports = [field.tcp.addr.port()];
        let fresh = PodSpec { opaque_ports: ports.to_vec(), env, ..PodSpec::new("fresh", &ports) };
        let fresh = mesh.pod(fresh.policy("all-authenticated"));
        fresh.ready().await;
        fresh.proxy.logged(&["SFT-TRU-009", &id], DEADLINE).await;
        refused(peer_of(&thief, &fresh, ports[0])).await;

        // 3. Into the store, beside its tombstone: it is published to nobody.
        let anchor = AnchorRecord { state: AnchorState::Retiring, ..old.clone() };
        mesh.order(|state| state.anchors.push(anchor.clone())).await;
        mesh.identity.logged(&["SFT-TRU-009", "the store", &id], DEADLINE).await;
        refused(field.peer(&thief)).await;

        // 4. Into the store, instead of its tombstone: workloads know it, and a person is called.
        mesh.order(|state| {
            state.tombstones.clear();
            state.seq += 1;
        })
        .await;
        let said = ["SFT-TRU-009", "the published bundle", &id];
        field.api.proxy.logged(&said, DEADLINE).await;
        refused(field.peer(&thief)).await;
        let halted = |state: &TrustDomainState| state.halted.is_some();
        mesh.state_where("it is found out", DEADLINE, halted).await;
        let (well, text) = mesh.command(&["trust", "recover", "--yes", "--timeout", "2m"]).await;
        assert!(well && text.contains("Healed"), "{text}");
        refused(field.peer(&thief)).await;
        let well = |state: &TrustDomainState| {
            let gone = state.tombstones.contains(&old.id) && state.anchor(old.id).is_none();
            gone && state.rotation.is_none() && state.halted.is_none()
        };
        mesh.state_where("it is withdrawn once more", DEADLINE, well).await
    })
    .await;
    assert_idle(&field.mesh, &state).await;
}

fn peer_of(issuer: &TestIssuer, pod: &Pod, port: u16) -> Peer {
    issuer.peer(&Leaf::of("ops"), pod.inbound, &dns_identity(&pod.spec.name), port)
}

async fn refused(peer: Peer) {
    let told = peer.connect().await;
    assert!(told.starts_with("refused"), "{told}");
}

/// What is published, and the old anchor.
fn with(state: &TrustDomainState, old: &AnchorRecord) -> TrustBundle {
    let anchors = state.published().chain([old]);
    let anchors = anchors.map(|anchor| TrustAnchor::parse(&anchor.der).expect("an anchor"));
    let trust_domain = TRUST_DOMAIN.parse().expect("a trust domain");
    TrustBundle::new(trust_domain, state.seq, anchors.collect()).expect("a bundle")
}

fn pem(bundle: &TrustBundle) -> String {
    let anchors = bundle.anchors().iter();
    anchors.map(|anchor| pem::encode(&pem::Pem::new("CERTIFICATE", anchor.der()))).collect()
}
