//! The cluster of the tests is a real one: what a pod may ask of Kubernetes, it gets here.

use std::time::Duration;

use steadfast_test_rig::cluster::Cluster;
use steadfast_test_rig::until;

#[tokio::test]
async fn pods_get_what_kubernetes_promises_them() {
    let cluster = Cluster::start(2).await;
    cluster.import("steadfast-test-app");
    cluster.apply(PODS);
    cluster.wait_for(&["--for=condition=Available", "deployment/web"]).await;
    let pods = cluster.kubectl(&["get", "pods", "--output", "wide"]);
    assert!(pods.contains("node-1") && pods.contains("node-2"), "both nodes have one:\n{pods}");

    // Names, Services, and the way from one node to the other.
    let inside = ["exec", "deployment/web", "--container=tool", "--"];
    let get = ["/steadfast-test-app", "get", "web.default.svc.cluster.local:80", "/"];
    for _ in 0..10 {
        let answer = until("web answers by its name", DEADLINE, || async {
            cluster.try_kubectl(&[&inside[..], &get].concat())
        })
        .await;
        assert_eq!(answer.trim(), "200\nfrom the init container");
    }

    // The token that is projected, and that the API server's review says of whom it is.
    let token = cluster.kubectl(&[
        "exec",
        "deployment/web",
        "--container=web",
        "--",
        "cat",
        "/var/run/mesh/token",
    ]);
    let review = serde_json::json!({
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": { "token": token.trim(), "audiences": ["identity.l5d.io"] },
    });
    let review = cluster.create(&review);
    assert_eq!(review["status"]["authenticated"], true, "{review:#}");
    let pod = &review["status"]["user"]["extra"]["authentication.kubernetes.io/pod-name"][0];
    assert!(pod.as_str().is_some_and(|pod| pod.starts_with("web-")), "{review:#}");

    let logs = cluster.kubectl(&["logs", "deployment/web", "--container", "beside"]);
    assert!(logs.contains("beside is there"), "{logs}");
}

const DEADLINE: Duration = Duration::from_secs(120);

const PODS: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: { name: web }
spec:
  replicas: 2
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: DoNotSchedule
        labelSelector: { matchLabels: { app: web } }
      initContainers:
      - name: first
        image: localhost/busybox:1
        imagePullPolicy: Never
        command: [sh, -c, "echo from the init container >/www/index.html"]
        volumeMounts: [{ name: www, mountPath: /www }]
      - name: beside
        image: localhost/busybox:1
        imagePullPolicy: Never
        restartPolicy: Always
        command: [sh, -c, "echo beside is there; exec sleep infinity"]
      containers:
      - name: web
        image: localhost/busybox:1
        imagePullPolicy: Never
        command: [httpd, -f, -h, /www]
        readinessProbe: { httpGet: { path: /, port: 80 }, periodSeconds: 1 }
        volumeMounts:
        - { name: www, mountPath: /www }
        - { name: mesh, mountPath: /var/run/mesh }
      - name: tool
        image: localhost/steadfast-test-app:1
        imagePullPolicy: Never
        args: [http, "127.0.0.1:8080"]
      terminationGracePeriodSeconds: 0
      volumes:
      - { name: www, emptyDir: {} }
      - name: mesh
        projected:
          sources:
          - serviceAccountToken: { audience: identity.l5d.io, path: token, expirationSeconds: 3600 }
---
apiVersion: v1
kind: Service
metadata: { name: web }
spec:
  selector: { app: web }
  ports: [{ port: 80 }]
"#;
