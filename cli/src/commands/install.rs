//! `steadfast install`, `upgrade`, `uninstall` and `prune`: manifests for `kubectl`. They print, and
//! change nothing themselves.

use std::collections::BTreeSet;
use std::path::PathBuf;

use kube::Api;
use kube::api::{DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use crate::chart::{self, CRDS, ChartError, HIGHLY_AVAILABLE, MESH};
use crate::mesh::{Cluster, Mesh, StoreProblem};
use crate::output;
use crate::problem::Problem;

/// Print the manifests of the control plane
///
/// Nothing is changed: `kubectl apply` does that. Keys and certificates are not among them: the
/// control plane makes them in the cluster.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast install --crds | kubectl apply -f -
  steadfast install | kubectl apply -f -
  steadfast install --ha --set trustDomain=prod.example.org | kubectl apply -f -
  steadfast install --values mesh.yaml > mesh-manifests.yaml

The same as:  helm install steadfast-crds … && helm install steadfast …")]
pub(crate) struct InstallArgs {
    /// Print the CustomResourceDefinitions alone: they come first
    #[arg(long, conflicts_with_all = ["values", "set", "ha"])]
    crds: bool,
    #[command(flatten)]
    values: ValuesArgs,
    /// The namespace of the control plane
    #[arg(long, value_name = "NAME", default_value = "steadfast")]
    control_namespace: String,
}

/// Print the manifests of this version, with the values that are installed
///
/// What was set when it was installed stays, unless it is set here.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast upgrade --crds | kubectl apply -f -
  steadfast upgrade | kubectl apply -f -
  steadfast upgrade --set identity.replicas=3 | kubectl apply -f -
  steadfast prune | kubectl delete -f -           what this version has no more")]
pub(crate) struct UpgradeArgs {
    /// Print the CustomResourceDefinitions alone: they come first
    #[arg(long, conflicts_with_all = ["values", "set", "ha"])]
    crds: bool,
    #[command(flatten)]
    values: ValuesArgs,
    #[command(flatten)]
    mesh: Mesh,
}

/// Print what is to be deleted to be rid of the control plane
///
/// The trust domain, its anchors and their keys are not among it: what is installed anew goes on
/// with them. With --trust they are, and every workload then needs a new identity.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast uninstall | kubectl delete -f -
  steadfast uninstall --trust | kubectl delete -f -      the trust domain and its keys, too")]
pub(crate) struct UninstallArgs {
    /// The trust domain, its keys and the CustomResourceDefinitions, too
    #[arg(long)]
    trust: bool,
    #[command(flatten)]
    mesh: Mesh,
}

/// Print what is installed and this version does not have
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast prune | kubectl delete -f -")]
pub(crate) struct PruneArgs {
    #[command(flatten)]
    mesh: Mesh,
}

/// What is different from the chart's own values.
#[derive(Debug, clap::Args)]
struct ValuesArgs {
    /// Set a value of the chart, such as identity.replicas=3; may be given several times
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// A file of values; may be given several times, and the last word counts
    #[arg(long, short = 'f', value_name = "FILE")]
    values: Vec<PathBuf>,
    /// For several nodes: three replicas of what workloads need, and pods that are not meshed are
    /// not created
    #[arg(long)]
    ha: bool,
}

/// Why there is nothing to print.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallError {
    #[error(transparent)]
    Chart(#[from] ChartError),
    #[error("it was installed by Helm, which knows what is there: use `helm {0}`")]
    ByHelm(&'static str),
    #[error(
        "no control plane is installed in the namespace {0:?} (its ConfigMap steadfast-values is not \
         there): `steadfast install` prints a new one"
    )]
    NotInstalled(String),
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    #[error(transparent)]
    Store(#[from] StoreProblem),
    #[error("the API server does not tell what is installed")]
    Unserved(#[from] kube::Error),
    #[error("a standalone mesh is no installation: leave --dir (or STEADFAST_DIR) out")]
    Standalone,
}

/// Prints the manifests.
///
/// # Errors
/// Values that the chart does not have.
pub(crate) fn install(args: &InstallArgs) -> Result<(), Problem> {
    if args.crds {
        return Ok(output::print(&crds()?)?);
    }
    let mut values = MESH.usual()?;
    args.values.apply(&mut values)?;
    Ok(output::print(&manifests(&values, &args.control_namespace)?)?)
}

/// Prints them with the values that are installed.
///
/// # Errors
/// [`InstallError`]
pub(crate) async fn upgrade(args: &UpgradeArgs) -> Result<(), Problem> {
    if args.crds {
        return Ok(output::print(&crds()?)?);
    }
    let cluster = cluster(&args.mesh).await?;
    let mut values = installed(cluster, Some("upgrade")).await?;
    args.values.apply(&mut values)?;
    Ok(output::print(&manifests(&values, &cluster.namespaces.control)?)?)
}

/// Prints what is to be deleted.
///
/// # Errors
/// [`InstallError`]
pub(crate) async fn uninstall(args: &UninstallArgs) -> Result<(), Problem> {
    let cluster = cluster(&args.mesh).await?;
    // Also what is left of an installation that was deleted in part.
    let there = ours(cluster).await?;
    let kept = |object: &Object| object.kept && !args.trust;
    let mut texts: Vec<_> =
        there.iter().filter(|object| !kept(object)).map(Object::manifest).collect();
    if args.trust {
        texts.extend(mirrors(cluster).await?.iter().map(Object::manifest));
        // The others are Linkerd's, whose mesh may be there too.
        let crds = crds()?;
        let own =
            crds.split("---\n").filter(|crd| crd.contains("\n  group: trust.steadfast.dev\n"));
        texts.extend(own.map(|crd| format!("---\n{crd}")));
    }
    Ok(output::print(&texts.concat())?)
}

/// Prints what this version does not have.
///
/// # Errors
/// [`InstallError`]
pub(crate) async fn prune(args: &PruneArgs) -> Result<(), Problem> {
    let cluster = cluster(&args.mesh).await?;
    let values = installed(cluster, Some("upgrade")).await?;
    let rendered = manifests(&values, &cluster.namespaces.control)?;
    let wanted: BTreeSet<_> = documents(&rendered)?.iter().map(Object::of).collect();
    let surplus = ours(cluster).await?;
    let surplus = surplus.iter().filter(|object| !object.kept && !wanted.contains(*object));
    Ok(output::print(&surplus.map(Object::manifest).collect::<String>())?)
}

impl ValuesArgs {
    fn apply(&self, values: &mut Value) -> Result<(), InstallError> {
        if self.ha {
            chart::merge(values, chart::parse(HIGHLY_AVAILABLE)?)?;
        }
        for file in &self.values {
            let text = std::fs::read_to_string(file);
            let text = text.map_err(|error| InstallError::Read(file.clone(), error))?;
            chart::merge(values, chart::parse(&text)?)?;
        }
        for text in &self.set {
            chart::merge(values, chart::set(text)?)?;
        }
        Ok(())
    }
}

fn crds() -> Result<String, InstallError> {
    Ok(CRDS.render(&json!({}), "")?)
}

/// The control plane, and the namespace that Helm makes by a flag.
pub(super) fn manifests(values: &Value, namespace: &str) -> Result<String, InstallError> {
    let own = format!(
        "---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: {namespace}\n  \
         labels: {{ app.kubernetes.io/part-of: steadfast }}\n  annotations: {{ {KEPT}: keep }}\n"
    );
    Ok(own + &MESH.render(values, namespace)?)
}

async fn cluster(mesh: &Mesh) -> Result<&Cluster, InstallError> {
    mesh.cluster().await?.ok_or(InstallError::Standalone)
}

/// The values that are installed, whole: those that are new in this version too. A command that
/// would print them anew is not for what Helm has installed.
pub(super) async fn installed(
    cluster: &Cluster,
    command: Option<&'static str>,
) -> Result<Value, InstallError> {
    let namespace = &cluster.namespaces.control;
    let kind = resource("", "v1", "ConfigMap", "configmaps");
    let api = Api::<DynamicObject>::namespaced_with(cluster.client.clone(), namespace, &kind);
    let found = api.get_opt(VALUES).await?;
    let found = found.ok_or_else(|| InstallError::NotInstalled(namespace.clone()))?;
    let manager = found.metadata.labels.as_ref().and_then(|all| all.get(MANAGED_BY));
    if let (Some("Helm"), Some(command)) = (manager.map(String::as_str), command) {
        return Err(InstallError::ByHelm(command));
    }
    let mut values = MESH.usual()?;
    let text = found.data["data"]["values.yaml"].as_str().unwrap_or_default();
    chart::merge(&mut values, chart::parse(text)?)?;
    Ok(values)
}

/// An object, by what it is known.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Object {
    kind: String,
    namespace: String,
    name: String,
    api_version: String,
    /// It outlives what is installed.
    kept: bool,
}

impl Object {
    fn of(document: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let metadata = &document["metadata"];
        Self {
            kind: text(&document["kind"]),
            namespace: text(&metadata["namespace"]),
            name: text(&metadata["name"]),
            api_version: text(&document["apiVersion"]),
            kept: metadata["annotations"][KEPT] == "keep",
        }
    }

    fn manifest(&self) -> String {
        let Self { kind, namespace, name, api_version, .. } = self;
        let namespace = match &**namespace {
            "" => String::new(),
            namespace => format!(", namespace: {namespace}"),
        };
        format!(
            "---\napiVersion: {api_version}\nkind: {kind}\nmetadata: {{ name: {name}{namespace} }}\n"
        )
    }
}

pub(super) fn documents(manifests: &str) -> Result<Vec<Value>, ChartError> {
    let parts = manifests.split("\n---\n").map(|part| part.trim_start_matches("---\n"));
    let parsed = parts.map(chart::parse).collect::<Result<Vec<_>, _>>()?;
    Ok(parsed.into_iter().filter(|document| document["kind"].is_string()).collect())
}

/// The mirrors of the trust bundle, one in each namespace.
async fn mirrors(cluster: &Cluster) -> Result<Vec<Object>, InstallError> {
    let params = ListParams::default().fields("metadata.name=steadfast-trust-bundle");
    list(cluster, ("", "v1", "ConfigMap", "configmaps"), &params).await
}

/// Everything in the cluster that says that it is a part of us.
async fn ours(cluster: &Cluster) -> Result<Vec<Object>, InstallError> {
    let params = ListParams::default().labels("app.kubernetes.io/part-of=steadfast");
    let mut found = Vec::new();
    for kind in KINDS {
        found.extend(list(cluster, kind, &params).await?);
    }
    Ok(found)
}

async fn list(
    cluster: &Cluster,
    (group, version, kind, plural): (&str, &str, &str, &str),
    params: &ListParams,
) -> Result<Vec<Object>, InstallError> {
    let resource = resource(group, version, kind, plural);
    let api = Api::<DynamicObject>::all_with(cluster.client.clone(), &resource);
    let objects = api.list(params).await?.items.into_iter().map(|object| {
        let metadata = object.metadata;
        let annotations = metadata.annotations.unwrap_or_default();
        Object {
            kind: kind.to_owned(),
            namespace: metadata.namespace.unwrap_or_default(),
            name: metadata.name.unwrap_or_default(),
            api_version: resource.api_version.clone(),
            kept: annotations.get(KEPT).is_some_and(|kept| kept == "keep"),
        }
    });
    Ok(objects.collect())
}

/// What a kind of our charts is to the API server.
pub(super) fn resource_of(kind: &str) -> Option<ApiResource> {
    let found = KINDS.iter().find(|(_, _, known, _)| *known == kind);
    found.map(|(group, version, kind, plural)| resource(group, version, kind, plural))
}

pub(super) fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

/// What our charts are made of, in the order in which it is deleted.
const KINDS: [(&str, &str, &str, &str); 12] = [
    (
        "admissionregistration.k8s.io",
        "v1",
        "MutatingWebhookConfiguration",
        "mutatingwebhookconfigurations",
    ),
    ("apps", "v1", "Deployment", "deployments"),
    ("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    ("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
    ("", "v1", "Service", "services"),
    ("", "v1", "ConfigMap", "configmaps"),
    ("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings"),
    ("rbac.authorization.k8s.io", "v1", "Role", "roles"),
    ("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings"),
    ("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles"),
    ("", "v1", "ServiceAccount", "serviceaccounts"),
    ("", "v1", "Namespace", "namespaces"),
];
const VALUES: &str = "steadfast-values";
const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
const KEPT: &str = "helm.sh/resource-policy";
