//! A standalone mesh in a directory of its own, and workloads in it.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use http::StatusCode;
use steadfast_identity::authority::Founding;
use steadfast_platform::keys::FileKeys;
use steadfast_platform::standalone;
use steadfast_platform::store::{Event, Revision, Store as _, StoreError, TRUST_DOMAIN_KEY};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::READ_LEASE;
use tempfile::TempDir;

use crate::metrics::{Metrics, get};
use crate::process::{Process, Spec, binary_path, free_port};
use crate::wait::until;

/// A read lease for tests.
pub const QUICK_LEASE: Duration = Duration::from_secs(4);

/// How a mesh is started.
#[derive(Clone, Debug)]
pub struct MeshConfig {
    /// The life of SVIDs.
    pub svid_ttl: Duration,
    /// The address of identity and control.
    pub ip: Ipv4Addr,
    /// The namespace that the control plane runs in.
    pub netns: Option<String>,
    /// Whether the controller of rotations runs: without it nobody but the test changes the state.
    pub rotation: bool,
    /// The read lease that the trust domain is founded with.
    pub read_lease: Duration,
    /// Over how long the renewals of a drain are spread.
    pub renew_window: Duration,
    /// Whether a second replica of identity runs, on another address of the same name.
    pub second_identity: bool,
    /// The trust domain that the mesh is founded with, and its keys; `None`: a new one.
    pub founding: Option<Arc<Founding>>,
    /// What it is given beside the usual: arguments, and variables of its environment.
    pub rotation_args: Vec<String>,
    /// See above.
    pub rotation_env: Vec<(String, String)>,
}

/// A running mesh.
#[derive(Debug)]
pub struct Mesh {
    // In the order in which they end: the workloads of a test are dropped before.
    /// `steadfast-rotation`, if the test wants it.
    pub rotation: Option<Process>,
    /// `steadfast-control`.
    pub control: Process,
    /// `steadfast-identity`.
    pub identity: Process,
    /// Its second replica, if the test wants it.
    pub identity_2: Option<Process>,
    /// `steadfast-store`.
    pub store: Process,
    /// Where identity listens.
    pub identity_addr: SocketAddr,
    /// Where control listens.
    pub control_addr: SocketAddr,
    /// Identity's admin port.
    pub identity_admin: SocketAddr,
    /// Control's admin port.
    pub control_admin: SocketAddr,
    /// Rotation's admin port.
    pub rotation_admin: SocketAddr,
    /// The admin port of identity's second replica.
    pub identity_2_admin: SocketAddr,
    /// By which identity is reached: a name, if it has two addresses.
    identity_name: String,
    hosts: Option<PathBuf>,
    config: MeshConfig,
    dir: TempDir,
}

/// What a workload is.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Its name, which is its Service's and its service account's too.
    pub name: String,
    /// The address it has.
    pub ip: Ipv4Addr,
    /// The ports of its application.
    pub ports: Vec<u16>,
    /// Those that are opaque.
    pub opaque_ports: Vec<u16>,
    /// `config.linkerd.io/default-inbound-policy`.
    pub policy: Option<String>,
    /// `127.0.0.1:PORT=authority` pairs, in explicit mode.
    pub listen_map: Vec<(SocketAddr, String)>,
    /// Variables beside the usual ones, which they replace.
    pub env: Vec<(String, String)>,
    /// The namespace it runs in: its traffic is then redirected.
    pub netns: Option<String>,
    /// The service's cluster address.
    pub cluster_ip: Option<Ipv4Addr>,
}

/// A workload's sidecar.
#[derive(Debug)]
pub struct Pod {
    /// What it is.
    pub spec: PodSpec,
    /// The sidecar's process.
    pub proxy: Process,
    /// Its inbound listener.
    pub inbound: SocketAddr,
    /// Its outbound listener.
    pub outbound: SocketAddr,
    /// Its admin port.
    pub admin: SocketAddr,
}

impl MeshConfig {
    /// Whose controller runs, and is quick: a rotation waits out the read lease several times.
    pub fn rotating() -> Self {
        Self { rotation: true, read_lease: QUICK_LEASE, ..Self::default() }
    }
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            svid_ttl: Duration::from_secs(24 * 3600),
            ip: Ipv4Addr::LOCALHOST,
            netns: None,
            rotation: false,
            read_lease: READ_LEASE,
            renew_window: Duration::from_secs(1),
            second_identity: false,
            founding: None,
            rotation_args: Vec::new(),
            rotation_env: Vec::new(),
        }
    }
}

