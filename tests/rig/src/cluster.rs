//! A whole Kubernetes on this machine: etcd, the API server, controllers and scheduler in a network
//! of their own, and nodes that are namespaces, each with containerd, kubelet and kube-proxy.
//!
//! Nothing of it is a stand-in. What it is made of is built by `tests/kubernetes/cluster build`.
//! Outside of its own namespaces it has one listener, on loopback, and a control group for each
//! node; all of it is gone when it is dropped, and when the process that started it is killed.

use std::fs::File;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures::future::{join, join_all};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use steadfast_platform::kubernetes::{ServerClock, connect};
use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit};

use self::addons::COREDNS;
use self::images::Version;
pub use self::images::{PREVIOUS_TAG, load};
pub use self::install::{ANCHORS_NAMESPACE, CONTROL_NAMESPACE, chart, steadfast_by};
pub use self::kubectl::Kubectl;
pub use self::node::Node;
use self::pki::Pki;
use crate::namespaces::{Kind, Namespaces};
use crate::process::{Process, Spec, binary_path, free_addr};

mod addons;
mod images;
mod install;
mod kubectl;
mod node;
mod pki;

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    // In the order in which they end.
    relay: Process,
    nodes: Vec<Node>,
    scheduler: Process,
    controllers: Process,
    /// The API server.
    pub api: Process,
    /// Its store.
    pub etcd: Process,
    fabric: Namespaces,
    control: Namespaces,
    sweeper: Sweeper,
    kubectl: Kubectl,
    parts: Parts,
    dir: TempDir,
    _share: SemaphorePermit<'static>,
}

impl Deref for Cluster {
    type Target = Kubectl;

    fn deref(&self) -> &Kubectl {
        &self.kubectl
    }
}

impl Cluster {
    /// Starts one with so many nodes, and waits until they are ready and names are resolved. One
    /// without nodes runs nothing, and is an API server with all that it has.
    ///
    /// It waits until others have left it room: a cluster that gets no processor for seconds restarts
    /// what does not answer its probes.
    pub async fn start(nodes: u8) -> Self {
        Self::start_with(nodes, u32::from(nodes).max(1)).await
    }

    /// The same, when no other test has one.
    pub async fn start_alone(nodes: u8) -> Self {
        Self::start_with(nodes, ROOM).await
    }

    async fn start_with(nodes: u8, share: u32) -> Self {
        static FREE: Semaphore = Semaphore::const_new(ROOM as usize);
        let share = FREE.acquire_many(share).await.expect("nobody closes it");
        let parts = Parts::find();
        let dir = TempDir::with_prefix("steadfast-cluster-").expect("a folder for the cluster");
        let logs = dir.path().join("log");
        std::fs::create_dir(&logs).expect("a folder for the logs");
        let sweeper = Sweeper::start(&format!("steadfast-{}", dir_name(&dir)));
        let pki = Pki::write(dir.path(), &[CONTROL_IP, SERVICE_IP, Ipv4Addr::LOCALHOST]);
        let secret = secret();
        write_tokens(dir.path(), &secret, nodes);

        let fabric = format!(
            "ip link add br0 type bridge; ip addr add {GATEWAY_IP}/24 dev br0; ip link set br0 up;"
        );
        let fabric = Namespaces::new(&logs, "fabric", Kind::Network, &fabric).await;
        let control = Namespaces::new(&logs, "control", Kind::Network, "").await;
        control.plug_into(&fabric, "control");
        control.run(&format!(
            "ip addr add {CONTROL_IP}/24 dev eth0; ip route add default via {GATEWAY_IP}"
        ));
        for index in 1..=nodes {
            let (pods, node) = (node::pod_subnet(index), node::ip(index));
            control.run(&format!("ip route add {pods} via {node}"));
        }
        let place =
            Place { parts: &parts, dir: dir.path(), logs: &logs, control: &control, secret };
        let etcd = place.etcd();
        let mut api = place.api(&pki);
        let listen = free_addr();
        let relay = place.relay(listen);
        place.kubeconfig("admin.kubeconfig", &format!("https://{CONTROL_IP}:6443"), "admin");
        place.kubeconfig("kubeconfig", &format!("https://{listen}"), "admin");
        let kubectl = Kubectl::new(&parts, dir.path().join("kubeconfig"));
        let started =
            (1..=nodes).map(|index| Node::start(&place, &fabric, sweeper.group(), index, nodes));
        let (nodes, ()) = join(join_all(started), kubectl.served(&mut api)).await;
        // Both give up when the API server is not there in time.
        let (controllers, scheduler) = (place.controllers(), place.scheduler());
        kubectl.apply(&COREDNS.replace("$DNS_IP", &DNS_IP.to_string()));
        for node in &nodes {
            kubectl.wait_for(&["--for=condition=Ready", &format!("node/{}", node.name())]).await;
        }
        let names = ["--namespace=kube-system", "--for=condition=Available", "deployment/coredns"];
        if !nodes.is_empty() {
            kubectl.wait_for(&names).await;
        }
        Self {
            relay,
            nodes,
            scheduler,
            controllers,
            api,
            etcd,
            fabric,
            control,
            sweeper,
            kubectl,
            parts,
            dir,
            _share: share,
        }
    }

