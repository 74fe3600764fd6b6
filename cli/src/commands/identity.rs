//! `steadfast identity`: who a workload is, until when, and by whose word.
//!
//! The sidecar itself is asked, over its admin port: what it holds is what its peers see. Where
//! that port is, the workload's Pod says.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use http::StatusCode;
use serde::Serialize;
use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, SystemClock, duration};
use x509_parser::prelude::*;

use crate::admin::{self, AdminError, IdentityStatus, Port};
use crate::mesh::{ADMIN_PORT_ANNOTATION, KnownPod, Mesh, StoreProblem};
use crate::output::{self, Format, Paint};
use crate::problem::Problem;
use crate::suggest::nearest;

/// Show the identity of a workload: chain, names, lifetimes, next renewal, trust anchor
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("where").required(true).args(["workload", "admin"]),
    after_help = "\
Examples:
  steadfast identity demo/web-0 --dir ./mesh
  steadfast identity web-0 --dir ./mesh -o json
  steadfast identity --admin 127.0.0.1:4191
  steadfast identity web-0 --dir ./mesh --pem | openssl x509 -noout -text"
)]
pub(crate) struct Args {
    /// NAMESPACE/POD, or POD alone where no other namespace has one of that name
    workload: Option<String>,
    #[command(flatten)]
    mesh: Mesh,
    /// Ask this admin port, whoever's it is
    #[arg(long, value_name = "ADDR", conflicts_with = "workload")]
    admin: Option<SocketAddr>,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
    /// Print the chain in PEM and nothing else: the SVID first, then its issuer
    #[arg(long, conflicts_with = "output")]
    pem: bool,
}

/// Why the identity of a workload is not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error(transparent)]
    Admin(#[from] AdminError),
    #[error("{workload:?} is in several namespaces; write one of: {}", candidates.join(", "))]
    Ambiguous { workload: String, candidates: Vec<String> },
    #[error(
        "the Pod {0} does not say where its admin port is: on Kubernetes it has no sidecar, and \
         standalone it needs the annotation {ADMIN_PORT_ANNOTATION} and status.podIP (or ask it \
         with --admin)"
    )]
    NoAdminPort(String),
    #[error(
        "the sidecar of {pod} does not answer at {addr}, where its Pod says that its admin port \
         is; does it run?"
    )]
    Silent {
        pod: String,
        addr: Port,
        #[source]
        source: Box<AdminError>,
    },
    #[error(transparent)]
    Store(#[from] StoreProblem),
    #[error("{pod} does not tell its identity: it is no sidecar (its admin port is {addr})")]
    Untold { pod: String, addr: Port },
    #[error("{workload:?} is no workload of this mesh; {hint}")]
    Unknown { workload: String, hint: String },
}

pub(super) async fn run(args: Args) -> Result<(), Problem> {
    let answer = ask(&args).await?;
    if args.pem {
        return Ok(output::print(&answer.status.chain_pem)?);
    }
    let view = View::of(&answer.name, &answer.status, SystemClock.now());
    Ok(args.output.print(&view, |view| view.table(Paint::stdout()))?)
}

struct Answer {
    name: String,
    status: IdentityStatus,
}

async fn ask(args: &Args) -> Result<Answer, IdentityError> {
    match (&args.workload, args.admin) {
        (Some(workload), None) => {
            let pod = find(workload, &args.mesh.pods().await?)?;
            let addr = pod.admin.ok_or_else(|| IdentityError::NoAdminPort(pod.name.clone()))?;
            let status = admin::identity(&addr).await.map_err(|source| match source {
                AdminError::Status { status: StatusCode::NOT_FOUND, .. } => {
                    IdentityError::Untold { pod: pod.name.clone(), addr }
                }
                AdminError::Silent { .. } => {
                    IdentityError::Silent { pod: pod.name.clone(), addr, source: Box::new(source) }
                }
                other => other.into(),
            })?;
            Ok(Answer { name: pod.name, status })
        }
        (_, Some(addr)) => {
            let addr = Port::Addr(addr);
            Ok(Answer { name: addr.to_string(), status: admin::identity(&addr).await? })
        }
        // clap lets no other combination through.
        (None, None) => {
            Err(IdentityError::Unknown { workload: String::new(), hint: HINT.to_owned() })
        }
    }
}

