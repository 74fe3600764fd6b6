//! One module a command; each parses nothing, since clap has, and prints its answer.

use std::process::ExitCode;

use crate::cli::Command;
use crate::demo;
use crate::problem::Problem;

pub(crate) mod anchor;
pub(crate) mod anchor_import;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod consumer;
pub(crate) mod explain;
pub(crate) mod identity;
pub(crate) mod inject;
pub(crate) mod install;
pub(crate) mod issuer;
pub(crate) mod issuer_import;
pub(crate) mod man;
pub(crate) mod trust;
pub(crate) mod trust_backup;
pub(crate) mod trust_recover;
pub(crate) mod version;

/// Does what was typed.
///
/// # Errors
/// Why it was not done.
pub(crate) async fn run(command: Command) -> Result<ExitCode, Problem> {
    match command {
        Command::Anchor(args) => return anchor::run(args).await,
        Command::Check(args) => return check::run(args).await,
        Command::Completions(args) => completions::run(&args)?,
        Command::Consumer(args) => consumer::run(args).await?,
        Command::Demo(args) => return demo::run(args).await,
        Command::Explain(args) => explain::run(&args)?,
        Command::Identity(args) => identity::run(args).await?,
        Command::Install(args) => install::install(&args)?,
        Command::Upgrade(args) => install::upgrade(&args).await?,
        Command::Uninstall(args) => install::uninstall(&args).await?,
        Command::Prune(args) => install::prune(&args).await?,
        Command::Inject(args) => return inject::inject(&args).await,
        Command::Uninject(args) => inject::uninject(&args)?,
        Command::Internal(args) => demo::run_internal(args).await?,
        Command::Issuer(args) => return issuer::run(args).await,
        Command::Man(args) => man::run(&args)?,
        Command::Trust(args) => trust::run(args).await?,
        Command::Version(args) => return version::run(args).await,
    }
    Ok(ExitCode::SUCCESS)
}
