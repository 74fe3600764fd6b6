//! A store that is put back: what a backup takes away, how a replica notices, and the way on.

use std::collections::BTreeSet;
use std::sync::Arc;

use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::recover::{Findings, Held};
use steadfast_rotation_protocol::trust_domain::Halt;

use super::parts::{Proxy, Served};
use super::{Config, NOW, TICK, World};
use crate::shortcut::Shortcut;

impl World {
    /// A replica reads the store. One that has seen a later state acts on no earlier one, and says
    /// that the store was put back.
    pub(super) fn read(&mut self, config: &Config, i: usize) -> Option<()> {
        let served = Served::of(&self.state);
        let recovered_at = self.state.recovered_at;
        let replica = self.nodes[i].replica.as_mut()?;
        let is_behind = |seq: u64| seq > served.seq;
        if !config.revisions_fall {
            if replica.served.as_ref().is_some_and(|held| is_behind(held.seq)) {
                return None;
            }
            (replica.served, replica.leased) = (Some(served), true);
            return Some(());
        }
        let held = replica.served.as_ref().zip(replica.read);
        let went_back = held.filter(|(held, (known, held_recovered_at))| {
            let recovered = recovered_at > *held_recovered_at;
            let older = self.revision < *known || is_behind(held.seq);
            let compares = config.shortcut != Some(Shortcut::RevisionsAreNotCompared);
            compares && older && !served.halted && !recovered
        });
        if let Some((held, _)) = went_back {
            let halt = Halt::Restored { seen_seq: held.seq };
            Arc::make_mut(&mut self.state).halted = Some(halt);
            self.raise_revision();
            return Some(());
        }
        (replica.served, replica.read) = (Some(served), Some((self.revision, recovered_at)));
        replica.leased = true;
        Some(())
    }

    /// The backup is put back: the whole store with its revisions, or the state is written again.
    pub(super) fn restore(&mut self, config: &Config) -> Option<()> {
        self.faults.restores -= 1;
        let (state, revision) = self.backup.take()?;
        self.state = state;
        self.revision = if config.revisions_fall { revision } else { self.revision + 1 };
        Some(())
    }

    /// A person has looked: what workloads hold and what is stored become one.
    pub(super) fn recover(&mut self) {
        let proxies = || self.nodes.iter().filter_map(|node| node.proxy.as_ref());
        let seq = proxies().map(|proxy| proxy.seq).max().unwrap_or(0);
        let held = |ids: fn(&Proxy) -> &Vec<KeyId>| {
            let ids: BTreeSet<_> = proxies().flat_map(ids).copied().collect();
            ids.into_iter().map(|id| Held { id, by: 1 }).collect::<Vec<_>>()
        };
        let (tombstones, denied) = (held(|p| &p.tombstones), held(|p| &p.denied));
        let found = Findings { seq, tombstones, denied, ..Findings::default() };
        let now = UnixTime::from_millis(NOW * TICK);
        Arc::make_mut(&mut self.state).recover(&found, "a person".to_owned(), now);
        self.raise_revision();
    }

    /// The state was written.
    pub(super) fn raise_revision(&mut self) {
        self.revision += 1;
    }
}
