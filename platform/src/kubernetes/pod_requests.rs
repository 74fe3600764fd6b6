//! PodCertificateRequests: a kubelet asks for a certificate for a pod that it runs.
//!
//! The API server has checked that the kubelet runs this pod and has the key. Whether the pod is
//! still that pod is asked again before anything is signed, as for tokens.

use futures::stream::{BoxStream, StreamExt as _};
use jiff::Timestamp;
use k8s_openapi::api::certificates::v1beta1::{PodCertificateRequest, PodCertificateRequestStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::PostParams;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client};
use steadfast_api::UnixTime;
use steadfast_process::ErrorChain;

use super::cluster_bundle::SIGNER_NAME;
use super::store::failed;
use super::tokens::{Holder, KubeTokens};
use crate::store::StoreError;
use crate::token::{ReviewedToken, TokenRefusal};

/// The requests that name our signer.
#[derive(Clone)]
pub struct PodRequests {
    client: Client,
}

/// One that nobody has answered.
#[derive(Clone, Debug)]
pub struct PodRequest {
    /// As it was read.
    object: PodCertificateRequest,
    /// The longest life that it allows, in seconds.
    pub life_max_seconds: u32,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The certificate.
    Issued(PodCertificate),
    /// None, and asking again in the same way is in vain.
    Denied {
        /// In one word.
        reason: &'static str,
        /// For people.
        message: String,
    },
}

/// A certificate for a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodCertificate {
    /// It, and what is between it and its anchor, in PEM.
    pub chain: String,
    /// Its beginning, to the second.
    pub not_before: UnixTime,
    /// Its end, to the second.
    pub not_after: UnixTime,
    /// When the kubelet should ask for the next.
    pub renew_at: UnixTime,
}

