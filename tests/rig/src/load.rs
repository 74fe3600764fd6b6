//! A load generator that counts every failure and repeats nothing.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

/// What to send.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Load {
    /// Whom to connect to.
    pub to: SocketAddr,
    /// The authority of the requests.
    pub authority: String,
    /// HTTP/2 with prior knowledge, else HTTP/1.1 with keep-alive.
    pub http2: bool,
    /// How many connections.
    pub connections: usize,
    /// Requests a second over all connections; 0: as fast as answers come.
    pub rate: u32,
    /// For how long, in milliseconds.
    pub duration_ms: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Requests sent.
    pub requests: u64,
    /// Those that did not get a 200 with their own body back.
    pub failed: u64,
    /// Connections opened beyond the first of each: the peer closed one, which is no failure.
    pub reconnects: u64,
    /// The first few failures.
    pub errors: Vec<String>,
}

impl Load {
    /// Sends POSTs to `/echo`, each with a body of its own, until the time is over.
    pub async fn run(self) -> Report {
        self.spawn(&Arc::default()).total().await
    }

    /// Sends them until the returned is dropped.
    pub fn start(self) -> Running {
        Self { duration_ms: FOR_EVER_MS, ..self }.spawn(&Arc::default())
    }

    /// The same while something else goes on, and to the end of it, however long that takes.
    pub async fn during<T>(self, story: impl Future<Output = T>) -> (Report, T) {
        let over = Arc::new(AtomicBool::new(false));
        let running = Self { duration_ms: FOR_EVER_MS, ..self }.spawn(&over);
        let told = story.await;
        over.store(true, Ordering::Relaxed);
        (running.total().await, told)
    }

    fn spawn(self, over: &Arc<AtomicBool>) -> Running {
        let (mut connections, report) = (JoinSet::new(), Arc::<Mutex<Report>>::default());
        for index in 0..self.connections {
            connections.spawn(self.clone().one(index, over.clone(), report.clone()));
        }
        Running { connections, report }
    }

    async fn one(self, index: usize, over: Arc<AtomicBool>, total: Arc<Mutex<Report>>) {
        let end = Instant::now() + Duration::from_millis(self.duration_ms);
        let each = Duration::from_secs(1) * self.connections as u32 / self.rate.max(1);
        let mut ticks = interval(each);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut sent, mut sender) = (0, None);
        while Instant::now() < end && !over.load(Ordering::Relaxed) {
            if self.rate > 0 {
                ticks.tick().await;
            }
            let body = format!("request {sent} of connection {index}");
            sent += 1;
            let mut one = Report { requests: 1, ..Report::default() };
            let answered = timeout(REQUEST_TIMEOUT, self.send(&mut sender, &mut one, body)).await;
            if let Err(error) = answered.unwrap_or_else(|_| Err("no answer in time".to_owned())) {
                sender = None;
                one.failed = 1;
                one.errors.push(error);
            }
            lock(&total).add(one);
        }
    }

    async fn send(
        &self,
        held: &mut Option<Sender>,
        report: &mut Report,
        body: String,
    ) -> Result<(), String> {
        // A connection that the peer closed between two requests is opened anew, as every HTTP
        // client does; a request that was sent is never sent again.
        let usable = match held {
            Some(sender) => sender.ready().await,
            None => false,
        };
        if !usable {
            report.reconnects += u64::from(held.is_some());
            *held = Some(Sender::connect(self.to, self.http2).await?);
        }
        let Some(sender) = held else { return Err("no connection".to_owned()) };
        let uri = match self.http2 {
            true => format!("http://{}/echo", self.authority),
            false => "/echo".to_owned(),
        };
        let mut request = Request::post(uri);
        if !self.http2 {
            request = request.header("host", &self.authority);
        }
        let request = request
            .body(Full::new(Bytes::from(body.clone())))
            .map_err(|error| format!("the request: {error}"))?;
        let (status, answer) = sender.exchange(request).await?;
        match (status, answer == body.as_bytes()) {
            (StatusCode::OK, true) => Ok(()),
            (status, _) => {
                Err(format!("{status}, {:?} instead of {body:?}", String::from_utf8_lossy(&answer)))
            }
        }
    }
}

/// The connections of a load.
#[derive(Debug)]
pub struct Running {
    connections: JoinSet<()>,
    report: Arc<Mutex<Report>>,
}

impl Running {
    /// What has come of it so far.
    pub fn report(&self) -> Report {
        lock(&self.report).clone()
    }

    async fn total(mut self) -> Report {
        while let Some(ended) = self.connections.join_next().await {
            ended.expect("a connection of the load does not panic");
        }
        self.report()
    }
}

fn lock(report: &Mutex<Report>) -> MutexGuard<'_, Report> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Report {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        self.reconnects += other.reconnects;
        self.errors.extend(other.errors);
        self.errors.truncate(ERRORS_KEPT);
    }
}

/// One HTTP connection.
pub struct Sender {
    kind: Kind,
    _connection: JoinSet<()>,
}

enum Kind {
    Http1(hyper::client::conn::http1::SendRequest<Full<Bytes>>),
    Http2(hyper::client::conn::http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    /// Connects and shakes hands.
    ///
    /// # Errors
    /// What failed, in words.
    pub async fn connect(to: impl ToSocketAddrs, http2: bool) -> Result<Self, String> {
        let stream = TcpStream::connect(to).await.map_err(|error| format!("connect: {error}"))?;
        // Else small requests wait for acks.
        stream.set_nodelay(true).map_err(|error| format!("nodelay: {error}"))?;
        let (io, mut tasks) = (TokioIo::new(stream), JoinSet::new());
        let handshake = |error: hyper::Error| format!("handshake: {error}");
        let kind = if http2 {
            let (sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
                    .await
                    .map_err(handshake)?;
            // Its error is seen by the request that it fails.
            tasks.spawn(async move { drop(connection.await) });
            Kind::Http2(sender)
        } else {
            let (sender, connection) =
                hyper::client::conn::http1::handshake(io).await.map_err(handshake)?;
            tasks.spawn(async move { drop(connection.await) });
            Kind::Http1(sender)
        };
        Ok(Self { kind, _connection: tasks })
    }

    /// Whether the connection takes another request.
    pub async fn ready(&mut self) -> bool {
        match &mut self.kind {
            Kind::Http1(sender) => sender.ready().await.is_ok(),
            Kind::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    /// One request and its whole answer.
    ///
    /// # Errors
    /// What failed, in words.
    pub async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Bytes), String> {
        let response = match &mut self.kind {
            Kind::Http1(sender) => sender.send_request(request).await,
            Kind::Http2(sender) => sender.send_request(request).await,
        };
        let response = response.map_err(|error| format!("send: {error:?}"))?;
        let status = response.status();
        let said = response.headers().get("l5d-proxy-error").cloned();
        let body = response.into_body().collect().await.map_err(|e| format!("body: {e:?}"))?;
        let body = body.to_bytes();
        // Why a proxy has answered in the place of the application.
        let said =
            said.filter(|_| body.is_empty()).map(|said| Bytes::copy_from_slice(said.as_bytes()));
        Ok((status, said.unwrap_or(body)))
    }
}

/// A day: no test is that long.
const FOR_EVER_MS: u64 = 86_400_000;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
const ERRORS_KEPT: usize = 10;
