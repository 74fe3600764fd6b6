//! An identity service in this process, on a real socket, that does what a test wants.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use prometheus_client::registry::Registry;
use rcgen::PublicKeyData;
use steadfast_api::trust::v1::stream_response::Message;
use steadfast_api::trust::v1::{
    Bundle, CertifyRequest, CertifyResponse, StreamRequest, StreamResponse, stream_request,
};
use steadfast_api::{DnsIdentity, UnixTime};
use steadfast_api_grpc::stream::{ALPN, Wire, framed};
use steadfast_api_grpc::trust_server::{Trust as TrustService, TrustServer};
use steadfast_identity_client::{
    ClientAuth, Contexts, Incoming, Issued, OwnSvid, Refusals, SvidKey, Vouched, incoming,
};
use steadfast_process::{Clock, Drain, SystemClock};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tonic::{Request, Response, Status};
use x509_parser::prelude::{FromDer as _, X509CertificationRequest};

use super::{Authority, HOUR, Leaf, name, trust};

/// What the service does when asked for an SVID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// Never answers.
    Hang,
    /// Issues.
    Issue { seq: u64 },
    /// Issues under the next anchor.
    IssueUnderNext { seq: u64 },
    /// Issues for another identity.
    OtherIdentity,
    /// Issues for another key.
    OtherKey,
    /// Refuses.
    Refuse,
}

/// A certificate authority of the present.
pub(crate) struct World {
    pub(crate) anchor: Authority,
    pub(crate) issuer: Authority,
    /// The anchor that a rotation brings, and an issuer under it.
    pub(crate) next_anchor: Authority,
    next_issuer: Authority,
}

/// The service, as a test holds it.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) address: SocketAddr,
    pub(crate) behaviour: watch::Sender<Behaviour>,
    pub(crate) asked: Arc<AtomicUsize>,
    /// Everything that came on trust streams, in its order.
    pub(crate) heard: watch::Sender<Vec<StreamRequest>>,
    bundle: watch::Sender<Bundle>,
    streams: Arc<Mutex<Vec<Outgoing>>>,
    world: Arc<World>,
    life: Duration,
    drain: Drain,
}

/// What is sent on one trust stream.
type Outgoing = mpsc::Sender<StreamResponse>;

impl World {
    pub(crate) fn new() -> Arc<Self> {
        let now = SystemClock.now();
        let anchor = Authority::anchor_valid("anchor", now - HOUR * 24, now + HOUR * 1000);
        let issuer = anchor.issuer_valid("issuer", now - HOUR, now + HOUR * 100);
        let next_anchor = Authority::anchor_valid("next", now - HOUR * 24, now + HOUR * 1000);
        let next_issuer = next_anchor.issuer_valid("next", now - HOUR, now + HOUR * 100);
        Arc::new(Self { anchor, issuer, next_anchor, next_issuer })
    }

    fn leaf(&self, name: &DnsIdentity, now: UnixTime, life: Duration) -> Leaf {
        let (not_before, not_after) = (now - Duration::from_secs(300), now + life);
        Leaf { not_before, not_after, ..Leaf::of(name) }
    }
}

impl Service {
    /// Starts one on a port of its own. It ends with the test's runtime.
    pub(crate) async fn start(world: &Arc<World>, life: Duration) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self::start_on(listener, world, life)
    }

    /// Starts one that answers requests and knows no trust stream.
    pub(crate) fn start_without_streams(world: &Arc<World>, life: Duration) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Self::start_with(listener, world, life, &[b"h2"])
    }

    pub(crate) fn start_on(
        listener: std::net::TcpListener,
        world: &Arc<World>,
        life: Duration,
    ) -> Self {
        Self::start_with(listener, world, life, &[ALPN, b"h2"])
    }

    fn start_with(
        listener: std::net::TcpListener,
        world: &Arc<World>,
        life: Duration,
        alpns: &'static [&'static [u8]],
    ) -> Self {
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let service = Self {
            address: listener.local_addr().unwrap(),
            behaviour: watch::Sender::new(Behaviour::Issue { seq: 1 }),
            asked: Arc::default(),
            heard: watch::Sender::default(),
            bundle: watch::Sender::new(wire_bundle(1, &[&world.anchor])),
            streams: Arc::default(),
            world: world.clone(),
            life,
            drain: Drain::new(),
        };
        service.serve(listener, alpns);
        service
    }

    fn serve(&self, listener: TcpListener, alpns: &'static [&'static [u8]]) {
        let world = &self.world;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let contexts = Contexts::new(clock.clone());
        let (key, id) = (SvidKey::generate().unwrap(), service_name().spiffe_id());
        let now = SystemClock.now();
        let leaf = world.leaf(&service_name(), now, HOUR);
        let issued = Issued { chain: world.issuer.sign(&leaf, &key), issued_at: now };
        let believes = trust(&[&world.anchor]);
        let svid = OwnSvid::check(issued, key, &id, &believes, now).unwrap();
        contexts.publish(Some(Arc::new(svid)), believes).unwrap();
        let connections = incoming(Incoming {
            listener,
            contexts: contexts.subscribe(),
            client_auth: ClientAuth::None,
            alpns,
            refusals: Refusals::new(&mut Registry::default(), clock),
            drain: self.drain.clone(),
        });
        let server =
            tonic::transport::Server::builder().add_service(TrustServer::new(self.clone()));
        let service = self.clone();
        // Trust streams are taken out; what is left speaks gRPC.
        let connections = Box::pin(connections).filter_map(move |io| {
            let io = match io {
                Ok(io) if io.tls().alpn() == Some(ALPN) => {
                    #[expect(clippy::disallowed_methods, reason = "it ends with its stream")]
                    tokio::spawn(service.clone().stream(io));
                    None
                }
                io => Some(io),
            };
            std::future::ready(io)
        });
        let drain = self.drain.clone();
        let serving = async move {
            let _contexts = contexts;
            tokio::select! {
                served = server.serve_with_incoming(connections) => served.unwrap(),
                () = drain.wait() => {}
            }
        };
        #[expect(clippy::disallowed_methods, reason = "it ends with the runtime of its test")]
        tokio::spawn(serving);
    }

    /// Breaks every connection and takes no more.
    pub(crate) fn stop(&self) {
        self.drain.start();
        self.streams.lock().unwrap().clear();
    }

    /// Sends a bundle to every stream, and to those that come.
    pub(crate) fn publish(&self, bundle: Bundle) {
        self.bundle.send_replace(bundle.clone());
        self.send(Message::Bundle(bundle));
    }

    /// Sends a message to every stream.
    pub(crate) fn send(&self, message: Message) {
        for stream in self.streams.lock().unwrap().iter() {
            let _ = stream.try_send(response(message.clone()));
        }
    }

    fn issue(&self, request: &CertifyRequest, seq: u64, name: &DnsIdentity) -> CertifyResponse {
        let now = SystemClock.now();
        let leaf = self.world.leaf(name, now, self.life);
        let chain = match *self.behaviour.borrow() {
            Behaviour::OtherKey => self.world.issuer.sign(&leaf, &SvidKey::generate().unwrap()),
            Behaviour::IssueUnderNext { .. } => {
                self.world.next_issuer.sign(&leaf, &PublicKey::of_request(&request.csr))
            }
            _ => self.world.issuer.sign(&leaf, &PublicKey::of_request(&request.csr)),
        };
        CertifyResponse {
            chain,
            issued_at: Some(now.into()),
            not_after: Some(leaf.not_after.into()),
            renew_at: None,
            server_time: Some(now.into()),
            seq,
        }
    }
}

