//! The issuance log: what was signed, for whom, with which key; JSON lines, appended only.
//!
//! Each SVID has two lines under its serial number. The *intent* has everything and is in the file
//! before there is a signature, so nothing can be handed out that is not in the log; *issued* (or
//! *failed*) says what became of it and follows within moments. One thread writes, and lines that
//! wait together are written together. The file is synced at least once a second while lines are
//! unsynced, and when it is rotated or closed: if the process dies no intent is lost, and a power
//! cut loses at most the last second. A write that fails is cut off again, so that a full disk
//! leaves no half line, and is tried until it works.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;
use steadfast_api::{KeyId, UnixTime};
use tokio::sync::{oneshot, watch};

/// One line. Field names are read by people and tools: they only ever get more.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Record<'a> {
    /// Nothing was handed out under this serial number.
    Failed {
        /// When.
        at: String,
        /// Of the intent.
        serial: String,
        /// Whom it was for.
        spiffe_id: &'a str,
        /// Why.
        reason: String,
    },
    /// About to be signed: stands in the file before the signature exists.
    Intent {
        /// When.
        at: String,
        /// The serial number.
        serial: String,
        /// Everything else about it.
        #[serde(flatten)]
        facts: &'a Facts<'a>,
    },
    /// Signed, checked and handed out.
    Issued {
        /// When.
        at: String,
        /// Of the intent.
        serial: String,
        /// Whom it is for.
        spiffe_id: &'a str,
    },
    /// The log could not be written and can be again.
    Recovered {
        /// When.
        at: String,
    },
}

/// Whom an SVID is for and what it hangs from.
#[derive(Clone, Debug, Serialize)]
pub struct Facts<'a> {
    /// Its one URI SAN.
    pub spiffe_id: &'a str,
    /// The namespace of the pod.
    pub namespace: &'a str,
    /// The pod.
    pub pod: &'a str,
    /// Its UID.
    pub pod_uid: &'a str,
    /// The node it runs on, where known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<&'a str>,
    /// The id of the token that was shown.
    pub token_id: &'a str,
    /// SHA-256 of the workload's SPKI.
    pub key_id: KeyId,
    /// SHA-256 of the issuer's SPKI.
    pub issuer_id: KeyId,
    /// From when it is valid.
    pub not_before: String,
    /// Until when.
    pub not_after: String,
}

/// Where the log is and how it is rotated.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// The directory; `issuance.jsonl` in it.
    pub directory: PathBuf,
    /// A file that is this long is rotated.
    pub file_bytes_max: u64,
    /// How many rotated files are kept beside the current one.
    pub files_kept: usize,
}

/// Why a line is not in the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// The writer has ended.
    #[error("the issuance log is closed")]
    Closed,
    /// More lines wait than the disk takes.
    #[error("the issuance log is behind: {QUEUE_LINES_MAX} lines wait to be written")]
    Full,
    /// The line was not written in time; whether it will be is unknown.
    #[error("the issuance log was not written within {WRITE_TIMEOUT:?}")]
    Slow,
    /// The file could not be opened or written.
    #[error("the issuance log {path} cannot be written: {reason}")]
    Unwritable {
        /// Which file.
        path: String,
        /// What the system says.
        reason: String,
    },
}

/// A handle to the log. Cheap to clone; the writer ends when the last is dropped.
#[derive(Clone)]
pub struct IssuanceLog {
    queue: SyncSender<Pending>,
    health: watch::Receiver<Result<(), LogError>>,
}

/// The thread that writes. Joining it after the last handle is gone waits for the last sync.
pub struct Writer(JoinHandle<()>);

struct Pending {
    line: Vec<u8>,
    /// Whoever waits for it.
    written: Option<oneshot::Sender<Result<(), LogError>>>,
}

impl IssuanceLog {
    /// Opens the log, or goes on with the one that is there, and starts its writer. `now` is the
    /// wall clock.
    ///
    /// # Errors
    /// A file that cannot be opened or a thread that cannot be started.
    pub fn open(
        config: LogConfig,
        now: impl Fn() -> UnixTime + Send + 'static,
    ) -> Result<(Self, Writer), LogError> {
        let file = LogFile::open(config)?;
        let path = file.path();
        let (queue, lines) = sync_channel(QUEUE_LINES_MAX);
        let (health, healthy) = watch::channel(Ok(()));
        let thread = std::thread::Builder::new()
            .name("issuance-log".to_owned())
            .spawn(move || write_lines(file, &lines, &health, now))
            .map_err(|error| unwritable(&path, &error))?;
        Ok((Self { queue, health: healthy }, Writer(thread)))
    }

