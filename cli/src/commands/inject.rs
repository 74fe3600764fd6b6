//! `steadfast inject` and `uninject`: manifests in, manifests out, for files and pipes.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use serde_json::{Value, json};
use steadfast_control::inject::{self, Outcome, Reason, Settings};

use crate::chart::{self, ChartError, MESH};
use crate::mesh::{Mesh, StoreProblem};
use crate::output;
use crate::problem::Problem;

/// Mesh the workloads of manifests
///
/// Their pods are annotated, so that the mesh gives them sidecars when they are created. With
/// --manual the sidecars are written into the manifests, for a cluster whose webhook is not wanted.
/// What was done with each object is told on standard error.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast inject app.yaml | kubectl apply -f -
  kubectl get deployment -n shop -o yaml | steadfast inject - | kubectl apply -f -
  steadfast inject --manual app.yaml > meshed.yaml

Exit code 1 if an annotation has a value that cannot be used.")]
pub(crate) struct InjectArgs {
    /// Manifests in YAML or JSON; - is standard input
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Write the sidecars themselves into the manifests
    #[arg(long)]
    manual: bool,
    /// With --manual: do not ask the cluster what its sidecars are, but take the chart's values
    #[arg(long, requires = "manual")]
    ignore_cluster: bool,
    /// With --ignore-cluster: set a value of the chart, such as image.tag=1.2
    #[arg(long, value_name = "NAME=VALUE", requires = "ignore_cluster")]
    set: Vec<String>,
    #[command(flatten)]
    mesh: Mesh,
}

/// Take the sidecars and the annotation that asks for them out of manifests
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast uninject app.yaml | kubectl apply -f -
  kubectl get deployment -n shop -o yaml | steadfast uninject - | kubectl apply -f -")]
pub(crate) struct UninjectArgs {
    /// Manifests in YAML or JSON; - is standard input
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
}