impl PodRequests {
    /// Of this cluster.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// Every request that nobody has answered, as it comes or changes. What cannot be read is told
    /// and tried again: an API server that does not serve them says so for ever.
    pub fn pending(&self) -> BoxStream<'static, Result<PodRequest, String>> {
        let requests = Api::<PodCertificateRequest>::all(self.client.clone());
        let ours = watcher::Config::default().fields(&format!("spec.signerName={SIGNER_NAME}"));
        let applied = watcher(requests, ours).default_backoff().applied_objects();
        applied
            .filter_map(async |found| match found {
                Ok(object) => PodRequest::pending(object).map(Ok),
                Err(error) => Some(Err(format!("the API server: {}", ErrorChain(&error)))),
            })
            .boxed()
    }

    /// The request as it is now; `None`: it is answered, or gone.
    ///
    /// # Errors
    /// The API server's.
    pub async fn again(&self, request: &PodRequest) -> Result<Option<PodRequest>, StoreError> {
        let found = self.of(request).get_opt(request.name()).await.map_err(failed)?;
        let same =
            |found: &PodCertificateRequest| found.metadata.uid == request.object.metadata.uid;
        Ok(found.filter(same).and_then(PodRequest::pending))
    }

    /// The pod that it is for, which is still that pod.
    ///
    /// # Errors
    /// It is not; or it could not be asked.
    pub async fn pod(&self, request: &PodRequest) -> Result<ReviewedToken, TokenRefusal> {
        let holder = request.holder();
        KubeTokens::new(self.client.clone()).check_pod(&holder).await?;
        Ok(holder.reviewed(UnixTime::default()))
    }

    /// Answers it; `false`: somebody else was faster, or it is gone.
    ///
    /// # Errors
    /// The API server's.
    pub async fn answer(&self, request: &PodRequest, answer: Answer) -> Result<bool, StoreError> {
        let mut object = request.object.clone();
        object.status = Some(status(answer, Timestamp::now()));
        let written =
            self.of(request).replace_status(request.name(), &PostParams::default(), &object).await;
        match written {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if matches!(status.code, NOT_FOUND | CONFLICT) => {
                Ok(false)
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn of(&self, request: &PodRequest) -> Api<PodCertificateRequest> {
        Api::namespaced(self.client.clone(), request.namespace())
    }
}

impl PodRequest {
    fn pending(object: PodCertificateRequest) -> Option<Self> {
        let conditions = object.status.as_ref().and_then(|status| status.conditions.as_ref());
        let answered = conditions.is_some_and(|conditions| !conditions.is_empty());
        let ours = object.spec.signer_name == SIGNER_NAME;
        let life = object.spec.max_expiration_seconds;
        let life_max_seconds = life.and_then(|s| u32::try_from(s).ok()).unwrap_or(DAY_SECONDS);
        (ours && !answered).then_some(Self { object, life_max_seconds })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.object.metadata.name.as_deref().unwrap_or_default()
    }

    /// The namespace of the pod.
    pub fn namespace(&self) -> &str {
        self.object.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// What tells it from every other.
    pub fn uid(&self) -> &str {
        self.object.metadata.uid.as_deref().unwrap_or_default()
    }

    /// The kubelet's PKCS#10, DER.
    pub fn csr(&self) -> &[u8] {
        &self.object.spec.stub_pkc_s10_request.0
    }

    /// What the pod's author wants beside: we know no such wish.
    pub fn wishes(&self) -> impl Iterator<Item = &str> {
        let wishes = self.object.spec.unverified_user_annotations.iter();
        wishes.flat_map(|wishes| wishes.keys().map(String::as_str))
    }

    fn holder(&self) -> Holder {
        let spec = &self.object.spec;
        Holder {
            namespace: self.namespace().to_owned(),
            service_account: spec.service_account_name.clone(),
            pod_name: spec.pod_name.clone(),
            pod_uid: spec.pod_uid.clone(),
            node: Some(spec.node_name.clone()),
            token_id: format!("podcertificaterequest/{}", self.name()),
        }
    }
}

fn status(answer: Answer, now: Timestamp) -> PodCertificateRequestStatus {
    let condition = |kind: &str, reason: &str, message: String| {
        vec![Condition {
            type_: kind.to_owned(),
            status: "True".to_owned(),
            reason: reason.to_owned(),
            message,
            last_transition_time: Time(now),
            observed_generation: None,
        }]
    };
    match answer {
        Answer::Issued(PodCertificate { chain, not_before, not_after, renew_at }) => {
            let time = |at: UnixTime| Timestamp::from_second(at.as_secs() as i64).ok().map(Time);
            PodCertificateRequestStatus {
                certificate_chain: Some(chain),
                not_before: time(not_before),
                not_after: time(not_after),
                begin_refresh_at: time(renew_at),
                conditions: Some(condition("Issued", "Issued", "by Steadfast".to_owned())),
            }
        }
        Answer::Denied { reason, message } => PodCertificateRequestStatus {
            conditions: Some(condition("Denied", reason, message)),
            ..PodCertificateRequestStatus::default()
        },
    }
}

/// What the API server takes where nobody says it.
const DAY_SECONDS: u32 = 86_400;
const NOT_FOUND: u16 = 404;
const CONFLICT: u16 = 409;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn request(status: serde_json::Value) -> PodCertificateRequest {
        serde_json::from_value(json!({
            "metadata": { "name": "r", "namespace": "demo", "uid": "u" },
            "spec": {
                "signerName": SIGNER_NAME, "podName": "web-0", "podUID": "p",
                "serviceAccountName": "web", "serviceAccountUID": "s", "nodeName": "n",
                "nodeUID": "m", "stubPKCS10Request": "", "maxExpirationSeconds": 3600,
                "unverifiedUserAnnotations": { "example.com/a": "b" },
            },
            "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn a_request_is_pending_until_somebody_has_answered() {
        let pending = PodRequest::pending(request(json!({}))).unwrap();
        assert_eq!((pending.life_max_seconds, pending.namespace()), (3600, "demo"));
        assert_eq!(pending.wishes().collect::<Vec<_>>(), ["example.com/a"]);
        let holder = pending.holder();
        assert_eq!((&*holder.pod_uid, holder.node.as_deref()), ("p", Some("n")));
        let denied = Answer::Denied { reason: "NoWish", message: "m".to_owned() };
        let answered = status(denied, Timestamp::UNIX_EPOCH);
        let answered = serde_json::to_value(answered).unwrap();
        assert_eq!(answered["conditions"][0]["type"], "Denied");
        assert!(PodRequest::pending(request(answered)).is_none());
        let mut foreign = request(json!({}));
        foreign.spec.signer_name = "example.com/other".to_owned();
        assert!(PodRequest::pending(foreign).is_none());
    }

    #[test]
    fn a_certificate_is_told_with_the_times_that_stand_in_it() {
        let at = |seconds: i64| UnixTime::from_secs(1_795_262_400 + seconds);
        let certificate = PodCertificate {
            chain: "PEM".to_owned(),
            not_before: at(0),
            not_after: at(3600),
            renew_at: at(2400),
        };
        let told = serde_json::to_value(status(Answer::Issued(certificate), Timestamp::UNIX_EPOCH));
        let told = told.unwrap();
        assert_eq!(told["notBefore"], "2026-11-21T12:00:00Z");
        assert_eq!(told["notAfter"], "2026-11-21T13:00:00Z");
        assert_eq!(told["beginRefreshAt"], "2026-11-21T12:40:00Z");
        assert_eq!(told["conditions"][0]["type"], "Issued");
    }
}