    /// Appends a line and waits until it is in the file.
    ///
    /// # Errors
    /// Any [`LogError`]: then nothing may be handed out.
    pub async fn append(&self, record: &Record<'_>) -> Result<(), LogError> {
        let (written, outcome) = oneshot::channel();
        self.send(record, Some(written))?;
        match tokio::time::timeout(WRITE_TIMEOUT, outcome).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(LogError::Closed),
            Err(_) => Err(LogError::Slow),
        }
    }

    /// Appends a line that follows another, and waits for nothing.
    ///
    /// # Errors
    /// A queue that is full or closed.
    pub fn note(&self, record: &Record<'_>) -> Result<(), LogError> {
        self.send(record, None)
    }

    fn send(
        &self,
        record: &Record<'_>,
        written: Option<oneshot::Sender<Result<(), LogError>>>,
    ) -> Result<(), LogError> {
        let mut line = Vec::with_capacity(LINE_BYTES_USUAL);
        // Strings alone: serialising them cannot fail.
        if serde_json::to_writer(&mut line, record).is_err() {
            return Err(LogError::Closed);
        }
        line.push(b'\n');
        self.queue.try_send(Pending { line, written }).map_err(|error| match error {
            TrySendError::Disconnected(_) => LogError::Closed,
            TrySendError::Full(_) => LogError::Full,
        })
    }

    /// Whether the last write worked; changes when that does.
    pub fn health(&self) -> watch::Receiver<Result<(), LogError>> {
        self.health.clone()
    }
}

impl Writer {
    /// Waits for the last sync. The last handle must be gone, or this waits for ever.
    pub fn join(self) {
        // A writer that panicked has said so on standard error, and has nothing left to sync.
        let _ = self.0.join();
    }
}

