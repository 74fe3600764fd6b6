//! Raw bytes against the HTTP/1 server.

use std::cell::{Cell, RefCell};
use std::future::pending;
use std::rc::Rc;

use http::header::{CONTENT_LENGTH, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use proptest::prelude::*;
use steadfast_proxy::http::{
    Body, BodyError, Frame, Reset, ServeError, Worker, abort, http1, needs_own_connection,
};
use tokio::io::{AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::support::{
    By, Zeros, channel, collect, data, echo, go, on_paused_worker, on_worker, read_to_end,
    read_until, settle, text, write,
};

type Served = JoinHandle<Result<(), ServeError>>;

fn start<F>(worker: &Worker, answer: F) -> (DuplexStream, Served)
where
    F: AsyncFn(Request<Body>) -> Response<Body> + 'static,
{
    start_until(worker, answer, pending())
}

fn start_until<F>(
    worker: &Worker,
    answer: F,
    close: impl Future<Output = ()> + 'static,
) -> (DuplexStream, Served)
where
    F: AsyncFn(Request<Body>) -> Response<Body> + 'static,
{
    let (client, server) = duplex(64 * 1024);
    let worker = worker.clone();
    let served = go(async move { http1::serve(server, &By(answer), &worker, close).await });
    (client, served)
}

/// The path, and the content, as content.
async fn describe(request: Request<Body>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let content = text(request.into_body()).await;
    Response::new(Body::full(format!("{path}={content}")))
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    on_worker(async |worker| {
        let (mut client, served) = start(&worker, describe);
        write(
            &mut client,
            "POST /a HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\nhiGET /b HTTP/1.1\r\n\
             host: h\r\n\r\nGET /c HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n",
        )
        .await;
        let expected = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n/a=hi\
                        HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n/b=\
                        HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\n/c=";
        assert_eq!(read_to_end(&mut client).await, expected);
        drop(client);
        served.await.unwrap().unwrap();
    });
}

#[test]
fn a_client_of_http10_is_answered_in_http10() {
    on_worker(async |worker| {
        let (mut client, _served) = start(&worker, echo);
        write(&mut client, "GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n").await;
        let kept = "HTTP/1.0 200 OK\r\ncontent-length: 0\r\nconnection: keep-alive\r\n\r\n";
        assert_eq!(read_until(&mut client, "\r\n\r\n").await, kept);

        let (sender, body) = channel();
        let body = Cell::new(Some(body));
        let (mut client, _served) =
            start(&worker, async move |_| Response::new(body.take().unwrap()));
        sender.send(Ok(data("unknown length"))).unwrap();
        drop(sender);
        write(&mut client, "GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n").await;
        let closed = "HTTP/1.0 200 OK\r\nconnection: close\r\n\r\nunknown length";
        assert_eq!(read_to_end(&mut client).await, closed);
    });
}

#[test]
fn chunks_and_trailers_pass_both_ways() {
    on_worker(async |worker| {
        let (mut client, _served) = start(&worker, echo);
        let body = "3\r\nabc\r\n0\r\nx-sum: 6\r\n\r\n";
        let head = "POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n";
        write(&mut client, format!("{head}{body}")).await;
        let expected = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{body}");
        assert_eq!(read_until(&mut client, "x-sum: 6\r\n\r\n").await, expected);
    });
}

#[test]
fn responses_without_content_have_none() {
    on_worker(async |worker| {
        let (mut client, _served) = start(&worker, async |request: Request<Body>| {
            let status = match request.uri().path() {
                "/204" => StatusCode::NO_CONTENT,
                "/304" => StatusCode::NOT_MODIFIED,
                _ => StatusCode::OK,
            };
            let mut response = Response::new(Body::full("never seen"));
            *response.status_mut() = status;
            response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("10"));
            if request.method() == Method::GET && status.is_success() {
                *response.body_mut() = Body::empty();
            }
            response
        });
        for (request, expected) in [
            ("HEAD /", "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"),
            ("GET /204", "HTTP/1.1 204 No Content\r\n\r\n"),
            ("GET /304", "HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n"),
            ("GET /", "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ] {
            write(&mut client, format!("{request} HTTP/1.1\r\nhost: h\r\n\r\n")).await;
            assert_eq!(read_until(&mut client, "\r\n\r\n").await, expected, "{request}");
        }
    });
}

#[test]
fn a_refused_request_is_answered_closed_and_never_seen() {
    let long = format!("GET / HTTP/1.1\r\nhost: h\r\na: {}\r\n\r\n", "x".repeat(70_000));
    for (request, status) in [
        ("GET / HTTP/1.1\nhost: h\n\n", "400 Bad Request"),
        ("GET / HTTP/1.1\r\n\r\n", "400 Bad Request"),
        (
            "POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n\
             0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: h\r\n\r\n",
            "400 Bad Request",
        ),
        ("GET / HTTP/3.0\r\nhost: h\r\n\r\n", "505 HTTP Version Not Supported"),
        (&long, "431 Request Header Fields Too Large"),
    ] {
        on_worker(async |worker| {
            let (client, served) = start(&worker, async |_| panic!("it was passed on"));
            let (mut read, mut writing) = tokio::io::split(client);
            let request = request.to_owned();
            let writing = async move {
                // The server may have stopped listening.
                let _ = writing.write_all(request.as_bytes()).await;
            };
            go(writing);
            let mut answer = String::new();
            tokio::io::AsyncReadExt::read_to_string(&mut read, &mut answer).await.unwrap();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{answer}");
            assert!(answer.contains("l5d-proxy-error: "), "{answer}");
            assert!(answer.ends_with("connection: close\r\n\r\n"), "{answer}");
            drop(read);
            assert!(matches!(served.await.unwrap(), Err(ServeError::Malformed(_))));
        });
    }
}

#[test]
fn malformed_chunks_break_the_body_and_the_connection() {
    on_worker(async |worker| {
        let seen = Rc::new(RefCell::new(None));
        let (mut client, served) = start(&worker, {
            let seen = seen.clone();
            async move |request: Request<Body>| {
                *seen.borrow_mut() = collect(request.into_body()).await.err();
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::BAD_REQUEST;
                response
            }
        });
        let head = "POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n";
        write(&mut client, format!("{head}zz\r\nGET /smuggled HTTP/1.1\r\nhost: h\r\n\r\n")).await;
        let answer = read_to_end(&mut client).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains("connection: close"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1);
        assert!(matches!(*seen.borrow(), Some(BodyError::Malformed(_))));
        drop(client);
        served.await.unwrap().unwrap();
    });
}

#[test]
fn content_is_asked_for_only_when_the_server_asks() {
    on_worker(async |worker| {
        let (mut client, _served) = start(&worker, async |request: Request<Body>| {
            let go_on = Response::builder().status(100).body(()).unwrap();
            request.body().interim().unwrap().send(go_on);
            describe(request).await
        });
        let head =
            "POST /a HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n";
        for _ in 0..2 {
            write(&mut client, head).await;
            assert_eq!(read_until(&mut client, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
            write(&mut client, "hi").await;
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n/a=hi";
            assert_eq!(read_until(&mut client, "/a=hi").await, answer);
        }
    });
}

#[test]
fn an_answer_instead_of_100_ends_the_connection() {
    on_worker(async |worker| {
        let (mut client, served) = start(&worker, async |_| Response::new(Body::empty()));
        let head =
            "POST / HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n";
        write(&mut client, head).await;
        let answer = read_until(&mut client, "\r\n\r\n").await;
        assert!(answer.contains("connection: close"), "{answer}");
        drop(client);
        served.await.unwrap().unwrap();
    });
}

#[test]
fn content_that_nobody_reads_is_discarded_if_it_is_little() {
    on_worker(async |worker| {
        let (mut client, _served) = start(&worker, async |_| Response::new(Body::empty()));
        write(&mut client, "POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 5\r\n\r\nhello").await;
        write(&mut client, "GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
        for _ in 0..2 {
            let answer = read_until(&mut client, "\r\n\r\n").await;
            assert_eq!(answer, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
        }
        write(&mut client, "POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 9999999\r\n\r\n").await;
        let answer = read_until(&mut client, "\r\n\r\n").await;
        assert!(answer.contains("connection: close"), "{answer}");
    });
}

#[test]
fn a_client_that_goes_away_cancels_its_exchange() {
    on_worker(async |worker| {
        struct Cancelled(Option<oneshot::Sender<()>>);
        impl Drop for Cancelled {
            fn drop(&mut self) {
                self.0.take().unwrap().send(()).unwrap();
            }
        }
        let (sender, cancelled) = oneshot::channel();
        let sender = Cell::new(Some(sender));
        let (mut client, served) = start(&worker, async move |_| {
            let _guard = Cancelled(sender.take());
            pending().await
        });
        write(&mut client, "GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
        settle().await;
        drop(client);
        cancelled.await.unwrap();
        assert!(matches!(served.await.unwrap(), Err(ServeError::ClientGone)));
    });
}

#[test]
fn a_body_outlives_its_connection_as_an_error() {
    on_worker(async |worker| {
        let kept = Rc::new(RefCell::new(None));
        let (mut client, served) = start(&worker, {
            let kept = kept.clone();
            async move |request: Request<Body>| {
                *kept.borrow_mut() = Some(request.into_body());
                pending().await
            }
        });
        write(&mut client, "POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 5\r\n\r\n").await;
        settle().await;
        let body = kept.borrow_mut().take().unwrap();
        let reading = go(collect(body));
        settle().await;
        served.abort();
        assert!(matches!(reading.await.unwrap(), Err(BodyError::Closed)));
    });
}

#[test]
fn the_wish_to_close_ends_an_idle_connection_and_follows_a_response() {
    on_worker(async |worker| {
        let (close, closed) = oneshot::channel::<()>();
        let (mut client, served) = start_until(&worker, echo, async move { drop(closed.await) });
        write(&mut client, "GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
        read_until(&mut client, "\r\n\r\n").await;
        close.send(()).unwrap();
        assert_eq!(read_to_end(&mut client).await, "");
        drop(client);
        served.await.unwrap().unwrap();

        let (close, closed) = oneshot::channel::<()>();
        let (answer, answered) = oneshot::channel::<()>();
        let answered = Cell::new(Some(answered));
        let (mut client, served) = start_until(
            &worker,
            async move |_| {
                answered.take().unwrap().await.unwrap();
                Response::new(Body::full("late"))
            },
            async move { drop(closed.await) },
        );
        write(&mut client, "GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
        settle().await;
        close.send(()).unwrap();
        settle().await;
        answer.send(()).unwrap();
        let expected = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\nlate";
        assert_eq!(read_to_end(&mut client).await, expected);
        drop(client);
        served.await.unwrap().unwrap();
    });
}

#[test]
fn slow_heads_and_idle_connections_run_out_of_time() {
    on_paused_worker(async |worker| {
        let (mut client, served) = start(&worker, echo);
        write(&mut client, "GET / HTTP/1.1\r\nho").await;
        let answer = read_to_end(&mut client).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        drop(client);
        assert!(matches!(served.await.unwrap(), Err(ServeError::HeadTimeout)));

        let (mut client, served) = start(&worker, echo);
        assert_eq!(read_to_end(&mut client).await, "");
        drop(client);
        served.await.unwrap().unwrap();
    });
}

#[test]
fn an_upgrade_becomes_a_tunnel_with_two_ends() {
    on_worker(async |worker| {
        let (sender, body) = channel();
        let body = Cell::new(Some(body));
        let (told, asked) = oneshot::channel();
        let told = Cell::new(Some(told));
        let (mut client, served) = start(&worker, async move |request: Request<Body>| {
            assert!(needs_own_connection(&request));
            told.take().unwrap().send(request.into_body()).ok().unwrap();
            let mut response = Response::new(body.take().unwrap());
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert("upgrade", HeaderValue::from_static("websocket"));
            response
        });
        let head = "GET / HTTP/1.1\r\nhost: h\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
        write(&mut client, format!("{head}early")).await;
        let expected = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\
                        connection: upgrade\r\n\r\n";
        assert_eq!(read_until(&mut client, "\r\n\r\n").await, expected);
        let mut from_client = asked.await.unwrap();
        assert_eq!(from_client.frame().await.unwrap().unwrap(), data("early"));
        write(&mut client, "ping").await;
        assert_eq!(from_client.frame().await.unwrap().unwrap(), data("ping"));
        sender.send(Ok(data("pong"))).unwrap();
        assert_eq!(read_until(&mut client, "pong").await, "pong");
        client.shutdown().await.unwrap();
        assert!(from_client.frame().await.is_none());
        sender.send(Ok(data("bye"))).unwrap();
        drop(sender);
        assert_eq!(read_to_end(&mut client).await, "bye");
        served.await.unwrap().unwrap();
    });
}

#[test]
fn a_refused_connect_leaves_the_connection_as_it_was() {
    on_worker(async |worker| {
        let (mut client, _served) = start(&worker, async |request: Request<Body>| {
            let mut response = Response::new(Body::full("no"));
            if request.method() == Method::CONNECT {
                *response.status_mut() = StatusCode::FORBIDDEN;
                go(async move { assert_eq!(text(request.into_body()).await, "") });
            }
            response
        });
        write(&mut client, "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n").await;
        let answer = read_until(&mut client, "no").await;
        assert_eq!(answer, "HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno");
        write(&mut client, "GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
        assert!(read_until(&mut client, "no").await.starts_with("HTTP/1.1 200 "));
    });
}

#[test]
fn a_broken_answer_is_never_taken_for_a_whole_one() {
    on_worker(async |worker| {
        let (sender, body) = channel();
        let body = Cell::new(Some(body));
        let (mut client, served) =
            start(&worker, async move |_| Response::new(body.take().unwrap()));
        write(&mut client, "GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
        sender.send(Ok(data("part"))).unwrap();
        settle().await;
        sender.send(Err(BodyError::Reset(Reset::CANCEL))).unwrap();
        let answer = read_to_end(&mut client).await;
        assert!(answer.ends_with("4\r\npart\r\n"), "{answer}");
        assert!(matches!(served.await.unwrap(), Err(ServeError::Reset(Reset::CANCEL))));

        let (mut client, served) = start(&worker, async |_| abort(Reset::REFUSED_STREAM));
        write(&mut client, "GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
        assert_eq!(read_to_end(&mut client).await, "");
        assert!(matches!(served.await.unwrap(), Err(ServeError::Reset(_))));
    });
}

#[test]
fn an_answer_is_made_no_faster_than_it_is_read() {
    for (length, frame) in [(100 * 1024 * 1024, 16 * 1024), (4 * 1024 * 1024, 200)] {
        on_worker(async |worker| {
            let taken = Rc::new(Cell::new(0));
            let (mut client, _served) = start(&worker, {
                let taken = taken.clone();
                async move |_| {
                    let zeros = Zeros { frame, left: length, taken: taken.clone() };
                    Response::new(Body::from_source(zeros))
                }
            });
            write(&mut client, "GET / HTTP/1.1\r\nhost: h\r\n\r\n").await;
            read_until(&mut client, "\r\n\r\n").await;
            let (mut read, mut buffer) = (0, vec![0; 64 * 1024]);
            while read < length {
                settle().await;
                assert!(taken.get() - read <= 160 * 1024, "{} ahead", taken.get() - read);
                let count = tokio::io::AsyncReadExt::read(&mut client, &mut buffer).await.unwrap();
                read += count as u64;
            }
            assert_eq!((read, taken.get()), (length, length));
        });
    }
}

#[test]
fn an_idle_connection_is_small() {
    on_worker(async |worker| {
        let (_client, server) = duplex(64);
        let exchange = By(echo);
        let serving = http1::serve(server, &exchange, &worker, pending());
        assert!(size_of_val(&serving) <= 1024, "{} bytes", size_of_val(&serving));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_split_of_pipelined_requests_is_answered_alike(
        kinds in proptest::collection::vec(0u8..4, 1..5),
        cuts in proptest::collection::vec(0usize..600, 0..10),
    ) {
        let wire: String = kinds
            .iter()
            .map(|kind| match kind {
                0 => "GET /a HTTP/1.1\r\nhost: h\r\n\r\n",
                1 => "POST /b HTTP/1.1\r\nhost: h\r\ncontent-length: 5\r\n\r\nhello",
                2 => "POST /c HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n\
                      2\r\nhi\r\n1;x\r\n!\r\n0\r\nt: 1\r\n\r\n",
                _ => "\r\nHEAD /d HTTP/1.1\r\nhost: h\r\n\r\n",
            })
            .collect();
        let answers = |cuts: Vec<usize>| {
            on_worker(async |worker| {
                let (mut client, _served) = start(&worker, describe);
                let mut from = 0;
                for to in cuts {
                    write(&mut client, &wire[from..to]).await;
                    settle().await;
                    from = to;
                }
                write(&mut client, &wire[from..]).await;
                write(&mut client, "GET /end HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await;
                read_to_end(&mut client).await
            })
        };
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(wire.len())).collect();
        cuts.sort_unstable();
        prop_assert_eq!(answers(cuts), answers(Vec::new()));
    }
}

#[test]
fn an_empty_line_before_a_request_may_come_in_pieces() {
    on_worker(async |worker| {
        let (mut client, _served) = start(&worker, describe);
        for piece in ["\r", "\n\r", "\nGET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"] {
            write(&mut client, piece).await;
            settle().await;
        }
        let answer = read_to_end(&mut client).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    });
}

#[test]
fn versions_and_trailers_reach_the_exchange() {
    on_worker(async |worker| {
        let (mut client, _served) = start(&worker, async |request: Request<Body>| {
            assert_eq!(request.version(), Version::HTTP_11);
            let (content, trailers) = collect(request.into_body()).await.unwrap();
            let mut expected = HeaderMap::new();
            expected.insert("x-sum", HeaderValue::from_static("1"));
            assert_eq!((&content[..], trailers), (&b"a"[..], Some(expected.clone())));
            let (sender, body) = channel();
            sender.send(Ok(Frame::Trailers(expected))).unwrap();
            Response::new(body)
        });
        let head = "POST / HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n";
        write(&mut client, format!("{head}1\r\na\r\n0\r\nx-sum: 1\r\n\r\n")).await;
        let answer = read_until(&mut client, "x-sum: 1\r\n\r\n").await;
        assert!(answer.ends_with("\r\n\r\n0\r\nx-sum: 1\r\n\r\n"), "{answer}");
    });
}
