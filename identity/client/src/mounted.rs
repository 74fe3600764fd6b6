//! The bundle that a workload starts with: mounted as a file, or given as text.
//!
//! It authenticates the identity service and nobody else. It is read again at each use (each time
//! the service is dialled without a live bundle that fits, for each ack, and every 30 s whether or
//! not there is anybody to ack to), so a change is never missed. A file that cannot be used leaves the last good one in force.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use steadfast_api::bundle::{BundleError, digest};
use steadfast_api::{KeyId, TrustAnchor, TrustBundle, TrustDomain};
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::census::UNREADABLE;

/// Where the first trust comes from.
#[derive(Clone, Debug)]
pub enum BootstrapBundle {
    /// A mounted file, as a SPIFFE bundle or PEM; read again whenever it is used.
    File(PathBuf),
    /// PEM text from the environment.
    Pem(String),
}

/// Why a mounted bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MountedError {
    /// It is no bundle.
    #[error("the bundle of {origin} cannot be used")]
    Bundle {
        /// The file, or the environment.
        origin: String,
        /// What is wrong with it.
        source: BundleError,
    },
    /// The file cannot be read.
    #[error("the mounted bundle {0} cannot be read: check that it is mounted into the workload")]
    Read(PathBuf, #[source] std::io::Error),
}

/// The mounted bundle and the last of it that was good.
#[derive(Debug)]
pub(crate) struct Mounted {
    source: BootstrapBundle,
    trust_domain: TrustDomain,
    last_good: Mutex<Option<TrustBundle>>,
}

impl Mounted {
    /// # Errors
    /// Text that is no bundle; a file may still come.
    pub(crate) fn new(
        source: BootstrapBundle,
        trust_domain: TrustDomain,
    ) -> Result<Self, MountedError> {
        let mounted = Self { source, trust_domain, last_good: Mutex::default() };
        match (&mounted.source, mounted.fresh()) {
            (BootstrapBundle::Pem(_), Err(error)) => Err(error),
            _ => Ok(mounted),
        }
    }

    /// The bundle as it is now; if it cannot be used, the last good one.
    ///
    /// # Errors
    /// There never was a good one.
    pub(crate) fn read(&self) -> Result<TrustBundle, MountedError> {
        let mut last_good = self.last_good.lock().unwrap_or_else(PoisonError::into_inner);
        match (self.fresh(), last_good.as_ref()) {
            (Ok(bundle), _) => {
                *last_good = Some(bundle.clone());
                Ok(bundle)
            }
            (Err(error), Some(bundle)) => {
                let (code, error) = (steadfast_api::Code::BUNDLE_INVALID, ErrorChain(&error));
                tracing::warn!(%code, "{error}; the last good one stays in force");
                Ok(bundle.clone())
            }
            (Err(error), None) => Err(error),
        }
    }

    /// What an ack names as the mounted file (empty without one), and which of these it holds: both
    /// of one reading.
    pub(crate) fn look(&self, ids: &BTreeSet<KeyId>) -> (Vec<u8>, BTreeSet<KeyId>) {
        let file = matches!(self.source, BootstrapBundle::File(_));
        let Ok(bundle) = self.fresh() else {
            return (if file { UNREADABLE.to_vec() } else { Vec::new() }, BTreeSet::new());
        };
        let held = || bundle.anchors().iter().map(TrustAnchor::id);
        let digest = if file { digest(held(), []).to_vec() } else { Vec::new() };
        (digest, held().filter(|id| ids.contains(id)).collect())
    }

    fn fresh(&self) -> Result<TrustBundle, MountedError> {
        let (bytes, origin) = match &self.source {
            BootstrapBundle::Pem(text) => (text.clone().into_bytes(), "the environment".to_owned()),
            BootstrapBundle::File(path) => {
                let failed = |source| MountedError::Read(path.clone(), source);
                let mut bytes = Vec::new();
                let file = std::fs::File::open(path).map_err(failed)?;
                file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
                (bytes, path.display().to_string())
            }
        };
        TrustBundle::parse(&self.trust_domain, &bytes)
            .map_err(|source| MountedError::Bundle { origin, source })
    }
}

/// One byte more than a bundle may have, so that a larger one is seen to be.
const FILE_BYTES_MAX: u64 = (1 << 20) + 1;
