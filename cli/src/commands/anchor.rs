//! `steadfast anchor`: rotations of trust anchors, ordered and watched.
//!
//! An order is written into the store and carried out by steadfast-rotation: what is shown here may
//! be left at any moment, and the rotation goes on.

use std::io::{self, IsTerminal as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use steadfast_api::KeyId;
use steadfast_process::{Clock as _, ErrorChain, SystemClock, duration};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::orders::OrderRefused;
use steadfast_rotation_protocol::trust_domain::{
    AnchorState, CanaryPlan, Outcome, PastRotation, Request, Selector,
};

use crate::commands::anchor_import::{self, ImportArgs, ImportProblem};
use crate::confirm::{OrderArgs, asks, confirm};
use crate::controller::{Controller, ControllerArg, ControllerError};
use crate::mesh::Mesh;
use crate::output::{self, Format, Paint};
use crate::problem::Problem;
use crate::rotation::follow::{Followed, Shown, follow};
use crate::rotation::ordered::Ordered;
use crate::rotation::plan::{Intent, Plan, Told};
use crate::trust_domain::{self, TrustDomainError, change_at};

mod exempt;
pub(crate) mod given;
mod list;
mod status;

/// Rotate trust anchors under live traffic, and watch it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Rotate(RotateArgs),
    Status(status::StatusArgs),
    Pause(OrderOnlyArgs),
    /// Let phases begin again, and follow the rotation that is under way
    Resume(WatchArgs),
    /// Undo the rotation that is under way: back to the anchor from before
    ///
    /// Until the old anchor is withdrawn this always ends as it began, with another standby at
    /// most. A stolen key has no way back.
    Abort(WatchArgs),
    Exempt(exempt::ExemptArgs),
    Unexempt(exempt::UnexemptArgs),
    List(list::ListArgs),
    Import(ImportArgs),
    Withdraw(WithdrawArgs),
    Taint(TaintArgs),
}

/// What every command here takes.
#[derive(Clone, Debug, clap::Args)]
struct CommonArgs {
    #[command(flatten)]
    mesh: Mesh,
    #[command(flatten)]
    controller: ControllerArg,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// Replace the active trust anchor, without a restart and without a failed request
///
/// The plan comes first: who is asked, how long it takes, what can go wrong, how it is undone. Then
/// each phase is shown with what it waits for. Ctrl-C leaves the display; the rotation goes on, and
/// `steadfast anchor status` shows it again.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast anchor rotate --dry-run               the plan, and who would be waited for
  steadfast anchor rotate                         the standby becomes active, a fresh one stands by
  steadfast anchor rotate --canary 10%            a tenth of the pods goes first, for five minutes
  steadfast anchor rotate --anchor root-2027.pem  to an anchor of your own CA
  steadfast anchor rotate --emergency             the active anchor's key is in other hands

Exit code 1 if --dry-run finds somebody who would be waited for, cut off or left in danger, or
something in the way, and if the rotation was undone.")]
struct RotateArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Only print the plan
    #[arg(long)]
    dry_run: bool,
    /// Let the pods of a namespace, or so many in a hundred of all, go first: demo, or 10%
    #[arg(long, value_name = "NS|PERCENT", value_parser = selector)]
    canary: Option<Selector>,
    /// How long nothing may go wrong for the canaries
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = time, requires = "canary")]
    canary_for: Duration,
    /// The active anchor's key is in other hands: another that everybody holds, the standby as a
    /// rule, becomes active at once; without one a fresh anchor does, as soon as everybody holds it
    #[arg(long, conflicts_with_all = ["canary", "anchor"])]
    emergency: bool,
    /// In an emergency: who has not answered so long after the change is cut off
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time, requires = "emergency")]
    deadline: Duration,
    /// The anchor that becomes active: a certificate in PEM, which is imported if it is not yet, or
    /// the id of an imported one. The standby stays
    #[arg(long, value_name = "FILE")]
    anchor: Option<PathBuf>,
    /// Return as soon as the order is written
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    order: OrderArgs,
}

/// Let no phase begin; renewals, bundles and repairs go on
#[derive(Debug, clap::Args)]
struct OrderOnlyArgs {
    #[command(flatten)]
    common: CommonArgs,
}

/// An order after which the rotation is followed: its command says what it is.
#[derive(Debug, clap::Args)]
struct WatchArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Return as soon as the order is written
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    order: OrderArgs,
}

