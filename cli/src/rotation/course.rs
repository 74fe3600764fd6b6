//! How a rotation goes: the phases behind it, the one it is in, those to come. Made of what the
//! store holds and what the controller says it waits for, and of nothing else.

use serde::Serialize;
use steadfast_api::{KeyId, UnixTime};
use steadfast_process::duration;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::Wait;
use steadfast_rotation_protocol::issuer::{IssuerPhase, IssuerRotation};
use steadfast_rotation_protocol::rotation::{Goal, Next, Phase, PhaseName, Rotation, Step};
use steadfast_rotation_protocol::trust_domain::{AnchorState, Outcome, PastRotation};

use crate::output::Paint;
use crate::rotation::ordered::ISSUER;
use crate::rotation::waiting::Waiting;

/// A rotation at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Course {
    /// `anchor`, `standby`, `emergency`, `removal` or `issuer`.
    pub(crate) kind: &'static str,
    /// Of this trust domain; `None`: it began under a version that did not count issuers'.
    pub(crate) number: Option<u64>,
    /// Who wanted it.
    pub(crate) by: String,
    /// Which keys it is about.
    pub(crate) about: String,
    /// Whether it is being undone.
    pub(crate) undone: bool,
    /// What is behind it.
    pub(crate) phases: Vec<PhaseTime>,
    /// Where it stands.
    pub(crate) phase: &'static str,
    /// For how long, in seconds.
    pub(crate) phase_s: f64,
    /// What it waits for there.
    pub(crate) waiting: Waiting,
    /// What comes then.
    pub(crate) to_come: Vec<&'static str>,
}

/// A phase that was left.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct PhaseTime {
    pub(crate) name: &'static str,
    pub(crate) seconds: f64,
    /// How many had acked; 0 where nobody is asked.
    pub(crate) acked: usize,
}

impl Course {
    /// The rotation of an anchor that is under way, if one is.
    pub(crate) fn of_anchor(
        state: &TrustDomainState,
        wait: Option<&Wait>,
        now: UnixTime,
    ) -> Option<Self> {
        let rotation = state.rotation.as_ref()?;
        let phase = rotation.phase.name();
        Some(Self {
            kind: rotation.kind(),
            number: Some(rotation.number),
            by: rotation.by.clone(),
            about: about(state, rotation),
            undone: rotation.turned_back || rotation.abort,
            phases: phase_times(rotation.started, &rotation.steps),
            phase: name(phase),
            phase_s: seconds(rotation.since, now),
            waiting: wait
                .map(|wait| Waiting::of(wait, state, rotation.deadline, now))
                .unwrap_or_default(),
            to_come: to_come(rotation),
        })
    }

    /// The rotation of the issuer that is under way, if one is.
    pub(crate) fn of_issuer(
        state: &TrustDomainState,
        wait: Option<&Wait>,
        now: UnixTime,
    ) -> Option<Self> {
        let rotation = state.issuer_rotation.as_ref()?;
        let deadline = match rotation.phase {
            IssuerPhase::Draining(draining) => Some(draining.deadline),
            IssuerPhase::Activated(_) | IssuerPhase::Denied(_) | IssuerPhase::Preparing(_) => None,
        };
        Some(Self {
            kind: ISSUER,
            number: Some(rotation.number).filter(|number| *number > 0),
            by: rotation.by.clone(),
            about: format!("issuer {} goes", rotation.old.short()),
            undone: false,
            phases: phase_times(rotation.started, &rotation.steps),
            phase: name(rotation.phase.name()),
            phase_s: seconds(rotation.since, now),
            waiting: wait.map(|wait| Waiting::of(wait, state, deadline, now)).unwrap_or_default(),
            to_come: issuer_to_come(rotation),
        })
    }

