//! CONNECT: a connection to a server in the shape of an exchange.
//!
//! After a 2xx to CONNECT the two bodies of the exchange are the two directions of the tunnel: what
//! the client sends is pumped into the server, what the server sends is the body of the response,
//! and the end of either is passed on as a half-close.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::Response;
use tokio::io::{AsyncRead, AsyncWriteExt as _, ReadBuf, ReadHalf, WriteHalf, split};
use tokio::task::AbortHandle;

use crate::http::{Body, BodyError, Frame, Length, Source, Worker};
use crate::io::BoxIo;

/// Answers CONNECT with a tunnel between the request's body and a server; `broken` is called if
/// the server's side breaks, with whether it had sent anything.
pub fn tunnel(
    server: BoxIo,
    upload: Body,
    worker: &Worker,
    broken: impl FnOnce(bool, &io::Error) + 'static,
) -> Response<Body> {
    let (reader, writer) = split(server);
    let pump = worker.tasks().spawn_counted(async move {
        // A server that is gone is told of by the other direction, which reads from it.
        let _ = pump(upload, writer).await;
    });
    let broken = Some(Box::new(broken) as Broken);
    Response::new(Body::from_source(Download { reader, pump: Some(pump), spoke: false, broken }))
}

type Broken = Box<dyn FnOnce(bool, &io::Error)>;

/// What the server sends.
struct Download {
    reader: ReadHalf<BoxIo>,
    /// Ended with the download if that is dropped before its end: nobody is there any more.
    pump: Option<AbortHandle>,
    /// Whether it has sent anything.
    spoke: bool,
    broken: Option<Broken>,
}

impl Source for Download {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        // On the stack: a tunnel that waits holds no buffer.
        let mut bytes = [0; READ_BYTES];
        let mut buf = ReadBuf::new(&mut bytes);
        let read = ready!(Pin::new(&mut self.reader).poll_read(cx, &mut buf));
        Poll::Ready(match read {
            Err(error) => {
                if let Some(broken) = self.broken.take() {
                    broken(self.spoke, &error);
                }
                Some(Err(BodyError::Io(error)))
            }
            Ok(()) if buf.filled().is_empty() => {
                // The other direction goes on.
                self.pump = None;
                None
            }
            Ok(()) => {
                self.spoke = true;
                Some(Ok(Frame::Data(Bytes::copy_from_slice(buf.filled()))))
            }
        })
    }

    fn length(&self) -> Length {
        Length::Unknown
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let Some(pump) = self.pump.take() {
            pump.abort();
        }
    }
}

async fn pump(mut upload: Body, mut writer: WriteHalf<BoxIo>) -> io::Result<()> {
    while let Some(Ok(frame)) = upload.frame().await {
        if let Frame::Data(bytes) = frame {
            writer.write_all(&bytes).await?;
            writer.flush().await?;
        }
    }
    writer.shutdown().await
}

const READ_BYTES: usize = 8 * 1024;
