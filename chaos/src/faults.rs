//! What goes wrong, and how it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::Rng as _;
use steadfast_api::UnixTime;
use steadfast_platform::store::{RESOURCES_PREFIX, TRUST_DOMAIN_KEY};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::rotation::PhaseName;

use crate::parts::Entries;
use crate::plan::{DAY, HOUR, Hazard, MINUTE};
use crate::world::{Event, World};

/// Something that is wrong until it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Half of all acks are lost.
    AcksLost,
    /// Workloads are suspended.
    Asleep {
        workload: usize,
        life: u32,
    },
    /// It was killed between two of its calls.
    ControllerAway(usize),
    ControllerClock(usize),
    ControllerCut(usize),
    /// A second controller beside the first, which was frozen and goes on.
    Double(u32),
    IdentityAway,
    /// The platform's list is a minute behind.
    ListingLags,
    NodeClock(usize),
    NodeCut(usize),
    ReplicaAway(usize),
    ReplicaClock(usize),
    ReplicaCut(usize),
    /// Nobody reaches the store.
    StoreAway,
    /// A workload that was deleted by force and runs on.
    Lost {
        workload: usize,
        life: u32,
    },
}

/// What is wrong now.
#[derive(Default)]
pub(crate) struct Faults {
    pub(crate) acks_lost: bool,
    pub(crate) listing_lags: bool,
    pub(crate) over: bool,
    pub(crate) restored_at: Option<UnixTime>,
    /// Nobody could notice that the store was put back: the history ends there.
    pub(crate) unnoticed: bool,
    /// What lived when it was put back: replicas, then controllers, each with its life.
    witnesses: (Vec<u32>, Vec<u32>),
    /// What was published then: its seq and digest.
    published: (u64, [u8; 32]),
    /// The store as it was, one copy of each phase.
    backups: BTreeMap<Option<PhaseName>, Entries>,
    /// The phases of which a copy was put back.
    restored: BTreeSet<Option<PhaseName>>,
    lasting: Vec<Fault>,
}

impl World {
    pub(crate) fn fault(&mut self) {
        if self.faults.over {
            return;
        }
        self.one_fault();
        let at = self.later(self.plan.fault_every);
        self.queue.push(at, Event::Fault);
    }

    pub(crate) fn one_fault(&mut self) {
        if self.faults.over {
            return;
        }
        let replica = self.rng.random_range(0..self.replicas.len());
        let node = self.rng.random_range(0..self.nodes.len());
        let some = self.rng.random_range(0..self.workloads.len());
        let seconds = |low: u64, high: u64| (Duration::from_secs(low), Duration::from_secs(high));
        match self.rng.random_range(0..23) {
            0..2 => {
                let time = self.between(seconds(16, 7200));
                self.count_fault("replica frozen");
                self.tell(|| format!("replica {replica} is frozen for {time:?}"));
                self.freeze_replica(replica, time);
            }
            2..4 => {
                self.kill_replica(replica);
                self.lasts(Fault::ReplicaAway(replica), seconds(1, 600));
            }
            4 => {
                self.cut_from_store(replica, true);
                self.lasts(Fault::ReplicaCut(replica), seconds(20, 3600));
            }
            5 => {
                self.refresh(replica);
                let off_ms = self.offset(200_000);
                self.replicas[replica].clock.set_off_ms(off_ms);
                self.lasts(Fault::ReplicaClock(replica), seconds(600, 40_000));
            }
            6 => {
                for replica in 0..self.replicas.len() {
                    self.kill_replica(replica);
                }
                self.lasts(Fault::IdentityAway, seconds(3600, 36_000));
            }
            7..10 => {
                let calls = self.rng.random_range(0..60);
                self.arm(calls);
            }
            10..12 => self.double(),
            12 => {
                let off_ms = self.offset(200_000);
                self.controllers[0].clock.set_off_ms(off_ms);
                self.lasts(Fault::ControllerClock(0), seconds(600, 20_000));
            }
            13 => {
                self.faults.acks_lost = true;
                self.lasts(Fault::AcksLost, seconds(600, 86_400));
            }
            14 => {
                self.faults.listing_lags = true;
                self.lasts(Fault::ListingLags, seconds(600, 86_400));
            }
            15 => {
                let off_ms = self.offset(600_000);
                self.set_node_clock(node, off_ms);
                self.lasts(Fault::NodeClock(node), seconds(600, 172_800));
            }
            16 => self.cut_node(node),
            17 => {
                for _ in 0..self.rng.random_range(1..4) {
                    self.suspend();
                }
            }
            18 => self.lose(some),
            19 => {
                self.controllers[0].cut_from_store = true;
                self.lasts(Fault::ControllerCut(0), seconds(20, 7200));
            }
            20 if self.plan.wanted.workloads < 1000 || self.chance(20) => self.restart_all(),
            21 if self.chance(40) => self.restore(),
            22 => {
                for replica in 0..self.replicas.len() {
                    self.cut_from_store(replica, true);
                }
                for controller in &mut self.controllers {
                    controller.cut_from_store = true;
                }
                self.lasts(Fault::StoreAway, seconds(20, 7200));
            }
            _ => {}
        }
    }

