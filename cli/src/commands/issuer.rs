//! `steadfast issuer`: the intermediate that signs SVIDs, and its rotation.

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use steadfast_api::{KeyId, UnixTime};
use steadfast_process::{Clock as _, SystemClock, duration};
use steadfast_rotation_protocol::TrustDomainState;

use crate::commands::anchor::{commanded, planned};
use crate::commands::issuer_import;
use crate::confirm::{OrderArgs, asks, confirm};
use crate::controller::ControllerArg;
use crate::mesh::Mesh;
use crate::output::{self, Format, Paint, table};
use crate::problem::Problem;
use crate::rotation::course::Course;
use crate::rotation::follow::{Followed, Shown, follow};
use crate::rotation::look::Look;
use crate::rotation::plan::Intent;
use crate::trust_domain;

/// Rotate the issuer, which signs every SVID, and watch it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Rotate(RotateArgs),
    Status(StatusArgs),
    Request(issuer_import::RequestArgs),
    Import(issuer_import::ImportArgs),
}

/// Replace the active issuer, under the same trust anchor
///
/// The plan comes first: who is asked, how long it takes, what can go wrong, how it is undone. It
/// happens by itself when an issuer nears its end. With --emergency, because its key is in other
/// hands, every workload renews at once, and then SVIDs of the old issuer are refused and open
/// connections with them are cut.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast issuer rotate --dry-run      the plan, and which replica would be waited for
  steadfast issuer rotate                another issuer signs; nobody notices
  steadfast issuer rotate --emergency    the issuer's key is in other hands

Exit code 1 if --dry-run finds somebody who would be waited for, cut off or left in danger, or
something in the way.")]
struct RotateArgs {
    #[command(flatten)]
    mesh: Mesh,
    #[command(flatten)]
    controller: ControllerArg,
    /// Only print the plan
    #[arg(long)]
    dry_run: bool,
    /// The issuer's key is in other hands
    #[arg(long)]
    emergency: bool,
    /// In an emergency: the old issuer is refused after this even if somebody still uses it
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = super::anchor::time, requires = "emergency")]
    deadline: Duration,
    /// Return as soon as the order is written
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    order: OrderArgs,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// Show the issuers: which signs, which are refused, how long each has left
#[derive(Debug, clap::Args)]
struct StatusArgs {
    #[command(flatten)]
    mesh: Mesh,
    #[command(flatten)]
    controller: ControllerArg,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

pub(super) async fn run(args: Args) -> Result<ExitCode, Problem> {
    match args.command {
        Command::Rotate(args) => rotate(args).await,
        Command::Status(args) => status(args).await,
        Command::Request(args) => {
            issuer_import::request(args).await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Import(args) => {
            issuer_import::import(args).await?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn rotate(args: RotateArgs) -> Result<ExitCode, Problem> {
    let mesh = &args.mesh;
    let intent = Intent::Issuer { deadline: args.emergency.then_some(args.deadline) };
    let judged = args.dry_run || asks(&args.order, args.output);
    let plan = planned(mesh, &args.controller, &intent, judged).await?;
    if args.dry_run {
        args.output.print(&plan, |plan| plan.text(Paint::stdout()))?;
        return Ok(if plan.is_clear() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if args.output == Format::Table {
        output::print(&(plan.text(Paint::stdout()) + "\n"))?;
    }
    confirm("Begin?", &args.order, args.output)?;
    let order = |state: &mut TrustDomainState| commanded(&intent, &args.order.by, state);
    let ordered = trust_domain::change(mesh, order).await?;
    let rotation = ordered.issuer_rotation.as_ref();
    let (number, from) = rotation.map_or((0, ordered.active_issuer), |r| (r.number, r.old));
    if args.no_wait {
        let rotated = Rotated { number, from, to: None };
        let text = "ordered; `steadfast issuer status` shows how it goes\n";
        args.output.print(&rotated, |_| text.to_owned())?;
        return Ok(ExitCode::SUCCESS);
    }
    let (followed, mut shown) = (Followed::Issuer(number), Shown::new(args.output));
    let Some(state) = follow(mesh, &args.controller, &followed, &mut shown).await? else {
        eprintln!("\nThe rotation goes on without you: `steadfast issuer status` shows it");
        return Ok(ExitCode::from(super::anchor::EXIT_INTERRUPTED));
    };
    let to = state.active_issuer;
    args.output.print(&Rotated { number, from, to: Some(to) }, |_| {
        format!("issuer {} signs in the place of {}\n", to.short(), from.short())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What was ordered, and what came of it.
#[derive(Serialize)]
struct Rotated {
    number: u64,
    from: KeyId,
    /// `None`: that is not waited for.
    to: Option<KeyId>,
}

/// How things stand, in both forms.
#[derive(Serialize)]
struct StatusView {
    issuers: Vec<IssuerView>,
    rotation: Option<Course>,
    trouble: Option<String>,
}

#[derive(Serialize)]
struct IssuerView {
    id: KeyId,
    role: &'static str,
    anchor: KeyId,
    not_after: UnixTime,
    left_s: u64,
}

async fn status(args: StatusArgs) -> Result<ExitCode, Problem> {
    let mesh = &args.mesh;
    let (state, now) = (trust_domain::read(mesh).await?, SystemClock.now());
    let look = Look::at(mesh, &args.controller).await;
    let trouble = look.trouble(&state);
    let rotation = Course::of_issuer(&state, look.issuer_wait(&state), now);
    let issuers = state.issuers.iter().map(|issuer| IssuerView {
        id: issuer.id,
        role: role(&state, issuer.id),
        anchor: issuer.anchor_id,
        not_after: issuer.not_after,
        left_s: issuer.not_after.since(now).as_secs(),
    });
    let view = StatusView { issuers: issuers.collect(), rotation, trouble };
    args.output.print(&view, |view| view.text(Paint::stdout()))?;
    Ok(if view.trouble.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What an issuer is to those who hold its SVIDs.
pub(super) fn role(state: &TrustDomainState, id: KeyId) -> &'static str {
    if state.denies(id) {
        "denied"
    } else if id == state.active_issuer {
        "active"
    } else {
        "former"
    }
}

impl StatusView {
    fn text(&self, paint: Paint) -> String {
        let rows: Vec<_> = self
            .issuers
            .iter()
            .map(|issuer| {
                let left = Duration::from_secs(issuer.left_s);
                [
                    issuer.id.short(),
                    issuer.role.to_owned(),
                    issuer.anchor.short(),
                    issuer.not_after.to_string(),
                    if left.is_zero() { "expired".to_owned() } else { duration::show(left) },
                ]
            })
            .collect();
        let mut text = table(["ID", "ROLE", "ANCHOR", "ENDS", "LEFT"], &rows);
        for line in self.rotation.iter().flat_map(|rotation| rotation.lines(paint)) {
            text += &format!("{line}\n");
        }
        if let Some(trouble) = &self.trouble {
            text += &format!("{} {trouble}\n", paint.red("!"));
        }
        text
    }
}
