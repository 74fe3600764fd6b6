//! A mesh in memory for the tests of the identity service: a store that can fail, tokens that are
//! what a test says, a clock that a test moves, and the service itself on a real TLS port.

// Each test file uses a part of it, and clippy knows tests by #[test] only.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod proxy;
pub mod world;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use linkerd2_proxy_api::identity::identity_client::IdentityClient;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, ServerName};
use steadfast_api::{KeyId, UnixTime};
use steadfast_api_grpc::fleet_client::FleetClient;
use steadfast_api_grpc::trust_client::TrustClient;
use steadfast_identity::app::{App, Platform};
use steadfast_identity::authority::{Authority, Founding, found};
use steadfast_identity::config::Config;
use steadfast_identity::issuance_log::LogConfig;
use steadfast_identity::limits::Rates;
use steadfast_identity::own::server_config;
use steadfast_platform::keys::{FileKeys, Zeroizing};
use steadfast_platform::kubernetes::Namespaces;
use steadfast_platform::store::{Event, ISSUER_REQUESTS_PREFIX, TRUST_DOMAIN_KEY};
use steadfast_platform::{
    Entry, ReviewedToken, Revision, Store, StoreError, TokenRefusal, TokenReview,
};
use steadfast_process::{Clock, Drain, SystemClock, Tasks};
use steadfast_rotation_protocol::TrustDomainState;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

/// The machine's clocks, moved by a test.
#[derive(Default)]
pub struct TestClock {
    pub wall_ms: AtomicI64,
    pub boot_ms: AtomicI64,
}

impl Clock for TestClock {
    fn now(&self) -> UnixTime {
        let moved = self.wall_ms.load(Ordering::SeqCst);
        UnixTime::from_millis(SystemClock.now().as_millis().saturating_add_signed(moved))
    }

    fn since_boot(&self) -> Duration {
        let moved = self.boot_ms.load(Ordering::SeqCst);
        SystemClock.since_boot() + Duration::from_millis(u64::try_from(moved).unwrap())
    }
}

/// A store in memory.
pub struct MemoryStore {
    inner: Arc<Mutex<Inner>>,
    changed: watch::Sender<u64>,
    pub down: AtomicBool,
    /// Of clients; a test writes by itself.
    pub refuse_writes: AtomicBool,
    /// How often requests for issuers were listed.
    pub lists: AtomicUsize,
}

#[derive(Default)]
struct Inner {
    entries: BTreeMap<String, Entry>,
    history: Vec<Event>,
    revision: u64,
}

impl Inner {
    fn write(&mut self, key: &str, value: Option<Bytes>) -> Revision {
        self.revision += 1;
        let (key, revision) = (key.to_owned(), Revision(self.revision));
        self.history.push(match value {
            Some(value) => {
                let entry = Entry { key: key.clone(), value, revision };
                self.entries.insert(key, entry.clone());
                Event::Put(entry)
            }
            None => {
                self.entries.remove(&key);
                Event::Deleted { key, revision }
            }
        });
        revision
    }
}

impl MemoryStore {
    pub fn new() -> Arc<Self> {
        let (changed, _) = watch::channel(0);
        let (down, refuse_writes) = (AtomicBool::new(false), AtomicBool::new(false));
        let (inner, lists) = (Arc::default(), AtomicUsize::new(0));
        Arc::new(Self { inner, changed, down, refuse_writes, lists })
    }

    pub fn put(&self, key: &str, value: impl Into<Bytes>) -> Revision {
        let revision = self.inner.lock().unwrap().write(key, Some(value.into()));
        self.changed.send_replace(revision.0);
        revision
    }

    pub fn delete(&self, key: &str) {
        let revision = self.inner.lock().unwrap().write(key, None);
        self.changed.send_replace(revision.0);
    }

    /// Puts an entry under a revision that was there before: a backup put back.
    pub fn restore(&self, key: &str, value: impl Into<Bytes>, revision: Revision) {
        let mut inner = self.inner.lock().unwrap();
        let entry = Entry { key: key.to_owned(), value: value.into(), revision };
        inner.entries.insert(key.to_owned(), entry);
    }

