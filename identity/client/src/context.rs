//! The TLS snapshot: SVID and bundle, swapped as one, and the handshakes that use them.
//!
//! A [`TlsContext`] never changes; [`Contexts`] is the one place that makes the next and publishes
//! it. Whoever dials or accepts takes the newest, so a renewal touches no open connection. An SVID
//! that has expired is never shown to anyone: the handshake is refused before it begins.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::ServerName;
use steadfast_api::{Code, DnsIdentity, SpiffeId, UnixTime};
use steadfast_process::Clock;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::observed::{Follower, Observed};
use crate::refusal::{Direction, Facts, PeerFacts, Refusal};
use crate::stream::{Failure, Local, TlsStream};
use crate::svid::{Lapse, OwnSvid};
use crate::tls::{Builder, ClientAuth, Judgement, judged};
use crate::trust::Trust;
use crate::verify::VerifiedPeer;

/// Whom we mean to reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// What SNI says.
    pub server_name: DnsIdentity,
    /// Whose SVID must be shown.
    pub id: SpiffeId,
}

/// One immutable snapshot of what TLS uses.
pub struct TlsContext {
    /// +1 with every snapshot of this process.
    pub generation: u64,
    /// Our SVID; `None` before the first.
    pub svid: Option<Arc<OwnSvid>>,
    /// The live bundle; `None` before the first.
    pub bundle: Option<Arc<Trust>>,
    clients: Option<Clients>,
    servers: Option<Servers>,
    local: Arc<Local>,
}

/// Publishes snapshots. The only writer of its watch.
pub struct Contexts {
    sender: watch::Sender<Arc<TlsContext>>,
    builder: Builder,
    clock: Arc<dyn Clock>,
    observed: Arc<Observed>,
}

struct Clients {
    mutual: Option<Arc<ClientConfig>>,
    bootstrap: Arc<ClientConfig>,
}

struct Servers {
    none: Arc<ServerConfig>,
    optional: Arc<ServerConfig>,
    required: Arc<ServerConfig>,
}

impl From<DnsIdentity> for Expected {
    /// The workload that a DNS identity names.
    fn from(server_name: DnsIdentity) -> Self {
        let id = server_name.spiffe_id();
        Self { server_name, id }
    }
}

impl TlsContext {
    /// Dials a peer with mutual TLS and returns once its certificate was accepted.
    ///
    /// In TLS 1.3 the peer has not judged *our* certificate yet: its alert comes with the first
    /// read (see [`TlsStream::refusal_of`] and [`TlsStream::late_refusal`]).
    ///
    /// # Errors
    /// The peer was refused, or broke off, or took longer than [`HANDSHAKE_TIMEOUT`]; or our own
    /// SVID is missing or has expired.
    pub async fn connect<IO: AsyncRead + AsyncWrite + Unpin>(
        &self,
        io: IO,
        expected: &Expected,
        alpn: Option<&'static [u8]>,
    ) -> Result<(TlsStream<IO>, Arc<VerifiedPeer>), Refusal> {
        self.check_own_svid(Direction::Outbound, Some(&expected.id))?;
        let config = self.clients.as_ref().and_then(|clients| clients.mutual.as_ref());
        self.dial(config, io, expected, alpn).await
    }

    /// Dials the identity service: it shows its SVID, we show a token later.
    ///
    /// # Errors
    /// As [`TlsContext::connect`], but for our own SVID, which plays no part.
    pub async fn connect_bootstrap<IO: AsyncRead + AsyncWrite + Unpin>(
        &self,
        io: IO,
        expected: &Expected,
        alpn: Option<&'static [u8]>,
    ) -> Result<(TlsStream<IO>, Arc<VerifiedPeer>), Refusal> {
        let config = self.clients.as_ref().map(|clients| &clients.bootstrap);
        self.dial(config, io, expected, alpn).await
    }

    /// Accepts a peer.
    ///
    /// # Errors
    /// The peer was refused, or broke off, or took longer than [`HANDSHAKE_TIMEOUT`]; or our own
    /// SVID is missing or has expired.
    pub async fn accept<IO: AsyncRead + AsyncWrite + Unpin>(
        &self,
        io: IO,
        client_auth: ClientAuth,
        alpns: &[&[u8]],
    ) -> Result<(TlsStream<IO>, Option<Arc<VerifiedPeer>>), Refusal> {
        self.check_own_svid(Direction::Inbound, None)?;
        let Some(servers) = &self.servers else {
            return Err(self.own_refusal(Direction::Inbound, None, Code::SVID_MISSING));
        };
        let config = match client_auth {
            ClientAuth::None => &servers.none,
            ClientAuth::Optional => &servers.optional,
            ClientAuth::Required => &servers.required,
        };
        let config = if alpns.is_empty() {
            config.clone()
        } else {
            let mut config = config.as_ref().clone();
            config.alpn_protocols = alpns.iter().map(|alpn| alpn.to_vec()).collect();
            Arc::new(config)
        };
        let accepting = TlsAcceptor::from(config).accept(io);
        let (stream, peer) = self.handshake(Direction::Inbound, None, accepting).await?;
        Ok((TlsStream::new(stream.into(), self.local.clone(), peer.clone()), peer))
    }

