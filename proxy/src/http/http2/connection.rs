//! What both ends of a connection have: its settings, its windows, its PINGs, and its stream of
//! bytes as h2 sees it.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use crate::http::Peer;
use crate::http::body::Reset;
use crate::http::error::ServeError;
use crate::http::worker::{Budget, Reservation};

/// How much a peer may send before any of it is read.
#[derive(Debug)]
pub(super) struct Windows {
    pub(super) connection_bytes: u32,
    pub(super) stream_bytes: u32,
    /// Held for the connection's life.
    _reservation: Option<Reservation>,
}

impl Windows {
    /// Full windows while the process's budget lasts, and then reduced ones: a process with that
    /// many peers is slower for new ones, instead of dead.
    pub(super) fn under(budget: &Budget) -> Self {
        let reservation = budget.reserve(CONNECTION_WINDOW_BYTES.into());
        let (connection_bytes, stream_bytes) = match reservation {
            Some(_) => (CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES),
            None => (REDUCED_CONNECTION_WINDOW_BYTES, REDUCED_STREAM_WINDOW_BYTES),
        };
        Self { connection_bytes, stream_bytes, _reservation: reservation }
    }
}

/// PINGs a sidecar, and gives up when it stays silent.
pub(super) struct Keepalive {
    pings: PingPong,
    timer: Pin<Box<Sleep>>,
    waits: bool,
}

impl Keepalive {
    pub(super) fn new(peer: Peer, pings: Option<PingPong>) -> Option<Self> {
        let pings = pings.filter(|_| peer == Peer::Mesh)?;
        Some(Self { pings, timer: Box::pin(sleep(KEEPALIVE_INTERVAL)), waits: false })
    }

    /// Ready when the peer is gone, or the connection.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ServeError> {
        loop {
            if self.waits {
                match self.pings.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => self.arm(false, KEEPALIVE_INTERVAL),
                    Poll::Ready(Err(error)) => return Poll::Ready(serve_error(error)),
                    Poll::Pending => {
                        ready!(self.timer.as_mut().poll(cx));
                        return Poll::Ready(ServeError::PeerGone);
                    }
                }
            }
            ready!(self.timer.as_mut().poll(cx));
            if let Err(error) = self.pings.send_ping(Ping::opaque()) {
                return Poll::Ready(serve_error(error));
            }
            self.arm(true, KEEPALIVE_TIMEOUT);
        }
    }

    fn arm(&mut self, waits: bool, delay: Duration) {
        self.waits = waits;
        self.timer.as_mut().reset(Instant::now() + delay);
    }
}

/// A connection's stream of bytes. h2 forgets what was wrong with it, but a refused handshake is
/// told by the error of the first read; and a connection is of use once its peer has spoken.
pub(super) struct Tapped<IO> {
    io: IO,
    tap: Rc<Tap>,
}

#[derive(Default)]
pub(super) struct Tap {
    pub(super) spoken: Cell<bool>,
    error: RefCell<Option<io::Error>>,
}

impl Tap {
    /// What broke the connection, if the stream of bytes did.
    pub(super) fn take_error(&self) -> Option<io::Error> {
        self.error.borrow_mut().take()
    }

    fn keep<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| {
            let kind = error.kind();
            self.error.borrow_mut().get_or_insert(error);
            kind.into()
        })
    }
}

impl<IO> Tapped<IO> {
    pub(super) fn new(io: IO) -> (Self, Rc<Tap>) {
        let tap = Rc::new(Tap::default());
        (Self { io, tap: tap.clone() }, tap)
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Tapped<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.io).poll_read(cx, buffer));
        if buffer.filled().len() > before {
            self.tap.spoken.set(true);
        }
        Poll::Ready(self.tap.keep(result))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Tapped<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write(cx, bytes));
        Poll::Ready(self.tap.keep(result))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, slices));
        Poll::Ready(self.tap.keep(result))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.io).poll_flush(cx));
        Poll::Ready(self.tap.keep(result))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

pub(super) fn serve_error(error: h2::Error) -> ServeError {
    let message = error.to_string();
    match (error.reason(), error.into_io()) {
        (_, Some(error)) => ServeError::Io(error),
        (reason, None) => {
            let reset = reason.map_or(Reset::INTERNAL_ERROR, |reason| Reset(reason.into()));
            ServeError::Protocol { reset, message }
        }
    }
}

/// Full speed for one stream over 2 ms and 1 Gbit/s.
pub const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// Four stalled streams leave room for the others.
pub const CONNECTION_WINDOW_BYTES: u32 = 4 * STREAM_WINDOW_BYTES;
const REDUCED_STREAM_WINDOW_BYTES: u32 = 16 * 1024;
const REDUCED_CONNECTION_WINDOW_BYTES: u32 = 4 * REDUCED_STREAM_WINDOW_BYTES;
/// High, since a client may hold one stream for each of its watches; what streams may cost is
/// bounded by the connection's window, and what is kept of them by a budget.
pub(super) const STREAMS_MAX: u32 = 4096;
/// As in HTTP/1.
pub(super) const HEADER_LIST_BYTES_MAX: u32 = 64 * 1024;
/// What one stream may have on its way out.
pub(super) const SEND_BUFFER_BYTES_MAX: usize = 64 * 1024;
/// A peer must have sent its preface, or SETTINGS, by then.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// A PING must be answered by then.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
const _: () = assert!(CONNECTION_WINDOW_BYTES >= 4 * STREAM_WINDOW_BYTES);
