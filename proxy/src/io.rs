//! A connection as the stages see it: bytes both ways, of which some may have been looked at.
//!
//! Detection reads into a [`Prefixed`]; whoever reads from it afterwards gets those bytes first,
//! and then the memory they were in is given back: an idle connection holds no buffer of ours.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use steadfast_identity_client::TlsStream;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;

/// A connection.
pub trait Io: AsyncRead + AsyncWrite + Unpin + 'static {
    /// Has the peer see that the connection broke, and no end, once this is dropped. One of TLS
    /// that is dropped before it was shut down says so by itself.
    fn abort(&mut self) {}
}

/// A connection of any kind, where the kinds meet.
pub type BoxIo = Box<dyn Io>;

impl Io for TcpStream {
    fn abort(&mut self) {
        // One that is gone already needs no reset.
        let _ = SockRef::from(&*self).set_linger(Some(Duration::ZERO));
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin + 'static> Io for TlsStream<IO> {}

#[cfg(test)]
impl Io for tokio::io::DuplexStream {}

impl Io for BoxIo {
    fn abort(&mut self) {
        (**self).abort();
    }
}

impl<IO: Io> Io for Prefixed<IO> {
    fn abort(&mut self) {
        self.io.abort();
    }
}

impl<IO: Io, T: Traffic + Unpin + 'static> Io for Counted<IO, T> {
    fn abort(&mut self) {
        self.io.abort();
    }
}

/// A connection whose first bytes can be looked at before they are read.
#[derive(Debug)]
pub struct Prefixed<IO> {
    prefix: Vec<u8>,
    at: usize,
    ended: bool,
    io: IO,
}

impl<IO> Prefixed<IO> {
    /// Nothing looked at yet.
    pub fn new(io: IO) -> Self {
        Self { prefix: Vec::new(), at: 0, ended: false, io }
    }

    /// What was looked at and not yet read.
    pub fn seen(&self) -> &[u8] {
        &self.prefix[self.at..]
    }

    /// Whether the peer has ended its side behind the bytes that were seen.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Takes bytes that were seen, at most so many, as if they had been read.
    pub fn skip(&mut self, bytes: usize) {
        self.at += bytes.min(self.seen().len());
        if self.at == self.prefix.len() {
            (self.prefix, self.at) = (Vec::new(), 0);
        }
    }
}

impl<IO: AsyncRead + Unpin> Prefixed<IO> {
    /// Waits for more bytes and lets them be seen; 0 is the end of the peer's side.
    ///
    /// # Errors
    /// As reading.
    pub async fn look(&mut self) -> io::Result<usize> {
        poll_fn(|cx| self.poll_look(cx)).await
    }