    /// As lines for people.
    pub(crate) fn lines(&self, paint: Paint) -> Vec<String> {
        let number = self.number.map_or_else(String::new, |number| format!(" {number}"));
        let undone = if self.undone { ", being undone" } else { "" };
        let title = format!("rotation{number} ({}{undone})", self.kind);
        let mut lines =
            vec![format!("{}, ordered by {}: {}", paint.bold(&title), self.by, self.about)];
        for phase in &self.phases {
            lines.push(phase.line(paint));
        }
        let bar = self.waiting.acked.map_or_else(String::new, |acked| {
            format!("  {} {} of {} {}", bar(acked), acked.0, acked.1, self.asked_for())
        });
        let phase = format!("{:<12}", self.phase);
        lines.push(format!("  ▸ {} {}{bar}", paint.bold(&phase), time(self.phase_s)));
        if !self.waiting.guard.is_empty() {
            let left = self.waiting.left_s.map_or_else(String::new, |left| {
                format!(" ({} left)", duration::show(std::time::Duration::from_secs(left)))
            });
            lines.push(format!("      {}{left}", self.waiting.guard));
        }
        let absent = &self.waiting.missing;
        let wide = absent.iter().map(|absent| absent.name.chars().count()).max().unwrap_or(0);
        for absent in absent.iter().take(NAMED_MAX) {
            let (name, reason) = (&absent.name, absent.with_time());
            lines.push(format!("      {} {name:<wide$}  {reason}", paint.red("missing")));
        }
        if absent.len() > NAMED_MAX {
            lines.push(format!(
                "      … and {} more (`steadfast anchor status -o json` names all)",
                absent.len() - NAMED_MAX
            ));
        }
        for name in &self.to_come {
            lines.push(format!("    {}", paint.dim(name)));
        }
        lines
    }

    /// For a comparison with another moment.
    pub(crate) fn forget_time(&mut self) {
        (self.phase_s, self.waiting.left_s) = (0.0, None);
        self.waiting.missing.iter_mut().for_each(|absent| absent.for_s = None);
    }

    fn asked_for(&self) -> &'static str {
        match self.phase {
            "staged" => "hold the new anchor",
            "draining" if self.kind == ISSUER => "have left the old issuer",
            "draining" => "have left the old anchor",
            "denied" => "refuse the old issuer",
            "withdrawn" => "trust the old anchor no more",
            _ => "have acked",
        }
    }
}

impl PhaseTime {
    /// As a line for people.
    pub(crate) fn line(&self, paint: Paint) -> String {
        let Self { name, seconds, acked } = self;
        let acked = if *acked > 0 { format!("  {acked} acked") } else { String::new() };
        format!("  {} {name:<12} {}{acked}", paint.green("✓"), paint.dim(&time(*seconds)))
    }
}

/// The phases of a rotation, each with how long it took.
pub(crate) fn phase_times(started: UnixTime, steps: &[Step]) -> Vec<PhaseTime> {
    let begins = std::iter::once(started).chain(steps.iter().map(|step| step.at));
    let timed = steps.iter().zip(begins).map(|(step, began)| PhaseTime {
        name: name(step.phase),
        seconds: seconds(began, step.at),
        acked: step.acked,
    });
    timed.collect()
}

/// What became of a rotation, in a line.
pub(crate) fn ending(past: &PastRotation) -> String {
    let outcome = match past.outcome {
        Outcome::Aborted => "undone",
        Outcome::Done => "done",
        Outcome::Overtaken => "overtaken by another",
    };
    let took = time(seconds(past.started, past.ended));
    format!("rotation {} ({}) is {outcome}, after {}", past.number, past.kind, took.trim())
}

/// What a phase is called.
pub(crate) const fn name(phase: PhaseName) -> &'static str {
    match phase {
        PhaseName::Generating => "generating",
        PhaseName::Staged => "staged",
        PhaseName::Preparing => "preparing",
        PhaseName::Canary => "canary",
        PhaseName::Activated => "activated",
        PhaseName::Draining => "draining",
        PhaseName::Withdrawn => "withdrawn",
        PhaseName::Denied => "denied",
    }
}

/// Which anchor goes, which comes, which stands by.
fn about(state: &TrustDomainState, rotation: &Rotation) -> String {
    let one = |anchor: AnchorState| state.in_state(anchor).map(|anchor| anchor.id).next();
    let goes = one(AnchorState::Retiring).or_else(|| one(AnchorState::Withdrawn));
    let active = one(AnchorState::Active);
    let short = |id: Option<KeyId>| id.map_or_else(|| "a fresh one".to_owned(), |id| id.short());
    match &rotation.goal {
        Goal::Removal => "an anchor that must go".to_owned(),
        Goal::Standby { replaces: None } => format!("{} is to stand by", short(rotation.added)),
        Goal::Standby { replaces: Some(old) } => {
            format!("{} is to stand by in the place of {}", short(rotation.added), old.short())
        }
        Goal::Successor { .. } if rotation.turned_back => {
            format!("anchor {} stays", short(active))
        }
        Goal::Successor { next, .. } => {
            let to = match (next, goes, &rotation.phase) {
                (_, Some(_), _) | (_, _, Phase::Withdrawn(_)) => active,
                (Next::Given(id) | Next::Standby(id), None, _) => Some(*id),
                (Next::Added, None, _) => rotation.added,
            };
            match goes.or(active) {
                from @ Some(_) if from != to => format!("anchor {} → {}", short(from), short(to)),
                _ => format!("anchor {}", short(to)),
            }
        }
    }
}

