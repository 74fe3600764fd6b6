//! Promise: a trust anchor rotates under load with no restart and no failed request.

use std::time::Duration;

use steadfast_rotation_protocol::trust_domain::{AnchorState, Outcome, Request};
use steadfast_test_rig::app::App;
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::process::free_addr;
use steadfast_test_rig::{Load, Mesh, MeshConfig, PodSpec, until};

#[tokio::test(flavor = "multi_thread")]
async fn an_anchor_rotates_under_load_without_a_restart_or_a_failed_request() {
    let mesh = Mesh::start(MeshConfig::rotating()).await;
    let app = App::http(free_addr()).await.unwrap();
    let port = app.addr.port();
    let server = mesh.pod(PodSpec::new("api", &[port]).policy("all-authenticated"));
    let client = mesh.pod(PodSpec::new("web", &[]));
    server.ready().await;
    client.ready().await;
    let pids = [server.proxy.pid(), client.proxy.pid(), mesh.identity.pid(), mesh.control.pid()];
    let before = mesh.trust_domain().await.0;
    let id = |state| before.in_state(state).map(|anchor| anchor.id).next().unwrap();
    let (old, standby) = (id(AnchorState::Active), id(AnchorState::Standby));

    let load = |http2| Load {
        to: client.outbound,
        authority: server.spec.authority(port),
        http2,
        connections: 4,
        rate: 40,
        duration_ms: LOAD.as_millis() as u64,
    };
    let rotation = async {
        let order = |state: &mut steadfast_rotation_protocol::TrustDomainState| {
            let (by, at) = ("a test".to_owned(), state.activated_at);
            state.request(Request { by, at, anchor: None, canary: None, replaces: None }).unwrap();
        };
        mesh.change_trust(order).await;
        until("the rotation is over", LOAD, || async {
            let (_, page) = get(mesh.rotation_admin, "/rotation.json").await?;
            let state = mesh.trust_domain().await.0;
            state.past.last().cloned().ok_or(page)
        })
        .await
    };
    let (http1, http2, past) = tokio::join!(load(false).run(), load(true).run(), rotation);

    for report in [&http1, &http2] {
        assert_eq!(report.failed, 0, "{report:#?}");
        assert!(report.requests > 1000, "{report:#?}");
    }
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
    let now = [server.proxy.pid(), client.proxy.pid(), mesh.identity.pid(), mesh.control.pid()];
    assert_eq!(now, pids);
}

/// Four fences, and the rounds between them.
const LOAD: Duration = Duration::from_secs(60);
