//! Who has subscribed to what: the newest snapshot of each service and address that is asked for.
//!
//! The board owns the index. A batch of changes is applied as a whole, and only what it may have
//! altered, and somebody follows, is computed again. Snapshots are compared before they are
//! published: a change that says nothing new wakes nobody.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::index::{AddressSnapshot, Index, Kind, MeshNames, Name, Object, ServiceSnapshot};

/// The index and its subscribers.
#[derive(Debug)]
pub struct Board {
    state: Mutex<State>,
    synced: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    index: Index,
    services: Topics<Name, ServiceSnapshot>,
    addresses: Topics<IpAddr, AddressSnapshot>,
}

/// One change of the resources, already read.
#[derive(Debug)]
pub(crate) enum Change {
    Delete(Kind, Name),
    Put(Name, Object),
}

impl Board {
    /// Without resources: nothing is answered before the first batch.
    pub fn new(mesh: MeshNames) -> Self {
        let state = State {
            index: Index::new(mesh),
            services: Topics::default(),
            addresses: Topics::default(),
        };
        Self { state: Mutex::new(state), synced: watch::Sender::new(false) }
    }

    /// Whether the resources have been read once.
    pub(crate) fn synced(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// Follows a service, whether it exists or not.
    pub(crate) fn service(&self, name: &Name) -> watch::Receiver<Arc<ServiceSnapshot>> {
        let State { index, services, .. } = &mut *self.lock();
        services.subscribe(name, || {
            let snapshot = index.service(name);
            say_unusable(&ServiceSnapshot::default(), &snapshot);
            snapshot
        })
    }

    /// Follows an address.
    pub(crate) fn address(&self, ip: IpAddr) -> watch::Receiver<Arc<AddressSnapshot>> {
        let State { index, addresses, .. } = &mut *self.lock();
        addresses.subscribe(&ip, || index.address(ip))
    }

    /// Whether a port of something unknown is not to be looked into.
    pub(crate) fn opaque_by_default(&self, port: u16) -> bool {
        self.lock().index.opaque_by_default(port)
    }

    /// Applies one batch and publishes what it has altered.
    pub(crate) fn apply(&self, batch: Vec<Change>) {
        self.change(|index| put_all(index, batch));
    }

    /// Everything of a kind that is not listed is gone; what is listed but not in the batch could
    /// not be read, and stays as it was.
    pub(crate) fn replace(&self, kind: Kind, listed: &HashSet<Name>, batch: Vec<Change>) {
        self.change(|index| {
            for name in index.names(kind) {
                if !listed.contains(&name) {
                    index.delete(kind, name);
                }
            }
            put_all(index, batch);
        });
    }

    /// The resources are read: from now on what is not there does not exist.
    pub(crate) fn set_synced(&self) {
        self.synced.send_replace(true);
    }

    /// How many objects of a kind there are.
    pub(crate) fn count(&self, kind: Kind) -> usize {
        self.lock().index.count(kind)
    }

    fn change(&self, change: impl FnOnce(&mut Index)) {
        let State { index, services, addresses } = &mut *self.lock();
        change(index);
        let dirty = index.take_dirty();
        for name in &dirty.services {
            if let Some((old, new)) = services.publish(name, || index.service(name)) {
                say_unusable(&old, &new);
            }
        }
        for ip in &dirty.addresses {
            addresses.publish(ip, || index.address(*ip));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What a panic has left behind is still made of whole objects: each is applied by itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn put_all(index: &mut Index, batch: Vec<Change>) {
    for change in batch {
        match change {
            Change::Delete(kind, name) => index.delete(kind, name),
            Change::Put(name, object) => index.put(name, object),
        }
    }
}

/// The subscribed snapshots of one kind.
#[derive(Debug)]
struct Topics<K, S> {
    senders: HashMap<K, watch::Sender<Arc<S>>>,
    /// At this many the abandoned ones are looked for.
    sweep_at: usize,
}

impl<K: Clone + Eq + Hash, S: PartialEq> Topics<K, S> {
    fn subscribe(&mut self, key: &K, now: impl FnOnce() -> S) -> watch::Receiver<Arc<S>> {
        if let Some(sender) = self.senders.get(key) {
            return sender.subscribe();
        }
        if self.senders.len() >= self.sweep_at {
            self.senders.retain(|_, sender| sender.receiver_count() > 0);
            self.sweep_at = (self.senders.len() * 2).max(SWEEP_AT_MIN);
        }
        let (sender, receiver) = watch::channel(Arc::new(now()));
        self.senders.insert(key.clone(), sender);
        receiver
    }

    /// Publishes what is new of a subscribed topic; returns the old and the new snapshot.
    fn publish(&mut self, key: &K, now: impl FnOnce() -> S) -> Option<(Arc<S>, Arc<S>)> {
        let sender = self.senders.get(key)?;
        if sender.receiver_count() == 0 {
            self.senders.remove(key);
            return None;
        }
        let (old, new) = (sender.borrow().clone(), now());
        if *old == new {
            return None;
        }
        let new = Arc::new(new);
        sender.send_replace(new.clone());
        Some((old, new))
    }
}

/// Says what is left out, once for as long as it is so.
fn say_unusable(old: &ServiceSnapshot, new: &ServiceSnapshot) {
    for unusable in new.unusable.iter().filter(|unusable| !old.unusable.contains(unusable)) {
        tracing::warn!(service = %new.name, "{unusable}");
    }
}

impl<K, S> Default for Topics<K, S> {
    fn default() -> Self {
        Self { senders: HashMap::new(), sweep_at: SWEEP_AT_MIN }
    }
}

const SWEEP_AT_MIN: usize = 1024;
