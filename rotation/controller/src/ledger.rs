//! The ledger of instances: who was there once, so that nobody is forgotten who has vanished.
//!
//! Replicas keep what they know in memory and may restart; a pod that was cut off or deleted by
//! force is on no list any more. What was seen is therefore kept in the store, written when somebody
//! joins or vanishes and once an hour for the times, never for each ack. It lies in pieces, each
//! pod's always in the same, since a store takes no value of any size. That the platform said of a
//! pod that it has ended is kept, too: soon no list has it any more, while replicas still remember
//! its stream. An entry goes when nothing of it can be valid any more.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::UnixTime;
use steadfast_platform::store::LEDGER_KEY;
use steadfast_platform::{Revision, Store};
use steadfast_rotation_protocol::Instance;
use steadfast_rotation_protocol::census::{Listed, ProxyStatus, Replica, Vanished};

use crate::shell::LookError;

/// Who was there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    pieces: [Piece; PIECES],
}

/// Some of them, by pod UID: the newest start of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Piece {
    members: BTreeMap<String, Entry>,
    /// Of what is stored; `None`: nothing is.
    revision: Option<Revision>,
    /// It differs from what is stored.
    changed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    name: String,
    started_at: UnixTime,
    /// At least as late as it was really heard of.
    last_heard: UnixTime,
    /// The platform has said so once: nothing of it runs.
    #[serde(default)]
    ended: bool,
}

impl Ledger {
    /// As it was written last, by us or by a controller before us.
    ///
    /// # Errors
    /// The store's, and what is no ledger of ours.
    pub async fn read(store: &dyn Store) -> Result<Self, LookError> {
        let prefix = format!("{LEDGER_KEY}/");
        let (entries, _) = store.list(&prefix).await?;
        let mut ledger = Self::default();
        for entry in entries {
            let number = entry.key.strip_prefix(&prefix).and_then(|n| n.parse::<usize>().ok());
            let Some(piece) = number.and_then(|number| ledger.pieces.get_mut(number)) else {
                continue;
            };
            piece.members = serde_json::from_slice(&entry.value)
                .map_err(|error| LookError::State(entry.key.clone(), error))?;
            piece.revision = Some(entry.revision);
        }
        Ok(ledger)
    }

    /// Writes what is to be written.
    ///
    /// # Errors
    /// The store's: somebody else may have written, so that it must be read again.
    pub async fn write(&mut self, store: &dyn Store) -> Result<(), LookError> {
        for (number, piece) in self.pieces.iter_mut().enumerate().filter(|(_, p)| p.changed) {
            let key = format!("{LEDGER_KEY}/{number}");
            let value = serde_json::to_vec(&piece.members);
            let value = value.map_err(|error| LookError::State(key.clone(), error))?;
            let written = store.compare_and_swap(&key, piece.revision, Some(value.into())).await?;
            (piece.revision, piece.changed) = (Some(written), false);
        }
        Ok(())
    }

    /// Takes in what another has seen: of two that know the same pod, the one that knows more.
    pub fn merge(&mut self, other: Self) {
        for (piece, other) in self.pieces.iter_mut().zip(other.pieces) {
            for (uid, other) in other.members {
                let before = piece.members.get(&uid).cloned();
                let entry = piece.members.entry(uid).or_insert_with(|| other.clone());
                entry.started_at = entry.started_at.max(other.started_at);
                entry.last_heard = entry.last_heard.max(other.last_heard);
                entry.ended |= other.ended;
                piece.changed |= before.as_ref() != Some(entry);
            }
        }
    }

    /// Takes in what a look has shown. Who was heard of last before `since` counts as heard of then:
    /// what is known may be of a copy.
    pub fn note(
        &mut self,
        listed: &[Listed],
        replicas: &[Replica],
        now: UnixTime,
        since: UnixTime,
        kept: Duration,
    ) {
        for listed in listed.iter().filter(|listed| listed.proxy == ProxyStatus::Running) {
            // It may be served by a replica that we do not reach.
            self.heard(&listed.pod_uid, &listed.name, None, now);
        }
        for member in replicas.iter().flat_map(|replica| &replica.members) {
            let Instance { pod_uid, started_at } = &member.instance;
            let heard = if member.open { now } else { member.last_heard };
            self.heard(pod_uid, &member.name, Some(*started_at), heard);
        }
        for listed in listed.iter().filter(|listed| listed.proxy == ProxyStatus::Ended) {
            self.piece(&listed.pod_uid).end(&listed.pod_uid);
        }
        for piece in &mut self.pieces {
            let before = piece.members.len();
            piece.members.retain(|_, entry| now <= entry.last_heard.max(since) + kept);
            piece.changed |= piece.members.len() != before;
        }
    }

