//! The stored trust domain, as commands read it and change it.
//!
//! An order is a change of the state by compare-and-swap, like every other; steadfast-rotation does
//! the rest, also when the command has ended.

use std::path::{Path, PathBuf};

use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_platform::{Revision, Store as _, StoreError};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::orders::OrderRefused;

use crate::store::{self, StoreProblem};

/// Why the trust domain was not read, or an order not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrustDomainError {
    #[error("the trust domain changes so often that the order was not written; try it again")]
    Busy,
    #[error("the store holds no trust domain yet\n  Make one:  steadfast trust init --dir {}", .0.display())]
    NoTrustDomain(PathBuf),
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
pub(crate) async fn read(dir: &Path) -> Result<TrustDomainState, TrustDomainError> {
    Ok(read_revision(dir).await?.0)
}

/// Changes the state, and tells what it then is.
///
/// # Errors
/// [`TrustDomainError`]; nothing has changed then.
pub(crate) async fn change(
    dir: &Path,
    order: impl Fn(&mut TrustDomainState) -> Result<(), OrderRefused>,
) -> Result<TrustDomainState, TrustDomainError> {
    for _ in 0..ATTEMPTS_MAX {
        let (mut state, revision) = read_revision(dir).await?;
        order(&mut state)?;
        let value = serde_json::to_vec(&state)?.into();
        let client = store::client(dir);
        match client.compare_and_swap(TRUST_DOMAIN_KEY, Some(revision), Some(value)).await {
            Ok(_) => return Ok(state),
            // Somebody else was faster: what he wrote is looked at.
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(store::explain(dir, error).into()),
        }
    }
    Err(TrustDomainError::Busy)
}

async fn read_revision(dir: &Path) -> Result<(TrustDomainState, Revision), TrustDomainError> {
    let entry = store::client(dir).get(TRUST_DOMAIN_KEY).await;
    let entry = entry.map_err(|error| store::explain(dir, error))?;
    let entry = entry.ok_or_else(|| TrustDomainError::NoTrustDomain(dir.to_owned()))?;
    Ok((serde_json::from_slice(&entry.value)?, entry.revision))
}

const ATTEMPTS_MAX: u32 = 20;
