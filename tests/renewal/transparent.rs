//! Promise: the same with nothing configured in the application: traffic is redirected to the
//! sidecars by the rules of a pod, and no request fails while SVIDs renew themselves. A pod's own
//! ports stay its own, and it reaches its own service.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use steadfast_test_rig::netns::{Network, inside};
use steadfast_test_rig::peer::{Leaf, TestIssuer, dns_identity};
use steadfast_test_rig::process::binary_path;
use steadfast_test_rig::redirected::{API_IP, CLUSTER_IP, Redirected};
use steadfast_test_rig::{Load, Report};

const SVID_TTL: Duration = Duration::from_secs(6);
const DEADLINE: Duration = Duration::from_secs(20);
const LOAD: Duration = Duration::from_secs(60);
const PORT: u16 = 8080;

/// Two workloads, one of which serves HTTP.
async fn pair(tag: &str) -> Redirected {
    let mut pair = Redirected::start(tag, SVID_TTL, &[PORT], &[]).await;
    pair.app("http", API_IP, PORT).await;
    pair
}

/// A load from `web`'s application to this address, to its end.
async fn load(pair: &Redirected, ip: Ipv4Addr, http2: bool) -> Report {
    let load = Load {
        to: SocketAddr::from((ip, PORT)),
        authority: pair.api.spec.authority(PORT),
        http2,
        connections: 3,
        rate: 40,
        duration_ms: LOAD.as_millis() as u64,
    };
    let (web, load) = (pair.application(&pair.web), serde_json::to_string(&load).unwrap());
    let run = tokio::task::spawn_blocking(move || web.run(&["load", &load]));
    let text = run.await.unwrap();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn redirected_traffic_is_mutual_tls_and_renewals_fail_no_request() {
    let pair = pair("load").await;
    let metrics = || [&pair.web, &pair.api].map(|pod| pair.metrics(pod));
    let before = metrics();

    // By the service's address and by the pod's own: both are the mesh.
    let (by_service, by_pod) =
        tokio::join!(load(&pair, CLUSTER_IP, false), load(&pair, API_IP, true));

    assert_eq!(by_service.failed, 0, "{by_service:#?}");
    assert_eq!(by_pod.failed, 0, "{by_pod:#?}");
    assert!(by_service.requests > 800 && by_pod.requests > 800, "{by_service:?} {by_pod:?}");
    let after = metrics();
    let id = pair.web.spec.spiffe_id();
    let labels = [("direction", "inbound"), ("tls", "true"), ("client_id", id.as_str())];
    let seen = after[1].sum("request_total", &labels) - before[1].sum("request_total", &labels);
    assert_eq!(seen, (by_service.requests + by_pod.requests) as f64, "{:#?}", after[1]);
    for (before, after) in before.iter().zip(&after) {
        let name = "control_identity_cert_refreshes_total";
        let renewed = after.sum(name, &[("result", "ok")]) - before.sum(name, &[("result", "ok")]);
        assert!((13.0..=18.0).contains(&renewed), "renewed {renewed} times in {LOAD:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_opens_neither_the_admin_port_nor_the_loopback_of_a_pod() {
    let mut pair = pair("header").await;
    // One application that the pod keeps to itself, and one that it does not.
    pair.app("tcp", Ipv4Addr::LOCALHOST, 9000).await;
    pair.app("tcp", API_IP, 9001).await;
    let issuer = TestIssuer::of_mesh(pair.mesh.dir(), &pair.mesh.issuer_der().await);
    // What becomes of a good peer that asks api's proxy for a port.
    let web = pair.beside_the_sidecar(&pair.web);
    let ask = |port| {
        let peer = issuer.peer(&Leaf::of("web"), pair.api.inbound, &dns_identity("api"), port);
        web.run(&["connect", &serde_json::to_string(&peer).unwrap()])
    };
    assert_eq!(ask(9001), "through: ping");
    let answer = ask(9000);
    assert!(answer.starts_with("refused"), "{answer}");
    pair.api.proxy.logged(&["SFT-NET-006", "10.250.0.3:9000"], DEADLINE).await;
    let answer = ask(pair.api.admin.port());
    assert!(answer.starts_with("refused"), "{answer}");
    pair.api.proxy.logged(&["SFT-NET-003", "loop_refused"], DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_reaches_itself_through_its_own_service() {
    let pair = pair("self").await;
    let service = SocketAddr::from((CLUSTER_IP, PORT)).to_string();
    let answer = pair.application(&pair.api).run(&["get", &service, "/hello"]);
    assert_eq!(answer, "200\nhello");
    let id = pair.api.spec.spiffe_id();
    let seen = [("direction", "inbound"), ("client_id", id.as_str())];
    assert_eq!(pair.metrics(&pair.api).sum("request_total", &seen), 1.0);
}

#[test]
fn the_rules_of_a_pod_are_written_by_either_program_again_and_again_and_taken_back() {
    let network = Network::new("rules", Ipv4Addr::new(10, 99, 9, 1));
    let init = binary_path("steadfast-init").display().to_string();
    let count = |what: &str| -> usize {
        let script = format!("{what} | grep -ci steadfast || true");
        inside(network.name(), &script).trim().parse().expect("a number")
    };
    let rules = || (count("nft list ruleset"), count("iptables-legacy-save -t nat"));
    let skip =
        "--skip-inbound-ports=22,4190-4191 --skip-outbound-ports=3306 --skip-subnets=10.0.0.0/8";
    for backend in ["nftables", "iptables"] {
        inside(network.name(), &format!("{init} --backend={backend} {skip}"));
        let once = rules();
        assert!(once.0 + once.1 > 0, "{backend}: {once:?}");
        inside(network.name(), &format!("{init} --backend={backend} {skip}"));
        assert_eq!(rules(), once, "{backend}");
        inside(network.name(), &format!("{init} --undo"));
        assert_eq!(rules(), (0, 0), "{backend}");
        inside(network.name(), &format!("{init} --undo"));
    }
    // Where the kernel has nftables, nothing else is asked.
    let said = inside(network.name(), &format!("{init} 2>&1"));
    assert!(!said.contains("trying iptables"), "{said}");
}
