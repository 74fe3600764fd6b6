//! How HTTP fails, and how a failure is told to the client.
//!
//! [`ProxyError::render`] is the only place that makes a response of the proxy's own; its headers
//! are Linkerd's. A connection or exchange that fails is a [`ServeError`] or a [`SendError`], whose
//! kinds are what a caller can act on.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io;

use http::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName};
use http::{HeaderValue, Request, Response, StatusCode, Version};

use super::body::{Body, BodyError, Reset};
use super::{head, http1};

/// A failure that the proxy tells the client of.
#[derive(Clone, Debug)]
pub struct ProxyError {
    /// The status for a client that does not speak gRPC.
    pub status: StatusCode,
    /// The status for one that does.
    pub grpc: GrpcStatus,
    /// What failed, in words: the value of `l5d-proxy-error`.
    pub message: Cow<'static, str>,
    /// Whether the client should take a new connection for its next request.
    pub close: bool,
}

/// A status of gRPC that a proxy has reason to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrpcStatus {
    /// Something is wrong inside.
    Internal = 13,
    /// The caller may not.
    PermissionDenied = 7,
    /// A limit is reached.
    ResourceExhausted = 8,
    /// Try again.
    Unavailable = 14,
}

/// How a client wants to be told of failures; taken from its request before that is given away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    grpc: bool,
    http2: bool,
}

/// Why a connection was not served to its end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The client went away in the middle of an exchange, which was cancelled.
    #[error("the client closed the connection before its request was answered")]
    ClientGone,
    /// A client took too long to send a head, or the preface of HTTP/2. In HTTP/1 it was answered
    /// with 408.
    #[error("the client took too long to begin; a head must be complete in {} s", http1::HEAD_TIMEOUT.as_secs())]
    HeadTimeout,
    /// The connection broke.
    #[error("the connection broke")]
    Io(#[source] io::Error),
    /// A head that this proxy refuses; the client has been told.
    #[error("the request was refused with status {}", .0.status().as_u16())]
    Malformed(#[source] http1::HeadError),
    /// A PING stayed without an answer.
    #[error("the peer answered no PING within {} s", super::http2::KEEPALIVE_TIMEOUT.as_secs())]
    PeerGone,
    /// The peer broke HTTP/2, or says that we did.
    #[error("HTTP/2 ended with {reset}: {message}")]
    Protocol {
        /// The error code of the GOAWAY.
        reset: Reset,
        /// What h2 says about it.
        message: String,
    },
    /// An exchange asked to end the connection without an answer, or its content broke.
    #[error("the exchange was ended without a complete answer: {0}")]
    Reset(Reset),
}

/// An exchange that got no response.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct SendError {
    /// What happened.
    #[source]
    pub kind: SendErrorKind,
    /// The request, if it is whole: nothing of its content was taken, or so little that it was kept.
    /// It can be sent again on another connection if the kind, or its method, says that this is
    /// safe.
    pub request: Option<Box<Request<Body>>>,
}

