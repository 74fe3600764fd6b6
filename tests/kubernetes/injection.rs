//! Pods are meshed as they are created, and go on being what Kubernetes' users know.

use std::time::Duration;

use serde_json::{Value, json};
use steadfast_test_rig::cluster::{CONTROL_NAMESPACE, Cluster, chart};
use steadfast_test_rig::until;

use crate::application::Application;

#[tokio::test]
async fn plain_manifests_in_an_annotated_namespace_are_a_mesh() {
    let cluster = Cluster::start(2).await;
    cluster.import("steadfast-test-app");
    cluster.install(&["rotation.readLease=5s"]).await;
    let application = Application::start(&cluster, "shop");
    requests_are_mutual_tls(&application).await;
    nobody_was_started_twice(&application);
    let checked = cluster.steadfast(&["check", "--proxy", "--wait=30s"]);
    checked.unwrap_or_else(|wrong| panic!("{wrong}"));
    a_pod_without_native_sidecars_starts_when_its_sidecar_is_ready(&cluster).await;
    a_pod_that_comes_with_its_namespace_is_meshed(&cluster);
    wrong_annotations_are_told_to_whoever_writes_them(&cluster);
    some_pods_are_left_alone(&cluster);
    jobs_end_and_stateful_pods_have_their_names(&cluster, &application).await;
    exec_logs_and_port_forward_work(&cluster, &application).await;
    the_webhook_mends_what_the_api_server_trusts(&cluster).await;
    let report = application.report().expect("web tells");
    assert!(report.requests > 500 && report.failed == 0, "{report:?}");
}

async fn requests_are_mutual_tls(application: &Application) {
    let report = until("requests are answered", DEADLINE, || async {
        let report = application.report()?;
        if report.requests >= 200 { Ok(report) } else { Err(format!("{report:?}")) }
    })
    .await;
    assert_eq!(report.failed, 0, "{report:?}");
    for (service, client) in [("api", "web"), ("store", "api")] {
        let metrics = application.metrics(&format!("deployment/{service}")).expect("metrics");
        let from = format!("client_id=\"spiffe://cluster.local/ns/shop/sa/{client}\"");
        let counted = metrics.lines().filter(|line| line.starts_with("request_total{"));
        let counted: Vec<_> =
            counted.filter(|line| line.contains("direction=\"inbound\"")).collect();
        assert!(counted.iter().any(|line| line.contains(&from)), "{service}: {counted:#?}");
    }
}

fn nobody_was_started_twice(application: &Application) {
    for pod in application.pods() {
        let spec = &pod["spec"];
        assert_eq!(spec["initContainers"][0]["name"], "linkerd-init", "{pod:#}");
        assert_eq!(spec["initContainers"][1]["name"], "linkerd-proxy");
        for kind in ["containerStatuses", "initContainerStatuses"] {
            for container in pod["status"][kind].as_array().expect("statuses") {
                assert_eq!(container["restartCount"], 0, "{container:#}");
            }
        }
    }
}

/// Where the sidecar is a container as others, those wait for it.
async fn a_pod_without_native_sidecars_starts_when_its_sidecar_is_ready(cluster: &Cluster) {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "classic", "namespace": "shop", "annotations": {
            "config.linkerd.io/proxy-enable-native-sidecar": "false",
        } },
        "spec": {
            "restartPolicy": "Never",
            "containers": [{
                "name": "ask", "image": "localhost/steadfast-test-app:1",
                "imagePullPolicy": "Never", "args": ["get", "store:80", "/hello"],
            }],
        },
    });
    let created = cluster.create(&pod);
    assert_eq!(created["spec"]["containers"][0]["name"], "linkerd-proxy", "{created:#}");
    // It asks once, and would be refused by a sidecar that is not there yet.
    until("it has asked", DEADLINE, || async {
        let logs = ["logs", "pod/classic", "--container=ask", "--namespace=shop"];
        let said = cluster.try_kubectl(&logs)?;
        if said.starts_with("200\nhello") { Ok(()) } else { Err(said) }
    })
    .await;
}

fn a_pod_that_comes_with_its_namespace_is_meshed(cluster: &Cluster) {
    for index in 0..5 {
        let namespace = format!("fresh-{index}");
        cluster.apply(&FRESH.replace("$NAMESPACE", &namespace));
        let pod = pod(cluster, &namespace, "first");
        assert!(has_sidecar(&pod), "{pod:#}");
    }
}

