//! What can be typed: the commands and their help.

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Parser, Subcommand};

use crate::commands::{completions, explain, identity, man, trust, version};
use crate::demo;

/// Mutual TLS for every service, and certificates that never take it down.
#[derive(Debug, Parser)]
#[command(
    name = "steadfast",
    version,
    styles = STYLES,
    max_term_width = 100,
    after_help = EXAMPLES,
    arg_required_else_help = true,
    subcommand_required = true,
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a small mesh on this machine and watch its identities renew under load
    Demo(demo::Args),
    /// Show the identity of a workload: chain, names, lifetimes, next renewal, trust anchor
    Identity(identity::Args),
    /// Make and look at the trust of a mesh: anchors, issuers, the bundle
    Trust(trust::Args),
    /// Say what an error code means and what to do about it
    Explain(explain::Args),
    /// Print the version of this command, and of what runs in a mesh
    Version(version::Args),
    /// Print the completions for a shell
    Completions(completions::Args),
    /// Print the manual page, or write all of them into a directory
    Man(man::Args),
    /// One application of the demo
    #[command(hide = true)]
    DemoApp(demo::app::Args),
    /// Becomes another program that ends with the demo
    #[command(hide = true)]
    DemoExec(demo::guard::ExecArgs),
    /// Removes the demo's directory once the demo is gone
    #[command(hide = true)]
    DemoJanitor(demo::guard::JanitorArgs),
}

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

const EXAMPLES: &str = "\
Examples:
  steadfast demo                                  a mesh of three services, until Ctrl-C
  steadfast demo --for 60s --svid-ttl 15s         a minute of load while every SVID renews
  steadfast trust init --dir ./mesh               anchors and issuer for a mesh of your own
  steadfast identity demo/web-0 --dir ./mesh      who a workload is, and until when
  steadfast explain SFT-TLS-001                   what an error code means

Exit codes: 0 all is well, 1 a problem was found, 2 wrong usage.";

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_commands_are_put_together_as_clap_wants_them() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_and_flag_that_is_shown_has_a_help_text() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments() {
                let name = format!("{} {}", command.get_name(), arg.get_id());
                assert!(arg.get_help().is_some() || arg.is_hide_set(), "{name}");
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
