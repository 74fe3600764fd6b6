//! `steadfast demo`: a mesh of three services on this machine, under load, renewing its identities.
//!
//! Everything is real: separate processes, sockets on loopback, the programs that a mesh of one's
//! own would run. The demo only starts them, sends requests, and shows what the sidecars tell.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use steadfast_api::TrustDomain;
use steadfast_platform::standalone::Directory;
use steadfast_process::{Clock as _, ErrorChain, SystemClock, duration};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::admin::AdminError;
use crate::commands::trust::init::{TRUST_DOMAIN_DEFAULT, read_lease};
use crate::controller::ControllerArg;
use crate::output::{self, Paint};
use crate::problem::Problem;
use home::{Home, Left};
use load::{Load, Target};
use observe::{Observer, Scrape, Screen};
use plan::{Plan, PlanError};
use processes::{Death, Processes};
use programs::Programs;
use progress::Progress;
use rotations::{Rotations, RotationsError, Shown, counted};
use signals::Signals;
use start::{StartError, Starter};
use summary::Summary;
use terminal::Live;
use view::Look;

mod app;
mod guard;
mod home;
mod load;
mod manifests;
mod observe;
mod plan;
mod processes;
mod programs;
mod progress;
mod rotations;
mod signals;
mod start;
mod summary;
mod terminal;
mod view;

/// Run a small mesh on this machine and watch its identities renew under load
///
/// Starts the store, the identity service, discovery and three services (web calls api, api calls
/// store), each with its own sidecar, as separate processes on loopback; sends requests; shows
/// rates, latencies, identities and renewals. Needs no root, no network and no configuration.
/// Ctrl-C (or q) stops everything and leaves nothing behind.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast demo                                  until Ctrl-C
  steadfast demo --for 60s --svid-ttl 15s         a minute, in which every SVID renews often
  steadfast demo --for 30s --json                 only the summary, for a program
  steadfast demo --rotate                         every rotation there is, under load
  steadfast demo --dir ./mesh                     keep the mesh's files: edit ./mesh/manifests
  steadfast demo --keep --dir ./mesh              and print how to attach programs of your own

Exit code 1 if a request failed or was not seen with its caller's identity, if a process died, and
if --rotate was interrupted or a rotation did not end as it was ordered.")]
pub(crate) struct Args {
    /// Send load for this long (60s, 5m); without it, until Ctrl-C
    #[arg(long = "for", value_name = "DURATION", value_parser = length)]
    length: Option<Duration>,
    /// How long each SVID lives: it renews at about two thirds of that
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = svid_ttl)]
    svid_ttl: Duration,
    /// Rotate the issuer, then the trust anchor, then undo a rotation after its activation, then
    /// rotate in an emergency, while requests flow; takes some two minutes, and the load lasts
    /// until then
    #[arg(long)]
    rotate: bool,
    /// How long the identity service acts on what the store has said last: 3s to 15s, which is the
    /// usual. Each phase of a rotation lasts at least as long. A mesh that is in --dir already keeps
    /// its own
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = read_lease)]
    read_lease: Duration,
    /// Requests a second
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=RATE_MAX))]
    rate: u32,
    /// Print the summary as JSON on standard output, and nothing else there
    #[arg(long)]
    json: bool,
    /// Keep state, manifests and logs in this directory; what one changes in its manifests while
    /// the demo runs, the mesh follows
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print the environment of each process, to attach more, and keep the mesh running until
    /// Ctrl-C, even after --for or --rotate is over
    #[arg(long)]
    keep: bool,
}

/// What the demo starts this program as: for nobody to type
#[derive(Debug, clap::Args)]
pub(crate) struct InternalArgs {
    #[command(subcommand)]
    command: Internal,
}

#[derive(Debug, clap::Subcommand)]
enum Internal {
    App(app::Args),
    Exec(guard::ExecArgs),
    Janitor(guard::JanitorArgs),
}

