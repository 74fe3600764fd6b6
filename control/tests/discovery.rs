//! The sidecar's discovery against the real control server over real sockets, on the real store.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test's helpers fail as it does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use steadfast_control::index::MeshNames;
use steadfast_control::{Board, Destination, DestinationSettings, Metrics, follow, serve};
use steadfast_platform::Store;
use steadfast_platform::standalone::{Client, Directory, Engine, Server};
use steadfast_process::{Drain, Readiness, SystemClock};
use steadfast_proxy::discovery::{self, Authority, Discovery, Endpoints, Profile};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;

const DEADLINE: Duration = Duration::from_secs(30);

/// A store on disk, served over its socket while it is up.
struct Mesh {
    directory: Directory,
    engine: Engine,
    _work: JoinSet<()>,
    _dir: tempfile::TempDir,
    _drain: Drain,
}

/// One control process, less its TLS.
struct Control {
    readiness: Readiness,
    registry: Registry,
    addr: SocketAddr,
    _process: Process,
}

/// Stands for a process: a runtime of its own, which takes everything with it when it is killed
/// by being dropped, as open connections.
struct Process {
    kill: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Process {
    fn start<F: Future<Output = ()>>(work: impl FnOnce() -> F + Send + 'static) -> Self {
        let (kill, killed) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    () = work() => {}
                    _ = killed => {}
                }
            });
        });
        Self { kill: Some(kill), thread: Some(thread) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.kill.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Mesh {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path());
        directory.create().unwrap();
        let drain = Drain::new();
        let (engine, writer) = Engine::open(&directory, drain.clone()).unwrap();
        let mut work = JoinSet::new();
        work.spawn(async move { writer.await.unwrap() });
        Self { directory, engine, _work: work, _dir: dir, _drain: drain }
    }

    /// Until it is dropped the store can be reached.
    fn serve_store(&self) -> Process {
        let (directory, engine) = (self.directory.clone(), self.engine.clone());
        Process::start(async move || {
            let server = Server::bind(&directory, engine, Arc::new(SystemClock)).unwrap();
            server.serve(Drain::new()).await.unwrap();
        })
    }

    async fn write(&self, kind: &str, name: &str, value: Option<Value>) {
        let key = format!("resources/{kind}/demo/{name}");
        let expected = self.engine.get(&key).await.unwrap().map(|entry| entry.revision);
        let value = value.map(|value| value.to_string().into());
        self.engine.compare_and_swap(&key, expected, value).await.unwrap();
    }

    async fn put(&self, kind: &str, name: &str, value: Value) {
        self.write(kind, name, Some(value)).await;
    }

    async fn pod(&self, name: &str, ip: &str, inject: &str) {
        let value = json!({
            "metadata": { "uid": name, "annotations": { "linkerd.io/inject": inject } },
            "spec": { "serviceAccountName": "web", "containers": [] },
            "status": { "podIP": ip },
        });
        self.put("ServiceAccount", "web", json!({})).await;
        self.put("Pod", name, value).await;
    }

    async fn slice(&self, endpoints: &[(&str, &str)]) {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|(pod, ip)| json!({ "addresses": [ip], "targetRef": { "kind": "Pod", "name": pod } }))
            .collect();
        let value = json!({
            "metadata": { "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": "IPv4", "ports": [{ "port": 8080 }], "endpoints": endpoints,
        });
        self.put("EndpointSlice", "web", value).await;
    }

    /// The service `web` with one meshed pod.
    async fn web(&self) {
        let spec = json!({ "clusterIP": "10.96.0.1", "ports": [{ "port": 80 }] });
        self.put("Service", "web", json!({ "spec": spec })).await;
        self.pod("web-1", "10.0.0.1", "enabled").await;
        self.slice(&[("web-1", "10.0.0.1")]).await;
    }

    fn control(&self, addr: &str) -> Control {
        let listener = std::net::TcpListener::bind(addr).unwrap();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap();
        let (readiness, mut registry) = (Readiness::new(), Registry::default());
        let metrics = Metrics::new(&mut registry);
        let synced = readiness.component("resources", "not read yet");
        let directory = self.directory.clone();
        let process = Process::start(async move || {
            let board = Arc::new(Board::new(MeshNames {
                trust_domain: "cluster.local".parse().unwrap(),
                control_namespace: "steadfast".to_owned(),
            }));
            let (drain, settings) = (Drain::new(), DestinationSettings::default());
            let destination =
                Destination::new(board.clone(), metrics.clone(), drain.clone(), settings);
            let store: Arc<dyn Store> = Arc::new(Client::new(&directory));
            let connections = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            tokio::select! {
                never = follow(store, board, metrics, Arc::new(SystemClock), synced) => match never {},
                ended = serve(destination, connections, drain) => ended.unwrap(),
            }
        });
        Control { readiness, registry, addr, _process: process }
    }
}

