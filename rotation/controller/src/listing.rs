//! Who must be asked, by the platform: every pod that carries our proxy, and our own processes.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::Pod;
use sha2::{Digest as _, Sha256};
use steadfast_identity::own::SERVICE_ACCOUNT;
use steadfast_platform::kubernetes::Namespaces;
use steadfast_platform::names::parse_resource_key;
use steadfast_platform::store::RESOURCES_PREFIX;
use steadfast_platform::{Entry, Store, StoreError};
use steadfast_rotation_protocol::census::{Listed, ProxyStatus};

/// How a pod says that it carries our proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carries {
    /// It has the proxy's container; and each of our own processes speaks for itself.
    Container,
    /// Every pod does, unless it is annotated otherwise: standalone, where containers are no matter.
    Unless,
}

/// What was read last: parsing ten thousand pods is work, and between two looks hardly one changes.
pub struct Listing {
    carries: Carries,
    /// By key: the digest of what was read, and what it says.
    pods: HashMap<String, ([u8; 32], Option<Listed>)>,
}

impl Listing {
    /// Nothing was read yet.
    pub fn new(carries: Carries) -> Self {
        Self { carries, pods: HashMap::new() }
    }

    /// The list, read from the store itself: what was taken before a fence does not count. The
    /// replicas of identity are not in it: they are asked themselves.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(
        &mut self,
        store: &dyn Store,
        namespaces: &Namespaces,
    ) -> Result<Vec<Listed>, StoreError> {
        let (carries, mut before) = (self.carries, std::mem::take(&mut self.pods));
        let (mut all, pods) = (Vec::with_capacity(before.len()), &mut self.pods);
        let mut read = |entries: Vec<Entry>| {
            for entry in entries {
                // By its content: the revisions of a store that was put back come again.
                let digest = Sha256::digest(&entry.value).into();
                let known = before.remove(&entry.key).filter(|(known, _)| *known == digest);
                let pod = known.unwrap_or_else(|| (digest, listed(&entry, carries, namespaces)));
                all.extend(pod.1.clone());
                pods.insert(entry.key, pod);
            }
        };
        store.list_parts(&format!("{RESOURCES_PREFIX}Pod/"), &mut read).await?;
        Ok(all)
    }
}

/// A pod, as the census asks for it. One that does not parse may run all the same: it is asked for
/// by the name of its key, and nobody can answer for it until it is mended.
pub(crate) fn listed(entry: &Entry, carries: Carries, namespaces: &Namespaces) -> Option<Listed> {
    let (_, name) = parse_resource_key(&entry.key)?;
    let Ok(pod) = serde_json::from_slice::<Pod>(&entry.value) else {
        let name = name.to_string();
        return Some(Listed { pod_uid: name.clone(), name, proxy: ProxyStatus::Running });
    };
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
    if name.namespace == namespaces.control && account == Some(SERVICE_ACCOUNT) {
        return None;
    }
    let is = |namespace: &str, wanted| name.namespace == namespace && account == Some(wanted);
    let ours = is(&namespaces.control, CONTROL_ACCOUNT) || is(&namespaces.anchors, OWN_ACCOUNT);
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let runs = match carries {
        Carries::Container if has_proxy(&pod) => containers(&pod, |name| name == PROXY),
        Carries::Container if ours => containers(&pod, |_| true),
        _ => Containers::Unknown,
    };
    let proxy = match (phase, runs) {
        // A native sidecar runs while the pod is still pending. Where a node is gone, Kubernetes says
        // that its pods have failed, and knows it of none of their containers.
        (_, Containers::Run) => ProxyStatus::Running,
        // One that crashes again and again may have been started since by a kubelet that is cut off.
        (Some("Failed"), Containers::Wait) => ProxyStatus::NotStarted,
        (Some("Failed"), Containers::Ended)
            if matches!(containers(&pod, |_| true), Containers::Run) =>
        {
            ProxyStatus::NotStarted
        }
        (Some("Succeeded" | "Failed"), _) => ProxyStatus::Ended,
        (_, Containers::Wait | Containers::Ended | Containers::None)
        | (Some("Pending"), Containers::Unknown) => ProxyStatus::NotStarted,
        // Also where nobody says: it may run.
        _ => ProxyStatus::Running,
    };
    let annotations = pod.metadata.annotations.as_ref();
    let inject = annotations.and_then(|annotations| annotations.get(INJECT));
    let carried = match carries {
        Carries::Container => has_proxy(&pod) || ours,
        Carries::Unless => inject.is_none_or(|inject| inject != "disabled"),
    };
    if !carried {
        return None;
    }
    let pod_uid = pod.metadata.uid.unwrap_or_else(|| name.to_string());
    Some(Listed { pod_uid, name: name.to_string(), proxy })
}

fn has_proxy(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(|c| c.name == PROXY)
}

/// What a pod's status says of some of its containers.
enum Containers {
    /// One runs.
    Run,
    /// None runs, and not all have ended.
    Wait,
    /// All have ended.
    Ended,
    /// It names none of them.
    None,
    /// There is no status, or nobody asks for it.
    Unknown,
}

