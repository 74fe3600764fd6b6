//! The listeners: TLS on the port that everyone uses, plaintext on loopback where it is asked for.
//! What is spoken is a trust stream if ALPN says so, else HTTP.
//!
//! A connection has a slot, a deadline for its handshake, bounds on what it may open and send, and
//! an end when nothing has gone on for a while: nobody here is authenticated before a request.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::{AlertDescription, ServerConfig};
use steadfast_api::Code;
use steadfast_api_grpc::stream;
use steadfast_process::{Clock, Drain, SystemClock};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

use crate::front::Front;
use crate::metrics::{Metrics, RefusalLabels};
use crate::streams::{STREAMS_MAX, Streams};

/// Where a request came from, as an extension of it.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// What goes on on a connection.
#[derive(Debug, Default)]
pub struct Activity {
    busy: AtomicUsize,
    /// Milliseconds on the boot clock.
    last_ms: AtomicU64,
}

/// Held while something goes on.
#[derive(Debug)]
pub struct Busy(Arc<Activity>);

/// A server for any number of listeners: they share the slots. Cheap to clone.
#[derive(Clone)]
pub struct Server(Arc<Shared>);

/// What the connections of a server share.
struct Shared {
    front: Front,
    streams: Arc<Streams>,
    http: auto::Builder<TokioExecutor>,
    metrics: Metrics,
    slots: Arc<Semaphore>,
    /// How many lines about refused SVIDs there may be.
    refusals_told: DefaultDirectRateLimiter,
    drain: Drain,
}

impl Server {
    /// A server that answers with this front, and serves these trust streams.
    pub fn new(front: Front, streams: Arc<Streams>, metrics: Metrics, drain: Drain) -> Self {
        let refusals_told = RateLimiter::direct(Quota::per_minute(REFUSALS_TOLD_MAX));
        let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let http = builder();
        Self(Arc::new(Shared { front, streams, http, metrics, slots, refusals_told, drain }))
    }

    /// Accepts until the drain, and then waits for what is open.
    ///
    /// # Errors
    /// None: a connection that fails is counted, and accepting goes on.
    pub async fn serve(
        self,
        listener: TcpListener,
        tls: Option<Arc<ServerConfig>>,
    ) -> Result<(), Infallible> {
        let Self(server) = self;
        let acceptor = tls.map(TlsAcceptor::from);
        let connections = TaskTracker::new();
        let _unfinished = server.drain.hold();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = server.drain.wait() => break,
            };
            let Ok((stream, peer)) = accepted else {
                server.failed("accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let Ok(slot) = Arc::clone(&server.slots).try_acquire_owned() else {
                server.failed("capacity");
                continue;
            };
            let (server, acceptor) = (Arc::clone(&server), acceptor.clone());
            connections.spawn(async move {
                server.metrics.connections.inc();
                server.connection(stream, peer, acceptor).await;
                server.metrics.connections.dec();
                drop(slot);
            });
        }
        connections.close();
        connections.wait().await;
        Ok(())
    }
}

