//! Whether the canaries do well: the guard of a phase in which some workloads go first.
//!
//! Well is: there are some; each of them holds an SVID of the next anchor's issuer; it was shown
//! and accepted both ways, by a workload that dialled a canary and by one that was dialled; and for
//! a whole window nobody has told of a handshake that failed and names that issuer. Counts are a
//! replica's, in memory, so the window begins again with a replica that has started meanwhile.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::UnixTime;

use crate::census::{Listed, Member, ProxyStatus, Round};
use crate::instance::Instance;
use crate::rotation::{Canary, Rotation};
use crate::trust_domain::{CanaryPlan, RenewOrder, TrustDomainState};

/// How the canaries do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryStanding {
    /// How many there are; 0: the plan selects nobody, and the phase is not entered, or not left.
    pub canaries: usize,
    /// Those without an SVID of the next anchor's issuer, by name.
    pub without: Vec<String>,
    /// Whether somebody has accepted a canary that dialled.
    pub inbound: bool,
    /// Whether somebody who dialled has accepted a canary.
    pub outbound: bool,
    /// Who had handshakes fail that name the issuer, within the window.
    pub failures: Vec<CanaryFailure>,
}

/// Somebody whose handshakes failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryFailure {
    /// Its pod's name: a canary, or whoever dealt with one.
    pub name: String,
    /// How many failed, since its replica knows it.
    pub failed: u64,
    /// The label of the newest failure's code.
    pub code: String,
    /// When that was told.
    pub at: UnixTime,
}

/// They have done well, for the whole window.
#[derive(Debug)]
pub(crate) struct Proven(());

/// Why they are not proven.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unproven {
    /// Something is missing or wrong.
    Standing(CanaryStanding),
    /// Nothing is; time is.
    Until(UnixTime),
}

/// The names of those that a plan selects now.
pub(crate) fn selected<'a>(plan: &CanaryPlan, round: &'a Round) -> Vec<&'a Listed> {
    let running = round.listed.iter().filter(|listed| listed.proxy != ProxyStatus::Ended);
    let selects = |listed: &&Listed| {
        let namespace = listed.name.split_once('/').map_or("", |(namespace, _)| namespace);
        plan.selector.selects(namespace, &listed.pod_uid)
    };
    running.filter(selects).collect()
}

/// Judges the canaries of a phase that began at `since`.
pub(crate) fn judge(
    state: &TrustDomainState,
    canary: &Canary,
    round: &Round,
    since: UnixTime,
    now: UnixTime,
) -> Result<Proven, Unproven> {
    let exempt = |instance: &Instance| state.exemptions.iter().any(|e| e.instance == *instance);
    let members: Vec<&Member> = round.replicas.iter().flat_map(|r| &r.members).collect();
    let mut standing = CanaryStanding::default();
    for listed in selected(&canary.plan, round) {
        let of_pod = members.iter().filter(|m| m.instance.pod_uid == listed.pod_uid);
        let newest = of_pod.max_by_key(|m| (m.instance.started_at, m.open, m.answered));
        if newest.is_some_and(|member| exempt(&member.instance)) {
            continue;
        }
        standing.canaries += 1;
        let held = newest.and_then(|member| member.ack.as_ref()?.svid);
        if held.is_none_or(|svid| svid.issuer != canary.issuer) {
            standing.without.push(listed.name.clone());
        }
    }
    // The window begins when all of them must have renewed.
    let renewed = canary.renew.map(|order| order.from + order.window);
    let mut proven_from = since.max(renewed.unwrap_or_default());
    for member in members.iter().filter(|member| !exempt(&member.instance)) {
        for used in member.issuers.iter().filter(|used| used.issuer == canary.issuer) {
            standing.inbound |= used.inbound > 0;
            standing.outbound |= used.outbound > 0;
            let Some(failed) = &used.failed else { continue };
            proven_from = proven_from.max(failed.at);
            if within(failed.at, canary.plan.window, now) {
                standing.failures.push(CanaryFailure {
                    name: member.name.clone(),
                    failed: failed.count,
                    code: failed.code.clone(),
                    at: failed.at,
                });
            }
        }
    }
    let well = standing.canaries > 0
        && standing.without.is_empty()
        && standing.failures.is_empty()
        && standing.inbound
        && standing.outbound;
    if !well {
        return Err(Unproven::Standing(standing));
    }
    // What a replica counted before it was started again is lost.
    let restarted = round.replicas.iter().map(|replica| replica.started_at).max();
    proven_from = proven_from.max(restarted.unwrap_or_default());
    match within(proven_from, canary.plan.window, now) {
        true => Err(Unproven::Until(proven_from + canary.plan.window)),
        false => Ok(Proven(())),
    }
}