fn find(workload: &str, pods: &[KnownPod]) -> Result<KnownPod, IdentityError> {
    let is_it = |pod: &&KnownPod| {
        pod.name == workload || pod.name.split_once('/').is_some_and(|(_, name)| name == workload)
    };
    match pods.iter().filter(is_it).collect::<Vec<_>>().as_slice() {
        [] => {
            let names = pods.iter().map(|pod| pod.name.as_str());
            let hint = match nearest(workload, names.clone()).first() {
                Some(near) if pods.len() > LISTED_MAX => format!("did you mean {near}?"),
                _ if pods.is_empty() => "it has none yet: no Pod in its manifests".to_owned(),
                _ => {
                    let listed: Vec<_> = names.take(LISTED_MAX).collect();
                    let more = pods.len() - listed.len();
                    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                    format!("it has: {}{more}", listed.join(", "))
                }
            };
            Err(IdentityError::Unknown { workload: workload.to_owned(), hint })
        }
        [pod] => Ok((*pod).clone()),
        several => Err(IdentityError::Ambiguous {
            workload: workload.to_owned(),
            candidates: several.iter().map(|pod| pod.name.clone()).collect(),
        }),
    }
}

/// What is shown, in both forms.
#[derive(Serialize)]
struct View {
    workload: String,
    #[serde(skip)]
    now: UnixTime,
    /// The certificates of the chain, the SVID first.
    chain: Vec<Certificate>,
    #[serde(flatten)]
    status: IdentityStatus,
}

/// One certificate of the chain, as it says of itself.
#[derive(Serialize)]
struct Certificate {
    subject: String,
    serial: String,
    sans: Vec<String>,
    not_before: String,
    not_after: String,
}

impl View {
    fn of(workload: &str, status: &IdentityStatus, now: UnixTime) -> Self {
        let chain = Pem::iter_from_buffer(status.chain_pem.as_bytes())
            .filter_map(Result::ok)
            .filter_map(|pem| Certificate::of(&pem.contents))
            .collect();
        Self { workload: workload.to_owned(), now, chain, status: status.clone() }
    }

    fn table(&self, paint: Paint) -> String {
        let status = &self.status;
        let mut text = format!("{}\n", paint.bold(&self.workload));
        let mut row = |name: &str, value: &str| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {}  {value}", paint.dim(&format!("{name:<12}")));
        };
        match &status.spiffe_id {
            Some(id) => row("SPIFFE ID", id.as_str()),
            None => row("SPIFFE ID", &paint.red("none yet: no SVID was ever issued to it")),
        }
        if let Some(svid) = self.chain.first() {
            svid.sans.iter().filter(|san| san.starts_with("DNS:")).for_each(|san| {
                row("DNS name", san.trim_start_matches("DNS:"));
            });
            row("serial", &svid.serial);
        }
        self.lifetimes(&mut row, paint);
        row("renewals", &format!("{} ({} failed)", status.renewals, status.failures));
        if let Some(why) = &status.last_failure {
            row("last failure", &paint.red(why));
        }
        let key = |id: Option<steadfast_api::KeyId>| {
            id.map_or_else(|| "unknown".to_owned(), |id| id.to_string())
        };
        row("issuer", &key(status.issuer));
        row("trust anchor", &key(status.anchor));
        let anchors: Vec<_> = status.bundle_anchors.iter().map(|id| id.short()).collect();
        let seq = status.bundle_seq.map_or_else(|| "none".to_owned(), |seq| seq.to_string());
        row("bundle", &format!("seq {seq}, anchors {}", anchors.join(" ")));
        if let Some(offset) = status.clock_offset_ms {
            row("clock", &format!("{offset} ms off the identity service's"));
        }
        for (index, certificate) in self.chain.iter().enumerate() {
            let what = if index == 0 { "SVID" } else { "issued by" };
            row(what, &format!("{}, until {}", certificate.subject, certificate.not_after));
        }
        text
    }

    fn lifetimes(&self, row: &mut impl FnMut(&str, &str), paint: Paint) {
        let (status, now) = (&self.status, self.now);
        if let Some(issued_at) = status.issued_at {
            row("issued", &format!("{issued_at}, {} ago", duration::show(now.since(issued_at))));
        }
        if let Some(end) = status.not_after {
            let left = end.since(now);
            let left = if left.is_zero() {
                paint.red(&format!("EXPIRED {} ago", duration::show(now.since(end))))
            } else {
                format!("in {}", duration::show(left))
            };
            row("ends", &format!("{end}, {left}"));
        }
        let next = match status.next_renewal {
            Some(at) if at.since(now) > Duration::ZERO => {
                format!("{at}, in {}", duration::show(at.since(now)))
            }
            _ => "under way".to_owned(),
        };
        row("next renewal", &next);
    }
}

