//! What `steadfast trust recover` orders: the way back where no phase can be left any more, since
//! nobody can be asked, or since the store forgot what workloads hold.
//!
//! *Everything expired*: the active anchor can sign nothing that would live, and no SVID is alive.
//! So there is nobody who could refuse anybody: an anchor that lasts, or a fresh one, becomes active
//! without a census, and everybody comes back by the mounted bundle and their token.
//!
//! *Restored store*: workloads hold a bundle that the stored state has never published. What they
//! tell ([`Findings`]) is put together with what is stored: a sequence number above all that was
//! seen, every tombstone, every denied issuer, and the anchors that the store has forgotten, as far
//! as their keys are ours: SVIDs under them are alive, so they are drained like any other. Nothing
//! else is taken on a workload's word. Where nobody can tell, the keys do: one that is there and that
//! the state does not know is of an anchor that was made since; one that is gone, of an anchor that
//! was withdrawn since, which can sign nothing more.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, UnixTime};

use crate::census::{self, ProxyStatus, Round};
use crate::controller::Observation;
use crate::rotation::{
    Activated, Generating, Goal, Next, Phase, Preparing, Rotation, Staged, Withdrawn, withdraw,
};
use crate::trust_domain::{
    AnchorRecord, AnchorState, Condemned, DeniedIssuer, Halt, Promise, TrustDomainState,
};

/// What only a person can order to be healed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ailment {
    /// The active anchor can sign nothing that would live.
    Expired {
        /// Its end.
        anchor_ended: UnixTime,
        /// The last SVID under any issuer has ended by then.
        svids_ended: UnixTime,
    },
    /// Workloads hold what the store has never published.
    Restored {
        /// The highest sequence number that was seen.
        seen_seq: u64,
    },
}

/// Why nothing can be recovered (yet).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoverRefused {
    /// Somebody may still have an SVID.
    #[error(
        "SVIDs may be valid until {0}: as long as one is, anchors are only replaced by a rotation"
    )]
    Alive(UnixTime),
    /// Nothing is wrong that needs a person.
    #[error("the trust domain is neither halted nor expired: there is nothing to recover")]
    Well,
}

/// What workloads hold and the stored state does not, as those tell who were asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// When they were asked.
    pub at: UnixTime,
    /// Of the state that was found wanting: of another they may say too little.
    #[serde(default)]
    pub revision: u64,
    /// The highest sequence number that anybody uses.
    pub seq: u64,
    /// How many have told.
    pub told: usize,
    /// Who has not, by name.
    pub silent: Vec<String>,
    /// The anchors that somebody uses.
    pub anchors: Vec<HeldAnchor>,
    /// The anchors that somebody knows to be withdrawn.
    pub tombstones: Vec<Held>,
    /// The issuers that somebody denies.
    pub denied: Vec<Held>,
    /// The anchors of ours that the state publishes and whose key is gone.
    #[serde(default)]
    pub keyless: Vec<KeyId>,
}

/// Something that workloads hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// What.
    pub id: KeyId,
    /// How many of them.
    pub by: usize,
}

/// An anchor that workloads use, or may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldAnchor {
    /// Which.
    pub id: KeyId,
    /// How many of them; 0: nobody said so, but its key is here.
    pub by: usize,
    /// Its record, where the state has none and its key is ours; it is never a workload's word.
    pub record: Option<AnchorRecord>,
}

