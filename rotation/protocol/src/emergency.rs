//! What a stolen key changes, in whatever phase it is found out.
//!
//! An anchor that never issued goes at once. The active one is replaced by an anchor that everybody
//! has acked and whose key is our own: first the one being drained, then the next in line; without
//! one, the fresh one is waited for. So is the one that is to become active after a recovery that
//! left none. One that is being drained gets a deadline. The rotation that was under way becomes the
//! emergency's.

use std::time::Duration;

use steadfast_api::{KeyId, UnixTime};

use crate::controller::Timings;
use crate::rotation::{
    Activated, Generating, Goal, Left, Next, Phase, Preparing, Rotation, Staged, Withdrawn,
    withdraw,
};
use crate::trust_domain::{AnchorRecord, AnchorState, Condemned, Taint, TrustDomainState};

/// What is done about an anchor whose key is in other hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// It has issued, or may have: it is drained, with a deadline.
    Drained,
    /// It has never issued: it goes at once, and the census of its end has no deadline.
    Removed,
    /// It is the active one: this anchor takes its place; `None`: a fresh one, once it is staged.
    Replaced(Option<KeyId>),
}

/// Whether an anchor signs for whoever asks, without waiting for a person.
pub(crate) type Signs<'a> = &'a dyn Fn(&TrustDomainState, KeyId) -> bool;

/// Brings the rotation in line with what is tainted; `false` if it is.
/// `signs` says of an anchor whether it has an issuer, or gets one without a person.
pub(crate) fn replan(
    domain: &mut TrustDomainState,
    now: UnixTime,
    timings: &Timings,
    signs: Signs<'_>,
) -> bool {
    if let Some(taint) = heir(domain).and_then(|heir| heir.taint.clone()) {
        // Without an issuer that signs, identity has no SVID: nobody could be asked about another one
        // before this one is active.
        return !domain.cannot_issue(now) && replace_active(domain, &taint, now, signs);
    }
    let tainted = |anchor: &&AnchorRecord| anchor.taint.is_some();
    let found = domain.anchors.iter().filter(tainted).find(|anchor| unused(domain, anchor));
    match found.map(|anchor| (anchor.id, anchor.taint.clone())) {
        Some((id, Some(taint)))
            if domain.may_have_issued(id, now, timings.skew) && retire(domain, id, &taint, now) =>
        {
            return true;
        }
        Some((id, _)) if !domain.may_have_issued(id, now, timings.skew) => {
            remove_unused(domain, id, now);
            return true;
        }
        _ => {}
    }
    if let Some(taint) = domain.active_anchor().and_then(|active| active.taint.clone()) {
        return replace_active(domain, &taint, now, signs);
    }
    let published = domain.anchors.iter().filter(|anchor| anchor.state.published());
    let mut issued = published.filter(tainted).filter(|anchor| !unused(domain, anchor));
    match issued.next().map(|anchor| (anchor.id, anchor.taint.clone())) {
        Some((id, Some(taint))) => hurry(domain, id, &taint, now),
        _ => false,
    }
}

/// What comes of the theft of this anchor's key, before anybody has said that it is stolen.
pub(crate) fn remedy(
    domain: &TrustDomainState,
    anchor: &AnchorRecord,
    now: UnixTime,
    skew: Duration,
    signs: Signs<'_>,
) -> Remedy {
    if anchor.state == AnchorState::Active || heir(domain).is_some_and(|heir| heir.id == anchor.id)
    {
        return Remedy::Replaced(successor(domain, signs).filter(|next| *next != anchor.id));
    }
    let issued = !unused(domain, anchor) || domain.may_have_issued(anchor.id, now, skew);
    if issued { Remedy::Drained } else { Remedy::Removed }
}

/// The anchor that is to become active where a recovery has left none: there is no way back from it.
fn heir(domain: &TrustDomainState) -> Option<&AnchorRecord> {
    let (Phase::Preparing(Preparing { to }) | Phase::Staged(Staged { added: to })) =
        domain.rotation.as_ref()?.phase
    else {
        return None;
    };
    if domain.active_anchor().is_some() { None } else { domain.anchor(to) }
}

