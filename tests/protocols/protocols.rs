//! Promise: what applications speak goes through two sidecars as it is.
//!
//! HTTP/1.1 with keep-alive, `Connection: close`, chunked and 100 MiB bodies, HTTP/2 with many
//! streams, gRPC with trailers and streaming, WebSocket, and raw TCP both ways with half-close.

use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use steadfast_test_rig::app::App;
use steadfast_test_rig::echo::Message;
use steadfast_test_rig::echo::echo_client::EchoClient;
use steadfast_test_rig::load::Sender;
use steadfast_test_rig::process::free_addr;
use steadfast_test_rig::{Mesh, MeshConfig, Pod, PodSpec};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Code;

/// Two sidecars, an application that speaks HTTP, one that speaks TCP and one that speaks first.
struct Pair {
    mesh: Mesh,
    http: App,
    tcp: App,
    server: Pod,
    client: Pod,
    tcp_entrance: std::net::SocketAddr,
    first_entrance: std::net::SocketAddr,
    _first: App,
}

async fn pair() -> Pair {
    pair_with(&[]).await
}

/// With these variables for both sidecars.
async fn pair_with(env: &[(&str, &str)]) -> Pair {
    let env: Vec<_> = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let mesh = Mesh::start(MeshConfig::default()).await;
    let http = App::http(free_addr()).await.unwrap();
    let tcp = App::tcp(free_addr()).await.unwrap();
    let first = App::server_first(free_addr()).await.unwrap();
    let ports = [http.addr.port(), tcp.addr.port(), first.addr.port()];
    let server = mesh.pod(PodSpec {
        opaque_ports: vec![ports[1]],
        env: env.clone(),
        ..PodSpec::new("api", &ports).policy("all-authenticated")
    });
    let (tcp_entrance, first_entrance) = (free_addr(), free_addr());
    let client = mesh.pod(PodSpec {
        listen_map: vec![
            (tcp_entrance, server.spec.authority(ports[1])),
            (first_entrance, server.spec.authority(ports[2])),
        ],
        env,
        ..PodSpec::new("web", &[])
    });
    server.ready().await;
    client.ready().await;
    Pair { mesh, http, tcp, server, client, tcp_entrance, first_entrance, _first: first }
}

impl Pair {
    fn authority(&self) -> String {
        self.server.spec.authority(self.http.addr.port())
    }

    fn request(&self, path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
        Request::post(path).header("host", self.authority()).body(Full::new(body.into())).unwrap()
    }

