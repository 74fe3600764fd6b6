//! A thousand pods that arrive at once. kwok runs them, so they have no processes: each one's trust
//! stream is driven with a token of its own.

use std::path::Path;
use std::time::Duration;

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use kube::api::{ListParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use steadfast_test_rig::cluster::{CONTROL_NAMESPACE, Cluster};
use steadfast_test_rig::until;
use tokio::task::JoinSet;

use crate::trust::{ROTATION, active, state};

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_pods_that_arrive_at_once_get_their_svids_and_an_anchor_rotates_under_them() {
    let cluster = Cluster::start(1).await;
    let there = "nodeSelector.kubernetes\\.io/hostname=node-1";
    // Whoever cannot be meshed now is created later.
    let fail = "injector.failurePolicy=Fail";
    let quick = ["rotation.readLease=5s", "rotation.renewWindow=20s", fail, there];
    cluster.install(&quick).await;
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": "kwok", "labels": { "kubernetes.io/os": "linux" },
            "annotations": { "kwok.x-k8s.io/node": "fake" },
        },
        "spec": { "taints": [{ "key": "kwok", "effect": "NoSchedule" }] },
    });
    cluster.apply(&node.to_string());
    let status = json!({ "status": {
        "allocatable": { "cpu": "9999", "memory": "9999Gi", "pods": "9999" },
        "capacity": { "cpu": "9999", "memory": "9999Gi", "pods": "9999" },
    }});
    let patch = ["patch", "node", "kwok", "--subresource=status", "--type=merge", "--patch"];
    cluster.kubectl(&[&patch[..], &[&status.to_string()]].concat());
    let manages = "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake";
    let _kwok = cluster.companion("kwok", &[manages, "--node-lease-duration-seconds=40"]);

    cluster.apply(&MANY.replace("$PODS", &PODS.to_string()));
    let (client, _) = cluster.client().await;
    let pods = until("all of them run", DEADLINE, || running(&client)).await;
    for pod in &pods {
        let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
        let meshed = containers.filter(|container| container.name == "linkerd-proxy").count();
        assert_eq!(meshed, 1, "{:?}", pod.metadata.name);
    }
    let folder = cluster.dir().join("swarm");
    std::fs::create_dir(&folder).expect("the folder is ours");
    mount(&client, &folder).await.expect("the mirror is there");
    tokens(&client, &pods, &folder).await;

    let identity = ["get", "pods", "--output=jsonpath={.items[0].status.podIP}", "--selector"];
    let selector = "app.kubernetes.io/name=steadfast-identity";
    let namespace = format!("--namespace={CONTROL_NAMESPACE}");
    let ip = cluster.kubectl(&[&identity[..], &[selector, &namespace]].concat());
    let dir = folder.display().to_string();
    let swarm = ["swarm", &format!("{ip}:8080"), &dir];
    let swarm = cluster.beside("swarm", "steadfast-test-app", &swarm);
    let all = format!("{PODS} of {PODS} have an SVID");
    swarm.logged(&[&all], DEADLINE).await;

    // As a kubelet does it, but for the time that one takes.
    let mut kubelet = JoinSet::new();
    kubelet.spawn(async move {
        loop {
            // What could not be read now is read the next time.
            let _ = mount(&client, &folder).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    let before = active(&state(&cluster).expect("the state"));
    let said = cluster.steadfast(&["anchor", "rotate", "--yes"]).unwrap_or_else(|e| panic!("{e}"));
    println!("{said}");
    let after = until("it is idle", ROTATION, || async {
        let state = state(&cluster)?;
        if state["rotation"].is_null() { Ok(active(&state)) } else { Err("not yet".to_owned()) }
    })
    .await;
    assert_ne!(after, before);
    drop(kubelet);
    let evidence = cluster.steadfast(&["trust", "history", "--output=json"]).expect("it is there");
    let evidence: Value = serde_json::from_str(&evidence).expect("JSON");
    println!("{evidence:#}");
}

async fn running(client: &Client) -> Result<Vec<Pod>, String> {
    let pods = Api::<Pod>::namespaced(client.clone(), "many");
    let listed = pods.list(&ListParams::default()).await.map_err(|error| error.to_string())?;
    let phase = |pod: &Pod| pod.status.as_ref().and_then(|status| status.phase.clone());
    let running = listed.items.iter().filter(|pod| phase(pod).as_deref() == Some("Running"));
    match running.count() {
        PODS => Ok(listed.items),
        running => Err(format!("{running} of {} run", listed.items.len())),
    }
}

/// The bundle, as it is mounted.
async fn mount(client: &Client, folder: &Path) -> Result<(), kube::Error> {
    let mirrors = Api::<ConfigMap>::namespaced(client.clone(), "many");
    let mirror = mirrors.get("steadfast-trust-bundle").await?;
    let bundle = mirror.data.and_then(|data| data.get("bundle.json").cloned());
    let new = folder.join("bundle.json.new");
    std::fs::write(&new, bundle.unwrap_or_default()).expect("the folder is ours");
    std::fs::rename(&new, folder.join("bundle.json")).expect("the folder is ours");
    Ok(())
}

/// A token for each, bound to its pod.
async fn tokens(client: &Client, pods: &[Pod], folder: &Path) {
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), "many");
    let asked = pods.iter().enumerate().map(|(number, pod)| {
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(vec!["identity.l5d.io".to_owned()]),
                expiration_seconds: Some(3600),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: pod.metadata.name.clone(),
                    uid: pod.metadata.uid.clone(),
                }),
            }),
            ..TokenRequest::default()
        };
        let (accounts, folder) = (accounts.clone(), folder.join(format!("many.many-{number}")));
        async move {
            let made =
                accounts.create_token_request("many", &PostParams::default(), &request).await?;
            std::fs::create_dir(&folder).expect("the folder is ours");
            let token = made.status.and_then(|status| status.token).unwrap_or_default();
            std::fs::write(folder.join("token"), token).expect("the folder is ours");
            Ok::<_, kube::Error>(())
        }
    });
    let asked: Vec<_> = asked.collect();
    let made: Result<Vec<()>, _> = stream::iter(asked).buffer_unordered(32).try_collect().await;
    made.expect("every pod gets a token");
}

const MANY: &str = r#"
apiVersion: v1
kind: Namespace
metadata:
  name: many
  annotations:
    linkerd.io/inject: enabled
    config.linkerd.io/proxy-enable-native-sidecar: "false"
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: many, namespace: many }
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: many, namespace: many }
spec:
  replicas: $PODS
  strategy: { rollingUpdate: { maxSurge: 100% } }
  selector: { matchLabels: { app: many } }
  template:
    metadata: { labels: { app: many } }
    spec:
      serviceAccountName: many
      nodeName: kwok
      tolerations: [{ operator: Exists }]
      containers: [{ name: app, image: none }]
"#;
const PODS: usize = 1_000;
const DEADLINE: Duration = Duration::from_secs(240);
