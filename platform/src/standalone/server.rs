//! The store's server: gRPC on the unix socket, for processes of the same user only.
//!
//! Who may connect is decided by the kernel: the socket has mode 0600, and the peer's credentials
//! are checked again on every connection, since a mode says nothing about a socket that was passed
//! on. Clients may write under `trust/` alone; everything else is the store's own.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{self, BoxStream, Stream, StreamExt as _};
use prometheus_client::metrics::gauge::Gauge;
use steadfast_process::{Clock, Drain};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

use super::directory::Directory;
use super::engine::Engine;
use super::metrics::Metrics;
use super::wire::store_server::{Store as StoreService, StoreServer};
use super::wire::{self, HEARTBEAT, LIST_CHUNK_BYTES, MESSAGE_BYTES_MAX, entry_bytes};
use crate::store::{Entry, Event, Revision, Store as _, StoreError};

/// The server of one store, bound to its socket.
pub struct Server {
    listener: UnixListener,
    socket: Socket,
    service: Service,
}

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The file system refused, or the path is longer than a socket's can be (107 bytes).
    #[error("cannot {action} the socket {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// Which socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something that is no socket has its name.
    #[error("{} is in the place of the store's socket and is no socket: move it away", .0.display())]
    Occupied(PathBuf),
}

impl Server {
    /// Binds the socket of a directory whose store is open: then nobody else serves it, and a
    /// socket that is there was left by a process that is no more. It is replaced in one step.
    ///
    /// # Errors
    /// [`BindError`].
    pub fn bind(
        directory: &Directory,
        engine: Engine,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, BindError> {
        let (listener, socket) = bind(&directory.socket())?;
        let metrics = engine.metrics().clone();
        let watches = Arc::new(Semaphore::new(WATCHES_MAX));
        Ok(Self { listener, socket, service: Service { engine, clock, metrics, watches } })
    }

    /// Serves until the drain has begun and the last call has been answered; the socket goes then.
    ///
    /// # Errors
    /// The listener failed for good.
    pub async fn serve(self, drain: Drain) -> Result<(), tonic::transport::Error> {
        let connections = Connections {
            listener: self.listener,
            slots: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            metrics: self.service.metrics.clone(),
        };
        let service = StoreServer::new(Draining { service: self.service, drain: drain.clone() })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let _socket = self.socket;
        tonic::transport::Server::builder()
            .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
            .http2_keepalive_interval(Some(HEARTBEAT * 4))
            .http2_keepalive_timeout(Some(HEARTBEAT * 2))
            .add_service(service)
            .serve_with_incoming_shutdown(connections.incoming(), async move { drain.wait().await })
            .await
    }
}

fn bind(path: &Path) -> Result<(UnixListener, Socket), BindError> {
    let io = |action| move |source| BindError::Io { action, path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::Occupied(path.to_owned()));
        }
        _ => {}
    }
    // Made under another name and renamed: clients never find it missing or with a looser mode.
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other.map_err(io("replace"))?,
    }
    let listener = UnixListener::bind(&new).map_err(io("bind"))?;
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&new, private).map_err(io("protect"))?;
    let id = file_id(&new).map_err(io("look at"))?;
    std::fs::rename(&new, path).map_err(io("name"))?;
    Ok((listener, Socket { path: path.to_owned(), id }))
}

/// The socket that this server has made. It goes with the server, also with one that was not let
/// finish.
struct Socket {
    path: PathBuf,
    id: (u64, u64),
}

impl Drop for Socket {
    /// Removes it, unless another store's is in its place by now. Whoever dials next then hears
    /// that there is no store, not that one refuses.
    fn drop(&mut self) {
        let removed = match file_id(&self.path) {
            Ok(id) if id == self.id => std::fs::remove_file(&self.path),
            _ => Ok(()),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, socket = %self.path.display(), "the socket stays behind");
        }
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// Accepted connections whose peers may be there.
struct Connections {
    listener: UnixListener,
    slots: Arc<Semaphore>,
    metrics: Metrics,
}

impl Connections {
    fn incoming(self) -> impl Stream<Item = Result<Connection, Infallible>> {
        stream::unfold(self, |connections| async move {
            let connection = connections.accept().await;
            Some((Ok(connection), connections))
        })
    }