/// Take an anchor away that does not sign: a standby, for a fresh one, or one that was imported
#[derive(Debug, clap::Args)]
struct WithdrawArgs {
    /// Its id, or the beginning of it
    id: String,
    #[command(flatten)]
    common: CommonArgs,
    /// Return as soon as the order is written
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    order: OrderArgs,
}

/// Say that an anchor's key is in other hands: an emergency begins, whatever is under way
#[derive(Debug, clap::Args)]
struct TaintArgs {
    /// Its id, or the beginning of it
    id: String,
    /// Who has not answered so long after a change of the active anchor is cut off; a standby goes
    /// without one
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time)]
    deadline: Duration,
    #[command(flatten)]
    common: CommonArgs,
    /// Return as soon as the order is written
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    order: OrderArgs,
}

/// Why an order about anchors is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnchorError {
    #[error("{text:?} is the beginning of several anchors: {}", .ids.join(", "))]
    Ambiguous { text: String, ids: Vec<String> },
    #[error(
        "no anchor is active, so none is replaced: say with `steadfast anchor taint ID` whose key is \
         in other hands (`steadfast anchor list` names them)"
    )]
    NoActive,
    #[error("no anchor begins with {0:?}; `steadfast anchor list` names them")]
    NoAnchor(String),
    #[error(
        "there is no file {0}, and no anchor begins with that: bring the certificate of the \
         anchor, or the id of one that was imported (`steadfast anchor list` names them)"
    )]
    NoFile(String),
    #[error(
        "{workload:?} is not exempt; {}",
        match .exempt.as_slice() {
            [] => "nobody is".to_owned(),
            exempt => format!("exempt are: {}", exempt.join(", ")),
        }
    )]
    NotExempt { workload: String, exempt: Vec<String> },
    #[error("the active anchor is replaced, not withdrawn: `steadfast anchor rotate`")]
    Active,
    #[error(
        "the rotation that was ordered is not in the history: the order was taken back before \
         anything began"
    )]
    TakenBack,
    #[error("anchor {0} is on its way in or out already; `steadfast anchor status` shows it")]
    UnderWay(String),
    #[error("nobody of the name {workload:?} is asked{hint}")]
    Unknown { workload: String, hint: String },
    #[error("nobody has been asked yet; try again in a few seconds")]
    Unasked,
}

