//! Holders that cannot ack: what is issued to them is promised in the state first.
//!
//! No census can ask them what they hold, so a rotation waits until the last SVID of theirs under
//! the old anchor must have ended, counted by what the state says. Before one is issued, the state
//! is made to say so, by compare-and-swap. That is done in steps of an hour: a write for each would
//! starve the phase changes, whose compare-and-swap it fails. The API tells who cannot: Linkerd's
//! has no trust stream. Ours goes with one, and its askers are on the list of every census.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use steadfast_api::{Code, KeyId, UnixTime};
use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_platform::{Revision, Store, StoreError};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::Promise;
use tokio::sync::Mutex;

use crate::refusal::Refusal;
use crate::replica::View;

/// Promises for them.
pub struct Holders {
    store: Arc<dyn Store>,
    /// One writes at a time; the others find what he wrote.
    written: Mutex<Written>,
}

/// What we have written, and when: views from before do not show it yet.
#[derive(Default)]
struct Written {
    promises: Vec<(Promise, Revision)>,
    /// The newest view that came with a request. One that is older is of a store that was put back,
    /// which has forgotten what we wrote.
    newest: Revision,
}

impl Holders {
    /// In this store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store, written: Mutex::default() }
    }

    /// Returns once the state promises that this kind of holder may hold SVIDs under this anchor
    /// until `not_after`.
    ///
    /// # Errors
    /// It does not, so nothing may be issued: the store is away, others write all the time, or the
    /// anchor is not published any more.
    pub async fn cover(
        &self,
        view: &View,
        anchor_id: KeyId,
        holder: &str,
        not_after: UnixTime,
    ) -> Result<(), Refusal> {
        let covers = |promise: &Promise| {
            promise.anchor_id == anchor_id
                && promise.holder == holder
                && promise.not_after >= not_after
        };
        if view.state.promised.iter().any(covers) {
            return Ok(());
        }
        let mut written = self.written.lock().await;
        written.see(view.revision);
        let shown = |at: Revision| at <= view.revision;
        if written.promises.iter().any(|(promise, at)| !shown(*at) && covers(promise)) {
            return Ok(());
        }
        let promise = Promise { anchor_id, holder: holder.to_owned(), not_after: step(not_after) };
        for _ in 0..TRIES_MAX {
            match self.raise(&promise).await {
                Ok(revision) => {
                    let other = |old: &Promise| old.anchor_id != anchor_id || old.holder != holder;
                    written.promises.retain(|(old, _)| other(old));
                    written.promises.push((promise, revision));
                    return Ok(());
                }
                Err(RaiseError::Store(StoreError::Conflict { .. })) => {}
                Err(error) => return Err(error.refusal()),
            }
        }
        Err(RaiseError::Contended.refusal())
    }

    async fn raise(&self, promise: &Promise) -> Result<Revision, RaiseError> {
        let entry = self.store.get(TRUST_DOMAIN_KEY).await?;
        let entry = entry.ok_or(RaiseError::NoState)?;
        let state: TrustDomainState =
            serde_json::from_slice(&entry.value).map_err(|_| RaiseError::NoState)?;
        if state.halted.is_some()
            || !state.anchor(promise.anchor_id).is_some_and(|anchor| anchor.state.published())
        {
            return Err(RaiseError::Gone(promise.anchor_id));
        }
        let Some(raised) = with(&entry.value, promise).ok_or(RaiseError::NoState)? else {
            return Ok(entry.revision);
        };
        let expected = Some(entry.revision);
        let revision =
            self.store.compare_and_swap(TRUST_DOMAIN_KEY, expected, Some(raised)).await?;
        tracing::info!(
            holder = promise.holder, anchor = %promise.anchor_id.short(),
            until = %promise.not_after, revision = revision.0,
            "SVIDs of holders that cannot ack are promised"
        );
        Ok(revision)
    }
}

impl Written {
    fn see(&mut self, revision: Revision) {
        if revision < self.newest {
            self.promises.clear();
        }
        self.newest = revision;
    }
}

#[derive(Debug, thiserror::Error)]
enum RaiseError {
    #[error("the state was written by others each time")]
    Contended,
    #[error("the anchor {0} is not published any more, or nothing is issued at all")]
    Gone(KeyId),
    #[error("the stored trust domain cannot be read")]
    NoState,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RaiseError {
    fn refusal(&self) -> Refusal {
        let what = format!("the SVID of a holder that cannot ack could not be promised: {self}");
        Refusal::new(Code::STORE_UNAVAILABLE, what)
    }
}

/// The stored state with this promise, as it is stored and not as it was parsed: a newer version
/// may have put more into it. `Some(None)`: it says so already; `None`: it is none that we know.
fn with(stored: &[u8], promise: &Promise) -> Option<Option<Bytes>> {
    let mut state: Value = serde_json::from_slice(stored).ok()?;
    let promised = state.get_mut("promised")?.as_array_mut()?;
    let same = |known: &Value| {
        serde_json::from_value::<Promise>(known.clone()).is_ok_and(|known| {
            known.anchor_id == promise.anchor_id && known.holder == promise.holder
        })
    };
    match promised.iter_mut().find(|known| same(known)) {
        Some(known) => {
            let until: UnixTime = serde_json::from_value(known["not_after"].clone()).ok()?;
            if until >= promise.not_after {
                return Some(None);
            }
            known["not_after"] = serde_json::to_value(promise.not_after).ok()?;
        }
        None => promised.push(serde_json::to_value(promise).ok()?),
    }
    serde_json::to_vec(&state).ok().map(|state| Some(Bytes::from(state)))
}

/// Not before this, and the same for everybody within an hour.
fn step(not_after: UnixTime) -> UnixTime {
    let step = u64::try_from(STEP.as_millis()).unwrap_or(u64::MAX);
    UnixTime::from_millis(not_after.as_millis().div_ceil(step).saturating_mul(step))
}

const STEP: Duration = Duration::from_secs(3600);
/// Phase changes and other replicas write too.
const TRIES_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_into_a_store_that_was_put_back_counts_no_more() {
        let anchor_id = KeyId::of_spki(b"anchor");
        let promise =
            Promise { anchor_id, holder: "linkerd".to_owned(), not_after: UnixTime::default() };
        let mut written = Written { promises: vec![(promise, Revision(9))], newest: Revision(8) };
        written.see(Revision(8));
        assert_eq!(written.promises.len(), 1, "the view is of before it was written");
        written.see(Revision(5));
        assert_eq!(written.promises, []);
    }

    #[test]
    fn a_step_is_a_whole_hour_and_never_too_early() {
        let hour = STEP.as_secs() as i64;
        for (at, expected) in [(hour, hour), (hour + 1, hour * 2), (hour * 2 - 1, hour * 2)] {
            assert_eq!(step(UnixTime::from_secs(at)), UnixTime::from_secs(expected), "{at}");
        }
    }
}
