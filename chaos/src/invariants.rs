//! What must always hold, checked after whatever can have touched it.
//!
//! The words are those of the rotation protocol. Who accepts whom is a question of few classes: what
//! the workloads believe, and under which anchors their SVIDs are; so it is asked of those, not of
//! pairs of workloads.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use steadfast_api::{KeyId, TrustAnchor, TrustBundle, UnixTime};
use steadfast_identity::authority::{SKEW, make_anchor};
use steadfast_identity_client::Trust;
use steadfast_platform::Revision;
use steadfast_rotation_protocol::census::Member;
use steadfast_rotation_protocol::controller::Wait;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{AnchorState, Exemption};
use steadfast_rotation_protocol::{Instance, TrustDomainState};

use crate::workload::Leaf;
use crate::world::{TaskId, World};

/// An invariant that did not hold.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which: S1 to S10 or L1 to L5.
    pub invariant: &'static str,
    /// When.
    pub at: UnixTime,
    /// What was seen.
    pub what: String,
}

/// As what a workload counts for who accepts whom: what it believes, and under which anchor the
/// SVID is that it shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counted {
    class: usize,
    anchor: KeyId,
}

/// What the checks know of the past.
#[derive(Default)]
pub(crate) struct Truth {
    /// How many believe what.
    believe: BTreeMap<usize, usize>,
    /// How many show an SVID under which anchor.
    show: BTreeMap<KeyId, usize>,
    /// Anchors that a census has settled once.
    settled: BTreeSet<KeyId>,
    /// What was ever published, by sequence number: anchors and denied issuers.
    published: BTreeSet<(u64, BTreeSet<KeyId>, BTreeSet<KeyId>)>,
    /// Anchors whose rotation is done: nobody may trust them.
    done: BTreeSet<KeyId>,
    ever_done: BTreeSet<KeyId>,
    ever_active: BTreeSet<KeyId>,
    /// The end of each issuer, and of the anchor above it if that is earlier.
    ends: BTreeMap<KeyId, UnixTime>,
    /// What each controller read last.
    read: BTreeMap<usize, Revision>,
    /// Whoever was exempt when the store was put back, which does not know it any more.
    cut_off: Vec<Exemption>,
    /// The newest start of each pod that a controller was told of.
    heard: BTreeMap<String, UnixTime>,
    /// The next write is a recovery, which puts together what is stored and what is held, and begins
    /// a rotation about it.
    pub(crate) recovers: bool,
    /// When the old anchor was withdrawn.
    withdrawn_at: UnixTime,
    /// When the controller could first have begun what was due; for lateness.
    pub(crate) hindered_until: UnixTime,
    /// Checks by name.
    pub(crate) checks: BTreeMap<&'static str, u64>,
}

impl Truth {
    pub(crate) fn new(founded: &TrustDomainState) -> Self {
        let mut truth = Self::default();
        truth.settled.extend(founded.published().map(|anchor| anchor.id));
        truth.remember(founded);
        truth
    }

    /// What was published stays a fact.
    fn remember(&mut self, state: &TrustDomainState) {
        let anchors = state.published().map(|anchor| anchor.id).collect();
        let denied = state.denied_issuers.iter().map(|denied| denied.id).collect();
        self.published.insert((state.seq, anchors, denied));
        self.ever_active.extend(state.active_anchor().map(|anchor| anchor.id));
        for issuer in &state.issuers {
            let anchor = state.anchor(issuer.anchor_id).map(|anchor| anchor.not_after);
            let ends = issuer.not_after.min(anchor.unwrap_or(issuer.not_after));
            self.ends.insert(issuer.id, ends);
        }
    }

    pub(crate) fn read_by(&mut self, controller: usize, revision: Revision) {
        self.read.insert(controller, revision);
    }

    /// The store was put back: what is published again is not done any more, until somebody looks.
    pub(crate) fn restored(
        &mut self,
        before: &TrustDomainState,
        state: &TrustDomainState,
        now: UnixTime,
    ) {
        // What was done in time may have been forgotten.
        self.hindered_until = now + HINDERED;
        self.cut_off.extend_from_slice(&before.exemptions);
        for anchor in state.published() {
            self.done.remove(&anchor.id);
        }
        self.remember(state);
    }
}

