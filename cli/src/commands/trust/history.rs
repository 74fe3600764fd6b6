//! `steadfast trust history`: the rotations that are over, and on what their phases were left.

use serde::Serialize;
use steadfast_process::{ErrorChain, duration};
use steadfast_rotation_protocol::evidence::{Evidence, Said, Witness};
use steadfast_rotation_protocol::trust_domain::{Outcome, PastRotation};

use crate::mesh::Mesh;
use crate::output::{Format, Paint, table};
use crate::problem::Problem;
use crate::rotation::course::{ending, phase_times};
use crate::trust_domain;

/// List the rotations that are over: who wanted each, how it ended, what it went through
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast trust history --dir ./mesh            the newest 32
  steadfast trust history 3 --dir ./mesh          the phases of the third, and who was asked in each
  steadfast trust history 3 -o json               the same with every ack, verified by its SHA-256")]
pub(super) struct Args {
    /// Only this rotation, with its phases and their evidence
    number: Option<u64>,
    #[command(flatten)]
    mesh: Mesh,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

pub(super) async fn run(args: &Args) -> Result<(), Problem> {
    let past = trust_domain::read(&args.mesh).await?.past;
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
    let one = One { rotation: one, evidence: evidence(&args.mesh, one).await };
    Ok(args.output.print(&one, |one| one.text(Paint::stdout()))?)
}

/// What each phase was left on; nothing for those in which nobody is asked.
async fn evidence(mesh: &Mesh, rotation: &PastRotation) -> Vec<Option<Found>> {
    let mut all = Vec::new();
    let Ok(store) = mesh.store().await else { return all };
    for (step, passed) in rotation.steps.iter().enumerate() {
        all.push(match passed.evidence {
            None => None,
            Some(digest) => {
                let read =
                    steadfast_rotation::evidence::read(&**store, rotation.number, step, digest);
                Some(match read.await {
                    Ok(evidence) => Found::Verified(evidence),
                    Err(error) => Found::Unusable(ErrorChain(&error).to_string()),
                })
            }
        });
    }
    all
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Found {
    /// It has the SHA-256 that the state relied on.
    Verified(Evidence),
    /// Why not.
    Unusable(String),
}

#[derive(Serialize)]
struct One<'a> {
    #[serde(flatten)]
    rotation: &'a PastRotation,
    /// For each step.
    evidence: Vec<Option<Found>>,
}

impl One<'_> {
    fn text(&self, paint: Paint) -> String {
        let PastRotation { by, started, steps, .. } = self.rotation;
        let mut text = format!("{}\n", paint.bold(&ending(self.rotation)));
        text += &format!("ordered by {by}, begun {started}\n");
        for (phase, found) in phase_times(*started, steps).iter().zip(&self.evidence) {
            text += &format!("{}\n", phase.line(paint));
            match found {
                None => {}
                Some(Found::Verified(evidence)) => text += &shown(evidence),
                Some(Found::Unusable(why)) => text += &format!("    {} {why}\n", paint.red("!")),
            }
        }
        text
    }
}

/// The first of those who were asked, and what they said.
fn shown(evidence: &Evidence) -> String {
    let Evidence { head, witnesses } = evidence;
    let mut text = String::new();
    for witness in witnesses.iter().take(SHOWN_MAX) {
        text += &format!("    {:<32} {}\n", witness.name, said(witness));
    }
    if witnesses.len() > SHOWN_MAX {
        text += &format!("    and {} more: `-o json` has all\n", witnesses.len() - SHOWN_MAX);
    }
    for exemption in &head.exempt {
        text += &format!("    not waited for: {} (by {})\n", exemption.reason, exemption.by);
    }
    text
}

fn said(witness: &Witness) -> String {
    match &witness.said {
        Said::Acked { ack, .. } => match &ack.svid {
            Some(svid) => format!("uses seq {}, SVID of issuer {}", ack.seq, svid.issuer.short()),
            None => format!("uses seq {}, no SVID", ack.seq),
        },
        Said::Outlived { last_heard } => {
            format!("vanished, last heard of {last_heard}: nothing of it is valid")
        }
        Said::Serves(Some(ack)) => format!("serves seq {}", ack.seq),
        Said::Serves(None) => "serves nothing".to_owned(),
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
                Outcome::Overtaken => "overtaken by another",
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

/// More would not be read.
const SHOWN_MAX: usize = 10;
