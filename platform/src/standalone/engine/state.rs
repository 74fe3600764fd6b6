//! The state of the store as values: what is there, what has been, and what a group of writes
//! would change. No I/O, no clock.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;

use bytes::Bytes;

use crate::standalone::wire::{KEY_BYTES_MAX, VALUE_BYTES_MAX, entry_bytes};
use crate::store::{Entry, Event, Revision, StoreError};

/// What is durable: the entries, and the history since the oldest revision that is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    revision: Revision,
    entries: BTreeMap<String, (Bytes, Revision)>,
    /// One event for each of the last revisions, without a hole; the last is `revision`.
    history: VecDeque<Event>,
    history_bytes: usize,
}

/// One write to a key that still is at `expected`; `None` is a key that does not exist.
#[derive(Debug)]
pub struct Write {
    /// Which key.
    pub key: String,
    /// The revision it was read at.
    pub expected: Option<Revision>,
    /// What to write; `None` deletes.
    pub value: Option<Value>,
}

/// A value to be written.
pub enum Value {
    /// These bytes.
    Fixed(Bytes),
    /// Bytes that name the revision of their own write.
    Versioned(Box<dyn Fn(Revision) -> Bytes + Send + Sync>),
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be secrets of whoever wrote them; they never reach a log.
        f.write_str("Value")
    }
}

impl Value {
    fn at(&self, revision: Revision) -> Bytes {
        match self {
            Self::Fixed(bytes) => bytes.clone(),
            Self::Versioned(make) => make(revision),
        }
    }
}

impl Write {
    /// Whether any store could take it.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        let key = &self.key;
        if key.is_empty() || key.len() > KEY_BYTES_MAX || key.chars().any(char::is_control) {
            let why =
                format!("{key:?} is no key: 1 to {KEY_BYTES_MAX} bytes, no control characters");
            return Err(StoreError::Denied(why));
        }
        let bytes = self.value.as_ref().map_or(0, |value| value.at(Revision(u64::MAX)).len());
        if bytes > VALUE_BYTES_MAX {
            let why = format!("{key:?} would be {bytes} bytes; at most {VALUE_BYTES_MAX} are kept");
            return Err(StoreError::Denied(why));
        }
        Ok(())
    }
}

impl State {
    /// From what a disk holds. Fails on what no store of ours has ever written.
    pub(super) fn restore(
        revision: Revision,
        entries: Vec<Entry>,
        history: Vec<Event>,
    ) -> Result<Self, String> {
        let oldest = revision.0.checked_sub(history.len() as u64);
        let mut next = oldest.ok_or("its history is longer than its revisions")?;
        for event in &history {
            next += 1;
            if revision_of(event).0 != next {
                let found = revision_of(event).0;
                return Err(format!("its history has revision {found} in the place of {next}"));
            }
        }
        if let Some(entry) = entries.iter().find(|entry| entry.revision > revision) {
            let (key, at) = (&entry.key, entry.revision.0);
            return Err(format!("{key:?} is at revision {at}, the store only at {}", revision.0));
        }
        let history_bytes = history.iter().map(event_bytes).sum();
        let entries = entries.into_iter().map(|e| (e.key, (e.value, e.revision))).collect();
        Ok(Self { revision, entries, history: history.into(), history_bytes })
    }

    pub(super) fn revision(&self) -> Revision {
        self.revision
    }

    pub(super) fn entry(&self, key: &str) -> Option<Entry> {
        let (value, revision) = self.entries.get(key)?;
        Some(Entry { key: key.to_owned(), value: value.clone(), revision: *revision })
    }

