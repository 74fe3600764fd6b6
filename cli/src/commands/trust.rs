//! `steadfast trust`: the anchors and the issuer of a mesh.
//!
//! `init` founds a trust domain, once; `status`, `bundle` and `history` show what the store holds.
//! No key is read here after it was made.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde::Serialize;
use steadfast_api::{KeyId, TrustDomain, UnixTime};
use steadfast_process::{Clock as _, SystemClock, duration};
use steadfast_rotation_protocol::TrustDomainState;

use crate::mesh::{Mesh, StoreProblem};
use crate::output::{self, Format, Paint, table};
use crate::problem::Problem;
use crate::trust_domain::{self, TrustDomainError};

use super::{trust_backup, trust_recover};

mod history;
pub(crate) mod init;
mod replay;

/// Make and look at the trust of a mesh: anchors, issuers, the bundle
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Init(InitArgs),
    Status(StatusArgs),
    Bundle(BundleArgs),
    History(history::Args),
    Backup(trust_backup::BackupArgs),
    Recover(trust_recover::RecoverArgs),
    Replay(replay::Args),
}

/// Make the trust anchors and the first issuer of a new mesh
///
/// Two anchors are made (one signs, the other stands by for the day the first must go) and an
/// issuer under the first. Their keys become files that only their owner may read, in DIR/keys.
/// What is there is never overwritten: a second call says what exists, and finishes a first one
/// that was interrupted.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast-store --dir ./mesh &
  steadfast trust init --dir ./mesh
  steadfast trust init --dir ./mesh --trust-domain prod.example.org")]
struct InitArgs {
    /// The state directory of the mesh, as steadfast-store was given it. On Kubernetes the control
    /// plane makes its own anchors when it is installed
    #[arg(long, value_name = "DIR", env = "STEADFAST_DIR")]
    dir: PathBuf,
    /// The name of the trust domain: lower-case letters, digits, dots, dashes. It cannot be
    /// changed later [default: cluster.local]
    #[arg(long, value_name = "NAME")]
    trust_domain: Option<TrustDomain>,
    /// How long the identity service acts on what the store has said last: 3s to 15s. Each phase
    /// of a rotation lasts at least as long; without the store nothing is issued after it. It
    /// cannot be changed later
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = init::read_lease)]
    read_lease: std::time::Duration,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// Show the anchors and issuers, and how long each has left
#[derive(Debug, clap::Args)]
struct StatusArgs {
    #[command(flatten)]
    mesh: Mesh,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// Print the trust bundle: what a workload must hold to know its peers
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast trust bundle --dir ./mesh                    SPIFFE's form (a JWK set)
  steadfast trust bundle --dir ./mesh -o pem > ca.pem    for openssl, curl and others")]
struct BundleArgs {
    #[command(flatten)]
    mesh: Mesh,
    /// The form of the bundle
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: BundleForm,
    /// The same as --output pem
    #[arg(long, conflicts_with = "output")]
    pem: bool,
}

/// The form of a trust bundle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum BundleForm {
    /// SPIFFE's: a JWK set.
    #[default]
    Json,
    /// The anchors' certificates, one after the other.
    Pem,
}