/// Why an exchange got no response.
#[derive(Debug, thiserror::Error)]
pub enum SendErrorKind {
    /// The content of the request broke: its client went away.
    #[error("the content of the request broke")]
    Body(#[source] BodyError),
    /// The server closed the connection after the request was sent and before it answered. It may
    /// have acted upon the request.
    #[error("the server closed the connection before it answered")]
    Closed,
    /// The connection broke.
    #[error("the connection broke before the answer")]
    Io(#[source] io::Error),
    /// The answer was no HTTP, or no HTTP that this proxy passes on.
    #[error("the answer was malformed")]
    Malformed(#[source] http1::HeadError),
    /// The server has certainly not acted upon the request: any request may be sent again on a
    /// new connection.
    #[error("the server did not take the request: {0}")]
    NotProcessed(Cow<'static, str>),
    /// The server reset the stream.
    #[error("the server reset the stream: {0}")]
    Reset(Reset),
}

impl ProxyError {
    /// A failure told with these statuses.
    pub fn new(
        status: StatusCode,
        grpc: GrpcStatus,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { status, grpc, message: message.into(), close: false }
    }

    /// Has the client take a new connection.
    #[must_use]
    pub fn closing(mut self) -> Self {
        self.close = true;
        self
    }

    /// The response that tells of this failure. gRPC gets its status in a response that is all
    /// head, since its clients read nothing else.
    pub fn render(&self, shape: Shape) -> Response<Body> {
        let mut response = Response::new(Body::empty());
        let said = HeaderValue::from_str(&visible(&self.message));
        let said = said.unwrap_or(HeaderValue::from_static("error"));
        if shape.grpc {
            let message = HeaderValue::from_str(&percent_encoded(&self.message));
            let headers = response.headers_mut();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert(GRPC_STATUS, HeaderValue::from(self.grpc as u16));
            headers.insert(GRPC_MESSAGE, message.unwrap_or_else(|_| said.clone()));
        } else {
            *response.status_mut() = self.status;
            response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        response.headers_mut().insert(L5D_PROXY_ERROR, said);
        if self.close {
            let name = if shape.http2 { L5D_PROXY_CONNECTION } else { CONNECTION };
            response.headers_mut().insert(name, HeaderValue::from_static("close"));
        }
        response
    }
}

impl Shape {
    /// What this request's client understands.
    pub fn of<B>(request: &Request<B>) -> Self {
        let version = request.version();
        Self { grpc: head::is_grpc(version, request.headers()), http2: version == Version::HTTP_2 }
    }
}

/// A response that ends the exchange without one: HTTP/2 resets the stream with this code, HTTP/1
/// closes the connection.
pub fn abort(reset: Reset) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    response.extensions_mut().insert(Abort(reset));
    response
}

/// What [`abort`] leaves for the server.
#[derive(Clone, Copy)]
pub(super) struct Abort(pub(super) Reset);

/// HTTP fields hold visible ASCII; the message may quote a peer.
fn visible(message: &str) -> String {
    message.chars().map(|c| if matches!(c, ' '..='~') { c } else { '?' }).collect()
}

/// The coding of `grpc-message`.
fn percent_encoded(message: &str) -> String {
    message.bytes().fold(String::with_capacity(message.len()), |mut encoded, byte| {
        match byte {
            b'%' | ..b' ' | 0x7f.. => drop(write!(encoded, "%{byte:02X}")),
            _ => encoded.push(byte.into()),
        }
        encoded
    })
}

/// Says what the proxy could not do.
pub const L5D_PROXY_ERROR: HeaderName = HeaderName::from_static("l5d-proxy-error");
/// `Connection: close` in the words of a mesh whose sidecars speak HTTP/2 to each other.
pub const L5D_PROXY_CONNECTION: HeaderName = HeaderName::from_static("l5d-proxy-connection");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

#[cfg(test)]
mod tests {
    use super::*;

    fn request(version: Version, content_type: &str) -> Request<()> {
        Request::builder().version(version).header(CONTENT_TYPE, content_type).body(()).unwrap()
    }

    fn error() -> ProxyError {
        let message = "no endpoint of “web”, 100 % gone";
        ProxyError::new(StatusCode::SERVICE_UNAVAILABLE, GrpcStatus::Unavailable, message).closing()
    }

    #[test]
    fn http1_is_told_with_a_status_and_closed() {
        let response = error().render(Shape::of(&request(Version::HTTP_11, "text/plain")));
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()[CONTENT_LENGTH], "0");
        assert_eq!(response.headers()[CONNECTION], "close");
        assert_eq!(response.headers()[L5D_PROXY_ERROR], "no endpoint of ?web?, 100 % gone");
    }

    #[test]
    fn grpc_is_told_with_trailers_only() {
        let response = error().render(Shape::of(&request(Version::HTTP_2, "application/grpc")));
        assert_eq!(response.status(), 200);
        assert!(response.body().is_end());
        assert_eq!(response.headers()[GRPC_STATUS], "14");
        let message = response.headers()[GRPC_MESSAGE].to_str().unwrap();
        assert_eq!(message, "no endpoint of %E2%80%9Cweb%E2%80%9D, 100 %25 gone");
        assert_eq!(response.headers()[L5D_PROXY_CONNECTION], "close");
        assert!(!response.headers().contains_key(CONNECTION));
    }
}
