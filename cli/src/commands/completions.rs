//! `steadfast completions`.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::output;
use crate::problem::Problem;

/// Print the completions for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bash   steadfast completions bash > ~/.local/share/bash-completion/completions/steadfast
  zsh    steadfast completions zsh > \"${fpath[1]}/_steadfast\"
  fish   steadfast completions fish > ~/.config/fish/completions/steadfast.fish")]
pub(crate) struct Args {
    /// Which shell
    shell: Shell,
}

pub(super) fn run(args: &Args) -> Result<(), Problem> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "steadfast", &mut script);
    Ok(output::print(&String::from_utf8_lossy(&script))?)
}
