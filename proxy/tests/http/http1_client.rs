//! The HTTP/1 client against raw bytes.

use std::cell::RefCell;
use std::rc::Rc;

use http::header::{CONTENT_LENGTH, HOST};
use http::{Method, Request, Response, StatusCode, Version};
use steadfast_proxy::http::http1::{Connection, HeadError};
use steadfast_proxy::http::{Body, BodyError, Interim, SendErrorKind, Worker};
use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

use super::support::{
    channel, collect, data, go, on_worker, read_to_end, read_until, settle, text, write,
};

/// A pool of one.
type Pool = Rc<RefCell<Option<Connection<DuplexStream>>>>;

fn connect(worker: &Worker) -> (Connection<DuplexStream>, DuplexStream) {
    let (client, server) = duplex(64 * 1024);
    (Connection::new(client, worker), server)
}

fn get(path: &str) -> Request<Body> {
    Request::builder().uri(path).header(HOST, "web").body(Body::empty()).unwrap()
}

fn post(body: Body) -> Request<Body> {
    get("/").map(|_| body)
}

fn back_to(pool: &Pool) -> impl FnOnce(Connection<DuplexStream>) + 'static {
    let pool = pool.clone();
    move |connection| *pool.borrow_mut() = Some(connection)
}

#[test]
fn a_connection_comes_back_when_both_messages_are_through() {
    on_worker(async |worker| {
        let (connection, mut server) = connect(&worker);
        let pool = Pool::default();
        let answering = go(async move {
            let request = read_until(&mut server, "\r\n\r\n").await;
            assert_eq!(request, "GET /a HTTP/1.1\r\nhost: web\r\n\r\n");
            write(&mut server, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
            server
        });
        let response = connection.send(get("/a"), back_to(&pool)).await.unwrap();
        assert!(pool.borrow().is_none());
        assert_eq!(response.version(), Version::HTTP_11);
        assert_eq!(text(response.into_body()).await, "hi");
        let mut connection = pool.borrow_mut().take().unwrap();
        assert!(connection.is_reused() && connection.is_reusable());
        drop(answering.await.unwrap());
        assert!(!connection.is_reusable());
    });
}

#[test]
fn a_connection_that_cannot_be_trusted_does_not_come_back() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi",
        "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi",
        "HTTP/1.1 200 OK\r\n\r\nhi",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\n\r\nunasked",
    ] {
        on_worker(async |worker| {
            let (connection, mut server) = connect(&worker);
            let pool = Pool::default();
            go(async move {
                read_until(&mut server, "\r\n\r\n").await;
                write(&mut server, answer).await;
            });
            let response = connection.send(get("/"), back_to(&pool)).await.unwrap();
            assert_eq!(text(response.into_body()).await, "hi", "{answer}");
            assert!(pool.borrow().is_none(), "{answer}");
            assert_eq!(Rc::strong_count(&pool), 1, "what waits for it is dropped: {answer}");
        });
    }
}

#[test]
fn a_response_that_nobody_reads_closes_its_connection() {
    on_worker(async |worker| {
        let (connection, mut server) = connect(&worker);
        let pool = Pool::default();
        let rest = go(async move {
            read_until(&mut server, "\r\n\r\n").await;
            write(&mut server, "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi").await;
            read_to_end(&mut server).await
        });
        let response = connection.send(get("/"), back_to(&pool)).await.unwrap();
        drop(response);
        assert_eq!(rest.await.unwrap(), "");
        assert!(pool.borrow().is_none());
    });
}

#[test]
fn interim_heads_are_passed_on_and_content_waits_for_nobody_but_its_sender() {
    #[derive(Default)]
    struct Heads(RefCell<Vec<StatusCode>>);
    impl Interim for Heads {
        fn send(&self, head: Response<()>) {
            self.0.borrow_mut().push(head.status());
        }
    }
    on_worker(async |worker| {
        let (connection, mut server) = connect(&worker);
        let (sender, body) = channel();
        let heads = Rc::new(Heads::default());
        let answering = go({
            let heads = heads.clone();
            async move {
                let request = read_until(&mut server, "\r\n\r\n").await;
                assert!(request.contains("transfer-encoding: chunked\r\n"), "{request}");
                write(
                    &mut server,
                    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\
                                    link: </a>\r\n\r\n",
                )
                .await;
                while heads.0.borrow().len() < 2 {
                    settle().await;
                }
                sender.send(Ok(data("hi"))).unwrap();
                drop(sender);
                assert_eq!(read_until(&mut server, "0\r\n\r\n").await, "2\r\nhi\r\n0\r\n\r\n");
                write(&mut server, "HTTP/1.1 204 No Content\r\n\r\n").await;
            }
        });
        let request = post(body.with_interim(heads.clone()));
        let response = connection.send(request, drop).await.unwrap();
        assert_eq!(response.status(), 204);
        assert_eq!(*heads.0.borrow(), [StatusCode::CONTINUE, StatusCode::EARLY_HINTS]);
        answering.await.unwrap();
    });
}

