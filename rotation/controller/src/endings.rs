//! Who has ended, as the platform tells it: a pod is on no list any more a moment after its kubelet
//! has said that nothing of it runs, and hardly a look falls into that moment. So every change of a
//! pod is followed, also by a controller that does not lead: it may in the next second.
//!
//! Whoever vanishes without that word is a debtor (a node that is cut off, a pod that is deleted by
//! force). A controller that starts goes on where the one before it was, as long as the store still
//! has what has happened since: a controller's own pod has ended before its successor's follows.

use std::collections::{HashSet, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use steadfast_platform::kubernetes::Namespaces;
use steadfast_platform::store::{Event, LEDGER_KEY, RESOURCES_PREFIX, TRUST_DOMAIN_KEY};
use steadfast_platform::{Revision, Store, StoreError};
use steadfast_rotation_protocol::census::{Listed, ProxyStatus};

use crate::listing::{Carries, listed};

/// Follows the pods.
pub struct Endings {
    carries: Carries,
    namespaces: Namespaces,
    untold: Mutex<Untold>,
}

/// Who has ended and was not asked for yet, the newest last.
#[derive(Default)]
struct Untold {
    pods: VecDeque<Listed>,
    uids: HashSet<String>,
    /// Everything up to this is in it, or was.
    seen: Option<Revision>,
}

/// What was told since it was asked for last.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// Who has ended.
    pub pods: Vec<Listed>,
    /// All that has happened up to this is told; `None`: it is not known how far.
    pub seen: Option<Revision>,
}

impl Endings {
    /// Nobody has ended yet.
    pub fn new(carries: Carries, namespaces: Namespaces) -> Self {
        Self { carries, namespaces, untold: Mutex::default() }
    }

    /// Those of whom it was not told yet. Who takes them keeps them.
    pub fn take(&self) -> Ended {
        let mut untold = self.untold();
        untold.uids.clear();
        Ended { pods: std::mem::take(&mut untold.pods).into(), seen: untold.seen }
    }

    /// Follows the pods for ever, without a hole where the store still has what has happened since.
    pub async fn run(self: Arc<Self>, store: Arc<dyn Store>) -> Infallible {
        let mut seen = stored(&*store).await;
        let mut in_vain = 0;
        loop {
            let before = seen;
            let error = self.follow(&*store, &mut seen).await;
            in_vain = if seen == before { in_vain + 1 } else { 0 };
            // Of a store that was put back, or is another, the revision may never come.
            if matches!(error, StoreError::Compacted(_)) || in_vain > IN_VAIN_MAX {
                tracing::warn!(%error, "pods that have ended meanwhile count as vanished");
                (seen, in_vain) = (None, 0);
            } else {
                tracing::debug!(%error, "pods are followed again in a moment");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn follow(&self, store: &dyn Store, seen: &mut Option<Revision>) -> StoreError {
        let from = match *seen {
            Some(seen) => seen,
            // Only the revision is wanted.
            None => match store.list(TRUST_DOMAIN_KEY).await {
                Ok((_, revision)) => revision,
                Err(error) => return error,
            },
        };
        *seen = Some(from);
        let mut events = match store.watch(&format!("{RESOURCES_PREFIX}Pod/"), from).await {
            Ok(events) => events,
            Err(error) => return error,
        };
        self.untold().seen = *seen;
        loop {
            match events.next().await {
                Some(Ok(Event::Put(entry))) => {
                    let pod = listed(&entry, self.carries, &self.namespaces);
                    self.note(pod.filter(|pod| pod.proxy == ProxyStatus::Ended));
                }
                Some(Ok(Event::Deleted { .. })) => {}
                Some(Ok(Event::Synced(revision))) => {
                    *seen = Some(revision);
                    self.untold().seen = *seen;
                }
                Some(Err(error)) => return error,
                None => return StoreError::Unavailable("the watch of pods ended".to_owned()),
            }
        }
    }

    fn note(&self, ended: Option<Listed>) {
        let Some(ended) = ended else { return };
        let mut untold = self.untold();
        if !untold.uids.insert(ended.pod_uid.clone()) {
            return;
        }
        untold.pods.push_back(ended);
        // Where nobody asks for them, another controller leads, and has written down the oldest.
        if untold.pods.len() > UNTOLD_MAX
            && let Some(oldest) = untold.pods.pop_front()
        {
            untold.uids.remove(&oldest.pod_uid);
        }
    }

    fn untold(&self) -> MutexGuard<'_, Untold> {
        // A panic between two changes leaves at worst a pod that is told twice.
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes down how far is told, for a controller that starts.
///
/// # Errors
/// The store's; somebody else may have written.
pub async fn keep(store: &dyn Store, seen: Revision) -> Result<(), StoreError> {
    let before = store.get(&seen_key()).await?;
    let value = seen.0.to_string().into_bytes();
    let expected = before.map(|entry| entry.revision);
    store.compare_and_swap(&seen_key(), expected, Some(value.into())).await.map(drop)
}

/// How far the controller before us was, once the store tells it; `None`: there was none.
async fn stored(store: &dyn Store) -> Option<Revision> {
    let entry = loop {
        match store.get(&seen_key()).await {
            Ok(entry) => break entry?,
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    };
    std::str::from_utf8(&entry.value).ok()?.parse().ok().map(Revision)
}

fn seen_key() -> String {
    format!("{LEDGER_KEY}/seen")
}

const PAUSE: Duration = Duration::from_millis(500);
/// Ten minutes: longer than the API server keeps what has happened.
const IN_VAIN_MAX: u32 = 1_200;
const UNTOLD_MAX: usize = 32_768;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_ended_is_told_once_and_the_oldest_go_first_where_nobody_asks() {
        let namespaces = Namespaces { control: "steadfast".into(), anchors: "anchors".into() };
        let endings = Endings::new(Carries::Unless, namespaces);
        let pod = |uid: usize| {
            Some(Listed {
                pod_uid: uid.to_string(),
                name: format!("demo/{uid}"),
                proxy: ProxyStatus::Ended,
            })
        };
        for uid in [1, 2, 1] {
            endings.note(pod(uid));
        }
        let told: Vec<_> = endings.take().pods.into_iter().map(|pod| pod.pod_uid).collect();
        assert_eq!(told, ["1", "2"]);
        assert_eq!(endings.take(), Ended::default());
        (0..=UNTOLD_MAX).for_each(|uid| endings.note(pod(uid)));
        let told = endings.take().pods;
        assert_eq!((told.len(), &*told[0].pod_uid), (UNTOLD_MAX, "1"));
    }
}
