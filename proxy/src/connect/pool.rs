//! Connections that are used again, by one worker.
//!
//! HTTP/2: one for each peer and expected identity; requests that come while it is being made wait
//! for the same attempt, whose failure is told once. One of an older TLS snapshot, or of an SVID
//! near its end, gets no new request and ends with its last stream. HTTP/1: those that idle, newest
//! first, for a while.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{LocalBoxFuture, Shared};
use http::{Request, Response};
use steadfast_api::{SpiffeId, UnixTime};
use steadfast_identity_client::LateRefusal;

use super::{Connect, Failed, Server, Unanswered, refused_late};
use crate::discovery::Endpoint;
use crate::http::http1::Connection;
use crate::http::http2::{self, Client, ConnectError};
use crate::http::{Body, Peer, SendError, SendErrorKind};
use crate::io::BoxIo;
use crate::metrics::{Direction, Labels};
use crate::refusal::Refusal;
use crate::transport::Session;

/// What can be used again.
#[derive(Default)]
pub(super) struct Pool {
    http1: RefCell<HashMap<SocketAddr, Vec<Idle>>>,
    http2: RefCell<HashMap<Key, Slot>>,
}

struct Idle {
    connection: Connection<BoxIo>,
    since: Duration,
}

/// Whom a connection of HTTP/2 leads to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    addr: SocketAddr,
    inbound_port: Option<u16>,
    id: Option<SpiffeId>,
}

type Connecting = Shared<LocalBoxFuture<'static, Result<Rc<Pooled>, Rc<Refusal>>>>;

enum Slot {
    Connecting(u64, Connecting),
    Ready(Rc<Pooled>),
}

struct Pooled {
    client: Client,
    generation: u64,
    retire_at: Option<UnixTime>,
    used: Cell<Duration>,
}

impl Connect {
    /// Sends a request by HTTP/2 to an endpoint.
    ///
    /// # Errors
    /// [`Unanswered`].
    pub async fn send_http2(
        self: &Rc<Self>,
        direction: Direction,
        endpoint: &Arc<Endpoint>,
        labels: impl FnOnce() -> Labels,
        request: Request<Body>,
    ) -> Result<Response<Body>, Unanswered> {
        let pooled = match self.http2(direction, endpoint, labels).await {
            Ok(pooled) => pooled,
            Err(refusal) => {
                let request = Some(Box::new(request));
                return Err(Unanswered { failed: Failed::Connect(refusal), request });
            }
        };
        pooled.used.set(self.clock.since_boot());
        pooled.client.send(request).await.map_err(Unanswered::from)
    }

    /// Sends a request by HTTP/1 in plaintext. One that met the end of an idle connection is sent
    /// again on a fresh one: always if it was not processed, and if its method is idempotent (RFC
    /// 9110 §9.2.2) also if the server closed without a byte of an answer.
    ///
    /// # Errors
    /// [`Unanswered`].
    pub async fn send_http1(
        self: &Rc<Self>,
        direction: Direction,
        addr: SocketAddr,
        labels: Labels,
        mut request: Request<Body>,
    ) -> Result<Response<Body>, Unanswered> {
        loop {
            let connection = match self.pool.idle(addr) {
                Some(connection) => connection,
                None => match self.plaintext(addr, labels.clone()).await {
                    Ok(server) => Connection::new(server.io, &self.http),
                    Err(refusal) => {
                        self.report(direction, addr, &refusal);
                        let failed = Failed::Connect(Rc::new(refusal));
                        return Err(Unanswered { failed, request: Some(Box::new(request)) });
                    }
                },
            };
            let (reused, idempotent) = (connection.is_reused(), request.method().is_idempotent());
            let pool = Rc::downgrade(self);
            let on_idle = move |connection| {
                if let Some(connect) = pool.upgrade() {
                    connect.pool.keep(addr, connection, connect.clock.since_boot());
                }
            };
            match connection.send(request, on_idle).await {
                Err(SendError { kind, request: Some(again) })
                    if reused
                        && (matches!(kind, SendErrorKind::NotProcessed(_))
                            || (idempotent
                                && matches!(
                                    kind,
                                    SendErrorKind::Closed | SendErrorKind::Io(_)
                                ))) =>
                {
                    self.metrics.retried(direction, "idle_closed");
                    request = *again;
                }
                result => return result.map_err(Unanswered::from),
            }
        }
    }

    /// Sends a request that may end as a tunnel, over a connection of its own.
    ///
    /// # Errors
    /// [`Unanswered`].
    pub async fn send_alone(
        &self,
        direction: Direction,
        addr: SocketAddr,
        server: Server,
        request: Request<Body>,
    ) -> Result<Response<Body>, Unanswered> {
        let connection = Connection::new(server.io, &self.http);
        let sent = connection.send(request, drop).await;
        sent.map_err(|error| match self.report_late(direction, addr, server.late.as_ref()) {
            Some(refusal) => {
                let failed = Failed::Connect(Rc::new(refusal));
                Unanswered { failed, request: error.request }
            }
            None => Unanswered::from(error),
        })
    }

