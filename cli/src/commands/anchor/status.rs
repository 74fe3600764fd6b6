//! `steadfast anchor status`: how the rotations stand.

use std::process::ExitCode;

use serde::Serialize;
use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, ErrorChain, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::Standing;
use steadfast_rotation_protocol::trust_domain::{Exemption, Outcome, PastRotation, Request};

use crate::controller::{Controller, ControllerError};
use crate::output::Paint;
use crate::problem::Problem;
use crate::rotation::course::{Course, ending};
use crate::rotation::follow::same_phase;
use crate::trust_domain;

use super::{MeshArgs, go_on};

/// Show the rotation that is under way, what it waits for, and whom it misses
#[derive(Debug, clap::Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    mesh: MeshArgs,
    /// Follow it to its end
    #[arg(short, long, conflicts_with = "output")]
    watch: bool,
}

/// How things stand, in both forms.
#[derive(Serialize)]
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
    let dir = &args.mesh.dir.dir;
    let state = trust_domain::read(dir).await?;
    let under_way = state.rotation.as_ref().map(|rotation| rotation.number - 1);
    if args.watch && (under_way.is_some() || state.requested.is_some()) {
        let before = under_way.unwrap_or(state.rotations);
        return go_on(&args.mesh, false, before, Outcome::Done).await;
    }
    let standing = Controller::find(dir, &args.mesh.controller).await;
    let view = StatusView::of(state, standing.map(|(_, standing)| standing), SystemClock.now());
    args.mesh.output.print(&view, |view| view.text(Paint::stdout()))?;
    Ok(if view.trouble.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl StatusView {
    fn of(
        state: TrustDomainState,
        standing: Result<Standing, ControllerError>,
        now: UnixTime,
    ) -> Self {
        let (wait, trouble) = match &standing {
            Ok(standing) => (
                standing.waiting.as_ref().filter(|_| same_phase(&state, standing)),
                standing.trouble.clone(),
            ),
            Err(error) => (None, Some(ErrorChain(error).to_string())),
        };
        let halted = state.halted.map(crate::rotation::waiting::halted);
        Self {
            rotation: Course::of_anchor(&state, wait, now),
            issuer_rotation: Course::of_issuer(&state, wait, now),
            trouble: halted.or(trouble),
            requested: state.requested,
            paused: state.paused,
            exemptions: state.exemptions,
            last: state.past.last().cloned(),
        }
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
            let Exemption { instance, reason, by, .. } = exemption;
            lines.push(format!("exempt: pod {} ({reason}; by {by})", instance.pod_uid));
        }
        lines.extend(self.trouble.iter().map(|trouble| format!("{} {trouble}", paint.red("!"))));
        lines.join("\n") + "\n"
    }
}
