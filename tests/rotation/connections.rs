//! Promise: open connections obey a changed trust bundle. An anchor that nobody stands on goes
//! unnoticed; one that a peer stands on ends its requests in good order and its bytes at a
//! deadline; a denied issuer cuts what stands on it at once, and nothing else.

use std::time::Duration;

use bytes::Bytes;
use futures::SinkExt as _;
use futures::channel::mpsc;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use steadfast_api::KeyId;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, AnchorState, DeniedIssuer};
use steadfast_test_rig::app::App;
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::peer::{Leaf, Peer, Session, TestIssuer, dns_identity};
use steadfast_test_rig::process::free_addr;
use steadfast_test_rig::{Load, Mesh, MeshConfig, Pod, PodSpec, until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

const DEADLINE: Duration = Duration::from_secs(60);
/// From a withdrawal to the cut: long enough for a slow machine to look in between.
const WITHDRAWN_TCP_DEADLINE: Duration = Duration::from_secs(6);

/// Two sidecars, and an application of each kind behind the second.
struct Pair {
    web: Pod,
    api: Pod,
    http: App,
    tcp: App,
    /// Where web's application reaches `tcp`.
    entrance: std::net::SocketAddr,
    // Last, so that the logs are there while the others end.
    mesh: Mesh,
}

async fn pair(config: MeshConfig) -> Pair {
    let mesh = Mesh::start(config).await;
    let http = App::http(free_addr()).await.unwrap();
    let tcp = App::tcp(free_addr()).await.unwrap();
    let (ports, entrance) = ([http.addr.port(), tcp.addr.port()], free_addr());
    let deadline = format!("{}s", WITHDRAWN_TCP_DEADLINE.as_secs());
    let env = vec![("STEADFAST_PROXY_WITHDRAWN_TCP_DEADLINE".to_owned(), deadline)];
    let api = mesh.pod(PodSpec {
        opaque_ports: vec![ports[1]],
        env: env.clone(),
        ..PodSpec::new("api", &ports).policy("all-authenticated")
    });
    let web = mesh.pod(PodSpec {
        listen_map: vec![(entrance, api.spec.authority(ports[1]))],
        env,
        ..PodSpec::new("web", &[])
    });
    api.ready().await;
    web.ready().await;
    Pair { web, api, http, tcp, entrance, mesh }
}

impl Pair {
    /// A peer of api's with an SVID of this issuer.
    fn peer(&self, issuer: &TestIssuer, port: u16) -> Peer {
        issuer.peer(&Leaf::of("ops"), self.api.inbound, &dns_identity("api"), port)
    }

    async fn opaque_peer(&self, issuer: &TestIssuer) -> TlsStream<TcpStream> {
        let peer = self.peer(issuer, self.tcp.addr.port());
        let mut stream = peer.open(Session::Opaque).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        stream.read_exact(&mut [0; 4]).await.unwrap();
        stream
    }

    /// The same through CONNECT.
    async fn tunnel(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.web.outbound).await.unwrap();
        let authority = self.api.spec.authority(self.tcp.addr.port());
        let ask = format!("CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n\r\n");
        stream.write_all(ask.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
        echo(&mut stream).await;
        stream
    }

    /// Bytes between the applications of web and api.
    async fn opaque(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.entrance).await.unwrap();
        echo(&mut stream).await;
        stream
    }

    fn load(&self, http2: bool, duration: Duration) -> Load {
        Load {
            to: self.web.outbound,
            authority: self.api.spec.authority(self.http.addr.port()),
            http2,
            connections: 4,
            rate: 60,
            duration_ms: duration.as_millis() as u64,
        }
    }

    /// Waits until both sidecars use the bundle of this sequence number.
    async fn installed(&self, state: &TrustDomainState) {
        for pod in [&self.web, &self.api] {
            let what = format!("{} uses the bundle {}", pod.spec.name, state.seq);
            until(&what, DEADLINE, || async {
                let seq = pod.metrics().await.sum("steadfast_bundle_seq", &[]);
                (seq == state.seq as f64).then_some(()).ok_or_else(|| format!("it uses {seq}"))
            })
            .await;
        }
    }
}

async fn echo(stream: &mut TcpStream) {
    let mut echo = [0; 4];
    stream.write_all(b"ping").await.unwrap();
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"ping");
}

/// A request of HTTP/2 whose body is still being sent, and the connection under it.
struct InFlight {
    sender: SendRequest<Upload>,
    connection: JoinSet<hyper::Result<()>>,
    parts: mpsc::Sender<Part>,
    answer: Incoming,
}

type Part = Result<Frame<Bytes>, std::io::Error>;
type Upload = StreamBody<mpsc::Receiver<Part>>;

