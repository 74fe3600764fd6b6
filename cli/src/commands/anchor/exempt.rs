//! `steadfast anchor exempt` and `unexempt`: whom no census waits for.

use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::Instance;
use steadfast_rotation_protocol::census::{Member, ProxyStatus, Round};
use steadfast_rotation_protocol::trust_domain::Exemption;

use crate::confirm::{OrderArgs, confirm};
use crate::controller::Controller;
use crate::problem::Problem;
use crate::suggest::nearest;
use crate::trust_domain;

use super::{AnchorError, CommonArgs, change, said};

/// Let a rotation go on without somebody whom it misses: a workload, or a replica of identity
///
/// The exemption is of this one instance of the pod. While it lasts, the workload may be refused by
/// others and refuse them. It ends by itself when the workload answers, or starts anew. That of a
/// replica of identity ends when it serves what is published.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast anchor exempt demo/web-0 --reason \"its node is being repaired\"
  steadfast anchor exempt 'identity host-b#2' --reason \"its machine is dead\"")]
pub(super) struct ExemptArgs {
    /// NAMESPACE/POD, the UID of the pod, or the name of a replica of identity, as `steadfast anchor
    /// status` shows it. Of several pods of one name it is one that does not answer and is not
    /// exempt yet
    #[arg(value_name = "NAME")]
    workload: String,
    /// Why, for those who come after you
    #[arg(long, value_name = "TEXT")]
    reason: String,
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    order: OrderArgs,
}

/// Wait again for a workload, or a replica of identity, that is exempt
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast anchor unexempt demo/web-0
  steadfast anchor unexempt 'identity host-b#2'")]
pub(super) struct UnexemptArgs {
    /// NAMESPACE/POD, the UID of the pod, or the name of a replica of identity
    #[arg(value_name = "NAME")]
    workload: String,
    #[command(flatten)]
    common: CommonArgs,
}

pub(super) async fn exempt(args: ExemptArgs) -> Result<(), Problem> {
    let (controller, _) = Controller::find(&args.common.mesh, &args.common.controller).await?;
    let round = controller.round().await?.ok_or(AnchorError::Unasked)?;
    let state = trust_domain::read(&args.common.mesh).await?;
    let (instance, name) = find(&args.workload, &round, &state.exemptions)?;
    let who = match instance.pod_uid == name {
        true => name.clone(),
        false => format!("{name} (UID {})", instance.pod_uid),
    };
    let question = format!(
        "Rotations go on without {who}: until it answers again, others may refuse it. Exempt it?"
    );
    confirm(&question, &args.order, args.common.output)?;
    let (reason, by) = (&args.reason, &args.order.by);
    change(&args.common, |state| {
        state.exempt(instance.clone(), name.clone(), reason.clone(), by.clone(), SystemClock.now());
        Ok(())
    })
    .await?;
    let until = match round.replicas.iter().any(|replica| replica.name == instance.pod_uid) {
        true => "it serves what is published",
        false => "it answers or starts anew",
    };
    said(args.common.output, &format!("{who} is exempt until {until}"))
}

/// Whom a person means by a name or a UID: of several pods of one name first one that does not
/// answer and is not exempt yet, then the newest start. One that nobody has heard of is
/// exempted as such, until it starts. A replica of identity is counted by its name.
fn find(
    text: &str,
    round: &Round,
    exemptions: &[Exemption],
) -> Result<(Instance, String), AnchorError> {
    let is_meant = |uid: &str, name: &str| uid == text || name == text;
    let members = round.replicas.iter().flat_map(|replica| &replica.members);
    let members = members.filter(|member| is_meant(&member.instance.pod_uid, &member.name));
    let members: Vec<_> = members.collect();
    let answers = |uid: &str| {
        let answers = |m: &&Member| m.open && m.answered >= round.nonce;
        members.iter().copied().filter(answers).any(|m| m.instance.pod_uid == uid)
    };
    let known = members.iter().map(|member| (&member.instance, &member.name));
    let vanished = round.vanished.iter().map(|gone| (&gone.instance, &gone.name));
    let heard = known.chain(vanished).map(|(instance, name)| (instance.clone(), name));
    let listed = round.listed.iter().filter(|listed| {
        let is_known = members.iter().any(|member| member.instance.pod_uid == listed.pod_uid);
        listed.proxy != ProxyStatus::Ended && !is_known
    });
    let listed = listed.map(|listed| (unheard(&listed.pod_uid), &listed.name));
    let replicas = round.replicas.iter().map(|replica| (unheard(&replica.name), &replica.name));
    let all = heard.chain(listed).chain(replicas);
    let meant = all.filter(|(instance, name)| is_meant(&instance.pod_uid, name));
    let waited_for = |instance: &Instance| !exemptions.iter().any(|e| covers(e, instance));
    let meant = meant.max_by_key(|(instance, _)| {
        let missed = !answers(&instance.pod_uid);
        (missed && waited_for(instance), missed, instance.started_at)
    });
    meant.map(|(instance, name)| (instance, name.clone())).ok_or_else(|| unknown(text, round))
}

