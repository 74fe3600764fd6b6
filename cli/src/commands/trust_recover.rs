//! `steadfast trust recover`: heals a mesh in which nobody can be asked any more, or whose store
//! was put back from a backup.
//!
//! The command only orders it, by one compare-and-swap; steadfast-rotation does it, also when the
//! command is gone. What is wrong and what follows is decided by the pure core
//! (`rotation/protocol/src/recover.rs`).

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use steadfast_api::{KeyId, UnixTime};
use steadfast_identity::authority::SKEW;
use steadfast_platform::store::{FINDINGS_KEY, TRUST_DOMAIN_KEY};
use steadfast_platform::{Revision, Store, StoreError};
use steadfast_process::{Clock as _, ErrorChain, SystemClock, duration};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::Standing;
use steadfast_rotation_protocol::recover::{Ailment, Findings, RecoverRefused};
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, AnchorState};
use tokio::time::{Instant, sleep};

use super::trust::TrustError;
use super::trust_backup::{self, BackupError};
use crate::confirm::agrees;
use crate::controller::{Controller, ControllerArg};
use crate::mesh::Mesh;
use crate::output::Format;
use crate::problem::Problem;

/// Heal a mesh whose certificates have all expired, or whose store was put back from a backup
///
/// It shows what is wrong and what it will do, asks, and waits until everybody holds what is
/// published again. With --from it asks twice: before FILE is put back, and before what follows from
/// it and from what workloads hold. No pod, token or identity is made anew, and no process is
/// restarted; steadfast-rotation must run, for it does the work. A mesh that is well is left as it is.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast trust recover --dir ./mesh --dry-run             what is wrong, and what would be done
  steadfast trust recover --dir ./mesh                       the same, asked for, and done
  steadfast trust recover --dir ./mesh --from backup.json    into a store that has lost everything")]
pub(super) struct RecoverArgs {
    #[command(flatten)]
    mesh: Mesh,
    #[command(flatten)]
    controller: ControllerArg,
    /// Only show it
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Put this backup (of `steadfast trust backup`) into the store first, which must be empty. A
    /// store that has lost its pods, too, makes them anew, each with another UID: identity issues
    /// again at once, but the end waits until the workloads have been restarted, and then for the
    /// pods from before, until no SVID of theirs can be valid: as long as an SVID may live, a day as
    /// a rule. `steadfast anchor exempt` of each of those, by its UID, spares that
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// How long to wait until the mesh has healed; it goes on healing after that
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration::parse)]
    timeout: Duration,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// Why a mesh is not recovered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecoverError {
    #[error(
        "the store holds no trust domain. With a backup of it: steadfast trust recover --from \
         FILE{mesh}\n  For a new mesh: {}",
        mesh.founding()
    )]
    Empty { mesh: Box<Mesh> },
    #[error(
        "nobody has told what the workloads hold within {}: {why}",
        duration::show(FINDINGS_WAIT)
    )]
    NoFindings { why: String },
    #[error(transparent)]
    Refused(#[from] RecoverRefused),
    #[error(
        "not healed within {waited}: {awaited}\n  It goes on by itself if steadfast-rotation and \
         steadfast-identity run; see their /ready",
        waited = duration::show(*waited)
    )]
    Unhealed { waited: Duration, awaited: String },
}

/// What the command says.
#[derive(Serialize)]
struct Report {
    ailment: Option<Ailment>,
    /// What was, or would be, done, in order.
    steps: Vec<String>,
    /// What a person should know before saying yes.
    warnings: Vec<String>,
    ordered: bool,
    healed: bool,
    /// From the order to the last answer, in seconds.
    seconds: Option<u64>,
    /// The bundle in the end.
    seq: u64,
}

