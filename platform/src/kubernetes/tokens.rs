//! Token review by the API server, for tokens that are bound to a pod which is still that pod.

use k8s_openapi::api::authentication::v1::{
    TokenReview as Review, TokenReviewSpec, TokenReviewStatus, UserInfo,
};
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::{Api, Client};
use serde::Deserialize;
use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, ErrorChain, SystemClock};

use crate::names::{check_name, check_namespace};
use crate::token::{ReviewedToken, TokenRefusal, TokenReview};

/// Reviews tokens of service accounts.
#[derive(Clone)]
pub struct KubeTokens {
    client: Client,
}

impl KubeTokens {
    /// By this API server.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// The pod as it is now, if it is still the one that the token was made for.
    pub(super) async fn check_pod(&self, holder: &Holder) -> Result<(), TokenRefusal> {
        let Holder { namespace, pod_name, .. } = holder;
        let pods = Api::<Pod>::namespaced(self.client.clone(), namespace);
        let pod = pods.get_opt(pod_name).await.map_err(unavailable)?;
        holder.agrees_with(pod.as_ref()).map_err(TokenRefusal::WorkloadGone)
    }
}

#[async_trait::async_trait]
impl TokenReview for KubeTokens {
    async fn review(&self, token: &[u8], audience: &str) -> Result<ReviewedToken, TokenRefusal> {
        let token = token.trim_ascii();
        if token.is_empty() {
            return Err(TokenRefusal::Missing);
        }
        let token = std::str::from_utf8(token).ok().filter(|token| token.len() <= TOKEN_BYTES_MAX);
        let token =
            token.ok_or_else(|| malformed(format!("not a text of {TOKEN_BYTES_MAX} bytes")))?;
        // Only read once the API server vouches for it, but for saying why it does not.
        let claims = Claims::read(token).ok_or_else(|| malformed("it is no JWT".to_owned()))?;
        let audiences = Some(vec![audience.to_owned()]);
        let spec = TokenReviewSpec { audiences, token: token.to_owned() };
        let review = Review { spec, ..Review::default() };
        let reviews = Api::<Review>::all(self.client.clone());
        let answer = reviews.create(&PostParams::default(), &review).await.map_err(unavailable)?;
        let status = answer.status.unwrap_or_default();
        let user = vouched(status, audience, &claims, SystemClock.now())?;
        let holder = Holder::of(&user)?;
        self.check_pod(&holder).await?;
        Ok(holder.reviewed(UnixTime::from_secs(claims.exp)))
    }
}

/// Whom the API server says that a token belongs to.
fn vouched(
    status: TokenReviewStatus,
    audience: &str,
    claims: &Claims,
    now: UnixTime,
) -> Result<UserInfo, TokenRefusal> {
    // An API server that knows no audiences answers without them, whatever the token is for.
    let audiences = status.audiences.unwrap_or_default();
    if status.authenticated == Some(true) && audiences.iter().any(|found| found == audience) {
        return status.user.ok_or_else(|| malformed("the review names nobody".to_owned()));
    }
    if !claims.aud.iter().any(|found| found == audience) {
        let expected = audience.to_owned();
        return Err(TokenRefusal::Audience { found: claims.aud.clone(), expected });
    }
    let expires = UnixTime::from_secs(claims.exp);
    if expires <= now {
        return Err(TokenRefusal::Expired(expires));
    }
    Err(malformed(
        status.error.unwrap_or_else(|| "the API server does not vouch for it".to_owned()),
    ))
}

/// What the payload of a token says of itself.
#[derive(Debug, Deserialize)]
struct Claims {
    #[serde(default)]
    aud: Vec<String>,
    #[serde(default)]
    exp: i64,
}

impl Claims {
    fn read(token: &str) -> Option<Self> {
        use base64::Engine as _;
        let mut parts = token.split('.');
        let (_, payload, _) = (parts.next()?, parts.next()?, parts.next()?);
        let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).ok()?;
        serde_json::from_slice(&payload).ok().filter(|_| parts.next().is_none())
    }
}

/// Whose token, or request, it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) namespace: String,
    pub(super) service_account: String,
    pub(super) pod_name: String,
    pub(super) pod_uid: String,
    pub(super) node: Option<String>,
    pub(super) token_id: String,
}

impl Holder {
    fn of(user: &UserInfo) -> Result<Self, TokenRefusal> {
        let name = user.username.as_deref().unwrap_or_default();
        let account = name.strip_prefix(ACCOUNT_PREFIX).and_then(|rest| rest.split_once(':'));
        let (namespace, service_account) =
            account.ok_or_else(|| malformed(format!("{name:?} is no service account")))?;
        let named = check_namespace(namespace).and_then(|()| check_name(service_account));
        named.map_err(|error| malformed(error.to_string()))?;
        let extra = |key: &str| {
            let values = user.extra.as_ref()?.get(key)?;
            values.first().filter(|value| !value.is_empty()).cloned()
        };
        let pod_name = extra(POD_NAME).ok_or(TokenRefusal::Unbound)?;
        let pod_uid = extra(POD_UID).ok_or(TokenRefusal::Unbound)?;
        Ok(Self {
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            pod_name,
            pod_uid,
            node: extra(NODE_NAME),
            token_id: extra(CREDENTIAL_ID).unwrap_or_default(),
        })
    }

    /// As one that has been looked at, until then.
    pub(super) fn reviewed(self, expires: UnixTime) -> ReviewedToken {
        ReviewedToken {
            namespace: self.namespace,
            service_account: self.service_account,
            pod_name: self.pod_name,
            pod_uid: self.pod_uid,
            node: self.node,
            token_id: self.token_id,
            expires,
        }
    }

