//! `steadfast anchor status`: how the rotations stand.

use std::io::{self, Write as _};
use std::process::ExitCode;

use serde::Serialize;
use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::Wait;
use steadfast_rotation_protocol::trust_domain::{Exemption, Outcome, PastRotation, Request};

use crate::output::{Format, Paint};
use crate::problem::Problem;
use crate::rotation::course::{Course, ending};
use crate::rotation::follow::{Followed, Show, before_it_begins, follow};
use crate::rotation::look::Look;
use crate::rotation::ordered::Ordered;
use crate::rotation::waiting::told_apart;
use crate::trust_domain;

use super::{CommonArgs, as_wanted, go_on, left_alone};

/// Show the rotation that is under way, what it waits for, and whom it misses
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast anchor status                     how it stands
  steadfast anchor status --watch             the same until it is over
  steadfast anchor status --watch -o json     a line of JSON whenever something has changed

Exit code 1 if something is in the way that does not pass by itself: trouble of steadfast-rotation,
a pause while a rotation waits, somebody who is not connected, has vanished or is too old to answer
(but for an emergency, which has a deadline), a clock that is off, a replica of identity that cannot
be reached and must load an issuer, a mounted bundle that stays old, a consumer that reads once and
for all, an issuer that an external CA has not signed, canaries that fail. And if the rotation that
was watched was undone.")]
pub(super) struct StatusArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Follow it to its end
    #[arg(short, long)]
    watch: bool,
}

/// How things stand, in both forms.
#[derive(Clone, Serialize)]
struct StatusView {
    rotation: Option<Course>,
    issuer_rotation: Option<Course>,
    requested: Option<Request>,
    paused: bool,
    exemptions: Vec<Exemption>,
    last: Option<PastRotation>,
    /// What a rotation waits for that has not begun.
    before: Option<String>,
    trouble: Option<String>,
    /// Something is in the way that does not pass by itself.
    #[serde(skip)]
    stalled: bool,
}

