//! hyper as the peer of our servers and clients.

use std::convert::Infallible;
use std::future::pending;

use bytes::Bytes;
use http::header::HOST;
use http::{Request, Response, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use steadfast_proxy::http::{Body, Frame, Peer, Worker, http1, http2};
use tokio::io::{DuplexStream, duplex};

use super::support::{By, Zeros, echo, go, on_worker, text};

const LARGE: u64 = 100 * 1024 * 1024;

/// hyper's HTTP/2 spawns through this.
#[derive(Clone)]
struct Local;

impl<F: Future + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, future: F) {
        go(async move { drop(future.await) });
    }
}

fn serve(worker: &Worker, version: Version) -> DuplexStream {
    let (client, server) = duplex(64 * 1024);
    let worker = worker.clone();
    go(async move {
        match version {
            Version::HTTP_2 => {
                http2::serve(server, &By(echo), &worker, Peer::Application, pending()).await
            }
            _ => http1::serve(server, &By(echo), &worker, pending()).await,
        }
    });
    client
}

async fn hyper_echo(request: Request<Incoming>) -> Result<Response<Incoming>, Infallible> {
    Ok(Response::new(request.into_body()))
}

fn hyper_serve(version: Version) -> DuplexStream {
    let (client, server) = duplex(64 * 1024);
    go(async move {
        let (io, service) = (TokioIo::new(server), hyper::service::service_fn(hyper_echo));
        match version {
            Version::HTTP_2 => {
                let mut builder = hyper::server::conn::http2::Builder::new(Local);
                builder.timer(TokioTimer::new()).serve_connection(io, service).await
            }
            _ => hyper::server::conn::http1::Builder::new().serve_connection(io, service).await,
        }
    });
    client
}

/// The request that hyper sends and what came back.
async fn through_hyper(io: DuplexStream, version: Version, body: Bytes) -> Bytes {
    let request = Request::builder().method("POST").uri("http://web/").header(HOST, "web");
    let request = request.version(version).body(Full::new(body)).unwrap();
    let response = match version {
        Version::HTTP_2 => {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(Local, TokioIo::new(io)).await.unwrap();
            go(connection);
            sender.send_request(request).await.unwrap()
        }
        _ => {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
            go(connection);
            sender.send_request(request).await.unwrap()
        }
    };
    assert_eq!(response.status(), 200);
    response.into_body().collect().await.unwrap().to_bytes()
}

#[test]
fn hyper_as_client_gets_its_content_back() {
    for version in [Version::HTTP_11, Version::HTTP_2] {
        for length in [0, 1, 100_000, LARGE as usize] {
            on_worker(async |worker| {
                let body = Bytes::from(vec![7; length]);
                let io = serve(&worker, version);
                assert!(through_hyper(io, version, body.clone()).await == body, "{length}");
            });
        }
    }
}

#[test]
fn hyper_as_server_sends_our_content_back() {
    for version in [Version::HTTP_11, Version::HTTP_2] {
        on_worker(async |worker| {
            let io = hyper_serve(version);
            let taken = Default::default();
            let large = Body::from_source(Zeros { frame: 16 * 1024, left: LARGE, taken });
            let request =
                |body| Request::builder().method("POST").uri("http://web/").body(body).unwrap();
            let mut answer = match version {
                Version::HTTP_2 => {
                    let connected = http2::connect(io, &worker, Peer::Application).await;
                    let (client, driver) = connected.unwrap();
                    go(driver);
                    let small = client.send(request(Body::full("small"))).await.unwrap();
                    assert_eq!(text(small.into_body()).await, "small");
                    client.send(request(large)).await.unwrap().into_body()
                }
                _ => {
                    let connection = http1::Connection::new(io, &worker);
                    connection.send(request(large), drop).await.unwrap().into_body()
                }
            };
            let mut read = 0;
            while let Some(frame) = answer.frame().await {
                let Frame::Data(data) = frame.unwrap() else { panic!("trailers") };
                read += data.len() as u64;
            }
            assert_eq!(read, LARGE);
        });
    }
}
