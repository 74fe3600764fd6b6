//! `steadfast trust init`: founds the trust domain of a standalone mesh, once.
//!
//! Keys first, then the state that names them, then the manifests of the control plane: a call
//! that is cut off leaves at worst keys that nothing names, and the next call goes on from what is
//! there. The compare-and-swap decides between two calls at once. No key is ever overwritten; the
//! only keys removed are those that this very call made and that the store then did not take.

use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use steadfast_api::spiffe::SpiffeError;
use steadfast_api::{KeyId, TrustDomain};
use steadfast_identity::authority::{AuthorityError, Founding, found};
use steadfast_platform::StoreError;
use steadfast_platform::keys::{FileKeys, KeyStoreError};
use steadfast_platform::standalone::Directory;
use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_process::{Clock as _, SystemClock, duration};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{READ_LEASE, READ_LEASE_MIN};

use crate::mesh::{Mesh, StoreProblem};

/// What a call of `init` found or made.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The trust domain as it now is.
    pub(crate) state: TrustDomainState,
    dir: PathBuf,
    founded: bool,
    manifest_written: bool,
    unnamed_keys: Vec<PathBuf>,
}

/// The same for a program.
#[derive(Debug, Serialize)]
pub(crate) struct View<'a> {
    trust_domain: &'a TrustDomain,
    /// Whether this call has made it; otherwise it was there.
    founded: bool,
    dir: &'a Path,
    anchors: Vec<AnchorView>,
    /// The active one.
    issuer: Option<IssuerView>,
    /// Whether this call has written the manifest of the control plane.
    manifest_written: bool,
    /// Keys of an interrupted call, which belong to nothing.
    unnamed_keys: &'a [PathBuf],
}

#[derive(Debug, Serialize)]
struct AnchorView {
    id: KeyId,
    state: &'static str,
}

#[derive(Debug, Serialize)]
struct IssuerView {
    id: KeyId,
    not_after: String,
}

