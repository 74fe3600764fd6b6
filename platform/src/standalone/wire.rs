//! The store's protocol: the generated messages and stubs, and how values become messages.

use bytes::Bytes;

use crate::store::{Entry, Event, Revision};

#[allow(
    missing_docs,
    clippy::use_self,
    clippy::or_fun_call,
    unused_qualifications,
    unreachable_pub
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/steadfast.store.v1.rs"));
}

pub(super) use generated::*;

impl From<Entry> for generated::Entry {
    fn from(entry: Entry) -> Self {
        Self { key: entry.key, value: entry.value, revision: entry.revision.0 }
    }
}

impl From<generated::Entry> for Entry {
    fn from(entry: generated::Entry) -> Self {
        Self { key: entry.key, value: entry.value, revision: Revision(entry.revision) }
    }
}

impl From<Event> for watch_reply::Event {
    fn from(event: Event) -> Self {
        match event {
            Event::Deleted { key, revision } => {
                Self::Deleted(Deleted { key, revision: revision.0 })
            }
            Event::Put(entry) => Self::Put(entry.into()),
            Event::Synced(revision) => Self::Synced(revision.0),
        }
    }
}

/// The size of an entry in a message, near enough for a bound.
pub(super) fn entry_bytes(key: &str, value: &Bytes) -> usize {
    key.len() + value.len() + ENTRY_OVERHEAD_BYTES
}

/// The longest key.
pub(super) const KEY_BYTES_MAX: usize = 1024;

/// The largest value: a trust domain's state with a hundred anchors and issuers is below 300 KiB.
pub(super) const VALUE_BYTES_MAX: usize = 1 << 20;

/// The largest message: one value at its bound, or a chunk of a list.
pub(super) const MESSAGE_BYTES_MAX: usize = VALUE_BYTES_MAX + LIST_CHUNK_BYTES + 64 * 1024;

/// A list is sent in chunks of about this size.
pub(super) const LIST_CHUNK_BYTES: usize = 256 * 1024;

/// A watch says that it lives at least this often.
pub(super) const HEARTBEAT: std::time::Duration = std::time::Duration::from_secs(5);

const ENTRY_OVERHEAD_BYTES: usize = 32;