    /// What about the pod is not as the token says.
    fn agrees_with(&self, pod: Option<&Pod>) -> Result<(), String> {
        let name = format!("{}/{}", self.namespace, self.pod_name);
        let Some(pod) = pod else { return Err(format!("there is no pod {name}")) };
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        if uid != self.pod_uid {
            return Err(format!("the pod {name} has been made anew, as {uid}"));
        }
        let spec = pod.spec.clone().unwrap_or_default();
        let account = spec.service_account_name.as_deref().unwrap_or("default");
        if account != self.service_account {
            return Err(format!(
                "the pod {name} runs as {account}, not as {}",
                self.service_account
            ));
        }
        let node = spec.node_name.as_deref();
        if self.node.is_some() && self.node.as_deref() != node {
            let node = node.unwrap_or("no node");
            return Err(format!("the pod {name} is on {node}, not on {:?}", self.node));
        }
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        match phase {
            Some(ended @ ("Succeeded" | "Failed")) => Err(format!("the pod {name} has {ended}")),
            _ => Ok(()),
        }
    }
}

fn malformed(why: String) -> TokenRefusal {
    TokenRefusal::Malformed(why)
}

fn unavailable(error: kube::Error) -> TokenRefusal {
    TokenRefusal::Unavailable(format!("the API server: {}", ErrorChain(&error)))
}

const ACCOUNT_PREFIX: &str = "system:serviceaccount:";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";
const TOKEN_BYTES_MAX: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn user() -> serde_json::Value {
        json!({
            "username": "system:serviceaccount:demo:web",
            "extra": {
                POD_NAME: ["web-0"], POD_UID: ["u1"], NODE_NAME: ["n1"], CREDENTIAL_ID: ["JTI=7"],
            },
        })
    }

    fn holder(user: serde_json::Value) -> Result<Holder, TokenRefusal> {
        Holder::of(&serde_json::from_value(user).unwrap())
    }

    #[test]
    fn a_token_belongs_to_the_pod_that_it_is_bound_to_and_to_no_other_of_its_name() {
        let holder = holder(user()).unwrap();
        let pod = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut pod = json!({
                "metadata": { "name": "web-0", "namespace": "demo", "uid": "u1" },
                "spec": { "serviceAccountName": "web", "nodeName": "n1", "containers": [] },
                "status": { "phase": "Running" },
            });
            change(&mut pod);
            serde_json::from_value::<Pod>(pod).unwrap()
        };
        assert_eq!(holder.agrees_with(Some(&pod(&|_| ()))), Ok(()));
        let told = holder.agrees_with(None).unwrap_err();
        assert!(told.contains("demo/web-0"), "{told}");
        for (pointer, value, told) in [
            ("/metadata/uid", "u2", "made anew"),
            ("/spec/serviceAccountName", "db", "runs as db"),
            ("/spec/nodeName", "n2", "on n2"),
            ("/status/phase", "Succeeded", "has Succeeded"),
            ("/status/phase", "Failed", "has Failed"),
        ] {
            let other = pod(&|pod| *pod.pointer_mut(pointer).unwrap() = json!(value));
            let why = holder.agrees_with(Some(&other)).unwrap_err();
            assert!(why.contains(told), "{why}");
        }
    }

    #[test]
    fn a_token_that_is_bound_to_no_pod_or_to_no_service_account_is_nobodys() {
        for key in [POD_NAME, POD_UID] {
            let mut user = user();
            user["extra"].as_object_mut().unwrap().remove(key);
            assert_eq!(holder(user), Err(TokenRefusal::Unbound), "{key}");
        }
        for name in
            ["admin", "system:node:n1", "system:serviceaccount:demo", "system:serviceaccount::web"]
        {
            let mut user = user();
            user["username"] = json!(name);
            assert!(matches!(holder(user), Err(TokenRefusal::Malformed(_))), "{name}");
        }
    }

    #[test]
    fn a_review_counts_only_if_it_names_our_audience_and_else_says_what_is_wrong() {
        let now = UnixTime::from_secs(1_000);
        let review = |status: serde_json::Value, aud: &str, exp| {
            let claims = Claims { aud: vec![aud.to_owned()], exp };
            vouched(serde_json::from_value(status).unwrap(), "mesh", &claims, now)
        };
        let good = json!({ "authenticated": true, "audiences": ["mesh"], "user": user() });
        assert!(review(good, "mesh", 2_000).is_ok());
        // Without the audience it is the word of a server that does not know what one is.
        let blind = json!({ "authenticated": true, "user": user() });
        assert!(review(blind, "mesh", 2_000).is_err());
        let refused = || json!({ "error": "no" });
        assert!(matches!(review(refused(), "api", 2_000), Err(TokenRefusal::Audience { .. })));
        assert!(matches!(review(refused(), "mesh", 1_000), Err(TokenRefusal::Expired(_))));
        let other = review(refused(), "mesh", 2_000);
        assert_eq!(other, Err(TokenRefusal::Malformed("no".to_owned())));
    }

    #[test]
    fn what_is_no_jwt_is_refused_before_the_api_server_is_asked() {
        for bad in ["", "a", "a.b", "a.b.c", "a.e30.c.d", "..", "a.!.c"] {
            assert!(Claims::read(bad).is_none(), "{bad}");
        }
        assert!(Claims::read("a.e30.c").is_some());
    }
}
