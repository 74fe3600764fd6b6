//! Injection: what becomes of a pod that is created in a mesh. Pure: a pod, its namespace's
//! annotations and the settings in; the meshed pod and warnings out.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use self::annotations::{Annotations, Inject, Said};

mod annotations;
mod pod;

/// What every injected pod has in common.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Settings {
    /// The namespace of the control plane.
    pub control_namespace: String,
    /// The trust domain.
    pub trust_domain: String,
    /// What names of Services end in.
    pub cluster_domain: String,
    /// The proxy's image, without its tag.
    pub proxy_image: String,
    /// The image of the init step, without its tag.
    pub init_image: String,
    /// The tag of both.
    pub tag: String,
    /// When they are pulled.
    pub pull_policy: String,
    /// The resources of a proxy whose annotations say nothing, as in a container.
    pub resources: Value,
}

/// What becomes of a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It stays as it is.
    Left(Reason),
    /// It is this one.
    Meshed(Box<Value>),
}

/// Why a pod stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It has a proxy already.
    HasProxy,
    /// It shares the node's network, whose rules are not ours to change.
    HostNetwork,
    /// It is no pod: whoever asks may send anything.
    NoPod,
    /// Neither it nor its namespace asks for it.
    NotAsked,
    /// Its annotation says that it is not to be.
    Disabled,
    /// It belongs to the control plane.
    ControlPlane,
}

/// What becomes of a pod that is created in this namespace, and what is wrong with its annotations.
pub fn inject(
    pod: &Value,
    namespace: &str,
    inherited: &BTreeMap<String, String>,
    settings: &Settings,
) -> (Outcome, Vec<String>) {
    if !pod::is_pod(pod) {
        let why = "this is no pod: it has no spec, or its metadata, containers or volumes are of \
                   another kind than a pod's";
        return (Outcome::Left(Reason::NoPod), vec![why.to_owned()]);
    }
    let mut warnings = Vec::new();
    let own: Annotations = pod::strings(&pod["metadata"]["annotations"]);
    let ports = pod::declared_ports(pod);
    let named = |name: &str| ports.iter().find(|(known, _)| known == name).map(|(_, port)| *port);
    let said = Said::read(&own, inherited, named, &mut warnings);
    let reason = match said.inject {
        // Whoever does not mesh the pod need not hear about annotations that nothing reads.
        Inject::Unsaid if !own.contains_key(annotations::INJECT) => {
            return (Outcome::Left(Reason::NotAsked), Vec::new());
        }
        Inject::Unsaid => Some(Reason::NotAsked),
        Inject::Disabled => Some(Reason::Disabled),
        Inject::Enabled if namespace == settings.control_namespace => Some(Reason::ControlPlane),
        Inject::Enabled if pod::has_proxy(pod) => Some(Reason::HasProxy),
        Inject::Enabled if pod["spec"]["hostNetwork"] == true => {
            warnings.push(
                "the pod shares its node's network (hostNetwork) and is not meshed: take it out of \
                 the node's network, or annotate it linkerd.io/inject: disabled"
                    .to_owned(),
            );
            Some(Reason::HostNetwork)
        }
        Inject::Enabled => None,
    };
    match reason {
        Some(reason) => (Outcome::Left(reason), warnings),
        None => (Outcome::Meshed(Box::new(pod::mesh(pod, &said, settings))), warnings),
    }
}

/// The pod as it was before it was meshed; `None` if it has no proxy.
pub fn uninject(pod: &Value) -> Option<Value> {
    (pod::is_pod(pod) && pod::has_proxy(pod)).then(|| pod::unmesh(pod))
}

/// Where an object says what pods it makes, or is one, as a JSON pointer; `None` if it makes none.
pub fn pod_of(object: &Value) -> Option<&'static str> {
    let places = match object["kind"].as_str()? {
        "Pod" => return Some(""),
        "CronJob" => "/spec/jobTemplate/spec/template",
        "DaemonSet"
        | "Deployment"
        | "Job"
        | "ReplicaSet"
        | "ReplicationController"
        | "StatefulSet" => "/spec/template",
        _ => return None,
    };
    object.pointer(places).is_some_and(Value::is_object).then_some(places)
}

