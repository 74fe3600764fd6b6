//! The story of a connection of the workload's own, and of a request on it.
//!
//! In transparent mode the kernel says where a connection goes, discovery says what stands behind
//! that address, and what is spoken decides whether bytes or requests are balanced. In explicit
//! mode each request names its destination, and a mapped listener has one. A destination of whom
//! discovery has not said that it is unmeshed never gets plaintext.

mod exchange;
mod routes;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use steadfast_api::Code;
use steadfast_identity_client::LateRefusal;
use steadfast_process::{Clock, Drain};

use crate::accept::Accepted;
use crate::config::Mode;
use crate::connect::{Connect, Server};
use crate::detect::{self, First, Proto};
use crate::forward::{self, Scratch};
use crate::http::{Peer, Worker, http1, http2};
use crate::io::{BoxIo, Counted, Io, Prefixed};
use crate::lifetime::{Ages, Bounds, Lifetime};
use crate::metrics::{Direction, Labels, Metrics};
use crate::refusal::{Refusal, Reporter};
use crate::target::Target;
use crate::transport::Session;
use crate::worker::Shared;
use exchange::Serving;
pub use routes::TARGETS_MAX;
use routes::{Chosen, Route, Routes};

/// What outbound connections of one worker need.
pub struct Outbound {
    mode: Mode,
    clock: Arc<dyn Clock>,
    drain: Drain,
    ages: Ages,
    metrics: Metrics,
    reporter: Rc<Reporter>,
    connect: Rc<Connect>,
    http: Worker,
    scratch: Scratch,
    routes: Routes,
}

/// A connection to a server.
struct Dialled {
    io: BoxIo,
    known: Known,
}

/// What is known of it.
struct Known {
    addr: SocketAddr,
    /// Holds the peer's refusal of us, if it comes with a later read.
    late: Option<LateRefusal>,
    /// What bounds it, if it was made with an SVID.
    bounds: Bounds,
    /// Counts it as pending at its endpoint.
    chosen: Chosen,
}

impl Outbound {
    /// For one worker.
    pub fn new(
        shared: &Shared,
        connect: Rc<Connect>,
        http: Worker,
        scratch: Scratch,
        reporter: Rc<Reporter>,
    ) -> Self {
        Self {
            mode: shared.config.mode,
            clock: shared.clock.clone(),
            drain: shared.drain.clone(),
            ages: shared.ages(reporter.clone()),
            metrics: shared.metrics.clone(),
            reporter,
            connect,
            http,
            scratch,
            routes: Routes::new(shared),
        }
    }

    /// Serves one connection to its end. `mapped` is the destination of its listener.
    ///
    /// # Errors
    /// Why it went no further.
    pub async fn serve<IO: Io>(
        self: Rc<Self>,
        conn: Accepted<IO>,
        mapped: Option<Target>,
    ) -> Result<(), Refusal> {
        match (self.mode, mapped) {
            (_, Some(target)) => {
                let route = Box::pin(self.routes.resolve(&target)).await?;
                Box::pin(self.opaque(Prefixed::new(conn.io), route, None)).await
            }
            // Boxed here and below, so that a connection pays for the state it is in alone.
            (Mode::Explicit, None) => Box::pin(self.serve_named(conn)).await,
            (Mode::Transparent, None) => Box::pin(self.serve_redirected(conn)).await,
        }
    }

    /// Lets go of destinations that nobody uses.
    pub fn sweep(&self) {
        self.routes.sweep();
    }

    /// Explicit mode: an HTTP proxy, whose requests name their destinations.
    async fn serve_named<IO: Io>(self: Rc<Self>, conn: Accepted<IO>) -> Result<(), Refusal> {
        let mut io = Prefixed::new(conn.io);
        match detect::protocol(&mut io).await? {
            Proto::Opaque if io.seen().is_empty() => Ok(()),
            Proto::Opaque => Err(Refusal::Unknown {
                code: Code::NO_SUCH_DESTINATION,
                target: conn.local.to_string(),
                detail: "this listener takes HTTP; for other protocols give the destination a \
                         listener of its own (STEADFAST_PROXY_OUTBOUND_LISTEN_MAP)"
                    .to_owned(),
            }),
            proto => self.requests(io, conn.client, None, proto).await,
        }
    }

