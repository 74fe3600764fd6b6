//! One application of the demo: an HTTP server that calls the next service through its own sidecar
//! and adds its name to the answer. It knows nothing of TLS or identities, as an application should.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use steadfast_process::drain::terminated;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::http1::{Connection, HttpError};

/// One application of the demo
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name
    #[arg(long)]
    name: String,
    /// Where it listens
    #[arg(long)]
    listen: SocketAddr,
    /// The authority of the service that it calls
    #[arg(long, requires = "via")]
    next: Option<String>,
    /// The outbound port of its sidecar
    #[arg(long)]
    via: Option<SocketAddr>,
}

/// Why it does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppError {
    #[error("{name} cannot listen on {addr}: {source}")]
    Listen { name: String, addr: SocketAddr, source: std::io::Error },
    #[error("cannot wait for signals")]
    Signals(#[source] std::io::Error),
}

/// Serves until it is asked to stop.
///
/// # Errors
/// The port is taken.
pub(crate) async fn run(args: Args) -> Result<(), AppError> {
    let listener = TcpListener::bind(args.listen).await.map_err(|source| AppError::Listen {
        name: args.name.clone(),
        addr: args.listen,
        source,
    })?;
    let app = Arc::new(App::new(args));
    let accept = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    // Small answers, each awaited: nothing to gather.
                    let _ = stream.set_nodelay(true);
                    app.tasks.spawn(serve(Arc::clone(&app), stream));
                }
                // Out of files: a moment later there may be some.
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    };
    tokio::select! {
        () = accept => Ok(()),
        asked = terminated() => asked.map_err(AppError::Signals),
    }
}

struct App {
    name: String,
    next: Option<(String, SocketAddr)>,
    /// Connections to the sidecar that no request uses at the moment.
    idle: Mutex<Vec<Connection>>,
    tasks: TaskTracker,
}

async fn serve(app: Arc<App>, stream: tokio::net::TcpStream) {
    let service = service_fn(|request| app.answer(request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    // A client that breaks off is no event.
    let _ = connection.await;
}

impl App {
    fn new(args: Args) -> Self {
        Self {
            name: args.name,
            next: args.next.zip(args.via),
            idle: Mutex::default(),
            tasks: TaskTracker::new(),
        }
    }

    /// `/hello/7` is answered with the names of all services on the way and the 7.
    async fn answer(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let path = request.uri().path();
        let number = path.strip_prefix(PATH_PREFIX).unwrap_or("?");
        let (status, text) = match &self.next {
            None => (StatusCode::OK, number.to_owned()),
            Some((authority, sidecar)) => self.ask(authority, *sidecar, path).await,
        };
        let text = if status == StatusCode::OK {
            format!("{} {text}", self.name)
        } else {
            // To its log too: a failure is what one looks there for.
            eprintln!("{} {path}: {text}", self.name);
            format!("{}: {text}", self.name)
        };
        let mut response = Response::new(Full::new(text.into()));
        *response.status_mut() = status;
        Ok(response)
    }

    async fn ask(&self, authority: &str, sidecar: SocketAddr, path: &str) -> (StatusCode, String) {
        let answer = match timeout(CALL_DEADLINE, self.call(authority, sidecar, path)).await {
            Ok(answer) => answer,
            Err(_) => Err(HttpError::Timeout(CALL_DEADLINE)),
        };
        match answer {
            Ok(answer) => {
                let text = String::from_utf8_lossy(answer.body()).into_owned();
                match answer.status() {
                    StatusCode::OK => (StatusCode::OK, text),
                    status => {
                        (StatusCode::BAD_GATEWAY, format!("{authority} answers {status}: {text}"))
                    }
                }
            }
            Err(error) => {
                let error = steadfast_process::ErrorChain(&error).to_string();
                (StatusCode::BAD_GATEWAY, format!("{authority} through {sidecar}: {error}"))
            }
        }
    }

    async fn call(
        &self,
        authority: &str,
        sidecar: SocketAddr,
        path: &str,
    ) -> Result<Response<Bytes>, HttpError> {
        let mut connection = match self.idle_connection() {
            Some(connection) => connection,
            None => Connection::open(sidecar, &self.tasks).await?,
        };
        let answer = connection.get(authority, path).await?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        Ok(answer)
    }

    fn idle_connection(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|connection| !connection.is_closed());
        idle.pop()
    }
}

/// What the load generator asks for, before the number of the request.
pub(crate) const PATH_PREFIX: &str = "/hello/";
const CALL_DEADLINE: Duration = Duration::from_secs(8);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