pub(super) async fn status(args: StatusArgs) -> Result<ExitCode, Problem> {
    let common = &args.common;
    let state = trust_domain::read(&common.mesh).await?;
    match Ordered::in_state(&state).filter(|_| args.watch) {
        Some(ordered) if common.output == Format::Table => {
            return go_on(common, false, ordered, Outcome::Done).await;
        }
        Some(ordered) => {
            let followed = Followed::Anchor(ordered.clone());
            let mut lines = Lines { output: common.output, last: String::new() };
            return match follow(&common.mesh, &common.controller, &followed, &mut lines).await? {
                Some(state) => as_wanted(&ordered, &state, Outcome::Done),
                None => Ok(left_alone()),
            };
        }
        None => {}
    }
    let look = Look::at(&common.mesh, &common.controller).await;
    let view = StatusView::of(&state, &look, SystemClock.now());
    match args.watch {
        true => Lines { output: common.output, last: String::new() }.tell(&view)?,
        false => common.output.print(&view, |view| view.text(Paint::stdout()))?,
    }
    Ok(if view.stalled { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// For a program that watches: a line for each change. That time goes by is none.
struct Lines {
    output: Format,
    last: String,
}

impl Lines {
    fn tell(&mut self, view: &StatusView) -> io::Result<()> {
        let timeless = serde_json::to_string(&view.timeless())?;
        if self.last == timeless {
            return Ok(());
        }
        self.last = timeless;
        self.output.print_line(view, |view| view.text(Paint::stdout()))
    }
}

impl Show for Lines {
    fn show(
        &mut self,
        state: &TrustDomainState,
        look: &Look,
        _: &Followed,
        now: UnixTime,
    ) -> io::Result<()> {
        self.tell(&StatusView::of(state, look, now))
    }

    fn blind(&mut self, why: &str) -> io::Result<()> {
        writeln!(io::stderr(), "{why}")
    }
}

impl StatusView {
    fn of(state: &TrustDomainState, look: &Look, now: UnixTime) -> Self {
        let (wait, issuer_wait) = (look.wait(state), look.issuer_wait(state));
        let rotation = Course::of_anchor(state, wait, now);
        let issuer_rotation = Course::of_issuer(state, issuer_wait, now);
        // A pause has a line of its own.
        let before = before_it_begins(state, look, now).filter(|_| !state.paused);
        let (before, lasts) = before.unzip();
        let trouble =
            look.trouble(state).or_else(|| before.clone().filter(|_| lasts == Some(true)));
        // One that the schedule wants is neither under way nor ordered.
        let waits = rotation.is_some() || state.requested.is_some() || wait == Some(&Wait::Paused);
        let mut courses = rotation.iter().chain(&issuer_rotation);
        Self {
            stalled: trouble.is_some()
                || state.paused && waits
                || courses.any(|course| course.waiting.stalled),
            rotation,
            issuer_rotation,
            trouble,
            requested: state.requested.clone(),
            paused: state.paused,
            exemptions: state.exemptions.clone(),
            last: state.past.last().cloned(),
            before,
        }
    }

    /// Without what changes with time.
    fn timeless(&self) -> Self {
        let mut view = self.clone();
        for course in [&mut view.rotation, &mut view.issuer_rotation].into_iter().flatten() {
            course.forget_time();
        }
        view
    }

    fn text(&self, paint: Paint) -> String {
        let mut lines = Vec::new();
        for course in [&self.rotation, &self.issuer_rotation].into_iter().flatten() {
            lines.extend(course.lines(paint));
        }
        if let Some(request) = &self.requested {
            lines.push(format!("a rotation is ordered by {}, and begins soon", request.by));
        } else if lines.is_empty() {
            lines.push("no rotation is under way".to_owned());
            lines.extend(self.last.as_ref().map(|last| format!("the last: {}", ending(last))));
        }
        if self.paused {
            lines.push("paused by a person: `steadfast anchor resume` goes on".to_owned());
        }
        let pods = self.exemptions.iter().map(|e| (e.shown_name(), e.instance.pod_uid.as_str()));
        for (name, exemption) in told_apart(pods).iter().zip(&self.exemptions) {
            let Exemption { reason, by, .. } = exemption;
            lines.push(format!("exempt: {name} ({reason}; by {by})"));
        }
        lines.extend(self.before.clone().filter(|_| self.trouble.is_none()));
        lines.extend(self.trouble.iter().map(|trouble| format!("{} {trouble}", paint.red("!"))));
        lines.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use steadfast_api::KeyId;
    use steadfast_rotation_protocol::Instance;
    use steadfast_rotation_protocol::canary::CanaryStanding;
    use steadfast_rotation_protocol::census::{Missing, OLDEST, Reason, Tally};
    use steadfast_rotation_protocol::controller::Standing;
    use steadfast_rotation_protocol::trust_domain::Consumer;

    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);

    fn founded() -> TrustDomainState {
        let domain = "cluster.local".parse().unwrap();
        steadfast_identity::authority::found(&domain, NOW).unwrap().state
    }

    /// A rotation is ordered, and two hold the bundle that cannot ack.
    fn ordered() -> TrustDomainState {
        let mut state = founded();
        let by = "ann".to_owned();
        let request = Request { by, at: NOW, anchor: None, canary: None, replaces: None };
        state.request(request).unwrap();
        for (name, refresh) in [("legacy", None), ("vault", Some(Duration::from_secs(300)))] {
            state.add_consumer(Consumer { name: name.to_owned(), refresh });
        }
        state
    }

    fn view(state: &TrustDomainState, wait: Wait) -> StatusView {
        let (state_seen, waiting) = (Some(state.clone()), Some(wait));
        let standing = Standing { state: state_seen, waiting, ..Standing::default() };
        StatusView::of(state, &Look::for_test(standing), NOW)
    }

    fn misses(reason: Reason) -> Wait {
        let instance = Instance { pod_uid: "u".to_owned(), started_at: NOW };
        let missing = vec![Missing { name: "demo/web-0".to_owned(), instance, reason }];
        Wait::Census(Tally { missing, ..Tally::default() })
    }

    fn issuer(loading: &[&str], away: &[&str]) -> Wait {
        let [loading, away] =
            [loading, away].map(|names| names.iter().map(|name| (*name).to_owned()).collect());
        Wait::Issuer { loading, away }
    }

    #[test]
    fn what_lasts_until_somebody_does_something_is_stalled_and_named() {
        let state = ordered();
        for (wait, words) in [
            (misses(Reason::NotConnected { since: None }), "demo/web-0: has never connected"),
            (misses(Reason::Vanished { until: NOW }), "vanished without a word"),
            (misses(Reason::ClockOff { offset_ms: 90_000 }), "mend the clock"),
            (Wait::Consumers(vec!["legacy".to_owned()]), "consumer remove legacy"),
            (Wait::Signature { anchor: KeyId::of_spki(b"a") }, "steadfast issuer request"),
            (Wait::Listed(vec![KeyId::of_spki(b"a")]), "take it out there"),
            (misses(Reason::VersionTooOld { version: OLDEST }), "its proxy is too old"),
            (issuer(&["identity a"], &["identity b"]), "identity b: cannot be reached"),
            (issuer(&[], &["identity b"]), "`steadfast anchor exempt`"),
            (Wait::Canary(CanaryStanding::default()), "selects no workload"),
            (Wait::Clock { offset_ms: 90_000 }, "the clock of steadfast-rotation"),
        ] {
            let view = view(&state, wait);
            assert!(view.stalled, "{words}");
            let text = view.text(Paint::plain());
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
    }

    #[test]
    fn whoever_holds_up_what_nobody_has_ordered_is_named_and_stalls_it() {
        let view = view(&founded(), misses(Reason::NotConnected { since: None }));
        assert!(view.stalled, "the schedule wants a rotation, and it cannot begin");
        let text = view.text(Paint::plain());
        assert!(text.contains("demo/web-0: has never connected"), "{text}");
        // Whoever is connected answers in the end.
        let view = self::view(&founded(), misses(Reason::Unanswered));
        let text = view.text(Paint::plain());
        assert!(!view.stalled && text.contains("demo/web-0: connected, and has not"), "{text}");
    }

    #[test]
    fn what_only_the_issuer_waits_for_holds_no_rotation_of_an_anchor_up() {
        let state = founded();
        let standing = Standing {
            state: Some(state.clone()),
            waiting: Some(Wait::Nothing),
            issuer_waiting: Some(misses(Reason::NotConnected { since: None })),
            ..Standing::default()
        };
        let view = StatusView::of(&state, &Look::for_test(standing), NOW);
        assert!(!view.stalled && view.before.is_none(), "{}", view.text(Paint::plain()));
    }

    #[test]
    fn of_two_pods_of_one_name_the_uids_are_shown() {
        let mut state = ordered();
        let instance = |uid: &str| Instance { pod_uid: uid.to_owned(), started_at: NOW };
        let missing = [("demo/web-0", "a"), ("demo/web-0", "b"), ("demo/api-0", "c")];
        let missing = missing.map(|(name, uid)| Missing {
            name: name.to_owned(),
            instance: instance(uid),
            reason: Reason::Vanished { until: NOW },
        });
        for uid in ["d", "e"] {
            let [name, reason] = ["demo/db-0", "it is away"].map(str::to_owned);
            state.exempt(instance(uid), name, reason, "ann".to_owned(), UnixTime::default());
        }
        let tally = Tally { missing: missing.to_vec(), ..Tally::default() };
        let text = view(&state, Wait::Census(tally)).text(Paint::plain());
        for words in [
            "demo/web-0 (UID a): vanished",
            "demo/web-0 (UID b): vanished",
            "demo/api-0: vanished",
            "exempt: demo/db-0 (UID e) (it is away; by ann)",
        ] {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
    }

    #[test]
    fn what_passes_by_itself_is_not_stalled() {
        let state = ordered();
        for wait in [
            misses(Reason::Unanswered),
            Wait::Consumers(vec!["vault".to_owned()]),
            Wait::Fence { left: Duration::from_secs(3) },
            issuer(&["identity a"], &[]),
            issuer(&[], &[]),
            Wait::Mirrors(vec!["demo/web-0".to_owned()]),
            Wait::Nothing,
        ] {
            let view = view(&state, wait.clone());
            assert!(!view.stalled && view.trouble.is_none(), "{wait:?}: {:?}", view.trouble);
        }
    }

    #[test]
    fn a_pause_stalls_what_waits_and_nothing_else() {
        let mut state = founded();
        state.pause(true);
        assert!(!view(&state, Wait::Nothing).stalled);
        assert!(view(&state, Wait::Paused).stalled, "the schedule wants one");
        let mut state = ordered();
        state.pause(true);
        let view = view(&state, Wait::Paused);
        assert!(view.stalled);
        assert_eq!(view.text(Paint::plain()).matches("paused by a person").count(), 1);
    }
}
