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

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use steadfast_api::UnixTime;
use steadfast_platform::Entry;
use steadfast_platform::store::{
    ANCHOR_KEYS_PREFIX, EVIDENCE_INDEX_KEY, EVIDENCE_PREFIX, FINDINGS_KEY, ISSUER_REQUESTS_PREFIX,
    LEADER_KEY, LEDGER_KEY, TRUST_DOMAIN_KEY,
};
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::Halt;

use super::trust::TrustError;
use crate::mesh::Mesh;
use crate::output::Format;
use crate::problem::Problem;
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
    mesh: Mesh,
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
        "the store has a trust domain (seq {seq}): --from is for a store that has none; \
         without it, `steadfast trust recover` heals the one that is there"
    )]
    NotEmpty { seq: u64 },
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
    /// Each a [`Content`]; in a backup of the first format, the JSON itself.
    entries: BTreeMap<String, Value>,
}

/// What the store has under a key.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Content {
    /// Bytes that are no text: a piece of evidence may end within a character.
    Base64(String),
    /// One value, which means the same however it is written.
    Json(Value),
    /// What counts to the byte, since its digest is kept elsewhere.
    Text(String),
}

pub(super) async fn run(args: &BackupArgs) -> Result<(), Problem> {
    let mesh = &args.mesh;
    let listed = mesh.store().await?.list(PREFIX).await;
    let (entries, revision) = listed.map_err(|error| mesh.explain(error))?;
    let domain = entries.iter().find(|entry| entry.key == TRUST_DOMAIN_KEY);
    let domain =
        domain.ok_or_else(|| TrustError::from(TrustDomainError::NoTrustDomain(mesh.founding())))?;
    let state: TrustDomainState =
        serde_json::from_slice(&domain.value).map_err(TrustError::from)?;
    let backup = Backup {
        format: FORMAT.to_owned(),
        taken_at: SystemClock.now(),
        revision: revision.0,
        entries: copied(&entries).map_err(TrustError::State)?,
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

/// What is worth keeping: not who leads, nor what is asked and found at this moment.
fn copied(entries: &[Entry]) -> Result<BTreeMap<String, Value>, serde_json::Error> {
    let wanted = |entry: &&Entry| {
        ![FINDINGS_KEY, LEADER_KEY].contains(&entry.key.as_str())
            && !entry.key.starts_with(ISSUER_REQUESTS_PREFIX)
    };
    let content = |entry: &Entry| {
        Ok((entry.key.clone(), serde_json::to_value(Content::of(&entry.key, &entry.value))?))
    };
    entries.iter().filter(wanted).map(content).collect()
}

impl Content {
    fn of(key: &str, bytes: &[u8]) -> Self {
        let verbatim = || match std::str::from_utf8(bytes) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Base64(STANDARD.encode(bytes)),
        };
        // A piece of evidence may look like one value, and is none.
        match serde_json::from_slice(bytes) {
            Ok(value) if !key.starts_with(EVIDENCE_PREFIX) => Self::Json(value),
            _ => verbatim(),
        }
    }

    fn bytes(self) -> Result<Bytes, String> {
        match self {
            Self::Base64(text) => {
                STANDARD.decode(text).map(Bytes::from).map_err(|error| error.to_string())
            }
            Self::Json(value) => {
                serde_json::to_vec(&value).map(Bytes::from).map_err(|error| error.to_string())
            }
            Self::Text(text) => Ok(text.into()),
        }
    }
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
pub(super) fn read(path: &Path) -> Result<(TrustDomainState, Vec<(String, Bytes)>), TrustError> {
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|error| BackupError::Read(path.to_owned(), error))?;
    let form = |why: String| BackupError::Form { file: path.to_owned(), why };
    let backup: Backup = serde_json::from_str(&text).map_err(|error| form(error.to_string()))?;
    let content: fn(Value) -> Result<Content, serde_json::Error> = match backup.format.as_str() {
        FORMAT => serde_json::from_value,
        FORMAT_BEFORE => |value| Ok(Content::Json(value)),
        other => {
            return Err(form(format!("its format is {other:?}, not {FORMAT:?}")).into());
        }
    };
    let (mut domain, mut others) = (None, Vec::new());
    for (key, value) in backup.entries {
        let bytes = content(value).map_err(|error| error.to_string()).and_then(Content::bytes);
        let bytes = bytes.map_err(|why| form(format!("{key}: {why}")))?;
        if key == TRUST_DOMAIN_KEY {
            domain = Some(bytes);
        } else if is_put_back(&key) {
            others.push((key, bytes));
        }
    }
    let domain = domain.ok_or_else(|| form(format!("it has no {TRUST_DOMAIN_KEY}")))?;
    let mut state: TrustDomainState =
        serde_json::from_slice(&domain).map_err(|error| form(error.to_string()))?;
    state.halted = Some(Halt::Restored { seen_seq: state.seq });
    Ok((state, others))
}

/// What stays true, however old it is: which key was made for what, what phases were left on, and
/// who was there. Pods that have gone since are waited for until nothing of them can be valid, as
/// any that vanish; without the ledger one that still runs, cut off, would be forgotten.
fn is_put_back(key: &str) -> bool {
    let ledger = key
        .strip_prefix(LEDGER_KEY)
        .is_some_and(|piece| piece.starts_with('/') && piece != "/seen");
    ledger
        || key == EVIDENCE_INDEX_KEY
        || key.starts_with(EVIDENCE_PREFIX)
        || key.starts_with(ANCHOR_KEYS_PREFIX)
}

/// Puts it into a store that has no trust domain.
pub(super) async fn put_back(
    mesh: &Mesh,
    state: &TrustDomainState,
    others: Vec<(String, Bytes)>,
) -> Result<(), TrustError> {
    let (store, explain) = (mesh.store().await?, |error| mesh.explain(error));
    for (key, value) in others {
        if store.get(&key).await.map_err(explain)?.is_none() {
            store.compare_and_swap(&key, None, Some(value)).await.map_err(explain)?;
        }
    }
    // Last: with it, everything is there.
    let value = serde_json::to_vec(state)?.into();
    store.compare_and_swap(TRUST_DOMAIN_KEY, None, Some(value)).await.map_err(explain)?;
    Ok(())
}

const PREFIX: &str = "trust/";
const FORMAT: &str = "steadfast trust backup 2";
/// In which every value was JSON.
const FORMAT_BEFORE: &str = "steadfast trust backup 1";

#[cfg(test)]
mod tests {
    use steadfast_rotation_protocol::evidence::PIECE_BYTES_MAX;

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

    fn entry(key: &str, value: impl Into<Bytes>) -> Entry {
        Entry {
            key: key.to_owned(),
            value: value.into(),
            revision: steadfast_platform::Revision(1),
        }
    }

    fn domain() -> Entry {
        let now = UnixTime::from_secs(1_800_000_000);
        let founding = steadfast_identity::authority::found(&"m".parse().unwrap(), now).unwrap();
        entry(TRUST_DOMAIN_KEY, serde_json::to_vec(&founding.state).unwrap())
    }

    fn file(dir: &Path, format: &str, entries: BTreeMap<String, Value>) -> PathBuf {
        let (path, taken_at) = (dir.join("backup.json"), UnixTime::default());
        let backup = Backup { format: format.to_owned(), taken_at, revision: 1, entries };
        std::fs::write(&path, serde_json::to_string(&backup).unwrap()).unwrap();
        path
    }

    #[test]
    fn evidence_comes_back_to_the_byte_and_with_it_what_stays_true() {
        let dir = tempfile::tempdir().unwrap();
        // A head, and a witness in a piece of its own; a reason that is cut within a character.
        let long = "ü".repeat(PIECE_BYTES_MAX);
        let (cut, rest) = long.as_bytes().split_at(PIECE_BYTES_MAX - 1);
        let place = |piece: u8| format!("{EVIDENCE_PREFIX}1/1/abc/{piece}");
        let kept = [
            entry(&format!("{ANCHOR_KEYS_PREFIX}1-1"), "\"id\""),
            entry(EVIDENCE_INDEX_KEY, "[]"),
            entry(&place(0), "{\"rotation\":1}\n{\"name\":\"web\"}\n"),
            entry(&place(1), "{\"name\":\"api\",\"instance\":1}\n"),
            entry(&place(2), Bytes::copy_from_slice(cut)),
            entry(&place(3), Bytes::copy_from_slice(rest)),
            entry(&format!("{LEDGER_KEY}/7"), "{\"uid\":{\"ended\":true}}"),
        ];
        let passing = [
            entry(FINDINGS_KEY, "{}"),
            entry(LEADER_KEY, "{}"),
            entry(&format!("{ISSUER_REQUESTS_PREFIX}9"), "{}"),
        ];
        let all = [&kept[..], &passing[..], &[domain()]].concat();
        let (state, others) = read(&file(dir.path(), FORMAT, copied(&all).unwrap())).unwrap();
        assert!(state.halted.is_some());
        let kept: Vec<_> = kept.into_iter().map(|entry| (entry.key, entry.value)).collect();
        assert_eq!(others, kept);
    }

    #[test]
    fn a_backup_of_the_format_before_is_still_read() {
        let dir = tempfile::tempdir().unwrap();
        let made_for = format!("{ANCHOR_KEYS_PREFIX}1-1");
        let all = [entry(&made_for, "\"id\""), entry(LEADER_KEY, "{}"), domain()];
        let json = |entry: Entry| (entry.key, serde_json::from_slice(&entry.value).unwrap());
        let entries = all.into_iter().map(json).collect();
        let (_, others) = read(&file(dir.path(), FORMAT_BEFORE, entries)).unwrap();
        assert_eq!(others, [(made_for, Bytes::from("\"id\""))]);
    }
}
