//! The second stage: what does a connection speak, and who is at its other end?
//!
//! Every read is bounded in bytes and in time. TLS for a workload of this mesh (by SNI) is terminated in
//! place and its peer verified; TLS for anybody else is opaque. A protocol whose server speaks
//! first is found by dialling the server when the client stays silent for a moment: whoever speaks
//! first decides, and nobody waits for a timeout.

mod hello;

use std::future::{Future, poll_fn};
use std::task::Poll;
use std::time::Duration;

use steadfast_api::DnsIdentity;
use tokio::io::AsyncRead;
use tokio::time::timeout;

use crate::http::sniff::{SNIFF_BYTES_MAX, Sniffed, sniff};
use crate::io::Prefixed;
use crate::refusal::Refusal;
use crate::transport::{Header, HeaderError};
#[cfg(test)]
pub(crate) use hello::client_hello;
pub use hello::{Hello, parse as parse_hello};

/// Whether a connection begins with TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// For this workload, or for another of this mesh that discovery believes to be here: the
    /// handshake then shows the dialler who really answers, and both sides can say so.
    Mesh,
    /// Not TLS.
    None,
    /// For somebody else: nothing of ours is in it.
    Other,
}

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proto {
    /// HTTP/1.0 or 1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// Anything else: bytes.
    Opaque,
}

/// Who spoke first.
#[derive(Debug)]
pub enum First<S> {
    /// The client; its first bytes can be seen.
    Client,
    /// Nobody, before the server was dialled; then this server, whose first bytes can be seen, or
    /// the end of a side.
    Server(S),
    /// The client, after the server was dialled: a connection that is there to be used.
    Both(S),
    /// Nobody: the connection to the server broke.
    Broken(std::io::Error),
}

/// Looks whether a connection begins with TLS for the workload of this name.
///
/// # Errors
/// [`Refusal::Silent`] for a beginning that stays incomplete; [`Refusal::Gone`].
pub async fn tls<IO: AsyncRead + Unpin>(
    io: &mut Prefixed<IO>,
    local_name: &str,
) -> Result<Tls, Refusal> {
    let hello = async {
        loop {
            match hello::parse(io.seen()) {
                Hello::Client { server_name: Some(name) } if of_this_mesh(&name, local_name) => {
                    return Ok(Tls::Mesh);
                }
                Hello::Client { .. } => return Ok(Tls::Other),
                Hello::NotTls => return Ok(Tls::None),
                Hello::Incomplete if io.ended() => return Ok(Tls::None),
                Hello::Incomplete => io.look().await.map_err(Refusal::Gone)?,
            };
        }
    };
    timeout(DETECT_TIMEOUT, hello).await.unwrap_or(Err(Refusal::Silent("whole ClientHello")))
}

/// Whether a name is that of a workload of the mesh that this workload is of. No application's own
/// TLS asks for such a name.
fn of_this_mesh(name: &str, local_name: &str) -> bool {
    let parse = |name: &str| name.parse::<DnsIdentity>().ok();
    name == local_name
        || parse(name).zip(parse(local_name)).is_some_and(|(name, local)| {
            name.trust_domain() == local.trust_domain()
                && name.control_namespace() == local.control_namespace()
        })
}

/// Reads the transport header that the connection's ALPN announced.
///
/// # Errors
/// [`Refusal::Header`], [`Refusal::Silent`].
pub async fn header<IO: AsyncRead + Unpin>(io: &mut Prefixed<IO>) -> Result<Header, Refusal> {
    match timeout(DETECT_TIMEOUT, Header::read(io)).await {
        Ok(Ok(header)) => Ok(header),
        Ok(Err(HeaderError::Ended(error))) => Err(Refusal::Gone(error)),
        Ok(Err(error)) => Err(Refusal::Header(error)),
        Err(_) => Err(Refusal::Silent("transport header")),
    }
}

/// Looks what a client that has spoken, or soon will, speaks. A beginning that stays undecided is
/// opaque.
///
/// # Errors
/// [`Refusal::Gone`].
pub async fn protocol<IO: AsyncRead + Unpin>(io: &mut Prefixed<IO>) -> Result<Proto, Refusal> {
    let decided = async {
        loop {
            match sniff(io.seen()) {
                Sniffed::Http1 => return Ok(Proto::Http1),
                Sniffed::Http2Preface => return Ok(Proto::Http2),
                Sniffed::Opaque | Sniffed::Tls => return Ok(Proto::Opaque),
                Sniffed::NeedMore if io.ended() || io.seen().len() >= SNIFF_BYTES_MAX => {
                    return Ok(Proto::Opaque);
                }
                Sniffed::NeedMore => io.look().await.map_err(Refusal::Gone)?,
            };
        }
    };
    timeout(DETECT_TIMEOUT, decided).await.unwrap_or(Ok(Proto::Opaque))
}

