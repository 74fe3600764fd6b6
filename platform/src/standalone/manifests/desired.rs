//! From the objects in force to the writes that make the store hold them. No I/O.
//!
//! The store is what the API server is: it gives an object its UID when it comes and keeps it
//! until the object goes, and it makes what nobody writes by hand: the `default` ServiceAccount of
//! a namespace, and EndpointSlices.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use steadfast_api::UnixTime;

use super::files::Files;
use super::parse::Object;
use crate::names::ObjectName;
use crate::names::{parse_resource_key, resource_key};
use crate::standalone::endpoints;
use crate::standalone::engine::{Value as Written, Write};
use crate::store::{Entry, Revision};

/// Under `manifests/<file>`: which objects a file has in force. So a file that is broken when the
/// store starts still has its last good version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Their keys.
    objects: Vec<String>,
}

/// The files as the store remembers them.
pub(super) fn remembered(records: &[Entry], resources: &[Entry]) -> Files {
    let resources: BTreeMap<&str, &Entry> = resources.iter().map(|e| (e.key.as_str(), e)).collect();
    let mut files = Files::default();
    for entry in records {
        let Some(file) = entry.key.strip_prefix(RECORDS_PREFIX) else { continue };
        let record: Record = serde_json::from_slice(&entry.value).unwrap_or_default();
        let objects = record.objects.iter().filter_map(|key| {
            let (kind, name) = parse_resource_key(key)?;
            let mut value: Value =
                serde_json::from_slice(&resources.get(key.as_str())?.value).ok()?;
            remove_own_fields(&mut value);
            Some(Object { kind: kind.to_owned(), name, value, line: 0 })
        });
        files.remember(file, objects.collect());
    }
    files
}

/// The writes that bring the store from what it holds to what the files say.
pub(super) fn writes(
    files: &Files,
    records: &[Entry],
    resources: &[Entry],
    now: UnixTime,
    mut new_uid: impl FnMut() -> String,
) -> Vec<Write> {
    let stored: BTreeMap<&str, &Entry> =
        resources.iter().chain(records).map(|entry| (entry.key.as_str(), entry)).collect();
    let mut desired: BTreeMap<String, Value> = BTreeMap::new();
    let mut add = |desired: &mut BTreeMap<String, Value>, key: String, mut value: Value| {
        let before = stored.get(key.as_str()).and_then(|e| serde_json::from_slice(&e.value).ok());
        set_own_fields(&mut value, before.as_ref(), now, &mut new_uid);
        desired.insert(key, value);
    };
    for object in files.objects() {
        add(&mut desired, resource_key(&object.kind, &object.name), object.value.clone());
    }
    for (name, account) in default_accounts(&desired) {
        add(&mut desired, resource_key("ServiceAccount", &name), account);
    }
    for (name, slice) in derived_slices(&desired) {
        // A hand-written slice of another Service may have the name.
        let key = resource_key("EndpointSlice", &name);
        if !desired.contains_key(&key) {
            add(&mut desired, key, slice);
        }
    }
    let mut writes = Vec::new();
    for (key, value) in &desired {
        let before = stored.get(key.as_str());
        if before.and_then(|entry| unversioned(entry)).as_ref() != Some(value) {
            writes.push(put(key, before.map(|entry| entry.revision), value.clone()));
        }
    }
    let kept: BTreeSet<String> = files.in_force().map(|(file, _)| record_key(file)).collect();
    for (file, objects) in files.in_force() {
        writes.extend(record(file, objects, &stored));
    }
    for entry in resources.iter().chain(records) {
        if !desired.contains_key(&entry.key) && !kept.contains(&entry.key) {
            let (key, expected) = (entry.key.clone(), Some(entry.revision));
            writes.push(Write { key, expected, value: None });
        }
    }
    writes
}

