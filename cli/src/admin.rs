//! What the admin port of a process of ours tells: its identity, its readiness, its metrics.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, SpiffeId, UnixTime};
use tokio::time::timeout;

use crate::http1::{self, HttpError};
use crate::metrics::Metrics;

/// `/identity.json`: the identity of a process at one moment, its times in milliseconds since the
/// epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct IdentityStatus {
    /// `None` before the first SVID.
    pub(crate) spiffe_id: Option<SpiffeId>,
    /// In hex.
    pub(crate) serial: Option<String>,
    /// The SVID and its issuers.
    pub(crate) chain_pem: String,
    /// By the issuer's clock.
    pub(crate) issued_at: Option<UnixTime>,
    pub(crate) not_before: Option<UnixTime>,
    pub(crate) not_after: Option<UnixTime>,
    /// `None` while a request is under way.
    pub(crate) next_renewal: Option<UnixTime>,
    /// SVIDs that came after the first.
    pub(crate) renewals: u64,
    pub(crate) failures: u64,
    pub(crate) last_failure: Option<String>,
    /// The anchor that the SVID's chain ends in.
    pub(crate) anchor: Option<KeyId>,
    /// The key that signed it.
    pub(crate) issuer: Option<KeyId>,
    /// Of the live bundle.
    pub(crate) bundle_seq: Option<u64>,
    pub(crate) bundle_anchors: Vec<KeyId>,
    /// Its clock less the identity service's.
    pub(crate) clock_offset_ms: Option<i64>,
}

/// Where an admin port is.
#[derive(Clone, Debug)]
pub(crate) enum Port {
    /// At an address.
    Addr(SocketAddr),
    /// Of a pod, through the API server and the kubelet: within the pod it is asked from loopback.
    Pod(Arc<PodPort>),
}

/// A port of a pod.
#[derive(Clone)]
pub(crate) struct PodPort {
    pods: Api<Pod>,
    namespace: String,
    name: String,
    port: u16,
}

impl PodPort {
    pub(crate) fn new(client: Client, namespace: &str, name: &str, port: u16) -> Self {
        let pods = Api::namespaced(client, namespace);
        Self { pods, namespace: namespace.to_owned(), name: name.to_owned(), port }
    }

    async fn get(&self, path: &str) -> Result<(StatusCode, String), HttpError> {
        let forwarder = self.pods.portforward(&self.name, &[self.port]).await;
        let mut forwarder = forwarder.map_err(|error| HttpError::Forward(Box::new(error)))?;
        let stream = forwarder.take_stream(self.port).ok_or(HttpError::Unforwarded)?;
        let answer = http1::get_over(stream, "localhost", path).await;
        // It says more of why than a stream that has ended.
        let refused = forwarder.take_error(self.port);
        match answer {
            Err(error) => match refused {
                Some(refused) => Err(refused.await.map_or(error, HttpError::Refused)),
                None => Err(error),
            },
            answered => answered,
        }
    }
}

impl Port {
    async fn get(&self, path: &str) -> Result<(StatusCode, String), HttpError> {
        match self {
            Self::Addr(addr) => http1::get(*addr, path, DEADLINE).await,
            Self::Pod(pod) => {
                timeout(DEADLINE, pod.get(path)).await.unwrap_or(Err(HttpError::Timeout(DEADLINE)))
            }
        }
    }
}

impl From<SocketAddr> for Port {
    fn from(addr: SocketAddr) -> Self {
        Self::Addr(addr)
    }
}

impl From<&Self> for Port {
    fn from(port: &Self) -> Self {
        port.clone()
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(addr) => addr.fmt(f),
            Self::Pod(pod) => {
                write!(f, "port {} of the pod {}/{}", pod.port, pod.namespace, pod.name)
            }
        }
    }
}

impl fmt::Debug for PodPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.namespace, self.name, self.port)
    }
}

/// Why an admin port did not tell.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdminError {
    #[error(
        "what answers at {addr} is no Steadfast process: its {path} cannot be understood ({why})"
    )]
    Form { addr: Port, path: &'static str, why: String },
    #[error("{addr} does not answer")]
    Silent {
        addr: Port,
        #[source]
        source: HttpError,
    },
    #[error("{addr}: {path} answers {status}: {body}")]
    Status { addr: Port, path: &'static str, status: StatusCode, body: String },
}

/// The identity of the process.
///
/// # Errors
/// Why it is not known.
pub(crate) async fn identity(port: impl Into<Port>) -> Result<IdentityStatus, AdminError> {
    json(port, "/identity.json").await
}

/// What one of its pages says in JSON.
///
/// # Errors
/// Why it is not known.
pub(crate) async fn json<T: DeserializeOwned>(
    port: impl Into<Port>,
    path: &'static str,
) -> Result<T, AdminError> {
    let addr = port.into();
    let body = ok(addr.clone(), path).await?;
    serde_json::from_str(&body).map_err(|error| AdminError::Form {
        addr,
        path,
        why: error.to_string(),
    })
}

/// Its metrics.
///
/// # Errors
/// Why they are not known.
pub(crate) async fn metrics(port: impl Into<Port>) -> Result<Metrics, AdminError> {
    Ok(Metrics::parse(&ok(port, "/metrics").await?))
}

/// Its version.
///
/// # Errors
/// Why it is not known.
pub(crate) async fn version(port: impl Into<Port>) -> Result<String, AdminError> {
    Ok(ok(port, "/version").await?.trim().to_owned())
}

/// Whether it is ready.
///
/// # Errors
/// Why it is not.
pub(crate) async fn ready(port: impl Into<Port>) -> Result<(), AdminError> {
    ok(port, "/ready").await.map(drop)
}

async fn ok(port: impl Into<Port>, path: &'static str) -> Result<String, AdminError> {
    let addr = port.into();
    match addr.get(path).await {
        Ok((StatusCode::OK, body)) => Ok(body),
        Ok((status, body)) => {
            let body = body.trim().chars().take(BODY_CHARS_SHOWN).collect();
            Err(AdminError::Status { addr, path, status, body })
        }
        Err(source) => Err(AdminError::Silent { addr, source }),
    }
}

const DEADLINE: Duration = Duration::from_secs(5);
const BODY_CHARS_SHOWN: usize = 400;
