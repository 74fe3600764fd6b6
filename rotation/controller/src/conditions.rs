//! What `kubectl get` and `kubectl describe` show of a trust domain: its status, derived.
//!
//! Nothing reads it back but for the times of transitions, and nothing depends on it. It is written
//! by who leads, when it has changed.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use steadfast_api::UnixTime;
use steadfast_platform::kubernetes::DomainStatus;
use steadfast_process::{Clock, ErrorChain};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::{Standing, Wait};
use tokio::sync::watch;

/// The status of a TrustDomain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// The phase of the rotation of the anchor, or `idle`.
    pub phase: String,
    /// When the first of the published anchors ends.
    pub anchor_not_after: String,
    /// When the issuer that signs SVIDs ends.
    pub issuer_not_after: String,
    /// In the order of their types.
    pub conditions: Vec<Condition>,
}

/// One condition, in Kubernetes' form.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True` or `False`.
    pub status: String,
    /// Why, in one word.
    pub reason: String,
    /// Why, for people.
    pub message: String,
    /// When `status` became what it is.
    pub last_transition_time: String,
}

/// Keeps the status for ever, while we lead.
pub async fn keep(
    domain: DomainStatus,
    mut standing: watch::Receiver<Standing>,
    held: watch::Receiver<Vec<String>>,
    clock: Arc<dyn Clock>,
) -> Infallible {
    let mut shown: Option<Status> = None;
    loop {
        let current = standing.borrow_and_update().clone();
        let state = current.state.as_ref().filter(|_| current.leads);
        match state {
            None => shown = None,
            Some(state) => {
                let held = held.borrow().clone();
                let seen = (state, &current, held.as_slice());
                if let Err(error) = write(&domain, &mut shown, seen, clock.now()).await {
                    tracing::warn!(error, "the status of the trust domain cannot be written");
                    shown = None;
                }
            }
        }
        // Not with every name that is missing no longer: it is for people.
        tokio::time::sleep(WRITE_EVERY).await;
        // The other end goes with the process.
        let _ = standing.changed().await;
    }
}

async fn write(
    domain: &DomainStatus,
    shown: &mut Option<Status>,
    seen: (&TrustDomainState, &Standing, &[String]),
    now: UnixTime,
) -> Result<(), String> {
    if shown.is_none() {
        let stored = domain.read().await.map_err(|error| ErrorChain(&error).to_string())?;
        // One of another version is written anew.
        *shown = Some(serde_json::from_value(stored).unwrap_or_default());
    }
    let before = shown.clone().unwrap_or_default();
    let status = status(seen, &before.conditions, now);
    if status != before {
        let value = serde_json::to_value(&status).map_err(|error| error.to_string())?;
        domain.write(value).await.map_err(|error| ErrorChain(&error).to_string())?;
        *shown = Some(status);
    }
    Ok(())
}

/// The status of this state, after one with these conditions.
pub fn status(
    (state, standing, held): (&TrustDomainState, &Standing, &[String]),
    before: &[Condition],
    now: UnixTime,
) -> Status {
    let phase = state.rotation.as_ref().map_or("idle", |rotation| rotation.phase.name().label());
    let first_end = state.published().map(|anchor| anchor.not_after).min();
    let issuer_end = state.active_issuer().map(|issuer| issuer.not_after);
    let end = |end: Option<UnixTime>| end.map(|end| end.to_string()).unwrap_or_default();
    let conditions =
        [keys(standing), proposals(held), ready(state, standing, now), rotating(state, standing)];
    let conditions = conditions.map(|(kind, status, reason, message)| {
        let status = if status { "True" } else { "False" };
        let same = before.iter().find(|one| one.kind == kind && one.status == status);
        Condition {
            kind: kind.to_owned(),
            status: status.to_owned(),
            reason,
            message,
            last_transition_time: same
                .map_or_else(|| now.to_string(), |one| one.last_transition_time.clone()),
        }
    });
    Status {
        phase: phase.to_owned(),
        anchor_not_after: end(first_end),
        issuer_not_after: end(issuer_end),
        conditions: conditions.into(),
    }
}