impl Control {
    fn metric(&self, name: &str) -> Option<String> {
        metric(&self.registry, name)
    }
}

fn metric(registry: &Registry, name: &str) -> Option<String> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    Some(value.to_owned())
}

/// A sidecar's discovery, asking this address.
struct Sidecar {
    discovery: Discovery,
    registry: Registry,
    _work: JoinSet<()>,
}

impl Sidecar {
    fn of(addr: SocketAddr) -> Self {
        Self::with(addr, discovery::Config::default())
    }

    fn with(addr: SocketAddr, config: discovery::Config) -> Self {
        let (mut registry, mut work) = (Registry::default(), JoinSet::new());
        let connector = tower::service_fn(move |_| async move {
            tokio::net::TcpStream::connect(addr).await.map(hyper_util::rt::TokioIo::new)
        });
        let channel = discovery::transport().connect_with_connector_lazy(connector);
        let (discovery, driver) = discovery::new(config, channel, &mut registry);
        work.spawn(async move {
            let _ = driver.run(Drain::new()).await;
        });
        Self { discovery, registry, _work: work }
    }

    fn endpoints(&self, authority: &str) -> watch::Receiver<Arc<Endpoints>> {
        self.discovery.endpoints(&Authority::parse(authority, 80).unwrap()).unwrap()
    }
}

/// Waits until this is so.
async fn until<V>(watch: &mut watch::Receiver<Arc<V>>, is_so: impl Fn(&V) -> bool) {
    let waited = tokio::time::timeout(DEADLINE, watch.wait_for(|value| is_so(value))).await;
    assert!(matches!(waited, Ok(Ok(_))), "it did not come to that in time");
}

/// Waits until a level that nobody publishes is reached.
async fn eventually(is_so: impl Fn() -> bool) {
    let reached = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, reached).await.expect("it did not come to that in time");
}

fn addrs(endpoints: &Endpoints) -> Option<Vec<String>> {
    match endpoints {
        Endpoints::Known { endpoints, .. } => Some(
            endpoints
                .iter()
                .map(|endpoint| match &endpoint.identity {
                    Some(expected) => format!("{} {}", endpoint.addr, expected.id),
                    None => endpoint.addr.to_string(),
                })
                .collect(),
        ),
        _ => None,
    }
}

fn are(wanted: &[&str]) -> impl Fn(&Endpoints) -> bool {
    move |endpoints| addrs(endpoints).is_some_and(|found| found == wanted)
}

const WEB: &str = "web.demo.svc.cluster.local:80";
const FIRST: &str = "10.0.0.1:8080 spiffe://cluster.local/ns/demo/sa/web";
const SECOND: &str = "10.0.0.2:8080 spiffe://cluster.local/ns/demo/sa/web";

#[tokio::test]
async fn a_sidecar_follows_a_service_from_before_its_birth_to_its_end() {
    let mesh = Mesh::new();
    let _store = mesh.serve_store();
    let control = mesh.control("127.0.0.1:0");
    let sidecar = Sidecar::of(control.addr);
    let mut web = sidecar.endpoints(WEB);
    until(&mut web, |endpoints| *endpoints == Endpoints::Missing).await;
    mesh.web().await;
    until(&mut web, are(&[FIRST])).await;
    mesh.pod("web-2", "10.0.0.2", "enabled").await;
    mesh.slice(&[("web-1", "10.0.0.1"), ("web-2", "10.0.0.2")]).await;
    until(&mut web, are(&[FIRST, SECOND])).await;
    mesh.pod("web-1", "10.0.0.1", "disabled").await;
    until(&mut web, are(&["10.0.0.1:8080", SECOND])).await;
    mesh.slice(&[]).await;
    until(&mut web, are(&[])).await;
    mesh.write("Service", "web", None).await;
    until(&mut web, |endpoints| *endpoints == Endpoints::Missing).await;
    let mut wrong = sidecar.endpoints("www.example.com:80");
    until(&mut wrong, |endpoints| matches!(endpoints, Endpoints::Refused(_))).await;
}

#[tokio::test]
async fn endpoints_outlive_control_and_follow_the_next_one() {
    let mesh = Mesh::new();
    let _store = mesh.serve_store();
    mesh.web().await;
    let control = mesh.control("127.0.0.1:0");
    let addr = control.addr;
    let sidecar = Sidecar::of(addr);
    let mut web = sidecar.endpoints(WEB);
    until(&mut web, are(&[FIRST])).await;
    let stale = || metric(&sidecar.registry, "discovery_stale_targets").unwrap();
    assert_eq!(stale(), "0");

    drop(control);
    eventually(|| stale() == "1").await;
    assert_eq!(addrs(&web.borrow_and_update()).unwrap(), [FIRST]);
    mesh.pod("web-2", "10.0.0.2", "enabled").await;
    mesh.slice(&[("web-2", "10.0.0.2")]).await;
    assert!(!web.has_changed().unwrap());

    let _control = mesh.control(&addr.to_string());
    until(&mut web, are(&[SECOND])).await;
    eventually(|| stale() == "0").await;
}

