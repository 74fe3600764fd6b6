//! Our HTTP/2 client and server against each other, and against a peer that misbehaves.

use std::cell::{Cell, RefCell};
use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, Version};
use steadfast_proxy::http::http2::{
    self, CONNECTION_WINDOW_BYTES, Client, ConnectError, Driver, STREAM_WINDOW_BYTES,
};
use steadfast_proxy::http::{
    Body, BodyError, Budget, Frame, GrpcStatus, Peer, ProxyError, Reset, SendError, SendErrorKind,
    ServeError, Shape, Worker, abort,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

use super::support::{
    By, Zeros, channel, collect, data, echo, go, on_paused_worker, on_worker, on_worker_with,
    settle, text,
};

type Served = JoinHandle<Result<(), ServeError>>;
type Driven = JoinHandle<Result<(), ServeError>>;

async fn start<F>(worker: &Worker, answer: F) -> (Client, Driven, Served)
where
    F: AsyncFn(Request<Body>) -> Response<Body> + 'static,
{
    start_until(worker, answer, pending()).await
}

async fn start_until<F>(
    worker: &Worker,
    answer: F,
    close: impl Future<Output = ()> + 'static,
) -> (Client, Driven, Served)
where
    F: AsyncFn(Request<Body>) -> Response<Body> + 'static,
{
    let (client, server) = duplex(64 * 1024);
    let served = go({
        let worker = worker.clone();
        async move { http2::serve(server, &By(answer), &worker, Peer::Mesh, close).await }
    });
    let (client, driver) = http2::connect(client, worker, Peer::Mesh).await.unwrap();
    (client, go(driver), served)
}

fn get(path: &str) -> Request<Body> {
    Request::builder().uri(format!("http://web{path}")).body(Body::empty()).unwrap()
}

fn post(body: Body) -> Request<Body> {
    get("/").map(|_| body)
}

fn fields(name: &'static str, value: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(name.parse().unwrap(), HeaderValue::from_static(value))])
}

/// Whether nobody acted upon a request, which is still whole.
fn may_retry(error: &SendError) -> bool {
    matches!(error.kind, SendErrorKind::NotProcessed(_)) && error.request.is_some()
}

#[test]
fn many_exchanges_share_a_connection() {
    on_worker(async |worker| {
        let (client, driven, served) = start(&worker, async |request: Request<Body>| {
            assert_eq!(request.version(), Version::HTTP_2);
            echo(request).await
        })
        .await;
        let exchanges = (0..500).map(|number| {
            let client = client.clone();
            go(async move {
                let body = Body::full(format!("{number}"));
                let response = client.send(post(body)).await.unwrap();
                assert_eq!(text(response.into_body()).await, format!("{number}"));
            })
        });
        for exchange in exchanges.collect::<Vec<_>>() {
            exchange.await.unwrap();
        }
        assert_eq!(client.streams(), 0);
        assert!(client.has_room() && !client.is_closed());
        drop(client);
        driven.await.unwrap().unwrap();
        served.await.unwrap().unwrap();
    });
}

#[test]
fn grpc_streams_both_ways_and_ends_with_trailers() {
    on_worker(async |worker| {
        let (client, ..) = start(&worker, async |request: Request<Body>| {
            assert_eq!(request.headers()["te"], "trailers");
            let (sender, body) = channel();
            go(async move {
                let mut asked = request.into_body();
                while let Some(frame) = asked.frame().await {
                    sender.send(frame).unwrap();
                }
                sender.send(Ok(Frame::Trailers(fields("grpc-status", "0")))).unwrap();
            });
            Response::new(body)
        })
        .await;
        let (sender, body) = channel();
        let mut request = post(body);
        request.headers_mut().insert("te", HeaderValue::from_static("trailers"));
        // The answer begins before the request has sent anything.
        let mut answer = client.send(request).await.unwrap().into_body();
        for _ in 0..3 {
            sender.send(Ok(data("ping"))).unwrap();
            assert_eq!(answer.frame().await.unwrap().unwrap(), data("ping"));
        }
        drop(sender);
        let trailers = answer.frame().await.unwrap().unwrap();
        assert_eq!(trailers, Frame::Trailers(fields("grpc-status", "0")));
        assert!(answer.frame().await.is_none());
    });
}

#[test]
fn an_error_for_grpc_is_a_head_alone() {
    on_worker(async |worker| {
        let (client, ..) = start(&worker, async |request: Request<Body>| {
            ProxyError::new(http::StatusCode::BAD_GATEWAY, GrpcStatus::Unavailable, "gone")
                .closing()
                .render(Shape::of(&request))
        })
        .await;
        let mut request = get("/");
        let content_type = HeaderValue::from_static("application/grpc");
        request.headers_mut().insert("content-type", content_type);
        let response = client.send(request).await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(response.body().is_end());
        assert_eq!(response.headers()["grpc-status"], "14");
    });
}

#[test]
fn interim_heads_pass() {
    on_worker(async |worker| {
        let (client, ..) = start(&worker, async |request: Request<Body>| {
            let go_on = Response::builder().status(100).body(()).unwrap();
            request.body().interim().unwrap().send(go_on);
            settle().await;
            echo(request).await
        })
        .await;
        struct Heads(Rc<Cell<u16>>);
        impl steadfast_proxy::http::Interim for Heads {
            fn send(&self, head: Response<()>) {
                self.0.set(head.status().as_u16());
            }
        }
        let seen = Rc::new(Cell::new(0));
        let request = post(Body::full("x").with_interim(Rc::new(Heads(seen.clone()))));
        let response = client.send(request).await.unwrap();
        assert_eq!(text(response.into_body()).await, "x");
        assert_eq!(seen.get(), 100);
    });
}

#[test]
fn cancelling_reaches_the_other_end() {
    on_worker(async |worker| {
        let observed = Rc::new(RefCell::new(Vec::new()));
        let (client, ..) = start(&worker, {
            let observed = observed.clone();
            async move |request: Request<Body>| {
                let (sender, body) = channel();
                let observed = observed.clone();
                go(async move {
                    let error = collect(request.into_body()).await.unwrap_err();
                    observed.borrow_mut().push(format!("{error:?}"));
                    sender.closed().await;
                    observed.borrow_mut().push("the answer was dropped".to_owned());
                });
                Response::new(body)
            }
        })
        .await;
        let (sender, body) = channel();
        let response = client.send(post(body)).await.unwrap();
        assert_eq!(client.streams(), 1);
        drop(response);
        sender.closed().await;
        while observed.borrow().len() < 2 {
            settle().await;
        }
        assert_eq!(
            *observed.borrow(),
            ["Reset(Reset(stream no longer needed))", "the answer was dropped"]
        );
        assert_eq!(client.streams(), 0);

        // The same before there is an answer.
        let (client, ..) = start(&worker, async |_| pending().await).await;
        let waiting = go({
            let client = client.clone();
            async move { client.send(get("/")).await }
        });
        settle().await;
        waiting.abort();
        settle().await;
        assert_eq!(client.streams(), 0);
    });
}

#[test]
fn resets_pass_with_their_code() {
    on_worker(async |worker| {
        let (client, ..) =
            start(&worker, async |request: Request<Body>| match request.uri().path() {
                "/abort" => abort(Reset::INTERNAL_ERROR),
                "/refuse" => abort(Reset::REFUSED_STREAM),
                _ => {
                    let (sender, body) = channel();
                    go(async move {
                        sender.send(Ok(data("part"))).unwrap();
                        settle().await;
                        sender.send(Err(BodyError::Reset(Reset(11)))).unwrap();
                    });
                    Response::new(body)
                }
            })
            .await;
        let error = client.send(get("/abort")).await.unwrap_err();
        assert!(matches!(error.kind, SendErrorKind::Reset(Reset::INTERNAL_ERROR)), "{error:?}");
        assert!(!may_retry(&error));
        let error = client.send(get("/refuse")).await.unwrap_err();
        assert!(may_retry(&error), "{error:?}");
        assert_eq!(error.request.unwrap().uri(), "http://web/refuse");
        let response = client.send(get("/")).await.unwrap();
        let error = collect(response.into_body()).await.unwrap_err();
        assert!(matches!(error, BodyError::Reset(Reset(11))), "{error:?}");
    });
}

#[test]
fn the_wish_to_close_lets_every_exchange_end() {
    on_worker(async |worker| {
        let (close, closed) = oneshot::channel::<()>();
        let (sender, body) = channel();
        let body = Cell::new(Some(body));
        let (client, driven, served) =
            start_until(&worker, async move |_| Response::new(body.take().unwrap()), async move {
                drop(closed.await)
            })
            .await;
        let mut answer = client.send(get("/")).await.unwrap().into_body();
        close.send(()).unwrap();
        settle().await;
        assert!(client.is_closed());
        let error = client.send(get("/again")).await.unwrap_err();
        assert!(may_retry(&error), "{error:?}");
        sender.send(Ok(data("late"))).unwrap();
        drop(sender);
        assert_eq!(answer.frame().await.unwrap().unwrap(), data("late"));
        let end = answer.frame().await;
        assert!(end.is_none(), "{end:?}");
        served.await.unwrap().unwrap();
        driven.await.unwrap().unwrap();
    });
}

#[test]
fn unread_content_is_bounded_by_the_windows() {
    for (budget, window) in [(Budget::default(), STREAM_WINDOW_BYTES), (Budget::new(0), 16 * 1024)]
    {
        on_worker_with(budget, async |worker| {
            let taken = Rc::new(Cell::new(0));
            let (client, ..) = start(&worker, {
                let taken = taken.clone();
                async move |_| {
                    let zeros =
                        Zeros { frame: 16 * 1024, left: 100 * 1024 * 1024, taken: taken.clone() };
                    Response::new(Body::from_source(zeros))
                }
            })
            .await;
            let mut answer = client.send(get("/")).await.unwrap().into_body();
            let (mut read, mut most) = (0, 0);
            while let Some(frame) = answer.frame().await {
                let Frame::Data(data) = frame.unwrap() else { panic!("trailers") };
                read += data.len() as u64;
                if read % (10 * 1024 * 1024) < 16 * 1024 {
                    settle().await;
                    most = most.max(taken.get() - read);
                }
            }
            assert_eq!(read, 100 * 1024 * 1024);
            // Beside the window, what the sender and the pipe hold.
            assert!(most <= u64::from(window) + 256 * 1024, "{most} bytes ahead");
        });
    }
}

#[test]
fn a_connection_takes_its_windows_from_the_budget() {
    let budget = Budget::new(u64::from(CONNECTION_WINDOW_BYTES) * 2);
    on_worker_with(budget.clone(), async |worker| {
        let (client, driven, served) = start(&worker, echo).await;
        assert_eq!(budget.left(), 0);
        let response = client.send(post(Body::full("x"))).await.unwrap();
        assert_eq!(text(response.into_body()).await, "x");
        drop(client);
        served.await.unwrap().unwrap();
        driven.await.unwrap().unwrap();
        assert_eq!(budget.left(), u64::from(CONNECTION_WINDOW_BYTES) * 2);
    });
}

#[test]
fn a_silent_sidecar_is_found_out() {
    on_paused_worker(async |worker| {
        // A peer that sends its SETTINGS and then nothing.
        let (client, mut peer) = duplex(64 * 1024);
        peer.write_all(b"\0\0\0\x04\0\0\0\0\0").await.unwrap();
        let (_client, driver) = http2::connect(client, &worker, Peer::Mesh).await.unwrap();
        assert!(matches!(driver.await, Err(ServeError::PeerGone)));

        let (mut peer, server) = duplex(64 * 1024);
        peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        let served = http2::serve(server, &By(echo), &worker, Peer::Mesh, pending()).await;
        assert!(matches!(served, Err(ServeError::PeerGone)));
    });
}

#[test]
fn an_application_gets_no_ping() {
    on_paused_worker(async |worker| {
        let (client, mut peer) = duplex(64 * 1024);
        peer.write_all(b"\0\0\0\x04\0\0\0\0\0").await.unwrap();
        let (_client, driver) = http2::connect(client, &worker, Peer::Application).await.unwrap();
        let driven = go(driver);
        let mut sent = Vec::new();
        let hour = Duration::from_secs(3600);
        assert!(tokio::time::timeout(hour, peer.read_to_end(&mut sent)).await.is_err());
        let mut frames = &sent[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len()..];
        while let [a, b, c, kind, ..] = frames {
            assert_ne!(*kind, 6, "PING");
            frames = &frames[9 + usize::from_be_bytes([0, 0, 0, 0, 0, *a, *b, *c])..];
        }
        assert!(!driven.is_finished());
    });
}

#[test]
fn a_connection_is_of_use_once_its_peer_has_spoken() {
    on_paused_worker(async |worker| {
        let connect = async |peer: DuplexStream, io: DuplexStream| -> ConnectError {
            let connected: Result<(Client, Driver<_>), _> =
                http2::connect(io, &worker, Peer::Mesh).await;
            drop(peer);
            connected.err().expect("there is no connection")
        };
        let (io, peer) = duplex(1024);
        assert!(matches!(connect(peer, io).await, ConnectError::Timeout));

        let (io, peer) = duplex(1024);
        drop(peer);
        let (unused, _) = duplex(1);
        assert!(matches!(connect(unused, io).await, ConnectError::Io(_)));

        let (io, mut peer) = duplex(1024);
        peer.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        assert!(matches!(connect(peer, io).await, ConnectError::Protocol(_)));
    });
}

#[test]
fn the_error_of_the_stream_of_bytes_survives_h2() {
    struct Refused;
    impl tokio::io::AsyncRead for Refused {
        fn poll_read(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Err(std::io::Error::other("alert: unknown CA")))
        }
    }
    impl tokio::io::AsyncWrite for Refused {
        fn poll_write(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            bytes: &[u8],
        ) -> std::task::Poll<std::io::Result<usize>> {
            std::task::Poll::Ready(Ok(bytes.len()))
        }
        fn poll_flush(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Ok(()))
        }
        fn poll_shutdown(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Ok(()))
        }
    }
    on_worker(async |worker| {
        let error = http2::connect(Refused, &worker, Peer::Mesh).await.err().unwrap();
        let ConnectError::Io(error) = error else { panic!("{error:?}") };
        assert_eq!(error.to_string(), "alert: unknown CA");
        let served = http2::serve(Refused, &By(echo), &worker, Peer::Mesh, pending()).await;
        let Err(ServeError::Io(error)) = served else { panic!("{served:?}") };
        assert_eq!(error.to_string(), "alert: unknown CA");
    });
}

