//! Promise: a controller may be killed in any phase, and its next start ends the rotation, with no
//! key made twice or lost and no failed request.

use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{AnchorState, Outcome};
use steadfast_test_rig::{MeshConfig, until};

use crate::support::{
    DEADLINE, Field, assert_idle, assert_outcome, in_phase, in_state, keys, over, rotate,
    without_a_failed_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_is_killed_in_each_phase_ends_its_rotation_with_one_key() {
    let mut field = Field::start(MeshConfig::rotating()).await;
    let before = field.mesh.trust_domain().await.0;
    let standby = in_state(&before, AnchorState::Standby).id;
    let old_keys = keys(&field.mesh);
    let load = field.load();
    let story = async {
        let mesh = &mut field.mesh;
        let mut made = None;
        rotate(mesh).await;
        for name in PHASES {
            in_phase(mesh, name).await;
            mesh.rotation.as_mut().expect("a controller").restart();
            if name == PhaseName::Generating {
                // Once more where a key has been made, and nothing in the state names it yet.
                let new = until("a key is made", DEADLINE, || async {
                    let new = keys(mesh).difference(&old_keys).next().copied();
                    new.ok_or_else(|| "there is none".to_owned())
                });
                made = Some(new.await);
                mesh.rotation.as_mut().expect("a controller").restart();
            }
        }
        let what = "the old anchor's key is condemned";
        mesh.state_where(what, DEADLINE, |state| !state.past.is_empty()).await;
        mesh.rotation.as_mut().expect("a controller").restart();
        (over(mesh, 1).await, made)
    };
    let ((state, past), made) = without_a_failed_request(load, story).await;
    assert_outcome(&past, Outcome::Done);
    assert_idle(&field.mesh, &state).await;
    assert_eq!(in_state(&state, AnchorState::Active).id, standby);
    assert_eq!(Some(in_state(&state, AnchorState::Standby).id), made, "the first that was made");
}

const PHASES: [PhaseName; 6] = [
    PhaseName::Generating,
    PhaseName::Staged,
    PhaseName::Preparing,
    PhaseName::Activated,
    PhaseName::Draining,
    PhaseName::Withdrawn,
];