pub(super) async fn run(args: RecoverArgs) -> Result<(), Problem> {
    let mesh = &args.mesh;
    let first = mesh.first_get(TRUST_DOMAIN_KEY).await.map_err(TrustError::from)?;
    match (first, &args.from) {
        (Some(entry), Some(_)) => {
            let state: TrustDomainState =
                serde_json::from_slice(&entry.value).map_err(TrustError::from)?;
            let error = BackupError::NotEmpty { seq: state.seq };
            return Err(TrustError::from(error).into());
        }
        (None, None) => {
            return Err(
                TrustError::from(RecoverError::Empty { mesh: Box::new(mesh.clone()) }).into()
            );
        }
        (None, Some(file)) => {
            let (state, others) = trust_backup::read(file)?;
            let (domain, seq) = (&state.trust_domain, state.seq);
            let step = format!("put {} back: {domain} at seq {seq}, halted", file.display());
            let warnings = keys_gone(mesh, &state).await;
            if args.dry_run {
                let ailment = Some(Ailment::Restored { seen_seq: seq });
                let next = "then: find out what workloads hold, show what follows, and ask again"
                    .to_owned();
                let steps = vec![step, next, aftermath(&state)];
                return Report::of(&state, ailment, steps, warnings).print(&args);
            }
            let plan = text(None, std::slice::from_ref(&step), &warnings);
            confirm(&args, &plan, "nothing was changed")?;
            trust_backup::put_back(mesh, &state, others).await?;
            note(&step);
            return recover(&args).await;
        }
        (Some(_), None) => {}
    }
    recover(&args).await
}

/// Recovers what is stored.
async fn recover(args: &RecoverArgs) -> Result<(), Problem> {
    let mesh = &args.mesh;
    // A second time, if somebody else has changed the state meanwhile.
    let (state, ailment, mut report) = loop {
        let (before, revision) = state(mesh).await?;
        let Some(ailment) = before.ailment(SystemClock.now(), SKEW) else {
            let steps = vec![idle_text(&before, SystemClock.now())];
            return Report::of(&before, None, steps, Vec::new()).print(args);
        };
        let (recovered, mut steps, warnings) = plan(args, &before, ailment, revision).await?;
        steps.extend(args.from.is_some().then(|| aftermath(&before)));
        let report = Report::of(&before, Some(ailment), steps, warnings);
        if args.dry_run {
            return report.print(args);
        }
        let unchanged = match args.from {
            Some(_) => {
                "the backup is in the store, halted, and nothing else was changed: `steadfast trust \
                 recover` goes on"
            }
            None => "nothing was changed",
        };
        confirm(args, &text(Some(ailment), &report.steps, &report.warnings), unchanged)?;
        let value = serde_json::to_vec(&recovered).map_err(TrustError::from)?.into();
        let store = mesh.store().await.map_err(TrustError::from)?;
        match store.compare_and_swap(TRUST_DOMAIN_KEY, Some(revision), Some(value)).await {
            Ok(_) => break (recovered, ailment, report),
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(TrustError::from(mesh.explain(error)).into()),
        }
    };
    let ordered = Instant::now();
    report.ordered = true;
    let rotation = state.rotations;
    report.seq = wait(args, rotation, ordered).await?.seq;
    (report.healed, report.ailment) = (true, Some(ailment));
    report.seconds = Some(ordered.elapsed().as_secs());
    report.print(args)
}

/// The state to be written, what it comes to, and what a person should know.
async fn plan(
    args: &RecoverArgs,
    before: &TrustDomainState,
    ailment: Ailment,
    revision: Revision,
) -> Result<(TrustDomainState, Vec<String>, Vec<String>), Problem> {
    let (mesh, mut after, now) = (&args.mesh, before.clone(), SystemClock.now());
    let by = "trust recover".to_owned();
    let (mut steps, mut warnings) = (Vec::new(), keys_gone(mesh, before).await);
    match ailment {
        Ailment::Expired { .. } => {
            let rescued = after.rescue(by, now, SKEW).map_err(RecoverError::from);
            rescued.map_err(TrustError::from)?;
            steps.push(match next_active(&after) {
                Some(id) => format!("make the anchor {} active, at once", id.short()),
                None => "make a fresh anchor (a new key) and make it active, at once".to_owned(),
            });
            steps.push("make an issuer under it: identity issues again".to_owned());
            steps.push(
                "everybody comes back by the mounted bundle and their token; what has expired is \
                 withdrawn"
                    .to_owned(),
            );
        }
        Ailment::Restored { .. } => {
            let store = mesh.store().await.map_err(TrustError::from)?;
            let Some(found) = findings(mesh, &**store, revision).await? else {
                return Err(TrustError::from(unfound(args).await).into());
            };
            after.recover(&found, by, now);
            steps = recovered(before, &after);
            warnings.extend(doubts(before, &found));
        }
    }
    Ok((after, steps, warnings))
}

