//! Promise: when identity is away for longer than SVIDs live, everything says so, and everything
//! is well again within seconds of its return, with no sidecar restarted.

use std::time::Duration;

use http::StatusCode;
use steadfast_test_rig::app::App;
use steadfast_test_rig::load::Sender;
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::peer::{Leaf, TestIssuer, dns_identity};
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

    let issuer = TestIssuer::of_mesh(mesh.dir(), &mesh.issuer_der().await);
    let peer = issuer.peer(&Leaf::of("web"), server.inbound, &dns_identity("api"), port);

    // 1. Identity is killed. Nothing changes while the SVIDs live.
    mesh.identity.kill();
    let killed = tokio::time::Instant::now();
    assert_eq!(hello(&client, &authority).await, Ok(StatusCode::OK));

    // 2. The SVIDs expire: /ready says so, with the reason.
    for pod in [&server, &client] {
        let reason = pod.unready(3 * SVID_TTL).await;
        assert!(reason.contains("SFT-TRU-001") && reason.contains("expired"), "{reason}");
    }

    // 3. Three lifetimes on, each sidecar refuses to talk, and the line that says so explains why.
    until("three lifetimes have passed", 4 * SVID_TTL, || async {
        let passed = killed.elapsed();
        (passed > 3 * SVID_TTL).then_some(()).ok_or_else(|| format!("{passed:?}"))
    })
    .await;
    let requests = app.requests();
    assert_ne!(hello(&client, &authority).await, Ok(StatusCode::OK));
    let expected = format!("expected={}", server.spec.spiffe_id());
    refuses(&client, "outbound", &expected).await;
    // Whoever comes with an SVID that is good finds the server's own one expired.
    let peer = peer.start("connect", &mesh);
    peer.logged(&["refused"], SVID_TTL).await;
    refuses(&server, "inbound", "expected=any").await;
    assert_eq!(app.requests(), requests, "a request arrived without an SVID");

    // 4. Identity returns: the same processes are ready and carry requests again.
    mesh.identity.restart();
    until("all is well again", RECOVERY, || async {
        for pod in [&server, &client] {
            let (status, reason) = get(pod.admin, "/ready").await?;
            if status != StatusCode::OK {
                return Err(format!("{} is not ready: {reason}", pod.spec.name));
            }
        }
        match hello(&client, &authority).await {
            Ok(StatusCode::OK) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!([server.proxy.pid(), client.proxy.pid()], pids);
    for mut pod in [server, client] {
        assert!(pod.proxy.alive());
    }
}

/// Checks the line and the counter of a handshake that was refused for our own expired SVID.
async fn refuses(pod: &Pod, direction: &str, expected: &str) {
    let facts = ["SFT-TRU-001", &format!("direction={direction}"), expected, "now="];
    pod.proxy.logged(&facts, SVID_TTL).await;
    let labels = [("direction", direction), ("reason", "svid_expired")];
    let counted = pod.metrics().await.sum("steadfast_handshake_refusals_total", &labels);
    assert!(counted >= 1.0, "{direction}: {counted}");
}

async fn hello(client: &Pod, authority: &str) -> Result<StatusCode, String> {
    let mut sender = Sender::connect(client.outbound, false).await?;
    let request = http::Request::get("/hello").header("host", authority);
    let request = request.body(http_body_util::Full::default()).map_err(|e| e.to_string())?;
    sender.exchange(request).await.map(|(status, _)| status)
}

/// What the promise says: from the start of identity until all is as it was.
const RECOVERY: Duration = Duration::from_secs(5);
