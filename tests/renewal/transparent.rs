//! Promise: the same with nothing configured in the application: traffic is redirected to the
//! sidecars by the rules of a pod, and no request fails while SVIDs renew themselves. A pod's own
//! ports stay its own, and it reaches its own service.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use steadfast_test_rig::netns::{Network, inside, redirect};
use steadfast_test_rig::peer::{Leaf, TestIssuer, dns_identity};
use steadfast_test_rig::process::{Process, Spec, binary_path};
use steadfast_test_rig::{Load, Mesh, MeshConfig, Pod, PodSpec, Report, until};

const SVID_TTL: Duration = Duration::from_secs(6);
const DEADLINE: Duration = Duration::from_secs(20);
const LOAD: Duration = Duration::from_secs(60);
const CONTROL_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 1);
const WEB_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 2);
const API_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 3);
const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const PORT: u16 = 8080;
const APP_UID: u32 = 65_534;

/// Two pods on a network, with the rules of a pod, and an application in one of them.
struct Scene {
    // In the order in which they end.
    _app: Process,
    web: Member,
    api: Member,
    tool: PathBuf,
    mesh: Mesh,
    _network: Network,
}

/// A pod, and the namespace that it is in.
struct Member {
    pod: Pod,
    netns: String,
}

/// Tests that run side by side have a tag each.
async fn scene(tag: &str) -> Scene {
    let mut network = Network::new(tag, CONTROL_IP);
    let web_ns = network.join(&format!("{tag}-web"), WEB_IP, CONTROL_IP);
    let api_ns = network.join(&format!("{tag}-api"), API_IP, CONTROL_IP);
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
    let app = Process::start(&mesh.logs(), app.args(["http", &format!("{API_IP}:{PORT}")]));
    let api = PodSpec {
        ip: API_IP,
        netns: Some(api_ns.clone()),
        cluster_ip: Some(CLUSTER_IP),
        ..PodSpec::new("api", &[PORT]).policy("all-authenticated")
    };
    let web = PodSpec { ip: WEB_IP, netns: Some(web_ns.clone()), ..PodSpec::new("web", &[]) };
    let api = Member { pod: mesh.pod(api), netns: api_ns };
    let web = Member { pod: mesh.pod(web), netns: web_ns };
    for member in [&api, &web] {
        until(&format!("{} is ready", member.pod.spec.name), Duration::from_secs(60), || async {
            let answer = member.get(&tool, "/ready");
            if answer.starts_with("200") { Ok(()) } else { Err(answer) }
        })
        .await;
    }
    Scene { _app: app, web, api, tool, mesh, _network: network }
}

impl Scene {
    /// A load from `web`'s application to this address, to its end.
    async fn load(&self, ip: Ipv4Addr, http2: bool) -> Report {
        let load = Load {
            to: SocketAddr::from((ip, PORT)),
            authority: self.api.pod.spec.authority(PORT),
            http2,
            connections: 3,
            rate: 40,
            duration_ms: LOAD.as_millis() as u64,
        };
        let (netns, tool) = (self.web.netns.clone(), self.tool.clone());
        tokio::task::spawn_blocking(move || run_load(&netns, &tool, &load)).await.unwrap()
    }

    /// What becomes of a good peer in `web`'s namespace that asks `api`'s proxy for this port.
    fn ask(&self, issuer: &TestIssuer, port: u16) -> String {
        let api = &self.api.pod;
        let peer = issuer.peer(&Leaf::of("web"), api.inbound, &dns_identity("api"), port);
        let json = serde_json::to_string(&peer).unwrap();
        run(&self.web.netns, &self.tool, 0, &["connect", &json])
    }

    fn metrics(&self) -> [String; 2] {
        [&self.web, &self.api].map(|member| member.get(&self.tool, "/metrics"))
    }
}

