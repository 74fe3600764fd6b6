//! HTTP/1: heads, chunks, and a whole server connection. What two readers could understand in two
//! ways smuggles requests, so reading in pieces must mean the same as reading at once.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response};
use steadfast_proxy::http::http1::{
    ChunkDecoder, Decoded, Framing, parse_request_head, parse_response_head, serve,
};
use steadfast_proxy::http::{Body, Budget, Exchange, Frame, Worker, needs_own_connection};
use steadfast_proxy::tasks::Tasks;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;

pub(crate) fn head(input: &[u8]) -> bool {
    let mut accepted = false;
    if let Ok(Some(head)) = parse_request_head(input) {
        assert!(head.consumed <= input.len());
        assert!(
            !matches!(head.framing, Framing::Close),
            "a request never ends with its connection"
        );
        // Nothing behind a head has a say in it, and nothing short of it is one.
        let alone = parse_request_head(&input[..head.consumed]).unwrap().unwrap();
        assert_eq!((alone.framing, alone.consumed), (head.framing, head.consumed));
        assert_eq!(alone.head.headers(), head.head.headers());
        let cut = parse_request_head(&input[..head.consumed - 1]);
        assert!(!matches!(cut, Ok(Some(_))), "a head without its last byte");
        accepted = true;
    }
    for method in [Method::GET, Method::HEAD, Method::CONNECT] {
        if let Ok(Some(head)) = parse_response_head(input, &method, false) {
            assert!(head.consumed <= input.len());
            accepted = true;
        }
    }
    accepted
}

pub(crate) fn head_seeds() -> Vec<Vec<u8>> {
    [
        "GET / HTTP/1.1\r\nHost: web.demo\r\n\r\n",
        "POST /a?b HTTP/1.1\r\nHost: a:80\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc",
        "PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: x\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        "CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\n",
        "GET http://a/b HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

pub(crate) fn chunks(input: &[u8]) -> bool {
    let whole = decode(input, input.len().max(1));
    for step in [1, 2, 7] {
        assert_eq!(decode(input, step), whole, "fed by {step}");
    }
    whole.ended
}

pub(crate) fn chunks_seeds() -> Vec<Vec<u8>> {
    [
        "0\r\n\r\n",
        "3\r\nabc\r\nA;name=value\r\n0123456789\r\n0\r\nx-sum: 1\r\n\r\n",
        "ffffffffffffffff\r\nabc",
        "1\nabc",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

#[derive(Debug, PartialEq)]
struct Content {
    data: Vec<u8>,
    trailers: Option<http::HeaderMap>,
    ended: bool,
    failed: bool,
    /// What was not taken, once the content is over.
    behind: Option<usize>,
}

fn decode(input: &[u8], step: usize) -> Content {
    let (mut decoder, mut buffer) = (ChunkDecoder::new(), BytesMut::new());
    let mut content =
        Content { data: Vec::new(), trailers: None, ended: false, failed: false, behind: None };
    let mut taken = 0;
    for piece in input.chunks(step) {
        buffer.extend_from_slice(piece);
        taken += piece.len();
        loop {
            match decoder.decode(&mut buffer) {
                Ok(Decoded::NeedMore) => break,
                Ok(Decoded::Frame(Frame::Data(data))) => content.data.extend_from_slice(&data),
                Ok(Decoded::Frame(Frame::Trailers(trailers))) => {
                    assert!(content.trailers.replace(trailers).is_none());
                }
                Ok(Decoded::End) => {
                    content.ended = true;
                    content.behind = Some(input.len() - taken + buffer.len());
                    return content;
                }
                Err(error) => {
                    // Who reads on finds no end in garbage.
                    assert_eq!(decoder.decode(&mut buffer).unwrap_err(), error);
                    assert!(!decoder.is_done());
                    content.failed = true;
                    return content;
                }
            }
        }
    }
    content
}

/// A whole connection: it ends, whatever the client sends, and answers with HTTP or nothing.
pub(crate) fn server(input: &[u8]) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let worker = Worker::new(Tasks::default(), Budget::default());
    let answered = std::rc::Rc::default();
    let io = Client { input: Bytes::copy_from_slice(input), output: std::rc::Rc::clone(&answered) };
    let local = tokio::task::LocalSet::new();
    let served = serve(io, &Echo, &worker, std::future::pending::<()>());
    let ended = local.block_on(&runtime, async { timeout(END_TIMEOUT, served).await });
    // How it ended does not matter: any end is a good one.
    assert!(ended.is_ok(), "the client has left, and its connection goes on");
    let answered = answered.borrow();
    assert!(answered.is_empty() || answered.starts_with(b"HTTP/1."));
    answered.starts_with(b"HTTP/1.1 200")
}

pub(crate) fn server_seeds() -> Vec<Vec<u8>> {
    let mut seeds = head_seeds();
    let mut pipelined = seeds[0].clone();
    pipelined.extend_from_slice(&seeds[1]);
    pipelined.extend_from_slice(&seeds[2]);
    seeds.push(pipelined);
    seeds
}

/// Answers each request with its own content.
struct Echo;

impl Exchange for Echo {
    async fn exchange(&self, mut request: Request<Body>) -> Response<Body> {
        let mut content = BytesMut::new();
        // The content of a request that asks for a tunnel comes once it is open, so never here.
        if needs_own_connection(&request) {
            return Response::new(Body::empty());
        }
        while let Some(Ok(frame)) = request.body_mut().frame().await {
            if let Frame::Data(data) = frame {
                content.extend_from_slice(&data);
            }
        }
        Response::new(Body::full(content.freeze()))
    }
}

/// A client that sends its input and ends its side.
struct Client {
    input: Bytes,
    output: std::rc::Rc<std::cell::RefCell<Vec<u8>>>,
}

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.input.len().min(buffer.remaining());
        buffer.put_slice(&self.input.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Client {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.output.borrow_mut().extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A connection whose client sends no more ends at once; this is for busy machines.
const END_TIMEOUT: Duration = Duration::from_secs(2);