    /// Its nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Where its processes log.
    pub fn logs(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Brings the image `localhost/<program>:1` of a program of this workspace into every node.
    pub fn import(&self, program: &str) {
        self.import_of(program, Version::This);
    }

    fn import_of(&self, program: &str, version: Version) {
        let image = images::of_program(&self.parts, program, version);
        self.nodes.iter().for_each(|node| node.import(&self.parts, &image));
    }

    /// Cuts a node off from all others, or joins it again.
    pub fn connect(&self, node: usize, connected: bool) {
        let state = if connected { "up" } else { "down" };
        self.fabric.run(&format!("ip link set {} {state}", self.nodes[node].name()));
    }

    /// Everything stops where it is, as if the machines slept; the nodes' pods too.
    pub fn sleep(&self) {
        for process in [&self.api, &self.scheduler, &self.controllers, &self.etcd] {
            process.freeze();
        }
        self.nodes.iter().for_each(|node| drop(node.namespaces.run("kill -STOP -1")));
    }

    /// Everything goes on.
    pub fn wake(&self) {
        self.nodes.iter().for_each(|node| drop(node.namespaces.run("kill -CONT -1")));
        for process in [&self.etcd, &self.api, &self.controllers, &self.scheduler] {
            process.thaw();
        }
    }

    /// Saves all that the API server has stored.
    pub fn snapshot(&self, file: &Path) {
        let etcdctl = self.parts.path("etcdctl");
        let (etcdctl, file) = (etcdctl.display(), file.display());
        self.control.run(&format!("{etcdctl} --endpoints={ETCD} snapshot save {file}"));
    }

    /// Puts it back, as an operator does: everybody is told that what they have seen is gone.
    pub async fn restore(&mut self, file: &Path) {
        for process in [&mut self.scheduler, &mut self.controllers, &mut self.api, &mut self.etcd] {
            process.kill();
        }
        let (etcdutl, data) = (self.parts.path("etcdutl"), self.dir.path().join("etcd"));
        std::fs::remove_dir_all(&data).expect("the data of etcd");
        let (etcdutl, file, data) = (etcdutl.display(), file.display(), data.display());
        self.control.run(&format!(
            "{etcdutl} snapshot restore {file} --data-dir={data} --bump-revision=1000000000 \
             --mark-compacted"
        ));
        self.etcd.restart();
        self.api.restart();
        self.kubectl.served(&mut self.api).await;
        self.controllers.restart();
        self.scheduler.restart();
    }

    /// A client of the API server, as the cluster's administrator, and its clock.
    pub async fn client(&self) -> (Client, ServerClock) {
        let config = Kubeconfig::read_from(self.kubeconfig()).expect("it was written");
        let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await;
        connect(config.expect("it is good")).expect("a client")
    }

    /// Starts a program beside the control plane, as the cluster's administrator by the kubeconfig
    /// that it is given with `--kubeconfig`.
    pub fn companion(&self, part: &str, args: &[&str]) -> Process {
        let kubeconfig = self.dir.path().join("admin.kubeconfig").display().to_string();
        let program = self.parts.path(part).display().to_string();
        let mut command = vec![program, format!("--kubeconfig={kubeconfig}")];
        command.extend(args.iter().map(|arg| (*arg).to_owned()));
        let entrance = self.control.entrance();
        let spec = Spec { name: part.to_owned(), command, entrance, ..Spec::default() };
        Process::start(&self.logs(), spec)
    }

    /// Starts a program of this workspace beside the control plane.
    pub fn beside(&self, name: &str, program: &str, args: &[&str]) -> Process {
        let mut command = vec![binary_path(program).display().to_string()];
        command.extend(args.iter().map(|arg| (*arg).to_owned()));
        let entrance = self.control.entrance();
        let spec = Spec { name: name.to_owned(), command, entrance, ..Spec::default() };
        Process::start(&self.logs(), spec)
    }

    /// Its own folder, with the certificate that the API server shows and its key.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Applies the definitions that a program of another project needs.
    pub fn define(&self, part: &str) {
        let file = parts_root().join("crds").join(format!("{part}.yaml"));
        let file = file.display().to_string();
        self.kubectl(&["apply", "--server-side", "--filename", &file]);
        let established = ["--for=condition=Established", "--filename", &file, "--timeout=60s"];
        self.kubectl(&[&["wait"], &established[..]].concat());
    }

    /// What is where the control plane is.
    pub fn control(&self) -> &Namespaces {
        &self.control
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Whoever goes on would only log that the others are gone.
        for process in [
            &mut self.relay,
            &mut self.scheduler,
            &mut self.controllers,
            &mut self.api,
            &mut self.etcd,
        ] {
            process.kill();
        }
        self.nodes.iter_mut().for_each(Node::end);
        self.fabric.end();
        self.control.end();
        self.sweeper.sweep();
    }
}

/// Where `tests/kubernetes/cluster build` puts its parts.
#[expect(clippy::disallowed_methods, reason = "a test has no configuration")]
pub fn parts_root() -> PathBuf {
    std::env::var_os(PARTS_VARIABLE).map_or_else(
        || {
            let home = std::env::var_os("HOME").expect("HOME is set");
            Path::new(&home).join(".cache/steadfast/kubernetes")
        },
        PathBuf::from,
    )
}

/// The parts that are built from Go modules, and images.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    bin: PathBuf,
    images: PathBuf,
}

