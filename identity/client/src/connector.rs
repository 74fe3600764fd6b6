//! Dials a tonic channel over mutual TLS with whatever SVID and bundle are newest.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tower::Service;

use crate::context::{Expected, TlsContext};
use crate::metrics::Refusals;
use crate::refusal::Refusal;
use crate::standing::Footing;
use crate::vouched::Vouched;

/// A service for `Endpoint::connect_with_connector`: the address of the URI is not used.
#[derive(Clone)]
pub struct Connector {
    contexts: watch::Receiver<Arc<TlsContext>>,
    /// `host:port`; a name is resolved at each try, and its addresses are tried in their order.
    address: Arc<str>,
    expected: Arc<Expected>,
    refusals: Refusals,
}

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// This process has no SVID yet, and none came in time.
    #[error("no SVID was issued within {} s", SVID_WAIT_MAX.as_secs())]
    NoSvid,
    /// One of the two sides refused the other.
    #[error("{0}")]
    Refused(Refusal),
    /// The name has no address.
    #[error("{0:?} cannot be resolved")]
    Resolve(String, #[source] std::io::Error),
    /// No address of it could be reached.
    #[error("{address} cannot be reached")]
    Tcp {
        /// What was dialled.
        address: String,
        /// The last reason.
        #[source]
        source: std::io::Error,
    },
}

impl Connector {
    /// Dials `address` (`host:port`) and expects that workload there.
    pub fn new(
        contexts: watch::Receiver<Arc<TlsContext>>,
        address: &str,
        expected: Expected,
        refusals: Refusals,
    ) -> Self {
        Self { contexts, address: address.into(), expected: Arc::new(expected), refusals }
    }

    async fn connect(mut self) -> Result<Vouched<TcpStream>, ConnectError> {
        let has_svid = self.contexts.wait_for(|context| context.svid.is_some());
        let context = match tokio::time::timeout(SVID_WAIT_MAX, has_svid).await {
            Ok(Ok(context)) => context.clone(),
            _ => return Err(ConnectError::NoSvid),
        };
        let io = dial_tcp(&self.address).await?;
        let address = io.peer_addr().ok();
        match context.connect(io, &self.expected, Some(ALPN_H2)).await {
            Ok((stream, peer)) => {
                Ok(Vouched::new(stream, Footing::new(&context, Some(peer)), self.contexts))
            }
            Err(refusal) => {
                self.refusals.report(address, &refusal);
                Err(ConnectError::Refused(refusal))
            }
        }
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Vouched<TcpStream>>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connecting = self.clone().connect();
        Box::pin(async move { connecting.await.map(TokioIo::new) })
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connector({} as {})", self.address, self.expected.id)
    }
}

/// The first address of `host:port` that answers.
pub(crate) async fn dial_tcp(address: &str) -> Result<TcpStream, ConnectError> {
    let resolved: Vec<_> = tokio::net::lookup_host(address)
        .await
        .map_err(|source| ConnectError::Resolve(address.to_owned(), source))?
        .collect();
    let mut source = std::io::Error::from(std::io::ErrorKind::NotFound);
    for candidate in resolved {
        match dial_one(candidate).await {
            Ok(io) => return Ok(io),
            Err(error) => source = error,
        }
    }
    Err(ConnectError::Tcp { address: address.to_owned(), source })
}

/// One address, within [`TCP_TIMEOUT`].
pub(crate) async fn dial_one(address: std::net::SocketAddr) -> std::io::Result<TcpStream> {
    let io = tokio::time::timeout(TCP_TIMEOUT, TcpStream::connect(address)).await??;
    io.set_nodelay(true)?;
    Ok(io)
}

/// gRPC's only transport.
pub(crate) const ALPN_H2: &[u8] = b"h2";
const SVID_WAIT_MAX: Duration = Duration::from_secs(10);
const TCP_TIMEOUT: Duration = Duration::from_secs(3);