#[tokio::test]
async fn control_serves_what_it_knew_while_the_store_is_away() {
    let mesh = Mesh::new();
    let store = mesh.serve_store();
    mesh.web().await;
    let control = mesh.control("127.0.0.1:0");
    let sidecar = Sidecar::of(control.addr);
    let mut web = sidecar.endpoints(WEB);
    until(&mut web, are(&[FIRST])).await;
    assert!(control.readiness.report().ready);

    drop(store);
    eventually(|| control.metric("discovery_store_connected").as_deref() == Some("0")).await;
    let since = control.metric("discovery_store_lost_timestamp_seconds").unwrap();
    assert!(since.parse::<f64>().unwrap() > 1e9, "{since}");
    // Who asks only now is answered too.
    let newcomer = Sidecar::of(control.addr);
    let mut late = newcomer.endpoints("web.demo:80");
    until(&mut late, are(&[FIRST])).await;
    mesh.slice(&[]).await;
    assert!(control.readiness.report().ready, "an old answer is better than none");

    let _store = mesh.serve_store();
    until(&mut web, are(&[])).await;
    eventually(|| control.metric("discovery_store_connected").as_deref() == Some("1")).await;
    assert_eq!(control.metric("discovery_store_lost_timestamp_seconds").unwrap(), "0.0");
}

#[tokio::test]
async fn a_sidecar_is_told_nothing_before_control_has_read_the_store() {
    let mesh = Mesh::new();
    mesh.web().await;
    let control = mesh.control("127.0.0.1:0");
    let sidecar = Sidecar::of(control.addr);
    let mut web = sidecar.endpoints(WEB);
    eventually(|| control.metric("discovery_store_connected").as_deref() == Some("0")).await;
    assert!(!control.readiness.report().ready);
    assert_eq!(**web.borrow(), Endpoints::Pending);
    let _store = mesh.serve_store();
    until(&mut web, are(&[FIRST])).await;
    assert!(control.readiness.report().ready);
}

#[tokio::test]
async fn addresses_lead_to_services_and_pods() {
    let mesh = Mesh::new();
    let _store = mesh.serve_store();
    mesh.web().await;
    let control = mesh.control("127.0.0.1:0");
    let sidecar = Sidecar::of(control.addr);
    let profile = |addr: &str| sidecar.discovery.profile(addr.parse().unwrap()).unwrap();
    let authority = Authority::parse(WEB, 80).unwrap();
    let service = Profile::Service { authority, opaque: false };
    until(&mut profile("10.96.0.1:80"), |found| *found == service).await;
    until(&mut profile("192.0.2.1:80"), |found| *found == Profile::Foreign { opaque: false }).await;
    until(&mut profile("192.0.2.1:5432"), |found| *found == Profile::Foreign { opaque: true })
        .await;
    let mut pod = profile("10.0.0.1:9999");
    until(&mut pod, |found| match found {
        Profile::Endpoint { endpoint, opaque } => {
            !opaque && endpoint.identity.is_some() && endpoint.inbound_port == Some(4143)
        }
        _ => false,
    })
    .await;
    mesh.write("Pod", "web-1", None).await;
    until(&mut pod, |found| matches!(found, Profile::Foreign { .. })).await;
}

#[tokio::test]
async fn a_target_that_nobody_holds_is_forgotten_and_its_stream_closed() {
    let mesh = Mesh::new();
    let _store = mesh.serve_store();
    let control = mesh.control("127.0.0.1:0");
    let config = discovery::Config {
        idle_timeout: Duration::from_millis(20),
        ..discovery::Config::default()
    };
    let sidecar = Sidecar::with(control.addr, config);
    let open = || control.metric("discovery_streams{method=\"Get\"}");
    let mut web = sidecar.endpoints(WEB);
    until(&mut web, |endpoints| *endpoints == Endpoints::Missing).await;
    assert_eq!(open().as_deref(), Some("1"));
    drop(web);
    eventually(|| open().as_deref() == Some("0")).await;
    eventually(|| metric(&sidecar.registry, "discovery_targets").as_deref() == Some("0")).await;
    until(&mut sidecar.endpoints(WEB), |endpoints| *endpoints == Endpoints::Missing).await;
}