fn containers(pod: &Pod, which: impl Fn(&str) -> bool) -> Containers {
    let Some(status) = &pod.status else { return Containers::Unknown };
    let of = [&status.container_statuses, &status.init_container_statuses];
    let all = of.into_iter().flatten().flatten().filter(|container| which(&container.name));
    let states: Vec<_> = all.map(|container| container.state.as_ref()).collect();
    let any_runs = states.iter().flatten().any(|state| state.running.is_some());
    let all_ended = states.iter().all(|s| s.is_some_and(|state| state.terminated.is_some()));
    match (states.is_empty(), any_runs, all_ended) {
        (true, ..) => Containers::None,
        (_, true, _) => Containers::Run,
        (_, _, true) => Containers::Ended,
        _ => Containers::Wait,
    }
}

/// Linkerd's name of the proxy's container.
const PROXY: &str = "linkerd-proxy";
/// Our own processes that have SVIDs, beside identity.
const CONTROL_ACCOUNT: &str = "steadfast-control";
const OWN_ACCOUNT: &str = "steadfast-rotation";
/// Linkerd's: `disabled` is a pod without a proxy.
const INJECT: &str = "linkerd.io/inject";

#[cfg(test)]
mod tests {
    use steadfast_platform::Revision;

    use super::*;

    fn namespaces() -> Namespaces {
        Namespaces { control: "steadfast".to_owned(), anchors: "anchors".to_owned() }
    }

    fn entry(value: &str) -> Entry {
        Entry {
            key: "resources/Pod/demo/web-0".to_owned(),
            value: value.to_owned().into(),
            revision: Revision(1),
        }
    }

    #[test]
    fn a_pod_is_asked_for_unless_it_has_ended_or_has_no_proxy() {
        let status = |value: &str| {
            listed(&entry(value), Carries::Unless, &namespaces()).map(|listed| listed.proxy)
        };
        assert_eq!(status(r#"{"metadata":{"uid":"u"}}"#), Some(ProxyStatus::Running));
        for (phase, expected) in [
            ("Running", ProxyStatus::Running),
            ("Unknown", ProxyStatus::Running),
            ("Pending", ProxyStatus::NotStarted),
            ("Succeeded", ProxyStatus::Ended),
            ("Failed", ProxyStatus::Ended),
        ] {
            let pod = format!(r#"{{"metadata":{{"uid":"u"}},"status":{{"phase":"{phase}"}}}}"#);
            assert_eq!(status(&pod), Some(expected), "{phase}");
        }
        let bare = r#"{"metadata":{"uid":"u","annotations":{"linkerd.io/inject":"disabled"}}}"#;
        assert_eq!(status(bare), None);
    }

    #[test]
    fn on_kubernetes_a_pod_is_asked_for_while_its_proxy_runs_whatever_the_pods_phase_says() {
        let status = |namespace: &str, pod: serde_json::Value| {
            let key = format!("resources/Pod/{namespace}/web-0");
            let entry = Entry { key, ..entry(&pod.to_string()) };
            listed(&entry, Carries::Container, &namespaces()).map(|listed| listed.proxy)
        };
        let pod = |phase: &str, sidecar: &str, state: serde_json::Value| {
            serde_json::json!({
                "metadata": { "uid": "u" },
                "spec": {
                    "serviceAccountName": "steadfast-control",
                    "containers": [{ "name": "app" }],
                    "initContainers": [{ "name": sidecar }],
                },
                "status": {
                    "phase": phase,
                    "initContainerStatuses": [{
                        "name": sidecar, "state": state, "image": "", "imageID": "",
                        "ready": true, "restartCount": 0,
                    }],
                },
            })
        };
        let running = serde_json::json!({ "running": {} });
        let waiting = serde_json::json!({ "waiting": { "reason": "CrashLoopBackOff" } });
        for phase in ["Pending", "Running", "Unknown"] {
            let runs = status("demo", pod(phase, "linkerd-proxy", running.clone()));
            assert_eq!(runs, Some(ProxyStatus::Running), "{phase}");
            let waits = status("demo", pod(phase, "linkerd-proxy", waiting.clone()));
            assert_eq!(waits, Some(ProxyStatus::NotStarted), "{phase}");
        }
        let terminated = serde_json::json!({ "terminated": { "exitCode": 0 } });
        for phase in ["Succeeded", "Failed"] {
            let ended = status("demo", pod(phase, "linkerd-proxy", terminated.clone()));
            assert_eq!(ended, Some(ProxyStatus::Ended), "{phase}");
        }
        let lost = status("demo", pod("Failed", "linkerd-proxy", running.clone()));
        assert_eq!(lost, Some(ProxyStatus::Running), "its node is gone, and may still be there");
        let crashed = status("demo", pod("Failed", "linkerd-proxy", waiting.clone()));
        assert_eq!(crashed, Some(ProxyStatus::NotStarted), "whoever was heard of is asked for");
        assert_eq!(status("demo", pod("Running", "other", running.clone())), None);
        // Our own processes are members without a sidecar.
        let own = status("steadfast", pod("Running", "other", running));
        assert_eq!(own, Some(ProxyStatus::Running));
    }

    #[test]
    fn a_pod_that_does_not_parse_is_a_debtor_by_its_name() {
        let listed = listed(&entry("no pod"), Carries::Unless, &namespaces()).unwrap();
        assert_eq!((listed.name.as_str(), listed.proxy), ("demo/web-0", ProxyStatus::Running));
    }
}
