//! `steadfast issuer request` and `import`: issuers under a trust anchor whose key is elsewhere.
//!
//! Identity makes the issuer's key and posts a certificate request; the anchor's owner signs it. The
//! key of the issuer never leaves identity, that of the anchor never enters the mesh.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use steadfast_api::KeyId;
use steadfast_identity::import;
use steadfast_platform::store::ISSUER_REQUESTS_PREFIX;
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::{AnchorState, IssuerRequest, WantedIssuer};
use tokio::time::Instant;

use crate::commands::anchor::{self, AnchorError};
use crate::commands::anchor_import::{ImportProblem, read};
use crate::mesh::Mesh;
use crate::output::{self, Format};
use crate::problem::Problem;
use crate::trust_domain::{self, TrustDomainError, change_at};

/// Print the certificate request of an issuer, to be signed by the CA of an external anchor
///
/// Identity has made the issuer's key, which stays with it; the request goes to whoever has the
/// anchor's key. The request is printed in PEM, and how to sign it to standard error. Asking again
/// prints the same request until it is answered.
///
/// It may be asked for before the anchor's rotation, which then waits for nobody, and in good time
/// before the issuer of an active external anchor ends: `steadfast trust status` says when.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast issuer request --dir ./mesh > issuer.csr
  steadfast issuer request --dir ./mesh --anchor 3f0c11aa -o json")]
pub(crate) struct RequestArgs {
    #[command(flatten)]
    mesh: Mesh,
    /// Which external anchor, by its id or the beginning of it [default: the one that an issuer is
    /// wanted for, or the only one]
    #[arg(long, value_name = "ID")]
    anchor: Option<String>,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// Take an issuer in that an external anchor's CA has signed
///
/// FILE is its certificate in PEM, with the intermediates between it and the anchor, if there are
/// any; the order does not matter, and the anchor itself may be in it. It must answer a request of
/// `steadfast issuer request`. Everything about it is checked before anything changes, and no
/// workload is given an SVID of it before every replica of identity has loaded and tested it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast issuer import issuer.pem --dir ./mesh
  cat issuer.pem intermediate.pem > chain.pem && steadfast issuer import chain.pem --dir ./mesh")]
pub(crate) struct ImportArgs {
    #[command(flatten)]
    mesh: Mesh,
    /// The issuer's certificate and its intermediates, PEM
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// Why there is no request, or no issuer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IssuerProblem {
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    #[error(transparent)]
    Import(#[from] ImportProblem),
    #[error(
        "this trust domain has no external anchor: the controller signs the issuers of its own by \
         itself. To bring one:  steadfast anchor import FILE"
    )]
    NoExternal,
    #[error("there are {0} external anchors: say which with --anchor ({1})")]
    Several(usize, String),
    #[error(
        "identity has not made a key for request {number} within {} s: is steadfast-identity \
         running, and can it reach the store? Then ask again",
        ANSWER_TIME_MAX.as_secs()
    )]
    Unanswered { number: u64 },
    #[error("request {0} in the store does not parse (written by a newer version?)")]
    Request(u64, #[source] serde_json::Error),
}

/// A request, and how it is answered.
#[derive(Serialize)]
struct Request {
    number: u64,
    anchor: KeyId,
    issuer: KeyId,
    csr: String,
    extensions: String,
    command: String,
}

/// What was imported.
#[derive(Serialize)]
struct Imported {
    issuer: KeyId,
    anchor: KeyId,
    intermediates: usize,
    not_after: String,
}

/// Prints the request.
///
/// # Errors
/// There is no external anchor, or identity does not answer.
pub(crate) async fn request(args: RequestArgs) -> Result<(), Problem> {
    let mesh = &args.mesh;
    let known = trust_domain::read(mesh).await?;
    let anchor = which(&known, args.anchor.as_deref())?;
    let wish = change_at(mesh, |state, revision| {
        let refused = |refused| ImportProblem::Refused { file: anchor.short().into(), refused };
        state.request_issuer(anchor, revision.0).map_err(refused)
    });
    let (_, wish) = wish.await.map_err(IssuerProblem::from)?;
    let posted = answer(mesh, wish).await?;
    let request = Request::of(&known, &posted);
    match args.output {
        Format::Table => {
            eprint!("{}", request.how_to(mesh));
            output::print(&request.csr)?;
        }
        format => format.print(&request, |request| request.csr.clone())?,
    }
    Ok(())
}

/// Imports what the file holds.
///
/// # Errors
/// What is wrong with it; nothing has changed then.
pub(crate) async fn import(args: ImportArgs) -> Result<(), Problem> {
    let (mesh, file) = (&args.mesh, &args.file);
    let pem = read(file).map_err(IssuerProblem::from)?;
    let known = trust_domain::read(mesh).await?;
    let mut requests = Vec::new();
    for wish in &known.wanted_external {
        requests.extend(posted(mesh, *wish).await?);
    }
    let read = import::issuer(&known, &requests, &pem, SystemClock.now());
    let read = read.map_err(|problem| ImportProblem::File { file: file.clone(), problem });
    let (request, issuer) = read.map_err(IssuerProblem::from)?;
    let wish = WantedIssuer { anchor_id: request.anchor_id, number: request.number };
    let added = change_at(mesh, |state, _| {
        let refused = |refused| ImportProblem::Refused { file: file.clone(), refused };
        state.import_issuer(wish, issuer.clone()).map_err(refused)
    });
    added.await.map_err(IssuerProblem::from)?;
    let imported = Imported {
        issuer: issuer.id,
        anchor: issuer.anchor_id,
        intermediates: issuer.chain.len(),
        not_after: issuer.not_after.to_string(),
    };
    let is_active = known.active_anchor().is_some_and(|active| active.id == issuer.anchor_id);
    args.output.print(&imported, |imported| imported.text(is_active, mesh))?;
    Ok(())
}

