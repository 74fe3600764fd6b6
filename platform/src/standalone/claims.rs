//! What a token of the built-in issuer says: the claims of Kubernetes' projected tokens.

use serde::{Deserialize, Serialize};

/// The claims of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Claims {
    pub(super) aud: Vec<String>,
    pub(super) exp: i64,
    pub(super) iat: i64,
    pub(super) iss: String,
    pub(super) jti: String,
    pub(super) nbf: i64,
    pub(super) sub: String,
    /// Whom the token is bound to.
    #[serde(rename = "kubernetes.io", default)]
    pub(super) bound: Option<Bound>,
}

/// Whom a token is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bound {
    pub(super) namespace: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) node: Option<Reference>,
    #[serde(default)]
    pub(super) pod: Option<Reference>,
    pub(super) serviceaccount: Reference,
}

/// One object and no other of the same name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reference {
    pub(super) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) uid: Option<String>,
}

/// The subject of a service account, in Kubernetes' form.
pub(super) fn subject(namespace: &str, service_account: &str) -> String {
    format!("system:serviceaccount:{namespace}:{service_account}")
}

/// Who issues: the store of this mesh. Another mesh has other keys.
pub(super) const ISSUER: &str = "steadfast-store";