/// What the controller has found out of the state of this revision: of another, and so of another
/// halt, it may say too little. `None`: nobody has told anything in time.
async fn findings(
    mesh: &Mesh,
    store: &dyn Store,
    revision: Revision,
) -> Result<Option<Findings>, Problem> {
    let started = Instant::now();
    let mut last: Option<Findings> = None;
    loop {
        let entry = store.get(FINDINGS_KEY).await;
        let entry = entry.map_err(|error| TrustError::from(mesh.explain(error)))?;
        let found = entry.map(|entry| serde_json::from_slice::<Findings>(&entry.value));
        let found = found.transpose().map_err(TrustError::from)?;
        if let Some(found) = found.filter(|found| found.revision == revision.0) {
            if found.silent.is_empty() && found.told > 0 {
                return Ok(Some(found));
            }
            last = Some(found);
        }
        if started.elapsed() > FINDINGS_WAIT {
            return Ok(last.filter(|found| found.told > 0));
        }
        sleep(POLL).await;
    }
}

/// Why nothing was found out: whoever asks may not run, or may be kept from its work.
async fn unfound(args: &RecoverArgs) -> RecoverError {
    let asked = Controller::find(&args.mesh, &args.controller).await;
    RecoverError::NoFindings {
        why: match asked {
            Ok((_, Standing { trouble: Some(trouble), .. })) => trouble,
            Ok(_) => "steadfast-rotation asks them; does it reach the identity service?".to_owned(),
            Err(error) => ErrorChain(&error).to_string(),
        },
    }
}

/// What changes, in words.
fn recovered(before: &TrustDomainState, after: &TrustDomainState) -> Vec<String> {
    let mut steps = vec![format!("publish seq {}, above every one that was seen", after.seq)];
    for anchor in &after.anchors {
        let was = before.anchor(anchor.id).map(|anchor| anchor.state);
        let id = anchor.id.short();
        match (was, anchor.state) {
            (Some(was), AnchorState::Withdrawn) if was != AnchorState::Withdrawn => steps.push(
                format!("withdraw the anchor {id} again: workloads know that it was withdrawn"),
            ),
            (Some(AnchorState::Retiring), AnchorState::Retiring) => {}
            (Some(was), AnchorState::Retiring) if was.published() => steps.push(format!(
                "drain the anchor {id}, whose key is gone: it was withdrawn meanwhile, or can sign \
                 nothing more"
            )),
            (_, AnchorState::Retiring) => steps
                .push(format!("publish the anchor {id} again, until no SVID is under it any more")),
            _ => {}
        }
    }
    for denied in &after.denied_issuers {
        if !before.denies(denied.id) {
            steps.push(format!("deny the issuer {} again", denied.id.short()));
        }
    }
    match (after.active_anchor(), next_active(after)) {
        (Some(_), _) => {}
        (None, Some(id)) => steps.push(format!("make the anchor {} active", id.short())),
        (None, None) => steps.push("stage a fresh anchor, and make it active".to_owned()),
    }
    steps.push("issue again, and wait until everybody holds what is published".to_owned());
    steps
}

/// When it ends if the store has lost the pods together with the trust domain.
fn aftermath(state: &TrustDomainState) -> String {
    let lives = state.anchors.iter().map(|anchor| anchor.svid_life_max);
    format!(
        "if the store has made its pods anew, restart the workloads; those that ran before are \
         waited for until no SVID of theirs can be valid, up to {} later, or until each is exempted \
         by its UID (`steadfast anchor exempt`)",
        duration::show(lives.max().unwrap_or_default() + SKEW)
    )
}

/// What the findings leave open.
fn doubts(before: &TrustDomainState, found: &Findings) -> Vec<String> {
    let mut doubts = Vec::new();
    if !found.silent.is_empty() {
        doubts.push(format!(
            "{} of {} have not told what they hold: {}",
            found.silent.len(),
            found.silent.len() + found.told,
            found.silent.join(", ")
        ));
    }
    for lost in found.forgotten(before).filter(|held| held.record.is_none()) {
        doubts.push(format!(
            "{} workloads use the anchor {}, which the store has forgotten and whose key is not in \
             keys/anchors: it is not taken on their word, so SVIDs under it will be refused. Put \
             its key back first, if there is one",
            lost.by,
            lost.id.short()
        ));
    }
    for held in &found.tombstones {
        if before.published().any(|anchor| anchor.id == held.id) && held.by < found.told {
            let (by, told) = (held.by, found.told);
            let id = held.id.short();
            doubts.push(format!(
                "only {by} of {told} workloads say that the anchor {id} was withdrawn"
            ));
        }
    }
    doubts
}