impl Member {
    /// What the sidecar's admin port answers.
    fn get(&self, tool: &Path, path: &str) -> String {
        let (tool, admin) = (tool.display(), self.pod.admin);
        inside(&self.netns, &format!("{tool} get {admin} {path} 2>&1 || true"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirected_traffic_is_mutual_tls_and_renewals_fail_no_request() {
    let scene = scene("load").await;
    let before = scene.metrics();

    // By the service's address and by the pod's own: both are the mesh.
    let (by_service, by_pod) =
        tokio::join!(scene.load(CLUSTER_IP, false), scene.load(API_IP, true));

    assert_eq!(by_service.failed, 0, "{by_service:#?}");
    assert_eq!(by_pod.failed, 0, "{by_pod:#?}");
    assert!(by_service.requests > 800 && by_pod.requests > 800, "{by_service:?} {by_pod:?}");
    let after = scene.metrics();
    let id = scene.web.pod.spec.spiffe_id();
    let client_id = format!("client_id=\"{id}\"");
    let labels = ["direction=\"inbound\"", "tls=\"true\"", &client_id];
    let seen = |scrape: &[String; 2]| sum(&scrape[1], "request_total{", &labels);
    let requests = (by_service.requests + by_pod.requests) as f64;
    assert_eq!(seen(&after) - seen(&before), requests, "{}", after[1]);
    for (before, after) in before.iter().zip(&after) {
        let name = "control_identity_cert_refreshes_total{";
        let renewals = |text: &str| sum(text, name, &["result=\"ok\""]);
        let renewed = renewals(after) - renewals(before);
        assert!((13.0..=18.0).contains(&renewed), "renewed {renewed} times in {LOAD:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_opens_neither_the_admin_port_nor_the_loopback_of_a_pod() {
    let scene = scene("header").await;
    // One application that the pod keeps to itself, and one that it does not.
    let apps = [("private", "127.0.0.1:9000".to_owned()), ("open", format!("{API_IP}:9001"))];
    let apps = apps.map(|(name, addr)| {
        let spec = Spec {
            name: name.to_owned(),
            command: vec![scene.tool.display().to_string()],
            netns: Some(scene.api.netns.clone()),
            uid: Some(APP_UID),
            ..Spec::default()
        };
        Process::start(&scene.mesh.logs(), spec.args(["tcp", &addr]))
    });
    for app in &apps {
        app.logged(&["listening"], DEADLINE).await;
    }
    let issuer = TestIssuer::of_mesh(scene.mesh.dir(), &scene.mesh.issuer_der().await);
    assert_eq!(scene.ask(&issuer, 9001), "through: ping");
    let answer = scene.ask(&issuer, 9000);
    assert!(answer.starts_with("refused"), "{answer}");
    scene.api.pod.proxy.logged(&["SFT-NET-006", "10.250.0.3:9000"], DEADLINE).await;
    let answer = scene.ask(&issuer, scene.api.pod.admin.port());
    assert!(answer.starts_with("refused"), "{answer}");
    scene.api.pod.proxy.logged(&["SFT-NET-003", "loop_refused"], DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_reaches_itself_through_its_own_service() {
    let scene = scene("self").await;
    let service = SocketAddr::from((CLUSTER_IP, PORT)).to_string();
    let answer = run(&scene.api.netns, &scene.tool, APP_UID, &["get", &service, "/hello"]);
    assert_eq!(answer, "200\nhello");
    let id = scene.api.pod.spec.spiffe_id();
    let [_, metrics] = scene.metrics();
    let client_id = format!("client_id=\"{id}\"");
    assert_eq!(sum(&metrics, "request_total{", &["direction=\"inbound\"", &client_id]), 1.0);
}

/// The sum of the samples of a scrape that begin so and have these labels.
fn sum(text: &str, name: &str, labels: &[&str]) -> f64 {
    let lines = text
        .lines()
        .filter(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
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

fn run_load(netns: &str, tool: &Path, load: &Load) -> Report {
    let json = serde_json::to_string(load).unwrap();
    let text = run(netns, tool, APP_UID, &["load", &json]);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"))
}

/// What the tool prints in this namespace and as this user.
fn run(netns: &str, tool: &Path, uid: u32, args: &[&str]) -> String {
    let output = std::process::Command::new("nsenter")
        .arg(format!("--net=/run/netns/{netns}"))
        .args(["setpriv", "--pdeathsig", "KILL", &format!("--reuid={uid}"), "--clear-groups"])
        .arg(tool)
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}
