//! The mesh that a command is about: a standalone one by its directory, else the one of a Kubernetes
//! cluster.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use steadfast_api::Code;
use steadfast_platform::keys::{FileKeys, KeyStoreError, TakesKeys};
use steadfast_platform::kubernetes::{
    self, ConnectError, KubeStore, Namespaces, Purpose, SecretKeys,
};
use steadfast_platform::standalone::{self, Directory};
use steadfast_platform::store::RESOURCES_PREFIX;
use steadfast_platform::{Entry, Store, StoreError};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep};

use crate::admin::{PodPort, Port};

/// The mesh that is meant; the way to it is found when it is first needed.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Mesh {
    /// The state directory of a standalone mesh, as steadfast-store was given it [default: the mesh
    /// of a Kubernetes cluster is meant]
    #[arg(long, value_name = "DIR", env = "STEADFAST_DIR")]
    dir: Option<PathBuf>,
    /// On Kubernetes: the context of the kubeconfig [default: the current one]
    #[arg(long, value_name = "NAME", help_heading = KUBERNETES)]
    context: Option<String>,
    /// On Kubernetes: the namespace of the control plane
    #[arg(long, value_name = "NAME", default_value = CONTROL_NAMESPACE, help_heading = KUBERNETES)]
    control_namespace: String,
    /// On Kubernetes: the namespace of the anchors' keys
    #[arg(long, value_name = "NAME", default_value = ANCHORS_NAMESPACE, help_heading = KUBERNETES)]
    anchors_namespace: String,
    #[arg(skip)]
    way: OnceCell<Way>,
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreProblem {
    #[error(transparent)]
    Connect(Box<ConnectError>),
    #[error(
        "no way to a mesh: --dir DIR (or STEADFAST_DIR) names no standalone one, and the kubeconfig \
         (KUBECONFIG, --context) names no cluster"
    )]
    Kubeconfig(#[source] Box<KubeconfigError>),
    #[error("the store refused: {0}")]
    Refused(StoreError),
    #[error(
        "{}: no store answers in {dir}: {why}\n  Start one:  steadfast-store --dir {dir}",
        Code::STORE_UNAVAILABLE,
        dir = dir.display()
    )]
    Unavailable { dir: PathBuf, why: String },
    #[error(
        "{}: the API server at {server} does not do it: {why}\n  See:  kubectl get --raw /readyz",
        Code::STORE_UNAVAILABLE
    )]
    Unserved { server: String, why: String },
}

/// Why the keys of anchors cannot be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeysProblem {
    #[error("the keys of anchors cannot be used")]
    Keys(#[from] KeyStoreError),
    #[error(transparent)]
    Store(#[from] StoreProblem),
}

/// The way to it.
#[derive(Clone)]
struct Way {
    store: Arc<dyn Store>,
    /// The API server, where there is one.
    cluster: Option<Cluster>,
}

/// A Kubernetes cluster.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) server: String,
    pub(crate) namespaces: Namespaces,
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Way")
    }
}

impl Mesh {
    /// The standalone one of this directory.
    pub(crate) fn standalone(dir: &Path) -> Self {
        Self {
            dir: Some(dir.to_owned()),
            context: None,
            control_namespace: CONTROL_NAMESPACE.to_owned(),
            anchors_namespace: ANCHORS_NAMESPACE.to_owned(),
            way: OnceCell::new(),
        }
    }

    /// The directory of a standalone one: a context that is named overrules the environment's.
    pub(crate) fn dir(&self) -> Option<&Path> {
        self.dir.as_deref().filter(|_| self.context.is_none())
    }

    /// Whether a mesh is named at all.
    pub(crate) async fn is_named(&self) -> bool {
        self.dir.is_some() || self.context.is_some() || self.way().await.is_ok()
    }

    /// Its store; whether it answers is not asked.
    ///
    /// # Errors
    /// There is no way to it.
    pub(crate) async fn store(&self) -> Result<&Arc<dyn Store>, StoreProblem> {
        Ok(&self.way().await?.store)
    }

    /// The cluster that it is on, unless it is standalone.
    ///
    /// # Errors
    /// There is no way to it.
    pub(crate) async fn cluster(&self) -> Result<Option<&Cluster>, StoreProblem> {
        Ok(self.way().await?.cluster.as_ref())
    }

    async fn way(&self) -> Result<&Way, StoreProblem> {
        self.way.get_or_try_init(|| self.find()).await
    }

