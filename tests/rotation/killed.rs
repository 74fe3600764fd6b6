//! Promise: a controller may be killed in any phase, and its next start ends the rotation, with no
//! key made twice or lost and no failed request.

use std::collections::BTreeSet;

use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{AnchorState, Outcome};
use steadfast_test_rig::{Mesh, MeshConfig, until};

use crate::support::{
    DEADLINE, Field, assert_idle, assert_outcome, in_phase, in_state, keys, over, phase,
    rotate_by_canaries, without_a_failed_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_is_killed_in_each_phase_ends_its_rotation_with_one_key() {
    let mut field = Field::start(MeshConfig::rotating()).await;
    let load = field.load();
    without_a_failed_request(load, async {
        let mut survived = BTreeSet::new();
        for rotation in 1..=ROTATIONS_MAX {
            survived.extend(killed_in_each_phase(&mut field.mesh, rotation).await);
            if survived.len() == PHASES.len() {
                return;
            }
        }
        panic!("no controller was killed but in {survived:?}");
    })
    .await;
}

/// Rotates once; the phases in which a controller was killed, by what the store held afterwards. One
/// that lasts for moments may have been left by then.
async fn killed_in_each_phase(mesh: &mut Mesh, rotation: usize) -> BTreeSet<PhaseName> {
    let before = mesh.trust_domain().await.0;
    let standby = in_state(&before, AnchorState::Standby).id;
    let old_keys = keys(mesh);
    let (mut killed, mut made) = (BTreeSet::new(), None);
    rotate_by_canaries(mesh).await;
    for name in PHASES {
        in_phase(mesh, name).await;
        killed.extend(kill(mesh).await);
        if name == PhaseName::Generating {
            // Once more where a key has been made, and nothing in the state names it yet.
            let new = until("a key is made", DEADLINE, || async {
                let new = keys(mesh).difference(&old_keys).next().copied();
                new.ok_or_else(|| "there is none".to_owned())
            });
            made = Some(new.await);
            kill(mesh).await;
        }
    }
    let what = "the old anchor's key is condemned";
    mesh.state_where(what, DEADLINE, |state| state.past.len() == rotation).await;
    kill(mesh).await;
    let (state, past) = over(mesh, rotation).await;
    assert_outcome(&past, Outcome::Done);
    assert_idle(mesh, &state).await;
    assert_eq!(in_state(&state, AnchorState::Active).id, standby);
    assert_eq!(Some(in_state(&state, AnchorState::Standby).id), made, "the first that was made");
    killed
}

/// Kills the controller and starts it again; the phase in which it was killed.
async fn kill(mesh: &mut Mesh) -> Option<PhaseName> {
    mesh.rotation.as_mut().expect("a controller").kill();
    let phase = phase(&mesh.trust_domain().await.0);
    mesh.rotation.as_mut().expect("a controller").restart();
    phase
}

const PHASES: [PhaseName; 7] = [
    PhaseName::Generating,
    PhaseName::Staged,
    PhaseName::Preparing,
    PhaseName::Canary,
    PhaseName::Activated,
    PhaseName::Draining,
    PhaseName::Withdrawn,
];

const ROTATIONS_MAX: usize = 3;