    /// Transparent mode: what the kernel redirected.
    async fn serve_redirected<IO: Io>(self: Rc<Self>, conn: Accepted<IO>) -> Result<(), Refusal> {
        let target = Target::Address(conn.destination()?.0);
        let route = Box::pin(self.routes.resolve(&target)).await?;
        let mut io = Prefixed::new(conn.io);
        if route.opaque {
            return self.opaque(io, route, None).await;
        }
        let mut known = None;
        let dial = async {
            let dialled = self.dial(&route).await?;
            known = Some(dialled.known);
            Ok(Prefixed::new(dialled.io))
        };
        let first = Box::pin(detect::first(&mut io, dial)).await?;
        let boxed = |io: Prefixed<BoxIo>| Box::new(io) as BoxIo;
        let dialled = match (first, known) {
            (First::Both(io), Some(known)) => Some(Dialled { io: boxed(io), known }),
            (First::Broken(error), Some(known)) => {
                self.connect.report_broken(known.addr, known.late.as_ref(), false, &error);
                io.abort();
                return Err(Refusal::Gone(error));
            }
            (First::Server(server), Some(known)) => {
                let dialled = Some(Dialled { io: boxed(server), known });
                return self.opaque(io, route, dialled).await;
            }
            _ => None,
        };
        match detect::protocol(&mut io).await? {
            Proto::Opaque => self.opaque(io, route, dialled).await,
            proto => {
                drop(dialled);
                self.requests(io, conn.client, Some(route), proto).await
            }
        }
    }

    /// Copies bytes. An SVID that ends takes no connection with it.
    async fn opaque<IO: Io>(
        &self,
        mut io: Prefixed<IO>,
        route: Route,
        dialled: Option<Dialled>,
    ) -> Result<(), Refusal> {
        let Dialled { io: mut server, known } = match dialled {
            Some(dialled) => dialled,
            // Where nobody answers there is no end of an answer.
            None => Box::pin(self.dial(&route)).await.inspect_err(|_| io.abort())?,
        };
        let labels = Labels::new([("direction", "outbound"), ("peer", "src")]);
        let mut io = Counted::new(io, self.metrics.tcp(labels));
        let copying = forward::opaque(&mut io, &mut server, &self.scratch);
        let error = match self.ages.limit(&known.bounds, copying).await {
            Some(Ok(())) => return Ok(()),
            Some(Err(error)) => error,
            None => {
                // An end would tell both that they have got everything.
                io.abort();
                server.abort();
                return Ok(());
            }
        };
        // Whether the server would have spoken is not known where the client went first.
        let spoke = error.server_spoke || error.side == "client";
        self.connect.report_broken(known.addr, known.late.as_ref(), spoke, &error.source);
        Err(Refusal::Gone(error.source))
    }

    /// Serves requests until the client leaves, or the process drains.
    async fn requests<IO: Io>(
        self: Rc<Self>,
        io: Prefixed<IO>,
        client: SocketAddr,
        route: Option<Route>,
        proto: Proto,
    ) -> Result<(), Refusal> {
        let life = Lifetime::new(self.clock.clone(), self.drain.clone(), None, None);
        let labels = Labels::new([("direction", "outbound"), ("peer", "src")]);
        let io = Counted::new(io, self.metrics.tcp(labels));
        let http = self.http.clone();
        let serving = Serving::new(self, client, route);
        let served = match proto {
            Proto::Http2 => {
                let peer = Peer::Application;
                Box::pin(http2::serve(io, &serving, &http, peer, life.over())).await
            }
            Proto::Http1 | Proto::Opaque => {
                Box::pin(http1::serve(io, &serving, &http, life.over())).await
            }
        };
        served.map_err(|error| Refusal::Gone(std::io::Error::other(error)))
    }