impl PodSpec {
    /// A workload on loopback with these ports.
    pub fn new(name: &str, ports: &[u16]) -> Self {
        Self {
            name: name.to_owned(),
            ip: Ipv4Addr::LOCALHOST,
            ports: ports.to_vec(),
            opaque_ports: Vec::new(),
            policy: None,
            listen_map: Vec::new(),
            env: Vec::new(),
            netns: None,
            cluster_ip: None,
        }
    }

    /// With an inbound policy.
    #[must_use]
    pub fn policy(self, policy: &str) -> Self {
        Self { policy: Some(policy.to_owned()), ..self }
    }

    /// Its SPIFFE ID.
    pub fn spiffe_id(&self) -> String {
        format!("spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{}", self.name)
    }

    /// The authority of one of its ports.
    pub fn authority(&self, port: u16) -> String {
        format!("{}.{NAMESPACE}.svc.cluster.local:{port}", self.name)
    }

    fn manifest(&self, inbound: u16, admin: u16) -> String {
        let Self { name, ip, .. } = self;
        let mut text = format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}-0\n  namespace: {NAMESPACE}\n\
             \x20 labels: {{app: {name}}}\n  annotations:\n    linkerd.io/inject: enabled\n\
             \x20   config.linkerd.io/inbound-port: \"{inbound}\"\n\
             \x20   config.linkerd.io/admin-port: \"{admin}\"\n\
             spec:\n  serviceAccountName: {name}\n  containers:\n  - name: app\n    image: none\n"
        );
        // Writing to a String cannot fail.
        let _ = writeln!(text, "status: {{podIP: {ip}, podIPs: [{{ip: {ip}}}]}}");
        if self.ports.is_empty() {
            return text;
        }
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: {NAMESPACE}\n"
        );
        if !self.opaque_ports.is_empty() {
            let ports: Vec<_> = self.opaque_ports.iter().map(u16::to_string).collect();
            let _ = writeln!(
                text,
                "  annotations: {{config.linkerd.io/opaque-ports: \"{}\"}}",
                ports.join(",")
            );
        }
        let _ = write!(text, "spec:\n  selector: {{app: {name}}}\n");
        if let Some(ip) = self.cluster_ip {
            let _ = writeln!(text, "  clusterIP: {ip}");
        }
        text.push_str("  ports:\n");
        for port in &self.ports {
            let _ = writeln!(text, "  - {{name: p{port}, port: {port}, targetPort: {port}}}");
        }
        text
    }
}

impl Mesh {
    /// Starts store, identity and control, and waits until all are ready.
    pub async fn start(config: MeshConfig) -> Self {
        let dir = tempfile::Builder::new().prefix("steadfast-test-").tempdir().expect("a temp dir");
        let logs = dir.path().join("test-logs");
        fs::create_dir_all(&logs).expect("the logs' folder");
        let addr = || SocketAddr::from((config.ip, free_port()));
        let (store_admin, identity_admin, control_admin) = (addr(), addr(), addr());
        let rotation_admin = addr();
        let (identity_addr, control_addr) = (addr(), addr());
        let spec = |binary: &str, admin: SocketAddr| Spec {
            netns: config.netns.clone(),
            ..Spec::ours(binary, binary)
                .args(["--dir", &dir.path().display().to_string()])
                .args(["--admin", &admin.to_string()])
        };
        let store = Process::start(&logs, spec("steadfast-store", store_admin));
        wait_for_socket(&dir.path().join("store.sock")).await;
        if let Some(founding) = &config.founding {
            found(dir.path(), founding).await;
        }
        init_trust(dir.path(), config.read_lease);
        let ttl = format!("{}s", config.svid_ttl.as_secs());
        let identity = |name: &str, addr: SocketAddr, admin| {
            let spec = Spec { name: name.to_owned(), ..spec("steadfast-identity", admin) };
            let flags = ["--listen", &addr.to_string(), "--svid-ttl", &ttl];
            Process::start(&logs, spec.args(flags))
        };
        let first = identity("steadfast-identity", identity_addr, identity_admin);
        let (identity_2_addr, identity_2_admin) =
            (SocketAddr::from((SECOND_IP, identity_addr.port())), addr());
        let second = config
            .second_identity
            .then(|| identity("steadfast-identity-2", identity_2_addr, identity_2_admin));
        let hosts = config.second_identity.then(|| {
            let path = dir.path().join("test-hosts");
            let text = format!("{} localhost {REPLICAS}\n{SECOND_IP} {REPLICAS}\n", config.ip);
            fs::write(&path, text).expect("the hosts are written");
            path
        });
        let identity_name = match config.second_identity {
            true => format!("{REPLICAS}:{}", identity_addr.port()),
            false => identity_addr.to_string(),
        };
        let spec = |binary: &str, admin| Spec { hosts: hosts.clone(), ..spec(binary, admin) };
        let control = Process::start(
            &logs,
            spec("steadfast-control", control_admin)
                .args(["--listen", &control_addr.to_string()])
                .args(["--identity-addr", &identity_name]),
        );
        let rotation = config.rotation.then(|| {
            let spec = spec("steadfast-rotation", rotation_admin)
                .args(["--identity-addr", &identity_name])
                .args(["--renew-window", &format!("{}s", config.renew_window.as_secs())])
                .args(["--emergency-renew-window", "1s"])
                .args(&config.rotation_args);
            let env = config.rotation_env.iter();
            let spec = env.fold(spec, |spec, (name, value)| spec.env(name, value));
            Process::start(&logs, spec)
        });
        let (identity, identity_2) = (first, second);
        let mesh = Self {
            identity_2,
            identity_2_admin,
            identity_name,
            hosts,
            rotation,
            rotation_admin,
            control,
            identity,
            store,
            identity_addr,
            control_addr,
            identity_admin,
            control_admin,
            config,
            dir,
        };
        if mesh.config.netns.is_none() {
            ready("steadfast-identity", identity_admin).await;
            if mesh.identity_2.is_some() {
                ready("the second steadfast-identity", identity_2_admin).await;
            }
            ready("steadfast-control", control_admin).await;
        }
        mesh
    }

