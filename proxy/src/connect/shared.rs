//! Connections of HTTP/2 that requests share, by one worker.
//!
//! One for each peer and expected identity, and more once the server allows no further stream on
//! it, up to a bound; then requests wait in line for a stream to end, and are refused after a
//! while. Requests that come while a connection is being made wait for the same attempt, whose
//! failure is told once; it is a task of the worker's, so that it goes on when they leave. A
//! connection of an older TLS snapshot, or of an SVID near its end, gets no new request and ends
//! with its last stream.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{self, select_all};
use steadfast_api::{SpiffeId, UnixTime};
use tokio::sync::{Mutex, oneshot};
use tokio::time::timeout;

use super::pool::IDLE_MAX;
use super::{Connect, Server, refused_late};
use crate::discovery::Endpoint;
use crate::http::Peer;
use crate::http::http2::{self, Client, ConnectError};
use crate::metrics::{Direction, Labels};
use crate::refusal::Refusal;
use crate::transport::Session;

/// The connections of a worker.
#[derive(Default)]
pub(super) struct Shared(RefCell<HashMap<Key, Rc<Connections>>>);

/// One connection.
pub(super) struct Pooled {
    pub(super) client: Client,
    /// When it was last given a request.
    pub(super) used: Cell<Duration>,
    generation: u64,
    retire_at: Option<UnixTime>,
}

/// Whom connections lead to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    addr: SocketAddr,
    inbound_port: Option<u16>,
    id: Option<SpiffeId>,
}

/// The connections to one peer.
#[derive(Default)]
struct Connections {
    open: RefCell<Vec<Rc<Pooled>>>,
    attempt: RefCell<Option<Attempt>>,
    /// Held by the one request whose turn it is when all are full.
    turn: Mutex<()>,
    /// How many requests wait for their turn, or have it.
    waiting: Cell<usize>,
}

/// A connection that is being made with the TLS snapshot of this generation.
#[derive(Clone)]
struct Attempt {
    generation: u64,
    opened: future::Shared<oneshot::Receiver<Opened>>,
}

type Opened = Result<Rc<Pooled>, Rc<Refusal>>;

/// Who asks for a connection, and whom it leads to.
struct Wanted<'a, L> {
    direction: Direction,
    endpoint: &'a Arc<Endpoint>,
    labels: L,
}

impl Connect {
    /// A connection that has room for one more request. The caller sends it before it awaits
    /// anything else: nobody else can then take its place.
    pub(super) async fn shared(
        self: &Rc<Self>,
        direction: Direction,
        endpoint: &Arc<Endpoint>,
        labels: impl Fn() -> Labels,
    ) -> Opened {
        let connections = self.pool.shared.to(endpoint);
        let wanted = Wanted { direction, endpoint, labels };
        // Whoever waits in line comes first.
        if connections.waiting.get() == 0
            && let Some(pooled) = self.find_or_open(&connections, &wanted).await?
        {
            return Ok(pooled);
        }
        // Boxed: a request that need not wait pays for none of it.
        Box::pin(self.in_line(&connections, &wanted)).await
    }

    /// Waits for a turn, and then for room.
    async fn in_line<L: Fn() -> Labels>(
        self: &Rc<Self>,
        connections: &Rc<Connections>,
        wanted: &Wanted<'_, L>,
    ) -> Opened {
        let Some(_place) = Place::in_line(connections) else {
            return Err(self.overloaded(wanted, "too many requests wait for the server"));
        };
        let turn = async {
            let _turn = connections.turn.lock().await;
            loop {
                if let Some(pooled) = self.find_or_open(connections, wanted).await? {
                    return Ok(pooled);
                }
                connections.freed().await;
            }
        };
        timeout(WAIT_MAX, turn).await.unwrap_or_else(|_| {
            Err(self.overloaded(wanted, "the server takes no more requests at once"))
        })
    }

    /// Lets go of what is closed, old or has idled for long.
    pub(super) fn sweep_shared(&self) {
        let (now, since_boot) = (self.clock.now(), self.clock.since_boot());
        let generation = self.tls.now().generation;
        self.pool.shared.0.borrow_mut().retain(|_, connections| {
            connections.open.borrow_mut().retain(|pooled| {
                let idle = since_boot.saturating_sub(pooled.used.get()) > IDLE_MAX;
                pooled.is_usable(now, generation) && !(idle && pooled.client.streams() == 0)
            });
            // Requests and attempts hold it too.
            Rc::strong_count(connections) > 1 || !connections.open.borrow().is_empty()
        });
    }

    /// `None`: all connections are full, and there may be, or can be, no more of them.
    async fn find_or_open<L: Fn() -> Labels>(
        self: &Rc<Self>,
        connections: &Rc<Connections>,
        wanted: &Wanted<'_, L>,
    ) -> Result<Option<Rc<Pooled>>, Rc<Refusal>> {
        for _ in 0..CONNECTIONS_MAX {
            let (now, generation) = (self.clock.now(), self.tls.now().generation);
            if let Some(pooled) = connections.with_room(now, generation) {
                return Ok(Some(pooled));
            }
            let attempt = match connections.attempt(generation) {
                Some(attempt) => attempt,
                None if connections.open.borrow().len() >= CONNECTIONS_MAX => return Ok(None),
                None => self.begin(connections, generation, wanted),
            };
            match attempt.opened.await {
                // One that began before a new snapshot is not for requests that came after it.
                Ok(Ok(pooled))
                    if pooled.client.has_room()
                        && pooled.is_usable(now, self.tls.now().generation) =>
                {
                    return Ok(Some(pooled));
                }
                // Others were quicker.
                Ok(Ok(_)) => {}
                Ok(Err(refusal)) if connections.open.borrow().is_empty() => return Err(refusal),
                Ok(Err(_)) => return Ok(None),
                Err(_) => {
                    connections.ended(generation);
                    let panicked = std::io::Error::other("making the connection failed");
                    return Err(Rc::new(Refusal::Gone(panicked)));
                }
            }
        }
        Ok(None)
    }

