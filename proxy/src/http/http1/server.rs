//! Serves a connection's requests, one after the other.
//!
//! An idle connection holds its shared value and a timer; the exchange lives in a box of its own
//! for as long as it runs. While an exchange has read its whole request, its connection is watched:
//! a client that goes away cancels it, as Linkerd and Envoy do.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::connection::{Incoming, IncomingBody, Outgoing, Shared, Unsent, connection_field};
use super::encode::{LengthField, bodiless, put_response, response_framing};
use super::parse::{Framing, HeadScan, LineEnds, RequestHead};
use crate::http::body::{Body, Frame, Length};
use crate::http::error::{Abort, GrpcStatus, ProxyError, ServeError, Shape};
use crate::http::head::{ConnectionOptions, strip_hop_by_hop};
use crate::http::{Exchange, Worker};

/// Serves one connection until its client leaves, or `close` asks for its end: an idle connection
/// then ends at once, a busy one after its response, which says so; a tunnel runs on.
///
/// # Errors
/// Why the connection ended other than by agreement. A client whose request was refused has been
/// told.
pub async fn serve<IO, E>(
    io: IO,
    exchange: &E,
    worker: &Worker,
    close: impl Future<Output = ()>,
) -> Result<(), ServeError>
where
    IO: AsyncRead + AsyncWrite + Unpin + 'static,
    E: Exchange,
{
    let shared = Shared::new(io, worker);
    let _gone = CloseOnDrop(shared.clone());
    let mut closing = Closing { wish: pin!(close), wished: false };
    loop {
        let head = match next_head(&shared, &mut closing).await {
            Ok(Some(head)) => head,
            Ok(None) => break,
            Err(error) => {
                refuse(&shared, &error).await;
                return Err(error);
            }
        };
        // Boxed, so that the room it needs is free again while the connection idles.
        let serving = Box::pin(serve_one(&shared, exchange, head, &mut closing));
        match serving.await? {
            Next::Close => break,
            Next::Head => {}
        }
    }
    finish(&shared).await;
    Ok(())
}

/// The caller's wish to end the connection.
struct Closing<'a, F> {
    wish: Pin<&'a mut F>,
    wished: bool,
}

impl<F: Future<Output = ()>> Closing<'_, F> {
    fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        self.wished = self.wished || self.wish.as_mut().poll(cx).is_ready();
        self.wished
    }
}

/// What follows an exchange.
enum Next {
    Close,
    Head,
}

/// What a request says about its response.
struct Asked {
    method: Method,
    version: Version,
    keep_alive: bool,
    expects_continue: bool,
    tunnel: bool,
}

/// The bodies of a connection that is given up must not wait for it.
struct CloseOnDrop<IO: AsyncRead + AsyncWrite + Unpin>(Rc<RefCell<Shared<IO>>>);

impl<IO: AsyncRead + AsyncWrite + Unpin> Drop for CloseOnDrop<IO> {
    fn drop(&mut self) {
        self.0.borrow_mut().close();
    }
}

