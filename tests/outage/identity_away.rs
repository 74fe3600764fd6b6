//! Promise: when identity is away for longer than SVIDs live, everything says so, and everything
//! is well again within seconds of its return, with no sidecar restarted.

use std::time::Duration;

use http::StatusCode;
use steadfast_test_rig::app::App;
use steadfast_test_rig::load::Sender;
use steadfast_test_rig::mesh::ready;
use steadfast_test_rig::process::free_addr;
use steadfast_test_rig::{Mesh, MeshConfig, Pod, PodSpec, until};

const SVID_TTL: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_whose_svids_have_all_expired_heals_when_identity_returns() {
    let mut mesh = Mesh::start(MeshConfig { svid_ttl: SVID_TTL, ..MeshConfig::default() }).await;
    let app = App::http(free_addr()).await.unwrap();
    let port = app.addr.port();
    let server = mesh.pod(PodSpec::new("api", &[port]).policy("all-authenticated"));
    let client = mesh.pod(PodSpec::new("web", &[]));
    server.ready().await;
    client.ready().await;
    let authority = server.spec.authority(port);
    assert_eq!(hello(&client, &authority).await, Ok(StatusCode::OK));
    let pids = [server.proxy.pid(), client.proxy.pid()];

    // 1. Identity is killed. Nothing changes while the SVIDs live.
    mesh.identity.kill();
    assert_eq!(hello(&client, &authority).await, Ok(StatusCode::OK));

    // 2. The SVIDs expire: /ready says so, with the reason.
    for pod in [&server, &client] {
        let reason = pod.unready(3 * SVID_TTL).await;
        assert!(reason.contains("SFT-TRU-001") && reason.contains("expired"), "{reason}");
    }

    // 3. Three lifetimes on, the sidecars refuse to talk, and the log explains why.
    let expired = tokio::time::Instant::now();
    until("three lifetimes have passed", 4 * SVID_TTL, || async {
        let passed = expired.elapsed();
        (passed > 2 * SVID_TTL).then_some(()).ok_or_else(|| format!("{passed:?}"))
    })
    .await;
    let requests = app.requests();
    assert_ne!(hello(&client, &authority).await, Ok(StatusCode::OK));
    assert_eq!(app.requests(), requests, "a request arrived without an SVID");
    client.proxy.logged(&["SFT-TRU-001"], SVID_TTL).await;

    // 4. Identity returns: the same processes are ready and carry requests again.
    mesh.identity.restart();
    ready("steadfast-identity", mesh.identity_admin).await;
    until("all is well again", RECOVERY, || async {
        match hello(&client, &authority).await {
            Ok(StatusCode::OK) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    server.ready().await;
    client.ready().await;
    assert_eq!([server.proxy.pid(), client.proxy.pid()], pids);
    for mut pod in [server, client] {
        assert!(pod.proxy.alive());
    }
}

async fn hello(client: &Pod, authority: &str) -> Result<StatusCode, String> {
    let mut sender = Sender::connect(client.outbound, false).await?;
    let request = http::Request::get("/hello").header("host", authority);
    let request = request.body(http_body_util::Full::default()).map_err(|e| e.to_string())?;
    sender.exchange(request).await.map(|(status, _)| status)
}

/// What the promise says: from identity being ready to the first request that gets through.
const RECOVERY: Duration = Duration::from_secs(5);