impl Findings {
    /// What a round of answers tells. Those who hold what is stored say so by their digest alone; of
    /// another bundle, one that they do not name says nothing, as a replica may have sent it before
    /// the store was put back.
    pub fn of(state: &TrustDomainState, round: &Round, at: UnixTime) -> Self {
        let digest = KeyId::from_slice(&state.digest());
        let tells =
            |ack: &&census::Ack| ack.held.is_some() || (ack.seq, ack.digest) == (state.seq, digest);
        let mut acks = BTreeMap::new();
        for replica in round.replicas.iter().filter(|replica| replica.reached) {
            let members = replica.members.iter().filter(|member| member.open);
            acks.extend(members.filter_map(|m| Some((&m.instance, m.ack.as_ref().filter(tells)?))));
        }
        let told = |uid: &str| acks.keys().any(|instance| instance.pod_uid == uid);
        let running = round.listed.iter().filter(|listed| listed.proxy == ProxyStatus::Running);
        let silent = running.filter(|listed| !told(&listed.pod_uid));
        let held = || acks.values().filter_map(|ack| ack.held.as_ref());
        let anchors = count(held().flat_map(|held| &held.anchors));
        let seqs = acks.values().map(|ack| ack.seq).filter(|seq| is_believable(state, *seq));
        Self {
            at,
            revision: 0,
            seq: seqs.max().unwrap_or(0),
            told: acks.len(),
            silent: silent.map(|listed| listed.name.clone()).collect(),
            anchors: anchors
                .into_iter()
                .map(|Held { id, by }| HeldAnchor { id, by, record: None })
                .collect(),
            tombstones: count(held().flat_map(|held| &held.tombstones)),
            denied: count(held().flat_map(|held| &held.denied)),
            keyless: Vec::new(),
        }
    }

    /// Takes in what the controller holds itself: it may be the only one who can tell.
    pub fn and_own(&mut self, state: &TrustDomainState, seq: u64, own: &census::Held) {
        if !is_believable(state, seq) {
            return;
        }
        self.seq = self.seq.max(seq);
        self.told = self.told.max(1);
        for id in &own.anchors {
            if !self.anchors.iter().any(|held| held.id == *id) {
                self.anchors.push(HeldAnchor { id: *id, by: 1, record: None });
            }
        }
        for (known, ids) in
            [(&mut self.tombstones, &own.tombstones), (&mut self.denied, &own.denied)]
        {
            for id in ids {
                if !known.iter().any(|held| held.id == *id) {
                    known.push(Held { id: *id, by: 1 });
                }
            }
        }
    }

    /// Takes in which keys of anchors there are.
    pub fn and_kept(&mut self, state: &TrustDomainState, kept: &[KeyId]) {
        let ours = state.published().filter(|anchor| !anchor.is_external());
        self.keyless = ours.map(|anchor| anchor.id).filter(|id| !kept.contains(id)).collect();
        for id in kept {
            let known = state.anchor(*id).is_some() || state.tombstones.contains(id);
            if !known && !self.anchors.iter().any(|held| held.id == *id) {
                self.anchors.push(HeldAnchor { id: *id, by: 0, record: None });
            }
        }
    }

    /// Anchors that are used, not withdrawn, and unknown to this state: their records are wanted.
    pub fn forgotten<'a>(
        &'a self,
        state: &'a TrustDomainState,
    ) -> impl Iterator<Item = &'a HeldAnchor> {
        let withdrawn = |id: KeyId| {
            state.tombstones.contains(&id) || self.tombstones.iter().any(|held| held.id == id)
        };
        let published = |id| state.published().any(|anchor| anchor.id == id);
        self.anchors.iter().filter(move |held| !withdrawn(held.id) && !published(held.id))
    }
}

fn count<'a>(ids: impl Iterator<Item = &'a KeyId>) -> Vec<Held> {
    let mut counts: BTreeMap<KeyId, usize> = BTreeMap::new();
    for id in ids {
        *counts.entry(*id).or_default() += 1;
    }
    counts.into_iter().map(|(id, by)| Held { id, by }).collect()
}

/// A workload's word for a sequence number counts within reason: one that nothing could be above
/// would end all rotations.
fn is_believable(state: &TrustDomainState, seq: u64) -> bool {
    seq <= state.seq.saturating_add(SEQ_AHEAD_MAX)
}