    /// For who keeps a copy of the newest snapshot, beginning with this one.
    #[must_use]
    pub fn follower(&self) -> Follower {
        Follower::new(self.local.observed.clone(), self.generation)
    }

    /// Who we are; `None` before the first SVID.
    pub fn id(&self) -> Option<&SpiffeId> {
        self.svid.as_deref().map(OwnSvid::id)
    }

    async fn dial<IO: AsyncRead + AsyncWrite + Unpin>(
        &self,
        config: Option<&Arc<ClientConfig>>,
        io: IO,
        expected: &Expected,
        alpn: Option<&'static [u8]>,
    ) -> Result<(TlsStream<IO>, Arc<VerifiedPeer>), Refusal> {
        let direction = Direction::Outbound;
        let missing = |code| self.own_refusal(direction, Some(&expected.id), code);
        let config = config.ok_or_else(|| missing(Code::SVID_MISSING))?;
        // A DNS identity is a DNS name by its type.
        let name = ServerName::try_from(expected.server_name.to_string())
            .map_err(|_| missing(Code::PEER_MALFORMED))?;
        let connector = TlsConnector::from(config.clone());
        let alpns = alpn.map(<[u8]>::to_vec).into_iter().collect();
        let dialling = connector.with_alpn(alpns).connect(name, io);
        let id = Some(expected.id.clone());
        let (stream, peer) = self.handshake(direction, id, dialling).await?;
        // rustls ends no client handshake without a verified certificate.
        let peer = peer.ok_or_else(|| missing(Code::PEER_NO_CERTIFICATE))?;
        Ok((TlsStream::new(stream.into(), self.local.clone(), Some(peer.clone())), peer))
    }

    /// Runs a handshake to its end or deadline; what went wrong becomes a refusal.
    async fn handshake<S>(
        &self,
        direction: Direction,
        expected: Option<SpiffeId>,
        handshake: impl Future<Output = std::io::Result<S>>,
    ) -> Result<(S, Option<Arc<VerifiedPeer>>), Refusal> {
        let deadline = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake);
        let (result, judgement) = judged(expected.clone(), deadline).await;
        let failure = match result {
            Ok(Ok(stream)) => match judgement {
                Some(Ok(peer)) => {
                    self.local.observed.count_handshake(&peer, direction);
                    return Ok((stream, Some(peer)));
                }
                Some(Err(refused)) => Failure::of_peer(*refused),
                None => return Ok((stream, None)),
            },
            Ok(Err(error)) => failure_of(&error, judgement),
            Err(_) => Failure::not_tls(format!(
                "the handshake was not over after {} s",
                HANDSHAKE_TIMEOUT.as_secs()
            )),
        };
        // Whoever refuses us names our issuer, whomever we refuse shows his.
        let issuer = match failure.code {
            Code::PEER_REFUSED_US => self.local.issuer,
            _ => failure.peer.issuer,
        };
        self.local.observed.count_failure(issuer, failure.code);
        Err(self.local.refusal(direction, expected, failure))
    }

    fn check_own_svid(
        &self,
        direction: Direction,
        expected: Option<&SpiffeId>,
    ) -> Result<(), Refusal> {
        match &self.svid {
            None => Err(self.own_refusal(direction, expected, Code::SVID_MISSING)),
            Some(svid) => {
                let offset = self.local.observed.clock_offset_ms();
                match svid.lapse(self.local.clock.now(), offset) {
                    Some(Lapse::Expired | Lapse::ExpiredHere) => {
                        Err(self.own_refusal(direction, expected, Code::SVID_EXPIRED))
                    }
                    Some(Lapse::NotYetValidHere) | None => Ok(()),
                }
            }
        }
    }

    /// A refusal for a reason of our own: the validity it tells is that of our SVID.
    fn own_refusal(
        &self,
        direction: Direction,
        expected: Option<&SpiffeId>,
        code: Code,
    ) -> Refusal {
        let detail = match &self.svid {
            Some(svid) => format!(
                "ours: valid from {} to {}, issuer {}, anchor {}",
                svid.facts().not_before,
                svid.facts().not_after,
                svid.issuer().short(),
                svid.anchor().short()
            ),
            None => "none was issued yet".to_owned(),
        };
        let failure = Failure { code, detail, peer: PeerFacts::default() };
        self.local.refusal(direction, expected.cloned(), failure)
    }
}

