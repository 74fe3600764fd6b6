//! Puts the process together: what it is made of, which services run, how it stops.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use steadfast_api::KeyId;
use steadfast_platform::access::{Access, Place};
use steadfast_platform::keys::{FileKeys, KeyStore, KeyStoreError};
use steadfast_platform::kubernetes::{
    ConnectError, KubeTokens, PodRequests, Purpose, SecretKeys, watched,
};
use steadfast_platform::standalone::Tokens;
use steadfast_platform::{Store, TokenReview};
use steadfast_process::admin::Admin;
use steadfast_process::tasks::TaskError;
use steadfast_process::{Clock, Drain, Readiness, SystemClock, Tasks};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::admin::Pages;
use crate::certify::{Certifier, IN_FLIGHT_MAX, Profile};
use crate::config::Config;
use crate::fleet::Fleet;
use crate::front::Front;
use crate::holders::Holders;
use crate::issuance_log::{IssuanceLog, LogConfig, LogError, Writer};
use crate::issuer_keys::IssuerKeys;
use crate::issuer_source::IssuerSource;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::own::{OwnSvid, server_config};
use crate::pod_certificates::PodCertificates;
use crate::promise::Promise;
use crate::replica::{Replica, Sources};
use crate::review::Reviews;
use crate::server::Server;
use crate::service::Service;
use crate::streams::Streams;

/// What differs between platforms and in tests.
pub struct Platform {
    /// The store.
    pub store: Arc<dyn Store>,
    /// The keys of issuers.
    pub keys: Arc<dyn KeyStore>,
    /// The key of an issuer that another tool keeps.
    pub proposed: watch::Receiver<Option<KeyId>>,
    /// Who holds a token.
    pub tokens: Arc<dyn TokenReview>,
    /// The clocks.
    pub clock: Arc<dyn Clock>,
    /// Our wall clock less the store's, where the store says its time.
    pub clock_offset_ms: Box<dyn Fn() -> Option<i64> + Send + Sync>,
}

/// The service, put together and running, but for its listeners.
pub struct App {
    /// Issues.
    pub certifier: Arc<Certifier>,
    /// The trust streams.
    pub streams: Arc<Streams>,
    /// What the server shows.
    pub own: Arc<OwnSvid>,
    /// Serves listeners.
    pub server: Server,
    /// Why it is not ready.
    pub readiness: Readiness,
    writer: Writer,
}

