//! Promise: no request fails while SVIDs renew themselves.
//!
//! Sixty seconds of load over two sidecars with SVIDs of six seconds; the generator counts every
//! failure and repeats nothing.

use std::time::Duration;

use steadfast_test_rig::app::App;
use steadfast_test_rig::process::free_addr;
use steadfast_test_rig::{Load, Mesh, MeshConfig, Pod, PodSpec};

const SVID_TTL: Duration = Duration::from_secs(6);
const LOAD: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn sixty_seconds_of_load_over_six_second_svids_fail_no_request() {
    let mesh = Mesh::start(MeshConfig { svid_ttl: SVID_TTL, ..MeshConfig::default() }).await;
    let app = App::http(free_addr()).await.unwrap();
    let port = app.addr.port();
    let server = mesh.pod(PodSpec::new("api", &[port]).policy("all-authenticated"));
    let client = mesh.pod(PodSpec::new("web", &[]));
    server.ready().await;
    client.ready().await;
    let before = [renewals(&server).await, renewals(&client).await];

    let load = |http2| Load {
        to: client.outbound,
        authority: server.spec.authority(port),
        http2,
        connections: 4,
        rate: 60,
        duration_ms: LOAD.as_millis() as u64,
    };
    let (http1, http2) = tokio::join!(load(false).run(), load(true).run());

    for report in [&http1, &http2] {
        assert_eq!(report.failed, 0, "{report:#?}");
        assert!(report.requests > 1000, "{report:#?}");
    }
    for (pod, before) in [&server, &client].into_iter().zip(before) {
        // Each renewal falls at 60 to 70 % of six seconds: 3.6 to 4.2 s after the last, and the
        // round trip is short. In a minute that is 14 to 17, one more or less at the ends.
        let renewed = renewals(pod).await - before;
        assert!((13.0..=18.0).contains(&renewed), "{} renewed {renewed} times", pod.spec.name);
    }
    // Every request arrived under the exact identity of its sender.
    let metrics = server.metrics().await;
    let id = client.spec.spiffe_id();
    let seen = metrics
        .sum("request_total", &[("direction", "inbound"), ("tls", "true"), ("client_id", &id)]);
    assert_eq!(seen, (http1.requests + http2.requests) as f64);
    assert_eq!(metrics.sum("request_total", &[("direction", "inbound")]), seen);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_tcp_connection_outlives_the_svid_it_began_with() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let mesh = Mesh::start(MeshConfig { svid_ttl: SVID_TTL, ..MeshConfig::default() }).await;
    let app = App::tcp(free_addr()).await.unwrap();
    let port = app.addr.port();
    let mut spec = PodSpec::new("db", &[port]).policy("all-authenticated");
    spec.opaque_ports = vec![port];
    let server = mesh.pod(spec);
    let entrance = free_addr();
    let mut spec = PodSpec::new("web", &[]);
    spec.listen_map = vec![(entrance, server.spec.authority(port))];
    let client = mesh.pod(spec);
    server.ready().await;
    client.ready().await;

    let mut stream = tokio::net::TcpStream::connect(entrance).await.unwrap();
    let mut echo = [0; 4];
    stream.write_all(b"one.").await.unwrap();
    stream.read_exact(&mut echo).await.unwrap();
    // Three renewals of both are more than the life of the SVIDs the connection began with.
    for pod in [&server, &client] {
        let start = renewals(pod).await;
        steadfast_test_rig::until("three renewals", 5 * SVID_TTL, || async {
            let now = renewals(pod).await;
            (now >= start + 3.0).then_some(()).ok_or_else(|| format!("{now} after {start}"))
        })
        .await;
    }
    stream.write_all(b"two.").await.unwrap();
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"two.");
}

async fn renewals(pod: &Pod) -> f64 {
    let metrics = pod.metrics().await;
    metrics.sum("control_identity_cert_refreshes_total", &[("result", "ok")])
}
