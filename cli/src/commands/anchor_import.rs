//! `steadfast anchor import`: a trust anchor that somebody else's CA has made.
//!
//! The logic is elsewhere: `steadfast_identity::import` reads the certificate and says what is wrong
//! with it, the state's own `import_anchor` says whether it fits. Here are files, the store and
//! words. A key that comes along is kept before anything names it, as everywhere.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use steadfast_api::KeyId;
use steadfast_identity::import::{self, ImportError};
use steadfast_platform::keys::{KeyStoreError, TakesKeys, Zeroizing};
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::import::ImportRefused;
use steadfast_rotation_protocol::trust_domain::AnchorRecord;

use crate::mesh::{KeysProblem, Mesh};
use crate::output::Format;
use crate::problem::Problem;
use crate::trust_domain::{self, TrustDomainError, change_at};

/// Bring a trust anchor of your own CA (openssl, Vault, cert-manager, an HSM)
///
/// FILE is one root certificate in PEM. Nothing changes for any workload yet: the anchor waits,
/// unpublished, until a rotation is ordered with it, which adds it to the bundle, moves every
/// workload to it and removes the old one, under traffic.
///
/// Its key stays where it is. Only your CA can then sign issuers under it: `steadfast issuer
/// request` prints what to sign, `steadfast issuer import` takes the answer. With --key the key is
/// copied into the mesh's own store, and the controller signs issuers by itself.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast anchor import root.pem --dir ./mesh
  steadfast issuer request --dir ./mesh > issuer.csr     then sign it with your CA
  steadfast issuer import issuer.pem --dir ./mesh
  steadfast anchor import root.pem --key root.key --dir ./mesh

A root of your own, for a try:
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \\
    -keyout root.key -out root.pem -subj '/O=Example/CN=Root' \\
    -addext basicConstraints=critical,CA:true -addext keyUsage=critical,keyCertSign,cRLSign")]
