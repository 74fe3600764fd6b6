//! `steadfast-store`, wired: what it opens, what it runs, and in which order it stops.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response};
use prometheus_client::registry::Registry;
use steadfast_process::admin::Admin;
use steadfast_process::readiness::Component;
use steadfast_process::{Drain, Readiness, SystemClock, Tasks};
use tokio::net::TcpListener;

use super::manifests::Report;
use super::{Directory, Engine, Manifests, Projection, Server};

/// How the store is to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the mesh keeps its state.
    pub directory: PathBuf,
    /// Where `/metrics` and `/ready` are served.
    pub admin: SocketAddr,
    /// How long a projected token lives.
    pub token_ttl: Duration,
}

/// Runs the store until SIGTERM or SIGINT.
///
/// # Errors
/// What could not be opened or bound, or which service failed.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let directory = Directory::new(config.directory);
    directory.create()?;
    let (drain, readiness, mut tasks) = (Drain::new(), Readiness::new(), Tasks::new());
    let clock = Arc::new(SystemClock);

    let (engine, writer) = Engine::open(&directory, drain.clone())?;
    tasks.spawn("writer", writer);
    let ready = readiness.component("disk", "opening");
    tasks.spawn("disk", report_disk(engine.clone(), ready, drain.clone()));

    let ready = readiness.component("manifests", "the manifests have not been read yet");
    let (manifests, report) = Manifests::new(&directory, engine.clone(), clock.clone(), ready);
    tasks.spawn("manifests", manifests.run(drain.clone()));

    let ready = readiness.component("tokens", "no token has been projected yet");
    let (place, ttl) = (directory.clone(), config.token_ttl);
    let projection = Projection::new(place, engine.clone(), clock.clone(), ttl, ready)?;
    tasks.spawn("projection", projection.run(drain.clone()));

    let mut registry = Registry::default();
    engine.metrics().register(&mut registry);
    let admin = Admin::new(Arc::new(registry), readiness.clone())
        .with_routes(move |request| routes(request, &report));
    let listener = TcpListener::bind(config.admin)
        .await
        .with_context(|| format!("cannot listen on the admin address {}", config.admin))?;
    tasks.spawn("admin", admin.serve(listener, drain.clone()));

    // Last: whoever can connect finds everything there.
    let server = Server::bind(&directory, engine.clone(), clock)?;
    tasks.spawn("server", server.serve(drain.clone()));
    let (revisions, socket) = (engine.revisions(), directory.socket());
    let revision = revisions.borrow().0;
    tracing::info!(socket = %socket.display(), revision, "the store is open");
    drop(engine);
    tasks.run(&drain, STOP_MAX).await?;
    Ok(())
}

/// What only loopback may ask for.
fn routes(request: &Request<Bytes>, report: &Report) -> Option<Response<String>> {
    let json = HeaderValue::from_static("application/json");
    (request.method() == Method::GET && request.uri().path() == "/manifests.json").then(|| {
        let mut response = Response::new(report.to_json());
        response.headers_mut().insert(CONTENT_TYPE, json);
        response
    })
}

/// Shows in `/ready` whether the disk takes writes.
async fn report_disk(engine: Engine, component: Component, drain: Drain) -> Result<(), String> {
    let mut refusing = engine.refusing();
    loop {
        match &*refusing.borrow_and_update() {
            Some(why) => component.not_ready(&format!("the disk refuses writes: {why}")),
            None => component.ready(),
        }
        tokio::select! {
            () = drain.wait() => return Ok(()),
            changed = refusing.changed() => changed.map_err(|error| error.to_string())?,
        }
    }
}

/// Short enough for a demo, long enough to be read before it ends.
pub const TOKEN_TTL_MIN: Duration = Duration::from_secs(5);
/// A token that leaked should not outlive a weekend.
pub const TOKEN_TTL_MAX: Duration = Duration::from_secs(2 * 86_400);

/// How long calls in flight get to finish.
const STOP_MAX: Duration = Duration::from_secs(5);
