//! `steadfast man`.

use std::fs;
use std::path::PathBuf;

use clap::CommandFactory as _;

use crate::cli::Cli;
use crate::output;
use crate::problem::Problem;

/// Print the manual page, or write all of them into a directory
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast man | man -l -                        read the page of steadfast itself
  steadfast man --out ~/.local/share/man/man1     a page for each command; then `man steadfast-demo`")]
pub(crate) struct Args {
    /// Write the page of each command into this directory, which is made if it is not there
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Why there are no pages.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManError {
    #[error("cannot write the manual pages into {}", .0.display())]
    Write(PathBuf, #[source] std::io::Error),
}

pub(super) fn run(args: &Args) -> Result<(), Problem> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let Some(out) = &args.out else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        return Ok(output::print(&String::from_utf8_lossy(&page))?);
    };
    let failed = |error| ManError::Write(out.clone(), error);
    fs::create_dir_all(out).map_err(failed)?;
    clap_mangen::generate_to(command, out).map_err(failed)?;
    let pages = fs::read_dir(out).map_err(failed)?.count();
    let words = format!("{pages} pages in {}; read one with `man -l`\n", out.display());
    Ok(output::print(&words)?)
}
