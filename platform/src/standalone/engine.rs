//! The store itself, near: entries in memory, every write on the disk before it is acknowledged.
//!
//! One writer (`writer`) takes waiting writes in groups, gives each the next revision and makes
//! them durable in one transaction of one redb file (`disk`). Only then do memory, watches and
//! the callers learn of them. Reads are answered from memory, which is always what is durable: so
//! a full or broken disk takes nothing away but writing. A watch reads the history by revision; it
//! has no queue of its own, and so can neither grow nor lose anything.

mod disk;
pub mod medium;
mod state;
mod writer;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use steadfast_api::Code;
use steadfast_process::Drain;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use self::disk::Disk;
use self::medium::{FileMedium, Medium};
use self::state::State;
pub use self::state::{Value, Write};
use self::writer::{Request, Writer};
use super::directory::Directory;
use super::metrics::Metrics;
use super::wire::HEARTBEAT;
use crate::keys::{KeyStoreError, create_private_dir};
use crate::store::{Entry, Event, Revision, Store, StoreError};

/// The open store. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    requests: mpsc::Sender<Request>,
}

/// What readers and the writer share. The writer alone changes it.
struct Shared {
    state: RwLock<State>,
    /// The newest revision: wakes the watches, which then read the state.
    revision: watch::Sender<Revision>,
    /// Why writes are refused at the moment.
    refusing: watch::Sender<Option<String>>,
    metrics: Metrics,
}

/// Why the store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Not a file of ours, cut short, damaged, or of another version.
    #[error(
        "{code}: the store's file {} cannot be opened: {reason}. Put a backup back; the file was \
         left as it is, do not delete it",
        path.display(), code = Code::STORE_CORRUPT
    )]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process has it.
    #[error(
        "another steadfast-store ({holder}) has {} open; only one process can: stop it first, or \
         use another --dir",
        path.display()
    )]
    InUse {
        /// Its directory.
        path: PathBuf,
        /// Who, as far as is known.
        holder: String,
    },
    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A directory cannot be made.
    #[error("the store has no place")]
    Place(#[from] KeyStoreError),
}

/// Why the writer ended.
#[derive(Debug, thiserror::Error)]
#[error("the store's writer panicked: {0}")]
pub struct WriterPanic(String);

impl Engine {
    /// Opens the store of a directory, and makes it if there is none: the engine, and its writer,
    /// which is a service of the process and ends once the drain has begun and what was asked
    /// before is done. One process only can have a store open.
    ///
    /// # Errors
    /// [`OpenError`]. A file that is no store of ours is never changed. A disk that is full or
    /// broken for writing alone is no error: the store then answers reads and refuses writes.
    pub fn open(
        directory: &Directory,
        drain: Drain,
    ) -> Result<(Self, impl Future<Output = Result<(), WriterPanic>> + Send + use<>), OpenError>
    {
        create_private_dir(&directory.store())?;
        let lock = lock(directory)?;
        let (engine, writer) = Self::open_on(FileMedium::new(directory.store_file()), drain)?;
        let work = async move {
            let ended = writer.await;
            // Held to the last: a second store must not open the file before it is closed.
            drop(lock);
            ended
        };
        Ok((engine, work))
    }

    /// As [`Engine::open`], on another medium than a file, and without a lock.
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn open_on<M: Medium>(
        medium: M,
        drain: Drain,
    ) -> Result<(Self, impl Future<Output = Result<(), WriterPanic>> + Send + use<M>), OpenError>
    {
        let mut disk = Disk::new(medium);
        let state = disk.start()?;
        let refusing = disk.reopen(&state).err().map(|error| error.to_string());
        if let Some(why) = &refusing {
            tracing::error!(code = %Code::STORE_WRITE_FAILED, %why, "the store cannot write; it answers reads");
        }
        let shared = Arc::new(Shared {
            revision: watch::Sender::new(state.revision()),
            refusing: watch::Sender::new(refusing),
            state: RwLock::new(state),
            metrics: Metrics::default(),
        });
        shared.note_revision();
        let (requests, receiver) = mpsc::channel(REQUESTS_MAX);
        let writer = Writer::new(Arc::clone(&shared), disk, receiver);
        Ok((Self { shared, requests }, writer.run(drain)))
    }