    fn between(&mut self, (low, high): (Duration, Duration)) -> Duration {
        // Short ones are as frequent as long ones.
        let share: f64 = self.rng.random_range(0.0..1.0);
        low.mul_f64((high.as_secs_f64() / low.as_secs_f64()).powf(share))
    }

    fn offset(&mut self, most: i64) -> i64 {
        self.rng.random_range(-most..most)
    }

    pub(crate) fn count_fault(&mut self, name: &str) {
        *self.counts.faults.entry(name.to_owned()).or_default() += 1;
    }

    /// The controller dies after so many calls, before the last one is done or after.
    pub(crate) fn arm(&mut self, calls: u32) {
        if self.faults.over {
            return;
        }
        let done = self.chance(50);
        self.controllers[0].dies_at = Some((calls, done));
    }

    /// The first controller has died between two of its calls, and is started again after a while.
    pub(crate) fn controller_died(&mut self) {
        let phase = self.phase();
        self.count_fault(&format!("controller killed, {}", name_of(phase)));
        let most = if self.plan.wanted.hazard == Hazard::All { MINUTE * 15 } else { MINUTE };
        let bounds = (Duration::from_secs(1), most);
        self.lasts(Fault::ControllerAway(0), bounds);
    }

    pub(crate) fn phase(&self) -> Option<PhaseName> {
        self.state.rotation.as_ref().map(|rotation| rotation.phase.name())
    }

    pub(crate) fn restart_all(&mut self) {
        let phase = self.phase();
        self.count_fault(&format!("all workloads restarted, {}", name_of(phase)));
        self.tell(|| "all workloads are restarted".to_owned());
        for index in 0..self.workloads.len() {
            if self.reaches(index) {
                self.start_workload(index);
            }
        }
    }

    fn lasts(&mut self, fault: Fault, bounds: (Duration, Duration)) {
        let time = self.between(bounds);
        self.count_fault(fault.name());
        self.tell(|| format!("fault: {fault:?} for {time:?}"));
        self.faults.lasting.push(fault);
        self.queue.push(self.now + time, Event::FaultEnds(fault));
    }

    /// The first controller is frozen, and another one started: later both go on.
    fn double(&mut self) {
        if self.controllers.len() > 1 && self.controllers[1].task.is_some() {
            return;
        }
        let bounds = (Duration::from_secs(5), HOUR * 3);
        let (frozen, beside) = (self.between(bounds), self.between(bounds));
        self.controllers[0].frozen_until = self.now + frozen;
        self.start_controller(1);
        let life = self.controllers[1].life;
        self.lasts(Fault::Double(life), (frozen + beside, frozen + beside + MINUTE));
    }

    pub(crate) fn set_node_clock(&mut self, node: usize, off_ms: i64) {
        let those: Vec<_> =
            (0..self.workloads.len()).filter(|w| self.workloads[*w].node == node).collect();
        for index in &those {
            if self.workloads[*index].running && !self.workloads[*index].asleep {
                self.idle(*index);
            }
        }
        self.nodes[node].off_ms = off_ms;
        for index in those {
            let who = &mut self.workloads[index];
            who.overslept = true;
            let life = who.life;
            if who.running && !who.asleep {
                // It looks at its clock within half a minute.
                let at = self.now + self.draw(Duration::from_secs(30));
                self.workloads[index].wakes_at = Some(at);
                self.queue.push(at, Event::Wake { workload: index, life });
            }
        }
    }

    fn cut_node(&mut self, node: usize) {
        if self.nodes[node].cut {
            return;
        }
        self.nodes[node].cut = true;
        for index in 0..self.workloads.len() {
            if self.workloads[index].node == node {
                self.hang_up(index);
            }
        }
        self.lasts(Fault::NodeCut(node), (MINUTE * 10, DAY * 4));
    }