/// The writer: until every handle is gone.
fn write_lines(
    mut file: LogFile,
    lines: &Receiver<Pending>,
    health: &watch::Sender<Result<(), LogError>>,
    now: impl Fn() -> UnixTime,
) {
    let mut batch = Vec::with_capacity(BATCH_LINES_MAX);
    let mut bytes = Vec::new();
    loop {
        match lines.recv_timeout(SYNC_EVERY) {
            Ok(first) => batch.push(first),
            Err(RecvTimeoutError::Timeout) => {
                let failed = health.borrow().is_err();
                let outcome = if failed { probe(&mut file, &now) } else { file.tend() };
                tell(health, outcome);
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
        batch.extend(lines.try_iter().take(BATCH_LINES_MAX - 1));
        bytes.clear();
        batch.iter().for_each(|pending| bytes.extend_from_slice(&pending.line));
        let outcome = file.append(&bytes);
        tell(health, outcome.clone());
        for written in batch.drain(..).filter_map(|pending| pending.written) {
            // Whoever stopped waiting was told so; the line is there all the same.
            let _ = written.send(outcome.clone());
        }
        // Under load nothing ever times out: the file's own clock says when a sync is due.
        tell(health, outcome.and_then(|()| file.tend()));
    }
    if let Err(error) = file.sync() {
        tracing::error!(%error, "the issuance log was not synced at its end");
    }
}

/// A log that could not be written gets a line of its own every second until one is: nobody may
/// ask for an SVID any more, since this replica is not ready.
fn probe(file: &mut LogFile, now: &impl Fn() -> UnixTime) -> Result<(), LogError> {
    let record = Record::Recovered { at: now().to_string() };
    let mut line = serde_json::to_vec(&record).unwrap_or_default();
    line.push(b'\n');
    file.append(&line)
}

fn tell(health: &watch::Sender<Result<(), LogError>>, outcome: Result<(), LogError>) {
    health.send_if_modified(|known| {
        let changed = *known != outcome;
        match (&outcome, changed) {
            (Err(error), true) => tracing::error!(
                code = %steadfast_api::Code::LOG_UNWRITABLE, %error,
                "nothing is issued until the issuance log can be written"
            ),
            (Ok(()), true) => tracing::info!("the issuance log can be written again"),
            _ => {}
        }
        *known = outcome;
        changed
    });
}

/// The file, its length up to the last whole line, and what is not synced yet.
struct LogFile {
    config: LogConfig,
    open: Option<Open>,
}

struct Open {
    file: File,
    inode: u64,
    bytes: u64,
    unsynced_since: Option<Duration>,
}

impl LogFile {
    fn open(config: LogConfig) -> Result<Self, LogError> {
        let mut log = Self { config, open: None };
        log.reopen()?;
        Ok(log)
    }

    fn path(&self) -> PathBuf {
        self.config.directory.join(FILE_NAME)
    }

    fn reopen(&mut self) -> Result<&mut Open, LogError> {
        let path = self.path();
        let opened = Open::new(&path).map_err(|error| unwritable(&path, &error))?;
        Ok(self.open.insert(opened))
    }

    /// Writes whole lines, or nothing.
    fn append(&mut self, lines: &[u8]) -> Result<(), LogError> {
        if self.open.as_ref().is_some_and(|open| open.bytes >= self.config.file_bytes_max) {
            self.rotate()?;
        }
        let path = self.path();
        if self.open.is_none() {
            self.reopen()?;
        }
        let Some(open) = &mut self.open else { return Err(LogError::Closed) };
        if let Err(error) = open.file.write_all(lines) {
            // What was written of it is cut off; if even that fails, the file is opened anew and a
            // line end put after the torn line.
            if open.file.set_len(open.bytes).is_err() {
                self.open = None;
            }
            return Err(unwritable(&path, &error));
        }
        open.bytes += lines.len() as u64;
        open.unsynced_since.get_or_insert_with(since_boot);
        Ok(())
    }

    /// Syncs when that is due, and opens the file anew if somebody took it away.
    fn tend(&mut self) -> Result<(), LogError> {
        let due = self.open.as_ref().and_then(|open| open.unsynced_since);
        let Some(since) = due else { return Ok(()) };
        if since_boot().saturating_sub(since) < SYNC_EVERY {
            return Ok(());
        }
        self.sync()?;
        let inode = std::fs::metadata(self.path()).map(|metadata| metadata.ino()).ok();
        if self.open.as_ref().map(|open| open.inode) != inode {
            self.reopen()?;
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), LogError> {
        let path = self.path();
        let Some(open) = &mut self.open else { return Ok(()) };
        if open.unsynced_since.is_some() {
            open.file.sync_data().map_err(|error| unwritable(&path, &error))?;
            open.unsynced_since = None;
        }
        Ok(())
    }

    /// Begins a new file, and keeps the one before under a number.
    fn rotate(&mut self) -> Result<(), LogError> {
        self.sync()?;
        let path = self.path();
        let kept = shift_up(&path, self.config.files_kept, |from, to| std::fs::rename(from, to));
        kept.map_err(|error| unwritable(&path, &error))?;
        self.reopen()?;
        Ok(())
    }
}

/// `issuance.jsonl` becomes `issuance.jsonl.1`, that becomes `.2`, and the oldest is overwritten. A
/// number that is free ends the shift: what failed halfway leaves one, and goes on there instead of
/// pushing out one more file with each try.
fn shift_up(
    path: &Path,
    files_kept: usize,
    rename: impl Fn(&Path, &Path) -> io::Result<()>,
) -> io::Result<()> {
    if files_kept == 0 {
        return std::fs::remove_file(path);
    }
    let numbered = |number: usize| {
        if number == 0 { path.to_owned() } else { with_number(path, number) }
    };
    let free = (1..files_kept).find(|number| !numbered(*number).exists());
    for number in (0..free.unwrap_or(files_kept)).rev() {
        match rename(&numbered(number), &numbered(number + 1)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

impl Open {
    fn new(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).append(true).mode(0o600);
        let mut file = match options.open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = options.create(true).open(path)?;
                // Else a power cut could take the file away with its synced lines.
                File::open(path.parent().unwrap_or(path))?.sync_all()?;
                file
            }
            opened => opened?,
        };
        let metadata = file.metadata()?;
        let mut bytes = metadata.len();
        if bytes > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
            // A power cut tore the last line: what follows begins on a line of its own.
            if last != *b"\n" {
                file.write_all(b"\n")?;
                bytes += 1;
            }
        }
        Ok(Self { file, inode: metadata.ino(), bytes, unsynced_since: None })
    }
}

fn with_number(path: &Path, number: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

fn unwritable(path: &Path, error: &io::Error) -> LogError {
    LogError::Unwritable { path: path.display().to_string(), reason: error.to_string() }
}

/// The writer is a thread of its own without a runtime: it asks the machine's clock itself.
fn since_boot() -> Duration {
    steadfast_process::Clock::since_boot(&steadfast_process::SystemClock)
}

/// The current file.
pub const FILE_NAME: &str = "issuance.jsonl";
/// Some seconds' worth at full speed; more than that, and new requests are refused instead.
const QUEUE_LINES_MAX: usize = 8192;
const BATCH_LINES_MAX: usize = 1024;
const LINE_BYTES_USUAL: usize = 768;
/// What a power cut can lose.
const SYNC_EVERY: Duration = Duration::from_secs(1);
/// A disk that takes longer has failed, as far as whoever waits is concerned.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn config(directory: &Path) -> LogConfig {
        LogConfig { directory: directory.to_owned(), file_bytes_max: 200, files_kept: 2 }
    }

    fn open(directory: &Path) -> (IssuanceLog, Writer) {
        IssuanceLog::open(config(directory), || UnixTime::from_secs(0)).unwrap()
    }

    fn failed(serial: usize) -> Record<'static> {
        let serial = serial.to_string();
        Record::Failed { at: "t".into(), serial, spiffe_id: "s", reason: "r".into() }
    }

    fn serials(path: &Path) -> Vec<usize> {
        let text = std::fs::read_to_string(path).unwrap();
        let line = |line: &str| {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            value["serial"].as_str().unwrap().parse().unwrap()
        };
        text.lines().map(line).collect()
    }

    #[tokio::test]
    async fn a_line_is_in_the_file_when_append_returns() {
        let dir = tempfile::tempdir().unwrap();
        let (log, _writer) = open(dir.path());
        for serial in 0..3 {
            log.append(&failed(serial)).await.unwrap();
            assert_eq!(serials(&dir.path().join(FILE_NAME)).last(), Some(&serial));
        }
        let mode = std::fs::metadata(dir.path().join(FILE_NAME)).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o600);
    }

    #[tokio::test]
    async fn files_are_rotated_by_size_and_only_so_many_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (log, _writer) = open(dir.path());
        for serial in 0..40 {
            log.append(&failed(serial)).await.unwrap();
        }
        let path = dir.path().join(FILE_NAME);
        let mut kept = serials(&with_number(&path, 2));
        kept.extend(serials(&with_number(&path, 1)));
        kept.extend(serials(&path));
        assert_eq!(*kept.last().unwrap(), 39);
        // No line is lost within what is kept, and none is torn.
        assert!(kept.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{kept:?}");
        assert!(!with_number(&path, 3).exists());
    }

    #[test]
    fn a_rotation_that_fails_again_and_again_pushes_no_kept_file_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        for (path, text) in [(with_number(&path, 2), "2"), (with_number(&path, 1), "1")] {
            std::fs::write(path, text).unwrap();
        }
        std::fs::write(&path, "now").unwrap();
        let stuck = |from: &Path, to: &Path| {
            if from == path {
                Err(io::ErrorKind::StorageFull.into())
            } else {
                std::fs::rename(from, to)
            }
        };
        for _ in 0..10 {
            assert!(shift_up(&path, 3, stuck).is_err());
        }
        shift_up(&path, 3, |from, to| std::fs::rename(from, to)).unwrap();
        let kept = |number| std::fs::read_to_string(with_number(&path, number)).unwrap();
        assert_eq!([kept(1), kept(2), kept(3)], ["now", "1", "2"]);
    }

    #[tokio::test]
    async fn a_torn_last_line_does_not_swallow_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        std::fs::write(&path, "{\"event\":\"iss").unwrap();
        let (log, _writer) = open(dir.path());
        log.append(&failed(7)).await.unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().nth(1).unwrap().contains("\"serial\":\"7\""), "{text}");
    }

    #[tokio::test]
    async fn a_full_disk_is_an_error_and_leaves_no_half_line() {
        // /dev/full takes nothing; as a directory it cannot be opened, so a link stands for the
        // file, and is then replaced by a place that takes lines again.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let (log, _writer) = open(dir.path());
        let error = log.append(&failed(1)).await.unwrap_err();
        assert!(matches!(error, LogError::Unwritable { .. }), "{error}");
        assert!(log.health().borrow().is_err());
        std::fs::remove_file(&path).unwrap();
        // Nobody appends any more: the writer itself finds out that it can write again.
        log.health().wait_for(Result::is_ok).await.unwrap();
        log.append(&failed(2)).await.unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\"event\":\"recovered\""), "{text}");
        assert_eq!(text.lines().count(), 2);
    }

    #[tokio::test]
    async fn a_log_that_somebody_moved_away_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let mut file =
            LogFile::open(LogConfig { file_bytes_max: 1 << 20, ..config(dir.path()) }).unwrap();
        file.append(b"one\n").unwrap();
        std::fs::rename(&path, dir.path().join("away")).unwrap();
        // As if the second were over.
        file.open.as_mut().unwrap().unsynced_since = Some(Duration::ZERO);
        file.tend().unwrap();
        file.append(b"two\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "two\n");
    }

    #[tokio::test]
    async fn the_last_handle_ends_the_writer() {
        let dir = tempfile::tempdir().unwrap();
        let (log, writer) = open(dir.path());
        log.append(&failed(1)).await.unwrap();
        drop(log);
        tokio::task::spawn_blocking(|| writer.join()).await.unwrap();
    }
}
