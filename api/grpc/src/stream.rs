//! The trust stream on the wire: messages on a TLS connection of their own, each behind its length.
//!
//! Every proxy has one open for days and hardly anything is said on it, so it must cost next to
//! nothing while it is silent. HTTP/2 would hold three buffers and its tables for each, some 22 KiB
//! that are never used again after the first second: so the protocol is chosen by ALPN, and between
//! two messages nothing is held at all. Proxies send `StreamRequest`, the service `StreamResponse`;
//! what carries no message is a sign of life, and `End` is the service's last word.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::ready;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use prost::{DecodeError, Message};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};

/// What a TLS client asks for to speak it.
pub const ALPN: &[u8] = b"trust.steadfast.dev/v1";

/// One end of a stream.
#[derive(Debug)]
pub struct Wire<IO> {
    io: IO,
    /// The most bytes that a message of the other end may have.
    message_bytes_max: usize,
    /// The beginning of a message; empty and without room between two of them.
    unread: BytesMut,
}

/// Why nothing more comes, or goes.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection has failed, or ended amid a message.
    #[error("the connection broke")]
    Io(#[from] io::Error),
    /// What came is no message.
    #[error("what came is no message")]
    Malformed(#[from] DecodeError),
    /// A message is not taken within [`WRITE_TIMEOUT`].
    #[error("nothing was taken for {} s", WRITE_TIMEOUT.as_secs())]
    Stuck,
    /// A message is longer than the other end may send.
    #[error("a message of {length} bytes; {max} are taken")]
    TooLong {
        /// As its head says.
        length: usize,
        /// What is taken.
        max: usize,
    },
}

impl<IO> Wire<IO> {
    /// Speaks on this connection, and takes messages up to this length.
    pub fn new(io: IO, message_bytes_max: usize) -> Self {
        Self { io, message_bytes_max, unread: BytesMut::new() }
    }

    /// Takes messages up to this length from now on.
    pub fn take_up_to(&mut self, message_bytes_max: usize) {
        self.message_bytes_max = message_bytes_max;
    }
}

impl<IO: AsyncRead + Unpin> Wire<IO> {
    /// The next message; `None`: the other end has ended. May be dropped and called again.
    ///
    /// # Errors
    /// [`WireError`]
    pub async fn next<M: Message + Default>(&mut self) -> Result<Option<M>, WireError> {
        loop {
            if let Some(message) = take(&mut self.unread, self.message_bytes_max)? {
                return Ok(Some(message));
            }
            match self.read().await? {
                0 if self.unread.is_empty() => return Ok(None),
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                _ => {}
            }
        }
    }

    /// Reads what there is, by a buffer that lasts no longer than the call.
    async fn read(&mut self) -> io::Result<usize> {
        poll_fn(|cx| {
            let mut buffer = [0; READ_BYTES];
            let mut buffer = ReadBuf::new(&mut buffer);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer))?;
            self.unread.extend_from_slice(buffer.filled());
            Ok(buffer.filled().len()).into()
        })
        .await
    }
}

impl<IO: AsyncWrite + Unpin> Wire<IO> {
    /// Sends what [`framed`] has made.
    ///
    /// # Errors
    /// [`WireError`], after which nothing more may be sent.
    pub async fn send(&mut self, framed: &[u8]) -> Result<(), WireError> {
        let sending = async {
            self.io.write_all(framed).await?;
            self.io.flush().await
        };
        let sent = tokio::time::timeout(WRITE_TIMEOUT, sending).await;
        Ok(sent.map_err(|_| WireError::Stuck)??)
    }

    /// Sends this as the last, unless the other end takes nothing: it is not waited for long.
    pub async fn end(mut self, framed: &[u8]) {
        let ending = async {
            self.send(framed).await?;
            Ok::<_, WireError>(self.io.shutdown().await?)
        };
        let _ = tokio::time::timeout(LAST_WORD_MAX, ending).await;
    }
}

/// A message as it is sent: these fields of it, and then those of `more`, which are encoded already.
/// Protobuf reads what stands one after the other as one message.
pub fn framed(fields: &impl Message, more: &[u8]) -> Vec<u8> {
    let length = fields.encoded_len() + more.len();
    let mut framed = Vec::with_capacity(HEAD_BYTES + length);
    // What is sent is far shorter than 4 GiB; what is not is refused by its head.
    framed.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    fields.encode_raw(&mut framed);
    framed.extend_from_slice(more);
    framed
}

