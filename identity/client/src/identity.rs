//! What a process builds to have an identity: the configuration, and handles to what it publishes.

use std::path::PathBuf;
use std::sync::Arc;

use prometheus_client::registry::Registry;
use steadfast_api::DnsIdentity;
use steadfast_process::{Clock, Drain, Readiness};
use tokio::sync::watch;
use tokio::task::JoinError;

use crate::context::{Contexts, Expected, TlsContext};
use crate::dial::Dialer;
use crate::metrics::{Metrics, Refusals};
use crate::mounted::{BootstrapBundle, Mounted, MountedError};
use crate::replicas::Replicas;
use crate::shell::Shell;
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

/// A configuration that cannot work.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The PEM text is no bundle.
    #[error("the trust anchors cannot be used")]
    Bundle(#[from] MountedError),
}

/// A defect of ours that ends an identity; all else is tried again.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The task that keeps the trust stream panicked.
    #[error("the trust stream's task ended")]
    Stream(#[source] JoinError),
    /// rustls has something against our settings.
    #[error("TLS cannot be configured")]
    Tls(#[from] rustls::Error),
}

/// Gets and renews the identity of this process.
pub struct Identity {
    dialer: Arc<Dialer>,
    token_file: PathBuf,
    status: watch::Sender<Status>,
    shell: Shell,
}

impl Identity {
    /// An identity that has nothing yet; [`Identity::run`] gets it. Until it has, readiness names
    /// the component `identity` with the reason.
    ///
    /// # Errors
    /// [`ConfigError`]; a mounted file that is not there yet is none.
    pub fn new(
        config: Config,
        clock: Arc<dyn Clock>,
        readiness: &Readiness,
        registry: &mut Registry,
    ) -> Result<Self, ConfigError> {
        let trust_domain = config.local.trust_domain().clone();
        let dialer = Arc::new(Dialer {
            address: config.identity_address.clone(),
            expected: Expected::from(config.identity_name.clone()),
            mounted: Mounted::new(config.bootstrap.clone(), trust_domain)?,
            contexts: Contexts::new(clock.clone()),
            refusals: Refusals::new(registry, clock.clone()),
        });
        let (status, token_file) = (watch::Sender::default(), config.token_file.clone());
        let component = readiness.component(COMPONENT, "no live bundle yet");
        let shell = Shell::new(
            config,
            dialer.clone(),
            clock,
            component,
            Metrics::new(registry),
            status.clone(),
        );
        Ok(Self { dialer, token_file, status, shell })
    }

    /// Follows the snapshots that TLS uses.
    pub fn contexts(&self) -> watch::Receiver<Arc<TlsContext>> {
        self.dialer.contexts.subscribe()
    }

    /// Follows what a person is shown.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Connections to the replicas of the identity service.
    pub fn replicas(&self) -> Replicas {
        Replicas { dialer: self.dialer.clone(), token_file: self.token_file.clone() }
    }

    /// Logs and counts refused connections.
    pub fn refusals(&self) -> Refusals {
        self.dialer.refusals.clone()
    }

    /// Gets and renews until the drain has started and everybody who holds it is done: what still
    /// finishes needs an SVID to the last.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub async fn run(self, drain: Drain) -> Result<(), IdentityError> {
        self.shell.run(drain).await
    }
}

const COMPONENT: &str = "identity";
