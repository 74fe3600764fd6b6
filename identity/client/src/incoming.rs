//! A listener whose connections are accepted by TLS, for tonic servers.
//!
//! Handshakes run side by side under a bound and a deadline, so that a peer that says nothing
//! keeps nobody waiting. Each uses the newest snapshot. A peer that is refused is reported once
//! and is no event of the stream.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use steadfast_process::Drain;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tonic::transport::server::Connected;

use crate::context::TlsContext;
use crate::metrics::Refusals;
use crate::refusal::Refusal;
use crate::standing::Footing;
use crate::tls::ClientAuth;
use crate::verify::VerifiedPeer;
use crate::vouched::Vouched;

/// What an accepting listener needs.
pub struct Incoming {
    /// Where connections come from.
    pub listener: TcpListener,
    /// What TLS uses.
    pub contexts: watch::Receiver<Arc<TlsContext>>,
    /// Whether clients are asked for an SVID.
    pub client_auth: ClientAuth,
    /// What is spoken inside, most wanted first. A client that offers no protocol is taken too.
    pub alpns: &'static [&'static [u8]],
    /// Where refused peers are logged and counted.
    pub refusals: Refusals,
    /// The stream ends when this starts.
    pub drain: Drain,
}

/// Who is at the other end of a connection: an extension of each request of a tonic server.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// Its address.
    pub address: Option<SocketAddr>,
    /// Its identity, if it has shown one.
    pub peer: Option<Arc<VerifiedPeer>>,
}

type Handshake = Result<Vouched<TcpStream>, (SocketAddr, Refusal)>;

/// The accepted connections, until the drain starts.
pub fn incoming(settings: Incoming) -> impl Stream<Item = io::Result<Vouched<TcpStream>>> {
    let state = (settings, JoinSet::new());
    futures::stream::unfold(state, |(settings, mut handshakes)| async move {
        loop {
            tokio::select! {
                () = settings.drain.wait() => return None,
                Some(ended) = handshakes.join_next() => {
                    if let Some(stream) = settings.take(ended) {
                        return Some((Ok(stream), (settings, handshakes)));
                    }
                }
                accepted = settings.listener.accept(), if handshakes.len() < HANDSHAKES_MAX => {
                    match accepted {
                        Ok((io, address)) => settings.begin(&mut handshakes, io, address),
                        Err(error) => {
                            // Out of files, as a rule: ask again when some may have been closed.
                            tracing::warn!(%error, "a connection could not be accepted");
                            tokio::time::sleep(ACCEPT_PAUSE).await;
                        }
                    }
                }
            }
        }
    })
}

impl Incoming {
    fn begin(&self, handshakes: &mut JoinSet<Handshake>, io: TcpStream, address: SocketAddr) {
        let (context, contexts) = (self.contexts.borrow().clone(), self.contexts.clone());
        let (client_auth, alpns) = (self.client_auth, self.alpns);
        handshakes.spawn(async move {
            // A socket that takes no option is closed already; the handshake finds out.
            let _ = io.set_nodelay(true);
            let accepted = context.accept(io, client_auth, alpns).await;
            let vouched =
                |(stream, peer)| Vouched::new(stream, Footing::new(&context, peer), contexts);
            accepted.map(vouched).map_err(|refusal| (address, refusal))
        });
    }

    fn take(&self, ended: Result<Handshake, JoinError>) -> Option<Vouched<TcpStream>> {
        match ended {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err((address, refusal))) => {
                self.refusals.report(Some(address), &refusal);
                None
            }
            Err(error) => {
                tracing::error!(%error, "a handshake panicked");
                None
            }
        }
    }
}

impl Connected for Vouched<TcpStream> {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        PeerInfo { address: self.peer_addr(), peer: self.tls().peer().cloned() }
    }
}

/// Handshakes under way at once; more wait in the kernel's backlog.
const HANDSHAKES_MAX: usize = 1024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
