//! The sixth stage: an endpoint becomes a connection to the one workload that may answer there.
//!
//! A meshed endpoint is reached by mutual TLS only, and its SVID must show the SPIFFE ID that
//! discovery named; an endpoint without an identity is dialled in plaintext. Connections are
//! pooled by worker: those of HTTP/2 that requests share, and idle ones of HTTP/1.

mod pool;
mod shared;
mod tunnel;

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::LocalBoxFuture;
use steadfast_api::{Code, UnixTime};
use steadfast_identity_client::{LateRefusal, VerifiedPeer};
use steadfast_process::Clock;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::accept;
use crate::config::Mode;
use crate::discovery::Endpoint;
use crate::http::{Body, SendErrorKind};
use crate::identity::{Tls, expires_at, retire_at};
use crate::io::{BoxIo, Counted};
use crate::lifetime::Bounds;
use crate::metrics::{Direction, Labels, Metrics};
use crate::refusal::{Refusal, Reporter};
use crate::standing;
use crate::transport::{self, Header, Session};
use crate::worker::Shared;
pub use tunnel::tunnel;

/// Opens connections; a test brings its own.
pub trait Dial {
    /// Opens one.
    fn dial(&self, addr: SocketAddr, what: Listener) -> LocalBoxFuture<'_, Result<BoxIo, Refusal>>;
}

/// What listens where a connection is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// The inbound port of a workload's proxy, by mutual TLS with a transport header. It may be
    /// our own, as a workload may call its own Service: the header names the application's port,
    /// and one that names a listener of ours is refused there.
    Proxy,
    /// Whatever listens there.
    Server,
}

/// Opens TCP connections, but none that would lead back into the proxy itself.
#[derive(Debug)]
pub struct TcpDial {
    own: Vec<SocketAddr>,
    inbound: SocketAddr,
}

/// Makes connections for one worker, and keeps those that can be used again.
pub struct Connect {
    mode: Mode,
    tls: Tls,
    clock: Arc<dyn Clock>,
    dial: Rc<dyn Dial>,
    http: crate::http::Worker,
    metrics: Metrics,
    reporter: Rc<Reporter>,
    pool: pool::Pool,
}

/// A connection to a server.
pub struct Server {
    /// What is read and written.
    pub io: BoxIo,
    /// Who answered; `None` in plaintext.
    pub peer: Option<Arc<VerifiedPeer>>,
    /// Holds the peer's refusal of us, if it comes with a later read.
    pub late: Option<LateRefusal>,
    /// The generation of the TLS snapshot that it was made with.
    pub generation: u64,
    /// From then on nothing new is begun on it.
    pub retire_at: Option<UnixTime>,
    /// What bounds it, if it was made with an SVID.
    pub bounds: Bounds,
}

/// Why a request got no response.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// There was no connection; already counted and logged.
    #[error("no connection")]
    Connect(#[source] Rc<Refusal>),
    /// The request failed on its connection.
    #[error("the request failed")]
    Send(#[source] SendErrorKind),
}

/// A failed request, with the request if not a byte of its body was taken.
pub struct Unanswered {
    /// Why.
    pub failed: Failed,
    /// The request.
    pub request: Option<Box<http::Request<Body>>>,
}

impl TcpDial {
    /// For a proxy that listens on these addresses, for its peers on the second.
    pub fn new(own: Vec<SocketAddr>, inbound: SocketAddr) -> Self {
        Self { own, inbound }
    }

    async fn open(&self, addr: SocketAddr) -> Result<TcpStream, Refusal> {
        let unreachable = |source| Refusal::Unreachable { addr, source };
        let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let connecting = socket.map_err(unreachable)?.connect(addr);
        let stream = match timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(connected) => connected.map_err(unreachable)?,
            Err(_) => return Err(unreachable(io::ErrorKind::TimedOut.into())),
        };
        accept::set_options(&stream).map_err(unreachable)?;
        Ok(stream)
    }

    /// Whether an address is one of the proxy's own listeners. One that listens on every address
    /// has all those of this machine, which only a connection tells.
    fn leads_back(&self, addr: SocketAddr, what: Listener, stream: Option<&TcpStream>) -> bool {
        let of_this_machine = || {
            let local = stream.and_then(|stream| stream.local_addr().ok());
            local.is_some_and(|local| local.ip().to_canonical() == addr.ip().to_canonical())
        };
        let closed = |own: &&SocketAddr| what == Listener::Server || **own != self.inbound;
        self.own.iter().filter(closed).any(|own| {
            own.port() == addr.port()
                && (own.ip() == addr.ip() || (own.ip().is_unspecified() && of_this_machine()))
        })
    }
}