/// Anchors that could sign, if their key were there.
async fn keys_gone(mesh: &Mesh, state: &TrustDomainState) -> Vec<String> {
    let Ok(keys) = mesh.anchor_keys().await else {
        return vec!["the keys of anchors cannot be read from here".to_owned()];
    };
    let mut gone = Vec::new();
    let here = |anchor: &&AnchorRecord| keys.place_of(anchor.id) == anchor.key_ref;
    for anchor in state.published().filter(here) {
        if matches!(keys.exists(anchor.id).await, Ok(false)) {
            gone.push(format!(
                "the key of the anchor {} is not there ({}): put it back if it is to sign",
                anchor.id.short(),
                anchor.key_ref
            ));
        }
    }
    gone
}

fn next_active(state: &TrustDomainState) -> Option<KeyId> {
    use steadfast_rotation_protocol::rotation::{Phase, Preparing};
    match state.rotation.as_ref().map(|rotation| &rotation.phase) {
        Some(Phase::Preparing(Preparing { to, .. })) => Some(*to),
        _ => None,
    }
}

/// Waits until the rotation that was ordered is over: its census shows that everybody holds what is
/// published, and by then somebody signs.
async fn wait(
    args: &RecoverArgs,
    number: u64,
    ordered: Instant,
) -> Result<TrustDomainState, Problem> {
    let mut told = None;
    loop {
        let read = state(&args.mesh).await;
        let awaited = match &read {
            Ok((state, _)) if is_over(state, number) => return Ok(read?.0),
            Ok((state, _)) => state.rotation.as_ref().map(|rotation| rotation.phase.name()),
            // The store may be restarted meanwhile.
            Err(_) => None,
        };
        if awaited != told {
            if let Some(phase) = awaited {
                note(&format!("{:>4}s  {}", ordered.elapsed().as_secs(), phase_text(phase)));
            }
            told = awaited;
        }
        if ordered.elapsed() > args.timeout {
            let awaited = match read {
                Ok(_) => told.map_or("the rotation of the recovery", phase_text).to_owned(),
                Err(error) => format!("{error:?}"),
            };
            let error = RecoverError::Unhealed { waited: args.timeout, awaited };
            return Err(TrustError::from(error).into());
        }
        sleep(POLL).await;
    }
}

fn is_over(state: &TrustDomainState, number: u64) -> bool {
    let ended = state.past.iter().any(|past| past.number == number);
    ended && state.halted.is_none()
}

fn phase_text(phase: steadfast_rotation_protocol::rotation::PhaseName) -> &'static str {
    use steadfast_rotation_protocol::rotation::PhaseName as P;
    match phase {
        P::Generating => "a fresh anchor is being made",
        P::Staged => "everybody is to hold the anchors",
        P::Preparing => "an issuer is being made",
        P::Canary => "some workloads go first",
        P::Activated => "identity issues again",
        P::Draining => "everybody renews",
        P::Denied | P::Withdrawn => "everybody is to hold what is published, and nothing else",
    }
}

async fn state(mesh: &Mesh) -> Result<(TrustDomainState, Revision), Problem> {
    let entry = mesh.store().await.map_err(TrustError::from)?.get(TRUST_DOMAIN_KEY).await;
    let entry = entry.map_err(|error| TrustError::from(mesh.explain(error)))?;
    let entry = entry
        .ok_or_else(|| TrustError::from(RecoverError::Empty { mesh: Box::new(mesh.clone()) }))?;
    let state = serde_json::from_slice(&entry.value).map_err(TrustError::from)?;
    Ok((state, entry.revision))
}

fn idle_text(state: &TrustDomainState, now: UnixTime) -> String {
    match state.active_issuer() {
        Some(issuer) if issuer.not_after <= now => format!(
            "nothing to recover: the issuer ended at {}, and steadfast-rotation makes the next by \
             itself (does it run?)",
            issuer.not_after
        ),
        _ => "nothing to recover: the trust domain is neither halted nor expired".to_owned(),
    }
}