/// Why the process did not start or did not stop as asked.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// An address that cannot be listened on.
    #[error("cannot listen on {0}: is another process there already?")]
    Bind(SocketAddr, #[source] std::io::Error),
    /// There is no API server to be found.
    #[error("there is no way to the store")]
    Connect(#[from] ConnectError),
    /// The directory of the issuers' keys.
    #[error("cannot use the directory of the issuers' keys")]
    Keys(#[from] KeyStoreError),
    /// The issuance log.
    #[error("cannot start")]
    Log(#[from] LogError),
    /// A service ended.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// The TLS configuration.
    #[error("cannot serve TLS")]
    Tls(#[from] rustls::Error),
}

/// Runs the service until SIGTERM.
///
/// # Errors
/// Why it did not start, or which service failed.
pub async fn run(config: Config) -> Result<(), AppError> {
    let listener = bind(config.listen).await?;
    let admin = bind(config.admin).await?;
    let plaintext = match config.plaintext_listen {
        Some(address) => Some(bind(address).await?),
        None => None,
    };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let Access { store, clock_offset_ms, place } =
        config.platform.open(config.namespaces.clone()).await?;
    let (mut tasks, drain, mut registry) = (Tasks::new(), Drain::new(), Registry::default());
    let (keys, tokens): (Arc<dyn KeyStore>, Arc<dyn TokenReview>) = match &place {
        Place::Kubernetes(client, namespaces) => (
            Arc::new(SecretKeys::new(client.clone(), &namespaces.control, Purpose::Issuers)),
            Arc::new(KubeTokens::new(client.clone())),
        ),
        Place::Standalone(directory) => {
            let (tokens, follow_tokens) = Tokens::new(Arc::clone(&store), Arc::clone(&clock));
            tasks.spawn("tokens", until(drain.clone(), follow_tokens));
            (Arc::new(FileKeys::open(directory.issuer_keys())?), tokens)
        }
    };
    let clock_offset_ms = Box::new(move || clock_offset_ms());
    let (proposed, proposals) = watch::channel(None);
    let store_too = Arc::clone(&store);
    let platform = Platform { store, keys, proposed: proposals, tokens, clock, clock_offset_ms };
    let log = LogConfig {
        directory: config.log_dir.clone(),
        file_bytes_max: config.log_file_bytes_max,
        files_kept: config.log_files_kept,
    };
    let app = App::start(&config, platform, log, &mut registry, &mut tasks, &drain)?;
    if let Place::Kubernetes(client, namespaces) = place {
        let requests = PodRequests::new(client.clone());
        let requests = PodCertificates::new(Arc::clone(&app.certifier), requests);
        tasks.spawn("pods' certificates", until(drain.clone(), requests.run()));
        if let Some(name) = &config.issuer_secret {
            let changes = watched::secret(client.clone(), &namespaces.control, name);
            let source = IssuerSource {
                source: format!("the Secret {}/{name}", namespaces.control),
                store: store_too,
                fetch: watched::secret_now(client.clone(), &namespaces.control, name),
                keys: Arc::new(SecretKeys::new(client, &namespaces.control, Purpose::Issuers)),
                replica: Arc::clone(&app.certifier.replica),
                proposed,
            };
            tasks.spawn("external issuer", until(drain.clone(), source.run(changes)));
        }
    }
    let tls = server_config(Arc::clone(&app.own))?;
    tasks.spawn("listener", app.server.clone().serve(listener, Some(tls)));
    if let Some(plaintext) = plaintext {
        tasks.spawn("plaintext listener", app.server.clone().serve(plaintext, None));
    }
    let admin_port = app.admin(registry);
    tasks.spawn("admin", admin_port.serve(admin, drain.clone()));
    let stopped = tasks.run(&drain, DRAIN_DEADLINE).await;
    app.close().await;
    Ok(stopped?)
}

impl App {
    /// Puts the service together and starts what it does by itself. Must be called within a
    /// runtime.
    ///
    /// # Errors
    /// An issuance log that cannot be opened.
    pub fn start(
        config: &Config,
        platform: Platform,
        log: LogConfig,
        registry: &mut Registry,
        tasks: &mut Tasks,
        drain: &Drain,
    ) -> Result<Self, AppError> {
        let (metrics, readiness) = (Metrics::register(registry), Readiness::new());
        let clock = Arc::clone(&platform.clock);
        let log_clock = Arc::clone(&clock);
        let (log, writer) = IssuanceLog::open(log, move || log_clock.now())?;
        let reviews = Reviews::new(platform.tokens, config.audience.clone(), Arc::clone(&clock));
        let certifier = Arc::new(Certifier {
            replica: Replica::new(Arc::clone(&clock), metrics.clone()),
            reviews: Arc::clone(&reviews),
            limits: Limits::new(config.rates),
            holders: Holders::new(Arc::clone(&platform.store)),
            log,
            clock,
            metrics: metrics.clone(),
            profile: Profile {
                control_namespace: config.namespaces.control.clone(),
                controller_namespace: config.namespaces.anchors.clone(),
                svid_lifetime: config.svid_ttl,
            },
            in_flight: Semaphore::new(IN_FLIGHT_MAX),
        });
        let streams = Streams::new(Arc::clone(&certifier), drain.clone());
        let own = Arc::new(OwnSvid::default());
        let fleet = Fleet::new(Arc::clone(&certifier), Arc::clone(&streams), Arc::clone(&own));
        let service = Service { certifier: Arc::clone(&certifier), fleet: Arc::clone(&fleet) };
        let front = Front::new(service, Arc::clone(&platform.store));
        let server = Server::new(front, Arc::clone(&streams), metrics, drain.clone());
        let store = Arc::clone(&platform.store);
        let (keys, keys_clock) = (Arc::clone(&platform.keys), Arc::clone(&platform.clock));
        let sources = Sources {
            store: platform.store,
            keys: platform.keys,
            clock_offset_ms: platform.clock_offset_ms,
        };
        let leased = readiness.component("trust_domain", "the store has not been read yet");
        let issuer = readiness.component("issuer", "the trust domain is not known yet");
        let own_ready = readiness.component("own_svid", "the service has no SVID of its own yet");
        let log_ready = readiness.component("issuance_log", "not opened yet");
        let replica = Arc::clone(&certifier.replica).run(sources, leased, issuer);
        tasks.spawn("trust domain", until(drain.clone(), replica));
        tasks.spawn("token reviews", until(drain.clone(), reviews.run(Arc::clone(&store))));
        let issuer_keys = IssuerKeys::new(
            Arc::clone(&certifier.replica),
            Arc::clone(&store),
            keys,
            keys_clock,
            platform.proposed,
        );
        tasks.spawn("issuers' keys", until(drain.clone(), issuer_keys.run()));
        let promise =
            Promise::new(Arc::clone(&certifier.replica), Arc::clone(&store), config.svid_ttl);
        tasks.spawn("promised life", until(drain.clone(), promise.run()));
        let renew = Arc::clone(&own).run(Arc::clone(&certifier), own_ready);
        tasks.spawn("own SVID", until(drain.clone(), renew));
        let tend = tend(Arc::clone(&certifier), Arc::clone(&streams), fleet, log_ready);
        tasks.spawn("housekeeping", until(drain.clone(), tend));
        Ok(Self { certifier, streams, own, server, readiness, writer })
    }

    /// The admin port: beside what every process shows, what [`Pages`] answers.
    pub fn admin(&self, registry: Registry) -> Admin {
        let pages = Pages {
            certifier: Arc::clone(&self.certifier),
            own: Arc::clone(&self.own),
            streams: Arc::clone(&self.streams),
        };
        Admin::new(Arc::new(registry), self.readiness.clone())
            .with_routes(move |request| pages.answer(request))
    }

    /// Waits for the last sync of the issuance log.
    pub async fn close(self) {
        let Self { certifier, streams, own, server, readiness, writer } = self;
        drop((certifier, streams, own, server, readiness));
        let joined = tokio::task::spawn_blocking(move || writer.join());
        if tokio::time::timeout(LOG_CLOSE_TIMEOUT, joined).await.is_err() {
            // Somebody still holds a handle (a connection past its deadline): the writer syncs
            // once a second in any case.
            tracing::warn!("the issuance log was not closed in time");
        }
    }
}

/// What must happen now and then, and what nobody else watches.
async fn tend(
    certifier: Arc<Certifier>,
    streams: Arc<Streams>,
    fleet: Arc<Fleet>,
    log_ready: steadfast_process::readiness::Component,
) -> Result<(), Infallible> {
    let mut health = certifier.log.health();
    loop {
        match &*health.borrow_and_update() {
            Ok(()) => log_ready.ready(),
            Err(error) => {
                log_ready.not_ready(&crate::refusal::Refusal::from(error.clone()).to_string());
            }
        }
        certifier.metrics.log_writable.set(i64::from(health.borrow().is_ok()));
        let now = certifier.clock.now();
        certifier.limits.tidy(now);
        streams.tidy(now);
        fleet.tidy();
        // A writer that ended has closed the log: every append says so.
        if let Ok(Err(_)) = tokio::time::timeout(TIDY_EVERY, health.changed()).await {
            tokio::time::sleep(TIDY_EVERY).await;
        }
    }
}

/// A service that goes on for ever ends when the process does.
async fn until<T>(
    drain: Drain,
    service: impl Future<Output = Result<T, Infallible>>,
) -> Result<(), Infallible> {
    tokio::select! {
        ended = service => ended.map(|_| ()),
        () = drain.wait() => Ok(()),
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, AppError> {
    let listener =
        TcpListener::bind(address).await.map_err(|error| AppError::Bind(address, error))?;
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "listening");
    }
    Ok(listener)
}

const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
const LOG_CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
const TIDY_EVERY: Duration = Duration::from_secs(5);