    /// As [`Self::look`].
    pub fn poll_look(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Ok(0));
        }
        // On the stack: a connection that waits holds no memory for it.
        let mut bytes = [0; LOOK_BYTES];
        let mut buf = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut buf))?;
        let read = buf.filled();
        self.ended = read.is_empty();
        self.prefix.extend_from_slice(read);
        Poll::Ready(Ok(read.len()))
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Prefixed<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let seen = this.seen();
        if !seen.is_empty() {
            let taken = seen.len().min(buf.remaining());
            buf.put_slice(&seen[..taken]);
            this.skip(taken);
            return Poll::Ready(Ok(()));
        }
        if this.ended {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.io).poll_read(cx, buf)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Prefixed<IO> {
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
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
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

/// A connection that is lent to a handshake, which drops it when it fails: it then comes back.
#[derive(Debug)]
pub struct Lent<IO> {
    io: Option<IO>,
    back: Weak<RefCell<Option<IO>>>,
}

/// Where a lent connection comes back to, unless this is dropped before.
#[derive(Debug)]
pub struct Back<IO>(Rc<RefCell<Option<IO>>>);

impl<IO> Lent<IO> {
    /// Lends a connection.
    pub fn new(io: IO) -> (Self, Back<IO>) {
        let back = Rc::new(RefCell::new(None));
        (Self { io: Some(io), back: Rc::downgrade(&back) }, Back(back))
    }

    fn io(&mut self) -> io::Result<Pin<&mut IO>>
    where
        IO: Unpin,
    {
        // It is there until this is dropped.
        self.io.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl<IO> Back<IO> {
    /// The connection, if it has come back.
    pub fn take(self) -> Option<IO> {
        self.0.take()
    }
}

impl<IO> Drop for Lent<IO> {
    fn drop(&mut self) {
        if let Some(back) = self.back.upgrade() {
            *back.borrow_mut() = self.io.take();
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Lent<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.io()?.poll_read(cx, buf)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Lent<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.io()?.poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.io()?.poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io()?.poll_shutdown(cx)
    }
}

/// Ends a connection so that what was written last arrives: a socket that is closed with bytes
/// unread resets the connection, and a reset overtakes an alert that explains it.
pub async fn linger(mut io: impl Io) {
    let ending = async {
        io.shutdown().await?;
        let (mut sink, mut left) = ([0; 1024], LINGER_BYTES_MAX);
        while left > 0 {
            match io.read(&mut sink).await? {
                0 => break,
                read => left = left.saturating_sub(read),
            }
        }
        Ok::<_, io::Error>(())
    };
    // The connection is over: how it ends is nobody's business any more.
    let _ = tokio::time::timeout(LINGER_MAX, ending).await;
}

/// Hears of the bytes of a connection.
pub trait Traffic {
    /// So many were read.
    fn read(&self, bytes: usize);
    /// So many were written.
    fn written(&self, bytes: usize);
    /// The connection broke.
    fn broke(&self, error: &io::Error);
}

/// A connection whose bytes are counted.
#[derive(Debug)]
pub struct Counted<IO, T> {
    io: IO,
    traffic: T,
}

impl<IO, T: Traffic> Counted<IO, T> {
    /// Counts the bytes of this connection there.
    pub fn new(io: IO, traffic: T) -> Self {
        Self { io, traffic }
    }

    fn note<V>(&self, result: io::Result<V>) -> io::Result<V> {
        result.inspect_err(|error| self.traffic.broke(error))
    }
}

impl<IO: AsyncRead + Unpin, T: Traffic + Unpin> AsyncRead for Counted<IO, T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut self.io).poll_read(cx, buf));
        self.traffic.read(buf.filled().len() - before);
        Poll::Ready(self.note(result))
    }
}

impl<IO: AsyncWrite + Unpin, T: Traffic + Unpin> AsyncWrite for Counted<IO, T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write(cx, bytes));
        self.traffic.written(*result.as_ref().unwrap_or(&0));
        Poll::Ready(self.note(result))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, slices));
        self.traffic.written(*result.as_ref().unwrap_or(&0));
        Poll::Ready(self.note(result))
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

/// More than a ClientHello with a post-quantum key share, so that one look is mostly enough.
const LOOK_BYTES: usize = 2048;
const LINGER_BYTES_MAX: usize = 64 * 1024;
const LINGER_MAX: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lent_connection_comes_back_while_somebody_waits_for_it() {
        let (lent, back) = Lent::new(7);
        drop(lent);
        assert_eq!(back.take(), Some(7));
        let (lent, back) = Lent::new(7);
        assert_eq!(back.take(), None);
        drop(lent);
    }

    #[tokio::test]
    async fn what_was_seen_is_read_again_and_then_what_follows() {
        let (mut peer, ours) = tokio::io::duplex(64);
        let mut io = Prefixed::new(ours);
        peer.write_all(b"hello ").await.unwrap();
        assert_eq!(io.look().await.unwrap(), 6);
        peer.write_all(b"world").await.unwrap();
        peer.shutdown().await.unwrap();
        let mut text = String::new();
        io.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello world");
        assert_eq!(io.prefix.capacity(), 0, "the memory is given back");
    }

    #[tokio::test]
    async fn an_end_that_was_seen_is_an_end() {
        let (peer, ours) = tokio::io::duplex(64);
        drop(peer);
        let mut io = Prefixed::new(ours);
        assert_eq!(io.look().await.unwrap(), 0);
        assert!(io.ended());
        assert_eq!(io.read(&mut [0; 8]).await.unwrap(), 0);
    }
}
