//! A keep-alive HTTP/1.1 connection, for the load generator, the demo's applications and the
//! reading of admin ports. It never sends a request twice: a retry would hide a failure.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

/// A connection that is open, as far as one can tell before the next request.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: SendRequest<Empty<Bytes>>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    /// The body cannot be read, or is too large.
    #[error("the answer broke off: {0}")]
    Body(String),
    /// Nobody listens.
    #[error("cannot connect")]
    Connect(#[source] std::io::Error),
    /// The API server leads to no port of the pod.
    #[error("the API server does not lead to the pod")]
    Forward(#[source] Box<kube::Error>),
    /// What the kubelet says of the port.
    #[error("the pod's port cannot be reached: {0}")]
    Refused(String),
    /// The API server has led to no port at all.
    #[error("the API server led to no port of the pod")]
    Unforwarded,
    /// The request cannot be sent or answered.
    #[error("the connection failed")]
    Exchange(#[source] hyper::Error),
    /// The path or authority has characters that no request may have.
    #[error("no valid request")]
    Request(#[from] http::Error),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

impl Connection {
    /// Connects. What drives the connection is owned by `tasks` and ends with the connection.
    ///
    /// # Errors
    /// [`HttpError::Connect`] or [`HttpError::Exchange`].
    pub(crate) async fn open(addr: SocketAddr, tasks: &TaskTracker) -> Result<Self, HttpError> {
        let stream = TcpStream::connect(addr).await.map_err(HttpError::Connect)?;
        stream.set_nodelay(true).map_err(HttpError::Connect)?;
        Self::over(stream, tasks).await
    }

    async fn over(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        tasks: &TaskTracker,
    ) -> Result<Self, HttpError> {
        let (sender, connection) =
            handshake(TokioIo::new(stream)).await.map_err(HttpError::Exchange)?;
        // Its error is the request's error too, or nobody's.
        tasks.spawn(async move { drop(connection.await) });
        Ok(Self { sender })
    }

    /// Sends a GET and reads the whole answer.
    ///
    /// # Errors
    /// As the connection fails; it is then of no more use.
    pub(crate) async fn get(
        &mut self,
        authority: &str,
        path: &str,
    ) -> Result<Response<Bytes>, HttpError> {
        let request = Request::get(path).header("host", authority).body(Empty::new())?;
        self.sender.ready().await.map_err(HttpError::Exchange)?;
        let response = self.sender.send_request(request).await.map_err(HttpError::Exchange)?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, BODY_BYTES_MAX).collect().await;
        let body = body.map_err(|error| HttpError::Body(error.to_string()))?;
        Ok(Response::from_parts(head, body.to_bytes()))
    }

    /// Whether the peer has said that it will answer no more requests here.
    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

/// One GET over a connection of its own.
///
/// # Errors
/// What failed, within the deadline.
pub(crate) async fn get(
    addr: SocketAddr,
    path: &str,
    deadline: Duration,
) -> Result<(StatusCode, String), HttpError> {
    let ask = async {
        let stream = TcpStream::connect(addr).await.map_err(HttpError::Connect)?;
        get_over(stream, &addr.to_string(), path).await
    };
    timeout(deadline, ask).await.map_err(|_| HttpError::Timeout(deadline))?
}

/// One GET over a stream that is used for nothing else.
///
/// # Errors
/// What failed.
pub(crate) async fn get_over(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    authority: &str,
    path: &str,
) -> Result<(StatusCode, String), HttpError> {
    let tasks = TaskTracker::new();
    let response = Connection::over(stream, &tasks).await?.get(authority, path).await?;
    let text = String::from_utf8_lossy(response.body()).into_owned();
    Ok((response.status(), text))
}

/// A scrape of a sidecar with very many series is some MiB.
const BODY_BYTES_MAX: usize = 16 << 20;
