//! Time, and what makes two worlds one: dates relative to now, numbers by their order only.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use steadfast_api::UnixTime;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::issuer::IssuerPhase;
use steadfast_rotation_protocol::rotation::{Goal, Phase};

use super::{CANARY_WINDOW, EXPIRED, NOW, OLDEST, TICK, World};

impl World {
    /// Everything that has a time is one tick older.
    pub(super) fn tick(&mut self, skew: u64) {
        older(Arc::make_mut(&mut self.state));
        self.failed = failure_older(self.failed);
        if let Some(backup) = &mut self.backup {
            older(Arc::make_mut(&mut backup.0));
        }
        for controller in &mut self.controllers {
            if let Some(fence) = &mut controller.fence {
                // Older than the lease is as good as any age.
                let oldest = Duration::from_millis((NOW - 1) * TICK);
                fence.since = fence.since.saturating_sub(Duration::from_millis(TICK)).max(oldest);
            }
            if let Some(pending) = &mut controller.pending {
                older(&mut pending.state);
            }
        }
        for node in &mut self.nodes {
            if let Some(replica) = &mut node.replica {
                replica.leased = false;
                replica.own = replica.own.map(|svid| svid.older(skew));
                for member in replica.members.values_mut() {
                    if !member.open {
                        member.last_heard = (member.last_heard - 1).max(OLDEST);
                    }
                    member.svid = member.svid.map(|svid| svid.older(skew));
                    member.failed = failure_older(member.failed);
                }
            }
            if let Some(proxy) = &mut node.proxy {
                proxy.svid = proxy
                    .svid
                    .map(|svid| svid.older(skew))
                    .filter(|svid| svid.not_after > EXPIRED - skew);
                proxy.reply = proxy.reply.map(|(svid, seq)| (svid.older(skew), seq));
                proxy.reply = proxy.reply.filter(|(svid, _)| svid.not_after > EXPIRED - skew);
            }
        }
    }

    /// The same world as whoever cannot tell more apart would see it.
    pub(super) fn normal(mut self, stored: bool) -> Self {
        self.order_revisions();
        self.order_nonces();
        if stored {
            forget_dates(Arc::make_mut(&mut self.state));
        }
        if let Some(backup) = &mut self.backup {
            forget_dates(Arc::make_mut(&mut backup.0));
        }
        for controller in &mut self.controllers {
            if let Some(pending) = &mut controller.pending {
                forget_dates(&mut pending.state);
            }
        }
        // Two pairs of a workload and its replica are told apart by nothing but an exemption, and
        // where one of them is the canary.
        if self.state.exemptions.is_empty()
            && !has_canaries(&self.state)
            && self.nodes.len() == 2
            && self.nodes.iter().all(|node| node.replica.is_some() && node.proxy.is_some())
        {
            let mut swapped = [self.nodes[1].clone(), self.nodes[0].clone()];
            for proxy in swapped.iter_mut().filter_map(|node| node.proxy.as_mut()) {
                proxy.home = 1 - proxy.home;
            }
            for replica in swapped.iter_mut().filter_map(|node| node.replica.as_mut()) {
                let members = std::mem::take(&mut replica.members);
                replica.members = members.into_iter().map(|(p, rec)| (1 - p, rec)).collect();
            }
            if swapped[..] < self.nodes[..] {
                self.nodes = swapped.into();
            }
        }
        self
    }

    /// A store counts what else is written to it, too: a state that comes after it was put back is
    /// never taken for one from before by its revision alone.
    fn order_revisions(&mut self) {
        let mut all = BTreeSet::new();
        self.each_revision(|revision| all.extend([*revision]));
        let rank = |revision: u64| WRITES_BETWEEN * (1 + all.range(..revision).count() as u64);
        self.each_revision(|revision| *revision = rank(*revision));
    }

    fn each_revision(&mut self, mut visit: impl FnMut(&mut u64)) {
        visit(&mut self.revision);
        self.backup.iter_mut().for_each(|(_, revision)| visit(revision));
        for controller in &mut self.controllers {
            controller.fence.iter_mut().for_each(|fence| visit(&mut fence.revision));
            controller.newest.iter_mut().for_each(|(revision, _)| visit(revision));
            controller.pending.iter_mut().for_each(|pending| visit(&mut pending.expected));
        }
        for replica in self.nodes.iter_mut().filter_map(|node| node.replica.as_mut()) {
            replica.read.iter_mut().for_each(|(revision, _)| visit(revision));
        }
    }

