//! `steadfast trust backup`: the state of a trust domain as a file, and the way from it into an
//! empty store.
//!
//! The file holds what the store knows of trust at one moment, and no key: keys are files of their
//! own, which are backed up by other means, or not at all. It is never written over.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use steadfast_api::UnixTime;
use steadfast_platform::standalone::Client;
use steadfast_platform::store::{
    ANCHOR_KEYS_PREFIX, FINDINGS_KEY, ISSUER_REQUESTS_PREFIX, TRUST_DOMAIN_KEY,
};
use steadfast_platform::{Entry, Store as _};
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::Halt;

use super::trust::TrustError;
use crate::output::Format;
use crate::problem::Problem;
use crate::store::{self, DirArg};
use crate::trust_domain::TrustDomainError;

/// Copy the state of the trust domain into a file: anchors, issuers, rotations, never a key
///
/// What is copied is of one moment. The file is new (mode 0600; one that exists is never
/// overwritten), and private keys are not in it: without DIR/keys it brings back no mesh. After a
/// restore `steadfast trust recover` puts it together with what workloads hold by then.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast trust backup trust-$(date +%F).json --dir ./mesh
  steadfast trust recover --from trust-2026-11-21.json --dir ./mesh    into an emptied store")]
pub(super) struct BackupArgs {
    /// The file that is made
    file: PathBuf,
    #[command(flatten)]
    dir: DirArg,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// What was copied, and where to.
#[derive(Serialize)]
struct Taken<'a> {
    file: &'a Path,
    trust_domain: String,
    seq: u64,
    /// Those in the bundle.
    anchors: usize,
    taken_at: String,
}

/// Why there is no backup, or it is not put back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackupError {
    #[error("{} exists, and a backup is never overwritten: name another file", .0.display())]
    Exists(PathBuf),
    #[error("{} is no backup that this version knows: {why}", file.display())]
    Form { file: PathBuf, why: String },
    #[error(
        "the store in {} has a trust domain (seq {seq}): --from is for a store that has none; \
         without it, `steadfast trust recover` heals the one that is there",
        dir.display()
    )]
    NotEmpty { dir: PathBuf, seq: u64 },
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] std::io::Error),
}

/// The file.
#[derive(Serialize, Deserialize)]
struct Backup {
    format: String,
    taken_at: UnixTime,
    /// Of the store.
    revision: u64,
    entries: BTreeMap<String, Value>,
}

pub(super) async fn run(args: &BackupArgs) -> Result<(), Problem> {
    let dir = &args.dir.dir;
    let client = store::client(dir);
    let listed = client.list(PREFIX).await;
    let (entries, revision) = listed.map_err(|error| store::explain(dir, error))?;
    let domain = entries.iter().find(|entry| entry.key == TRUST_DOMAIN_KEY);
    let domain =
        domain.ok_or_else(|| TrustError::from(TrustDomainError::NoTrustDomain(dir.clone())))?;
    let state: TrustDomainState =
        serde_json::from_slice(&domain.value).map_err(TrustError::from)?;
    let wanted = |entry: &&Entry| {
        entry.key != FINDINGS_KEY && !entry.key.starts_with(ISSUER_REQUESTS_PREFIX)
    };
    let values = entries
        .iter()
        .filter(wanted)
        .map(|entry| Ok((entry.key.clone(), serde_json::from_slice(&entry.value)?)));
    let backup = Backup {
        format: FORMAT.to_owned(),
        taken_at: SystemClock.now(),
        revision: revision.0,
        entries: values.collect::<Result<_, _>>().map_err(TrustError::State)?,
    };
    write(&args.file, &(serde_json::to_string_pretty(&backup)? + "\n"))?;
    let taken = Taken {
        file: &args.file,
        trust_domain: state.trust_domain.to_string(),
        seq: state.seq,
        anchors: state.published().count(),
        taken_at: backup.taken_at.to_string(),
    };
    Ok(args.output.print(&taken, Taken::text)?)
}

impl Taken<'_> {
    fn text(&self) -> String {
        let Self { trust_domain, seq, anchors, .. } = self;
        format!(
            "{}: the trust domain {trust_domain} at seq {seq}, {anchors} anchors; no private key \
             is in it\n",
            self.file.display()
        )
    }
}

fn write(path: &Path, text: &str) -> Result<(), BackupError> {
    let opened = File::options().write(true).create_new(true).mode(0o600).open(path);
    let mut file = opened.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => BackupError::Exists(path.to_owned()),
        _ => BackupError::Write(path.to_owned(), error),
    })?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|error| BackupError::Write(path.to_owned(), error))
}

/// What is in the file, for a store that has no trust domain. It is halted: what workloads hold by
/// now is to be put together with it.
pub(super) fn read(path: &Path) -> Result<(TrustDomainState, Vec<(String, Value)>), TrustError> {
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|error| BackupError::Read(path.to_owned(), error))?;
    let form = |why: String| BackupError::Form { file: path.to_owned(), why };
    let backup: Backup = serde_json::from_str(&text).map_err(|error| form(error.to_string()))?;
    if backup.format != FORMAT {
        return Err(form(format!("its format is {:?}, not {FORMAT:?}", backup.format)).into());
    }
    let mut entries = backup.entries;
    let domain = entries.remove(TRUST_DOMAIN_KEY);
    let domain = domain.ok_or_else(|| form(format!("it has no {TRUST_DOMAIN_KEY}")))?;
    let mut state: TrustDomainState =
        serde_json::from_value(domain).map_err(|error| form(error.to_string()))?;
    state.halted = Some(Halt::Restored { seen_seq: state.seq });
    let kept = |key: &str| key.starts_with(ANCHOR_KEYS_PREFIX);
    Ok((state, entries.into_iter().filter(|(key, _)| kept(key)).collect()))
}

/// Puts it into a store that has no trust domain.
pub(super) async fn put_back(
    dir: &Path,
    client: &Client,
    state: &TrustDomainState,
    others: Vec<(String, Value)>,
) -> Result<(), TrustError> {
    let explain = |error| store::explain(dir, error);
    for (key, value) in others {
        if client.get(&key).await.map_err(explain)?.is_none() {
            let value = serde_json::to_vec(&value)?.into();
            client.compare_and_swap(&key, None, Some(value)).await.map_err(explain)?;
        }
    }
    // Last: with it, everything is there.
    let value = serde_json::to_vec(state)?.into();
    client.compare_and_swap(TRUST_DOMAIN_KEY, None, Some(value)).await.map_err(explain)?;
    Ok(())
}

const PREFIX: &str = "trust/";
const FORMAT: &str = "steadfast trust backup 1";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_private_and_never_overwritten() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backup.json");
        write(&path, "first").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let error = write(&path, "second").unwrap_err().to_string();
        assert!(error.contains("never overwritten"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "first");
    }

    #[test]
    fn what_is_no_backup_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backup.json");
        for text in ["", "{}", r#"{"format":"2","taken_at":0,"revision":1,"entries":{}}"#] {
            std::fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("backup.json"), "{error}");
        }
    }
}