#[tonic::async_trait]
impl TrustService for Service {
    async fn certify(
        &self,
        request: Request<CertifyRequest>,
    ) -> Result<Response<CertifyResponse>, Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let request = request.into_inner();
        let behaviour = self.behaviour.borrow().clone();
        match behaviour {
            Behaviour::Hang => std::future::pending().await,
            Behaviour::Issue { seq } | Behaviour::IssueUnderNext { seq } => {
                Ok(Response::new(self.issue(&request, seq, &name("web"))))
            }
            Behaviour::OtherIdentity => Ok(Response::new(self.issue(&request, 1, &name("other")))),
            Behaviour::OtherKey => Ok(Response::new(self.issue(&request, 1, &name("web")))),
            Behaviour::Refuse => Err(Status::unavailable("SFT-ID-021: not now")),
        }
    }
}

impl Service {
    async fn stream(self, io: Vouched<TcpStream>) {
        let mut wire = Wire::new(io, 1 << 20);
        let (sender, mut receiver) = mpsc::channel(16);
        let bundle = self.bundle.borrow().clone();
        sender.try_send(response(Message::Bundle(bundle))).unwrap();
        let mut sender = Some(sender);
        loop {
            tokio::select! {
                heard = wire.next() => {
                    let Ok(Some(heard)) = heard else { return };
                    self.heard.send_modify(|all| all.push(heard));
                    // What is sent begins after the hello.
                    self.streams.lock().unwrap().extend(sender.take());
                }
                response = receiver.recv(), if sender.is_none() => {
                    let Some(response) = response else { return };
                    if wire.send(&framed(&response, &[])).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

pub(crate) fn service_name() -> DnsIdentity {
    name("steadfast-identity")
}

pub(crate) fn wire_bundle(seq: u64, anchors: &[&Authority]) -> Bundle {
    Bundle {
        trust_domain: "cluster.local".to_owned(),
        seq,
        anchors: anchors.iter().map(|anchor| anchor.der.clone()).collect(),
        denied_issuers: Vec::new(),
        tombstones: Vec::new(),
    }
}

/// How many of what was heard are hellos: each begins a stream.
pub(crate) fn hellos(heard: &[StreamRequest]) -> usize {
    let is_hello = |request: &&StreamRequest| {
        matches!(request.message, Some(stream_request::Message::Hello(_)))
    };
    heard.iter().filter(is_hello).count()
}

/// The acks among what was heard.
pub(crate) fn acks(heard: &[StreamRequest]) -> Vec<steadfast_api::trust::v1::Ack> {
    let acks = heard.iter().filter_map(|request| match &request.message {
        Some(stream_request::Message::Ack(ack)) => Some(ack.clone()),
        _ => None,
    });
    acks.collect()
}

fn response(message: Message) -> StreamResponse {
    StreamResponse { server_time: Some(SystemClock.now().into()), message: Some(message) }
}

/// The P-256 key of a certificate request.
struct PublicKey(Vec<u8>);

impl PublicKey {
    fn of_request(csr: &[u8]) -> Self {
        let (_, request) = X509CertificationRequest::from_der(csr).unwrap();
        let spki = request.certification_request_info.subject_pki;
        Self(spki.subject_public_key.data.to_vec())
    }
}

impl PublicKeyData for PublicKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}
