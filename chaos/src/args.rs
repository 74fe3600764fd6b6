//! The command line.

use clap::{Args, Parser, ValueEnum};
use steadfast_chaos::{Hazard, Mutant, Wanted};

/// Simulates months of trust rotations with faults, and checks the rotation protocol's invariants
/// after every event.
///
/// The code that decides is the real one: the rotation controller, the identity service's copy and
/// lease of the state, issuers and members, the workloads' renewal engine. Time, network, store and
/// everything that goes wrong are simulated, and follow from the seed: the same seed is the same
/// history, event by event.
#[derive(Debug, Parser)]
#[command(name = "steadfast-chaos", version, after_long_help = EXAMPLES)]
pub(crate) struct Chaos {
    /// What is simulated.
    #[command(flatten)]
    pub(crate) simulate: Simulate,
}

/// What is simulated.
#[derive(Args, Debug)]
pub(crate) struct Simulate {
    /// The first seed
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// How many seeds, one after the other
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub(crate) seeds: u64,
    /// How many workloads
    #[arg(long, value_name = "COUNT", default_value_t = 40,
        value_parser = clap::value_parser!(u32).range(2..=100_000))]
    pub(crate) workloads: u32,
    /// For how many simulated days things go wrong; then all must become well again
    #[arg(long, value_name = "COUNT", default_value_t = 60)]
    pub(crate) days: u64,
    /// What goes wrong
    #[arg(long, value_name = "HAZARD", value_enum, default_value_t = Hazard::All)]
    pub(crate) hazard: Hazard,
    /// Break something on purpose, to see that it is found
    #[arg(long = "break", value_name = "DEFECT", value_enum)]
    pub(crate) defect: Option<Mutant>,
    /// Tell the history, step by step
    #[arg(long)]
    pub(crate) trace: bool,
    /// How the outcome is told
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub(crate) output: Output,
}

/// How an outcome is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// One object.
    Json,
    /// Lines for people.
    Text,
}

impl Simulate {
    /// What one seed is to be.
    pub(crate) fn wanted(&self, seed: u64) -> Wanted {
        Wanted {
            seed,
            workloads: self.workloads as usize,
            days: self.days,
            hazard: self.hazard,
            mutant: self.defect,
            told: self.trace,
        }
    }

    /// The command that replays a seed, step by step.
    pub(crate) fn replay(&self, seed: u64) -> String {
        let Self { workloads, days, .. } = self;
        let hazard = self.hazard.name();
        let defect = self.defect.and_then(|defect| defect.to_possible_value());
        let defect = defect.map_or_else(String::new, |d| format!(" --break {}", d.get_name()));
        format!(
            "cargo run --release -p steadfast-chaos -- --seed {seed} --workloads {workloads} \
             --days {days} --hazard {hazard}{defect} --trace"
        )
    }
}

const EXAMPLES: &str = "\
Examples:
  steadfast-chaos --seeds 1000                        a thousand small histories
  steadfast-chaos --workloads 10000 --days 180        half a year of a large mesh
  steadfast-chaos --seed 7 --trace                    one history, step by step
  steadfast-chaos --hazard restores                   the store put back, from each phase
  steadfast-chaos --seeds 20 --break no-lease         is a replica without a lease found?

Exit codes:
  0  every invariant held
  1  one did not: the seed, what was seen, and the command that replays it are told
  2  a flag is wrong";
