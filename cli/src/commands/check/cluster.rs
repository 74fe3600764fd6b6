//! The cluster itself: its API server, its version, what a person may do in it, its clocks.

use futures::future::join_all;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::version::Info;
use kube::Api;
use kube::api::{ListParams, PostParams};
use steadfast_process::ErrorChain;

use super::{Category, Wrong, some};
use crate::mesh::Cluster;

/// Whether the API server answers, and its version.
pub(super) async fn api(cluster: &Cluster) -> (Category, Option<Info>) {
    let mut category = Category::new("kubernetes-api");
    category.add("can initialize the client", Ok(()));
    let version = cluster.client.apiserver_version().await;
    let outcome = version.as_ref().map(drop).map_err(|error| {
        let what = format!("{}: {}", cluster.server, ErrorChain(error));
        Wrong::error(what, "kubectl cluster-info")
    });
    category.add("can query the Kubernetes API", outcome);
    (category, version.ok())
}

pub(super) fn version(info: &Info) -> Category {
    let mut category = Category::new("kubernetes-version");
    let found = &info.git_version;
    let outcome = if is_at_least(info, LEAST) {
        Ok(())
    } else {
        let (major, minor) = LEAST;
        Err(Wrong::error(
            format!("it runs {found}; sidecars are native sidecars, from {major}.{minor} on"),
            "upgrade the cluster, or annotate pods \
             config.linkerd.io/proxy-enable-native-sidecar: \"false\"",
        ))
    };
    category.add(format!("is running the minimum Kubernetes API version ({found})"), outcome);
    category
}

fn is_at_least(info: &Info, least: (u32, u32)) -> bool {
    // Some clouds add a plus.
    let number = |text: &str| text.trim_end_matches('+').parse::<u32>().unwrap_or_default();
    (number(&info.major), number(&info.minor)) >= least
}

/// Whether the mesh may be installed.
pub(super) async fn before(cluster: &Cluster) -> Category {
    let mut category = Category::new("pre-kubernetes-setup");
    let control = &cluster.namespaces.control;
    let namespaces = Api::<Namespace>::all(cluster.client.clone());
    let outcome = match namespaces.get_opt(control).await {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(Wrong::warning(
            format!("the namespace {control} is there already: is the mesh installed?"),
            "steadfast check",
        )),
        Err(error) => Err(Wrong::error(ErrorChain(&error).to_string(), CAN_I)),
    };
    category.add("control plane namespace does not already exist", outcome);
    let asked = CREATED.iter().map(|(group, resource, namespaced)| async move {
        let namespace = if *namespaced { control } else { "" };
        (*resource, can_create(cluster, group, resource, namespace).await)
    });
    for (resource, outcome) in join_all(asked).await {
        category.add(format!("can create {resource}"), outcome);
    }
    category
}

async fn can_create(
    cluster: &Cluster,
    group: &str,
    resource: &str,
    namespace: &str,
) -> Result<(), Wrong> {
    let attributes = ResourceAttributes {
        verb: Some("create".to_owned()),
        group: Some(group.to_owned()),
        resource: Some(resource.to_owned()),
        namespace: Some(namespace.to_owned()),
        ..ResourceAttributes::default()
    };
    let spec = SelfSubjectAccessReviewSpec {
        resource_attributes: Some(attributes),
        ..SelfSubjectAccessReviewSpec::default()
    };
    let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let reviews = Api::<SelfSubjectAccessReview>::all(cluster.client.clone());
    let mend = "ask an administrator of the cluster: installing needs cluster-admin";
    match reviews.create(&PostParams::default(), &review).await {
        Ok(answer) if answer.status.as_ref().is_some_and(|status| status.allowed) => Ok(()),
        Ok(_) => Err(Wrong::error(format!("you may not create {resource}"), mend)),
        Err(error) => Err(Wrong::error(ErrorChain(&error).to_string(), mend)),
    }
}

