//! What is installed, the trust domain, the webhook, and the versions of what runs.

use std::collections::BTreeSet;

use futures::future::join_all;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::Api;
use kube::api::{DynamicObject, ListParams, PostParams};
use serde_json::{Value, json};
use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, ErrorChain, SystemClock, duration};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, AnchorState};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Category, Wrong, some};
use crate::admin;
use crate::commands::install::{self, InstallError};
use crate::controller::{Controller, ControllerArg};
use crate::mesh::{Cluster, Mesh};
use crate::trust_domain;

pub(super) async fn all(mesh: &Mesh, cluster: &Cluster) -> Vec<Category> {
    vec![
        crds(cluster).await,
        existence(cluster).await,
        spread(cluster).await,
        identity(mesh, cluster).await,
        webhook(cluster).await,
        versions(mesh).await,
    ]
}

async fn crds(cluster: &Cluster) -> Category {
    let mut category = Category::new("crd");
    let kind = install::resource(
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
    );
    let api = Api::<DynamicObject>::all_with(cluster.client.clone(), &kind);
    let mend = "steadfast install --crds | kubectl apply -f -";
    for (kind, name, version) in CRDS {
        let outcome = match api.get_opt(name).await {
            Ok(Some(found)) => {
                let versions = found.data["spec"]["versions"].as_array();
                let served = |v: &Value| v["name"] == version && v["served"] == true;
                match versions.is_some_and(|versions| versions.iter().any(served)) {
                    true => Ok(()),
                    false => Err(Wrong::error(format!("it does not serve {version}"), mend)),
                }
            }
            Ok(None) => {
                let what = format!("there is no CustomResourceDefinition {name}");
                Err(Wrong::error(what, mend))
            }
            Err(error) => Err(unreadable(&error)),
        };
        category.add(format!("the {kind} CRD is there"), outcome);
    }
    category
}

async fn existence(cluster: &Cluster) -> Category {
    let mut category = Category::new("existence");
    let namespaces = Api::<Namespace>::all(cluster.client.clone());
    for name in [&cluster.namespaces.control, &cluster.namespaces.anchors] {
        let outcome = match namespaces.get_opt(name).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => {
                Err(Wrong::error("it is not there", "steadfast install | kubectl apply -f -"))
            }
            Err(error) => Err(unreadable(&error)),
        };
        if !category.add(format!("the namespace {name} is there"), outcome) {
            return category;
        }
    }
    category.add("everything that is installed is there, and as it was made", whole(cluster).await);
    for (namespace, name) in deployments(cluster) {
        let deployments = Api::<Deployment>::namespaced(cluster.client.clone(), namespace);
        let outcome = match deployments.get_opt(name).await {
            Ok(Some(found)) => ready(&found, namespace, name),
            // Told above, with all that is missing.
            Ok(None) => Err(Wrong::error("it is not there", UPGRADE)),
            Err(error) => Err(unreadable(&error)),
        };
        category.add(format!("{name} is ready"), outcome);
    }
    category
}

/// Whether one node that fails takes no part of the control plane away that has several replicas.
async fn spread(cluster: &Cluster) -> Category {
    let mut category = Category::new("ha-checks");
    for (namespace, name) in deployments(cluster) {
        let deployments = Api::<Deployment>::namespaced(cluster.client.clone(), namespace);
        // Told above, if it is not there.
        let Ok(Some(found)) = deployments.get_opt(name).await else { continue };
        let replicas = found.spec.and_then(|spec| spec.replicas).unwrap_or(1);
        if replicas < 2 {
            continue;
        }
        let label = ListParams::default().labels(&format!("app.kubernetes.io/name={name}"));
        let pods = Api::<Pod>::namespaced(cluster.client.clone(), namespace).list(&label).await;
        let outcome = match pods {
            Ok(pods) => one_node(&pods.items).map_or(Ok(()), |node| {
                Err(Wrong::warning(
                    format!("all of its {replicas} replicas are on {node}"),
                    format!(
                        "kubectl rollout restart -n {namespace} deployment/{name}   (with two \
                             nodes that may run it)"
                    ),
                ))
            }),
            Err(error) => Err(unreadable(&error)),
        };
        category.add(format!("the replicas of {name} are on several nodes"), outcome);
    }
    category
}

/// The node on which all of several pods are.
fn one_node(pods: &[Pod]) -> Option<&str> {
    let nodes: BTreeSet<_> =
        pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.as_deref()).collect();
    nodes.first().copied().filter(|_| pods.len() > 1 && nodes.len() == 1)
}

