//! Following a prefix for ever: list, watch, resume from the revision that was seen, list again
//! only when the store no longer has it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;

use crate::store::{Entry, Event, Revision, Store, StoreError};

/// What a follower is told, in order.
pub enum Change<'a> {
    /// One change after what was told before.
    Event(Event),
    /// The following broke off and is tried again; what was told is the last that is known.
    Failed(&'a StoreError),
    /// Everything under the prefix: forget what was told before.
    Reset(Vec<Entry>, Revision),
}

/// Follows a prefix and tells every change, until it is dropped.
pub async fn follow(
    store: Arc<dyn Store>,
    prefix: &str,
    mut tell: impl FnMut(Change<'_>) + Send,
) -> Infallible {
    let mut seen = None;
    let mut pause = PAUSE_MIN;
    loop {
        let before = seen;
        let error = once(&*store, prefix, &mut seen, &mut tell).await;
        tell(Change::Failed(&error));
        if matches!(error, StoreError::Compacted(_)) {
            seen = None;
        }
        // Progress since the last failure: the store was there, so the next try is soon.
        pause = if seen == before { (pause * 2).min(PAUSE_MAX) } else { PAUSE_MIN };
        tokio::time::sleep(pause).await;
    }
}

/// Follows from what was seen until something fails; says what.
async fn once(
    store: &dyn Store,
    prefix: &str,
    seen: &mut Option<Revision>,
    tell: &mut (impl FnMut(Change<'_>) + Send),
) -> StoreError {
    let from = match *seen {
        Some(revision) => revision,
        None => match store.list(prefix).await {
            Ok((entries, revision)) => {
                *seen = Some(revision);
                tell(Change::Reset(entries, revision));
                revision
            }
            Err(error) => return error,
        },
    };
    let mut events = match store.watch(prefix, from).await {
        Ok(events) => events,
        Err(error) => return error,
    };
    loop {
        match events.next().await {
            Some(Ok(event)) => {
                *seen = Some(match &event {
                    Event::Deleted { revision, .. } | Event::Synced(revision) => *revision,
                    Event::Put(entry) => entry.revision,
                });
                tell(Change::Event(event));
            }
            Some(Err(error)) => return error,
            None => return StoreError::Unavailable("the watch ended".to_owned()),
        }
    }
}

const PAUSE_MIN: Duration = Duration::from_millis(20);
/// A unix socket costs nothing to try, and whoever waits for the store waits for it to start.
const PAUSE_MAX: Duration = Duration::from_millis(500);
