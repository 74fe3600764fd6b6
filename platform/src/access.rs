//! Which platform a process runs on, as its flags say, and the way to its store.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kube::Client;
use steadfast_process::flags::Flags;

use crate::bundle_file::BUNDLE_FILE;
use crate::kubernetes::{self, ConnectError, KubeStore, Namespaces};
use crate::standalone::{self, Directory};
use crate::store::Store;

/// The flags that say it.
#[derive(Clone, Debug, clap::Args)]
pub struct PlatformArgs {
    /// The state directory of a standalone mesh, where `steadfast-store` listens
    #[arg(long, value_name = "DIR", required_unless_present = "kubernetes")]
    dir: Option<PathBuf>,
    /// Run on Kubernetes: the API server is the store. It is found as every pod finds it, or by
    /// KUBECONFIG
    #[arg(long, conflicts_with = "dir")]
    kubernetes: bool,
}

/// A platform.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Platform {
    /// The API server is the store.
    Kubernetes,
    /// `steadfast-store` is, in this directory.
    Standalone(PathBuf),
}

/// The way to everything that differs between platforms.
pub struct Access {
    /// The store.
    pub store: Arc<dyn Store>,
    /// Our wall clock less the store's, in milliseconds, where the store has said its time.
    pub clock_offset_ms: Arc<dyn Fn() -> Option<i64> + Send + Sync>,
    /// Where keys and tokens are.
    pub place: Place,
}

/// Where keys and tokens are.
#[derive(Clone)]
pub enum Place {
    /// In the API server.
    Kubernetes(Client, Namespaces),
    /// In this directory.
    Standalone(Directory),
}

impl PlatformArgs {
    /// Checks them.
    pub fn check(self, flags: &mut Flags) -> Platform {
        let Some(dir) = self.dir else { return Platform::Kubernetes };
        if !dir.is_dir() {
            flags.wrong("--dir", &dir.display().to_string(), "no such directory");
        }
        Platform::Standalone(dir)
    }
}

impl Platform {
    /// Where a pod of the control plane has its token and its bundle.
    pub fn pod_directory(&self, namespace: &str, service_account: &str) -> PathBuf {
        match self {
            Self::Kubernetes => Path::new(POD_DIRECTORY).to_owned(),
            Self::Standalone(dir) => {
                dir.join("pods").join(namespace).join(format!("{service_account}-0"))
            }
        }
    }

    /// Where our own objects lie, as flags say it.
    pub fn namespaces(&self, control: String, anchors: String) -> Namespaces {
        match self {
            Self::Kubernetes => Namespaces { control, anchors },
            Self::Standalone(_) => Namespaces { anchors: control.clone(), control },
        }
    }

    /// Where such a pod has its bundle: on Kubernetes it reads the store and writes it itself, so
    /// that it can start before there is any mirror.
    pub fn bundle_file(&self, pod: &Path) -> PathBuf {
        match self {
            Self::Kubernetes => Path::new(OWN_DIRECTORY).join(BUNDLE_FILE),
            Self::Standalone(_) => pod.join(BUNDLE_FILE),
        }
    }

    /// The way to it. Whether the store answers is not asked. Must be called within a runtime.
    ///
    /// # Errors
    /// There is no API server to be found.
    pub async fn open(&self, namespaces: Namespaces) -> Result<Access, ConnectError> {
        match self {
            Self::Kubernetes => {
                let (client, clock) = kubernetes::connect(kubernetes::infer().await?)?;
                Ok(Access {
                    store: Arc::new(KubeStore::new(client.clone(), namespaces.clone())),
                    clock_offset_ms: Arc::new(move || clock.offset_millis()),
                    place: Place::Kubernetes(client, namespaces),
                })
            }
            Self::Standalone(dir) => {
                let directory = Directory::new(dir);
                let client = standalone::Client::new(&directory);
                let clock = client.clone();
                Ok(Access {
                    store: Arc::new(client),
                    clock_offset_ms: Arc::new(move || clock.clock_offset_millis()),
                    place: Place::Standalone(directory),
                })
            }
        }
    }
}

/// What a pod of the control plane may write to.
const OWN_DIRECTORY: &str = "/var/lib/steadfast";
/// Where our manifests mount the token and the bundle of every pod that has an SVID.
pub const POD_DIRECTORY: &str = "/var/run/steadfast";