fn deployments(cluster: &Cluster) -> [(&str, &'static str); 3] {
    [
        (&*cluster.namespaces.control, "steadfast-identity"),
        (&*cluster.namespaces.anchors, "steadfast-rotation"),
        (&*cluster.namespaces.control, "steadfast-control"),
    ]
}

fn ready(found: &Deployment, namespace: &str, name: &str) -> Result<(), Wrong> {
    let wanted = found.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    let ready = found.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0);
    let logs = format!("kubectl logs -n {namespace} deployment/{name}");
    match ready {
        0 => Err(Wrong::error(format!("none of {wanted} replicas is ready"), logs)),
        ready if ready < wanted => {
            Err(Wrong::warning(format!("{ready} of {wanted} replicas are ready"), logs))
        }
        _ => Ok(()),
    }
}

/// Whether all that was installed is there, and grants what it was made to grant.
async fn whole(cluster: &Cluster) -> Result<(), Wrong> {
    let values = match install::installed(cluster, None).await {
        Ok(values) => values,
        Err(error @ InstallError::NotInstalled(_)) => {
            return Err(Wrong::error(
                error.to_string(),
                "steadfast install | kubectl apply -f -   (with what was set when it was installed)",
            ));
        }
        Err(error) => return Err(Wrong::error(ErrorChain(&error).to_string(), UPGRADE)),
    };
    let wanted = install::manifests(&values, &cluster.namespaces.control)
        .and_then(|manifests| Ok(install::documents(&manifests)?));
    let wanted = wanted.map_err(|error| Wrong::error(ErrorChain(&error).to_string(), UPGRADE))?;
    let looked = join_all(wanted.iter().map(|object| difference(cluster, object))).await;
    match looked.into_iter().flatten().collect::<Vec<_>>().as_slice() {
        [] => Ok(()),
        wrong => Err(Wrong::error(some(wrong), UPGRADE)),
    }
}

/// In what an object differs from how it was made, if it does: it is gone, or grants something else.
async fn difference(cluster: &Cluster, wanted: &Value) -> Option<String> {
    let (kind, name) = (wanted["kind"].as_str()?, wanted["metadata"]["name"].as_str()?);
    let resource = install::resource_of(kind)?;
    let api = match wanted["metadata"]["namespace"].as_str() {
        Some(namespace) => {
            Api::<DynamicObject>::namespaced_with(cluster.client.clone(), namespace, &resource)
        }
        None => Api::all_with(cluster.client.clone(), &resource),
    };
    match api.get_opt(name).await {
        Ok(Some(found)) if wanted["rules"].is_array() && found.data["rules"] != wanted["rules"] => {
            Some(format!("the {kind} {name} grants something else"))
        }
        Ok(Some(_)) => None,
        Ok(None) => Some(format!("the {kind} {name} is gone")),
        Err(error) => Some(format!("the {kind} {name} cannot be read: {}", ErrorChain(&error))),
    }
}

async fn identity(mesh: &Mesh, cluster: &Cluster) -> Category {
    let mut category = Category::new("identity");
    let state = trust_domain::read(mesh).await;
    let outcome = state.as_ref().map(drop).map_err(|error| {
        let logs =
            format!("kubectl logs -n {} deployment/steadfast-rotation", cluster.namespaces.anchors);
        Wrong::error(ErrorChain(error).to_string(), logs)
    });
    category.add("the trust domain is founded", outcome);
    let Ok(state) = state else { return category };
    let halted = state.halted.map(|halt| {
        Wrong::error(crate::rotation::waiting::halted(halt), "steadfast trust recover")
    });
    category.add("the trust domain is not halted", halted.map_or(Ok(()), Err));
    let now = SystemClock.now();
    category.add("the active trust anchor is valid", anchor(&state, AnchorState::Active, now));
    category.add(
        "a standby trust anchor is there and valid",
        anchor(&state, AnchorState::Standby, now),
    );
    category.add("the issuer is valid", issuer(&state, now));
    for (name, outcome) in conditions(cluster).await {
        category.add(name, outcome);
    }
    let controller = Controller::find(mesh, &ControllerArg::default()).await;
    let outcome = match controller {
        Ok((_, standing)) if standing.leads => match standing.trouble {
            None => Ok(()),
            Some(trouble) => Err(Wrong::error(trouble, "steadfast anchor status")),
        },
        Ok(_) => {
            Err(Wrong::warning("none of them leads at this moment", "steadfast anchor status"))
        }
        Err(error) => Err(Wrong::error(
            ErrorChain(&error).to_string(),
            format!("kubectl logs -n {} deployment/steadfast-rotation", cluster.namespaces.anchors),
        )),
    };
    category.add("a controller of rotations leads, and nothing holds it up", outcome);
    category
}

