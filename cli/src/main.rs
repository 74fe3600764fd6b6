//! `steadfast`: the command a person types.
//!
//! Exit codes: 0 all is well, 1 a problem was found, 2 the command was used wrongly. A reader that
//! goes away (`steadfast explain | head`) ends the command quietly.

mod admin;
mod chart;
mod cli;
mod commands;
mod confirm;
mod controller;
mod demo;
mod http1;
mod mesh;
mod metrics;
mod output;
mod problem;
mod rotation;
mod suggest;
mod trust_domain;

use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::Cli;
use crate::problem::Problem;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // To standard output for --help and --version, to standard error otherwise; a reader
            // that has gone away is no error of ours.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(cli) {
        Ok(code) => code,
        Err(problem) => problem.report(),
    }
}

fn run(cli: Cli) -> Result<ExitCode, Problem> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(commands::run(cli.command))
}
