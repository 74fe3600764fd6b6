//! HTTP, and the only place that knows which library speaks it.
//!
//! Servers turn a connection into requests and hand each to an [`Exchange`]; clients turn a
//! connection into something that sends requests. What passes between them are heads of the crate
//! `http` with a [`Body`] of ours: frames that are pulled, so that whoever reads slowly slows down
//! whoever writes. HTTP/1 is ours on httparse, because a sidecar must pass 1xx on, refuse what
//! could smuggle a request, and hold nothing while a connection idles; HTTP/2 is the crate h2.
//!
//! Futures here are not `Send`: a connection lives and dies on its worker, which owns the buffer
//! that all of its connections read into. This module never calls a stage of the proxy, takes no
//! decision about traffic, and counts nothing.

pub mod body;
pub mod error;
pub mod head;
pub mod http1;
pub mod http2;
pub mod orig_proto;
pub mod sniff;
pub mod worker;

pub use body::{Body, BodyError, End, Frame, Interim, Length, Observer, Reset, Source};
pub use error::{GrpcStatus, ProxyError, SendError, SendErrorKind, ServeError, Shape, abort};
pub use head::{begins_tunnel, needs_own_connection};
pub use sniff::{Sniffed, sniff};
pub use worker::{Budget, Worker};

use http::{Request, Response};

/// What a server calls with each request of a connection.
///
/// The body of the request stays bound to its connection: it yields what the client sends as it is
/// polled, and an error once the client is gone. A future that is dropped has been cancelled: the
/// client went away or reset the stream.
pub trait Exchange {
    /// Answers one request. Failures are answers too: [`ProxyError::render`] makes them, [`abort`]
    /// ends the stream without one.
    fn exchange(&self, request: Request<Body>) -> impl Future<Output = Response<Body>>;
}

/// Who is at the other end of an HTTP/2 connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A program of the user's. It gets no PING of ours: gRPC servers close connections that ping
    /// more often than every five minutes.
    Application,
    /// A sidecar: PINGs find out when it is gone.
    Mesh,
}
