//! What the tests of the two stories stand on: a dialler that hands out pipes, and a worker whose
//! TLS context is empty.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::LocalBoxFuture;
use prometheus_client::registry::Registry;
use steadfast_identity_client::{Contexts, Refusals};
use steadfast_process::{Clock, Drain, SystemClock};
use tokio::io::{DuplexStream, duplex};
use tokio::task::LocalSet;

use crate::accept::{Accepted, OrigDst};
use crate::config::Config;
use crate::connect::{Connect, Dial, Listener};
use crate::forward::Scratch;
use crate::http;
use crate::identity::Tls;
use crate::inbound::Inbound;
use crate::io::BoxIo;
use crate::metrics::Metrics;
use crate::outbound::Outbound;
use crate::policy::DefaultPolicies;
use crate::refusal::{Refusal, Reporter};
use crate::tasks::Tasks;
use crate::worker::Shared;

/// Hands out the pipes that a test put there, in order; remembers what was dialled.
#[derive(Default)]
pub(crate) struct Pipes {
    pub(crate) dialled: RefCell<Vec<SocketAddr>>,
    servers: RefCell<Vec<DuplexStream>>,
}

impl Pipes {
    /// The other end of the next connection that is dialled.
    pub(crate) fn server(&self) -> DuplexStream {
        let (ours, theirs) = duplex(PIPE_BYTES);
        self.servers.borrow_mut().insert(0, theirs);
        ours
    }
}

impl Dial for Pipes {
    fn dial(&self, addr: SocketAddr, _: Listener) -> LocalBoxFuture<'_, Result<BoxIo, Refusal>> {
        self.dialled.borrow_mut().push(addr);
        let source = std::io::ErrorKind::ConnectionRefused.into();
        let server = self.servers.borrow_mut().pop();
        let io = server.map(|io| Box::new(io) as BoxIo);
        async move {
            // As a network does: others come in meanwhile.
            tokio::task::yield_now().await;
            io.ok_or(Refusal::Unreachable { addr, source })
        }
        .boxed_local()
    }
}

/// Both stories on one worker, and the metrics that they count in.
pub(crate) struct World {
    pub(crate) inbound: Rc<Inbound>,
    pub(crate) outbound: Rc<Outbound>,
    pub(crate) pipes: Rc<Pipes>,
    pub(crate) connect: Rc<Connect>,
    pub(crate) http: http::Worker,
    registry: Registry,
}

impl World {
    /// With these variables beside those that are required.
    pub(crate) fn new(vars: &[(&'static str, &'static str)]) -> Self {
        let name = "web.demo.serviceaccount.identity.steadfast.cluster.local";
        let mut all = BTreeMap::from([
            ("LINKERD2_PROXY_IDENTITY_LOCAL_NAME", name),
            ("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", "/nowhere/token"),
            ("LINKERD2_PROXY_IDENTITY_SVC_ADDR", "127.0.0.1:1"),
            ("LINKERD2_PROXY_IDENTITY_SVC_NAME", name),
            ("STEADFAST_PROXY_BUNDLE_FILE", "/nowhere/bundle.json"),
        ]);
        all.extend(vars.iter().copied());
        let config = Arc::new(Config::parse(&all).unwrap());
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let (mut registry, contexts) = (Registry::default(), Contexts::new(clock.clone()));
        let shared = Shared {
            metrics: Metrics::register(&mut registry, clock.clone()),
            handshakes: Refusals::new(&mut registry, clock.clone()),
            policies: DefaultPolicies::new(&config.inbound, config.mode),
            discovery: None,
            contexts: contexts.subscribe(),
            budget: http::Budget::default(),
            drain: Drain::new(),
            config,
            clock,
        };
        let tls = Tls::new(&mut shared.contexts.clone());
        let reporter = Rc::new(Reporter::new(shared.metrics.clone(), shared.handshakes.clone()));
        let http =
            http::Worker::new(Tasks::new(shared.metrics.panics.clone()), shared.budget.clone());
        let pipes = Rc::new(Pipes::default());
        let (dial, scratch) = (pipes.clone(), Scratch::new());
        let connect = Connect::new(&shared, tls.clone(), dial, http.clone(), reporter.clone());
        let connect = Rc::new(connect);
        let inbound = Inbound::new(
            &shared,
            tls,
            connect.clone(),
            http.clone(),
            scratch.clone(),
            reporter.clone(),
        );
        let outbound = Outbound::new(&shared, connect.clone(), http.clone(), scratch, reporter);
        let (inbound, outbound) = (Rc::new(inbound), Rc::new(outbound));
        Self { inbound, outbound, pipes, connect, http, registry }
    }

    /// The value of a series, by the text before it.
    pub(crate) fn metric(&self, series: &str) -> Option<String> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map(str::to_owned)
    }
}

/// A client's end of a connection, and ours; `orig_dst` is where the kernel says it goes.
pub(crate) fn connection(
    client: &str,
    orig_dst: Option<&str>,
) -> (DuplexStream, Accepted<DuplexStream>) {
    let (peer, io) = duplex(PIPE_BYTES);
    let client = client.parse().unwrap();
    let orig_dst = orig_dst.map(|addr| OrigDst(addr.parse().unwrap()));
    (peer, Accepted { client, local: "10.0.0.1:4143".parse().unwrap(), orig_dst, io })
}

/// Runs a test as a worker would, on paused time.
pub(crate) fn on_worker<T>(test: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
    LocalSet::new().block_on(&runtime, test)
}

const PIPE_BYTES: usize = 64 * 1024;

/// Of nobody; until 2126.
pub(crate) const ANCHOR: &str = "-----BEGIN CERTIFICATE-----
MIIBijCCAS+gAwIBAgIUIAGTS3CVVeKfP2zGwIJfyexsLdMwCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGYW5jaG9yMCAXDTI2MTEyMTE3MDcyNFoYDzIxMjYxMDI4MTcw
NzI0WjARMQ8wDQYDVQQDDAZhbmNob3IwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AAR6P4pFGwrY4C56xATLFLubQLun9qVwLQz90RQnigswoaN2H40IGGPDekz3C2KO
fj2vagjkvRcIuE9kF/+SYpv8o2MwYTAdBgNVHQ4EFgQUiS8R6cKPJSTiO4iTYeNd
sDZbYhkwHwYDVR0jBBgwFoAUiS8R6cKPJSTiO4iTYeNdsDZbYhkwDwYDVR0TAQH/
BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAQYwCgYIKoZIzj0EAwIDSQAwRgIhAIz9si0n
6EuNXKqTE3gMcSvpo8jBMN7Jf47uQ/G8tRa3AiEA6XPLYcQYYk238g9mc3+FZywC
DHn93GBLmqNJFMrxOp8=
-----END CERTIFICATE-----
";