/// Why the trust of a mesh cannot be made or shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrustError {
    #[error("the stored state of the trust domain makes no bundle")]
    Bundle(#[from] steadfast_api::bundle::BundleError),
    #[error(transparent)]
    Init(#[from] init::InitError),
    #[error(transparent)]
    Backup(#[from] trust_backup::BackupError),
    #[error(transparent)]
    Recover(#[from] trust_recover::RecoverError),
    #[error("what is stored, or was backed up, is not ours (written by a newer version?)")]
    State(#[from] serde_json::Error),
    #[error(transparent)]
    Store(#[from] StoreProblem),
    #[error(transparent)]
    TrustDomain(#[from] TrustDomainError),
}

pub(super) async fn run(args: Args) -> Result<(), Problem> {
    match args.command {
        Command::Init(args) => {
            let outcome = init::run(&args.dir, args.trust_domain.as_ref(), args.read_lease).await;
            let outcome = outcome.map_err(TrustError::from)?;
            args.output.print(&outcome.view(), |_| outcome.to_string())?;
        }
        Command::Status(args) => {
            let state = trust_domain::read(&args.mesh).await?;
            let status = Status::of(&state, SystemClock.now());
            args.output.print(&status, |status| status.table(Paint::stdout()))?;
        }
        Command::Bundle(args) => {
            let state = trust_domain::read(&args.mesh).await?;
            let bundle = state.bundle().map_err(TrustError::from)?;
            let ders = bundle.anchors().iter().map(|anchor| anchor.der());
            match args.output {
                BundleForm::Json if !args.pem => output::print(&(bundle.to_jwks() + "\n"))?,
                _ => output::print(&ders.map(output::pem).collect::<String>())?,
            }
        }
        Command::Backup(args) => trust_backup::run(&args).await?,
        Command::Recover(args) => trust_recover::run(args).await?,
        Command::History(args) => history::run(&args).await?,
        Command::Replay(args) => replay::run(&args)?,
    }
    Ok(())
}

/// The trust of a mesh at one moment.
#[derive(Serialize)]
struct Status {
    trust_domain: String,
    bundle_sequence: u64,
    /// What goes on, or what is wrong, in lines.
    notes: Vec<String>,
    authorities: Vec<AuthorityStatus>,
}

#[derive(Serialize)]
struct AuthorityStatus {
    kind: &'static str,
    id: String,
    state: String,
    /// Of an anchor: whether its key is elsewhere, so that persons have its issuers signed.
    external: bool,
    /// Of an external anchor: whether an issuer under it waits to be signed.
    awaits_signature: bool,
    signed_by: Option<String>,
    not_after: String,
    remaining_s: u64,
}

impl Status {
    fn of(state: &TrustDomainState, now: UnixTime) -> Self {
        let anchors = state.anchors.iter().map(|anchor| {
            let parsed = steadfast_api::TrustAnchor::parse(&anchor.der).ok();
            let not_after = parsed.as_ref().map(steadfast_api::TrustAnchor::not_after);
            AuthorityStatus {
                kind: "anchor",
                id: anchor.id.to_string(),
                state: anchor.state.label().to_owned(),
                external: anchor.is_external(),
                awaits_signature: awaiting(state).any(|id| id == anchor.id),
                signed_by: None,
                not_after: not_after.map_or_else(|| "unreadable".to_owned(), |t| t.to_string()),
                remaining_s: not_after.map_or(0, |t| t.since(now).as_secs()),
            }
        });
        let issuers = state.issuers.iter().map(|issuer| AuthorityStatus {
            kind: "issuer",
            id: issuer.id.to_string(),
            state: super::issuer::role(state, issuer.id).to_owned(),
            external: false,
            awaits_signature: false,
            signed_by: Some(issuer.anchor_id.to_string()),
            not_after: issuer.not_after.to_string(),
            remaining_s: issuer.not_after.since(now).as_secs(),
        });
        Self {
            trust_domain: state.trust_domain.to_string(),
            bundle_sequence: state.seq,
            notes: notes(state, now),
            authorities: anchors.chain(issuers).collect(),
        }
    }

    fn table(&self, paint: Paint) -> String {
        let short = |id: &str| id.get(..8).unwrap_or(id).to_owned();
        let rows: Vec<_> = self
            .authorities
            .iter()
            .map(|authority| {
                let left = std::time::Duration::from_secs(authority.remaining_s);
                [
                    authority.kind.to_owned(),
                    short(&authority.id),
                    match authority.external {
                        true => format!("{}, external", authority.state),
                        false => authority.state.clone(),
                    },
                    authority.signed_by.as_deref().map_or_else(|| "itself".to_owned(), short),
                    authority.not_after.clone(),
                    if left.is_zero() { "expired".to_owned() } else { duration::show(left) },
                ]
            })
            .collect();
        format!(
            "{} {}, bundle seq {}\n\n{}",
            paint.bold("trust domain"),
            self.trust_domain,
            self.bundle_sequence,
            table(["KIND", "ID", "STATE", "SIGNED BY", "ENDS", "LEFT"], &rows)
        ) + &self.notes.iter().map(|note| format!("\n{note}\n")).collect::<String>()
    }
}

fn notes(state: &TrustDomainState, now: UnixTime) -> Vec<String> {
    let expired = state.published().all(|anchor| anchor.not_after <= now).then(|| {
        "every anchor that workloads trust has ended, and nothing is issued any more: `steadfast \
         trust recover` heals the mesh, and no pod is made anew"
            .to_owned()
    });
    let halted = state.halted.map(crate::rotation::waiting::halted);
    let rotation = state.rotation.as_ref().map(|rotation| {
        format!("rotation {} is under way: `steadfast anchor status` shows it", rotation.number)
    });
    let tainted = state.anchors.iter().filter_map(|anchor| {
        let by = &anchor.taint.as_ref()?.by;
        Some(format!("the key of anchor {} is in other hands, says {by}", anchor.id.short()))
    });
    let unsigned = awaiting(state).map(|anchor| {
        let id = anchor.short();
        format!(
            "an issuer under the external anchor {id} waits to be signed by its CA: `steadfast issuer \
             request --anchor {id}`, then `steadfast issuer import FILE`"
        )
    });
    expired.into_iter().chain(halted).chain(rotation).chain(tainted).chain(unsigned).collect()
}

/// The external anchors under which an issuer is wanted that nobody has signed yet.
fn awaiting(state: &TrustDomainState) -> impl Iterator<Item = KeyId> {
    state.wanted_external.iter().map(|wanted| wanted.anchor_id)
}

#[cfg(test)]
mod tests {
    use steadfast_rotation_protocol::trust_domain::{AnchorState, EXTERNAL};

    use super::*;

    #[test]
    fn the_status_names_every_authority_and_what_it_has_left() {
        let now = UnixTime::from_secs(1_800_000_000);
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let founding = steadfast_identity::authority::found(&domain, now).unwrap();
        let text = Status::of(&founding.state, now).table(Paint::plain());
        for id in [&founding.active.id, &founding.standby.id, &founding.issuer.id] {
            assert!(text.contains(&id.short()), "{text}");
        }
        for word in ["active", "standby", "cluster.local", "bundle seq 1", "30d"] {
            assert!(text.contains(word), "{word} is not in\n{text}");
        }
        let late = Status::of(&founding.state, UnixTime::from_secs(2_800_000_000));
        let late = late.table(Paint::plain());
        assert!(late.contains("expired") && late.contains("steadfast trust recover"), "{late}");
    }

    #[test]
    fn an_external_anchor_is_shown_as_that_and_with_the_signature_that_it_awaits() {
        let now = UnixTime::from_secs(1_800_000_000);
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let mut state = steadfast_identity::authority::found(&domain, now).unwrap().state;
        let before = Status::of(&state, now).table(Paint::plain());
        assert!(!before.contains("external") && !before.contains("signed by its CA"), "{before}");
        let standby = state.in_state(AnchorState::Standby).next().unwrap().id;
        for anchor in state.anchors.iter_mut().filter(|anchor| anchor.id == standby) {
            anchor.key_ref = EXTERNAL.to_owned();
        }
        state.request_issuer(standby, 7).unwrap();
        let status = Status::of(&state, now);
        let text = status.table(Paint::plain());
        let id = standby.short();
        for words in ["standby, external", &format!("issuer request --anchor {id}")] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
        let json = serde_json::to_value(&status).unwrap();
        let said = |authority: &serde_json::Value| {
            let words = [&authority["external"], &authority["awaits_signature"]];
            (authority["id"] == standby.to_string(), words.map(|word| word.as_bool().unwrap()))
        };
        let said: Vec<_> = json["authorities"].as_array().unwrap().iter().map(said).collect();
        assert_eq!(said, [(false, [false; 2]), (true, [true; 2]), (false, [false; 2])]);
    }
}
