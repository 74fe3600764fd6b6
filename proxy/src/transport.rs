//! Linkerd's transport header: what a connection to a proxy's inbound port is for.
//!
//! `transport.l5d.io/v1\r\n\r\n`, the length as a big-endian u32, and a protobuf message that
//! names the port of the application and the protocol spoken behind the header. It is sent inside
//! mutual TLS, whose ALPN says that it follows. Reading is bounded.

use prost::Message;
use tokio::io::AsyncRead;

use crate::io::Prefixed;

/// The ALPN that announces the header.
pub const ALPN: &[u8] = b"transport.l5d.io/v1";

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The port of the application.
    pub port: u16,
    /// What is spoken behind the header.
    pub protocol: Session,
}

/// What is spoken behind the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// HTTP/1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// Anything: bytes.
    Opaque,
}

/// Why a header is refused.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The connection ended or failed within the header.
    #[error("the connection ended within the transport header")]
    Ended(#[source] std::io::Error),
    /// Another name than a port: gateways are for multicluster links.
    #[error("the transport header asks for the gateway to {0:?}, which this proxy is not")]
    Gateway(String),
    /// Longer than a header can be.
    #[error("the transport header is {0} bytes long; at most {HEADER_BYTES_MAX} are read")]
    Length(u32),
    /// No protobuf of a header.
    #[error("the transport header does not parse")]
    Malformed(#[source] prost::DecodeError),
    /// A direct connection whose ALPN does not announce the header.
    #[error(
        "the ALPN announces no transport header, and nothing else says what the connection is for"
    )]
    Missing,
    /// Not a port.
    #[error("the transport header names the port {0}; expected 1 to 65535")]
    Port(i32),
    /// Something else than the header.
    #[error("the connection does not begin with the transport header its ALPN announced")]
    Preface,
}

impl Header {
    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let session_protocol = match self.protocol {
            Session::Http1 => Some(Wire::protocol(ProtocolKind::Http1(Empty {}))),
            Session::Http2 => Some(Wire::protocol(ProtocolKind::Http2(Empty {}))),
            Session::Opaque => None,
        };
        let wire = Wire { port: i32::from(self.port), name: String::new(), session_protocol };
        let body = wire.encode_to_vec();
        let mut bytes = PREFACE.to_vec();
        // A port and an empty message: some ten bytes.
        bytes.extend_from_slice(&(body.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads the header; what follows it stays to be read.
    ///
    /// # Errors
    /// Why it is refused. Any bytes may come; none panic.
    pub async fn read<IO: AsyncRead + Unpin>(io: &mut Prefixed<IO>) -> Result<Self, HeaderError> {
        loop {
            if let Some((header, length)) = Self::parse(io.seen())? {
                io.skip(length);
                return Ok(header);
            }
            if io.look().await.map_err(HeaderError::Ended)? == 0 {
                return Err(HeaderError::Ended(std::io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// The header at the start of these bytes and its length; `None`: more are needed.
    ///
    /// # Errors
    /// Why it is refused. Any bytes may be given; none panic.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, HeaderError> {
        let compared = bytes.len().min(PREFACE.len());
        if bytes[..compared] != PREFACE[..compared] {
            return Err(HeaderError::Preface);
        }
        let Some((length, rest)) = bytes[compared..].split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        if length > HEADER_BYTES_MAX {
            return Err(HeaderError::Length(length));
        }
        let Some(body) = rest.get(..length as usize) else { return Ok(None) };
        let header = Wire::decode(body).map_err(HeaderError::Malformed)?.check()?;
        Ok(Some((header, PREFACE.len() + 4 + body.len())))
    }
}

/// `transport.l5d.io.TransportHeader`.
#[derive(Clone, PartialEq, Message)]
struct Wire {
    #[prost(int32, tag = "1")]
    port: i32,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, optional, tag = "3")]
    session_protocol: Option<SessionProtocol>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionProtocol {
    #[prost(oneof = "ProtocolKind", tags = "1, 2")]
    kind: Option<ProtocolKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum ProtocolKind {
    #[prost(message, tag = "1")]
    Http1(Empty),
    #[prost(message, tag = "2")]
    Http2(Empty),
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

impl Wire {
    fn protocol(kind: ProtocolKind) -> SessionProtocol {
        SessionProtocol { kind: Some(kind) }
    }

    fn check(self) -> Result<Header, HeaderError> {
        if !self.name.is_empty() {
            return Err(HeaderError::Gateway(self.name));
        }
        let port = u16::try_from(self.port).ok().filter(|&port| port != 0);
        let protocol = match self.session_protocol.and_then(|session| session.kind) {
            Some(ProtocolKind::Http1(_)) => Session::Http1,
            Some(ProtocolKind::Http2(_)) => Session::Http2,
            None => Session::Opaque,
        };
        Ok(Header { port: port.ok_or(HeaderError::Port(self.port))?, protocol })
    }
}

const PREFACE: &[u8] = b"transport.l5d.io/v1\r\n\r\n";
/// A port, a DNS name and a protocol: some 300 bytes.
const HEADER_BYTES_MAX: u32 = 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_has_linkerds_bytes() {
        let header = Header { port: 8080, protocol: Session::Http2 };
        let expected = b"transport.l5d.io/v1\r\n\r\n\0\0\0\x07\x08\x90\x3f\x1a\x02\x12\0";
        assert_eq!(header.encode(), expected);
        let opaque = Header { port: 1, protocol: Session::Opaque };
        assert_eq!(opaque.encode(), b"transport.l5d.io/v1\r\n\r\n\0\0\0\x02\x08\x01");
    }

    #[tokio::test]
    async fn what_follows_the_header_stays_to_be_read() {
        let header = Header { port: 443, protocol: Session::Opaque };
        let bytes = [&header.encode()[..], b"payload"].concat();
        let mut io = Prefixed::new(&bytes[..]);
        assert_eq!(Header::read(&mut io).await.unwrap(), header);
        assert_eq!(io.seen(), b"payload");
    }

    #[test]
    fn wrong_headers_are_refused_with_their_reason() {
        let of = |port, name: &str| {
            let wire = Wire { port, name: name.to_owned(), session_protocol: None };
            let body = wire.encode_to_vec();
            Header::parse(&[PREFACE, &(body.len() as u32).to_be_bytes(), &body].concat())
        };
        assert!(matches!(of(0, ""), Err(HeaderError::Port(0))));
        assert!(matches!(of(-1, ""), Err(HeaderError::Port(-1))));
        assert!(matches!(of(65_536, ""), Err(HeaderError::Port(_))));
        assert!(matches!(of(80, "db.west"), Err(HeaderError::Gateway(_))));
        let long = [PREFACE, &[0, 0, 4, 1]].concat();
        assert!(matches!(Header::parse(&long), Err(HeaderError::Length(1025))));
        assert!(matches!(Header::parse(b"transport.l5d.io/v2"), Err(HeaderError::Preface)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Header::parse(&bytes);
            let length = (bytes.len() as u32).to_be_bytes();
            let _ = Header::parse(&[PREFACE, &length, &bytes].concat());
        }

        #[test]
        fn a_header_reads_back(port in 1_u16.., kind in 0..3) {
            let protocol = [Session::Http1, Session::Http2, Session::Opaque][kind as usize];
            let header = Header { port, protocol };
            let bytes = header.encode();
            for end in 0..bytes.len() {
                prop_assert!(matches!(Header::parse(&bytes[..end]), Ok(None)));
            }
            prop_assert_eq!(Header::parse(&bytes).unwrap(), Some((header, bytes.len())));
        }
    }
}
