//! A disk that does what disks do at their worst, for the tests of the store's engine.

#![allow(dead_code, unreachable_pub)] // Each test file uses its part.
#![allow(clippy::unwrap_used)] // A test may fail by panicking.

pub mod process;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use rand::Rng;
use redb::StorageBackend;
use steadfast_platform::standalone::engine::medium::Medium;

/// A disk with one file. All clones are one, and it outlives whoever has it open, as disks do.
#[derive(Clone, Debug, Default)]
pub struct TestDisk(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    file: FileOnDisk,
    draft: FileOnDisk,
    published: bool,
    /// Operations until the power goes; `None` is never.
    operations_left: Option<u64>,
    failure: Option<Failure>,
    pub syncs: u64,
}

/// A file as a program sees it, and as it would be after a power cut.
#[derive(Clone, Debug, Default)]
struct FileOnDisk {
    seen: Vec<u8>,
    durable: Vec<u8>,
    /// What was done since the last sync, in order.
    unsynced: Vec<Operation>,
}

#[derive(Clone, Debug)]
enum Operation {
    SetLen(u64),
    Write(u64, Vec<u8>),
}

/// What the disk refuses, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Reads and everything else: EIO.
    Everything,
    /// Growing, and writing what is not there yet: ENOSPC.
    Full,
    /// Syncs: EIO, after the data may or may not have reached the disk.
    Sync,
    /// Writes: EIO.
    Write,
}

impl TestDisk {
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// The power goes after this many more writes, syncs and changes of length.
    pub fn cut_after(&self, operations: u64) {
        self.lock().operations_left = Some(operations);
    }

    pub fn is_cut(&self) -> bool {
        self.lock().operations_left == Some(0)
    }

    /// Power again: of what was not synced, each sector is there or is not.
    pub fn power_on(&self, rng: &mut impl Rng) {
        let mut inner = self.lock();
        inner.operations_left = None;
        if inner.published {
            inner.file.lose_unsynced(rng);
        }
        inner.draft = FileOnDisk::default();
    }

    pub fn fail(&self, failure: Option<Failure>) {
        self.lock().failure = failure;
    }

    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }
}

impl Inner {
    /// One operation that changes something, if there is power for it.
    fn spend(&mut self) -> io::Result<()> {
        match &mut self.operations_left {
            Some(0) => Err(io::Error::other("the power is off")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn refuse(&self, operation: &[Failure]) -> io::Result<()> {
        match self.failure {
            Some(Failure::Full) if operation.contains(&Failure::Full) => {
                Err(io::ErrorKind::StorageFull.into())
            }
            Some(failure) if failure == Failure::Everything || operation.contains(&failure) => {
                Err(io::Error::from_raw_os_error(5))
            }
            _ => Ok(()),
        }
    }
}

impl FileOnDisk {
    fn lose_unsynced(&mut self, rng: &mut impl Rng) {
        // Sometimes nearly all was written back, sometimes hardly anything.
        let kept = rng.random_range(0.0..=1.0);
        for operation in self.unsynced.drain(..) {
            match operation {
                Operation::SetLen(len) if rng.random_bool(kept) => {
                    self.durable.resize(len as usize, 0);
                }
                Operation::SetLen(_) => {}
                Operation::Write(offset, data) => {
                    for (index, sector) in data.chunks(SECTOR_BYTES).enumerate() {
                        let start = offset as usize + index * SECTOR_BYTES;
                        // Data behind the end of a file is in no file.
                        let end = (start + sector.len()).min(self.durable.len());
                        if start < end && rng.random_bool(kept) {
                            self.durable[start..end].copy_from_slice(&sector[..end - start]);
                        }
                    }
                }
            }
        }
        self.seen = self.durable.clone();
    }

    fn sync(&mut self) {
        for operation in self.unsynced.drain(..) {
            match operation {
                Operation::SetLen(len) => self.durable.resize(len as usize, 0),
                Operation::Write(offset, data) => {
                    let start = offset as usize;
                    self.durable[start..start + data.len()].copy_from_slice(&data);
                }
            }
        }
    }
}

impl Medium for TestDisk {
    type Backend = Backend;

    fn path(&self) -> &Path {
        Path::new("test.redb")
    }

    fn open(&self) -> io::Result<Option<Backend>> {
        Ok(self.lock().published.then(|| Backend { disk: self.clone(), draft: false }))
    }

    fn draft(&self) -> io::Result<Backend> {
        self.lock().draft = FileOnDisk::default();
        Ok(Backend { disk: self.clone(), draft: true })
    }

    fn publish(&self) -> io::Result<()> {
        let mut inner = self.lock();
        inner.spend()?;
        inner.draft.sync();
        inner.file = std::mem::take(&mut inner.draft);
        inner.published = true;
        Ok(())
    }
}

#[derive(Debug)]
pub struct Backend {
    disk: TestDisk,
    draft: bool,
}

impl Backend {
    fn with<T>(&self, work: impl FnOnce(&mut FileOnDisk) -> T) -> T {
        let mut inner = self.disk.lock();
        if self.draft { work(&mut inner.draft) } else { work(&mut inner.file) }
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|file| file.seen.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.disk.lock().refuse(&[])?;
        self.with(|file| {
            let start = offset as usize;
            let there = file.seen.get(start..start + out.len());
            out.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let grows = len > self.len()?;
        {
            let mut inner = self.disk.lock();
            inner.refuse(if grows {
                &[Failure::Full, Failure::Write]
            } else {
                &[Failure::Write]
            })?;
            inner.spend()?;
        }
        self.with(|file| {
            file.seen.resize(len as usize, 0);
            file.unsynced.push(Operation::SetLen(len));
        });
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        {
            let mut inner = self.disk.lock();
            inner.refuse(&[Failure::Sync])?;
            inner.spend()?;
            inner.syncs += 1;
        }
        self.with(FileOnDisk::sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        {
            let mut inner = self.disk.lock();
            // A file system that is full may refuse any page that it has to place anew.
            inner.refuse(&[Failure::Full, Failure::Write])?;
            inner.spend()?;
        }
        self.with(|file| {
            let start = offset as usize;
            file.seen[start..start + data.len()].copy_from_slice(data);
            file.unsynced.push(Operation::Write(offset, data.to_vec()));
        });
        Ok(())
    }
}

/// The unit that a disk writes whole.
const SECTOR_BYTES: usize = 512;