    async fn find(&self) -> Result<Way, StoreProblem> {
        if let Some(dir) = self.dir() {
            let store = Arc::new(standalone::Client::new(&Directory::new(dir)));
            return Ok(Way { store, cluster: None });
        }
        let context = self.context.clone();
        let options = KubeConfigOptions { context, ..KubeConfigOptions::default() };
        let unnamed = |error| StoreProblem::Kubeconfig(Box::new(error));
        let config = Kubeconfig::read().map_err(unnamed)?;
        let config = Config::from_custom_kubeconfig(config, &options).await.map_err(unnamed)?;
        let server = config.cluster_url.to_string();
        let (client, _) =
            kubernetes::connect(config).map_err(|error| StoreProblem::Connect(Box::new(error)))?;
        let namespaces = Namespaces {
            control: self.control_namespace.clone(),
            anchors: self.anchors_namespace.clone(),
        };
        let store = Arc::new(KubeStore::new(client.clone(), namespaces.clone()));
        Ok(Way { store, cluster: Some(Cluster { client, server, namespaces }) })
    }

    /// Where the keys of anchors are.
    ///
    /// # Errors
    /// They cannot be reached.
    pub(crate) async fn anchor_keys(&self) -> Result<Arc<dyn TakesKeys>, KeysProblem> {
        if let Some(dir) = self.dir() {
            return Ok(Arc::new(FileKeys::open(Directory::new(dir).anchor_keys())?));
        }
        let client = self.cluster().await?.map(|cluster| cluster.client.clone());
        let client = client.ok_or(StoreProblem::Kubeconfig(Box::new(KubeconfigError::FindPath)))?;
        Ok(Arc::new(SecretKeys::new(client, &self.anchors_namespace, Purpose::Anchors)))
    }

    /// The entry of a key, from a store that may have been started a moment ago in the same script:
    /// it gets that moment to open its socket.
    ///
    /// # Errors
    /// The store's.
    pub(crate) async fn first_get(&self, key: &str) -> Result<Option<Entry>, StoreProblem> {
        let (store, deadline) = (self.store().await?, Instant::now() + START_TIME_MAX);
        loop {
            match store.get(key).await {
                Err(StoreError::Unavailable(_)) if Instant::now() < deadline => sleep(POLL).await,
                answer => return answer.map_err(|error| self.explain(error)),
            }
        }
    }

    /// An error of the store, as a person needs it.
    pub(crate) fn explain(&self, error: StoreError) -> StoreProblem {
        let StoreError::Unavailable(why) = error else { return StoreProblem::Refused(error) };
        let Some(dir) = self.dir() else {
            let cluster = self.way.get().and_then(|way| way.cluster.as_ref());
            let server = cluster.map(|cluster| cluster.server.clone()).unwrap_or_default();
            return StoreProblem::Unserved { server, why };
        };
        let why = if dir.join("store.sock").exists() {
            why
        } else if dir.exists() {
            "there is no store.sock, so none is running".to_owned()
        } else {
            "there is no such directory".to_owned()
        };
        StoreProblem::Unavailable { dir: dir.to_owned(), why }
    }

    /// Makes a trust domain, where there is none.
    pub(crate) fn founding(&self) -> String {
        match self.dir() {
            Some(dir) => format!("steadfast trust init --dir {}", dir.display()),
            None => format!(
                "helm install, or steadfast install; steadfast check{self} says what is there"
            ),
        }
    }

    /// All pods that the store knows.
    ///
    /// # Errors
    /// The store does not answer.
    pub(crate) async fn pods(&self) -> Result<Vec<KnownPod>, StoreProblem> {
        let way = self.way().await?;
        let listed = way.store.list(&format!("{RESOURCES_PREFIX}Pod/")).await;
        let (entries, _) = listed.map_err(|error| self.explain(error))?;
        let pods = entries.iter().filter_map(|entry| serde_json::from_slice(&entry.value).ok());
        Ok(pods.map(|pod| self.known(way, &pod)).collect())
    }

    /// Whether a pod is of the controller of rotations.
    pub(crate) fn is_controller(&self, pod: &KnownPod) -> bool {
        let namespace = pod.name.split_once('/').map(|(namespace, _)| namespace);
        (self.dir().is_some() || namespace == Some(&*self.anchors_namespace))
            && pod.account.as_deref() == Some(CONTROLLER_ACCOUNT)
    }

    /// Whether a pod is of the control plane.
    pub(crate) fn is_ours(&self, pod: &KnownPod) -> bool {
        let namespace = pod.name.split_once('/').map(|(namespace, _)| namespace);
        [&self.control_namespace, &self.anchors_namespace].iter().any(|o| Some(&***o) == namespace)
    }