fn wrong_annotations_are_told_to_whoever_writes_them(cluster: &Cluster) {
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": "wrong", "namespace": "default" },
        "spec": {
            "replicas": 0,
            "selector": { "matchLabels": { "app": "wrong" } },
            "template": {
                "metadata": { "labels": { "app": "wrong" }, "annotations": {
                    "linkerd.io/inject": "true",
                    "config.linkerd.io/proxy-memory-limit": "128MB",
                    "config.linkerd.io/skip-outbound-port": "25",
                } },
                "spec": { "containers": [{ "name": "a", "image": "localhost/busybox:1" }] },
            },
        },
    });
    let said = cluster.apply(&deployment.to_string());
    for wanted in ["\"enabled\"", "proxy-memory-limit", "128MB", "skip-outbound-port"] {
        assert!(said.contains(wanted), "{wanted} is not in\n{said}");
    }
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": "told", "annotations": { "linkerd.io/inject": "yes" } },
    });
    let said = cluster.apply(&namespace.to_string());
    assert!(said.contains("linkerd.io/inject of the namespace"), "{said}");
}

fn some_pods_are_left_alone(cluster: &Cluster) {
    let host = json!({ "hostNetwork": true });
    for (name, annotations, spec, sidecar) in [
        ("plain", json!({}), json!({}), false),
        ("asks", json!({ "linkerd.io/inject": "enabled" }), json!({}), true),
        ("host", json!({ "linkerd.io/inject": "enabled" }), host, false),
    ] {
        let mut object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": "default", "annotations": annotations },
            "spec": {
                "containers": [{
                    "name": "a", "image": "localhost/busybox:1", "imagePullPolicy": "Never",
                    "command": ["sleep", "infinity"],
                }],
                "terminationGracePeriodSeconds": 0,
            },
        });
        let spec = spec.as_object().expect("a map").clone();
        object["spec"].as_object_mut().expect("a map").extend(spec);
        let created = cluster.create(&object);
        assert_eq!(has_sidecar(&created), sidecar, "{name}: {created:#}");
    }
}

async fn jobs_end_and_stateful_pods_have_their_names(cluster: &Cluster, application: &Application) {
    cluster.apply(WORKLOADS);
    let shop = "--namespace=shop";
    cluster.kubectl(&["create", "job", "now", "--from=cronjob/later", shop]);
    for job in ["job/once", "job/now"] {
        cluster.wait_for(&["--for=condition=Complete", job, shop]).await;
        let said = cluster.kubectl(&["logs", job, "--container=ask", shop]);
        assert!(said.starts_with("200\nhello"), "{said}");
    }
    cluster.kubectl(&["rollout", "status", "--timeout=110s", "statefulset/ledger", shop]);
    for pod in ["ledger-0", "ledger-1"] {
        let to = format!("{pod}.ledgers.shop.svc.cluster.local:8080");
        let hello = application.ask("deployment/api", &to, "/hello").expect("it answers");
        assert_eq!(hello.trim(), "hello");
        let metrics = application.metrics(&format!("pod/{pod}")).expect("metrics");
        let from = "client_id=\"spiffe://cluster.local/ns/shop/sa/api\"";
        assert!(metrics.contains(from), "{metrics}");
    }
}

async fn exec_logs_and_port_forward_work(cluster: &Cluster, application: &Application) {
    let shop = "--namespace=shop";
    let said = cluster.kubectl(&["logs", "deployment/api", "--container=api", shop]);
    assert!(said.contains("listening on 0.0.0.0:8080"), "{said}");
    let said = cluster.kubectl(&["logs", "deployment/api", "--container=linkerd-init", shop]);
    assert!(said.contains("redirect to :4143") && !said.contains("trying iptables"), "{said}");
    let hello = application.ask("deployment/api", "127.0.0.1:8080", "/hello").expect("exec");
    assert_eq!(hello.trim(), "hello");
    let forward = cluster.forward(&["deployment/api", shop], 8080);
    let (status, body) = until("the forwarded port answers", DEADLINE, || async {
        steadfast_test_rig::metrics::get(forward.addr, "/hello").await
    })
    .await;
    assert_eq!((status.as_u16(), &*body), (200, "hello"));
}