/// The highest sequence number of a bundle that somebody holds and this state never published; its
/// own, if the store itself shows that it was put back.
pub(crate) fn unknown_bundle(
    state: &TrustDomainState,
    seen: &Observation,
    went_back: bool,
) -> Option<u64> {
    let digest = KeyId::from_slice(&state.digest());
    let replicas = || seen.round.iter().flat_map(|round| &round.replicas);
    let members = replicas().flat_map(|replica| &replica.members);
    let acks = members.filter(|member| member.open).filter_map(|member| member.ack.as_ref());
    let acks = acks.chain(replicas().filter_map(|replica| replica.own.as_ref()));
    let unknown = acks.filter(|ack| {
        is_believable(state, ack.seq)
            && (ack.seq > state.seq || ack.seq == state.seq && ack.seq > 0 && ack.digest != digest)
    });
    unknown.map(|ack| ack.seq).max().or_else(|| went_back.then_some(state.seq))
}

impl TrustDomainState {
    /// What is wrong that only a person can order to be healed.
    pub fn ailment(&self, now: UnixTime, skew: Duration) -> Option<Ailment> {
        if let Some(Halt::Restored { seen_seq }) = self.halted {
            return Some(Ailment::Restored { seen_seq });
        }
        let active = self.active_anchor().filter(|active| !signs(active, now, skew))?;
        let rescued = self.rotation.as_ref().is_some_and(|rotation| rotation.rescue);
        let svids_ended = self.svids_ended(skew);
        (!rescued).then_some(Ailment::Expired { anchor_ended: active.not_after, svids_ended })
    }

    /// No SVID is alive any more: an anchor that lasts becomes active, or a fresh one, without a
    /// census. Everything that was under way is over.
    ///
    /// # Errors
    /// [`RecoverRefused`]
    pub fn rescue(
        &mut self,
        by: String,
        now: UnixTime,
        skew: Duration,
    ) -> Result<(), RecoverRefused> {
        match self.ailment(now, skew) {
            Some(Ailment::Expired { svids_ended, .. }) if svids_ended > now => {
                return Err(RecoverRefused::Alive(svids_ended));
            }
            Some(Ailment::Expired { .. }) => {}
            Some(Ailment::Restored { .. }) | None => return Err(RecoverRefused::Well),
        }
        let lasts = |anchor: &&AnchorRecord| {
            let needed = anchor.svid_life_max + skew * 3;
            anchor.taint.is_none() && anchor.not_after > now + needed
        };
        // Nobody has an SVID, so nobody has to hold it already.
        let to = self.published().filter(lasts).max_by_key(|a| (a.state, a.not_after));
        let to = to.map(|anchor| anchor.id);
        if let Some(rotation) = self.rotation.take()
            && let Phase::Generating(_) = rotation.phase
        {
            self.condemned.push(Condemned::MadeFor(rotation.label()));
        }
        (self.requested, self.wanted_issuer, self.issuer_rotation) = (None, None, None);
        self.paused = false;
        let (goal, phase) = self.toward(to);
        self.rotations += 1;
        let rotation = Rotation::begin(self.rotations, by, goal, now);
        self.rotation = Some(Rotation { rescue: true, phase, ..rotation });
        Ok(())
    }