/// The next request's head; `None` when there is none.
async fn next_head<IO: AsyncRead + AsyncWrite + Unpin>(
    shared: &RefCell<Shared<IO>>,
    closing: &mut Closing<'_, impl Future<Output = ()>>,
) -> Result<Option<RequestHead>, ServeError> {
    let first = poll_fn(|cx| {
        let mut this = shared.borrow_mut();
        if !this.unread.is_empty() {
            return Poll::Ready(Ok(true));
        }
        // Reading comes first: a request that was sent before the wish to close is answered.
        match this.poll_fill(cx) {
            Poll::Ready(read) => Poll::Ready(read.map(|bytes| bytes > 0)),
            Poll::Pending if closing.poll(cx) => Poll::Ready(Ok(false)),
            Poll::Pending => Poll::Pending,
        }
    });
    match timeout(IDLE_TIMEOUT, first).await {
        Ok(Ok(true)) => {}
        Ok(Ok(false)) | Err(_) => return Ok(None),
        // A client that resets its idle connection closes it.
        Ok(Err(_)) => return Ok(None),
    }

    let mut scan = HeadScan::new(LineEnds::Strict);
    let rest = poll_fn(|cx| {
        let mut this = shared.borrow_mut();
        loop {
            match scan.take_request(&mut this.unread) {
                Ok(None) => {}
                Ok(head) => return Poll::Ready(Ok(head)),
                Err(error) => return Poll::Ready(Err(ServeError::Malformed(error))),
            }
            if ready!(this.poll_fill(cx)).map_err(ServeError::Io)? == 0 {
                let blank = this.unread.is_empty();
                return Poll::Ready(if blank { Ok(None) } else { Err(ServeError::ClientGone) });
            }
        }
    });
    timeout(HEAD_TIMEOUT, rest).await.unwrap_or(Err(ServeError::HeadTimeout))
}

async fn serve_one<IO, E>(
    shared: &Rc<RefCell<Shared<IO>>>,
    exchange: &E,
    parsed: RequestHead,
    closing: &mut Closing<'_, impl Future<Output = ()>>,
) -> Result<Next, ServeError>
where
    IO: AsyncRead + AsyncWrite + Unpin + 'static,
    E: Exchange,
{
    let asked = Asked {
        method: parsed.head.method().clone(),
        version: parsed.head.version(),
        keep_alive: parsed.keep_alive,
        expects_continue: parsed.expects_continue,
        tunnel: parsed.framing == Framing::Tunnel,
    };
    let request = begin(shared, parsed);
    let mut answer = pin!(exchange.exchange(request));
    let response = poll_fn(|cx| {
        closing.poll(cx);
        match answer.as_mut().poll(cx) {
            Poll::Ready(response) => Poll::Ready(Ok(response)),
            Poll::Pending => poll_watch(shared, cx).map(Err),
        }
    })
    .await?;
    if let Some(Abort(reset)) = response.extensions().get() {
        return Err(ServeError::Reset(*reset));
    }
    respond(shared, &asked, response, closing.wished).await
}

/// Makes the request, with a body that reads this connection.
fn begin<IO: AsyncRead + AsyncWrite + Unpin + 'static>(
    shared: &Rc<RefCell<Shared<IO>>>,
    parsed: RequestHead,
) -> Request<Body> {
    let mut this = shared.borrow_mut();
    this.begin_incoming(parsed.framing);
    if parsed.framing == Framing::Tunnel {
        this.incoming = Incoming::Unopened;
    }
    this.interims_left =
        if parsed.head.version() == Version::HTTP_11 { INTERIM_HEADS_MAX } else { 0 };
    this.continued = false;
    drop(this);
    let body = match parsed.framing {
        Framing::Empty => Body::empty(),
        _ => IncomingBody::body(shared, None),
    };
    parsed.head.map(|()| body.with_interim(shared.clone()))
}

/// Writes 1xx heads, and watches for a client that goes away once its request has been read.
fn poll_watch<IO: AsyncRead + AsyncWrite + Unpin>(
    shared: &RefCell<Shared<IO>>,
    cx: &mut Context<'_>,
) -> Poll<ServeError> {
    let mut this = shared.borrow_mut();
    this.owned_by(cx);
    if let Poll::Ready(Err(error)) = this.poll_flush(cx) {
        return Poll::Ready(ServeError::Io(error));
    }
    let requests_read = matches!(this.incoming, Incoming::Done | Incoming::Unopened);
    if requests_read && this.unread.is_empty() {
        match ready!(this.poll_fill(cx)) {
            Ok(0) => return Poll::Ready(ServeError::ClientGone),
            Ok(_) => {} // The next request; it waits.
            Err(error) => return Poll::Ready(ServeError::Io(error)),
        }
    }
    Poll::Pending
}

