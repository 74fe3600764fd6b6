//! Wires everything: the only place that knows all parts.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response};
use prometheus_client::registry::Registry;
use steadfast_api::spiffe::SpiffeError;
use steadfast_api::{DnsIdentity, TrustAnchor, TrustDomain, UnixTime};
use steadfast_identity_client::{
    BootstrapBundle, Config as IdentityConfig, ConfigError, Identity, Status, TlsContext,
};
use steadfast_platform::access::{Access, Place};
use steadfast_platform::keys::{FileKeys, KeyStore, KeyStoreError};
use steadfast_platform::kubernetes::{
    ClusterBundle, ConnectError, DomainEvents, DomainStatus, Namespaces, Purpose, SecretKeys,
    watched,
};
use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_platform::{Store, bundle_file};
use steadfast_process::admin::Admin;
use steadfast_process::drain::terminated;
use steadfast_process::readiness::Component;
use steadfast_process::tasks::TaskError;
use steadfast_process::{Clock, Drain, ErrorChain, Readiness, SystemClock, Tasks};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::census::{Held, Round};
use steadfast_rotation_protocol::controller::{Standing, Timings};
use tokio::sync::watch;

use crate::anchors::Anchors;
use crate::conditions;
use crate::config::Config;
use crate::endings::Endings;
use crate::event_log::EventLog;
use crate::events;
use crate::fleet::Network;
use crate::founding::{Founder, Progress};
use crate::listing::Carries;
use crate::metrics::Metrics;
use crate::mirror::Mirrors;
use crate::proposals::Proposals;
use crate::shell::{Parts, Shell};
use crate::token::Token;