    /// After the store was put back: what is stored and what is held become one. A rotation follows
    /// in any case, whose census shows that everybody holds it.
    pub fn recover(&mut self, found: &Findings, by: String, now: UnixTime) {
        // 1. Above everything that was seen.
        let seen_seq = self.halted.take().map_or(0, |Halt::Restored { seen_seq }| seen_seq);
        self.seq = self.seq.max(found.seq).max(seen_seq).saturating_add(1);
        // What was wished for may have been answered, and the key of the answer destroyed.
        self.wanted_issuer = None;
        // 2. What was withdrawn stays so.
        let mut changed = false;
        for Held { id, .. } in &found.tombstones {
            let lives = self.anchor(*id).is_some_and(|a| a.state != AnchorState::Withdrawn);
            if lives {
                withdraw(self, *id);
                changed = true;
            } else if !self.tombstones.contains(id) {
                self.tombstones.push(*id);
            }
        }
        // 3. What was forgotten comes back to be drained: SVIDs under it are alive.
        let forgotten: Vec<_> =
            found.forgotten(self).filter_map(|held| held.record.clone()).collect();
        for record in forgotten {
            self.anchors.retain(|anchor| anchor.id != record.id);
            self.unsettled.push(record.id);
            self.anchors.push(AnchorRecord { state: AnchorState::Retiring, ..record });
            changed = true;
        }
        // 4. What has lost its key signs nothing more: it was withdrawn since, and if not, it is now.
        for anchor in self.anchors.iter_mut().filter(|anchor| found.keyless.contains(&anchor.id)) {
            use AnchorState::{Active, Retiring, Staged, Standby};
            if matches!(anchor.state, Active | Staged | Standby) {
                self.unsettled.push(anchor.id);
                anchor.state = Retiring;
                changed = true;
            }
        }
        // 5. What was denied stays so; its end is not known to those who deny it.
        for Held { id, .. } in &found.denied {
            if !self.denies(*id) {
                let until = self.issuer(*id).map_or(now + ISSUER_LIFE_MAX, |i| i.not_after);
                self.denied_issuers.push(DeniedIssuer { id: *id, until });
            }
        }
        // 6. SVIDs may have been issued under anything until now, also to whoever cannot ack.
        self.activated_at = now;
        // Later than the one before, whatever a clock said then: it tells them apart.
        let moment = Duration::from_millis(1);
        let before = self.recovered_at.map(|before| before + moment);
        self.recovered_at = Some(now.max(before.unwrap_or_default()));
        self.promise_again(now);
        // 7. What was under way goes on, if it is about anchors that are still what they were.
        match &mut self.rotation {
            Some(rotation) if !changed => {
                rotation.since = now;
                rotation.restart_deadline(now);
                // An abort since may have taken back what was added, of which no tombstone tells:
                // who holds it is asked once more. In a rescue nobody can be asked, or aborts.
                let asks = !rotation.turned_back && !rotation.rescue;
                if let (Phase::Preparing(_), true, Some(added)) =
                    (&rotation.phase, asks, rotation.added)
                {
                    rotation.phase = Phase::Staged(Staged { added });
                    self.set_state(added, AnchorState::Staged);
                }
            }
            _ => self.settle_after_recovery(found, by, now),
        }
    }

    /// What was promised since the copy was made is forgotten: whatever kind of holder was ever
    /// promised anything may hold an SVID under any anchor.
    fn promise_again(&mut self, now: UnixTime) {
        let holders: BTreeSet<_> = self.promised.drain(..).map(|promise| promise.holder).collect();
        for holder in holders {
            let published = self.anchors.iter().filter(|anchor| anchor.state.published());
            self.promised.extend(published.map(|anchor| Promise {
                anchor_id: anchor.id,
                holder: holder.clone(),
                not_after: now + anchor.svid_life_max,
            }));
        }
    }

    fn settle_after_recovery(&mut self, found: &Findings, by: String, now: UnixTime) {
        let (goal, phase) = match self.active_anchor() {
            Some(_) if self.in_state(AnchorState::Retiring).next().is_some() => {
                (Goal::Removal, Phase::Activated(Activated))
            }
            Some(_) => (Goal::Removal, Phase::Withdrawn(Withdrawn)),
            None => {
                let to = self.heir(found, now);
                let staged = to.and_then(|to| self.anchor(to));
                let staged = staged.filter(|anchor| anchor.state == AnchorState::Staged);
                if let Some(staged) = staged.map(|anchor| anchor.id) {
                    self.unsettled.push(staged);
                    self.set_state(staged, AnchorState::Retiring);
                }
                self.toward(to)
            }
        };
        // Without any anchor nobody could recognise identity, so that nobody could be asked.
        let rescue = matches!(phase, Phase::Generating(_)) && self.cannot_issue(now);
        self.requested = None;
        self.rotations += 1;
        let rotation = Rotation::begin(self.rotations, by, goal, now);
        self.rotation = Some(Rotation { phase, rescue, ..rotation });
    }