impl Dial for TcpDial {
    fn dial(&self, addr: SocketAddr, what: Listener) -> LocalBoxFuture<'_, Result<BoxIo, Refusal>> {
        async move {
            if self.leads_back(addr, what, None) {
                return Err(Refusal::Loop(addr));
            }
            let stream = self.open(addr).await?;
            if self.leads_back(addr, what, Some(&stream)) {
                return Err(Refusal::Loop(addr));
            }
            Ok(Box::new(stream) as BoxIo)
        }
        .boxed_local()
    }
}

impl Connect {
    /// For one worker.
    pub fn new(
        shared: &Shared,
        tls: Tls,
        dial: Rc<dyn Dial>,
        http: crate::http::Worker,
        reporter: Rc<Reporter>,
    ) -> Self {
        Self {
            mode: shared.config.mode,
            tls,
            clock: shared.clock.clone(),
            dial,
            http,
            metrics: shared.metrics.clone(),
            reporter,
            pool: pool::Pool::default(),
        }
    }

    /// A connection in plaintext, counted under these labels.
    ///
    /// # Errors
    /// [`Refusal::Unreachable`], [`Refusal::Loop`].
    pub async fn plaintext(&self, addr: SocketAddr, labels: Labels) -> Result<Server, Refusal> {
        let io = self.dial.dial(addr, Listener::Server).await?;
        let io = Box::new(Counted::new(io, self.metrics.tcp(labels)));
        let generation = 0;
        let bounds = Bounds::default();
        Ok(Server { io, peer: None, late: None, generation, retire_at: None, bounds })
    }

    /// A connection to an endpoint: by mutual TLS if it is meshed, else in plaintext.
    ///
    /// # Errors
    /// It cannot be reached, or is not who it should be.
    pub async fn endpoint(
        &self,
        endpoint: &Endpoint,
        session: Session,
        labels: Labels,
    ) -> Result<Server, Refusal> {
        let Some(expected) = &endpoint.identity else {
            return self.plaintext(endpoint.addr, labels).await;
        };
        let context = self.tls.now();
        let (addr, header) = self.way_to(endpoint, session, context.id() == Some(&expected.id))?;
        let what = if header.is_some() { Listener::Proxy } else { Listener::Server };
        let io = self.dial.dial(addr, what).await?;
        let alpn = header.as_ref().map(|_| transport::ALPN);
        let (mut stream, peer) = context.connect(io, expected, alpn).await?;
        let late = stream.late_refusal();
        if let Some(header) = header {
            let written = async {
                stream.write_all(&header.encode()).await?;
                stream.flush().await
            };
            written.await.map_err(|error| refused_late(&late, addr, error))?;
        }
        let place = (Direction::Outbound, addr);
        let (stream, stand) =
            self.tls.hold(&context, Some(peer.clone()), place, Box::new(stream))?;
        let expires_at = expires_at(&context, Some(&peer));
        Ok(Server {
            generation: context.generation,
            retire_at: retire_at(&context, Some(&peer), self.clock.now()),
            bounds: Bounds { expires_at, stand: Some(stand) },
            io: Box::new(Counted::new(stream, self.metrics.tcp(labels))),
            peer: Some(peer),
            late: Some(late),
        })
    }

    /// Counts and logs the refusal that the end of a connection to a server means, if it means
    /// one: the connection broke, after the server `spoke` or before.
    pub fn report_broken(
        &self,
        addr: SocketAddr,
        late: Option<&LateRefusal>,
        spoke: bool,
        error: &io::Error,
    ) {
        if standing::is_cut(error) {
            return;
        }
        let source = error.kind().into();
        let refusal = match late {
            Some(late) if !spoke || late.get().is_some() => refused_late(late, addr, source),
            None if !spoke => Refusal::Closed { addr, source },
            Some(_) | None => return,
        };
        self.report(Direction::Outbound, addr, &refusal);
    }

