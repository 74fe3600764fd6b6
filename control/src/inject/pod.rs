//! The pod as it is made: redirection, sidecar, and what the sidecar proves itself with.

use serde_json::{Map, Value, json};
use steadfast_platform::access::POD_DIRECTORY;
use steadfast_platform::bundle_file::BUNDLE_FILE;
use steadfast_platform::token::IDENTITY_AUDIENCE;

use super::Settings;
use super::annotations::{Annotations, Said};

/// A pod with a sidecar.
pub(super) fn mesh(pod: &Value, said: &Said, settings: &Settings) -> Value {
    let mut pod = pod.clone();
    let native = said.is("proxy-enable-native-sidecar").unwrap_or(true);
    let proxy = proxy(&pod, said, settings, native);
    let init = init(said, settings);
    let spec = &mut pod["spec"];
    insert(spec, "volumes", volume());
    if native {
        insert(spec, "initContainers", proxy);
    } else {
        insert(spec, "containers", proxy);
    }
    insert(spec, "initContainers", init);
    let metadata = &mut pod["metadata"];
    set(metadata, "labels", CONTROL_LABEL, &settings.control_namespace);
    set(metadata, "annotations", VERSION_ANNOTATION, env!("CARGO_PKG_VERSION"));
    pod
}

/// A pod without its sidecar.
pub(super) fn unmesh(pod: &Value) -> Value {
    let mut pod = pod.clone();
    let spec = &mut pod["spec"];
    for field in ["containers", "initContainers", "volumes"] {
        if let Some(all) = spec[field].as_array_mut() {
            all.retain(|one| {
                let name = one["name"].as_str().unwrap_or_default();
                ![PROXY, INIT, VOLUME].contains(&name)
            });
        }
    }
    for (field, name) in [("labels", CONTROL_LABEL), ("annotations", VERSION_ANNOTATION)] {
        if let Some(map) = pod["metadata"][field].as_object_mut() {
            map.remove(name);
        }
    }
    pod
}

/// Whether it has the shape on which everything here relies.
pub(super) fn is_pod(pod: &Value) -> bool {
    let (metadata, spec) = (&pod["metadata"], &pod["spec"]);
    let map = |value: &Value| value.is_null() || value.is_object();
    let list = |value: &Value| value.is_null() || value.is_array();
    pod.is_object()
        && spec.is_object()
        && [metadata, &metadata["labels"], &metadata["annotations"]].into_iter().all(map)
        && ["containers", "initContainers", "volumes"].iter().all(|field| list(&spec[*field]))
}

/// Whether it is a meshed pod already.
pub(super) fn has_proxy(pod: &Value) -> bool {
    let of = ["containers", "initContainers"];
    let all = of.iter().filter_map(|field| pod["spec"][field].as_array()).flatten();
    all.into_iter().any(|container| container["name"] == PROXY)
}

/// Names and numbers of the TCP ports that its containers declare.
pub(super) fn declared_ports(pod: &Value) -> Vec<(String, u16)> {
    let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
    let ports = containers.filter_map(|container| container["ports"].as_array()).flatten();
    let tcp = ports.filter(|port| port["protocol"].as_str().unwrap_or("TCP") == "TCP");
    let declared = tcp.filter_map(|port| {
        let number = u16::try_from(port["containerPort"].as_u64()?).ok()?;
        Some((port["name"].as_str().unwrap_or_default().to_owned(), number))
    });
    declared.collect()
}