/// The first message of these bytes, if all of it is there.
fn take<M: Message + Default>(unread: &mut BytesMut, max: usize) -> Result<Option<M>, WireError> {
    let Some((head, rest)) = unread.split_first_chunk::<HEAD_BYTES>() else { return Ok(None) };
    let length = u32::from_be_bytes(*head) as usize;
    if length > max {
        return Err(WireError::TooLong { length, max });
    }
    let Some(message) = rest.get(..length) else { return Ok(None) };
    let message = M::decode(message)?;
    unread.advance(HEAD_BYTES + length);
    if unread.is_empty() {
        *unread = BytesMut::new();
    }
    Ok(Some(message))
}

/// The service says its time at least this often, which is its sign of life.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
/// A service that has said nothing for so long is gone.
pub const SERVICE_SILENT_MAX: Duration = Duration::from_secs(15);
/// A proxy that has nothing to say says so this often.
pub const SIGN_OF_LIFE: Duration = Duration::from_secs(20);
/// A proxy that has said nothing for so many heartbeats is gone.
pub const SILENT_BEATS_MAX: u32 = 5;
/// For whoever reads nothing more.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// Whoever stops should not be held up by it.
const LAST_WORD_MAX: Duration = Duration::from_secs(2);
/// The length, with the highest byte first.
const HEAD_BYTES: usize = 4;
const READ_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use steadfast_api::trust::v1;
    use steadfast_api::trust::v1::stream_request::Message as Up;
    use steadfast_api::trust::v1::stream_response::Message as Down;

    use super::*;

    const MAX: usize = 64 * 1024;

    fn ack(nonce: u64) -> v1::StreamRequest {
        v1::StreamRequest { message: Some(Up::Ack(v1::Ack { nonce, ..v1::Ack::default() })) }
    }

    #[test]
    fn messages_are_read_however_they_are_cut_and_leave_no_buffer() {
        let sent = [ack(1), v1::StreamRequest::default(), ack(300), ack(0)];
        let bytes: Vec<u8> = sent.iter().flat_map(|message| framed(message, &[])).collect();
        let (mut unread, mut read) = (BytesMut::new(), Vec::new());
        for byte in &bytes {
            unread.extend_from_slice(&[*byte]);
            read.extend(take::<v1::StreamRequest>(&mut unread, MAX).unwrap());
        }
        assert_eq!(read, sent);
        assert_eq!(unread.capacity(), 0);
        unread.extend_from_slice(&bytes);
        let read = [(); 4].map(|()| take::<v1::StreamRequest>(&mut unread, MAX).unwrap().unwrap());
        assert_eq!(read, sent);
        assert_eq!(
            (take::<v1::StreamRequest>(&mut unread, MAX).unwrap(), unread.capacity()),
            (None, 0)
        );
    }

    #[test]
    fn what_is_too_long_or_no_message_is_refused_at_once() {
        let taken = |bytes: &[u8]| take::<v1::StreamRequest>(&mut BytesMut::from(bytes), MAX);
        let too_long = u32::try_from(MAX + 1).unwrap().to_be_bytes();
        assert!(matches!(taken(&too_long), Err(WireError::TooLong { length: 65_537, .. })));
        assert!(matches!(taken(&[0, 0, 0, 1, 0xff]), Err(WireError::Malformed(_))));
    }

    #[test]
    fn fields_and_what_is_encoded_already_are_one_message() {
        let bundle = v1::Bundle { seq: 7, anchors: vec![vec![1; 300]], ..v1::Bundle::default() };
        let server_time = Some(prost_types::Timestamp { seconds: 5, nanos: 6 });
        let whole = v1::StreamResponse { server_time, message: Some(Down::Bundle(bundle)) };
        let more = v1::StreamResponse { server_time: None, ..whole.clone() }.encode_to_vec();
        let fields = v1::StreamResponse { server_time, message: None };
        let mut framed = BytesMut::from(&*framed(&fields, &more));
        assert_eq!(take::<v1::StreamResponse>(&mut framed, MAX).unwrap(), Some(whole));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_takes_nothing_is_waited_for_no_longer_than_said() {
        let (near, _far) = tokio::io::duplex(8);
        let mut wire = Wire::new(near, MAX);
        assert!(matches!(wire.send(&[0; 64]).await, Err(WireError::Stuck)));
        let began = tokio::time::Instant::now();
        wire.end(&[0; 64]).await;
        assert_eq!(began.elapsed(), LAST_WORD_MAX);
    }

    #[tokio::test]
    async fn a_connection_that_ends_amid_a_message_is_broken_and_one_between_two_has_ended() {
        let whole = framed(&ack(7), &[]);
        let mut wire = Wire::new(&whole[..], MAX);
        assert_eq!(wire.next().await.unwrap(), Some(ack(7)));
        assert_eq!(wire.next::<v1::StreamRequest>().await.unwrap(), None);
        let mut wire = Wire::new(&whole[..whole.len() - 1], MAX);
        assert!(matches!(wire.next::<v1::StreamRequest>().await, Err(WireError::Io(_))));
    }
}
