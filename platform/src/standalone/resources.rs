//! The watched resources as typed snapshots.
//!
//! One follower of `resources/` turns entries into the types of Kubernetes and publishes whole
//! snapshots: what belongs together by revision is seen together. While the store is away the last
//! snapshot stays in force; an object that does not parse keeps its last good form and is said.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::follow::{Change, follow};
use super::names::ObjectName;
use crate::store::{Entry, Event, RESOURCES_PREFIX, Revision, Store, StoreError};

/// The objects of one kind by their names.
pub type Objects<T> = BTreeMap<ObjectName, Arc<T>>;

/// Every watched resource, as of one revision. A kind that has not changed since another snapshot
/// is the same `Arc`.
#[derive(Clone, Debug, Default)]
pub struct Resources {
    /// The revision of the store that this is the state of; 0: nothing was read yet.
    pub revision: Revision,
    /// Why the store is not heard at the moment, so that all this may have grown old.
    pub stale: Option<StoreError>,
    /// EndpointSlices, hand-written and derived.
    pub endpoint_slices: Arc<Objects<EndpointSlice>>,
    /// Namespaces, for their annotations; a namespace need not be written down to exist.
    pub namespaces: Arc<Objects<Namespace>>,
    /// Pods.
    pub pods: Arc<Objects<Pod>>,
    /// ServiceAccounts.
    pub service_accounts: Arc<Objects<ServiceAccount>>,
    /// Services.
    pub services: Arc<Objects<Service>>,
}

/// What is being put together from changes.
#[derive(Default)]
struct Follower {
    latest: Resources,
    /// Whether anything was taken over since the last whole snapshot.
    changed: bool,
}

impl Resources {
    /// Follows the resources of a store: the newest snapshot, and the work that keeps it new,
    /// which is a service of the process. The first snapshot has revision 0 and holds nothing.
    pub fn follow(
        store: Arc<dyn Store>,
    ) -> (watch::Receiver<Arc<Self>>, impl Future<Output = Result<(), Infallible>> + Send) {
        let (sender, receiver) = watch::channel(Arc::new(Self::default()));
        let work = async move {
            let mut follower = Follower::default();
            let never = follow(store, RESOURCES_PREFIX, |change| {
                if follower.apply(change) {
                    sender.send_replace(Arc::new(follower.latest.clone()));
                }
            });
            match never.await {}
        };
        (receiver, work)
    }
}

impl Follower {
    /// Takes one change over; says whether the snapshot is whole, so that it can be published.
    fn apply(&mut self, change: Change<'_>) -> bool {
        match change {
            Change::Event(Event::Deleted { key, .. }) => {
                self.changed = true;
                self.latest.remove(&key);
            }
            Change::Event(Event::Put(entry)) => {
                self.changed = true;
                self.latest.put(&entry);
            }
            // Also a sign of life, and told after changes elsewhere: of both nobody need hear.
            Change::Event(Event::Synced(revision)) => {
                self.latest.revision = revision;
                let changed = std::mem::take(&mut self.changed);
                return self.latest.stale.take().is_some() || changed;
            }
            // A store that was restarted is back at once: only the first failure is an event.
            Change::Failed(error) => return self.latest.stale.replace(error.clone()).is_none(),
            Change::Reset(entries, revision) => {
                let mut fresh = Resources { revision, ..Resources::default() };
                fresh.keep_unreadable(&self.latest, &entries);
                entries.iter().for_each(|entry| fresh.put(entry));
                *self = Self { latest: fresh, changed: false };
                return true;
            }
        }
        false
    }
}

impl Resources {
    fn put(&mut self, entry: &Entry) {
        let Some((kind, name)) = parse_key(&entry.key) else { return };
        let read = match kind {
            "EndpointSlice" => put(&mut self.endpoint_slices, name, entry),
            "Namespace" => put(&mut self.namespaces, name, entry),
            "Pod" => put(&mut self.pods, name, entry),
            "Service" => put(&mut self.services, name, entry),
            "ServiceAccount" => put(&mut self.service_accounts, name, entry),
            _ => Ok(()),
        };
        if let Err(error) = read {
            let key = &entry.key;
            tracing::error!(%key, %error, "a resource does not parse; its last good form stays");
        }
    }

    fn remove(&mut self, key: &str) {
        let Some((kind, name)) = parse_key(key) else { return };
        match kind {
            "EndpointSlice" => drop(Arc::make_mut(&mut self.endpoint_slices).remove(&name)),
            "Namespace" => drop(Arc::make_mut(&mut self.namespaces).remove(&name)),
            "Pod" => drop(Arc::make_mut(&mut self.pods).remove(&name)),
            "Service" => drop(Arc::make_mut(&mut self.services).remove(&name)),
            "ServiceAccount" => drop(Arc::make_mut(&mut self.service_accounts).remove(&name)),
            _ => {}
        }
    }

