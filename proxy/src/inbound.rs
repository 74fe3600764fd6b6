//! The story of a connection from a peer, and of a request on it.
//!
//! In the order in which it happens: who is there (TLS in place, by our own name), where to (the
//! transport header, or where the kernel says), whether it may (policy), what it speaks, and then
//! bytes or requests to the application. Nothing reaches the application, not even a connection,
//! before the policy has let the peer in.

mod exchange;
mod facts;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use steadfast_api::Code;
use steadfast_identity_client::ClientAuth;
use steadfast_policy::{Permit, Policy};
use steadfast_process::{Clock, Drain};

use crate::accept::Accepted;
use crate::config::Mode;
use crate::connect::Connect;
use crate::detect::{self, First, Proto};
use crate::forward::{self, Scratch};
use crate::http::{Peer, Worker, http1, http2};
use crate::identity::{Tls, expires_at, retire_at};
use crate::io::{BoxIo, Counted, Io, Lent, Prefixed, linger};
use crate::lifetime::{Ages, Bounds, Lifetime};
use crate::metrics::{Authz, Direction, Metrics};
use crate::policy::{Policies, Ports};
use crate::refusal::{Refusal, Reporter};
use crate::transport::{self, HeaderError, Session};
use crate::worker::Shared;
use exchange::Serving;
use facts::Facts;

/// What inbound connections of one worker need.
pub struct Inbound {
    local_name: String,
    ports: Ports,
    opaque_ports: BTreeSet<u16>,
    /// Ports that the proxy itself listens on.
    own_ports: BTreeSet<u16>,
    /// Where the application listens; `None`: at the address that was dialled, so that what a pod
    /// keeps on its loopback is for nobody else.
    application: Option<IpAddr>,
    policies: Rc<dyn Policies>,
    tls: Tls,
    clock: Arc<dyn Clock>,
    drain: Drain,
    ages: Ages,
    metrics: Metrics,
    reporter: Rc<Reporter>,
    connect: Rc<Connect>,
    http: Worker,
    scratch: Scratch,
}

/// The addresses of a connection.
#[derive(Clone, Copy)]
struct Ends {
    client: SocketAddr,
    /// Our own side of it.
    local: SocketAddr,
    /// Where the client wanted to go, if the kernel redirected it here.
    redirected: Option<SocketAddr>,
}

/// A connection of which all is known but what it speaks.
struct Identified {
    facts: Rc<Facts>,
    /// What the transport header says is spoken.
    session: Option<Session>,
    io: Prefixed<BoxIo>,
}

impl Inbound {
    /// For one worker.
    pub fn new(
        shared: &Shared,
        tls: Tls,
        connect: Rc<Connect>,
        http: Worker,
        scratch: Scratch,
        reporter: Rc<Reporter>,
    ) -> Self {
        let config = &shared.config;
        let (ports, application) = match config.mode {
            Mode::Explicit => {
                (Ports::Declared(config.inbound.ports.clone()), Some(config.inbound.application))
            }
            Mode::Transparent => (Ports::Redirected, None),
        };
        Self {
            local_name: config.identity.local_name.to_string().to_ascii_lowercase(),
            ports,
            opaque_ports: config.inbound.opaque_ports.clone(),
            own_ports: config.own_listeners().iter().map(SocketAddr::port).collect(),
            application,
            policies: Rc::new(shared.policies.clone()),
            tls,
            clock: shared.clock.clone(),
            drain: shared.drain.clone(),
            ages: shared.ages(reporter.clone()),
            metrics: shared.metrics.clone(),
            reporter,
            connect,
            http,
            scratch,
        }
    }

