//! Promise: the same with nothing configured in the application: traffic is redirected to the
//! sidecars by the rules of a pod, and no request fails while SVIDs renew themselves.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use steadfast_test_rig::netns::{Network, inside, redirect};
use steadfast_test_rig::process::{Process, Spec, binary_path};
use steadfast_test_rig::{Load, Mesh, MeshConfig, PodSpec, Report, until};

const SVID_TTL: Duration = Duration::from_secs(6);
const LOAD: Duration = Duration::from_secs(60);
const CONTROL_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 1);
const WEB_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 2);
const API_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 3);
const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const PORT: u16 = 8080;
const APP_UID: u32 = 65_534;

#[tokio::test(flavor = "multi_thread")]
async fn redirected_traffic_is_mutual_tls_and_renewals_fail_no_request() {
    let mut network = Network::new("net", CONTROL_IP);
    let web_ns = network.join("web", WEB_IP, CONTROL_IP);
    let api_ns = network.join("api", API_IP, CONTROL_IP);
    let mesh = Mesh::start(MeshConfig {
        svid_ttl: SVID_TTL,
        ip: CONTROL_IP,
        netns: Some(network.name().to_owned()),
    })
    .await;
    // The sidecars run as root here, the applications do not: the rules tell them apart.
    redirect(&web_ns, 0);
    redirect(&api_ns, 0);
    let tool = shared_binary(&mesh.logs());
    let app = Spec {
        netns: Some(api_ns.clone()),
        uid: Some(APP_UID),
        ..Spec::ours("app", "steadfast-test-app")
    };
    let app = Spec { command: vec![tool.display().to_string()], ..app };
    let _app = Process::start(&mesh.logs(), app.args(["http", &format!("{API_IP}:{PORT}")]));
    let api = mesh.pod(PodSpec {
        ip: API_IP,
        netns: Some(api_ns.clone()),
        cluster_ip: Some(CLUSTER_IP),
        ..PodSpec::new("api", &[PORT]).policy("all-authenticated")
    });
    let web =
        mesh.pod(PodSpec { ip: WEB_IP, netns: Some(web_ns.clone()), ..PodSpec::new("web", &[]) });
    for (pod, netns) in [(&api, &api_ns), (&web, &web_ns)] {
        until(&format!("{} is ready", pod.spec.name), Duration::from_secs(60), || async {
            let answer = get(netns, &tool, pod.admin, "/ready");
            if answer.starts_with("200") { Ok(()) } else { Err(answer) }
        })
        .await;
    }
    let id = web.spec.spiffe_id();
    let before = get(&api_ns, &tool, api.admin, "/metrics");

    // By the service's address and by the pod's own: both are the mesh.
    let report = |ip: Ipv4Addr, http2| {
        let load = Load {
            to: SocketAddr::from((ip, PORT)),
            authority: api.spec.authority(PORT),
            http2,
            connections: 3,
            rate: 40,
            duration_ms: LOAD.as_millis() as u64,
        };
        let (netns, tool) = (web_ns.clone(), tool.clone());
        tokio::task::spawn_blocking(move || run_load(&netns, &tool, &load))
    };
    let (by_service, by_pod) = tokio::join!(report(CLUSTER_IP, false), report(API_IP, true));
    let (by_service, by_pod) = (by_service.unwrap(), by_pod.unwrap());

    assert_eq!(by_service.failed, 0, "{by_service:#?}");
    assert_eq!(by_pod.failed, 0, "{by_pod:#?}");
    assert!(by_service.requests > 800 && by_pod.requests > 800, "{by_service:?} {by_pod:?}");
    let after = get(&api_ns, &tool, api.admin, "/metrics");
    let seen = |text: &str| {
        let lines = text.lines().filter(|line| {
            line.starts_with("request_total{")
                && line.contains("direction=\"inbound\"")
                && line.contains("tls=\"true\"")
                && line.contains(&format!("client_id=\"{id}\""))
        });
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>()
    };
    let requests = by_service.requests + by_pod.requests;
    assert_eq!(seen(&after) - seen(&before), requests as f64, "{after}");
    let renewals = |text: &str| {
        let name = "control_identity_cert_refreshes_total{";
        let line =
            text.lines().find(|line| line.starts_with(name) && line.contains("result=\"ok\""));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or_default()
    };
    let renewed = renewals(&after) - renewals(&before);
    assert!((13.0..=18.0).contains(&renewed), "renewed {renewed} times in {LOAD:?}");
}

/// The tool where the application's user may read it.
fn shared_binary(logs: &Path) -> PathBuf {
    let dir = logs.parent().expect("the logs are in the mesh's folder");
    let open = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    let bin = dir.join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    let tool = bin.join("steadfast-test-app");
    std::fs::copy(binary_path("steadfast-test-app"), &tool).unwrap();
    [dir, &bin, &tool].into_iter().for_each(open);
    tool
}

fn get(netns: &str, tool: &Path, admin: SocketAddr, path: &str) -> String {
    inside(netns, &format!("{} get {admin} {path} 2>&1 || true", tool.display()))
}

fn run_load(netns: &str, tool: &Path, load: &Load) -> Report {
    let json = serde_json::to_string(load).unwrap();
    let output = std::process::Command::new("nsenter")
        .arg(format!("--net=/run/netns/{netns}"))
        .args(["setpriv", "--pdeathsig", "KILL", &format!("--reuid={APP_UID}"), "--clear-groups"])
        .arg(tool)
        .args(["load", &json])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?} {output:?}"))
}
