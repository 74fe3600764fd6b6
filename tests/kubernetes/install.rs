//! The control plane, installed by its charts.

use std::time::Duration;

use serde_json::Value;
use steadfast_test_rig::cluster::{ANCHORS_NAMESPACE as ANCHORS, CONTROL_NAMESPACE, Cluster};
use steadfast_test_rig::until;

#[tokio::test]
async fn the_charts_install_a_control_plane_that_founds_its_own_trust_domain() {
    let cluster = Cluster::start(1).await;
    cluster.install(&["trustDomain=prod.example.org", "rotation.readLease=5s"]).await;
    let state = domain(&cluster);
    assert_eq!(state["trust_domain"], "prod.example.org");
    assert_eq!(state["read_lease"]["secs"], 5);
    let keys = |namespace, purpose| {
        let label = format!("trust.steadfast.dev/key={purpose}");
        let get = ["get", "secrets", "--output=name", "--namespace", namespace, "--selector"];
        cluster.kubectl(&[&get[..], &[&*label]].concat()).lines().count()
    };
    assert_eq!(keys(ANCHORS, "anchor"), 2);
    assert_eq!(keys(CONTROL_NAMESPACE, "issuer"), 1);
    let issuer = state["issuers"][0]["key_ref"].as_str().unwrap();
    assert!(issuer.starts_with("secret/steadfast/steadfast-issuer-"), "{issuer}");

    // Every namespace has the bundle, a new one too, and what was deleted or changed comes back.
    cluster.kubectl(&["create", "namespace", "fresh"]);
    let mirror = |namespace: &str| {
        let get = ["get", "configmap", "steadfast-trust-bundle", "--output=json", "--namespace"];
        let found = cluster.try_kubectl(&[&get[..], &[namespace]].concat())?;
        serde_json::from_str::<Value>(&found).map_err(|error| error.to_string())
    };
    let mirrored = |namespace: &'static str| {
        until("the mirror is there", DEADLINE, move || async move {
            let found = mirror(namespace)?;
            let bundle = found["data"]["bundle.json"].as_str().unwrap_or_default();
            let certificates = found["data"]["ca-bundle.crt"].as_str().unwrap_or_default();
            let whole = bundle.contains("spiffe_sequence")
                && certificates.matches("BEGIN CERTIFICATE").count() == 2;
            if whole { Ok(()) } else { Err(found.to_string()) }
        })
    };
    mirrored("fresh").await;
    cluster.kubectl(&["delete", "configmap", "steadfast-trust-bundle", "--namespace=default"]);
    mirrored("default").await;
    let change = [r#"{"data":{"ca-bundle.crt":"none"}}"#, "--type=merge", "--namespace=default"];
    let patch = ["patch", "configmap", "steadfast-trust-bundle", "--patch"];
    cluster.kubectl(&[&patch[..], &change].concat());
    mirrored("default").await;

    // Who may read what.
    for (account, verb, what, namespace) in [
        ("identity", "create", "secrets", ANCHORS),
        ("identity", "create", "serviceaccounts/token", ANCHORS),
        ("identity", "get", "secrets", ANCHORS),
        ("identity", "list", "secrets", ANCHORS),
        ("identity", "list", "configmaps", ANCHORS),
        ("identity", "get", "secrets", "default"),
        ("identity", "create", "trustdomains", ""),
        ("rotation", "get", "secrets", CONTROL_NAMESPACE),
        ("rotation", "get", "secrets", "default"),
        ("rotation", "list", "configmaps", "default"),
        ("control", "get", "secrets", CONTROL_NAMESPACE),
        ("control", "get", "secrets", ANCHORS),
        ("control", "patch", "trustdomains", ""),
    ] {
        let of = if account == "rotation" { ANCHORS } else { CONTROL_NAMESPACE };
        let user = format!("--as=system:serviceaccount:{of}:steadfast-{account}");
        let can = ["auth", "can-i", verb, what, "--namespace", namespace, &user];
        let answer = cluster.try_kubectl(&can);
        assert!(answer.is_err(), "{account} can {verb} {what} in {namespace:?}");
    }

    // A state that somebody deletes is told, and no other is founded in its place.
    let rotation = format!("--namespace={ANCHORS}");
    let restart = ["rollout", "restart", "deployment/steadfast-rotation", &rotation];
    cluster.kubectl(&["delete", "trustdomain", "steadfast"]);
    cluster.kubectl(&restart);
    until("the controller says what has happened", DEADLINE, || async {
        let logs = cluster.try_kubectl(&[
            "logs",
            "--selector=app.kubernetes.io/name=steadfast-rotation",
            &rotation,
        ])?;
        if logs.contains("its state was deleted") { Ok(()) } else { Err(logs) }
    })
    .await;
    assert!(cluster.try_kubectl(&["get", "trustdomain", "steadfast"]).is_err());
    assert_eq!(keys(ANCHORS, "anchor"), 2);
}

fn domain(cluster: &Cluster) -> Value {
    let found = cluster.kubectl(&["get", "trustdomain", "steadfast", "--output=json"]);
    let found: Value = serde_json::from_str(&found).expect("kubectl prints JSON");
    found["spec"].clone()
}

const DEADLINE: Duration = Duration::from_secs(60);