async fn respond<IO: AsyncRead + AsyncWrite + Unpin + 'static>(
    shared: &Rc<RefCell<Shared<IO>>>,
    asked: &Asked,
    response: Response<Body>,
    closing: bool,
) -> Result<Next, ServeError> {
    let (mut head, body) = final_head(asked, response).into_parts();
    let tunnel = asked.agreed(head.status);
    shared.borrow_mut().open_tunnel(tunnel);

    let told = if tunnel { Some(false) } else { bodiless(&asked.method, head.status) };
    let framing = match told {
        _ if tunnel => Framing::Tunnel,
        Some(_) => Framing::Empty,
        None => response_framing(asked.version, body.length()),
    };
    let length = match told {
        Some(true) => LengthField::AsTold,
        Some(false) => LengthField::None,
        None => LengthField::Of(framing),
    };
    let keep_alive = asked.keep_alive
        && !closing
        && framing != Framing::Close
        && !ConnectionOptions::of(&head.headers).close
        && rest_is_readable(shared, asked);
    strip_hop_by_hop(&mut head.headers, tunnel);
    let field = connection_field(tunnel, keep_alive, asked.version, &head.headers);
    let head = Response::from_parts(head, ());
    {
        let mut this = shared.borrow_mut();
        this.interims_left = 0;
        put_response(&mut this.pending.front, &head, asked.version, length, field);
    }

    send(shared, Outgoing::new(body, framing), tunnel).await?;
    if tunnel {
        end_tunnel(shared).await?;
        return Ok(Next::Close);
    }
    let read = read_rest(shared).await;
    Ok(if keep_alive && read { Next::Head } else { Next::Close })
}

impl Asked {
    /// Whether this answer opens the tunnel that was asked for.
    fn agreed(&self, status: StatusCode) -> bool {
        self.tunnel
            && if self.method == Method::CONNECT {
                status.is_success()
            } else {
                status == StatusCode::SWITCHING_PROTOCOLS
            }
    }
}

/// An exchange that ends in an interim status has no answer.
fn final_head(asked: &Asked, response: Response<Body>) -> Response<Body> {
    if response.status().is_informational() && !asked.agreed(response.status()) {
        let message = format!("status {} is no final answer", response.status().as_u16());
        return ProxyError::new(StatusCode::BAD_GATEWAY, GrpcStatus::Internal, message)
            .render(Shape::of(&Request::new(())));
    }
    response
}

/// Whether what is left of the request will be read to its end, so that the next can follow. A
/// client that waits for 100 and gets its answer instead may or may not send its content: nobody
/// can tell what then comes.
fn rest_is_readable<IO>(shared: &RefCell<Shared<IO>>, asked: &Asked) -> bool {
    let this = shared.borrow();
    let waits = asked.expects_continue && !this.continued;
    match this.incoming {
        Incoming::Done => true,
        _ if waits => false,
        Incoming::Active => true,
        Incoming::Broken => {
            matches!(this.decoder.length(), Length::Exact(rest) if rest <= DISCARDED_BYTES_MAX)
        }
        Incoming::Unopened => false,
    }
}

async fn send<IO: AsyncRead + AsyncWrite + Unpin>(
    shared: &RefCell<Shared<IO>>,
    mut outgoing: Outgoing,
    tunnel: bool,
) -> Result<(), ServeError> {
    poll_fn(|cx| {
        if let Poll::Ready(sent) = outgoing.poll(shared, cx) {
            return Poll::Ready(sent.map_err(|unsent| match unsent {
                Unsent::Body(error) => ServeError::Reset(error.reset()),
                Unsent::Io(error) => ServeError::Io(error),
            }));
        }
        if tunnel { Poll::Pending } else { poll_watch(shared, cx).map(Err) }
    })
    .await
}

/// The server's direction is over; the client's may not be.
async fn end_tunnel<IO: AsyncRead + AsyncWrite + Unpin>(
    shared: &RefCell<Shared<IO>>,
) -> Result<(), ServeError> {
    poll_fn(|cx| shared.borrow_mut().poll_shutdown(cx)).await.map_err(ServeError::Io)?;
    wait_for_reader(shared).await;
    Ok(())
}