fn within(from: UnixTime, window: Duration, now: UnixTime) -> bool {
    now < from + window
}

impl TrustDomainState {
    /// The order to renew early that this workload is to follow: that of all, or the canaries'.
    pub fn renew_for(&self, namespace: &str, pod_uid: &str) -> Option<RenewOrder> {
        let canary = self.rotation.as_ref().and_then(Rotation::canary);
        let canary = canary.filter(|canary| canary.plan.selector.selects(namespace, pod_uid));
        let orders = [self.renew, canary.and_then(|canary| canary.renew)];
        orders.into_iter().flatten().max_by_key(|order| order.id)
    }
}

#[cfg(test)]
mod tests {
    use steadfast_api::KeyId;

    use super::*;
    use crate::census::{Ack, Failed, HeldSvid, IssuerUse, Replica};
    use crate::trust_domain::{IssuerRecord, Selector};

    const SINCE: UnixTime = UnixTime::from_secs(1_800_000_000);
    const WINDOW: Duration = Duration::from_secs(300);

    fn id(n: u8) -> KeyId {
        KeyId::of_spki(&[n])
    }

    fn canary() -> Canary {
        let selector = Selector::Namespace("web".to_owned());
        let plan = CanaryPlan { selector, window: WINDOW };
        Canary { to: id(2), issuer: id(20), plan, renew: None }
    }

    fn state() -> TrustDomainState {
        let issuer = IssuerRecord {
            id: id(10),
            anchor_id: id(1),
            der: Vec::new(),
            chain: Vec::new(),
            not_before: SINCE,
            not_after: SINCE,
            key_ref: String::new(),
        };
        TrustDomainState::founded("m".parse().unwrap(), Vec::new(), issuer, SINCE)
    }

    fn member(name: &str, issuer: u8, used: IssuerUse) -> Member {
        Member {
            instance: Instance { pod_uid: name.to_owned(), started_at: SINCE },
            name: name.to_owned(),
            open: true,
            last_heard: SINCE,
            answered: 1,
            answered_before: 1,
            used: Vec::new(),
            issuers: vec![used],
            ack: Some(Ack {
                seq: 1,
                digest: None,
                mounted: None,
                svid: Some(HeldSvid { issuer: id(issuer), not_after: SINCE }),
                clock_offset_ms: 0,
                held: None,
            }),
            version: None,
        }
    }

    fn used(inbound: u64, outbound: u64) -> IssuerUse {
        IssuerUse { issuer: id(20), inbound, outbound, failed: None }
    }

    fn round(members: Vec<Member>) -> Round {
        let listed = members.iter().map(|member| Listed {
            pod_uid: member.instance.pod_uid.clone(),
            name: member.name.clone(),
            proxy: ProxyStatus::Running,
        });
        Round {
            nonce: 1,
            listed: listed.collect(),
            replicas: vec![Replica {
                name: "identity".to_owned(),
                reached: true,
                started_at: SINCE - WINDOW,
                newest_nonce: 1,
                loaded: vec![id(20)],
                own: None,
                members,
            }],
            vanished: Vec::new(),
        }
    }

    fn standing(round: &Round, now: UnixTime) -> CanaryStanding {
        match judge(&state(), &canary(), round, SINCE, now).unwrap_err() {
            Unproven::Standing(standing) => standing,
            Unproven::Until(until) => panic!("nothing is wrong until {until}"),
        }
    }

