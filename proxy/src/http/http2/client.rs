//! A connection to a server, shared by many exchanges.
//!
//! [`connect`] returns when the server has spoken: with TLS 1.3 a client's handshake ends before
//! the server has judged its certificate, so that only then the connection is known to be of use.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use http::header::HOST;
use http::{Request, Response, Version};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::connection::{
    HANDSHAKE_TIMEOUT, HEADER_LIST_BYTES_MAX, Keepalive, SEND_BUFFER_BYTES_MAX, STREAMS_MAX, Tap,
    Tapped, Windows, serve_error,
};
use super::stream::{Received, Sending, Unsent};
use crate::http::body::{Body, Interim, Reset};
use crate::http::error::{SendError, SendErrorKind, ServeError};
use crate::http::{Peer, Worker};

/// Sends requests over one connection. Clones share it; when the last is dropped, and its streams
/// are over, the connection closes.
#[derive(Clone)]
pub struct Client {
    sender: SendRequest<Bytes>,
    worker: Worker,
    state: Rc<State>,
}

#[derive(Default)]
struct State {
    closed: Cell<bool>,
    streams: Cell<usize>,
    /// How many streams the server allows at once.
    streams_max: Cell<usize>,
    /// Wakes one who waits for room.
    freed: Notify,
}

/// Runs the connection; a task of the worker polls it until it ends.
pub struct Driver<IO: AsyncRead + AsyncWrite + Unpin> {
    connection: h2::client::Connection<Tapped<IO>, Bytes>,
    keepalive: Option<Keepalive>,
    tap: Rc<Tap>,
    state: Rc<State>,
    _windows: Windows,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The server closed the connection, or it broke; with TLS the error may hold a refusal.
    #[error("the connection ended before the server spoke")]
    Io(#[source] io::Error),
    /// The server does not speak HTTP/2.
    #[error("the server does not speak HTTP/2")]
    Protocol(#[source] ServeError),
    /// The server did not speak.
    #[error("the server sent no SETTINGS within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Timeout,
}

/// Starts HTTP/2 on a connection and waits until the server has spoken.
///
/// # Errors
/// The server does not speak HTTP/2, or does not want to.
pub async fn connect<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    worker: &Worker,
    peer: Peer,
) -> Result<(Client, Driver<IO>), ConnectError> {
    let (io, tap) = Tapped::new(io);
    let windows = Windows::under(worker.budget());
    let handshake = Builder::new()
        .enable_push(false)
        .initial_window_size(windows.stream_bytes)
        .initial_connection_window_size(windows.connection_bytes)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .max_send_buffer_size(SEND_BUFFER_BYTES_MAX)
        .handshake(io);
    let started = async {
        let (sender, connection) = handshake.await.map_err(|error| connect_error(error, &tap))?;
        let mut driver = Driver {
            connection,
            keepalive: None,
            tap: tap.clone(),
            state: Rc::default(),
            _windows: windows,
        };
        poll_fn(|cx| driver.poll_spoken(cx)).await?;
        driver.learn_limit();
        driver.keepalive = Keepalive::new(peer, driver.connection.ping_pong());
        Ok((Client { sender, worker: worker.clone(), state: driver.state.clone() }, driver))
    };
    timeout(HANDSHAKE_TIMEOUT, started).await.unwrap_or(Err(ConnectError::Timeout))
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Driver<IO> {
    fn poll_spoken(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        let polled = Pin::new(&mut self.connection).poll(cx);
        match polled {
            Poll::Ready(Err(error)) => Poll::Ready(Err(connect_error(error, &self.tap))),
            Poll::Ready(Ok(())) => {
                let error = self.tap.take_error();
                let error = error.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                Poll::Ready(Err(ConnectError::Io(error)))
            }
            Poll::Pending if self.tap.spoken.get() => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Driver<IO> {
    /// The server's SETTINGS may have come, or changed.
    fn learn_limit(&self) {
        let streams_max = self.connection.max_concurrent_send_streams();
        if self.state.streams_max.replace(streams_max) < streams_max {
            self.state.freed.notify_one();
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Future for Driver<IO> {
    type Output = Result<(), ServeError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Some(Poll::Ready(gone)) = this.keepalive.as_mut().map(|k| k.poll(cx)) {
            this.state.close();
            return Poll::Ready(Err(gone));
        }
        let polled = Pin::new(&mut this.connection).poll(cx);
        this.learn_limit();
        let Poll::Ready(ended) = polled else { return Poll::Pending };
        this.state.close();
        Poll::Ready(ended.map_err(|error| match this.tap.take_error() {
            Some(error) => ServeError::Io(error),
            None => serve_error(error),
        }))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Drop for Driver<IO> {
    fn drop(&mut self) {
        self.state.close();
    }
}

impl State {
    fn close(&self) {
        self.closed.set(true);
        self.freed.notify_one();
    }
}

impl Client {
    /// Whether fewer streams are open than the server allows at once. h2 itself would let a
    /// request wait for its stream without a bound.
    pub fn has_room(&self) -> bool {
        self.state.streams.get() < self.state.streams_max.get()
    }

    /// Waits until there may be room again: a stream has ended, the server allows more, or the
    /// connection is closed. Wakes one of those who wait.
    pub async fn freed(&self) {
        self.state.freed.notified().await;
    }

    /// Whether the connection takes no request any more: it is closed, or will be.
    pub fn is_closed(&self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.state.closed.get()
            || matches!(self.sender.clone().poll_ready(&mut cx), Poll::Ready(Err(_)))
    }

    /// How many exchanges run.
    pub fn streams(&self) -> usize {
        self.state.streams.get()
    }

    /// Sends a request and waits for the head of its answer; without [room](Self::has_room) it waits
    /// for as long as that takes. 1xx heads go to the request's
    /// [`Interim`]. Dropping the future, or the body of the response, resets the stream.
    ///
    /// # Errors
    /// There is no answer; its kind says whether another connection may be tried.
    pub async fn send(&self, request: Request<Body>) -> Result<Response<Body>, SendError> {
        let mut sender = self.sender.clone();
        if let Err(error) = poll_fn(|cx| sender.poll_ready(cx)).await {
            return Err(unsent(not_processed(&error), request));
        }
        let open = Rc::new(Open::new(&self.state));
        let (parts, body) = request.into_parts();
        let head = Request::from_parts(parts, ());
        let interim = body.interim().cloned();
        let end = body.is_end();
        let (answer, stream) = match sender.send_request(for_wire(&head), end) {
            Ok(opened) => opened,
            Err(error) => return Err(unsent(not_processed(&error), head.map(|()| body))),
        };
        let mut exchange = Running { answer, sending: None, over: end, interim };
        exchange.sending = Some(Sending::again(body, stream, self.worker.kept().clone()));
        match poll_fn(|cx| exchange.poll(cx)).await {
            Ok(response) => {
                exchange.sending.iter_mut().for_each(Sending::keep_nothing);
                Ok(self.answered(response, exchange, open))
            }
            Err(kind) => {
                // Content that broke is not whole again.
                let broke = matches!(kind, SendErrorKind::Body(_));
                let sending = exchange.sending.filter(|_| !broke);
                let body = sending.and_then(Sending::into_body);
                let request = body.map(|body| Box::new(head.map(|()| body)));
                Err(SendError { kind, request })
            }
        }
    }

    fn answered(
        &self,
        response: Response<h2::RecvStream>,
        exchange: Running,
        open: Rc<Open>,
    ) -> Response<Body> {
        let upload = exchange.sending.filter(|_| !exchange.over).map(|sending| {
            let open = open.clone();
            let rest = async move {
                // Until then it is a stream to the server.
                let _open = open;
                // Who broke it is told: the server by a reset, the client by its own.
                let _ = sending.await;
            };
            self.worker.tasks().spawn_counted(rest)
        });
        let (parts, stream) = response.into_parts();
        let body = Received::body(stream, &parts.headers, upload, open);
        Response::from_parts(parts, body)
    }
}

/// A request whose answer has not begun.
struct Running {
    answer: ResponseFuture,
    sending: Option<Sending>,
    /// The request was sent to its end, or the server wants no more of it.
    over: bool,
    interim: Option<Rc<dyn Interim>>,
}

impl Running {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Response<h2::RecvStream>, SendErrorKind>> {
        if let Some(sending) = self.sending.as_mut().filter(|_| !self.over)
            && let Poll::Ready(sent) = sending.poll(cx)
        {
            self.over = true;
            if let Err(Unsent::Body(error)) = sent {
                return Poll::Ready(Err(SendErrorKind::Body(error)));
            }
        }
        while let Poll::Ready(Some(Ok(head))) = self.answer.poll_informational(cx) {
            if let Some(interim) = &self.interim {
                interim.send(head);
            }
        }
        Pin::new(&mut self.answer).poll(cx).map_err(send_error)
    }
}

/// Counts a stream for as long as it lives.
struct Open(Rc<State>);

impl Open {
    fn new(state: &Rc<State>) -> Self {
        state.streams.set(state.streams.get() + 1);
        Self(state.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get().saturating_sub(1));
        self.0.freed.notify_one();
    }
}

/// h2 takes its head by value, and a request that was not processed must still have one.
fn for_wire(head: &Request<()>) -> Request<()> {
    let mut wire = head.clone();
    // A request without an authority is one of HTTP/1.0, which h2 lets pass by that name.
    let named = wire.uri().authority().is_some();
    *wire.version_mut() = if named { Version::HTTP_2 } else { Version::HTTP_11 };
    let headers = wire.headers_mut();
    // Twice the same is allowed, but an empty host beside no authority says nothing.
    if headers.get(HOST).is_some_and(|host| host.is_empty()) {
        headers.remove(HOST);
    }
    wire
}

fn unsent(message: Cow<'static, str>, request: Request<Body>) -> SendError {
    let kind = SendErrorKind::NotProcessed(message);
    SendError { kind, request: Some(Box::new(request)) }
}

fn not_processed(error: &h2::Error) -> Cow<'static, str> {
    error.to_string().into()
}

/// h2 hands a remote GOAWAY to those streams only that came after the last one it names.
fn send_error(error: h2::Error) -> SendErrorKind {
    match error.reason().map(|reason| Reset(reason.into())) {
        Some(Reset::REFUSED_STREAM) => SendErrorKind::NotProcessed("REFUSED_STREAM".into()),
        Some(_) if error.is_go_away() && error.is_remote() => {
            SendErrorKind::NotProcessed(not_processed(&error))
        }
        Some(reset) => SendErrorKind::Reset(reset),
        None => error.into_io().map_or(SendErrorKind::Closed, SendErrorKind::Io),
    }
}

fn connect_error(error: h2::Error, tap: &Tap) -> ConnectError {
    match tap.take_error() {
        Some(error) => ConnectError::Io(error),
        None => ConnectError::Protocol(serve_error(error)),
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("closed", &self.is_closed())
            .field("streams", &self.streams())
            .finish_non_exhaustive()
    }
}