async fn the_webhook_mends_what_the_api_server_trusts(cluster: &Cluster) {
    let get = ["get", "mutatingwebhookconfiguration", "steadfast-injector", "--output=json"];
    let bundles = || {
        let found: Value = serde_json::from_str(&cluster.kubectl(&get)).expect("JSON");
        let webhooks = found["webhooks"].as_array().expect("webhooks").clone();
        let bundle =
            |webhook: &Value| webhook["clientConfig"]["caBundle"].as_str().map(str::to_owned);
        webhooks.iter().map(bundle).collect::<Vec<_>>()
    };
    let before = bundles();
    assert!(before.len() == 2 && before.iter().all(Option::is_some), "{before:?}");
    let wiped = r#"[{"op":"remove","path":"/webhooks/0/clientConfig/caBundle"}]"#;
    let patch = ["patch", get[1], get[2], "--type=json", "--patch", wiped];
    cluster.kubectl(&patch);
    until("the bundle is back", DEADLINE, || async {
        let found = bundles();
        if found == before { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;

    // While nobody answers a pod is created as it is, and what is created later is meshed.
    let control = ["deployment/steadfast-control", &*format!("--namespace={CONTROL_NAMESPACE}")];
    cluster.kubectl(&[&["scale", "--replicas=0"], &control[..]].concat());
    let ours = "--selector=app.kubernetes.io/name=steadfast-control";
    let namespace = format!("--namespace={CONTROL_NAMESPACE}");
    cluster.wait_for(&["--for=delete", "pod", ours, &namespace]).await;
    cluster.apply(&FRESH.replace("$NAMESPACE", "unguarded"));
    assert!(!has_sidecar(&pod(cluster, "unguarded", "first")));
    check_names_what_is_wrong(cluster);
    cluster.control_plane_ready().await;
    until("pods are meshed again", DEADLINE, || async {
        cluster.kubectl(&["delete", "pod", "first", "--namespace=unguarded", "--grace-period=0"]);
        cluster.apply(&FRESH.replace("$NAMESPACE", "unguarded"));
        let created = pod(cluster, "unguarded", "first");
        if has_sidecar(&created) { Ok(()) } else { Err(created.to_string()) }
    })
    .await;
}

/// With nobody at the webhook, a pod without its sidecar, and a permission taken away.
fn check_names_what_is_wrong(cluster: &Cluster) {
    let remove = r#"[{"op":"remove","path":"/rules/0"}]"#;
    let patch = ["patch", "clusterrole", "steadfast-identity", "--type=json", "--patch", remove];
    cluster.kubectl(&patch);
    let said = cluster.steadfast(&["check", "--proxy", "--output=json"]).unwrap_err();
    let report: Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
    assert_eq!(report["success"], false);
    let found = |category: &str, words: &str| {
        let categories = report["categories"].as_array().expect("categories").iter();
        let mut checks = categories
            .filter(|one| one["categoryName"] == category)
            .flat_map(|one| one["checks"].as_array().expect("checks"));
        let told = |check: &&Value| {
            check["result"] == "error"
                && check["error"].as_str().is_some_and(|error| error.contains(words))
                && check["hint"].as_str().is_some_and(|hint| !hint.is_empty())
        };
        assert!(checks.any(|check| told(&check)), "{category}: {words}: {report:#}");
    };
    found("existence", "the ClusterRole steadfast-identity grants something else");
    found("existence", "none of 0 replicas is ready");
    found("webhooks-tls", "without a sidecar");
    found("data-plane", "unguarded/first");
    // What repairs it.
    let chart = chart("steadfast");
    let again = ["upgrade", "steadfast", &chart, "--reuse-values", "--force-conflicts"];
    cluster.helm(&[&again[..], &["--namespace", CONTROL_NAMESPACE]].concat());
}

fn pod(cluster: &Cluster, namespace: &str, name: &str) -> Value {
    let namespace = format!("--namespace={namespace}");
    let pod = cluster.kubectl(&["get", "pod", name, "--output=json", &namespace]);
    serde_json::from_str(&pod).expect("kubectl prints JSON")
}

fn has_sidecar(pod: &Value) -> bool {
    let containers = pod["spec"]["initContainers"].as_array();
    containers.is_some_and(|all| all.iter().any(|container| container["name"] == "linkerd-proxy"))
}

const DEADLINE: Duration = Duration::from_secs(120);

const FRESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: $NAMESPACE, annotations: { linkerd.io/inject: enabled } }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: first, namespace: $NAMESPACE }
---
apiVersion: v1
kind: Pod
metadata: { name: first, namespace: $NAMESPACE }
spec:
  serviceAccountName: first
  terminationGracePeriodSeconds: 0
  containers:
  - { name: a, image: "localhost/busybox:1", imagePullPolicy: Never, command: [sleep, infinity] }
"#;

const WORKLOADS: &str = r#"
apiVersion: batch/v1
kind: Job
metadata: { name: once, namespace: shop }
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: ask
        image: localhost/steadfast-test-app:1
        imagePullPolicy: Never
        args: [get, "store:80", /hello]
---
apiVersion: batch/v1
kind: CronJob
metadata: { name: later, namespace: shop }
spec:
  schedule: "0 0 1 1 *"
  jobTemplate:
    spec:
      backoffLimit: 0
      template:
        spec:
          restartPolicy: Never
          containers:
          - name: ask
            image: localhost/steadfast-test-app:1
            imagePullPolicy: Never
            args: [get, "store:80", /hello]
---
apiVersion: v1
kind: Service
metadata: { name: ledgers, namespace: shop }
spec:
  clusterIP: None
  selector: { app: ledger }
  ports: [{ name: http, port: 8080 }]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: { name: ledger, namespace: shop }
spec:
  serviceName: ledgers
  replicas: 2
  selector: { matchLabels: { app: ledger } }
  template:
    metadata: { labels: { app: ledger } }
    spec:
      containers:
      - name: ledger
        image: localhost/steadfast-test-app:1
        imagePullPolicy: Never
        args: [http, "0.0.0.0:8080"]
        ports: [{ containerPort: 8080 }]
        readinessProbe: { httpGet: { path: /hello, port: 8080 }, periodSeconds: 1 }
"#;
