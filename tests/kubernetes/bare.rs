//! Who speaks with the mesh and is no pod with a sidecar, and who tries what must be refused.

use serde_json::Value;
use steadfast_test_rig::cluster::{ANCHORS_NAMESPACE, CONTROL_NAMESPACE, Cluster};
use steadfast_test_rig::until;

use crate::application::Application;
use crate::trust::{DEADLINE, SHORT};

#[tokio::test]
async fn a_pod_without_a_sidecar_and_a_workload_outside_speak_mutual_tls_and_nobody_gets_anothers()
{
    let cluster = Cluster::start(2).await;
    cluster.import("steadfast-test-app");
    cluster.install(&SHORT).await;
    let application = Application::start(&cluster, "shop");

    a_kubelet_asks_for_a_pod(&cluster, &application).await;
    a_workload_outside_is_an_endpoint(&cluster, &application).await;
    what_must_be_refused_is(&cluster, &application).await;
}

/// The kubelet asks for the certificate of a pod that has no sidecar; the bundle comes as a
/// ClusterTrustBundle. A key that nobody here issues to is denied.
async fn a_kubelet_asks_for_a_pod(cluster: &Cluster, application: &Application) {
    start_bare(cluster).await;
    cluster.apply(&BARE.replace("$NAME", "wrong").replace("$KEY", "RSA3072"));
    let requests = || {
        let found = ["get", "podcertificaterequests", "--namespace=bare", "--output=json"];
        let found: Value = serde_json::from_str(&cluster.kubectl(&found)).expect("JSON");
        found["items"].as_array().cloned().unwrap_or_default()
    };
    until("the RSA key is denied", DEADLINE, || async {
        let requests = requests();
        let denied = requests.iter().any(|request| {
            let condition = &request["status"]["conditions"][0];
            let message = condition["message"].as_str().unwrap_or_default();
            request["spec"]["podName"] == "wrong"
                && condition["reason"] == "UnsupportedKeyType"
                && message.contains("keyType: ECDSAP256")
        });
        if denied { Ok(()) } else { Err(format!("{requests:#?}")) }
    })
    .await;
    let answer = ask_by_pod_certificate(cluster, application, "api").expect("it answers");
    let client = "l5d-client-id: bare.bare.serviceaccount.identity.steadfast.cluster.local";
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(client), "{answer}");
    let other = ask_by_pod_certificate(cluster, application, "web");
    assert!(other.is_err(), "it is taken for another: {other:?}");
    // No census can ask it: the state says until when it may hold what it has.
    let promised = cluster.kubectl(&[
        "get",
        "trustdomain",
        "steadfast",
        "--output=jsonpath={.spec.promised[*].holder}",
    ]);
    assert_eq!(promised, "pod certificates");
}

/// Starts a pod that has a certificate of ours and no sidecar.
pub async fn start_bare(cluster: &Cluster) {
    cluster.apply(&BARE.replace("$NAME", "bare").replace("$KEY", "ECDSAP256"));
    cluster.wait_for(&["--for=condition=Ready", "pod/bare", "--namespace=bare"]).await;
}

/// What a pod of `api` answers to it over mutual TLS, if it is who `expected` is.
pub fn ask_by_pod_certificate(
    cluster: &Cluster,
    application: &Application,
    expected: &str,
) -> Result<String, String> {
    let pods = application.pods();
    let api = pods.iter().find(|pod| pod["metadata"]["labels"]["app"] == "api").expect("api runs");
    let addr = format!("{}:8080", api["status"]["podIP"].as_str().expect("an address"));
    let name = format!("{expected}.shop.serviceaccount.identity.steadfast.cluster.local");
    let exec = ["exec", "bare", "--namespace=bare", "--", "/steadfast-test-app", "tls-get"];
    let files = ["/id/credentials.pem", "/id/anchors.pem", "/head"];
    cluster.try_kubectl(&[&exec[..], &[&addr, &name], &files].concat())
}

