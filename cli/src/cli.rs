//! What can be typed: the commands and their help.

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Parser, Subcommand};

use crate::commands::{
    anchor, check, completions, consumer, explain, identity, inject, install, issuer, man, trust,
    version,
};
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

/// Each says of itself what it does.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Demo(demo::Args),
    Check(check::Args),
    Install(install::InstallArgs),
    Upgrade(install::UpgradeArgs),
    Uninstall(install::UninstallArgs),
    Prune(install::PruneArgs),
    Inject(inject::InjectArgs),
    Uninject(inject::UninjectArgs),
    Identity(identity::Args),
    Trust(trust::Args),
    Anchor(anchor::Args),
    Issuer(issuer::Args),
    Consumer(consumer::Args),
    Explain(explain::Args),
    Version(version::Args),
    Completions(completions::Args),
    Man(man::Args),
    #[command(hide = true)]
    Internal(demo::InternalArgs),
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
  steadfast anchor rotate --dir ./mesh            another trust anchor, under live traffic
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

    #[test]
    fn every_command_about_trust_can_answer_in_json() {
        fn check(command: &clap::Command) {
            if command.has_subcommands() {
                return command.get_subcommands().for_each(check);
            }
            let mut args = command.get_arguments();
            let json = args.any(|arg| {
                arg.get_short() == Some('o')
                    && arg.get_possible_values().iter().any(|value| value.matches("json", false))
            });
            assert!(json, "{}", command.get_name());
        }
        for name in ["anchor", "issuer", "trust", "consumer"] {
            check(Cli::command().find_subcommand(name).unwrap());
        }
    }
}