/// Asks; `unchanged` is what a no leaves.
fn confirm(args: &RecoverArgs, plan: &str, unchanged: &str) -> Result<(), Problem> {
    match agrees(&format!("{plan}\nDo it?"), args.yes, args.output)? {
        true => Ok(()),
        false => Err(Problem::found(unchanged)),
    }
}

/// Progress is for people; programs read standard output.
fn note(text: &str) {
    // Nobody is left to tell if this fails.
    let _ = writeln!(io::stderr(), "{text}");
}

fn text(ailment: Option<Ailment>, steps: &[String], warnings: &[String]) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    match ailment {
        Some(Ailment::Expired { anchor_ended, svids_ended }) => {
            let _ = writeln!(
                text,
                "Everything has expired: the active anchor ended at {anchor_ended}, the last SVID \
                 at {svids_ended}"
            );
        }
        Some(Ailment::Restored { seen_seq }) => {
            let _ = writeln!(
                text,
                "The store was put back: seq {seen_seq} was published before, and nothing is issued"
            );
        }
        None => {}
    }
    for (index, step) in steps.iter().enumerate() {
        let _ = writeln!(text, "  {}. {step}", index + 1);
    }
    for warning in warnings {
        let _ = writeln!(text, "  warning: {warning}");
    }
    text
}

impl Report {
    fn of(
        state: &TrustDomainState,
        ailment: Option<Ailment>,
        steps: Vec<String>,
        warnings: Vec<String>,
    ) -> Self {
        let seq = state.seq;
        Self { ailment, steps, warnings, ordered: false, healed: false, seconds: None, seq }
    }

    fn print(&self, args: &RecoverArgs) -> Result<(), Problem> {
        Ok(args.output.print(self, Self::table)?)
    }

    fn table(&self) -> String {
        if self.ailment.is_none() {
            return self.steps.iter().map(|step| format!("{step}\n")).collect();
        }
        let mut text = text(self.ailment, &self.steps, &self.warnings);
        // Writing to a String cannot fail.
        let _ = match (self.healed, self.seconds) {
            (true, Some(seconds)) => writeln!(
                text,
                "Healed after {seconds} s: identity issues, and everybody holds the bundle of seq {}",
                self.seq
            ),
            _ => writeln!(text, "Nothing was changed."),
        };
        text
    }
}

/// The controller asks every few seconds; who has not told by then is named.
const FINDINGS_WAIT: Duration = Duration::from_secs(45);
const POLL: Duration = Duration::from_millis(200);

#[cfg(test)]
mod tests {
    use steadfast_platform::standalone::{Directory, Engine};
    use steadfast_process::Drain;

    use super::*;

    #[tokio::test]
    async fn what_was_found_out_of_another_state_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let drain = Drain::new();
        let (engine, writer) = Engine::open(&Directory::new(dir.path()), drain).unwrap();
        let mesh = Mesh::standalone(dir.path());
        let write = async |told, revision, expected| {
            let found = Findings { told, revision, ..Findings::default() };
            let value = serde_json::to_vec(&found).unwrap().into();
            engine.compare_and_swap(FINDINGS_KEY, expected, Some(value)).await.unwrap()
        };
        let told = async {
            let before = write(7, 8, None).await;
            let found = findings(&mesh, &engine, Revision(9));
            tokio::join!(found, write(2, 9, Some(before))).0.unwrap().unwrap().told
        };
        tokio::select! {
            told = told => assert_eq!(told, 2),
            ended = writer => panic!("{ended:?}"),
        }
    }

    #[test]
    fn a_backup_s_own_seq_is_not_told_as_what_workloads_have_seen() {
        let ailment = Some(Ailment::Restored { seen_seq: 4 });
        let text = text(ailment, &[aftermath(&founded())], &[]);
        assert!(text.contains("seq 4 was published before"), "{text}");
        for words in ["restart the workloads", "until no SVID of theirs can be valid, up to 1d"] {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
    }

    fn founded() -> TrustDomainState {
        let now = UnixTime::from_secs(1_800_000_000);
        steadfast_identity::authority::found(&"m".parse().unwrap(), now).unwrap().state
    }
}
