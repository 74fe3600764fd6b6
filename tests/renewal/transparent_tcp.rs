//! Promise: what is redirected and is no HTTP goes through two sidecars as it is, by mutual TLS:
//! found out by looking, declared opaque, or with a server that speaks first.

use std::time::Duration;

use steadfast_test_rig::redirected::{API_IP, CLUSTER_IP, Redirected};

const SVID_TTL: Duration = Duration::from_secs(24 * 3600);
/// Neither declared opaque nor known to be: the sidecars find out.
const DETECTED: u16 = 7070;
const OPAQUE: u16 = 7071;
const SERVER_FIRST: u16 = 7072;
const BYTES: &str = "1048576";

#[tokio::test(flavor = "multi_thread")]
async fn redirected_tcp_goes_both_ways_half_closes_and_hears_a_server_that_speaks_first() {
    let ports = [DETECTED, OPAQUE, SERVER_FIRST];
    let mut pair = Redirected::start("tcp", SVID_TTL, &ports, &[OPAQUE]).await;
    pair.app("tcp", API_IP, DETECTED).await;
    pair.app("tcp", API_IP, OPAQUE).await;
    pair.app("server-first", API_IP, SERVER_FIRST).await;

    let web = pair.application(&pair.web);
    // By the service's address and by the pod's own: both are the mesh.
    for ip in [CLUSTER_IP, API_IP] {
        for port in [DETECTED, OPAQUE] {
            // The client closes its half; the other goes on until the application has said its
            // last word.
            let said = web.run(&["talk", &format!("{ip}:{port}"), "0", BYTES]);
            assert_eq!(said, format!("{BYTES} bytes back, then \"total {BYTES}\\n\""));
        }
        // The client says nothing before it has read the greeting.
        let greeting = "220 ready\r\n".len().to_string();
        let said = web.run(&["talk", &format!("{ip}:{SERVER_FIRST}"), &greeting, "6"]);
        assert_eq!(said, "\"220 ready\\r\\n\", 6 bytes back, then \"\"");
    }

    let (metrics, id) = (pair.metrics(&pair.api), pair.web.spec.spiffe_id());
    for port in ports.map(|port| port.to_string()) {
        let seen = [("direction", "inbound"), ("target_port", &port), ("client_id", &id)];
        assert_eq!(metrics.sum("tcp_open_total", &seen), 2.0, "{port}: {metrics:#?}");
    }
}
