//! The webhook that meshes pods as they are created: what the API server asks, and what it has to
//! trust to ask it.

mod admission;
mod certificate;
mod trusted;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client};
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use steadfast_process::{Clock, Drain, ErrorChain};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use self::admission::{Answer, AskedError, Question};
use self::certificate::{MakeError, Serving};
pub(crate) use self::trusted::Trusted;
use crate::Metrics;
use crate::inject::Settings;

/// Where pods are meshed, and what it is known by.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// The DNS name by which the API server calls.
    pub(crate) host: String,
    /// This replica, unlike every other.
    pub(crate) replica: String,
    /// The MutatingWebhookConfiguration that leads here.
    pub(crate) configuration: String,
}

/// Why there is no webhook.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// Its first certificate.
    #[error(transparent)]
    Certificate(Box<dyn std::error::Error + Send + Sync>),
    /// Its TLS.
    #[error("the webhook's TLS cannot be configured")]
    Tls(#[from] rustls::Error),
}

impl From<MakeError> for WebhookError {
    fn from(error: MakeError) -> Self {
        Self::Certificate(error.into())
    }
}

/// The webhook of one replica.
pub(crate) struct Webhook {
    client: Client,
    settings: Settings,
    metrics: Metrics,
    serving: Arc<Resolver>,
}

/// The certificate that is served: it is exchanged while the listener goes on.
#[derive(Debug)]
struct Resolver(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

impl Webhook {
    /// The webhook, and who sees to it that the API server trusts its certificate.
    ///
    /// # Errors
    /// [`WebhookError`]
    pub(crate) fn new(
        client: Client,
        names: Names,
        settings: Settings,
        clock: Arc<dyn Clock>,
        metrics: Metrics,
    ) -> Result<(Arc<Self>, Trusted), WebhookError> {
        let first = Serving::make(&names.host, &names.replica, clock.now())?;
        let serving = Arc::new(Resolver(ArcSwap::new(Arc::clone(&first.key))));
        let resolver = Arc::clone(&serving);
        let serve = Box::new(move |key| resolver.0.store(key));
        let trusted = Trusted::new(client.clone(), names, first, clock, metrics.clone(), serve);
        Ok((Arc::new(Self { client, settings, metrics, serving }), trusted))
    }

    /// Answers until the drain starts and what is under way has been answered.
    ///
    /// # Errors
    /// The configuration of TLS.
    pub(crate) async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        drain: Drain,
    ) -> Result<(), WebhookError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&self.serving) as Arc<dyn ResolvesServerCert>);
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        let _unfinished = drain.hold();
        let lingered = lingered(&drain);
        tokio::pin!(lingered);
        loop {
            let accepted = tokio::select! {
                () = &mut lingered => break,
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => accepted,
            };
            let (Ok((stream, client)), Ok(slot)) =
                (accepted, Arc::clone(&slots).try_acquire_owned())
            else {
                // Out of files or of slots: the API server sees a closed connection and decides.
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let connection =
                Arc::clone(&self).connection(stream, client, acceptor.clone(), drain.clone());
            connections.spawn(async move {
                connection.await;
                drop(slot);
            });
        }
        while connections.join_next().await.is_some() {}
        Ok(())
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        client: SocketAddr,
        acceptor: TlsAcceptor,
        drain: Drain,
    ) {
        let stream = match timeout(READ_TIMEOUT, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                // An API server that does not trust the certificate yet, or whoever scans ports.
                return tracing::debug!(%client, "no TLS with the webhook: {}", ErrorChain(&error));
            }
            Err(_) => return,
        };
        let service = service_fn(|request| {
            let webhook = Arc::clone(&self);
            async move { Ok::<_, Infallible>(webhook.respond(request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE_MAX)
            .serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        tokio::select! {
            // A client that breaks off is no event.
            _ = &mut connection => {}
            () = lingered(&drain) => {
                connection.as_mut().graceful_shutdown();
                let _ = connection.await;
            }
        }
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let question = match (request.method(), request.uri().path()) {
            (&Method::POST, "/inject") => Question::Inject,
            (&Method::POST, "/review") => Question::Review,
            (_, path) => return text(StatusCode::NOT_FOUND, format!("no such path: {path}")),
        };
        let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
        let Ok(Ok(body)) = timeout(READ_TIMEOUT, body).await else {
            return text(StatusCode::BAD_REQUEST, "the body is too large or too slow".to_owned());
        };
        let answer = match self.answer(question, &body.to_bytes()).await {
            Ok(answer) => answer,
            Err((status, why)) => {
                self.metrics.injection("failed");
                tracing::warn!("the API server's question cannot be answered: {why}");
                return text(status, why);
            }
        };
        self.metrics.injection(answer.did);
        match serde_json::to_vec(&answer.review) {
            Ok(body) => {
                let response = Response::builder().header("content-type", "application/json");
                response.body(body.into()).unwrap_or_default()
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }

    async fn answer(
        &self,
        question: Question,
        body: &[u8],
    ) -> Result<Answer, (StatusCode, String)> {
        let bad = |error: AskedError| (StatusCode::BAD_REQUEST, ErrorChain(&error).to_string());
        let request = admission::parse(body).map_err(bad)?;
        let asks_for_pods = question == Question::Inject || request.kind.kind != "Namespace";
        let inherited = match &request.namespace {
            Some(namespace) if asks_for_pods => self.annotations(namespace).await?,
            _ => BTreeMap::new(),
        };
        admission::answer(question, &request, &inherited, &self.settings).map_err(bad)
    }

    /// The annotations of a namespace, read from the API server itself: what is watched lags behind,
    /// and the first pods of a new namespace would go unmeshed.
    async fn annotations(
        &self,
        name: &str,
    ) -> Result<BTreeMap<String, String>, (StatusCode, String)> {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        let failed = |why: String| {
            let why = format!("the namespace {name} cannot be read: {why}");
            (StatusCode::SERVICE_UNAVAILABLE, why)
        };
        match timeout(READ_TIMEOUT, namespaces.get(name)).await {
            Ok(Ok(found)) => Ok(found.metadata.annotations.unwrap_or_default()),
            Ok(Err(error)) => Err(failed(ErrorChain(&error).to_string())),
            Err(_) => Err(failed(format!("no answer within {READ_TIMEOUT:?}"))),
        }
    }
}

/// A replica that goes is asked for a moment longer, until nodes and API servers know that it goes:
/// a pod that is created meanwhile would have no sidecar.
async fn lingered(drain: &Drain) {
    drain.wait().await;
    tokio::time::sleep(LINGER).await;
}

fn text(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text + "\n"));
    *response.status_mut() = status;
    response
}

/// More than API servers hold open.
const CONNECTIONS_MAX: usize = 512;
/// An object has 1.5 MiB at most, and a question has two of them.
const BODY_BYTES_MAX: usize = 8 << 20;
/// The API server waits for 10 s in all.
const READ_TIMEOUT: Duration = Duration::from_secs(4);
/// API servers keep idle connections for 90 s; who closes first fails a request that is on its way.
const IDLE_MAX: Duration = Duration::from_secs(120);
/// Within the grace period of a drain.
const LINGER: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
