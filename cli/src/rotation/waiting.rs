//! What a rotation waits for, in words: the guard, what would satisfy it, and who is missing.

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;
use steadfast_api::UnixTime;
use steadfast_process::duration;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::canary::CanaryStanding;
use steadfast_rotation_protocol::census::{Missing, OLDEST, Reason, Tally};
use steadfast_rotation_protocol::controller::Wait;
use steadfast_rotation_protocol::trust_domain::{
    Consumer, Halt, KUBELET_REFRESH, POD_CERTIFICATES,
};

/// A wait, as it is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Waiting {
    /// The guard, and what would satisfy it.
    pub(crate) guard: String,
    /// How many have answered as demanded, and how many must; `None`: nobody is asked.
    pub(crate) acked: Option<(usize, usize)>,
    /// Who has not.
    pub(crate) missing: Vec<Absent>,
    /// How long the guard itself still needs, where that is known, in seconds.
    pub(crate) left_s: Option<u64>,
    /// Whether it lasts until somebody does something.
    pub(crate) stalled: bool,
}

/// Somebody who is waited for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Absent {
    /// Namespace and name.
    pub(crate) name: String,
    /// Why, and since when.
    pub(crate) reason: String,
    /// For how long, where that is known, in seconds.
    pub(crate) for_s: Option<u64>,
}

impl Waiting {
    /// What this wait is, at this time. At the deadline, if there is one, nobody is waited for.
    pub(crate) fn of(
        wait: &Wait,
        state: &TrustDomainState,
        deadline: Option<UnixTime>,
        now: UnixTime,
    ) -> Self {
        let ends = deadline.is_some_and(|deadline| now < deadline);
        Self { stalled: is_stalled(wait, state, ends, now), ..Self::shown(wait, state, now) }
    }

    fn shown(wait: &Wait, state: &TrustDomainState, now: UnixTime) -> Self {
        let guard = |guard: String| Self { guard, ..Self::default() };
        match wait {
            Wait::Canary(standing) => Self::canary(standing, now),
            Wait::Census(tally) => Self::census(tally, now),
            Wait::Clock { offset_ms } => guard(format!(
                "the clock of steadfast-rotation is {} the store's: it takes no step before that \
                 is mended",
                offset(*offset_ms)
            )),
            Wait::Consumers(names) => Self {
                guard: "holders that cannot ack must have read the bundle".to_owned(),
                missing: names.iter().map(|name| consumer(name, &state.consumers)).collect(),
                ..Self::default()
            },
            Wait::Fence { left } => Self {
                guard: "fence: replicas may act on older copies of the state until it is over"
                    .to_owned(),
                left_s: Some(left.as_millis().div_ceil(1000) as u64).filter(|left| *left > 0),
                ..Self::default()
            },
            Wait::Halted(halt) => guard(halted(*halt)),
            Wait::Issuer { loading, away } if loading.is_empty() && away.is_empty() => {
                guard("the identity service makes the key of the next issuer".to_owned())
            }
            Wait::Issuer { loading, away } => {
                let loading = loading.iter().map(|name| Absent::named(name, "loads it"));
                let away = away.iter().map(|name| {
                    let reason = "cannot be reached: bring it back, or, if it is gone for good, \
                                  exempt it by name (`steadfast anchor exempt`)";
                    Absent::named(name, reason)
                });
                Self {
                    guard: "the next issuer must be loaded by the replicas of identity".to_owned(),
                    missing: loading.chain(away).collect(),
                    ..Self::default()
                }
            }
            Wait::Key => guard("the key of the new anchor is being made".to_owned()),
            Wait::Listed(anchors) => {
                let ids: Vec<_> = anchors.iter().map(|id| id.short().to_string()).collect();
                guard(format!(
                    "the ConfigMap of the operator's bundle still lists {}: take it out there, or \
                     go back with `steadfast anchor abort`",
                    ids.join(", ")
                ))
            }
            Wait::Mirrors(names) => Self {
                guard: "mounted copies of the bundle must show the new anchors".to_owned(),
                missing: names.iter().map(|name| Absent::named(name, MOUNTED_BEHIND)).collect(),
                ..Self::default()
            },
            Wait::Nothing => guard(String::new()),
            Wait::Paused => {
                guard("paused by a person; it goes on with `steadfast anchor resume`".to_owned())
            }
            Wait::Promised { until } => Self {
                guard: format!(
                    "SVIDs of holders that cannot ack live until {until}; nothing but their end \
                     satisfies this"
                ),
                left_s: Some(until.since(now).as_secs()),
                ..Self::default()
            },
            Wait::Round => guard("everybody is being asked".to_owned()),
            Wait::Signature { anchor } => {
                let id = anchor.short();
                guard(format!(
                    "the owner of external anchor {id} must sign an issuer: `steadfast issuer \
                     request --anchor {id}`, then `steadfast issuer import FILE`"
                ))
            }
            Wait::Until(until) => Self {
                guard: match state.rotation.as_ref().and_then(|rotation| rotation.canary()) {
                    Some(_) => "the canaries: nothing may go wrong until their time is over",
                    None => "the next issuer must be valid on every clock",
                }
                .to_owned(),
                left_s: Some(until.since(now).as_secs()),
                ..Self::default()
            },
        }
    }

