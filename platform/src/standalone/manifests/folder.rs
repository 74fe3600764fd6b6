//! Looking at the folder: which files have changed, and whether they are at rest.
//!
//! A file is read once it has not changed for a moment, so that one that is being written is not
//! read by halves. A file that has become shorter, or empty, or is gone, is given longer: editors
//! truncate before they write, and rename the old file away before they name the new one; and to
//! believe it too soon would delete what it declares.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use steadfast_api::UnixTime;

/// The folder and what was seen of it.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    files: BTreeMap<String, Seen>,
    /// Whether it was ever looked at.
    known: bool,
}

/// What was seen of one file.
#[derive(Debug)]
struct Seen {
    looks: Looks,
    /// Since when it looks so, on the boot clock.
    since: Duration,
    /// What was told of it last.
    told: Option<Told>,
}

#[derive(Debug)]
struct Told {
    looks: Looks,
    /// The bytes that were told; `None` for what could not be read.
    bytes: Option<Vec<u8>>,
    /// It changed so shortly before it was read that a later change may look the same.
    doubtful: bool,
}

/// A file from outside: whatever changes its bytes changes this, but for changes within one tick
/// of the file system's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Looks {
    Absent,
    File { identity: (u64, u64), bytes: u64, modified_ns: i128, changed_ns: i128 },
    Unreadable(String),
}

/// What is to be told of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Gone,
    Read(Vec<u8>),
    Unreadable(String),
}

/// What a look has found.
#[derive(Debug, Default)]
pub(super) struct Look {
    pub(super) changes: Vec<(String, Change)>,
    /// When to look again because something is not at rest yet.
    pub(super) again_in: Option<Duration>,
}

impl Folder {
    /// A folder of which these files were known before: if one is not there, it is gone.
    pub(super) fn new(path: PathBuf, known: impl IntoIterator<Item = String>) -> Self {
        let remembered = |name| {
            let told = Told { looks: Looks::Absent, bytes: None, doubtful: true };
            // Not absent: that would have been told.
            let told = Told { looks: Looks::Unreadable(String::new()), ..told };
            let looks = Looks::Unreadable(String::new());
            (name, Seen { looks, since: Duration::ZERO, told: Some(told) })
        };
        Self { path, files: known.into_iter().map(remembered).collect(), known: false }
    }

    /// Looks at every file. `since_boot` measures how long one has been at rest, `now` is compared
    /// with the times of files.
    ///
    /// # Errors
    /// The folder itself cannot be read; nothing is concluded from that.
    pub(super) fn look(&mut self, since_boot: Duration, now: UnixTime) -> io::Result<Look> {
        let names = self.names()?;
        let first = !std::mem::replace(&mut self.known, true);
        let mut look = Look::default();
        let all: BTreeSet<String> = self.files.keys().cloned().chain(names).collect();
        for name in all {
            let path = self.path.join(&name);
            let looks = Looks::of(&path);
            let seen = self.files.entry(name.clone()).or_insert_with(|| Seen {
                looks: Looks::Absent,
                // What was at rest before anyone looked need not be waited for.
                since: if first { since_boot.saturating_sub(looks.age(now)) } else { since_boot },
                told: None,
            });
            if seen.looks != looks {
                let rest = if first { looks.age(now) } else { Duration::ZERO };
                seen.since = since_boot.saturating_sub(rest);
                seen.looks = looks;
            }
            let rested = since_boot.saturating_sub(seen.since);
            match seen.judge(&path, rested, now) {
                Judgement::Changed(change) => look.changes.push((name.clone(), change)),
                Judgement::Same => {}
                Judgement::Wait(wait) => {
                    look.again_in = Some(look.again_in.map_or(wait, |other| other.min(wait)));
                }
            }
            if seen.looks == Looks::Absent && seen.told.is_none() {
                self.files.remove(&name);
            }
        }
        Ok(look)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            // A name that is no text cannot be a manifest's: editors and people write text.
            let Ok(name) = entry?.file_name().into_string() else { continue };
            let manifest = name.ends_with(".yaml") || name.ends_with(".yml");
            // Hidden files are editors' own: swap files, locks, drafts.
            if manifest && !name.starts_with('.') && !self.path.join(&name).is_dir() {
                names.push(name);
            }
        }
        names.sort_unstable();
        if names.len() > FILES_MAX {
            let why = format!("it holds {} manifests, at most {FILES_MAX} are read", names.len());
            return Err(io::Error::other(why));
        }
        Ok(names)
    }
}

enum Judgement {
    Changed(Change),
    Same,
    Wait(Duration),
}