    /// Serves one connection to its end.
    ///
    /// # Errors
    /// Why it went no further.
    pub async fn serve<IO: Io>(self: Rc<Self>, conn: Accepted<IO>) -> Result<(), Refusal> {
        let redirected = conn.orig_dst.map(|orig_dst| orig_dst.0);
        let ends = Ends { client: conn.client, local: conn.local, redirected };
        let client = ends.client;
        let mut io = Prefixed::new(conn.io);
        let mut dialled = None;
        if let Some(target) = redirected {
            // A client that stays silent may wait for the application's first word.
            let dial = self.dial_before_a_word(Facts::plaintext(client, target));
            match Box::pin(detect::first(&mut io, dial)).await? {
                First::Client => {}
                First::Both(server) => dialled = Some(server),
                First::Broken(error) => {
                    io.abort();
                    return Err(Refusal::Gone(error));
                }
                First::Server(server) => {
                    let mut conn = plaintext(io, client, target);
                    self.authorize(&conn.facts).inspect_err(|_| conn.io.abort())?;
                    return Box::pin(self.opaque(conn, Some(server))).await;
                }
            }
        }
        let found = detect::tls(&mut io, &self.local_name).await?;
        // As a probe does that only looks whether somebody listens.
        let left = io.ended() && io.seen().is_empty();
        let conn = match (found, redirected) {
            (detect::Tls::Mesh, _) => {
                dialled = None;
                Box::pin(self.handshake(io, ends)).await?
            }
            (_, Some(target)) => plaintext(io, client, target),
            (_, None) if left => return Err(gone_without_a_word()),
            (found, None) => {
                io.abort();
                return Err(no_direct_plaintext(client, found));
            }
        };
        // Boxed, so that a connection that is served pays for no other state than this.
        match self.authorize(&conn.facts) {
            Ok(()) => Box::pin(self.speak(conn, dialled)).await,
            Err(_) if left => Err(gone_without_a_word()),
            Err(refusal) => Box::pin(self.turn_away(conn, refusal)).await,
        }
    }

