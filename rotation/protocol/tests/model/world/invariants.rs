//! What must hold at every moment, and what the end looks like.

use std::sync::Arc;

use steadfast_api::KeyId;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::Wait;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::AnchorState;

use super::parts::Proxy;
use super::{Action, Config, NOW, World, uid};

impl World {
    /// The invariants that are of what has just happened.
    pub(super) fn compare(&mut self, before: &Self, config: &Config, action: Action) {
        for (i, nodes) in before.nodes.iter().zip(&self.nodes).enumerate() {
            let (Some(was), Some(is)) = (&nodes.0.proxy, &nodes.1.proxy) else { continue };
            if is.seq < was.seq && action != Action::RestartProxy(i) {
                self.broken.get_or_insert("S5: a sequence number falls at a workload");
            }
            let own = match action {
                Action::Tick => true,
                Action::Bundle(n) | Action::Install(n) | Action::Reconnect(n, _) => n == i,
                Action::RestartProxy(n) | Action::Forge(n) => n == i,
                _ => false,
            };
            if !own && (was.svid != is.svid || was.anchors != is.anchors) {
                self.broken.get_or_insert("S9: a workload lost what it had without a word to it");
            }
        }
        if matches!(action, Action::Restore | Action::Recover) {
            return;
        }
        let lacks = |one: &Self, other: &Self| {
            one.state.published().any(|a| !other.state.published().any(|b| a.id == b.id))
        };
        if config.strict && lacks(before, self) && lacks(self, before) {
            self.broken.get_or_insert("an anchor is added as another is removed");
        }
        let numbers = before.state.rotation.as_ref().zip(self.state.rotation.as_ref());
        if numbers.is_some_and(|(was, is)| was.number != is.number) {
            self.broken.get_or_insert("S6: a rotation begins before another has ended");
        }
    }

    /// The invariants that are of this moment.
    pub(super) fn check(&mut self, config: &Config) {
        let mut proxies = self.nodes.iter().filter_map(|node| node.proxy.as_ref());
        if proxies.any(|proxy| proxy.seq > 0 && self.is_deceived(proxy)) {
            self.broken.get_or_insert("S10: a workload holds a bundle that was never published");
        }
        if let Some(outlives) = self.outlives(config) {
            self.broken.get_or_insert(outlives);
        }
        let mut live = Vec::new();
        for (i, node) in self.nodes.iter().enumerate() {
            let Some(proxy) = node.proxy.as_ref().filter(|proxy| proxy.seq > 0) else { continue };
            if !self.is_exempt(i) {
                live.push(proxy);
            }
        }
        let unexpired = |p: &&&Proxy| p.svid.filter(|svid| svid.not_after >= NOW);
        for p in &live {
            let Some(svid) = unexpired(&p) else { continue };
            if live.iter().any(|q| !q.anchors.contains(&svid.anchor)) {
                self.broken.get_or_insert("S1: a workload refuses another's SVID");
            }
        }
        let idle = self.state.rotation.is_none() && self.state.halted.is_none();
        let buried = |p: &Proxy| {
            let mut trusted = p.anchors.iter().chain(p.mounted.iter().flatten());
            trusted.any(|id| self.state.tombstones.contains(id))
        };
        if idle && live.iter().any(|p| unexpired(&p).is_some() && buried(p)) {
            self.broken.get_or_insert("S2: a withdrawn anchor is trusted after the end");
        }
        if self.state.published().any(|anchor| self.state.tombstones.contains(&anchor.id)) {
            self.broken.get_or_insert("S5: a tombstoned anchor is published");
        }
        if self.state.published().next().is_none() {
            self.broken.get_or_insert("S8: the bundle is empty");
        }
    }

