//! What the tests start in namespaces: an application, a load generator, a reader of admin ports,
//! and peers with certificates of the tests' making.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};

use steadfast_test_rig::app::App;
use steadfast_test_rig::load::Load;
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::peer::Peer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["http", addr] => serve(App::http(addr.parse()?).await?).await,
        ["http", addr, next] => serve(App::between(addr.parse()?, next).await?).await,
        ["client", addr, to] => client(addr.parse()?, to).await,
        ["tcp", addr] => serve(App::tcp(addr.parse()?).await?).await,
        ["server-first", addr] => serve(App::server_first(addr.parse()?).await?).await,
        ["talk", addr, greeting_bytes, bytes] => {
            println!("{}", talk(addr, greeting_bytes.parse()?, bytes.parse()?).await?);
            Ok(ExitCode::SUCCESS)
        }
        ["load", load] => {
            let report = serde_json::from_str::<Load>(load)?.run().await;
            println!("{}", serde_json::to_string(&report)?);
            Ok(ExitCode::SUCCESS)
        }
        ["get", addr, path] => {
            let (status, body) = get(*addr, path).await.map_err(anyhow::Error::msg)?;
            println!("{}\n{body}", status.as_u16());
            Ok(ExitCode::SUCCESS)
        }
        ["tls-get", addr, server_name, bundle, anchors, path] => {
            println!("{}", tls_get(addr, server_name, bundle, anchors, path).await?);
            Ok(ExitCode::SUCCESS)
        }
        ["connect", peer] => {
            println!("{}", serde_json::from_str::<Peer>(peer)?.connect().await);
            Ok(ExitCode::SUCCESS)
        }
        ["serve", peer] => {
            println!("{}", serde_json::from_str::<Peer>(peer)?.serve().await);
            Ok(ExitCode::SUCCESS)
        }
        ["swarm", identity, dir] => {
            steadfast_test_rig::swarm::run(identity, Path::new(dir)).await?;
            Ok(ExitCode::SUCCESS)
        }
        ["subscribe", identity, control, dir, prefix, count, suffix, connections] => {
            let (dir, names) = (Path::new(dir), (*prefix, count.parse()?, *suffix));
            steadfast_test_rig::subscribers::run(
                identity,
                control,
                dir,
                names,
                connections.parse()?,
            )
            .await?;
            Ok(ExitCode::SUCCESS)
        }
        ["relay", listen, netns, target] => {
            relay(listen.parse()?, Path::new(netns), target.parse()?).await
        }
        other => {
            eprintln!(
                "{other:?}: expected http ADDR [NEXT], client ADDR TO, tcp ADDR, server-first ADDR, \
                 talk ADDR GREETING_BYTES BYTES, load JSON, get ADDR PATH, \
                 tls-get ADDR NAME CREDENTIALS ANCHORS PATH, \
                 connect JSON, serve JSON, swarm ADDR DIR, \
                 subscribe ADDR ADDR DIR PREFIX COUNT SUFFIX CONNECTIONS or relay ADDR NETNS ADDR"
            );
            Ok(ExitCode::from(2))
        }
    }
}

/// Reads a greeting of so many bytes before it says a word, then sends so many bytes, closes its
/// half, and tells what came back.
async fn talk(addr: &str, greeting_bytes: usize, bytes: usize) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(addr).await?;
    let mut greeting = vec![0; greeting_bytes];
    // The mark of the stall is ten seconds; a busy machine takes less.
    timeout(Duration::from_secs(8), stream.read_exact(&mut greeting)).await??;
    let (mut reader, mut writer) = stream.split();
    let (sent, mut back) = (vec![b'x'; bytes], Vec::new());
    let send = async {
        writer.write_all(&sent).await?;
        writer.shutdown().await
    };
    let ((), _) = tokio::try_join!(send, reader.read_to_end(&mut back))?;
    anyhow::ensure!(back.starts_with(&sent), "{} of {bytes} bytes came back", back.len());
    let text = |bytes: &[u8]| format!("{:?}", String::from_utf8_lossy(bytes));
    let greeting = if greeting.is_empty() { String::new() } else { text(&greeting) + ", " };
    Ok(format!("{greeting}{bytes} bytes back, then {}", text(&back[bytes..])))
}

/// The answer of a server of this name, over TLS with a client certificate: what a pod without a
/// sidecar speaks to a meshed one. All of it is standard: nothing here knows the mesh.
async fn tls_get(
    addr: &str,
    server_name: &str,
    credentials: &str,
    anchors: &str,
    path: &str,
) -> anyhow::Result<String> {
    let mut roots = RootCertStore::empty();
    for anchor in CertificateDer::pem_file_iter(anchors)? {
        roots.add(anchor?)?;
    }
    let chain = CertificateDer::pem_file_iter(credentials)?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(credentials)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    let stream = TcpStream::connect(addr).await?;
    let name = ServerName::try_from(server_name.to_owned())?;
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    // A server may end without a word when it was asked to close.
    let _ = stream.read_to_string(&mut answer).await;
    Ok(answer)
}

/// Listens here, and connects from within another network namespace: sockets stay where they were
/// made, and this program is one thread.
async fn relay(listen: SocketAddr, netns: &Path, target: SocketAddr) -> anyhow::Result<ExitCode> {
    let listener = TcpListener::bind(listen).await?;
    let netns = File::open(netns)?;
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
    println!("listening on {listen}");
    let mut relayed = JoinSet::new();
    loop {
        let (mut near, _) = listener.accept().await?;
        while relayed.try_join_next().is_some() {}
        relayed.spawn(async move {
            // Who asks sees the end of its connection, whatever the reason was.
            let mut far = TcpStream::connect(target).await?;
            copy_bidirectional(&mut near, &mut far).await
        });
    }
}

/// Sends requests to a service for as long as it runs; `/report` tells what has come of them.
async fn client(addr: SocketAddr, authority: &str) -> anyhow::Result<ExitCode> {
    let to = tokio::net::lookup_host(authority).await?.next().context("no address")?;
    let authority = authority.to_owned();
    let load = Load { to, authority, http2: false, connections: 4, rate: 40, duration_ms: 0 };
    let running = load.start();
    let report = move || serde_json::to_string(&running.report()).unwrap_or_default();
    serve(App::telling(addr, "/report", report).await?).await
}

async fn serve(app: App) -> anyhow::Result<ExitCode> {
    println!("listening on {}", app.addr);
    std::future::pending().await
}
