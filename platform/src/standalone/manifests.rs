//! The watched manifests: what is in DIR/manifests is what the store holds.
//!
//! A watch on the folder makes changes quick, and a poll beside it makes them sure: nothing
//! depends on the watch, which can lose events or die. A file that cannot be used keeps its last
//! good version in force, whole, and is said once, with file, line, column and reason.

mod desired;
mod files;
mod folder;
mod parse;

use std::convert::Infallible;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher as _};
use steadfast_api::Code;
use steadfast_process::readiness::Component;
use steadfast_process::{Clock, Drain};
use tokio::sync::{mpsc, watch};

use self::desired::RECORDS_PREFIX;
use self::files::{Files, Outcome, Read, Status};
use self::folder::{Change, Folder, Look};
use self::parse::Invalid;
use super::directory::Directory;
use super::engine::Engine;
use super::metrics::{FileLabels, Metrics};
use crate::store::RESOURCES_PREFIX;

/// Keeps the store as the manifests say. A service of the process.
pub struct Manifests {
    engine: Engine,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    ready: Component,
    path: PathBuf,
    folder: Option<Folder>,
    files: Files,
    /// What was read is in the store.
    written: bool,
    status: watch::Sender<Arc<Vec<Status>>>,
}

/// What is in force, for `/manifests.json`. Cheap to clone.
#[derive(Clone)]
pub struct Report(watch::Receiver<Arc<Vec<Status>>>);

impl Report {
    /// Every file: whether its last version is in force, and if not, why and since when.
    pub fn to_json(&self) -> String {
        // Numbers and strings alone: serialising them cannot fail.
        serde_json::to_string_pretty(&**self.0.borrow()).unwrap_or_default() + "\n"
    }
}

/// Reads a manifest as the store would and keeps nothing: how many objects it holds.
///
/// # Errors
/// Line, column and reason why it would be refused.
pub fn check(bytes: &[u8]) -> Result<usize, ManifestError> {
    match parse::parse(bytes) {
        Ok((objects, _)) => Ok(objects.len()),
        Err(Invalid { line, column, reason }) => Err(ManifestError { line, column, reason }),
    }
}

/// Why a manifest is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {reason}")]
pub struct ManifestError {
    /// The line, from 1.
    pub line: u64,
    /// The column, from 1.
    pub column: u64,
    /// What is wrong there.
    pub reason: String,
}

impl Manifests {
    /// The manifests of a directory. `ready` objects until what the folder holds is in the store.
    pub fn new(
        directory: &Directory,
        engine: Engine,
        clock: Arc<dyn Clock>,
        ready: Component,
    ) -> (Self, Report) {
        let (records, _) = engine.entries(RECORDS_PREFIX);
        let (resources, _) = engine.entries(RESOURCES_PREFIX);
        let files = desired::remembered(&records, &resources);
        let known = files.in_force().map(|(file, _)| file.to_owned()).collect::<Vec<_>>();
        let path = directory.manifests();
        let (status, report) = watch::channel(Arc::default());
        let manifests = Self {
            metrics: engine.metrics().clone(),
            engine,
            clock,
            ready,
            folder: Some(Folder::new(path.clone(), known)),
            path,
            files,
            written: false,
            status,
        };
        (manifests, Report(report))
    }

