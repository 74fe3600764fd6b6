//! The store's file: three tables of one redb database, changed by durable transactions alone.
//!
//! redb stops using a file at the first I/O error; it is then closed, and opened again before the
//! next write. What is in memory was durable before, so it decides: whatever a failed commit has
//! left in the file, complete or not, is replaced by it before anything else is written.

use std::panic::AssertUnwindSafe;

use bytes::Bytes;
use redb::{
    Builder, Database, Durability, ReadableDatabase as _, ReadableTable as _, StorageBackend,
    TableDefinition, WriteTransaction,
};

use super::OpenError;
use super::medium::{Medium, Trial};
use super::state::{State, revision_of};
use crate::store::{Entry, Event, Revision};

/// The database on its medium; closed while the medium fails.
pub(super) struct Disk<M> {
    medium: M,
    database: Option<Database>,
}

/// Why the disk did not do it. The reason alone matters: what to do is always to try again.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct DiskError(String);

impl<M: Medium> Disk<M> {
    pub(super) fn new(medium: M) -> Self {
        Self { medium, database: None }
    }

    /// The state that is there, or a new store if there is none. What is there is not changed.
    pub(super) fn start(&self) -> Result<State, OpenError> {
        let path = || self.medium.path().to_owned();
        let corrupt =
            |reason: String| OpenError::Corrupt { path: self.medium.path().to_owned(), reason };
        let found = self.medium.open().map_err(|error| corrupt(error.to_string()))?;
        let Some(backend) = found else {
            let state = State::default();
            self.create(&state).map_err(|error| OpenError::Io {
                action: "create",
                path: path(),
                source: std::io::Error::other(error),
            })?;
            return Ok(state);
        };
        let trial = Trial::new(backend).map_err(|error| corrupt(error.to_string()))?;
        let database = open(trial).map_err(|error| corrupt(error.0))?;
        load(&database).map_err(|error| corrupt(error.0))
    }

    /// Opens the database and makes sure that it holds this state, which was durable before.
    pub(super) fn reopen(&mut self, state: &State) -> Result<(), DiskError> {
        // Closed first: two handles of one file would not know of each other.
        self.database = None;
        if self.medium.open().map_err(reason)?.is_none() {
            tracing::error!(path = %self.medium.path().display(), "the store's file is gone: it is made again from memory");
            self.create(state)?;
        }
        let backend = self.medium.open().map_err(reason)?.ok_or_else(|| reason("it is gone"))?;
        let database = open(backend)?;
        if load(&database)? == *state {
            // Nothing is missing; but whether it can be written is known only by writing.
            touch(&database, state)?;
        } else {
            tracing::warn!("what a failed write left in the store's file is undone");
            rewrite(&database, state)?;
        }
        self.database = Some(database);
        Ok(())
    }

    /// Makes events durable, and lets the oldest of the history go. After an error the disk is to
    /// be opened again.
    pub(super) fn commit(&mut self, events: &[Event], overflow: usize) -> Result<(), DiskError> {
        let database = self.database.as_ref().ok_or_else(|| reason("it is not open"))?;
        let there = self.medium.check().map_err(reason);
        let done = there.and_then(|()| commit(database, events, overflow));
        if done.is_err() {
            self.database = None;
        }
        done
    }

    pub(super) fn is_open(&self) -> bool {
        self.database.is_some()
    }

    fn create(&self, state: &State) -> Result<(), DiskError> {
        let database = open(self.medium.draft().map_err(reason)?)?;
        rewrite(&database, state)?;
        drop(database);
        self.medium.publish().map_err(reason)
    }
}

fn open(backend: impl StorageBackend) -> Result<Database, DiskError> {
    // redb judges most damage by an error, but not all: a panic must not hide which file it was.
    let opened = std::panic::catch_unwind(AssertUnwindSafe(|| {
        Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend)
    }));
    match opened {
        Ok(database) => database.map_err(reason),
        Err(_) => Err(reason("it is damaged in a way that redb cannot name")),
    }
}

fn load(database: &Database) -> Result<State, DiskError> {
    let loaded = std::panic::catch_unwind(AssertUnwindSafe(|| load_tables(database)));
    loaded.unwrap_or_else(|_| Err(reason("it is damaged in a way that redb cannot name")))
}

fn load_tables(database: &Database) -> Result<State, DiskError> {
    let transaction = database.begin_read().map_err(reason)?;
    let meta = transaction.open_table(META).map_err(foreign)?;
    let number = |name: &str| -> Result<Option<u64>, DiskError> {
        Ok(meta.get(name).map_err(reason)?.map(|guard| guard.value()))
    };
    match number(FORMAT_KEY)? {
        Some(FORMAT) => {}
        Some(other) => {
            return Err(reason(format!("it has format {other}; this binary knows {FORMAT}")));
        }
        None => return Err(reason("it names no format")),
    }
    let revision = number(REVISION_KEY)?.ok_or_else(|| reason("it names no revision"))?;
    let mut entries = Vec::new();
    for row in transaction.open_table(ENTRIES).map_err(foreign)?.iter().map_err(reason)? {
        let (key, row) = row.map_err(reason)?;
        let (revision, value) = row.value();
        let (key, value) = (key.value().to_owned(), Bytes::copy_from_slice(value));
        entries.push(Entry { key, value, revision: Revision(revision) });
    }
    let mut history = Vec::new();
    for row in transaction.open_table(HISTORY).map_err(foreign)?.iter().map_err(reason)? {
        let (revision, row) = row.map_err(reason)?;
        let revision = Revision(revision.value());
        let (key, value) = row.value();
        let key = key.to_owned();
        history.push(match value {
            Some(value) => {
                let value = Bytes::copy_from_slice(value);
                Event::Put(Entry { key, value, revision })
            }
            None => Event::Deleted { key, revision },
        });
    }
    State::restore(Revision(revision), entries, history).map_err(DiskError)
}