/// It has never signed for anybody, and is not gone yet.
fn unused(domain: &TrustDomainState, anchor: &AnchorRecord) -> bool {
    let canary = domain.rotation.as_ref().and_then(Rotation::canary);
    matches!(anchor.state, AnchorState::Generated | AnchorState::Staged | AnchorState::Standby)
        && canary.is_none_or(|canary| canary.to != anchor.id)
}

/// An anchor that may have issued is drained like one that has; `false` while a rotation that
/// is about others is under way, which comes to its end first.
fn retire(domain: &mut TrustDomainState, id: KeyId, taint: &Taint, now: UnixTime) -> bool {
    let mut rotation = match domain.rotation.take() {
        None => {
            domain.rotations += 1;
            let by = taint.by.clone();
            Rotation::begin(domain.rotations, by, Goal::Removal, now)
        }
        Some(rotation) if aims_at(&rotation.phase, id) => rotation,
        other => {
            domain.rotation = other;
            return false;
        }
    };
    if !domain.acked(id) {
        domain.unsettled.push(id);
    }
    domain.set_state(id, AnchorState::Retiring);
    domain.wanted_issuer = domain.wanted_issuer.filter(|wanted| wanted.anchor_id != id);
    rotation.goal = Goal::Removal;
    urge(&mut rotation, taint.deadline, now);
    rotation.enter(Phase::Activated(Activated), Left::default(), now);
    domain.rotation = Some(rotation);
    true
}

fn aims_at(phase: &Phase, id: KeyId) -> bool {
    matches!(phase, Phase::Preparing(Preparing { to }) | Phase::Staged(Staged { added: to }) if *to == id)
}

fn remove_unused(domain: &mut TrustDomainState, id: KeyId, now: UnixTime) {
    let published = domain.anchor(id).is_some_and(|anchor| anchor.state.published());
    if published {
        withdraw(domain, id);
        domain.seq += 1;
    } else {
        domain.take_back(id);
        // Nothing that lists it brings it back.
        domain.tombstones.push(id);
    }
    domain.wanted_issuer = domain.wanted_issuer.filter(|wanted| wanted.anchor_id != id);
    if domain.requested.as_ref().is_some_and(|request| request.anchor == Some(id)) {
        domain.requested = None;
    }
    let Some(mut rotation) = domain.rotation.take() else {
        if published {
            domain.rotations += 1;
            let mut rotation =
                Rotation::begin(domain.rotations, "taint".to_owned(), Goal::Removal, now);
            rotation.phase = Phase::Withdrawn(Withdrawn);
            domain.rotation = Some(rotation);
        }
        return;
    };
    if rotation.added == Some(id) {
        rotation.added = None;
    }
    let given =
        matches!(&rotation.goal, Goal::Successor { next: Next::Given(given), .. } if *given == id);
    match rotation.phase {
        // Without what it was to add it adds another one.
        Phase::Staged(Staged { added }) if added == id && !given => {
            rotation.attempt += 1;
            rotation.enter(Phase::Generating(Generating), Left::default(), now);
        }
        Phase::Staged(Staged { added: to }) | Phase::Preparing(Preparing { to }) if to == id => {
            rotation.goal = Goal::Removal;
            rotation.enter(Phase::Withdrawn(Withdrawn), Left::default(), now);
        }
        Phase::Generating(_) | Phase::Staged(_) => {
            let aims = match &rotation.goal {
                Goal::Successor { next: Next::Standby(next) | Next::Given(next), .. } => {
                    *next == id
                }
                Goal::Standby { replaces } => *replaces == Some(id),
                Goal::Successor { next: Next::Added, .. } | Goal::Removal => false,
            };
            if aims {
                rotation.goal = Goal::Standby { replaces: None };
            }
        }
        _ => {}
    }
    domain.rotation = Some(rotation);
}

