//! `steadfast trust history`: the rotations that are over.

use serde::Serialize;
use steadfast_process::duration;
use steadfast_rotation_protocol::trust_domain::{Outcome, PastRotation};

use crate::output::{Format, Paint, table};
use crate::problem::Problem;
use crate::rotation::course::{ending, phase_times};
use crate::store::DirArg;
use crate::trust_domain;

/// List the rotations that are over: who wanted each, how it ended, what it went through
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast trust history --dir ./mesh            the newest 32
  steadfast trust history 3 --dir ./mesh          the phases of the third")]
pub(super) struct Args {
    /// Only this rotation, with its phases
    number: Option<u64>,
    #[command(flatten)]
    dir: DirArg,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

pub(super) async fn run(args: &Args) -> Result<(), Problem> {
    let past = trust_domain::read(&args.dir.dir).await?.past;
    let Some(number) = args.number else {
        return Ok(args.output.print(&past, |past| listing(past))?);
    };
    let Some(one) = past.iter().find(|past| past.number == number) else {
        let known: Vec<_> = past.iter().map(|past| past.number.to_string()).collect();
        return Err(Problem::found(format!(
            "rotation {number} is not in the history; it has: {}",
            if known.is_empty() { "none".to_owned() } else { known.join(", ") }
        )));
    };
    Ok(args.output.print(&One { rotation: one }, |one| one.text(Paint::stdout()))?)
}

#[derive(Serialize)]
struct One<'a> {
    #[serde(flatten)]
    rotation: &'a PastRotation,
}

impl One<'_> {
    fn text(&self, paint: Paint) -> String {
        let PastRotation { by, started, steps, .. } = self.rotation;
        let mut text = format!("{}\n", paint.bold(&ending(self.rotation)));
        text += &format!("ordered by {by}, begun {started}\n");
        for phase in phase_times(*started, steps) {
            text += &format!("{}\n", phase.line(paint));
        }
        text
    }
}

fn listing(past: &[PastRotation]) -> String {
    if past.is_empty() {
        return "no rotation is over yet\n".to_owned();
    }
    let rows: Vec<_> = past
        .iter()
        .map(|past| {
            let outcome = match past.outcome {
                Outcome::Aborted => "undone",
                Outcome::Done => "done",
            };
            [
                past.number.to_string(),
                past.kind.clone(),
                past.by.clone(),
                past.started.to_string(),
                duration::show(past.ended.since(past.started)),
                outcome.to_owned(),
            ]
        })
        .collect();
    table(["NUMBER", "KIND", "BY", "BEGUN", "TOOK", "OUTCOME"], &rows)
}
