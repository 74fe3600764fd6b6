//! Promise: a rotation that is aborted ends in Idle with a standby, from each phase that has a way
//! back, and no request fails.

use std::time::Duration;

use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{
    AnchorState, CanaryPlan, Outcome, Request, Selector,
};

use steadfast_test_rig::MeshConfig;

use crate::support::{
    Field, assert_idle, assert_outcome, in_phase, in_state, over, phase, without_a_failed_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_in_each_phase_with_a_way_back_ends_in_idle_with_a_standby() {
    let field = Field::start(MeshConfig::rotating()).await;
    let mesh = &field.mesh;
    let active = in_state(&mesh.trust_domain().await.0, AnchorState::Active).id;
    without_a_failed_request(field.load(), async {
        for (index, name) in PHASES.into_iter().enumerate() {
            let (selector, window) =
                (Selector::Namespace("demo".to_owned()), Duration::from_secs(3600));
            let plan = CanaryPlan { selector, window };
            let canary = (name == PhaseName::Canary).then_some(plan);
            mesh.order(|state| {
                let (by, at) = ("a test".to_owned(), state.activated_at);
                let request =
                    Request { by, at, anchor: None, canary: canary.clone(), replaces: None };
                state.request(request).expect("it is taken");
            })
            .await;
            in_phase(mesh, name).await;
            let aborted = mesh.order(|state| {
                state.abort().expect("there is a way back");
                phase(state)
            });
            assert_eq!(aborted.await, Some(name), "it was aborted in the phase that was meant");
            let (state, past) = over(mesh, index + 1).await;
            assert_outcome(&past, Outcome::Aborted);
            assert_idle(mesh, &state).await;
            assert_eq!(in_state(&state, AnchorState::Active).id, active, "{name:?}");
        }
    })
    .await;
}

/// From the last, there is none.
const PHASES: [PhaseName; 6] = [
    PhaseName::Generating,
    PhaseName::Staged,
    PhaseName::Preparing,
    PhaseName::Canary,
    PhaseName::Activated,
    PhaseName::Draining,
];
