//! The targets that are watched: bounded, and each with the receivers that hold it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Watched targets of one kind.
#[derive(Debug)]
pub(super) struct Cache<K, V> {
    targets: HashMap<K, Watched<V>>,
    capacity: usize,
    /// Not yet given to the driver.
    starts: Vec<Start<K, V>>,
}

/// A target whose stream is to be opened.
#[derive(Debug)]
pub(super) struct Start<K, V> {
    pub(super) key: K,
    pub(super) sender: watch::Sender<Arc<V>>,
    /// Its place was given to another.
    pub(super) evicted: CancellationToken,
}

#[derive(Debug)]
struct Watched<V> {
    sender: watch::Sender<Arc<V>>,
    evicted: CancellationToken,
}

impl<K: Clone + Eq + Hash, V: Default> Cache<K, V> {
    pub(super) fn new(capacity: usize) -> Self {
        Self { targets: HashMap::new(), capacity, starts: Vec::new() }
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Watches a target; `None` if every place is taken by one that somebody holds.
    pub(super) fn subscribe(&mut self, key: &K) -> Option<watch::Receiver<Arc<V>>> {
        if let Some(watched) = self.targets.get(key) {
            return Some(watched.sender.subscribe());
        }
        if self.targets.len() >= self.capacity {
            self.evict_one()?;
        }
        let (sender, receiver) = watch::channel(Arc::new(V::default()));
        let evicted = CancellationToken::new();
        let watched = Watched { sender: sender.clone(), evicted: evicted.clone() };
        self.targets.insert(key.clone(), watched);
        self.starts.push(Start { key: key.clone(), sender, evicted });
        Some(receiver)
    }

    pub(super) fn take_starts(&mut self) -> Vec<Start<K, V>> {
        std::mem::take(&mut self.starts)
    }

    /// Forgets a target if nobody holds it and it is still the one with this sender; says whether
    /// its stream is to end.
    pub(super) fn remove_idle(&mut self, key: &K, sender: &watch::Sender<Arc<V>>) -> bool {
        if sender.receiver_count() > 0 {
            return false;
        }
        if self.targets.get(key).is_some_and(|watched| watched.sender.same_channel(sender)) {
            self.targets.remove(key);
        }
        true
    }

    /// Takes the place of a target that nobody holds.
    fn evict_one(&mut self) -> Option<()> {
        let mut targets = self.targets.iter();
        let idle = targets.find(|(_, watched)| watched.sender.receiver_count() == 0);
        let key = idle?.0.clone();
        self.targets.remove(&key)?.evicted.cancel();
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_cache_gives_away_only_what_nobody_holds() {
        let mut cache = Cache::<u8, u8>::new(2);
        let (held, dropped) = (cache.subscribe(&1), cache.subscribe(&2));
        assert!(cache.subscribe(&3).is_none());
        drop(dropped);
        let third = cache.subscribe(&3);
        assert!(held.is_some() && third.is_some());
        let starts = cache.take_starts();
        let evicted: Vec<_> = starts.iter().map(|start| start.evicted.is_cancelled()).collect();
        assert_eq!(evicted, [false, true, false]);
    }

    #[test]
    fn a_target_that_somebody_holds_again_stays() {
        let mut cache = Cache::<u8, u8>::new(2);
        drop(cache.subscribe(&1));
        let sender = cache.take_starts().remove(0).sender;
        let again = cache.subscribe(&1);
        assert!(cache.take_starts().is_empty(), "one stream serves both");
        assert!(!cache.remove_idle(&1, &sender));
        drop(again);
        assert!(cache.remove_idle(&1, &sender));
        assert!(cache.targets.is_empty());
    }

    #[test]
    fn an_old_stream_does_not_take_its_successor_away() {
        let mut cache = Cache::<u8, u8>::new(1);
        drop(cache.subscribe(&1));
        let old = cache.take_starts().remove(0).sender;
        drop(cache.subscribe(&2));
        let held = cache.subscribe(&1);
        assert!(cache.remove_idle(&1, &old));
        assert!(held.is_some() && cache.targets.contains_key(&1));
    }
}
