//! Copies bytes both ways until both sides have ended.
//!
//! Each direction ends by itself (a half-close is passed on and the other direction goes on). The
//! worker's buffer is borrowed only within one poll: a connection that waits holds none, and one
//! whose receiver is slow holds what it could not write, at most one buffer's worth.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::ReadBuf;

use crate::io::Io;

/// The buffer that all connections of a worker read into.
#[derive(Clone, Debug)]
pub struct Scratch(Rc<RefCell<Box<[u8]>>>);

/// Which side broke.
#[derive(Debug, thiserror::Error)]
#[error("the connection of the {side} broke")]
pub struct CopyError {
    /// "client" or "server".
    pub side: &'static str,
    /// Whether the server had sent anything.
    pub server_spoke: bool,
    /// How.
    #[source]
    pub source: io::Error,
}

impl Scratch {
    /// A buffer for one worker.
    pub fn new() -> Self {
        Self(Rc::new(RefCell::new(vec![0; SCRATCH_BYTES].into())))
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Copies until both sides have ended. If one breaks, the other is made to break too: an end would
/// tell it that it has got everything.
///
/// # Errors
/// Which side broke; both are then to be dropped.
pub async fn opaque(
    client: &mut impl Io,
    server: &mut impl Io,
    scratch: &Scratch,
) -> Result<(), CopyError> {
    let mut to_server = Half::new(["client", "server"]);
    let mut to_client = Half::new(["server", "client"]);
    let copied = poll_fn(|cx| {
        let up = to_server.poll(cx, client, server, scratch)?;
        let down = to_client.poll(cx, server, client, scratch)?;
        match (up, down) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            _ => Poll::Pending,
        }
    });
    copied.await.map_err(|Broken { side, source }| {
        client.abort();
        server.abort();
        CopyError { side, server_spoke: to_client.spoke, source }
    })
}

/// Which side of a direction broke.
struct Broken {
    side: &'static str,
    source: io::Error,
}

/// One direction.
struct Half {
    /// What was read and could not be written yet.
    stalled: Vec<u8>,
    stalled_at: usize,
    state: State,
    /// Whether something was written since the last flush: TLS may hold it back.
    unflushed: bool,
    /// Whether anything was read.
    spoke: bool,
    /// The names of reader and writer.
    sides: [&'static str; 2],
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Copying,
    Done,
    Ended,
}

impl Half {
    fn new(sides: [&'static str; 2]) -> Self {
        let stalled = Vec::new();
        let state = State::Copying;
        Self { stalled, stalled_at: 0, state, unflushed: false, spoke: false, sides }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut impl Io,
        writer: &mut impl Io,
        scratch: &Scratch,
    ) -> Poll<Result<(), Broken>> {
        let [read_side, write_side] = self.sides;
        let broke = |side| move |source| Broken { side, source };
        loop {
            if !self.stalled.is_empty() {
                ready!(self.poll_stalled(cx, writer)).map_err(broke(write_side))?;
            }
            match self.state {
                State::Copying => {}
                State::Done => return Poll::Ready(Ok(())),
                State::Ended => {
                    // Flushes, too.
                    let end = ready!(Pin::new(&mut *writer).poll_shutdown(cx));
                    self.state = State::Done;
                    // A peer that is gone needs no half-close.
                    return match end {
                        Err(error) if error.kind() != io::ErrorKind::NotConnected => {
                            Poll::Ready(Err(broke(write_side)(error)))
                        }
                        _ => Poll::Ready(Ok(())),
                    };
                }
            }
            let mut bytes = scratch.0.borrow_mut();
            let mut buf = ReadBuf::new(&mut bytes);
            match Pin::new(&mut *reader).poll_read(cx, &mut buf).map_err(broke(read_side))? {
                Poll::Ready(()) => {}
                Poll::Pending => {
                    if self.unflushed {
                        ready!(Pin::new(&mut *writer).poll_flush(cx)).map_err(broke(write_side))?;
                        self.unflushed = false;
                    }
                    return Poll::Pending;
                }
            }
            let read = buf.filled();
            if read.is_empty() {
                self.state = State::Ended;
                continue;
            }
            self.spoke = true;
            self.write_or_stall(cx, writer, read).map_err(broke(write_side))?;
        }
    }

    /// Writes what it can at once and keeps a copy of the rest.
    fn write_or_stall(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut impl Io,
        mut bytes: &[u8],
    ) -> io::Result<()> {
        self.unflushed = true;
        while !bytes.is_empty() {
            match Pin::new(&mut *writer).poll_write(cx, bytes)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => bytes = &bytes[written..],
                Poll::Pending => {
                    (self.stalled, self.stalled_at) = (bytes.to_vec(), 0);
                    break;
                }
            }
        }
        Ok(())
    }