    /// Bytes to the sidecar as they are, and everything that comes back until it closes.
    async fn raw(&self, bytes: &str) -> String {
        let mut stream = TcpStream::connect(self.client.outbound).await.unwrap();
        stream.write_all(bytes.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        tokio::time::timeout(Duration::from_secs(30), read).await.expect("it closes").unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http1_keeps_one_connection_for_many_requests() {
    let pair = pair().await;
    let mut sender = Sender::connect(pair.client.outbound, false).await.unwrap();
    for index in 0..50 {
        assert!(sender.ready().await, "the connection was closed after {index} requests");
        let body = format!("body {index}");
        let (status, answer) = sender.exchange(pair.request("/echo", body.clone())).await.unwrap();
        assert_eq!((status, answer), (StatusCode::OK, Bytes::from(body)));
    }
    assert_eq!(pair.http.requests(), 50);
    drop(pair.mesh);
}

#[tokio::test(flavor = "multi_thread")]
async fn http1_closes_when_the_client_asks_for_it_and_pipelines_in_order() {
    let pair = pair().await;
    let host = pair.authority();
    let close = format!("GET /hello HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    let answer = pair.raw(&close).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.ends_with("hello"), "{answer}");

    let one =
        |n: u8| format!("POST /echo HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1\r\n\r\n{n}");
    let answer = pair.raw(&format!("{}{}{close}", one(1), one(2))).await;
    let bodies: Vec<_> = answer.split("\r\n\r\n").skip(1).map(|body| &body[..1]).collect();
    assert_eq!(bodies, ["1", "2", "h"], "{answer}");

    let http10 = format!("GET /hello HTTP/1.0\r\nhost: {host}\r\n\r\n");
    assert!(pair.raw(&http10).await.ends_with("hello"));
    drop(pair.mesh);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunked_and_hundred_mebibyte_bodies_arrive_whole_both_ways() {
    let pair = pair().await;
    let host = pair.authority();
    let chunked = format!(
        "POST /echo HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n\
         5\r\nhello\r\n7\r\n, world\r\n0\r\n\r\n"
    );
    let answer = pair.raw(&chunked).await;
    assert!(answer.contains("hello") && answer.contains(", world"), "{answer}");

    let size: usize = 100 << 20;
    let body = Bytes::from((0..size).map(|at| (at % 251) as u8).collect::<Vec<_>>());
    for http2 in [false, true] {
        let mut sender = Sender::connect(pair.client.outbound, http2).await.unwrap();
        let mut request = pair.request("/echo", body.clone());
        if http2 {
            *request.uri_mut() = format!("http://{host}/echo").parse().unwrap();
            request.headers_mut().remove("host");
        }
        let (status, answer) = sender.exchange(request).await.unwrap();
        assert_eq!(status, StatusCode::OK);
        assert!(answer == body, "{} of {size} bytes, http2 {http2}", answer.len());
    }
    drop(pair.mesh);
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_carries_a_hundred_streams_at_once() {
    let pair = pair().await;
    let stream = TcpStream::connect(pair.client.outbound).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move { drop(connection.await) });
    let host = pair.authority();
    let requests = (0..100).map(|index| {
        let mut sender = sender.clone();
        let request = Request::post(format!("http://{host}/echo"))
            .body(Full::new(Bytes::from(format!("stream {index}"))))
            .unwrap();
        async move {
            let response = sender.send_request(request).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, format!("stream {index}"));
        }
    });
    futures::future::join_all(requests).await;
    drop(pair.mesh);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_workers_share_the_connections_of_one_sidecar() {
    let pair = pair_with(&[("LINKERD2_PROXY_CORES", "2")]).await;
    // The kernel deals out connections by their ports: that of these one worker gets none happens
    // once in a billion runs.
    let exchanges = (0..32).map(|index| {
        let (pair, body) = (&pair, format!("connection {index}"));
        async move {
            let mut sender = Sender::connect(pair.client.outbound, false).await.unwrap();
            for _ in 0..3 {
                assert!(sender.ready().await);
                let request = pair.request("/echo", body.clone());
                let (status, answer) = sender.exchange(request).await.unwrap();
                assert_eq!((status, answer), (StatusCode::OK, Bytes::from(body.clone())));
            }
        }
    });
    futures::future::join_all(exchanges).await;
    assert_eq!(pair.http.requests(), 32 * 3);
    // Each worker makes a connection of its own.
    let workers = std::thread::available_parallelism().unwrap().get().min(2);
    let opened = pair.client.metrics().await;
    let opened = opened.sum("tcp_open_total", &[("direction", "outbound"), ("peer", "dst")]);
    assert_eq!(opened, workers as f64);
    drop(pair.mesh);
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_streams_and_ends_with_its_trailers() {
    let pair = pair().await;
    let channel =
        tonic::transport::Endpoint::from_shared(format!("http://{}", pair.client.outbound))
            .unwrap()
            .origin(format!("http://{}", pair.authority()).parse().unwrap())
            .connect()
            .await
            .unwrap();
    let mut echo = EchoClient::new(channel);
    let message = |text: &str, count| Message { text: text.to_owned(), count };

    let answer = echo.unary(message("one", 1)).await.unwrap().into_inner();
    assert_eq!(answer, message("one", 1));

    let download = echo.download(message("many", 1000)).await.unwrap().into_inner();
    let counts: Vec<_> = download.map(|message| message.unwrap().count).collect().await;
    assert_eq!(counts, (0..1000).collect::<Vec<_>>());

    let upload = futures::stream::iter((0..100).map(move |count| message("x", count)));
    let total = echo.upload(upload).await.unwrap().into_inner();
    assert_eq!((total.text.len(), total.count), (100, 100));

    // A conversation: each answer is read before the next message is sent.
    let (mut say, said) = futures::channel::mpsc::channel(1);
    let mut answers = echo.chat(said).await.unwrap().into_inner();
    for count in 0..20 {
        say.send(message("turn", count)).await.unwrap();
        assert_eq!(answers.next().await.unwrap().unwrap().count, count);
    }
    drop(say);
    assert!(answers.next().await.is_none());

    let status = echo.fail(message("on purpose", 0)).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, "on purpose"));
    assert_eq!(status.metadata().get("x-reason").unwrap(), "asked");
    drop(pair.mesh);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_talks_both_ways() {
    let pair = pair().await;
    let stream = TcpStream::connect(pair.client.outbound).await.unwrap();
    let uri = format!("ws://{}/ws", pair.authority());
    let (mut socket, response) = tokio_tungstenite::client_async(uri, stream).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    for index in 0..20 {
        let text = format!("message {index}");
        socket.send(text.clone().into()).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap().into_text().unwrap(), text);
    }
    socket.close(None).await.unwrap();
    drop(pair.mesh);
}

#[tokio::test(flavor = "multi_thread")]
async fn raw_tcp_goes_both_ways_and_half_closes() {
    let pair = pair().await;
    let mut stream = TcpStream::connect(pair.tcp_entrance).await.unwrap();
    let sent = vec![7; 1 << 20];
    let (mut reader, mut writer) = stream.split();
    let mut answer = Vec::new();
    let write = async {
        writer.write_all(&sent).await.unwrap();
        // Only our half: the other goes on until the application has said its last word.
        writer.shutdown().await.unwrap();
    };
    let (_, read) = tokio::join!(write, reader.read_to_end(&mut answer));
    read.unwrap();
    assert_eq!(answer.len(), sent.len() + b"total 1048576\n".len());
    assert!(answer.ends_with(b"total 1048576\n"));
    assert_eq!(pair.tcp.bytes(), 1 << 20);
    drop(pair.mesh);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_first_is_heard() {
    let pair = pair().await;
    let mut stream = TcpStream::connect(pair.first_entrance).await.unwrap();
    let mut banner = [0; 11];
    // The mark of the stall is ten seconds; a busy machine takes less.
    let read = stream.read_exact(&mut banner);
    tokio::time::timeout(Duration::from_secs(8), read).await.expect("no stall").unwrap();
    assert_eq!(&banner, b"220 ready\r\n");
    stream.write_all(b"EHLO\r\n").await.unwrap();
    let mut echo = [0; 6];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"EHLO\r\n");
    drop(pair.mesh);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_reaches_its_own_service_by_http_and_by_bytes() {
    let mesh = Mesh::start(MeshConfig::default()).await;
    let http = App::http(free_addr()).await.unwrap();
    let tcp = App::tcp(free_addr()).await.unwrap();
    let (ports, entrance) = ([http.addr.port(), tcp.addr.port()], free_addr());
    let spec = PodSpec {
        opaque_ports: vec![ports[1]],
        ..PodSpec::new("web", &ports).policy("all-authenticated")
    };
    let listen_map = vec![(entrance, spec.authority(ports[1]))];
    let web = mesh.pod(PodSpec { listen_map, ..spec });
    web.ready().await;

    for http2 in [false, true] {
        let mut sender = Sender::connect(web.outbound, http2).await.unwrap();
        let authority = web.spec.authority(ports[0]);
        let request = match http2 {
            true => Request::get(format!("http://{authority}/hello")),
            false => Request::get("/hello").header("host", authority),
        };
        let (status, _) = sender.exchange(request.body(Full::default()).unwrap()).await.unwrap();
        assert_eq!(status, StatusCode::OK, "http2 {http2}");
    }
    let mut stream = TcpStream::connect(entrance).await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"ping");
    // It is the mesh like any other: with its own name on both ends.
    let id = web.spec.spiffe_id();
    let seen = [("direction", "inbound"), ("tls", "true"), ("client_id", id.as_str())];
    assert_eq!(web.metrics().await.sum("request_total", &seen), 2.0);
    drop(mesh);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_that_is_asked_to_stop_finishes_what_is_open_and_can_be_watched() {
    let mut pair = pair().await;
    let mut stream = TcpStream::connect(pair.tcp_entrance).await.unwrap();
    let mut echo = [0; 4];
    stream.write_all(b"ping").await.unwrap();
    stream.read_exact(&mut echo).await.unwrap();
    pair.client.proxy.ask_to_stop();
    let reason = pair.client.unready(Duration::from_secs(30)).await;
    assert!(reason.contains("draining"), "{reason}");
    let open = [("direction", "outbound"), ("peer", "src")];
    assert_eq!(pair.client.metrics().await.sum("tcp_open_connections", &open), 1.0);
    stream.write_all(b"pong").await.unwrap();
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"pong");
    drop(stream);
    assert_eq!(pair.client.proxy.ended(Duration::from_secs(60)).await, Some(0));
    drop(pair.mesh);
}