/// A request whose body comes back.
fn upload(parts: mpsc::Receiver<Part>) -> Request<Upload> {
    Request::post("http://api.demo/echo").body(StreamBody::new(parts)).unwrap()
}

impl InFlight {
    async fn begin(peer: &Peer) -> Self {
        let stream = TokioIo::new(peer.open(Session::Http2).await.unwrap());
        let shaken = http2::handshake::<_, _, Upload>(TokioExecutor::new(), stream).await;
        let (mut sender, connection) = shaken.unwrap();
        let connection = JoinSet::from_iter([connection]);
        let (parts, body) = mpsc::channel(4);
        let response = sender.send_request(upload(body)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let mut in_flight = Self { sender, connection, parts, answer: response.into_body() };
        in_flight.send("before").await;
        let frame = in_flight.answer.frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "before");
        in_flight
    }

    /// Sends a part of the body.
    async fn send(&mut self, part: &'static str) {
        let frame = Frame::data(Bytes::from_static(part.as_bytes()));
        self.parts.send(Ok(frame)).await.unwrap();
    }
}

fn standby(state: &TrustDomainState) -> AnchorRecord {
    state.in_state(AnchorState::Standby).next().expect("a standby").clone()
}

/// Takes an anchor out of the bundle for ever.
fn withdraw(state: &mut TrustDomainState, id: KeyId) {
    let anchor = state.anchors.iter_mut().find(|anchor| anchor.id == id);
    anchor.expect("the anchor").state = AnchorState::Withdrawn;
    state.tombstones.push(id);
    state.seq += 1;
}

fn deny(state: &mut TrustDomainState, id: KeyId) {
    let until = state.active_issuer().expect("an issuer").not_after;
    state.denied_issuers.push(DeniedIssuer { id, until });
    state.seq += 1;
}

async fn refusals(pod: &Pod, reason: &str) -> f64 {
    let labels = [("reason", reason)];
    pod.metrics().await.sum("steadfast_connection_refusals_total", &labels)
}

