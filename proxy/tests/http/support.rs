//! Runs a test as a worker would, and makes exchanges out of closures.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, Response};
use steadfast_proxy::http::{Body, BodyError, Budget, Exchange, Frame, Length, Source, Worker};
use steadfast_proxy::tasks::Tasks;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::{LocalSet, spawn_local};

/// Runs a test on a worker of its own, with a deadline.
pub(crate) fn on_worker<T>(test: impl AsyncFnOnce(Worker) -> T) -> T {
    on_worker_with(Budget::default(), test)
}

pub(crate) fn on_worker_with<T>(budget: Budget, test: impl AsyncFnOnce(Worker) -> T) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    run(runtime.enable_all().build().unwrap(), budget, Duration::from_secs(60), test)
}

/// The same with a clock that jumps to the next timer when nothing else can run.
pub(crate) fn on_paused_worker<T>(test: impl AsyncFnOnce(Worker) -> T) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
    run(runtime, Budget::default(), Duration::from_secs(24 * 3600), test)
}

fn run<T>(
    runtime: tokio::runtime::Runtime,
    budget: Budget,
    deadline: Duration,
    test: impl AsyncFnOnce(Worker) -> T,
) -> T {
    LocalSet::new().block_on(&runtime, async {
        let worker = Worker::new(Tasks::default(), budget);
        tokio::time::timeout(deadline, test(worker)).await.expect("the test ends in time")
    })
}

/// What clippy bans in the product is how a test plays its peers.
#[allow(clippy::disallowed_methods)]
pub(crate) fn go<T: 'static>(
    future: impl Future<Output = T> + 'static,
) -> tokio::task::JoinHandle<T> {
    spawn_local(future)
}

/// An exchange that a closure answers.
pub(crate) struct By<F>(pub(crate) F);

impl<F: AsyncFn(Request<Body>) -> Response<Body>> Exchange for By<F> {
    fn exchange(&self, request: Request<Body>) -> impl Future<Output = Response<Body>> {
        (self.0)(request)
    }
}

/// Answers with the request's own body.
pub(crate) async fn echo(request: Request<Body>) -> Response<Body> {
    Response::new(request.into_body())
}

/// All of a body.
pub(crate) async fn collect(mut body: Body) -> Result<(Bytes, Option<HeaderMap>), BodyError> {
    let (mut data, mut trailers) = (BytesMut::new(), None);
    while let Some(frame) = body.frame().await.transpose()? {
        match frame {
            Frame::Data(piece) => data.extend_from_slice(&piece),
            Frame::Trailers(map) => trailers = Some(map),
        }
    }
    Ok((data.freeze(), trailers))
}

pub(crate) async fn text(body: Body) -> String {
    String::from_utf8(collect(body).await.unwrap().0.to_vec()).unwrap()
}

/// A body of frames that arrive through a channel.
pub(crate) struct Channel(
    pub(crate) tokio::sync::mpsc::UnboundedReceiver<Result<Frame, BodyError>>,
);

impl Source for Channel {
    fn poll_frame(
        &mut self,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame, BodyError>>> {
        self.0.poll_recv(cx)
    }

    fn length(&self) -> Length {
        Length::Unknown
    }
}

pub(crate) fn channel() -> (tokio::sync::mpsc::UnboundedSender<Result<Frame, BodyError>>, Body) {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    (sender, Body::from_source(Channel(receiver)))
}

pub(crate) fn data(text: &'static str) -> Frame {
    Frame::Data(Bytes::from_static(text.as_bytes()))
}

/// A body of zeros, made as it is polled, in frames of this size.
pub(crate) struct Zeros {
    pub(crate) frame: u64,
    pub(crate) left: u64,
    pub(crate) taken: std::rc::Rc<std::cell::Cell<u64>>,
}

impl Source for Zeros {
    fn poll_frame(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame, BodyError>>> {
        static ZEROS: [u8; 16 * 1024] = [0; 16 * 1024];
        let piece = self.left.min(self.frame).min(ZEROS.len() as u64);
        self.left -= piece;
        self.taken.set(self.taken.get() + piece);
        std::task::Poll::Ready(match piece {
            0 => None,
            _ => Some(Ok(Frame::Data(Bytes::from_static(&ZEROS[..piece as usize])))),
        })
    }

    fn length(&self) -> Length {
        Length::Exact(self.left)
    }
}

/// Reads until what was read ends with `end`.
pub(crate) async fn read_until(io: &mut DuplexStream, end: &str) -> String {
    let mut read = Vec::new();
    while !read.ends_with(end.as_bytes()) {
        let mut byte = [0];
        let count = io.read(&mut byte).await.unwrap();
        assert!(count > 0, "closed after {:?}", String::from_utf8_lossy(&read));
        read.push(byte[0]);
    }
    String::from_utf8(read).unwrap()
}

pub(crate) async fn read_to_end(io: &mut DuplexStream) -> String {
    let mut read = Vec::new();
    io.read_to_end(&mut read).await.unwrap();
    String::from_utf8(read).unwrap()
}

pub(crate) async fn write(io: &mut DuplexStream, bytes: impl AsRef<[u8]>) {
    io.write_all(bytes.as_ref()).await.unwrap();
}

/// Lets every task run until none can.
pub(crate) async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}
