//! Promise: what goes on past the end of its SVID is counted, and has an end where one is set:
//! opaque TCP, CONNECT and WebSocket alike.

use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use steadfast_test_rig::app::App;
use steadfast_test_rig::process::free_addr;
use steadfast_test_rig::{Mesh, MeshConfig, PodSpec, until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

const SVID_TTL: Duration = Duration::from_secs(6);
const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn bytes_go_on_past_the_end_of_their_svid_are_counted_and_end_at_the_maximum_age() {
    let mesh = Mesh::start(MeshConfig { svid_ttl: SVID_TTL, ..MeshConfig::default() }).await;
    let http = App::http(free_addr()).await.unwrap();
    let tcp = App::tcp(free_addr()).await.unwrap();
    let (ports, entrance) = ([http.addr.port(), tcp.addr.port()], free_addr());
    let api = mesh.pod(PodSpec {
        opaque_ports: vec![ports[1]],
        ..PodSpec::new("api", &ports).policy("all-authenticated")
    });
    let web = mesh.pod(PodSpec {
        listen_map: vec![(entrance, api.spec.authority(ports[1]))],
        env: vec![("STEADFAST_PROXY_CONNECTION_AGE_MAX".to_owned(), "25s".to_owned())],
        ..PodSpec::new("web", &[])
    });
    api.ready().await;
    web.ready().await;

    let mut opaque = TcpStream::connect(entrance).await.unwrap();
    let mut connect = TcpStream::connect(web.outbound).await.unwrap();
    let authority = api.spec.authority(ports[1]);
    let ask = format!("CONNECT {authority} HTTP/1.1\r\nhost: {authority}\r\n\r\n");
    connect.write_all(ask.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(connect.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    let stream = TcpStream::connect(web.outbound).await.unwrap();
    let uri = format!("ws://{}/ws", api.spec.authority(ports[0]));
    let (mut socket, _) = tokio_tungstenite::client_async(uri, stream).await.unwrap();

    for pod in [&web, &api] {
        until(&format!("{} counts all three", pod.spec.name), DEADLINE, || async {
            match pod.metrics().await.sum("tcp_outliving_svid_connections", &[]) {
                3.0 => Ok(()),
                other => Err(format!("{other} connections")),
            }
        })
        .await;
    }
    for stream in [&mut opaque, &mut connect] {
        let mut echo = [0; 4];
        stream.write_all(b"ping").await.unwrap();
        stream.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"ping");
    }
    socket.send("ping".into()).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap().into_text().unwrap(), "ping");

    // The end of the connection, or its reset: nothing else comes.
    for stream in [&mut opaque, &mut connect] {
        let ended = timeout(DEADLINE, stream.read_u8()).await.expect("it ends");
        assert!(ended.is_err());
    }
    let ended = timeout(DEADLINE, socket.next()).await.expect("it ends");
    assert!(!matches!(ended, Some(Ok(_))), "{ended:?}");
    until("nothing is counted any more", DEADLINE, || async {
        match web.metrics().await.sum("tcp_outliving_svid_connections", &[]) {
            0.0 => Ok(()),
            other => Err(format!("{other} connections")),
        }
    })
    .await;
    drop(mesh);
}
