//! The only place that wires: listeners, the control thread's services, the workers, the drain.
//!
//! The control thread (this one) runs identity, discovery and the admin port; each worker thread
//! runs connections, and shares with it only snapshots, counters and the drain. A service that
//! ends, a worker among them, ends the process with its error.

use std::io;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use steadfast_identity_client::{ConfigError, Connector, Expected, Identity};
use steadfast_process::admin::Admin;
use steadfast_process::tasks::TaskError;
use steadfast_process::{Clock, Drain, Readiness, SystemClock, Tasks, drain, limits, log};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::accept::{self, BindError, Shares};
use crate::admin::Pages;
use crate::config::{Config, Destination, Mode};
use crate::discovery::{self, Discovery};
use crate::http::Budget;
use crate::identity;
use crate::metrics::Metrics;
use crate::outbound;
use crate::policy::DefaultPolicies;
use crate::worker::{self, Listeners, Shared};

/// Why a sidecar could not start, or ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// An address that is taken.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The trust anchors in the environment are none.
    #[error("the identity cannot be configured")]
    Identity(#[from] ConfigError),
    /// No runtime, no thread, no listener.
    #[error("the process could not start")]
    Io(#[from] io::Error),
    /// A service ended.
    #[error(transparent)]
    Task(#[from] TaskError),
}

/// Runs a sidecar until SIGTERM, SIGINT or `/shutdown`, then drains it.
///
/// # Errors
/// Why it could not start, or ended before it was asked to.
pub fn run(config: Config, log: log::Handle) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(serve(config, log));
    // What a deadline left over is not waited for: a name that is being resolved, say.
    runtime.shutdown_background();
    result
}

async fn serve(config: Config, log: log::Handle) -> Result<(), RunError> {
    let config = Arc::new(config);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let (mut registry, readiness) = (Registry::default(), Readiness::new());
    let (mut tasks, stopping) = (Tasks::new(), Drain::new());
    let open_files = limits::raise_open_files();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = config.cores.min(cores);
    let listeners = bind(&config, workers)?;
    let admin_listener = accept::bind_one(config.admin_listen)?;

    let client = identity::client_config(&config.identity);
    let identity = Identity::new(client, clock.clone(), &readiness, &mut registry)?;
    let discovery = config.destination.as_ref().map(|destination| {
        let (discovery, driver) = discovery_over(destination, &identity, workers, &mut registry);
        tasks.spawn("discovery", driver.run(stopping.clone()));
        discovery
    });
    let shared = Shared {
        metrics: Metrics::register(&mut registry, clock.clone()),
        policies: DefaultPolicies::new(&config.inbound, config.mode),
        contexts: identity.contexts(),
        handshakes: identity.refusals(),
        budget: Budget::default(),
        drain: stopping.clone(),
        config: config.clone(),
        discovery,
        clock,
    };
    let shutdown = CancellationToken::new();
    let pages = Pages {
        log,
        shutdown: shutdown.clone(),
        env: config.seen.clone(),
        local_name: config.identity.local_name.clone(),
        status: identity.status(),
        contexts: identity.contexts(),
    };
    tasks.spawn("identity", identity.run(stopping.clone()));
    let shares = || Shares::for_open_files(open_files, workers);
    for listeners in listeners {
        spawn_worker(&mut tasks, shared.clone(), listeners, shares())?;
    }
    let admin = Admin::new(Arc::new(registry), readiness)
        .with_routes(move |request| pages.answer(request))
        .serve(TcpListener::from_std(admin_listener)?, stopping.clone());
    tasks.spawn("admin", admin);
    announce(&config, workers, open_files);
    let stop = async {
        tokio::select! {
            terminated = drain::terminated() => terminated.map_err(TaskError::Signals),
            () = shutdown.cancelled() => Ok(()),
        }
    };
    Ok(tasks.run_until(stop, &stopping, config.grace).await?)
}

/// One set of listeners for each worker.
fn bind(config: &Config, workers: usize) -> Result<Vec<Listeners>, BindError> {
    let inbound = accept::bind(config.inbound.listen, workers)?;
    let outbound = accept::bind(config.outbound.listen, workers)?;
    let mut sets: Vec<_> = inbound
        .into_iter()
        .zip(outbound)
        .map(|(inbound, outbound)| Listeners { inbound, outbound, mapped: Vec::new() })
        .collect();
    for (listen, target) in &config.outbound.listen_map {
        for (set, listener) in sets.iter_mut().zip(accept::bind(*listen, workers)?) {
            set.mapped.push((listener, target.clone()));
        }
    }
    Ok(sets)
}

/// Discovery over mutual TLS with whatever SVID is newest, dialled when it is first asked.
fn discovery_over(
    destination: &Destination,
    identity: &Identity,
    workers: usize,
    registry: &mut Registry,
) -> (Discovery, discovery::Driver) {
    let expected = Expected::from(destination.service.name.clone());
    let (contexts, refusals) = (identity.contexts(), identity.refusals());
    let connector = Connector::new(contexts, &destination.service.addr, expected, refusals);
    let channel = discovery::transport().connect_with_connector_lazy(connector);
    let context_token = destination.context.clone();
    let default = discovery::Config::default();
    // What all workers hold at once fits, so that a place which nobody holds is always found.
    let targets_max = default.targets_max.max(workers.saturating_mul(outbound::TARGETS_MAX));
    let config = discovery::Config { context_token, targets_max, ..default };
    discovery::new(config, channel, registry)
}

/// Starts a worker thread and a service that ends as it ends.
fn spawn_worker(
    tasks: &mut Tasks,
    shared: Shared,
    listeners: Listeners,
    shares: Shares,
) -> io::Result<()> {
    let (ended, end) = oneshot::channel();
    // Identity and discovery go on until the last connection has ended.
    let hold = shared.drain.hold();
    std::thread::Builder::new().name("worker".to_owned()).spawn(move || {
        let _hold = hold;
        // Nobody listens when the process has given up waiting.
        let _ = ended.send(worker::run(shared, listeners, shares));
    })?;
    tasks.spawn("worker", async move {
        match end.await {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(_) => Err("the thread panicked".to_owned()),
        }
    });
    Ok(())
}

fn announce(config: &Config, workers: usize, open_files: u64) {
    let mode = match config.mode {
        Mode::Explicit => "explicit",
        Mode::Transparent => "transparent",
    };
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        workload = %config.identity.local_name,
        mode,
        inbound = %config.inbound.listen,
        outbound = %config.outbound.listen,
        admin = %config.admin_listen,
        policy = %config.inbound.default_policy,
        workers,
        open_files,
        "the sidecar has started"
    );
}
