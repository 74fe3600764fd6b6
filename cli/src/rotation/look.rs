//! One look at the controller: what it waits for, and what keeps it from its work.
//!
//! The controller tells one wait. While a rotation of an anchor is under way, or about to begin, it
//! is that one's: what a rotation of the issuer waits for is then told from the last round of
//! answers, by the same census.

use std::path::Path;

use steadfast_api::UnixTime;
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::census::{Bounds, Demand, FreeOf, Round, tally};
use steadfast_rotation_protocol::controller::{Standing, Timings, Wait};
use steadfast_rotation_protocol::issuer::{IssuerPhase, IssuerRotation};
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, AnchorState, IssuerRecord};

use crate::controller::{Controller, ControllerArg, ControllerError};

/// What the controller said.
#[derive(Debug)]
pub(crate) struct Look {
    standing: Result<Standing, ControllerError>,
    /// Asked for only where the issuer's wait is told from it.
    round: Option<Round>,
}

impl Look {
    /// Asks, knowing this state of the store.
    pub(crate) async fn at(dir: &Path, arg: &ControllerArg, state: &TrustDomainState) -> Self {
        match Controller::find(dir, arg).await {
            Ok((controller, standing)) => {
                let untold = state.issuer_rotation.is_some() && anchors_are_told(state);
                // Who has just ended tells no round: then nobody is named, and the next look does.
                let round = if untold { controller.round().await.ok().flatten() } else { None };
                Self { standing: Ok(standing), round }
            }
            Err(error) => Self { standing: Err(error), round: None },
        }
    }

    /// A controller that says this.
    #[cfg(test)]
    pub(crate) fn for_test(standing: Standing) -> Self {
        Self { standing: Ok(standing), round: None }
    }

    /// What the rotation of an anchor waits for, or the order for one.
    pub(crate) fn wait(&self, state: &TrustDomainState) -> Option<&Wait> {
        let standing = self.standing.as_ref().ok()?;
        standing.waiting.as_ref().filter(|_| same_phase(state, standing))
    }

    /// What the rotation of the issuer waits for.
    pub(crate) fn issuer_wait(&self, state: &TrustDomainState, now: UnixTime) -> Option<Wait> {
        if !anchors_are_told(state) {
            return self.wait(state).cloned();
        }
        let timings = self.standing.as_ref().ok()?.timings?;
        let rotation = state.issuer_rotation.as_ref()?;
        Some(from_round(state, rotation, self.round.as_ref(), timings, now))
    }

    /// What keeps everything where it is: nothing is issued, or the controller cannot do its work,
    /// or none answers.
    pub(crate) fn trouble(&self, state: &TrustDomainState) -> Option<String> {
        let trouble = match &self.standing {
            Ok(standing) => standing.trouble.clone(),
            Err(error) => Some(ErrorChain(error).to_string()),
        };
        state.halted.map(super::waiting::halted).or(trouble)
    }
}

/// Whether the controller's wait is that of a rotation of an anchor.
fn anchors_are_told(state: &TrustDomainState) -> bool {
    let standby = state.in_state(AnchorState::Standby).next();
    state.rotation.is_some() || state.requested.is_some() || standby.is_none()
}

/// What the controller waits for is about what the store holds now.
fn same_phase(state: &TrustDomainState, standing: &Standing) -> bool {
    let phase = |state: &TrustDomainState| {
        let rotation = state.rotation.as_ref().map(|r| (r.number, r.phase.name(), r.turned_back));
        (rotation, state.issuer_rotation.as_ref().map(|r| r.phase), state.paused)
    };
    standing.state.as_ref().is_some_and(|seen| phase(seen) == phase(state))
}

fn from_round(
    state: &TrustDomainState,
    rotation: &IssuerRotation,
    round: Option<&Round>,
    timings: Timings,
    now: UnixTime,
) -> Wait {
    if let Some(halt) = state.halted {
        return Wait::Halted(halt);
    }
    // The fence begins anew with each write of the other rotation: it may last longer.
    let left = timings.lease.saturating_sub(now.since(rotation.since));
    let demand = match rotation.phase {
        IssuerPhase::Preparing(_) => return next_issuer(state, rotation, round),
        IssuerPhase::Activated(_) => return Wait::Fence { left },
        IssuerPhase::Draining(_) | IssuerPhase::Denied(_) if !left.is_zero() => {
            return Wait::Fence { left };
        }
        IssuerPhase::Draining(_) => {
            Demand { free_of: Some(FreeOf::Issuer(rotation.old)), ..Demand::default() }
        }
        IssuerPhase::Denied(_) => Demand::default(),
    };
    let Some(round) = round else { return Wait::Round };
    let lives = state.anchors.iter().map(|anchor| anchor.svid_life_max);
    let bounds = Bounds { skew: timings.skew, svid_life_max: lives.max().unwrap_or_default() };
    Wait::Census(tally(state, demand, round, round.nonce, now, bounds))
}