impl Certificate {
    fn of(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let names = certificate.subject_alternative_name().ok().flatten();
        let names = names.iter().flat_map(|extension| &extension.value.general_names);
        let sans = names.filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(format!("DNS:{name}")),
            GeneralName::URI(uri) => Some(format!("URI:{uri}")),
            _ => None,
        });
        let time = |time: ASN1Time| UnixTime::from_secs(time.timestamp()).to_string();
        let subject = certificate.subject().to_string();
        Some(Self {
            subject: if subject.is_empty() { "(no subject)".to_owned() } else { subject },
            serial: certificate.raw_serial_as_string().replace(':', ""),
            sans: sans.collect(),
            not_before: time(certificate.validity().not_before),
            not_after: time(certificate.validity().not_after),
        })
    }
}

const HINT: &str = "name a workload, or its admin port with --admin";
const LISTED_MAX: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, port: u16) -> KnownPod {
        KnownPod {
            name: name.to_owned(),
            admin: Some(SocketAddr::from(([127, 0, 0, 1], port)).into()),
            account: None,
        }
    }

    #[test]
    fn a_workload_is_found_by_its_full_name_or_by_a_pod_name_that_is_unique() {
        let pods = [pod("demo/web-0", 1), pod("demo/api-0", 2), pod("prod/web-0", 3)];
        assert_eq!(find("prod/web-0", &pods).unwrap().name, "prod/web-0");
        assert_eq!(find("api-0", &pods).unwrap().name, "demo/api-0");
        let error = find("web-0", &pods).unwrap_err().to_string();
        assert!(error.contains("demo/web-0, prod/web-0"), "{error}");
    }

    #[test]
    fn an_unknown_workload_is_answered_with_the_known_ones() {
        let error = find("db", &[pod("demo/web-0", 1)]).unwrap_err().to_string();
        assert_eq!(error, "\"db\" is no workload of this mesh; it has: demo/web-0");
        let many: Vec<_> = (0..50).map(|n| pod(&format!("demo/web-{n}"), 1)).collect();
        let error = find("demo/web-99", &many).unwrap_err().to_string();
        assert!(error.contains("did you mean demo/web-"), "{error}");
        assert!(find("x", &[]).unwrap_err().to_string().contains("no Pod"));
    }

    #[test]
    fn the_table_shows_lifetimes_the_next_renewal_and_what_failed() {
        let now = UnixTime::from_secs(1_800_000_000);
        let status = IdentityStatus {
            spiffe_id: "spiffe://cluster.local/ns/demo/sa/web".parse().ok(),
            issued_at: Some(now - Duration::from_secs(60)),
            not_after: Some(now + Duration::from_secs(3600)),
            next_renewal: Some(now + Duration::from_secs(1800)),
            renewals: 4,
            failures: 1,
            last_failure: Some("no route".to_owned()),
            bundle_seq: Some(7),
            ..IdentityStatus::default()
        };
        let text = View::of("demo/web-0", &status, now).table(Paint::plain());
        for word in
            ["sa/web", "1m00s ago", "in 1h00m", "in 30m00s", "4 (1 failed)", "no route", "seq 7"]
        {
            assert!(text.contains(word), "{word} is not in\n{text}");
        }
        let late = View::of("x", &status, now + Duration::from_secs(7200));
        assert!(late.table(Paint::plain()).contains("EXPIRED 1h00m ago"));
    }
}