impl Seen {
    fn judge(&mut self, path: &Path, rested: Duration, now: UnixTime) -> Judgement {
        if self.told.as_ref().is_some_and(|told| told.looks == self.looks && !told.doubtful) {
            return Judgement::Same;
        }
        if rested < REST {
            return Judgement::Wait(REST - rested);
        }
        match &self.looks {
            Looks::Absent if self.told.is_none() => Judgement::Same,
            Looks::Absent if rested < REST_TO_SHRINK => Judgement::Wait(REST_TO_SHRINK - rested),
            Looks::Absent => {
                self.told = None;
                Judgement::Changed(Change::Gone)
            }
            Looks::Unreadable(why) => {
                let change = Change::Unreadable(why.clone());
                self.tell(None, false, change)
            }
            Looks::File { .. } => self.read(path, rested, now),
        }
    }

    fn read(&mut self, path: &Path, rested: Duration, now: UnixTime) -> Judgement {
        let bytes = match read_bounded(path) {
            Ok(bytes) => bytes,
            Err(error) => {
                self.looks = Looks::Unreadable(error.to_string());
                return self.tell(None, false, Change::Unreadable(error.to_string()));
            }
        };
        // Changed while it was read: it is not at rest after all.
        if Looks::of(path) != self.looks {
            return Judgement::Wait(REST);
        }
        let before = self.told.as_ref().and_then(|told| told.bytes.as_ref());
        let shrunk = bytes.trim_ascii().is_empty()
            || before.is_some_and(|b| bytes.len() < b.len() && b.starts_with(&bytes));
        if shrunk && rested < REST_TO_SHRINK {
            return Judgement::Wait(REST_TO_SHRINK - rested);
        }
        let doubtful = self.looks.age(now) < DOUBT;
        if before == Some(&bytes) {
            let bytes = Some(bytes);
            self.told = Some(Told { looks: self.looks.clone(), bytes, doubtful });
            return Judgement::Same;
        }
        self.tell(Some(bytes.clone()), doubtful, Change::Read(bytes))
    }

    fn tell(&mut self, bytes: Option<Vec<u8>>, doubtful: bool, change: Change) -> Judgement {
        self.told = Some(Told { looks: self.looks.clone(), bytes, doubtful });
        Judgement::Changed(change)
    }
}

impl Looks {
    fn of(path: &Path) -> Self {
        // Through symbolic links: a mounted volume swaps those.
        match std::fs::metadata(path) {
            Ok(metadata) => Self::of_metadata(&metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match std::fs::symlink_metadata(path) {
                    Ok(_) => Self::Unreadable("it is a symbolic link to nothing".to_owned()),
                    Err(_) => Self::Absent,
                }
            }
            Err(error) => Self::Unreadable(error.to_string()),
        }
    }

    fn of_metadata(metadata: &Metadata) -> Self {
        if !metadata.is_file() {
            return Self::Unreadable("it is no regular file".to_owned());
        }
        let ns = |secs: i64, nsec: i64| i128::from(secs) * 1_000_000_000 + i128::from(nsec);
        Self::File {
            identity: (metadata.dev(), metadata.ino()),
            bytes: metadata.len(),
            modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// How long ago it changed, by the wall clock; a time in the future is now.
    fn age(&self, now: UnixTime) -> Duration {
        let Self::File { modified_ns, changed_ns, .. } = self else { return Duration::ZERO };
        let newest_ms = (*modified_ns).max(*changed_ns) / 1_000_000;
        now.since(UnixTime::from_millis(u64::try_from(newest_ms).unwrap_or(0)))
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let why = format!("it is larger than {FILE_BYTES_MAX} bytes: split it");
        return Err(io::Error::other(why));
    }
    Ok(bytes)
}

/// How long a file must be at rest.
const REST: Duration = Duration::from_millis(150);
/// How long, if it has become less.
const REST_TO_SHRINK: Duration = Duration::from_secs(2);
/// Twice the coarsest clock of a file system (FAT: 2 s).
const DOUBT: Duration = Duration::from_secs(4);

const FILES_MAX: usize = 1000;
const FILE_BYTES_MAX: u64 = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with a clock of its own: files age only when the test says so.
    struct Fixture {
        dir: tempfile::TempDir,
        folder: Folder,
        since_boot: Duration,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let folder = Folder::new(dir.path().to_owned(), []);
            Self { dir, folder, since_boot: Duration::from_secs(1000) }
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.dir.path().join(name), text).unwrap();
        }

        /// What is told after this much more time.
        fn after(&mut self, pass: Duration) -> Vec<(String, Change)> {
            self.since_boot += pass;
            // In the past of every file: none is old, each rests from when it is first seen.
            self.folder.look(self.since_boot, UnixTime::from_secs(0)).unwrap().changes
        }

