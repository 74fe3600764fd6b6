//! `steadfast check`: whether a cluster can have a mesh, and whether the mesh that it has is well. It
//! looks at what is live, and says of everything that is wrong how to mend it.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use steadfast_process::duration;
use tokio::time::{Instant, sleep};

use crate::mesh::Mesh;
use crate::output::{self, Paint};
use crate::problem::Problem;

mod cluster;
mod control_plane;
mod data_plane;
mod services;

/// Check a cluster before, or a mesh after, it is installed
///
/// Each check says what it has found and, where something is wrong, how to mend it. Nothing is
/// changed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast check --pre                 may the mesh be installed here?
  steadfast check                       is the control plane well?
  steadfast check --proxy               and every sidecar?
  steadfast check --proxy -n shop       and those of one namespace?
  steadfast check --wait 5m             until it is well, for at most so long

Exit code 1 if anything is wrong; warnings do not change it.")]
pub(crate) struct Args {
    /// Whether the mesh may be installed here
    #[arg(long, conflicts_with = "proxy")]
    pre: bool,
    /// Also every sidecar
    #[arg(long)]
    proxy: bool,
    /// With --proxy: only those of this namespace
    #[arg(short, long, value_name = "NAME", requires = "proxy")]
    namespace: Option<String>,
    /// Check again until nothing is wrong, for at most so long
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = duration::parse)]
    wait: Duration,
    #[command(flatten)]
    mesh: Mesh,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Form,
}

/// The form of the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Form {
    /// For programs, in Linkerd's shape.
    Json,
    /// Only what is wrong.
    Short,
    /// For people.
    #[default]
    Table,
}

/// What has come of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Success,
    Warning,
    Error,
}

/// One check.
#[derive(Clone, Debug, Serialize)]
struct Check {
    description: String,
    result: Verdict,
    /// What was found.
    #[serde(skip_serializing_if = "String::is_empty")]
    error: String,
    /// How it is mended.
    #[serde(skip_serializing_if = "String::is_empty")]
    hint: String,
}

/// Checks that belong together, by Linkerd's name of them.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Category {
    category_name: &'static str,
    checks: Vec<Check>,
}

/// All of them.
#[derive(Clone, Debug, Serialize)]
struct Report {
    success: bool,
    categories: Vec<Category>,
}

/// What is found wrong by a check: what it is, and how it is mended.
#[derive(Clone, Debug)]
struct Wrong {
    verdict: Verdict,
    what: String,
    hint: String,
}

impl Wrong {
    fn error(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { verdict: Verdict::Error, what: what.into(), hint: hint.into() }
    }

    fn warning(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warning, ..Self::error(what, hint) }
    }
}

impl Category {
    const fn new(category_name: &'static str) -> Self {
        Self { category_name, checks: Vec::new() }
    }

    /// Keeps what has come of a check; whether it went well.
    fn add(&mut self, description: impl Into<String>, outcome: Result<(), Wrong>) -> bool {
        let well = Wrong { verdict: Verdict::Success, what: String::new(), hint: String::new() };
        let Wrong { verdict, what, hint } = outcome.err().unwrap_or(well);
        let description = description.into();
        self.checks.push(Check { description, result: verdict, error: what, hint });
        verdict != Verdict::Error
    }
}