    fn canary(standing: &CanaryStanding, now: UnixTime) -> Self {
        let failing = standing.failures.iter().map(|failure| Absent {
            name: failure.name.clone(),
            reason: format!("{} of its handshakes failed, last: {}", failure.failed, failure.code),
            for_s: Some(now.since(failure.at).as_secs()),
        });
        let without = standing.without.iter().map(|name| Absent {
            name: name.clone(),
            reason: "it has no SVID of the next issuer yet".to_owned(),
            for_s: None,
        });
        let guard = match standing {
            CanaryStanding { canaries: 0, .. } => {
                "the canary plan selects no workload that runs: undo it with `steadfast anchor \
                 abort`, and order it with another plan"
            }
            CanaryStanding { failures, .. } if !failures.is_empty() => {
                "handshakes that name the canaries' issuer fail: mend that, or undo the rotation \
                 with `steadfast anchor abort`"
            }
            CanaryStanding { inbound: false, .. } | CanaryStanding { outbound: false, .. } => {
                "the canaries: a handshake with one must be accepted each way, when it dials and \
                 when it is dialled"
            }
            _ => "the canaries: each must hold an SVID of the next issuer",
        };
        let missing = failing.chain(without).collect();
        Self { guard: guard.to_owned(), missing, ..Self::default() }
    }

    fn census(tally: &Tally, now: UnixTime) -> Self {
        let (settled, missing) = (tally.settled.len(), tally.missing.len());
        Self {
            guard: "census: everybody must answer for what is published; who has ended, or is \
                    exempted by name (`steadfast anchor exempt`), need not"
                .to_owned(),
            acked: Some((settled, settled + missing)),
            missing: Absent::all(&tally.missing, now),
            ..Self::default()
        }
    }
}

/// Whether this lasts until somebody does something. Whoever is connected answers in the end, and
/// what is of time passes.
fn is_stalled(wait: &Wait, state: &TrustDomainState, ends: bool, now: UnixTime) -> bool {
    let is_fixed = |name: &String| {
        let mut consumers = state.consumers.iter();
        consumers.any(|consumer| consumer.name == *name && consumer.refresh.is_none())
    };
    match wait {
        Wait::Canary(standing) => standing.canaries == 0 || !standing.failures.is_empty(),
        Wait::Census(tally) => !ends && tally.missing.iter().any(|m| lasts(&m.reason)),
        Wait::Clock { .. }
        | Wait::Halted(_)
        | Wait::Listed(_)
        | Wait::Paused
        | Wait::Signature { .. } => true,
        Wait::Consumers(names) => !ends && names.iter().any(is_fixed),
        Wait::Issuer { away, .. } => !away.is_empty(),
        Wait::Mirrors(_) => {
            let since = state.rotation.as_ref().map(|rotation| rotation.since);
            since.is_some_and(|since| now > since + MOUNTED_LATE)
        }
        Wait::Fence { .. }
        | Wait::Key
        | Wait::Nothing
        | Wait::Promised { .. }
        | Wait::Round
        | Wait::Until(_) => false,
    }
}

/// Nobody hears of it, or it or its node is to be mended.
const fn lasts(reason: &Reason) -> bool {
    matches!(
        reason,
        Reason::ClockOff { .. }
            | Reason::NotConnected { .. }
            | Reason::Vanished { .. }
            | Reason::VersionTooOld { .. }
    )
}