#[test]
fn a_request_without_an_authority_has_none_at_the_other_end() {
    on_worker(async |worker| {
        let (client, ..) = start(&worker, async |request: Request<Body>| {
            Response::new(Body::full(request.uri().to_string()))
        })
        .await;
        let request = Request::builder().uri("/old").body(Body::empty()).unwrap();
        let response = client.send(request).await.unwrap();
        assert_eq!(text(response.into_body()).await, "/old");
        let request = Request::builder().uri("http://web/a?b").body(Body::full(Bytes::new()));
        let response = client.send(request.unwrap()).await.unwrap();
        assert_eq!(text(response.into_body()).await, "http://web/a?b");
    });
}

#[test]
fn a_small_request_that_was_sent_and_not_processed_is_whole_again() {
    // Also where other connections have taken all that windows may be.
    on_worker_with(Budget::new(0), async |worker| {
        for (bytes, whole) in [(5, true), (60_000, true), (70_000, false)] {
            let (client, mut server) = duplex(256 * 1024);
            go(async move {
                server.write_all(&SETTINGS).await.unwrap();
                let mut seen = Vec::new();
                while seen.iter().filter(|byte| **byte == b'x').count() < bytes {
                    server.read_buf(&mut seen).await.unwrap();
                }
                // It has taken no stream at all.
                server.write_all(&GO_AWAY).await.unwrap();
                server.read_to_end(&mut seen).await.unwrap();
            });
            let (client, driver) = http2::connect(client, &worker, Peer::Mesh).await.unwrap();
            go(driver);
            let content = "x".repeat(bytes);
            let error = client.send(post(Body::full(content.clone()))).await.unwrap_err();
            assert!(matches!(error.kind, SendErrorKind::NotProcessed(_)), "{:?}", error.kind);
            let again = error.request.map(|request| request.into_body());
            assert_eq!(again.is_some(), whole, "{bytes} bytes");
            if let Some(body) = again {
                assert_eq!(text(body).await, content);
            }
        }
    });
}