    /// The anchor that becomes active where a recovery leaves none: one that everybody holds, the
    /// standby, else the one that most tell of. Where nobody can be asked about a fresh one, any that
    /// some hold will do: what was staged may have been active since, and a stolen one is replaced
    /// as soon as it is active.
    fn heir(&self, found: &Findings, now: UnixTime) -> Option<KeyId> {
        use AnchorState::{Retiring, Standby};
        let told = |anchor: &AnchorRecord| {
            let held = found.anchors.iter().find(|held| held.id == anchor.id);
            held.map_or(0, |held| held.by)
        };
        let kept = self.published().filter(|anchor| !found.keyless.contains(&anchor.id));
        let held = |a: &AnchorRecord| a.taint.is_none() && matches!(a.state, Standby | Retiring);
        let usable = kept.filter(|anchor| held(anchor) || self.cannot_issue(now));
        // Of those that as many tell of, the first.
        let first = usable.min_by_key(|anchor| {
            (anchor.taint.is_some(), anchor.state != Standby, Reverse(told(anchor)))
        });
        first.map(|anchor| anchor.id)
    }

    /// To this anchor, with an issuer of its own whose key is there; else to a fresh one.
    fn toward(&mut self, to: Option<KeyId>) -> (Goal, Phase) {
        let next = to.map_or(Next::Added, Next::Standby);
        let phase = match to {
            Some(to) => {
                self.issuers.retain(|issuer| issuer.anchor_id != to);
                Phase::Preparing(Preparing { to })
            }
            None => Phase::Generating(Generating),
        };
        (Goal::Successor { next, canary: None }, phase)
    }

    /// Whether an anchor that has not signed yet may have, before the store was put back.
    pub(crate) fn may_have_issued(&self, id: KeyId, now: UnixTime, skew: Duration) -> bool {
        use AnchorState::{Staged, Standby};
        let unused = self.anchor(id).filter(|a| matches!(a.state, Staged | Standby));
        unused.zip(self.recovered_at).is_some_and(|(anchor, recovered_at)| {
            now <= recovered_at + self.read_lease + anchor.svid_life_max + skew
        })
    }

    /// Nobody can sign with the active issuer, whatever replicas have loaded: it is denied or over,
    /// or its anchor is not believed. Identity has no SVID of its own then, so that it could not
    /// even be asked; and nothing is lost by another issuer.
    pub(crate) fn cannot_issue(&self, now: UnixTime) -> bool {
        self.active_issuer().is_none_or(|issuer| {
            let believed =
                |anchor: &AnchorRecord| anchor.id == issuer.anchor_id && anchor.not_after > now;
            now >= issuer.not_after || self.denies(issuer.id) || !self.published().any(believed)
        })
    }

    /// By when the last SVID of any issuer has ended, on every clock.
    fn svids_ended(&self, skew: Duration) -> UnixTime {
        let ends = self.issuers.iter().map(|issuer| {
            let anchor = self.anchor(issuer.anchor_id).map(|anchor| anchor.not_after - skew);
            anchor.map_or(issuer.not_after, |ends| ends.min(issuer.not_after))
        });
        // An SVID ends a skew before its issuer, and clocks are off by no more.
        ends.max().unwrap_or_default()
    }
}

/// Whether an issuer under this anchor could sign anything that lives for a moment.
pub(crate) fn signs(anchor: &AnchorRecord, now: UnixTime, skew: Duration) -> bool {
    anchor.not_after > now + skew * 2
}

/// A word for a sequence number further ahead than this is not believed.
const SEQ_AHEAD_MAX: u64 = 1 << 20;
/// No issuer lives longer that anybody could still deny.
const ISSUER_LIFE_MAX: Duration = Duration::from_secs(366 * 86_400);