    /// Terminates mutual TLS and reads the transport header, if one is announced: what the kernel
    /// redirected has its destination, and no header changes it.
    async fn handshake<IO: Io>(&self, io: Prefixed<IO>, ends: Ends) -> Result<Identified, Refusal> {
        let context = self.tls.now();
        let (lent, back) = Lent::new(io);
        let alpns: &[&[u8]] = if ends.redirected.is_none() { &[transport::ALPN] } else { &[] };
        let accepted = context.accept(lent, self.client_auth(ends), alpns).await;
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(refusal) => {
                if let Some(io) = back.take() {
                    linger(io).await;
                }
                return Err(refusal.into());
            }
        };
        drop(back);
        let announced = stream.alpn() == Some(transport::ALPN);
        let place = (Direction::Inbound, ends.client);
        let held = self.tls.hold(&context, peer.clone(), place, Box::new(stream));
        let (stream, stand) = held?;
        let mut io = Prefixed::new(Box::new(stream) as BoxIo);
        let (target, session) = if announced {
            let header = detect::header(&mut io).await?;
            (self.application_at(header.port, ends.local), Some(header.protocol))
        } else {
            (ends.redirected.ok_or(Refusal::Header(HeaderError::Missing))?, None)
        };
        let facts = Facts {
            client: ends.client,
            mesh: true,
            target,
            named: session.is_some(),
            retire_at: retire_at(&context, peer.as_deref(), self.clock.now()),
            bounds: Bounds {
                expires_at: expires_at(&context, peer.as_deref()),
                stand: Some(stand),
            },
            peer,
        };
        Ok(Identified { facts: Rc::new(facts), session, io })
    }

    /// Where a port of the application is, for a client that dialled this address of ours.
    fn application_at(&self, port: u16, local: SocketAddr) -> SocketAddr {
        SocketAddr::new(self.application.unwrap_or_else(|| local.ip()), port)
    }

    /// Whether a client must show a certificate: always to the proxy's own port, else if the
    /// policy of the port it dialled lets nobody in without.
    fn client_auth(&self, ends: Ends) -> ClientAuth {
        let policy = ends.redirected.map(|target| self.policies.for_port(target.port()));
        match policy {
            Some(policy) if policy.admits_unauthenticated(ends.client.ip()) => ClientAuth::Optional,
            _ => ClientAuth::Required,
        }
    }

    /// Whether a connection may go where it wants to.
    fn judge(&self, facts: &Facts, policy: &Policy) -> Result<Permit, Refusal> {
        // A header may name any port. Forwarding to one of ours would never end, or would ask the
        // admin port in the name of the workload itself.
        if facts.named && self.own_ports.contains(&facts.target.port()) {
            return Err(Refusal::Loop(facts.target));
        }
        self.ports.check(facts.target.port())?;
        facts.judge(policy)
    }

    /// Judges a connection, and counts the judgement.
    fn authorize(&self, facts: &Facts) -> Result<(), Refusal> {
        let policy = self.policies.for_port(facts.target.port());
        let judged = self.judge(facts, &policy);
        let what = if judged.is_ok() { Authz::TcpAllow } else { Authz::TcpDeny };
        let labels = facts.authz_labels(&policy, judged.as_ref().ok());
        self.metrics.authorized(what, &labels);
        let permit = judged?;
        if permit.audited() {
            self.metrics.authorized(Authz::Audit, &labels);
            let peer = facts.peer.as_ref().map(|peer| &peer.id);
            let (now, port) = (self.clock.since_boot(), facts.target.port());
            self.reporter.audited(now, facts.client, peer, port, permit.policy());
        }
        Ok(())
    }

    /// Dials the application for a client that has not spoken, if it may.
    async fn dial_before_a_word(&self, facts: Facts) -> Result<Prefixed<BoxIo>, Refusal> {
        let _permit = self.judge(&facts, &self.policies.for_port(facts.target.port()))?;
        self.application(&facts).await
    }

    async fn application(&self, facts: &Facts) -> Result<Prefixed<BoxIo>, Refusal> {
        let server = self.connect.plaintext(facts.target, facts.server_labels()).await?;
        Ok(Prefixed::new(server.io))
    }

    /// Finds what is spoken, and speaks it with the application.
    async fn speak(
        self: &Rc<Self>,
        mut conn: Identified,
        mut dialled: Option<Prefixed<BoxIo>>,
    ) -> Result<(), Refusal> {
        let facts = conn.facts.clone();
        let proto = match self.declared(&conn) {
            Some(proto) => proto,
            None => {
                // In plaintext the client has spoken already.
                if facts.mesh {
                    match Box::pin(detect::first(&mut conn.io, self.application(&facts))).await? {
                        First::Client => {}
                        First::Both(server) => dialled = Some(server),
                        First::Server(server) => return self.opaque(conn, Some(server)).await,
                        First::Broken(error) => return Err(Refusal::Gone(error)),
                    }
                }
                detect::protocol(&mut conn.io).await?
            }
        };
        match proto {
            Proto::Opaque => self.opaque(conn, dialled).await,
            Proto::Http1 | Proto::Http2 => {
                drop(dialled);
                self.http(conn, proto).await
            }
        }
    }

    /// Refuses a connection. A peer that speaks HTTP is told why: each of its requests is judged,
    /// and answered here. To one that does not, nothing can be said; its connection is broken off,
    /// since an end would look like an empty answer.
    async fn turn_away(
        self: &Rc<Self>,
        mut conn: Identified,
        refusal: Refusal,
    ) -> Result<(), Refusal> {
        if !conn.facts.mesh {
            conn.io.abort();
            return Err(refusal);
        }
        let proto = match self.declared(&conn) {
            Some(proto) => proto,
            // A peer that breaks off was refused all the same.
            None => detect::protocol(&mut conn.io).await.unwrap_or(Proto::Opaque),
        };
        match proto {
            Proto::Opaque => Err(refusal),
            Proto::Http1 | Proto::Http2 => self.http(conn, proto).await,
        }
    }

    /// What is spoken, where nobody has to look.
    fn declared(&self, conn: &Identified) -> Option<Proto> {
        match conn.session {
            Some(Session::Http1) => Some(Proto::Http1),
            Some(Session::Http2) => Some(Proto::Http2),
            Some(Session::Opaque) => Some(Proto::Opaque),
            None => self.opaque_ports.contains(&conn.facts.target.port()).then_some(Proto::Opaque),
        }
    }

    /// Copies bytes. An SVID that ends takes no connection with it.
    async fn opaque(
        &self,
        mut conn: Identified,
        dialled: Option<Prefixed<BoxIo>>,
    ) -> Result<(), Refusal> {
        let mut server = match dialled {
            Some(server) => server,
            // Where nobody answers there is no end of an answer.
            None => {
                let dialled = Box::pin(self.application(&conn.facts)).await;
                dialled.inspect_err(|_| conn.io.abort())?
            }
        };
        let mut io = Counted::new(conn.io, self.metrics.tcp(conn.facts.client_labels()));
        let copying = forward::opaque(&mut io, &mut server, &self.scratch);
        let copied = self.ages.limit(&conn.facts.bounds, copying).await;
        let Some(copied) = copied else {
            // An end would tell both that they have got everything.
            io.abort();
            server.abort();
            return Ok(());
        };
        copied.map_err(|error| Refusal::Gone(error.source))
    }

    /// Serves requests until the client leaves, or the connection's life is over.
    async fn http(self: &Rc<Self>, conn: Identified, proto: Proto) -> Result<(), Refusal> {
        let facts = conn.facts;
        let (clock, drain) = (self.clock.clone(), self.drain.clone());
        let life = Lifetime::new(clock, drain, facts.retire_at, facts.bounds.stand.clone());
        let io = Counted::new(conn.io, self.metrics.tcp(facts.client_labels()));
        let peer = if facts.peer.is_some() { Peer::Mesh } else { Peer::Application };
        let serving = Serving::new(self.clone(), facts);
        let served = match proto {
            Proto::Http2 => {
                Box::pin(http2::serve(io, &serving, &self.http, peer, life.over())).await
            }
            Proto::Http1 | Proto::Opaque => {
                Box::pin(http1::serve(io, &serving, &self.http, life.over())).await
            }
        };
        served.map_err(|error| Refusal::Gone(std::io::Error::other(error)))
    }
}

