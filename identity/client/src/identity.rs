//! The shell that keeps a process's SVID and bundle fresh.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use steadfast_api::DnsIdentity;
use steadfast_process::{Clock, Drain, Readiness};
use tokio::sync::watch;

use crate::context::{Contexts, TlsContext};
use crate::metrics::{Metrics, Refusals};
use crate::status::Status;

/// Who a process is, and where its identity comes from.
#[derive(Clone, Debug)]
pub struct Config {
    /// Our own name; its SPIFFE ID must stand in the SVID.
    pub local: DnsIdentity,
    /// The identity service's address, `host:port`; a name may have several addresses, each a
    /// replica.
    pub identity_address: String,
    /// Who must answer there.
    pub identity_name: DnsIdentity,
    /// The projected token; read again for each request.
    pub token_file: PathBuf,
    /// What authenticates the identity service until a live bundle is held.
    pub bootstrap: BootstrapBundle,
    /// Our version, for displays.
    pub version: String,
}

/// Where the first trust comes from.
#[derive(Clone, Debug)]
pub enum BootstrapBundle {
    /// A mounted file, as a SPIFFE bundle or PEM; read again whenever it is used.
    File(PathBuf),
    /// PEM text from the environment.
    Pem(String),
}

/// A configuration that cannot work.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The PEM text is no bundle.
    #[error("the trust anchors given as PEM text: {0}")]
    Bundle(#[from] steadfast_api::bundle::BundleError),
}

/// Why the shell ended though nobody asked it to.
pub type RunError = Infallible;

/// Gets and renews the identity of this process.
pub struct Identity {
    contexts: Contexts,
    refusals: Refusals,
    status: watch::Sender<Status>,
    _metrics: Metrics,
}

impl Identity {
    /// An identity that has nothing yet; [`Identity::run`] gets it.
    ///
    /// # Errors
    /// [`ConfigError`]; a mounted file that is not there yet is none.
    pub fn new(
        _config: Config,
        clock: Arc<dyn Clock>,
        _readiness: &Readiness,
        registry: &mut Registry,
    ) -> Result<Self, ConfigError> {
        let refusals = Refusals::new(registry, clock.clone());
        Ok(Self {
            contexts: Contexts::new(clock),
            refusals,
            status: watch::Sender::default(),
            _metrics: Metrics::new(registry),
        })
    }

    /// Follows the snapshots that TLS uses.
    pub fn contexts(&self) -> watch::Receiver<Arc<TlsContext>> {
        self.contexts.subscribe()
    }

    /// Follows what a person is shown.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Logs and counts refused connections.
    pub fn refusals(&self) -> Refusals {
        self.refusals.clone()
    }

    /// Gets and renews until everybody who holds the drain is done.
    ///
    /// # Errors
    /// None at present: what fails is tried again.
    pub async fn run(self, drain: Drain) -> Result<(), RunError> {
        drain.wait().await;
        Ok(())
    }
}
