//! The keys of anchors and issuers, one object per key, created once.
//!
//! A key is addressed by its content ([`KeyId`]), so that no key can ever take another's place:
//! there is no way to overwrite or to rename one. A store makes keys and lets them sign; whether
//! their bytes ever leave it is its own affair, since a token's never do. What is loaded from a
//! file is wiped when it is dropped. A file that others could read or change is refused by its
//! name, since the key in it may no longer be ours alone.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey,
    VerificationAlgorithm,
};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat};
use rustix::io::Errno;
use steadfast_api::KeyId;
pub use zeroize::Zeroizing;

pub use self::local::{LocalKey, LocalKeyError};

mod local;

/// A place for private keys.
#[async_trait::async_trait]
pub trait KeyStore: Send + Sync + 'static {
    /// Makes a new key: ECDSA on P-256. Acknowledged means durable.
    async fn make(&self) -> Result<Arc<dyn PrivateKey>, KeyStoreError>;

    /// The key with this id, ready to sign.
    async fn key(&self, id: KeyId) -> Result<Arc<dyn PrivateKey>, KeyStoreError>;

    /// Whether there is a key with this id.
    async fn exists(&self, id: KeyId) -> Result<bool, KeyStoreError>;

    /// The ids of all keys, in ascending order.
    async fn list(&self) -> Result<Vec<KeyId>, KeyStoreError>;

    /// Destroys a key for ever. Acknowledged means durable; one that is not there is destroyed.
    async fn destroy(&self, id: KeyId) -> Result<(), KeyStoreError>;

    /// Where it keeps a key, for the stored state and for people.
    fn place_of(&self, id: KeyId) -> String;
}

/// A place that takes keys that were made elsewhere, too.
#[async_trait::async_trait]
pub trait TakesKeys: KeyStore {
    /// Keeps a key, in PKCS#8. Acknowledged means durable.
    ///
    /// # Errors
    /// [`KeyStoreError::Exists`] if there is one of this id, which stays.
    async fn take(&self, id: KeyId, pkcs8: Zeroizing<Vec<u8>>) -> Result<(), KeyStoreError>;
}

/// A private key that can sign, wherever it is. Signing may take as long as a device takes.
pub trait PrivateKey: Send + Sync {
    /// SHA-256 of its SPKI.
    fn id(&self) -> KeyId;

    /// What kind of key it is.
    fn kind(&self) -> KeyKind;

    /// The public key, as it stands in the BIT STRING of its SPKI.
    fn public(&self) -> &[u8];

    /// Signs, as the [`KeyKind`] says.
    ///
    /// # Errors
    /// The key, or the device that has it, does not.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyStoreError>;
}

/// The kinds of keys that sign certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// ECDSA on P-256 with SHA-256, its signatures in ASN.1.
    EcdsaP256,
    /// ECDSA on P-384 with SHA-384, its signatures in ASN.1.
    EcdsaP384,
    /// RSA, PKCS#1 v1.5 with SHA-256.
    Rsa,
}

/// Why a key store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KeyStoreError {
    /// Keys are made once: the one that is there stays.
    #[error("the key {0} exists already and is never overwritten")]
    Exists(String),
    /// The device that has the keys.
    #[error("{0}")]
    Device(String),
    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No such key.
    #[error("there is no key {0}; if it was lost, put it back from a backup")]
    Missing(String),
    /// No key was made.
    #[error(transparent)]
    Making(LocalKeyError),
    /// The file holds another key than its name says, or none.
    #[error("{} does not hold the key that it is named after: {reason}", path.display())]
    Other {
        /// Which file.
        path: PathBuf,
        /// What it holds.
        reason: String,
    },
    /// Others than the owner may use it.
    #[error(
        "{} has mode {mode:04o}, so others than its owner could use it; find out who has, then \
         `chmod {wanted:o} {}`",
        path.display(),
        path.display()
    )]
    Permissions {
        /// Which file or directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// The mode that it should have.
        wanted: u32,
    },
    /// The key did not sign.
    #[error("a signature of the key {0} does not come about or does not verify")]
    Signing(KeyId),
    /// Not a file of a key's size.
    #[error("{} is no key: expected a regular file of at most {KEY_BYTES_MAX} bytes", .0.display())]
    Strange(PathBuf),
}

