//! Following a prefix for ever: list, watch, resume from the revision that was seen, list again
//! only when the store no longer has it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;

use crate::store::{Entry, Event, Revision, Store, StoreError};

/// What a follower is told, in order. Of what is listed it gets what it reads in each entry.
pub enum Change<'a, T = Entry> {
    /// One change after what was told before.
    Event(Event),
    /// The following broke off and is tried again; what was told is the last that is known.
    Failed(&'a StoreError),
    /// Everything under the prefix: forget what was told before.
    Reset(Vec<T>, Revision),
}

/// Follows a prefix and tells every change, until it is dropped.
pub async fn follow(
    store: Arc<dyn Store>,
    prefix: &str,
    tell: impl FnMut(Change<'_>) + Send,
) -> Infallible {
    follow_read(store, prefix, |entry| entry, tell).await
}

/// The same where the entries are large, and what is wanted of them is not: a list is never there as
/// a whole, only what is read in its entries.
pub async fn follow_read<T: Send>(
    store: Arc<dyn Store>,
    prefix: &str,
    read: impl Fn(Entry) -> T + Send + Sync,
    mut tell: impl FnMut(Change<'_, T>) + Send,
) -> Infallible {
    let mut seen = None;
    let mut pause = PAUSE_MIN;
    loop {
        let before = seen;
        let error = once(&*store, prefix, &mut seen, &read, &mut tell).await;
        tell(Change::Failed(&error));
        if matches!(error, StoreError::Compacted(_)) {
            seen = None;
        }
        // Progress since the last failure: the store was there, so the next try is soon.
        pause = match &error {
            StoreError::NoSuchKind(_) => PAUSE_NO_KIND,
            _ if seen == before => (pause * 2).min(PAUSE_MAX),
            _ => PAUSE_MIN,
        };
        tokio::time::sleep(pause).await;
    }
}

/// Follows from what was seen until something fails; says what.
async fn once<T: Send>(
    store: &dyn Store,
    prefix: &str,
    seen: &mut Option<Revision>,
    read: &(impl Fn(Entry) -> T + Send + Sync),
    tell: &mut (impl FnMut(Change<'_, T>) + Send),
) -> StoreError {
    let from = match *seen {
        Some(revision) => revision,
        None => {
            let mut all = Vec::new();
            let mut part = |entries: Vec<Entry>| all.extend(entries.into_iter().map(read));
            let revision = match store.list_parts(prefix, &mut part).await {
                Ok(revision) => revision,
                Err(error) => return error,
            };
            *seen = Some(revision);
            tell(Change::Reset(all, revision));
            revision
        }
    };
    let mut events = match store.watch(prefix, from).await {
        Ok(events) => events,
        Err(error) => return error,
    };
    loop {
        match events.next().await {
            Some(Ok(event)) => {
                // The revision of an entry is its own: where to go on is told with what came at
                // once, and whatever came since the last such word is told again.
                if let Event::Synced(revision) = &event {
                    *seen = Some(*revision);
                }
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

/// A person installs it, or never does.
const PAUSE_NO_KIND: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Mutex;

    use bytes::Bytes;
    use futures::stream::{self, BoxStream};
    use tokio::sync::mpsc;

    use super::*;

    /// Answers lists and watches as it was told to, and notes what it was asked.
    struct Script {
        lists: Mutex<VecDeque<u64>>,
        watches: Mutex<VecDeque<Vec<Result<Event, StoreError>>>>,
        asked: mpsc::UnboundedSender<String>,
    }

    #[async_trait::async_trait]
    impl Store for Script {
        async fn get(&self, _: &str) -> Result<Option<Entry>, StoreError> {
            panic!("not asked here")
        }

        async fn list(&self, _: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
            let revision = self.lists.lock().unwrap().pop_front().unwrap();
            self.asked.send(format!("list {revision}")).unwrap();
            Ok((Vec::new(), Revision(revision)))
        }

        async fn compare_and_swap(
            &self,
            _: &str,
            _: Option<Revision>,
            _: Option<Bytes>,
        ) -> Result<Revision, StoreError> {
            panic!("not asked here")
        }

        async fn watch(
            &self,
            _: &str,
            from: Revision,
        ) -> Result<BoxStream<'static, Result<Event, StoreError>>, StoreError> {
            self.asked.send(format!("watch {}", from.0)).unwrap();
            match self.watches.lock().unwrap().pop_front() {
                Some(events) => Ok(stream::iter(events).boxed()),
                None => Ok(stream::pending().boxed()),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_watch_resumes_where_it_was_and_lists_again_only_when_it_must() {
        let put = |revision| {
            let (key, value) = ("a".to_owned(), Bytes::new());
            Ok(Event::Put(Entry { key, value, revision: Revision(revision) }))
        };
        let synced = |revision| Ok(Event::Synced(Revision(revision)));
        let away = || Err(StoreError::Unavailable("away".to_owned()));
        let compacted = Err(StoreError::Compacted(Revision(90)));
        let (asked, mut questions) = mpsc::unbounded_channel();
        let script = Script {
            lists: Mutex::new([5, 100].into()),
            watches: Mutex::new(
                [vec![put(6), put(7), synced(7), put(8), away()], vec![away()], vec![compacted]]
                    .into(),
            ),
            asked,
        };
        let (told, mut tellings) = mpsc::unbounded_channel();
        let never = follow(Arc::new(script), "", |change| {
            let text = match change {
                Change::Event(Event::Put(entry)) => format!("put {}", entry.revision.0),
                Change::Event(_) => "event".to_owned(),
                Change::Failed(_) => "failed".to_owned(),
                Change::Reset(_, revision) => format!("reset {}", revision.0),
            };
            told.send(text).unwrap();
        });
        let expected = ["list 5", "watch 5", "watch 7", "watch 7", "list 100", "watch 100"];
        let check = async {
            for expected in expected {
                assert_eq!(questions.recv().await.unwrap(), expected);
            }
        };
        tokio::select! {
            never = never => match never {},
            () = check => {}
        }
        let mut all = Vec::new();
        while let Ok(text) = tellings.try_recv() {
            all.push(text);
        }
        let expected =
            ["reset 5", "put 6", "put 7", "event", "put 8", "failed", "failed", "failed"];
        assert_eq!(all, [&expected[..], &["reset 100"]].concat());
    }
}