/// What is wrong with the annotations of a namespace, which its pods inherit.
pub fn review_namespace(annotations: &Value) -> Vec<String> {
    let mut warnings = Vec::new();
    let annotations = pod::strings(annotations);
    // A name may be a port's of one of its pods: which, only a pod can say.
    let any = |name: &str| name.starts_with(|c: char| c.is_ascii_lowercase()).then_some(1);
    let _ = Said::read(&Annotations::new(), &annotations, any, &mut warnings);
    warnings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings() -> Settings {
        Settings {
            control_namespace: "steadfast".to_owned(),
            trust_domain: "cluster.local".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            proxy_image: "r/steadfast-proxy".to_owned(),
            init_image: "r/steadfast-init".to_owned(),
            tag: "1".to_owned(),
            pull_policy: "IfNotPresent".to_owned(),
            resources: json!({ "requests": { "cpu": "10m", "memory": "8Mi" } }),
        }
    }

    fn pod(annotations: Value) -> Value {
        json!({
            "metadata": { "generateName": "web-", "annotations": annotations },
            "spec": {
                "serviceAccountName": "web",
                "initContainers": [{ "name": "migrate", "image": "m" }],
                "containers": [{
                    "name": "web", "image": "w",
                    "ports": [{ "name": "http", "containerPort": 8080 }, { "containerPort": 9 }],
                }],
            },
        })
    }

    fn meshed(annotations: Value) -> Value {
        match inject(&pod(annotations), "demo", &BTreeMap::new(), &settings()) {
            (Outcome::Meshed(pod), warnings) if warnings.is_empty() => *pod,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_meshed_is_unmeshed_to_what_it_was() {
        for native in ["true", "false"] {
            let annotations = json!({
                "linkerd.io/inject": "enabled",
                "config.linkerd.io/proxy-enable-native-sidecar": native,
            });
            let mut before = pod(annotations.clone());
            let after = uninject(&meshed(annotations)).unwrap();
            // What was empty is left empty.
            before["spec"]["volumes"] = json!([]);
            before["metadata"]["labels"] = json!({});
            assert_eq!(after, before);
            assert_eq!(uninject(&after), None);
        }
    }

    #[test]
    fn what_is_no_pod_is_left_as_it_is_and_told() {
        let asks = || json!({ "annotations": { "linkerd.io/inject": "enabled" } });
        for broken in [
            json!({ "metadata": asks(), "spec": "x" }),
            json!({ "metadata": asks(), "spec": { "containers": [], "volumes": {} } }),
            json!({ "metadata": asks(), "spec": { "containers": 7 } }),
            json!({ "metadata": asks() }),
            json!({ "metadata": "x", "spec": { "containers": [] } }),
            json!("pod"),
            json!(null),
        ] {
            let asked = BTreeMap::from([("linkerd.io/inject".to_owned(), "enabled".to_owned())]);
            let (outcome, warnings) = inject(&broken, "demo", &asked, &settings());
            assert_eq!(outcome, Outcome::Left(Reason::NoPod), "{broken}");
            assert!(warnings[0].contains("no pod"), "{warnings:?}");
            assert_eq!(uninject(&broken), None);
        }
    }

    fn env<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
        let all = container["env"].as_array().unwrap();
        all.iter().find(|one| one["name"] == name)?["value"].as_str()
    }

    #[test]
    fn a_meshed_pod_has_the_redirection_first_then_the_sidecar_then_what_it_had() {
        let pod = meshed(json!({ "linkerd.io/inject": "enabled" }));
        let containers = pod["spec"]["initContainers"].as_array().unwrap();
        let names: Vec<_> = containers.iter().map(|one| one["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["linkerd-init", "linkerd-proxy", "migrate"]);
        let proxy = &pod["spec"]["initContainers"][1];
        assert_eq!(proxy["restartPolicy"], "Always");
        assert_eq!(proxy["image"], "r/steadfast-proxy:1");
        assert_eq!(env(proxy, "LINKERD2_PROXY_INBOUND_PORTS"), Some("9,8080"));
        assert_eq!(
            env(proxy, "LINKERD2_PROXY_IDENTITY_LOCAL_NAME"),
            Some("$(_pod_sa).$(_pod_ns).serviceaccount.identity.steadfast.cluster.local")
        );
        let mounted = &pod["spec"]["volumes"][0]["projected"]["sources"];
        assert_eq!(mounted[0]["serviceAccountToken"]["audience"], "identity.l5d.io");
        assert_eq!(mounted[1]["configMap"]["name"], "steadfast-trust-bundle");
        assert_eq!(pod["spec"]["containers"], self::pod(json!({}))["spec"]["containers"]);
    }

    #[test]
    fn everything_but_the_init_step_satisfies_the_restricted_level() {
        let pod = meshed(json!({ "linkerd.io/inject": "enabled" }));
        let proxy = &pod["spec"]["initContainers"][1]["securityContext"];
        assert_eq!(proxy["runAsNonRoot"], true);
        assert_eq!(proxy["allowPrivilegeEscalation"], false);
        assert_eq!(proxy["capabilities"]["drop"], json!(["ALL"]));
        assert_eq!(proxy["seccompProfile"]["type"], "RuntimeDefault");
        let init = &pod["spec"]["initContainers"][0]["securityContext"];
        assert_eq!(init["capabilities"]["add"], json!(["NET_ADMIN", "NET_RAW"]));
        assert_eq!(init["privileged"], false);
    }

    #[test]
    fn annotations_say_how_it_is_meshed() {
        let pod = meshed(json!({
            "linkerd.io/inject": "enabled",
            "config.linkerd.io/proxy-cpu-limit": "100m",
            "config.linkerd.io/proxy-memory-limit": "128Mi",
            "config.linkerd.io/opaque-ports": "http,5432",
            "config.linkerd.io/skip-outbound-ports": "3306",
            "config.linkerd.io/skip-inbound-ports": "22",
            "config.linkerd.io/proxy-uid": "5000",
            "config.linkerd.io/inbound-port": "5143",
            "config.linkerd.io/default-inbound-policy": "all-authenticated",
            "config.linkerd.io/proxy-version": "2",
        }));
        let [init, proxy] = [0, 1].map(|index| &pod["spec"]["initContainers"][index]);
        assert_eq!(proxy["resources"]["limits"], json!({ "cpu": "100m", "memory": "128Mi" }));
        assert_eq!(proxy["resources"]["requests"]["cpu"], "10m");
        let opaque = "LINKERD2_PROXY_INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION";
        assert_eq!(env(proxy, opaque), Some("5432,8080"));
        assert_eq!(env(proxy, "LINKERD2_PROXY_INBOUND_LISTEN_ADDR"), Some("0.0.0.0:5143"));
        assert_eq!(env(proxy, "LINKERD2_PROXY_INBOUND_DEFAULT_POLICY"), Some("all-authenticated"));
        assert_eq!(proxy["securityContext"]["runAsUser"], 5000);
        assert_eq!(proxy["image"], "r/steadfast-proxy:2");
        let args: Vec<_> = init["args"].as_array().unwrap().iter().collect();
        for wanted in [
            "--inbound-port=5143",
            "--proxy-uid=5000",
            "--skip-inbound-ports=22,4190,4191",
            "--skip-outbound-ports=3306",
        ] {
            assert!(args.iter().any(|arg| *arg == wanted), "{wanted} is not in {args:?}");
        }
    }

    #[test]
    fn without_native_sidecars_the_proxy_is_the_first_container_and_the_others_wait_for_it() {
        let pod = meshed(json!({
            "linkerd.io/inject": "enabled",
            "config.linkerd.io/proxy-enable-native-sidecar": "false",
        }));
        let proxy = &pod["spec"]["containers"][0];
        assert_eq!(proxy["name"], "linkerd-proxy");
        assert_eq!(proxy.get("restartPolicy"), None);
        assert!(proxy["lifecycle"]["postStart"].is_object(), "{proxy:#}");
    }

    #[test]
    fn a_pod_is_left_alone_that_is_meshed_has_the_nodes_network_or_does_not_ask() {
        let asks = || json!({ "linkerd.io/inject": "enabled" });
        let outcome = |pod: &Value, namespace: &str, inherited: &[(&str, &str)]| {
            let inherited = inherited.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            inject(pod, namespace, &inherited.collect(), &settings())
        };
        let left = |pod: &Value, namespace, inherited: &[(&str, &str)]| match outcome(
            pod, namespace, inherited,
        )
        .0
        {
            Outcome::Left(reason) => Some(reason),
            Outcome::Meshed(_) => None,
        };
        let enabled = [("linkerd.io/inject", "enabled")];
        assert_eq!(left(&pod(json!({})), "demo", &[]), Some(Reason::NotAsked));
        assert_eq!(left(&pod(json!({})), "demo", &enabled), None);
        let disabled = pod(json!({ "linkerd.io/inject": "disabled" }));
        assert_eq!(left(&disabled, "demo", &enabled), Some(Reason::Disabled));
        assert_eq!(left(&pod(asks()), "steadfast", &[]), Some(Reason::ControlPlane));
        assert_eq!(left(&meshed(asks()), "demo", &[]), Some(Reason::HasProxy));
        let mut host = pod(asks());
        host["spec"]["hostNetwork"] = json!(true);
        assert_eq!(left(&host, "demo", &[]), Some(Reason::HostNetwork));
        assert!(outcome(&host, "demo", &[]).1[0].contains("hostNetwork"));
    }
}