impl World {
    /// Says that an invariant does not hold: the first one ends the run.
    fn breaks(&mut self, invariant: &'static str, what: String) {
        if self.broken.is_none() {
            self.tell(|| format!("{invariant} DOES NOT HOLD: {what}"));
            self.broken = Some(Violation { invariant, at: self.now, what });
        }
    }

    /// As [`World::breaks`], unless it holds.
    pub(crate) fn check(
        &mut self,
        invariant: &'static str,
        holds: bool,
        what: impl FnOnce(&Self) -> String,
    ) {
        *self.truth.checks.entry(invariant).or_default() += 1;
        if !holds {
            let what = what(self);
            self.breaks(invariant, what);
        }
    }

    /// A workload shows another SVID, believes something else, or plays another part.
    pub(crate) fn count(&mut self, index: usize) {
        let who = &self.workloads[index];
        let now = who
            .svid
            .filter(|svid| who.running && svid.not_after > self.now)
            .zip(who.trust)
            .filter(|_| !self.is_exempt(index))
            .map(|(svid, class)| Counted { class, anchor: svid.anchor });
        let before = std::mem::replace(&mut self.workloads[index].counted, now);
        if before == now {
            return;
        }
        if let Some(Counted { class, anchor }) = before {
            less(&mut self.truth.believe, class);
            less(&mut self.truth.show, anchor);
        }
        let Some(Counted { class, anchor }) = now else { return };
        let first_believes = more(&mut self.truth.believe, class);
        let first_shows = more(&mut self.truth.show, anchor);
        if first_believes || first_shows {
            self.invariant_s1_mutual_acceptance();
        }
    }

    /// A controller is told of them.
    pub(crate) fn told_of(&mut self, members: &[Member]) {
        let mut newer = BTreeSet::new();
        for Instance { pod_uid, started_at } in members.iter().map(|member| &member.instance) {
            let known = self.truth.heard.entry(pod_uid.clone()).or_default();
            if started_at > known {
                *known = *started_at;
                newer.insert(pod_uid.as_str());
            }
        }
        self.recount(&newer);
    }

    fn recount(&mut self, uids: &BTreeSet<&str>) {
        let indexes = uids.iter().filter_map(|uid| self.by_uid.get(*uid).copied());
        for index in indexes.collect::<Vec<_>>() {
            self.count(index);
        }
    }

    /// Everybody counts as the state has it now.
    pub(crate) fn recount_all(&mut self) {
        for index in 0..self.workloads.len() {
            self.count(index);
        }
    }

    /// Whether nobody waits for this start of it: what is exempt stays so until somebody is told that
    /// it has started anew.
    pub(crate) fn is_exempt(&self, index: usize) -> bool {
        let who = &self.workloads[index];
        let exempt = self.state.exemptions.iter().chain(&self.truth.cut_off);
        exempt.filter(|exempt| exempt.instance.pod_uid == who.uid).any(|exempt| {
            exempt.instance.started_at == who.started_at
                || who.began <= exempt.at + self.plan.timings.skew
                || self.truth.heard.get(&who.uid).is_none_or(|heard| *heard < who.started_at)
        })
    }

    /// S1: the anchor of every live SVID is believed by everyone who lives.
    fn invariant_s1_mutual_acceptance(&mut self) {
        let mut refused = None;
        for class in self.truth.believe.keys() {
            let trust = self.trusts.of(*class);
            for anchor in self.truth.show.keys() {
                if !trust.anchors().iter().any(|believed| believed.id() == *anchor) {
                    refused = Some((*class, *anchor));
                }
            }
        }
        self.check("S1", refused.is_none(), |world| {
            let (class, anchor) = refused.unwrap_or_else(|| (0, KeyId::of_spki(b"")));
            let find = |is: &dyn Fn(Counted) -> bool| {
                let mut those = world.workloads.iter().filter(|who| who.counted.is_some_and(is));
                those.next().map_or_else(String::new, |who| who.uid.clone())
            };
            let (believes, shows) =
                (find(&|counted| counted.class == class), find(&|c| c.anchor == anchor));
            let seq = world.trusts.of(class).sequence();
            format!(
                "{believes}, which uses the bundle of seq {seq}, does not accept {shows}, whose \
                 SVID is under {}",
                world.name(anchor)
            )
        });
    }