fn anchor(state: &TrustDomainState, wanted: AnchorState, now: UnixTime) -> Result<(), Wrong> {
    let Some(anchor) = state.in_state(wanted).next() else {
        let what = format!("there is none ({})", wanted.label());
        return Err(match wanted {
            AnchorState::Active => Wrong::error(what, "steadfast anchor status"),
            _ => Wrong::warning(what, "steadfast anchor status"),
        });
    };
    let name = format!("the anchor {}", anchor.id.short());
    let parsed = steadfast_api::TrustAnchor::parse(&anchor.der);
    let parsed = parsed.map_err(|error| {
        Wrong::error(format!("{name} cannot be read: {error}"), "steadfast trust status")
    })?;
    let mend = mend(state, now, "steadfast anchor rotate");
    lasting(&name, parsed.not_before(), parsed.not_after(), now, mend)
}

fn issuer(state: &TrustDomainState, now: UnixTime) -> Result<(), Wrong> {
    let issuer = state.active_issuer();
    let issuer = issuer.ok_or_else(|| Wrong::error("there is none", "steadfast issuer status"))?;
    let name = format!("the issuer {}", issuer.id.short());
    let parsed = X509Certificate::from_der(&issuer.der);
    let (_, parsed) = parsed.map_err(|error| {
        Wrong::error(format!("{name} cannot be read: {error}"), "steadfast issuer status")
    })?;
    let from = UnixTime::from_secs(parsed.validity().not_before.timestamp());
    lasting(&name, from, issuer.not_after, now, mend(state, now, "steadfast issuer rotate"))
}

/// What helps, unless everything has ended.
fn mend<'a>(state: &TrustDomainState, now: UnixTime, usual: &'a str) -> &'a str {
    let lasts = |anchor: &AnchorRecord| {
        let parsed = steadfast_api::TrustAnchor::parse(&anchor.der);
        parsed.is_ok_and(|parsed| parsed.not_after() > now)
    };
    if state.published().any(lasts) { usual } else { "steadfast trust recover" }
}

/// Whether a certificate is valid, and has more than a fifth of its life left.
fn lasting(
    name: &str,
    from: UnixTime,
    to: UnixTime,
    now: UnixTime,
    mend: &str,
) -> Result<(), Wrong> {
    if now < from {
        let mend = "set the clocks: it was made by one that is ahead of this machine's";
        return Err(Wrong::error(format!("{name} is valid from {from} on"), mend));
    }
    if now >= to {
        let what = format!("{name} has ended at {to}");
        return Err(Wrong::error(what, mend));
    }
    let (life, left) = (to.since(from), to.since(now));
    if left < life / 5 {
        let left = duration::show(left);
        return Err(Wrong::warning(format!("{name} ends in {left}, at {to}"), mend));
    }
    Ok(())
}

/// What the control plane itself says of the trust domain.
async fn conditions(cluster: &Cluster) -> Vec<(String, Result<(), Wrong>)> {
    let kind = install::resource("trust.steadfast.dev", "v1alpha1", "TrustDomain", "trustdomains");
    let api = Api::<DynamicObject>::all_with(cluster.client.clone(), &kind);
    let Ok(found) = api.get("steadfast").await else { return Vec::new() };
    let conditions = found.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let told = conditions.iter().filter(|condition| condition["type"] != "Rotating");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    told.map(|condition| {
        let outcome = match condition["status"] == "True" {
            true => Ok(()),
            false => Err(Wrong::error(
                format!("{}: {}", text(&condition["reason"]), text(&condition["message"])),
                "kubectl describe trustdomain steadfast",
            )),
        };
        (format!("the TrustDomain says {}", text(&condition["type"])), outcome)
    })
    .collect()
}

async fn webhook(cluster: &Cluster) -> Category {
    let mut category = Category::new("webhooks-tls");
    let api = Api::<MutatingWebhookConfiguration>::all(cluster.client.clone());
    let found = match api.get_opt(WEBHOOK).await {
        Ok(Some(found)) => found,
        Ok(None) => {
            let what = format!("there is no MutatingWebhookConfiguration {WEBHOOK}");
            category.add("the injector is configured", Err(Wrong::error(what, UPGRADE)));
            return category;
        }
        Err(error) => {
            category.add("the injector is configured", Err(unreadable(&error)));
            return category;
        }
    };
    category.add("the injector is configured", Ok(()));
    let logs =
        format!("kubectl logs -n {} deployment/steadfast-control", cluster.namespaces.control);
    let now = SystemClock.now();
    let outcome = found.webhooks.iter().flatten().try_for_each(|webhook| {
        let trusted = webhook.client_config.ca_bundle.as_ref().map_or(&[][..], |ca| &ca.0);
        match newest_end(trusted) {
            Some(end) if end > now => Ok(()),
            Some(end) => {
                let what =
                    format!("all certificates of {} have ended, the last at {end}", webhook.name);
                Err(Wrong::error(what, logs.clone()))
            }
            None => {
                let what = format!("{} trusts no certificate (caBundle is empty)", webhook.name);
                Err(Wrong::error(what, logs.clone()))
            }
        }
    });
    category.add("the API server trusts a certificate of it that is valid", outcome);
    category.add("a pod is meshed as it is created (dry run)", try_it(cluster, &logs).await);
    category
}

