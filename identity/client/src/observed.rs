//! What handshakes and replies have shown: which anchors and issuers peers use, how far our clock is off, and
//! which snapshot everybody here has come to use.
//!
//! It outlives every snapshot; each connection may write to it, one ack or line reads it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use steadfast_api::{Code, KeyId, UnixTime};
use tokio::sync::Notify;

use crate::refusal::Direction;
use crate::verify::VerifiedPeer;

/// Shared by all snapshots of a process.
#[derive(Debug)]
pub struct Observed {
    /// Our clock less the identity service's; [`UNKNOWN`] before its first reply.
    clock_offset_ms: AtomicI64,
    handshakes: Mutex<BTreeMap<KeyId, u64>>,
    issuers: Mutex<Issuers>,
    /// The generation that each follower uses.
    followers: Mutex<Vec<Weak<AtomicU64>>>,
    followed: Notify,
}

/// Handshakes between two acks.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    /// By the anchor that the peer's chain ended in.
    pub(crate) handshakes: BTreeMap<KeyId, u64>,
    pub(crate) issuers: Issuers,
}

/// Handshakes by issuer.
#[derive(Debug, Default)]
pub(crate) struct Issuers {
    pub(crate) accepted: BTreeMap<KeyId, Accepted>,
    /// How many failed, and the newest one's code.
    pub(crate) failed: BTreeMap<KeyId, (u64, Code)>,
}

/// Peers that were accepted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Accepted {
    pub(crate) inbound: u64,
    pub(crate) outbound: u64,
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
            issuers: Mutex::default(),
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

    /// A peer was accepted.
    pub(crate) fn count_handshake(&self, peer: &VerifiedPeer, direction: Direction) {
        let mut counts = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(peer.anchor).or_default() += 1;
        drop(counts);
        let mut issuers = self.issuers();
        let accepted = issuers.accepted.entry(peer.issuer).or_default();
        match direction {
            Direction::Inbound => accepted.inbound += 1,
            Direction::Outbound => accepted.outbound += 1,
        }
    }

    /// A handshake has failed over the certificate of this issuer.
    pub(crate) fn count_failure(&self, issuer: Option<KeyId>, code: Code) {
        let Some(issuer) = issuer.filter(|_| is_about_issuer(code)) else { return };
        let mut issuers = self.issuers();
        // Strangers name what they like.
        if issuers.failed.len() >= FAILED_MAX && !issuers.failed.contains_key(&issuer) {
            return;
        }
        let failed = issuers.failed.entry(issuer).or_insert((0, code));
        *failed = (failed.0 + 1, code);
    }

    fn issuers(&self) -> MutexGuard<'_, Issuers> {
        self.issuers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handshakes since the last call.
    pub(crate) fn take_counted(&self) -> Counted {
        let mut handshakes = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        let handshakes = std::mem::take(&mut *handshakes);
        Counted { handshakes, issuers: std::mem::take(&mut *self.issuers()) }
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

/// Whether a failure says something about the issuer of a certificate; that somebody else answers
/// at an address, or breaks off, does not.
fn is_about_issuer(code: Code) -> bool {
    matches!(
        code,
        Code::PEER_UNKNOWN_ISSUER
            | Code::PEER_EXPIRED
            | Code::PEER_NOT_YET_VALID
            | Code::PEER_NOT_SVID
            | Code::PEER_TRUST_DOMAIN
            | Code::PEER_BAD_SIGNATURE
            | Code::PEER_ISSUER_DENIED
            | Code::PEER_REFUSED_US
            | Code::PEER_MALFORMED
    )
}

/// Issuers between two acks of which a failure is told.
const FAILED_MAX: usize = 16;
const UNKNOWN: i64 = i64::MIN;
