//! Promise: a sidecar that does not answer holds a rotation up and is named; exempted, it is waited
//! for no longer, and when it runs again it comes back alone.

use steadfast_api::UnixTime;
use steadfast_rotation_protocol::Instance;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{AnchorState, Outcome};
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::{MeshConfig, PodSpec, until};

use crate::support::{
    DEADLINE, Field, assert_outcome, in_phase, in_state, now, over, page, phase, rotate,
    without_a_failed_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_sidecar_is_named_and_waited_for_unless_exempt_and_comes_back_alone() {
    let field = Field::start(MeshConfig::rotating()).await;
    let mesh = &field.mesh;
    let mut sleeper = mesh.pod(PodSpec::new("sleeper", &[]));
    sleeper.ready().await;
    let (pid, next) =
        (sleeper.proxy.pid(), in_state(&mesh.trust_domain().await.0, AnchorState::Standby).id);
    let (state, past) = without_a_failed_request(field.load(), async {
        // 1. It falls asleep in the middle: nobody else is named, and the phase is not left.
        rotate(mesh).await;
        in_phase(mesh, PhaseName::Staged).await;
        sleeper.proxy.freeze();
        let instance = until("the sleeper alone is named", DEADLINE, || missing_alone(mesh)).await;
        assert_eq!(phase(&mesh.trust_domain().await.0), Some(PhaseName::Staged));
        // 2. Exempted by name, it holds nothing up any more.
        let order = ["demo/sleeper-0", "its node is gone", "a test"].map(str::to_owned);
        mesh.order(|state| {
            let [name, reason, by] = order.clone();
            state.exempt(instance.clone(), name, reason, by, now());
        })
        .await;
        over(mesh, 1).await
    })
    .await;
    assert_outcome(&past, Outcome::Done);
    assert_eq!(state.exemptions.len(), 1, "{:?}", state.exemptions);
    assert!(state.exemptions[0].relied_on, "{:?}", state.exemptions);
    // 3. It wakes up behind a whole rotation, and needs nobody.
    sleeper.proxy.thaw();
    let what = "its exemption is gone";
    let state = mesh.state_where(what, DEADLINE, |state| state.exemptions.is_empty()).await;
    let (_, text) = get(sleeper.admin, "/identity.json").await.expect("it answers");
    let identity: serde_json::Value = serde_json::from_str(&text).expect("its identity");
    assert_eq!(identity["anchor"], next.to_string(), "{text}");
    assert_eq!(identity["bundle_seq"], state.seq, "{text}");
    assert!(sleeper.proxy.alive() && sleeper.proxy.pid() == pid);
    sleeper.ready().await;
}

/// The instance that the census misses, if it is the sleeper and nobody else.
async fn missing_alone(mesh: &steadfast_test_rig::Mesh) -> Result<Instance, String> {
    let page = page(mesh).await?;
    let missing = page["waiting"]["census"]["missing"].as_array().cloned().unwrap_or_default();
    let [one] = missing.as_slice() else { return Err(page["waiting"].to_string()) };
    if one["name"] != "demo/sleeper-0" {
        return Err(one.to_string());
    }
    let instance = serde_json::from_value::<Instance>(one["instance"].clone());
    let instance = instance.map_err(|error| error.to_string())?;
    (instance.started_at > UnixTime::default()).then_some(instance).ok_or_else(|| one.to_string())
}