/// Whether it is exempt: whatever start of a pod ran when that was said.
fn covers(exemption: &Exemption, instance: &Instance) -> bool {
    let Instance { pod_uid, started_at } = &exemption.instance;
    *pod_uid == instance.pod_uid && instance.started_at <= exemption.at.max(*started_at)
}

fn unheard(uid: &str) -> Instance {
    Instance { pod_uid: uid.to_owned(), started_at: UnixTime::default() }
}

/// Nobody of this name is asked: who is, with those first that do not answer.
fn unknown(name: &str, round: &Round) -> AnchorError {
    let replicas = || round.replicas.iter();
    let listed = round.listed.iter().map(|listed| listed.name.as_str());
    let vanished = round.vanished.iter().map(|gone| gone.name.as_str());
    let all = listed.chain(vanished).chain(replicas().map(|replica| replica.name.as_str()));
    let all: Vec<_> = all.collect();
    let near = nearest(name, all.iter().copied());
    let near = near.first().map_or_else(String::new, |near| format!("; did you mean {near:?}?"));
    let has_answered = |asked: &&&str| {
        let reached = replicas().any(|replica| replica.name == **asked && replica.reached);
        let heard = replicas()
            .flat_map(|replica| &replica.members)
            .any(|member| member.name == **asked && member.open && member.answered >= round.nonce);
        reached || heard
    };
    let silent: Vec<_> = all.iter().filter(|asked| !has_answered(asked)).copied().collect();
    let silent = match silent.as_slice() {
        [] => "everybody who is asked answers now".to_owned(),
        silent => {
            let more = silent.len().saturating_sub(NAMED_MAX);
            let named = silent.iter().take(NAMED_MAX).map(|name| format!("{name:?}"));
            let named = named.collect::<Vec<_>>().join(", ");
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!("who does not answer now: {named}{more}")
        }
    };
    AnchorError::Unknown { workload: name.to_owned(), hint: format!("{near}; {silent}") }
}

pub(super) async fn unexempt(args: UnexemptArgs) -> Result<(), Problem> {
    let state = trust_domain::read(&args.common.mesh).await?;
    let exemption = exempted(&args.workload, &state.exemptions)?;
    change(&args.common, |state| state.unexempt(&exemption.instance.pod_uid)).await?;
    said(args.common.output, &format!("{} is waited for again", args.workload))
}

/// The exemption of this pod, of several of one name first one that can still be taken back.
fn exempted<'a>(text: &str, exemptions: &'a [Exemption]) -> Result<&'a Exemption, AnchorError> {
    let is_it = |e: &&Exemption| e.instance.pod_uid == text || e.name == text;
    let found = exemptions.iter().filter(is_it).min_by_key(|exemption| exemption.relied_on);
    found.ok_or_else(|| {
        let exempt = exemptions.iter().map(|exemption| exemption.shown_name().to_owned());
        AnchorError::NotExempt { workload: text.to_owned(), exempt: exempt.collect() }
    })
}

/// More names than this do not help in an error.
const NAMED_MAX: usize = 10;

#[cfg(test)]
mod tests {
    use steadfast_rotation_protocol::census::{Listed, Replica, Vanished};

    use super::*;

    /// Two replicas of identity, the second of which is dead; one pod that answers, one that does
    /// not.
    fn round() -> Round {
        let listed = |name: &str| Listed {
            pod_uid: format!("uid of {name}"),
            name: name.to_owned(),
            proxy: ProxyStatus::Running,
        };
        let member = Member {
            instance: Instance {
                pod_uid: "uid of demo/api-0".to_owned(),
                started_at: UnixTime::from_secs(7),
            },
            name: "demo/api-0".to_owned(),
            open: true,
            last_heard: UnixTime::from_secs(9),
            answered: 5,
            answered_before: 4,
            used: Vec::new(),
            issuers: Vec::new(),
            ack: None,
            version: None,
        };
        let replica = |name: &str, reached, members| Replica {
            name: name.to_owned(),
            reached,
            members,
            ..Replica::default()
        };
        Round {
            nonce: 5,
            listed: vec![listed("demo/web-0"), listed("demo/api-0")],
            replicas: vec![
                replica("identity 192.0.2.1:8080", true, vec![member]),
                replica("identity 192.0.2.2:8080", false, Vec::new()),
            ],
            vanished: Vec::new(),
        }
    }

