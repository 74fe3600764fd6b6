//! The mirrors of the bundle: one in every namespace, so that a pod can mount it from its beginning,
//! and a ClusterTrustBundle for those whose certificates their kubelets ask for.
//!
//! The leader writes what the state says and reads it back. What somebody has changed or deleted is
//! put right; a namespace gets its mirror as soon as it is there.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use steadfast_platform::bundle_file::{self, CERTIFICATES_FILE};
use steadfast_platform::follow::{Change, follow};
use steadfast_platform::kubernetes::ClusterBundle;
use steadfast_platform::names::parse_resource_key;
use steadfast_platform::store::{Entry, Event, MIRRORS_PREFIX, RESOURCES_PREFIX};
use steadfast_platform::{Revision, Store, StoreError};
use steadfast_process::{Clock, ErrorChain};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::Standing;
use tokio::sync::{Notify, watch};

use crate::leader::LedAt;

/// Keeps them.
pub struct Mirrors {
    store: Arc<dyn Store>,
    /// The one that is the cluster's.
    cluster: ClusterBundle,
    seen: Mutex<Seen>,
    changed: Notify,
    /// The certificates that the cluster's was seen to hold, and when, on the boot clock.
    cluster_holds: Mutex<Option<(String, Duration)>>,
    clock: Arc<dyn Clock>,
    /// The newest sequence number that every mirror shows.
    current: AtomicU64,
}

/// What is there.
#[derive(Debug, Default)]
struct Seen {
    namespaces: BTreeSet<String>,
    mirrors: BTreeMap<String, Mirror>,
    /// Whether both were read once.
    read: [bool; 2],
}

/// A mirror as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mirror {
    revision: Revision,
    digest: [u8; 32],
}

impl Mirrors {
    /// In this store, and as a ClusterTrustBundle.
    pub fn new(store: Arc<dyn Store>, cluster: ClusterBundle, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            store,
            cluster,
            cluster_holds: Mutex::default(),
            clock,
            seen: Mutex::default(),
            changed: Notify::new(),
            current: AtomicU64::new(0),
        })
    }

    /// Whether every mirror, read back, shows the bundle of this sequence number.
    pub fn show(&self, seq: u64) -> bool {
        self.current.load(Ordering::Acquire) == seq
    }

    /// Keeps them for ever, while we lead: a process that was stopped may have been overtaken
    /// meanwhile, so that what it was sure of long ago does not count.
    pub async fn run(
        self: Arc<Self>,
        mut standing: watch::Receiver<Standing>,
        led_at: Arc<LedAt>,
    ) -> Infallible {
        let namespaces = format!("{RESOURCES_PREFIX}Namespace/");
        let (for_namespaces, for_mirrors) = (Arc::clone(&self), Arc::clone(&self));
        let namespaces = follow(Arc::clone(&self.store), &namespaces, move |change| {
            for_namespaces.tell(0, change, Seen::namespace);
        });
        let mirrors = follow(Arc::clone(&self.store), MIRRORS_PREFIX, move |change| {
            for_mirrors.tell(1, change, Seen::mirror);
        });
        let keep = async {
            loop {
                let state = {
                    let standing = standing.borrow_and_update();
                    let leads = standing.leads && led_at.since(self.clock.since_boot()) < FRESH;
                    standing.state.clone().filter(|_| leads)
                };
                match state {
                    Some(state) => self.keep(&state).await,
                    // Another may write now.
                    None => *self.cluster_holds() = None,
                }
                tokio::select! {
                    () = self.changed.notified() => {}
                    _ = standing.changed() => {}
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                }
            }
        };
        tokio::select! {
            never = namespaces => never,
            never = mirrors => never,
            never = keep => never,
        }
    }

    fn tell(&self, which: usize, change: Change<'_>, put: fn(&mut Seen, &str, Option<&Entry>)) {
        let mut seen = self.seen();
        match change {
            Change::Event(Event::Put(entry)) => put(&mut seen, &entry.key, Some(&entry)),
            Change::Event(Event::Deleted { key, .. }) => put(&mut seen, &key, None),
            Change::Event(Event::Synced(_)) => self.changed.notify_one(),
            Change::Failed(_) => {}
            Change::Reset(entries, _) => {
                match which {
                    0 => seen.namespaces.clear(),
                    _ => seen.mirrors.clear(),
                }
                entries.iter().for_each(|entry| put(&mut seen, &entry.key, Some(entry)));
                seen.read[which] = true;
                self.changed.notify_one();
            }
        }
    }

    /// Writes what is not as it should be.
    async fn keep(&self, state: &TrustDomainState) {
        let files = bundle_file::files(state).and_then(|files| {
            let value = serde_json::to_vec(&files).map_err(|error| error.to_string())?;
            Ok((files, Bytes::from(value)))
        });
        let (files, value) = match files {
            Ok(files) => files,
            Err(error) => return tracing::error!(error, "the state makes no mirror"),
        };
        let due = {
            let seen = self.seen();
            if seen.read != [true; 2] {
                return;
            }
            seen.due(digest(&value))
        };
        let kept = self.keep_cluster(state, &files[CERTIFICATES_FILE]).await;
        if let Err(error) = &kept {
            let error = ErrorChain(error);
            tracing::warn!(%error, "the ClusterTrustBundle cannot be written");
        }
        if due.is_empty() && kept.is_ok() {
            self.current.store(state.seq, Ordering::Release);
            return;
        }
        for (namespace, expected) in due {
            let key = format!("{MIRRORS_PREFIX}{namespace}");
            match self.store.compare_and_swap(&key, expected, Some(value.clone())).await {
                // What became of it is told by the watch.
                Ok(_) | Err(StoreError::Conflict { .. }) => {}
                Err(error) => {
                    let error = ErrorChain(&error);
                    tracing::warn!(%error, namespace, "the mirror of the bundle cannot be written");
                }
            }
        }
    }

    /// The same for the cluster's, which no watch tells of: once it is as it should be, it is read
    /// now and then.
    async fn keep_cluster(
        &self,
        state: &TrustDomainState,
        anchors: &str,
    ) -> Result<(), StoreError> {
        let now = self.clock.since_boot();
        let held = self.cluster_holds().clone().filter(|(held, at)| {
            held == anchors && now.saturating_sub(*at) < CLUSTER_EVERY && self.show(state.seq)
        });
        if held.is_none() {
            self.cluster.keep(anchors).await?;
            *self.cluster_holds() = Some((anchors.to_owned(), now));
        }
        Ok(())
    }

    fn cluster_holds(&self) -> MutexGuard<'_, Option<(String, Duration)>> {
        self.cluster_holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn namespace(&mut self, key: &str, entry: Option<&Entry>) {
        let Some((_, name)) = parse_resource_key(key) else { return };
        // Nothing can be made in one that ends.
        let stays = entry.is_some_and(|entry| {
            let value = serde_json::from_slice::<serde_json::Value>(&entry.value);
            value.is_ok_and(|value| value.pointer("/metadata/deletionTimestamp").is_none())
        });
        if stays {
            self.namespaces.insert(name.name);
        } else {
            self.namespaces.remove(&name.name);
        }
    }

    fn mirror(&mut self, key: &str, entry: Option<&Entry>) {
        let Some(namespace) = key.strip_prefix(MIRRORS_PREFIX) else { return };
        match entry {
            None => self.mirrors.remove(namespace),
            Some(entry) => {
                let mirror = Mirror { revision: entry.revision, digest: digest(&entry.value) };
                self.mirrors.insert(namespace.to_owned(), mirror)
            }
        };
    }

    /// The namespaces whose mirror is to be written, and what is there.
    fn due(&self, wanted: [u8; 32]) -> Vec<(String, Option<Revision>)> {
        let mirror = |namespace: &String| (namespace.clone(), self.mirrors.get(namespace).copied());
        self.namespaces
            .iter()
            .map(mirror)
            .filter(|(_, mirror)| mirror.is_none_or(|mirror| mirror.digest != wanted))
            .map(|(namespace, mirror)| (namespace, mirror.map(|mirror| mirror.revision)))
            .collect()
    }
}