pub(crate) struct ImportArgs {
    #[command(flatten)]
    mesh: Mesh,
    /// The root certificate, PEM: ECDSA on P-256, P-384 or P-521, RSA of 2048 bits or more, Ed25519
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Its private key, PKCS#8 in PEM, mode 0600: ECDSA on P-256 or P-384, or RSA
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// Why nothing was imported.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportProblem {
    #[error("{}: {problem}", file.display())]
    File { file: PathBuf, problem: ImportError },
    #[error("{} has mode {mode:04o}, so others than you could have read the key: make a new one, or `chmod 600 {}` if you know that nobody has", file.display(), file.display())]
    KeyMode { file: PathBuf, mode: u32 },
    #[error("the key cannot be kept")]
    Keys(#[from] KeyStoreError),
    #[error(transparent)]
    Place(#[from] KeysProblem),
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    #[error("{}: {refused}", file.display())]
    Refused { file: PathBuf, refused: ImportRefused },
    #[error(transparent)]
    TrustDomain(#[from] TrustDomainError),
}

/// What was imported.
#[derive(Serialize)]
struct Imported {
    id: KeyId,
    key: String,
    external: bool,
    not_after: String,
}

/// Imports what the files hold.
///
/// # Errors
/// What is wrong with which file, or what is in the way; nothing has changed then.
pub(crate) async fn import(args: ImportArgs) -> Result<(), Problem> {
    let anchor = import_files(&args.mesh, &args.file, args.key.as_deref()).await?;
    let imported = Imported {
        id: anchor.id,
        external: anchor.is_external(),
        not_after: anchor.not_after.to_string(),
        key: anchor.key_ref,
    };
    args.output.print(&imported, |imported| imported.text(&args.mesh))?;
    Ok(())
}

async fn import_files(
    mesh: &Mesh,
    file: &Path,
    key: Option<&Path>,
) -> Result<AnchorRecord, ImportProblem> {
    let of_file = |file: &Path| {
        let file = file.to_owned();
        move |problem| ImportProblem::File { file, problem }
    };
    let pem = read(file)?;
    let state = trust_domain::read(mesh).await?;
    let mut anchor = parsed(&state, file, &pem)?;
    // Before anything is kept: a key that was put there for nothing is a danger.
    let refused = |refused| ImportProblem::Refused { file: file.to_owned(), refused };
    state.clone().import_anchor(anchor.clone()).map_err(refused)?;
    let mut kept = None;
    if let Some(key_file) = key {
        let pkcs8 = import::anchor_key(anchor.id, &Zeroizing::new(read_key(key_file)?));
        let pkcs8 = pkcs8.map_err(of_file(key_file))?;
        let keys = mesh.anchor_keys().await?;
        let made = keep(&*keys, anchor.id, pkcs8).await?;
        anchor.key_ref = keys.place_of(anchor.id);
        kept = made.then_some(keys);
    }
    let mut named = false;
    let added = change_at(mesh, |state, _| {
        named = state.anchor(anchor.id).is_some();
        state.import_anchor(anchor.clone()).map_err(refused)
    })
    .await;
    if let (Err(ImportProblem::Refused { .. }), Some(keys), false) = (&added, kept, named) {
        // Nothing names it. Had the store's answer been lost, the state might.
        keys.destroy(anchor.id).await?;
    }
    added.map(|_| anchor)
}

/// Keeps a key; `false`: this very key was kept already, by an import that was cut off before the
/// state named it. Nobody else destroys what no state names.
async fn keep(
    keys: &dyn TakesKeys,
    id: KeyId,
    pkcs8: Zeroizing<Vec<u8>>,
) -> Result<bool, KeyStoreError> {
    match keys.take(id, pkcs8).await {
        Ok(()) => Ok(true),
        // By its id there can be no other, unless it is broken.
        Err(error @ KeyStoreError::Exists(_)) => match keys.key(id).await {
            Ok(kept) if kept.id() == id => Ok(false),
            _ => Err(error),
        },
        Err(error) => Err(error),
    }
}

/// The anchor of a file, whatever the state knows of it.
///
/// # Errors
/// What is wrong with the file.
pub(crate) fn parsed(
    state: &TrustDomainState,
    file: &Path,
    pem: &[u8],
) -> Result<AnchorRecord, ImportProblem> {
    let anchor = import::anchor(&state.trust_domain, pem, SystemClock.now());
    anchor.map_err(|problem| ImportProblem::File { file: file.to_owned(), problem })
}

/// Forgets one that was imported and never published.
///
/// # Errors
/// It is not there, or in use.
pub(crate) async fn forget(mesh: &Mesh, id: KeyId) -> Result<(), ImportProblem> {
    change_at(mesh, |state, _| {
        let refused = |refused| ImportProblem::Refused { file: id.to_string().into(), refused };
        state.forget_anchor(id).map_err(refused)
    })
    .await
    .map(drop)
}

impl Imported {
    fn text(&self, mesh: &Mesh) -> String {
        let (id, short) = (self.id, self.id.short());
        let mut text = format!(
            "The anchor {short} is imported; no workload trusts it yet\n  id   {id}\n  ends {}\n  key  {}\n\nNext:\n",
            self.not_after, self.key
        );
        if self.external {
            text.push_str(&format!(
                "  steadfast issuer request --anchor {short}{mesh} > issuer.csr\n  \
                 # sign it with your CA, then\n  \
                 steadfast issuer import issuer.pem{mesh}\n"
            ));
        }
        text + &format!("  steadfast anchor rotate --anchor {short}{mesh}\n")
    }
}

/// A file that a person names; one that is larger than is ever read is cut, and then refused.
pub(crate) fn read(file: &Path) -> Result<Vec<u8>, ImportProblem> {
    let failed = |error| ImportProblem::Read(file.to_owned(), error);
    let mut bytes = Vec::new();
    File::open(file).and_then(|f| f.take(BYTES_MAX).read_to_end(&mut bytes)).map_err(failed)?;
    Ok(bytes)
}

fn read_key(file: &Path) -> Result<Vec<u8>, ImportProblem> {
    let failed = |error| ImportProblem::Read(file.to_owned(), error);
    let mode = std::fs::metadata(file).map_err(failed)?.mode() & 0o7777;
    match mode & 0o077 {
        0 => read(file),
        _ => Err(ImportProblem::KeyMode { file: file.to_owned(), mode }),
    }
}

const BYTES_MAX: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use steadfast_platform::keys::{FileKeys, LocalKey, PrivateKey as _};

    use super::*;

    #[tokio::test]
    async fn a_key_that_an_import_before_has_kept_is_no_obstacle_and_another_is() {
        let dir = tempfile::tempdir().unwrap();
        let keys = FileKeys::open(dir.path().join("keys")).unwrap();
        let (key, pkcs8) = LocalKey::generate().unwrap();
        assert!(keep(&keys, key.id(), pkcs8.clone()).await.unwrap());
        assert!(!keep(&keys, key.id(), pkcs8).await.unwrap());
        let broken = KeyId::of_spki(b"anchor");
        let bytes = || Zeroizing::new(b"no key".to_vec());
        assert!(keep(&keys, broken, bytes()).await.unwrap());
        let error = keep(&keys, broken, bytes()).await.unwrap_err();
        assert!(matches!(error, KeyStoreError::Exists(_)), "{error}");
    }
}
