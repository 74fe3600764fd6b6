//! A thousand pods that arrive at once, and a thousand services. The pods have no processes, so what
//! their sidecars would ask is asked with tokens of theirs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use steadfast_process::{Clock as _, SystemClock};
use steadfast_test_rig::cluster::{CONTROL_NAMESPACE, Cluster};
use steadfast_test_rig::until;
use tokio::task::JoinSet;

use crate::trust::{ROTATION, active, state};

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_pods_that_arrive_at_once_get_their_svids_and_an_anchor_rotates_under_them() {
    let cluster = Cluster::start_alone(1).await;
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

    let identity = address(&cluster, "identity", 8080);
    let dir = folder.display().to_string();
    let swarm = ["swarm", &identity, &dir];
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

/// What a platform team's cluster is: a thousand services of ten pods, and as many subscribers as
/// sidecars make.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_reaches_every_subscriber_of_a_thousand_services_within_the_memory_promised() {
    let cluster = Cluster::start_alone(1).await;
    cluster.install(&[]).await;
    let empty = footprint();
    cluster.apply(ONE);
    let (client, _) = cluster.client().await;
    let asks = cluster.try_kubectl(&["rollout", "status", "deployment/many", "--namespace=many"]);
    asks.unwrap_or_else(|error| panic!("{error}"));
    let fleet = Fleet { client: client.clone() };
    fleet.create().await;

    let folder = cluster.dir().join("subscribers");
    std::fs::create_dir(&folder).expect("the folder is ours");
    mount(&client, &folder).await.expect("the mirror is there");
    let pods = Api::<Pod>::namespaced(client, "many");
    let pods = pods.list(&ListParams::default()).await.expect("the API server answers").items;
    tokens(&fleet.client, &pods, &folder).await;
    let (identity, control) =
        (address(&cluster, "identity", 8080), address(&cluster, "control", 8086));
    let (dir, count) = (folder.display().to_string(), SERVICES.to_string());
    let connections = CONNECTIONS.to_string();
    let suffix = ".fleet.svc.cluster.local:80";
    let subscribe = ["subscribe", &identity, &control, &dir, "s", &count, suffix, &connections];
    let subscribers = cluster.beside("subscribers", "steadfast-test-app", &subscribe);
    // The first service is everybody's.
    let streams = SERVICES + CONNECTIONS - 1;
    let told = |wanted: &dyn Fn(usize) -> usize| {
        let log = subscribers.log();
        let heard = heard(&log);
        let right = heard.values().filter(|told| wanted(told.number) == told.endpoints);
        match right.count() {
            told if told == streams => Ok(heard.values().map(|told| told.at).max()),
            told => Err(format!("{told} of {streams} know it")),
        }
    };
    until("all of them know all endpoints", DEADLINE, || async { told(&|_| ENDPOINTS) }).await;
    let full = footprint();

    let mut slowest = Vec::new();
    for round in 1..=ROUNDS {
        // One that all follow, and those of the next hundred.
        let changed = |number| number == 0 || number / 100 == round - 1;
        let left = ENDPOINTS - round;
        let before = SystemClock.now().as_millis();
        let changes = (0..SERVICES).filter(|number| changed(*number));
        let changes = changes.map(|number| fleet.slice(number, left));
        let changes: Vec<_> = changes.collect();
        stream::iter(changes).buffer_unordered(32).collect::<Vec<()>>().await;
        let written = SystemClock.now().as_millis();
        let known = |number| match (number, number / 100) {
            (0, _) => left,
            (_, hundred) if hundred < round => ENDPOINTS - hundred - 1,
            _ => ENDPOINTS,
        };
        let last = until("every subscriber knows it", DEADLINE, || async { told(&known) }).await;
        let last = last.expect("somebody was told");
        slowest.push((written - before, last.saturating_sub(written)));
    }
    let busy = footprint();
    println!("written within ms, and heard by all so many ms later: {slowest:?}");
    for (when, footprint) in [("empty", empty), ("full", full), ("after changes", busy)] {
        println!("{when}: {footprint:#?}");
        let own: u64 = footprint.values().map(|process| process.own_kib).sum();
        assert!(own < MEMORY_KIB_MAX, "{when}: {own} KiB");
    }
}

/// Services whose endpoints nobody but the test writes.
struct Fleet {
    client: Client,
}

impl Fleet {
    async fn create(&self) {
        let account = json!({ "metadata": { "name": "fleet" } });
        self.make::<ServiceAccount>(account).await;
        let pods = (0..SERVICES * ENDPOINTS).map(|number| self.pod(number));
        let pods: Vec<_> = pods.collect();
        stream::iter(pods).buffer_unordered(64).collect::<Vec<()>>().await;
        let services = (0..SERVICES).map(|number| async move {
            let service = json!({
                "metadata": { "name": format!("s{number}") },
                "spec": { "ports": [{ "name": "http", "port": 80, "targetPort": 8080 }] },
            });
            self.make::<Service>(service).await;
            self.slice(number, ENDPOINTS).await;
        });
        let services: Vec<_> = services.collect();
        stream::iter(services).buffer_unordered(64).collect::<Vec<()>>().await;
    }

