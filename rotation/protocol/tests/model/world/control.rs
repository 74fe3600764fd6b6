//! The controllers of a world: what they see, what they decide, and what becomes of it.

use std::sync::Arc;
use std::time::Duration;

use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::census::{Listed, ProxyStatus, Replica, Round};
use steadfast_rotation_protocol::controller::{
    Change, Controller, Effect, Made, Memory, Newest, Now, Observation, Persist, Signed, Timings,
    Wait,
};
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::schedule::Schedule;
use steadfast_rotation_protocol::trust_domain::{
    AnchorState, CanaryPlan, Condemned, Label, Request, Selector,
};
use steadfast_rotation_protocol::{Instance, TrustDomainState, journal};

use super::parts::{Ctl, Pending};
use super::{
    CANARY, CANARY_WINDOW, Config, NOW, Order, TICK, World, anchor as anchor_of, issuer, key,
    started, ticks, uid,
};
use crate::shortcut::Shortcut;

impl World {
    /// What a controller would see and decide now.
    pub(crate) fn line(&self, config: &Config, i: usize) -> journal::Line {
        let mut controller = self.controller(config, i);
        let seen = self.observation(config, i);
        journal::handle(&mut controller, timings(config), now(), seen).1
    }

    fn controller(&self, config: &Config, i: usize) -> Controller {
        let Ctl { fence, newest, .. } = &self.controllers[i];
        let newest = newest.map(|(revision, recovered_at)| Newest { revision, recovered_at });
        let memory = Memory { fence: fence.clone(), newest };
        Controller::resume(timings(config), memory)
    }

    /// What a controller would wait for now.
    pub(crate) fn waiting(&self, config: &Config, i: usize) -> Wait {
        let mut controller = self.controller(config, i);
        let _ = controller.handle(now(), &self.observation(config, i));
        controller.waiting().clone()
    }

    pub(crate) fn has_key(&self, id: KeyId) -> bool {
        self.keys.values().any(|key| *key == id)
    }

    pub(super) fn look(&mut self, config: &Config, i: usize) -> Option<()> {
        let mut controller = self.controller(config, i);
        let mut seen = self.observation(config, i);
        if let Some(shortcut) = config.shortcut {
            shortcut.bend_sight(&mut seen);
            shortcut.bend_fence(&mut controller, &seen, timings(config));
        }
        let effects = controller.handle(now(), &seen);
        let mut pending = None;
        for effect in effects {
            match effect {
                Effect::Destroy(condemned) => self.destroy(&condemned),
                Effect::Generate(label) => {
                    if !self.keys.contains_key(&label) {
                        self.keys.insert(label, key(self.next_key));
                        self.next_key += 1;
                    }
                }
                Effect::Persist(persist) => pending = Some(self.pending(config, *persist)),
                Effect::Query(nonce) => {
                    self.controllers[i].nonce = nonce;
                    for replica in self.nodes.iter_mut().filter_map(|node| node.replica.as_mut()) {
                        if nonce > replica.nonce {
                            replica.nonce = nonce;
                            replica.taken.insert(i, nonce);
                        }
                    }
                }
                // Identity and the key of the anchor are there: the next look finds it signed.
                Effect::Sign(_) => {}
            }
        }
        self.remember(config, i, controller.memory());
        if let Some(pending) = pending {
            self.controllers[i].pending = Some(Box::new(pending));
            if !config.slow_writes {
                self.write(config, i)?;
            }
        }
        Some(())
    }

    fn pending(&self, config: &Config, persist: Persist) -> Pending {
        let mut state = persist.state;
        if let Some(shortcut) = config.shortcut {
            shortcut.bend_write(&self.state, &mut state);
        }
        let generating = persist.change == Change::Left(PhaseName::Generating);
        Pending { expected: persist.expected, state, from: place(&self.state), generating }
    }