pub(super) async fn run(args: Args) -> Result<ExitCode, Problem> {
    match args.command {
        Command::Rotate(args) => return rotate(args).await,
        Command::Status(args) => return status::status(args).await,
        Command::Resume(args) => return resume(args).await,
        Command::Abort(args) => return abort(args).await,
        Command::Withdraw(args) => return withdraw(args).await,
        Command::Taint(args) => return taint(args).await,
        Command::Pause(args) => pause(&args.common).await?,
        Command::Exempt(args) => exempt::exempt(args).await?,
        Command::Unexempt(args) => exempt::unexempt(args).await?,
        Command::List(args) => list::list(&args).await?,
        Command::Import(args) => anchor_import::import(args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn rotate(args: RotateArgs) -> Result<ExitCode, Problem> {
    let state = trust_domain::read(&args.common.mesh).await?;
    let intent = if args.emergency {
        let active = state.active_anchor().ok_or(AnchorError::NoActive)?;
        Intent::Emergency { anchor: active.id, deadline: args.deadline }
    } else {
        let canary = args.canary.clone();
        let canary = canary.map(|selector| CanaryPlan { selector, window: args.canary_for });
        let next = args.anchor.as_deref().map(|path| given::find(path, &state)).transpose()?;
        Intent::Rotate { next, canary }
    };
    order(&args.common, &args.order, intent, args.dry_run, args.no_wait).await
}

async fn withdraw(args: WithdrawArgs) -> Result<ExitCode, Problem> {
    let state = trust_domain::read(&args.common.mesh).await?;
    let id = find(&args.id, &state)?;
    match state.anchor(id).map(|anchor| anchor.state) {
        Some(AnchorState::Standby) => {
            let intent = Intent::Replace { standby: id };
            order(&args.common, &args.order, intent, false, args.no_wait).await
        }
        Some(AnchorState::Generated) => {
            confirm(&format!("Forget anchor {id}?"), &args.order, args.common.output)?;
            anchor_import::forget(&args.common.mesh, id).await?;
            said(args.common.output, &format!("anchor {} is forgotten", id.short()))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(AnchorState::Active) => Err(AnchorError::Active.into()),
        _ => Err(AnchorError::UnderWay(id.to_string()).into()),
    }
}

async fn taint(args: TaintArgs) -> Result<ExitCode, Problem> {
    let state = trust_domain::read(&args.common.mesh).await?;
    let anchor = find(&args.id, &state)?;
    let intent = Intent::Emergency { anchor, deadline: args.deadline };
    order(&args.common, &args.order, intent, false, args.no_wait).await
}

/// Plans, asks, orders and follows.
async fn order(
    common: &CommonArgs,
    order: &OrderArgs,
    intent: Intent,
    dry_run: bool,
    no_wait: bool,
) -> Result<ExitCode, Problem> {
    let judged = dry_run || asks(order, common.output);
    let plan = planned(&common.mesh, &common.controller, &intent, judged).await?;
    if dry_run {
        common.output.print(&plan, |plan| plan.text(Paint::stdout()))?;
        return Ok(if plan.is_clear() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if common.output == Format::Table {
        output::print(&(plan.text(Paint::stdout()) + "\n"))?;
    }
    confirm("Begin?", order, common.output)?;
    let by = &order.by;
    let given = |state: &mut TrustDomainState| match intent.given() {
        Some(given) => given.join(state),
        None => Ok(()),
    };
    // An anchor that is brought is imported by the very write that orders the rotation to it.
    let changed = change_at(&common.mesh, |state, _| {
        given(state)?;
        commanded(&intent, by, state).map_err(TrustDomainError::from)?;
        Ok::<_, ImportProblem>(())
    });
    let (state, ()) = changed.await?;
    let ordered = match &intent {
        // What is under way already may be the emergency's from now on.
        Intent::Emergency { .. } => {
            let under_way = state.rotation.as_ref().map(|rotation| rotation.number - 1);
            Ordered::Emergency { after: under_way.unwrap_or(state.rotations) }
        }
        Intent::Issuer { .. } | Intent::Replace { .. } | Intent::Rotate { .. } => {
            Ordered::By { after: state.rotations, by: by.clone() }
        }
    };
    go_on(common, no_wait, ordered, Outcome::Done).await
}

/// The order itself.
pub(super) fn commanded(
    intent: &Intent,
    by: &str,
    state: &mut TrustDomainState,
) -> Result<(), OrderRefused> {
    let request = |anchor, canary, replaces| {
        let (by, at) = (by.to_owned(), SystemClock.now());
        Request { by, at, anchor, canary, replaces }
    };
    match intent {
        Intent::Emergency { anchor, deadline } => state.taint(*anchor, by.to_owned(), *deadline),
        Intent::Issuer { deadline } => {
            state.rotate_issuer(by.to_owned(), *deadline, SystemClock.now())
        }
        Intent::Replace { standby } => state.request(request(None, None, Some(*standby))),
        Intent::Rotate { next, canary } => {
            let next = next.as_ref().map(|given| given.record.id);
            state.request(request(next, canary.clone(), None))
        }
    }
}

/// Follows what was ordered, to the end that was ordered.
async fn go_on(
    common: &CommonArgs,
    no_wait: bool,
    ordered: Ordered,
    wanted: Outcome,
) -> Result<ExitCode, Problem> {
    if no_wait {
        said(common.output, "ordered; `steadfast anchor status` shows how it goes")?;
        return Ok(ExitCode::SUCCESS);
    }
    let followed = Followed::Anchor(ordered.clone());
    let mut shown = Shown::new(common.output);
    let Some(state) = follow(&common.mesh, &common.controller, &followed, &mut shown).await? else {
        return Ok(left_alone());
    };
    if common.output != Format::Table {
        let rotations = followed.ended(&state);
        let number = ordered.ended(&state).map(|past| past.number);
        common.output.print(&Ended { ordered: number, rotations }, |_| String::new())?;
    }
    as_wanted(&ordered, &state, wanted)
}

/// The person has had enough of the display.
fn left_alone() -> ExitCode {
    eprintln!("\nThe rotation goes on without you: `steadfast anchor status` shows it");
    ExitCode::from(EXIT_INTERRUPTED)
}

/// Whether the rotation that was ordered has ended as it was ordered; of an emergency, nothing but
/// an anchor may have been there to be removed.
fn as_wanted(
    ordered: &Ordered,
    state: &TrustDomainState,
    wanted: Outcome,
) -> Result<ExitCode, Problem> {
    match ordered.ended(state) {
        Some(past) if past.outcome == wanted => Ok(ExitCode::SUCCESS),
        Some(_) => Ok(ExitCode::FAILURE),
        None if matches!(ordered, Ordered::Emergency { .. }) => Ok(ExitCode::SUCCESS),
        None => Err(AnchorError::TakenBack.into()),
    }
}

/// The rotations that have ended while they were followed.
#[derive(Serialize)]
struct Ended {
    /// The number of the one that was ordered.
    ordered: Option<u64>,
    rotations: Vec<PastRotation>,
}

/// A plan with what the controller knows, or why it does not tell. One that is judged, by a person
/// or by its exit code, is made of answers to a query of now; an order that is sure waits for none.
pub(super) async fn planned(
    mesh: &Mesh,
    controller: &ControllerArg,
    intent: &Intent,
    judged: bool,
) -> Result<Plan, Problem> {
    let (told, silent) = asked(mesh, controller, judged).await;
    // After the answers, so that no state is judged by those to the one before.
    let mut state = trust_domain::read(mesh).await?;
    // The plan is of the state as it would be; what is stored changes after the question.
    if let Some(given) = intent.given() {
        given.join(&mut state)?;
    }
    let mut plan = Plan::of(intent, &state, &told, SystemClock.now());
    plan.obstacles.extend(silent.map(|error| ErrorChain(&error).to_string()));
    Ok(plan)
}

async fn asked(mesh: &Mesh, arg: &ControllerArg, judged: bool) -> (Told, Option<ControllerError>) {
    let began = SystemClock.now();
    match Controller::find(mesh, arg).await {
        Ok((controller, standing)) => {
            if judged && io::stderr().is_terminal() {
                eprintln!("Asking everybody …");
            }
            let round = match judged {
                true => controller.round_since(began).await,
                false => controller.round().await,
            };
            match round {
                Ok(round) => (Told::of(standing, round), None),
                Err(error) => (Told::of(standing, None), Some(error.into())),
            }
        }
        Err(error) => (Told::default(), Some(error)),
    }
}

async fn pause(common: &CommonArgs) -> Result<(), Problem> {
    let state = change(common, |state| {
        state.pause(true);
        Ok(())
    })
    .await?;
    let what = state.rotation.as_ref().map_or_else(
        || "no rotation begins".to_owned(),
        |rotation| format!("rotation {} stays in its phase", rotation.number),
    );
    said(common.output, &format!("paused: {what} before `steadfast anchor resume`"))
}

async fn resume(args: WatchArgs) -> Result<ExitCode, Problem> {
    let state = change(&args.common, |state| {
        state.pause(false);
        Ok(())
    })
    .await?;
    let Some(ordered) = Ordered::in_state(&state) else {
        said(args.common.output, "resumed; no rotation is under way")?;
        return Ok(ExitCode::SUCCESS);
    };
    go_on(&args.common, args.no_wait, ordered, Outcome::Done).await
}

async fn abort(args: WatchArgs) -> Result<ExitCode, Problem> {
    let state = trust_domain::read(&args.common.mesh).await?;
    // What cannot be undone is refused before anybody is asked.
    state.clone().abort().map_err(TrustDomainError::from)?;
    let question = match &state.rotation {
        Some(rotation) if state.requested.is_none() => {
            format!("Undo rotation {}?", rotation.number)
        }
        _ => "Take the order for a rotation back?".to_owned(),
    };
    confirm(&question, &args.order, args.common.output)?;
    let after = change(&args.common, |state| state.abort()).await?;
    let Some(rotation) = after.rotation.as_ref().filter(|rotation| rotation.abort) else {
        said(args.common.output, "the order is taken back; nothing had begun")?;
        return Ok(ExitCode::SUCCESS);
    };
    let ordered = Ordered::Number(rotation.number);
    go_on(&args.common, args.no_wait, ordered, Outcome::Aborted).await
}

async fn change(
    common: &CommonArgs,
    order: impl Fn(&mut TrustDomainState) -> Result<(), OrderRefused>,
) -> Result<TrustDomainState, TrustDomainError> {
    trust_domain::change(&common.mesh, order).await
}

/// The anchor whose id begins so.
///
/// # Errors
/// There is none, or more than one.
pub(super) fn find(text: &str, state: &TrustDomainState) -> Result<KeyId, AnchorError> {
    let lower = text.to_ascii_lowercase();
    let ids = state.anchors.iter().map(|anchor| anchor.id);
    let found: Vec<_> = ids.filter(|id| id.to_string().starts_with(&lower)).collect();
    match found.as_slice() {
        [id] if !lower.is_empty() => Ok(*id),
        [] => Err(AnchorError::NoAnchor(text.to_owned())),
        several => Err(AnchorError::Ambiguous {
            text: text.to_owned(),
            ids: several.iter().map(KeyId::short).collect(),
        }),
    }
}

/// What was done, for a person, or for a program.
fn said(output: Format, what: &str) -> Result<(), Problem> {
    #[derive(Serialize)]
    struct Said<'a> {
        done: &'a str,
    }
    Ok(output.print(&Said { done: what }, |said| format!("{}\n", said.done))?)
}

fn selector(text: &str) -> Result<Selector, String> {
    let Some(percent) = text.strip_suffix('%') else {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if text.is_empty() || text.len() > 63 || !text.chars().all(plain) {
            return Err("is neither a namespace nor a percentage such as 10%".to_owned());
        }
        if text.chars().all(|c| c.is_ascii_digit()) {
            return Err(format!("write {text}% for a percentage"));
        }
        return Ok(Selector::Namespace(text.to_owned()));
    };
    match percent.parse() {
        Ok(percent @ 1..=99) => Ok(Selector::Percent(percent)),
        _ => Err("must be from 1% to 99%".to_owned()),
    }
}

/// Reads a time of at least a second.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    let time = duration::parse(text).map_err(|error| error.to_string())?;
    if time < Duration::from_secs(1) { Err("must be at least 1s".to_owned()) } else { Ok(time) }
}

/// As a shell tells of a program that SIGINT has ended.
pub(super) const EXIT_INTERRUPTED: u8 = 130;

#[cfg(test)]
mod tests {
    use steadfast_api::UnixTime;

    use super::*;

    #[test]
    fn an_anchor_is_meant_by_the_beginning_of_its_id_in_either_case_and_by_nothing_else() {
        let (domain, now) = ("cluster.local".parse().unwrap(), UnixTime::from_secs(1_800_000_000));
        let state = steadfast_identity::authority::found(&domain, now).unwrap().state;
        let id = state.active_anchor().unwrap().id;
        for text in [id.to_string(), id.short(), id.short().to_ascii_uppercase()] {
            assert_eq!(find(&text, &state).unwrap(), id, "{text}");
        }
        assert!(matches!(find("", &state), Err(AnchorError::Ambiguous { .. })));
        assert!(matches!(find("zz", &state), Err(AnchorError::NoAnchor(_))));
    }

    #[test]
    fn an_order_that_was_taken_back_is_no_success_and_an_emergency_without_a_rotation_is_one() {
        let (domain, now) = ("cluster.local".parse().unwrap(), UnixTime::from_secs(1_800_000_000));
        let mut state = steadfast_identity::authority::found(&domain, now).unwrap().state;
        let ordered = Ordered::By { after: 0, by: "ann".to_owned() };
        let error = as_wanted(&ordered, &state, Outcome::Done).unwrap_err();
        assert!(error.text().contains("taken back before anything began"), "{}", error.text());
        let code = |ordered: &Ordered, state: &TrustDomainState| {
            // An exit code can be compared as text only.
            format!("{:?}", as_wanted(ordered, state, Outcome::Done).unwrap())
        };
        let [well, wrong] = [ExitCode::SUCCESS, ExitCode::FAILURE].map(|code| format!("{code:?}"));
        assert_eq!(code(&Ordered::Emergency { after: 0 }, &state), well);
        // The issuer's ends first, and as it should; the one that was ordered is undone.
        for (number, kind, outcome) in
            [(1, "issuer", Outcome::Overtaken), (2, "anchor", Outcome::Done)]
        {
            let (kind, by) = (kind.to_owned(), "ann".to_owned());
            let (started, ended, steps) = (now, now, Vec::new());
            state.past.push(PastRotation { number, kind, by, started, ended, outcome, steps });
        }
        assert_eq!(code(&ordered, &state), well);
        state.past[0].outcome = Outcome::Done;
        state.past[1].outcome = Outcome::Aborted;
        assert_eq!(code(&ordered, &state), wrong);
    }
}
