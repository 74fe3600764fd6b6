//! One connection, as its owner and the bodies of its exchange share it.
//!
//! Whoever reads the body of the incoming message reads the connection; while nobody does, its
//! owner may. Only one of them ever polls the reading side. Nothing borrows the connection across
//! an await, and nobody polls a body while borrowing it: the body may be this connection's own.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BytesMut};
use http::{Response, StatusCode, Version};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::AbortHandle;

use super::client::Connection;
use super::decode::{Decoded, Decoder};
use super::encode::{ConnectionField, Encoder, LengthField, Pending, put_response, upgrade_field};
use super::parse::Framing;
use crate::http::Worker;
use crate::http::body::{Body, BodyError, Frame, Interim, Length, Source};

pub(super) struct Shared<IO> {
    io: IO,
    worker: Worker,
    /// Read, and not yet taken by a head or a body.
    pub(super) unread: BytesMut,
    /// Nothing more comes.
    pub(super) ended: bool,
    pub(super) pending: Pending,
    written: bool,

    pub(super) incoming: Incoming,
    pub(super) decoder: Decoder,
    /// Of the task that waits for the body.
    reader: Option<Waker>,
    /// Of the task that owns the connection.
    pub(super) owner: Option<Waker>,
    /// The owner is gone: the body is broken.
    closed: bool,

    /// How many 1xx heads may still be sent.
    pub(super) interims_left: u8,
    /// 100 was sent: the client sends its content.
    pub(super) continued: bool,

    pub(super) reuse: Option<Reuse<IO>>,
}

/// Where the body of the incoming message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Somebody reads it.
    Active,
    /// It was dropped before its end, or was malformed: what follows on the connection cannot be
    /// told from it.
    Broken,
    /// All of it was read.
    Done,
    /// It begins when the connection becomes a tunnel.
    Unopened,
}

/// A client's connection on its way back to its pool.
pub(super) struct Reuse<IO> {
    pub(super) on_idle: Box<dyn FnOnce(Connection<IO>)>,
    /// The whole request was written.
    pub(super) sent: bool,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Shared<IO> {
    pub(super) fn new(io: IO, worker: &Worker) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            io,
            worker: worker.clone(),
            unread: BytesMut::new(),
            ended: false,
            pending: Pending::default(),
            written: false,
            incoming: Incoming::Done,
            decoder: Decoder::new(Framing::Empty),
            reader: None,
            owner: None,
            closed: false,
            interims_left: 0,
            continued: false,
            reuse: None,
        }))
    }

    pub(super) fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Reads once. Zero is the end.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Ok(0));
        }
        if self.unread.is_empty() {
            // What was split off it keeps its memory; an idle connection must not.
            self.unread = BytesMut::new();
        }
        let read = ready!(self.worker.poll_read(Pin::new(&mut self.io), cx, &mut self.unread))?;
        self.ended = read == 0;
        Poll::Ready(Ok(read))
    }

    /// Writes all that is pending.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.pending.is_empty() {
            let Pending { front, content, back } = &mut self.pending;
            let slices = [IoSlice::new(front), IoSlice::new(content), IoSlice::new(back)];
            let io = Pin::new(&mut self.io);
            let mut count = if content.is_empty() && back.is_empty() {
                ready!(io.poll_write(cx, front))?
            } else {
                ready!(io.poll_write_vectored(cx, &slices))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written = true;
            for part in [front as &mut dyn Buf, content, back] {
                let taken = count.min(part.remaining());
                part.advance(taken);
                count -= taken;
            }
        }
        if self.written {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.written = false;
            self.pending = Pending::default();
        }
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_flush(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    /// A message begins whose content is framed so.
    pub(super) fn begin_incoming(&mut self, framing: Framing) {
        self.decoder = Decoder::new(framing);
        self.incoming = if framing == Framing::Empty { Incoming::Done } else { Incoming::Active };
    }

    /// The server agreed to a tunnel (`true`) or did not: the body that waited begins, or is over.
    pub(super) fn open_tunnel(&mut self, agreed: bool) {
        if self.incoming == Incoming::Unopened {
            self.begin_incoming(if agreed { Framing::Tunnel } else { Framing::Empty });
            self.wake_reader();
        }
    }

    /// The owner gives up: whoever waits for the body hears of it.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.wake_reader();
    }

    /// Has the task at hand woken when the body's state changes.
    pub(super) fn owned_by(&mut self, cx: &Context<'_>) {
        match &mut self.owner {
            Some(owner) => owner.clone_from(cx.waker()),
            owner => *owner = Some(cx.waker().clone()),
        }
    }

    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    pub(super) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame, BodyError>>> {
        if self.closed {
            return Poll::Ready(Some(Err(BodyError::Closed)));
        }
        if self.incoming == Incoming::Active {
            loop {
                match self.decoder.decode(&mut self.unread, self.ended) {
                    Ok(Decoded::Frame(frame)) => {
                        if self.decoder.length() == Length::Exact(0) {
                            self.incoming = Incoming::Done;
                        }
                        return Poll::Ready(Some(Ok(frame)));
                    }
                    Ok(Decoded::End) => {
                        self.incoming = Incoming::Done;
                        return Poll::Ready(None);
                    }
                    Ok(Decoded::NeedMore) => {}
                    Err(error) => return Poll::Ready(Some(Err(error))),
                }
                match self.poll_fill(cx) {
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(error)) => {
                        return Poll::Ready(Some(Err(BodyError::Io(error))));
                    }
                    Poll::Pending => break,
                }
            }
        }
        match self.incoming {
            Incoming::Broken => Poll::Ready(Some(Err(BodyError::Closed))),
            Incoming::Done => Poll::Ready(None),
            Incoming::Active | Incoming::Unopened => {
                // The owner may close, or open the tunnel, while this waits.
                self.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// The body of the incoming message.
pub(super) struct IncomingBody<IO: AsyncRead + AsyncWrite + Unpin + 'static> {
    shared: Rc<RefCell<Shared<IO>>>,
    /// What is left of the request: pointless once the response is given up.
    upload: Option<AbortHandle>,
    length: Length,
    over: bool,
}

impl<IO: AsyncRead + AsyncWrite + Unpin + 'static> IncomingBody<IO> {
    pub(super) fn body(shared: &Rc<RefCell<Shared<IO>>>, upload: Option<AbortHandle>) -> Body {
        let length = match shared.borrow().incoming {
            Incoming::Unopened => Length::Unknown,
            _ => shared.borrow().decoder.length(),
        };
        Body::from_source(Self { shared: shared.clone(), upload, length, over: false })
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin + 'static> Source for IncomingBody<IO> {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let mut shared = self.shared.borrow_mut();
        let polled = ready!(shared.poll_body(cx));
        if matches!(polled, Some(Err(_))) {
            shared.incoming = Incoming::Broken;
        }
        self.length = shared.decoder.length();
        self.over = shared.incoming != Incoming::Active;
        drop(shared);
        if self.over {
            settle(&self.shared);
        }
        Poll::Ready(polled)
    }

    fn length(&self) -> Length {
        self.length
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin + 'static> Drop for IncomingBody<IO> {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        if let Some(upload) = &self.upload {
            upload.abort();
        }
        self.shared.borrow_mut().incoming = Incoming::Broken;
        settle(&self.shared);
    }
}