    /// A workload sleeps, hours or weeks.
    fn suspend(&mut self) {
        let index = self.rng.random_range(0..self.workloads.len());
        if !self.reaches(index) {
            return;
        }
        self.idle(index);
        self.hang_up(index);
        let who = &mut self.workloads[index];
        (who.asleep, who.overslept) = (true, true);
        let life = who.life;
        self.lasts(Fault::Asleep { workload: index, life }, (HOUR, DAY * 21));
    }

    /// A pod is deleted by force, and runs on where nobody reaches it.
    fn lose(&mut self, index: usize) {
        if !self.reaches(index) {
            return;
        }
        self.hang_up(index);
        self.workloads[index].lost = true;
        let key = self.workloads[index].resource_key();
        self.store.put(&key, None);
        let life = self.workloads[index].life;
        self.lasts(Fault::Lost { workload: index, life }, (HOUR, DAY * 10));
        // Something takes its place.
        self.add_workload();
    }

    pub(crate) fn fault_ends(&mut self, fault: Fault) {
        let Some(index) = self.faults.lasting.iter().position(|lasting| *lasting == fault) else {
            return;
        };
        self.faults.lasting.swap_remove(index);
        self.tell(|| format!("over: {fault:?}"));
        match fault {
            Fault::AcksLost => self.faults.acks_lost = false,
            Fault::ListingLags => self.faults.listing_lags = false,
            Fault::Asleep { workload, life } => self.awake(workload, life),
            Fault::ControllerAway(index) => {
                if self.controllers[index].task.is_none() {
                    self.start_controller(index);
                }
            }
            Fault::ControllerClock(index) => self.controllers[index].clock.set_off_ms(0),
            Fault::ControllerCut(index) => self.controllers[index].cut_from_store = false,
            Fault::Double(life) => {
                if self.controllers[1].life == life {
                    self.kill_controller(1);
                }
            }
            Fault::IdentityAway => {
                for replica in 0..self.replicas.len() {
                    self.start_replica(replica);
                }
                self.stir_all();
            }
            Fault::NodeClock(node) => self.set_node_clock(node, 0),
            Fault::NodeCut(node) => {
                self.nodes[node].cut = false;
                let at = self.now + self.draw(MINUTE);
                self.queue.push(at, Event::Mount { node });
                for index in 0..self.workloads.len() {
                    if self.workloads[index].node == node {
                        self.stir(index);
                    }
                }
            }
            Fault::ReplicaAway(replica) => {
                self.start_replica(replica);
                self.stir_all();
            }
            Fault::ReplicaClock(replica) => {
                self.refresh(replica);
                self.replicas[replica].clock.set_off_ms(0);
            }
            Fault::ReplicaCut(replica) => {
                self.cut_from_store(replica, false);
                self.read_soon(replica);
            }
            Fault::StoreAway => {
                for replica in 0..self.replicas.len() {
                    self.cut_from_store(replica, false);
                    self.read_soon(replica);
                }
                for controller in &mut self.controllers {
                    controller.cut_from_store = false;
                }
            }
            Fault::Lost { workload, life } => {
                if self.workloads[workload].life == life {
                    self.stop_workload(workload);
                    self.release(workload);
                }
            }
        }
    }

    fn awake(&mut self, index: usize, life: u32) {
        let who = &mut self.workloads[index];
        if who.life != life {
            return;
        }
        who.asleep = false;
        if !self.nodes[self.workloads[index].node].cut {
            self.stir(index);
        }
    }

    /// Nothing goes wrong from now on.
    pub(crate) fn end_faults(&mut self) {
        self.faults.over = true;
        for controller in &mut self.controllers {
            controller.dies_at = None;
        }
        for fault in self.faults.lasting.clone() {
            self.fault_ends(fault);
        }
        for index in 0..self.replicas.len() {
            self.start_replica(index);
        }
        if self.controllers[0].task.is_none() {
            self.start_controller(0);
        }
        for node in 0..self.nodes.len() {
            if self.nodes[node].off_ms.unsigned_abs() > 1000 {
                self.set_node_clock(node, 0);
            }
        }
        self.stir_all();
        self.tell(|| "nothing goes wrong from now on".to_owned());
    }

    /// Keeps a copy of each phase, now and then a newer one.
    pub(crate) fn back_up(&mut self) {
        let phase = self.phase();
        if self.chance(30) || !self.faults.backups.contains_key(&phase) {
            self.faults.backups.insert(phase, self.store.copy(RESOURCES_PREFIX));
        }
    }

    /// The store is put back as it was in one of the phases, each as likely as any other.
    fn restore(&mut self) {
        let phases: Vec<_> = self.faults.backups.keys().copied().collect();
        if !phases.is_empty() && self.faults.restored_at.is_none() {
            let which = self.rng.random_range(0..phases.len());
            self.restore_from(phases[which]);
        }
    }

