//! The stored trust domain, as commands read it and change it.
//!
//! An order is a change of the state by compare-and-swap, like every other; steadfast-rotation does
//! the rest, also when the command has ended.

use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_platform::{Revision, StoreError};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::orders::OrderRefused;

use crate::mesh::{Mesh, StoreProblem};

/// Why the trust domain was not read, or an order not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrustDomainError {
    #[error("the trust domain changes so often that the order was not written; try it again")]
    Busy,
    #[error("the store holds no trust domain yet\n  Make one:  {0}")]
    NoTrustDomain(String),
    #[error(transparent)]
    Refused(#[from] OrderRefused),
    #[error(
        "{TRUST_DOMAIN_KEY:?} in the store is no trust domain of ours (written by a newer version?)"
    )]
    State(#[from] serde_json::Error),
    #[error(transparent)]
    Store(#[from] StoreProblem),
}

/// The state, as it is now.
///
/// # Errors
/// [`TrustDomainError`]
pub(crate) async fn read(mesh: &Mesh) -> Result<TrustDomainState, TrustDomainError> {
    Ok(read_revision(mesh).await?.0)
}

/// Changes the state by an order, and tells what it then is.
///
/// # Errors
/// [`TrustDomainError`]; nothing has changed then.
pub(crate) async fn change(
    mesh: &Mesh,
    order: impl Fn(&mut TrustDomainState) -> Result<(), OrderRefused>,
) -> Result<TrustDomainState, TrustDomainError> {
    let ordered = |state: &mut TrustDomainState, _| Ok::<_, TrustDomainError>(order(state)?);
    Ok(change_at(mesh, ordered).await?.0)
}

/// The same for an order that needs to know the revision that it changes, has an answer, or has
/// errors of its own.
///
/// # Errors
/// Those of the order, and [`TrustDomainError`]; nothing has changed then.
pub(crate) async fn change_at<T, E>(
    mesh: &Mesh,
    mut order: impl FnMut(&mut TrustDomainState, Revision) -> Result<T, E>,
) -> Result<(TrustDomainState, T), E>
where
    E: From<TrustDomainError>,
{
    let failed = |error| E::from(TrustDomainError::from(error));
    let store = mesh.store().await.map_err(failed)?;
    for _ in 0..ATTEMPTS_MAX {
        let (before, revision) = read_revision(mesh).await?;
        let mut state = before.clone();
        let answer = order(&mut state, revision)?;
        if state == before {
            return Ok((state, answer));
        }
        let value = serde_json::to_vec(&state).map_err(TrustDomainError::from)?.into();
        match store.compare_and_swap(TRUST_DOMAIN_KEY, Some(revision), Some(value)).await {
            Ok(_) => return Ok((state, answer)),
            // Somebody else was faster: what he wrote is looked at.
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(failed(mesh.explain(error))),
        }
    }
    Err(TrustDomainError::Busy.into())
}

async fn read_revision(mesh: &Mesh) -> Result<(TrustDomainState, Revision), TrustDomainError> {
    let entry = mesh.store().await?.get(TRUST_DOMAIN_KEY).await;
    let entry = entry.map_err(|error| mesh.explain(error))?;
    let entry = entry.ok_or_else(|| TrustDomainError::NoTrustDomain(mesh.founding()))?;
    Ok((serde_json::from_slice(&entry.value)?, entry.revision))
}

const ATTEMPTS_MAX: u32 = 20;