        fn settled(&mut self) -> Vec<(String, Change)> {
            assert!(self.after(Duration::ZERO).is_empty());
            self.after(REST)
        }
    }

    fn read(name: &str, text: &str) -> Vec<(String, Change)> {
        vec![(name.to_owned(), Change::Read(text.as_bytes().to_vec()))]
    }

    #[test]
    fn a_file_is_read_once_it_is_at_rest() {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", "half");
        assert!(fixture.after(Duration::ZERO).is_empty());
        fixture.write("a.yaml", "whole text");
        assert!(fixture.after(REST).is_empty());
        assert_eq!(fixture.after(REST), read("a.yaml", "whole text"));
        assert!(fixture.after(REST).is_empty());
    }

    #[test]
    fn what_was_at_rest_before_the_start_is_read_at_once() {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", "text");
        let later =
            UnixTime::from(std::fs::metadata(fixture.dir.path()).unwrap().modified().unwrap());
        let later = later + Duration::from_secs(60);
        let look = fixture.folder.look(fixture.since_boot, later).unwrap();
        assert_eq!(look.changes, read("a.yaml", "text"));
    }

    #[test]
    fn a_file_that_was_emptied_is_not_believed_at_once() {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", "one two");
        fixture.settled();
        for shrunk in ["", "one"] {
            fixture.write("a.yaml", shrunk);
            assert!(fixture.settled().is_empty(), "{shrunk:?}");
            fixture.write("a.yaml", "one two three");
            assert_eq!(fixture.settled(), read("a.yaml", "one two three"), "{shrunk:?}");
            fixture.write("a.yaml", "one two");
            assert!(fixture.settled().is_empty());
            assert_eq!(fixture.after(REST_TO_SHRINK), read("a.yaml", "one two"));
        }
    }

    #[test]
    fn a_file_that_is_renamed_over_is_never_gone() {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", "one");
        fixture.settled();
        let path = |name| fixture.dir.path().join(name);
        std::fs::rename(path("a.yaml"), path("a.yaml~")).unwrap();
        let (new, old) = (path("a.yaml.tmp"), path("a.yaml"));
        assert!(fixture.settled().is_empty());
        std::fs::write(&new, "two").unwrap();
        std::fs::rename(new, old).unwrap();
        assert_eq!(fixture.settled(), read("a.yaml", "two"));
    }

    #[test]
    fn a_deleted_file_is_gone() {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", "one");
        fixture.settled();
        std::fs::remove_file(fixture.dir.path().join("a.yaml")).unwrap();
        assert!(fixture.settled().is_empty());
        assert_eq!(fixture.after(REST_TO_SHRINK), [("a.yaml".to_owned(), Change::Gone)]);
        assert!(fixture.after(REST_TO_SHRINK).is_empty());
    }

    #[test]
    fn a_file_that_vanished_while_the_store_was_down_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut folder = Folder::new(dir.path().to_owned(), ["a.yaml".to_owned()]);
        let mut look =
            |secs| folder.look(Duration::from_secs(secs), UnixTime::from_secs(0)).unwrap().changes;
        assert!(look(100).is_empty());
        assert_eq!(look(110), [("a.yaml".to_owned(), Change::Gone)]);
    }

    #[test]
    fn a_swapped_symbolic_link_is_a_change() {
        let mut fixture = Fixture::new();
        let path = |name: &str| fixture.dir.path().join(name);
        for (version, text) in [("v1", "one"), ("v2", "two")] {
            std::fs::create_dir(path(version)).unwrap();
            std::fs::write(path(version).join("a.yaml"), text).unwrap();
        }
        let (data, swap) = (path("..data"), path("..swap"));
        std::os::unix::fs::symlink("v1", &data).unwrap();
        std::os::unix::fs::symlink("..data/a.yaml", path("a.yaml")).unwrap();
        assert_eq!(fixture.settled(), read("a.yaml", "one"));
        std::os::unix::fs::symlink("v2", &swap).unwrap();
        std::fs::rename(&swap, &data).unwrap();
        assert_eq!(fixture.settled(), read("a.yaml", "two"));
    }

    #[test]
    fn what_is_no_manifest_is_not_read() {
        let mut fixture = Fixture::new();
        for name in [".a.yaml.swp", ".#a.yaml", "a.yaml~", "a.txt", "a.json", ".hidden.yaml"] {
            fixture.write(name, "text");
        }
        std::fs::create_dir(fixture.dir.path().join("dir.yaml")).unwrap();
        assert!(fixture.settled().is_empty());
    }

    #[test]
    fn a_link_to_nothing_is_said_and_not_taken_for_a_deletion() {
        let mut fixture = Fixture::new();
        std::os::unix::fs::symlink("nowhere", fixture.dir.path().join("a.yaml")).unwrap();
        let told = fixture.settled();
        assert!(matches!(&told[0].1, Change::Unreadable(why) if why.contains("nothing")));
        assert!(fixture.after(REST_TO_SHRINK).is_empty());
    }

    #[test]
    fn a_folder_that_cannot_be_read_is_no_empty_folder() {
        let mut fixture = Fixture::new();
        fixture.write("a.yaml", "one");
        fixture.settled();
        let moved = fixture.dir.path().with_extension("moved");
        std::fs::rename(fixture.dir.path(), &moved).unwrap();
        assert!(fixture.folder.look(Duration::from_secs(5000), UnixTime::from_secs(0)).is_err());
        std::fs::rename(&moved, fixture.dir.path()).unwrap();
        assert!(fixture.after(REST_TO_SHRINK).is_empty());
    }
}