    /// S1, of two that really meet.
    pub(crate) fn after_handshake(&mut self, one: usize, other: usize) {
        for (judge, shown) in [(one, other), (other, one)] {
            let (judge, shown) = (&self.workloads[judge], &self.workloads[shown]);
            let (Some(class), Some(leaf)) = (judge.counted, shown.counted) else { continue };
            let trust = self.trusts.of(class.class);
            let holds = trust.anchors().iter().any(|anchor| anchor.id() == leaf.anchor);
            let (judge, shown) = (judge.uid.clone(), shown.uid.clone());
            self.check("S1", holds, |_| format!("{judge} does not accept {shown}"));
            self.counts.handshakes += 1;
        }
    }

    /// Everything about a write of the state.
    pub(crate) fn after_write(&mut self, before: &TrustDomainState) {
        let after = std::sync::Arc::clone(&self.state);
        if before.exemptions != after.exemptions {
            let both = before.exemptions.iter().chain(&after.exemptions);
            let uids: BTreeSet<_> = both.map(|e| e.instance.pod_uid.as_str()).collect();
            self.recount(&uids);
        }
        self.truth.remember(&after);
        let phase = |state: &TrustDomainState| state.rotation.as_ref().map(|r| r.phase.name());
        if phase(&after) == Some(PhaseName::Withdrawn) && phase(before) != phase(&after) {
            self.truth.withdrawn_at = self.now;
        }
        self.invariant_s3_settled_by_all(&after);
        self.invariant_s4_issuers_end_first(before, &after);
        self.invariant_s5_tombstones_stay(before, &after);
        if !std::mem::take(&mut self.truth.recovers) {
            self.invariant_s6_one_at_a_time(before, &after);
        }
        self.invariant_s8_never_empty(before, &after);
        self.invariant_s2_no_residual_trust(before, &after);
        self.invariant_l4_begins_in_time(before, &after);
    }

    /// S2: when a rotation is done, nobody trusts the old anchor any more.
    fn invariant_s2_no_residual_trust(
        &mut self,
        before: &TrustDomainState,
        after: &TrustDomainState,
    ) {
        let gone = before.in_state(AnchorState::Withdrawn).map(|anchor| anchor.id);
        let gone: Vec<_> = gone.filter(|id| after.anchor(*id).is_none()).collect();
        for id in gone {
            self.truth.done.insert(id);
            self.truth.ever_done.insert(id);
            let believed = |trust: &Trust| trust.anchors().iter().any(|a| a.id() == id);
            let live = self.truth.believe.keys().find(|class| believed(self.trusts.of(**class)));
            let live = live.copied();
            // Whoever began since the anchor was withdrawn began with what was published then.
            let mounted = self.workloads.iter().find(|who| {
                who.counted.is_some()
                    && who.began < self.truth.withdrawn_at
                    && self.nodes[who.node].mounted.anchors.contains(&id)
            });
            let mounted = mounted.map(|who| who.uid.clone());
            self.check("S2", live.is_none() && mounted.is_none(), |world| {
                let mut who = world.workloads.iter();
                let who = who.find(|who| who.counted.is_some_and(|c| Some(c.class) == live));
                format!(
                    "{} is done with, but believed (seq {:?} by {:?}) or mounted ({mounted:?})",
                    world.name(id),
                    live.map(|class| world.trusts.of(class).sequence()),
                    who.map(|who| (&who.uid, who.started_at)),
                )
            });
        }
    }

