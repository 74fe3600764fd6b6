//! `steadfast anchor status`: how the rotations stand.

use std::io::{self, Write as _};
use std::process::ExitCode;

use serde::Serialize;
use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{Exemption, Outcome, PastRotation, Request};

use crate::output::{Format, Paint};
use crate::problem::Problem;
use crate::rotation::course::{Course, ending};
use crate::rotation::follow::{Followed, Show, follow};
use crate::rotation::look::Look;
use crate::rotation::ordered::Ordered;
use crate::trust_domain;

use super::{MeshArgs, as_wanted, go_on, left_alone};

/// Show the rotation that is under way, what it waits for, and whom it misses
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast anchor status                     how it stands
  steadfast anchor status --watch             the same until it is over
  steadfast anchor status --watch -o json     a line of JSON whenever something has changed

Exit code 1 if something is in the way that does not pass by itself, and if the rotation that was
watched was undone.")]
pub(super) struct StatusArgs {
    #[command(flatten)]
    mesh: MeshArgs,
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
    trouble: Option<String>,
}

pub(super) async fn status(args: StatusArgs) -> Result<ExitCode, Problem> {
    let (dir, mesh) = (&args.mesh.dir.dir, &args.mesh);
    let state = trust_domain::read(dir).await?;
    match Ordered::in_state(&state).filter(|_| args.watch) {
        Some(ordered) if mesh.output == Format::Table => {
            return go_on(mesh, false, ordered, Outcome::Done).await;
        }
        Some(ordered) => {
            let followed = Followed::Anchor(ordered.clone());
            let mut lines = Lines { output: mesh.output, last: String::new() };
            return match follow(dir, &mesh.controller, &followed, &mut lines).await? {
                Some(state) => as_wanted(&ordered, &state, Outcome::Done),
                None => Ok(left_alone()),
            };
        }
        None => {}
    }
    let look = Look::at(dir, &mesh.controller, &state).await;
    let view = StatusView::of(&state, &look, SystemClock.now());
    match args.watch {
        true => Lines { output: mesh.output, last: String::new() }.tell(&view)?,
        false => mesh.output.print(&view, |view| view.text(Paint::stdout()))?,
    }
    Ok(if view.trouble.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
        let issuer_wait = look.issuer_wait(state, now);
        Self {
            rotation: Course::of_anchor(state, look.wait(state), now),
            issuer_rotation: Course::of_issuer(state, issuer_wait.as_ref(), now),
            trouble: look.trouble(state),
            requested: state.requested.clone(),
            paused: state.paused,
            exemptions: state.exemptions.clone(),
            last: state.past.last().cloned(),
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
        for exemption in &self.exemptions {
            let (name, Exemption { reason, by, .. }) = (exemption.shown_name(), exemption);
            lines.push(format!("exempt: {name} ({reason}; by {by})"));
        }
        lines.extend(self.trouble.iter().map(|trouble| format!("{} {trouble}", paint.red("!"))));
        lines.join("\n") + "\n"
    }
}