    /// Where the second replica of identity listens, if there is one.
    pub fn identity_2_addr(&self) -> SocketAddr {
        SocketAddr::from((SECOND_IP, self.identity_addr.port()))
    }

    /// The mesh's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The certificate of the active issuer, in DER: the second of what a workload shows.
    pub async fn issuer_der(&self) -> Vec<u8> {
        self.trust_domain().await.0.active_issuer().expect("an active issuer").der.clone()
    }

    /// The stored state of the trust domain, and its revision.
    pub async fn trust_domain(&self) -> (TrustDomainState, Revision) {
        let entry = self.client().get(TRUST_DOMAIN_KEY).await.expect("the store answers");
        let entry = entry.expect("a trust domain");
        (serde_json::from_slice(&entry.value).expect("its state"), entry.revision)
    }

    /// A second controller beside the first, and where its admin port is.
    pub fn another_controller(&self) -> (Process, SocketAddr) {
        let first = self.rotation.as_ref().expect("a controller");
        let admin = SocketAddr::from((self.config.ip, free_port()));
        let from = self.rotation_admin.to_string();
        (first.twin("steadfast-rotation-2", &from, &admin.to_string()), admin)
    }

    /// Changes the state of the trust domain, as its controller would: by compare-and-swap.
    /// Returns what was written.
    pub async fn change_trust(
        &self,
        change: impl FnOnce(&mut TrustDomainState),
    ) -> TrustDomainState {
        let (mut state, revision) = self.trust_domain().await;
        change(&mut state);
        let value = serde_json::to_vec(&state).expect("a state is JSON");
        let (client, value) = (self.client(), Some(value.into()));
        let written = client.compare_and_swap(TRUST_DOMAIN_KEY, Some(revision), value).await;
        written.expect("nobody else writes it");
        state
    }

    /// Gives an order as a command does: again, if somebody else was faster. Returns what it
    /// returns, of the state that was written.
    pub async fn order<T>(&self, mut order: impl FnMut(&mut TrustDomainState) -> T) -> T {
        loop {
            let (mut state, revision) = self.trust_domain().await;
            let told = order(&mut state);
            let value = serde_json::to_vec(&state).expect("a state is JSON");
            let (client, value) = (self.client(), Some(value.into()));
            match client.compare_and_swap(TRUST_DOMAIN_KEY, Some(revision), value).await {
                Ok(_) => return told,
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => panic!("the store answers: {error}"),
            }
        }
    }

    /// Waits for a state, and misses none in between.
    pub async fn state_where(
        &self,
        what: &str,
        deadline: Duration,
        accept: impl Fn(&TrustDomainState) -> bool,
    ) -> TrustDomainState {
        let mut last = None;
        let found = tokio::time::timeout(deadline, self.watch(&accept, &mut last)).await;
        match found {
            Ok(state) => state,
            Err(_) => {
                let page = get(self.rotation_admin, "/rotation.json").await;
                panic!("not within {deadline:?}: {what}: {last:#?}\n{page:?}")
            }
        }
    }