fn digest(value: &[u8]) -> [u8; 32] {
    Sha256::digest(value).into()
}

/// What could not be written is tried again this often.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// What somebody has done to the ClusterTrustBundle is put right as late as this.
const CLUSTER_EVERY: Duration = Duration::from_secs(30);
/// The lead is asked about twice a second, and lasts for longer than this.
const FRESH: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str, revision: u64) -> Entry {
        let (key, value) = (key.to_owned(), value.to_owned().into());
        Entry { key, value, revision: Revision(revision) }
    }

    #[test]
    fn every_namespace_that_stays_has_the_mirror_and_what_was_changed_is_put_right() {
        let mut seen = Seen::default();
        for (name, value) in [
            ("demo", r#"{"metadata":{}}"#),
            ("new", r#"{"metadata":{}}"#),
            ("ends", r#"{"metadata":{"deletionTimestamp":"2026-11-21T12:00:00Z"}}"#),
            ("kept", r#"{"metadata":{}}"#),
        ] {
            let key = format!("{RESOURCES_PREFIX}Namespace//{name}");
            seen.namespace(&key, Some(&entry(&key, value, 1)));
        }
        for (namespace, value) in [("demo", "changed"), ("kept", "wanted")] {
            let key = format!("{MIRRORS_PREFIX}{namespace}");
            seen.mirror(&key, Some(&entry(&key, value, 7)));
        }
        let due = seen.due(digest(b"wanted"));
        let expected = [("demo".to_owned(), Some(Revision(7))), ("new".to_owned(), None)];
        assert_eq!(due, expected);
        seen.mirror(&format!("{MIRRORS_PREFIX}kept"), None);
        assert!(seen.due(digest(b"wanted")).contains(&("kept".to_owned(), None)));
    }
}
