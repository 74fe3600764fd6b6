//! What the world is made of beside the processes: time, a store, keys, and a queue of events.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use steadfast_api::{KeyId, UnixTime};
use steadfast_platform::keys::{KeyStore, KeyStoreError, LocalKey, PrivateKey};
use steadfast_platform::{Entry, Revision, StoreError};
use steadfast_process::Clock;

/// When the world begins.
pub(crate) const START: UnixTime = UnixTime::from_secs(1_800_000_000);

/// True time, which is the store's; every clock of the world hangs from it.
#[derive(Clone, Debug)]
pub(crate) struct TrueTime(Arc<AtomicU64>);

impl TrueTime {
    pub(crate) fn new() -> Self {
        Self(Arc::new(AtomicU64::new(START.as_millis())))
    }

    pub(crate) fn now(&self) -> UnixTime {
        UnixTime::from_millis(self.0.load(Ordering::Relaxed))
    }

    pub(crate) fn set(&self, now: UnixTime) {
        self.0.store(now.as_millis(), Ordering::Relaxed);
    }
}

/// The clocks of one machine: its wall clock may be off, its boot clock is not.
#[derive(Clone, Debug)]
pub(crate) struct MachineClock {
    time: TrueTime,
    off_ms: Arc<AtomicI64>,
    /// How many times too fast its boot clock runs: only where that is broken on purpose.
    haste: u32,
}

impl MachineClock {
    pub(crate) fn new(time: &TrueTime) -> Self {
        Self { time: time.clone(), off_ms: Arc::default(), haste: 1 }
    }

    pub(crate) fn hasty(self) -> Self {
        Self { haste: 100_000, ..self }
    }

    /// The wall clock less true time.
    pub(crate) fn off_ms(&self) -> i64 {
        self.off_ms.load(Ordering::Relaxed)
    }

    pub(crate) fn set_off_ms(&self, off_ms: i64) {
        self.off_ms.store(off_ms, Ordering::Relaxed);
    }
}

impl Clock for MachineClock {
    fn now(&self) -> UnixTime {
        shifted(self.time.now(), self.off_ms())
    }

    fn since_boot(&self) -> Duration {
        self.time.now().since(START) * self.haste + Duration::from_secs(3600)
    }
}

/// A time on a clock that is off.
pub(crate) fn shifted(time: UnixTime, off_ms: i64) -> UnixTime {
    let by = Duration::from_millis(off_ms.unsigned_abs());
    if off_ms < 0 { time - by } else { time + by }
}

/// What happens next, and in which order what happens at the same time.
pub(crate) struct Queue<E> {
    heap: BinaryHeap<Reverse<Item<E>>>,
    pushed: u64,
}

struct Item<E> {
    at: UnixTime,
    number: u64,
    event: E,
}

impl<E> PartialEq for Item<E> {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl<E> Eq for Item<E> {}

impl<E> PartialOrd for Item<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Item<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl<E> Queue<E> {
    pub(crate) fn new() -> Self {
        Self { heap: BinaryHeap::new(), pushed: 0 }
    }

    pub(crate) fn push(&mut self, at: UnixTime, event: E) {
        self.pushed += 1;
        self.heap.push(Reverse(Item { at, number: self.pushed, event }));
    }

    pub(crate) fn pop(&mut self) -> Option<(UnixTime, E)> {
        self.heap.pop().map(|Reverse(item)| (item.at, item.event))
    }

    pub(crate) fn next_at(&self) -> Option<UnixTime> {
        self.heap.peek().map(|Reverse(item)| item.at)
    }
}

/// The store: entries, and one revision for all of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entries {
    entries: BTreeMap<String, (Bytes, u64)>,
    revision: u64,
}

impl Entries {
    pub(crate) fn get(&self, key: &str) -> Option<Entry> {
        let (value, revision) = self.entries.get(key)?;
        Some(entry(key, value, *revision))
    }

