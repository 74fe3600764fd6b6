//! Serves a connection's streams, all of them in one future.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt};
use h2::RecvStream;
use h2::server::{Builder, SendResponse};
use http::header::{CONNECTION, UPGRADE};
use http::{Request, Response, StatusCode, Version};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::connection::{
    HANDSHAKE_TIMEOUT, HEADER_LIST_BYTES_MAX, Keepalive, SEND_BUFFER_BYTES_MAX, STREAMS_MAX,
    Tapped, Windows, serve_error,
};
use super::stream::{Received, Sending, reason};
use crate::http::body::{Body, Interim};
use crate::http::error::{Abort, GrpcStatus, ProxyError, ServeError, Shape};
use crate::http::head::strip_hop_by_hop;
use crate::http::{Exchange, Peer, Worker};

/// Serves one connection until its client leaves, or `close` asks for its end: the client is then
/// told to send no more requests, and those that it has sent are answered, however long they take.
///
/// # Errors
/// Why the connection ended other than by agreement.
pub async fn serve<IO, E>(
    io: IO,
    exchange: &E,
    worker: &Worker,
    peer: Peer,
    close: impl Future<Output = ()>,
) -> Result<(), ServeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    E: Exchange,
{
    let windows = Windows::under(worker.budget());
    let (io, tap) = Tapped::new(io);
    let error = |error: h2::Error| match tap.take_error() {
        Some(error) => ServeError::Io(error),
        None => serve_error(error),
    };
    let handshake = Builder::new()
        .initial_window_size(windows.stream_bytes)
        .initial_connection_window_size(windows.connection_bytes)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .max_send_buffer_size(SEND_BUFFER_BYTES_MAX)
        .handshake(io);
    let mut connection = timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .map_err(|_| ServeError::HeadTimeout)?
        .map_err(error)?;

    let mut keepalive = Keepalive::new(peer, connection.ping_pong());
    let (mut close, mut closing) = (pin!(close), false);
    let mut streams = FuturesUnordered::new();
    poll_fn(|cx| {
        loop {
            if !closing && close.as_mut().poll(cx).is_ready() {
                closing = true;
                connection.graceful_shutdown();
            }
            if let Some(Poll::Ready(gone)) = keepalive.as_mut().map(|k| k.poll(cx)) {
                return Poll::Ready(Err(gone));
            }
            match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    streams.push(serve_stream(exchange, request, respond));
                    continue;
                }
                Poll::Ready(Some(Err(failed))) => return Poll::Ready(Err(error(failed))),
                // Every stream is over.
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => {}
            }
            // What streams send is written by the connection, which wakes this task for it.
            if !matches!(streams.poll_next_unpin(cx), Poll::Ready(Some(()))) {
                return Poll::Pending;
            }
        }
    })
    .await
}

async fn serve_stream<E: Exchange>(
    exchange: &E,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    let respond = Rc::new(Respond(RefCell::new(respond)));
    let (parts, stream) = request.into_parts();
    let body = Received::body(stream, &parts.headers, None, ()).with_interim(respond.clone());
    let mut answer = pin!(exchange.exchange(Request::from_parts(parts, body)));
    let answered = poll_fn(|cx| {
        if let Poll::Ready(response) = answer.as_mut().poll(cx) {
            return Poll::Ready(Some(response));
        }
        // The client wants no answer any more, or the connection is gone.
        respond.0.borrow_mut().poll_reset(cx).map(|_| None)
    })
    .await;
    let Some(response) = answered else { return };
    if let Some(Abort(reset)) = response.extensions().get() {
        return respond.0.borrow_mut().send_reset(reason(*reset));
    }
    let (head, body) = final_head(response).into_parts();
    let sent = respond.0.borrow_mut().send_response(Response::from_parts(head, ()), body.is_end());
    // A body that breaks has reset the stream, and a client that does not want it has done so
    // itself; both are told by the observers of the body.
    if let Ok(stream) = sent
        && !body.is_end()
    {
        let _ = Sending::new(body, stream).await;
    }
}

/// Fields of an HTTP/1 hop would break the stream, and an interim status is no answer.
fn final_head(mut response: Response<Body>) -> Response<Body> {
    if response.status().is_informational() {
        let message = format!("status {} is no final answer", response.status().as_u16());
        let mut request = Request::new(());
        *request.version_mut() = Version::HTTP_2;
        return ProxyError::new(StatusCode::BAD_GATEWAY, GrpcStatus::Internal, message)
            .render(Shape::of(&request));
    }
    *response.version_mut() = Version::HTTP_2;
    let headers = response.headers_mut();
    if headers.contains_key(CONNECTION) || headers.contains_key(UPGRADE) {
        strip_hop_by_hop(headers, false);
    }
    response
}

/// The answering side of a stream, shared with whoever passes 1xx heads on.
struct Respond(RefCell<SendResponse<Bytes>>);

impl Interim for Respond {
    fn send(&self, head: Response<()>) {
        if head.status() != StatusCode::SWITCHING_PROTOCOLS {
            // One that comes too late is dropped.
            let _ = self.0.borrow_mut().send_informational(head);
        }
    }
}