    fn poll_stalled(&mut self, cx: &mut Context<'_>, writer: &mut impl Io) -> Poll<io::Result<()>> {
        while self.stalled_at < self.stalled.len() {
            let rest = &self.stalled[self.stalled_at..];
            match ready!(Pin::new(&mut *writer).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.stalled_at += written,
            }
        }
        self.stalled = Vec::new();
        Poll::Ready(Ok(()))
    }
}

/// Two TLS records: larger ones win nothing on loopback or a network, measured.
const SCRATCH_BYTES: usize = 32 * 1024;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn a_half_close_is_passed_on_and_the_other_way_goes_on() {
        let (mut client, mut client_side) = duplex(1024);
        let (mut server, mut server_side) = duplex(1024);
        let scratch = Scratch::new();
        let talk = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut question = String::new();
            server.read_to_string(&mut question).await.unwrap();
            assert_eq!(question, "question");
            // Only after the client's end was seen.
            server.write_all(b"the answer").await.unwrap();
            server.shutdown().await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "the answer");
        };
        let copy = opaque(&mut client_side, &mut server_side, &scratch);
        let (copy, ()) = tokio::join!(copy, talk);
        copy.unwrap();
    }

    #[tokio::test]
    async fn a_slow_reader_gets_every_byte_in_order() {
        let (mut client, mut client_side) = duplex(64 * 1024);
        let (mut server, mut server_side) = duplex(7);
        let sent: Vec<u8> = (0..200_000_u32).map(|number| number as u8).collect();
        let scratch = Scratch::new();
        let send = async {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
        };
        let receive = async {
            let mut received = Vec::new();
            server.read_to_end(&mut received).await.unwrap();
            drop(server);
            received
        };
        let copy = opaque(&mut client_side, &mut server_side, &scratch);
        let (_, (), received) = tokio::join!(copy, send, receive);
        assert!(received == sent);
    }

    #[tokio::test]
    async fn a_side_that_breaks_does_not_look_like_an_end_to_the_other() {
        async fn pair() -> (TcpStream, TcpStream) {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let connecting = TcpStream::connect(listener.local_addr().unwrap());
            let (connected, accepted) = tokio::join!(connecting, listener.accept());
            (connected.unwrap(), accepted.unwrap().0)
        }
        let ((mut client, mut client_side), (mut server, mut server_side)) =
            (pair().await, pair().await);
        let scratch = Scratch::new();
        let talk = async {
            server.write_all(b"half of it").await.unwrap();
            client.read_exact(&mut [0; 10]).await.unwrap();
            server.abort();
            drop(server);
        };
        let copy = opaque(&mut client_side, &mut server_side, &scratch);
        let (copied, ()) = tokio::join!(copy, talk);
        drop((client_side, server_side));
        let error = copied.unwrap_err();
        assert_eq!((error.side, error.server_spoke), ("server", true));
        let end = client.read(&mut [0; 1]).await;
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn the_buffer_is_free_while_a_connection_waits() {
        let ((_client, mut a), (_server, mut b)) = (duplex(8), duplex(8));
        let scratch = Scratch::new();
        let mut copy = std::pin::pin!(opaque(&mut a, &mut b, &scratch));
        assert!(futures::poll!(copy.as_mut()).is_pending());
        assert!(scratch.0.try_borrow_mut().is_ok());
    }
}