/// The issuer that follows is to be signed, or made, or loaded.
fn next_issuer(state: &TrustDomainState, rotation: &IssuerRotation, round: Option<&Round>) -> Wait {
    let Some(anchor) = state.active_anchor() else { return Wait::Nothing };
    let follows = |issuer: &&IssuerRecord| {
        issuer.anchor_id == anchor.id && issuer.id != rotation.old && !state.denies(issuer.id)
    };
    let next = state.issuers.iter().filter(follows).max_by_key(|issuer| issuer.not_after);
    match (next, round) {
        (None, _) if AnchorRecord::is_external(anchor) => Wait::Signature { anchor: anchor.id },
        (None, _) => Wait::Issuer(Vec::new()),
        (Some(_), None) => Wait::Round,
        (Some(next), Some(round)) => {
            let without =
                round.replicas.iter().filter(|r| !r.reached || !r.loaded.contains(&next.id));
            Wait::Issuer(without.map(|replica| replica.name.clone()).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use steadfast_rotation_protocol::Instance;
    use steadfast_rotation_protocol::census::{
        Ack, HeldSvid, Listed, Member, ProxyStatus, Replica,
    };
    use steadfast_rotation_protocol::trust_domain::{Halt, Request};

    use super::*;
    use crate::output::Paint;
    use crate::rotation::course::Course;
    use crate::rotation::plan::TIMINGS_USUAL;

    const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);

    /// An emergency rotation of the issuer, in its first phase, and a rotation of the anchor that is
    /// ordered: what the controller tells is of that.
    fn state() -> TrustDomainState {
        let domain = "cluster.local".parse().unwrap();
        let mut state = steadfast_identity::authority::found(&domain, NOW).unwrap().state;
        let began = NOW - Duration::from_secs(100);
        state.rotate_issuer("ann".to_owned(), Some(Duration::from_secs(600)), began).unwrap();
        let (by, at) = ("bob".to_owned(), began);
        state.request(Request { by, at, anchor: None, canary: None, replaces: None }).unwrap();
        state
    }

    fn look(state: &TrustDomainState, round: Option<Round>) -> Look {
        let standing = Standing {
            state: Some(state.clone()),
            waiting: Some(Wait::Key),
            timings: Some(TIMINGS_USUAL),
            ..Standing::default()
        };
        Look { standing: Ok(standing), round }
    }

    /// One replica of two has loaded nothing; one workload of two still uses the old issuer.
    fn round(state: &TrustDomainState) -> Round {
        let pod = |name: &str, issuer| {
            let ack = Ack {
                seq: state.seq,
                digest: steadfast_api::KeyId::from_slice(&state.digest()),
                mounted: None,
                svid: Some(HeldSvid { issuer, not_after: NOW + Duration::from_secs(600) }),
                clock_offset_ms: 0,
                held: None,
            };
            let instance = Instance { pod_uid: name.to_owned(), started_at: NOW };
            let listed = Listed {
                pod_uid: name.to_owned(),
                name: name.to_owned(),
                proxy: ProxyStatus::Running,
            };
            let member = Member {
                instance,
                name: name.to_owned(),
                open: true,
                last_heard: NOW,
                answered: 3,
                answered_before: 2,
                used: Vec::new(),
                issuers: Vec::new(),
                ack: Some(ack),
                version: None,
            };
            (listed, member)
        };
        let old = state.issuer_rotation.as_ref().unwrap().old;
        let other = state.issuers.iter().map(|issuer| issuer.id).find(|id| *id != old);
        let pods = [pod("demo/web-0", old), pod("demo/api-0", other.unwrap_or(old))];
        let (listed, members): (Vec<_>, Vec<_>) = pods.into_iter().unzip();
        let replica = |name: &str, members, loaded| Replica {
            name: name.to_owned(),
            reached: true,
            members,
            loaded,
            ..Replica::default()
        };
        let replicas = vec![
            replica("identity 192.0.2.1:8080", members, other.into_iter().collect()),
            replica("identity 192.0.2.2:8080", Vec::new(), Vec::new()),
        ];
        Round { nonce: 3, listed, replicas, vanished: Vec::new() }
    }

    fn with_another_issuer(mut state: TrustDomainState) -> TrustDomainState {
        let domain = "cluster.local".parse().unwrap();
        let other = steadfast_identity::authority::found(&domain, NOW).unwrap().state;
        let anchor_id = state.active_anchor().unwrap().id;
        state.issuers.extend(other.issuers.into_iter().map(|i| IssuerRecord { anchor_id, ..i }));
        state
    }

    #[test]
    fn the_issuer_s_wait_is_told_beside_that_of_an_anchor() {
        let state = with_another_issuer(state());
        let look = look(&state, Some(round(&state)));
        assert_eq!(look.wait(&state), Some(&Wait::Key), "of the order for an anchor");
        let Some(Wait::Issuer(without)) = look.issuer_wait(&state, NOW) else { panic!("{look:?}") };
        assert_eq!(without, ["identity 192.0.2.2:8080"]);
    }

    #[test]
    fn while_an_issuer_is_drained_its_last_users_are_named_also_beside_an_anchor() {
        let mut state = with_another_issuer(state());
        let rotation = state.issuer_rotation.as_mut().unwrap();
        let phase = r#"{"draining":{"deadline":1800000500000}}"#;
        rotation.phase = serde_json::from_str(phase).unwrap();
        let look = look(&state, Some(round(&state)));
        let wait = look.issuer_wait(&state, NOW);
        let course = Course::of_issuer(&state, wait.as_ref(), NOW).unwrap();
        let text = course.lines(Paint::plain()).join("\n");
        for words in ["3 of 4 have left the old issuer", "demo/web-0", "it renews by itself"] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
        assert!(!text.contains("missing demo/api-0"), "{text}");
    }

    #[test]
    fn alone_the_issuer_s_wait_is_the_controller_s() {
        let state = TrustDomainState { requested: None, ..state() };
        assert_eq!(look(&state, None).issuer_wait(&state, NOW), Some(Wait::Key));
    }

    #[test]
    fn what_is_halted_says_so_and_what_to_do() {
        let mut state = state();
        assert_eq!(look(&state, None).trouble(&state), None);
        state.halted = Some(Halt::Restored { seen_seq: 9 });
        let trouble = look(&state, None).trouble(&state).unwrap();
        assert!(trouble.contains("steadfast trust recover"), "{trouble}");
    }
}
