//! Follows the resources of the store and puts them on the board.
//!
//! Changes are gathered until the store says that it has told everything up to a revision, so that
//! what was written together is seen together. While the store is away the board keeps what it
//! has, which is logged once and counted, and once more when it is back.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;

use steadfast_platform::follow::{self as store_follow, Change as StoreChange};
use steadfast_platform::store::{Entry, Event, RESOURCES_PREFIX};
use steadfast_platform::{Store, StoreError};
use steadfast_process::readiness::Component;
use steadfast_process::{Clock, ErrorChain};

use crate::board::{Board, Change};
use crate::index::{Kind, Object, parse_key};
use crate::metrics::Metrics;

/// Follows the resources until it is dropped.
pub async fn follow(
    store: Arc<dyn Store>,
    board: Arc<Board>,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    synced: Component,
) -> Infallible {
    let mut feed = Feed { board, metrics, clock, synced, batch: Vec::new(), away: false };
    store_follow::follow(store, RESOURCES_PREFIX, move |change| feed.tell(change)).await
}

struct Feed {
    board: Arc<Board>,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    synced: Component,
    /// What came since the last revision that was told in full.
    batch: Vec<Change>,
    away: bool,
}

impl Feed {
    fn tell(&mut self, change: StoreChange<'_>) {
        match change {
            StoreChange::Event(Event::Deleted { key, .. }) => {
                if let Ok(Some((kind, name))) = parse_key(&key) {
                    self.batch.push(Change::Delete(kind, name));
                }
            }
            StoreChange::Event(Event::Put(entry)) => self.put(&entry),
            StoreChange::Event(Event::Synced(_)) => {
                self.publish();
                self.heard();
            }
            StoreChange::Failed(error) => self.failed(error),
            StoreChange::Reset(entries, _) => self.reset(&entries),
        }
    }

    fn put(&mut self, entry: &Entry) {
        let (kind, name) = match parse_key(&entry.key) {
            Ok(Some(known)) => known,
            Ok(None) => return,
            Err(error) => return self.unreadable(&entry.key, &error),
        };
        let mut notes = Vec::new();
        match Object::parse(kind, &entry.key, &entry.value, &mut notes) {
            Ok(object) => self.batch.push(Change::Put(name, object)),
            Err(error) => self.unreadable(&entry.key, &error),
        }
        for note in notes {
            self.metrics.note();
            tracing::warn!(object = %entry.key, "{note}");
        }
    }

    fn unreadable(&self, key: &str, error: &(dyn std::error::Error + 'static)) {
        self.metrics.unreadable();
        let error = ErrorChain(error);
        tracing::error!(object = key, %error, "a resource does not parse; its last good form stays");
    }

    /// The whole state at one revision: what is not in it is gone.
    fn reset(&mut self, entries: &[Entry]) {
        self.batch.clear();
        let listed = entries.iter().filter_map(|entry| parse_key(&entry.key).ok().flatten());
        let listed: HashSet<_> = listed.collect();
        entries.iter().for_each(|entry| self.put(entry));
        self.board.replace(&listed, std::mem::take(&mut self.batch));
        self.heard();
        self.board.set_synced();
        self.synced.ready();
    }

    fn publish(&mut self) {
        if !self.batch.is_empty() {
            self.board.apply(std::mem::take(&mut self.batch));
        }
    }

    fn heard(&mut self) {
        if std::mem::take(&mut self.away) {
            tracing::info!("the store is back");
        }
        self.metrics.store_heard();
        for kind in Kind::ALL {
            self.metrics.set_resources(kind, self.board.count(kind));
        }
    }

    fn failed(&mut self, error: &StoreError) {
        // What came before the failure is not told again.
        self.publish();
        self.metrics.store_silent(self.clock.now());
        if !std::mem::replace(&mut self.away, true) {
            let code = steadfast_api::Code::STORE_UNAVAILABLE;
            tracing::warn!(
                %code,
                error = %ErrorChain(error),
                "the store is away; what was last known stays in force"
            );
        }
    }
}