    /// S3: an anchor counts as acked only when everybody believes it who is not exempt.
    fn invariant_s3_settled_by_all(&mut self, after: &TrustDomainState) {
        let acked = after.anchors.iter().filter(|anchor| after.acked(anchor.id));
        let fresh = acked.filter(|anchor| !self.truth.settled.contains(&anchor.id));
        let fresh: Vec<_> = fresh.map(|anchor| anchor.id).collect();
        for id in fresh {
            self.truth.settled.insert(id);
            let believed = |trust: &Trust| trust.anchors().iter().any(|a| a.id() == id);
            let without =
                self.truth.believe.keys().find(|class| !believed(self.trusts.of(**class)));
            let without = without.copied();
            self.check("S3", without.is_none(), |world| {
                let class = without.unwrap_or_default();
                let who = world.workloads.iter();
                let mut who = who.filter(|who| who.counted.is_some_and(|c| c.class == class));
                format!(
                    "{} counts as acked, but {} does not believe it",
                    world.name(id),
                    who.next().map_or("somebody", |who| &who.uid)
                )
            });
        }
    }

    /// S3 and S4, of each SVID.
    pub(crate) fn after_issue(&mut self, index: usize, leaf: Leaf) {
        let exempt = self.is_exempt(index);
        let settled = exempt || self.truth.settled.contains(&leaf.anchor);
        self.check("S3", settled, |world| {
            format!("an SVID was issued under {}, which no census settled", world.name(leaf.anchor))
        });
        let ends = self.truth.ends.get(&leaf.issuer).copied().unwrap_or_default();
        self.check("S4", leaf.not_after + SKEW <= ends, |world| {
            format!(
                "an SVID of {} ends at {}, and what is above it at {ends}",
                world.name(leaf.issuer),
                leaf.not_after
            )
        });
    }

    /// S4: an issuer ends before its anchor.
    fn invariant_s4_issuers_end_first(
        &mut self,
        before: &TrustDomainState,
        after: &TrustDomainState,
    ) {
        for issuer in after.issuers.iter().filter(|issuer| before.issuer(issuer.id).is_none()) {
            let anchor = after.anchor(issuer.anchor_id);
            let holds = anchor.is_some_and(|anchor| issuer.not_after + SKEW <= anchor.not_after);
            self.check("S4", holds, |world| {
                format!("{} outlives its anchor", world.name(issuer.id))
            });
        }
    }

    /// S5: what is withdrawn is not published again.
    fn invariant_s5_tombstones_stay(
        &mut self,
        before: &TrustDomainState,
        after: &TrustDomainState,
    ) {
        let forgotten = before.tombstones.iter().find(|id| !after.tombstones.contains(id));
        let back = after
            .anchors
            .iter()
            .find(|anchor| anchor.state.published() && after.tombstones.contains(&anchor.id));
        let (forgotten, back) = (forgotten.copied(), back.map(|anchor| anchor.id));
        let holds = forgotten.is_none() && back.is_none() && after.seq >= before.seq;
        self.check("S5", holds, |world| {
            format!(
                "seq {} after {}; forgotten {:?}, back {:?}",
                after.seq,
                before.seq,
                forgotten.map(|id| world.name(id)),
                back.map(|id| world.name(id))
            )
        });
    }

    /// S5, S2 and S10, of the bundle that a workload uses from now on.
    pub(crate) fn after_bundle(&mut self, index: usize, before: Option<usize>, class: usize) {
        let trust = std::sync::Arc::clone(self.trusts.of(class));
        let uid = self.workloads[index].uid.clone();
        if let Some(before) = before.map(|class| std::sync::Arc::clone(self.trusts.of(class))) {
            let kept = trust.tombstones().is_superset(before.tombstones());
            let back = trust.anchors().iter().any(|a| before.tombstones().contains(&a.id()));
            let holds = trust.sequence() >= before.sequence() && kept && !back;
            let seqs = (before.sequence(), trust.sequence());
            self.check("S5", holds, |_| {
                format!("{uid} went from seq {} to {}, or took back a tombstone", seqs.0, seqs.1)
            });
        }
        let residual =
            trust.anchors().iter().map(TrustAnchor::id).find(|id| self.truth.done.contains(id));
        self.check("S2", residual.is_none(), |world| {
            format!("{uid} trusts {:?} again", residual.map(|id| world.name(id)))
        });
        self.invariant_s10_from_the_store(&uid, &trust);
    }

