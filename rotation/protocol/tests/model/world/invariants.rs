//! What must hold at every moment, and what the end looks like.

use steadfast_rotation_protocol::trust_domain::AnchorState;

use super::parts::Proxy;
use super::{Action, NOW, World, uid};

impl World {
    /// The invariants that are of what has just happened.
    pub(super) fn compare(&mut self, before: &Self, action: Action) {
        for (i, nodes) in before.nodes.iter().zip(&self.nodes).enumerate() {
            let (Some(was), Some(is)) = (&nodes.0.proxy, &nodes.1.proxy) else { continue };
            if is.seq < was.seq && action != Action::RestartProxy(i) {
                self.broken.get_or_insert("S5: a sequence number falls at a workload");
            }
            let own = match action {
                Action::Tick => true,
                Action::Bundle(n) | Action::Install(n) | Action::Reconnect(n, _) => n == i,
                Action::RestartProxy(n) => n == i,
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
        if lacks(before, self) && lacks(self, before) {
            self.broken.get_or_insert("S6: an anchor is added as another is removed");
        }
        let numbers = before.state.rotation.as_ref().zip(self.state.rotation.as_ref());
        if numbers.is_some_and(|(was, is)| was.number != is.number) {
            self.broken.get_or_insert("S6: a rotation begins before another has ended");
        }
    }

    /// The invariants that are of this moment.
    pub(super) fn check(&mut self) {
        let mut live = Vec::new();
        for (i, node) in self.nodes.iter().enumerate() {
            let Some(proxy) = node.proxy.as_ref().filter(|proxy| proxy.seq > 0) else { continue };
            let exempt = self.state.exemptions.iter().any(|e| e.instance.pod_uid == uid(i));
            if !exempt {
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
        let buried = |p: &Proxy| p.anchors.iter().any(|id| self.state.tombstones.contains(id));
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
