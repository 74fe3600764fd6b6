//! Promise: of several controllers one decides, and another goes on where it stopped, whether it is
//! gone or comes back and has not noticed; and what was decided can be decided again from their log.

use std::process::Command;

use serde_json::Value;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{AnchorState, Outcome};
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::process::binary_path;
use steadfast_test_rig::{MeshConfig, until};

use crate::support::{
    DEADLINE, Field, assert_idle, assert_outcome, in_phase, in_state, over, rotate,
    without_a_failed_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_second_controller_goes_on_where_the_first_was_frozen_and_follows_when_that_is_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("rotation.jsonl").display().to_string();
    let rotation_args = vec!["--event-log".to_owned(), log.clone()];
    let field = Field::start(MeshConfig { rotation_args, ..MeshConfig::rotating() }).await;
    let mesh = &field.mesh;
    let first = mesh.rotation.as_ref().expect("a controller");
    let standby = in_state(&mesh.trust_domain().await.0, AnchorState::Standby).id;
    let state = without_a_failed_request(field.load(), async {
        // 1. The first leads, and the second knows it.
        leads(mesh.rotation_admin, true).await;
        let (second, second_admin) = mesh.another_controller();
        leads(second_admin, false).await;
        until("every proxy has told its version", DEADLINE, || async {
            let (_, text) = get(mesh.rotation_admin, "/round.json").await?;
            let told = text.matches(concat!("\"version\": \"", env!("CARGO_PKG_VERSION"))).count();
            // Both sidecars, control and either controller, a start each of one pod.
            if told == 5 { Ok(()) } else { Err(text) }
        })
        .await;
        rotate(mesh).await;
        in_phase(mesh, PhaseName::Staged).await;
        // 2. It stops in the middle, and the second ends what it began.
        first.freeze();
        let (state, past) = over(mesh, 1).await;
        assert_outcome(&past, Outcome::Done);
        assert_eq!(in_state(&state, AnchorState::Active).id, standby);
        // 3. It goes on, and neither undoes nor doubles anything.
        first.thaw();
        leads(mesh.rotation_admin, false).await;
        leads(second_admin, true).await;
        rotate(mesh).await;
        let (_, past) = over(mesh, 2).await;
        assert_outcome(&past, Outcome::Done);
        // 4. The second goes in good order, and the first leads again.
        second.ask_to_stop();
        leads(mesh.rotation_admin, true).await;
        mesh.trust_domain().await.0
    })
    .await;
    assert_idle(mesh, &state).await;
    // 5. All of it is in the log, and would be decided again.
    let replay = Command::new(binary_path("steadfast")).args(["trust", "replay", &log]).output();
    let replay = replay.expect("steadfast runs");
    let told = String::from_utf8_lossy(&replay.stdout);
    assert!(replay.status.success(), "{told}{}", String::from_utf8_lossy(&replay.stderr));
    for phase in ["generating", "staged", "preparing", "activated", "draining", "withdrawn"] {
        assert_eq!(told.matches(&format!("{phase} is left")).count(), 2, "{told}");
    }
}

async fn leads(admin: std::net::SocketAddr, expected: bool) {
    until(&format!("{admin} leads: {expected}"), DEADLINE, || async {
        let (_, text) = get(admin, "/rotation.json").await?;
        let page: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let said = page["leads"] == expected && (expected || page["leader"].is_string());
        said.then_some(()).ok_or_else(|| page["leader"].to_string())
    })
    .await;
}