    async fn watch(
        &self,
        accept: &impl Fn(&TrustDomainState) -> bool,
        last: &mut Option<TrustDomainState>,
    ) -> TrustDomainState {
        let client = self.client();
        loop {
            if let Ok((entries, revision)) = client.list(TRUST_DOMAIN_KEY).await
                && let Ok(mut events) = client.watch(TRUST_DOMAIN_KEY, revision).await
            {
                let mut values: Vec<_> = entries.into_iter().map(|entry| entry.value).collect();
                loop {
                    for value in values.drain(..) {
                        let state: TrustDomainState =
                            serde_json::from_slice(&value).expect("its state");
                        if accept(&state) {
                            return state;
                        }
                        *last = Some(state);
                    }
                    match events.next().await {
                        Some(Ok(Event::Put(entry))) => values.push(entry.value),
                        Some(Ok(_)) => {}
                        // The store was stopped, as some tests do.
                        Some(Err(_)) | None => break,
                    }
                }
            }
            tokio::time::sleep(WATCH_AGAIN).await;
        }
    }

    /// Runs `steadfast` for this mesh, as a person would; its output and whether it went well.
    pub async fn command(&self, words: &[&str]) -> (bool, String) {
        let mut command = tokio::process::Command::new(binary_path("steadfast"));
        command.args(words).arg("--dir").arg(self.dir()).stdin(std::process::Stdio::null());
        let output = command.output().await.expect("steadfast runs");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    fn client(&self) -> standalone::Client {
        standalone::Client::new(&standalone::Directory::new(self.dir()))
    }

    /// Where the logs are.
    pub fn logs(&self) -> PathBuf {
        self.dir.path().join("test-logs")
    }

    /// Writes a workload's manifests and starts its sidecar.
    pub fn pod(&self, spec: PodSpec) -> Pod {
        let (inbound, outbound, admin) = match spec.netns {
            Some(_) => (4143, 4140, 4191),
            None => (free_port(), free_port(), free_port()),
        };
        let manifest = self.dir().join("manifests").join(format!("{}.yaml", spec.name));
        fs::write(&manifest, spec.manifest(inbound, admin)).expect("the manifest is written");
        let (inbound, outbound, admin) = (
            SocketAddr::from((spec.ip, inbound)),
            SocketAddr::from((Ipv4Addr::LOCALHOST, outbound)),
            SocketAddr::from((spec.ip, admin)),
        );
        let process = self.sidecar(&spec, inbound, outbound, admin);
        let proxy = Process::start(&self.logs(), process);
        Pod { spec, proxy, inbound, outbound, admin }
    }

    fn sidecar(
        &self,
        spec: &PodSpec,
        inbound: SocketAddr,
        outbound: SocketAddr,
        admin: SocketAddr,
    ) -> Spec {
        let name = &spec.name;
        let mounted = self.dir().join("pods").join(NAMESPACE).join(format!("{name}-0"));
        let local_name = |ns: &str, sa: &str| {
            format!("{sa}.{ns}.serviceaccount.identity.steadfast.{TRUST_DOMAIN}")
        };
        let numbers =
            |ports: &[u16]| ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
        let map = spec.listen_map.iter().map(|(addr, to)| format!("{addr}={to}"));
        let (netns, hosts) = (spec.netns.clone(), self.hosts.clone());
        let mut process = Spec { netns, hosts, ..Spec::ours(name, "steadfast-proxy") }
            .env("LINKERD2_PROXY_IDENTITY_LOCAL_NAME", local_name(NAMESPACE, name))
            .env("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", mounted.join("token").display())
            .env("STEADFAST_PROXY_BUNDLE_FILE", mounted.join("bundle.json").display())
            .env("LINKERD2_PROXY_IDENTITY_SVC_ADDR", &self.identity_name)
            .env("LINKERD2_PROXY_IDENTITY_SVC_NAME", local_name("steadfast", "steadfast-identity"))
            .env("LINKERD2_PROXY_DESTINATION_SVC_ADDR", self.control_addr)
            .env(
                "LINKERD2_PROXY_DESTINATION_SVC_NAME",
                local_name("steadfast", "steadfast-control"),
            )
            .env(
                "LINKERD2_PROXY_POLICY_WORKLOAD",
                format!("{{\"ns\":\"{NAMESPACE}\",\"pod\":\"{name}-0\"}}"),
            )
            .env(
                "LINKERD2_PROXY_DESTINATION_CONTEXT",
                format!("{{\"ns\":\"{NAMESPACE}\",\"pod\":\"{name}-0\"}}"),
            )
            .env("LINKERD2_PROXY_INBOUND_LISTEN_ADDR", inbound)
            .env("LINKERD2_PROXY_OUTBOUND_LISTEN_ADDR", outbound)
            .env("LINKERD2_PROXY_ADMIN_LISTEN_ADDR", admin)
            .env("LINKERD2_PROXY_INBOUND_PORTS", numbers(&spec.ports))
            .env("LINKERD2_PROXY_LOG", "info")
            .env(
                "STEADFAST_PROXY_MODE",
                if spec.netns.is_some() { "transparent" } else { "explicit" },
            );
        if !spec.opaque_ports.is_empty() {
            process = process.env(
                "LINKERD2_PROXY_INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION",
                numbers(&spec.opaque_ports),
            );
        }
        if let Some(policy) = &spec.policy {
            process = process.env("LINKERD2_PROXY_INBOUND_DEFAULT_POLICY", policy);
        }
        if !spec.listen_map.is_empty() {
            let map = map.collect::<Vec<_>>().join(",");
            process = process.env("STEADFAST_PROXY_OUTBOUND_LISTEN_MAP", map);
        }
        for (name, value) in &spec.env {
            process.env.retain(|(have, _)| have != name);
            process = process.env(name, value);
        }
        process
    }
}

impl Pod {
    /// Waits until the sidecar is ready.
    pub async fn ready(&self) {
        ready(&self.spec.name, self.admin).await;
    }