    pub(super) fn write(&mut self, config: &Config, i: usize) -> Option<()> {
        let pending = self.controllers[i].pending.take()?;
        let unchanged = match config.shortcut {
            Some(Shortcut::CompareRotationAndPhase) => place(&self.state) == pending.from,
            _ => self.revision == pending.expected,
        };
        if !unchanged {
            self.controllers[i].fence = None;
            return Some(());
        }
        let after = place(&pending.state).1;
        if pending.from.1 == Some(PhaseName::Canary)
            && after == Some(PhaseName::Activated)
            && pending.state.rotation.as_ref().is_some_and(|r| !r.turned_back)
            && self.failed.is_some_and(|at| at + CANARY_WINDOW > NOW)
        {
            self.broken = Some("a rotation went on past a canary that fails");
        }
        if config.strict && self.revision != pending.expected {
            self.broken.get_or_insert("S6: a write lands though there was another since");
        }
        let before = std::mem::replace(&mut self.state, Arc::new(pending.state));
        self.raise_revision();
        self.written(config, &before);
        let mut controller = self.controller(config, i);
        controller.persisted(now(), self.revision);
        self.remember(config, i, controller.memory());
        Some(())
    }

    /// Where revisions never fall there is nothing to remember of the newest.
    fn remember(&mut self, config: &Config, i: usize, memory: &Memory) {
        let compares = config.shortcut != Some(Shortcut::RevisionsAreNotCompared);
        let newest = memory.newest.filter(|_| config.revisions_fall && compares);
        self.controllers[i].fence = memory.fence.clone();
        self.controllers[i].newest = newest.map(|newest| (newest.revision, newest.recovered_at));
    }

    fn observation(&self, config: &Config, i: usize) -> Observation {
        let nonce = self.controllers[i].nonce;
        let round = (nonce > 0).then(|| self.round(config, i, nonce));
        let label = self.state.rotation.as_ref().map(|rotation| rotation.label());
        let made = label.and_then(|label| {
            let id = *self.keys.get(&label)?;
            Some(Made { label, anchor: anchor_of(config, id, AnchorState::Generated) })
        });
        let there = |id: KeyId| self.exists(Condemned::Anchor(id));
        let signed = self.state.wanted_issuer.filter(|wanted| there(wanted.anchor_id));
        let signed = signed.map(|wanted| {
            let siblings =
                self.state.issuers.iter().filter(|issuer| issuer.anchor_id == wanted.anchor_id);
            let first = siblings.count() as u8 + u8::from(wanted.anchor_id == key(1));
            let there = |number: &u8| {
                let id = issuer(wanted.anchor_id, *number).id;
                self.state.issuer(id).is_some() || self.state.denies(id)
            };
            let number = (first..).find(|number| !there(number)).unwrap_or(first);
            let anchor = self.state.anchor(wanted.anchor_id).cloned();
            let anchor =
                anchor.unwrap_or_else(|| anchor_of(config, wanted.anchor_id, AnchorState::Active));
            Signed { wanted, issuer: config.signed(&anchor, number) }
        });
        let ours = self.state.published().filter(|anchor| !anchor.is_external());
        let keyless = ours.filter(|anchor| !there(anchor.id));
        let undestroyed = self.state.condemned.iter().filter(|condemned| self.exists(**condemned));
        Observation {
            round,
            state: TrustDomainState::clone(&self.state),
            revision: self.revision,
            clock_offset_ms: config.controller_clock_ms,
            made,
            signed,
            mirrors_current: self.mirror.as_ref().is_none_or(|m| m.is_current(&self.state)),
            undestroyed: undestroyed.copied().collect(),
            keyless: keyless.map(|anchor| anchor.id).collect(),
            listed: Vec::new(),
        }
    }

    fn round(&self, config: &Config, i: usize, nonce: u64) -> Round {
        let canary = self.state.rotation.as_ref().and_then(|r| r.canary()).map(|c| c.issuer);
        let proxies = self.nodes.iter().enumerate();
        let listed = proxies.filter_map(|(n, node)| Some((n, node.proxy.as_ref()?)));
        let listed = listed.filter(|(_, proxy)| proxy.listed).map(|(n, _)| Listed {
            pod_uid: uid(n),
            name: format!("{0}/{0}", uid(n)),
            proxy: ProxyStatus::Running,
        });
        let replicas = self.nodes.iter().enumerate().filter_map(|(n, node)| {
            let replica = node.replica.as_ref()?;
            Some(Replica {
                name: format!("replica {}", uid(n)),
                reached: replica.taken.get(&i) == Some(&nonce),
                started_at: UnixTime::default(),
                newest_nonce: replica.nonce,
                own: replica.own_ack(),
                loaded: replica.loaded.clone().unwrap_or_else(|| self.issuers().collect()),
                members: replica
                    .members
                    .iter()
                    .map(|(p, rec)| rec.member(*p, canary, config.skew))
                    .collect(),
            })
        });
        Round {
            nonce,
            listed: listed.collect(),
            replicas: replicas.collect(),
            vanished: Vec::new(),
        }
    }

