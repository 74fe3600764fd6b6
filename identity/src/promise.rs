//! The longest life of an SVID, as the state promises it of each anchor.
//!
//! A rotation whose workloads do not all answer waits until every SVID under the old anchor must
//! have ended, counted by what the state says. So a replica that is told to issue longer ones
//! raises it first; until the store has acknowledged that and the view shows it, it issues shorter
//! ones. It is never lowered: what was promised may have been issued.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_platform::{Store, StoreError};

use crate::replica::{Replica, View};

/// Raises it.
pub struct Promise {
    replica: Arc<Replica>,
    store: Arc<dyn Store>,
    /// How long SVIDs should live here.
    wanted: Duration,
}

impl Promise {
    /// That SVIDs may live this long.
    pub fn new(replica: Arc<Replica>, store: Arc<dyn Store>, wanted: Duration) -> Self {
        Self { replica, store, wanted }
    }

    /// Follows the view for ever.
    ///
    /// # Errors
    /// None: what fails is told and tried again.
    pub async fn run(self) -> Result<(), Infallible> {
        let mut views = self.replica.subscribe();
        let mut told = false;
        loop {
            let raised = self.look().await;
            if let Err(error) = &raised
                && !told
            {
                tracing::warn!(%error, wanted = ?self.wanted,
                    "SVIDs live shorter than asked for: the longer life could not be promised");
            }
            told = raised.is_err();
            let looked = tokio::time::timeout(LOOK_EVERY, views.changed()).await;
            if matches!(looked, Ok(Err(_))) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }

    /// Looks once: raises what falls short.
    ///
    /// # Errors
    /// The store's.
    pub async fn look(&self) -> Result<(), StoreError> {
        let Ok(view) = self.replica.current() else { return Ok(()) };
        if view.state.halted.is_some() || !self.falls_short(&view) {
            return Ok(());
        }
        // As it is stored, not as it was parsed: a newer version may have put more into it.
        let Some(entry) = self.store.get(TRUST_DOMAIN_KEY).await? else { return Ok(()) };
        if entry.revision != view.revision {
            return Ok(());
        }
        let Some(raised) = raise(&entry.value, &view, self.wanted) else { return Ok(()) };
        match self
            .store
            .compare_and_swap(TRUST_DOMAIN_KEY, Some(entry.revision), Some(raised))
            .await
        {
            Ok(revision) => {
                tracing::info!(revision = revision.0, life = ?self.wanted, "longer SVIDs promised");
                Ok(())
            }
            // Whatever was written shows in the next view.
            Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn falls_short(&self, view: &View) -> bool {
        view.state.published().any(|anchor| anchor.svid_life_max < self.wanted)
    }
}

/// The stored state with this life promised of every published anchor; `None`: it is none that we
/// know.
fn raise(stored: &[u8], view: &View, life: Duration) -> Option<Bytes> {
    let mut state: Value = serde_json::from_slice(stored).ok()?;
    let anchors = state.get_mut("anchors")?.as_array_mut()?;
    for record in view.state.published().filter(|anchor| anchor.svid_life_max < life) {
        let id = record.id.to_string();
        let mut same = anchors.iter_mut().filter(|anchor| anchor["id"] == id.as_str());
        same.next()?["svid_life_max"] = serde_json::to_value(life).ok()?;
    }
    serde_json::to_vec(&state).ok().map(Bytes::from)
}

/// A view that is new wakes us; what could not be done is tried again this often.
const LOOK_EVERY: Duration = Duration::from_secs(2);