fn to_come(rotation: &Rotation) -> Vec<&'static str> {
    use PhaseName::{Activated, Canary, Draining, Generating, Preparing, Staged, Withdrawn};
    let all: &[PhaseName] = match &rotation.goal {
        _ if rotation.turned_back => &[Preparing, Activated, Draining, Withdrawn],
        Goal::Removal if rotation.phase.name() == Withdrawn => &[Withdrawn],
        Goal::Removal => &[Activated, Draining, Withdrawn],
        Goal::Standby { replaces: None } => &[Generating, Staged],
        Goal::Standby { replaces: Some(_) } => &[Generating, Staged, Withdrawn],
        Goal::Successor { canary: None, .. } => {
            &[Generating, Staged, Preparing, Activated, Draining, Withdrawn]
        }
        Goal::Successor { canary: Some(_), .. } => {
            &[Generating, Staged, Preparing, Canary, Activated, Draining, Withdrawn]
        }
    };
    let now = rotation.phase.name();
    all.iter().skip_while(|phase| **phase != now).skip(1).map(|phase| name(*phase)).collect()
}

fn issuer_to_come(rotation: &IssuerRotation) -> Vec<&'static str> {
    if rotation.urgent.is_none() {
        return Vec::new();
    }
    use PhaseName::{Activated, Denied, Draining, Preparing};
    let (all, now) = ([Preparing, Activated, Draining, Denied], rotation.phase.name());
    all.into_iter().skip_while(|phase| *phase != now).skip(1).map(name).collect()
}

fn seconds(from: UnixTime, to: UnixTime) -> f64 {
    (to.since(from).as_secs_f64() * 10.0).round() / 10.0
}

fn time(seconds: f64) -> String {
    if seconds < 600.0 {
        return format!("{seconds:>6.1} s");
    }
    format!("{:>8}", duration::show(std::time::Duration::from_secs_f64(seconds)))
}

fn bar((done, all): (usize, usize)) -> String {
    let full = (done * BAR_CELLS).checked_div(all).unwrap_or(BAR_CELLS);
    "█".repeat(full) + &"░".repeat(BAR_CELLS - full)
}