/// Why the controller ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// An address cannot be listened on.
    #[error("cannot listen on {0}; is another process there?")]
    Bind(SocketAddr, #[source] std::io::Error),
    /// There is no API server to be found.
    #[error("there is no way to the store")]
    Connect(#[from] ConnectError),
    /// The configuration of its identity.
    #[error("the controller's own identity cannot be configured")]
    Identity(#[from] ConfigError),
    /// The directory of the anchors' keys.
    #[error("cannot use the directory of the anchors' keys")]
    Keys(#[from] KeyStoreError),
    /// Its own name.
    #[error("the controller's own name cannot be made")]
    Name(#[from] SpiffeError),
    /// A service.
    #[error("the controller ended early")]
    Task(#[from] TaskError),
}

/// Runs the controller until SIGTERM or SIGINT.
///
/// # Errors
/// [`AppError`]
pub async fn run(config: Config) -> Result<(), AppError> {
    let (drain, readiness) = (Drain::new(), Readiness::new());
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let bound = Admin::bind_twice(config.admin).await;
    let (listener, early) = bound.map_err(|error| AppError::Bind(config.admin, error))?;
    let Access { store, clock_offset_ms, place } =
        config.platform.open(config.namespaces.clone()).await?;
    let token = config.token.clone().map(Token::new);
    let (anchors, founder) = keys(&config, &place, token.as_ref(), &store)?;
    let state = readiness.component("trust_domain", "the store has not been read yet");
    let offset = Arc::clone(&clock_offset_ms);
    // Until there is a trust domain, the admin port says what is waited for.
    let waiting = Admin::new(Arc::new(Registry::default()), readiness.clone());
    let founded = tokio::select! {
        found = founded(&*store, founder.as_ref(), &*clock, &*offset, &state) => found,
        ended = waiting.serve(early, drain.clone()) => match ended {
            Ok(()) => return Ok(()),
            Err(never) => match never {},
        },
        stopped = terminated() => return stopped.map_err(|e| TaskError::Signals(e).into()),
    };
    let (trust_domain, lease) = (founded.trust_domain, founded.read_lease);
    let mut registry = Registry::default();
    let identity = identity(&config, &trust_domain, clock.clone(), &readiness, &mut registry)?;
    let contexts = identity.contexts();
    let mirrors = match &place {
        Place::Kubernetes(client, _) => {
            let cluster = ClusterBundle::new(client.clone());
            Some(Mirrors::new(Arc::clone(&store), cluster, Arc::clone(&clock)))
        }
        Place::Standalone(_) => None,
    };
    let status_clock = Arc::clone(&clock);
    let (listed, not_taken) = (watch::Sender::new(None), watch::Sender::new(Vec::new()));
    let proposals = match (&place, config.bundle.clone()) {
        (Place::Kubernetes(client, Namespaces { anchors, .. }), Some(bundle)) => {
            let changes = watched::config_map(client.clone(), anchors, &bundle.config_map);
            let (clock, offset) = (Arc::clone(&clock), Arc::clone(&clock_offset_ms));
            let proposals = Proposals {
                bundle: format!("the ConfigMap {anchors}/{}", bundle.config_map),
                entry: bundle.entry,
                makes_issuers: bundle.makes_issuers,
                store: Arc::clone(&store),
                now: Box::new(move || store_time(clock.now(), &*offset)),
                timings: Timings { lease, ..config.timings },
                held: not_taken.clone(),
                listed: listed.clone(),
            };
            Some((proposals, changes))
        }
        _ => None,
    };
    let (follows, listed) = (proposals.is_some(), listed.subscribe());
    let carries = if mirrors.is_some() { Carries::Container } else { Carries::Unless };
    let (shown, for_bundle) = (mirrors.clone(), Arc::clone(&store));
    let endings = Arc::new(Endings::new(carries, config.namespaces.clone()));
    let (ended, followed) = (Arc::clone(&endings), Arc::clone(&store));
    let mut shell = Shell::new(Parts {
        anchors,
        fleet: Arc::new(Network::new(identity.replicas(), config.identity_addr.clone())),
        store,
        clock,
        clock_offset_ms: Box::new(move || clock_offset_ms()),
        held: Box::new(move || held(&contexts.borrow())),
        timings: Timings { lease, ..config.timings },
        anchor_lifetime: config.anchor_lifetime,
        namespaces: config.namespaces.clone(),
        carries,
        listed: Box::new(move |state| match &*listed.borrow() {
            Some(listed) => listed.clone(),
            // Until it is known, everything may be listed that comes from there.
            None if follows => {
                state.published().filter(|a| a.is_external()).map(|a| a.id).collect()
            }
            None => Vec::new(),
        }),
        ended: Box::new(move || ended.take()),
        mirrors_show: Box::new(move |seq| shown.as_ref().is_none_or(|shown| shown.show(seq))),
        event_log: EventLog::new(config.event_log.clone()),
        name: name(),
        metrics: Metrics::new(&mut registry),
    });
    let (status, standing, round) = (identity.status(), shell.standing(), shell.newest_round());
    let told = token.as_ref().map(|_| readiness.component("anchor_keys", "not asked yet"));
    let pages = Admin::new(Arc::new(registry), readiness)
        .with_routes(move |request| page(request, &status, &standing, &round));
    let mut tasks = Tasks::new();
    tasks.spawn("identity", identity.run(drain.clone()));
    tasks.spawn("pods", until(drain.clone(), endings.run(followed)));
    if let Some(mirrors) = mirrors {
        let keep = bundle_file::keep(for_bundle, config.bundle_file.clone());
        tasks.spawn("own bundle", until(drain.clone(), keep));
        tasks.spawn("mirrors", until(drain.clone(), mirrors.run(shell.standing(), shell.led_at())));
    }
    if let Place::Kubernetes(client, _) = place {
        let status = DomainStatus::new(client.clone());
        let standing = shell.standing();
        let keep =
            conditions::keep(status, standing, not_taken.subscribe(), Arc::clone(&status_clock));
        tasks.spawn("status", until(drain.clone(), keep));
        let events =
            DomainEvents::new(client, "steadfast-rotation", &steadfast_process::hostname());
        let told = events::publish(events, shell.standing(), not_taken.subscribe());
        tasks.spawn("events", until(drain.clone(), told));
    }
    if let Some((proposals, changes)) = proposals {
        let standing = shell.standing();
        tasks.spawn("proposals", until(drain.clone(), proposals.run(changes, standing)));
    }
    let stop = drain.clone();
    tasks.spawn("rotation", async move {
        let run = until(stop, shell.run(&state)).await;
        shell.resign().await;
        run
    });
    if let (Some(token), Some(told)) = (token, told) {
        tasks.spawn("token", until(drain.clone(), watch_token(token, told)));
    }
    tasks.spawn("admin", pages.serve(listener, drain.clone()));
    tracing::info!(%trust_domain, "the controller of rotations has started");
    Ok(tasks.run(&drain, DRAIN_DEADLINE).await?)
}

/// The keys of anchors, and who founds a trust domain if there is none: standalone, a person does.
fn keys(
    config: &Config,
    place: &Place,
    token: Option<&Token>,
    store: &Arc<dyn Store>,
) -> Result<(Anchors, Option<Founder>), AppError> {
    let own: Arc<dyn KeyStore> = match place {
        Place::Kubernetes(client, Namespaces { anchors, .. }) => {
            Arc::new(SecretKeys::new(client.clone(), anchors, Purpose::Anchors))
        }
        Place::Standalone(directory) => Arc::new(FileKeys::open(directory.anchor_keys())?),
    };
    let anchors = match token {
        Some(token) => Anchors::new(Arc::new(token.clone()), [own], Arc::clone(store)),
        None => Anchors::new(own, [], Arc::clone(store)),
    };
    let founds = config.founds.clone().filter(|_| matches!(place, Place::Kubernetes(..)));
    let founder = founds.map(|founds| Founder {
        store: Arc::clone(store),
        anchors: anchors.clone(),
        founds,
        anchor_lifetime: config.anchor_lifetime,
        issuer_lifetime: config.timings.issuer_life,
    });
    Ok((anchors, founder))
}

/// The state of the trust domain that the store knows; waits until it knows one, or founds it. What
/// is taken from it never changes.
async fn founded(
    store: &dyn Store,
    founder: Option<&Founder>,
    clock: &dyn Clock,
    clock_offset_ms: &(dyn Fn() -> Option<i64> + Send + Sync),
    waiting: &Component,
) -> TrustDomainState {
    let mut logged = String::new();
    loop {
        let founding = match founder {
            Some(founder) => Some(founder.step(store_time(clock.now(), clock_offset_ms)).await),
            None => None,
        };
        let reason = match (founding, store.get(TRUST_DOMAIN_KEY).await) {
            (Some(Err(error)), _) => ErrorChain(&error).to_string(),
            (Some(Ok(Progress::Moved)), _) => continue,
            (Some(Ok(Progress::WaitsForIdentity)), _) => {
                "identity has not asked for the first issuer of the trust domain yet".to_owned()
            }
            (_, Ok(Some(entry))) => match serde_json::from_slice(&entry.value) {
                Ok(state) => return state,
                Err(error) => format!("the trust domain in the store cannot be read: {error}"),
            },
            (_, Ok(None)) => {
                "the store has no trust domain yet: run `steadfast trust init`".to_owned()
            }
            (_, Err(error)) => ErrorChain(&error).to_string(),
        };
        waiting.not_ready(&reason);
        if logged != reason {
            tracing::warn!("{reason}");
            logged = reason;
        }
        tokio::time::sleep(TRUST_DOMAIN_PAUSE).await;
    }
}

/// What the store's clock says, as far as it is known.
fn store_time(
    now: UnixTime,
    clock_offset_ms: &(dyn Fn() -> Option<i64> + Send + Sync),
) -> UnixTime {
    let offset = clock_offset_ms().unwrap_or_default();
    let off = Duration::from_millis(offset.unsigned_abs());
    if offset < 0 { now + off } else { now - off }
}

/// By what other controllers know this process: where it runs, and which one it is there.
fn name() -> String {
    let host = steadfast_process::hostname();
    let (pid, since) = (std::process::id(), SystemClock.now());
    format!("{host}/{pid} since {since}")
}

fn identity(
    config: &Config,
    trust_domain: &TrustDomain,
    clock: Arc<dyn Clock>,
    readiness: &Readiness,
    registry: &mut Registry,
) -> Result<Identity, AppError> {
    let Namespaces { control, anchors } = &config.namespaces;
    let name = |account, namespace| DnsIdentity::new(account, namespace, control, trust_domain);
    let config = IdentityConfig {
        local: name("steadfast-rotation", anchors)?,
        identity_address: config.identity_addr.clone(),
        identity_name: name("steadfast-identity", control)?,
        token_file: config.token_file.clone(),
        bootstrap: BootstrapBundle::File(config.bundle_file.clone()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    Ok(Identity::new(config, clock, readiness, registry)?)
}

/// What we use ourselves, as a workload would tell it.
fn held(context: &TlsContext) -> Option<(u64, Held)> {
    let bundle = context.bundle.as_ref()?;
    let held = Held {
        anchors: bundle.anchors().iter().map(TrustAnchor::id).collect(),
        tombstones: bundle.tombstones().iter().copied().collect(),
        denied: bundle.denied().iter().copied().collect(),
    };
    Some((bundle.sequence(), held))
}

/// Asks the token now and then whether it is there, so that a person hears of it before a rotation
/// needs it.
async fn watch_token(token: Token, ready: Component) -> Infallible {
    let mut told = None;
    loop {
        let trouble = token.check().await.err().map(|error| ErrorChain(&error).to_string());
        match &trouble {
            None => ready.ready(),
            Some(trouble) => ready.not_ready(trouble),
        }
        if trouble != told {
            match &trouble {
                Some(error) => {
                    tracing::warn!(error, "the token of the anchors' keys cannot be used")
                }
                None => tracing::info!("the token of the anchors' keys answers"),
            }
            told = trouble;
        }
        tokio::time::sleep(TOKEN_ASKED_EVERY).await;
    }
}

/// What the admin port tells beside what every process does.
fn page(
    request: &Request<Bytes>,
    status: &watch::Receiver<Status>,
    standing: &watch::Receiver<Standing>,
    round: &watch::Receiver<Option<Arc<Round>>>,
) -> Option<Response<String>> {
    // Strings and numbers alone: serialising them cannot fail.
    let body = match (request.method(), request.uri().path()) {
        (&Method::GET, "/identity.json") => serde_json::to_string_pretty(&*status.borrow()),
        (&Method::GET, "/rotation.json") => serde_json::to_string_pretty(&*standing.borrow()),
        (&Method::GET, "/round.json") => serde_json::to_string_pretty(&round.borrow().as_deref()),
        _ => return None,
    };
    let mut response = Response::new(body.unwrap_or_default() + "\n");
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Some(response)
}

async fn until(drain: Drain, service: impl Future<Output = Infallible>) -> Result<(), Infallible> {
    tokio::select! {
        never = service => match never {},
        () = drain.wait() => Ok(()),
    }
}

const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
const TOKEN_ASKED_EVERY: Duration = Duration::from_secs(5);
const TRUST_DOMAIN_PAUSE: Duration = Duration::from_millis(250);