    async fn accept(&self) -> Connection {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    if let Some(connection) = self.admit(stream) {
                        return connection;
                    }
                    self.metrics.connections_refused.inc();
                }
                Err(error) => {
                    // Out of files, most likely: what is open goes on, and closes some day.
                    tracing::warn!(%error, "the store's socket could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn admit(&self, stream: UnixStream) -> Option<Connection> {
        let peer = match stream.peer_cred() {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!(%error, "a peer of the store's socket has no credentials: refused");
                return None;
            }
        };
        let own = rustix::process::geteuid().as_raw();
        if peer.uid() != own && peer.uid() != 0 {
            let (uid, pid) = (peer.uid(), peer.pid());
            tracing::warn!(uid, pid, own, "a process of another user dialled the store: refused");
            return None;
        }
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            let pid = peer.pid();
            tracing::warn!(
                pid,
                max = CONNECTIONS_MAX,
                "too many connections to the store: refused"
            );
            return None;
        };
        Some(Connection { stream, _held: Counted::new(&self.metrics.connections, slot) })
    }
}

/// A slot that is taken, counted while it is.
struct Counted {
    gauge: Gauge,
    _slot: OwnedSemaphorePermit,
}

impl Counted {
    fn new(gauge: &Gauge, slot: OwnedSemaphorePermit) -> Self {
        gauge.inc();
        Self { gauge: gauge.clone(), _slot: slot }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// A connection that holds its slot.
struct Connection {
    stream: UnixStream,
    _held: Counted,
}

impl Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

struct Service {
    engine: Engine,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    watches: Arc<Semaphore>,
}

/// The service while it drains: watches, which never end by themselves, end then.
struct Draining {
    service: Service,
    drain: Drain,
}

impl Service {
    fn now_ms(&self) -> u64 {
        self.clock.now().as_millis()
    }
}

#[tonic::async_trait]
impl StoreService for Draining {
    type ListStream = BoxStream<'static, Result<wire::ListReply, Status>>;
    type WatchStream = BoxStream<'static, Result<wire::WatchReply, Status>>;

    async fn get(
        &self,
        request: Request<wire::GetRequest>,
    ) -> Result<Response<wire::GetReply>, Status> {
        let entry = self.service.engine.entry(&request.get_ref().key).map(Into::into);
        Ok(Response::new(wire::GetReply { server_time_ms: self.service.now_ms(), entry }))
    }

    async fn list(
        &self,
        request: Request<wire::ListRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let (entries, revision) = self.service.engine.entries(&request.get_ref().prefix);
        let chunks = chunks(entries, revision, self.service.now_ms());
        Ok(Response::new(stream::iter(chunks.map(Ok)).boxed()))
    }

    async fn compare_and_swap(
        &self,
        request: Request<wire::CompareAndSwapRequest>,
    ) -> Result<Response<wire::CompareAndSwapReply>, Status> {
        use wire::compare_and_swap_reply::Outcome;
        let request = request.into_inner();
        let expected = request.expected.map(Revision);
        let written = if request.key.starts_with(CLIENTS_PREFIX) {
            self.service.engine.compare_and_swap(&request.key, expected, request.value).await
        } else {
            let key = &request.key;
            Err(StoreError::Denied(format!("{key:?}: clients write under {CLIENTS_PREFIX} only")))
        };
        let outcome = match written {
            Ok(revision) => Outcome::Revision(revision.0),
            Err(StoreError::Conflict { actual, .. }) => {
                Outcome::Conflict(wire::Conflict { actual: actual.map(|revision| revision.0) })
            }
            Err(StoreError::Denied(why)) => Outcome::Denied(why),
            Err(StoreError::WriteFailed(why)) => Outcome::WriteFailed(why),
            Err(
                error @ (StoreError::Compacted(_)
                | StoreError::NoSuchKind(_)
                | StoreError::Unavailable(_)
                | StoreError::Unreadable { .. }),
            ) => {
                return Err(Status::unavailable(error.to_string()));
            }
        };
        let outcome = Some(outcome);
        let server_time_ms = self.service.now_ms();
        Ok(Response::new(wire::CompareAndSwapReply { server_time_ms, outcome }))
    }

    async fn watch(
        &self,
        request: Request<wire::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let Ok(slot) = Arc::clone(&self.service.watches).try_acquire_owned() else {
            let why = format!("{WATCHES_MAX} watches are open, which is the most there can be");
            return Err(Status::resource_exhausted(why));
        };
        let held = Counted::new(&self.service.metrics.watches, slot);
        let request = request.into_inner();
        let events = match self.service.engine.watch(&request.prefix, Revision(request.from)).await
        {
            Ok(events) => events,
            Err(error) => stream::iter([Err(error)]).boxed(),
        };
        let clock = Arc::clone(&self.service.clock);
        let replies = events.map(move |event| {
            // The watch is counted as long as its stream lives.
            let _ = &held;
            watch_reply(event, clock.now().as_millis())
        });
        let drain = self.drain.clone();
        let ended = async move { drain.wait().await };
        Ok(Response::new(replies.take_until(Box::pin(ended)).boxed()))
    }
}

fn watch_reply(
    event: Result<Event, StoreError>,
    server_time_ms: u64,
) -> Result<wire::WatchReply, Status> {
    let event = match event {
        Ok(event) => event.into(),
        Err(StoreError::Compacted(oldest)) => wire::watch_reply::Event::Compacted(oldest.0),
        Err(error) => return Err(Status::unavailable(error.to_string())),
    };
    Ok(wire::WatchReply { server_time_ms, event: Some(event) })
}

/// A list in messages of bounded size; at least one, and the last says that it is.
fn chunks(
    entries: Vec<Entry>,
    revision: Revision,
    server_time_ms: u64,
) -> impl Iterator<Item = wire::ListReply> + Send {
    let mut entries = entries.into_iter().peekable();
    let mut complete = false;
    std::iter::from_fn(move || {
        if complete {
            return None;
        }
        let (mut chunk, mut bytes) = (Vec::new(), 0);
        while bytes < LIST_CHUNK_BYTES
            && let Some(entry) = entries.next()
        {
            bytes += entry_bytes(&entry.key, &entry.value);
            chunk.push(entry.into());
        }
        complete = entries.peek().is_none();
        Some(wire::ListReply { server_time_ms, revision: revision.0, entries: chunk, complete })
    })
}

/// What clients may write.
const CLIENTS_PREFIX: &str = "trust/";

/// Each process of ours has one or two connections.
const CONNECTIONS_MAX: usize = 256;
const STREAMS_PER_CONNECTION_MAX: u32 = 128;
const WATCHES_MAX: usize = 1024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_cut_into_messages_and_only_the_last_is_complete() {
        let entry = |index: u64| Entry {
            key: format!("trust/{index}"),
            value: vec![0; LIST_CHUNK_BYTES / 2].into(),
            revision: Revision(index),
        };
        let replies: Vec<_> = chunks((1..=5).map(entry).collect(), Revision(5), 0).collect();
        let complete: Vec<_> = replies.iter().map(|reply| reply.complete).collect();
        assert_eq!(complete, [false, false, true]);
        assert_eq!(replies.iter().map(|reply| reply.entries.len()).sum::<usize>(), 5);
        let empty: Vec<_> = chunks(Vec::new(), Revision(5), 0).collect();
        assert!(empty.len() == 1 && empty[0].complete);
    }
}
