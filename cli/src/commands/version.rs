//! `steadfast version`: of this command, and of what runs in a mesh.

use std::process::ExitCode;

use serde::Serialize;

use crate::admin;
use crate::mesh::{KnownPod, Mesh};
use crate::output::{Format, table};
use crate::problem::Problem;

/// Print the version of this command, and of what runs in a mesh
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast version
  steadfast version --client            of this command alone
  steadfast version --dir ./mesh        of a standalone mesh
  steadfast version -o json")]
pub(crate) struct Args {
    #[command(flatten)]
    mesh: Mesh,
    /// Only of this command
    #[arg(long)]
    client: bool,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

#[derive(Serialize)]
struct Versions {
    client: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    processes: Vec<ProcessVersion>,
}

#[derive(Serialize)]
struct ProcessVersion {
    workload: String,
    version: Option<String>,
    /// Why the version is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

pub(super) async fn run(args: Args) -> Result<ExitCode, Problem> {
    let mut versions = Versions { client: env!("CARGO_PKG_VERSION"), processes: Vec::new() };
    // Whoever has named no mesh and has no kubeconfig asks about the command.
    if !args.client && args.mesh.is_named().await {
        let mut pods = args.mesh.pods().await?;
        pods.retain(|pod| pod.admin.is_some() || args.mesh.dir().is_some());
        versions.processes = futures::future::join_all(pods.iter().map(ask)).await;
    }
    args.output.print(&versions, Versions::table)?;
    let silent = versions.processes.iter().any(|process| process.problem.is_some());
    Ok(if silent { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn ask(pod: &KnownPod) -> ProcessVersion {
    let version = match &pod.admin {
        Some(addr) => admin::version(addr).await.map_err(|error| error.to_string()),
        None => Err("its Pod does not say where its admin port is".to_owned()),
    };
    ProcessVersion {
        workload: pod.name.clone(),
        problem: version.as_ref().err().cloned(),
        version: version.ok(),
    }
}

impl Versions {
    fn table(&self) -> String {
        let mut text = format!("steadfast {}\n", self.client);
        if !self.processes.is_empty() {
            let rows: Vec<_> = self
                .processes
                .iter()
                .map(|process| {
                    let known = process.version.as_ref().or(process.problem.as_ref());
                    [process.workload.clone(), known.cloned().unwrap_or_default()]
                })
                .collect();
            text.push('\n');
            text.push_str(&table(["WORKLOAD", "VERSION"], &rows));
        }
        text
    }
}
