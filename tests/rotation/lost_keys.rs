//! Promise: when the key of an anchor is gone, another anchor takes its place without a person, and
//! no request fails by it.

use steadfast_api::KeyId;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::AnchorState;
use steadfast_test_rig::{Mesh, MeshConfig};

use crate::support::{DEADLINE, Field, assert_idle, in_state, without_a_failed_request};

#[tokio::test(flavor = "multi_thread")]
async fn an_active_anchor_whose_key_is_deleted_is_replaced_by_the_standby() {
    let field = Field::start(MeshConfig::rotating()).await;
    let mesh = &field.mesh;
    let before = mesh.trust_domain().await.0;
    let standby = in_state(&before, AnchorState::Standby).id;
    let after = without_a_failed_request(field.load(), loses(mesh, AnchorState::Active)).await;
    assert_eq!(in_state(&after, AnchorState::Active).id, standby);
    field.api_uses(after.seq).await;
    assert_idle(mesh, &after).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_whose_key_is_deleted_is_replaced_by_a_fresh_one() {
    let field = Field::start(MeshConfig::rotating()).await;
    let mesh = &field.mesh;
    let active = in_state(&mesh.trust_domain().await.0, AnchorState::Active).id;
    let after = without_a_failed_request(field.load(), loses(mesh, AnchorState::Standby)).await;
    assert_eq!(in_state(&after, AnchorState::Active).id, active);
    assert_idle(mesh, &after).await;
}

/// Deletes a key, and waits until its anchor is gone and nothing is missing.
async fn loses(mesh: &Mesh, which: AnchorState) -> TrustDomainState {
    let lost: KeyId = in_state(&mesh.trust_domain().await.0, which).id;
    let file = mesh.dir().join("keys/anchors").join(format!("{lost}.key"));
    std::fs::remove_file(&file).expect("its key is there");
    let mended = |state: &TrustDomainState| {
        let whole = [AnchorState::Active, AnchorState::Standby]
            .iter()
            .all(|wanted| state.in_state(*wanted).count() == 1);
        state.anchor(lost).is_none() && whole && state.rotation.is_none()
    };
    let state = mesh.state_where("the lost key is mended", DEADLINE, mended).await;
    assert!(state.past.iter().any(|past| past.by == "lost key"), "{:#?}", state.past);
    state
}