/// Why the trust domain was not founded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    #[error("no anchors and no issuer could be made")]
    Authority(#[from] AuthorityError),
    #[error(
        "the mesh in {} has the trust domain {found} already, and a mesh has one\n  \
         Leave --trust-domain away to keep it, or use another directory for {asked}",
        dir.display()
    )]
    Different { dir: PathBuf, found: TrustDomain, asked: TrustDomain },
    #[error("a key cannot be kept")]
    Keys(#[from] KeyStoreError),
    #[error("the key of {what} {} is not in {}: put it back from a backup", id.short(), dir.display())]
    KeyGone { what: &'static str, id: KeyId, dir: PathBuf },
    #[error("cannot write {}", .0.display())]
    Manifest(PathBuf, #[source] std::io::Error),
    #[error(
        "another call has founded the trust domain meanwhile, and a key that this one made stays \
         behind: no anchor or issuer names it, so delete {}",
        .0.display()
    )]
    Stray(PathBuf, #[source] std::io::Error),
    #[error(
        "{TRUST_DOMAIN_KEY:?} in the store is no trust domain of ours (written by a newer version?)"
    )]
    State(#[from] serde_json::Error),
    #[error(transparent)]
    Store(#[from] StoreProblem),
    #[error(transparent)]
    TrustDomain(#[from] SpiffeError),
}

/// Founds the trust domain, or says what is there.
///
/// # Errors
/// What is in the way; nothing that was there has changed.
pub(crate) async fn run(
    dir: &Path,
    asked: Option<&TrustDomain>,
    read_lease: Duration,
) -> Result<Outcome, InitError> {
    let directory = Directory::new(dir);
    let mesh = Mesh::standalone(dir);
    let existing = mesh.first_get(TRUST_DOMAIN_KEY).await?;
    let (state, founded) = match existing {
        Some(entry) => (serde_json::from_slice(&entry.value)?, false),
        None => establish(&directory, &mesh, asked, read_lease).await?,
    };
    if let Some(asked) = asked.filter(|asked| **asked != state.trust_domain) {
        let (dir, asked) = (dir.to_owned(), asked.clone());
        return Err(InitError::Different { dir, found: state.trust_domain, asked });
    }
    let unnamed_keys = check_keys(&directory, &state)?;
    let manifest = directory.manifests().join(MANIFEST);
    let manifest_written = !manifest.exists();
    if manifest_written {
        write_manifest(&directory, &manifest)?;
    }
    Ok(Outcome { state, dir: dir.to_owned(), founded, manifest_written, unnamed_keys })
}

/// The value of `--read-lease`.
pub(crate) fn read_lease(text: &str) -> Result<Duration, String> {
    let lease = duration::parse(text).map_err(|error| error.to_string())?;
    let range = READ_LEASE_MIN..=READ_LEASE;
    if range.contains(&lease) { Ok(lease) } else { Err("expected 3s to 15s".to_owned()) }
}

/// Makes everything new; `false` if another call was faster, whose state it then is.
async fn establish(
    directory: &Directory,
    mesh: &Mesh,
    asked: Option<&TrustDomain>,
    read_lease: Duration,
) -> Result<(TrustDomainState, bool), InitError> {
    let trust_domain = match asked {
        Some(asked) => asked.clone(),
        None => TRUST_DOMAIN_DEFAULT.parse()?,
    };
    let Founding { mut state, active, standby, issuer } = found(&trust_domain, SystemClock.now())?;
    state.read_lease = read_lease;
    let anchor_keys = FileKeys::open(directory.anchor_keys())?;
    let issuer_keys = FileKeys::open(directory.issuer_keys())?;
    let (active_id, standby_id, issuer_id) = (active.id, standby.id, issuer.id);
    anchor_keys.put_new(active_id, active.pkcs8).await?;
    anchor_keys.put_new(standby_id, standby.pkcs8).await?;
    issuer_keys.put_new(issuer_id, issuer.pkcs8).await?;
    let value = serde_json::to_vec(&state)?.into();
    let store = mesh.store().await?;
    match store.compare_and_swap(TRUST_DOMAIN_KEY, None, Some(value)).await {
        Ok(_) => Ok((state, true)),
        Err(StoreError::Conflict { .. }) => {
            // Ours were never named by any state: an anchor key that lies about is a danger.
            discard(&directory.anchor_keys(), active_id)?;
            discard(&directory.anchor_keys(), standby_id)?;
            discard(&directory.issuer_keys(), issuer_id)?;
            let entry = store.get(TRUST_DOMAIN_KEY).await;
            let entry = entry.map_err(|error| mesh.explain(error))?;
            // Made a moment ago; nothing of ours ever deletes it.
            let bytes = entry.map(|entry| entry.value).unwrap_or_default();
            Ok((serde_json::from_slice(&bytes)?, false))
        }
        // The write may have been done although its answer is lost: the keys stay, and the next
        // call sees.
        Err(error) => Err(mesh.explain(error).into()),
    }
}

/// Removes a key that nothing names, for good: its directory is synced too.
fn discard(dir: &Path, id: KeyId) -> Result<(), InitError> {
    let path = key_file(dir, id);
    fs::remove_file(&path)
        .and_then(|()| File::open(dir)?.sync_all())
        .map_err(|error| InitError::Stray(path, error))
}

/// Every key that the state names must be there; what else is there is named: whole keys, and what
/// a call that was cut off in the middle of a write has left.
fn check_keys(directory: &Directory, state: &TrustDomainState) -> Result<Vec<PathBuf>, InitError> {
    // Others are in a token, or with their owner.
    let in_files = state.anchors.iter().filter(|anchor| anchor.key_ref.starts_with("keys/"));
    let anchors = in_files.map(|anchor| anchor.id);
    let issuers = state.issuers.iter().map(|issuer| issuer.id);
    let named: Vec<_> = anchors
        .map(|id| ("the anchor", id, directory.anchor_keys()))
        .chain(issuers.map(|id| ("the issuer", id, directory.issuer_keys())))
        .collect();
    for (what, id, dir) in &named {
        if !key_file(dir, *id).exists() {
            return Err(InitError::KeyGone { what, id: *id, dir: dir.clone() });
        }
    }
    let named: Vec<_> = named.iter().map(|(_, id, dir)| key_file(dir, *id)).collect();
    let mut unnamed = Vec::new();
    for dir in [directory.anchor_keys(), directory.issuer_keys()] {
        let files = fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path());
        unnamed.extend(files.filter(|path| !named.contains(path)));
    }
    Ok(unnamed)
}

fn key_file(dir: &Path, id: KeyId) -> PathBuf {
    dir.join(format!("{id}.key"))
}

/// Whole or not at all: the draft lies outside the watched directory.
fn write_manifest(directory: &Directory, path: &Path) -> Result<(), InitError> {
    let draft = directory.path().join(format!(".{MANIFEST}.draft"));
    let written = (|| {
        fs::create_dir_all(directory.manifests())?;
        fs::write(&draft, control_plane(ADMIN_PORTS))?;
        File::open(&draft)?.sync_all()?;
        fs::rename(&draft, path)
    })();
    written.map_err(|error| InitError::Manifest(path.to_owned(), error))
}

/// The control plane's own workloads, so that each gets its token like any other. The admin ports
/// are those of identity, control and rotation.
pub(crate) fn control_plane([identity, control, rotation]: [u16; 3]) -> String {
    let mut text =
        "# The control plane of this mesh as workloads, so that each has its identity.\n"
            .to_owned();
    for (name, admin) in [("identity", identity), ("control", control), ("rotation", rotation)] {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "---\n\
             apiVersion: v1\n\
             kind: ServiceAccount\n\
             metadata: {{name: steadfast-{name}, namespace: steadfast}}\n\
             ---\n\
             apiVersion: v1\n\
             kind: Pod\n\
             metadata:\n\
             \x20 name: steadfast-{name}-0\n\
             \x20 namespace: steadfast\n\
             \x20 labels: {{app: steadfast-{name}}}\n\
             \x20 annotations: {{config.linkerd.io/admin-port: \"{admin}\"}}\n\
             spec:\n\
             \x20 serviceAccountName: steadfast-{name}\n\
             \x20 containers: [{{name: {name}, image: steadfast-{name}}}]\n\
             status: {{podIP: 127.0.0.1, podIPs: [{{ip: 127.0.0.1}}]}}\n"
        );
    }
    text
}