fn commit(database: &Database, events: &[Event], overflow: usize) -> Result<(), DiskError> {
    let mut transaction = begin(database)?;
    write_events(&mut transaction, events)?;
    {
        let mut history = transaction.open_table(HISTORY).map_err(reason)?;
        for _ in 0..overflow {
            history.pop_first().map_err(reason)?;
        }
    }
    transaction.commit().map_err(reason)
}

fn write_events(transaction: &mut WriteTransaction, events: &[Event]) -> Result<(), DiskError> {
    let mut entries = transaction.open_table(ENTRIES).map_err(reason)?;
    let mut history = transaction.open_table(HISTORY).map_err(reason)?;
    for event in events {
        let revision = revision_of(event).0;
        match event {
            Event::Deleted { key, .. } => {
                entries.remove(key.as_str()).map_err(reason)?;
                history.insert(revision, (key.as_str(), None)).map_err(reason)?;
            }
            Event::Put(Entry { key, value, .. }) => {
                let (key, value) = (key.as_str(), value.as_ref());
                entries.insert(key, (revision, value)).map_err(reason)?;
                history.insert(revision, (key, Some(value))).map_err(reason)?;
            }
            Event::Synced(_) => {}
        }
    }
    if let Some(last) = events.last() {
        let mut meta = transaction.open_table(META).map_err(reason)?;
        meta.insert(REVISION_KEY, revision_of(last).0).map_err(reason)?;
    }
    Ok(())
}

/// Writes what is there already.
fn touch(database: &Database, state: &State) -> Result<(), DiskError> {
    let transaction = begin(database)?;
    let mut meta = transaction.open_table(META).map_err(reason)?;
    meta.insert(REVISION_KEY, state.revision().0).map_err(reason)?;
    drop(meta);
    transaction.commit().map_err(reason)
}

/// Replaces everything by this state, in one transaction.
fn rewrite(database: &Database, state: &State) -> Result<(), DiskError> {
    let transaction = begin(database)?;
    {
        let mut meta = transaction.open_table(META).map_err(reason)?;
        let mut entries = transaction.open_table(ENTRIES).map_err(reason)?;
        let mut history = transaction.open_table(HISTORY).map_err(reason)?;
        meta.insert(FORMAT_KEY, FORMAT).map_err(reason)?;
        meta.insert(REVISION_KEY, state.revision().0).map_err(reason)?;
        entries.retain(|_, _| false).map_err(reason)?;
        for Entry { key, value, revision } in state.entries("") {
            entries.insert(key.as_str(), (revision.0, value.as_ref())).map_err(reason)?;
        }
        history.retain(|_, _| false).map_err(reason)?;
        for event in state.all_history() {
            let row = match event {
                Event::Deleted { key, .. } => (key.as_str(), None),
                Event::Put(entry) => (entry.key.as_str(), Some(entry.value.as_ref())),
                Event::Synced(_) => continue,
            };
            history.insert(revision_of(event).0, row).map_err(reason)?;
        }
    }
    transaction.commit().map_err(reason)
}

fn begin(database: &Database) -> Result<WriteTransaction, DiskError> {
    let mut transaction = database.begin_write().map_err(reason)?;
    // redb's default, said once more because everything rests on it: commit returns after a sync.
    transaction.set_durability(Durability::Immediate).map_err(reason)?;
    // A second sync per commit, for a file that needs no checksum to be believed after a power cut
    // and no walk through all of it before the store serves again.
    transaction.set_quick_repair(true);
    Ok(transaction)
}

fn reason(error: impl ToString) -> DiskError {
    DiskError(error.to_string())
}

/// A table that is not there or has other types is of someone else's database.
fn foreign(error: redb::TableError) -> DiskError {
    DiskError(format!("it is a redb database, but no store of Steadfast ({error})"))
}

/// Key to revision and value.
const ENTRIES: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("entries");
/// Revision to key and value; no value is a deletion.
const HISTORY: TableDefinition<'_, u64, (&str, Option<&[u8]>)> = TableDefinition::new("history");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const FORMAT_KEY: &str = "format";
const REVISION_KEY: &str = "revision";
const FORMAT: u64 = 1;

/// Everything is in memory anyway; the cache is for writing.
const CACHE_BYTES: usize = 4 << 20;
