//! The control plane, installed by its charts.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use steadfast_test_rig::app::App;
use steadfast_test_rig::cluster::{
    ANCHORS_NAMESPACE as ANCHORS, CONTROL_NAMESPACE, Cluster, chart, steadfast_by,
};
use steadfast_test_rig::process::free_addr;
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

    // What others may have defined, and have not, keeps nobody from discovering services.
    let foreign = ["servers.policy.linkerd.io", "externalworkloads.workload.linkerd.io"];
    cluster.kubectl(&[&["delete", "crd"], &foreign[..]].concat());
    let control = format!("--namespace={CONTROL_NAMESPACE}");
    cluster.kubectl(&["rollout", "restart", "deployment/steadfast-control", &control]);
    let status = ["rollout", "status", "deployment/steadfast-control", "--timeout=110s", &control];
    cluster.kubectl(&status);

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

#[tokio::test(flavor = "multi_thread")]
async fn the_command_installs_what_the_charts_do_and_takes_it_away_again() {
    let cluster = Cluster::start(0).await;
    let run = |args: &[&str]| cluster.steadfast(args).unwrap_or_else(|e| panic!("{args:?}: {e}"));
    check_says_what_is_missing_to_install(&cluster).await;

    // The same objects as Helm's, but for who manages them and the namespace that Helm makes.
    let ours =
        documents(&run(&["install", "--ha", "--set", DOMAIN, "--set", "networkPolicies=true"]));
    let (chart, values) = (chart("steadfast"), chart("steadfast") + "/values-ha.yaml");
    let template = ["template", "steadfast", &chart, "--namespace", CONTROL_NAMESPACE];
    let set = ["--set", DOMAIN, "--set", "networkPolicies=true"];
    let with = [&["--values", &*values][..], &set[..]].concat();
    let helms = documents(&cluster.helm(&[&template[..], &with[..]].concat()));
    assert!(helms.len() > 20, "{}", helms.len());
    for (name, object) in &helms {
        assert_eq!(ours.get(name), Some(object), "{name}");
    }
    assert_eq!(ours.len(), helms.len() + 1);

    cluster.apply(&run(&["install", "--crds"]));
    cluster.apply(&run(&["install", "--set", "identity.replicas=2"]));
    let replicas = |cluster: &Cluster| {
        let identity = ["get", "deployment", "steadfast-identity", "--output=json"];
        let namespace = format!("--namespace={CONTROL_NAMESPACE}");
        let found = cluster.kubectl(&[&identity[..], &[&*namespace]].concat());
        serde_json::from_str::<Value>(&found).expect("JSON")["spec"]["replicas"].clone()
    };
    // What was set stays set.
    cluster.apply(&run(&["upgrade", "--set", "control.replicas=2"]));
    assert_eq!(replicas(&cluster), 2);
    assert_eq!(run(&["prune"]), "");
    let namespace = format!("--namespace={CONTROL_NAMESPACE}");
    cluster.kubectl(&["create", "service", "clusterip", "old", "--tcp=80", &namespace]);
    let part = "app.kubernetes.io/part-of=steadfast";
    cluster.kubectl(&["label", "service", "old", part, &namespace]);
    let pruned = run(&["prune"]);
    assert!(pruned.contains("name: old") && pruned.matches("kind:").count() == 1, "{pruned}");

    let gone = run(&["uninstall"]);
    cluster.delete(&gone);
    let left = cluster.kubectl(&["get", "all,configmap", "--all-namespaces", "--selector", part]);
    assert!(left.is_empty(), "{left}");
    cluster.kubectl(&["get", "namespace", ANCHORS]);
    cluster.kubectl(&["get", "crd", "trustdomains.trust.steadfast.dev"]);
    cluster.delete(&run(&["uninstall", "--trust"]));
    assert!(cluster.try_kubectl(&["get", "crd", "trustdomains.trust.steadfast.dev"]).is_err());
    let error = cluster.steadfast(&["upgrade"]).unwrap_err();
    assert!(error.contains("no control plane is installed"), "{error}");
}

/// The one who asks may do nothing here, a node's clock is ahead, the API server is of long ago.
async fn check_says_what_is_missing_to_install(cluster: &Cluster) {
    let checked = cluster.steadfast(&["check", "--pre"]);
    checked.unwrap_or_else(|wrong| panic!("{wrong}"));
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": { "name": "fast", "namespace": "kube-node-lease" },
        "spec": { "holderIdentity": "fast", "renewTime": "2126-01-01T00:00:00.000000Z" },
    });
    cluster.create(&lease);
    let skewed = cluster.steadfast(&["check", "--pre"]).unwrap_err();
    assert!(skewed.contains("the clock of fast is") && skewed.contains("chrony"), "{skewed}");
    cluster.kubectl(&["delete", "lease", "fast", "--namespace=kube-node-lease"]);

    let kubeconfig = cluster.kubectl(&["config", "view", "--raw", "--output=json"]);
    let mut kubeconfig: Value = serde_json::from_str(&kubeconfig).expect("kubectl prints JSON");
    let file = cluster.dir().join("another.kubeconfig");
    let mut check_pre = |at: &str, value: &str| {
        *kubeconfig.pointer_mut(at).expect("it is there") = value.into();
        std::fs::write(&file, kubeconfig.to_string()).expect("the folder is ours");
        steadfast_by(&file, &["check", "--pre"]).unwrap_err()
    };
    cluster.kubectl(&["create", "serviceaccount", "anybody", "--namespace=default"]);
    let token = cluster.kubectl(&["create", "token", "anybody", "--namespace=default"]);
    let refused = check_pre("/users/0/user/token", token.trim());
    assert!(refused.contains("you may not create customresourcedefinitions"), "{refused}");
    let version = r#"{"major":"1","minor":"27","gitVersion":"v1.27.1","gitCommit":"",
        "gitTreeState":"","buildDate":"","goVersion":"","compiler":"","platform":""}"#;
    let of_long_ago = App::telling(free_addr(), "/version", || version.to_owned()).await;
    let of_long_ago = of_long_ago.expect("a port is free");
    let old = check_pre("/clusters/0/cluster/server", &format!("http://{}", of_long_ago.addr));
    assert!(old.contains("it runs v1.27.1") && old.contains("upgrade the cluster"), "{old}");
}

/// Each object of manifests, by what it is known by; who manages it does not count.
fn documents(manifests: &str) -> BTreeMap<String, Value> {
    let all: Vec<Value> = serde_saphyr::from_multiple(manifests).expect("YAML");
    let named = all.into_iter().filter(|object| object["kind"].is_string()).map(|mut object| {
        for labels in ["/metadata/labels", "/spec/template/metadata/labels"] {
            if let Some(labels) = object.pointer_mut(labels).and_then(Value::as_object_mut) {
                labels.remove("app.kubernetes.io/managed-by");
            }
        }
        // Texts of YAML and JSON, which may be laid out in other ways.
        if let Some(data) = object["data"].as_object_mut() {
            for text in data.values_mut() {
                let parsed = text.as_str().and_then(|text| serde_saphyr::from_str(text).ok());
                *text = parsed.unwrap_or_else(|| text.clone());
            }
        }
        if let Some(all) = object.pointer_mut("/spec/template/metadata/annotations") {
            all.as_object_mut().expect("a map").remove("checksum/injection");
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let metadata = &object["metadata"];
        let name = [&object["kind"], &metadata["namespace"], &metadata["name"]].map(text);
        (name.join(" "), object)
    });
    named.collect()
}

const DOMAIN: &str = "trustDomain=prod.example.org";
const DEADLINE: Duration = Duration::from_secs(120);