impl fmt::Debug for TlsContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsContext")
            .field("generation", &self.generation)
            .field("svid", &self.svid.as_ref().map(|svid| svid.facts()))
            .field("seq", &self.bundle.as_ref().map(|bundle| bundle.sequence()))
            .finish_non_exhaustive()
    }
}

impl Contexts {
    /// Publishes a first snapshot that holds nothing: every handshake is refused.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let observed = Arc::new(Observed::default());
        let local = Arc::new(Local {
            id: None,
            issuer: None,
            clock: clock.clone(),
            observed: observed.clone(),
        });
        let nothing = TlsContext {
            generation: 0,
            svid: None,
            bundle: None,
            clients: None,
            servers: None,
            local,
        };
        Self {
            sender: watch::Sender::new(Arc::new(nothing)),
            builder: Builder::new(clock.clone()),
            clock,
            observed,
        }
    }

    /// Follows the snapshots.
    pub fn subscribe(&self) -> watch::Receiver<Arc<TlsContext>> {
        self.sender.subscribe()
    }

    /// The newest snapshot.
    pub fn current(&self) -> Arc<TlsContext> {
        self.sender.borrow().clone()
    }

    /// What handshakes of all snapshots have shown.
    pub fn observed(&self) -> &Arc<Observed> {
        &self.observed
    }

    /// Publishes the next snapshot: this SVID together with this bundle.
    ///
    /// # Errors
    /// What rustls has against our settings: a defect of ours; the old snapshot stays.
    pub fn publish(
        &self,
        svid: Option<Arc<OwnSvid>>,
        bundle: Arc<Trust>,
    ) -> Result<Arc<TlsContext>, rustls::Error> {
        let next = Arc::new(self.snapshot(svid, bundle)?);
        self.sender.send_replace(next.clone());
        Ok(next)
    }

    /// A snapshot for one errand that nobody else sees: dialling the identity service with the
    /// mounted bundle.
    ///
    /// # Errors
    /// As [`Contexts::publish`].
    pub fn snapshot(
        &self,
        svid: Option<Arc<OwnSvid>>,
        bundle: Arc<Trust>,
    ) -> Result<TlsContext, rustls::Error> {
        let id = svid.as_ref().map(|svid| svid.id().clone());
        let own = svid.as_deref();
        let mutual = own.map(|own| self.builder.client(&bundle, Some(own))).transpose()?;
        let clients = Clients { mutual, bootstrap: self.builder.client(&bundle, None)? };
        let server = |own, client_auth| self.builder.server(&bundle, own, client_auth);
        let servers = own
            .map(|own| {
                Ok::<_, rustls::Error>(Servers {
                    none: server(own, ClientAuth::None)?,
                    optional: server(own, ClientAuth::Optional)?,
                    required: server(own, ClientAuth::Required)?,
                })
            })
            .transpose()?;
        let (clock, observed) = (self.clock.clone(), self.observed.clone());
        let local = Local { id, issuer: own.map(OwnSvid::issuer), clock, observed };
        Ok(TlsContext {
            generation: self.sender.borrow().generation + 1,
            svid,
            bundle: Some(bundle),
            clients: Some(clients),
            servers,
            local: Arc::new(local),
        })
    }
}

impl Local {
    fn refusal(
        &self,
        direction: Direction,
        expected: Option<SpiffeId>,
        failure: Failure,
    ) -> Refusal {
        let facts = Facts {
            direction,
            detail: failure.detail,
            local: self.id.clone(),
            expected,
            peer: failure.peer,
            now: self.now(),
            clock_offset_ms: self.observed.clock_offset_ms(),
        };
        Refusal { code: failure.code, facts: Box::new(facts) }
    }

    fn now(&self) -> UnixTime {
        self.clock.now()
    }
}

/// What a failed handshake means: the verifier's own word, if it refused, else what rustls says.
fn failure_of(error: &std::io::Error, judgement: Option<Judgement>) -> Failure {
    match judgement {
        Some(Err(refused)) => Failure::of_peer(*refused),
        Some(Ok(peer)) => Failure { peer: peer.facts(), ..Failure::of_io(error) },
        None => Failure::of_io(error),
    }
}

/// A handshake is two round trips and two signatures; what takes longer will not come.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
