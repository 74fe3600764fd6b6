//! `steadfast-chaos`.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use clap::Parser as _;
use serde::Serialize;
use steadfast_chaos::{Counts, run};

use crate::args::{Chaos, Output, Simulate};

mod args;

fn main() -> ExitCode {
    let args = Chaos::parse();
    match simulate(&args.simulate) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(EXIT_BROKEN),
        Err(error) => {
            eprintln!("steadfast-chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// All that is told in the end.
#[derive(Serialize)]
struct Told {
    seeds: u64,
    /// Whose histories ended early: the store was put back where nobody could notice.
    unnoticed: u64,
    failures: Vec<Failure>,
    simulated_years: f64,
    checks: u64,
    counts: Counts,
}

/// A seed that broke an invariant.
#[derive(Serialize)]
struct Failure {
    seed: u64,
    invariant: &'static str,
    at: String,
    what: String,
    replay: String,
}

/// Whether every invariant held.
fn simulate(args: &Simulate) -> anyhow::Result<bool> {
    let mut told = Told {
        seeds: args.seeds,
        unnoticed: 0,
        failures: Vec::new(),
        simulated_years: 0.0,
        checks: 0,
        counts: Counts::default(),
    };
    let shown = std::io::stderr().is_terminal();
    let mut out = std::io::stdout().lock();
    for seed in args.seed..args.seed.saturating_add(args.seeds) {
        let outcome = run(args.wanted(seed), |day, counts| {
            // Long runs say how far they are: a line that overwrites itself, or one a month.
            if shown {
                eprint!("\rseed {seed}, day {day} of {}, {} events ", args.days, counts.events);
            } else if day % 30 == 0 && args.workloads >= 1000 {
                eprintln!("seed {seed}, day {day} of {}, {} events", args.days, counts.events);
            }
        });
        if shown {
            eprint!("\r\x1b[K");
        }
        for line in &outcome.story {
            writeln!(out, "{line}")?;
        }
        told.counts.add(&outcome.counts);
        told.unnoticed += u64::from(outcome.unnoticed);
        if let Some(broken) = outcome.broken {
            let failure = Failure {
                seed,
                invariant: broken.invariant,
                at: broken.at.to_string(),
                what: broken.what,
                replay: args.replay(seed),
            };
            if args.output == Output::Text {
                let Failure { invariant, at, what, replay, .. } = &failure;
                writeln!(out, "seed {seed}: {invariant} does not hold at {at}: {what}")?;
                writeln!(out, "    step by step: {replay}")?;
            }
            told.failures.push(failure);
        }
    }
    told.simulated_years = told.counts.simulated_seconds as f64 / (365.25 * 86_400.0);
    told.checks = told.counts.checks_done();
    match args.output {
        Output::Json => writeln!(out, "{}", serde_json::to_string_pretty(&told)?)?,
        Output::Text => summary(&mut out, &told)?,
    }
    Ok(told.failures.is_empty())
}

fn summary(out: &mut impl std::io::Write, told: &Told) -> std::io::Result<()> {
    let Told { seeds, unnoticed, failures, simulated_years, checks, counts } = told;
    let held = seeds - failures.len() as u64;
    writeln!(out, "{held} of {seeds} seeds held, over {simulated_years:.1} simulated years")?;
    if *unnoticed > 0 {
        writeln!(out, "{unnoticed} ended early: the store was put back where nobody could notice")?;
    }
    writeln!(
        out,
        "{} events, {checks} checks, {} SVIDs issued, {} bundles installed, {} acks, {} handshakes",
        counts.events, counts.svids, counts.bundles, counts.acks, counts.handshakes
    )?;
    let maps = [
        ("rotations", &counts.rotations),
        ("orders", &counts.orders),
        ("faults", &counts.faults),
        ("checks", &counts.checks),
    ];
    for (name, map) in maps {
        let all: Vec<_> = map.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        writeln!(out, "{name}: {}", if all.is_empty() { "none".into() } else { all.join(", ") })?;
    }
    Ok(())
}

const EXIT_BROKEN: u8 = 1;
