//! Two sidecars in a row: HTTP/1 in, HTTP/2 between them, HTTP/1 out.

use std::future::pending;

use http::{Request, Response, StatusCode};
use steadfast_proxy::http::http1::Connection;
use steadfast_proxy::http::{
    Body, GrpcStatus, Peer, ProxyError, Shape, Worker, http1, http2, needs_own_connection,
    orig_proto,
};
use tokio::io::{DuplexStream, duplex};

use super::support::{By, go, on_worker, read_to_end, read_until, settle, write};

/// The client's end of the outbound sidecar and the server's end of the inbound one.
async fn pair(worker: &Worker) -> (DuplexStream, DuplexStream) {
    let (caller, outbound) = duplex(64 * 1024);
    let (mesh_client, mesh_server) = duplex(64 * 1024);
    let (to_application, application) = duplex(64 * 1024);
    let connection = std::cell::Cell::new(Some(Connection::new(to_application, worker)));
    go({
        let worker = worker.clone();
        async move {
            let inbound = By(async |request| to_app(&connection, request).await);
            http2::serve(mesh_server, &inbound, &worker, Peer::Mesh, pending()).await
        }
    });
    let (client, driver) = http2::connect(mesh_client, worker, Peer::Mesh).await.unwrap();
    go(driver);
    go({
        let worker = worker.clone();
        async move {
            let exchange = By(async |mut request: Request<Body>| {
                assert!(!needs_own_connection(&request));
                orig_proto::request_to_http2(&mut request);
                let mut response = client.send(request).await.unwrap();
                orig_proto::response_from_http2(&mut response);
                response
            });
            http1::serve(outbound, &exchange, &worker, pending()).await
        }
    });
    (caller, application)
}

async fn to_app(
    connection: &std::cell::Cell<Option<Connection<DuplexStream>>>,
    mut request: Request<Body>,
) -> Response<Body> {
    assert!(orig_proto::request_from_http2(&mut request));
    let shape = Shape::of(&request);
    let mut response = match connection.take().unwrap().send(request, drop).await {
        Ok(response) => response,
        Err(error) => {
            ProxyError::new(StatusCode::BAD_GATEWAY, GrpcStatus::Unavailable, error.to_string())
                .closing()
                .render(shape)
        }
    };
    orig_proto::response_to_http2(&mut response);
    response
}

#[test]
fn the_application_sees_what_the_caller_sent() {
    for (request, seen) in [
        (
            "GET /a?b=c HTTP/1.1\r\nhost: web.demo:80\r\naccept: */*\r\nconnection: close\r\n\r\n",
            "GET /a?b=c HTTP/1.1\r\nhost: web.demo:80\r\naccept: */*\r\n\r\n",
        ),
        ("GET /old HTTP/1.0\r\n\r\n", "GET /old HTTP/1.0\r\n\r\n"),
        (
            "GET http://web.demo/a HTTP/1.1\r\nhost: other\r\n\r\n",
            "GET http://web.demo/a HTTP/1.1\r\nhost: web.demo\r\n\r\n",
        ),
        ("OPTIONS * HTTP/1.1\r\nhost: web\r\n\r\n", "OPTIONS * HTTP/1.1\r\nhost: web\r\n\r\n"),
        (
            "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 0\r\n\r\n",
            "POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 0\r\n\r\n",
        ),
        (
            "POST / HTTP/1.1\r\nhost: web\r\ncookie: a=1; b=2\r\ncontent-length: 2\r\n\r\nhi",
            "POST / HTTP/1.1\r\nhost: web\r\ncookie: a=1; b=2\r\ncontent-length: 2\r\n\r\nhi",
        ),
    ] {
        on_worker(async |worker| {
            let (mut caller, mut application) = pair(&worker).await;
            write(&mut caller, request).await;
            assert_eq!(read_until(&mut application, &seen[seen.len() - 4..]).await, seen);
            write(&mut application, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx: y\r\n\r\nok").await;
            let answer = read_until(&mut caller, "ok").await;
            assert!(answer.contains("x: y\r\n") && !answer.contains("l5d-"), "{answer}");
        });
    }
}

#[test]
fn a_hundred_continue_travels_from_application_to_caller() {
    on_worker(async |worker| {
        let (mut caller, mut application) = pair(&worker).await;
        let head = "POST / HTTP/1.1\r\nhost: web\r\nexpect: 100-continue\r\n\
                    transfer-encoding: chunked\r\n\r\n";
        write(&mut caller, head).await;
        let seen = read_until(&mut application, "\r\n\r\n").await;
        assert!(seen.contains("expect: 100-continue\r\n"), "{seen}");
        write(&mut application, "HTTP/1.1 100 Continue\r\n\r\n").await;
        assert_eq!(read_until(&mut caller, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
        write(&mut caller, "2\r\nhi\r\n0\r\nx-sum: 1\r\n\r\n").await;
        let content = read_until(&mut application, "x-sum: 1\r\n\r\n").await;
        assert_eq!(content, "2\r\nhi\r\n0\r\nx-sum: 1\r\n\r\n");
        write(
            &mut application,
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\
                                 x-t: 2\r\n\r\n",
        )
        .await;
        assert!(
            read_until(&mut caller, "\r\n0\r\nx-t: 2\r\n\r\n").await.starts_with("HTTP/1.1 200")
        );
    });
}

#[test]
fn a_caller_that_goes_away_is_gone_at_the_application() {
    on_worker(async |worker| {
        let (mut caller, mut application) = pair(&worker).await;
        write(&mut caller, "GET /slow HTTP/1.1\r\nhost: web\r\n\r\n").await;
        read_until(&mut application, "\r\n\r\n").await;
        drop(caller);
        assert_eq!(read_to_end(&mut application).await, "");
    });
}

#[test]
fn a_failed_application_closes_the_callers_connection() {
    on_worker(async |worker| {
        let (mut caller, mut application) = pair(&worker).await;
        write(&mut caller, "GET / HTTP/1.1\r\nhost: web\r\n\r\n").await;
        read_until(&mut application, "\r\n\r\n").await;
        drop(application);
        let answer = read_to_end(&mut caller).await;
        assert!(answer.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{answer}");
        assert!(answer.contains("l5d-proxy-error: "), "{answer}");
        assert!(answer.contains("connection: close\r\n"), "{answer}");
        settle().await;
    });
}
