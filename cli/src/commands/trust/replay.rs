//! `steadfast trust replay`: the event log of a controller, decided again step by step.

use std::fs;
use std::path::PathBuf;

use serde::Serialize;
use steadfast_rotation_protocol::controller::{Change, Effect};
use steadfast_rotation_protocol::journal::{self, Line, ReplayError};

use crate::output::{Format, table};
use crate::problem::Problem;

/// Decide again, step by step, what an event log says that a controller has decided
///
/// `steadfast-rotation --event-log FILE` adds a line of JSON for each change of the state that it
/// decides on, with everything that it was made of. Each is decided again from that alone, on any
/// machine, and shown; exit code 1 if this version decides one of them otherwise.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast-rotation --dir ./mesh --event-log ./rotation.jsonl &
  steadfast trust replay rotation.jsonl
  jq .seen.round rotation.jsonl                           what everybody had answered")]
pub(super) struct Args {
    /// The event log
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// One decision.
#[derive(Serialize)]
struct Step {
    at: String,
    revision: u64,
    seq: u64,
    phase: String,
    decided: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<(), Problem> {
    let file = args.file.display();
    let text = fs::read_to_string(&args.file);
    let text = text.map_err(|error| Problem::found(format!("{file} cannot be read: {error}")))?;
    let (mut steps, mut trouble) = (Vec::new(), None);
    for step in journal::steps(&text) {
        match step {
            Ok(line) => steps.push(Step::of(&line)),
            Err(error) => {
                trouble = Some(match &error {
                    ReplayError::Otherwise { line, then, now } => format!(
                        "line {line}: then it was decided to {}; this version decides to {}",
                        in_words(then),
                        in_words(now)
                    ),
                    ReplayError::Malformed { .. } => error.to_string(),
                });
                break;
            }
        }
    }
    if steps.is_empty() {
        trouble = trouble.or_else(|| Some("it has no decisions".to_owned()));
    }
    args.output.print(&steps, |steps| listing(steps))?;
    trouble.map_or(Ok(()), |trouble| Err(Problem::found(format!("{file}: {trouble}"))))
}

impl Step {
    fn of(line: &Line) -> Self {
        let state = &line.seen.state;
        let phase = state.rotation.as_ref().map(|rotation| rotation.phase.name().label());
        Self {
            at: line.now.wall.to_string(),
            revision: line.seen.revision,
            seq: state.seq,
            phase: phase.unwrap_or("idle").to_owned(),
            decided: line.effects.iter().map(decided).collect(),
        }
    }
}

fn in_words(effects: &[Effect]) -> String {
    let words: Vec<_> = effects.iter().map(decided).collect();
    if words.is_empty() { "do nothing".to_owned() } else { words.join("; ") }
}

fn decided(effect: &Effect) -> String {
    match effect {
        Effect::Destroy(condemned) => format!("destroy {} keys", condemned.len()),
        Effect::Generate(label) => format!("make a key for rotation {}", label.rotation),
        Effect::Persist(persist) => {
            format!("write seq {} ({})", persist.state.seq, changed(&persist.change))
        }
        Effect::Query(_) => "ask everybody".to_owned(),
        Effect::Sign(wanted) => format!("sign an issuer under {}", wanted.anchor_id.short()),
    }
}

fn changed(change: &Change) -> String {
    match change {
        Change::Left(phase) => format!("{} is left", phase.label()),
        Change::IssuerStored => "an issuer is stored or wished for".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn listing(steps: &[Step]) -> String {
    let rows = steps.iter().map(|step| {
        let [revision, seq] = [step.revision, step.seq].map(|number| number.to_string());
        [step.at.clone(), revision, seq, step.phase.clone(), step.decided.join("; ")]
    });
    let rows: Vec<_> = rows.collect();
    let table = table(["AT", "REVISION", "SEQ", "PHASE", "DECIDED"], &rows);
    format!("{table}{} decisions, each decided again\n", steps.len())
}