/// Signs something of no meaning and verifies it, so that a key that cannot sign, or a public key
/// that is not its own, is found before anything hangs from it. May take as long as a device takes.
///
/// # Errors
/// As [`PrivateKey::sign`], and a signature that does not verify.
pub fn self_test(key: &dyn PrivateKey) -> Result<(), KeyStoreError> {
    let signature = key.sign(SELF_TEST)?;
    let algorithm: &dyn VerificationAlgorithm = match key.kind() {
        KeyKind::EcdsaP256 => &ECDSA_P256_SHA256_ASN1,
        KeyKind::EcdsaP384 => &ECDSA_P384_SHA384_ASN1,
        KeyKind::Rsa => &RSA_PKCS1_2048_8192_SHA256,
    };
    let verified = UnparsedPublicKey::new(algorithm, key.public()).verify(SELF_TEST, &signature);
    verified.map_err(|_| KeyStoreError::Signing(key.id()))
}

/// Keys as files with mode 0600 in one directory with mode 0700: `<key id>.key`.
#[derive(Clone, Debug)]
pub struct FileKeys {
    directory: PathBuf,
}

impl FileKeys {
    /// The keys in a directory, which is made if it is not there.
    ///
    /// # Errors
    /// A directory that others may enter, or that cannot be made.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, KeyStoreError> {
        let directory = directory.into();
        create_private_dir(&directory)?;
        let metadata = std::fs::metadata(&directory).map_err(io("look at", &directory))?;
        check_mode(&directory, metadata.mode(), 0o700)?;
        Ok(Self { directory })
    }

    /// Keeps a new key (PKCS#8 in DER) under its id. Acknowledged means durable.
    ///
    /// # Errors
    /// A key that is there already, or a directory that cannot be written.
    pub async fn put_new(&self, id: KeyId, pkcs8: Zeroizing<Vec<u8>>) -> Result<(), KeyStoreError> {
        let path = self.path(id);
        blocking(move || write_new(&path, &pkcs8)).await
    }

    /// The key with this id, as PKCS#8 in DER.
    ///
    /// # Errors
    /// No such key, or a file that others may read.
    pub async fn load(&self, id: KeyId) -> Result<Zeroizing<Vec<u8>>, KeyStoreError> {
        let path = self.path(id);
        blocking(move || read(&path)).await
    }

    fn path(&self, id: KeyId) -> PathBuf {
        self.directory.join(format!("{id}.key"))
    }
}

#[async_trait::async_trait]
impl TakesKeys for FileKeys {
    async fn take(&self, id: KeyId, pkcs8: Zeroizing<Vec<u8>>) -> Result<(), KeyStoreError> {
        self.put_new(id, pkcs8).await
    }
}

#[async_trait::async_trait]
impl KeyStore for FileKeys {
    async fn make(&self) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        let (key, pkcs8) = LocalKey::generate().map_err(KeyStoreError::Making)?;
        self.put_new(key.id(), pkcs8).await?;
        Ok(Arc::new(key))
    }

    async fn key(&self, id: KeyId) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        let pkcs8 = self.load(id).await?;
        let other = |reason: String| KeyStoreError::Other { path: self.path(id), reason };
        let key = LocalKey::from_pkcs8(&pkcs8).map_err(|error| other(error.to_string()))?;
        if key.id() != id {
            return Err(other(format!("it is the key {}", key.id())));
        }
        Ok(Arc::new(key))
    }

    async fn exists(&self, id: KeyId) -> Result<bool, KeyStoreError> {
        let (path, directory) = (self.path(id), self.directory.clone());
        blocking(move || {
            // Without the directory nothing says what was in it.
            let exists = std::fs::metadata(&directory).and_then(|_| path.try_exists());
            exists.map_err(io("look for", &path))
        })
        .await
    }

    async fn list(&self) -> Result<Vec<KeyId>, KeyStoreError> {
        let directory = self.directory.clone();
        blocking(move || list(&directory)).await
    }

    async fn destroy(&self, id: KeyId) -> Result<(), KeyStoreError> {
        let path = self.path(id);
        blocking(move || remove(&path)).await
    }

    /// By the end of its path: the state does not know where on a machine its directory is.
    fn place_of(&self, id: KeyId) -> String {
        let path = self.path(id);
        let end: Vec<_> = path.iter().rev().take(3).map(|part| part.to_string_lossy()).collect();
        end.iter().rev().map(AsRef::as_ref).collect::<Vec<&str>>().join("/")
    }
}

