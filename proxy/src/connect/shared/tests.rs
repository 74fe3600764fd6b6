//! The shared connections against servers of h2 itself, on pipes.

use std::cell::RefCell;

use bytes::Bytes;
use futures::future::join_all;
use h2::SendStream;
use http::{Request, Response, Version};
use tokio::io::{AsyncReadExt as _, DuplexStream};

use super::*;
use crate::connect::Failed;
use crate::discovery::ProtocolHint;
use crate::fakes::{World, on_worker};
use crate::http::{Body, Exchange};

struct Hello;

impl Exchange for Hello {
    async fn exchange(&self, _: Request<Body>) -> Response<Body> {
        Response::new(Body::full("hello"))
    }
}

fn endpoint() -> Arc<Endpoint> {
    Arc::new(Endpoint {
        addr: SocketAddr::from(([10, 0, 0, 7], 80)),
        weight: 1,
        identity: None,
        inbound_port: None,
        protocol: ProtocolHint::Http2,
        authority_override: None,
        labels: Arc::default(),
    })
}

async fn send(world: &World) -> Result<Response<Body>, Failed> {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = "http://web/a".parse().unwrap();
    *request.version_mut() = Version::HTTP_2;
    let way = Direction::Outbound;
    let sent = world.connect.send_http2(way, &endpoint(), Labels::default, request).await;
    sent.map_err(|unanswered| unanswered.failed)
}

fn refusals(world: &World, reason: &str) -> Option<String> {
    world.metric(&format!("steadfast_connection_refusals_total{{direction=\"outbound\",{reason}}}"))
}

/// The answers of servers that begin and do not end.
type Held = Rc<RefCell<Vec<SendStream<Bytes>>>>;

/// Takes so many streams at once, and ends none of them.
async fn hold(io: DuplexStream, streams_max: u32, held: Held) {
    let mut server = h2::server::Builder::new();
    let server = server.max_concurrent_streams(streams_max).handshake(io).await;
    let mut server = server.unwrap();
    while let Some(Ok((_, mut respond))) = server.accept().await {
        held.borrow_mut().push(respond.send_response(Response::new(()), false).unwrap());
    }
}

/// As many such servers.
fn holding(world: &World, servers: usize, streams_max: u32) -> Held {
    let held = Held::default();
    for _ in 0..servers {
        let server = hold(world.pipes.server(), streams_max, held.clone());
        world.http.tasks().spawn_counted(server);
    }
    held
}

#[test]
fn requests_that_come_while_a_connection_is_made_share_it() {
    on_worker(async {
        let world = World::new(&[]);
        let (server, http) = (world.pipes.server(), world.http.clone());
        let close = std::future::pending();
        let serving = http2::serve(server, &Hello, &http, Peer::Application, close);
        let request = || async {
            let mut response = send(&world).await.unwrap();
            while let Some(frame) = response.body_mut().frame().await {
                frame.unwrap();
            }
        };
        let requests = async {
            futures::join!(request(), request(), request());
            request().await;
        };
        tokio::select! {
            () = requests => {}
            ended = serving => panic!("{ended:?}"),
        }
        assert_eq!(world.pipes.dialled.borrow().len(), 1);
    });
}

#[test]
fn a_failed_attempt_is_told_once_to_all_who_waited_and_the_next_tries_anew() {
    on_worker(async {
        let world = World::new(&[]);
        let unreachable = "reason=\"unreachable\",code=\"SFT-NET-006\"";
        let (first, second) = futures::join!(send(&world), send(&world));
        assert!(first.is_err() && second.is_err());
        assert_eq!(refusals(&world, unreachable).as_deref(), Some("1"));
        assert!(send(&world).await.is_err());
        assert_eq!(refusals(&world, unreachable).as_deref(), Some("2"));
    });
}

#[test]
fn more_streams_than_a_server_allows_on_one_connection_take_further_ones() {
    on_worker(async {
        let world = World::new(&[]);
        let held = holding(&world, 3, 100);
        let answers = join_all((0..300).map(|_| send(&world))).await;
        assert!(answers.iter().all(Result::is_ok));
        assert_eq!((held.borrow().len(), world.pipes.dialled.borrow().len()), (300, 3));
    });
}

#[test]
fn a_request_waits_for_a_stream_to_end_and_those_who_wait_come_first() {
    on_worker(async {
        let world = World::new(&[]);
        let _held = holding(&world, CONNECTIONS_MAX, 1);
        let mut answers = join_all((0..CONNECTIONS_MAX).map(|_| send(&world))).await;
        let mut first = std::pin::pin!(send(&world));
        assert!(futures::poll!(first.as_mut()).is_pending());
        drop(answers.pop());
        // A stream is free, and the first who waits has not yet seen it.
        let mut second = std::pin::pin!(send(&world));
        assert!(futures::poll!(second.as_mut()).is_pending());
        assert!(first.await.is_ok());
        assert!(second.await.is_ok(), "the first has been dropped");
        assert_eq!(world.pipes.dialled.borrow().len(), CONNECTIONS_MAX);
    });
}

#[test]
fn a_request_that_no_stream_becomes_free_for_is_refused_as_overload() {
    on_worker(async {
        let world = World::new(&[]);
        let _held = holding(&world, CONNECTIONS_MAX, 1);
        let answers = join_all((0..CONNECTIONS_MAX).map(|_| send(&world))).await;
        assert!(answers.iter().all(Result::is_ok));
        let Err(Failed::Connect(refusal)) = send(&world).await else { panic!("it was served") };
        assert!(matches!(*refusal, Refusal::Overloaded(_)), "{refusal}");
        let overloaded = "reason=\"overloaded\",code=\"SFT-NET-010\"";
        assert_eq!(refusals(&world, overloaded).as_deref(), Some("1"));
        drop(answers);
        assert!(send(&world).await.is_ok());
    });
}

#[test]
fn an_attempt_that_everyone_has_left_goes_on_and_serves_the_next() {
    on_worker(async {
        let world = World::new(&[]);
        let _held = holding(&world, 1, 100);
        {
            let mut left = std::pin::pin!(send(&world));
            assert!(futures::poll!(left.as_mut()).is_pending());
        }
        assert!(send(&world).await.is_ok());
        assert_eq!(world.pipes.dialled.borrow().len(), 1);
    });
}

#[test]
fn an_attempt_that_everyone_has_left_lets_go_of_a_server_that_stays_silent() {
    on_worker(async {
        let world = World::new(&[]);
        let mut silent = world.pipes.server();
        {
            let mut left = std::pin::pin!(send(&world));
            assert!(futures::poll!(left.as_mut()).is_pending());
        }
        let mut seen = Vec::new();
        let closed = timeout(Duration::from_secs(60), silent.read_to_end(&mut seen)).await;
        assert!(closed.is_ok_and(|read| read.is_ok()), "the connection is still open");
        let _held = holding(&world, 1, 100);
        assert!(send(&world).await.is_ok());
    });
}