    /// In TLS 1.3 the peer judges our certificate last: its refusal comes with a later read, and
    /// is counted and logged then.
    pub fn report_late(
        &self,
        direction: Direction,
        addr: SocketAddr,
        late: Option<&LateRefusal>,
    ) -> Option<Refusal> {
        let refusal = Refusal::Tls(late?.get()?.clone());
        self.report(direction, addr, &refusal);
        Some(refusal)
    }

    /// Counts and logs a connection that was refused.
    pub fn report(&self, direction: Direction, addr: SocketAddr, refusal: &Refusal) {
        self.reporter.report(self.clock.since_boot(), direction, addr, refusal);
    }

    /// Lets go of what is closed, old or has idled for long.
    pub fn sweep(&self) {
        let (now, since_boot) = (self.clock.now(), self.clock.since_boot());
        let generation = self.tls.now().generation;
        self.pool.http2.borrow_mut().retain(|_, slot| match slot {
            Slot::Connecting(..) => true,
            Slot::Ready(pooled) => {
                let idle = since_boot.saturating_sub(pooled.used.get()) > IDLE_MAX;
                pooled.is_usable(now, generation) && !(idle && pooled.client.streams() == 0)
            }
        });
        self.pool.http1.borrow_mut().retain(|_, all| {
            all.retain_mut(|idle| {
                since_boot.saturating_sub(idle.since) < IDLE_MAX && idle.connection.is_reusable()
            });
            !all.is_empty()
        });
    }

    /// Lets go of everything: what runs ends by itself.
    pub fn clear(&self) {
        self.pool.http1.take();
        self.pool.http2.take();
    }

    async fn http2(
        self: &Rc<Self>,
        direction: Direction,
        endpoint: &Arc<Endpoint>,
        labels: impl FnOnce() -> Labels,
    ) -> Result<Rc<Pooled>, Rc<Refusal>> {
        let key = Key {
            addr: endpoint.addr,
            inbound_port: endpoint.inbound_port,
            id: endpoint.identity.as_ref().map(|expected| expected.id.clone()),
        };
        let (now, generation) = (self.clock.now(), self.tls.now().generation);
        let connecting = {
            let mut pool = self.pool.http2.borrow_mut();
            match pool.get(&key) {
                Some(Slot::Ready(pooled)) if pooled.is_usable(now, generation) => {
                    return Ok(pooled.clone());
                }
                Some(Slot::Connecting(of, connecting)) if *of == generation => connecting.clone(),
                _ => {
                    let opening = self.clone().open(direction, endpoint.clone(), labels());
                    let connecting = opening.boxed_local().shared();
                    let slot = Slot::Connecting(generation, connecting.clone());
                    pool.insert(key.clone(), slot);
                    connecting
                }
            }
        };
        let result = connecting.clone().await;
        if let Entry::Occupied(mut slot) = self.pool.http2.borrow_mut().entry(key)
            && matches!(slot.get(), Slot::Connecting(_, c) if c.ptr_eq(&connecting))
        {
            match &result {
                Ok(pooled) => drop(slot.insert(Slot::Ready(pooled.clone()))),
                Err(_) => drop(slot.remove()),
            }
        }
        result
    }

    async fn open(
        self: Rc<Self>,
        direction: Direction,
        endpoint: Arc<Endpoint>,
        labels: Labels,
    ) -> Result<Rc<Pooled>, Rc<Refusal>> {
        let addr = endpoint.addr;
        self.try_open(&endpoint, labels).await.map_err(|refusal| {
            self.report(direction, addr, &refusal);
            Rc::new(refusal)
        })
    }

    async fn try_open(&self, endpoint: &Endpoint, labels: Labels) -> Result<Rc<Pooled>, Refusal> {
        let Server { io, peer, late, generation, retire_at, .. } =
            self.endpoint(endpoint, Session::Http2, labels).await?;
        let peer = if peer.is_some() { Peer::Mesh } else { Peer::Application };
        let addr = endpoint.addr;
        let unreachable = |source| Refusal::Unreachable { addr, source };
        let connected = http2::connect(io, &self.http, peer).await;
        let (client, driver) = connected.map_err(|error| match (error, &late) {
            (ConnectError::Io(error), Some(late)) => refused_late(late, addr, error),
            (ConnectError::Io(error), None) => unreachable(error),
            (other, _) => unreachable(std::io::Error::other(other)),
        })?;
        self.http.tasks().spawn_counted(async move {
            // Requests in flight are told; the connection itself has nothing more to say.
            if let Err(error) = driver.await {
                tracing::debug!(%addr, %error, "a connection of HTTP/2 broke");
            }
        });
        let used = Cell::new(self.clock.since_boot());
        Ok(Rc::new(Pooled { client, generation, retire_at, used }))
    }
}

impl Pooled {
    fn is_usable(&self, now: UnixTime, generation: u64) -> bool {
        let fresh = self.generation == 0 || self.generation == generation;
        fresh && self.retire_at.is_none_or(|at| now < at) && !self.client.is_closed()
    }
}

