//! A process's way to the store: [`Store`] over the unix socket of `steadfast-store`.
//!
//! It connects when it is first asked and again whenever the connection broke; it retries nothing
//! by itself, since only the caller knows whether a write may be repeated. Every call has a
//! deadline, and a watch that is silent for too long counts as broken. Nothing is ever answered
//! from a cache.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use hyper_util::rt::TokioIo;
use steadfast_api::UnixTime;
use steadfast_process::{Clock, SystemClock};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use super::directory::Directory;
use super::wire::store_client::StoreClient;
use super::wire::{self, HEARTBEAT, MESSAGE_BYTES_MAX};
use crate::store::{Entry, Event, Revision, Store, StoreError};

/// A client of `steadfast-store`. Cheap to clone; all clones share one connection.
#[derive(Clone)]
pub struct Client {
    stub: StoreClient<Channel>,
    socket: Arc<Path>,
    clock_offset_ms: Arc<AtomicI64>,
}

impl Client {
    /// A client of the store of this directory; connects when it is first asked. Must be made
    /// within a tokio runtime.
    pub fn new(directory: &Directory) -> Self {
        let socket: Arc<Path> = directory.socket().into();
        let path = Arc::clone(&socket);
        let connector = tower::service_fn(move |_: http::Uri| connect(path.to_path_buf()));
        // The name is never looked up: the connector knows only the socket.
        let channel = Endpoint::from_static("http://steadfast-store")
            .connect_timeout(CALL_TIMEOUT)
            .connect_with_connector_lazy(connector);
        let stub = StoreClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Self { stub, socket, clock_offset_ms: Arc::new(AtomicI64::new(OFFSET_UNKNOWN)) }
    }

    /// Our clock less the store's, in milliseconds, at the last reply; `None` before the first.
    pub fn clock_offset_millis(&self) -> Option<i64> {
        let offset = self.clock_offset_ms.load(Ordering::Relaxed);
        (offset != OFFSET_UNKNOWN).then_some(offset)
    }

    fn note_time(&self, server_time_ms: u64) {
        let offset = SystemClock.now().offset_millis(UnixTime::from_millis(server_time_ms));
        self.clock_offset_ms.store(offset, Ordering::Relaxed);
    }

