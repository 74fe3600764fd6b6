//! The body of a message: frames that are pulled.
//!
//! Backpressure is the pull itself: nobody reads ahead for a body that nobody polls, and HTTP/2's
//! windows open as its data is taken. Dropping a body before its end cancels what produces it.
//!
//! After a switch of protocols (101, or 2xx to CONNECT) the two bodies of the exchange are the two
//! directions of the tunnel: the end of a body is the half-close of its direction.

use std::fmt;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderMap, Response};

/// A message's content.
#[derive(Default)]
pub struct Body {
    inner: Inner,
    interim: Option<Rc<dyn Interim>>,
}

#[derive(Default)]
enum Inner {
    #[default]
    Empty,
    Full(Bytes),
    Source(Box<dyn Source>),
}

/// One piece of a body.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// Content.
    Data(Bytes),
    /// Fields after the content; nothing follows them.
    Trailers(HeaderMap),
}

/// How much content remains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// This many bytes.
    Exact(u64),
    /// Nobody said.
    Unknown,
}

/// What produces the frames of a body.
pub trait Source {
    /// The next frame, or `None` at the end. Not polled again after its end or an error.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>>;

    /// How much content remains.
    fn length(&self) -> Length;

    /// Whether it is certain that no frame follows, trailers included.
    fn is_end(&self) -> bool {
        self.length() == Length::Exact(0)
    }
}

/// Passes 1xx heads to the client of the exchange before its answer. A request's body carries the
/// handle, since heads and bodies are all that stages see.
pub trait Interim {
    /// Sends one 1xx head; one that the client cannot take (HTTP/1.0, an answer already begun, too
    /// many of them) is dropped, as RFC 9110 §15.2 allows.
    fn send(&self, head: Response<()>);
}

/// Sees a body pass.
pub trait Observer {
    /// A frame was taken.
    fn frame(&mut self, frame: &Frame);
    /// The body is over; called once.
    fn ended(&mut self, end: End<'_>);
}

/// How a body ended.
#[derive(Debug)]
pub enum End<'a> {
    /// All of it was taken.
    Complete,
    /// It was dropped before its end: whoever took it lost interest.
    Dropped,
    /// It broke.
    Failed(&'a BodyError),
}

/// Why a body broke.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The peer closed the connection before the body's end.
    #[error("the peer closed the connection before the end of the message")]
    Closed,
    /// The connection broke.
    #[error("the connection broke in the middle of a message")]
    Io(#[source] std::io::Error),
    /// The chunked coding was malformed.
    #[error("the peer sent malformed content")]
    Malformed(#[source] super::http1::ChunkError),
    /// The stream was reset.
    #[error("the stream was reset: {0}")]
    Reset(Reset),
    /// The content is not as long as announced.
    #[error("the content is not as long as its content-length, {announced} bytes")]
    WrongLength {
        /// What the head said.
        announced: u64,
    },
}

/// An HTTP/2 error code (RFC 9113 §7).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Reset(pub u32);

impl Body {
    /// No content.
    pub const fn empty() -> Self {
        Self { inner: Inner::Empty, interim: None }
    }

    /// Content that is there already.
    pub fn full(content: impl Into<Bytes>) -> Self {
        let content = content.into();
        let inner = if content.is_empty() { Inner::Empty } else { Inner::Full(content) };
        Self { inner, interim: None }
    }

    /// Content that comes from somewhere.
    pub fn from_source(source: impl Source + 'static) -> Self {
        Self { inner: Inner::Source(Box::new(source)), interim: None }
    }

    /// With these frames, which were taken from it, in front again.
    #[must_use]
    pub fn after(mut self, taken: Vec<Frame>) -> Self {
        if taken.is_empty() {
            return self;
        }
        let interim = self.interim.take();
        let again = Again { taken: taken.into_iter(), rest: self };
        Self { inner: Inner::Source(Box::new(again)), interim }
    }

    /// Has its 1xx heads sent by this handle.
    #[must_use]
    pub fn with_interim(mut self, interim: Rc<dyn Interim>) -> Self {
        self.interim = Some(interim);
        self
    }

    /// Sends a 1xx head to whoever sent this body, if that is possible.
    pub fn interim(&self) -> Option<&Rc<dyn Interim>> {
        self.interim.as_ref()
    }

    /// Lets an observer see each frame and the end. An empty body ends when it is polled or
    /// dropped, and is then complete.
    #[must_use]
    pub fn observed(mut self, observer: impl Observer + 'static) -> Self {
        let interim = self.interim.take();
        let observed = Observed { body: self, observer: Some(observer) };
        Self { inner: Inner::Source(Box::new(observed)), interim }
    }

    /// The next frame; `None` at the end, and ever after.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match std::mem::take(&mut self.inner) {
            Inner::Empty => Poll::Ready(None),
            Inner::Full(content) => Poll::Ready(Some(Ok(Frame::Data(content)))),
            Inner::Source(mut source) => {
                let polled = source.poll_frame(cx);
                // A source that has ended is dropped: it may hold a connection.
                let over = match &polled {
                    Poll::Ready(None | Some(Err(_) | Ok(Frame::Trailers(_)))) => true,
                    Poll::Ready(Some(Ok(Frame::Data(_)))) => source.is_end(),
                    Poll::Pending => false,
                };
                if !over {
                    self.inner = Inner::Source(source);
                }
                polled
            }
        }
    }