impl Shared {
    /// The task of a connection lives for as long as a proxy does, and has room for the largest of
    /// all that it ever awaits: so it awaits boxes.
    async fn connection(
        self: &Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        tls: Option<TlsAcceptor>,
    ) {
        // A socket that refuses this is about to fail anyway.
        let _ = stream.set_nodelay(true);
        let Some(acceptor) = tls else { return self.requests(stream, peer).await };
        let handshake = Box::pin(tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)));
        let stream = match handshake.await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return self.handshake_failed(peer, &error),
            Err(_) => return self.failed("handshake_timeout"),
        };
        if stream.get_ref().1.alpn_protocol() == Some(stream::ALPN) {
            Box::pin(Arc::clone(&self.streams).serve(stream, peer)).await;
        } else {
            self.requests(stream, peer).await;
        }
    }

    /// Answers on this connection until it ends. No `async fn`: that would keep room for `io` beside
    /// the connection that has it.
    fn requests<IO>(self: &Arc<Self>, io: IO, peer: SocketAddr) -> impl Future<Output = ()>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let activity = Arc::new(Activity::default());
        drop(Activity::begin(Arc::clone(&activity)));
        let (server, active) = (Arc::clone(self), Arc::clone(&activity));
        let service = service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
            let (server, busy) = (Arc::clone(&server), Activity::begin(Arc::clone(&active)));
            request.extensions_mut().insert(Peer(peer));
            request.extensions_mut().insert(Arc::clone(&active));
            // Its room in the stream's task is kept until the answer's body ends.
            Box::pin(async move {
                let answer = server.front.answer(request).await;
                drop(busy);
                answer
            })
        });
        let mut connection = Box::pin(self.http.serve_connection(TokioIo::new(io), service));
        async move {
            let mut asked = false;
            loop {
                tokio::select! {
                    ended = connection.as_mut() => {
                        if let Err(error) = ended {
                            tracing::debug!(%peer, %error, "connection broke");
                        }
                        return;
                    }
                    () = self.drain.wait(), if !asked => {}
                    () = tokio::time::sleep(IDLE_MAX / 2) => {
                        if !activity.idle_for(IDLE_MAX) {
                            continue;
                        }
                        if asked {
                            // Nothing goes on and it does not close: it is dropped.
                            return;
                        }
                    }
                }
                asked = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }

    /// A client that refuses our SVID has an old bundle, or we an SVID that nobody believes: a
    /// person should hear of it, without a flood of it. All else is noise of a network.
    fn handshake_failed(&self, peer: SocketAddr, error: &std::io::Error) {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let Some(rustls::Error::AlertReceived(alert)) = tls.filter(|error| refuses_us(error))
        else {
            self.failed("handshake");
            tracing::debug!(%peer, %error, "handshake failed");
            return;
        };
        let code = Code::PEER_REFUSED_US;
        self.failed(code.label());
        if self.refusals_told.check().is_ok() {
            tracing::warn!(%code, %peer, ?alert, "a client refuses our SVID");
        }
    }

    fn failed(&self, reason: &'static str) {
        self.metrics.connection_failures.get_or_create(&RefusalLabels { reason }).inc();
    }
}

impl Activity {
    /// Something begins.
    #[must_use]
    pub fn begin(self: Arc<Self>) -> Busy {
        self.busy.fetch_add(1, Ordering::AcqRel);
        Busy(self)
    }

    fn idle_for(&self, time: Duration) -> bool {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Acquire));
        self.busy.load(Ordering::Acquire) == 0
            && SystemClock.since_boot().saturating_sub(last) >= time
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let now = u64::try_from(SystemClock.since_boot().as_millis()).unwrap_or(u64::MAX);
        self.0.last_ms.store(now, Ordering::Release);
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

/// RFC 8446, §6.2: the alerts that are an answer to a certificate.
fn refuses_us(error: &rustls::Error) -> bool {
    use AlertDescription as A;
    let rustls::Error::AlertReceived(alert) = error else { return false };
    matches!(
        alert,
        A::AccessDenied
            | A::BadCertificate
            | A::CertificateExpired
            | A::CertificateRevoked
            | A::CertificateUnknown
            | A::DecryptError
            | A::UnknownCA
            | A::UnsupportedCertificate
    )
}

/// HTTP/2 by its preface, also without ALPN (Linkerd's proxy names none), else HTTP/1.1.
fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HANDSHAKE_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .max_send_buf_size(SEND_BUFFER_BYTES_MAX)
        .keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
    builder
}

/// A minute, of all clients together; the rest are counted.
const REFUSALS_TOLD_MAX: NonZeroU32 = NonZeroU32::new(10).unwrap();
/// Per process: a proxy has its stream and, while it asks for an SVID, another one.
const CONNECTIONS_MAX: usize = 2 * STREAMS_MAX + 4_000;
const STREAMS_PER_CONNECTION_MAX: u32 = 256;
const HEAD_BYTES_MAX: usize = 16 * 1024;
const SEND_BUFFER_BYTES_MAX: usize = 64 * 1024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// A connection on which nothing goes on for this long is closed; a client opens another.
const IDLE_MAX: Duration = Duration::from_secs(120);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
