//! `steadfast consumer`: holders of the trust bundle that cannot ack.

use std::time::Duration;

use clap::Subcommand;
use steadfast_process::duration;
use steadfast_rotation_protocol::trust_domain::Consumer;

use crate::output::{self, Format, table};
use crate::problem::Problem;
use crate::store::DirArg;
use crate::trust_domain;

/// Name what holds the trust bundle and cannot say which: rotations give it time, or wait for it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Add(AddArgs),
    List(ListArgs),
    Remove(RemoveArgs),
}

/// Register a consumer; one of the same name is changed
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("how").required(true).args(["refresh", "fixed"]),
    after_help = "\
Examples:
  steadfast consumer add vault --refresh 5m     each new anchor waits until it has surely been read
  steadfast consumer add legacy-gateway --fixed no anchor is added before it was given the bundle"
)]
struct AddArgs {
    /// Its name, for plans and displays
    #[arg(value_parser = name)]
    name: String,
    /// How often it reads the bundle: it is given four times that
    #[arg(long, value_name = "TIME", value_parser = super::anchor::time)]
    refresh: Option<Duration>,
    /// It has read the bundle once and for all: a rotation that adds an anchor waits until it is
    /// removed or registered anew
    #[arg(long)]
    fixed: bool,
    #[command(flatten)]
    dir: DirArg,
}

/// List the registered consumers
#[derive(Debug, clap::Args)]
struct ListArgs {
    #[command(flatten)]
    dir: DirArg,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// Wait for a consumer no more
#[derive(Debug, clap::Args)]
struct RemoveArgs {
    /// Its name
    name: String,
    #[command(flatten)]
    dir: DirArg,
}

pub(super) async fn run(args: Args) -> Result<(), Problem> {
    match args.command {
        Command::Add(args) => add(args).await,
        Command::List(args) => {
            let state = trust_domain::read(&args.dir.dir).await?;
            Ok(args.output.print(&state.consumers, |consumers| listing(consumers))?)
        }
        Command::Remove(args) => {
            let (dir, name) = (&args.dir.dir, &args.name);
            trust_domain::change(dir, |state| state.remove_consumer(name)).await?;
            Ok(output::print(&format!("no rotation waits for {name} any more\n"))?)
        }
    }
}

async fn add(args: AddArgs) -> Result<(), Problem> {
    let consumer = Consumer { name: args.name, refresh: args.refresh };
    trust_domain::change(&args.dir.dir, |state| {
        state.add_consumer(consumer.clone());
        Ok(())
    })
    .await?;
    let what = consumer.refresh.map_or_else(
        || "holds up every rotation that adds an anchor, until it is removed".to_owned(),
        |refresh| format!("is given four times {} in every rotation", duration::show(refresh)),
    );
    Ok(output::print(&format!("{} {what}\n", consumer.name))?)
}

fn listing(consumers: &[Consumer]) -> String {
    if consumers.is_empty() {
        return "no consumer is registered\n".to_owned();
    }
    let rows: Vec<_> = consumers
        .iter()
        .map(|consumer| {
            let reads = consumer.refresh.map(|time| format!("every {}", duration::show(time)));
            [consumer.name.clone(), reads.unwrap_or_else(|| "once and for all".to_owned())]
        })
        .collect();
    table(["NAME", "READS THE BUNDLE"], &rows)
}

fn name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '/');
    if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.chars().all(plain) {
        return Err(format!(
            "must be 1 to {NAME_BYTES_MAX} letters, digits, dots, dashes, underscores or slashes"
        ));
    }
    Ok(text.to_owned())
}

const NAME_BYTES_MAX: usize = 128;