    pub(super) fn entries(&self, prefix: &str) -> Vec<Entry> {
        let from = self
            .entries
            .range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        from.take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, (value, revision))| Entry {
                key: key.clone(),
                value: value.clone(),
                revision: *revision,
            })
            .collect()
    }

    /// The whole history that is kept, oldest first.
    pub(super) fn all_history(&self) -> impl Iterator<Item = &Event> {
        self.history.iter()
    }

    /// Whether a watch can begin after `from`: not before the history, and not in the future,
    /// which a client has seen only if the store was put back from a backup.
    pub(super) fn check_watchable(&self, from: Revision) -> Result<(), StoreError> {
        let oldest = self.oldest_watchable();
        if from < oldest || from > self.revision {
            return Err(StoreError::Compacted(oldest));
        }
        Ok(())
    }

    /// The events under a prefix after `from`, of at most `max` revisions; the revision that was
    /// reached, and the newest there is.
    pub(super) fn history(
        &self,
        prefix: &str,
        from: Revision,
        max: usize,
    ) -> Result<(Vec<Event>, Revision, Revision), StoreError> {
        self.check_watchable(from)?;
        let skip = usize::try_from(from.0 - self.oldest_watchable().0).unwrap_or(usize::MAX);
        let read = self.history.iter().skip(skip).take(max);
        let reached = Revision(from.0 + read.len() as u64);
        let events = read.filter(|event| key_of(event).starts_with(prefix)).cloned().collect();
        Ok((events, reached, self.revision))
    }

    /// What the requests of a group would change: the events of each, with the revisions that
    /// follow, or why it is refused. A later request sees what an earlier one writes.
    pub(super) fn stage<'a>(
        &self,
        requests: impl IntoIterator<Item = &'a [Write]>,
    ) -> Vec<Result<Vec<Event>, StoreError>> {
        let mut written = HashMap::new();
        let mut next = self.revision;
        let requests = requests.into_iter();
        requests.map(|writes| self.stage_one(writes, &mut written, &mut next)).collect()
    }

    fn stage_one<'a>(
        &self,
        writes: &'a [Write],
        written: &mut HashMap<&'a str, Option<Revision>>,
        next: &mut Revision,
    ) -> Result<Vec<Event>, StoreError> {
        let mut own: HashMap<&str, Option<Revision>> = HashMap::new();
        let mut events = Vec::with_capacity(writes.len());
        let mut revision = *next;
        for write in writes {
            let key = write.key.as_str();
            let actual = match own.get(key).or_else(|| written.get(key)) {
                Some(staged) => *staged,
                None => self.entries.get(key).map(|(_, revision)| *revision),
            };
            if actual != write.expected {
                let (key, expected) = (write.key.clone(), write.expected);
                return Err(StoreError::Conflict { key, expected, actual });
            }
            // To delete what is not there changes nothing, and nothing has no revision.
            let (None, None) = (actual, &write.value) else {
                revision.0 += 1;
                own.insert(key, write.value.as_ref().map(|_| revision));
                events.push(event(write, revision));
                continue;
            };
        }
        written.extend(own);
        *next = revision;
        Ok(events)
    }

    /// How many of the oldest events must go once these have come.
    pub(super) fn overflow(&self, events: &[Event]) -> usize {
        let mut count = self.history.len() + events.len();
        let mut bytes = self.history_bytes + events.iter().map(event_bytes).sum::<usize>();
        let mut gone = 0;
        for event in self.history.iter().chain(events) {
            if count <= HISTORY_EVENTS_MAX && bytes <= HISTORY_BYTES_MAX {
                break;
            }
            (count, bytes, gone) = (count - 1, bytes - event_bytes(event), gone + 1);
        }
        gone
    }

    /// Takes over events that have become durable.
    pub(super) fn apply(&mut self, events: Vec<Event>) {
        let overflow = self.overflow(&events);
        for event in events {
            self.revision = revision_of(&event);
            self.history_bytes += event_bytes(&event);
            match &event {
                Event::Deleted { key, .. } => drop(self.entries.remove(key)),
                Event::Put(entry) => {
                    let value = (entry.value.clone(), entry.revision);
                    self.entries.insert(entry.key.clone(), value);
                }
                Event::Synced(_) => {}
            }
            self.history.push_back(event);
        }
        for event in self.history.drain(..overflow) {
            self.history_bytes -= event_bytes(&event);
        }
    }

    fn oldest_watchable(&self) -> Revision {
        Revision(self.revision.0 - self.history.len() as u64)
    }
}

fn event(write: &Write, revision: Revision) -> Event {
    let key = write.key.clone();
    match &write.value {
        Some(value) => Event::Put(Entry { key, value: value.at(revision), revision }),
        None => Event::Deleted { key, revision },
    }
}

pub(super) fn revision_of(event: &Event) -> Revision {
    match event {
        Event::Deleted { revision, .. } | Event::Synced(revision) => *revision,
        Event::Put(entry) => entry.revision,
    }
}

fn key_of(event: &Event) -> &str {
    match event {
        Event::Deleted { key, .. } => key,
        Event::Put(entry) => &entry.key,
        Event::Synced(_) => "",
    }
}

fn event_bytes(event: &Event) -> usize {
    match event {
        Event::Deleted { key, .. } => entry_bytes(key, &Bytes::new()),
        Event::Put(entry) => entry_bytes(&entry.key, &entry.value),
        Event::Synced(_) => 0,
    }
}

