//! The evidence of rotations, beside the state: in pieces that every store takes.
//!
//! It is written before the state names it. Its place is named by its own digest, so that two
//! controllers that decide the same step on different acks write to different places, and the state
//! says which one counted. An index, written before the pieces, knows every place that may hold
//! something, so that what nobody names any more is found and deleted without reading it all.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use steadfast_api::KeyId;
use steadfast_platform::store::{EVIDENCE_INDEX_KEY, EVIDENCE_PREFIX};
use steadfast_platform::{Revision, Store, StoreError};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::evidence::{Evidence, EvidenceError, Kept};

/// Why evidence cannot be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// A place that is named by its content holds something else.
    #[error("{0} in the store holds something else than its name says: delete it")]
    Foreign(String),
    /// What is there is no evidence.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    /// The index does not parse.
    #[error("{EVIDENCE_INDEX_KEY} in the store does not parse (written by a newer version?)")]
    Index(#[source] serde_json::Error),
    /// Nothing is there.
    #[error("the store has no evidence of step {step} of rotation {rotation} with digest {digest}")]
    Missing {
        /// The rotation's number.
        rotation: u64,
        /// Which of its steps, from 0.
        step: usize,
        /// What the state names.
        digest: KeyId,
    },
    /// The store.
    #[error("the store cannot be used")]
    Store(#[from] StoreError),
}

/// A place where pieces may lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    rotation: u64,
    step: usize,
    digest: KeyId,
    pieces: usize,
}

impl Place {
    fn of(kept: &Kept) -> Self {
        let Kept { rotation, step, digest, .. } = *kept;
        Self { rotation, step, digest, pieces: kept.pieces().count() }
    }

    fn key(&self, piece: usize) -> String {
        let Self { rotation, step, digest, .. } = self;
        format!("{EVIDENCE_PREFIX}{rotation}/{step}/{digest}/{piece}")
    }
}

/// Reads the evidence of a step and verifies it against the digest that the state keeps of it
/// (`Step::evidence`).
///
/// # Errors
/// [`KeepError`]
pub async fn read(
    store: &dyn Store,
    rotation: u64,
    step: usize,
    digest: KeyId,
) -> Result<Evidence, KeepError> {
    let place = Place { rotation, step, digest, pieces: 0 };
    let mut text = Vec::new();
    for piece in 0.. {
        let Some(entry) = store.get(&place.key(piece)).await? else { break };
        text.extend_from_slice(&entry.value);
    }
    if text.is_empty() {
        return Err(KeepError::Missing { rotation, step, digest });
    }
    Ok(Evidence::parse(&text, digest)?)
}

/// Keeps evidence; when this returns it is durable.
///
/// # Errors
/// [`KeepError`]: the state that relies on it must not be written.
pub async fn keep(store: &dyn Store, kept: &Kept) -> Result<(), KeepError> {
    let place = Place::of(kept);
    loop {
        let (mut places, revision) = index(store).await?;
        if places.contains(&place) {
            break;
        }
        places.push(place.clone());
        match write_index(store, revision, &places).await {
            // Somebody else has written: what he wrote is read, and ours is added to it.
            Err(KeepError::Store(StoreError::Conflict { .. })) => {}
            written => break written?,
        }
    }
    for (number, piece) in kept.pieces().enumerate() {
        let key = place.key(number);
        let written = store.compare_and_swap(&key, None, Some(Bytes::copy_from_slice(piece))).await;
        match written {
            Ok(_) => {}
            // Before a crash, or by another controller that decided the same.
            Err(StoreError::Conflict { .. }) => {
                let there = store.get(&key).await?;
                if there.is_none_or(|there| there.value != piece) {
                    return Err(KeepError::Foreign(key));
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Deletes what this state does not rely on. Of a rotation that is under way, or that this state
/// does not know yet, everything stays: another controller may be about to rely on it.
///
/// # Errors
/// [`KeepError`]; what was not deleted is found again.
pub async fn tidy(store: &dyn Store, state: &TrustDomainState) -> Result<usize, KeepError> {
    let (places, revision) = index(store).await?;
    let (kept, gone): (Vec<_>, Vec<_>) =
        places.into_iter().partition(|place| relies_on(state, place));
    for place in &gone {
        for piece in 0..place.pieces {
            let key = place.key(piece);
            if let Some(entry) = store.get(&key).await? {
                store.compare_and_swap(&key, Some(entry.revision), None).await?;
            }
        }
    }
    if !gone.is_empty() {
        write_index(store, revision, &kept).await?;
    }
    Ok(gone.len())
}

fn relies_on(state: &TrustDomainState, place: &Place) -> bool {
    let anchor = state.rotation.as_ref().map(|rotation| rotation.number);
    let issuer = state.issuer_rotation.as_ref().map(|rotation| rotation.number);
    let under_way = [anchor, issuer].contains(&Some(place.rotation));
    let past = state.past.iter().find(|past| past.number == place.rotation);
    let named = past.and_then(|past| past.steps.get(place.step)?.evidence);
    under_way || place.rotation > state.rotations || named == Some(place.digest)
}

async fn index(store: &dyn Store) -> Result<(Vec<Place>, Option<Revision>), KeepError> {
    let Some(entry) = store.get(EVIDENCE_INDEX_KEY).await? else { return Ok((Vec::new(), None)) };
    let places = serde_json::from_slice(&entry.value).map_err(KeepError::Index)?;
    Ok((places, Some(entry.revision)))
}

async fn write_index(
    store: &dyn Store,
    expected: Option<Revision>,
    places: &[Place],
) -> Result<(), KeepError> {
    let value = serde_json::to_vec(places).map_err(KeepError::Index)?;
    store.compare_and_swap(EVIDENCE_INDEX_KEY, expected, Some(value.into())).await?;
    Ok(())
}
