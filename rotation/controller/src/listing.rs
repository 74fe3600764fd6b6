//! Who must be asked, by the platform: every pod that carries our proxy, and our own processes.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::Pod;
use steadfast_identity::own::SERVICE_ACCOUNT;
use steadfast_platform::names::parse_resource_key;
use steadfast_platform::store::RESOURCES_PREFIX;
use steadfast_platform::{Entry, Store, StoreError};
use steadfast_rotation_protocol::census::{Listed, ProxyStatus};

/// What was read last: parsing ten thousand pods is work, and between two looks hardly one changes.
#[derive(Default)]
pub struct Listing {
    /// By key.
    pods: HashMap<String, (Box<[u8]>, Option<Listed>)>,
}

impl Listing {
    /// The list, read from the store itself: what was taken before a fence does not count. The
    /// replicas of identity are not in it: they are asked themselves.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(
        &mut self,
        store: &dyn Store,
        control_namespace: &str,
    ) -> Result<Vec<Listed>, StoreError> {
        let (entries, _) = store.list(&format!("{RESOURCES_PREFIX}Pod/")).await?;
        let mut before = std::mem::take(&mut self.pods);
        let mut all = Vec::with_capacity(entries.len());
        for entry in entries {
            // By its content: the revisions of a store that was put back come again.
            let known = before.remove(&entry.key).filter(|(value, _)| **value == *entry.value);
            let pod = known.unwrap_or_else(|| {
                // A copy: what came in one message with it is not kept.
                let value = Box::from(&*entry.value);
                (value, listed(&entry, control_namespace))
            });
            all.extend(pod.1.clone());
            self.pods.insert(entry.key, pod);
        }
        Ok(all)
    }
}

/// A pod, as the census asks for it. One that does not parse may run all the same: it is asked for
/// by the name of its key, and nobody can answer for it until it is mended.
fn listed(entry: &Entry, control_namespace: &str) -> Option<Listed> {
    let (_, name) = parse_resource_key(&entry.key)?;
    let Ok(pod) = serde_json::from_slice::<Pod>(&entry.value) else {
        let name = name.to_string();
        return Some(Listed { pod_uid: name.clone(), name, proxy: ProxyStatus::Running });
    };
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
    if name.namespace == control_namespace && account == Some(SERVICE_ACCOUNT) {
        return None;
    }
    let annotations = pod.metadata.annotations.as_ref();
    let inject = annotations.and_then(|annotations| annotations.get(INJECT));
    if inject.is_some_and(|inject| inject == "disabled") {
        return None;
    }
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let proxy = match phase {
        Some("Succeeded" | "Failed") => ProxyStatus::Ended,
        Some("Pending") => ProxyStatus::NotStarted,
        // Also where nobody says: it may run.
        _ => ProxyStatus::Running,
    };
    let pod_uid = pod.metadata.uid.unwrap_or_else(|| name.to_string());
    Some(Listed { pod_uid, name: name.to_string(), proxy })
}

/// Linkerd's: `disabled` is a pod without a proxy.
const INJECT: &str = "linkerd.io/inject";

#[cfg(test)]
mod tests {
    use steadfast_platform::Revision;

    use super::*;

    fn entry(value: &str) -> Entry {
        Entry {
            key: "resources/Pod/demo/web-0".to_owned(),
            value: value.to_owned().into(),
            revision: Revision(1),
        }
    }

    #[test]
    fn a_pod_is_asked_for_unless_it_has_ended_or_has_no_proxy() {
        let status = |value: &str| listed(&entry(value), "steadfast").map(|listed| listed.proxy);
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
    fn a_pod_that_does_not_parse_is_a_debtor_by_its_name() {
        let listed = listed(&entry("no pod"), "steadfast").unwrap();
        assert_eq!((listed.name.as_str(), listed.proxy), ("demo/web-0", ProxyStatus::Running));
    }
}