/// Every namespace in which a pod runs as it has a `default` ServiceAccount.
fn default_accounts(desired: &BTreeMap<String, Value>) -> Vec<(ObjectName, Value)> {
    let pods = desired.iter().filter_map(|(key, value)| Some((parse_resource_key(key)?, value)));
    let namespaces: BTreeSet<String> = pods
        .filter(|((kind, _), value)| {
            *kind == "Pod" && value.pointer("/spec/serviceAccountName") == Some(&json!("default"))
        })
        .map(|((_, name), _)| name.namespace)
        .collect();
    let names = namespaces.into_iter().map(|namespace| ObjectName::new(namespace, "default"));
    names
        .filter(|name| !desired.contains_key(&resource_key("ServiceAccount", name)))
        .map(|name| {
            let metadata = json!({"name": "default", "namespace": name.namespace});
            let account =
                json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata});
            (name, account)
        })
        .collect()
}

fn derived_slices(desired: &BTreeMap<String, Value>) -> Vec<(ObjectName, Value)> {
    let (services, pods) = (of_kind::<Service>(desired, "Service"), of_kind::<Pod>(desired, "Pod"));
    let slices = of_kind::<EndpointSlice>(desired, "EndpointSlice");
    let written = slices.values().filter_map(endpoints::service_of).collect();
    let derived = endpoints::derive(&services, &pods, &written);
    derived
        .into_iter()
        .filter_map(|slice| {
            let name =
                ObjectName::new(slice.metadata.namespace.clone()?, slice.metadata.name.clone()?);
            Some((name, serde_json::to_value(slice).ok()?))
        })
        .collect()
}

fn of_kind<T: serde::de::DeserializeOwned>(
    desired: &BTreeMap<String, Value>,
    kind: &str,
) -> BTreeMap<ObjectName, T> {
    let objects = desired.iter().filter_map(|(key, value)| {
        let (found, name) = parse_resource_key(key)?;
        (found == kind).then_some(())?;
        Some((name, T::deserialize(value).ok()?))
    });
    objects.collect()
}

/// The write that records a file's objects, if it is not recorded so already.
fn record(file: &str, objects: &[Object], stored: &BTreeMap<&str, &Entry>) -> Option<Write> {
    let objects = objects.iter().map(|object| resource_key(&object.kind, &object.name)).collect();
    let value: Bytes = serde_json::to_vec(&Record { objects }).ok()?.into();
    let key = record_key(file);
    let before = stored.get(key.as_str());
    if before.is_some_and(|entry| entry.value == value) {
        return None;
    }
    let expected = before.map(|entry| entry.revision);
    Some(Write { key, expected, value: Some(Written::Fixed(value)) })
}

fn record_key(file: &str) -> String {
    format!("{RECORDS_PREFIX}{file}")
}

/// UID and creation time: those that the object has, or new ones.
fn set_own_fields(
    value: &mut Value,
    before: Option<&Value>,
    now: UnixTime,
    new_uid: &mut impl FnMut() -> String,
) {
    let kept = |field: &str| {
        before.and_then(|before| before.pointer(&format!("/metadata/{field}"))).cloned()
    };
    let uid = kept("uid").unwrap_or_else(|| Value::String(new_uid()));
    let created = kept("creationTimestamp").unwrap_or_else(|| Value::String(now.to_string()));
    if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
        metadata.insert("uid".to_owned(), uid);
        metadata.insert("creationTimestamp".to_owned(), created);
    }
}

fn remove_own_fields(value: &mut Value) {
    if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
        for field in ["uid", "creationTimestamp", "resourceVersion"] {
            metadata.remove(field);
        }
    }
}

fn unversioned(entry: &Entry) -> Option<Value> {
    let mut value: Value = serde_json::from_slice(&entry.value).ok()?;
    value.get_mut("metadata")?.as_object_mut()?.remove("resourceVersion");
    Some(value)
}

/// An object names the revision of the write that made it what it is.
fn put(key: &str, expected: Option<Revision>, value: Value) -> Write {
    let versioned = move |revision: Revision| {
        let mut value = value.clone();
        if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
            metadata.insert("resourceVersion".to_owned(), Value::String(revision.0.to_string()));
        }
        Bytes::from(value.to_string())
    };
    Write { key: key.to_owned(), expected, value: Some(Written::Versioned(Box::new(versioned))) }
}

/// Where the objects of each file are recorded.
pub(super) const RECORDS_PREFIX: &str = "manifests/";

#[cfg(test)]
mod tests;