/// What an ExternalWorkload names is an endpoint of the Service that selects it, by its identity and
/// by no other; a Server says what is spoken there.
async fn a_workload_outside_is_an_endpoint(cluster: &Cluster, application: &Application) {
    cluster.apply(OUTSIDE);
    cluster.wait_for(&["--for=condition=Ready", "pod/vm", "--namespace=outside"]).await;
    let ip = ["get", "pod", "vm", "--namespace=outside", "--output=jsonpath={.status.podIP}"];
    let ip = cluster.kubectl(&ip);
    let external = |account: &str| {
        cluster.apply(&EXTERNAL.replace("$IP", &ip).replace("$ACCOUNT", account));
        let ready = r#"{"status":{"conditions":[{"type":"Ready","status":"True"}]}}"#;
        let patch = ["patch", "externalworkload", "vm", "--namespace=shop", "--subresource=status"];
        cluster.kubectl(&[&patch[..], &["--type=merge", "--patch", ready]].concat());
    };
    let answers =
        |what: &'static str, to: String, expected: fn(&Result<String, String>) -> bool| {
            until(what, DEADLINE, move || {
                let answer = application.ask("deployment/web", &to, "/head");
                let told = format!("{answer:?}");
                let expected = expected(&answer);
                async move { if expected { Ok(()) } else { Err(told) } }
            })
        };
    let (service, address) = ("vm:80".to_owned(), format!("{ip}:8080"));
    external("vm");
    let knows = |answer: &Result<String, String>| {
        answer.as_ref().is_ok_and(|head| head.contains("l5d-client-id: web.shop."))
    };
    answers("it is spoken to as itself", service.clone(), knows).await;
    external("somebody-else");
    answers("it is not what it was said to be", service.clone(), Result::is_err).await;
    external("vm");
    answers("it is spoken to as itself", service, knows).await;
    // By its own address a pod is itself, whatever an ExternalWorkload of another namespace says.
    external("somebody-else");
    answers("the pod is spoken to as itself", address.clone(), knows).await;
    cluster.kubectl(&["delete", "externalworkload", "vm", "--namespace=shop"]);
    answers("the pod is spoken to as itself", address.clone(), knows).await;
    cluster.apply(SERVER);
    let opaque = |answer: &Result<String, String>| {
        answer.as_ref().is_ok_and(|head| !head.contains("l5d-client-id"))
    };
    answers("nobody looks into what is opaque", address, opaque).await;
}

/// RBAC and identity, by trying what must not be.
async fn what_must_be_refused_is(cluster: &Cluster, application: &Application) {
    // Identity reads an anchor's key.
    let control = format!("--namespace={CONTROL_NAMESPACE}");
    let token = cluster.kubectl(&["create", "token", "steadfast-identity", &control]);
    let token = format!("--token={}", token.trim());
    let anchors = format!("--namespace={ANCHORS_NAMESPACE}");
    let names = ["get", "secrets", &anchors, "--output=jsonpath={.items[*].metadata.name}"];
    let names = cluster.kubectl(&names);
    let key = names.split(' ').find(|name| name.starts_with("steadfast-anchor-")).expect("a key");
    let read = cluster.try_kubectl(&["get", "secret", key, &anchors, &token]);
    assert!(read.is_err_and(|error| error.contains("Forbidden")), "identity reads {key}");
    let own = cluster.try_kubectl(&["get", "secrets", &control, &token]);
    assert!(own.is_ok(), "the token is good: {own:?}");

    // A kubelet asks for a token of a pod that it does not run.
    let pods = application.pods();
    let store = pods.iter().find(|pod| pod["metadata"]["labels"]["app"] == "store").expect("one");
    let (pod, node) = (&store["metadata"], store["spec"]["nodeName"].as_str().expect("a node"));
    let other = cluster.nodes().iter().map(|node| node.name()).find(|name| *name != node);
    let name = pod["name"].as_str().expect("a name");
    let uid = format!("--bound-object-uid={}", pod["uid"].as_str().expect("a UID"));
    let bound = ["--bound-object-kind=Pod", "--bound-object-name", name, &uid];
    let token = ["create", "token", "store", "--namespace=shop", "--audience=identity.l5d.io"];
    let as_node = |node: &str| {
        let kubeconfig = cluster.dir().join(format!("{node}.kubeconfig")).display().to_string();
        let token: Value =
            serde_json::from_str(&std::fs::read_to_string(kubeconfig).expect("its kubeconfig"))
                .expect("JSON");
        format!("--token={}", token["users"][0]["user"]["token"].as_str().expect("a token"))
    };
    let runs = cluster.try_kubectl(&[&token[..], &bound, &[&as_node(node)]].concat());
    assert!(runs.is_ok(), "its own kubelet may: {runs:?}");
    let foreign = as_node(other.expect("there are two nodes"));
    let refused = cluster.try_kubectl(&[&token[..], &bound, &[&foreign]].concat());
    assert!(refused.as_ref().is_err_and(|e| e.contains("forbidden")), "{refused:?}");

    nothing_is_issued_to_what_is_not_so(cluster, store, other.expect("there are two nodes")).await;

    // A workload asks for another's identity.
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "thief", "namespace": "shop" },
        "spec": {
            "serviceAccountName": "web",
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "app", "image": "localhost/busybox:1", "imagePullPolicy": "Never",
                "command": ["sleep", "infinity"],
            }],
        },
    });
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), pod.to_string()).expect("it is written");
    let file = file.path().display().to_string();
    let meshed = cluster.steadfast(&["inject", "--manual", &file]).expect("it is meshed");
    let meshed =
        meshed.replace("$(_pod_sa).$(_pod_ns).serviceaccount", "store.shop.serviceaccount");
    assert!(meshed.contains("store.shop.serviceaccount"), "{meshed}");
    cluster.apply(&meshed);
    // It asks with its token, and gets what the token says and nothing else.
    until("the thief gets its own identity alone", DEADLINE, || async {
        let logs = ["logs", "thief", "--namespace=shop", "--container=linkerd-proxy"];
        let logs = cluster.try_kubectl(&logs)?;
        let own = "the SVID is of spiffe://cluster.local/ns/shop/sa/web, and we are \
                   spiffe://cluster.local/ns/shop/sa/store";
        if logs.contains(own) { Ok(()) } else { Err(logs) }
    })
    .await;
    let ready = ["get", "pod", "thief", "--namespace=shop", "--output=jsonpath={.status.phase}"];
    assert_eq!(cluster.kubectl(&ready), "Pending", "its sidecar has no SVID");
}