#[test]
fn content_is_kept_within_the_budget_until_its_answer_begins_and_never_of_an_answer() {
    on_worker(async |worker| {
        let (events, watched) = channel();
        let (kept, watched) = (Rc::new(Cell::new(0)), Cell::new(Some(watched)));
        let budget = worker.kept().clone();
        let (client, ..) = start(&worker, {
            let (kept, budget) = (kept.clone(), budget.clone());
            async move |request: Request<Body>| {
                text(request.into_body()).await;
                kept.set(budget.left());
                Response::new(watched.take().unwrap())
            }
        })
        .await;
        let left = budget.left();
        let response = client.send(post(Body::full("x".repeat(1000)))).await.unwrap();
        assert_eq!(kept.get(), left - 1000, "nobody has answered yet");
        // A watch: its stream stays open, and nothing of it is ever sent again.
        let mut answer = response.into_body();
        events.send(Ok(data("an event"))).unwrap();
        answer.frame().await.unwrap().unwrap();
        assert_eq!(budget.left(), left);
    });
}

#[test]
fn content_that_there_is_no_room_to_keep_is_sent_and_not_kept() {
    on_worker(async |worker| {
        let (client, ..) = start(&worker, echo).await;
        let hold = worker.kept().reserve(worker.kept().left() - 10).unwrap();
        let response = client.send(post(Body::full("x".repeat(1000)))).await.unwrap();
        assert_eq!(text(response.into_body()).await.len(), 1000);
        drop(hold);
    });
}

