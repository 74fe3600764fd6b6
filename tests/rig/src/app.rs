//! The applications of the tests: they know nothing of the mesh.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tonic::{Request as GrpcRequest, Response as GrpcResponse, Status, Streaming};
use tower::ServiceExt as _;

use crate::echo::Message;
use crate::echo::echo_server::{Echo, EchoServer};
use crate::load::Sender;

/// A running application; it ends when this is dropped.
#[derive(Debug)]
pub struct App {
    /// Where it listens.
    pub addr: SocketAddr,
    seen: Arc<Seen>,
    _tasks: JoinSet<()>,
}

/// What has arrived at an application.
#[derive(Debug, Default)]
struct Seen {
    connections: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
}

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

impl App {
    /// Speaks HTTP/1.1 and HTTP/2, gRPC and WebSocket on this address:
    /// `/hello`, `/echo` (the body back, as it arrives, with its trailers), `/bytes/N` (N bytes),
    /// `/head` (the request's head), `/ws` (a WebSocket that echoes), and the gRPC service `Echo`.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn http(addr: SocketAddr) -> std::io::Result<Self> {
        Self::requests_to(addr, answer).await
    }

    async fn requests_to<F>(
        addr: SocketAddr,
        answer: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    ) -> std::io::Result<Self>
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        Self::accept(addr, move |stream, seen| {
            let answer = answer.clone();
            async move {
                let service = service_fn(move |request| {
                    seen.requests.fetch_add(1, Ordering::Relaxed);
                    let answered = answer(request);
                    async move { Ok::<_, Infallible>(answered.await) }
                });
                // A client that breaks off is what some tests are about.
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection_with_upgrades(TokioIo::new(stream), service)
                    .await;
            }
        })
        .await
    }

    /// The same, but that `/echo` is asked of the next service, which says it back.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn between(addr: SocketAddr, next: &str) -> std::io::Result<Self> {
        let next = Arc::new(Next { authority: next.to_owned(), idle: Mutex::default() });
        Self::requests_to(addr, move |request| {
            let next = Arc::clone(&next);
            async move {
                match request.uri().path() {
                    "/echo" => next.ask(request).await,
                    _ => answer(request).await,
                }
            }
        })
        .await
    }

    /// Answers one path with what is told at that moment.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn telling(
        addr: SocketAddr,
        path: &'static str,
        tell: impl Fn() -> String + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let tell = Arc::new(tell);
        Self::requests_to(addr, move |request| {
            let told = (request.uri().path() == path).then(|| tell());
            std::future::ready(match told {
                Some(told) => text(StatusCode::OK, &told),
                None => text(StatusCode::NOT_FOUND, "no such path"),
            })
        })
        .await
    }

    /// Echoes bytes; when the client has closed its half it says how many there were, and closes.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn tcp(addr: SocketAddr) -> std::io::Result<Self> {
        Self::accept(addr, |mut stream, seen| async move {
            let (mut buffer, mut total) = (vec![0; 64 * 1024], 0u64);
            loop {
                match stream.read(&mut buffer).await {
                    Ok(0) => break,
                    Ok(count) => {
                        total += count as u64;
                        seen.bytes.fetch_add(count as u64, Ordering::Relaxed);
                        if stream.write_all(&buffer[..count]).await.is_err() {
                            return;
                        }
                    }
                    Err(_) => return,
                }
            }
            // The client may not wait for the end.
            let _ = stream.write_all(format!("total {total}\n").as_bytes()).await;
            let _ = stream.shutdown().await;
        })
        .await
    }

    /// Speaks first, as SMTP and MySQL do, then echoes lines.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn server_first(addr: SocketAddr) -> std::io::Result<Self> {
        Self::accept(addr, |mut stream, _| async move {
            if stream.write_all(b"220 ready\r\n").await.is_ok() {
                let (mut reader, mut writer) = stream.split();
                // The client may not wait for the end.
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            }
        })
        .await
    }

    async fn accept<F: Future<Output = ()> + Send + 'static>(
        addr: SocketAddr,
        serve: impl Fn(TcpStream, Arc<Seen>) -> F + Send + 'static,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        let (addr, seen) = (listener.local_addr()?, Arc::new(Seen::default()));
        let (mut tasks, counted) = (JoinSet::new(), seen.clone());
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    Ok((stream, _)) = listener.accept() => {
                        counted.connections.fetch_add(1, Ordering::Relaxed);
                        connections.spawn(serve(stream, counted.clone()));
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Ok(Self { addr, seen, _tasks: tasks })
    }

    /// How many connections were accepted.
    pub fn connections(&self) -> u64 {
        self.seen.connections.load(Ordering::Relaxed)
    }

    /// How many requests have arrived.
    pub fn requests(&self) -> u64 {
        self.seen.requests.load(Ordering::Relaxed)
    }

    /// How many bytes have arrived over plain TCP.
    pub fn bytes(&self) -> u64 {
        self.seen.bytes.load(Ordering::Relaxed)
    }
}

/// The service that another one asks.
struct Next {
    authority: String,
    /// Connections that no request uses at the moment.
    idle: Mutex<Vec<Sender>>,
}

impl Next {
    async fn ask(&self, request: Request<Incoming>) -> Response<Body> {
        match self.asked(request).await {
            Ok((status, body)) => {
                let body = Full::new(body).map_err(|never| match never {});
                let mut response = Response::new(body.boxed_unsync());
                *response.status_mut() = status;
                response
            }
            Err(error) => text(StatusCode::BAD_GATEWAY, &error),
        }
    }

