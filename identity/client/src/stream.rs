//! A TLS connection of ours, and what a failure on it means.
//!
//! The one type through which the rest of Steadfast sees TLS: which library is beneath it, and
//! whether it buffers, is nobody else's business. An alert that the peer sends after the
//! handshake (in TLS 1.3 it judges our certificate last) becomes a [`Refusal`] here.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use rustls::{AlertDescription, InvalidMessage};
use steadfast_api::{Code, KeyId, SpiffeId};
use steadfast_process::Clock;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::observed::Observed;
use crate::refusal::{Direction, Facts, PeerFacts, Refusal};
use crate::verify::{PeerRefused, VerifiedPeer};

/// A TLS connection.
pub struct TlsStream<IO> {
    inner: tokio_rustls::TlsStream<IO>,
    local: Arc<Local>,
    peer: Option<Arc<VerifiedPeer>>,
    late: Option<Arc<OnceLock<Refusal>>>,
}

/// Tells of a refusal after the stream was given away, to a library that keeps only the text of
/// an error.
#[derive(Clone, Debug, Default)]
pub struct LateRefusal(Arc<OnceLock<Refusal>>);

/// Our side, as a refusal tells it; no key is in it, so a long connection keeps none alive.
pub(crate) struct Local {
    pub(crate) id: Option<SpiffeId>,
    /// Of our SVID.
    pub(crate) issuer: Option<KeyId>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) observed: Arc<Observed>,
}

/// What went wrong, before the facts of our side are added.
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) detail: String,
    pub(crate) peer: PeerFacts,
}

impl<IO> TlsStream<IO> {
    pub(crate) fn new(
        inner: tokio_rustls::TlsStream<IO>,
        local: Arc<Local>,
        peer: Option<Arc<VerifiedPeer>>,
    ) -> Self {
        Self { inner, local, peer, late: None }
    }

    /// The protocol that both sides agreed on.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.inner.get_ref().1.alpn_protocol()
    }

    /// Who the peer is; `None` for a client that was not asked or had nothing to show.
    pub fn peer(&self) -> Option<&Arc<VerifiedPeer>> {
        self.peer.as_ref()
    }

    /// What lies beneath.
    pub fn io(&self) -> &IO {
        self.inner.get_ref().0
    }

    /// Version, key exchange and cipher suite, for displays and tests.
    pub fn negotiated(&self) -> Negotiated {
        let connection = self.inner.get_ref().1;
        Negotiated {
            version: connection.protocol_version().and_then(|version| version.as_str()),
            group: connection.negotiated_key_exchange_group().and_then(|g| g.name().as_str()),
            resumed: connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed),
        }
    }

    /// The refusal that an error of this stream means, if it means one: the peer's alert against
    /// our certificate, or bytes that are no TLS.
    pub fn refusal_of(&self, error: &io::Error) -> Option<Refusal> {
        error.get_ref()?.downcast_ref::<rustls::Error>()?;
        let failure = Failure::of_io(error);
        let peer = self.peer.as_ref();
        let direction = match &self.inner {
            tokio_rustls::TlsStream::Client(_) => Direction::Outbound,
            tokio_rustls::TlsStream::Server(_) => Direction::Inbound,
        };
        let facts = Facts {
            direction,
            detail: failure.detail,
            local: self.local.id.clone(),
            expected: peer.filter(|_| direction == Direction::Outbound).map(|peer| peer.id.clone()),
            peer: peer.map(|peer| peer.facts()).unwrap_or_default(),
            now: self.local.clock.now(),
            clock_offset_ms: self.local.observed.clock_offset_ms(),
        };
        Some(Refusal { code: failure.code, facts: Box::new(facts) })
    }

    /// A handle that will hold the refusal if a later read meets one. Take it before the stream is
    /// given to a library.
    pub fn late_refusal(&mut self) -> LateRefusal {
        LateRefusal(self.late.get_or_insert_default().clone())
    }

    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if let (Some(late), Err(error)) = (&self.late, &result)
            && let Some(refusal) = self.refusal_of(error)
        {
            let code = refusal.code;
            // The first refusal is the reason; what follows it are consequences.
            if late.set(refusal).is_ok() && code == Code::PEER_REFUSED_US {
                self.local.observed.count_failure(self.local.issuer, code);
            }
        }
        result
    }
}