    /// S10: a bundle is what somebody published, less what its holder knows to be withdrawn; also
    /// where a restored store publishes it.
    fn invariant_s10_from_the_store(&mut self, uid: &str, trust: &Trust) {
        let (seq, used) = (trust.sequence(), trust.anchors().iter().map(TrustAnchor::id));
        let used: BTreeSet<_> = used.collect();
        let of_seq =
            (seq, BTreeSet::new(), BTreeSet::new())..(seq + 1, BTreeSet::new(), BTreeSet::new());
        let holds = self.truth.published.range(of_seq).any(|(_, anchors, denied)| {
            anchors.difference(trust.tombstones()).eq(&used) && denied == trust.denied()
        });
        self.check("S10", holds, |_| {
            format!("{uid} uses a bundle of seq {seq} that nobody published")
        });
    }

    /// S6: rotations come one after the other, and anchors are added or removed, never swapped.
    fn invariant_s6_one_at_a_time(&mut self, before: &TrustDomainState, after: &TrustDomainState) {
        let numbers =
            (before.rotation.as_ref().map(|r| r.number), after.rotation.as_ref().map(|r| r.number));
        let in_turn = match numbers {
            (Some(before), Some(after)) => before == after,
            (None, Some(number)) => number == before.rotations + 1 && number == after.rotations,
            _ => after.rotations >= before.rotations,
        };
        let ids = |state: &TrustDomainState| {
            state.published().map(|anchor| anchor.id).collect::<BTreeSet<_>>()
        };
        let (was, is) = (ids(before), ids(after));
        let swapped = was.difference(&is).next().is_some() && is.difference(&was).next().is_some();
        self.check("S6", in_turn && !swapped, |_| {
            format!("rotation {:?} became {:?}; swapped: {swapped}", numbers.0, numbers.1)
        });
    }

    /// S6: a controller writes only over what it has read.
    pub(crate) fn wrote(&mut self, controller: usize, over: Option<Revision>) {
        let read = self.truth.read.get(&controller).copied();
        self.check("S6", read == over, |_| {
            format!("controller {controller} read revision {read:?} and wrote over {over:?}")
        });
    }

    /// S7: the key of an anchor goes when its rotation is done, or when it never was active; that of
    /// an issuer when nobody may use it.
    pub(crate) fn invariant_s7_keys_last(&mut self, task: TaskId, id: KeyId) {
        let state = std::sync::Arc::clone(&self.state);
        let holds = match task {
            TaskId::Controller(_) => {
                self.truth.ever_done.contains(&id)
                    || !self.truth.ever_active.contains(&id)
                        && !state.published().any(|anchor| anchor.id == id)
            }
            TaskId::Replica(_) => {
                let useless = state.issuer(id).is_none_or(|issuer| {
                    state.denies(id) || id != state.active_issuer && issuer.not_after < self.now
                });
                self.refresh_all();
                let signs = |replica: &usize| {
                    self.view(*replica)
                        .is_ok_and(|view| view.signer().is_ok_and(|signer| signer.id() == id))
                };
                useless && !(0..self.replicas.len()).any(|replica| signs(&replica))
            }
        };
        self.check("S7", holds, |world| {
            format!("{task:?} destroys the key of {} before its time", world.name(id))
        });
        self.counts.destroyed += 1;
    }

    /// S8: no write takes away the last anchor that has any life left.
    fn invariant_s8_never_empty(&mut self, before: &TrustDomainState, after: &TrustDomainState) {
        let live = |state: &TrustDomainState| {
            let mut published = state.published();
            published.any(|anchor| anchor.not_after > self.now)
        };
        let holds = after.published().next().is_some() && (live(after) || !live(before));
        self.check("S8", holds, |_| "no anchor that is published has any life left".to_owned());
    }