/// A direction of the connection is through with its message: its owner, or its pool, may want it.
pub(super) fn settle<IO: AsyncRead + AsyncWrite + Unpin>(shared: &Rc<RefCell<Shared<IO>>>) {
    let mut this = shared.borrow_mut();
    if let Some(owner) = &this.owner {
        owner.wake_by_ref();
    }
    let Some(reuse) = &this.reuse else { return };
    let reuse = match this.incoming {
        Incoming::Done if reuse.sent => this.reuse.take(),
        Incoming::Broken => {
            this.reuse = None;
            None
        }
        _ => None,
    };
    // Bytes that nobody asked for would be taken for the next response.
    let clean = this.unread.is_empty() && !this.ended;
    drop(this);
    if let Some(reuse) = reuse.filter(|_| clean) {
        (reuse.on_idle)(Connection::reused(shared.clone()));
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin + 'static> Interim for RefCell<Shared<IO>> {
    fn send(&self, head: Response<()>) {
        let mut this = self.borrow_mut();
        // 101 is no interim answer, but the final one.
        if this.interims_left == 0 || head.status() == StatusCode::SWITCHING_PROTOCOLS {
            return;
        }
        this.interims_left -= 1;
        this.continued |= head.status() == StatusCode::CONTINUE;
        let (length, connection) = (LengthField::None, ConnectionField::None);
        put_response(&mut this.pending.front, &head, Version::HTTP_11, length, connection);
        if let Some(owner) = &this.owner {
            owner.wake_by_ref();
        }
    }
}

/// The content of the outgoing message, on its way.
pub(super) struct Outgoing {
    pub(super) body: Body,
    encoder: Encoder,
    /// A frame was taken from the body: it cannot be sent again.
    pub(super) taken: bool,
    trailers: bool,
    encoded: bool,
}

/// Why a message was not sent to its end.
#[derive(Debug)]
pub(super) enum Unsent {
    Body(BodyError),
    Io(io::Error),
}

impl Outgoing {
    pub(super) fn new(body: Body, framing: Framing) -> Self {
        let encoder = Encoder::new(framing);
        Self { body, encoder, taken: false, trailers: false, encoded: false }
    }

    /// Takes from the body what there is room for, and writes it.
    pub(super) fn poll<IO: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        shared: &RefCell<Shared<IO>>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Unsent>> {
        loop {
            let mut waits = false;
            while !self.encoded && !waits && shared.borrow().pending.has_room() {
                waits = self.take_frame(shared, cx).map_err(Unsent::Body)?.is_pending();
            }
            ready!(shared.borrow_mut().poll_flush(cx)).map_err(Unsent::Io)?;
            if self.encoded {
                return Poll::Ready(Ok(()));
            }
            if waits {
                return Poll::Pending;
            }
        }
    }

    fn take_frame<IO>(
        &mut self,
        shared: &RefCell<Shared<IO>>,
        cx: &mut Context<'_>,
    ) -> Result<Poll<()>, BodyError> {
        let frame = match self.body.poll_frame(cx) {
            Poll::Ready(frame) => frame.transpose()?,
            Poll::Pending => return Ok(Poll::Pending),
        };
        let out = &mut shared.borrow_mut().pending;
        match frame {
            Some(frame) => {
                self.taken = true;
                self.trailers = matches!(frame, Frame::Trailers(_));
                self.encoder.frame(frame, out)?;
            }
            None => {
                self.encoder.finish(self.trailers, out)?;
                self.encoded = true;
            }
        }
        Ok(Poll::Ready(()))
    }
}

/// `Connection` for the head of a message that goes out.
pub(super) fn connection_field(
    tunnel: bool,
    keep_alive: bool,
    version: Version,
    headers: &http::HeaderMap,
) -> ConnectionField {
    match (tunnel, keep_alive) {
        (true, _) => upgrade_field(headers),
        (false, false) => ConnectionField::Close,
        (false, true) if version == Version::HTTP_10 => ConnectionField::KeepAlive,
        (false, true) => ConnectionField::None,
    }
}