fn plaintext<IO: Io>(io: Prefixed<IO>, client: SocketAddr, target: SocketAddr) -> Identified {
    let facts = Rc::new(Facts::plaintext(client, target));
    Identified { facts, session: None, io: Prefixed::new(Box::new(io) as BoxIo) }
}

/// Of a client that asked for nothing.
fn gone_without_a_word() -> Refusal {
    Refusal::Gone(std::io::ErrorKind::UnexpectedEof.into())
}

/// What was sent to the proxy's own port without TLS of this mesh is for nobody.
fn no_direct_plaintext(client: SocketAddr, found: detect::Tls) -> Refusal {
    let spoken = match found {
        detect::Tls::Other => "TLS for another name than this workload's",
        detect::Tls::Mesh | detect::Tls::None => "plaintext",
    };
    let detail = format!("{client} spoke {spoken} to the proxy's own port");
    Refusal::Denied { code: Code::PLAINTEXT_REFUSED, detail }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::fakes::{World, connection, on_worker};

    const AUTHENTICATED: (&str, &str) =
        ("LINKERD2_PROXY_INBOUND_DEFAULT_POLICY", "all-authenticated");
    const EXPLICIT: (&str, &str) = ("STEADFAST_PROXY_MODE", "explicit");
    const PEER: &str = "10.0.0.9:40000";
    const APPLICATION: &str = "10.0.0.1:8080";

    #[test]
    fn a_connection_that_is_served_is_small() {
        let world = World::new(&[]);
        let (_peer, conn) = connection(PEER, Some(APPLICATION));
        let serving = world.inbound.clone().serve(conn);
        assert!(size_of_val(&serving) <= 2048, "{} bytes", size_of_val(&serving));
        let (_peer, conn) = connection(PEER, Some(APPLICATION));
        let conn = plaintext(Prefixed::new(conn.io), conn.client, conn.local);
        let serving = world.inbound.speak(conn, None);
        assert!(size_of_val(&serving) <= 2048, "{} bytes", size_of_val(&serving));
    }

    #[test]
    fn plaintext_to_a_port_that_asks_for_mutual_tls_reaches_nothing() {
        on_worker(async {
            let world = World::new(&[AUTHENTICATED]);
            let _server = world.pipes.server();
            let (mut peer, conn) = connection(PEER, Some(APPLICATION));
            peer.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
            let refusal = world.inbound.clone().serve(conn).await.unwrap_err();
            assert_eq!(refusal.code(), Some(Code::PLAINTEXT_REFUSED));
            assert!(world.pipes.dialled.borrow().is_empty());
        });
    }

    #[test]
    fn a_silent_client_that_may_not_is_not_dialled_for() {
        on_worker(async {
            let world = World::new(&[AUTHENTICATED]);
            let _server = world.pipes.server();
            let (_peer, conn) = connection(PEER, Some(APPLICATION));
            let refusal = world.inbound.clone().serve(conn).await.unwrap_err();
            assert_eq!(refusal.code(), Some(Code::PLAINTEXT_REFUSED));
            assert!(world.pipes.dialled.borrow().is_empty());
        });
    }

    #[test]
    fn plaintext_to_the_proxys_own_port_is_refused_whatever_the_policy() {
        on_worker(async {
            for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\0\x01\x02"] {
                let world = World::new(&[EXPLICIT]);
                let (mut peer, conn) = connection(PEER, None);
                peer.write_all(bytes).await.unwrap();
                let refusal = world.inbound.clone().serve(conn).await.unwrap_err();
                assert_eq!(refusal.code(), Some(Code::PLAINTEXT_REFUSED));
                assert!(world.pipes.dialled.borrow().is_empty());
            }
        });
    }

    #[test]
    fn a_server_that_speaks_first_is_heard_without_a_stall() {
        on_worker(async {
            let world = World::new(&[]);
            let mut server = world.pipes.server();
            let (mut peer, conn) = connection(PEER, Some(APPLICATION));
            let started = tokio::time::Instant::now();
            let talk = async {
                server.write_all(b"220 ready\r\n").await.unwrap();
                let mut greeting = [0; 11];
                peer.read_exact(&mut greeting).await.unwrap();
                assert_eq!(&greeting, b"220 ready\r\n");
                // On paused time, which moves only when all wait: no timeout was waited for.
                assert!(started.elapsed() < detect::DETECT_TIMEOUT / 10);
                drop((peer, server));
            };
            let (served, ()) = tokio::join!(world.inbound.clone().serve(conn), talk);
            assert!(served.is_ok());
        });
    }

    #[test]
    fn an_unverified_client_can_name_nobody() {
        on_worker(async {
            let world = World::new(&[]);
            let mut server = world.pipes.server();
            let (mut peer, conn) = connection(PEER, Some(APPLICATION));
            let request = "GET /a HTTP/1.1\r\nhost: web\r\nl5d-client-id: boss\r\n\
                           l5d-orig-proto: HTTP/1.0\r\nconnection: close\r\n\r\n";
            let talk = async {
                peer.write_all(request.as_bytes()).await.unwrap();
                let mut seen = vec![0; 1024];
                let bytes = server.read(&mut seen).await.unwrap();
                let seen = String::from_utf8(seen[..bytes].to_vec()).unwrap();
                assert!(seen.starts_with("GET /a HTTP/1.1\r\n"), "{seen}");
                assert!(!seen.contains("boss") && !seen.contains("l5d-"), "{seen}");
                server.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                let mut response = String::new();
                peer.read_to_string(&mut response).await.unwrap();
                assert!(response.starts_with("HTTP/1.1 204"), "{response}");
            };
            let (served, ()) = tokio::join!(world.inbound.clone().serve(conn), talk);
            assert!(served.is_ok());
            let requests = "request_total{direction=\"inbound\",target_port=\"8080\",\
                tls=\"no_identity\",no_tls_reason=\"no_tls_from_remote\",client_id=\"\"}";
            assert_eq!(world.metric(requests).as_deref(), Some("1"));
        });
    }

    #[test]
    fn a_probe_that_only_connects_is_no_refusal() {
        on_worker(async {
            for (vars, orig_dst) in [(EXPLICIT, None), (AUTHENTICATED, Some(APPLICATION))] {
                let world = World::new(&[vars]);
                let (peer, conn) = connection(PEER, orig_dst);
                drop(peer);
                let refusal = world.inbound.clone().serve(conn).await.unwrap_err();
                assert_eq!(refusal.code(), None, "{refusal}");
                assert!(world.pipes.dialled.borrow().is_empty());
            }
        });
    }

    #[test]
    fn a_policy_under_audit_lets_in_and_counts_whom() {
        on_worker(async {
            let audit = ("LINKERD2_PROXY_INBOUND_DEFAULT_POLICY", "audit");
            let world = World::new(&[audit]);
            let mut server = world.pipes.server();
            let (mut peer, conn) = connection(PEER, Some(APPLICATION));
            let talk = async {
                peer.write_all(b"\0\x01\x02").await.unwrap();
                let mut seen = [0; 3];
                server.read_exact(&mut seen).await.unwrap();
                drop((peer, server));
            };
            let (served, ()) = tokio::join!(world.inbound.clone().serve(conn), talk);
            assert!(served.is_ok());
            let audited = "steadfast_inbound_authz_audit_total{direction=\"inbound\",\
                target_port=\"8080\",tls=\"no_identity\",no_tls_reason=\"no_tls_from_remote\",\
                client_id=\"\",srv_kind=\"default\",srv_name=\"audit\",\
                authz_kind=\"default\",authz_name=\"audit\"}";
            assert_eq!(world.metric(audited).as_deref(), Some("1"));
        });
    }

    #[test]
    fn where_the_policy_asks_for_an_identity_tls_asks_for_a_certificate() {
        let world = World::new(&[AUTHENTICATED]);
        let asked = |client: &str, redirected: Option<&str>| {
            world.inbound.client_auth(Ends {
                client: client.parse().unwrap(),
                local: "10.0.0.1:4143".parse().unwrap(),
                redirected: redirected.map(|addr| addr.parse().unwrap()),
            })
        };
        assert_eq!(asked(PEER, Some(APPLICATION)), ClientAuth::Required);
        assert_eq!(asked("127.0.0.1:40000", Some(APPLICATION)), ClientAuth::Optional);
        assert_eq!(asked("127.0.0.1:40000", None), ClientAuth::Required);
    }

    #[test]
    fn a_header_never_leads_to_the_loopback_of_a_pod() {
        let dialled = "10.0.0.1:4143".parse().unwrap();
        let world = World::new(&[]);
        assert_eq!(world.inbound.application_at(8080, dialled), APPLICATION.parse().unwrap());
        let world = World::new(&[EXPLICIT]);
        assert!(world.inbound.application_at(8080, dialled).ip().is_loopback());
    }

    #[test]
    fn the_admin_port_is_one_of_our_own() {
        let world = World::new(&[]);
        assert_eq!(world.inbound.own_ports, [4140, 4143, 4191].into());
    }

    #[test]
    fn a_workload_without_an_svid_refuses_mutual_tls_by_a_code_of_its_own() {
        on_worker(async {
            let world = World::new(&[EXPLICIT]);
            let (mut peer, conn) = connection(PEER, None);
            let name = "web.demo.serviceaccount.identity.steadfast.cluster.local";
            peer.write_all(&detect::client_hello(name)).await.unwrap();
            let refusal = world.inbound.clone().serve(conn).await.unwrap_err();
            assert_eq!(refusal.code(), Some(Code::SVID_MISSING));
        });
    }

    #[test]
    fn tls_for_another_name_passes_through_untouched() {
        on_worker(async {
            let world = World::new(&[]);
            let mut server = world.pipes.server();
            let (mut peer, conn) = connection(PEER, Some(APPLICATION));
            let hello = detect::client_hello("shop.example");
            let talk = async {
                peer.write_all(&hello).await.unwrap();
                let mut seen = vec![0; hello.len()];
                server.read_exact(&mut seen).await.unwrap();
                assert!(seen == hello);
                drop((peer, server));
            };
            let (served, ()) = tokio::join!(world.inbound.clone().serve(conn), talk);
            assert!(served.is_ok());
        });
    }
}