impl Parts {
    fn find() -> Self {
        let root = parts_root();
        let parts = Self { bin: root.join("bin"), images: root.join("images") };
        for part in ["etcd", "kube-apiserver", "kubelet", "containerd", "coredns", "kubectl"] {
            assert!(
                parts.path(part).exists(),
                "{} is missing: run tests/kubernetes/cluster build",
                parts.path(part).display()
            );
        }
        parts
    }

    fn path(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// Where programs are found, with those that a node has of the machine.
    fn search_path(&self) -> String {
        format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.bin.display())
    }

    /// The commit before this one: its programs and its charts.
    fn previous(&self) -> PathBuf {
        let previous = parts_root().join("previous");
        assert!(
            previous.join("programs").exists(),
            "{} is missing: run tests/kubernetes/cluster previous",
            previous.display()
        );
        previous
    }

    fn image(&self, name: &str) -> PathBuf {
        self.images.join(format!("{name}.tar"))
    }
}

/// Where the control plane's processes start.
struct Place<'a> {
    parts: &'a Parts,
    dir: &'a Path,
    logs: &'a Path,
    control: &'a Namespaces,
    secret: String,
}

impl Place<'_> {
    fn etcd(&self) -> Process {
        self.start(
            "etcd",
            "etcd",
            [
                format!("--data-dir={}", self.file("etcd")),
                format!("--listen-client-urls={ETCD}"),
                format!("--advertise-client-urls={ETCD}"),
                "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
                "--log-level=warn".to_owned(),
            ],
        )
    }

    fn api(&self, pki: &Pki) -> Process {
        let file = |path: &Path| path.display().to_string();
        self.start(
            "api-server",
            "kube-apiserver",
            [
                format!("--etcd-servers={ETCD}"),
                format!("--bind-address={CONTROL_IP}"),
                format!("--advertise-address={CONTROL_IP}"),
                "--secure-port=6443".to_owned(),
                format!("--tls-cert-file={}", file(&pki.server)),
                format!("--tls-private-key-file={}", file(&pki.server_key)),
                format!("--client-ca-file={}", file(&pki.ca)),
                format!("--kubelet-client-certificate={}", file(&pki.client)),
                format!("--kubelet-client-key={}", file(&pki.client_key)),
                "--kubelet-preferred-address-types=InternalIP".to_owned(),
                format!("--service-account-signing-key-file={}", file(&pki.tokens)),
                format!("--service-account-key-file={}", file(&pki.tokens_public)),
                "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
                format!("--token-auth-file={}", self.file("tokens.csv")),
                "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
                "--authorization-mode=Node,RBAC".to_owned(),
                "--enable-admission-plugins=NodeRestriction".to_owned(),
                "--enable-aggregator-routing=true".to_owned(),
                "--allow-privileged=true".to_owned(),
                "--runtime-config=certificates.k8s.io/v1beta1=true".to_owned(),
                format!("--feature-gates={FEATURE_GATES}"),
                "--profiling=false".to_owned(),
            ],
        )
    }

    fn controllers(&self) -> Process {
        self.start(
            "controllers",
            "kube-controller-manager",
            [
                format!("--kubeconfig={}", self.file("admin.kubeconfig")),
                format!("--service-account-private-key-file={}", self.file("tokens.key")),
                format!("--root-ca-file={}", self.file("ca.crt")),
                "--leader-elect=false".to_owned(),
                "--use-service-account-credentials=true".to_owned(),
                "--allocate-node-cidrs=false".to_owned(),
                format!("--feature-gates={FEATURE_GATES}"),
                "--profiling=false".to_owned(),
            ],
        )
    }

    fn scheduler(&self) -> Process {
        self.start(
            "scheduler",
            "kube-scheduler",
            [
                format!("--kubeconfig={}", self.file("admin.kubeconfig")),
                "--leader-elect=false".to_owned(),
                "--profiling=false".to_owned(),
            ],
        )
    }

    /// The only listener outside of the cluster's namespaces.
    fn relay(&self, listen: SocketAddr) -> Process {
        let spec = Spec {
            name: "relay".to_owned(),
            command: vec![binary_path("steadfast-test-app").display().to_string()],
            ..Spec::default()
        };
        let netns = format!("/proc/{}/ns/net", self.control.pid());
        let args = ["relay".to_owned(), listen.to_string(), netns, format!("{CONTROL_IP}:6443")];
        Process::start(self.logs, spec.args(args))
    }

    fn start<const N: usize>(&self, name: &str, part: &str, args: [String; N]) -> Process {
        let mut command = vec![self.parts.path(part).display().to_string()];
        command.extend(args);
        let entrance = self.control.entrance();
        let spec = Spec { name: name.to_owned(), command, entrance, ..Spec::default() };
        Process::start(self.logs, spec)
    }

    /// Writes how to reach the API server as one of its users.
    fn kubeconfig(&self, name: &str, server: &str, user: &str) {
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "steadfast",
                "cluster": { "server": server, "certificate-authority": self.file("ca.crt") },
            }],
            "users": [{ "name": user, "user": { "token": token_of(user, &self.secret) } }],
            "contexts": [{ "name": user, "context": { "cluster": "steadfast", "user": user } }],
            "current-context": user,
        });
        std::fs::write(self.dir.join(name), config.to_string()).expect("the folder is ours");
    }

    fn file(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }
}

