//! Where the store's bytes are kept: a file, or in tests a disk that fails on purpose.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;
use redb::backends::FileBackend;

/// A place that holds one store, or none yet.
pub trait Medium: Send + Sync + 'static {
    /// How redb reads and writes it.
    type Backend: StorageBackend;

    /// What a person calls it.
    fn path(&self) -> &Path;

    /// Opens what is there; `None` if nothing ever was.
    ///
    /// # Errors
    /// What is there cannot be opened, or is not what this medium opened before.
    fn open(&self) -> io::Result<Option<Self::Backend>>;

    /// An empty place for a new store, which nobody finds before it is published.
    ///
    /// # Errors
    /// There is no room.
    fn draft(&self) -> io::Result<Self::Backend>;

    /// Puts the draft, whole and synced, where [`Medium::open`] finds it, durably.
    ///
    /// # Errors
    /// It could not; there still is no store, or the one that was.
    fn publish(&self) -> io::Result<()>;

    /// Whether what was opened last is still what one would open.
    ///
    /// # Errors
    /// Why it is not, in words.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

/// A file, made whole under another name first: one that exists is never empty or half made, and
/// so an empty one is known for what it is, a store that was cut off.
#[derive(Debug)]
pub struct FileMedium {
    path: PathBuf,
    /// Device and inode of what was opened.
    opened: Mutex<Option<(u64, u64)>>,
}

impl FileMedium {
    /// The store in this file.
    pub fn new(path: PathBuf) -> Self {
        Self { path, opened: Mutex::new(None) }
    }

    fn draft_path(&self) -> PathBuf {
        self.path.with_extension("redb.new")
    }

    fn opened(&self) -> MutexGuard<'_, Option<(u64, u64)>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Medium for FileMedium {
    type Backend = FileBackend;

    fn path(&self) -> &Path {
        &self.path
    }

    fn open(&self) -> io::Result<Option<FileBackend>> {
        let file = match File::options().read(true).write(true).open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no regular file"));
        }
        if metadata.len() == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is empty"));
        }
        let found = (metadata.dev(), metadata.ino());
        if *self.opened().get_or_insert(found) != found {
            let why = "it was replaced by another file while the store ran; restart the store, so \
                       that it reads the new one";
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        FileBackend::new(file).map(Some).map_err(|error| io::Error::other(error.to_string()))
    }

    fn draft(&self) -> io::Result<FileBackend> {
        // A draft that is there was left by a crash before it was ever a store.
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file = file.open(self.draft_path())?;
        FileBackend::new(file).map_err(|error| io::Error::other(error.to_string()))
    }

    fn publish(&self) -> io::Result<()> {
        let directory = self.path.parent().unwrap_or_else(|| Path::new("."));
        File::open(self.draft_path())?.sync_all()?;
        std::fs::rename(self.draft_path(), &self.path)?;
        *self.opened() = None;
        File::open(directory)?.sync_all()
    }

    fn check(&self) -> Result<(), String> {
        let path = self.path.display();
        match std::fs::metadata(&self.path) {
            Ok(found) if *self.opened() == Some((found.dev(), found.ino())) => Ok(()),
            Ok(_) => Err(format!("{path} was replaced by another file while the store ran")),
            Err(error) => Err(format!("{path}: {error}")),
        }
    }
}

/// Reads from a backend, and keeps what is written to itself: so a file can be opened, repaired
/// and judged before a byte of it is changed.
#[derive(Debug)]
pub(super) struct Trial<B> {
    base: B,
    base_bytes: u64,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    bytes: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl<B: StorageBackend> Trial<B> {
    pub(super) fn new(base: B) -> io::Result<Self> {
        let bytes = base.len()?;
        let written = Mutex::new(Written { bytes, pages: BTreeMap::new() });
        Ok(Self { base, base_bytes: bytes, written })
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A page as it is in the base; what lies behind its end reads as zeros.
    fn base_page(&self, page: u64) -> io::Result<Box<[u8]>> {
        let mut bytes = vec![0; PAGE_BYTES as usize].into_boxed_slice();
        let offset = page * PAGE_BYTES;
        let there = self.base_bytes.saturating_sub(offset).min(PAGE_BYTES) as usize;
        if there > 0 {
            self.base.read(offset, &mut bytes[..there])?;
        }
        Ok(bytes)
    }
}

impl<B: StorageBackend> StorageBackend for Trial<B> {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written().bytes)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.written();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > written.bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (page, within, part) in parts(offset, out.len()) {
            let target = &mut out[part];
            match written.pages.get(&page) {
                Some(bytes) => target.copy_from_slice(&bytes[within]),
                None => target.copy_from_slice(&self.base_page(page)?[within]),
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.written().bytes = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.written();
        for (page, within, part) in parts(offset, data.len()) {
            let bytes = match written.pages.entry(page) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => entry.insert(self.base_page(page)?),
            };
            bytes[within].copy_from_slice(&data[part]);
        }
        Ok(())
    }
}

/// A range of bytes as pages: which page, where in the page, where in the range.
fn parts(
    offset: u64,
    bytes: usize,
) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == bytes {
            return None;
        }
        let at = offset + done as u64;
        let start = (at % PAGE_BYTES) as usize;
        let count = (PAGE_BYTES as usize - start).min(bytes - done);
        let part = done..done + count;
        done += count;
        Some((at / PAGE_BYTES, start..start + count, part))
    })
}

const PAGE_BYTES: u64 = 4096;