async fn withdrawn(pod: &Pod) -> f64 {
    pod.metrics().await.sum("tcp_withdrawn_anchor_connections", &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_anchor_that_nobody_stands_on_is_withdrawn_and_nothing_notices() {
    let pair = pair(MeshConfig::default()).await;
    let mut opaque = pair.opaque().await;
    let withdrawing = async {
        until("the load has begun", DEADLINE, || async {
            (pair.http.requests() > 60).then_some(()).ok_or_else(|| "no requests".to_owned())
        })
        .await;
        let standby = standby(&pair.mesh.trust_domain().await.0);
        let state = pair.mesh.change_trust(|state| withdraw(state, standby.id)).await;
        pair.installed(&state).await;
        pair.http.requests()
    };
    let (http1, http2) = (pair.load(false, LOAD), pair.load(true, LOAD));
    let (http1, http2, at_withdrawal) = tokio::join!(http1.run(), http2.run(), withdrawing);
    for report in [&http1, &http2] {
        assert_eq!(report.failed, 0, "{report:#?}");
    }
    assert!(pair.http.requests() > at_withdrawal, "the load went on after it");
    echo(&mut opaque).await;
    for pod in [&pair.web, &pair.api] {
        assert_eq!(withdrawn(pod).await, 0.0);
        assert!(!pod.proxy.log().contains("withdrawn"), "{}", pod.proxy.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_issuer_cuts_open_connections_at_once_and_no_others() {
    let pair = pair(MeshConfig::default()).await;
    let (state, _) = pair.mesh.trust_domain().await;
    let (stolen, record) =
        TestIssuer::under_anchor(pair.mesh.dir(), state.active_anchor().unwrap());
    let mut in_flight = InFlight::begin(&pair.peer(&stolen, pair.http.addr.port())).await;
    let mut bytes = pair.opaque_peer(&stolen).await;
    let mut others = pair.opaque().await;

    pair.mesh.change_trust(|state| deny(state, record.id)).await;
    let cut = timeout(DEADLINE, bytes.read_u8()).await.expect("it is cut");
    assert!(cut.is_err(), "{cut:?}");
    let frame = timeout(DEADLINE, in_flight.answer.frame()).await.expect("it is cut");
    assert!(!matches!(frame, Some(Ok(_))), "{frame:?}");
    let ops = "spiffe://cluster.local/ns/demo/sa/ops";
    let texts = ["SFT-TLS-009", "issuer_denied", ops, &pair.api.spec.spiffe_id()];
    pair.api.proxy.logged(&texts, DEADLINE).await;
    assert_eq!(refusals(&pair.api, "issuer_denied").await, 2.0);
    // Nobody comes in with it again, and everybody else goes on.
    let again = pair.peer(&stolen, pair.tcp.addr.port()).connect().await;
    assert!(again.starts_with("refused"), "{again}");
    echo(&mut others).await;
    assert_eq!(refusals(&pair.web, "issuer_denied").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_withdrawn_anchor_ends_requests_in_good_order_and_bytes_at_the_deadline() {
    let pair = pair(MeshConfig::default()).await;
    let standby = standby(&pair.mesh.trust_domain().await.0);
    let (issuer, _) = TestIssuer::under_anchor(pair.mesh.dir(), &standby);
    let mut in_flight = InFlight::begin(&pair.peer(&issuer, pair.http.addr.port())).await;
    let mut bytes = pair.opaque_peer(&issuer).await;
    let mut others = pair.opaque().await;

    pair.mesh.change_trust(|state| withdraw(state, standby.id)).await;
    until("the bytes are counted", DEADLINE, || async {
        match withdrawn(&pair.api).await {
            1.0 => Ok(()),
            other => Err(format!("{other} connections")),
        }
    })
    .await;
    bytes.write_all(b"more").await.unwrap();
    bytes.read_exact(&mut [0; 4]).await.expect("the deadline has not come");
    let ops = "spiffe://cluster.local/ns/demo/sa/ops";
    let named = ["SFT-TLS-013", ops, &pair.api.spec.spiffe_id(), "deadline"];
    pair.api.proxy.logged(&named, DEADLINE).await;

    // GOAWAY: no further request is taken, and the one that runs goes on to its end.
    until("the client was told to go", DEADLINE, || {
        let mut sender = in_flight.sender.clone();
        async move {
            match sender.send_request(upload(mpsc::channel(1).1)).await {
                Ok(response) => Err(format!("a request was taken: {}", response.status())),
                Err(_) => Ok(()),
            }
        }
    })
    .await;
    in_flight.send("after").await;
    drop(in_flight.parts);
    let rest = timeout(DEADLINE, in_flight.answer.collect()).await.expect("it ends");
    assert_eq!(rest.expect("no request fails").to_bytes(), "after");
    let ended = timeout(DEADLINE, in_flight.connection.join_next()).await.expect("it ends");
    ended.unwrap().unwrap().expect("in good order");

    let cut = timeout(DEADLINE, bytes.read_u8()).await.expect("it is cut");
    assert!(cut.is_err(), "{cut:?}");
    until("the cut is told and nothing counted any more", DEADLINE, || async {
        match (refusals(&pair.api, "anchor_withdrawn").await, withdrawn(&pair.api).await) {
            (1.0, 0.0) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    echo(&mut others).await;
    assert_eq!(withdrawn(&pair.web).await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_cuts_what_its_own_denied_svid_made_and_requests_go_on_anew() {
    let pair =
        pair(MeshConfig { svid_ttl: Duration::from_secs(10), ..MeshConfig::default() }).await;
    let mut opaque = pair.opaque().await;
    let mut tunnel = pair.tunnel().await;
    // The issuer changes hands first, as ROTATION's emergency does it: nobody is left without.
    let (state, _) = pair.mesh.trust_domain().await;
    let (old, anchor) = (state.active_issuer, state.active_anchor().unwrap().clone());
    let (_, record) = TestIssuer::under_anchor(pair.mesh.dir(), &anchor);
    let fresh = record.id;
    pair.mesh
        .change_trust(|state| {
            state.active_issuer = fresh;
            state.issuers.push(record);
        })
        .await;
    let fresh = fresh.to_string();
    for pod in [&pair.web, &pair.api] {
        until("its SVID is of the new issuer", DEADLINE, || async {
            let (_, text) = get(pod.admin, "/identity.json").await?;
            text.contains(&fresh).then_some(()).ok_or(text)
        })
        .await;
    }
    echo(&mut opaque).await;

    let load = pair.load(true, LOAD);
    let denying = async {
        until("the load has begun", DEADLINE, || async {
            (pair.http.requests() > 60).then_some(()).ok_or_else(|| "no requests".to_owned())
        })
        .await;
        pair.mesh.change_trust(|state| deny(state, old)).await;
        for stream in [&mut opaque, &mut tunnel] {
            let cut = timeout(DEADLINE, stream.read_u8()).await.expect("it is cut");
            assert!(cut.is_err(), "{cut:?}");
        }
    };
    let (report, ()) = tokio::join!(load.run(), denying);
    assert_eq!(report.failed, 0, "{report:#?}");
    let mut cut = 0.0;
    for pod in [&pair.web, &pair.api] {
        cut += refusals(pod, "issuer_denied").await + refusals(pod, "own_issuer_denied").await;
    }
    // Whichever sidecar is quicker cuts; both may, each on its side.
    assert!((2.0..=4.0).contains(&cut), "{cut} connections were cut");
}

/// Long enough for a withdrawal to be installed in the middle of it.
const LOAD: Duration = Duration::from_secs(12);