type Told = (&'static str, bool, String, String);

fn keys(standing: &Standing) -> Told {
    if standing.keyless.is_empty() {
        let all = "the key of each published anchor is where it belongs".to_owned();
        return ("KeysPresent", true, "AllThere".to_owned(), all);
    }
    let ids = standing.keyless.iter().map(|id| id.short().to_string()).collect::<Vec<_>>();
    let message = format!(
        "the keys of these anchors are gone: {}; another anchor takes their place by itself",
        ids.join(", ")
    );
    ("KeysPresent", false, "KeyGone".to_owned(), message)
}

fn proposals(held: &[String]) -> Told {
    let kind = "ProposalsTaken";
    if held.is_empty() {
        let none = "nothing that another tool keeps is held".to_owned();
        return (kind, true, "NoneHeld".to_owned(), none);
    }
    (kind, false, "Held".to_owned(), held.join("; "))
}

fn ready(state: &TrustDomainState, standing: &Standing, now: UnixTime) -> Told {
    let told =
        |status, reason: &str, message: String| ("Ready", status, reason.to_owned(), message);
    if state.halted.is_some() {
        let message = "workloads hold a bundle that this state has never published: the store was \
                       put back. Nothing is issued; run `steadfast trust recover`";
        return told(false, "Halted", message.to_owned());
    }
    if state.published().all(|anchor| anchor.not_after <= now) {
        let message = "every published anchor has ended: nothing is issued, and nobody can be \
                       asked; run `steadfast trust recover`";
        return told(false, "Expired", message.to_owned());
    }
    if state.active_issuer().is_none_or(|issuer| issuer.not_after <= now) {
        let message = "the issuer has ended: nothing is issued until it is replaced, which needs \
                       nobody where the key of its anchor is in the mesh";
        return told(false, "IssuerExpired", message.to_owned());
    }
    match &standing.trouble {
        Some(trouble) => told(false, "Trouble", trouble.clone()),
        None => told(true, "Issuing", "SVIDs are issued and bundles served".to_owned()),
    }
}

fn rotating(state: &TrustDomainState, standing: &Standing) -> Told {
    let waits = standing.waiting.as_ref().map(waits_for).unwrap_or_default();
    let Some(rotation) = &state.rotation else {
        let message = if waits.is_empty() {
            "no anchor is being rotated".to_owned()
        } else {
            format!("a rotation is due and {waits}")
        };
        return ("Rotating", false, "Idle".to_owned(), message);
    };
    let label = rotation.phase.name().label();
    let (first, rest) = label.split_at(1);
    let number = state.rotations;
    let message = format!("rotation {number} is in {label}; {waits}");
    ("Rotating", true, first.to_uppercase() + rest, message)
}

/// What is waited for, in half a sentence that does not change from second to second.
fn waits_for(wait: &Wait) -> String {
    let names = |names: &[String]| {
        let more = names.len().saturating_sub(NAMES_SHOWN);
        let shown = names[..names.len() - more].join(", ");
        if more == 0 { shown } else { format!("{shown} and {more} more") }
    };
    match wait {
        Wait::Nothing => String::new(),
        Wait::Census(tally) => {
            let missing: Vec<_> = tally.missing.iter().map(|one| one.name.clone()).collect();
            format!("waits for the word of {}", names(&missing))
        }
        Wait::Consumers(all) => format!("waits for holders that cannot ack: {}", names(all)),
        Wait::Listed(anchors) => {
            let ids: Vec<_> = anchors.iter().map(|id| id.short().to_string()).collect();
            format!("waits until the operator's bundle lists {} no more", names(&ids))
        }
        Wait::Mirrors(all) => format!("waits for mounted bundles: {}", names(all)),
        Wait::Issuer { loading, away } => {
            let all: Vec<_> = loading.iter().chain(away).cloned().collect();
            format!("waits until replicas of identity have the next issuer: {}", names(&all))
        }
        Wait::Until(until) => {
            format!("waits until {until}: the next issuer must be valid on every clock")
        }
        Wait::Promised { until } => {
            format!("waits until {until}: certificates of holders that cannot ack live so long")
        }
        Wait::Signature { anchor } => {
            format!("waits for an issuer under the external anchor {}", anchor.short())
        }
        Wait::Paused => "waits for a person: `steadfast anchor resume`".to_owned(),
        other => format!("waits for: {}", other.label()),
    }
}

const NAMES_SHOWN: usize = 5;
const WRITE_EVERY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use steadfast_identity::authority::found;
    use steadfast_rotation_protocol::trust_domain::Halt;

    use super::*;

    #[test]
    fn a_status_says_how_it_stands_and_since_when() {
        let (then, now) = (UnixTime::from_secs(1_795_262_400), UnixTime::from_secs(1_795_262_500));
        let mut state = found(&"cluster.local".parse().unwrap(), then).unwrap().state;
        let standing = Standing { state: Some(state.clone()), ..Standing::default() };
        let first = status((&state, &standing, &[]), &[], then);
        assert_eq!(first.phase, "idle");
        let kinds: Vec<_> = first.conditions.iter().map(|one| (&*one.kind, &*one.status)).collect();
        let expected = [
            ("KeysPresent", "True"),
            ("ProposalsTaken", "True"),
            ("Ready", "True"),
            ("Rotating", "False"),
        ];
        assert_eq!(kinds, expected);
        for (days, reason) in [(31, "IssuerExpired"), (800, "Expired")] {
            let late =
                status((&state, &standing, &[]), &[], then + Duration::from_secs(days * 86_400));
            let ready = &late.conditions[2];
            assert_eq!((&*ready.status, &*ready.reason), ("False", reason));
        }
        state.halted = Some(Halt::Restored { seen_seq: 7 });
        let held = ["the Secret a/b: it is not there".to_owned()];
        let halted = status((&state, &standing, &held), &first.conditions, now);
        assert_eq!(
            (&*halted.conditions[1].status, &*halted.conditions[1].message),
            ("False", &*held[0])
        );
        let ready = &halted.conditions[2];
        assert_eq!((&*ready.status, &*ready.reason), ("False", "Halted"));
        assert_eq!(ready.last_transition_time, now.to_string());
        assert_eq!(halted.conditions[0].last_transition_time, then.to_string());
        assert_eq!(status((&state, &standing, &held), &halted.conditions, now), halted);
    }

    #[test]
    fn of_many_who_are_waited_for_some_are_named() {
        let names = (0..8).map(|n| format!("demo/web-{n}")).collect();
        let told = waits_for(&Wait::Mirrors(names));
        assert!(told.ends_with("demo/web-4 and 3 more"), "{told}");
    }
}