    /// S9: what a workload has it keeps, whatever it reaches.
    pub(crate) fn invariant_s9_works_to_its_end(&mut self, index: usize) {
        let who = &self.workloads[index];
        let kept = who.keeps.is_none_or(|end| end <= self.now || who.svid.is_some());
        let alive = who.svid.is_some_and(|svid| svid.not_after > self.now);
        let known = !alive || who.machine.installed().is_some();
        let uid = (!kept || !known).then(|| who.uid.clone());
        self.workloads[index].keeps = self.workloads[index].svid.map(|svid| svid.not_after);
        self.check("S9", uid.is_none(), |_| {
            format!("{} let go of an SVID that was not over", uid.unwrap_or_default())
        });
    }

    /// L2: whoever does not hold what a census asks about is named, and holds the phase up: nobody
    /// else knows what the person needs to know.
    pub(crate) fn invariant_l2_the_missing_are_named(&mut self) {
        let (host, state) = (&self.controllers[0], std::sync::Arc::clone(&self.state));
        let looks = host.task.is_some() && host.frozen_until <= self.now && !host.cut_from_store;
        let census = match &host.seen.lock().unwrap().waiting {
            Some(Wait::Census(tally)) if looks => Some(tally.clone()),
            _ => None,
        };
        let (Some(tally), Some(rotation)) = (census, &state.rotation) else { return };
        // It has looked since, whatever it had to wait for.
        if self.now < rotation.since + HINDERED {
            return;
        }
        let named: BTreeSet<_> =
            tally.missing.iter().map(|missing| missing.instance.pod_uid.as_str()).collect();
        let unnamed = self.workloads.iter().enumerate().find(|(index, who)| {
            let seq = who.trust.map(|class| self.trusts.of(class).sequence());
            let asked = who.running && who.began < rotation.since && seq != Some(state.seq);
            // Whose pod is gone is waited for as long as its SVID can live.
            let over = who.lost && who.svid.is_none_or(|svid| svid.not_after <= self.now);
            asked && !over && !self.is_exempt(*index) && !named.contains(who.uid.as_str())
        });
        let unnamed = unnamed.map(|(_, who)| who.uid.clone());
        self.check("L2", unnamed.is_none(), |_| {
            format!("a census waits for {named:?} and not for {}", unnamed.unwrap_or_default())
        });
    }

    /// A store that was put back hours ago has not been noticed. Nobody can, where whoever has seen
    /// it before is gone and replicas show an SVID under an anchor that workloads know to be
    /// withdrawn: no stream opens, so no ack comes. The history ends there.
    pub(crate) fn restored_store_is_noticed(&mut self) {
        let excused = self.none_has_seen();
        self.check("L5", excused, |_| "nobody notices that the store was put back".to_owned());
        self.faults.unnoticed = true;
        self.count_fault("store put back, and nobody could notice");
    }

    /// L4: what begins by schedule begins while there is time for it.
    fn invariant_l4_begins_in_time(&mut self, before: &TrustDomainState, after: &TrustDomainState) {
        let (None, Some(rotation)) = (&before.rotation, &after.rotation) else { return };
        let Some(active) = after.active_anchor().filter(|_| rotation.by == "schedule") else {
            return;
        };
        let life = after.anchors.iter().map(|anchor| anchor.svid_life_max).max();
        let slow_path = self.plan.timings.lease + life.unwrap_or_default() + SKEW;
        let holds = active.not_after >= self.now + slow_path * 2;
        self.check("L4", holds || self.now < self.truth.hindered_until, |_| {
            format!("a rotation begins when its anchor has until {} left", active.not_after)
        });
    }