    /// A connection for bytes to one of a route's endpoints: another one is tried if one cannot be
    /// reached. Each refusal is told here, with the address of the endpoint.
    async fn dial(&self, route: &Route) -> Result<Dialled, Refusal> {
        let mut attempts = 1;
        loop {
            let chosen = self.routes.choose(route).await?;
            let endpoint = chosen.endpoint().clone();
            let labels = route.labels(&endpoint).with("peer", "dst");
            let refusal = match self.connect.endpoint(&endpoint, Session::Opaque, labels).await {
                Ok(Server { io, late, bounds, .. }) => {
                    chosen.connected();
                    let known = Known { addr: endpoint.addr, late, bounds, chosen };
                    return Ok(Dialled { io, known });
                }
                Err(refusal) => refusal,
            };
            self.connect.report(Direction::Outbound, endpoint.addr, &refusal);
            self.routes.refused(&chosen);
            if attempts >= ATTEMPTS_MAX {
                return Err(Refusal::Gone(std::io::ErrorKind::ConnectionRefused.into()));
            }
            attempts += 1;
        }
    }
}

/// To different endpoints where there are several.
const ATTEMPTS_MAX: u32 = 3;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;
    use crate::fakes::{World, connection, on_worker};

    const EXPLICIT: (&str, &str) = ("STEADFAST_PROXY_MODE", "explicit");
    const APPLICATION: &str = "127.0.0.1:40000";

    #[test]
    fn a_connection_that_is_served_is_small() {
        let world = World::new(&[EXPLICIT]);
        let (_peer, conn) = connection(APPLICATION, None);
        let serving = world.outbound.clone().serve(conn, None);
        assert!(size_of_val(&serving) <= 1024, "{} bytes", size_of_val(&serving));
        let (_peer, conn) = connection(APPLICATION, None);
        let serving = world.outbound.clone().serve_named(conn);
        assert!(size_of_val(&serving) <= 1024, "{} bytes", size_of_val(&serving));
        let (_peer, conn) = connection(APPLICATION, None);
        let (io, proto) = (Prefixed::new(conn.io), Proto::Http1);
        let serving = world.outbound.clone().requests(io, conn.client, None, proto);
        assert!(size_of_val(&serving) <= 1024, "{} bytes", size_of_val(&serving));
    }

    async fn read_some(io: &mut DuplexStream) -> String {
        let mut seen = vec![0; 4096];
        let bytes = io.read(&mut seen).await.unwrap();
        String::from_utf8(seen[..bytes].to_vec()).unwrap()
    }

    #[test]
    fn a_connection_to_our_own_listener_is_a_loop() {
        on_worker(async {
            let world = World::new(&[]);
            let (_peer, conn) = connection(APPLICATION, None);
            let refusal = world.outbound.clone().serve(conn, None).await.unwrap_err();
            assert!(matches!(refusal, Refusal::Loop(_)));
        });
    }

    #[test]
    fn absolute_form_reaches_the_server_in_origin_form() {
        on_worker(async {
            let world = World::new(&[EXPLICIT]);
            let mut server = world.pipes.server();
            let (mut peer, conn) = connection(APPLICATION, None);
            let talk = async {
                let request = "GET http://10.0.0.7:81/a HTTP/1.1\r\nhost: evil\r\n\
                               l5d-orig-proto: HTTP/1.0\r\nconnection: close\r\n\r\n";
                peer.write_all(request.as_bytes()).await.unwrap();
                let seen = read_some(&mut server).await;
                assert_eq!(seen, "GET /a HTTP/1.1\r\nhost: 10.0.0.7:81\r\n\r\n");
                server.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                assert!(read_some(&mut peer).await.starts_with("HTTP/1.1 204"));
            };
            let (served, ()) = tokio::join!(world.outbound.clone().serve(conn, None), talk);
            assert!(served.is_ok());
            assert_eq!(*world.pipes.dialled.borrow(), ["10.0.0.7:81".parse().unwrap()]);
        });
    }

    #[test]
    fn connect_makes_a_tunnel_with_both_its_ends() {
        on_worker(async {
            let world = World::new(&[EXPLICIT]);
            let mut server = world.pipes.server();
            let (mut peer, conn) = connection(APPLICATION, None);
            let talk = async {
                let request = "CONNECT 10.0.0.7:5432 HTTP/1.1\r\nhost: 10.0.0.7:5432\r\n\r\n";
                peer.write_all(request.as_bytes()).await.unwrap();
                assert!(read_some(&mut peer).await.starts_with("HTTP/1.1 200"));
                peer.write_all(b"question").await.unwrap();
                peer.shutdown().await.unwrap();
                let mut question = String::new();
                server.read_to_string(&mut question).await.unwrap();
                assert_eq!(question, "question");
                server.write_all(b"answer").await.unwrap();
                server.shutdown().await.unwrap();
                let mut answer = String::new();
                peer.read_to_string(&mut answer).await.unwrap();
                assert_eq!(answer, "answer");
            };
            let (served, ()) = tokio::join!(world.outbound.clone().serve(conn, None), talk);
            assert!(served.is_ok());
        });
    }

    #[test]
    fn a_name_that_nobody_knows_is_told_with_its_code_and_counted() {
        on_worker(async {
            let world = World::new(&[EXPLICIT]);
            let (mut peer, conn) = connection(APPLICATION, None);
            let talk = async {
                let request = "GET / HTTP/1.1\r\nhost: nobody.demo\r\nconnection: close\r\n\r\n";
                peer.write_all(request.as_bytes()).await.unwrap();
                let mut response = String::new();
                peer.read_to_string(&mut response).await.unwrap();
                assert!(response.starts_with("HTTP/1.1 502"), "{response}");
                assert!(response.contains("SFT-NET-007"), "{response}");
            };
            let (served, ()) = tokio::join!(world.outbound.clone().serve(conn, None), talk);
            assert!(served.is_ok());
            let errors = "outbound_http_errors_total{error=\"no_such_destination\"}";
            assert_eq!(world.metric(errors).as_deref(), Some("1"));
            assert!(world.pipes.dialled.borrow().is_empty());
        });
    }

    #[test]
    fn a_server_that_is_down_is_tried_again_and_then_told() {
        on_worker(async {
            let world = World::new(&[EXPLICIT]);
            let (mut peer, conn) = connection(APPLICATION, None);
            let talk = async {
                let request = "POST / HTTP/1.1\r\nhost: 10.0.0.7\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi";
                peer.write_all(request.as_bytes()).await.unwrap();
                let mut response = String::new();
                peer.read_to_string(&mut response).await.unwrap();
                assert!(response.starts_with("HTTP/1.1 502"), "{response}");
            };
            let (_, ()) = tokio::join!(world.outbound.clone().serve(conn, None), talk);
            assert_eq!(world.pipes.dialled.borrow().len(), ATTEMPTS_MAX as usize);
            // One request, one response, and it failed.
            let labels = "direction=\"outbound\",authority=\"10.0.0.7:80\",target_port=\"80\",\
                tls=\"no_identity\",no_tls_reason=\"not_provided_by_service_discovery\"";
            let requests = format!("request_total{{{labels}}}");
            assert_eq!(world.metric(&requests).as_deref(), Some("1"));
            let failures = format!(
                "response_total{{{labels},status_code=\"502\",classification=\"failure\"}}"
            );
            assert_eq!(world.metric(&failures).as_deref(), Some("1"));
        });
    }

    #[test]
    fn a_mapped_listener_copies_bytes_to_its_destination() {
        on_worker(async {
            let world = World::new(&[EXPLICIT]);
            let mut server = world.pipes.server();
            let (mut peer, conn) = connection(APPLICATION, None);
            let target = Some("10.0.0.7:5432".parse().unwrap());
            let talk = async {
                // Looks like HTTP, and is none of our business here.
                peer.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
                assert_eq!(read_some(&mut server).await, "GET / HTTP/1.1\r\n\r\n");
                drop((peer, server));
            };
            let (served, ()) = tokio::join!(world.outbound.clone().serve(conn, target), talk);
            assert!(served.is_ok());
        });
    }
}