    /// Takes in who has ended, as it was told: also of whom nobody has heard yet, since a replica may
    /// tell of it later.
    pub fn end(&mut self, ended: &[Listed], now: UnixTime) {
        for Listed { pod_uid, name, .. } in ended {
            self.heard(pod_uid, name, None, now);
            self.piece(pod_uid).end(pod_uid);
        }
    }

    /// Those who are on no list any more and never ended.
    pub fn vanished(&self, listed: &[Listed]) -> Vec<Vanished> {
        let vanished = self.unlisted(listed).filter(|(_, entry)| !entry.ended);
        vanished
            .map(|(uid, entry)| Vanished {
                instance: Instance { pod_uid: uid.clone(), started_at: entry.started_at },
                name: entry.name.clone(),
                last_heard: entry.last_heard,
            })
            .collect()
    }

    /// Those who ended while they were on the list, and are on no list any more.
    pub fn ended(&self, listed: &[Listed]) -> Vec<Listed> {
        let ended = self.unlisted(listed).filter(|(_, entry)| entry.ended);
        let listed = |(uid, entry): (&String, &Entry)| Listed {
            pod_uid: uid.clone(),
            name: entry.name.clone(),
            proxy: ProxyStatus::Ended,
        };
        ended.map(listed).collect()
    }

    fn unlisted<'a>(
        &'a self,
        listed: &'a [Listed],
    ) -> impl Iterator<Item = (&'a String, &'a Entry)> {
        let listed: HashSet<_> = listed.iter().map(|listed| listed.pod_uid.as_str()).collect();
        let members = self.pieces.iter().flat_map(|piece| &piece.members);
        members.filter(move |(uid, _)| !listed.contains(uid.as_str()))
    }

    /// Times go forward in steps, and ahead of what was heard: a write for each look would be too
    /// many.
    fn heard(&mut self, uid: &str, name: &str, started_at: Option<UnixTime>, heard: UnixTime) {
        let piece = self.piece(uid);
        let started_at = started_at.unwrap_or_default();
        let Some(entry) = piece.members.get_mut(uid) else {
            let (name, last_heard) = (name.to_owned(), heard + STEP);
            piece
                .members
                .insert(uid.to_owned(), Entry { name, started_at, last_heard, ended: false });
            piece.changed = true;
            return;
        };
        if heard > entry.last_heard {
            entry.last_heard = heard + STEP;
            piece.changed = true;
        }
        if started_at > entry.started_at {
            entry.started_at = started_at;
            piece.changed = true;
        }
    }

    /// Where a pod's entry is: the same for ever, in every version.
    fn piece(&mut self, uid: &str) -> &mut Piece {
        let fnv = |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        let hash = uid.bytes().fold(0x811c_9dc5, fnv);
        &mut self.pieces[(hash >> 16) as usize % PIECES]
    }
}

impl Piece {
    fn end(&mut self, uid: &str) {
        if let Some(entry) = self.members.get_mut(uid) {
            self.changed |= !entry.ended;
            entry.ended = true;
        }
    }
}

/// Of 100,000 workloads, each has some 500 KiB; a store takes 1 MiB.
const PIECES: usize = 32;