    /// Starts to make a connection.
    fn begin<L: Fn() -> Labels>(
        self: &Rc<Self>,
        connections: &Rc<Connections>,
        generation: u64,
        wanted: &Wanted<'_, L>,
    ) -> Attempt {
        let (told, opened) = oneshot::channel();
        let attempt = Attempt { generation, opened: opened.shared() };
        connections.attempt.replace(Some(attempt.clone()));
        let (connect, connections) = (self.clone(), connections.clone());
        let (direction, endpoint) = (wanted.direction, wanted.endpoint.clone());
        let labels = (wanted.labels)();
        self.http.tasks().spawn_counted(async move {
            let opened = connect.open(&endpoint, labels).await.map_err(|refusal| {
                connect.report(direction, endpoint.addr, &refusal);
                Rc::new(refusal)
            });
            connections.ended(generation);
            if let Ok(pooled) = &opened {
                connections.open.borrow_mut().push(pooled.clone());
            }
            // With nobody left who waits, it is there for the next one.
            let _ = told.send(opened);
        });
        attempt
    }

    async fn open(&self, endpoint: &Endpoint, labels: Labels) -> Result<Rc<Pooled>, Refusal> {
        let Server { io, peer, late, generation, retire_at, .. } =
            self.endpoint(endpoint, Session::Http2, labels).await?;
        let peer = if peer.is_some() { Peer::Mesh } else { Peer::Application };
        let addr = endpoint.addr;
        let unreachable = |source| Refusal::Unreachable { addr, source };
        let connected = http2::connect(io, &self.http, peer).await;
        let (client, driver) = connected.map_err(|error| match (error, &late) {
            (ConnectError::Io(error), Some(late)) => refused_late(late, addr, error),
            (ConnectError::Io(error), None) => unreachable(error),
            (other, _) => unreachable(std::io::Error::other(other)),
        })?;
        self.http.tasks().spawn_counted(async move {
            // Requests in flight are told; the connection itself has nothing more to say.
            if let Err(error) = driver.await {
                tracing::debug!(%addr, %error, "a connection of HTTP/2 broke");
            }
        });
        let used = Cell::new(self.clock.since_boot());
        Ok(Rc::new(Pooled { client, used, generation, retire_at }))
    }

    fn overloaded<L>(&self, wanted: &Wanted<'_, L>, why: &'static str) -> Rc<Refusal> {
        let refusal = Refusal::Overloaded(why);
        self.report(wanted.direction, wanted.endpoint.addr, &refusal);
        Rc::new(refusal)
    }
}

impl Shared {
    /// The connections to an endpoint.
    fn to(&self, endpoint: &Endpoint) -> Rc<Connections> {
        let key = Key {
            addr: endpoint.addr,
            inbound_port: endpoint.inbound_port,
            id: endpoint.identity.as_ref().map(|expected| expected.id.clone()),
        };
        self.0.borrow_mut().entry(key).or_default().clone()
    }

    /// Lets go of everything: what runs ends by itself.
    pub(super) fn clear(&self) {
        self.0.take();
    }
}

impl Connections {
    /// The oldest that can be used, so that those which were opened for a burst idle after it.
    fn with_room(&self, now: UnixTime, generation: u64) -> Option<Rc<Pooled>> {
        let mut open = self.open.borrow_mut();
        let usable = |pooled: &Rc<Pooled>| pooled.is_usable(now, generation);
        let found = open.iter().find(|pooled| pooled.client.has_room() && usable(pooled)).cloned();
        if found.is_none() {
            open.retain(usable);
        }
        found
    }

    fn attempt(&self, generation: u64) -> Option<Attempt> {
        let attempt = self.attempt.borrow();
        attempt.as_ref().filter(|attempt| attempt.generation == generation).cloned()
    }

    /// Forgets an attempt, unless one with a newer snapshot has taken its place.
    fn ended(&self, generation: u64) {
        self.attempt.borrow_mut().take_if(|attempt| attempt.generation == generation);
    }

    /// Waits until one of them may have room.
    async fn freed(&self) {
        let open = self.open.borrow().clone();
        let freed: Vec<_> = open.iter().map(|pooled| Box::pin(pooled.client.freed())).collect();
        if !freed.is_empty() {
            select_all(freed).await;
        }
    }
}

impl Pooled {
    fn is_usable(&self, now: UnixTime, generation: u64) -> bool {
        let fresh = self.generation == 0 || self.generation == generation;
        fresh && self.retire_at.is_none_or(|at| now < at) && !self.client.is_closed()
    }
}

/// A place in the line of those who wait.
struct Place<'a>(&'a Connections);

impl<'a> Place<'a> {
    fn in_line(connections: &'a Connections) -> Option<Self> {
        let waiting = connections.waiting.get();
        (waiting < WAITING_MAX).then(|| {
            connections.waiting.set(waiting + 1);
            Self(connections)
        })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}

/// To one peer. Servers allow 100 streams or more on each (RFC 9113 §6.5.2 asks for that), so that
/// this worker can have 1,600 requests or more open there.
const CONNECTIONS_MAX: usize = 16;
/// Of one peer.
const WAITING_MAX: usize = 1024;
/// For a stream to end when all are taken: Linkerd's time until it fails fast.
const WAIT_MAX: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests;
