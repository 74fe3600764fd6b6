//! What the admin port of a process of ours tells: its identity, its readiness, its metrics.

use std::net::SocketAddr;
use std::time::Duration;

use http::StatusCode;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, SpiffeId, UnixTime};

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

/// Why an admin port did not tell.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdminError {
    #[error(
        "what answers at {addr} is no Steadfast process: its {path} cannot be understood ({why})"
    )]
    Form { addr: SocketAddr, path: &'static str, why: String },
    #[error("{addr} does not answer")]
    Silent {
        addr: SocketAddr,
        #[source]
        source: HttpError,
    },
    #[error("{addr}{path} answers {status}: {body}")]
    Status { addr: SocketAddr, path: &'static str, status: StatusCode, body: String },
}

/// The identity of the process.
///
/// # Errors
/// Why it is not known.
pub(crate) async fn identity(addr: SocketAddr) -> Result<IdentityStatus, AdminError> {
    json(addr, "/identity.json").await
}

/// What one of its pages says in JSON.
///
/// # Errors
/// Why it is not known.
pub(crate) async fn json<T: DeserializeOwned>(
    addr: SocketAddr,
    path: &'static str,
) -> Result<T, AdminError> {
    let body = ok(addr, path).await?;
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
pub(crate) async fn metrics(addr: SocketAddr) -> Result<Metrics, AdminError> {
    Ok(Metrics::parse(&ok(addr, "/metrics").await?))
}

/// Its version.
///
/// # Errors
/// Why it is not known.
pub(crate) async fn version(addr: SocketAddr) -> Result<String, AdminError> {
    Ok(ok(addr, "/version").await?.trim().to_owned())
}

/// Whether it is ready.
///
/// # Errors
/// Why it is not.
pub(crate) async fn ready(addr: SocketAddr) -> Result<(), AdminError> {
    ok(addr, "/ready").await.map(drop)
}

async fn ok(addr: SocketAddr, path: &'static str) -> Result<String, AdminError> {
    match http1::get(addr, path, DEADLINE).await {
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
