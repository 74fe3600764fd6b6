//! The two directions of one stream.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::HeaderMap;
use http::header::CONTENT_LENGTH;
use tokio::task::AbortHandle;

use crate::http::body::{Body, BodyError, Frame, Length, Reset, Source};
use crate::http::worker::{Budget, Reservation};

/// Content that a peer sends. Its window opens as frames are taken.
pub(super) struct Received<G> {
    stream: RecvStream,
    length: Length,
    data_over: bool,
    over: bool,
    /// The rest of the request: pointless once the response is given up.
    upload: Option<AbortHandle>,
    /// Whatever must live as long as the stream.
    _guard: G,
}

impl<G: 'static> Received<G> {
    pub(super) fn body(
        stream: RecvStream,
        headers: &HeaderMap,
        upload: Option<AbortHandle>,
        guard: G,
    ) -> Body {
        if stream.is_end_stream() {
            return Body::empty();
        }
        let length = headers
            .get(CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok())
            .map_or(Length::Unknown, Length::Exact);
        let (data_over, over) = (false, false);
        Body::from_source(Self { stream, length, data_over, over, upload, _guard: guard })
    }
}

impl<G> Source for Received<G> {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let polled = ready!(self.poll_stream(cx));
        self.over = match &polled {
            None | Some(Err(_) | Ok(Frame::Trailers(_))) => true,
            Some(Ok(Frame::Data(_))) => self.stream.is_end_stream(),
        };
        Poll::Ready(polled)
    }

    fn length(&self) -> Length {
        if self.over { Length::Exact(0) } else { self.length }
    }

    fn is_end(&self) -> bool {
        self.over
    }
}

impl<G> Received<G> {
    fn poll_stream(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        while !self.data_over {
            match ready!(self.stream.poll_data(cx)) {
                // A peer ends its content with an empty frame if it learnt of the end too late.
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    // Taken is read: whoever took it has room for it.
                    let released = self.stream.flow_control().release_capacity(data.len());
                    if let Length::Exact(left) = &mut self.length {
                        *left = left.saturating_sub(data.len() as u64);
                    }
                    return Poll::Ready(Some(match released {
                        Ok(()) => Ok(Frame::Data(data)),
                        Err(error) => Err(body_error(error)),
                    }));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(body_error(error)))),
                None => self.data_over = true,
            }
        }
        let trailers = ready!(self.stream.poll_trailers(cx)).map_err(body_error).transpose();
        Poll::Ready(trailers.map(|trailers| trailers.map(Frame::Trailers)))
    }
}

impl<G> Drop for Received<G> {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload
            && !self.over
        {
            upload.abort();
        }
    }
}

/// Content on its way to the peer.
pub(super) struct Sending {
    body: Body,
    stream: SendStream<Bytes>,
    /// Taken from the body; waits for the window.
    waiting: Bytes,
    /// What was taken from the body, where that may have to be sent again.
    taken: Option<Taken>,
}

/// What was taken from a body, as long as that is little and there is room for it.
struct Taken {
    frames: Vec<(Frame, Option<Reservation>)>,
    bytes: usize,
    budget: Budget,
}

/// Why content was not sent to its end.
#[derive(Debug)]
pub(super) enum Unsent {
    /// It broke; the peer has been told.
    Body(BodyError),
    /// The peer wants no more of it.
    Refused,
}

impl Taken {
    /// With this frame; `None`: it is too much.
    fn and(mut self, frame: &Frame) -> Option<Self> {
        let kept = match frame {
            Frame::Data(data) => {
                let reserved = self.budget.reserve(data.len() as u64)?;
                self.bytes += data.len();
                // A small part would hold on to all that was read with it.
                let data = match data.len() < COPIED_BELOW_BYTES {
                    true => Bytes::copy_from_slice(data),
                    false => data.clone(),
                };
                (Frame::Data(data), Some(reserved))
            }
            Frame::Trailers(_) => (frame.clone(), None),
        };
        self.frames.push(kept);
        (self.bytes <= KEPT_BYTES_MAX && self.frames.len() <= KEPT_FRAMES_MAX).then_some(self)
    }
}