impl Absent {
    /// Who, and why.
    pub(crate) fn all(missing: &[Missing], now: UnixTime) -> Vec<Self> {
        let pods = missing.iter().map(|m| (m.name.as_str(), m.instance.pod_uid.as_str()));
        let absent = told_apart(pods).into_iter().zip(missing).map(|(name, missing)| {
            let for_s = match missing.reason {
                Reason::NotConnected { since: Some(since) } => Some(now.since(since).as_secs()),
                _ => None,
            };
            Self { name, reason: reason(&missing.reason), for_s }
        });
        absent.collect()
    }

    fn named(name: &str, reason: &str) -> Self {
        Self { name: name.to_owned(), reason: reason.to_owned(), for_s: None }
    }

    /// With the time that it has lasted, for a look that is not compared with another.
    pub(crate) fn with_time(&self) -> String {
        let ago = self.for_s.map(|secs| duration::show(Duration::from_secs(secs)));
        ago.map_or_else(|| self.reason.clone(), |ago| format!("{} ({ago})", self.reason))
    }
}

/// Pods by name and UID, each by a name that is no other's: of several of one name, with the UID.
pub(crate) fn told_apart<'a>(
    pods: impl Iterator<Item = (&'a str, &'a str)> + Clone,
) -> Vec<String> {
    let mut of_name: HashMap<&str, usize> = HashMap::new();
    for (name, _) in pods.clone() {
        *of_name.entry(name).or_default() += 1;
    }
    let told = pods.map(|(name, uid)| match of_name[name] {
        1 => name.to_owned(),
        _ => format!("{name} (UID {uid})"),
    });
    told.collect()
}

/// Why somebody has not settled, with what would help where that is not plain.
fn reason(reason: &Reason) -> String {
    match reason {
        Reason::Behind { seq } => format!("still uses the bundle of seq {seq}"),
        Reason::ClockOff { offset_ms } => {
            format!("its clock is {} ours: mend the clock of its node", offset(*offset_ms))
        }
        Reason::Differs => "holds a bundle of the same seq with other anchors".to_owned(),
        Reason::MountedStale => {
            "its mounted bundle file cannot be read, or still names the old anchors".to_owned()
        }
        Reason::NotConnected { since: Some(since) } => {
            format!("not connected since {since}")
        }
        Reason::NotConnected { since: None } => "has never connected".to_owned(),
        Reason::Svid { issuer } => {
            format!("its SVID is still of issuer {}; it renews by itself", issuer.short())
        }
        Reason::Unanswered => "connected, and has not answered yet".to_owned(),
        Reason::Used { anchor } => {
            format!("still has handshakes under anchor {}", anchor.short())
        }
        Reason::VersionTooOld { version } => {
            format!("its proxy is too old: {version}, and {OLDEST} is the oldest that answers")
        }
        Reason::Vanished { until } => {
            format!("vanished without a word; its SVID may live until {until}")
        }
    }
}

/// What halts everything.
pub(crate) fn halted(halt: Halt) -> String {
    match halt {
        Halt::Restored { seen_seq } => format!(
            "the store was restored from a backup (seq {seen_seq} has been seen): nothing is issued \
             before `steadfast trust recover`"
        ),
    }
}

fn consumer(name: &str, consumers: &[Consumer]) -> Absent {
    let known = consumers.iter().find(|consumer| consumer.name == name);
    let reason = match known.map(|consumer| consumer.refresh) {
        Some(None) => format!(
            "reads the bundle once and for all: give it the new one, then `steadfast consumer \
             remove {name}`"
        ),
        Some(Some(refresh)) => reads_every(refresh),
        None if name == POD_CERTIFICATES => {
            format!("their kubelets' copy of the bundle: {}", reads_every(KUBELET_REFRESH))
        }
        None => "is no consumer any more".to_owned(),
    };
    Absent { name: name.to_owned(), reason, for_s: None }
}

fn reads_every(refresh: Duration) -> String {
    format!("reads the bundle every {}, and gets four times that", duration::show(refresh))
}

fn offset(millis: i64) -> String {
    let side = if millis < 0 { "behind" } else { "ahead of" };
    format!("{:.1} s {side}", millis.unsigned_abs() as f64 / 1000.0)
}

const MOUNTED_BEHIND: &str = "its mounted bundle file names other anchors than the bundle";
/// Every mounted file is there by then, and read again once a minute.
const MOUNTED_LATE: Duration = Duration::from_secs(300);
