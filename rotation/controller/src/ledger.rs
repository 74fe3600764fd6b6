//! The ledger of instances: who was there once, so that nobody is forgotten who has vanished.
//!
//! Replicas keep what they know in memory and may restart; a pod that was cut off or deleted by
//! force is on no list any more. What was seen is therefore kept in the store: one object, written
//! when somebody joins or vanishes and once an hour for the times, never for each ack. An entry
//! goes when nothing of it can be valid any more, or when the platform says that it has ended.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::UnixTime;
use steadfast_rotation_protocol::Instance;
use steadfast_rotation_protocol::census::{Listed, ProxyStatus, Replica, Vanished};

/// Who was there, by pod UID: the newest start of each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    members: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    name: String,
    started_at: UnixTime,
    /// At least as late as it was really heard of.
    last_heard: UnixTime,
}

impl Ledger {
    /// What is known after a look; equal to what was known before if nothing needs to be written.
    #[must_use]
    pub fn after(
        &self,
        listed: &[Listed],
        replicas: &[Replica],
        now: UnixTime,
        kept: Duration,
    ) -> Self {
        let mut next = self.clone();
        for listed in listed.iter().filter(|listed| listed.proxy == ProxyStatus::Running) {
            // It may be served by a replica that we do not reach.
            next.note(&listed.pod_uid, &listed.name, None, now);
        }
        for member in replicas.iter().flat_map(|replica| &replica.members) {
            let Instance { pod_uid, started_at } = &member.instance;
            let heard = if member.open { now } else { member.last_heard };
            next.note(pod_uid, &member.name, Some(*started_at), heard);
        }
        let ended = listed.iter().filter(|listed| listed.proxy == ProxyStatus::Ended);
        let ended: HashSet<_> = ended.map(|listed| listed.pod_uid.as_str()).collect();
        next.members
            .retain(|uid, entry| !ended.contains(uid.as_str()) && now <= entry.last_heard + kept);
        next
    }

    /// Those who are on no list any more.
    pub fn vanished(&self, listed: &[Listed]) -> Vec<Vanished> {
        let listed: HashSet<_> = listed.iter().map(|listed| listed.pod_uid.as_str()).collect();
        let vanished = self.members.iter().filter(|(uid, _)| !listed.contains(uid.as_str()));
        vanished
            .map(|(uid, entry)| Vanished {
                instance: Instance { pod_uid: uid.clone(), started_at: entry.started_at },
                name: entry.name.clone(),
                last_heard: entry.last_heard,
            })
            .collect()
    }

    /// Times go forward in steps, and ahead of what was heard: a write for each look would be too
    /// many.
    fn note(&mut self, uid: &str, name: &str, started_at: Option<UnixTime>, heard: UnixTime) {
        let entry = self.members.entry(uid.to_owned()).or_insert_with(|| Entry {
            name: name.to_owned(),
            started_at: UnixTime::default(),
            last_heard: heard + STEP,
        });
        if heard > entry.last_heard {
            entry.last_heard = heard + STEP;
        }
        entry.started_at = entry.started_at.max(started_at.unwrap_or_default());
    }
}

/// How far ahead a time is written.
const STEP: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);
    const KEPT: Duration = Duration::from_secs(86_400);

    fn pod(uid: &str, proxy: ProxyStatus) -> Listed {
        Listed { pod_uid: uid.to_owned(), name: format!("demo/{uid}"), proxy }
    }

    #[test]
    fn whoever_vanishes_is_a_debtor_until_nothing_of_it_can_be_valid() {
        let running = [pod("a", ProxyStatus::Running)];
        let ledger = Ledger::default().after(&running, &[], NOW, KEPT);
        assert!(ledger.vanished(&running).is_empty());
        let gone = ledger.after(&[], &[], NOW + STEP, KEPT);
        assert_eq!(gone.vanished(&[]).len(), 1);
        assert_eq!(gone.vanished(&[])[0].name, "demo/a");
        let late = gone.after(&[], &[], NOW + STEP + KEPT + Duration::from_secs(1), KEPT);
        assert!(late.vanished(&[]).is_empty());
    }

    #[test]
    fn whoever_ended_owes_nothing() {
        let ledger = Ledger::default().after(&[pod("a", ProxyStatus::Running)], &[], NOW, KEPT);
        let ended = ledger.after(&[pod("a", ProxyStatus::Ended)], &[], NOW, KEPT);
        assert!(ended.vanished(&[]).is_empty());
    }

    #[test]
    fn a_look_at_the_same_things_changes_nothing_for_an_hour() {
        let running = [pod("a", ProxyStatus::Running), pod("b", ProxyStatus::NotStarted)];
        let ledger = Ledger::default().after(&running, &[], NOW, KEPT);
        assert_eq!(ledger.after(&running, &[], NOW + STEP, KEPT), ledger);
        let later = ledger.after(&running, &[], NOW + STEP + Duration::from_secs(1), KEPT);
        assert_ne!(later, ledger);
    }
}
