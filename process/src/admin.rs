//! The admin port: `/metrics`, `/live`, `/ready`, `/version`, and what a process adds.
//!
//! Metrics, live and ready answer to everyone; all else answers to loopback only, and a change
//! needs POST. Requests are small and few: each is read and answered under a bound.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::Readiness;
use crate::drain::Drain;

/// What a process adds to its admin port: a request whose body was read, to an answer; `None` is
/// "not found".
pub type Routes = dyn Fn(&Request<Bytes>) -> Option<Response<String>> + Send + Sync;

/// Everything the admin port shows.
#[derive(Clone)]
pub struct Admin {
    registry: Arc<Registry>,
    readiness: Readiness,
    routes: Arc<Routes>,
}

impl Admin {
    /// An admin port that shows these metrics and this readiness.
    pub fn new(registry: Arc<Registry>, readiness: Readiness) -> Self {
        Self { registry, readiness, routes: Arc::new(|_| None) }
    }

    /// One socket, for two that listen one after the other: what is shown while a process finds out
    /// what it is for, and what is shown then.
    ///
    /// # Errors
    /// Another process is there.
    pub async fn bind_twice(addr: SocketAddr) -> std::io::Result<(TcpListener, TcpListener)> {
        let first = TcpListener::bind(addr).await?.into_std()?;
        let second = TcpListener::from_std(first.try_clone()?)?;
        Ok((TcpListener::from_std(first)?, second))
    }

    /// Adds what answers to loopback only.
    #[must_use]
    pub fn with_routes(
        self,
        routes: impl Fn(&Request<Bytes>) -> Option<Response<String>> + Send + Sync + 'static,
    ) -> Self {
        Self { routes: Arc::new(routes), ..self }
    }

    /// Answers until the drain has started and everybody who holds it is done: who finishes work can
    /// be watched meanwhile, and is not ready.
    ///
    /// # Errors
    /// None at present: a connection that fails is dropped, and accepting is tried again.
    pub async fn serve(self, listener: TcpListener, drain: Drain) -> Result<(), Infallible> {
        let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = tokio::task::JoinSet::new();
        let mut draining = None;
        let finished = async {
            drain.wait().await;
            drain.finished(Duration::MAX).await;
        };
        tokio::pin!(finished);
        loop {
            let accepted = tokio::select! {
                // No answer is given by what was so before.
                biased;
                () = drain.wait(), if draining.is_none() => {
                    draining = Some(self.readiness.component("process", "draining"));
                    continue;
                }
                () = &mut finished => return Ok(()),
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            let (Ok((stream, client)), Ok(slot)) = (accepted, slots.clone().try_acquire_owned())
            else {
                // Out of files or of slots: the client sees a closed connection and asks again.
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let admin = self.clone();
            connections.spawn(async move {
                let service = service_fn(|request| admin.answer(client, request));
                let connection = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(READ_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service);
                // A client that breaks off is no event.
                let _ = tokio::time::timeout(CONNECTION_AGE_MAX, connection).await;
                drop(slot);
            });
        }
    }

    async fn answer(
        &self,
        client: SocketAddr,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let (head, body) = request.into_parts();
        let body = tokio::time::timeout(READ_TIMEOUT, Limited::new(body, BODY_BYTES_MAX).collect());
        let Ok(Ok(body)) = body.await else {
            return Ok(text(StatusCode::BAD_REQUEST, "the body is too large or too slow\n"));
        };
        let request = Request::from_parts(head, body.to_bytes());
        let response = match (request.method(), request.uri().path()) {
            (&Method::GET, "/metrics") => self.metrics(),
            (&Method::GET, "/live") => text(StatusCode::OK, "live\n"),
            (&Method::GET, "/ready") => self.ready(),
            _ if !client.ip().to_canonical().is_loopback() => {
                text(StatusCode::FORBIDDEN, "only loopback may ask for this\n")
            }
            (&Method::GET, "/version") => text(StatusCode::OK, VERSION),
            (_, path) => match (self.routes)(&request) {
                Some(response) => response.map(|body| Full::new(body.into())),
                None => text(StatusCode::NOT_FOUND, &format!("no such path: {path}\n")),
            },
        };
        Ok(response)
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        let mut body = String::new();
        match prometheus_client::encoding::text::encode(&mut body, &self.registry) {
            Ok(()) => typed(StatusCode::OK, METRICS_TYPE, body),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("metrics: {error}\n")),
        }
    }

    fn ready(&self) -> Response<Full<Bytes>> {
        let report = self.readiness.report();
        let status = if report.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        // Strings alone: serialising them cannot fail.
        typed(status, "application/json", serde_json::to_string(&report).unwrap_or_default() + "\n")
    }
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", body.to_owned())
}

fn typed(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let content_type = header::HeaderValue::from_static(content_type);
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

/// All programs of this workspace are of one version.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\n");
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const CONNECTIONS_MAX: usize = 64;
const BODY_BYTES_MAX: usize = 16 * 1024;
const READ_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(300);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    async fn get(addr: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_process_that_drains_is_not_ready_and_can_be_watched_to_its_end() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (addr, drain) = (listener.local_addr().unwrap(), Drain::new());
        let admin = Admin::new(Arc::default(), Readiness::new());
        let serving = admin.serve(listener, drain.clone());
        let watching = async {
            let work = drain.hold();
            assert!(get(addr, "/ready").await.starts_with("HTTP/1.1 200"));
            drain.start();
            let ready = get(addr, "/ready").await;
            assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
            assert!(ready.contains("draining"), "{ready}");
            assert!(get(addr, "/metrics").await.starts_with("HTTP/1.1 200"));
            drop(work);
        };
        let ended = tokio::time::timeout(Duration::from_secs(60), async {
            tokio::join!(serving, watching)
        });
        assert!(ended.await.is_ok());
        assert!(TcpStream::connect(addr).await.is_err(), "the port is closed");
    }
}