/// How much history is kept for watches that resume; older ones list again.
const HISTORY_EVENTS_MAX: usize = 4096;
const HISTORY_BYTES_MAX: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, expected: Option<u64>, value: &str) -> Write {
        let value = Some(Value::Fixed(value.to_owned().into()));
        Write { key: key.to_owned(), expected: expected.map(Revision), value }
    }

    fn delete(key: &str, expected: Option<u64>) -> Write {
        Write { key: key.to_owned(), expected: expected.map(Revision), value: None }
    }

    fn write(state: &mut State, writes: &[Write]) -> Result<(), StoreError> {
        let events = state.stage([writes]).remove(0)?;
        state.apply(events);
        Ok(())
    }

    #[test]
    fn a_group_gives_every_write_its_own_revision_and_later_ones_see_earlier_ones() {
        let state = State::default();
        let group = [
            vec![put("a", None, "1"), put("b", None, "1")],
            vec![put("a", None, "2")],
            vec![put("a", Some(1), "3")],
            vec![delete("b", Some(2))],
        ];
        let staged = state.stage(group.iter().map(Vec::as_slice));
        let revisions = |index: usize| -> Vec<u64> {
            staged[index].as_ref().unwrap().iter().map(|event| revision_of(event).0).collect()
        };
        assert_eq!(revisions(0), [1, 2]);
        let conflict = staged[1].as_ref().unwrap_err();
        assert!(matches!(conflict, StoreError::Conflict { actual: Some(Revision(1)), .. }));
        assert_eq!(revisions(2), [3]);
        assert_eq!(revisions(3), [4]);
    }

    #[test]
    fn a_request_that_conflicts_in_its_last_write_writes_nothing() {
        let state = State::default();
        let group = [vec![put("a", None, "1"), put("b", Some(9), "1")], vec![put("a", None, "2")]];
        let staged = state.stage(group.iter().map(Vec::as_slice));
        assert!(staged[0].is_err());
        assert_eq!(revision_of(&staged[1].as_ref().unwrap()[0]), Revision(1));
    }

    #[test]
    fn to_delete_what_is_not_there_takes_no_revision() {
        let mut state = State::default();
        write(&mut state, &[delete("a", None)]).unwrap();
        assert_eq!(state.revision(), Revision(0));
        assert!(write(&mut state, &[delete("a", Some(1))]).is_err());
    }

    #[test]
    fn history_is_bounded_and_says_what_it_no_longer_has() {
        let mut state = State::default();
        for revision in 0..HISTORY_EVENTS_MAX as u64 + 10 {
            let expected = (revision > 0).then_some(revision);
            write(&mut state, &[put("a", expected, "x")]).unwrap();
        }
        assert_eq!(state.history.len(), HISTORY_EVENTS_MAX);
        assert_eq!(state.history("", Revision(9), 1), Err(StoreError::Compacted(Revision(10))));
        let (events, reached, _) = state.history("", Revision(10), 1).unwrap();
        assert_eq!((revision_of(&events[0]), reached), (Revision(11), Revision(11)));
    }

    #[test]
    fn history_is_bounded_in_bytes() {
        let mut state = State::default();
        let large = "x".repeat(VALUE_BYTES_MAX);
        for revision in 0..40 {
            let expected = (revision > 0).then_some(revision);
            write(&mut state, &[put("a", expected, &large)]).unwrap();
            assert!(state.history_bytes <= HISTORY_BYTES_MAX);
        }
        assert!(state.history.len() >= 10);
    }

    #[test]
    fn a_watch_from_the_future_lists_again() {
        let mut state = State::default();
        write(&mut state, &[put("a", None, "1")]).unwrap();
        assert!(state.check_watchable(Revision(1)).is_ok());
        assert!(matches!(state.check_watchable(Revision(2)), Err(StoreError::Compacted(_))));
    }

    #[test]
    fn a_state_with_a_hole_is_refused() {
        let mut state = State::default();
        for key in ["a", "b", "c"] {
            write(&mut state, &[put(key, None, "1")]).unwrap();
        }
        let mut history: Vec<_> = state.all_history().cloned().collect();
        let entries = state.entries("");
        assert_eq!(State::restore(Revision(3), entries.clone(), history.clone()), Ok(state));
        history.remove(1);
        assert!(State::restore(Revision(3), entries.clone(), history).is_err());
        assert!(State::restore(Revision(2), entries, Vec::new()).is_err());
    }

    #[test]
    fn a_list_holds_its_prefix_and_nothing_else() {
        let mut state = State::default();
        for key in ["a", "b/1", "b/2", "b0", "c"] {
            write(&mut state, &[put(key, None, "1")]).unwrap();
        }
        let keys: Vec<_> = state.entries("b/").into_iter().map(|entry| entry.key).collect();
        assert_eq!(keys, ["b/1", "b/2"]);
    }

    #[test]
    fn keys_and_values_have_bounds() {
        for key in ["", "a\nb", &"x".repeat(KEY_BYTES_MAX + 1)] {
            assert!(matches!(put(key, None, "").check(), Err(StoreError::Denied(_))), "{key:?}");
        }
        let large = "x".repeat(VALUE_BYTES_MAX + 1);
        assert!(matches!(put("a", None, &large).check(), Err(StoreError::Denied(_))));
    }
}
