//! What the store holds after what the files said.

use super::super::parse::parse;
use super::*;
use crate::store::RESOURCES_PREFIX;

/// A store and the files before it.
#[derive(Default)]
struct Fixture {
    files: Files,
    entries: BTreeMap<String, Entry>,
    revision: u64,
    uids: u32,
}

impl Fixture {
    /// The files say this; returns how many writes that took.
    fn apply(&mut self, read: &[(&str, Option<&str>)]) -> usize {
        let parsed = read.iter().map(|(file, text)| {
            let parsed = text.map(|text| parse(text.as_bytes()).map(|(objects, _)| objects));
            ((*file).to_owned(), parsed)
        });
        let now = UnixTime::from_secs(1_000_000_000 + i64::from(self.uids));
        self.files.update(parsed.collect(), now);
        self.reconcile(now)
    }

    fn reconcile(&mut self, now: UnixTime) -> usize {
        let (records, resources) = (self.under(RECORDS_PREFIX), self.under(RESOURCES_PREFIX));
        let writes = writes(&self.files, &records, &resources, now, || {
            self.uids += 1;
            format!("uid-{}", self.uids)
        });
        let count = writes.len();
        for write in writes {
            let found = self.entries.get(&write.key).map(|entry| entry.revision);
            assert_eq!(found, write.expected, "{}", write.key);
            self.revision += 1;
            let revision = Revision(self.revision);
            let value = match write.value {
                Some(Written::Fixed(value)) => value,
                Some(Written::Versioned(make)) => make(revision),
                None => {
                    self.entries.remove(&write.key);
                    continue;
                }
            };
            self.entries.insert(write.key.clone(), Entry { key: write.key, value, revision });
        }
        count
    }

    fn under(&self, prefix: &str) -> Vec<Entry> {
        self.entries.values().filter(|entry| entry.key.starts_with(prefix)).cloned().collect()
    }

    fn keys(&self) -> Vec<&str> {
        let keys = self.entries.keys().map(String::as_str);
        keys.filter_map(|key| key.strip_prefix(RESOURCES_PREFIX)).collect()
    }

    fn value(&self, key: &str) -> Value {
        serde_json::from_slice(&self.entries[&format!("{RESOURCES_PREFIX}{key}")].value).unwrap()
    }
}

const POD: &str = "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: demo, labels: {app: web}}, spec: {serviceAccountName: web}, status: {podIP: 127.0.0.1}}";
const SERVICE: &str = "{apiVersion: v1, kind: Service, metadata: {name: web, namespace: demo}, spec: {selector: {app: web}, ports: [{port: 80}]}}";

#[test]
fn an_object_gets_a_uid_a_version_and_a_time_and_keeps_them_while_it_changes() {
    let mut store = Fixture::default();
    store.apply(&[("pods.yaml", Some(POD))]);
    let metadata = store.value("Pod/demo/a")["metadata"].clone();
    assert_eq!(metadata["uid"], "uid-1");
    assert_eq!(metadata["creationTimestamp"], "2001-09-09T01:46:40Z");
    let revision = store.entries["resources/Pod/demo/a"].revision.0.to_string();
    assert_eq!(metadata["resourceVersion"], revision);

    assert_eq!(store.apply(&[("pods.yaml", Some(POD))]), 0);
    store.apply(&[("pods.yaml", Some(&POD.replace("app: web", "app: other")))]);
    let changed = store.value("Pod/demo/a")["metadata"].clone();
    assert_eq!(changed["uid"], "uid-1");
    assert_eq!(changed["creationTimestamp"], metadata["creationTimestamp"]);
    assert_ne!(changed["resourceVersion"], metadata["resourceVersion"]);

    store.apply(&[("pods.yaml", None)]);
    assert!(store.entries.is_empty());
    store.apply(&[("pods.yaml", Some(POD))]);
    assert_eq!(store.value("Pod/demo/a")["metadata"]["uid"], "uid-2");
}

#[test]
fn endpoints_follow_the_pods_of_a_service() {
    let mut store = Fixture::default();
    store.apply(&[("service.yaml", Some(SERVICE))]);
    assert_eq!(store.keys(), ["Service/demo/web"]);
    store.apply(&[("pods.yaml", Some(POD))]);
    let slice = store.keys()[0].to_owned();
    assert!(slice.starts_with("EndpointSlice/demo/web-"), "{slice}");
    let endpoint = store.value(&slice)["endpoints"][0].clone();
    assert_eq!(endpoint["targetRef"]["uid"], store.value("Pod/demo/a")["metadata"]["uid"]);
    assert_eq!(store.reconcile(UnixTime::from_secs(5)), 0);

    let by_hand = "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: mine, namespace: demo, labels: {kubernetes.io/service-name: web}}, addressType: IPv4, endpoints: [{addresses: [10.0.0.9]}]}";
    store.apply(&[("slices.yaml", Some(by_hand))]);
    assert_eq!(store.keys()[0], "EndpointSlice/demo/mine");
    assert!(!store.keys().contains(&slice.as_str()));
    store.apply(&[("slices.yaml", None)]);
    assert_eq!(store.keys()[0], slice);
    store.apply(&[("pods.yaml", None)]);
    assert_eq!(store.keys(), ["Service/demo/web"]);
}

#[test]
fn a_namespace_with_a_default_pod_has_a_default_account() {
    let mut store = Fixture::default();
    let pod = POD.replace("serviceAccountName: web", "");
    store.apply(&[("pods.yaml", Some(&pod))]);
    assert_eq!(store.keys(), ["Pod/demo/a", "ServiceAccount/demo/default"]);
    let uid = store.value("ServiceAccount/demo/default")["metadata"]["uid"].clone();
    let by_hand = "{apiVersion: v1, kind: ServiceAccount, metadata: {name: default, namespace: demo, labels: {a: b}}}";
    store.apply(&[("accounts.yaml", Some(by_hand))]);
    let account = store.value("ServiceAccount/demo/default");
    assert_eq!(
        (&account["metadata"]["labels"]["a"], &account["metadata"]["uid"]),
        (&json!("b"), &uid)
    );
    store.apply(&[("pods.yaml", None), ("accounts.yaml", None)]);
    assert!(store.entries.is_empty());
}

#[test]
fn after_a_restart_a_broken_file_has_its_last_good_version_and_a_missing_one_is_gone() {
    let mut store = Fixture::default();
    store.apply(&[("a.yaml", Some(POD)), ("b.yaml", Some(SERVICE))]);
    let before = store.value("Pod/demo/a");
    store.files = remembered(&store.under(RECORDS_PREFIX), &store.under(RESOURCES_PREFIX));
    assert_eq!(store.reconcile(UnixTime::from_secs(9)), 0);
    store.apply(&[("a.yaml", Some("broken: [")), ("b.yaml", None)]);
    assert_eq!(store.keys(), ["Pod/demo/a"]);
    assert_eq!(store.value("Pod/demo/a"), before);
}
