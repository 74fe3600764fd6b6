//! Follows the resources of the store and puts them on the board.
//!
//! Each kind is followed by itself, as the API server tells them. Changes are gathered until the
//! store says that it has told everything up to a revision, so that what was written together is
//! seen together. While the store is away the board keeps what it has, which is logged once and
//! counted, and once more when it is back.

use std::collections::{BTreeSet, HashSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::select_all;
use steadfast_platform::follow::{Change as StoreChange, follow_read};
use steadfast_platform::store::{Entry, Event, RESOURCES_PREFIX};
use steadfast_platform::{Store, StoreError};
use steadfast_process::readiness::Component;
use steadfast_process::{Clock, ErrorChain};

use crate::board::{Board, Change};
use crate::index::{Kind, Name, Object, ObjectError, parse_key};
use crate::metrics::Metrics;

/// Follows the resources until it is dropped.
pub async fn follow(
    store: Arc<dyn Store>,
    board: Arc<Board>,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    synced: Component,
) -> Infallible {
    let standing = Standing { away: BTreeSet::new(), unread: Kind::ALL.into() };
    let common = Arc::new(Common { board, metrics, clock, synced, standing: Mutex::new(standing) });
    let kinds = Kind::ALL.map(|kind| {
        let (store, mut feed) = (Arc::clone(&store), Feed::new(kind, Arc::clone(&common)));
        let follow = async move {
            let prefix = format!("{RESOURCES_PREFIX}{}/", kind.as_str());
            let read = |entry| Read::of(&entry);
            follow_read(store, &prefix, read, move |change| feed.tell(change)).await
        };
        Box::pin(follow)
    });
    select_all(kinds).await.0
}

/// What all kinds have in common.
struct Common {
    board: Arc<Board>,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    synced: Component,
    standing: Mutex<Standing>,
}

/// How far the kinds are.
struct Standing {
    /// Those that the store does not tell of at the moment.
    away: BTreeSet<Kind>,
    /// Those that were not read yet.
    unread: BTreeSet<Kind>,
}

/// A resource as it was read, which is little beside what the store keeps of it.
struct Read {
    key: String,
    /// `None`: it is of no kind that is followed.
    name: Option<Name>,
    object: Result<Option<Object>, ObjectError>,
    /// What in it cannot be used.
    notes: Vec<String>,
}

impl Read {
    fn of(entry: &Entry) -> Self {
        let mut notes = Vec::new();
        let (name, object) = match parse_key(&entry.key) {
            Ok(Some((kind, name))) => {
                let object = Object::parse(kind, &entry.key, &entry.value, &mut notes);
                (Some(name), object.map(Some))
            }
            Ok(None) => (None, Ok(None)),
            Err(error) => (None, Err(error)),
        };
        Self { key: entry.key.clone(), name, object, notes }
    }
}

/// One kind.
struct Feed {
    kind: Kind,
    common: Arc<Common>,
    /// What came since the last revision that was told in full.
    batch: Vec<Change>,
    /// The store knows no such kind.
    is_missing: bool,
}

impl Feed {
    fn new(kind: Kind, common: Arc<Common>) -> Self {
        Self { kind, common, batch: Vec::new(), is_missing: false }
    }

    fn tell(&mut self, change: StoreChange<'_, Read>) {
        match change {
            StoreChange::Event(Event::Deleted { key, .. }) => {
                if let Ok(Some((kind, name))) = parse_key(&key) {
                    self.batch.push(Change::Delete(kind, name));
                }
            }
            StoreChange::Event(Event::Put(entry)) => drop(self.put(Read::of(&entry))),
            StoreChange::Event(Event::Synced(_)) => {
                self.publish();
                self.heard();
            }
            // Services and pods are discovered without what others may have defined, or not.
            StoreChange::Failed(error @ StoreError::NoSuchKind(_)) if self.kind.is_optional() => {
                self.missing(error);
            }
            StoreChange::Failed(error) => self.failed(error),
            StoreChange::Reset(all, _) => {
                self.is_missing = false;
                self.reset(all);
            }
        }
    }

    /// Takes in what was read, and says whose it is.
    fn put(&mut self, Read { key, name, object, notes }: Read) -> Option<Name> {
        match (&name, object) {
            (Some(name), Ok(Some(object))) => self.batch.push(Change::Put(name.clone(), object)),
            (_, Err(error)) => self.unreadable(&key, &error),
            (_, Ok(_)) => {}
        }
        for note in notes {
            self.common.metrics.note();
            tracing::warn!(object = %key, "{note}");
        }
        name
    }

    fn unreadable(&self, key: &str, error: &(dyn std::error::Error + 'static)) {
        self.common.metrics.unreadable();
        let error = ErrorChain(error);
        tracing::error!(object = key, %error, "a resource does not parse; its last good form stays");
    }

    /// The whole kind at one revision: what is not in it is gone.
    fn reset(&mut self, all: Vec<Read>) {
        self.batch.clear();
        let listed: HashSet<_> = all.into_iter().filter_map(|read| self.put(read)).collect();
        self.common.board.replace(self.kind, &listed, std::mem::take(&mut self.batch));
        self.heard();
        let read = {
            let mut standing = self.common.standing();
            standing.unread.remove(&self.kind) && standing.unread.is_empty()
        };
        if read {
            self.common.board.set_synced();
            self.common.synced.ready();
        }
    }

    fn publish(&mut self) {
        if !self.batch.is_empty() {
            self.common.board.apply(std::mem::take(&mut self.batch));
        }
    }

    fn heard(&mut self) {
        let Common { board, metrics, .. } = &*self.common;
        let mut standing = self.common.standing();
        if standing.away.remove(&self.kind) && standing.away.is_empty() {
            tracing::info!("the store is back");
        }
        if standing.away.is_empty() {
            metrics.store_heard();
        }
        metrics.set_resources(self.kind, board.count(self.kind));
    }

    fn missing(&mut self, error: &StoreError) {
        if !std::mem::replace(&mut self.is_missing, true) {
            tracing::warn!(kind = self.kind.as_str(), %error, "none of these are discovered");
        }
        self.reset(Vec::new());
    }

    fn failed(&mut self, error: &StoreError) {
        // What came before the failure is not told again.
        self.publish();
        let Common { metrics, clock, .. } = &*self.common;
        metrics.store_silent(clock.now());
        let mut standing = self.common.standing();
        let first = standing.away.is_empty();
        if standing.away.insert(self.kind) && first {
            let code = steadfast_api::Code::STORE_UNAVAILABLE;
            tracing::warn!(
                %code,
                kind = self.kind.as_str(),
                error = %ErrorChain(error),
                "the store is away; what was last known stays in force"
            );
        }
    }
}

impl Common {
    fn standing(&self) -> MutexGuard<'_, Standing> {
        // Each change is one call: a panic leaves nothing half done.
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
