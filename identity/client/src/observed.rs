//! What handshakes and replies have shown: which anchors peers use, how far our clock is off, and
//! which snapshot everybody here has come to use.
//!
//! It outlives every snapshot; each connection may write to it, one ack or line reads it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use steadfast_api::{KeyId, UnixTime};
use tokio::sync::Notify;

/// Shared by all snapshots of a process.
#[derive(Debug)]
pub struct Observed {
    /// Our clock less the identity service's; [`UNKNOWN`] before its first reply.
    clock_offset_ms: AtomicI64,
    handshakes: Mutex<BTreeMap<KeyId, u64>>,
    /// The generation that each follower uses.
    followers: Mutex<Vec<Weak<AtomicU64>>>,
    followed: Notify,
}

/// Whoever keeps a copy of the newest snapshot, as a worker does, and says which one it is: an ack
/// speaks of a snapshot only when every copy is of it. Dropped, it holds no ack back any more.
#[derive(Debug)]
pub struct Follower {
    /// `None` only while it is dropped.
    generation: Option<Arc<AtomicU64>>,
    observed: Arc<Observed>,
}

impl Default for Observed {
    fn default() -> Self {
        Self {
            clock_offset_ms: AtomicI64::new(UNKNOWN),
            handshakes: Mutex::default(),
            followers: Mutex::default(),
            followed: Notify::new(),
        }
    }
}

impl Follower {
    pub(crate) fn new(observed: Arc<Observed>, generation: u64) -> Self {
        let generation = Arc::new(AtomicU64::new(generation));
        observed.followers().push(Arc::downgrade(&generation));
        Self { generation: Some(generation), observed }
    }

    /// The copy is of this generation from now on.
    pub fn uses(&self, generation: u64) {
        if let Some(used) = &self.generation {
            used.store(generation, Ordering::Release);
        }
        self.observed.followed.notify_one();
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // First it is gone, then it is told.
        self.generation = None;
        self.observed.followed.notify_one();
    }
}

impl Observed {
    /// Our clock less the identity service's.
    pub fn clock_offset_ms(&self) -> Option<i64> {
        Some(self.clock_offset_ms.load(Ordering::Relaxed)).filter(|&offset| offset != UNKNOWN)
    }

    pub(crate) fn set_clock_offset_ms(&self, offset: i64) {
        self.clock_offset_ms.store(offset, Ordering::Relaxed);
    }

    pub(crate) fn count_handshake(&self, anchor: KeyId) {
        let mut counts = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(anchor).or_default() += 1;
    }

    /// The handshakes since the last call, by the anchor that the peer's chain ended in.
    pub(crate) fn take_handshakes(&self) -> BTreeMap<KeyId, u64> {
        std::mem::take(&mut *self.handshakes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether every copy is of this generation or a newer one.
    pub fn all_use(&self, generation: u64) -> bool {
        let mut followers = self.followers();
        followers.retain(|follower| follower.strong_count() > 0);
        let mut used = followers.iter().filter_map(Weak::upgrade);
        used.all(|used| used.load(Ordering::Acquire) >= generation)
    }

    /// Waits until a follower has said something.
    pub(crate) async fn followed(&self) {
        self.followed.notified().await;
    }

    fn followers(&self) -> MutexGuard<'_, Vec<Weak<AtomicU64>>> {
        self.followers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The identity service's time, as far as it is known, when our clock says `now`.
pub(crate) fn server_time(now: UnixTime, clock_offset_ms: Option<i64>) -> UnixTime {
    let offset = clock_offset_ms.unwrap_or(0);
    let distance = std::time::Duration::from_millis(offset.unsigned_abs());
    if offset < 0 { now + distance } else { now - distance }
}

const UNKNOWN: i64 = i64::MIN;