    /// Carries over what is listed still: put again it is replaced, unless it does not parse.
    fn keep_unreadable(&mut self, old: &Self, entries: &[Entry]) {
        fn keep<T>(new: &mut Arc<Objects<T>>, old: &Objects<T>, name: &ObjectName)
        where
            T: Clone,
        {
            if let Some(object) = old.get(name) {
                Arc::make_mut(new).insert(name.clone(), Arc::clone(object));
            }
        }
        for entry in entries {
            let Some((kind, name)) = parse_key(&entry.key) else { continue };
            match kind {
                "EndpointSlice" => keep(&mut self.endpoint_slices, &old.endpoint_slices, &name),
                "Namespace" => keep(&mut self.namespaces, &old.namespaces, &name),
                "Pod" => keep(&mut self.pods, &old.pods, &name),
                "Service" => keep(&mut self.services, &old.services, &name),
                "ServiceAccount" => keep(&mut self.service_accounts, &old.service_accounts, &name),
                _ => {}
            }
        }
    }
}

fn put<T: DeserializeOwned>(
    objects: &mut Arc<Objects<T>>,
    name: ObjectName,
    entry: &Entry,
) -> Result<(), serde_json::Error> {
    let object = serde_json::from_slice(&entry.value)?;
    Arc::make_mut(objects).insert(name, Arc::new(object));
    Ok(())
}

/// The key of a resource in the store.
pub(super) fn key(kind: &str, name: &ObjectName) -> String {
    format!("{RESOURCES_PREFIX}{kind}/{}/{}", name.namespace, name.name)
}

/// Kind and name of the resource with this key.
pub(super) fn parse_key(key: &str) -> Option<(&str, ObjectName)> {
    let (kind, rest) = key.strip_prefix(RESOURCES_PREFIX)?.split_once('/')?;
    let (namespace, name) = rest.split_once('/')?;
    Some((kind, ObjectName::new(namespace, name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str, revision: u64) -> Entry {
        let value = value.to_owned().into();
        Entry { key: key.to_owned(), value, revision: Revision(revision) }
    }

    fn pod(uid: &str) -> String {
        format!(r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"uid":"{uid}"}}}}"#)
    }

    const WEB: &str = "resources/Pod/demo/web";

    #[test]
    fn a_resource_that_does_not_parse_keeps_its_last_good_form() {
        let mut follower = Follower::default();
        let name = ObjectName::new("demo", "web");
        assert!(follower.apply(Change::Reset(vec![entry(WEB, &pod("1"), 1)], Revision(1))));
        assert!(!follower.apply(Change::Event(Event::Put(entry(WEB, "garbage", 2)))));
        assert!(follower.apply(Change::Event(Event::Synced(Revision(2)))));
        assert_eq!(follower.latest.pods[&name].metadata.uid.as_deref(), Some("1"));
        // A list that replaces everything does not lose it either, as long as it is listed.
        assert!(follower.apply(Change::Reset(vec![entry(WEB, "garbage", 2)], Revision(3))));
        assert_eq!(follower.latest.pods[&name].metadata.uid.as_deref(), Some("1"));
        assert!(follower.apply(Change::Reset(Vec::new(), Revision(4))));
        assert!(follower.latest.pods.is_empty());
    }

    #[test]
    fn a_sign_of_life_is_no_new_snapshot() {
        let mut follower = Follower::default();
        follower.apply(Change::Reset(Vec::new(), Revision(7)));
        assert!(!follower.apply(Change::Event(Event::Synced(Revision(7)))));
        assert!(!follower.apply(Change::Event(Event::Synced(Revision(8)))));
        let deleted = Event::Deleted { key: WEB.to_owned(), revision: Revision(9) };
        assert!(!follower.apply(Change::Event(deleted)));
        assert!(follower.apply(Change::Event(Event::Synced(Revision(9)))));
    }

    #[test]
    fn a_store_that_is_away_makes_the_snapshot_stale_and_takes_nothing_from_it() {
        let mut follower = Follower::default();
        follower.apply(Change::Reset(vec![entry(WEB, &pod("1"), 1)], Revision(1)));
        let away = StoreError::Unavailable("gone".to_owned());
        assert!(follower.apply(Change::Failed(&away)));
        assert!(!follower.apply(Change::Failed(&away)));
        assert_eq!((follower.latest.pods.len(), follower.latest.stale.clone()), (1, Some(away)));
        assert!(follower.apply(Change::Event(Event::Synced(Revision(1)))));
        assert_eq!(follower.latest.stale, None);
    }

    #[test]
    fn a_kind_that_did_not_change_is_the_same_object() {
        let mut follower = Follower::default();
        follower.apply(Change::Reset(vec![entry(WEB, &pod("1"), 1)], Revision(1)));
        let before = follower.latest.clone();
        follower.apply(Change::Event(Event::Put(entry("resources/Namespace//demo", "{}", 2))));
        assert!(Arc::ptr_eq(&before.pods, &follower.latest.pods));
    }
}
