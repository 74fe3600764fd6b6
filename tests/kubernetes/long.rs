//! What takes long, or much of the machine: `tests/run --long` runs it too.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::certificates::v1beta1::PodCertificateRequest;
use serde_json::Value;
use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, SystemClock};
use steadfast_test_rig::cluster::Cluster;
use steadfast_test_rig::until;

use crate::application::Application;
use crate::bare::{ask_by_pod_certificate, start_bare};
use crate::trust::{SHORT, active_anchor, answered, lives};

/// The API server takes no certificate of less than an hour, of which a kubelet waits for more than
/// half before it asks for the next.
#[tokio::test]
async fn a_pod_certificate_is_renewed_while_the_pod_runs() {
    let cluster = Cluster::start(1).await;
    cluster.import("steadfast-test-app");
    cluster.install(&SHORT).await;
    let application = Application::start(&cluster, "shop");
    start_bare(&cluster).await;
    // Those that were answered are deleted after a while.
    let issued = || {
        let all = ["get", "podcertificaterequests", "--namespace=bare", "--output=json"];
        let found = cluster.try_kubectl(&all)?;
        let mut found: Value = serde_json::from_str(&found).map_err(|error| error.to_string())?;
        let found: Vec<PodCertificateRequest> =
            serde_json::from_value(found["items"].take()).map_err(|error| error.to_string())?;
        let ends = found.into_iter().filter_map(|request| {
            let end = request.status?.not_after?.0.as_second();
            Some((request.metadata.name?, UnixTime::from_secs(end)))
        });
        Ok::<BTreeMap<_, _>, String>(ends.collect())
    };
    let first = issued().expect("they are listed");
    let end = *first.values().max().expect("one was issued");
    let hour = Duration::from_secs(4_200);
    until("the kubelet has asked again, and has its answer", hour, || async {
        let now = issued()?;
        if now.keys().all(|name| first.contains_key(name)) {
            Err(format!("{now:?}"))
        } else {
            Ok(())
        }
    })
    .await;
    until("the first certificate has ended", hour, || async {
        let left = end.since(SystemClock.now());
        if left.is_zero() { Ok(()) } else { Err(format!("{left:?} are left")) }
    })
    .await;
    let answer = ask_by_pod_certificate(&cluster, &application, "api").expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// How long each phase takes is in the output.
#[tokio::test]
async fn an_anchor_rotates_under_a_hundred_real_pods() {
    let cluster = Cluster::start_alone(2).await;
    cluster.import("steadfast-test-app");
    cluster.install(&SHORT).await;
    let application = Application::start(&cluster, "shop");
    cluster.apply(CROWD);
    let rollout = ["rollout", "status", "--timeout=100s", "deployment/crowd", "--namespace=shop"];
    until("a hundred pods run", Duration::from_secs(1_200), || async {
        cluster.try_kubectl(&rollout)
    })
    .await;
    answered(&application, 100).await;
    let (pods, anchor) = (lives(&application), active_anchor(&cluster));
    assert_eq!(pods.len(), 100);
    let said = cluster.steadfast(&["anchor", "rotate", "--yes"]).unwrap_or_else(|e| panic!("{e}"));
    println!("{said}");
    assert_ne!(active_anchor(&cluster), anchor);
    assert_eq!(lives(&application), pods, "a pod was created or restarted");
    let seen = application.report().expect("web tells").requests;
    answered(&application, seen + 100).await;
    println!("{}", cluster.steadfast(&["trust", "history", "1"]).expect("it is there"));
}

const CROWD: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: crowd, namespace: shop }
spec:
  replicas: 95
  progressDeadlineSeconds: 3600
  selector: { matchLabels: { app: crowd } }
  template:
    metadata: { labels: { app: crowd } }
    spec:
      serviceAccountName: store
      containers:
      - name: crowd
        image: localhost/steadfast-test-app:1
        imagePullPolicy: Never
        args: [http, "0.0.0.0:8080"]
"#;
