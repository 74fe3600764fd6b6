//! How the identity service is reached: server-authenticated, by the live bundle or the mounted
//! one, one replica at a time, for requests over gRPC or for the trust stream.
//!
//! Our own SVID plays no part, so a workload that slept through every expiry comes back this way.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use steadfast_api::Code;
use steadfast_api::bundle::BundleError;
use steadfast_api_grpc::stream;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

use crate::connector::{ALPN_H2, ConnectError, dial_one};
use crate::context::{Contexts, Expected, TlsContext};
use crate::metrics::Refusals;
use crate::mounted::{Mounted, MountedError};
use crate::refusal::Refusal;
use crate::standing::Footing;
use crate::trust::Trust;
use crate::vouched::Vouched;

/// Dials replicas of the identity service.
pub(crate) struct Dialer {
    pub(crate) address: String,
    pub(crate) expected: Expected,
    pub(crate) mounted: Mounted,
    pub(crate) contexts: Contexts,
    pub(crate) refusals: Refusals,
}

/// Why the identity service could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The mounted bundle has no anchor that is not withdrawn.
    #[error("the mounted bundle cannot be used")]
    Bundle(#[source] BundleError),
    /// No HTTP/2 could be spoken on the connection.
    #[error("the identity service at {0} speaks no HTTP/2")]
    Channel(String, #[source] tonic::transport::Error),
    /// Not connected, or refused.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It has no use for what we would say.
    #[error(
        "the identity service at {0} does not speak {protocol}: are its version and ours at most \
         one apart?",
        protocol = String::from_utf8_lossy(.1)
    )]
    Protocol(String, &'static [u8]),
    /// No bundle to verify it with.
    #[error(transparent)]
    Mounted(#[from] MountedError),
    /// Neither the live nor the mounted bundle has the anchor of the service's chain.
    #[error("neither the live nor the mounted bundle fits the identity service: {0}")]
    Stale(Refusal),
    /// A defect of ours.
    #[error("TLS cannot be configured")]
    Tls(#[from] rustls::Error),
}

impl Dialer {
    /// A connection for requests to the replica at this address.
    pub(crate) async fn channel_at(&self, address: SocketAddr) -> Result<Channel, DialError> {
        let mut once = Some(self.dial(address, ALPN_H2).await?);
        let connector = tower::service_fn(move |_| {
            let stream = once.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
            std::future::ready(stream.map(TokioIo::new))
        });
        // When it breaks, the next dial may go elsewhere.
        Endpoint::from_static("http://identity")
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_with_connector(connector)
            .await
            .map_err(|source| DialError::Channel(self.address.clone(), source))
    }

    /// A connection for the trust stream to the replica at this address.
    pub(crate) async fn stream_at(
        &self,
        address: SocketAddr,
    ) -> Result<Vouched<TcpStream>, DialError> {
        self.dial(address, stream::ALPN).await
    }

    /// The address of the n-th replica; there may be fewer, then it goes round. This one is left
    /// out if there are others.
    pub(crate) async fn replica(
        &self,
        replica: usize,
        not: Option<SocketAddr>,
    ) -> Result<SocketAddr, ConnectError> {
        let mut resolved = self.resolve().await?;
        if resolved.iter().any(|address| Some(*address) != not) {
            resolved.retain(|address| Some(*address) != not);
        }
        let index = replica.checked_rem(resolved.len());
        index.and_then(|index| resolved.get(index)).copied().ok_or_else(|| ConnectError::Tcp {
            address: self.address.clone(),
            source: io::ErrorKind::NotFound.into(),
        })
    }

    async fn dial(
        &self,
        address: SocketAddr,
        alpn: &'static [u8],
    ) -> Result<Vouched<TcpStream>, DialError> {
        let dial = || async move {
            let failed = |source| ConnectError::Tcp { address: address.to_string(), source };
            dial_one(address).await.map_err(failed)
        };

        let live = self.contexts.current();
        if live.bundle.is_some() {
            match self.handshake(&live, dial().await?, alpn).await {
                Err(refusal) if refusal.code == Code::PEER_UNKNOWN_ISSUER => {}
                result => return self.speaks(result.map_err(ConnectError::Refused)?, alpn),
            }
        }
        let mounted = self.mounted_context(live.bundle.as_deref())?;
        match self.handshake(&mounted, dial().await?, alpn).await {
            Err(refusal) if refusal.code == Code::PEER_UNKNOWN_ISSUER => {
                Err(DialError::Stale(refusal))
            }
            result => self.speaks(result.map_err(ConnectError::Refused)?, alpn),
        }
    }

    /// TLS goes on where a server has chosen nothing.
    fn speaks(
        &self,
        io: Vouched<TcpStream>,
        alpn: &'static [u8],
    ) -> Result<Vouched<TcpStream>, DialError> {
        if io.tls().alpn() == Some(alpn) {
            return Ok(io);
        }
        Err(DialError::Protocol(self.address.clone(), alpn))
    }

    /// The addresses of the service, each a replica.
    pub(crate) async fn resolve(&self) -> Result<Vec<SocketAddr>, ConnectError> {
        let resolved = tokio::net::lookup_host(&self.address).await;
        let failed = |source| ConnectError::Resolve(self.address.clone(), source);
        Ok(resolved.map_err(failed)?.collect())
    }

    async fn handshake(
        &self,
        context: &TlsContext,
        io: TcpStream,
        alpn: &'static [u8],
    ) -> Result<Vouched<TcpStream>, Refusal> {
        let address = io.peer_addr().ok();
        let result = context.connect_bootstrap(io, &self.expected, Some(alpn)).await;
        let vouched = |(stream, peer)| {
            // Our own SVID plays no part.
            let footing = Footing::between(None, Some(peer));
            Vouched::new(stream, footing, self.contexts.subscribe())
        };
        result.map(vouched).map_err(|mut refusal| {
            // We have shown no certificate: what the service cannot go on with is its own.
            if refusal.code == Code::PEER_REFUSED_US {
                refusal.code = Code::PEER_NO_CERTIFICATE;
                let alert = &refusal.facts.detail;
                refusal.facts.detail = format!("the identity service has no valid SVID; {alert}");
            }
            self.refusals.report(address, &refusal);
            refusal
        })
    }

    /// What the mounted bundle gives, less what is known to be withdrawn or denied.
    fn mounted_context(&self, live: Option<&Trust>) -> Result<TlsContext, DialError> {
        let bundle = self.mounted.read()?;
        let denied = live.iter().flat_map(|live| live.denied().iter().copied());
        let tombstones = live.iter().flat_map(|live| live.tombstones().iter().copied());
        let trust = Trust::new(&bundle, denied, tombstones).map_err(DialError::Bundle)?;
        Ok(self.contexts.snapshot(None, Arc::new(trust))?)
    }
}

/// A replica that vanished without a word is noticed after both.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