/// Waits until the client or the server speaks. The server is dialled once the client has been
/// silent for `SERVER_FIRST_AFTER`; one that cannot be reached is no reason to send the client
/// away before it has spoken.
///
/// # Errors
/// [`Refusal::Gone`], and what dialling returns if the client then ends its side without a word.
pub async fn first<IO, S>(
    client: &mut Prefixed<IO>,
    dial: impl Future<Output = Result<Prefixed<S>, Refusal>>,
) -> Result<First<Prefixed<S>>, Refusal>
where
    IO: AsyncRead + Unpin,
    S: AsyncRead + Unpin,
{
    if !client.seen().is_empty() {
        return Ok(First::Client);
    }
    if let Ok(looked) = timeout(SERVER_FIRST_AFTER, client.look()).await {
        looked.map_err(Refusal::Gone)?;
        return Ok(First::Client);
    }
    let mut server = match dial.await {
        Ok(server) => server,
        Err(refusal) => {
            let looked = timeout(DETECT_TIMEOUT, client.look()).await;
            let spoke = looked.is_ok_and(|looked| looked.is_ok_and(|bytes| bytes > 0));
            return if spoke { Ok(First::Client) } else { Err(refusal) };
        }
    };
    enum Spoke {
        Client(usize),
        Server(std::io::Result<usize>),
    }
    let spoke = poll_fn(|cx| {
        if let Poll::Ready(looked) = client.poll_look(cx) {
            return Poll::Ready(looked.map(Spoke::Client));
        }
        server.poll_look(cx).map(|looked| Ok(Spoke::Server(looked)))
    });
    Ok(match spoke.await.map_err(Refusal::Gone)? {
        Spoke::Client(1..) => First::Both(server),
        Spoke::Client(0) | Spoke::Server(Ok(_)) => First::Server(server),
        Spoke::Server(Err(error)) => First::Broken(error),
    })
}

/// Of each read that has to decide something.
pub const DETECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Clients that speak first do so within a round trip of connecting; dialling for one that is
/// slower costs a connection, never a request.
const SERVER_FIRST_AFTER: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    fn pair() -> (DuplexStream, Prefixed<DuplexStream>) {
        let (peer, ours) = duplex(4096);
        (peer, Prefixed::new(ours))
    }

    #[test]
    fn tls_for_any_workload_of_this_mesh_is_ended_here_and_no_other() {
        let name = |td: &str| format!("web.demo.serviceaccount.identity.steadfast.{td}");
        let local = name("cluster.local");
        assert!(of_this_mesh(&local, &local));
        assert!(of_this_mesh(&local.replace("web", "api"), &local));
        assert!(!of_this_mesh(&name("elsewhere.test"), &local));
        assert!(!of_this_mesh(&local.replace("steadfast", "linkerd"), &local));
        assert!(!of_this_mesh("www.example.org", &local));
    }

    #[tokio::test]
    async fn a_protocol_is_told_by_bytes_that_come_one_by_one() {
        for (bytes, proto) in [
            (&b"GET / HTTP/1.1\r\n"[..], Proto::Http1),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Proto::Http2),
            (b"\0\x01\x02", Proto::Opaque),
        ] {
            let (mut peer, mut ours) = pair();
            let send = async {
                for byte in bytes {
                    peer.write_all(&[*byte]).await.unwrap();
                    tokio::task::yield_now().await;
                }
            };
            let (detected, ()) = tokio::join!(protocol(&mut ours), send);
            assert_eq!(detected.unwrap(), proto);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_undecided_beginning_is_opaque_after_a_while_and_is_not_lost() {
        let (mut peer, mut ours) = pair();
        peer.write_all(b"GET").await.unwrap();
        assert_eq!(protocol(&mut ours).await.unwrap(), Proto::Opaque);
        assert_eq!(ours.seen(), b"GET");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_gets_the_server_that_speaks_first() {
        let (_peer, mut ours) = pair();
        let (mut server, server_side) = pair();
        server.write_all(b"220 ready\r\n").await.unwrap();
        match first(&mut ours, async { Ok(server_side) }).await.unwrap() {
            First::Server(server) => assert_eq!(server.seen(), b"220 ready\r\n"),
            other => panic!("{other:?}"),
        };
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_speaks_at_once_dials_nothing() {
        let (mut peer, mut ours) = pair();
        peer.write_all(b"hello").await.unwrap();
        let never = async { panic!("the server was dialled") };
        let spoke = first::<_, DuplexStream>(&mut ours, never).await.unwrap();
        assert!(matches!(spoke, First::Client));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_down_waits_for_the_client_to_speak() {
        let (mut peer, mut ours) = pair();
        let down = async { Err(Refusal::Overloaded("test")) };
        let speak = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            peer.write_all(b"hello").await.unwrap();
        };
        let (spoke, ()) = tokio::join!(first::<_, DuplexStream>(&mut ours, down), speak);
        assert!(matches!(spoke, Ok(First::Client)));
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_hello_is_refused_after_a_while_and_plaintext_at_once() {
        let (mut peer, mut ours) = pair();
        peer.write_all(&[22, 3, 1]).await.unwrap();
        assert!(matches!(tls(&mut ours, "web").await, Err(Refusal::Silent(_))));
        let (mut peer, mut ours) = pair();
        peer.write_all(b"G").await.unwrap();
        assert_eq!(tls(&mut ours, "web").await.unwrap(), Tls::None);
    }
}
