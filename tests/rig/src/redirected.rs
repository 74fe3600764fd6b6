//! Two workloads in namespaces of their own, with nothing configured in their applications: the
//! rules of a pod redirect their traffic to their sidecars.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::mesh::READY_DEADLINE;
use crate::netns::{Network, inside, redirect};
use crate::process::{Process, Spec, binary_path};
use crate::{Mesh, MeshConfig, Pod, PodSpec, until};

/// `web`, which calls, and `api`, which serves.
#[derive(Debug)]
pub struct Redirected {
    // In the order in which they end: the namespaces go last.
    apps: Vec<Process>,
    /// The workload that calls.
    pub web: Pod,
    /// The workload that serves.
    pub api: Pod,
    mesh: Mesh,
    /// The test's program, where the applications' user may read it.
    tool: PathBuf,
    web_ns: String,
    api_ns: String,
    _network: Network,
}

impl Redirected {
    /// Starts both, and waits until they are ready; `opaque_ports` are some of the `ports` of api.
    pub async fn start(svid_ttl: Duration, ports: &[u16], opaque_ports: &[u16]) -> Self {
        let mut network = Network::new("net", CONTROL_IP);
        let web_ns = network.join("web", WEB_IP, CONTROL_IP);
        let api_ns = network.join("api", API_IP, CONTROL_IP);
        let netns = Some(network.name().to_owned());
        let mesh = Mesh::start(MeshConfig { svid_ttl, ip: CONTROL_IP, netns }).await;
        // The sidecars run as root here, the applications do not: the rules tell them apart.
        redirect(&web_ns, 0);
        redirect(&api_ns, 0);
        let tool = shared_binary(&mesh.logs());
        let api = mesh.pod(PodSpec {
            ip: API_IP,
            netns: Some(api_ns.clone()),
            cluster_ip: Some(CLUSTER_IP),
            opaque_ports: opaque_ports.to_vec(),
            ..PodSpec::new("api", ports).policy("all-authenticated")
        });
        let web = mesh.pod(PodSpec {
            ip: WEB_IP,
            netns: Some(web_ns.clone()),
            ..PodSpec::new("web", &[])
        });
        let apps = Vec::new();
        let pair = Self { apps, web, api, mesh, tool, web_ns, api_ns, _network: network };
        for (pod, netns) in [(&pair.api, &pair.api_ns), (&pair.web, &pair.web_ns)] {
            until(&format!("{} is ready", pod.spec.name), READY_DEADLINE, || async {
                let answer = pair.get(netns, pod.admin, "/ready");
                if answer.starts_with("200") { Ok(()) } else { Err(answer) }
            })
            .await;
        }
        pair
    }

    /// Starts an application of api's, by what the test's program calls it.
    pub async fn app(&mut self, kind: &str, port: u16) {
        let spec = Spec {
            netns: Some(self.api_ns.clone()),
            uid: Some(APP_UID),
            command: vec![self.tool.display().to_string()],
            ..Spec::ours(&format!("app-{kind}-{port}"), "steadfast-test-app")
        };
        let app = spec.args([kind, &format!("0.0.0.0:{port}")]);
        let app = Process::start(&self.mesh.logs(), app);
        app.logged(&["listening"], READY_DEADLINE).await;
        self.apps.push(app);
    }

    /// What the test's program prints when web's application runs it.
    pub fn in_web(&self, args: &[&str]) -> String {
        let output = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.web_ns))
            .args(["setpriv", "--pdeathsig", "KILL", &format!("--reuid={APP_UID}")])
            .arg("--clear-groups")
            .arg(&self.tool)
            .args(args)
            .output()
            .expect("nsenter runs");
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The metrics of api's sidecar.
    pub fn metrics(&self) -> String {
        self.get(&self.api_ns, self.api.admin, "/metrics")
    }

    fn get(&self, netns: &str, admin: SocketAddr, path: &str) -> String {
        inside(netns, &format!("{} get {admin} {path} 2>&1 || true", self.tool.display()))
    }
}

/// The tool where the application's user may read it.
fn shared_binary(logs: &Path) -> PathBuf {
    let dir = logs.parent().expect("the logs are in the mesh's folder");
    let open = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
    };
    let bin = dir.join("bin");
    std::fs::create_dir_all(&bin).expect("the folder");
    let tool = bin.join("steadfast-test-app");
    std::fs::copy(binary_path("steadfast-test-app"), &tool).expect("it can be copied");
    [dir, &bin, &tool].into_iter().for_each(open);
    tool
}

/// The address of the control plane.
pub const CONTROL_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 1);
/// The address of web.
pub const WEB_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 2);
/// The address of api.
pub const API_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 3);
/// The address of api's Service.
pub const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const APP_UID: u32 = 65_534;