    /// Watches until the drain has begun.
    ///
    /// # Errors
    /// None: whatever fails is said, and tried again.
    pub async fn run(mut self, drain: Drain) -> Result<(), Infallible> {
        let (wake, mut woken) = mpsc::channel(1);
        let mut watcher = FolderWatcher::new(self.path.clone(), wake);
        loop {
            let watching = watcher.renew();
            let wait =
                self.round().await.unwrap_or(if watching { POLL_BESIDE } else { POLL_ALONE });
            let wait = if self.written { wait } else { wait.min(POLL_ALONE) };
            tokio::select! {
                () = drain.wait() => return Ok(()),
                _ = woken.recv() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Looks once and writes what has changed; says when to look again, if not at the next poll.
    async fn round(&mut self) -> Option<Duration> {
        let look = self.look().await;
        let read = look.changes.into_iter().map(|(file, change)| {
            let read = self.read(&file, change);
            (file, read)
        });
        let read: Vec<_> = read.collect();
        if !read.is_empty() {
            self.written = false;
            let outcomes = self.files.update(read, self.clock.now());
            outcomes.iter().for_each(|(file, outcome)| self.report(file, outcome));
            self.status.send_replace(Arc::new(self.files.status()));
        }
        // What is not at rest at the start is in force as it was: it is not waited for.
        self.reconcile().await;
        look.again_in
    }

    async fn look(&mut self) -> Look {
        let Some(mut folder) = self.folder.take() else { return Look::default() };
        let (since_boot, now) = (self.clock.since_boot(), self.clock.now());
        let looked = tokio::task::spawn_blocking(move || {
            let look = folder.look(since_boot, now);
            (folder, look)
        });
        let look = match looked.await {
            Ok((folder, look)) => {
                self.folder = Some(folder);
                look
            }
            Err(error) => {
                tracing::error!(%error, "looking at the manifests panicked; it begins anew");
                let known = self.files.in_force().map(|(file, _)| file.to_owned());
                self.folder = Some(Folder::new(self.path.clone(), known.collect::<Vec<_>>()));
                return Look::default();
            }
        };
        let unreadable = FileLabels { file: ".".to_owned() };
        match look {
            Ok(look) => {
                self.metrics.manifest_errors.remove(&unreadable);
                look
            }
            Err(error) => {
                let news = self.metrics.manifest_errors.get_or_create(&unreadable).set(1) == 0;
                if news {
                    let path = self.path.display();
                    tracing::error!(code = %Code::MANIFEST_INVALID, %path, %error, "the manifests cannot be read; all that was in force stays");
                }
                Look::default()
            }
        }
    }

    fn read(&self, file: &str, change: Change) -> Read {
        let bytes = match change {
            Change::Gone => return None,
            Change::Read(bytes) => bytes,
            Change::Unreadable(reason) => {
                return Some(Err(Invalid { line: 0, column: 0, reason }));
            }
        };
        Some(parse::parse(&bytes).map(|(objects, warnings)| {
            for warning in warnings {
                let line = warning.line;
                tracing::warn!(file, line, "{}", warning.text);
            }
            objects
        }))
    }

    fn report(&self, file: &str, outcome: &Outcome) {
        let labels = FileLabels { file: file.to_owned() };
        match outcome {
            Outcome::Gone => {
                self.metrics.manifest_errors.remove(&labels);
                tracing::info!(file, "the manifest is gone, and what it declared");
            }
            Outcome::InForce => {
                self.metrics.manifest_errors.remove(&labels);
                tracing::info!(file, "the manifest is in force");
            }
            Outcome::Refused(Invalid { line, column, reason }) => {
                self.metrics.manifest_errors.get_or_create(&labels).set(1);
                let code = Code::MANIFEST_INVALID;
                tracing::error!(%code, file, line, column, reason, "the manifest cannot be used; its last good version stays in force");
            }
        }
    }

    async fn reconcile(&mut self) {
        if self.written {
            return;
        }
        let (records, _) = self.engine.entries(RECORDS_PREFIX);
        let (resources, _) = self.engine.entries(RESOURCES_PREFIX);
        let new_uid = || uuid::Uuid::new_v4().to_string();
        let now = self.clock.now();
        let writes = desired::writes(&self.files, &records, &resources, now, new_uid);
        let count = writes.len();
        match self.engine.write(writes).await {
            Ok(_) => {
                self.written = true;
                let resources = self.files.objects().count();
                self.metrics.resources.set(i64::try_from(resources).unwrap_or(i64::MAX));
                self.ready.ready();
                if count > 0 {
                    tracing::debug!(count, "the manifests were written to the store");
                }
            }
            Err(error) => {
                self.ready.not_ready(&format!("the manifests are not in the store: {error}"));
                tracing::warn!(%error, "the manifests could not be written; it is tried again");
            }
        }
    }
}

/// A watch that is made again when the folder is another, or when it has died.
struct FolderWatcher {
    path: PathBuf,
    wake: mpsc::Sender<()>,
    /// The watch, and the inode that it is of.
    watch: Option<(notify::RecommendedWatcher, u64)>,
}

impl FolderWatcher {
    fn new(path: PathBuf, wake: mpsc::Sender<()>) -> Self {
        Self { path, wake, watch: None }
    }

    /// Whether there is a watch on what is there now.
    fn renew(&mut self) -> bool {
        let inode = std::fs::metadata(&self.path).ok().map(|metadata| metadata.ino());
        if self.watch.as_ref().map(|(_, inode)| *inode) != inode {
            self.watch = None;
        }
        if let (None, Some(inode)) = (&self.watch, inode) {
            self.watch = self.watch().map(|watch| (watch, inode));
        }
        self.watch.is_some()
    }

    fn watch(&self) -> Option<notify::RecommendedWatcher> {
        let wake = self.wake.clone();
        // Whatever happened, the answer is to look, also to an error of the watch; but our own
        // reading is no reason to read. A full channel has a wake in it already.
        let handler = move |event: notify::Result<notify::Event>| {
            if event.map_or(true, |event| changes_something(event.kind)) {
                let _ = wake.try_send(());
            }
        };
        let watched = notify::recommended_watcher(handler).and_then(|mut watcher| {
            watcher.watch(&self.path, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        match watched {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::debug!(%error, "the manifests cannot be watched; they are polled");
                None
            }
        }
    }
}

fn changes_something(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write),
        _ => true,
    }
}

/// How often the folder is looked at when a watch wakes us besides.
const POLL_BESIDE: Duration = Duration::from_secs(10);
/// How often, when none does.
const POLL_ALONE: Duration = Duration::from_secs(2);
