//! Paths that were built before, so that a peer that comes back costs one hash instead of two
//! signature checks.
//!
//! Only what was accepted is kept: a refusal is rare, and a peer that sends a thousand bad chains
//! must not push the good ones out. Validity is not part of an outcome; it is checked at each use.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use crate::verify::Path;

/// SHA-256 over role and presented chain.
pub(crate) type Fingerprint = [u8; 32];

/// A bounded map that forgets what was added first.
#[derive(Debug, Default)]
pub(crate) struct Outcomes(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    paths: HashMap<Fingerprint, Arc<Path>>,
    order: VecDeque<Fingerprint>,
}

impl Outcomes {
    pub(crate) fn find(&self, fingerprint: &Fingerprint) -> Option<Arc<Path>> {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.paths.get(fingerprint).cloned()
    }

    pub(crate) fn add(&self, fingerprint: Fingerprint, path: Arc<Path>) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.paths.insert(fingerprint, path).is_some() {
            return;
        }
        inner.order.push_back(fingerprint);
        if inner.order.len() > OUTCOMES_MAX
            && let Some(oldest) = inner.order.pop_front()
        {
            inner.paths.remove(&oldest);
        }
    }
}

/// Some 600 bytes each.
pub(crate) const OUTCOMES_MAX: usize = 256;