/// A map of strings, of a field that may not be there.
pub(super) fn strings(map: &Value) -> Annotations {
    let all = map.as_object().into_iter().flatten();
    all.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

fn init(said: &Said, settings: &Settings) -> Value {
    let Ports { inbound, outbound, admin } = Ports::of(said);
    let own = format!("{TAP_PORT},{admin}");
    let skipped = said
        .text("skip-inbound-ports")
        .map_or_else(|| own.clone(), |ports| format!("{ports},{own}"));
    let mut args = vec![
        format!("--inbound-port={inbound}"),
        format!("--outbound-port={outbound}"),
        format!("--proxy-uid={}", uid(said)),
        format!("--skip-inbound-ports={skipped}"),
    ];
    for (flag, setting) in
        [("--skip-outbound-ports", "skip-outbound-ports"), ("--skip-subnets", "skip-subnets")]
    {
        args.extend(said.text(setting).map(|value| format!("{flag}={value}")));
    }
    let image = said.text("init-image").unwrap_or(&settings.init_image);
    let tag = said.text("init-image-version").unwrap_or(&settings.tag);
    json!({
        "name": INIT,
        "image": format!("{image}:{tag}"),
        "imagePullPolicy": pull_policy(said, settings),
        "args": args,
        "resources": { "requests": { "cpu": "10m", "memory": "10Mi" }, "limits": { "memory": "50Mi" } },
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "add": ["NET_ADMIN", "NET_RAW"], "drop": ["ALL"] },
            "privileged": false,
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": false,
            "runAsUser": 0,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    })
}

fn proxy(pod: &Value, said: &Said, settings: &Settings, native: bool) -> Value {
    let ports = Ports::of(said);
    let image = said.text("proxy-image").unwrap_or(&settings.proxy_image);
    let tag = said.text("proxy-version").unwrap_or(&settings.tag);
    let uid = uid(said);
    let probe = |path: &str| json!({ "httpGet": { "path": path, "port": ports.admin } });
    let mut proxy = json!({
        "name": PROXY,
        "image": format!("{image}:{tag}"),
        "imagePullPolicy": pull_policy(said, settings),
        "env": environment(pod, said, settings, ports),
        "ports": [
            { "name": "linkerd-proxy", "containerPort": ports.inbound },
            { "name": "linkerd-admin", "containerPort": ports.admin },
        ],
        "livenessProbe": merged(probe("/live"), json!({ "initialDelaySeconds": 10 })),
        "readinessProbe": merged(probe("/ready"), json!({ "initialDelaySeconds": 2 })),
        "resources": resources(said, settings),
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": { "drop": ["ALL"] },
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "runAsUser": uid,
            "runAsGroup": said.number("proxy-gid").unwrap_or(uid),
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{ "name": VOLUME, "mountPath": POD_DIRECTORY, "readOnly": true }],
    });
    let waited_for = said.is("proxy-await").unwrap_or(true);
    if native {
        proxy["restartPolicy"] = json!("Always");
        if waited_for {
            // What comes after it starts when it is ready.
            let every = json!({ "periodSeconds": 1, "failureThreshold": 120 });
            proxy["startupProbe"] = merged(probe("/ready"), every);
        }
    } else if waited_for {
        // The containers behind it start when this has ended.
        let wait = json!({ "exec": { "command": ["/steadfast-proxy", "--await"] } });
        proxy["lifecycle"] = json!({ "postStart": wait });
    }
    proxy
}

fn environment(pod: &Value, said: &Said, settings: &Settings, ports: Ports) -> Value {
    let Settings { control_namespace: control, trust_domain, cluster_domain, .. } = settings;
    let identity = |account: &str, namespace: &str| {
        format!("{account}.{namespace}.serviceaccount.identity.{control}.{trust_domain}")
    };
    let service = |name: &str, port: u16| format!("{name}.{control}.svc.{cluster_domain}:{port}");
    let mut declared: Vec<_> = declared_ports(pod).into_iter().map(|(_, port)| port).collect();
    declared.sort_unstable();
    declared.dedup();
    let declared: Vec<_> = declared.iter().map(u16::to_string).collect();
    let declared = declared.join(",");
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let mut env = vec![
        field("_pod_name", "metadata.name"),
        field("_pod_ns", "metadata.namespace"),
        field("_pod_sa", "spec.serviceAccountName"),
        field("_pod_node", "spec.nodeName"),
    ];
    let workload = r#"{"ns":"$(_pod_ns)","pod":"$(_pod_name)"}"#;
    let context = r#"{"ns":"$(_pod_ns)","nodeName":"$(_pod_node)","pod":"$(_pod_name)"}"#;
    let fixed = [
        ("IDENTITY_LOCAL_NAME", identity("$(_pod_sa)", "$(_pod_ns)")),
        ("IDENTITY_TOKEN_FILE", format!("{POD_DIRECTORY}/{TOKEN_FILE}")),
        ("IDENTITY_SVC_ADDR", service("steadfast-identity", 8080)),
        ("IDENTITY_SVC_NAME", identity("steadfast-identity", control)),
        ("DESTINATION_SVC_ADDR", service("steadfast-control", 8086)),
        ("DESTINATION_SVC_NAME", identity("steadfast-control", control)),
        ("DESTINATION_CONTEXT", context.to_owned()),
        ("POLICY_WORKLOAD", workload.to_owned()),
        ("INBOUND_LISTEN_ADDR", format!("0.0.0.0:{}", ports.inbound)),
        ("OUTBOUND_LISTEN_ADDR", format!("127.0.0.1:{}", ports.outbound)),
        ("ADMIN_LISTEN_ADDR", format!("0.0.0.0:{}", ports.admin)),
        ("INBOUND_PORTS", said.text("pod-inbound-ports").map_or(declared, str::to_owned)),
    ];
    let variable = |name: &str, value: &str| json!({ "name": name, "value": value });
    env.extend(
        fixed.iter().map(|(name, value)| variable(&format!("LINKERD2_PROXY_{name}"), value)),
    );
    env.push(variable("STEADFAST_PROXY_BUNDLE_FILE", &format!("{POD_DIRECTORY}/{BUNDLE_FILE}")));
    env.extend(said.variables().map(|(name, value)| variable(name, value)));
    env.into()
}