    /// A reply within the deadline, or why there is none.
    async fn within<T>(
        &self,
        timeout: Duration,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, StoreError> {
        match tokio::time::timeout(timeout, call).await {
            Ok(reply) => reply.map_err(|status| self.refusal(&status)),
            Err(_) => Err(self.unavailable(&format!("no answer within {timeout:?}"))),
        }
    }

    fn refusal(&self, status: &Status) -> StoreError {
        match status.code() {
            Code::PermissionDenied | Code::InvalidArgument => {
                StoreError::Denied(status.message().to_owned())
            }
            _ => self.unavailable(&self.cause(status)),
        }
    }

    /// What a person needs to know of a call that failed: as a rule that nobody listens, which
    /// tonic hides beneath layers of its own.
    fn cause(&self, status: &Status) -> String {
        let mut source = std::error::Error::source(status);
        while let Some(error) = source {
            match error.downcast_ref::<io::Error>() {
                Some(error) if NOBODY_LISTENS.contains(&error.kind()) => {
                    let dir = self.socket.parent().unwrap_or(&self.socket).display();
                    return format!("nothing listens there: start steadfast-store --dir {dir}");
                }
                Some(error) => return error.to_string(),
                None => source = error.source(),
            }
        }
        status.message().to_owned()
    }

    fn unavailable(&self, why: &str) -> StoreError {
        StoreError::Unavailable(format!("{}: {why}", self.socket.display()))
    }

    async fn next_event(
        &self,
        stream: &mut Streaming<wire::WatchReply>,
    ) -> Result<Event, StoreError> {
        let Some(reply) = self.within(SILENCE_MAX, stream.message()).await? else {
            return Err(self.unavailable("the store ended the watch"));
        };
        self.note_time(reply.server_time_ms);
        match reply.event {
            Some(wire::watch_reply::Event::Put(entry)) => Ok(Event::Put(entry.into())),
            Some(wire::watch_reply::Event::Deleted(deleted)) => {
                let revision = Revision(deleted.revision);
                Ok(Event::Deleted { key: deleted.key, revision })
            }
            Some(wire::watch_reply::Event::Synced(revision)) => {
                Ok(Event::Synced(Revision(revision)))
            }
            Some(wire::watch_reply::Event::Compacted(oldest)) => {
                Err(StoreError::Compacted(Revision(oldest)))
            }
            // An event of a newer store: it is told again as part of a list.
            None => Err(self.unavailable("the store sent an event of no known kind")),
        }
    }
}

#[async_trait::async_trait]
impl Store for Client {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let request = wire::GetRequest { key: key.to_owned() };
        let mut stub = self.stub.clone();
        let reply = self.within(CALL_TIMEOUT, stub.get(request)).await?.into_inner();
        self.note_time(reply.server_time_ms);
        Ok(reply.entry.map(Entry::from))
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        let request = wire::ListRequest { prefix: prefix.to_owned() };
        let mut stub = self.stub.clone();
        let mut chunks = self.within(CALL_TIMEOUT, stub.list(request)).await?.into_inner();
        let mut entries = Vec::new();
        loop {
            let Some(chunk) = self.within(CALL_TIMEOUT, chunks.message()).await? else {
                return Err(self.unavailable("the store cut a list off"));
            };
            self.note_time(chunk.server_time_ms);
            entries.extend(chunk.entries.into_iter().map(Entry::from));
            if chunk.complete {
                return Ok((entries, Revision(chunk.revision)));
            }
        }
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Option<Bytes>,
    ) -> Result<Revision, StoreError> {
        use wire::compare_and_swap_reply::Outcome;
        let request = wire::CompareAndSwapRequest {
            key: key.to_owned(),
            expected: expected.map(|revision| revision.0),
            value,
        };
        let mut stub = self.stub.clone();
        let reply = self.within(CALL_TIMEOUT, stub.compare_and_swap(request)).await?.into_inner();
        self.note_time(reply.server_time_ms);
        match reply.outcome {
            Some(Outcome::Revision(revision)) => Ok(Revision(revision)),
            Some(Outcome::Conflict(conflict)) => Err(StoreError::Conflict {
                key: key.to_owned(),
                expected,
                actual: conflict.actual.map(Revision),
            }),
            Some(Outcome::WriteFailed(why)) => Err(StoreError::WriteFailed(why)),
            Some(Outcome::Denied(why)) => Err(StoreError::Denied(why)),
            None => Err(self.unavailable("the store answered a write in no known way")),
        }
    }

    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<Event, StoreError>>, StoreError> {
        let request = wire::WatchRequest { prefix: prefix.to_owned(), from: from.0 };
        let mut stub = self.stub.clone();
        let replies = self.within(CALL_TIMEOUT, stub.watch(request)).await?.into_inner();
        let events = stream::unfold(Some((self.clone(), replies)), |state| async move {
            let (client, mut replies) = state?;
            let event = client.next_event(&mut replies).await;
            // After an error nothing follows: the caller resumes from what it has seen.
            let state = event.is_ok().then_some((client, replies));
            Some((event, state))
        });
        Ok(events.boxed())
    }
}

/// Connects, and makes sure that it is the store of our own user that answers: whoever else could
/// put a socket in its place would decide what this process believes.
async fn connect(socket: PathBuf) -> io::Result<TokioIo<UnixStream>> {
    let stream = UnixStream::connect(&socket).await?;
    let (peer, own) = (stream.peer_cred()?.uid(), rustix::process::geteuid().as_raw());
    if peer != own && peer != 0 {
        let why = format!("the socket belongs to user {peer}, this process to user {own}");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    Ok(TokioIo::new(stream))
}

const NOBODY_LISTENS: [io::ErrorKind; 2] =
    [io::ErrorKind::ConnectionRefused, io::ErrorKind::NotFound];

const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Three signs of life that did not come.
const SILENCE_MAX: Duration = HEARTBEAT.saturating_mul(3);

const OFFSET_UNKNOWN: i64 = i64::MIN;