impl Outcome {
    /// For a program.
    pub(crate) fn view(&self) -> View<'_> {
        let anchors = self.state.anchors.iter();
        let issuer = self.state.active_issuer();
        View {
            trust_domain: &self.state.trust_domain,
            founded: self.founded,
            dir: &self.dir,
            anchors: anchors.map(|a| AnchorView { id: a.id, state: a.state.label() }).collect(),
            issuer: issuer.map(|i| IssuerView { id: i.id, not_after: i.not_after.to_string() }),
            manifest_written: self.manifest_written,
            unnamed_keys: &self.unnamed_keys,
        }
    }

    /// In one line.
    pub(crate) fn in_short(&self) -> String {
        let anchors: Vec<_> = self.state.anchors.iter().map(|anchor| anchor.id.short()).collect();
        let issuer = self.state.active_issuer().map(|issuer| issuer.id.short());
        format!("anchors {}, issuer {}", anchors.join(" "), issuer.as_deref().unwrap_or("none"))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = &self.state;
        let verb = if self.founded { "has been founded" } else { "exists already" };
        writeln!(f, "The trust domain {} {verb} in {}", state.trust_domain, self.dir.display())?;
        for anchor in &state.anchors {
            let role = format!("{:?}", anchor.state).to_lowercase();
            writeln!(f, "  anchor    {}  {role}", anchor.id.short())?;
        }
        if let Some(issuer) = state.active_issuer() {
            writeln!(f, "  issuer    {}  active, until {}", issuer.id.short(), issuer.not_after)?;
        }
        if self.manifest_written {
            writeln!(f, "  manifest  {MANIFEST}  the control plane's own workloads")?;
        }
        for key in &self.unnamed_keys {
            writeln!(
                f,
                "  note: {} belongs to no anchor or issuer; an interrupted init left it, and it \
                 can be deleted",
                key.display()
            )?;
        }
        if !self.founded {
            return Ok(());
        }
        let dir = self.dir.display();
        writeln!(
            f,
            "\nNext:\n  steadfast-identity --dir {dir} &\n  \
             steadfast-control --dir {dir} --identity-addr 127.0.0.1:8080 &\n  \
             steadfast-rotation --dir {dir} --identity-addr 127.0.0.1:8080 &"
        )
    }
}

/// The trust domain of a mesh that was given no other name.
pub(crate) const TRUST_DOMAIN_DEFAULT: &str = "cluster.local";
/// The manifest of the control plane.
pub(crate) const MANIFEST: &str = "steadfast.yaml";

/// The admin ports that the processes use unless told otherwise.
const ADMIN_PORTS: [u16; 3] = [9990, 9992, 9991];

#[cfg(test)]
mod tests {
    use super::*;

    fn founded(dir: &Path) -> (Directory, TrustDomainState) {
        let directory = Directory::new(dir);
        let domain = "cluster.local".parse().unwrap();
        let founding = found(&domain, SystemClock.now()).unwrap();
        for keys in [directory.anchor_keys(), directory.issuer_keys()] {
            fs::create_dir_all(keys).unwrap();
        }
        for id in [founding.active.id, founding.standby.id] {
            fs::write(key_file(&directory.anchor_keys(), id), b"key").unwrap();
        }
        fs::write(key_file(&directory.issuer_keys(), founding.issuer.id), b"key").unwrap();
        (directory, founding.state)
    }

    #[test]
    fn a_missing_key_is_named_and_a_key_that_nothing_names_is_pointed_out() {
        let dir = tempfile::tempdir().unwrap();
        let (directory, state) = founded(dir.path());
        assert!(check_keys(&directory, &state).unwrap().is_empty());
        for name in ["stray.key", ".3f0c.key.5d1b7a52"] {
            let stray = directory.anchor_keys().join(name);
            fs::write(&stray, b"key").unwrap();
            assert_eq!(check_keys(&directory, &state).unwrap(), std::slice::from_ref(&stray));
            fs::remove_file(stray).unwrap();
        }
        fs::remove_file(key_file(&directory.issuer_keys(), state.active_issuer)).unwrap();
        let error = check_keys(&directory, &state).unwrap_err().to_string();
        assert!(error.contains("the issuer") && error.contains("backup"), "{error}");
    }

    #[test]
    fn a_key_that_nothing_names_is_gone_or_its_path_and_what_to_do_are_said() {
        let dir = tempfile::tempdir().unwrap();
        let id = KeyId::of_spki(b"some key");
        fs::write(key_file(dir.path(), id), b"key").unwrap();
        discard(dir.path(), id).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let error = discard(dir.path(), id).unwrap_err().to_string();
        assert!(error.contains("delete ") && error.contains(&id.to_string()), "{error}");
    }

    #[test]
    fn the_manifest_is_written_whole_and_leaves_no_draft() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path());
        let path = directory.manifests().join(MANIFEST);
        write_manifest(&directory, &path).unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), control_plane(ADMIN_PORTS));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