    /// Writes all of these or none, each with a revision of its own, in one transaction.
    ///
    /// # Errors
    /// The first that is not at its expected revision, or why nothing can be written.
    pub async fn write(&self, writes: Vec<Write>) -> Result<Vec<Revision>, StoreError> {
        for write in &writes {
            write.check()?;
        }
        let (reply, answer) = oneshot::channel();
        let stopping = || StoreError::Unavailable("the store is stopping".to_owned());
        let request = Request { writes, reply };
        self.requests.send(request).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// The newest revision, whenever there is another.
    pub fn revisions(&self) -> watch::Receiver<Revision> {
        self.shared.revision.subscribe()
    }

    /// Why writes are refused, as a level; `None` while they are not.
    pub fn refusing(&self) -> watch::Receiver<Option<String>> {
        self.shared.refusing.subscribe()
    }

    /// What the store counts.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// The entry of a key, now.
    pub fn entry(&self, key: &str) -> Option<Entry> {
        self.shared.read().entry(key)
    }

    /// All entries under a prefix, and the revision they are the state of.
    pub fn entries(&self, prefix: &str) -> (Vec<Entry>, Revision) {
        let state = self.shared.read();
        (state.entries(prefix), state.revision())
    }
}

#[async_trait::async_trait]
impl Store for Engine {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.entry(key))
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        Ok(self.entries(prefix))
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Option<Bytes>,
    ) -> Result<Revision, StoreError> {
        let write = Write { key: key.to_owned(), expected, value: value.map(Value::Fixed) };
        let revisions = self.write(vec![write]).await?;
        let none = || StoreError::Unavailable("the store wrote nothing".to_owned());
        revisions.first().copied().ok_or_else(none)
    }

    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<Event, StoreError>>, StoreError> {
        // Subscribed before the history is read, so that no revision can fall between.
        let revisions = self.revisions();
        self.shared.read().check_watchable(from)?;
        let watcher = Watcher {
            // A watch must not keep the store open: it holds what it reads, not who writes.
            shared: Arc::clone(&self.shared),
            prefix: prefix.to_owned(),
            told: from,
            synced: false,
            revisions,
            ready: VecDeque::new(),
            beats_at: Instant::now() + HEARTBEAT,
        };
        let events = stream::unfold(Some(watcher), |watcher| async move {
            let mut watcher = watcher?;
            let event = watcher.next().await;
            let watcher = event.is_ok().then_some(watcher);
            Some((event, watcher))
        });
        Ok(events.boxed())
    }
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, State> {
        // A panic while writing leaves a state that the writer had made durable.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes durable changes visible.
    fn publish(&self, events: Vec<Event>) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).apply(events);
        self.note_revision();
    }

    fn note_revision(&self) {
        let revision = self.read().revision();
        self.metrics.revision.set(i64::try_from(revision.0).unwrap_or(i64::MAX));
        self.revision.send_replace(revision);
    }
}

/// One watch: where it stands, and what it has read but not told.
struct Watcher {
    shared: Arc<Shared>,
    prefix: String,
    /// Everything up to this revision was told or does not concern it.
    told: Revision,
    /// Whether that was said.
    synced: bool,
    revisions: watch::Receiver<Revision>,
    ready: VecDeque<Event>,
    /// When it is told that nothing has happened.
    beats_at: Instant,
}

impl Watcher {
    async fn next(&mut self) -> Result<Event, StoreError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.beats_at = Instant::now() + HEARTBEAT;
                return Ok(event);
            }
            // Seen before it is read: a later change wakes again.
            self.revisions.borrow_and_update();
            let (events, reached, newest) =
                self.shared.read().history(&self.prefix, self.told, EVENTS_READ_MAX)?;
            self.synced &= events.is_empty();
            self.told = reached;
            self.ready = events.into();
            if !self.synced && reached == newest {
                self.synced = true;
                self.ready.push_back(Event::Synced(reached));
            }
            if self.ready.is_empty() && reached == newest {
                // Writes that do not concern it put nothing off.
                let woken = tokio::time::timeout_at(self.beats_at, self.revisions.changed()).await;
                match woken {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => {
                        return Err(StoreError::Unavailable("the store has stopped".to_owned()));
                    }
                    Err(_) => self.synced = false,
                }
            }
        }
    }
}

/// Takes the store for this process; the kernel gives it back however the process ends.
fn lock(directory: &Directory) -> Result<File, OpenError> {
    let path = directory.store().join("lock");
    let io = |action| {
        let path = path.clone();
        move |source| OpenError::Io { action, path, source }
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io("open"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let holder = std::fs::read_to_string(&path).unwrap_or_default();
            let holder = if holder.is_empty() { "of unknown pid".to_owned() } else { holder };
            return Err(OpenError::InUse { path: directory.path().to_owned(), holder });
        }
        Err(std::fs::TryLockError::Error(source)) => return Err(io("lock")(source)),
    }
    // Only for the message above: a full disk must not keep the store from reading.
    let note = file.set_len(0).and_then(|()| {
        io::Write::write_all(&mut &file, format!("pid {}", std::process::id()).as_bytes())
    });
    if let Err(error) = note {
        tracing::warn!(path = %path.display(), %error, "the lock file could not be written");
    }
    Ok(file)
}

/// Writes that wait at most; more wait to be let in.
const REQUESTS_MAX: usize = 256;

/// A watch reads its history in pieces, so that one far behind does not hold the lock for long.
const EVENTS_READ_MAX: usize = 256;