/// A SETTINGS frame that lets windows be as large as they can, and one that lets the connection send.
const SETTINGS: [u8; 28] = [
    0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0x7f, 0xff, 0xff, 0xff, // SETTINGS_INITIAL_WINDOW_SIZE
    0, 0, 4, 8, 0, 0, 0, 0, 0, 0x7f, 0xff, 0, 0, // WINDOW_UPDATE
];
/// Its last stream is 0, its reason NO_ERROR.
const GO_AWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A sender that goes to another connection where one takes no more requests, as a pool does.
async fn send_on(
    client: &RefCell<Option<Client>>,
    worker: &Worker,
    to: std::net::SocketAddr,
    mut request: Request<Body>,
) -> Result<Response<Body>, SendError> {
    loop {
        let current = client.borrow().clone().filter(|client| !client.is_closed());
        let current = match current {
            Some(current) => current,
            None => {
                let io = tokio::net::TcpStream::connect(to).await.unwrap();
                let (fresh, driver) = http2::connect(io, worker, Peer::Mesh).await.unwrap();
                go(driver);
                client.replace(Some(fresh.clone()));
                fresh
            }
        };
        match current.send(request).await {
            Err(error) if may_retry(&error) => request = *error.request.unwrap(),
            result => return result,
        }
    }
}

