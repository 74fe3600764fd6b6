//! The Kubernetes platform: the API server is the store, the lock and the bus.
//!
//! Nothing home-made is distributed here. Our state is a custom resource and some ConfigMaps, the
//! election of a leader a Lease, keys are Secrets, tokens are reviewed by the API server, and
//! everything else is read as it is.

use std::time::Duration;

use kube::client::ClientBuilder;
use kube::{Client, Config};

pub use self::clock::ServerClock;
pub use self::cluster_bundle::{ClusterBundle, SIGNER_NAME};
pub use self::domain_events::DomainEvents;
pub use self::keys::{Purpose, SecretKeys};
pub use self::pod_requests::{Answer, PodCertificate, PodRequest, PodRequests};
pub use self::status::DomainStatus;
pub use self::store::KubeStore;
pub use self::tokens::KubeTokens;

mod clock;
mod cluster_bundle;
mod domain_events;
mod keys;
mod place;
mod pod_requests;
mod status;
mod store;
mod tokens;
pub mod watched;

/// Where our own objects lie. A standalone mesh has one namespace for both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespaces {
    /// The control plane, and the keys of issuers.
    pub control: String,
    /// The controller of rotations, the keys of anchors, and what it alone writes. Identity may make
    /// Secrets in its own namespace, also one that asks for the token of a service account there:
    /// the account that may read anchors' keys is not there.
    pub anchors: String,
}

/// Why there is no way to the API server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Its client.
    #[error("the client of the API server cannot be made")]
    Client(#[source] kube::Error),
    /// Where it is and who we are.
    #[error(
        "neither a service account of a pod nor a kubeconfig says where the API server is; in a \
         pod check automountServiceAccountToken, elsewhere set KUBECONFIG"
    )]
    Config(#[source] kube::config::InferConfigError),
}

/// Where the API server is: what the pod's service account says, or else the kubeconfig.
///
/// # Errors
/// Neither says it.
pub async fn infer() -> Result<Config, ConnectError> {
    Config::infer().await.map_err(ConnectError::Config)
}

/// A client of the API server, and the clock that its answers tell. Whether it answers is not asked.
///
/// # Errors
/// The configuration cannot be used.
pub fn connect(mut config: Config) -> Result<(Client, ServerClock), ConnectError> {
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // Every watch is told something more often than this, if only that it has ended.
    config.read_timeout = Some(SILENCE_MAX);
    config.write_timeout = Some(CONNECT_TIMEOUT);
    // Whoever asks knows how long it may take, and whether to ask again.
    config.default_retry = false;
    let clock = ServerClock::default();
    let builder = ClientBuilder::try_from(config).map_err(ConnectError::Client)?;
    Ok((builder.with_layer(&clock).build(), clock))
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const SILENCE_MAX: Duration = Duration::from_secs(75);