    pub fn put_state(&self, state: &TrustDomainState) -> Revision {
        self.put(TRUST_DOMAIN_KEY, serde_json::to_vec(state).unwrap())
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.down.load(Ordering::SeqCst) {
            return Err(StoreError::Unavailable("the test took the store down".to_owned()));
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.check()?;
        Ok(self.inner.lock().unwrap().entries.get(key).cloned())
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        self.check()?;
        if prefix == ISSUER_REQUESTS_PREFIX {
            self.lists.fetch_add(1, Ordering::SeqCst);
        }
        let inner = self.inner.lock().unwrap();
        let entries = inner.entries.values().filter(|e| e.key.starts_with(prefix));
        Ok((entries.cloned().collect(), Revision(inner.revision)))
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Option<Bytes>,
    ) -> Result<Revision, StoreError> {
        self.check()?;
        if self.refuse_writes.load(Ordering::SeqCst) {
            return Err(StoreError::WriteFailed("the test has filled the disk".to_owned()));
        }
        let mut inner = self.inner.lock().unwrap();
        let actual = inner.entries.get(key).map(|entry| entry.revision);
        if actual != expected {
            return Err(StoreError::Conflict { key: key.to_owned(), expected, actual });
        }
        let revision = inner.write(key, value);
        self.changed.send_replace(revision.0);
        Ok(revision)
    }

    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<Event, StoreError>>, StoreError> {
        self.check()?;
        let (prefix, inner) = (prefix.to_owned(), Arc::clone(&self.inner));
        let start = (self.changed.subscribe(), usize::try_from(from.0).unwrap());
        // Revisions have no hole: what comes after `from` is what stands behind it in the history.
        let events = futures::stream::unfold(start, move |(mut changed, at)| {
            let inner = Arc::clone(&inner);
            async move {
                let ahead = |revision: &u64| *revision > at as u64;
                changed.wait_for(ahead).await.ok()?;
                let event = inner.lock().unwrap().history[at].clone();
                Some((event, (changed, at + 1)))
            }
        });
        let wanted = events.filter(move |event| {
            let (Event::Put(Entry { key, .. }) | Event::Deleted { key, .. }) = event else {
                return futures::future::ready(false);
            };
            futures::future::ready(key.starts_with(&prefix))
        });
        Ok(wanted.map(Ok).boxed())
    }
}

/// Tokens by their text.
#[derive(Default)]
pub struct TestTokens {
    pub known: Mutex<HashMap<String, Result<ReviewedToken, TokenRefusal>>>,
    pub reviews: AtomicI64,
}

#[async_trait::async_trait]
impl TokenReview for TestTokens {
    async fn review(&self, token: &[u8], _: &str) -> Result<ReviewedToken, TokenRefusal> {
        self.reviews.fetch_add(1, Ordering::SeqCst);
        let token = String::from_utf8_lossy(token).into_owned();
        let unknown = || Err(TokenRefusal::Malformed("unknown to the test".to_owned()));
        self.known.lock().unwrap().get(&token).cloned().unwrap_or_else(unknown)
    }
}

pub fn token_of(namespace: &str, service_account: &str, pod: &str) -> ReviewedToken {
    ReviewedToken {
        namespace: namespace.into(),
        service_account: service_account.into(),
        pod_name: pod.into(),
        pod_uid: format!("uid-of-{pod}"),
        node: Some("node-1".into()),
        token_id: format!("token-of-{pod}"),
        expires: SystemClock.now() + Duration::from_secs(3600),
    }
}

/// The service on a real port, with everything around it.
pub struct Mesh {
    pub dir: tempfile::TempDir,
    pub founding: Founding,
    pub store: Arc<MemoryStore>,
    pub tokens: Arc<TestTokens>,
    pub clock: Arc<TestClock>,
    pub clock_offset_ms: Arc<AtomicI64>,
    pub app: App,
    pub address: SocketAddr,
    pub plaintext: SocketAddr,
    pub drain: Drain,
    running: tokio::task::JoinSet<()>,
}

/// Another replica.
pub struct Beside {
    pub app: App,
    _dir: tempfile::TempDir,
    _running: tokio::task::JoinSet<()>,
}

pub fn rates(n: u32) -> Rates {
    let rate = std::num::NonZeroU32::new(n).unwrap();
    Rates { common_per_second: rate, renewals_per_second: rate, workload_per_minute: rate }
}

pub fn config() -> Config {
    let any = "127.0.0.1:0".parse().unwrap();
    Config {
        issuer_secret: None,
        platform: steadfast_platform::access::Platform::Standalone("/".into()),
        log_dir: "/".into(),
        listen: any,
        plaintext_listen: None,
        admin: any,
        svid_ttl: Duration::from_secs(3600),
        namespaces: Namespaces { control: "steadfast".into(), anchors: "steadfast-anchors".into() },
        audience: "identity.l5d.io".into(),
        rates: rates(100_000),
        log_file_bytes_max: 1 << 20,
        log_files_kept: 2,
        log_filter: "info".into(),
        log_format: steadfast_process::log::Format::Plain,
        restarted: false,
    }
}

impl Mesh {
    pub async fn start() -> Self {
        Self::start_with(config()).await
    }