    pub(crate) fn list(&self, prefix: &str) -> (Vec<Entry>, Revision) {
        let from = self.entries.range(prefix.to_owned()..);
        let those = from.take_while(|(key, _)| key.starts_with(prefix));
        let those = those.map(|(key, (value, revision))| entry(key, value, *revision));
        (those.collect(), Revision(self.revision))
    }

    /// As a copy of its file, but for what the platform puts there by itself.
    pub(crate) fn copy(&self, but: &str) -> Self {
        let kept = self.entries.iter().filter(|(key, _)| !key.starts_with(but));
        let entries = kept.map(|(key, value)| (key.clone(), value.clone())).collect();
        Self { entries, revision: self.revision }
    }

    /// The copy is put back: revisions fall, too.
    pub(crate) fn put_back(&mut self, copy: Self, but: &str) {
        self.entries.retain(|key, _| key.starts_with(but));
        self.entries.extend(copy.entries);
        self.revision = copy.revision;
    }

    /// Writes whatever is there; what the world itself puts there.
    pub(crate) fn put(&mut self, key: &str, value: Option<Bytes>) -> Revision {
        self.revision += 1;
        match value {
            Some(value) => drop(self.entries.insert(key.to_owned(), (value, self.revision))),
            None => drop(self.entries.remove(key)),
        }
        Revision(self.revision)
    }

    pub(crate) fn compare_and_swap(
        &mut self,
        key: &str,
        expected: Option<Revision>,
        value: Option<Bytes>,
    ) -> Result<Revision, StoreError> {
        let actual = self.entries.get(key).map(|(_, revision)| Revision(*revision));
        if actual != expected {
            return Err(StoreError::Conflict { key: key.to_owned(), expected, actual });
        }
        Ok(self.put(key, value))
    }
}

fn entry(key: &str, value: &Bytes, revision: u64) -> Entry {
    Entry { key: key.to_owned(), value: value.clone(), revision: Revision(revision) }
}

/// Private keys. Those who ask through a [`crate::ops::Port`] wait for it; a replica that loads an
/// issuer does not.
#[derive(Clone, Default)]
pub(crate) struct Vault(Arc<Mutex<BTreeMap<KeyId, Arc<dyn PrivateKey>>>>);

impl Vault {
    pub(crate) fn put(&self, pkcs8: &[u8]) {
        let key = LocalKey::from_pkcs8(pkcs8).unwrap();
        self.0.lock().unwrap().insert(key.id(), Arc::new(key));
    }

    pub(crate) fn make_one(&self) -> Arc<dyn PrivateKey> {
        let key: Arc<dyn PrivateKey> = Arc::new(LocalKey::generate().unwrap().0);
        self.0.lock().unwrap().insert(key.id(), Arc::clone(&key));
        key
    }

    pub(crate) fn get(&self, id: KeyId) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        let key = self.0.lock().unwrap().get(&id).cloned();
        key.ok_or_else(|| KeyStoreError::Missing(id.to_string()))
    }

    pub(crate) fn holds(&self, id: KeyId) -> bool {
        self.0.lock().unwrap().contains_key(&id)
    }

    pub(crate) fn ids(&self) -> Vec<KeyId> {
        self.0.lock().unwrap().keys().copied().collect()
    }

    pub(crate) fn remove(&self, id: KeyId) {
        self.0.lock().unwrap().remove(&id);
    }
}

#[async_trait::async_trait]
impl KeyStore for Vault {
    async fn make(&self) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        Ok(self.make_one())
    }

    async fn key(&self, id: KeyId) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        self.get(id)
    }

    async fn exists(&self, id: KeyId) -> Result<bool, KeyStoreError> {
        Ok(self.holds(id))
    }

    async fn list(&self) -> Result<Vec<KeyId>, KeyStoreError> {
        Ok(self.ids())
    }

    async fn destroy(&self, id: KeyId) -> Result<(), KeyStoreError> {
        self.remove(id);
        Ok(())
    }

    fn place_of(&self, id: KeyId) -> String {
        crate::ops::place_of(id)
    }
}
