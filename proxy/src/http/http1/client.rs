//! A connection to a server: one exchange at a time.
//!
//! There is no task behind it: whoever waits for the head, and then whoever reads the body, drives
//! it. Only a request whose answer begins before it is sent to its end leaves a task that sends on.

use std::cell::RefCell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use http::{Method, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};

use super::connection::{IncomingBody, Outgoing, Reuse, Shared, Unsent, settle};
use super::encode::{ConnectionField, put_request, upgrade_field};
use super::parse::{Framing, HeadError, HeadScan, LineEnds, ResponseHead};
use crate::http::body::{Body, Interim, Length};
use crate::http::error::{SendError, SendErrorKind};
use crate::http::{Worker, needs_own_connection};

/// A connection that is ready for an exchange.
pub struct Connection<IO> {
    shared: Rc<RefCell<Shared<IO>>>,
    reused: bool,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Connection<IO> {
    /// A connection on which nothing was sent yet.
    pub fn new(io: IO, worker: &Worker) -> Self {
        Self { shared: Shared::new(io, worker), reused: false }
    }

    pub(super) fn reused(shared: Rc<RefCell<Shared<IO>>>) -> Self {
        Self { shared, reused: true }
    }

    /// Whether an exchange took place on it: its server may close it at any moment, so that a
    /// request which gets no byte of an answer was probably never read.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// Whether its server still holds it open; costs a system call only if something has come.
    pub fn is_reusable(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.shared.borrow_mut().poll_fill(&mut cx).is_pending()
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin + 'static> Connection<IO> {
    /// Sends a request and waits for the head of its answer. 1xx heads go to the request's
    /// [`Interim`]. When both messages are through and the server keeps the connection, `on_idle`
    /// gets it back; else it is closed and `on_idle` dropped. Dropping the future, or the body of
    /// the response, cancels the exchange.
    ///
    /// A request that asks for a tunnel, and gets it, has the tunnel's two directions as the
    /// bodies of request and response.
    ///
    /// # Errors
    /// There is no answer; the connection is closed.
    pub async fn send(
        self,
        request: Request<Body>,
        on_idle: impl FnOnce(Self) + 'static,
    ) -> Result<Response<Body>, SendError> {
        let (parts, body) = request.into_parts();
        let head = Request::from_parts(parts, ());
        let tunnel = needs_own_connection(&head);
        let framing = framing_of(&body, tunnel);
        let interim = body.interim().cloned();
        {
            let mut shared = self.shared.borrow_mut();
            let connection =
                if tunnel { upgrade_field(head.headers()) } else { ConnectionField::None };
            put_request(&mut shared.pending.front, &head, framing, connection);
        }
        let mut sending = Sending {
            shared: &self.shared,
            outgoing: Outgoing::new(body, framing),
            state: if tunnel { Sent::Withheld } else { Sent::Partly },
            scan: HeadScan::new(LineEnds::Lenient),
            answered: false,
            interims_left: INTERIM_HEADS_MAX,
        };
        let received = poll_fn(|cx| sending.poll(&head, interim.as_deref(), cx)).await;
        let Sending { outgoing, state, .. } = sending;
        match received {
            Ok(answer) => Ok(self.answer(answer, outgoing, state, Box::new(on_idle))),
            Err(kind) => {
                let untouched = !outgoing.taken && !matches!(kind, SendErrorKind::Body(_));
                let request = untouched.then(|| Box::new(head.map(|()| outgoing.body)));
                Err(SendError { kind, request })
            }
        }
    }

    /// The answer has begun: sees to the rest of the request, and makes the response's body.
    fn answer(
        self,
        answer: ResponseHead,
        outgoing: Outgoing,
        sent: Sent,
        on_idle: Box<dyn FnOnce(Self)>,
    ) -> Response<Body> {
        let tunnel = answer.framing == Framing::Tunnel;
        {
            let mut shared = self.shared.borrow_mut();
            shared.begin_incoming(answer.framing);
            let reusable = answer.keep_alive && !tunnel && !matches!(sent, Sent::Broken(_));
            shared.reuse = reusable
                .then(|| Reuse { on_idle, sent: matches!(sent, Sent::Wholly | Sent::Withheld) });
        }
        let upload = match sent {
            Sent::Partly => Some(outgoing),
            Sent::Withheld if tunnel => Some(outgoing),
            _ => None,
        };
        let upload = upload.map(|outgoing| {
            let tasks = self.shared.borrow().worker().tasks().clone();
            tasks.spawn_counted(send_rest(self.shared.clone(), outgoing, tunnel))
        });
        let body = if answer.framing == Framing::Empty {
            settle(&self.shared);
            Body::empty()
        } else {
            IncomingBody::body(&self.shared, upload)
        };
        answer.head.map(|()| body)
    }
}

fn framing_of(body: &Body, tunnel: bool) -> Framing {
    match body.length() {
        _ if tunnel => Framing::Tunnel,
        _ if body.is_end() => Framing::Empty,
        Length::Exact(bytes) => Framing::Length(bytes),
        Length::Unknown => Framing::Chunked,
    }
}

/// How much of a request's content was sent.
enum Sent {
    /// The server takes no more of it; it may have answered before it closed.
    Broken(io::Error),
    Partly,
    Wholly,
    /// It waits for the server's agreement to a tunnel.
    Withheld,
}

struct Sending<'a, IO> {
    shared: &'a Rc<RefCell<Shared<IO>>>,
    outgoing: Outgoing,
    state: Sent,
    scan: HeadScan,
    answered: bool,
    interims_left: u8,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Sending<'_, IO> {
    /// Writes the request and reads the head of the answer, each as far as it goes.
    fn poll(
        &mut self,
        head: &Request<()>,
        interim: Option<&dyn Interim>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<ResponseHead, SendErrorKind>> {
        let written = match self.state {
            Sent::Partly => self.outgoing.poll(self.shared, cx),
            Sent::Withheld => self.shared.borrow_mut().poll_flush(cx).map_err(Unsent::Io),
            Sent::Broken(_) | Sent::Wholly => Poll::Pending,
        };
        match (written, &self.state) {
            (Poll::Ready(Ok(())), Sent::Partly) => self.state = Sent::Wholly,
            (Poll::Ready(Err(Unsent::Io(error))), _) => self.state = Sent::Broken(error),
            (Poll::Ready(Err(Unsent::Body(error))), _) => {
                return Poll::Ready(Err(SendErrorKind::Body(error)));
            }
            _ => {}
        }
        loop {
            let answer = ready!(self.poll_head(head, cx))?;
            if answer.head.status() == StatusCode::SWITCHING_PROTOCOLS
                || !answer.head.status().is_informational()
            {
                return Poll::Ready(Ok(answer));
            }
            if self.interims_left == 0 {
                let error = HeadError::Syntax("too many 1xx heads before an answer");
                return Poll::Ready(Err(SendErrorKind::Malformed(error)));
            }
            self.interims_left -= 1;
            if let Some(interim) = interim {
                interim.send(answer.head);
            }
        }
    }

    fn poll_head(
        &mut self,
        head: &Request<()>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<ResponseHead, SendErrorKind>> {
        let upgrade = head.method() != Method::CONNECT && needs_own_connection(head);
        let mut shared = self.shared.borrow_mut();
        loop {
            match self.scan.take_response(&mut shared.unread, head.method(), upgrade) {
                Ok(None) => {}
                Ok(Some(answer)) => {
                    self.scan = HeadScan::new(LineEnds::Lenient);
                    return Poll::Ready(Ok(answer));
                }
                Err(error) => return Poll::Ready(Err(SendErrorKind::Malformed(error))),
            }
            let read = ready!(shared.poll_fill(cx));
            let kind = match (read, std::mem::replace(&mut self.state, Sent::Wholly)) {
                (Ok(1..), state) => {
                    (self.state, self.answered) = (state, true);
                    continue;
                }
                // What broke first says more than what followed from it.
                (_, Sent::Broken(error)) | (Err(error), _) => SendErrorKind::Io(error),
                (Ok(0), _) if self.answered => {
                    SendErrorKind::Malformed(HeadError::Syntax("it ends early"))
                }
                (Ok(0), _) => SendErrorKind::Closed,
            };
            return Poll::Ready(Err(kind));
        }
    }
}

/// Sends the rest of a request whose answer has begun. A failure ends the connection, which the
/// response's body, if it is not over, will tell.
async fn send_rest<IO: AsyncRead + AsyncWrite + Unpin>(
    shared: Rc<RefCell<Shared<IO>>>,
    mut outgoing: Outgoing,
    tunnel: bool,
) {
    let sent = poll_fn(|cx| outgoing.poll(&shared, cx)).await;
    match sent {
        Ok(()) if tunnel => {
            // The end of this direction; the other goes on.
            let _ = poll_fn(|cx| shared.borrow_mut().poll_shutdown(cx)).await;
        }
        Ok(()) => {
            if let Some(reuse) = &mut shared.borrow_mut().reuse {
                reuse.sent = true;
            }
            settle(&shared);
        }
        Err(Unsent::Body(_)) => shared.borrow_mut().close(),
        Err(Unsent::Io(_)) => {
            // The answer may be complete in spite of it.
            shared.borrow_mut().reuse = None;
        }
    }
}

impl<IO> fmt::Debug for Connection<IO> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("reused", &self.reused).finish_non_exhaustive()
    }
}

/// More 1xx heads are no answer.
const INTERIM_HEADS_MAX: u8 = 16;