/// An administrator asks in a kubelet's place, for a pod that is another than the request says.
async fn nothing_is_issued_to_what_is_not_so(cluster: &Cluster, pod: &Value, other_node: &str) {
    let uid = |kind: &str, name: &str, namespace: &[&str]| {
        let get = ["get", kind, name, "--output=jsonpath={.metadata.uid}"];
        cluster.kubectl(&[&get[..], namespace].concat())
    };
    let shop = ["--namespace=shop"];
    let (name, node) = (&pod["metadata"]["name"], pod["spec"]["nodeName"].as_str().expect("one"));
    let key = rcgen::KeyPair::generate().expect("a key");
    let request = rcgen::CertificateParams::default().serialize_request(&key).expect("a request");
    let spec = serde_json::json!({
        "signerName": "trust.steadfast.dev/svid", "maxExpirationSeconds": 3600,
        "podName": name, "podUID": pod["metadata"]["uid"],
        "serviceAccountName": "store", "serviceAccountUID": uid("sa", "store", &shop),
        "nodeName": node, "nodeUID": uid("node", node, &[]),
        "stubPKCS10Request": k8s_openapi::ByteString(request.der().to_vec()),
    });
    for (field, wrong) in [
        ("podUID", "5a7c2d58-0000-4000-8000-000000000000"),
        ("podName", "nobody"),
        ("serviceAccountName", "web"),
        ("nodeName", other_node),
    ] {
        let mut spec = spec.clone();
        spec[field] = wrong.into();
        let forged = format!("forged-{}", field.to_lowercase());
        let object = serde_json::json!({
            "apiVersion": "certificates.k8s.io/v1beta1", "kind": "PodCertificateRequest",
            "metadata": { "name": forged, "namespace": "shop" }, "spec": spec,
        });
        cluster.apply(&object.to_string());
        until(&format!("another {field} is denied"), DEADLINE, || async {
            let found = ["get", "podcertificaterequest", &forged, "--output=json"];
            let found = cluster.try_kubectl(&[&found[..], &shop].concat())?;
            let found: Value = serde_json::from_str(&found).map_err(|error| error.to_string())?;
            let condition = &found["status"]["conditions"][0];
            let denied = condition["type"] == "Denied" && condition["reason"] == "PodGone";
            let nothing = found["status"]["certificateChain"].is_null();
            if denied && nothing { Ok(()) } else { Err(found["status"].to_string()) }
        })
        .await;
    }
}

const BARE: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: bare }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: $NAME, namespace: bare }
---
apiVersion: v1
kind: Pod
metadata: { name: $NAME, namespace: bare }
spec:
  serviceAccountName: $NAME
  containers:
  - name: app
    image: localhost/steadfast-test-app:1
    imagePullPolicy: Never
    args: [http, "0.0.0.0:8080"]
    volumeMounts: [{ name: id, mountPath: /id }]
  volumes:
  - name: id
    projected:
      sources:
      - podCertificate:
          signerName: trust.steadfast.dev/svid
          keyType: $KEY
          maxExpirationSeconds: 3600
          credentialBundlePath: credentials.pem
      - clusterTrustBundle:
          signerName: trust.steadfast.dev/svid
          labelSelector: {}
          path: anchors.pem
"#;

const OUTSIDE: &str = r#"
apiVersion: v1
kind: Namespace
metadata: { name: outside, annotations: { linkerd.io/inject: enabled } }
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: vm, namespace: outside }
---
apiVersion: v1
kind: Pod
metadata: { name: vm, namespace: outside, labels: { app: vm } }
spec:
  serviceAccountName: vm
  containers:
  - name: app
    image: localhost/steadfast-test-app:1
    imagePullPolicy: Never
    args: [http, "0.0.0.0:8080"]
    ports: [{ name: http, containerPort: 8080 }]
"#;

const EXTERNAL: &str = r#"
apiVersion: workload.linkerd.io/v1beta1
kind: ExternalWorkload
metadata: { name: vm, namespace: shop, labels: { app: vm } }
spec:
  meshTLS: { identity: "spiffe://cluster.local/ns/outside/sa/$ACCOUNT", serverName: vm.example }
  ports: [{ name: http, port: 8080 }]
  workloadIPs: [{ ip: $IP }]
---
apiVersion: v1
kind: Service
metadata: { name: vm, namespace: shop }
spec: { selector: { app: vm }, ports: [{ name: http, port: 80, targetPort: http }] }
"#;

const SERVER: &str = r#"
apiVersion: policy.linkerd.io/v1beta3
kind: Server
metadata: { name: vm, namespace: outside }
spec:
  podSelector: { matchLabels: { app: vm } }
  port: http
  proxyProtocol: opaque
"#;
