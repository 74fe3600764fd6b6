//! Wires everything: the only place that knows all parts.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response};
use prometheus_client::registry::Registry;
use steadfast_api::spiffe::SpiffeError;
use steadfast_api::{Code, DnsIdentity, TrustDomain};
use steadfast_identity_client::{
    BootstrapBundle, ClientAuth, Config as IdentityConfig, ConfigError, Identity, Incoming, Status,
    incoming,
};
use steadfast_platform::access::{Access, Place};
use steadfast_platform::kubernetes::{ConnectError, Namespaces};
use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_platform::{Store, bundle_file};
use steadfast_process::admin::Admin;
use steadfast_process::drain::terminated;
use steadfast_process::readiness::Component;
use steadfast_process::tasks::TaskError;
use steadfast_process::{Clock, Drain, ErrorChain, Readiness, SystemClock, Tasks};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use crate::config::Config;
use crate::index::MeshNames;
use crate::inject::Settings;
use crate::webhook::{self, Webhook, WebhookError};
use crate::{Board, Destination, DestinationSettings, Metrics, feed};

/// Why control ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// An address cannot be listened on.
    #[error("cannot listen on {0}; is another process there?")]
    Bind(SocketAddr, #[source] io::Error),
    /// There is no API server to be found.
    #[error("there is no way to the store")]
    Connect(#[from] ConnectError),
    /// The configuration of its identity.
    #[error("control's own identity cannot be configured")]
    Identity(#[from] ConfigError),
    /// What every meshed pod has in common.
    #[error("--injection {0}")]
    Injection(std::path::PathBuf, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// Control's own name.
    #[error("control's own name cannot be made")]
    Name(#[from] SpiffeError),
    /// A service.
    #[error("control ended early")]
    Task(#[from] TaskError),
    /// The webhook.
    #[error("there is no webhook")]
    Webhook(#[from] WebhookError),
}

/// Runs control until SIGTERM or SIGINT.
///
/// # Errors
/// [`AppError`].
pub async fn run(config: Config) -> Result<(), AppError> {
    let (drain, readiness) = (Drain::new(), Readiness::new());
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let bound = Admin::bind_twice(config.admin).await;
    let (admin, early_admin) = bound.map_err(|error| AppError::Bind(config.admin, error))?;
    let listener = bind(config.listen).await?;
    let plaintext = match config.plaintext_listen {
        Some(addr) => Some(bind(addr).await?),
        None => None,
    };
    let webhook = match config.webhook.clone() {
        Some(webhook) => {
            Some((bind(webhook.listen).await?, settings(&webhook.injection)?, webhook))
        }
        None => None,
    };
    let resources = readiness.component("resources", "the resources of the store are not read yet");
    // It reads nothing of what lies with the anchors.
    let control = config.control_namespace.clone();
    let namespaces = Namespaces { anchors: control.clone(), control };
    let Access { store, place, .. } = config.platform.open(namespaces).await?;

    // Everything has the trust domain in its name. Until the store tells it, the admin port says
    // what is waited for.
    let waiting = readiness.component("trust_domain", "the store was not asked yet");
    let early = Admin::new(Arc::new(Registry::default()), readiness.clone());
    let trust_domain = tokio::select! {
        found = trust_domain(&*store, &waiting) => found,
        ended = early.serve(early_admin, drain.clone()) => match ended {
            Ok(()) => return Ok(()),
            Err(never) => match never {},
        },
        stopped = terminated() => return stopped.map_err(|e| TaskError::Signals(e).into()),
    };
    drop(waiting);

    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let identity = identity(&config, &trust_domain, clock.clone(), &readiness, &mut registry)?;
    let names = MeshNames { trust_domain, control_namespace: config.control_namespace.clone() };
    let board = Arc::new(Board::new(names));
    let settings =
        DestinationSettings { cluster_domain: config.cluster_domain.clone(), ..Default::default() };
    let destination =
        || Destination::new(board.clone(), metrics.clone(), drain.clone(), settings.clone());

    let mut tasks = Tasks::new();
    if let (Place::Kubernetes(client, _), Some((listener, settings, webhook))) = (&place, webhook) {
        let names = webhook::Names {
            host: format!("steadfast-control.{}.svc", config.control_namespace),
            replica: steadfast_process::hostname(),
            configuration: webhook.configuration,
        };
        let (client, clock) = (client.clone(), clock.clone());
        let (webhook, trusted) = Webhook::new(client, names, settings, clock, metrics.clone())?;
        let told = readiness.component("webhook", "the API server does not trust it yet");
        let stop = drain.clone();
        tasks.spawn("trust in the webhook", async move {
            tokio::select! {
                never = trusted.keep(told) => match never {},
                () = stop.wait() => Ok::<_, Infallible>(()),
            }
        });
        tasks.spawn("webhook", webhook.serve(listener, drain.clone()));
    }
    if let Place::Kubernetes(..) = place {
        let keep = bundle_file::keep(Arc::clone(&store), config.bundle_file.clone());
        let stop = drain.clone();
        tasks.spawn("own bundle", async move {
            tokio::select! {
                never = keep => match never {},
                () = stop.wait() => Ok::<_, Infallible>(()),
            }
        });
    }
    let tls = incoming(Incoming {
        listener,
        contexts: identity.contexts(),
        client_auth: ClientAuth::Required,
        alpns: &[b"h2"],
        refusals: identity.refusals(),
        drain: drain.clone(),
    });
    tasks.spawn("destination", serve(destination(), tls, drain.clone()));
    if let Some(listener) = plaintext {
        let connections = TcpListenerStream::new(listener);
        tasks.spawn("destination, plaintext", serve(destination(), connections, drain.clone()));
    }
    let status = identity.status();
    tasks.spawn("identity", identity.run(drain.clone()));
    tasks.spawn("resources", follow(store, board, metrics, clock, resources, drain.clone()));
    let pages = Admin::new(Arc::new(registry), readiness)
        .with_routes(move |request| identity_page(request, &status.borrow()));
    tasks.spawn("admin", pages.serve(admin, drain.clone()));
    tracing::info!(address = %config.listen, "control serves the destination API");
    Ok(tasks.run(&drain, config.grace_period).await?)
}

/// Serves the destination API on these connections until the drain starts and the streams have
/// ended.
///
/// # Errors
/// When the server cannot be built or its listener is broken.
pub async fn serve<IO>(
    destination: Destination,
    connections: impl Stream<Item = io::Result<IO>> + Send + 'static,
    drain: Drain,
) -> Result<(), tonic::transport::Error>
where
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let _unfinished = drain.hold();
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .add_service(destination.into_service())
        .serve_with_incoming_shutdown(connections, drain.wait())
        .await
}

/// The trust domain that the store knows; waits until it knows one.
async fn trust_domain(store: &dyn Store, waiting: &Component) -> TrustDomain {
    let mut logged = String::new();
    loop {
        let reason = match store.get(TRUST_DOMAIN_KEY).await {
            Ok(Some(entry)) => match parse_trust_domain(&entry.value) {
                Ok(trust_domain) => return trust_domain,
                Err(reason) => format!("the trust domain in the store cannot be read: {reason}"),
            },
            Ok(None) => "the store has no trust domain yet: run `steadfast trust init`".to_owned(),
            Err(error) => {
                format!("{}: {}", Code::STORE_UNAVAILABLE, ErrorChain(&error))
            }
        };
        waiting.not_ready(&reason);
        if logged != reason {
            tracing::warn!("{reason}");
            logged = reason;
        }
        tokio::time::sleep(TRUST_DOMAIN_PAUSE).await;
    }
}

/// Its name is all that is needed of the stored object, whatever else a newer version puts there.
fn parse_trust_domain(value: &[u8]) -> Result<TrustDomain, String> {
    let object: serde_json::Value = serde_json::from_slice(value).map_err(|e| e.to_string())?;
    let name = object.get("trust_domain").and_then(|name| name.as_str());
    name.ok_or("it has no trust_domain")?.parse().map_err(|e: SpiffeError| e.to_string())
}

fn identity(
    config: &Config,
    trust_domain: &TrustDomain,
    clock: Arc<dyn Clock>,
    readiness: &Readiness,
    registry: &mut Registry,
) -> Result<Identity, AppError> {
    let namespace = &config.control_namespace;
    let name = |account| DnsIdentity::new(account, namespace, namespace, trust_domain);
    let config = IdentityConfig {
        local: name("steadfast-control")?,
        identity_address: config.identity_addr.clone(),
        identity_name: name("steadfast-identity")?,
        token_file: config.token_file.clone(),
        bootstrap: BootstrapBundle::File(config.bundle_file.clone()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    Ok(Identity::new(config, clock, readiness, registry)?)
}

/// `/identity.json`: who we are, as every process of ours tells it to loopback.
fn identity_page(request: &Request<Bytes>, status: &Status) -> Option<Response<String>> {
    let asked = request.method() == Method::GET && request.uri().path() == "/identity.json";
    // Strings and numbers alone: serialising them cannot fail.
    let body = || serde_json::to_string_pretty(status).unwrap_or_default() + "\n";
    asked.then(|| {
        let mut response = Response::new(body());
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(CONTENT_TYPE, json);
        response
    })
}

/// Follows the resources until the drain starts.
async fn follow(
    store: Arc<dyn Store>,
    board: Arc<Board>,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    synced: Component,
    drain: Drain,
) -> Result<(), Infallible> {
    tokio::select! {
        never = feed::follow(store, board, metrics, clock, synced) => match never {},
        () = drain.wait() => Ok(()),
    }
}

/// What every meshed pod has in common.
fn settings(path: &Path) -> Result<Settings, AppError> {
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| {
        AppError::Injection(path.to_owned(), error)
    };
    let text = std::fs::read(path).map_err(|error| wrong(error.into()))?;
    serde_json::from_slice(&text).map_err(|error| wrong(error.into()))
}

async fn bind(addr: SocketAddr) -> Result<TcpListener, AppError> {
    TcpListener::bind(addr).await.map_err(|error| AppError::Bind(addr, error))
}

const TRUST_DOMAIN_PAUSE: Duration = Duration::from_millis(250);
/// A client that is gone without a word is noticed within the sum of the two.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A sidecar watches at most some thousands of names and addresses.
const STREAMS_PER_CONNECTION_MAX: u32 = 16_384;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_admin_port_tells_controls_own_identity() {
        let status = Status { serial: Some("4A".to_owned()), ..Status::default() };
        let ask = |method, path| {
            let request = Request::builder().method(method).uri(path).body(Bytes::new()).unwrap();
            identity_page(&request, &status)
        };
        let page = ask(Method::GET, "/identity.json").unwrap();
        let page: serde_json::Value = serde_json::from_str(page.body()).unwrap();
        assert_eq!(page["serial"], "4A");
        assert!(ask(Method::POST, "/identity.json").is_none());
        assert!(ask(Method::GET, "/other").is_none());
    }
}
