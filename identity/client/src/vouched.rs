//! A connection of our own that obeys each new bundle while it is open, as the sidecar's do.
//!
//! The streams to identity and control stay open for days. When an issuer of either end is denied,
//! its key is in other hands: the connection ends at once. When an anchor of either end is
//! withdrawn it ends, too, but at a moment of its own choice within [`WITHDRAWN_END_MAX`], so that
//! a rotation does not make everybody dial at once. Whoever used it dials again, by what holds now.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;

use crate::context::TlsContext;
use crate::random_jitter;
use crate::standing::{Footing, Standing};
use crate::stream::TlsStream;

/// The connection, for as long as the newest bundle vouches for both its ends.
pub struct Vouched<IO> {
    io: TlsStream<IO>,
    over: Pin<Box<dyn Future<Output = Standing> + Send>>,
    ended: Option<Standing>,
}

impl<IO> Vouched<IO> {
    /// A connection whose ends stand on this; the bundles are those of these snapshots.
    pub fn new(
        io: TlsStream<IO>,
        footing: Footing,
        contexts: watch::Receiver<Arc<TlsContext>>,
    ) -> Self {
        Self { io, over: Box::pin(no_longer(footing, contexts)), ended: None }
    }

    /// The connection itself.
    pub fn tls(&self) -> &TlsStream<IO> {
        &self.io
    }

    /// Why it is over, if it is. A pending read is woken by it.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.ended.is_none()
            && let Poll::Ready(standing) = self.over.as_mut().poll(cx)
        {
            if let Some(code) = standing.code() {
                tracing::info!(%code, %self, "a connection ends: a newer bundle does not vouch for it");
            }
            self.ended = Some(standing);
        }
        match self.ended.and_then(Standing::code) {
            Some(code) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, code.to_string())),
            None => Ok(()),
        }
    }
}

/// Waits until no bundle vouches for it any more.
async fn no_longer(footing: Footing, mut contexts: watch::Receiver<Arc<TlsContext>>) -> Standing {
    loop {
        let bundle = contexts.borrow_and_update().bundle.clone();
        let standing = bundle.map_or(Standing::Good, |bundle| footing.standing(&bundle));
        match standing {
            Standing::Denied(..) => return standing,
            Standing::Withdrawn(..) => {
                tokio::select! {
                    () = tokio::time::sleep(random_jitter().of(WITHDRAWN_END_MAX)) => return standing,
                    Ok(()) = contexts.changed() => {}
                }
            }
            Standing::Good => {
                if contexts.changed().await.is_err() {
                    // Nobody publishes bundles any more: this process stops.
                    return std::future::pending().await;
                }
            }
        }
    }
}

impl<IO> fmt::Display for Vouched<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.io.peer() {
            Some(peer) => write!(f, "peer={}", peer.id),
            None => f.write_str("peer=unknown"),
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Vouched<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Vouched<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl Vouched<tokio::net::TcpStream> {
    /// The address of the other end.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.io.io().peer_addr().ok()
    }
}

/// A mesh of ten thousand workloads then dials some hundreds of times a second.
pub const WITHDRAWN_END_MAX: Duration = Duration::from_secs(30);