    fn order_nonces(&mut self) {
        let mut all = BTreeSet::from([0]);
        let mut nonces = Vec::new();
        self.each_nonce(|nonce| nonces.push(*nonce));
        all.extend(nonces);
        // Far below the time of day: the next query is above all of them.
        self.each_nonce(|nonce| *nonce = all.range(..*nonce).count() as u64);
    }

    fn each_nonce(&mut self, mut visit: impl FnMut(&mut u64)) {
        for controller in &mut self.controllers {
            visit(&mut controller.nonce);
            if let Some(fence) = &mut controller.fence {
                let queries = &mut fence.queries;
                visit(&mut queries.last);
                queries.first.iter_mut().for_each(&mut visit);
                queries.first_fenced.iter_mut().for_each(&mut visit);
            }
        }
        for replica in self.nodes.iter_mut().filter_map(|node| node.replica.as_mut()) {
            visit(&mut replica.nonce);
            replica.taken.values_mut().for_each(&mut visit);
            for member in replica.members.values_mut() {
                visit(&mut member.answered);
                visit(&mut member.answered_before);
            }
        }
    }
}

/// Every date of a state that counts is one tick older.
fn older(state: &mut TrustDomainState) {
    let older = |at: &mut UnixTime| {
        let oldest = UnixTime::from_millis(OLDEST * TICK);
        *at = (*at - Duration::from_millis(TICK)).max(oldest);
    };
    older(&mut state.activated_at);
    let ends = state.anchors.iter_mut().map(|anchor| &mut anchor.not_after);
    let ends = ends.chain(state.issuers.iter_mut().map(|issuer| &mut issuer.not_after));
    let ends = ends.chain(state.denied_issuers.iter_mut().map(|denied| &mut denied.until));
    ends.filter(|at| at.as_millis() < FAR * TICK).for_each(older);
    if let Some(rotation) = &mut state.rotation {
        rotation.deadline.iter_mut().for_each(older);
        if rotation.canary().is_some() {
            older(&mut rotation.since);
        }
    }
    if let Some(rotation) = &mut state.issuer_rotation
        && let IssuerPhase::Draining(draining) = &mut rotation.phase
    {
        older(&mut draining.deadline);
    }
}

/// What nothing depends on.
fn forget_dates(state: &mut TrustDomainState) {
    let epoch = UnixTime::default();
    state.past.clear();
    state.renew = None;
    if let Some(rotation) = &mut state.rotation {
        rotation.started = epoch;
        match &mut rotation.phase {
            Phase::Canary(canary) => canary.renew = None,
            _ => rotation.since = epoch,
        }
        rotation.steps.clear();
        if matches!(rotation.phase, Phase::Withdrawn(_)) {
            state.activated_at = UnixTime::from_millis(OLDEST * TICK);
        }
    } else {
        state.activated_at = UnixTime::from_millis(OLDEST * TICK);
    }
    if let Some(rotation) = &mut state.issuer_rotation {
        (rotation.started, rotation.since) = (epoch, epoch);
        rotation.steps.clear();
    }
    if let Some(request) = &mut state.requested {
        request.at = epoch;
    }
    for wanted in state.wanted_issuer.iter_mut().chain(&mut state.wanted_external) {
        wanted.number = 0;
    }
}

fn has_canaries(state: &TrustDomainState) -> bool {
    let requested = state.requested.as_ref().is_some_and(|request| request.canary.is_some());
    let goal = state.rotation.as_ref().map(|rotation| &rotation.goal);
    requested || matches!(goal, Some(Goal::Successor { canary: Some(_), .. }))
}

/// One that is older than the window counts for nothing.
fn failure_older(failed: Option<u64>) -> Option<u64> {
    failed.map(|at| at - 1).filter(|at| at + CANARY_WINDOW > NOW)
}

/// What ends later does not end here.
const FAR: u64 = NOW + 1000;
/// Revisions between two that anybody remembers: more than the state is written in any world.
const WRITES_BETWEEN: u64 = 1000;
