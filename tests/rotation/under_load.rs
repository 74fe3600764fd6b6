//! Promise: a trust anchor rotates under load with no restart and no failed request.

use std::time::Duration;

use steadfast_rotation_protocol::trust_domain::{AnchorState, Outcome};
use steadfast_test_rig::{MeshConfig, until};

use crate::commands::steadfast;
use crate::support::{Field, over, rotate, without_a_failed_request};

#[tokio::test(flavor = "multi_thread")]
async fn an_anchor_rotates_under_load_without_a_restart_or_a_failed_request() {
    let field = Field::start(MeshConfig::rotating()).await;
    let Field { mesh, api: server, web: client, .. } = &field;
    let pids = [server.proxy.pid(), client.proxy.pid(), mesh.identity.pid(), mesh.control.pid()];
    let before = mesh.trust_domain().await.0;
    let id = |state| before.in_state(state).map(|anchor| anchor.id).next().unwrap();
    let (old, standby) = (id(AnchorState::Active), id(AnchorState::Standby));

    let rotation = async {
        rotate(mesh).await;
        over(mesh, 1).await.1
    };
    let past = without_a_failed_request(field.load(), rotation).await;
    assert_eq!(past.outcome, Outcome::Done);
    let after = mesh.trust_domain().await.0;
    let active = after.active_anchor().map(|anchor| anchor.id);
    assert_eq!((active, after.published().count()), (Some(standby), 2));
    assert_eq!(after.tombstones, [old]);
    let key = mesh.dir().join(format!("keys/anchors/{old}.key"));
    until("the old anchor's key is destroyed", Duration::from_secs(5), || async {
        if key.exists() { Err(key.display().to_string()) } else { Ok(()) }
    })
    .await;
    // What it relied on is kept: who was asked in each phase, as they said it.
    let told = steadfast(mesh, &["trust", "history", "1", "-o", "json"]).await.json();
    for (phase, at) in [("staged", 1), ("draining", 4), ("withdrawn", 5)] {
        let evidence = &told["evidence"][at]["verified"];
        assert_eq!(evidence["head"]["phase"], phase, "{told:#}");
        let names: Vec<_> = evidence["witnesses"].as_array().into_iter().flatten().collect();
        let named = |name: &str| names.iter().any(|witness| witness["name"] == name);
        assert!(named("demo/web-0") && named("demo/api-0"), "{told:#}");
    }
    let shown = steadfast(mesh, &["trust", "history", "1"]).await;
    assert!(shown.text().contains("uses seq 2"), "{}", shown.text());
    let now = [server.proxy.pid(), client.proxy.pid(), mesh.identity.pid(), mesh.control.pid()];
    assert_eq!(now, pids);
}
