//! What Services say of their ports, and what their pods say: where they differ, some connections
//! are looked into and others are not.

use std::collections::{BTreeMap, BTreeSet};

use steadfast_control::index::{Index, Kind, MeshNames, Name, Object, parse_key};
use steadfast_platform::StoreError;
use steadfast_platform::store::RESOURCES_PREFIX;
use steadfast_process::ErrorChain;

use super::{Category, Wrong};
use crate::mesh::Mesh;
use crate::trust_domain;

pub(super) async fn all(mesh: &Mesh, control_namespace: &str, only: Option<&str>) -> Category {
    let mut category = Category::new("opaque-ports");
    let outcome = match read(mesh, control_namespace).await {
        Ok(index) => match differences(&index, only).as_slice() {
            [] => Ok(()),
            differ => Err(Wrong::warning(
                differ.join("\n"),
                "write the same config.linkerd.io/opaque-ports on both, or on the namespace",
            )),
        },
        Err(why) => Err(Wrong::error(why, "kubectl auth can-i list services --all-namespaces")),
    };
    category.add("Services and their pods agree on which ports are opaque", outcome);
    category
}

async fn read(mesh: &Mesh, control_namespace: &str) -> Result<Index, String> {
    let told = |error: &(dyn std::error::Error + 'static)| ErrorChain(error).to_string();
    let state = trust_domain::read(mesh).await.map_err(|error| told(&error))?;
    let (trust_domain, control_namespace) = (state.trust_domain, control_namespace.to_owned());
    let mut index = Index::new(MeshNames { trust_domain, control_namespace });
    let store = mesh.store().await.map_err(|error| told(&error))?;
    for kind in Kind::ALL {
        let entries = match store.list(&format!("{RESOURCES_PREFIX}{}/", kind.as_str())).await {
            Ok((entries, _)) => entries,
            // What a cluster may do without is told where definitions are looked at.
            Err(StoreError::NoSuchKind(_)) if kind.is_optional() => Vec::new(),
            Err(error) => return Err(told(&error)),
        };
        for entry in entries {
            // What cannot be used is told where annotations are looked at.
            let parsed = Object::parse(kind, &entry.key, &entry.value, &mut Vec::new());
            if let (Ok(Some((_, name))), Ok(object)) = (parse_key(&entry.key), parsed) {
                index.put(name, object);
            }
        }
    }
    Ok(index)
}

/// A line for each port of which a Service and meshed pods of its say different things.
fn differences(index: &Index, only: Option<&str>) -> Vec<String> {
    let mut names = index.names(Kind::Service);
    names.retain(|name| only.is_none_or(|only| *name.namespace == *only));
    let mut differ = Vec::new();
    for name in names {
        let service = index.service(&name);
        for (port, known) in &service.ports {
            let mut others: BTreeMap<u16, BTreeSet<&Name>> = BTreeMap::new();
            for (addr, address) in known.addresses.iter() {
                let Some(workload) = &address.workload else { continue };
                if workload.mesh_at(addr.port()).is_some()
                    && workload.opaque(addr.port()) != known.opaque
                {
                    others.entry(addr.port()).or_default().insert(&workload.name);
                }
            }
            differ.extend(others.into_iter().map(|(target, pods)| {
                let (says, say) = if known.opaque { ("", "not ") } else { ("not ", "") };
                let first = pods.first().map(ToString::to_string).unwrap_or_default();
                let more = match pods.len() {
                    1 => String::new(),
                    count => format!(" and {} more", count - 1),
                };
                format!(
                    "port {port} of the Service {name} is {says}opaque, and {target} of the pod \
                     {first}{more} is {say}so"
                )
            }));
        }
    }
    differ
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_service_and_a_pod_that_differ_are_named_with_the_port() {
        let names = MeshNames {
            trust_domain: "cluster.local".parse().unwrap(),
            control_namespace: "steadfast".to_owned(),
        };
        let mut index = Index::new(names);
        let mut put = |kind: Kind, name: &str, value: Value| {
            let key = format!("resources/{}/demo/{name}", kind.as_str());
            let value = value.to_string();
            let object = Object::parse(kind, &key, value.as_bytes(), &mut Vec::new()).unwrap();
            index.put(Name::new("demo", name), object);
        };
        put(Kind::ServiceAccount, "web", json!({}));
        let opaque = json!({ "config.linkerd.io/opaque-ports": "80" });
        put(
            Kind::Service,
            "web",
            json!({ "metadata": { "annotations": opaque }, "spec": {
                "clusterIP": "10.96.0.1", "ports": [{ "port": 80 }, { "port": 81 }],
            }}),
        );
        put(
            Kind::Pod,
            "web-0",
            json!({
                "metadata": { "annotations": { "linkerd.io/inject": "enabled" } },
                "spec": { "serviceAccountName": "web", "containers": [] },
                "status": { "podIP": "10.0.0.1" },
            }),
        );
        put(
            Kind::EndpointSlice,
            "web",
            json!({
                "metadata": { "labels": { "kubernetes.io/service-name": "web" } },
                "addressType": "IPv4",
                "ports": [{ "name": "", "port": 80 }],
                "endpoints": [{
                    "addresses": ["10.0.0.1"], "targetRef": { "kind": "Pod", "name": "web-0" },
                }],
            }),
        );
        let expected = "port 80 of the Service demo/web is opaque, and 80 of the pod demo/web-0 is \
                        not so";
        assert_eq!(differences(&index, None)[0], expected);
        assert_eq!(differences(&index, Some("other")), [""; 0]);
    }
}