    /// The invariants that are of what was just written in the place of this: whom a phase was left
    /// without, and what with. Where a shortcut is to be seen by its consequences they are not
    /// looked for.
    pub(super) fn written(&mut self, config: &Config, before: &TrustDomainState) {
        let state = Arc::clone(&self.state);
        let mut broken = Vec::new();
        for anchor in &state.anchors {
            let id = anchor.id;
            let was = before.anchor(id).map(|anchor| anchor.state);
            if state.acked(id) && !before.acked(id) {
                let held = self.counted().all(|(_, p)| p.anchors.contains(&id));
                match held {
                    true => self.settled.extend([id]),
                    false => broken.push("L2: an anchor is settled that somebody lacks"),
                }
                if self.mirror_lacks(id) {
                    broken.push("an anchor is settled that the mirror lacks");
                }
                if was == Some(AnchorState::Staged) && self.clock_is_off() {
                    broken.push("an anchor is settled while a clock is off");
                }
            }
            if was == Some(AnchorState::Retiring) && anchor.state == AnchorState::Withdrawn {
                let used = |p: &Proxy| p.svid.is_some_and(|svid| svid.anchor == id);
                if self.counted().any(|(_, p)| used(p)) {
                    broken.push("L2: an anchor is withdrawn that somebody has an SVID under");
                }
                if self.clock_is_off() {
                    broken.push("an anchor is withdrawn while a clock is off");
                }
            }
            // A new census, should it be added once more.
            if anchor.state == AnchorState::Generated {
                self.settled.remove(&id);
            }
        }
        let gone = before.in_state(AnchorState::Withdrawn).map(|anchor| anchor.id);
        let mut gone = gone.filter(|id| state.anchor(*id).is_none());
        if gone.any(|id| self.counted().any(|(_, p)| p.anchors.contains(&id))) {
            broken.push("L2: a rotation ends though somebody trusts what was withdrawn");
        }
        if before.rotation.is_none() && before.requested.is_some() && self.clock_is_off() {
            broken.push("a rotation begins while a clock is off");
        }
        let urgent = state.rotation.as_ref().is_some_and(|rotation| rotation.urgent.is_some())
            || before.issuer_rotation.as_ref().is_some_and(|rotation| rotation.urgent.is_some());
        let replicas = || self.nodes.iter().filter_map(|node| node.replica.as_ref());
        let lacks = |loaded: &Vec<KeyId>| !loaded.contains(&state.active_issuer);
        if state.active_issuer != before.active_issuer
            && !urgent
            && replicas().any(|replica| replica.loaded.as_ref().is_some_and(lacks))
        {
            broken.push("an issuer becomes active that a replica has not loaded");
        }
        if config.strict {
            self.broken = self.broken.or_else(|| broken.first().copied());
        }
    }

    /// Whom every census counts: who runs on an SVID that is valid, and is not exempt.
    fn counted(&self) -> impl Iterator<Item = (usize, &Proxy)> {
        let proxies =
            self.nodes.iter().enumerate().filter_map(|(i, n)| Some((i, n.proxy.as_ref()?)));
        proxies.filter(|(i, proxy)| {
            let valid = proxy.svid.is_some_and(|svid| svid.not_after >= NOW);
            proxy.seq > 0 && valid && !self.is_exempt(*i)
        })
    }

    /// Whether somebody who counts has said last that his clock is off.
    fn clock_is_off(&self) -> bool {
        self.counted().any(|(i, proxy)| {
            let home = self.nodes[proxy.home].replica.as_ref();
            home.and_then(|replica| replica.members.get(&i)).is_some_and(|rec| rec.clock_off)
        })
    }

    pub(super) fn is_exempt(&self, i: usize) -> bool {
        self.state.exemptions.iter().any(|e| e.instance.pod_uid == uid(i))
    }

    /// L2: somebody cannot be reached, everything else has come as far as it can, and whoever looks
    /// is told who it is. If everybody can be, or it was over before: the end.
    pub(crate) fn stalls_by_name(&self, config: &Config) -> bool {
        let proxies =
            self.nodes.iter().enumerate().filter_map(|(i, n)| Some((i, n.proxy.as_ref()?)));
        let cut = proxies.filter(|(i, p)| !p.connected && p.listed && !self.is_exempt(*i));
        let cut: Vec<_> = cut.map(|(i, _)| uid(i)).collect();
        if self.orders < config.orders.len() || self.state.issuer_rotation.is_some() {
            return false;
        }
        let at_rest = match self.phase() {
            None if self.settled_down() => return true,
            None => self.state.requested.is_some(),
            Some(PhaseName::Staged | PhaseName::Withdrawn) => true,
            // Where SVIDs end, this phase ends with them.
            Some(PhaseName::Draining) => config.svid_life.is_none(),
            Some(_) => false,
        };
        if cut.is_empty() || !at_rest {
            return false;
        }
        let Wait::Census(tally) = self.waiting(config, 0) else { return false };
        let named: Vec<_> = tally.missing.into_iter().map(|m| m.instance.pod_uid).collect();
        named == cut
    }

    pub(crate) fn phase(&self) -> Option<PhaseName> {
        self.state.rotation.as_ref().map(|rotation| rotation.phase.name())
    }

    /// Idle, as it should be: an active anchor and a standby, nothing asked for, nothing amiss.
    pub(crate) fn settled_down(&self) -> bool {
        let state = &self.state;
        state.rotation.is_none()
            && state.issuer_rotation.is_none()
            && state.requested.is_none()
            && state.halted.is_none()
            && state.published().count() == 2
            && state.in_state(AnchorState::Standby).count() >= 1
            && state.in_state(AnchorState::Active).count() == 1
    }
}