/// The response is through. Whoever still reads the request may go on; what nobody reads is
/// discarded, if it is little. Says whether the request is over.
async fn read_rest<IO: AsyncRead + AsyncWrite + Unpin>(shared: &RefCell<Shared<IO>>) -> bool {
    wait_for_reader(shared).await;
    if shared.borrow().incoming == Incoming::Done {
        return true;
    }
    let mut left = DISCARDED_BYTES_MAX;
    let discard = poll_fn(|cx| {
        let mut this = shared.borrow_mut();
        this.incoming = Incoming::Active;
        loop {
            match ready!(this.poll_body(cx)) {
                Some(Ok(Frame::Data(data))) => left = left.saturating_sub(data.len() as u64),
                Some(Ok(Frame::Trailers(_))) | None => return Poll::Ready(true),
                Some(Err(_)) => return Poll::Ready(false),
            }
            if this.incoming == Incoming::Done || left == 0 {
                return Poll::Ready(this.incoming == Incoming::Done);
            }
        }
    });
    timeout(LINGER_TIMEOUT, discard).await.unwrap_or(false)
}

async fn wait_for_reader<IO: AsyncRead + AsyncWrite + Unpin>(shared: &RefCell<Shared<IO>>) {
    poll_fn(|cx| {
        let mut this = shared.borrow_mut();
        this.owned_by(cx);
        if this.incoming == Incoming::Active { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
}

/// Tells a client why its request is refused.
async fn refuse<IO: AsyncRead + AsyncWrite + Unpin>(
    shared: &RefCell<Shared<IO>>,
    error: &ServeError,
) {
    let (status, message) = match error {
        ServeError::HeadTimeout => (StatusCode::REQUEST_TIMEOUT, error.to_string()),
        ServeError::Malformed(error) => (error.status(), error.to_string()),
        _ => return,
    };
    let error = ProxyError::new(status, GrpcStatus::Internal, message);
    let response = error.render(Shape::of(&Request::new(())));
    let head = response.map(|_| ());
    {
        let mut this = shared.borrow_mut();
        let (version, length) = (Version::HTTP_11, LengthField::Of(Framing::Empty));
        let field = connection_field(false, false, version, &HeaderMap::new());
        put_response(&mut this.pending.front, &head, version, length, field);
    }
    finish(shared).await;
}

/// Closes in a way that lets the client read its last response: closing while bytes of it are
/// unread would reset the connection, and take the response along.
async fn finish<IO: AsyncRead + AsyncWrite + Unpin>(shared: &RefCell<Shared<IO>>) {
    let shutdown = poll_fn(|cx| shared.borrow_mut().poll_shutdown(cx));
    if !matches!(timeout(LINGER_TIMEOUT, shutdown).await, Ok(Ok(()))) {
        return;
    }
    let mut left = DISCARDED_BYTES_MAX;
    let linger = poll_fn(|cx| {
        let mut this = shared.borrow_mut();
        loop {
            this.unread.clear();
            match ready!(this.poll_fill(cx)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(bytes) => left = left.saturating_sub(bytes as u64),
            }
            if left == 0 {
                return Poll::Ready(());
            }
        }
    });
    // Over or not, the connection is closed now.
    let _ = timeout(LINGER_TIMEOUT, linger).await;
}

/// A head must be complete this long after its first byte.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection without requests is closed after this; long, since a client that sends its next
/// request at that moment loses it.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// For how long the rest of a request is read that nobody wants.
const LINGER_TIMEOUT: Duration = Duration::from_secs(2);
/// How much of it.
const DISCARDED_BYTES_MAX: u64 = 256 * 1024;
/// More 1xx heads for one request are dropped.
const INTERIM_HEADS_MAX: u8 = 16;
