//! The state directory of a standalone mesh, and where everything in it is.

use std::path::{Path, PathBuf};

use crate::keys::{KeyStoreError, create_private_dir};
use crate::names::{NameError, check_name, check_namespace};

/// DIR, with a name for each place in it. Directories have mode 0700, keys and tokens 0600.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directory(PathBuf);

impl Directory {
    /// The directory at this path, which need not exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Makes the directory and those in it that every mesh has.
    ///
    /// # Errors
    /// The first that cannot be made.
    pub fn create(&self) -> Result<(), KeyStoreError> {
        let all = [
            self.0.clone(),
            self.store(),
            self.manifests(),
            self.pods(),
            self.log(),
            self.anchor_keys(),
            self.issuer_keys(),
        ];
        all.iter().try_for_each(|path| create_private_dir(path))
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The socket of `steadfast-store`.
    pub fn socket(&self) -> PathBuf {
        self.0.join("store.sock")
    }

    /// What `steadfast-store` alone opens.
    pub fn store(&self) -> PathBuf {
        self.0.join("store")
    }

    /// The store's file.
    pub fn store_file(&self) -> PathBuf {
        self.store().join("store.redb")
    }

    /// The key of the token issuer.
    pub fn token_key(&self) -> PathBuf {
        self.store().join("token.key")
    }

    /// The keys of anchors: for rotation and `trust init` only.
    pub fn anchor_keys(&self) -> PathBuf {
        self.0.join("keys/anchors")
    }

    /// The keys of issuers: for identity only.
    pub fn issuer_keys(&self) -> PathBuf {
        self.0.join("keys/issuers")
    }

    /// The watched manifests.
    pub fn manifests(&self) -> PathBuf {
        self.0.join("manifests")
    }

    /// Where each pod has its token and bundle.
    pub fn pods(&self) -> PathBuf {
        self.0.join("pods")
    }

    /// The directory of one pod, as the kubelet mounts one.
    ///
    /// # Errors
    /// A namespace or name that is none, and so must not become part of a path.
    pub fn pod(&self, namespace: &str, pod: &str) -> Result<PodDirectory, NameError> {
        check_namespace(namespace)?;
        check_name(pod)?;
        Ok(PodDirectory(self.pods().join(namespace).join(pod)))
    }

    /// Where logs are kept.
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }
}

/// What is projected for one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodDirectory(PathBuf);

impl PodDirectory {
    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The pod's bound token, renewed at 80 % of its life.
    pub fn token(&self) -> PathBuf {
        self.0.join("token")
    }

    /// The mounted bundle: a mirror of the published one.
    pub fn bundle(&self) -> PathBuf {
        self.0.join("bundle.json")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_has_its_files_where_the_kubelet_would_mount_them() {
        let pod = Directory::new("/mesh").pod("demo", "web-1").unwrap();
        assert_eq!(pod.token(), Path::new("/mesh/pods/demo/web-1/token"));
        assert_eq!(pod.bundle(), Path::new("/mesh/pods/demo/web-1/bundle.json"));
        assert!(Directory::new("/mesh").pod("..", "keys").is_err());
        assert!(Directory::new("/mesh").pod("demo", "../../keys").is_err());
    }
}