/// Why there is no demo.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("{0}")]
    Died(Death),
    #[error("stopped before the mesh was ready")]
    Interrupted,
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("the rotations were not performed")]
    Rotations(#[from] RotationsError),
    #[error("the sidecars do not tell what they have counted")]
    Scrape(#[from] AdminError),
    #[error("the mesh did not come up")]
    Start(#[from] StartError),
    #[error("the name of the trust domain")]
    TrustDomain(#[from] steadfast_api::spiffe::SpiffeError),
}

/// Runs the demo.
///
/// # Errors
/// Whatever is in its way.
pub(crate) async fn run(args: Args) -> Result<ExitCode, Problem> {
    let signals = Signals::new()?;
    let programs = Programs::find()?;
    let home = Home::open(&programs.own, args.dir.as_deref())?;
    let progress = Progress::new(args.json);
    let processes = Processes::new(&programs.own, home.directory().log());
    let mut demo =
        Demo { args, programs, directory: home.directory(), progress, processes, signals };
    let whose = if home.is_kept() { "" } else { " (removed at the end)" };
    progress.say(&format!("Starting a mesh in {}{whose}", demo.directory.path().display()));
    let outcome = demo.run().await;
    // From here on, a signal only says: hurry.
    demo.processes.stop(demo.signals.next()).await;
    progress.say(&match home.close() {
        Ok(Left::Files(path)) => format!("Stopped; its files are in {}", path.display()),
        Ok(Left::Nothing) => "Stopped; nothing is left behind".to_owned(),
        Err(error) => format!("Stopped; {}", ErrorChain(&error)),
    });
    outcome
}

/// Runs what the demo started this program as.
///
/// # Errors
/// Why it cannot.
pub(crate) async fn run_internal(args: InternalArgs) -> Result<(), Problem> {
    match args.command {
        Internal::App(args) => Ok(app::run(args).await?),
        Internal::Exec(args) => Ok(guard::exec(&args)?),
        Internal::Janitor(args) => Ok(guard::janitor(&args)?),
    }
}

/// Why the watching has ended.
enum Watched {
    /// A process has.
    Died(Death),
    /// Somebody has had enough.
    Enough,
    /// The load, or the last rotation, is over.
    Over,
    /// A rotation was not performed as it was ordered.
    Unperformed(RotationsError),
}

impl Watched {
    /// Whether a mesh that is to be kept goes on running until somebody has had enough.
    const fn stays(&self, keep: bool) -> bool {
        keep && matches!(self, Self::Over)
    }
}

/// A demo while it runs.
struct Demo {
    args: Args,
    programs: Programs,
    directory: Directory,
    progress: Progress,
    processes: Processes,
    signals: Signals,
}

impl Demo {
    async fn run(&mut self) -> Result<ExitCode, Problem> {
        let plan = self.bring_up().await?;
        if self.args.keep {
            let environments = start::write_environments(&self.directory, &self.processes)?;
            self.progress.say(&format!("\n{environments}"));
        }
        let Some(target) = Target::of(&plan) else { return Ok(ExitCode::SUCCESS) };
        let baseline = observe::scrape(&plan).await.map_err(DemoError::from)?;
        // The rotations take as long as they take.
        let limit = self.args.length.filter(|_| !self.args.rotate);
        let load = Load::start(target, self.args.rate, limit);
        let mut observer = Observer::new(baseline, &load);
        let rotations = self.args.rotate.then(|| {
            let pids = self.processes.running().filter_map(|(_, pid)| pid);
            let controller = ControllerArg::at(plan.rotation_admin);
            Rotations::new(self.directory.path(), controller, &load, pids)
        });
        let shown = rotations.as_ref().map(Rotations::shown);
        let watched = self.watch(&plan, &load, &mut observer, rotations).await;
        let stays = watched.stays(self.args.keep);
        let (death, unperformed) = match watched {
            Watched::Died(death) => (Some(death), None),
            Watched::Enough | Watched::Over => (None, None),
            Watched::Unperformed(error) => (None, Some(error)),
        };
        let length = load.elapsed();
        load.stop();
        let patience = if death.is_some() { PATIENCE_AFTER_DEATH } else { PATIENCE };
        tokio::select! {
            _ = timeout(patience, load.finished()) => {}
            () = self.signals.next() => {}
        }
        let settling = if death.is_some() { Duration::ZERO } else { SETTLE_DEADLINE };
        let mut summary = settle(&plan, &load, &observer, length, settling).await;
        summary.rotations =
            shown.map(|shown| counted(shown.borrow().performed.clone(), &load.tally()));
        self.report(&summary)?;
        if let Some(death) = death {
            return Err(DemoError::Died(death).into());
        }
        if let Some(error) = unperformed {
            return Err(DemoError::Rotations(error).into());
        }
        if stays {
            self.stay().await?;
        }
        Ok(if summary.is_well() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Starts the mesh; with other ports, if one was taken in the moment between choice and use.
    async fn bring_up(&mut self) -> Result<Plan, DemoError> {
        let trust_domain: TrustDomain = TRUST_DOMAIN_DEFAULT.parse()?;
        for attempt in 0.. {
            let mut plan = Plan::new(&trust_domain, self.args.svid_ttl, attempt)?;
            let starter = Starter {
                plan: &mut plan,
                directory: &self.directory,
                read_lease: self.args.read_lease,
                programs: &self.programs,
                processes: &mut self.processes,
                progress: self.progress,
            };
            let started = tokio::select! {
                started = starter.start() => started,
                () = self.signals.next() => return Err(DemoError::Interrupted),
            };
            match started {
                Ok(()) => return Ok(plan),
                Err(StartError::Died(death))
                    if death.is_of_a_taken_port() && attempt + 1 < ATTEMPTS_MAX =>
                {
                    self.progress.say("  a port was taken meanwhile: once more, with others");
                    self.processes.stop(self.signals.next()).await;
                }
                Err(StartError::Died(death)) => return Err(DemoError::Died(death)),
                Err(error) => return Err(error.into()),
            }
        }
        Err(DemoError::Plan(PlanError::NoPort))
    }

    /// Shows what happens until the load's time is over, the user has had enough, or a process
    /// dies.
    async fn watch(
        &mut self,
        plan: &Plan,
        load: &Load,
        observer: &mut Observer,
        rotations: Option<Rotations<'_>>,
    ) -> Watched {
        let shown = rotations.as_ref().map(Rotations::shown);
        let rotating = rotations.is_some();
        let perform = async {
            match rotations {
                Some(rotations) => rotations.perform().await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(perform);
        let mut told = 0;
        let mut live = self.live();
        let mut look = interval(if live.is_some() { LOOK } else { LINE });
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut keys = interval(KEYS);
        keys.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut screen: Option<Screen> = None;
        if live.is_none() {
            // The first tick comes at once, when there is nothing to tell yet.
            look.tick().await;
        }
        loop {
            tokio::select! {
                biased;
                death = self.processes.death() => return Watched::Died(death),
                () = self.signals.next() => return Watched::Enough,
                () = load.finished() => return Watched::Over,
                performed = &mut perform, if rotating => {
                    if live.is_none() {
                        self.tell(&shown, &mut told);
                    }
                    return performed.map_or_else(Watched::Unperformed, |()| Watched::Over);
                }
                _ = look.tick() => {
                    let now = observer.look(plan, load, SystemClock.now()).await;
                    let rotation = shown.as_ref().map(|shown| shown.borrow().clone());
                    let length = self.args.length.filter(|_| !rotating);
                    let now = Screen { length, rotation, ..now };
                    match &mut live {
                        // A terminal that has gone asks for nothing more.
                        Some(live) => if live.draw(&now, &self.note()).is_err() {
                            return Watched::Enough;
                        },
                        // Nor does a reader that has.
                        None => {
                            self.tell(&shown, &mut told);
                            if self.progress.tick(&now).is_err() { return Watched::Enough }
                        }
                    }
                    screen = Some(now);
                }
                _ = keys.tick(), if live.is_some() => {
                    let (Some(live), Some(screen)) = (&mut live, &screen) else { continue };
                    match live.end_asked() {
                        Ok(false) if live.is_stale() => {
                            if live.draw(screen, &self.note()).is_err() { return Watched::Enough }
                        }
                        Ok(false) => {}
                        Ok(true) | Err(_) => return Watched::Enough,
                    }
                }
            }
        }
    }

    /// The rotations that are over and not told yet, and the one under way.
    fn tell(&self, shown: &Option<watch::Receiver<Shown>>, told: &mut usize) {
        let Some(shown) = shown else { return };
        let shown = shown.borrow();
        for line in shown.done.iter().skip(*told) {
            self.progress.say(&format!("  {} {line}", self.progress.paint.green("✓")));
        }
        *told = shown.done.len();
        if !shown.course.is_empty() {
            self.progress.say(&format!("    {}", shown.course.join("\n    ")));
        }
    }

    /// The live view, if standard output is a terminal that can show one.
    fn live(&self) -> Option<Live> {
        if self.args.json || !std::io::stdout().is_terminal() {
            return None;
        }
        Live::open(Look { colours: Paint::stdout().is_on() }).ok()
    }

    fn note(&self) -> String {
        let dir = self.directory.path().display();
        match (self.args.keep, &self.args.dir) {
            (true, _) => format!("q or Ctrl-C stops it all · to attach more: {dir}/env"),
            (false, Some(_)) => format!("q or Ctrl-C stops it all · change {dir}/manifests"),
            (false, None) => format!("q or Ctrl-C stops it all · logs: {dir}/log"),
        }
    }

    fn report(&self, summary: &Summary) -> Result<(), Problem> {
        if !self.args.json {
            self.progress.say(&summary.table(self.progress.paint));
            return Ok(());
        }
        if let Some(unsent) = summary.unsent {
            self.progress.say(&format!("  warning: {unsent}"));
        }
        if !summary.is_well() {
            self.progress.say(summary.problems().trim_end());
        }
        Ok(output::print(&(serde_json::to_string(summary)? + "\n"))?)
    }

    async fn stay(&mut self) -> Result<(), DemoError> {
        let dir = self.directory.path().display();
        self.progress.say(&format!(
            "The load has ended; the mesh runs until Ctrl-C (environments: {dir}/env)"
        ));
        tokio::select! {
            () = self.signals.next() => Ok(()),
            death = self.processes.death() => Err(DemoError::Died(death)),
        }
    }
}

/// The final numbers. What the sidecars count, they tell a moment later: they are asked until all
/// that was answered is counted, or no longer.
async fn settle(
    plan: &Plan,
    load: &Load,
    observer: &Observer,
    length: Duration,
    patience: Duration,
) -> Summary {
    let end = Instant::now() + patience;
    let mut renewals = observer.latest.renewals_since(&observer.baseline);
    loop {
        let scrape = observe::scrape(plan).await.ok();
        let since = |scrape: &Scrape| scrape.renewals_since(&observer.baseline);
        renewals = scrape.as_ref().map_or(renewals, since);
        let edges = scrape.map(|scrape| scrape.edges_since(plan, &observer.baseline));
        let (tally, edges) = (load.final_tally(length), edges.unwrap_or_default());
        let answered = tally.answered.cast_signed();
        let full = !edges.is_empty() && edges.iter().all(|edge| edge.verified >= answered);
        if full || Instant::now() >= end {
            return Summary::of(&tally, &edges, renewals, length);
        }
        sleep(SETTLE_POLL).await;
    }
}

fn length(text: &str) -> Result<Duration, String> {
    let length = parsed(text)?;
    if length.is_zero() {
        return Err(
            "is too short to send anything; leave --for away to run until Ctrl-C".to_owned()
        );
    }
    Ok(length)
}

fn svid_ttl(text: &str) -> Result<Duration, String> {
    let ttl = parsed(text)?;
    if !(SVID_TTL_MIN..=SVID_TTL_MAX).contains(&ttl) {
        return Err(format!(
            "must be from {} to {}: a shorter life leaves no time to renew and retry, and no \
             demo runs for longer",
            duration::show(SVID_TTL_MIN),
            duration::show(SVID_TTL_MAX)
        ));
    }
    if ttl.subsec_nanos() != 0 {
        return Err("must be whole seconds: a certificate knows no smaller time".to_owned());
    }
    Ok(ttl)
}

fn parsed(text: &str) -> Result<Duration, String> {
    duration::parse(text).map_err(|error| error.to_string())
}

const SVID_TTL_MIN: Duration = Duration::from_secs(3);
const SVID_TTL_MAX: Duration = Duration::from_secs(24 * 3600);
const RATE_MAX: i64 = 20_000;
const ATTEMPTS_MAX: u16 = 3;
/// How often the live view looks at the sidecars.
const LOOK: Duration = Duration::from_secs(1);
/// How often there is a line where no live view is.
const LINE: Duration = Duration::from_secs(5);
/// How long a key may wait.
const KEYS: Duration = Duration::from_millis(100);
/// For requests under way when the load ends: each has a deadline of its own before this.
const PATIENCE: Duration = Duration::from_secs(12);
/// They may wait for what has died.
const PATIENCE_AFTER_DEATH: Duration = Duration::from_secs(1);
const SETTLE_DEADLINE: Duration = Duration::from_secs(3);
const SETTLE_POLL: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mesh_that_is_kept_outlives_what_was_to_be_shown_and_nobody_s_patience() {
        assert!(Watched::Over.stays(true), "be it the load or the rotations");
        assert!(!Watched::Over.stays(false));
        assert!(!Watched::Enough.stays(true), "one Ctrl-C stops it all");
    }

    #[test]
    fn lengths_and_lives_that_make_no_sense_are_refused_with_a_reason() {
        assert_eq!(length("60s"), Ok(Duration::from_secs(60)));
        assert!(length("0s").unwrap_err().contains("leave --for away"));
        assert!(length("60").unwrap_err().contains("60s"));
        assert_eq!(svid_ttl("15s"), Ok(Duration::from_secs(15)));
        assert!(svid_ttl("2s").unwrap_err().contains("from 3s to 1d"));
        assert!(svid_ttl("2d").is_err());
        assert!(svid_ttl("3500ms").unwrap_err().contains("whole seconds"));
    }
}