    /// One that nobody schedules, as if it ran and was meshed.
    async fn pod(&self, number: usize) {
        let name = format!("p{number}");
        let pod = json!({
            "metadata": {
                "name": name, "labels": { "app": format!("s{}", number / ENDPOINTS) },
                "annotations": { "linkerd.io/inject": "enabled" },
            },
            "spec": {
                "schedulerName": "nobody", "serviceAccountName": "fleet",
                "containers": [
                    { "name": "app", "image": "none", "ports": [{ "containerPort": 8080 }] },
                    { "name": "linkerd-proxy", "image": "none" },
                ],
            },
        });
        self.make::<Pod>(pod).await;
        let ip = pod_ip(number);
        let status = json!({ "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        }});
        let pods = Api::<Pod>::namespaced(self.client.clone(), "fleet");
        let (params, status) = (PatchParams::default(), Patch::Merge(status));
        let patched = pods.patch_status(&name, &params, &status).await;
        patched.unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    /// Says that so many of its pods are the endpoints of a service.
    async fn slice(&self, service: usize, endpoints: usize) {
        let name = format!("s{service}");
        let endpoint = |number: usize| {
            json!({
                "addresses": [pod_ip(number)], "conditions": { "ready": true },
                "targetRef": { "kind": "Pod", "name": format!("p{number}"), "namespace": "fleet" },
            })
        };
        let first = service * ENDPOINTS;
        let endpoints: Vec<_> = (first..first + endpoints).map(endpoint).collect();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": { "name": name, "labels": {
                "kubernetes.io/service-name": name,
                "endpointslice.kubernetes.io/managed-by": "test.steadfast.dev",
            } },
            "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080 }],
            "endpoints": endpoints,
        });
        let slices = Api::<EndpointSlice>::namespaced(self.client.clone(), "fleet");
        let (params, slice) = (PatchParams::apply("test").force(), Patch::Apply(slice));
        let applied = slices.patch(&name, &params, &slice).await;
        applied.unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    async fn make<K>(&self, object: Value)
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
        K: Clone + std::fmt::Debug + DeserializeOwned + Serialize,
    {
        let object: K = serde_json::from_value(object).expect("it is one");
        let api = Api::<K>::namespaced(self.client.clone(), "fleet");
        let created = api.create(&PostParams::default(), &object).await;
        created.unwrap_or_else(|error| panic!("{:?}: {error}", object.meta().name));
    }
}

fn pod_ip(number: usize) -> String {
    format!("10.64.{}.{}", number / 250, number % 250 + 1)
}

/// What a stream was told last.
struct Heard {
    /// When: Unix time in ms.
    at: u64,
    /// The number of its service.
    number: usize,
    /// How many endpoints it then had.
    endpoints: usize,
}

/// The same of each stream, by its connection and name.
fn heard(log: &str) -> BTreeMap<(&str, &str), Heard> {
    // The last line may not be whole yet.
    let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let told = whole.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (at, connection, name) = (words.next()?.parse().ok()?, words.next()?, words.next()?);
        let number = name.strip_prefix('s')?.split('.').next()?.parse().ok()?;
        let endpoints = words.next()?.parse().ok()?;
        Some(((connection, name), Heard { at, number, endpoints }))
    });
    told.collect()
}

/// What a process of the control plane takes.
#[derive(Debug)]
#[expect(dead_code, reason = "for whoever reads the output")]
struct Process {
    /// All that is in memory, with the program itself.
    resident_kib: u64,
    /// What it has made itself.
    own_kib: u64,
    /// The most that was resident.
    peak_kib: u64,
    /// Of all processors, since it began.
    cpu_ms: u64,
}

/// The processes of the control plane of the one cluster there is.
fn footprint() -> BTreeMap<String, Process> {
    let processes = std::fs::read_dir("/proc").expect("/proc is there").flatten();
    let ours = processes.filter_map(|process| {
        let read = |file| std::fs::read_to_string(process.path().join(file)).ok();
        let (command, status, stat) = (read("cmdline")?, read("status")?, read("stat")?);
        let program = command.split('\0').next()?.strip_prefix("/steadfast-")?.to_owned();
        if !["identity", "rotation", "control"].contains(&&*program) {
            return None;
        }
        let kib = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        // After the name, which may hold spaces: the state is the third field, the times are the
        // fourteenth and the fifteenth, in hundredths of a second.
        let times = stat.rsplit_once(')')?.1.split_whitespace().skip(11).take(2);
        let cpu: u64 = times.filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
        let footprint = Process {
            resident_kib: kib("VmRSS:")?,
            own_kib: kib("RssAnon:")?,
            peak_kib: kib("VmHWM:")?,
            cpu_ms: cpu * 10,
        };
        Some((program, footprint))
    });
    let ours: BTreeMap<_, _> = ours.collect();
    assert_eq!(ours.len(), 3, "{ours:?}");
    ours
}

/// Where a process of the control plane listens.
fn address(cluster: &Cluster, component: &str, port: u16) -> String {
    let selector = format!("--selector=app.kubernetes.io/name=steadfast-{component}");
    let namespace = format!("--namespace={CONTROL_NAMESPACE}");
    let ip = "--output=jsonpath={.items[0].status.podIP}";
    format!("{}:{port}", cluster.kubectl(&["get", "pods", ip, &selector, &namespace]))
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
/// A pod that is meshed, and services whose pods are on no node.
const ONE: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: many, annotations: { linkerd.io/inject: enabled } }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: many, namespace: many }
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: many, namespace: many }
spec:
  selector: { matchLabels: { app: many } }
  template:
    metadata: { labels: { app: many } }
    spec:
      serviceAccountName: many
      terminationGracePeriodSeconds: 0
      containers:
      - name: app
        image: localhost/busybox:1
        imagePullPolicy: Never
        command: [sleep, infinity]
---
apiVersion: v1
kind: Namespace
metadata: { name: fleet }
"#;
const PODS: usize = 1_000;
const SERVICES: usize = 1_000;
/// Of each service.
const ENDPOINTS: usize = 10;
/// As many sidecars.
const CONNECTIONS: usize = 200;
const ROUNDS: usize = 5;
/// What the whole control plane may take.
const MEMORY_KIB_MAX: u64 = 100 * 1024;
const DEADLINE: Duration = Duration::from_secs(240);