    /// As one copy after the other is put back, while all is well in between.
    pub(crate) fn restore_next(&mut self) {
        let fresh = |copy: &Entries| {
            let now = self.store.get(TRUST_DOMAIN_KEY).map(|entry| entry.value);
            copy.get(TRUST_DOMAIN_KEY).map(|entry| entry.value) != now
        };
        let mut copies = self.faults.backups.iter();
        let next =
            copies.find(|(phase, copy)| !self.faults.restored.contains(phase) && fresh(copy));
        let next = next.map(|(phase, _)| phase);
        if let Some(next) = next.copied()
            && self.faults.restored_at.is_none()
            && self.unwell().is_none()
        {
            self.restore_from(next);
        }
    }

    fn restore_from(&mut self, phase: Option<PhaseName>) {
        let Some(copy) = self.faults.backups.remove(&phase) else { return };
        self.count_fault(&format!("store put back, {}", name_of(phase)));
        self.refresh_all();
        self.store.put_back(copy, RESOURCES_PREFIX);
        let Some(entry) = self.store.get(TRUST_DOMAIN_KEY) else { return };
        let state: TrustDomainState = serde_json::from_slice(&entry.value).unwrap();
        self.tell(|| format!("the store is put back to seq {}, {}", state.seq, name_of(phase)));
        let before = std::mem::replace(&mut self.state, std::sync::Arc::new(state));
        let after = std::sync::Arc::clone(&self.state);
        self.truth.restored(&before, &after, self.now);
        self.recount_all();
        let changed = *before != *self.state;
        self.faults.restored_at = changed.then_some(self.now);
        self.faults.restored.insert(phase);
        self.faults.witnesses = self.alive();
        self.faults.published = (before.seq, before.digest());
        self.faults.backups.clear();
        self.mount_soon();
        for replica in 0..self.replicas.len() {
            self.read_soon(replica);
        }
    }

    /// Whether nobody is left who has seen the store before it was put back, or what is published is
    /// what was published then.
    pub(crate) fn none_has_seen(&self) -> bool {
        if self.faults.published == (self.state.seq, self.state.digest()) {
            return true;
        }
        let ((replicas, controllers), (r, c)) = (&self.faults.witnesses, self.alive());
        let same = |then: &[u32], now: &[u32]| then.iter().zip(now).any(|(then, now)| then == now);
        !same(replicas, &r) && !same(controllers, &c)
    }

    fn alive(&self) -> (Vec<u32>, Vec<u32>) {
        let replicas = self.replicas.iter().map(|replica| replica.life).collect();
        (replicas, self.controllers.iter().map(|controller| controller.life).collect())
    }

    /// Writes the state in the name of a person.
    pub(crate) fn order(
        &mut self,
        what: &str,
        change: impl FnOnce(&mut TrustDomainState, UnixTime) -> bool,
    ) -> bool {
        let mut state = TrustDomainState::clone(&self.state);
        if !change(&mut state, self.now) || state == *self.state {
            return false;
        }
        *self.counts.orders.entry(what.to_owned()).or_default() += 1;
        self.truth.recovers = matches!(what, "recover" | "rescue");
        self.refresh_all();
        let value = serde_json::to_vec(&state).unwrap();
        let revision = self.store.put(TRUST_DOMAIN_KEY, Some(value.into()));
        self.state_written(&format!("a person ({what})"), revision);
        true
    }
}

impl Fault {
    const fn name(self) -> &'static str {
        match self {
            Self::StoreAway => "store away",
            Self::AcksLost => "half the acks lost",
            Self::Asleep { .. } => "workload asleep",
            Self::ControllerAway(_) => "controller away",
            Self::ControllerClock(_) => "controller's clock off",
            Self::ControllerCut(_) => "controller cut off",
            Self::Double(_) => "controller doubled",
            Self::IdentityAway => "identity away for hours",
            Self::ListingLags => "listing behind",
            Self::Lost { .. } => "pod gone without a word",
            Self::NodeClock(_) => "node's clock off",
            Self::NodeCut(_) => "node cut off",
            Self::ReplicaAway(_) => "replica killed",
            Self::ReplicaClock(_) => "replica's clock off",
            Self::ReplicaCut(_) => "replica cut from the store",
        }
    }
}

pub(crate) fn name_of(phase: Option<PhaseName>) -> String {
    phase
        .map_or_else(|| "between rotations".to_owned(), |phase| format!("{phase:?}").to_lowercase())
}
