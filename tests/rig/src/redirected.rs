//! Two workloads in namespaces of their own, with nothing configured in their applications: the
//! rules of a pod redirect their traffic to their sidecars.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::mesh::READY_DEADLINE;
use crate::metrics::Metrics;
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
    /// What both are in.
    pub mesh: Mesh,
    /// The test's program, where the applications' user may read it.
    tool: PathBuf,
    _network: Network,
}

impl Redirected {
    /// Starts both, and waits until they are ready; `opaque_ports` are some of the `ports` of api.
    /// Tests that run side by side have a tag each.
    pub async fn start(tag: &str, svid_ttl: Duration, ports: &[u16], opaque_ports: &[u16]) -> Self {
        let mut network = Network::new(tag, CONTROL_IP);
        let web_ns = network.join(&format!("{tag}-web"), WEB_IP, CONTROL_IP);
        let api_ns = network.join(&format!("{tag}-api"), API_IP, CONTROL_IP);
        let netns = Some(network.name().to_owned());
        let mesh =
            Mesh::start(MeshConfig { svid_ttl, ip: CONTROL_IP, netns, ..MeshConfig::default() })
                .await;
        // The sidecars run as root here, the applications do not: the rules tell them apart.
        redirect(&web_ns, 0);
        redirect(&api_ns, 0);
        let tool = shared_binary(&mesh.logs());
        let api = mesh.pod(PodSpec {
            ip: API_IP,
            netns: Some(api_ns),
            cluster_ip: Some(CLUSTER_IP),
            opaque_ports: opaque_ports.to_vec(),
            ..PodSpec::new("api", ports).policy("all-authenticated")
        });
        let web = mesh.pod(PodSpec { ip: WEB_IP, netns: Some(web_ns), ..PodSpec::new("web", &[]) });
        let pair = Self { apps: Vec::new(), web, api, mesh, tool, _network: network };
        for pod in [&pair.api, &pair.web] {
            until(&format!("{} is ready", pod.spec.name), READY_DEADLINE, || async {
                let answer = pair.admin(pod, "/ready");
                if answer.starts_with("200") { Ok(()) } else { Err(answer) }
            })
            .await;
        }
        pair
    }

    /// Starts an application of api's, by what the test's program calls it.
    pub async fn app(&mut self, kind: &str, ip: Ipv4Addr, port: u16) {
        let spec = Spec {
            netns: self.api.spec.netns.clone(),
            uid: Some(APP_UID),
            command: vec![self.tool.display().to_string()],
            ..Spec::ours(&format!("app-{kind}-{port}"), "steadfast-test-app")
        };
        let app = Process::start(&self.mesh.logs(), spec.args([kind, &format!("{ip}:{port}")]));
        app.logged(&["listening"], READY_DEADLINE).await;
        self.apps.push(app);
    }

    /// How to run the test's program as an application of this workload.
    pub fn application(&self, pod: &Pod) -> Tool {
        self.tool(pod, APP_UID)
    }

    /// How to run the test's program as the sidecar's user, whose traffic is not redirected.
    pub fn beside_the_sidecar(&self, pod: &Pod) -> Tool {
        self.tool(pod, 0)
    }

    fn tool(&self, pod: &Pod, uid: u32) -> Tool {
        let netns = pod.spec.netns.clone().expect("each workload has a namespace");
        Tool { netns, uid, path: self.tool.clone() }
    }

    /// The metrics of a workload's sidecar.
    pub fn metrics(&self, pod: &Pod) -> Metrics {
        Metrics::parse(&self.admin(pod, "/metrics"))
    }

    /// The status that the admin port of a workload's sidecar answers with, and the answer.
    fn admin(&self, pod: &Pod, path: &str) -> String {
        let netns = pod.spec.netns.as_deref().expect("each workload has a namespace");
        inside(netns, &format!("{} get {} {path} 2>&1 || true", self.tool.display(), pod.admin))
    }
}

/// The test's program, in the place of somebody.
#[derive(Clone, Debug)]
pub struct Tool {
    netns: String,
    uid: u32,
    path: PathBuf,
}

impl Tool {
    /// What it prints.
    pub fn run(&self, args: &[&str]) -> String {
        let output = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.netns))
            .args(["setpriv", "--pdeathsig", "KILL", &format!("--reuid={}", self.uid)])
            .arg("--clear-groups")
            .arg(&self.path)
            .args(args)
            .output()
            .expect("nsenter runs");
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
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