pub(super) async fn run(args: Args) -> Result<ExitCode, Problem> {
    if args.mesh.dir().is_some() {
        return Err(Problem::usage(
            "check is about Kubernetes: leave --dir (or STEADFAST_DIR) out; a standalone mesh tells \
             how it is by `steadfast trust status` and `steadfast anchor status`",
        ));
    }
    let end = Instant::now() + args.wait;
    loop {
        let report = check(&args).await;
        if report.success || Instant::now() >= end {
            output::print(&report.text(args.output, Paint::stdout())?)?;
            return Ok(if report.success { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        sleep(PAUSE).await;
    }
}

async fn check(args: &Args) -> Report {
    let mut categories = Vec::new();
    let cluster = match args.mesh.cluster().await {
        Ok(Some(cluster)) => cluster,
        found => {
            let mut api = Category::new("kubernetes-api");
            let why = found.err().map_or_else(String::new, |error| error.to_string());
            api.add("can initialize the client", Err(Wrong::error(why, "set KUBECONFIG")));
            return Report::of(vec![api]);
        }
    };
    let (api, version) = cluster::api(cluster).await;
    categories.push(api);
    if let Some(version) = version {
        categories.push(cluster::version(&version));
        if args.pre {
            categories.push(cluster::before(cluster).await);
        } else {
            categories.extend(control_plane::all(&args.mesh, cluster).await);
        }
        categories.push(cluster::clocks(cluster).await);
        if args.proxy {
            let only = args.namespace.as_deref();
            categories.push(data_plane::all(&args.mesh, cluster, only).await);
            let control = &cluster.namespaces.control;
            categories.push(services::all(&args.mesh, control, only).await);
        }
    }
    Report::of(categories)
}

impl Report {
    fn of(categories: Vec<Category>) -> Self {
        let mut all = categories.iter().flat_map(|category| &category.checks);
        let success = all.all(|check| check.result != Verdict::Error);
        Self { success, categories }
    }

    fn text(&self, form: Form, paint: Paint) -> Result<String, serde_json::Error> {
        match form {
            Form::Json => Ok(serde_json::to_string_pretty(self)? + "\n"),
            Form::Short => Ok(self.table(paint, Verdict::Warning)),
            Form::Table => Ok(self.table(paint, Verdict::Success)),
        }
    }

    fn table(&self, paint: Paint, least: Verdict) -> String {
        let mut text = String::new();
        for category in &self.categories {
            let shown: Vec<_> = category.checks.iter().filter(|c| c.result >= least).collect();
            if shown.is_empty() {
                continue;
            }
            let name = category.category_name;
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{}\n{}", paint.bold(name), "-".repeat(name.len()));
            for check in shown {
                let mark = match check.result {
                    Verdict::Success => paint.green("√"),
                    Verdict::Warning => "‼".to_owned(),
                    Verdict::Error => paint.red("×"),
                };
                let _ = writeln!(text, "{mark} {}", check.description);
                for line in check.error.lines() {
                    let _ = writeln!(text, "    {line}");
                }
                for line in check.hint.lines() {
                    let _ = writeln!(text, "    mend it:  {line}");
                }
            }
            text.push('\n');
        }
        let mark = if self.success { paint.green("√") } else { paint.red("×") };
        if least == Verdict::Success || !self.success {
            let _ = writeln!(text, "Status check results are {mark}");
        }
        text
    }
}

/// Names, of which the first few are shown.
fn some(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let named = names[..names.len() - more].join(", ");
    if more > 0 { format!("{named} and {more} more") } else { named }
}

const PAUSE: Duration = Duration::from_secs(2);
const NAMED_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_is_wrong_and_how_to_mend_it_in_every_form() {
        let mut category = Category::new("webhooks-tls");
        category.add("is there", Ok(()));
        category.add("is young", Err(Wrong::warning("it is old", "wait")));
        let warned = Report::of(vec![category.clone()]);
        assert!(warned.success);
        category.add("is trusted", Err(Wrong::error("by nobody", "steadfast upgrade")));
        let report = Report::of(vec![category]);
        assert!(!report.success);
        let table = report.text(Form::Table, Paint::plain()).unwrap();
        assert_eq!(
            table,
            "webhooks-tls\n------------\n√ is there\n‼ is young\n    it is old\n    mend it:  wait\n\
             × is trusted\n    by nobody\n    mend it:  steadfast upgrade\n\n\
             Status check results are ×\n"
        );
        let short = report.text(Form::Short, Paint::plain()).unwrap();
        assert!(!short.contains("is there") && short.contains("is young"));
        let json = report.text(Form::Json, Paint::plain()).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["success"], false);
        let check = &json["categories"][0]["checks"][2];
        assert_eq!(json["categories"][0]["categoryName"], "webhooks-tls");
        assert_eq!(check["result"], "error");
        assert_eq!([&check["error"], &check["hint"]], ["by nobody", "steadfast upgrade"]);
    }
}
