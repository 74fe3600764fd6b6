//! The person: gives orders at random moments, and sees to what waits for a person.
//!
//! Orders are the product's own functions on the stored state.

use std::time::Duration;

use rand::Rng as _;
use steadfast_api::UnixTime;
use steadfast_identity::authority::{SKEW, make_anchor};
use steadfast_platform::store::{FINDINGS_KEY, TRUST_DOMAIN_KEY};
use steadfast_rotation_protocol::controller::Wait;
use steadfast_rotation_protocol::recover::{Ailment, Findings};
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{AnchorState, CanaryPlan, Request, Selector};

use crate::plan::{HOUR, Hazard, MINUTE};
use crate::world::{Event, World};

/// What the person remembers.
#[derive(Default)]
pub(crate) struct Operator {
    /// Since when the same census is waited for.
    stalled_since: Option<UnixTime>,
    paused_until: Option<UnixTime>,
    /// How long a stall is looked at before anybody is exempted.
    patience: Duration,
}

impl World {
    /// Once an hour, and sometimes in the middle of things.
    pub(crate) fn operate(&mut self) {
        self.see_to_what_waits();
        match self.plan.wanted.hazard {
            Hazard::Restores => {
                if !self.faults.over {
                    self.restore_next();
                }
                self.order_canary("store put back, canary");
            }
            Hazard::DeadlyWrites => self.order_canary("controller killed, canary"),
            Hazard::All | Hazard::None | Hazard::Restarts => {}
        }
        if self.plan.wanted.hazard == Hazard::All && !self.faults.over {
            let share = HOUR.as_secs_f64() / self.plan.order_every.as_secs_f64();
            if self.rng.random_bool(share.min(1.0)) {
                self.order_at_random();
            }
        }
        self.queue.push(self.now + HOUR, Event::Operator);
    }

    /// In the middle of a rotation.
    pub(crate) fn interfere(&mut self) {
        if self.faults.over || self.state.rotation.is_none() {
            return;
        }
        match self.plan.wanted.hazard {
            Hazard::All => {}
            Hazard::Restarts => {
                if self.phase() == Some(PhaseName::Draining) {
                    let at = self.now + self.draw(Duration::from_secs(40));
                    self.queue.push(at, Event::RestartAll);
                }
                return;
            }
            Hazard::DeadlyWrites | Hazard::None | Hazard::Restores => return,
        }
        if self.chance(10) {
            let calls = self.rng.random_range(0..12);
            self.arm(calls);
        }
        if self.phase() == Some(PhaseName::Draining) && self.chance(5) {
            let at = self.now + self.draw(MINUTE);
            self.queue.push(at, Event::RestartAll);
        }
        if self.chance(15) {
            let most = if self.chance(50) { Duration::from_secs(40) } else { MINUTE * 20 };
            let at = self.now + self.draw(most);
            self.queue.push(at, Event::Interference { order: true });
        }
        if self.chance(20) {
            let most = if self.chance(70) { Duration::from_secs(40) } else { MINUTE * 20 };
            let at = self.now + self.draw(most);
            self.queue.push(at, Event::Interference { order: false });
        }
    }

    fn see_to_what_waits(&mut self) {
        self.invariant_l4_is_never_late();
        self.invariant_l2_the_missing_are_named();
        if self.operator.paused_until.is_some_and(|until| self.now >= until) || self.faults.over {
            self.operator.paused_until = None;
            self.order("resume", |state, _| {
                state.pause(false);
                true
            });
        }
        if self.state.halted.is_none()
            && self.faults.restored_at.is_some_and(|at| self.now > at + HOUR * 3)
        {
            self.restored_store_is_noticed();
        }
        let often = if self.faults.over { 100 } else { 30 };
        match self.state.ailment(self.now, SKEW) {
            Some(Ailment::Restored { .. }) if self.chance(often) => self.recover(),
            Some(Ailment::Expired { .. }) if self.chance(often) => self.rescue(),
            _ => {}
        }
        self.exempt_who_stalls();
        self.abort_without_canaries();
    }

    /// As `steadfast trust recover` does, by what the controller has found out.
    fn recover(&mut self) {
        let Some(entry) = self.store.get(FINDINGS_KEY) else { return };
        let Ok(mut found) = serde_json::from_slice::<Findings>(&entry.value) else { return };
        let state = self.store.get(TRUST_DOMAIN_KEY);
        if state.is_none_or(|state| state.revision.0 != found.revision) {
            return;
        }
        // Ids are drawn by the machine and not by the seed.
        found.anchors.sort_by_key(|held| {
            let name = self.name(held.id);
            (name.len(), name)
        });
        self.faults.restored_at = None;
        self.order("recover", |state, now| {
            state.recover(&found, "operator".to_owned(), now);
            true
        });
    }

    /// As the same does when everything has expired.
    fn rescue(&mut self) {
        self.order("rescue", |state, now| state.rescue("operator".to_owned(), now, SKEW).is_ok());
    }

    /// What a person has asked to go first does not exist.
    fn abort_without_canaries(&mut self) {
        let waiting = self.controllers[0].seen.lock().unwrap().waiting.clone();
        if matches!(waiting, Some(Wait::Canary(standing)) if standing.canaries == 0) {
            self.order("abort", |state, _| state.abort().is_ok());
        }
    }