    /// Waits until the sidecar is not ready, and returns the reason.
    pub async fn unready(&self, deadline: Duration) -> String {
        until(&format!("{} is not ready", self.spec.name), deadline, || async {
            match get(self.admin, "/ready").await? {
                (StatusCode::SERVICE_UNAVAILABLE, reason) => Ok(reason),
                (status, body) => Err(format!("/ready is {status}: {body}")),
            }
        })
        .await
    }

    /// The sidecar's metrics now.
    pub async fn metrics(&self) -> Metrics {
        Metrics::scrape(self.admin).await.unwrap_or_else(|error| panic!("{error}"))
    }
}

/// Waits until the process behind an admin port is ready.
pub async fn ready(name: &str, admin: SocketAddr) {
    until(&format!("{name} is ready"), READY_DEADLINE, || async {
        match get(admin, "/ready").await? {
            (StatusCode::OK, _) => Ok(()),
            (status, reason) => Err(format!("/ready is {status}: {reason}")),
        }
    })
    .await;
}

async fn wait_for_socket(path: &Path) {
    until("the store serves its socket", READY_DEADLINE, || async {
        let connected = tokio::net::UnixStream::connect(path).await;
        connected.map(drop).map_err(|error| format!("{}: {error}", path.display()))
    })
    .await;
}

/// Keys first, then the state that names them, as `trust init` does it.
async fn found(dir: &Path, founding: &Founding) {
    let directory = standalone::Directory::new(dir);
    let anchor_keys = FileKeys::open(directory.anchor_keys()).expect("the anchors' keys");
    let issuer_keys = FileKeys::open(directory.issuer_keys()).expect("the issuers' keys");
    let Founding { active, standby, issuer, state } = founding;
    for (keys, made) in [(&anchor_keys, active), (&anchor_keys, standby), (&issuer_keys, issuer)] {
        keys.put_new(made.id, made.pkcs8.clone()).await.expect("a key is kept");
    }
    let value = serde_json::to_vec(state).expect("a state is JSON").into();
    let client = standalone::Client::new(&directory);
    let written = client.compare_and_swap(TRUST_DOMAIN_KEY, None, Some(value)).await;
    written.expect("the state is written");
}

fn init_trust(dir: &Path, read_lease: Duration) {
    let output = Command::new(binary_path("steadfast"))
        .args(["trust", "init", "--trust-domain", TRUST_DOMAIN])
        .args(["--read-lease", &format!("{}s", read_lease.as_secs()), "--dir"])
        .arg(dir)
        .output()
        .expect("steadfast runs");
    assert!(
        output.status.success(),
        "steadfast trust init: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The trust domain of every test mesh.
pub const TRUST_DOMAIN: &str = "cluster.local";
/// The name of identity, where it has two addresses.
const REPLICAS: &str = "identity.test";
const SECOND_IP: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const WATCH_AGAIN: Duration = Duration::from_millis(20);
/// The namespace of every test workload.
pub const NAMESPACE: &str = "demo";
/// Debug builds on a busy machine of two cores take their time.
pub const READY_DEADLINE: Duration = Duration::from_secs(60);