    pub(super) fn issuers(&self) -> impl Iterator<Item = KeyId> {
        self.state.issuers.iter().map(|issuer| issuer.id)
    }

    fn exists(&self, condemned: Condemned) -> bool {
        match condemned {
            Condemned::Anchor(id) => self.keys.values().any(|key| *key == id),
            Condemned::MadeFor(label) => self.keys.contains_key(&label),
        }
    }

    fn destroy(&mut self, condemned: &[Condemned]) {
        for key in condemned {
            let gone = |label: &Label, id: &KeyId| match key {
                Condemned::Anchor(condemned) => condemned == id,
                Condemned::MadeFor(condemned) => condemned == label,
            };
            let ids: Vec<_> =
                self.keys.iter().filter(|(l, id)| gone(l, id)).map(|(_, id)| *id).collect();
            if ids.iter().any(|id| self.state.published().any(|anchor| anchor.id == *id)) {
                self.broken = Some("S7: the key of a published anchor was destroyed");
            }
            self.keys.retain(|label, id| !gone(label, id));
        }
    }

    pub(super) fn give(&mut self, order: Order) -> Option<()> {
        let now = UnixTime::from_millis(NOW * TICK);
        let request =
            |anchor| Request { by: String::new(), at: now, anchor, canary: None, replaces: None };
        let deadline = Duration::from_millis(TICK);
        let active = self.state.active_anchor().map(|anchor| anchor.id);
        let other = [AnchorState::Retiring, AnchorState::Standby]
            .into_iter()
            .find_map(|state| self.state.in_state(state).find(|a| a.taint.is_none()).map(|a| a.id));
        let state = Arc::make_mut(&mut self.state);
        let taken = match order {
            Order::Abort => state.abort(),
            Order::ExemptMissing => {
                let missing = self
                    .nodes
                    .iter()
                    .position(|node| node.proxy.as_ref().is_some_and(|proxy| !proxy.connected))?;
                let started_at = started(self.nodes[missing].proxy.as_ref()?.started);
                let instance = Instance { pod_uid: uid(missing), started_at };
                state.exempt(instance, String::new(), String::new(), String::new(), now);
                Ok(())
            }
            Order::Rotate => state.request(request(None)),
            Order::RotateCanary => {
                let selector = Selector::Namespace(CANARY.to_owned());
                let window = Duration::from_millis(CANARY_WINDOW * TICK);
                let canary = Some(CanaryPlan { selector, window });
                state.request(Request { canary, ..request(None) })
            }
            Order::RotateGiven => state.request(request(Some(key(9)))),
            Order::RotateExternal => state.request(request(Some(key(9)))),
            Order::OwnerSigns => {
                let wanted = *state.wanted_external.first()?;
                state.import_issuer(wanted, issuer(wanted.anchor_id, 0)).ok()?;
                Ok(())
            }
            Order::RotateIssuer => state.rotate_issuer(String::new(), None, now),
            Order::IssuerStolen => state.rotate_issuer(String::new(), Some(deadline), now),
            Order::TaintActive => state.taint(active?, String::new(), deadline),
            Order::TaintOther => state.taint(other?, String::new(), deadline),
        };
        taken.ok()?;
        self.raise_revision();
        Some(())
    }
}

/// What a state is called: its rotation and phase.
pub(super) fn place(state: &TrustDomainState) -> (u64, Option<PhaseName>) {
    (state.rotations, state.rotation.as_ref().map(|rotation| rotation.phase.name()))
}

fn now() -> Now {
    Now { wall: UnixTime::from_millis(NOW * TICK), boot: Duration::from_millis(NOW * TICK) }
}

fn timings(config: &Config) -> Timings {
    Timings {
        lease: ticks(1),
        skew: match config.shortcut {
            Some(Shortcut::NoSkewMargin) => Duration::ZERO,
            _ => ticks(config.skew),
        },
        renew_window: ticks(1),
        renew_window_urgent: ticks(1),
        issuer_life: ticks(1000),
        issuer_left_min: ticks(config.issuer_life.map_or(1, |life| life / 2)),
        schedule: Schedule { anchor_period: ticks(1_000_000), window: None },
    }
}