const BAR_CELLS: usize = 12;
/// More names than this do not help on a screen.
const NAMED_MAX: usize = 10;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use steadfast_rotation_protocol::Instance;
    use steadfast_rotation_protocol::census::{Missing, Reason, Tally};
    use steadfast_rotation_protocol::evidence::{Said, Witness};

    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);

    /// The third rotation, half a minute old, its new anchor in the bundle.
    fn staged() -> TrustDomainState {
        let domain = "cluster.local".parse().unwrap();
        let mut state = steadfast_identity::authority::found(&domain, NOW).unwrap().state;
        let standby = state.in_state(AnchorState::Standby).next().unwrap().id;
        let began = NOW - Duration::from_secs(30);
        let step = Step {
            phase: PhaseName::Generating,
            at: began + Duration::from_millis(1_500),
            acked: 0,
            evidence: None,
        };
        state.rotation = Some(Rotation {
            number: 3,
            attempt: 1,
            by: "alice".to_owned(),
            started: began,
            since: step.at,
            goal: Goal::Successor { next: Next::Standby(standby), canary: None },
            added: Some(standby),
            urgent: None,
            deadline: None,
            abort: false,
            turned_back: false,
            rescue: false,
            phase: serde_json::from_value(json!({"staged": {"added": standby}})).unwrap(),
            steps: vec![step],
        });
        state
    }

    fn tally(missing: usize) -> Tally {
        let instance = Instance { pod_uid: "u".to_owned(), started_at: NOW };
        let reason = Reason::NotConnected { since: Some(NOW - Duration::from_secs(240)) };
        let missing = (0..missing).map(|n| Missing {
            name: format!("demo/web-{n}"),
            instance: instance.clone(),
            reason: reason.clone(),
        });
        Tally {
            settled: vec![Witness {
                name: "demo/api-0".to_owned(),
                instance: instance.clone(),
                said: Said::Serves(None),
            }],
            missing: missing.collect(),
            healed: Vec::new(),
            heard: Vec::new(),
        }
    }

    #[test]
    fn a_course_shows_what_is_behind_what_is_waited_for_and_what_comes() {
        let state = staged();
        let course = Course::of_anchor(&state, Some(&Wait::Census(tally(1))), NOW).unwrap();
        let text = course.lines(Paint::plain()).join("\n");
        for words in [
            "rotation 3 (anchor), ordered by alice",
            "✓ generating      1.5 s",
            "▸ staged         28.5 s  ██████░░░░░░ 1 of 2 hold the new anchor",
            "missing demo/web-0  not connected since",
            "(4m00s)",
            "    preparing\n    activated\n    draining\n    withdrawn",
        ] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
        let (from, to) = (state.active_anchor().unwrap().id, state.rotation.unwrap().added);
        assert!(text.contains(&format!("{} → {}", from.short(), to.unwrap().short())), "{text}");
    }

    #[test]
    fn a_fence_is_told_with_the_time_that_it_has_left() {
        let wait = Wait::Fence { left: Duration::from_millis(3_200) };
        let course = Course::of_anchor(&staged(), Some(&wait), NOW).unwrap();
        let text = course.lines(Paint::plain()).join("\n");
        assert!(text.contains("(4s left)"), "{text}");
        assert_eq!(course.waiting.acked, None);
    }

    #[test]
    fn a_mounted_file_that_stays_old_is_named_and_stalls() {
        let wait = Wait::Mirrors(vec!["demo/web-0".to_owned()]);
        let at = |now| Course::of_anchor(&staged(), Some(&wait), now).unwrap();
        assert!(!at(NOW).waiting.stalled, "it is read again once a minute");
        let late = at(NOW + Duration::from_secs(300));
        assert!(late.waiting.stalled);
        let text = late.lines(Paint::plain()).join("\n");
        assert!(text.contains("missing demo/web-0  its mounted bundle file"), "{text}");
    }

    #[test]
    fn of_many_missing_the_first_are_named_and_the_others_counted() {
        let wait = Wait::Census(tally(NAMED_MAX + 7));
        let course = Course::of_anchor(&staged(), Some(&wait), NOW).unwrap();
        let lines = course.lines(Paint::plain());
        let named = lines.iter().filter(|line| line.contains("missing demo/")).count();
        assert_eq!(named, NAMED_MAX);
        assert!(lines.iter().any(|line| line.contains("and 7 more")), "{lines:?}");
        assert_eq!(course.waiting.missing.len(), NAMED_MAX + 7, "for programs all are named");
    }

    #[test]
    fn the_course_of_an_issuer_has_its_number_and_the_phases_behind_it() {
        let mut state = staged();
        let urgent = Some(Duration::from_secs(600));
        state.rotate_issuer("ann".to_owned(), urgent, NOW - Duration::from_secs(20)).unwrap();
        let number = state.rotations;
        let rotation = state.issuer_rotation.as_mut().unwrap();
        rotation.steps.push(Step {
            phase: PhaseName::Preparing,
            at: NOW - Duration::from_secs(12),
            acked: 0,
            evidence: None,
        });
        rotation.phase = serde_json::from_str(r#"{"activated":null}"#).unwrap();
        let course = Course::of_issuer(&state, None, NOW).unwrap();
        assert_eq!(course.number, Some(number));
        let text = course.lines(Paint::plain()).join("\n");
        for words in ["(issuer), ordered by ann", "✓ preparing       8.0 s", "▸ activated"] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
        assert_eq!(course.to_come, ["draining", "denied"]);
    }

    #[test]
    fn idle_has_no_course() {
        let state = TrustDomainState { rotation: None, ..staged() };
        assert_eq!(Course::of_anchor(&state, None, NOW), None);
        assert_eq!(Course::of_issuer(&state, None, NOW), None);
    }
}
