//! Promise: each refused connection is refused for its own reason, which both processes log and
//! the sidecar counts; not one byte reaches the application; and the same peer, mended in that
//! one property, gets through.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use steadfast_test_rig::app::App;
use steadfast_test_rig::peer::{Leaf, Peer, TestIssuer, dns_identity};
use steadfast_test_rig::process::{Process, free_addr};
use steadfast_test_rig::{Mesh, MeshConfig, Pod, PodSpec, until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const DEADLINE: Duration = Duration::from_secs(20);

/// A workload whose port takes mutual TLS only, and an issuer of the mesh that the test may use.
struct Target {
    api: Pod,
    app: App,
    issuer: TestIssuer,
    // Last, so that the logs are there while the others end.
    mesh: Mesh,
}

async fn target() -> Target {
    let mesh = Mesh::start(MeshConfig::default()).await;
    let app = App::tcp(free_addr()).await.unwrap();
    let port = app.addr.port();
    let api = mesh.pod(PodSpec {
        opaque_ports: vec![port],
        ..PodSpec::new("api", &[port]).policy("all-authenticated")
    });
    api.ready().await;
    let issuer = TestIssuer::of_mesh(mesh.dir(), &mesh.issuer_der().await);
    Target { api, app, issuer, mesh }
}

impl Target {
    /// What a good client's certificate says.
    fn leaf(&self) -> Leaf {
        Leaf::of("web")
    }

    fn peer(&self, issuer: &TestIssuer, leaf: &Leaf) -> Peer {
        issuer.peer(leaf, self.api.inbound, &dns_identity("api"), self.app.addr.port())
    }

    /// Runs a peer and checks that it is refused with this code, that the sidecar says so in its
    /// log and counts it, that the peer's process says so too, and that the application sees
    /// nothing.
    async fn refused(&self, peer: Peer, code: &str, label: &str, alert: &str) {
        let line = self.turned_away(peer, code, label, alert).await;
        assert!(line.contains("now=") && line.contains("clock_offset="), "{line}");
    }

    /// The same for a peer whose certificate is good, and whose wish is not.
    async fn turned_away(&self, peer: Peer, code: &str, label: &str, end: &str) -> String {
        let before = (self.app.connections(), refusals(&self.api, "inbound", label).await);
        let peer = peer.start("connect", &self.mesh);
        peer.logged(&["refused", end], DEADLINE).await;
        let line = self.api.proxy.logged(&[code, label, "inbound"], DEADLINE).await;
        let counted = refusals(&self.api, "inbound", label).await;
        assert_eq!(counted, before.1 + 1.0, "{label}");
        assert_eq!(self.app.connections(), before.0, "{label}: the application was reached");
        line
    }

    /// Runs a peer and checks that it gets through.
    async fn through(&self, peer: Peer) {
        let peer = peer.start("connect", &self.mesh);
        peer.logged(&["through: ping"], DEADLINE).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_a_foreign_authority_is_refused() {
    let target = target().await;
    let foreign = target.peer(&TestIssuer::foreign(), &target.leaf());
    target.refused(foreign, "SFT-TLS-001", "unknown_issuer", "UnknownCA").await;
    target.through(target.peer(&target.issuer, &target.leaf())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_svid_has_expired_is_refused() {
    let target = target().await;
    let expired = Leaf { expired: Some(Duration::from_secs(10)), ..target.leaf() };
    let peer = target.peer(&target.issuer, &expired);
    target.refused(peer, "SFT-TLS-002", "expired", "CertificateExpired").await;
    target.through(target.peer(&target.issuer, &target.leaf())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_two_uri_sans_is_refused() {
    let target = target().await;
    let mut two = target.leaf();
    two.uris.push("spiffe://cluster.local/ns/demo/sa/admin".to_owned());
    let peer = target.peer(&target.issuer, &two);
    target.refused(peer, "SFT-TLS-004", "not_an_svid", "Certificate").await;
    target.through(target.peer(&target.issuer, &target.leaf())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_another_trust_domain_is_refused() {
    let target = target().await;
    let mut other = target.leaf();
    other.uris = vec!["spiffe://elsewhere.test/ns/demo/sa/web".to_owned()];
    let peer = target.peer(&target.issuer, &other);
    target.refused(peer, "SFT-TLS-005", "wrong_trust_domain", "AccessDenied").await;
    target.through(target.peer(&target.issuer, &target.leaf())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_a_certificate_is_refused() {
    let target = target().await;
    let bare = target.peer(&target.issuer, &target.leaf()).without_certificate();
    target.refused(bare, "SFT-TLS-007", "no_certificate", "CertificateRequired").await;
    target.through(target.peer(&target.issuer, &target.leaf())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_names_no_port_or_the_admin_port_is_refused() {
    let target = target().await;
    let good = target.peer(&target.issuer, &target.leaf());
    let nowhere = Peer { port: 0, ..good.clone() };
    target.turned_away(nowhere, "SFT-NET-005", "transport_header", "").await;
    let admin = Peer { port: target.api.admin.port(), ..good.clone() };
    target.turned_away(admin, "SFT-NET-003", "loop_refused", "").await;
    target.through(good).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_tcp_to_a_port_that_asks_for_mutual_tls_is_refused() {
    let target = target().await;
    // The client is a workload whose sidecar believes that the service is not meshed.
    let entrance = free_addr();
    let manifest = target.mesh.dir().join("manifests").join("bare.yaml");
    std::fs::write(&manifest, unmeshed("bare", target.api.inbound)).unwrap();
    let web = target.mesh.pod(PodSpec {
        listen_map: vec![(
            entrance,
            format!("bare.demo.svc.cluster.local:{}", target.api.inbound.port()),
        )],
        ..PodSpec::new("web", &[])
    });
    web.ready().await;
    in_vain(entrance).await;
    target.api.proxy.logged(&["SFT-NET-001", "plaintext_refused"], DEADLINE).await;
    assert_eq!(refusals(&target.api, "inbound", "plaintext_refused").await, 1.0);
    assert_eq!((target.app.connections(), target.app.bytes()), (0, 0));
    web.proxy.logged(&["SFT-NET-011", "peer_closed", "outbound"], DEADLINE).await;
    assert_eq!(refusals(&web, "outbound", "peer_closed").await, 1.0);
    target.through(target.peer(&target.issuer, &target.leaf())).await;
}

/// A client sidecar, and a server at the address where discovery says that `api` answers.
struct Dialler {
    web: Pod,
    entrance: SocketAddr,
    /// Where the server listens: `api`'s inbound address.
    server: SocketAddr,
    issuer: TestIssuer,
    _api: Pod,
    // Last, so that the logs are there while the others end.
    mesh: Mesh,
}

async fn dialler() -> Dialler {
    let mesh = Mesh::start(MeshConfig::default()).await;
    let mut api = mesh.pod(PodSpec { opaque_ports: vec![9], ..PodSpec::new("api", &[9]) });
    let entrance = free_addr();
    let web = mesh.pod(PodSpec {
        listen_map: vec![(entrance, api.spec.authority(9))],
        ..PodSpec::new("web", &[])
    });
    api.ready().await;
    web.ready().await;
    // The sidecar makes room for the peer that the test puts in its place.
    api.proxy.kill();
    let issuer = TestIssuer::of_mesh(mesh.dir(), &mesh.issuer_der().await);
    let server = api.inbound;
    Dialler { web, entrance, server, issuer, _api: api, mesh }
}

impl Dialler {
    fn peer(&self, issuer: &TestIssuer, leaf: &Leaf) -> Peer {
        issuer.peer(leaf, self.server, "", 0)
    }

    async fn dial(&self, peer: &Peer) -> (Process, Vec<u8>) {
        let peer = peer.start("serve", &self.mesh);
        peer.logged(&["listening"], DEADLINE).await;
        let mut stream = TcpStream::connect(self.entrance).await.unwrap();
        let mut answer = Vec::new();
        // The sidecar may close before all is written: what comes back is what counts.
        let _ = stream.write_all(b"ping").await;
        let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.unwrap();
        (peer, answer)
    }

    async fn refused(&self, peer: Peer, code: &str, label: &str, alert: &str) {
        let before = refusals(&self.web, "outbound", label).await;
        let (peer, answer) = self.dial(&peer).await;
        assert!(answer.is_empty(), "{answer:?}");
        peer.logged(&["refused", alert], DEADLINE).await;
        let line = self.web.proxy.logged(&[code, label], DEADLINE).await;
        assert!(line.contains("expected=spiffe://cluster.local/ns/demo/sa/api"), "{line}");
        assert!(refusals(&self.web, "outbound", label).await > before, "{label}");
    }

    async fn through(&self, peer: Peer) {
        // The address may be in the penalty box after it was refused: ask until it is out.
        until("the mended peer gets through", DEADLINE, || async {
            let (_peer, answer) = self.dial(&peer).await;
            if answer == b"pong" { Ok(()) } else { Err(format!("{answer:?}")) }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_another_identity_is_refused() {
    let dialler = dialler().await;
    let other = dialler.peer(&dialler.issuer, &Leaf::of("store"));
    dialler.refused(other, "SFT-TLS-006", "wrong_identity", "AccessDenied").await;
    dialler.through(dialler.peer(&dialler.issuer, &Leaf::of("api"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_a_foreign_authority_is_refused() {
    let dialler = dialler().await;
    let foreign = dialler.peer(&TestIssuer::foreign(), &Leaf::of("api"));
    dialler.refused(foreign, "SFT-TLS-001", "unknown_issuer", "UnknownCA").await;
    dialler.through(dialler.peer(&dialler.issuer, &Leaf::of("api"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_svid_has_expired_is_refused() {
    let dialler = dialler().await;
    let expired = Leaf { expired: Some(Duration::from_secs(10)), ..Leaf::of("api") };
    let peer = dialler.peer(&dialler.issuer, &expired);
    dialler.refused(peer, "SFT-TLS-002", "expired", "CertificateExpired").await;
    dialler.through(dialler.peer(&dialler.issuer, &Leaf::of("api"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_two_uri_sans_is_refused() {
    let dialler = dialler().await;
    let mut two = Leaf::of("api");
    two.uris.push("spiffe://cluster.local/ns/demo/sa/admin".to_owned());
    let peer = dialler.peer(&dialler.issuer, &two);
    dialler.refused(peer, "SFT-TLS-004", "not_an_svid", "Certificate").await;
    dialler.through(dialler.peer(&dialler.issuer, &Leaf::of("api"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sidecars_that_disagree_about_an_identity_both_say_so() {
    let mesh = Mesh::start(MeshConfig::default()).await;
    let app = App::tcp(free_addr()).await.unwrap();
    let port = app.addr.port();
    let opaque = |name: &str| PodSpec {
        opaque_ports: vec![port],
        ..PodSpec::new(name, &[port]).policy("all-authenticated")
    };
    let store = mesh.pod(opaque("store"));
    store.ready().await;
    // `api` is said to answer where `store` does: an address that was reused.
    let manifest = reuse(&mesh, port, &store);
    let entrance = free_addr();
    let web = mesh.pod(PodSpec {
        listen_map: vec![(entrance, format!("api.demo.svc.cluster.local:{port}"))],
        ..PodSpec::new("web", &[])
    });
    web.ready().await;
    in_vain(entrance).await;
    web.proxy.logged(&["SFT-TLS-006", "sa/store", "sa/api"], DEADLINE).await;
    store.proxy.logged(&["SFT-TLS-010", "refused_by_peer"], DEADLINE).await;
    assert!(refusals(&web, "outbound", "wrong_identity").await >= 1.0);
    assert!(refusals(&store, "inbound", "refused_by_peer").await >= 1.0);
    assert_eq!(app.connections(), 0);

    // Mended: the manifest names who really answers there.
    std::fs::write(&manifest, reused("store", port, store.inbound.port())).unwrap();
    until("the mended manifest is in force", DEADLINE, || ping(entrance)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sidecars_of_foreign_authorities_both_say_so() {
    let ours = Mesh::start(MeshConfig::default()).await;
    let app = App::tcp(free_addr()).await.unwrap();
    let port = app.addr.port();
    let api = PodSpec {
        opaque_ports: vec![port],
        ..PodSpec::new("api", &[port]).policy("all-authenticated")
    };
    let api = ours.pod(api);
    api.ready().await;
    // Another mesh has the same names, and anchors of its own.
    let theirs = Mesh::start(MeshConfig::default()).await;
    let _manifest = reuse(&theirs, port, &api);
    let caller = |mesh: &Mesh| {
        let entrance = free_addr();
        let listen_map = vec![(entrance, format!("api.demo.svc.cluster.local:{port}"))];
        (entrance, mesh.pod(PodSpec { listen_map, ..PodSpec::new("web", &[]) }))
    };
    let (entrance, foreign) = caller(&theirs);
    foreign.ready().await;
    in_vain(entrance).await;
    foreign.proxy.logged(&["SFT-TLS-001", "unknown_issuer", "outbound"], DEADLINE).await;
    api.proxy.logged(&["SFT-TLS-010", "refused_by_peer", "inbound"], DEADLINE).await;
    assert!(refusals(&foreign, "outbound", "unknown_issuer").await >= 1.0);
    assert!(refusals(&api, "inbound", "refused_by_peer").await >= 1.0);
    assert_eq!(app.connections(), 0);

    // Mended: the same caller with the same anchors.
    let (entrance, web) = caller(&ours);
    web.ready().await;
    until("the caller of the same mesh gets through", DEADLINE, || ping(entrance)).await;
}

/// Tells a mesh that its `api` answers where this workload does.
fn reuse(mesh: &Mesh, port: u16, at: &Pod) -> PathBuf {
    let manifests = mesh.dir().join("manifests");
    let account = "{apiVersion: v1, kind: ServiceAccount, metadata: {name: api, namespace: demo}}";
    std::fs::write(manifests.join("account.yaml"), account).unwrap();
    let manifest = manifests.join("reused.yaml");
    std::fs::write(&manifest, reused("api", port, at.inbound.port())).unwrap();
    manifest
}

/// Nothing comes back for bytes that are sent here.
async fn in_vain(entrance: SocketAddr) {
    let mut stream = TcpStream::connect(entrance).await.unwrap();
    // A reset is as good an end as a close, also before all is written: what counts is that
    // nothing came back.
    let _ = stream.write_all(b"ping").await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.is_empty(), "{answer:?}");
}

/// The application answers bytes that are sent here.
async fn ping(entrance: SocketAddr) -> Result<(), String> {
    let mut stream = TcpStream::connect(entrance).await.map_err(|e| e.to_string())?;
    stream.write_all(b"ping").await.map_err(|e| e.to_string())?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await.map_err(|e| e.to_string())?;
    (&answer == b"ping").then_some(()).ok_or_else(|| format!("{answer:?}"))
}

/// A workload whose sidecar refuses, and one whose sidecar calls it.
struct Refused {
    web: Pod,
    api: Pod,
    http: App,
    tcp: App,
    /// Where `web` reaches the opaque port of `api`.
    entrance: SocketAddr,
    mesh: Mesh,
}

/// `spoil` is what is wrong with `api`.
async fn refused(spoil: impl FnOnce(PodSpec) -> PodSpec) -> Refused {
    let mesh = Mesh::start(MeshConfig::default()).await;
    let http = App::http(free_addr()).await.unwrap();
    let tcp = App::tcp(free_addr()).await.unwrap();
    let ports = [http.addr.port(), tcp.addr.port()];
    let good = PodSpec { opaque_ports: vec![ports[1]], ..PodSpec::new("api", &ports) };
    let api = mesh.pod(spoil(good.policy("all-authenticated")));
    let entrance = free_addr();
    let web = mesh.pod(PodSpec {
        listen_map: vec![(entrance, api.spec.authority(ports[1]))],
        ..PodSpec::new("web", &[])
    });
    api.ready().await;
    web.ready().await;
    Refused { web, api, http, tcp, entrance, mesh }
}

impl Refused {
    /// What `web` gets for a request to a service, to the end of the connection.
    async fn request(&self, service: &PodSpec) -> String {
        let host = service.authority(self.http.addr.port());
        let head = format!("GET /hello HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        let mut stream = TcpStream::connect(self.web.outbound).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        tokio::time::timeout(DEADLINE, read).await.expect("it closes").unwrap();
        answer
    }

    /// A request and a connection for bytes are refused with this code: the request with an answer
    /// that says so, and both sidecars log and count each. The application sees nothing.
    async fn says_so_on_both_sides(&self, code: &str, label: &str) {
        let answer = self.request(&self.api.spec).await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
        assert!(answer.contains(&format!("l5d-proxy-error: {code} {label}")), "{answer}");
        self.api.proxy.logged(&[code, label, "inbound"], DEADLINE).await;
        self.web.proxy.logged(&[code, label, "outbound"], DEADLINE).await;
        assert_eq!(refusals(&self.api, "inbound", label).await, 1.0);
        assert_eq!(refusals(&self.web, "outbound", label).await, 1.0);
        let denied = self.api.metrics().await.sum("inbound_http_authz_deny_total", &[]);
        assert_eq!(denied, 1.0);

        let mut stream = TcpStream::connect(self.entrance).await.unwrap();
        // The sidecar may break off before all is written: what comes back is what counts.
        let _ = stream.write_all(b"ping").await;
        let mut answer = Vec::new();
        let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.unwrap();
        assert!(read.is_err() && answer.is_empty(), "a refusal looks like an end: {answer:?}");
        self.web.proxy.logged(&["SFT-NET-011", "peer_closed", "outbound"], DEADLINE).await;
        assert_eq!(refusals(&self.web, "outbound", "peer_closed").await, 1.0);
        assert_eq!(refusals(&self.api, "inbound", label).await, 2.0);
        assert_eq!((self.http.connections(), self.tcp.connections()), (0, 0));

        // The same caller reaches the same application where nothing is wrong with its sidecar.
        let store = self.mesh.pod(PodSpec::new("store", &[self.http.addr.port()]));
        store.ready().await;
        let answer = self.request(&store.spec).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_the_policy_keeps_out_is_told_and_both_sidecars_say_so() {
    let refused = refused(|api| api.policy("deny")).await;
    refused.says_so_on_both_sides("SFT-NET-004", "policy_denied").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_wants_an_undeclared_port_is_told_and_both_sidecars_say_so() {
    let other = ("LINKERD2_PROXY_INBOUND_PORTS".to_owned(), "1".to_owned());
    let refused = refused(|api| PodSpec { env: vec![other], ..api }).await;
    refused.says_so_on_both_sides("SFT-NET-002", "port_undeclared").await;
}

/// How often the sidecar has counted this reason: a handshake's refusals and the policy's have a
/// series each.
async fn refusals(pod: &Pod, direction: &str, reason: &str) -> f64 {
    let labels = [("direction", direction), ("reason", reason)];
    let metrics = pod.metrics().await;
    let names = ["steadfast_handshake_refusals_total", "steadfast_connection_refusals_total"];
    names.iter().map(|name| metrics.sum(name, &labels)).fold(0.0, f64::max)
}

/// A service without a mesh, at this address.
fn unmeshed(name: &str, at: SocketAddr) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\n\
         spec:\n  ports:\n  - {{name: p, port: {port}, targetPort: {port}}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}-1, namespace: demo, labels: {{kubernetes.io/service-name: {name}}}}}\n\
         addressType: IPv4\nports: [{{name: p, port: {port}, protocol: TCP}}]\n\
         endpoints: [{{addresses: [\"{ip}\"], conditions: {{ready: true}}}}]\n",
        ip = at.ip(),
        port = at.port(),
    )
}

/// Service `api`, whose one pod is said to run as `account` behind this inbound port.
fn reused(account: &str, port: u16, inbound: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: reused-0\n  namespace: demo\n\
         \x20 labels: {{app: reused}}\n  annotations:\n    linkerd.io/inject: enabled\n\
         \x20   config.linkerd.io/inbound-port: \"{inbound}\"\n\
         spec:\n  serviceAccountName: {account}\n  containers: [{{name: app, image: none}}]\n\
         status: {{podIP: 127.0.0.1, podIPs: [{{ip: 127.0.0.1}}]}}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata:\n  name: api\n  namespace: demo\n\
         \x20 annotations: {{config.linkerd.io/opaque-ports: \"{port}\"}}\n\
         spec:\n  selector: {{app: reused}}\n  ports: [{{name: p, port: {port}, targetPort: {port}}}]\n"
    )
}
