//! Promise: a stolen anchor pre-empts a rotation that is under way, whichever of its anchors it is,
//! and after it nobody comes in with an SVID under that anchor.

use std::time::Duration;

use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::AnchorState;
use steadfast_test_rig::peer::TestIssuer;

use steadfast_test_rig::MeshConfig;

use crate::support::{
    DEADLINE, Field, assert_idle, in_phase, in_state, phase, rotate, without_a_failed_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn the_active_anchor_is_stolen_in_the_middle_of_a_rotation() {
    stolen(AnchorState::Active, PhaseName::Staged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_anchor_is_stolen_before_it_is_active() {
    stolen(AnchorState::Standby, PhaseName::Staged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_anchor_is_stolen_when_it_has_just_become_active() {
    stolen(AnchorState::Standby, PhaseName::Draining).await;
}

async fn stolen(which: AnchorState, when: PhaseName) {
    let field = Field::start(MeshConfig::rotating()).await;
    let mesh = &field.mesh;
    let anchor = in_state(&mesh.trust_domain().await.0, which);
    // Whoever has the key makes an issuer of his own; the mesh knows nothing of it.
    let (thief, _) = TestIssuer::under_anchor(mesh.dir(), &anchor);
    let (thief, id) = (field.peer(&thief), anchor.id);
    assert!(thief.clone().connect().await.starts_with("through"), "it is stolen");
    let state = without_a_failed_request(field.load(), async {
        rotate(mesh).await;
        in_phase(mesh, when).await;
        let found_out = mesh.order(|state| {
            state.taint(id, "a test".to_owned(), GRACE).expect("there is such an anchor");
            phase(state)
        });
        assert_eq!(found_out.await, Some(when), "it was found out in the phase that was meant");
        let over = |state: &steadfast_rotation_protocol::TrustDomainState| {
            let gone = state.tombstones.contains(&id) && state.anchor(id).is_none();
            let standby = state.in_state(AnchorState::Standby).next().is_some();
            gone && standby && state.rotation.is_none() && state.requested.is_none()
        };
        mesh.state_where("the emergency is over", DEADLINE, over).await
    })
    .await;
    // One that has never issued goes at once; any other is an emergency, which waits for nobody.
    let emergency = state.past.iter().any(|past| past.kind == "emergency");
    let unused = which == AnchorState::Standby && when == PhaseName::Staged;
    assert_eq!(emergency, !unused, "{:#?}", state.past);
    field.api_uses(state.seq).await;
    let refused = thief.connect().await;
    assert!(refused.starts_with("refused"), "{refused}");
    field.api.proxy.logged(&["SFT-TLS-001", "inbound"], DEADLINE).await;
    assert_idle(mesh, &state).await;
}

/// Nobody is cut off here: all answer long before.
const GRACE: Duration = Duration::from_secs(100);
