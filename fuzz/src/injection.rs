//! Pods as whoever reaches the webhook sends them.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde_json::{Value, json};
use steadfast_control::inject::{Outcome, Reason, Settings, inject, uninject};

/// Any JSON is left as it is, or is a pod; a meshed pod is not meshed again, and can be unmeshed.
pub(crate) fn injection(input: &[u8]) -> bool {
    let Ok(pod) = serde_json::from_slice::<Value>(input) else { return false };
    let asked = BTreeMap::from([("linkerd.io/inject".to_owned(), "enabled".to_owned())]);
    let outcome = |pod: &Value| inject(pod, "demo", &asked, &SETTINGS).0;
    let Outcome::Meshed(meshed) = outcome(&pod) else {
        if let Some(bare) = uninject(&pod) {
            assert_eq!(uninject(&bare), None);
        }
        return false;
    };
    assert_eq!(outcome(&meshed), Outcome::Left(Reason::HasProxy));
    let bare = uninject(&meshed).expect("it has a proxy");
    assert!(matches!(outcome(&bare), Outcome::Meshed(_)));
    true
}

pub(crate) fn injection_seeds() -> Vec<Vec<u8>> {
    let annotations = json!({
        "config.linkerd.io/skip-inbound-ports": "22,http",
        "config.linkerd.io/proxy-memory-limit": "128Mi",
        "config.linkerd.io/skip-subnets": "10.0.0.0/8",
        "config.linkerd.io/proxy-enable-native-sidecar": "false",
    });
    let container = json!({ "name": "a", "ports": [{ "name": "http", "containerPort": 80 }] });
    let plain = json!({ "spec": { "containers": [container] } });
    let annotated = json!({
        "metadata": { "annotations": annotations, "labels": {} },
        "spec": { "containers": [container], "initContainers": [], "volumes": [] },
    });
    let broken = json!({ "metadata": "x", "spec": { "volumes": {} } });
    [plain, annotated, broken].iter().map(|pod| pod.to_string().into_bytes()).collect()
}

static SETTINGS: LazyLock<Settings> = LazyLock::new(|| Settings {
    control_namespace: "steadfast".to_owned(),
    trust_domain: "cluster.local".to_owned(),
    cluster_domain: "cluster.local".to_owned(),
    proxy_image: "proxy".to_owned(),
    init_image: "init".to_owned(),
    tag: "1".to_owned(),
    pull_policy: "Never".to_owned(),
    resources: json!({}),
});