impl Sending {
    /// Content that is sent once.
    pub(super) fn new(body: Body, stream: SendStream<Bytes>) -> Self {
        Self { body, stream, waiting: Bytes::new(), taken: None }
    }

    /// Content that is sent again, on another connection, where the peer has processed none of it: as
    /// much as this budget lets be kept.
    pub(super) fn again(body: Body, stream: SendStream<Bytes>, budget: Budget) -> Self {
        let taken = Taken { frames: Vec::new(), bytes: 0, budget };
        Self { taken: Some(taken), ..Self::new(body, stream) }
    }

    /// The body as it was before anything was taken from it; `None`: that was too much to keep.
    pub(super) fn into_body(self) -> Option<Body> {
        let frames = self.taken?.frames.into_iter().map(|(frame, _)| frame);
        Some(self.body.after(frames.collect()))
    }

    /// The answer has begun: it will not be sent again.
    pub(super) fn keep_nothing(&mut self) {
        self.taken = None;
    }

    /// Sends what the window allows.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Unsent>> {
        loop {
            if !self.waiting.is_empty() {
                if ready!(self.poll_send(cx))? {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            let polled = self.body.poll_frame(cx);
            if let Poll::Ready(Some(Ok(frame))) = &polled {
                self.taken = self.taken.take().and_then(|taken| taken.and(frame));
            }
            match polled {
                Poll::Ready(Some(Ok(Frame::Data(data)))) => {
                    if data.is_empty() && self.body.is_end() {
                        return Poll::Ready(self.send(Bytes::new(), true));
                    }
                    self.waiting = data;
                }
                Poll::Ready(Some(Ok(Frame::Trailers(trailers)))) => {
                    return Poll::Ready(refused(self.stream.send_trailers(trailers)));
                }
                Poll::Ready(Some(Err(error))) => {
                    self.stream.send_reset(reason(error.reset()));
                    return Poll::Ready(Err(Unsent::Body(error)));
                }
                Poll::Ready(None) => return Poll::Ready(self.send(Bytes::new(), true)),
                Poll::Pending => {
                    // Nothing to send: a peer that resets the stream would go unnoticed.
                    ready!(self.stream.poll_reset(cx)).ok();
                    return Poll::Ready(Err(Unsent::Refused));
                }
            }
        }
    }

    /// Sends some of what waits; says whether it was the last of the content.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Unsent>> {
        self.stream.reserve_capacity(self.waiting.len());
        while self.stream.capacity() == 0 {
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(Err(Unsent::Refused)),
            }
        }
        let bytes = self.stream.capacity().min(self.waiting.len());
        let data = self.waiting.split_to(bytes);
        let last = self.waiting.is_empty() && self.body.is_end();
        Poll::Ready(self.send(data, last).map(|()| last))
    }

    fn send(&mut self, data: Bytes, last: bool) -> Result<(), Unsent> {
        refused(self.stream.send_data(data, last))
    }
}

impl Future for Sending {
    type Output = Result<(), Unsent>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Self::poll(&mut self, cx)
    }
}

fn refused(result: Result<(), h2::Error>) -> Result<(), Unsent> {
    result.map_err(|_| Unsent::Refused)
}

pub(super) fn reason(reset: Reset) -> Reason {
    reset.0.into()
}

pub(super) fn body_error(error: h2::Error) -> BodyError {
    match error.reason() {
        Some(reason) if error.is_reset() => BodyError::Reset(Reset(reason.into())),
        _ => error.into_io().map_or(BodyError::Closed, BodyError::Io),
    }
}

/// Of a request, until its answer begins: most are smaller, and a stream that lasts is none to be
/// sent again.
const KEPT_BYTES_MAX: usize = 64 * 1024;
const KEPT_FRAMES_MAX: usize = 64;
const COPIED_BELOW_BYTES: usize = 4096;