/// Takes the nodes' control groups away, whatever happens to us: it notices our end.
#[derive(Debug)]
struct Sweeper {
    group: String,
    child: Child,
}

impl Sweeper {
    /// Makes the group in each hierarchy.
    fn start(group: &str) -> Self {
        let script = format!(
            "cat; for i in $(seq 200); do \
               [ -n \"$(find /sys/fs/cgroup -maxdepth 2 -name {group})\" ] || exit 0; \
               find /sys/fs/cgroup/*/{group} -depth -type d -exec rmdir {{}} + 2>/dev/null; \
               sleep 0.1; \
             done; echo \"{group}: control groups are left\" >&2; exit 1"
        );
        let child = Command::new("setsid")
            .args(["sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("sh runs");
        Self { group: group.to_owned(), child }
    }

    fn group(&self) -> &str {
        &self.group
    }

    fn sweep(&mut self) {
        drop(self.child.stdin.take());
        let swept = self.child.wait();
        if !std::thread::panicking() {
            assert!(swept.is_ok_and(|status| status.success()), "{} is left", self.group);
        }
    }
}

/// Who may ask the API server, each by a token.
fn write_tokens(dir: &Path, secret: &str, nodes: u8) {
    let mut tokens = format!("{},admin,admin,system:masters\n", token_of("admin", secret));
    for name in (1..=nodes).map(node::name) {
        tokens += &format!("{},system:node:{name},{name},system:nodes\n", token_of(&name, secret));
    }
    std::fs::write(dir.join("tokens.csv"), tokens).expect("the folder is ours");
}

fn token_of(user: &str, secret: &str) -> String {
    format!("{secret}-{user}")
}

/// The listener on loopback is open to every user of this machine, and a cluster runs what it is
/// told as root.
fn secret() -> String {
    let mut bytes = [0; 16];
    let mut random = File::open("/dev/urandom").expect("there is randomness");
    random.read_exact(&mut bytes).expect("there is randomness");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn dir_name(dir: &TempDir) -> String {
    let name = dir.path().file_name().expect("it has a name").to_string_lossy();
    name.trim_start_matches("steadfast-cluster-").to_lowercase()
}

/// Overrules where the parts are.
const PARTS_VARIABLE: &str = "STEADFAST_KUBERNETES";
/// The bridge that ties everything together.
const GATEWAY_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 1);
/// Where the API server is.
const CONTROL_IP: Ipv4Addr = Ipv4Addr::new(10, 250, 0, 2);
/// The API server's Service.
const SERVICE_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// The Service of the names.
const DNS_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const ETCD: &str = "http://10.250.0.2:2379";
const FEATURE_GATES: &str =
    "ClusterTrustBundle=true,ClusterTrustBundleProjection=true,PodCertificateRequest=true";
/// For everything that a loaded machine may take long for.
/// So many nodes in all clusters of a test run; a cluster without any counts as one.
const ROOM: u32 = 5;
const DEADLINE: Duration = Duration::from_secs(120);