    fn known(&self, way: &Way, pod: &Pod) -> KnownPod {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let ours =
            [&self.control_namespace, &self.anchors_namespace].iter().any(|o| *o == namespace);
        let admin = match &way.cluster {
            None => standalone_port(pod).map(Port::Addr),
            Some(Cluster { client, .. }) => container_port(pod, ours).map(|port| {
                Port::Pod(Arc::new(PodPort::new(client.clone(), namespace, name, port)))
            }),
        };
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        KnownPod { name: format!("{namespace}/{name}"), admin, account }
    }
}

/// The flags that name it in another command, each with a space before it.
impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(dir) = self.dir() {
            return write!(f, " --dir {}", dir.display());
        }
        for (flag, value, usual) in [
            ("--context", self.context.as_deref().unwrap_or_default(), ""),
            ("--control-namespace", &*self.control_namespace, CONTROL_NAMESPACE),
            ("--anchors-namespace", &*self.anchors_namespace, ANCHORS_NAMESPACE),
        ] {
            if value != usual {
                write!(f, " {flag} {value}")?;
            }
        }
        Ok(())
    }
}

/// A workload of the mesh.
#[derive(Clone, Debug)]
pub(crate) struct KnownPod {
    /// Namespace and name.
    pub(crate) name: String,
    /// Where its admin port is, if its Pod says so.
    pub(crate) admin: Option<Port>,
    /// Its service account, if its Pod names one.
    pub(crate) account: Option<String>,
}

/// Pods of a standalone mesh are processes, which share one address.
fn standalone_port(pod: &Pod) -> Option<SocketAddr> {
    let port =
        pod.metadata.annotations.as_ref()?.get(ADMIN_PORT_ANNOTATION)?.parse::<u16>().ok()?;
    let ip = pod.status.as_ref()?.pod_ip.as_ref()?.parse::<IpAddr>().ok()?;
    Some(SocketAddr::from((ip, port)))
}

/// The admin port of the sidecar, or of a process of ours.
fn container_port(pod: &Pod, ours: bool) -> Option<u16> {
    let spec = pod.spec.as_ref()?;
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    let admin = ports.find(|port| {
        let name = port.name.as_deref();
        name == Some("linkerd-admin") || (ours && name == Some("admin"))
    })?;
    u16::try_from(admin.container_port).ok()
}

/// In the Pod of a standalone mesh.
pub(crate) const ADMIN_PORT_ANNOTATION: &str = "config.linkerd.io/admin-port";
const CONTROLLER_ACCOUNT: &str = "steadfast-rotation";
const KUBERNETES: &str = "On Kubernetes";
pub(crate) const CONTROL_NAMESPACE: &str = "steadfast";
pub(crate) const ANCHORS_NAMESPACE: &str = "steadfast-anchors";
/// A store starts within a tenth of a second; a slow disk has to sync a few times.
const START_TIME_MAX: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_says_where_its_admin_port_is() {
        let pod = |pod| serde_json::from_value::<Pod>(pod).unwrap();
        let process = pod(json!({
            "metadata": { "annotations": { ADMIN_PORT_ANNOTATION: "4191" } },
            "status": { "podIP": "127.0.0.1" },
        }));
        assert_eq!(standalone_port(&process), Some(SocketAddr::from(([127, 0, 0, 1], 4191))));
        assert_eq!(standalone_port(&Pod::default()), None);
        let container =
            |name: &str| json!({ "name": "c", "ports": [{ "name": name, "containerPort": 9000 }] });
        let meshed = pod(json!({
            "spec": { "initContainers": [container("linkerd-admin")], "containers": [container("admin")] },
        }));
        assert_eq!(container_port(&meshed, false), Some(9000));
        let other = pod(json!({ "spec": { "containers": [container("admin")] } }));
        assert_eq!(container_port(&other, false), None);
        assert_eq!(container_port(&other, true), Some(9000));
    }

    #[test]
    fn a_mesh_is_named_in_other_commands_as_it_was_named_here() {
        let standalone = Mesh::standalone(Path::new("./mesh"));
        assert_eq!(standalone.to_string(), " --dir ./mesh");
        let usual = Mesh { dir: None, ..standalone.clone() };
        assert_eq!(usual.to_string(), "");
        let other = Mesh {
            context: Some("prod".to_owned()),
            control_namespace: "mesh".to_owned(),
            ..standalone
        };
        assert_eq!(other.to_string(), " --context prod --control-namespace mesh");
    }
}