/// Whether the nodes' clocks agree with the API server's. A kubelet writes the time of its clock into
/// its Lease, and the API server beside it when that was.
pub(super) async fn clocks(cluster: &Cluster) -> Category {
    let mut category = Category::new("clocks");
    let leases = Api::<Lease>::namespaced(cluster.client.clone(), "kube-node-lease");
    let outcome = match leases.list(&ListParams::default()).await {
        Err(error) => Err(Wrong::warning(ErrorChain(&error).to_string(), CAN_I)),
        Ok(leases) => {
            let skewed: Vec<_> = leases.items.iter().filter_map(skewed).collect();
            match skewed.as_slice() {
                [] => Ok(()),
                _ => Err(Wrong::error(
                    some(&skewed),
                    "set the clocks of these nodes (chrony, systemd-timesyncd): certificates are \
                     refused where a clock is off",
                )),
            }
        }
    };
    category.add(
        format!("the clocks of all nodes are within {SKEW_MAX_S} s of the API server's"),
        outcome,
    );
    category
}

/// By how much a node's clock is off, if it is by too much.
fn skewed(lease: &Lease) -> Option<String> {
    let told = lease.spec.as_ref()?.renew_time.as_ref()?.0;
    let written =
        lease.metadata.managed_fields.as_ref()?.iter().filter_map(|field| field.time.as_ref());
    let written = written.map(|time| time.0).max()?;
    let off = told.as_second() - written.as_second();
    let name = lease.metadata.name.as_deref().unwrap_or_default();
    let way = if off > 0 { "ahead" } else { "behind" };
    (off.abs() > SKEW_MAX_S).then(|| format!("the clock of {name} is {} s {way}", off.abs()))
}

/// Native sidecars.
const LEAST: (u32, u32) = (1, 29);
/// Certificates are dated back by more, and a node's Lease is told in whole seconds.
const SKEW_MAX_S: i64 = 5;
const CAN_I: &str = "kubectl auth can-i --list";
/// What an installation creates, by group, and whether in a namespace.
const CREATED: [(&str, &str, bool); 14] = [
    ("", "namespaces", false),
    ("rbac.authorization.k8s.io", "clusterroles", false),
    ("rbac.authorization.k8s.io", "clusterrolebindings", false),
    ("apiextensions.k8s.io", "customresourcedefinitions", false),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations", false),
    ("trust.steadfast.dev", "trustdomains", false),
    ("rbac.authorization.k8s.io", "roles", true),
    ("rbac.authorization.k8s.io", "rolebindings", true),
    ("", "serviceaccounts", true),
    ("", "services", true),
    ("", "configmaps", true),
    ("", "secrets", true),
    ("apps", "deployments", true),
    ("policy", "poddisruptionbudgets", true),
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_old_api_server_is_told_with_what_it_lacks() {
        let of = |major: &str, minor: &str| {
            let info = Info {
                major: major.to_owned(),
                minor: minor.to_owned(),
                git_version: format!("v{major}.{minor}.0"),
                ..Info::default()
            };
            let check = version(&info).checks.remove(0);
            (check.result, check.error)
        };
        assert_eq!(of("1", "29+").0, super::super::Verdict::Success);
        let (verdict, error) = of("1", "27");
        assert_eq!(verdict, super::super::Verdict::Error);
        assert!(error.contains("v1.27.0") && error.contains("1.29"), "{error}");
    }

    #[test]
    fn a_skewed_node_is_named_with_its_skew() {
        let lease = |renewed: &str| -> Lease {
            serde_json::from_value(json!({
                "metadata": {
                    "name": "node-7",
                    "managedFields": [{ "manager": "kubelet", "time": "2026-11-23T08:00:00Z" }],
                },
                "spec": { "renewTime": renewed },
            }))
            .unwrap()
        };
        assert_eq!(skewed(&lease("2026-11-23T08:00:01.000000Z")), None);
        let told = skewed(&lease("2026-11-23T08:00:20.000000Z")).unwrap();
        assert_eq!(told, "the clock of node-7 is 20 s ahead");
        let told = skewed(&lease("2026-11-23T07:59:00.000000Z")).unwrap();
        assert_eq!(told, "the clock of node-7 is 60 s behind");
    }
}