/// What has the name of a key's file. A draft that a crash left has none, nor has anything that a
/// person put there.
fn list(directory: &Path) -> Result<Vec<KeyId>, KeyStoreError> {
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(io("list", directory))? {
        let name = entry.map_err(io("list", directory))?.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(".key")).map(str::parse::<KeyId>);
        ids.extend(id.and_then(Result::ok));
    }
    ids.sort_unstable();
    Ok(ids)
}

/// Removes the name of a key's file, durably. Its blocks are not written over: a file system that
/// journals or copies on write would keep the old ones all the same.
fn remove(path: &Path) -> Result<(), KeyStoreError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        removed => removed.map_err(io("destroy", path))?,
    }
    // Also when it was gone: an earlier try may have failed right here.
    sync_dir(parent_of(path))
}

/// Makes a directory (and its parents) with mode 0700, durably; one that is there is left as it is.
pub(crate) fn create_private_dir(path: &Path) -> Result<(), KeyStoreError> {
    let parents = parents_of_missing(path);
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io("create", path))?;
    parents.iter().try_for_each(|parent| sync_dir(parent))
}

/// The directories in which a name is missing on the way to `path`, the innermost first.
fn parents_of_missing(path: &Path) -> Vec<PathBuf> {
    let missing = path.ancestors().take_while(|at| !at.as_os_str().is_empty() && !at.exists());
    missing.map(|at| parent_of(at).to_owned()).collect()
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}

/// Writes a file that must not exist yet, with mode 0600, whole or not at all, durably.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), KeyStoreError> {
    let directory = parent_of(path);
    let mut draft = Draft::new(path).map_err(io("write in", directory))?;
    let written = draft.file.write_all(bytes).and_then(|()| draft.file.sync_all());
    let linked = written.map_err(io("write", path)).and_then(|()| match draft.link(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(KeyStoreError::Exists(path.display().to_string()))
        }
        linked => linked.map_err(io("create", path)),
    });
    let removed = draft.remove();
    linked?;
    removed?;
    sync_dir(directory)
}

/// A key's file before it has its name. Where the file system can, it has no name at all, so that
/// a process that is killed leaves no key behind that nobody knows of.
struct Draft {
    file: File,
    name: Option<PathBuf>,
}

impl Draft {
    fn new(path: &Path) -> io::Result<Self> {
        let unnamed = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        match rustix::fs::open(parent_of(path), unnamed, Mode::RUSR | Mode::WUSR) {
            Ok(file) if Path::new(OPEN_FILES).exists() => {
                Ok(Self { file: file.into(), name: None })
            }
            // NFS and old overlays know no such files. `trust init` points out what is left here.
            Ok(_) | Err(Errno::OPNOTSUPP | Errno::ISDIR) => Self::named(path),
            Err(error) => Err(error.into()),
        }
    }

    /// Under a name of its own: what an earlier crash has left is in nobody's way.
    fn named(path: &Path) -> io::Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = path.with_file_name(format!(".{name}.{}", uuid::Uuid::new_v4()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&name)?;
        Ok(Self { file, name: Some(name) })
    }