/// When the last of the certificates ends.
fn newest_end(bundle: &[u8]) -> Option<UnixTime> {
    let ends = pem::parse_many(bundle).ok()?.into_iter().filter_map(|pem| {
        let (_, certificate) = X509Certificate::from_der(pem.contents()).ok()?;
        Some(UnixTime::from_secs(certificate.validity().not_after.timestamp()))
    });
    ends.max()
}

/// Asks for a pod that is never made, and looks at what would become of it.
async fn try_it(cluster: &Cluster, logs: &str) -> Result<(), Wrong> {
    let pod = json!({
        "metadata": {
            "generateName": "steadfast-check-",
            "annotations": { "linkerd.io/inject": "enabled" },
        },
        "spec": { "containers": [{ "name": "check", "image": "check" }] },
    });
    let pod: Pod = serde_json::from_value(pod)
        .map_err(|error| Wrong::error(error.to_string(), "report this as a bug"))?;
    let pods = Api::<Pod>::namespaced(cluster.client.clone(), "default");
    let params = PostParams { dry_run: true, ..PostParams::default() };
    match pods.create(&params, &pod).await {
        Ok(made) => {
            let spec = made.spec.unwrap_or_default();
            let mut all = spec.init_containers.iter().flatten().chain(&spec.containers);
            match all.any(|container| container.name == "linkerd-proxy") {
                true => Ok(()),
                false => Err(Wrong::error(
                    "it would be created without a sidecar: the API server does not reach the \
                     webhook, or does not trust it",
                    logs,
                )),
            }
        }
        Err(kube::Error::Api(status)) if status.message.contains("failed calling webhook") => {
            Err(Wrong::error(status.message.clone(), logs))
        }
        // A quota, or a policy, that has nothing to do with the mesh.
        Err(error) => {
            Err(Wrong::warning(ErrorChain(&error).to_string(), "kubectl auth can-i create pods"))
        }
    }
}

async fn versions(mesh: &Mesh) -> Category {
    let mut category = Category::new("version");
    let own = env!("CARGO_PKG_VERSION");
    let pods = match mesh.pods().await {
        Ok(pods) => pods,
        Err(error) => {
            let wrong = Wrong::error(ErrorChain(&error).to_string(), "kubectl get pods");
            category.add("the control plane tells its version", Err(wrong));
            return category;
        }
    };
    let ours = pods.iter().filter(|pod| mesh.is_ours(pod));
    let asked = ours.filter_map(|pod| Some((pod.name.clone(), pod.admin.clone()?)));
    let told =
        join_all(asked.map(|(name, port)| async move { (name, admin::version(port).await) }));
    let mut others = Vec::new();
    for (name, version) in told.await {
        match version {
            Ok(version) if version == own => {}
            Ok(version) => others.push(format!("{name} runs {version}")),
            Err(error) => others.push(format!("{name}: {}", ErrorChain(&error))),
        }
    }
    let outcome = match others.as_slice() {
        [] => Ok(()),
        others => Err(Wrong::warning(some(others), UPGRADE)),
    };
    category.add(format!("the control plane is of this command's version ({own})"), outcome);
    category
}

fn unreadable(error: &kube::Error) -> Wrong {
    Wrong::error(ErrorChain(error).to_string(), "kubectl auth can-i --list")
}

const WEBHOOK: &str = "steadfast-injector";
/// Each with the version of it that is read.
const CRDS: [(&str, &str, &str); 3] = [
    ("TrustDomain", "trustdomains.trust.steadfast.dev", "v1alpha1"),
    ("ExternalWorkload", "externalworkloads.workload.linkerd.io", "v1beta1"),
    ("Server", "servers.policy.linkerd.io", "v1beta3"),
];
const UPGRADE: &str = "steadfast upgrade | kubectl apply -f -   (or helm upgrade)";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_certificate_is_told_that_ends_soon_has_ended_or_has_not_begun() {
        let from = UnixTime::from_secs(1_800_000_000);
        let to = from + Duration::from_secs(100);
        let at = |seconds| {
            let now = from + Duration::from_secs(seconds);
            lasting("x", from, to, now, "mend").err().map(|wrong| wrong.verdict)
        };
        assert_eq!(at(10), None);
        assert_eq!(at(85), Some(super::super::Verdict::Warning));
        assert_eq!(at(100), Some(super::super::Verdict::Error));
        let early = lasting("x", from, to, from - Duration::from_secs(1), "mend").unwrap_err();
        assert!(early.what.contains("valid from"), "{early:?}");
    }
}
