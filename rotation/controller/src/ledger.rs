//! The ledger of instances: who was there once, so that nobody is forgotten who has vanished.
//!
//! Replicas keep what they know in memory and may restart; a pod that was cut off or deleted by
//! force is on no list any more. What was seen is therefore kept in the store: one object, written
//! when somebody joins or vanishes and once an hour for the times, never for each ack. That the
//! platform said of a pod that it has ended is kept, too: soon no list has it any more, while
//! replicas still remember its stream. An entry goes when nothing of it can be valid any more.

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
    /// The platform has said so once: nothing of it runs.
    #[serde(default)]
    ended: bool,
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
        for listed in listed.iter().filter(|listed| listed.proxy == ProxyStatus::Ended) {
            if let Some(entry) = next.members.get_mut(&listed.pod_uid) {
                entry.ended = true;
            }
        }
        next.members.retain(|_, entry| now <= entry.last_heard + kept);
        next
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

    fn unlisted(&self, listed: &[Listed]) -> impl Iterator<Item = (&String, &Entry)> {
        let listed: HashSet<_> = listed.iter().map(|listed| listed.pod_uid.clone()).collect();
        self.members.iter().filter(move |(uid, _)| !listed.contains(uid.as_str()))
    }

    /// Times go forward in steps, and ahead of what was heard: a write for each look would be too
    /// many.
    fn note(&mut self, uid: &str, name: &str, started_at: Option<UnixTime>, heard: UnixTime) {
        let entry = self.members.entry(uid.to_owned()).or_insert_with(|| Entry {
            name: name.to_owned(),
            started_at: UnixTime::default(),
            last_heard: heard + STEP,
            ended: false,
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
    fn whoever_ended_owes_nothing_when_no_list_has_it_and_replicas_still_remember_it() {
        let ledger = Ledger::default().after(&[pod("a", ProxyStatus::Running)], &[], NOW, KEPT);
        let ended = ledger.after(&[pod("a", ProxyStatus::Ended)], &[], NOW, KEPT);
        let gone = ended.after(&[], &[remembers("a")], NOW, KEPT);
        assert!(gone.vanished(&[]).is_empty());
        assert_eq!(gone.ended(&[]), [pod("a", ProxyStatus::Ended)]);
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