impl Pool {
    /// The connection that went idle last, if its server still holds it open.
    fn idle(&self, addr: SocketAddr) -> Option<Connection<BoxIo>> {
        let mut all = self.http1.borrow_mut();
        let of_addr = all.get_mut(&addr)?;
        while let Some(mut idle) = of_addr.pop() {
            if idle.connection.is_reusable() {
                return Some(idle.connection);
            }
        }
        None
    }

    fn keep(&self, addr: SocketAddr, connection: Connection<BoxIo>, since: Duration) {
        let mut all = self.http1.borrow_mut();
        let of_addr = all.entry(addr).or_default();
        if of_addr.len() < IDLE_CONNECTIONS_MAX {
            of_addr.push(Idle { connection, since });
        }
    }
}

impl From<SendError> for Unanswered {
    fn from(error: SendError) -> Self {
        Self { failed: Failed::Send(error.kind), request: error.request }
    }
}

/// Servers commonly close after 60 s or more; the few that are quicker are noticed.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// Of one server.
const IDLE_CONNECTIONS_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::discovery::ProtocolHint;
    use crate::fakes::{World, on_worker};
    use crate::http::Exchange;

    struct Hello;

    impl Exchange for Hello {
        async fn exchange(&self, _: Request<Body>) -> Response<Body> {
            Response::new(Body::full("hello"))
        }
    }

    fn addr() -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 7], 80))
    }

    fn get(uri: &str) -> Request<Body> {
        Request::builder().uri(uri).header("host", "web").body(Body::empty()).unwrap()
    }

    fn endpoint() -> Arc<Endpoint> {
        Arc::new(Endpoint {
            addr: addr(),
            weight: 1,
            identity: None,
            inbound_port: None,
            protocol: ProtocolHint::Http2,
            authority_override: None,
            labels: Arc::default(),
        })
    }

    async fn drained(mut response: Response<Body>) {
        while let Some(frame) = response.body_mut().frame().await {
            frame.unwrap();
        }
    }

    #[test]
    fn requests_that_come_while_a_connection_is_made_share_it() {
        on_worker(async {
            let world = World::new(&[]);
            let (server, http) = (world.pipes.server(), world.http.clone());
            let close = std::future::pending();
            let serving = http2::serve(server, &Hello, &http, Peer::Application, close);
            let (connect, endpoint) = (&world.connect, endpoint());
            let request = || async {
                let mut request = get("http://web/a");
                *request.version_mut() = http::Version::HTTP_2;
                let way = Direction::Outbound;
                let sent = connect.send_http2(way, &endpoint, Labels::default, request).await;
                drained(sent.map_err(|unanswered| unanswered.failed).unwrap()).await;
            };
            let requests = async {
                futures::join!(request(), request(), request());
                request().await;
            };
            tokio::select! {
                () = requests => {}
                ended = serving => panic!("{ended:?}"),
            }
            assert_eq!(world.pipes.dialled.borrow().len(), 1);
        });
    }

    #[test]
    fn a_failed_attempt_is_told_once_to_all_who_waited_and_the_next_tries_anew() {
        on_worker(async {
            let world = World::new(&[]);
            let (connect, endpoint) = (&world.connect, endpoint());
            let request = || async {
                let mut request = get("http://web/a");
                *request.version_mut() = http::Version::HTTP_2;
                let way = Direction::Outbound;
                let sent = connect.send_http2(way, &endpoint, Labels::default, request).await;
                assert!(sent.is_err_and(|unanswered| unanswered.request.is_some()));
            };
            futures::join!(request(), request());
            let refusals = "steadfast_connection_refusals_total{direction=\"outbound\",\
                            reason=\"unreachable\",code=\"SFT-NET-006\"}";
            assert_eq!(world.metric(refusals).as_deref(), Some("1"));
            request().await;
            assert_eq!(world.metric(refusals).as_deref(), Some("2"));
        });
    }

    #[test]
    fn an_idle_connection_is_used_again_unless_its_server_has_closed_it() {
        on_worker(async {
            let world = World::new(&[]);
            let send = || async {
                let way = Direction::Inbound;
                let sent = world.connect.send_http1(way, addr(), Labels::default(), get("/a"));
                drained(sent.await.map_err(|unanswered| unanswered.failed).unwrap()).await;
            };
            let mut server = world.pipes.server();
            let answer = async |server: &mut tokio::io::DuplexStream| {
                let mut seen = [0; 256];
                assert!(server.read(&mut seen).await.unwrap() > 0);
                server.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            };
            futures::join!(send(), answer(&mut server));
            futures::join!(send(), answer(&mut server));
            assert_eq!(world.pipes.dialled.borrow().len(), 1);
            drop(server);
            let mut next = world.pipes.server();
            futures::join!(send(), answer(&mut next));
            assert_eq!(world.pipes.dialled.borrow().len(), 2);
        });
    }
}
