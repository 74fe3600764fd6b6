//! `steadfast trust replay`: the event log of a controller, decided again step by step.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;
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
    let (mut steps, mut troubles) = (Vec::new(), Vec::new());
    for step in journal::steps(&text) {
        match step {
            Ok(line) => steps.push(Step::of(&line)),
            Err(ReplayError::Otherwise { line, then, now }) => troubles.push(format!(
                "line {line}: then it was decided to {}; this version decides to {}{}",
                in_words(&then),
                in_words(&now),
                difference(&then, &now)?
            )),
            Err(error @ ReplayError::Malformed { .. }) => troubles.push(error.to_string()),
        }
    }
    if steps.is_empty() && troubles.is_empty() {
        troubles.push("it has no decisions".to_owned());
    }
    if !steps.is_empty() {
        args.output.print(&steps, |steps| listing(steps))?;
    }
    match troubles.as_slice() {
        [] => Ok(()),
        troubles => Err(Problem::found(format!("{file}: {}", troubles.join("\n  ")))),
    }
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
        Change::Destroyed => "what was condemned is destroyed",
        Change::Emergency => "a stolen key changes what is planned",
        Change::Halted => "nothing is issued until a person has looked",
        Change::Healed => "exemptions are over",
        Change::Issuer => "the rotation of the issuer goes on",
        Change::IssuerStored => "an issuer is stored or wished for",
        Change::Left(phase) => return format!("{} is left", phase.label()),
        Change::Started => "a rotation begins",
        Change::Tidied => "what has expired is forgotten",
    }
    .to_owned()
}

/// Where the decisions differ first, with what is there: in words they may be the same.
fn difference(then: &[Effect], now: &[Effect]) -> serde_json::Result<String> {
    let (then, now) = (serde_json::to_value(then)?, serde_json::to_value(now)?);
    Ok(first_difference(&then, &now, ".effects".to_owned()).map_or_else(
        String::new,
        |(path, then, now)| {
            format!(". They differ first in {path}: {} then, {} now", shown(then), shown(now))
        },
    ))
}

/// The path to the first values that differ, as jq takes it from a line, and both of them.
fn first_difference<'a>(
    then: &'a Value,
    now: &'a Value,
    path: String,
) -> Option<(String, &'a Value, &'a Value)> {
    match (then, now) {
        _ if then == now => None,
        (Value::Object(these), Value::Object(those)) => {
            let names: BTreeSet<_> = these.keys().chain(those.keys()).collect();
            names.into_iter().find_map(|name| {
                first_difference(&then[name], &now[name], format!("{path}.{name}"))
            })
        }
        (Value::Array(these), Value::Array(those)) => {
            let at = |values: &'a [Value], index| values.get(index).unwrap_or(&Value::Null);
            (0..these.len().max(those.len())).find_map(|index| {
                first_difference(at(these, index), at(those, index), format!("{path}[{index}]"))
            })
        }
        _ => Some((path, then, now)),
    }
}

/// A value in a line: the whole of what is small, the beginning of what is not.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
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

/// More of a value does not help on a screen.
const SHOWN_MAX: usize = 120;

#[cfg(test)]
mod tests {
    use steadfast_api::UnixTime;
    use steadfast_rotation_protocol::controller::Persist;
    use steadfast_rotation_protocol::rotation::PhaseName;

    use super::*;

    #[test]
    fn decisions_that_are_the_same_in_words_are_told_apart_by_the_first_value_that_differs() {
        let now = UnixTime::from_secs(1_800_000_000);
        let state = steadfast_identity::authority::found(&"m".parse().unwrap(), now).unwrap().state;
        let decision = |paused| {
            let mut state = state.clone();
            state.paused = paused;
            let persist = Persist { expected: 3, state, change: Change::Started, evidence: None };
            vec![Effect::Persist(Box::new(persist)), Effect::Query(7)]
        };
        let (then, now) = (decision(false), decision(true));
        assert_eq!(in_words(&then), in_words(&now));
        let text = difference(&then, &now).unwrap();
        assert!(
            text.ends_with("in .effects[0].persist.state.paused: false then, true now"),
            "{text}"
        );
        let text = difference(&then, &then[..1]).unwrap();
        assert!(text.ends_with(r#"in .effects[1]: {"query":7} then, null now"#), "{text}");
    }

    #[test]
    fn each_change_is_told_in_words() {
        for (change, words) in [
            (Change::Started, "a rotation begins"),
            (Change::Issuer, "the rotation of the issuer goes on"),
            (Change::Left(PhaseName::Staged), "staged is left"),
        ] {
            assert_eq!(changed(&change), words);
        }
    }

    #[test]
    fn of_a_long_value_the_beginning_is_shown() {
        let text = shown(&Value::from("ü".repeat(SHOWN_MAX)));
        assert!(text.ends_with("ü…") && text.chars().count() == SHOWN_MAX + 1, "{text}");
    }
}