    /// L4, seen from the other side: while nothing hinders the controller, no anchor in use comes
    /// near its end, and no issuer.
    pub(crate) fn invariant_l4_is_never_late(&mut self) {
        let host = &self.controllers[0];
        let idle = {
            let seen = host.seen.lock().unwrap();
            seen.error.is_none() && seen.waiting == Some(Wait::Nothing)
        };
        let state = std::sync::Arc::clone(&self.state);
        let hindered = !idle
            || host.task.is_none()
            || host.frozen_until > self.now
            || state.paused
            || state.halted.is_some();
        if hindered {
            self.truth.hindered_until = self.now + HINDERED;
        }
        if self.now < self.truth.hindered_until {
            return;
        }
        let life = state.anchors.iter().map(|anchor| anchor.svid_life_max).max();
        let slow_path = self.plan.timings.lease + life.unwrap_or_default() + SKEW;
        let active = state.active_anchor().map(|anchor| anchor.not_after);
        let issuer = state.active_issuer().map(|issuer| issuer.not_after);
        let needed = self.now + self.plan.svid_life / 2;
        let holds = active.is_some_and(|end| end >= self.now + slow_path * 2)
            && issuer.is_some_and(|end| end >= needed);
        self.check("L4", holds, |_| {
            format!("nothing is done, and the anchor ends at {active:?}, the issuer at {issuer:?}")
        });
    }

    /// S10, broken on purpose: a bundle with an anchor of somebody else's.
    pub(crate) fn foreign_bundle(&mut self, class: usize) -> usize {
        let trust = self.trusts.of(class);
        let domain = trust.trust_domain().clone();
        let foreign = make_anchor(&domain, self.now, Duration::from_secs(86_400)).unwrap();
        let mut anchors = trust.anchors().to_vec();
        anchors.push(TrustAnchor::parse(&foreign.der).unwrap());
        let bundle = TrustBundle::new(domain, trust.sequence(), anchors).unwrap();
        let denied: Vec<_> = trust.denied().iter().copied().collect();
        let tombstones: Vec<_> = trust.tombstones().iter().copied().collect();
        let trust = Trust::new(&bundle, denied, tombstones).unwrap();
        self.trusts.class(trust)
    }

    /// Whether all is as it should be when nothing goes wrong any more: L1, L3 and L5, or the first
    /// that does not hold yet.
    pub(crate) fn unwell(&self) -> Option<(&'static str, String)> {
        let state = &self.state;
        if let Some(halt) = state.halted {
            return Some(("L5", format!("the trust domain is halted: {halt:?}")));
        }
        if let Some(rotation) = &state.rotation {
            let phase = rotation.phase.name();
            let waiting = self.controllers.first().map(|c| self.waiting_of(c));
            return Some(("L1", format!("rotation {} is {phase:?}: {waiting:?}", rotation.number)));
        }
        if state.issuer_rotation.is_some() || state.requested.is_some() {
            return Some(("L1", "the rotation of the issuer does not end".to_owned()));
        }
        if state.in_state(AnchorState::Standby).next().is_none() {
            return Some(("L5", "there is no standby".to_owned()));
        }
        for who in self.workloads.iter().filter(|who| who.running) {
            let seq = who.trust.map(|class| self.trusts.of(class).sequence());
            let alive = who.svid.is_some_and(|svid| svid.not_after > self.now);
            if seq != Some(state.seq) || !alive {
                return Some((
                    "L3",
                    format!(
                        "{} has the bundle of seq {seq:?} (published: {}) and {} SVID",
                        who.uid,
                        state.seq,
                        if alive { "an" } else { "no" }
                    ),
                ));
            }
        }
        None
    }

    fn waiting_of(&self, controller: &crate::controller::ControllerHost) -> String {
        let seen = controller.seen.lock().unwrap();
        let mut text = format!("{:?} {:?}", seen.waiting, seen.error);
        text.truncate(600);
        text
    }

    /// Nothing goes wrong any more and all the time there is has passed.
    pub(crate) fn check_liveness(&mut self) {
        let unwell = self.unwell();
        for invariant in ["L1", "L3", "L5"] {
            *self.truth.checks.entry(invariant).or_default() += 1;
        }
        if let Some((invariant, what)) = unwell {
            self.breaks(invariant, what);
        }
    }
}

/// The controller looks again within its longest pause, and needs some rounds then.
const HINDERED: Duration = Duration::from_secs(4 * 3600);

fn more<K: Ord>(counts: &mut BTreeMap<K, usize>, key: K) -> bool {
    let count = counts.entry(key).or_default();
    *count += 1;
    *count == 1
}

fn less<K: Ord>(counts: &mut BTreeMap<K, usize>, key: K) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}