fn replace_active(
    domain: &mut TrustDomainState,
    taint: &Taint,
    now: UnixTime,
    signs: Signs<'_>,
) -> bool {
    let target = successor(domain, signs);
    let good = |id| domain.anchor(id).is_some_and(|a| a.taint.is_none()) && signs(domain, id);
    let fresh = domain.in_state(AnchorState::Staged).map(|a| a.id).find(|id| good(*id));
    let rotation = domain.rotation.as_ref();
    let under_way = rotation.filter(|rotation| rotation.urgent.is_some()).map(|r| &r.phase);
    let planned = match (target, fresh, under_way) {
        (Some(_), _, Some(Phase::Preparing(Preparing { to }))) => good(*to),
        (None, Some(fresh), Some(Phase::Staged(Staged { added }))) => *added == fresh,
        (None, None, Some(Phase::Generating(_))) => true,
        _ => false,
    };
    if planned {
        return false;
    }
    let under_way = domain.rotation.take();
    let begins = under_way.is_none();
    let mut rotation = under_way.unwrap_or_else(|| {
        domain.rotations += 1;
        Rotation::begin(domain.rotations, taint.by.clone(), Goal::Removal, now)
    });
    if let (Phase::Generating(_), Some(_), false) = (&rotation.phase, target.or(fresh), begins) {
        domain.condemned.push(Condemned::MadeFor(rotation.label()));
        rotation.attempt += 1;
    }
    let phase = match (target, fresh) {
        (Some(to), _) => Phase::Preparing(Preparing { to }),
        (None, Some(added)) => Phase::Staged(Staged { added }),
        (None, None) => Phase::Generating(Generating),
    };
    let next = target.map_or(Next::Added, Next::Standby);
    rotation.goal = Goal::Successor { next, canary: None };
    urge(&mut rotation, taint.deadline, now);
    (rotation.abort, rotation.turned_back) = (false, false);
    match begins {
        true => rotation.phase = phase,
        false => rotation.enter(phase, Left::default(), now),
    }
    domain.rotation = Some(rotation);
    true
}

/// An anchor that everybody holds and whose key is in good hands. An emergency waits for no person
/// to sign a first issuer: a fresh anchor of our own is faster.
fn successor(domain: &TrustDomainState, signs: Signs<'_>) -> Option<KeyId> {
    let good = |anchor: &&AnchorRecord| {
        anchor.taint.is_none() && domain.acked(anchor.id) && signs(domain, anchor.id)
    };
    let first = |state| domain.in_state(state).find(good).map(|anchor| anchor.id);
    let in_line = domain.rotation.as_ref().and_then(|rotation| match &rotation.goal {
        Goal::Successor { next: Next::Standby(id) | Next::Given(id), .. } => Some(*id),
        _ => None,
    });
    let in_line = in_line.filter(|id| {
        let standby = domain.anchor(*id).filter(|a| a.state == AnchorState::Standby);
        standby.is_some_and(|anchor| good(&anchor))
    });
    first(AnchorState::Retiring).or(in_line).or_else(|| first(AnchorState::Standby))
}

/// An anchor that has issued and is not the active one: it is drained, with a deadline from now on.
fn hurry(domain: &mut TrustDomainState, id: KeyId, taint: &Taint, now: UnixTime) -> bool {
    let Some(mut rotation) = domain.rotation.take() else { return false };
    let phase = match &rotation.phase {
        Phase::Canary(canary) if canary.to == id => Some(canary.clone().turn_back(domain, now)),
        // Back to it is no way any more.
        Phase::Preparing(Preparing { to }) if *to == id => Some(Activated),
        _ => None,
    };
    let changed = phase.is_some() || rotation.urgent.is_none();
    if changed {
        urge(&mut rotation, taint.deadline, now);
        (rotation.abort, rotation.turned_back) = (false, false);
    }
    if let Some(phase) = phase {
        rotation.enter(Phase::Activated(phase), Left::default(), now);
    }
    domain.rotation = Some(rotation);
    changed
}

fn urge(rotation: &mut Rotation, deadline: Duration, now: UnixTime) {
    rotation.urgent = Some(deadline);
    rotation.restart_deadline(now);
}