/// How far ahead a time is written.
const STEP: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use steadfast_rotation_protocol::census::Member;

    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);
    const KEPT: Duration = Duration::from_secs(86_400);

    fn pod(uid: &str, proxy: ProxyStatus) -> Listed {
        Listed { pod_uid: uid.to_owned(), name: format!("demo/{uid}"), proxy }
    }

    /// A replica that once had a stream of this pod.
    fn remembers(uid: &str) -> Replica {
        let member = Member {
            instance: Instance { pod_uid: uid.to_owned(), started_at: NOW },
            name: format!("demo/{uid}"),
            open: false,
            last_heard: NOW,
            answered: 0,
            answered_before: 0,
            used: vec![],
            issuers: vec![],
            ack: None,
            version: None,
        };
        Replica {
            name: "identity".to_owned(),
            reached: true,
            started_at: NOW,
            newest_nonce: 0,
            loaded: vec![],
            own: None,
            members: vec![member],
        }
    }

    impl Ledger {
        /// What is known after a look.
        fn after(&self, listed: &[Listed], replicas: &[Replica], now: UnixTime) -> Self {
            let mut next = self.clone();
            next.pieces.iter_mut().for_each(|piece| piece.changed = false);
            next.note(listed, replicas, now, UnixTime::default(), KEPT);
            next
        }

        fn is_changed(&self) -> bool {
            self.pieces.iter().any(|piece| piece.changed)
        }
    }

    #[test]
    fn whoever_vanishes_is_a_debtor_until_nothing_of_it_can_be_valid() {
        let running = [pod("a", ProxyStatus::Running)];
        let ledger = Ledger::default().after(&running, &[], NOW);
        assert!(ledger.vanished(&running).is_empty());
        let gone = ledger.after(&[], &[], NOW + STEP);
        assert_eq!(gone.vanished(&[]).len(), 1);
        assert_eq!(gone.vanished(&[])[0].name, "demo/a");
        let late = gone.after(&[], &[], NOW + STEP + KEPT + Duration::from_secs(1));
        assert!(late.vanished(&[]).is_empty());
    }

    #[test]
    fn whoever_ended_owes_nothing() {
        let ledger = Ledger::default().after(&[pod("a", ProxyStatus::Running)], &[], NOW);
        let ended = ledger.after(&[pod("a", ProxyStatus::Ended)], &[], NOW);
        assert!(ended.vanished(&[]).is_empty());
    }

    #[test]
    fn whoever_ended_owes_nothing_when_no_list_has_it_and_replicas_still_remember_it() {
        let ledger = Ledger::default().after(&[pod("a", ProxyStatus::Running)], &[], NOW);
        let ended = ledger.after(&[pod("a", ProxyStatus::Ended)], &[], NOW);
        let gone = ended.after(&[], &[remembers("a")], NOW);
        assert!(gone.vanished(&[]).is_empty());
        assert_eq!(gone.ended(&[]), [pod("a", ProxyStatus::Ended)]);
    }

    #[test]
    fn whoever_was_told_to_have_ended_owes_nothing_also_if_it_is_heard_of_only_then() {
        let mut ledger = Ledger::default();
        ledger.end(&[pod("a", ProxyStatus::Ended)], NOW);
        assert!(ledger.is_changed());
        let later = ledger.after(&[], &[remembers("a")], NOW);
        assert!(later.vanished(&[]).is_empty());
        assert_eq!(later.ended(&[]), [pod("a", ProxyStatus::Ended)]);
    }

    #[test]
    fn who_is_known_from_a_copy_is_kept_from_the_recovery_on() {
        let mut copy = Ledger::default().after(&[pod("a", ProxyStatus::Running)], &[], NOW);
        let (recovered_at, late) = (NOW + KEPT * 7, Duration::from_secs(1));
        copy.note(&[], &[], recovered_at + KEPT, recovered_at, KEPT);
        assert_eq!(copy.vanished(&[]).len(), 1);
        copy.note(&[], &[], recovered_at + KEPT + late, recovered_at, KEPT);
        assert_eq!(copy.vanished(&[]), []);
    }

    #[test]
    fn what_a_copy_of_the_store_has_forgotten_is_written_again() {
        let [a, b] = ["a", "b"].map(|uid| pod(uid, ProxyStatus::Running));
        let mut copy = Ledger::default().after(std::slice::from_ref(&a), &[], NOW);
        let known = copy.after(&[b], &[remembers("a")], NOW + STEP * 2);
        copy.pieces.iter_mut().for_each(|piece| piece.changed = false);
        copy.merge(known.clone());
        assert!(copy.is_changed());
        assert_eq!(copy.vanished(&[]), known.vanished(&[]));
        let mut again = copy.after(&[], &[], NOW);
        again.merge(known);
        assert!(!again.is_changed(), "it knows all that already");
    }

    #[test]
    fn a_look_at_the_same_things_changes_nothing_for_an_hour() {
        let running = [pod("a", ProxyStatus::Running), pod("b", ProxyStatus::NotStarted)];
        let ledger = Ledger::default().after(&running, &[], NOW);
        assert!(ledger.is_changed());
        assert!(!ledger.after(&running, &[], NOW + STEP).is_changed());
        let later = ledger.after(&running, &[], NOW + STEP + Duration::from_secs(1));
        assert!(later.is_changed());
    }

    #[test]
    fn of_a_hundred_thousand_workloads_no_piece_is_too_large_for_a_store() {
        let uid = |n: u32| format!("{:08x}-0000-4000-8000-{n:012x}", n.wrapping_mul(0x9e37_79b9));
        let running: Vec<_> = (0..100_000).map(|n| pod(&uid(n), ProxyStatus::Running)).collect();
        let ledger = Ledger::default().after(&running, &[], NOW);
        let bytes = |piece: &Piece| serde_json::to_vec(&piece.members).unwrap().len();
        let largest = ledger.pieces.iter().map(bytes).max().unwrap();
        assert!(largest < 800 * 1024, "{largest}");
    }
}
