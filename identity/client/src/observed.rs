//! What handshakes and replies have shown: which anchors peers use, and how far our clock is off.
//!
//! It outlives every snapshot; each connection may write to it, one ack or line reads it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, PoisonError};

use steadfast_api::KeyId;

/// Shared by all snapshots of a process.
#[derive(Debug)]
pub struct Observed {
    /// Our clock less the identity service's; [`UNKNOWN`] before its first reply.
    clock_offset_ms: AtomicI64,
    handshakes: Mutex<BTreeMap<KeyId, u64>>,
}

impl Default for Observed {
    fn default() -> Self {
        Self { clock_offset_ms: AtomicI64::new(UNKNOWN), handshakes: Mutex::default() }
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

    /// Puts back what could not be told.
    pub(crate) fn restore_handshakes(&self, untold: &BTreeMap<KeyId, u64>) {
        let mut counts = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        for (anchor, count) in untold {
            *counts.entry(*anchor).or_default() += count;
        }
    }
}

const UNKNOWN: i64 = i64::MIN;
