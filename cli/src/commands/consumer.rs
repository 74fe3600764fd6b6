//! `steadfast consumer`: holders of the trust bundle that cannot ack.

use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use steadfast_process::duration;
use steadfast_rotation_protocol::trust_domain::Consumer;

use crate::mesh::Mesh;
use crate::output::{Format, table};
use crate::problem::Problem;
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
    mesh: Mesh,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// List the registered consumers
#[derive(Debug, clap::Args)]
struct ListArgs {
    #[command(flatten)]
    mesh: Mesh,
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
    mesh: Mesh,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// A consumer, as it is listed.
#[derive(Serialize)]
struct ConsumerView {
    name: String,
    /// How often it reads the bundle, in seconds; `None`: it has done so once and for all.
    refresh_s: Option<u64>,
}

/// Which consumer is one no more.
#[derive(Serialize)]
struct Removed<'a> {
    removed: &'a str,
}

pub(super) async fn run(args: Args) -> Result<(), Problem> {
    match args.command {
        Command::Add(args) => add(args).await,
        Command::List(args) => {
            let state = trust_domain::read(&args.mesh).await?;
            let consumers: Vec<_> = state.consumers.iter().map(ConsumerView::of).collect();
            Ok(args.output.print(&consumers, |consumers| listing(consumers))?)
        }
        Command::Remove(args) => {
            let (mesh, name) = (&args.mesh, &args.name);
            trust_domain::change(mesh, |state| state.remove_consumer(name)).await?;
            let removed = Removed { removed: name };
            Ok(args.output.print(&removed, |Removed { removed }| {
                format!("no rotation waits for {removed} any more\n")
            })?)
        }
    }
}

async fn add(args: AddArgs) -> Result<(), Problem> {
    let consumer = Consumer { name: args.name, refresh: args.refresh };
    trust_domain::change(&args.mesh, |state| {
        state.add_consumer(consumer.clone());
        Ok(())
    })
    .await?;
    Ok(args.output.print(&ConsumerView::of(&consumer), ConsumerView::added)?)
}

impl ConsumerView {
    fn of(consumer: &Consumer) -> Self {
        let refresh_s = consumer.refresh.map(|refresh| refresh.as_secs());
        Self { name: consumer.name.clone(), refresh_s }
    }

    fn refresh(&self) -> Option<String> {
        self.refresh_s.map(|secs| duration::show(Duration::from_secs(secs)))
    }

    fn added(&self) -> String {
        let what = self.refresh().map_or_else(
            || "holds up every rotation that adds an anchor, until it is removed".to_owned(),
            |refresh| format!("is given four times {refresh} in every rotation"),
        );
        format!("{} {what}\n", self.name)
    }
}

fn listing(consumers: &[ConsumerView]) -> String {
    if consumers.is_empty() {
        return "no consumer is registered\n".to_owned();
    }
    let rows: Vec<_> = consumers
        .iter()
        .map(|consumer| {
            let reads = consumer.refresh().map(|time| format!("every {time}"));
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