/// What a handshake agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// `TLSv1_3`.
    pub version: Option<&'static str>,
    /// The key exchange: `X25519MLKEM768` or `X25519`.
    pub group: Option<&'static str>,
    /// Whether certificates were left out because of an earlier session: never, with us.
    pub resumed: bool,
}

impl LateRefusal {
    /// The refusal, if one was met.
    pub fn get(&self) -> Option<&Refusal> {
        self.0.get()
    }
}

impl Failure {
    pub(crate) fn of_peer(refused: PeerRefused) -> Self {
        Self { code: refused.code, detail: refused.detail, peer: refused.peer }
    }

    pub(crate) fn not_tls(detail: String) -> Self {
        Self { code: Code::PEER_NOT_TLS, detail, peer: PeerFacts::default() }
    }

    /// What an error of a handshake or of a connection means.
    pub(crate) fn of_io(error: &io::Error) -> Self {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let Some(tls) = tls else {
            return Self::not_tls(format!("the connection broke off: {error}"));
        };
        let code = match tls {
            rustls::Error::AlertReceived(alert) if is_about_certificate(*alert) => {
                Code::PEER_REFUSED_US
            }
            rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)
            | rustls::Error::NoApplicationProtocol => Code::PEER_NO_PROTOCOL,
            rustls::Error::NoCertificatesPresented => Code::PEER_NO_CERTIFICATE,
            rustls::Error::InvalidCertificate(rustls::CertificateError::BadSignature) => {
                Code::PEER_BAD_SIGNATURE
            }
            rustls::Error::AlertReceived(_)
            | rustls::Error::PeerIncompatible(_)
            | rustls::Error::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::MessageTooLarge
                | InvalidMessage::UnknownProtocolVersion,
            ) => Code::PEER_NOT_TLS,
            _ => Code::PEER_MALFORMED,
        };
        let detail = match tls {
            rustls::Error::AlertReceived(alert) => format!("its alert is {}", alert_name(*alert)),
            other => other.to_string(),
        };
        Self { code, detail, peer: PeerFacts::default() }
    }
}

/// RFC 8446, §6.2: the alerts that are an answer to a certificate.
fn is_about_certificate(alert: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        alert,
        A::AccessDenied
            | A::BadCertificate
            | A::CertificateExpired
            | A::CertificateRequired
            | A::CertificateRevoked
            | A::CertificateUnknown
            | A::DecryptError
            | A::UnknownCA
            | A::UnsupportedCertificate
    )
}

/// The alert's name in the words of RFC 8446.
fn alert_name(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let name = match alert {
        A::AccessDenied => "access_denied",
        A::BadCertificate => "bad_certificate",
        A::CertificateExpired => "certificate_expired",
        A::CertificateRequired => "certificate_required",
        A::CertificateRevoked => "certificate_revoked",
        A::CertificateUnknown => "certificate_unknown",
        A::DecodeError => "decode_error",
        A::DecryptError => "decrypt_error",
        A::HandshakeFailure => "handshake_failure",
        A::IllegalParameter => "illegal_parameter",
        A::InternalError => "internal_error",
        A::NoApplicationProtocol => "no_application_protocol",
        A::ProtocolVersion => "protocol_version",
        A::UnexpectedMessage => "unexpected_message",
        A::UnknownCA => "unknown_ca",
        A::UnrecognisedName => "unrecognized_name",
        A::UnsupportedCertificate => "unsupported_certificate",
        other => return format!("{other:?}"),
    };
    name.to_owned()
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.inner).poll_read(cx, buffer));
        Poll::Ready(self.note(result))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
