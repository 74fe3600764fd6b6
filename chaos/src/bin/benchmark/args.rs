//! The command line.

use std::time::Duration;

use clap::{Parser, ValueEnum};
use steadfast_process::duration;

/// Measures a rotation of the trust anchor in a mesh of real processes and real trust streams.
///
/// It takes a quarter of an hour, of which ten minutes are the window over which a controller
/// spreads the renewals of a drain, and wants a machine with nothing else to do. It needs root, as
/// the end-to-end tests do, to give the replicas of identity one name.
#[derive(Debug, Parser)]
#[command(name = "steadfast-benchmark", after_long_help = EXIT_CODES)]
pub(crate) struct Args {
    /// How many workloads; each replica of identity has an equal share of their streams
    #[arg(long, value_name = "COUNT", default_value_t = 10_000,
        value_parser = clap::value_parser!(u32).range(2..=18_000))]
    pub(crate) workloads: u32,
    /// How many replicas of identity: one, to see what all streams cost it, or two
    #[arg(long, value_name = "COUNT", default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=2))]
    pub(crate) replicas: u32,
    /// Over how long the renewals of the drain are spread
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = duration::parse)]
    pub(crate) renew_window: Duration,
    /// The read lease of the mesh, which each fence waits for
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = duration::parse)]
    pub(crate) read_lease: Duration,
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

/// Something is over its budget.
pub(crate) const EXIT_OVER: u8 = 1;

const EXIT_CODES: &str = "\
Exit codes:
  0  all is within its budget
  1  something is over its budget, or could not be measured
  2  a flag is wrong";