#[test]
fn a_server_that_tells_its_clients_to_go_at_any_moment_loses_no_request() {
    on_worker(async |worker| {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (server, served) = (worker.clone(), Rc::new(Cell::new(0_u64)));
        let count = served.clone();
        go(async move {
            loop {
                let (io, _) = listener.accept().await.unwrap();
                let (worker, number) = (server.clone(), count.replace(count.get() + 1));
                go(async move {
                    // Each after another number of requests.
                    let (left, over) = (Cell::new(1 + number * 7 % 23), Notify::new());
                    let answer = async |request: Request<Body>| {
                        left.set(left.get().saturating_sub(1));
                        if left.get() == 0 {
                            over.notify_one();
                        }
                        echo(request).await
                    };
                    let close = over.notified();
                    http2::serve(io, &By(answer), &worker, Peer::Mesh, close).await.unwrap();
                });
            }
        });
        let client = Rc::new(RefCell::new(None));
        let senders = (0..8).map(|sender| {
            let (client, worker) = (client.clone(), worker.clone());
            go(async move {
                for number in 0..150 {
                    let text_sent = format!("{sender}: {number}");
                    let request = post(Body::full(text_sent.clone()));
                    let answer = send_on(&client, &worker, addr, request).await.unwrap();
                    assert_eq!(text(answer.into_body()).await, text_sent);
                }
            })
        });
        for sender in senders.collect::<Vec<_>>() {
            sender.await.unwrap();
        }
        assert!(served.get() > 20, "{} connections", served.get());
    });
}