    /// A link, not a rename: it fails if the name is taken, so that no key is ever replaced.
    fn link(&self, path: &Path) -> io::Result<()> {
        let open = || PathBuf::from(format!("{OPEN_FILES}/{}", self.file.as_raw_fd()));
        let from = self.name.clone().unwrap_or_else(open);
        Ok(linkat(CWD, &from, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
    }

    fn remove(self) -> Result<(), KeyStoreError> {
        match self.name {
            Some(name) => std::fs::remove_file(&name).map_err(io("remove", &name)),
            None => Ok(()),
        }
    }
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(directory: &Path) -> Result<(), KeyStoreError> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(io("sync", directory))
}

/// Reads a key's file, after a check that nobody else could have.
pub(crate) fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, KeyStoreError> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(KeyStoreError::Missing(path.display().to_string()));
        }
        other => other.map_err(io("open", path))?,
    };
    // Of the open file, so that it is the same file that is then read.
    let metadata = file.metadata().map_err(io("look at", path))?;
    if !metadata.is_file() || metadata.len() > KEY_BYTES_MAX {
        return Err(KeyStoreError::Strange(path.to_owned()));
    }
    check_mode(path, metadata.mode(), 0o600)?;
    // The exact capacity: a vector that grows leaves copies of the key behind.
    let mut bytes = Zeroizing::new(vec![0; usize::try_from(metadata.len()).unwrap_or(0)]);
    file.read_exact(&mut bytes).map_err(io("read", path))?;
    Ok(bytes)
}

fn check_mode(path: &Path, mode: u32, wanted: u32) -> Result<(), KeyStoreError> {
    let mode = mode & 0o7777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    Err(KeyStoreError::Permissions { path: path.to_owned(), mode, wanted })
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyStoreError {
    move |source| KeyStoreError::Io { action, path: path.to_owned(), source }
}

/// File I/O off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KeyStoreError> + Send + 'static,
) -> Result<T, KeyStoreError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        let source = io::Error::other(error.to_string());
        Err(KeyStoreError::Io { action: "finish work on", path: PathBuf::from("keys"), source })
    })
}

