//! Every pod that is meshed, or should be.

use std::collections::BTreeMap;

use futures::stream::{self, StreamExt as _};
use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use kube::api::ListParams;
use serde_json::Value;
use steadfast_control::inject::{self, Outcome};
use steadfast_platform::store::RESOURCES_PREFIX;
use steadfast_process::{Clock as _, ErrorChain, SystemClock};

use super::{Category, Wrong, some};
use crate::admin;
use crate::commands::inject::any_settings;
use crate::mesh::{Cluster, KnownPod, Mesh};

pub(super) async fn all(mesh: &Mesh, cluster: &Cluster, only: Option<&str>) -> Category {
    let mut category = Category::new("data-plane");
    let found = match pods(mesh, cluster, only).await {
        Ok(found) => found,
        Err(wrong) => {
            category.add("the pods can be read", Err(wrong));
            return category;
        }
    };
    let outcome = match found.bare.as_slice() {
        [] => Ok(()),
        bare => Err(Wrong::error(
            format!("without a sidecar, though they are to have one: {}", some(bare)),
            "create them anew: kubectl rollout restart (they were created while nobody could mesh \
             them)",
        )),
    };
    category.add("every pod that asks for a sidecar has one", outcome);
    let outcome = match found.wrong.as_slice() {
        [] => Ok(()),
        wrong => Err(Wrong::warning(wrong.join("\n"), "correct the annotations of the workloads")),
    };
    category.add("all annotations can be used", outcome);
    let meshed = stream::iter(&found.meshed).map(asked).buffer_unordered(AT_ONCE);
    let unwell: Vec<_> = meshed.filter_map(std::future::ready).collect().await;
    let outcome = match unwell.as_slice() {
        [] => Ok(()),
        _ => Err(Wrong::error(
            unwell.join("\n"),
            "steadfast identity NAMESPACE/POD; kubectl logs POD -c linkerd-proxy",
        )),
    };
    let count = found.meshed.len();
    category.add(format!("all {count} sidecars are ready, and their SVIDs valid"), outcome);
    category
}

/// What is wrong with a sidecar, if anything is.
async fn asked(pod: &KnownPod) -> Option<String> {
    let name = &pod.name;
    let Some(port) = &pod.admin else { return Some(format!("{name} has no admin port")) };
    if let Err(error) = admin::ready(port).await {
        return Some(format!("{name} is not ready: {}", ErrorChain(&error)));
    }
    match admin::identity(port).await {
        Ok(identity) => match identity.not_after {
            Some(end) if end > SystemClock.now() => None,
            Some(end) => Some(format!("the SVID of {name} has ended at {end}")),
            None => Some(format!("{name} has no SVID")),
        },
        Err(error) => Some(format!("{name} does not tell its SVID: {}", ErrorChain(&error))),
    }
}

/// The pods, by what was found of each.
#[derive(Default)]
struct Found {
    meshed: Vec<KnownPod>,
    /// Those that ask for a sidecar and have none.
    bare: Vec<String>,
    /// What is wrong with annotations.
    wrong: Vec<String>,
}

async fn pods(mesh: &Mesh, cluster: &Cluster, only: Option<&str>) -> Result<Found, Wrong> {
    let failed = |why: String| Wrong::error(why, "kubectl auth can-i list pods --all-namespaces");
    let namespaces = Api::<Namespace>::all(cluster.client.clone());
    let namespaces = namespaces.list(&ListParams::default()).await;
    let namespaces = namespaces.map_err(|error| failed(ErrorChain(&error).to_string()))?;
    let inherited: BTreeMap<_, _> = namespaces
        .items
        .into_iter()
        .map(|one| {
            let annotations = one.metadata.annotations.unwrap_or_default();
            (one.metadata.name.unwrap_or_default(), annotations)
        })
        .collect();
    let store = mesh.store().await.map_err(|error| failed(error.to_string()))?;
    let listed = store.list(&format!("{RESOURCES_PREFIX}Pod/")).await;
    let (entries, _) = listed.map_err(|error| failed(error.to_string()))?;
    let (mut found, settings) = (Found::default(), any_settings());
    let known: BTreeMap<_, _> = mesh
        .pods()
        .await
        .map_err(|error| failed(error.to_string()))?
        .into_iter()
        .map(|pod| (pod.name.clone(), pod))
        .collect();
    for entry in entries {
        let Ok(pod) = serde_json::from_slice::<Value>(&entry.value) else { continue };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let namespace = text(&pod["metadata"]["namespace"]);
        let ended = ["Succeeded", "Failed"].iter().any(|phase| pod["status"]["phase"] == *phase);
        let apart = [&*cluster.namespaces.control, &*cluster.namespaces.anchors, "kube-system"];
        if ended || only.is_some_and(|only| only != namespace) || apart.contains(&&*namespace) {
            continue;
        }
        let name = format!("{namespace}/{}", text(&pod["metadata"]["name"]));
        let none = BTreeMap::new();
        let annotations = inherited.get(&namespace).unwrap_or(&none);
        let (outcome, warnings) = inject::inject(&pod, &namespace, annotations, &settings);
        found.wrong.extend(warnings.iter().map(|warning| format!("{name}: {warning}")));
        if matches!(outcome, Outcome::Meshed(_)) {
            found.bare.push(name);
        } else if inject::uninject(&pod).is_some() {
            found.meshed.extend(known.get(&name).cloned());
        }
    }
    Ok(found)
}

/// Each is a way through the API server and a kubelet.
const AT_ONCE: usize = 16;
