//! The application that the tests mesh: `web` sends requests to `api`, which asks `store`. Its
//! manifests know nothing of the mesh, but for the annotation of their namespace.

use serde_json::Value;
use steadfast_test_rig::cluster::{Cluster, Kubectl};
use steadfast_test_rig::load::Report;
use steadfast_test_rig::until;

use crate::trust::DEADLINE;

/// The application in a namespace of its own.
pub struct Application {
    kubectl: Kubectl,
    pub namespace: &'static str,
}

impl Application {
    /// Applies it, and waits until all of it is rolled out.
    pub fn start(cluster: &Cluster, namespace: &'static str) -> Self {
        Self::applied(cluster, namespace, MANIFESTS.to_owned())
    }

    /// The same, with all of it on one node.
    pub fn start_on(cluster: &Cluster, namespace: &'static str, node: &str) -> Self {
        let account = "      serviceAccountName:";
        let there = format!("      nodeSelector: {{ kubernetes.io/hostname: {node} }}\n{account}");
        Self::applied(cluster, namespace, MANIFESTS.replace(account, &there))
    }

    fn applied(cluster: &Cluster, namespace: &'static str, manifests: String) -> Self {
        cluster.apply(&manifests.replace("$NAMESPACE", namespace));
        for deployment in ["store", "api", "web"] {
            let deployment = format!("deployment/{deployment}");
            let namespace = format!("--namespace={namespace}");
            cluster.kubectl(&["rollout", "status", "--timeout=110s", &deployment, &namespace]);
        }
        Self { kubectl: (**cluster).clone(), namespace }
    }

    /// Replaces the pods of these deployments by new ones, as a rollout does it.
    pub async fn restart(&self, deployments: &[&str]) {
        let namespace = format!("--namespace={}", self.namespace);
        let all = self.pods().len();
        for deployment in deployments {
            let deployment = format!("deployment/{deployment}");
            self.kubectl.kubectl(&["rollout", "restart", &deployment, &namespace]);
            let status = ["rollout", "status", "--timeout=110s", &deployment, &namespace];
            self.kubectl.kubectl(&status);
        }
        until("the old pods are gone", DEADLINE, || async {
            match self.pods().len() {
                pods if pods == all => Ok(()),
                pods => Err(format!("{pods} pods")),
            }
        })
        .await;
    }

    /// What has come of the requests so far, or why it cannot be read.
    pub fn report(&self) -> Result<Report, String> {
        let report = self.ask("deployment/web", "127.0.0.1:9000", "/report")?;
        serde_json::from_str(&report).map_err(|error| format!("{error}: {report}"))
    }

    /// The metrics of the sidecar of a pod.
    pub fn metrics(&self, pod: &str) -> Result<String, String> {
        self.ask(pod, "127.0.0.1:4191", "/metrics")
    }

    /// An answer with status 200 to a request from within a pod.
    pub fn ask(&self, pod: &str, to: &str, path: &str) -> Result<String, String> {
        let namespace = format!("--namespace={}", self.namespace);
        let get = ["exec", pod, &namespace, "--", "/steadfast-test-app", "get", to, path];
        let answer = self.kubectl.try_kubectl(&get)?;
        match answer.split_once('\n') {
            Some(("200", body)) => Ok(body.to_owned()),
            _ => Err(answer),
        }
    }

    /// Its pods.
    pub fn pods(&self) -> Vec<Value> {
        let namespace = format!("--namespace={}", self.namespace);
        let pods = self.kubectl.kubectl(&["get", "pods", "--output=json", &namespace]);
        let mut pods: Value = serde_json::from_str(&pods).expect("kubectl prints JSON");
        serde_json::from_value(pods["items"].take()).expect("a list")
    }
}

const MANIFESTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: $NAMESPACE, annotations: { linkerd.io/inject: enabled } }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: web, namespace: $NAMESPACE }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: api, namespace: $NAMESPACE }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: store, namespace: $NAMESPACE }
---
apiVersion: v1
kind: Service
metadata: { name: api, namespace: $NAMESPACE }
spec: { selector: { app: api }, ports: [{ name: http, port: 80, targetPort: http }] }
---
apiVersion: v1
kind: Service
metadata: { name: store, namespace: $NAMESPACE }
spec: { selector: { app: store }, ports: [{ name: http, port: 80, targetPort: http }] }
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: web, namespace: $NAMESPACE }
spec:
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      # It does not hear SIGTERM, and serves until then.
      terminationGracePeriodSeconds: 10
      serviceAccountName: web
      containers:
      - name: web
        image: localhost/steadfast-test-app:1
        imagePullPolicy: Never
        args: [client, "127.0.0.1:9000", "api:80"]
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: api, namespace: $NAMESPACE }
spec:
  replicas: 2
  selector: { matchLabels: { app: api } }
  template:
    metadata: { labels: { app: api } }
    spec:
      # It does not hear SIGTERM, and serves until then.
      terminationGracePeriodSeconds: 10
      serviceAccountName: api
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: ScheduleAnyway
        labelSelector: { matchLabels: { app: api } }
      containers:
      - name: api
        image: localhost/steadfast-test-app:1
        imagePullPolicy: Never
        args: [http, "0.0.0.0:8080", "store:80"]
        ports: [{ name: http, containerPort: 8080 }]
        readinessProbe:
          { httpGet: { path: /hello, port: http }, periodSeconds: 1, timeoutSeconds: 5 }
        livenessProbe: { httpGet: { path: /hello, port: http }, timeoutSeconds: 10 }
---
apiVersion: apps/v1
kind: Deployment
metadata: { name: store, namespace: $NAMESPACE }
spec:
  replicas: 2
  selector: { matchLabels: { app: store } }
  template:
    metadata: { labels: { app: store } }
    spec:
      # It does not hear SIGTERM, and serves until then.
      terminationGracePeriodSeconds: 10
      serviceAccountName: store
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: ScheduleAnyway
        labelSelector: { matchLabels: { app: store } }
      containers:
      - name: store
        image: localhost/steadfast-test-app:1
        imagePullPolicy: Never
        args: [http, "0.0.0.0:8080"]
        ports: [{ name: http, containerPort: 8080 }]
        # A sidecar takes every connection: only an answer shows that the application listens.
        readinessProbe:
          { httpGet: { path: /hello, port: http }, periodSeconds: 1, timeoutSeconds: 5 }
        livenessProbe: { tcpSocket: { port: http }, timeoutSeconds: 10 }
"#;