#[test]
fn an_answer_may_begin_and_end_before_the_request_does() {
    on_worker(async |worker| {
        let (connection, mut server) = connect(&worker);
        let (sender, body) = channel();
        let pool = Pool::default();
        let answering = go(async move {
            read_until(&mut server, "\r\n\r\n").await;
            write(&mut server, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
            read_until(&mut server, "0\r\n\r\n").await
        });
        let response = connection.send(post(body), back_to(&pool)).await.unwrap();
        assert_eq!(text(response.into_body()).await, "hi");
        assert!(pool.borrow().is_none());
        sender.send(Ok(data("late"))).unwrap();
        drop(sender);
        assert_eq!(answering.await.unwrap(), "4\r\nlate\r\n0\r\n\r\n");
        settle().await;
        assert!(pool.borrow().is_some());
        worker.tasks().finished().await;
    });
}

#[test]
fn giving_up_an_answer_ends_its_upload() {
    on_worker(async |worker| {
        let (connection, mut server) = connect(&worker);
        let (sender, body) = channel();
        let rest = go(async move {
            read_until(&mut server, "\r\n\r\n").await;
            write(&mut server, "HTTP/1.1 200 OK\r\n\r\nendless").await;
            read_to_end(&mut server).await
        });
        let response = connection.send(post(body), drop).await.unwrap();
        drop(response);
        assert_eq!(rest.await.unwrap(), "");
        sender.closed().await;
    });
}

#[test]
fn a_request_that_got_no_answer_comes_back_if_nothing_of_it_is_lost() {
    on_worker(async |worker| {
        let (connection, server) = connect(&worker);
        drop(server);
        let error = connection.send(get("/a"), drop).await.unwrap_err();
        assert!(matches!(error.kind, SendErrorKind::Closed | SendErrorKind::Io(_)), "{error:?}");
        assert_eq!(error.request.unwrap().uri(), "/a");

        let (connection, mut server) = connect(&worker);
        go(async move {
            read_until(&mut server, "hi").await;
        });
        let error = connection.send(post(Body::full("hi")), drop).await.unwrap_err();
        assert!(matches!(error.kind, SendErrorKind::Closed), "{error:?}");
        assert!(error.request.is_none());
    });
}

#[test]
fn an_answer_that_could_be_read_in_two_ways_is_refused() {
    for (answer, expected) in [
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            HeadError::LengthWithTransferEncoding,
        ),
        ("HTTP/1.1 101 Switching\r\n\r\n", HeadError::SwitchUnasked),
        ("HTTP/1.1 200 OK\r\ncontent-le", HeadError::Syntax("it ends early")),
    ] {
        on_worker(async |worker| {
            let (connection, mut server) = connect(&worker);
            go(async move {
                read_until(&mut server, "\r\n\r\n").await;
                write(&mut server, answer).await;
            });
            let error = connection.send(get("/"), drop).await.unwrap_err();
            let SendErrorKind::Malformed(error) = error.kind else { panic!("{error:?}") };
            assert_eq!(error, expected);
        });
    }
}

#[test]
fn an_answer_that_ends_early_is_an_error() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n",
    ] {
        on_worker(async |worker| {
            let (connection, mut server) = connect(&worker);
            go(async move {
                read_until(&mut server, "\r\n\r\n").await;
                write(&mut server, answer).await;
            });
            let response = connection.send(get("/"), drop).await.unwrap();
            let error = collect(response.into_body()).await.unwrap_err();
            assert!(matches!(error, BodyError::Closed), "{error:?}");
        });
    }
}

#[test]
fn a_body_that_breaks_closes_the_connection_unfinished() {
    on_worker(async |worker| {
        let (connection, mut server) = connect(&worker);
        let (sender, body) = channel();
        sender.send(Ok(data("hi"))).unwrap();
        sender.send(Err(BodyError::Closed)).unwrap();
        let rest = go(async move { read_to_end(&mut server).await });
        let error = connection.send(post(body), drop).await.unwrap_err();
        assert!(matches!(error.kind, SendErrorKind::Body(_)));
        assert!(!rest.await.unwrap().ends_with("0\r\n\r\n"));
    });
}

#[test]
fn an_agreed_tunnel_is_two_bodies() {
    on_worker(async |worker| {
        for (request, head, agreement) in [
            (
                Request::builder().uri("/").header(HOST, "h").header("upgrade", "websocket"),
                "GET / HTTP/1.1\r\nhost: h\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
                "HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
            ),
            (
                Request::builder().method(Method::CONNECT).uri("a:1").header(HOST, "a:1"),
                "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n",
                "HTTP/1.1 200 OK\r\n\r\n",
            ),
        ] {
            let (connection, mut server) = connect(&worker);
            let (sender, body) = channel();
            sender.send(Ok(data("ping"))).unwrap();
            let answering = go(async move {
                assert_eq!(read_until(&mut server, "\r\n\r\n").await, head);
                settle().await;
                write(&mut server, format!("{agreement}hello")).await;
                assert_eq!(read_until(&mut server, "ping").await, "ping");
                server.shutdown().await.unwrap();
                read_to_end(&mut server).await
            });
            let response = connection.send(request.body(body).unwrap(), drop).await.unwrap();
            assert_eq!(text(response.into_body()).await, "hello");
            sender.send(Ok(data("bye"))).unwrap();
            drop(sender);
            assert_eq!(answering.await.unwrap(), "bye");
        }
    });
}

#[test]
fn a_refused_upgrade_drops_what_was_meant_for_the_tunnel() {
    on_worker(async |worker| {
        let (connection, mut server) = connect(&worker);
        let (sender, body) = channel();
        let pool = Pool::default();
        let answering = go(async move {
            read_until(&mut server, "\r\n\r\n").await;
            write(&mut server, "HTTP/1.1 426 No\r\ncontent-length: 0\r\n\r\n").await;
            server
        });
        let request = Request::builder().uri("/").header(HOST, "h").header("upgrade", "websocket");
        let request = request.body(body).unwrap();
        let response = connection.send(request, back_to(&pool)).await.unwrap();
        assert_eq!(response.status(), 426);
        assert_eq!(response.headers()[CONTENT_LENGTH], "0");
        sender.closed().await;
        assert!(pool.borrow_mut().take().unwrap().is_reusable());
        drop(answering.await.unwrap());
    });
}
