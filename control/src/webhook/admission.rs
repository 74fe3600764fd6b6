//! What the API server is answered. Pure: its question and the annotations of the pod's namespace
//! in, its answer out.

use std::collections::BTreeMap;

use kube::core::DynamicObject;
use kube::core::admission::{
    AdmissionRequest, AdmissionResponse, AdmissionReview, SerializePatchError,
};

use crate::inject::{self, Outcome, Reason, Settings};

/// A question that cannot be answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskedError {
    #[error("the body is no AdmissionReview of admission.k8s.io/v1: {0}")]
    Parse(#[from] serde_json::Error),
    #[error("the AdmissionReview asks nothing: it has no request")]
    Empty,
    #[error("the patch cannot be written")]
    Patch(#[source] SerializePatchError),
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// What becomes of a pod that is created.
    Inject,
    /// What is wrong with the annotations of an object that makes pods, or of a namespace.
    Review,
}

/// Its answer, and what was done.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) review: AdmissionReview<DynamicObject>,
    pub(super) did: &'static str,
}

/// The question that a body asks.
pub(super) fn parse(body: &[u8]) -> Result<AdmissionRequest<DynamicObject>, AskedError> {
    let review: AdmissionReview<DynamicObject> = serde_json::from_slice(body)?;
    // With the kind of the review, which the answer has too.
    review.try_into().map_err(|_| AskedError::Empty)
}

/// Answers it; `inherited` are the annotations of the object's namespace.
pub(super) fn answer(
    question: Question,
    request: &AdmissionRequest<DynamicObject>,
    inherited: &BTreeMap<String, String>,
    settings: &Settings,
) -> Result<Answer, AskedError> {
    let response = AdmissionResponse::from(request);
    let object = serde_json::to_value(&request.object)?;
    let namespace = request.namespace.as_deref().unwrap_or_default();
    let (mut response, warnings, did) = match (question, &*request.kind.kind) {
        (Question::Inject, "Pod") => {
            let (outcome, warnings) = inject::inject(&object, namespace, inherited, settings);
            match outcome {
                Outcome::Left(reason) => (response, warnings, left(reason)),
                Outcome::Meshed(meshed) => {
                    let patch = json_patch::diff(&object, &meshed);
                    let response = response.with_patch(patch).map_err(AskedError::Patch)?;
                    (response, warnings, "injected")
                }
            }
        }
        (Question::Review, "Namespace") => {
            (response, inject::review_namespace(&object["metadata"]["annotations"]), "reviewed")
        }
        (Question::Review, _) => {
            let template = inject::pod_of(&object).and_then(|place| object.pointer(place));
            let warnings =
                template.map(|template| inject::inject(template, namespace, inherited, settings).1);
            (response, warnings.unwrap_or_default(), "reviewed")
        }
        _ => (response, Vec::new(), "not_ours"),
    };
    if !warnings.is_empty() {
        response.warnings = Some(warnings);
    }
    Ok(Answer { review: response.into_review(), did })
}

fn left(reason: Reason) -> &'static str {
    match reason {
        Reason::HasProxy => "has_proxy",
        Reason::HostNetwork => "host_network",
        Reason::NoPod => "no_pod",
        Reason::NotAsked => "not_asked",
        Reason::Disabled => "disabled",
        Reason::ControlPlane => "control_plane",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn settings() -> Settings {
        serde_json::from_value(json!({
            "controlNamespace": "steadfast", "trustDomain": "cluster.local",
            "clusterDomain": "cluster.local", "proxyImage": "p", "initImage": "i", "tag": "1",
            "pullPolicy": "Never", "resources": {},
        }))
        .unwrap()
    }

    fn review(kind: &str, object: &Value) -> Vec<u8> {
        let group = if ["Pod", "Namespace"].contains(&kind) { "" } else { "apps" };
        let resource = format!("{}s", kind.to_lowercase());
        let review = json!({
            "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {
                "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
                "kind": { "group": group, "version": "v1", "kind": kind },
                "resource": { "group": group, "version": "v1", "resource": resource },
                "name": "", "namespace": "demo", "operation": "CREATE", "userInfo": {},
                "dryRun": false, "object": object,
            },
        });
        serde_json::to_vec(&review).unwrap()
    }

    fn pod(annotations: Value) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "generateName": "web-", "annotations": annotations },
            "spec": { "containers": [{ "name": "web", "image": "w" }] },
        })
    }

    fn ask(question: Question, kind: &str, object: &Value) -> Value {
        let request = parse(&review(kind, object)).unwrap();
        let answer = answer(question, &request, &BTreeMap::new(), &settings()).unwrap();
        let review = serde_json::to_value(&answer.review).unwrap();
        let kind = [&review["apiVersion"], &review["kind"]];
        assert_eq!(kind, ["admission.k8s.io/v1", "AdmissionReview"]);
        review["response"].clone()
    }

    #[test]
    fn the_patch_makes_the_pod_that_was_meant() {
        let asks = pod(json!({ "linkerd.io/inject": "true" }));
        let response = ask(Question::Inject, "Pod", &asks);
        assert_eq!(response["allowed"], true);
        assert_eq!(response["uid"], "705ab4f5-6393-11e8-b7cc-42010a800002");
        assert!(response["warnings"][0].as_str().unwrap().contains("\"enabled\""), "{response}");
        let patch: Vec<u8> = serde_json::from_value(response["patch"].clone()).unwrap();
        let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
        let mut meshed = asks;
        json_patch::patch(&mut meshed, &patch).unwrap();
        assert_eq!(meshed["spec"]["initContainers"][1]["name"], "linkerd-proxy");
        assert_eq!(meshed["spec"]["containers"][0]["name"], "web");
        assert_eq!(ask(Question::Inject, "Pod", &meshed).get("patch"), None);
    }

    #[test]
    fn what_is_not_to_be_meshed_is_allowed_as_it_is() {
        let response = ask(Question::Inject, "Pod", &pod(json!({})));
        assert_eq!(response["allowed"], true);
        assert_eq!(response.get("patch"), None);
        assert_eq!(response.get("warnings"), None);
    }

    #[test]
    fn who_writes_a_template_or_a_namespace_hears_what_is_wrong_with_it() {
        let annotations = json!({
            "linkerd.io/inject": "enabled", "config.linkerd.io/proxy-memory-limit": "128MB",
        });
        let pod = pod(annotations.clone());
        let deployment = json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {},
            "spec": { "template": { "metadata": pod["metadata"], "spec": pod["spec"] } },
        });
        let job = json!({
            "apiVersion": "batch/v1", "kind": "CronJob", "metadata": {},
            "spec": { "jobTemplate": { "spec": deployment["spec"] } },
        });
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": { "annotations": annotations },
        });
        for (kind, object) in
            [("Deployment", deployment), ("CronJob", job), ("Namespace", namespace)]
        {
            let response = ask(Question::Review, kind, &object);
            let warning = response["warnings"][0].as_str().unwrap();
            assert!(
                warning.contains("proxy-memory-limit") && warning.contains("128MB"),
                "{warning}"
            );
            assert_eq!(response["allowed"], true);
            assert_eq!(response.get("patch"), None);
        }
    }

    #[test]
    fn bytes_that_ask_nothing_are_told_so() {
        for body in
            ["", "{}", "[]", r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}"#]
        {
            assert!(parse(body.as_bytes()).is_err(), "{body}");
        }
    }
}
