//! Token review: who holds a token that is bound to one workload instance.

use std::time::Duration;

use steadfast_api::{Code, UnixTime};

/// What a good token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReviewedToken {
    /// The namespace of the workload.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// The pod it is bound to.
    pub pod_name: String,
    /// The UID of that pod: another pod of the same name has another.
    pub pod_uid: String,
    /// The node the pod runs on, where known.
    pub node: Option<String>,
    /// The token's own id, for the issuance log.
    pub token_id: String,
    /// When the token ends.
    pub expires: UnixTime,
}

/// Why a token is not accepted. Each is a [`Code`] of its own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefusal {
    /// Not for us.
    #[error("the token is for the audience {found:?}, not {expected:?}")]
    Audience {
        /// What it names.
        found: Vec<String>,
        /// Who we are.
        expected: String,
    },
    /// Past its end.
    #[error("the token expired at {0}")]
    Expired(UnixTime),
    /// No token of this mesh.
    #[error("the token is no token of this mesh: {0}")]
    Malformed(String),
    /// Empty.
    #[error("there is no token")]
    Missing,
    /// Not bound to a pod.
    #[error("the token is not bound to a pod")]
    Unbound,
    /// The review itself could not be done; the token may be good.
    #[error("the token could not be reviewed: {0}")]
    Unavailable(String),
    /// The pod is gone, or is another.
    #[error("the token's workload is not there: {0}")]
    WorkloadGone(String),
}

impl TokenRefusal {
    /// Its code.
    pub const fn code(&self) -> Code {
        match self {
            Self::Audience { .. } => Code::TOKEN_AUDIENCE,
            Self::Expired(_) => Code::TOKEN_EXPIRED,
            Self::Malformed(_) => Code::TOKEN_MALFORMED,
            Self::Missing => Code::TOKEN_MISSING,
            Self::Unbound => Code::TOKEN_UNBOUND,
            Self::Unavailable(_) => Code::STORE_UNAVAILABLE,
            Self::WorkloadGone(_) => Code::TOKEN_WORKLOAD_GONE,
        }
    }
}

/// Reviews tokens; on Kubernetes by a TokenReview, standalone by the issuer's public keys and the
/// watched pods.
#[async_trait::async_trait]
pub trait TokenReview: Send + Sync + 'static {
    /// Who holds this token, which must be for `audience` and bound to a pod that is there.
    async fn review(&self, token: &[u8], audience: &str) -> Result<ReviewedToken, TokenRefusal>;
}

/// The audience of the identity service: Linkerd's, so that its manifests apply.
pub const IDENTITY_AUDIENCE: &str = "identity.l5d.io";

/// A review is believed for at most this long, and never past the pod's deletion.
pub const REVIEW_AGE_MAX: Duration = Duration::from_secs(30);