/// The anchor that is meant: the named one; or the only one that an issuer is wanted for, else the
/// only external one.
fn which(state: &TrustDomainState, named: Option<&str>) -> Result<KeyId, IssuerProblem> {
    if let Some(text) = named {
        return Ok(anchor::find(text, state)?);
    }
    if let [wanted] = state.wanted_external.as_slice() {
        return Ok(wanted.anchor_id);
    }
    let usable = state.anchors.iter().filter(|anchor| {
        anchor.is_external()
            && !matches!(anchor.state, AnchorState::Withdrawn | AnchorState::Retiring)
    });
    let ids: Vec<_> = usable.map(|anchor| anchor.id).collect();
    match ids.as_slice() {
        [] => Err(IssuerProblem::NoExternal),
        [id] => Ok(*id),
        several => {
            let list: Vec<_> = several.iter().map(KeyId::short).collect();
            Err(IssuerProblem::Several(several.len(), list.join(", ")))
        }
    }
}

/// What identity posts for a wish; it gets a moment to make the key.
async fn answer(mesh: &Mesh, wish: WantedIssuer) -> Result<IssuerRequest, IssuerProblem> {
    let deadline = Instant::now() + ANSWER_TIME_MAX;
    loop {
        match posted(mesh, wish).await? {
            Some(request) => return Ok(request),
            None if Instant::now() < deadline => tokio::time::sleep(POLL).await,
            None => return Err(IssuerProblem::Unanswered { number: wish.number }),
        }
    }
}

async fn posted(mesh: &Mesh, wish: WantedIssuer) -> Result<Option<IssuerRequest>, IssuerProblem> {
    let key = format!("{ISSUER_REQUESTS_PREFIX}{}", wish.number);
    let failed = |problem| ImportProblem::from(TrustDomainError::from(problem));
    let entry = mesh.store().await.map_err(failed)?.get(&key).await;
    let entry = entry.map_err(|error| failed(mesh.explain(error)))?;
    let request = entry.map(|entry| serde_json::from_slice(&entry.value)).transpose();
    request.map_err(|error| IssuerProblem::Request(wish.number, error))
}

impl Request {
    fn of(state: &TrustDomainState, posted: &IssuerRequest) -> Self {
        let left = state.anchor(posted.anchor_id).map(|a| a.not_after.since(SystemClock.now()));
        let left = left.unwrap_or_default().as_secs() / DAY_SECS;
        let days = left.saturating_sub(1).clamp(1, DAYS_USUAL);
        Self {
            number: posted.number,
            anchor: posted.anchor_id,
            issuer: posted.key_id,
            csr: output::pem_of("CERTIFICATE REQUEST", &posted.csr),
            extensions: format!(
                "basicConstraints=critical,CA:true,pathlen:0\n\
                 keyUsage=critical,keyCertSign,cRLSign\n\
                 subjectKeyIdentifier=hash\n\
                 authorityKeyIdentifier=keyid\n\
                 subjectAltName=URI:{}\n",
                state.trust_domain.id()
            ),
            command: format!(
                "openssl x509 -req -in issuer.csr -CA root.pem -CAkey root.key -CAcreateserial \
                 -days {days} -sha256 -extfile issuer.ext -out issuer.pem"
            ),
        }
    }

    fn how_to(&self, mesh: &Mesh) -> String {
        let extensions: String =
            self.extensions.lines().map(|line| format!("      {line}\n")).collect();
        format!(
            "Request {} for an issuer under the anchor {}: sign it with that anchor's key, or with an\n\
             intermediate below it. With openssl, where root.pem and root.key are the anchor's:\n\n  \
             1. Write this as issuer.ext:\n\n{extensions}\n  \
             2. {}\n\n  \
             3. steadfast issuer import issuer.pem{mesh}\n\n\
             Any other CA does as well: only the key of the request and these extensions count.\n\n",
            self.number,
            self.anchor.short(),
            self.command,
        )
    }
}

impl Imported {
    fn text(&self, is_active: bool, mesh: &Mesh) -> String {
        let above = match self.intermediates {
            0 => "signed by the anchor itself".to_owned(),
            1 => "with one intermediate in between".to_owned(),
            more => format!("with {more} intermediates in between"),
        };
        let anchor = self.anchor.short();
        let next = match is_active {
            true => format!("steadfast issuer rotate{mesh}     or wait: it is used in time"),
            false => format!("steadfast anchor rotate --anchor {anchor}{mesh}"),
        };
        format!(
            "The issuer {} under the anchor {anchor} is imported, {above}\n  ends {}\n\nNext:\n  {next}\n",
            self.issuer.short(),
            self.not_after
        )
    }
}

const ANSWER_TIME_MAX: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(100);
const DAY_SECS: u64 = 86_400;
/// Long enough not to be a chore, short enough to be done again before it is forgotten.
const DAYS_USUAL: u64 = 90;