fn resources(said: &Said, settings: &Settings) -> Value {
    let mut resources = settings.resources.clone();
    for (kind, of) in [("requests", "request"), ("limits", "limit")] {
        for (resource, name) in
            [("cpu", "cpu"), ("memory", "memory"), ("ephemeral-storage", "ephemeral-storage")]
        {
            if let Some(value) = said.text(&format!("proxy-{name}-{of}")) {
                set(&mut resources, kind, resource, value);
            }
        }
    }
    resources
}

fn volume() -> Value {
    json!({
        "name": VOLUME,
        "projected": {
            "sources": [
                { "serviceAccountToken": {
                    "audience": IDENTITY_AUDIENCE, "path": TOKEN_FILE, "expirationSeconds": 86_400,
                } },
                { "configMap": {
                    "name": MIRROR, "items": [{ "key": BUNDLE_FILE, "path": BUNDLE_FILE }],
                } },
            ],
        },
    })
}

/// The ports of the sidecar itself.
#[derive(Clone, Copy, Debug)]
struct Ports {
    inbound: u16,
    outbound: u16,
    admin: u16,
}

impl Ports {
    fn of(said: &Said) -> Self {
        Self {
            inbound: said.number("inbound-port").unwrap_or(4143),
            outbound: said.number("outbound-port").unwrap_or(4140),
            admin: said.number("admin-port").unwrap_or(4191),
        }
    }
}

fn uid(said: &Said) -> u32 {
    said.number("proxy-uid").unwrap_or(PROXY_UID)
}

fn pull_policy<'a>(said: &'a Said, settings: &'a Settings) -> &'a str {
    said.text("image-pull-policy").unwrap_or(&settings.pull_policy)
}

/// Puts a value first in a list, which is made if it is not there.
fn insert(object: &mut Value, field: &str, value: Value) {
    match &mut object[field] {
        Value::Array(list) => list.insert(0, value),
        other => *other = json!([value]),
    }
}

/// Sets a text in a map, which is made if it is not there.
fn set(object: &mut Value, field: &str, name: &str, value: &str) {
    let map = &mut object[field];
    if !map.is_object() {
        *map = Value::Object(Map::new());
    }
    map[name] = json!(value);
}

fn merged(mut object: Value, more: Value) -> Value {
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more);
    }
    object
}

/// Linkerd's names, which its users' tools know.
const PROXY: &str = "linkerd-proxy";
const INIT: &str = "linkerd-init";
const CONTROL_LABEL: &str = "linkerd.io/control-plane-ns";
const VERSION_ANNOTATION: &str = "linkerd.io/proxy-version";
const PROXY_UID: u32 = 2102;
const TAP_PORT: u16 = 4190;
const VOLUME: &str = "steadfast-identity";
const TOKEN_FILE: &str = "token";
/// In every namespace.
const MIRROR: &str = "steadfast-trust-bundle";