    /// Runs, and is ready.
    pub async fn start_with(config: Config) -> Self {
        let founding = found(&"cluster.local".parse().unwrap(), SystemClock.now()).unwrap();
        let mesh = Self::start_unready(config, founding).await;
        let ready = mesh.app.readiness.ready();
        if tokio::time::timeout(WAIT, ready).await.is_err() {
            panic!("not ready: {:?}", mesh.app.readiness.report());
        }
        mesh
    }

    pub async fn start_unready(config: Config, founding: Founding) -> Self {
        Self::start_prepared(config, founding, |_| ()).await
    }

    /// Runs after something was done to the directory of its log.
    pub async fn start_prepared(
        config: Config,
        founding: Founding,
        prepare: impl Fn(&std::path::Path),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let keys = FileKeys::open(dir.path().join("keys/issuers")).unwrap();
        let pkcs8 = Zeroizing::new(founding.issuer.pkcs8.to_vec());
        keys.put_new(founding.issuer.id, pkcs8).await.unwrap();
        std::fs::create_dir(dir.path().join("log")).unwrap();
        prepare(&dir.path().join("log"));
        let store = MemoryStore::new();
        store.put_state(&founding.state);
        store.put("tokens/jwks", "{\"keys\":[]}");
        let tokens = Arc::new(TestTokens::default());
        for (token, reviewed) in [
            ("web", token_of("demo", "web", "web-1")),
            ("api", token_of("demo", "api", "api-1")),
            ("controller", token_of("steadfast-anchors", "steadfast-rotation", "rotation-1")),
        ] {
            tokens.known.lock().unwrap().insert(token.into(), Ok(reviewed));
        }
        let clock = Arc::new(TestClock::default());
        let clock_offset_ms = Arc::new(AtomicI64::new(0));
        let offset = Arc::clone(&clock_offset_ms);
        let platform = Platform {
            proposed: watch::channel(None).1,
            store: store.clone(),
            keys: Arc::new(keys),
            tokens: tokens.clone(),
            clock: clock.clone(),
            clock_offset_ms: Box::new(move || Some(offset.load(Ordering::SeqCst))),
        };
        let log = LogConfig {
            directory: dir.path().join("log"),
            file_bytes_max: config.log_file_bytes_max,
            files_kept: config.log_files_kept,
        };
        let (mut tasks, drain) = (Tasks::new(), Drain::new());
        let mut registry = prometheus_client::registry::Registry::default();
        let app = App::start(&config, platform, log, &mut registry, &mut tasks, &drain).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let plaintext_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let plaintext = plaintext_listener.local_addr().unwrap();
        let tls = server_config(Arc::clone(&app.own)).unwrap();
        tasks.spawn("tls", app.server.clone().serve(listener, Some(tls)));
        tasks.spawn("plaintext", app.server.clone().serve(plaintext_listener, None));
        let mut running = tokio::task::JoinSet::new();
        let stop = drain.clone();
        running.spawn(async move {
            let never = std::future::pending();
            let _ = tasks.run_until(never, &stop, Duration::ZERO).await;
        });
        Self {
            dir,
            founding,
            store,
            tokens,
            clock,
            clock_offset_ms,
            app,
            address,
            plaintext,
            drain,
            running,
        }
    }

    /// Another replica of the same mesh, which serves no port.
    pub async fn beside(&self) -> Beside {
        self.beside_with(config()).await
    }

