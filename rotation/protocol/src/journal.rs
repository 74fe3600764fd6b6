//! The journal of a controller: what it saw and what it decided, line by line in JSON, and the
//! replay of it.
//!
//! A line has everything a decision was made of, its own memory included, so that each can be
//! replayed alone: on another machine, years later, by whoever asks why.

use serde::{Deserialize, Serialize};

use crate::controller::{Controller, Effect, Memory, Now, Observation, Timings};

/// One decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Its timings.
    pub timings: Timings,
    /// Its clocks.
    pub now: Now,
    /// What it remembered.
    pub memory: Memory,
    /// What it saw.
    pub seen: Observation,
    /// What it decided.
    pub effects: Vec<Effect>,
}

/// Why a journal does not replay.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// A line that is none.
    #[error("line {line} of the journal is none: {reason}")]
    Malformed {
        /// From 1.
        line: usize,
        /// What the parser says.
        reason: String,
    },
    /// This version decides otherwise.
    #[error("line {line} of the journal: this version decides otherwise")]
    Otherwise {
        /// From 1.
        line: usize,
        /// What was decided.
        then: Vec<Effect>,
        /// What is decided now.
        now: Vec<Effect>,
    },
}

/// Decides, and says so in a line.
pub fn handle(
    controller: &mut Controller,
    timings: Timings,
    now: Now,
    seen: Observation,
) -> (Vec<Effect>, Line) {
    let memory = controller.memory().clone();
    let effects = controller.handle(now, &seen);
    let line = Line { timings, now, memory, seen, effects: effects.clone() };
    (effects, line)
}

/// Decides each line of a journal again, step by step.
pub fn steps(journal: &str) -> impl Iterator<Item = Result<Line, ReplayError>> {
    journal.lines().enumerate().map(|(index, text)| {
        let line = index + 1;
        let then: Line = serde_json::from_str(text)
            .map_err(|error| ReplayError::Malformed { line, reason: error.to_string() })?;
        let now =
            Controller::resume(then.timings, then.memory.clone()).handle(then.now, &then.seen);
        if now == then.effects {
            Ok(then)
        } else {
            Err(ReplayError::Otherwise { line, then: then.effects, now })
        }
    })
}
