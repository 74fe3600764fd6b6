//! What the HTTP connections of one worker share: a read buffer, the owner of their tasks, and the
//! process's budget of unread bytes.
//!
//! The buffer is borrowed for the length of one read, never across an await: a connection that
//! waits holds none of it.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use tokio::io::{AsyncRead, ReadBuf};

use crate::tasks::Tasks;

/// One worker's share of what HTTP needs. All clones are one.
#[derive(Clone, Debug)]
pub struct Worker {
    scratch: Rc<RefCell<Box<[u8]>>>,
    tasks: Tasks,
    budget: Budget,
    kept: Budget,
}

/// How many bytes there is room for: those that all peers together may have sent and nobody has read
/// yet, which is the sum of the windows granted to them; or those kept to be sent again. All clones
/// are one.
#[derive(Clone, Debug)]
pub struct Budget(Arc<AtomicU64>);

/// A part of the budget, given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    budget: Budget,
    bytes: u64,
}

impl Worker {
    /// A worker whose exchanges run on `tasks`: what is left of an upload when its answer has
    /// already begun runs on, and the owner of the tasks must wait for it on drain.
    pub fn new(tasks: Tasks, budget: Budget) -> Self {
        let scratch = vec![0; SCRATCH_BYTES].into_boxed_slice();
        let kept = Budget::new(KEPT_BYTES);
        Self { scratch: Rc::new(RefCell::new(scratch)), tasks, budget, kept }
    }

    /// The owner of this worker's tasks.
    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// The process's budget of unread bytes.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// This worker's budget of content that is kept until its answer begins.
    pub fn kept(&self) -> &Budget {
        &self.kept
    }

    /// Reads once through the worker's buffer and appends what came to `into`, which grows by just
    /// that much. Zero is the end of the stream.
    pub(super) fn poll_read(
        &self,
        io: Pin<&mut impl AsyncRead>,
        cx: &mut Context<'_>,
        into: &mut BytesMut,
    ) -> Poll<io::Result<usize>> {
        let mut scratch = self.scratch.borrow_mut();
        let mut buffer = ReadBuf::new(&mut scratch);
        ready!(io.poll_read(cx, &mut buffer))?;
        let filled = buffer.filled();
        into.extend_from_slice(filled);
        Poll::Ready(Ok(filled.len()))
    }
}

impl Budget {
    /// A budget of this many bytes.
    pub fn new(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    /// Takes `bytes` of what is left, or nothing if less is left.
    pub fn reserve(&self, bytes: u64) -> Option<Reservation> {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes))
            .ok()
            .map(|_| Reservation { budget: self.clone(), bytes })
    }

    /// How many bytes are left.
    pub fn left(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(BUDGET_BYTES)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.0.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

/// Two TLS records: large reads are worth their copy, and the buffer stays in the L1 cache.
const SCRATCH_BYTES: usize = 32 * 1024;
/// Full windows for 64 connections; beyond them connections get reduced windows.
pub const BUDGET_BYTES: u64 = 64 * 1024 * 1024;
/// 256 requests of the largest size that is kept wait for their answer, or many more small ones.
const KEPT_BYTES: u64 = 16 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_given_back_and_never_overdrawn() {
        let budget = Budget::new(100);
        let first = budget.reserve(60);
        assert!(first.is_some());
        assert!(budget.reserve(60).is_none());
        assert_eq!(budget.left(), 40);
        drop(first);
        assert_eq!(budget.left(), 100);
    }
}
