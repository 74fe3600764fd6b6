//! Connections that are used again, by one worker.
//!
//! HTTP/2: those that requests share (`shared`). HTTP/1: those that idle, newest first, for a while.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use steadfast_identity_client::LateRefusal;

use super::shared::Shared;
use super::{Connect, Failed, Server, Unanswered};
use crate::discovery::Endpoint;
use crate::http::http1::Connection;
use crate::http::{Body, SendError, SendErrorKind};
use crate::io::BoxIo;
use crate::metrics::{Direction, Labels};
use crate::refusal::Refusal;

/// What can be used again.
#[derive(Default)]
pub(super) struct Pool {
    http1: RefCell<HashMap<SocketAddr, Vec<Idle>>>,
    pub(super) shared: Shared,
}

struct Idle {
    connection: Connection<BoxIo>,
    since: Duration,
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
        labels: impl Fn() -> Labels,
        request: Request<Body>,
    ) -> Result<Response<Body>, Unanswered> {
        let pooled = match self.shared(direction, endpoint, labels).await {
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
        let since_boot = self.clock.since_boot();
        self.sweep_shared();
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
        self.pool.shared.clear();
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
pub(super) const IDLE_MAX: Duration = Duration::from_secs(30);
/// Of one server.
const IDLE_CONNECTIONS_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::fakes::{World, on_worker};

    fn addr() -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 7], 80))
    }

    fn get(uri: &str) -> Request<Body> {
        Request::builder().uri(uri).header("host", "web").body(Body::empty()).unwrap()
    }

    async fn drained(mut response: Response<Body>) {
        while let Some(frame) = response.body_mut().frame().await {
            frame.unwrap();
        }
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