    fn exempt_who_stalls(&mut self) {
        let waiting = self.controllers[0].seen.lock().unwrap().waiting.clone();
        let Some(Wait::Census(tally)) = waiting else {
            self.operator.stalled_since = None;
            return;
        };
        if self.operator.stalled_since.is_none() {
            let first = tally.missing.first().map(|who| (who.name.clone(), who.reason.label()));
            self.tell(|| format!("a census waits for {}: {first:?}", tally.missing.len()));
        }
        let since = *self.operator.stalled_since.get_or_insert(self.now);
        if self.operator.patience.is_zero() {
            self.operator.patience = HOUR * self.rng.random_range(3..40);
        }
        if self.faults.over || self.now < since + self.operator.patience {
            return;
        }
        self.operator.stalled_since = None;
        self.operator.patience = Duration::ZERO;
        self.tell(|| {
            let missing = tally.missing.iter().map(|who| (&who.name, who.instance.started_at));
            format!("a person exempts {:?}", missing.collect::<Vec<_>>())
        });
        self.order("exempt", |state, now| {
            for missing in tally.missing {
                let reason = "it has not answered for hours".to_owned();
                let by = "operator".to_owned();
                state.exempt(missing.instance, missing.name, reason, by, now);
            }
            true
        });
    }

    pub(crate) fn order_at_random(&mut self) {
        if self.faults.over {
            return;
        }
        let by = || "operator".to_owned();
        let minutes =
            |low: u32, high: u32, world: &mut Self| MINUTE * world.rng.random_range(low..high);
        match self.rng.random_range(0..100) {
            0..22 => {
                let canary = self.canary();
                let what = if canary.is_some() { "rotate, canary" } else { "rotate" };
                self.order(what, |state, at| {
                    state
                        .request(Request { by: by(), at, anchor: None, replaces: None, canary })
                        .is_ok()
                });
            }
            22..32 => self.rotate_to_given(),
            32..48 => {
                self.order("abort", |state, _| state.abort().is_ok());
            }
            48..56 => {
                self.operator.paused_until = Some(self.now + minutes(1, 600, self));
                self.order("pause", |state, _| {
                    state.pause(true);
                    true
                });
            }
            56..62 => self.taint(AnchorState::Active),
            62..67 => self.taint(AnchorState::Standby),
            67..72 => self.taint(AnchorState::Retiring),
            72..75 => self.taint(AnchorState::Staged),
            75..83 => {
                self.order("rotate issuer", |state, now| {
                    state.rotate_issuer(by(), None, now).is_ok()
                });
            }
            83..88 => {
                let deadline = minutes(2, 30, self);
                self.order("rotate issuer, urgent", |state, now| {
                    state.rotate_issuer(by(), Some(deadline), now).is_ok()
                });
            }
            88..94 => {
                let index = self.rng.random_range(0..self.workloads.len());
                let who = &self.workloads[index];
                let name = format!("{}/{}", who.namespace, who.uid);
                let instance = steadfast_rotation_protocol::Instance {
                    pod_uid: who.uid.clone(),
                    started_at: who.started_at,
                };
                if who.running {
                    self.order("exempt", |state, now| {
                        state.exempt(instance, name, "a whim".to_owned(), by(), now);
                        true
                    });
                }
            }
            _ => {
                self.order("unexempt", |state, _| {
                    let first = state.exemptions.first().map(|e| e.instance.pod_uid.clone());
                    first.is_some_and(|uid| state.unexempt(&uid).is_ok())
                });
            }
        }
    }

    /// Until this has happened: no schedule begins a rotation with canaries.
    fn order_canary(&mut self, fault: &str) {
        let well = self.faults.restored_at.is_none() && self.unwell().is_none();
        let free = self.state.rotation.is_none() && self.state.requested.is_none();
        if self.faults.over || self.counts.faults.contains_key(fault) || !well || !free {
            return;
        }
        let plan =
            CanaryPlan { selector: Selector::Namespace("shop".to_owned()), window: MINUTE * 10 };
        let (by, canary) = ("operator".to_owned(), Some(plan));
        self.order("rotate, canary", |state, at| {
            state.request(Request { by, at, anchor: None, replaces: None, canary }).is_ok()
        });
    }

    fn canary(&mut self) -> Option<CanaryPlan> {
        let selector = match self.rng.random_range(0..6) {
            0 => Selector::Namespace("shop".to_owned()),
            1 => Selector::Percent(self.rng.random_range(0..101)),
            _ => return None,
        };
        Some(CanaryPlan { selector, window: MINUTE * self.rng.random_range(1..120) })
    }

    /// With an anchor of the person's own, that everybody still has to learn.
    fn rotate_to_given(&mut self) {
        let domain = self.state.trust_domain.clone();
        let made = make_anchor(&domain, self.now, self.plan.anchor_life).unwrap();
        if self.state.rotation.is_some() || self.state.requested.is_some() {
            return;
        }
        self.anchor_keys.put(&made.pkcs8);
        let canary = self.canary();
        self.order("rotate to a given anchor", |state, at| {
            state.anchors.push(made.as_anchor(AnchorState::Generated));
            let by = "operator".to_owned();
            state.request(Request { by, at, anchor: Some(made.id), replaces: None, canary }).is_ok()
        });
    }

    fn taint(&mut self, which: AnchorState) {
        let deadline = MINUTE * self.rng.random_range(1..30);
        let id = self.state.in_state(which).next().map(|anchor| anchor.id);
        let Some(id) = id else { return };
        let what = format!("taint {which:?}");
        self.order(&what, |state, _| state.taint(id, "operator".to_owned(), deadline).is_ok());
    }
}