    /// The next frame.
    pub async fn frame(&mut self) -> Option<Result<Frame, BodyError>> {
        poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// How much content remains.
    pub fn length(&self) -> Length {
        match &self.inner {
            Inner::Empty => Length::Exact(0),
            Inner::Full(content) => Length::Exact(content.len() as u64),
            Inner::Source(source) => source.length(),
        }
    }

    /// Whether it is certain that no frame follows.
    pub fn is_end(&self) -> bool {
        match &self.inner {
            Inner::Empty => true,
            Inner::Full(_) => false,
            Inner::Source(source) => source.is_end(),
        }
    }
}

/// A body that was taken in part, whole again.
struct Again {
    taken: std::vec::IntoIter<Frame>,
    rest: Body,
}

impl Source for Again {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match self.taken.next() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => self.rest.poll_frame(cx),
        }
    }

    fn length(&self) -> Length {
        let taken = self.taken.as_slice().iter().map(|frame| match frame {
            Frame::Data(data) => data.len() as u64,
            Frame::Trailers(_) => 0,
        });
        match self.rest.length() {
            Length::Exact(rest) => Length::Exact(rest + taken.sum::<u64>()),
            Length::Unknown => Length::Unknown,
        }
    }

    fn is_end(&self) -> bool {
        self.taken.as_slice().is_empty() && self.rest.is_end()
    }
}

struct Observed<O: Observer> {
    body: Body,
    observer: Option<O>,
}

impl<O: Observer> Source for Observed<O> {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let Poll::Ready(next) = self.body.poll_frame(cx) else { return Poll::Pending };
        if let (Some(Ok(frame)), Some(observer)) = (&next, &mut self.observer) {
            observer.frame(frame);
        }
        let end = match &next {
            None => Some(End::Complete),
            Some(Err(error)) => Some(End::Failed(error)),
            Some(Ok(_)) if self.body.is_end() => Some(End::Complete),
            Some(Ok(_)) => None,
        };
        if let Some(end) = end
            && let Some(mut observer) = self.observer.take()
        {
            observer.ended(end);
        }
        Poll::Ready(next)
    }

    fn length(&self) -> Length {
        self.body.length()
    }

    fn is_end(&self) -> bool {
        self.body.is_end()
    }
}

impl<O: Observer> Drop for Observed<O> {
    fn drop(&mut self) {
        if let Some(mut observer) = self.observer.take() {
            observer.ended(if self.body.is_end() { End::Complete } else { End::Dropped });
        }
    }
}

impl Reset {
    /// Nothing is wrong.
    pub const NO_ERROR: Self = Self(0);
    /// The peer broke the protocol.
    pub const PROTOCOL_ERROR: Self = Self(1);
    /// Something broke on the sender's side.
    pub const INTERNAL_ERROR: Self = Self(2);
    /// The stream was refused before any processing: safe to send again.
    pub const REFUSED_STREAM: Self = Self(7);
    /// Nobody needs the stream any more.
    pub const CANCEL: Self = Self(8);
}

impl BodyError {
    /// How to tell an HTTP/2 peer.
    pub fn reset(&self) -> Reset {
        match self {
            Self::Closed | Self::Io(_) => Reset::CANCEL,
            Self::Malformed(_) | Self::WrongLength { .. } => Reset::PROTOCOL_ERROR,
            Self::Reset(code) => *code,
        }
    }
}

impl fmt::Display for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", h2::Reason::from(self.0))
    }
}

impl fmt::Debug for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reset({self})")
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("length", &self.length()).finish_non_exhaustive()
    }
}

impl From<Bytes> for Body {
    fn from(content: Bytes) -> Self {
        Self::full(content)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Rc<RefCell<Vec<String>>>);

    impl Observer for Log {
        fn frame(&mut self, frame: &Frame) {
            if let Frame::Data(data) = frame {
                self.0.borrow_mut().push(format!("{} bytes", data.len()));
            }
        }

        fn ended(&mut self, end: End<'_>) {
            self.0.borrow_mut().push(format!("{end:?}"));
        }
    }

    fn poll(body: &mut Body) -> Poll<Option<Result<Frame, BodyError>>> {
        body.poll_frame(&mut Context::from_waker(std::task::Waker::noop()))
    }

    struct Broken;

    impl Source for Broken {
        fn poll_frame(&mut self, _: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
            Poll::Ready(Some(Err(BodyError::Closed)))
        }

        fn length(&self) -> Length {
            Length::Unknown
        }
    }

    #[test]
    fn an_observer_hears_of_the_end_once_and_with_the_last_frame() {
        let log = Log::default();
        let mut body = Body::full("abc").observed(log.clone());
        assert_eq!(body.length(), Length::Exact(3));
        assert!(matches!(poll(&mut body), Poll::Ready(Some(Ok(Frame::Data(_))))));
        assert!(matches!(poll(&mut body), Poll::Ready(None)));
        drop(body);
        assert_eq!(*log.0.borrow(), ["3 bytes", "Complete"]);
    }

    #[test]
    fn an_observer_tells_a_dropped_body_from_a_broken_and_an_empty_one() {
        let log = Log::default();
        drop(Body::full("abc").observed(log.clone()));
        let mut broken = Body::from_source(Broken).observed(log.clone());
        assert!(matches!(poll(&mut broken), Poll::Ready(Some(Err(_)))));
        assert!(matches!(poll(&mut broken), Poll::Ready(None)));
        drop(Body::empty().observed(log.clone()));
        assert_eq!(*log.0.borrow(), ["Dropped", "Failed(Closed)", "Complete"]);
    }
}