/// Why nothing is printed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InjectError {
    #[error(transparent)]
    Chart(#[from] ChartError),
    #[error("a standalone mesh has no pods to inject: leave --dir (or STEADFAST_DIR) out")]
    Standalone,
    #[error("{} is no manifest: {why}", file.display())]
    Manifest { file: PathBuf, why: String },
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error(
        "what the sidecars of this cluster are cannot be read (ConfigMap steadfast-injection in \
         namespace {0:?}): is the control plane installed? Or use --ignore-cluster"
    )]
    Settings(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    #[error(transparent)]
    Store(#[from] StoreProblem),
}

/// What becomes of an object's pods.
enum Done {
    Changed(&'static str),
    Left(&'static str),
}

/// Prints the manifests, meshed.
///
/// # Errors
/// [`InjectError`]
pub(crate) async fn inject(args: &InjectArgs) -> Result<ExitCode, Problem> {
    let settings = match (args.manual, args.ignore_cluster) {
        (false, _) => None,
        (true, true) => Some(of_chart(&args.set)?),
        (true, false) => Some(of_cluster(&args.mesh).await?),
    };
    let mut warned = false;
    let printed = each(&args.files, |object, pod| {
        let (done, warnings) = mesh(object, pod, settings.as_ref());
        warned |= !warnings.is_empty();
        (done, warnings)
    })?;
    output::print(&printed)?;
    Ok(if warned { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Prints the manifests, unmeshed.
///
/// # Errors
/// [`InjectError`]
pub(crate) fn uninject(args: &UninjectArgs) -> Result<(), Problem> {
    let printed = each(&args.files, |object, place| {
        let Some(pod) = object.pointer_mut(place) else {
            return (Done::Left("it has no pod"), vec![]);
        };
        let unmeshed = inject::uninject(pod);
        let annotations = |pod: &mut Value| {
            let annotations = pod["metadata"]["annotations"].as_object_mut();
            annotations.is_some_and(|all| all.remove(INJECT).is_some())
        };
        let had_proxy = unmeshed.is_some();
        if let Some(unmeshed) = unmeshed {
            *pod = unmeshed;
        }
        let was_asked = annotations(pod);
        let done = match had_proxy || was_asked {
            true => Done::Changed("uninjected"),
            false => Done::Left("it is not meshed"),
        };
        (done, Vec::new())
    })?;
    Ok(output::print(&printed)?)
}

/// Meshes one object, and says what is wrong with it.
fn mesh(object: &mut Value, place: &str, settings: Option<&Settings>) -> (Done, Vec<String>) {
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default").to_owned();
    let Some(pod) = object.pointer_mut(place) else { return (Done::Left("it has no pod"), vec![]) };
    let asked = BTreeMap::from([(INJECT.to_owned(), "enabled".to_owned())]);
    let any = any_settings();
    let (outcome, warnings) = inject::inject(pod, &namespace, &asked, settings.unwrap_or(&any));
    let meshed = match outcome {
        Outcome::Meshed(meshed) => meshed,
        Outcome::Left(reason) => return (Done::Left(why(reason)), warnings),
    };
    if settings.is_some() {
        *pod = *meshed;
        return (Done::Changed("injected"), warnings);
    }
    let metadata = &mut pod["metadata"];
    if !metadata["annotations"].is_object() {
        metadata["annotations"] = json!({});
    }
    metadata["annotations"][INJECT] = json!("enabled");
    (Done::Changed("annotated"), warnings)
}

const fn why(reason: Reason) -> &'static str {
    match reason {
        Reason::HasProxy => "it has a sidecar already",
        Reason::HostNetwork => "it shares its node's network",
        Reason::NoPod => "it is no pod",
        Reason::NotAsked => "it does not ask for it",
        Reason::Disabled => "its annotation says linkerd.io/inject: disabled",
        Reason::ControlPlane => "it belongs to the control plane",
    }
}

/// Every object of every file, changed, as YAML; what was done goes to standard error.
fn each(
    files: &[PathBuf],
    mut change: impl FnMut(&mut Value, &str) -> (Done, Vec<String>),
) -> Result<String, InjectError> {
    let mut printed = String::new();
    for file in files {
        for mut document in documents(file)? {
            let is_list = document["kind"].as_str().is_some_and(|kind| kind.ends_with("List"));
            let objects = match document.get_mut("items").and_then(Value::as_array_mut) {
                Some(items) if is_list => items.iter_mut().collect(),
                _ => vec![&mut document],
            };
            for object in objects {
                let kind = object["kind"].as_str().unwrap_or("object").to_lowercase();
                let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                let (done, warnings) = match inject::pod_of(object) {
                    Some(place) => change(object, place),
                    None => (Done::Left("it makes no pods"), Vec::new()),
                };
                let line = match done {
                    Done::Changed(what) => format!("{kind} {name:?} {what}"),
                    Done::Left(why) => format!("{kind} {name:?} left as it is: {why}"),
                };
                // Whoever does not listen does not want to know.
                let _ = writeln!(io::stderr(), "{line}");
                for warning in warnings {
                    let _ = writeln!(io::stderr(), "  ! {warning}");
                }
            }
            let yaml = serde_saphyr::to_string(&document);
            let yaml = yaml.map_err(|error| InjectError::Manifest {
                file: file.clone(),
                why: error.to_string(),
            })?;
            printed.push_str(&format!("---\n{}\n", yaml.trim_end()));
        }
    }
    Ok(printed)
}

fn documents(file: &Path) -> Result<Vec<Value>, InjectError> {
    let mut text = String::new();
    let read = if file == Path::new("-") {
        io::stdin().read_to_string(&mut text).map(drop)
    } else {
        std::fs::read_to_string(file).map(|read| text = read)
    };
    read.map_err(|error| InjectError::Read(file.to_owned(), error))?;
    let wrong = |why: String| InjectError::Manifest { file: file.to_owned(), why };
    let all: Vec<Value> =
        serde_saphyr::from_multiple(&text).map_err(|error| wrong(error.to_string()))?;
    let all: Vec<_> = all.into_iter().filter(|document| !document.is_null()).collect();
    match all.iter().find(|document| !document["kind"].is_string()) {
        Some(_) => Err(wrong("a document of it has no kind".to_owned())),
        None => Ok(all),
    }
}

/// What every sidecar of the cluster has in common.
async fn of_cluster(mesh: &Mesh) -> Result<Settings, InjectError> {
    let cluster = mesh.cluster().await?.ok_or(InjectError::Standalone)?;
    let namespace = &cluster.namespaces.control;
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        InjectError::Settings(namespace.clone(), error)
    };
    let maps = Api::<ConfigMap>::namespaced(cluster.client.clone(), namespace);
    let found = maps.get("steadfast-injection").await.map_err(|error| failed(error.into()))?;
    let text = found.data.and_then(|mut data| data.remove("injection.json")).unwrap_or_default();
    serde_json::from_str(&text).map_err(|error| failed(error.into()))
}

/// The same, of our chart.
fn of_chart(set: &[String]) -> Result<Settings, InjectError> {
    let mut values = MESH.usual()?;
    for text in set {
        chart::merge(&mut values, chart::set(text)?)?;
    }
    let text = MESH.injection(&values, crate::mesh::CONTROL_NAMESPACE)?;
    serde_json::from_str(&text)
        .map_err(|error| InjectError::Settings("the chart".to_owned(), error.into()))
}

/// For whoever only wants to know whether a pod is meshed, and what is wrong with it.
pub(super) fn any_settings() -> Settings {
    Settings {
        control_namespace: crate::mesh::CONTROL_NAMESPACE.to_owned(),
        trust_domain: String::new(),
        cluster_domain: String::new(),
        proxy_image: String::new(),
        init_image: String::new(),
        tag: String::new(),
        pull_policy: String::new(),
        resources: json!({}),
    }
}

/// Linkerd's.
const INJECT: &str = "linkerd.io/inject";