    /// Where a meshed endpoint is dialled, and the header that says what for. In transparent mode
    /// HTTP goes to the workload's own address, where its proxy takes it in place; but not to one
    /// of `own` name: that may be this very workload, and no rule redirects what its proxy sends.
    fn way_to(
        &self,
        endpoint: &Endpoint,
        session: Session,
        own: bool,
    ) -> Result<(SocketAddr, Option<Header>), Refusal> {
        let in_place = self.mode == Mode::Transparent && session != Session::Opaque && !own;
        match endpoint.inbound_port {
            Some(port) if !in_place => {
                let header = Header { port: endpoint.addr.port(), protocol: session };
                Ok((SocketAddr::new(endpoint.addr.ip(), port), Some(header)))
            }
            None if self.mode == Mode::Explicit => Err(Refusal::Unknown {
                code: Code::NO_ENDPOINTS,
                target: endpoint.addr.to_string(),
                detail: "it is meshed, but the control plane names no port of its proxy".to_owned(),
            }),
            _ => Ok((endpoint.addr, None)),
        }
    }
}

/// The refusal that an error means on a connection to a peer that has not sent a byte yet.
fn refused_late(late: &LateRefusal, addr: SocketAddr, error: io::Error) -> Refusal {
    match late.get() {
        Some(refusal) => Refusal::Tls(refusal.clone()),
        None => Refusal::Closed { addr, source: error },
    }
}

/// Linkerd's for outbound connections.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;
    use crate::discovery::ProtocolHint;
    use crate::fakes::{World, on_worker};

    const ENTRANCES: [Ipv4Addr; 2] = [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED];

    /// A listener that stands for one of the proxy's own.
    async fn listener() -> (tokio::net::TcpListener, SocketAddr) {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    #[tokio::test]
    async fn a_dial_to_our_own_listener_is_refused_by_whatever_address() {
        let (_listener, addr) = listener().await;
        let elsewhere = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 1));
        for own in ENTRANCES.map(|ip| SocketAddr::from((ip, addr.port()))) {
            for inbound in [own, elsewhere] {
                let dial = TcpDial::new(vec![own], inbound);
                let refused = dial.dial(addr, Listener::Server).await;
                assert!(matches!(refused, Err(Refusal::Loop(_))), "{own}");
            }
            let dial = TcpDial::new(vec![own], elsewhere);
            assert!(dial.dial(addr, Listener::Proxy).await.is_err(), "{own} is not for peers");
        }
        let dial = TcpDial::new(vec![elsewhere], elsewhere);
        assert!(dial.dial(addr, Listener::Server).await.is_ok());
    }

    #[tokio::test]
    async fn a_workload_reaches_its_own_service_through_its_own_proxy() {
        let (_listener, addr) = listener().await;
        for inbound in ENTRANCES.map(|ip| SocketAddr::from((ip, addr.port()))) {
            let dial = TcpDial::new(vec![inbound], inbound);
            assert!(dial.dial(addr, Listener::Proxy).await.is_ok(), "{inbound}");
        }
    }

    #[test]
    fn redirected_http_goes_to_the_proxy_of_a_workload_of_our_own_name() {
        on_worker(async {
            let world = World::new(&[]);
            let endpoint = Endpoint {
                addr: SocketAddr::from(([10, 0, 0, 7], 80)),
                weight: 1,
                identity: None,
                inbound_port: Some(4143),
                protocol: ProtocolHint::Http2,
                authority_override: None,
                labels: Arc::default(),
            };
            let way_to = |own| {
                let (addr, header) = world.connect.way_to(&endpoint, Session::Http2, own).unwrap();
                (addr.port(), header.map(|header| header.port))
            };
            assert_eq!(way_to(false), (80, None));
            assert_eq!(way_to(true), (4143, Some(80)));
        });
    }
}