    async fn asked(&self, request: Request<Incoming>) -> Result<(StatusCode, Bytes), String> {
        let body = request.into_body().collect().await.map_err(|error| error.to_string())?;
        let request = Request::post("/echo").header(header::HOST, &self.authority);
        let request = request.body(Full::new(body.to_bytes())).map_err(|e| e.to_string())?;
        let mut sender = loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut idle) = idle else {
                break Sender::connect(&*self.authority, false).await?;
            };
            if idle.ready().await {
                break idle;
            }
        };
        let answer = sender.exchange(request).await?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        Ok(answer)
    }
}

async fn answer(mut request: Request<Incoming>) -> Response<Body> {
    let is_grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    if is_grpc {
        let service = EchoServer::new(EchoService);
        let response = match service.oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        return response.map(|body| {
            // tonic's own server bodies end with a status, never with an error.
            body.map_err(|_| unreachable!("tonic bodies do not fail")).boxed_unsync()
        });
    }
    let path = request.uri().path().to_owned();
    match path.as_str() {
        "/hello" => text(StatusCode::OK, "hello"),
        "/echo" => Response::new(request.into_body().boxed_unsync()),
        "/head" => text(StatusCode::OK, &head(&request)),
        "/ws" => websocket(&mut request),
        _ => match path.strip_prefix("/bytes/").and_then(|count| count.parse().ok()) {
            Some(count) => Response::new(zeroes(count)),
            None => text(StatusCode::NOT_FOUND, "no such path"),
        },
    }
}

/// The request's line and headers, one a line, for the test to look at.
fn head<B>(request: &Request<B>) -> String {
    let line = format!("{} {} {:?}", request.method(), request.uri(), request.version());
    let headers = request.headers().iter();
    let headers = headers.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap_or("?")));
    std::iter::once(line).chain(headers).collect::<Vec<_>>().join("\n")
}

fn text(status: StatusCode, body: &str) -> Response<Body> {
    let body = Full::new(Bytes::copy_from_slice(body.as_bytes()));
    let mut response = Response::new(body.map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = status;
    response
}

/// `count` bytes in pieces of 64 KiB, without a content-length: chunked in HTTP/1.1.
fn zeroes(count: u64) -> Body {
    let piece = Bytes::from_static(&[0; 64 * 1024]);
    let pieces = futures::stream::unfold(count, move |left| {
        let size = left.min(piece.len() as u64);
        let frame = Frame::data(piece.slice(..size as usize));
        std::future::ready((left > 0).then(|| (Ok::<_, hyper::Error>(frame), left - size)))
    });
    StreamBody::new(pieces).boxed_unsync()
}

fn websocket(request: &mut Request<Incoming>) -> Response<Body> {
    let Some(key) = request.headers().get("sec-websocket-key").cloned() else {
        return text(StatusCode::BAD_REQUEST, "no sec-websocket-key");
    };
    let upgrade = hyper::upgrade::on(request);
    let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes());
    // The echo lives as long as its connection; a test's runtime ends it at the latest.
    #[allow(clippy::disallowed_methods)]
    tokio::spawn(async move {
        let Ok(stream) = upgrade.await else { return };
        let role = tokio_tungstenite::tungstenite::protocol::Role::Server;
        let socket =
            tokio_tungstenite::WebSocketStream::from_raw_socket(TokioIo::new(stream), role, None);
        let (sink, stream) = socket.await.split();
        let echoed = stream.filter(|message| {
            let keep = message.as_ref().is_ok_and(|m| m.is_text() || m.is_binary());
            std::future::ready(keep)
        });
        // A client that breaks off is what some tests are about.
        let _ = echoed.forward(sink).await;
    });
    let mut response = text(StatusCode::SWITCHING_PROTOCOLS, "");
    let headers: &mut HeaderMap = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(accept) = HeaderValue::from_str(&accept) {
        headers.insert("sec-websocket-accept", accept);
    }
    response
}

struct EchoService;

type Messages = Pin<Box<dyn Stream<Item = Result<Message, Status>> + Send>>;

#[tonic::async_trait]
impl Echo for EchoService {
    type DownloadStream = Messages;
    type ChatStream = Messages;

    async fn unary(&self, request: GrpcRequest<Message>) -> Result<GrpcResponse<Message>, Status> {
        Ok(GrpcResponse::new(request.into_inner()))
    }

    async fn download(
        &self,
        request: GrpcRequest<Message>,
    ) -> Result<GrpcResponse<Messages>, Status> {
        let Message { text, count } = request.into_inner();
        let messages = (0..count).map(move |count| Ok(Message { text: text.clone(), count }));
        Ok(GrpcResponse::new(Box::pin(futures::stream::iter(messages))))
    }

    async fn upload(
        &self,
        request: GrpcRequest<Streaming<Message>>,
    ) -> Result<GrpcResponse<Message>, Status> {
        let mut stream = request.into_inner();
        let mut total = Message::default();
        while let Some(message) = stream.next().await {
            let message = message?;
            total.text.push_str(&message.text);
            total.count += 1;
        }
        Ok(GrpcResponse::new(total))
    }

    async fn chat(
        &self,
        request: GrpcRequest<Streaming<Message>>,
    ) -> Result<GrpcResponse<Messages>, Status> {
        Ok(GrpcResponse::new(Box::pin(request.into_inner())))
    }

    async fn fail(&self, request: GrpcRequest<Message>) -> Result<GrpcResponse<Message>, Status> {
        let mut status = Status::failed_precondition(request.into_inner().text);
        status
            .metadata_mut()
            .insert("x-reason", tonic::metadata::MetadataValue::from_static("asked"));
        Err(status)
    }
}