    fn well() -> Vec<Member> {
        vec![member("web/a", 20, used(0, 0)), member("api/b", 10, used(1, 1))]
    }

    #[test]
    fn canaries_that_do_well_for_the_whole_window_are_proven_and_no_sooner() {
        let round = round(well());
        let at = |now| judge(&state(), &canary(), &round, SINCE, now);
        assert!(at(SINCE + WINDOW).is_ok());
        let early = at(SINCE + WINDOW - Duration::from_secs(1)).unwrap_err();
        assert_eq!(early, Unproven::Until(SINCE + WINDOW));
    }

    #[test]
    fn the_window_begins_when_the_canaries_must_have_renewed() {
        let round = round(well());
        let renew = RenewOrder { id: 1, from: SINCE + WINDOW, window: WINDOW };
        let canary = Canary { renew: Some(renew), ..canary() };
        let early = judge(&state(), &canary, &round, SINCE, SINCE + WINDOW * 2).unwrap_err();
        assert_eq!(early, Unproven::Until(SINCE + WINDOW * 3));
        assert!(judge(&state(), &canary, &round, SINCE, SINCE + WINDOW * 3).is_ok());
    }

    #[test]
    fn a_plan_that_selects_nobody_proves_nothing() {
        let round = round(vec![member("api/b", 10, used(1, 1))]);
        assert_eq!(standing(&round, SINCE + WINDOW * 9).canaries, 0);
    }

    #[test]
    fn a_canary_without_the_next_issuer_is_named() {
        let mut members = well();
        members.push(member("web/c", 10, used(0, 0)));
        assert_eq!(standing(&round(members), SINCE + WINDOW * 9).without, ["web/c"]);
    }

    #[test]
    fn one_way_alone_proves_nothing() {
        for (inbound, outbound) in [(5, 0), (0, 5), (0, 0)] {
            let members =
                vec![member("web/a", 20, used(0, 0)), member("api/b", 10, used(inbound, outbound))];
            let standing = standing(&round(members), SINCE + WINDOW * 9);
            assert_eq!((standing.inbound, standing.outbound), (inbound > 0, outbound > 0));
        }
    }

    #[test]
    fn a_failure_that_names_the_issuer_begins_the_window_again_and_says_whose_it_was() {
        let mut members = well();
        let at = SINCE + WINDOW / 2;
        members[1].issuers[0].failed = Some(Failed { at, count: 3, code: "expired".to_owned() });
        let round = round(members);
        let failing = standing(&round, SINCE + WINDOW);
        assert_eq!(failing.failures.len(), 1);
        assert_eq!((failing.failures[0].name.as_str(), failing.failures[0].failed), ("api/b", 3));
        assert!(judge(&state(), &canary(), &round, SINCE, at + WINDOW).is_ok());
    }

    #[test]
    fn failures_of_another_issuer_and_of_the_exempt_hold_nobody_up() {
        let mut members = well();
        let failed = Some(Failed { at: SINCE, count: 1, code: "expired".to_owned() });
        members[1].issuers.push(IssuerUse { issuer: id(10), failed: failed.clone(), ..used(0, 0) });
        members.push(member("api/c", 10, IssuerUse { failed, ..used(0, 0) }));
        let mut state = state();
        let instance = members[2].instance.clone();
        state.exempt(instance, String::new(), String::new(), String::new(), SINCE);
        let round = round(members);
        assert!(judge(&state, &canary(), &round, SINCE, SINCE + WINDOW).is_ok());
    }

    #[test]
    fn a_replica_that_has_started_again_begins_the_window_again() {
        let mut round = round(well());
        round.replicas[0].started_at = SINCE + WINDOW / 2;
        let unproven = judge(&state(), &canary(), &round, SINCE, SINCE + WINDOW).unwrap_err();
        assert_eq!(unproven, Unproven::Until(SINCE + WINDOW / 2 + WINDOW));
    }
}