const SELF_TEST: &[u8] = b"steadfast: a test signature, of no meaning";
const OPEN_FILES: &str = "/proc/self/fd";
/// An RSA key of 16,384 bits is below 10 KiB.
const KEY_BYTES_MAX: u64 = 64 * 1024;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn keys() -> (tempfile::TempDir, FileKeys) {
        let dir = tempfile::tempdir().unwrap();
        let keys = FileKeys::open(dir.path().join("keys/issuers")).unwrap();
        (dir, keys)
    }

    fn id() -> KeyId {
        KeyId::of_spki(b"some key")
    }

    fn bytes(text: &str) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(text.as_bytes().to_vec())
    }

    #[tokio::test]
    async fn a_key_reads_back_from_a_private_file() {
        let (_dir, keys) = keys();
        assert!(!keys.exists(id()).await.unwrap());
        keys.put_new(id(), bytes("secret")).await.unwrap();
        assert!(keys.exists(id()).await.unwrap());
        assert_eq!(*keys.load(id()).await.unwrap(), b"secret");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(&keys.path(id())), 0o600);
        assert_eq!(mode(&keys.directory), 0o700);
        // Nothing but the key is left.
        assert_eq!(std::fs::read_dir(&keys.directory).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_key_is_never_overwritten() {
        let (_dir, keys) = keys();
        keys.put_new(id(), bytes("first")).await.unwrap();
        let refused = keys.put_new(id(), bytes("second")).await;
        assert!(matches!(refused, Err(KeyStoreError::Exists(_))), "{refused:?}");
        assert_eq!(*keys.load(id()).await.unwrap(), b"first");
        assert_eq!(std::fs::read_dir(&keys.directory).unwrap().count(), 1);
    }

    #[test]
    fn a_write_that_is_cut_off_leaves_no_key_under_any_name() {
        let (_dir, keys) = keys();
        let mut draft = Draft::new(&keys.path(id())).unwrap();
        draft.file.write_all(b"secret").unwrap();
        // As a kill would: nothing more of this process runs.
        std::mem::forget(draft);
        assert_eq!(std::fs::read_dir(&keys.directory).unwrap().count(), 0);
    }

    #[test]
    fn where_every_file_has_a_name_the_key_is_the_only_one_left() {
        let (_dir, keys) = keys();
        let path = keys.path(id());
        for is_new in [true, false] {
            let mut draft = Draft::named(&path).unwrap();
            draft.file.write_all(b"secret").unwrap();
            assert_eq!(draft.link(&path).is_ok(), is_new);
            draft.remove().unwrap();
            assert_eq!(std::fs::read_dir(&keys.directory).unwrap().count(), 1);
        }
        assert_eq!(*read(&path).unwrap(), b"secret");
    }

    #[test]
    fn every_directory_that_gets_a_new_name_is_synced() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        let parents = parents_of_missing(&at("mesh/keys/anchors"));
        assert_eq!(parents, [at("mesh/keys"), at("mesh"), dir.path().to_owned()]);
        create_private_dir(&at("mesh/keys/anchors")).unwrap();
        assert!(parents_of_missing(&at("mesh/keys/anchors")).is_empty());
        let relative = parents_of_missing(Path::new("no-such-directory"));
        assert_eq!(relative, [Path::new(".")]);
    }

    #[tokio::test]
    async fn a_key_that_others_can_read_is_refused_by_its_name() {
        let (_dir, keys) = keys();
        keys.put_new(id(), bytes("secret")).await.unwrap();
        for mode in [0o640, 0o604, 0o660, 0o644] {
            std::fs::set_permissions(keys.path(id()), PermissionsExt::from_mode(mode)).unwrap();
            let error = keys.load(id()).await.unwrap_err().to_string();
            assert!(error.contains(&id().to_string()) && error.contains("chmod 600"), "{error}");
        }
        std::fs::set_permissions(&keys.directory, PermissionsExt::from_mode(0o755)).unwrap();
        let error = FileKeys::open(&keys.directory).unwrap_err().to_string();
        assert!(error.contains("0755") && error.contains("chmod 700"), "{error}");
    }

    #[tokio::test]
    async fn a_destroyed_key_is_gone_and_no_other() {
        let (_dir, keys) = keys();
        let other = KeyId::of_spki(b"another key");
        for id in [id(), other] {
            keys.put_new(id, bytes("secret")).await.unwrap();
        }
        std::fs::write(keys.directory.join("notes.txt"), "a person's").unwrap();
        std::fs::write(keys.directory.join(".draft.key"), "a crash's").unwrap();
        let mut both = vec![id(), other];
        both.sort_unstable();
        assert_eq!(keys.list().await.unwrap(), both);
        for _again in 0..2 {
            keys.destroy(id()).await.unwrap();
            assert_eq!(keys.list().await.unwrap(), [other]);
        }
        assert!(!keys.exists(id()).await.unwrap());
        assert_eq!(*keys.load(other).await.unwrap(), b"secret");
        let error = FileKeys { directory: "/no/such".into() }.destroy(id()).await.unwrap_err();
        assert!(error.to_string().contains("/no/such"), "{error}");
    }

    #[tokio::test]
    async fn a_key_that_is_made_is_kept_and_signs_again() {
        let (_dir, keys) = keys();
        let made = keys.make().await.unwrap();
        let again = keys.key(made.id()).await.unwrap();
        assert_eq!((again.id(), again.public()), (made.id(), made.public()));
        let signature = again.sign(b"a message").unwrap();
        let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, made.public());
        public.verify(b"a message", &signature).unwrap();
        self_test(&*again).unwrap();
        assert_eq!(keys.place_of(id()), format!("keys/issuers/{}.key", id()));
        // A file that holds another key than its name says is not used.
        let (_, pkcs8) = LocalKey::generate().unwrap();
        keys.put_new(id(), pkcs8).await.unwrap();
        assert!(matches!(keys.key(id()).await, Err(KeyStoreError::Other { .. })));
    }

    #[tokio::test]
    async fn a_missing_key_is_named() {
        let (_dir, keys) = keys();
        let error = keys.load(id()).await.unwrap_err();
        assert!(matches!(&error, KeyStoreError::Missing(path) if path.contains(&id().to_string())));
    }

    #[tokio::test]
    async fn a_directory_in_place_of_a_key_is_no_key() {
        let (_dir, keys) = keys();
        std::fs::create_dir(keys.path(id())).unwrap();
        assert!(matches!(keys.load(id()).await, Err(KeyStoreError::Strange(_))));
    }
}