    pub async fn beside_with(&self, config: Config) -> Beside {
        let dir = tempfile::tempdir().unwrap();
        let offset = Arc::clone(&self.clock_offset_ms);
        let platform = Platform {
            proposed: watch::channel(None).1,
            store: self.store.clone(),
            keys: Arc::new(FileKeys::open(self.dir.path().join("keys/issuers")).unwrap()),
            tokens: self.tokens.clone(),
            clock: self.clock.clone(),
            clock_offset_ms: Box::new(move || Some(offset.load(Ordering::SeqCst))),
        };
        let directory = dir.path().to_owned();
        let log = LogConfig { directory, file_bytes_max: 1 << 20, files_kept: 2 };
        let (mut tasks, drain) = (Tasks::new(), Drain::new());
        let mut registry = prometheus_client::registry::Registry::default();
        let app = App::start(&config, platform, log, &mut registry, &mut tasks, &drain).unwrap();
        let mut running = tokio::task::JoinSet::new();
        running.spawn(async move {
            let never = std::future::pending();
            let _ = tasks.run_until(never, &drain, Duration::ZERO).await;
        });
        // Halted, it has all that it needs and is not ready.
        let started = || {
            let report = app.readiness.report();
            let halted = report.reasons.get("issuer").is_some_and(|r| r.contains("SFT-ID-026"));
            report.ready || halted && app.own.issuer().is_some()
        };
        self.wait(started, "a second replica started").await;
        Beside { app, _dir: dir, _running: running }
    }

    /// A gRPC channel over real TLS, which trusts the mesh's anchors and expects its name.
    pub async fn channel(&self) -> Channel {
        let anchors = [&self.founding.active, &self.founding.standby];
        channel(self.address, client_config(anchors)).await
    }

    pub async fn trust(&self) -> TrustClient<Channel> {
        TrustClient::new(self.channel().await)
    }

    pub async fn fleet(&self) -> FleetClient<Channel> {
        FleetClient::new(self.channel().await)
    }

    pub async fn linkerd(&self) -> IdentityClient<Channel> {
        IdentityClient::new(self.channel().await)
    }

    /// The lines of the issuance log.
    pub fn log(&self) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.dir.path().join("log/issuance.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits until `/ready` says so, or names this component with this text.
    pub async fn ready(&self) {
        self.wait(|| self.app.readiness.report().ready, "ready").await;
    }

    pub async fn not_ready(&self, component: &str, text: &str) {
        let says = || {
            let reasons = self.app.readiness.report().reasons;
            reasons.get(component).is_some_and(|reason| reason.contains(text))
        };
        self.wait(says, text).await;
    }

    pub async fn wait(&self, level: impl Fn() -> bool, what: &str) {
        let waiting = async {
            while !level() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(WAIT, waiting).await.is_err() {
            panic!("never {what}: {:?}", self.app.readiness.report());
        }
    }
}

/// A gRPC channel over real TLS, which expects the identity service's name.
pub async fn channel(address: SocketAddr, config: Arc<rustls::ClientConfig>) -> Channel {
    let connector = tower::service_fn(move |_: http::Uri| {
        let config = Arc::clone(&config);
        async move {
            let stream = try_connect(address, &config).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    let endpoint = Endpoint::from_static("http://identity");
    endpoint.connect_with_connector(connector).await.unwrap()
}

/// A TLS connection that expects the identity service's name.
pub async fn try_connect(
    address: SocketAddr,
    config: &Arc<rustls::ClientConfig>,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(SERVICE_NAME).unwrap();
    tokio_rustls::TlsConnector::from(Arc::clone(config)).connect(name, stream).await
}

pub fn client_config(anchors: [&Authority; 2]) -> Arc<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    for anchor in anchors {
        roots.add(CertificateDer::from(anchor.der.clone())).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// A request for a certificate with a fresh P-256 key.
pub fn csr(params: &CertificateParams) -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    params.serialize_request(&key).unwrap().der().to_vec()
}

pub fn plain_csr() -> Vec<u8> {
    csr(&empty())
}

pub fn empty() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
}

pub fn key_id(der: &[u8]) -> KeyId {
    steadfast_api::Svid::parse(der).unwrap().key_id
}

pub const SERVICE_NAME: &str =
    "steadfast-identity.steadfast.serviceaccount.identity.steadfast.cluster.local";
pub const WEB_NAME: &str = "web.demo.serviceaccount.identity.steadfast.cluster.local";
pub const WEB_ID: &str = "spiffe://cluster.local/ns/demo/sa/web";
/// Far longer than anything here takes.
pub const WAIT: Duration = Duration::from_secs(30);