    #[test]
    fn a_replica_of_identity_is_exempted_by_the_name_that_is_shown() {
        let (found, name) = find("identity 192.0.2.2:8080", &round(), &[]).unwrap();
        assert_eq!(name, "identity 192.0.2.2:8080");
        // What a census asks for: see `tally`.
        let counted = Instance {
            pod_uid: "identity 192.0.2.2:8080".to_owned(),
            started_at: UnixTime::default(),
        };
        assert_eq!(found, counted);
    }

    #[test]
    fn a_pod_is_exempted_as_the_start_that_was_heard_of_or_as_unheard() {
        for (text, name, started_at) in [
            ("demo/api-0", "demo/api-0", UnixTime::from_secs(7)),
            ("uid of demo/api-0", "demo/api-0", UnixTime::from_secs(7)),
            ("demo/web-0", "demo/web-0", UnixTime::default()),
        ] {
            let (found, known_as) = find(text, &round(), &[]).unwrap();
            assert_eq!((found.started_at, known_as.as_str()), (started_at, name));
        }
    }

    #[test]
    fn of_two_pods_of_one_name_the_one_that_is_missed_is_meant() {
        let mut round = round();
        let pod_uid = "another uid".to_owned();
        let name = "demo/api-0".to_owned();
        round.listed.push(Listed { pod_uid, name, proxy: ProxyStatus::Running });
        let (found, _) = find("demo/api-0", &round, &[]).unwrap();
        assert_eq!(found, unheard("another uid"));
        let (found, _) = find("uid of demo/api-0", &round, &[]).unwrap();
        assert_eq!(found.started_at, UnixTime::from_secs(7));
    }

    #[test]
    fn the_same_name_again_means_another_that_is_missed_and_not_exempt_yet() {
        let mut round = round();
        let missed = |uid: &str, secs| Vanished {
            instance: Instance { pod_uid: uid.to_owned(), started_at: UnixTime::from_secs(secs) },
            name: "demo/api-0".to_owned(),
            last_heard: UnixTime::from_secs(secs),
        };
        round.vanished = vec![missed("first", 3), missed("second", 4)];
        let mut exemptions = Vec::new();
        for uid in ["second", "first"] {
            let (instance, name) = find("demo/api-0", &round, &exemptions).unwrap();
            assert_eq!(instance.pod_uid, uid);
            exemptions.push(Exemption { instance, name, ..exemption("", false) });
        }
        // A start after the exemption is missed anew.
        exemptions[0].instance.started_at = UnixTime::from_secs(2);
        let (instance, _) = find("demo/api-0", &round, &exemptions).unwrap();
        assert_eq!(instance.pod_uid, "second");
    }

    fn exemption(uid: &str, relied_on: bool) -> Exemption {
        Exemption {
            instance: Instance { pod_uid: uid.to_owned(), started_at: UnixTime::from_secs(7) },
            at: UnixTime::default(),
            name: "demo/web-0".to_owned(),
            reason: "had not answered at the deadline".to_owned(),
            by: "deadline".to_owned(),
            relied_on,
        }
    }

    #[test]
    fn whoever_was_cut_off_is_found_by_name_and_by_uid() {
        let exempt = [exemption("old", true), exemption("new", false)];
        for (text, uid) in [("demo/web-0", "new"), ("old", "old")] {
            assert_eq!(exempted(text, &exempt).unwrap().instance.pod_uid, uid);
        }
        let error = exempted("demo/api-0", &exempt[..1]).unwrap_err().to_string();
        assert!(error.ends_with("exempt are: demo/web-0"), "{error}");
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_nearest_and_with_who_is_missing() {
        let error = find("identity 192.0.2.3:8080", &round(), &[]).unwrap_err().to_string();
        for words in
            ["did you mean \"identity 192.0.2.", "\"demo/web-0\", \"identity 192.0.2.2:8080\""]
        {
            assert!(error.contains(words), "{words:?} is not in {error}");
        }
        assert!(!error.contains("api-0"), "it answers: {error}");
    }
}
