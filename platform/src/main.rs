//! `steadfast-store`: what Kubernetes' API server and kubelet are elsewhere, for a standalone mesh.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use steadfast_platform::standalone::process::{self, Config};
use steadfast_process::{ErrorChain, log};

/// Keeps the state of a standalone mesh and serves it to its other processes.
///
/// Watches the Kubernetes manifests in DIR/manifests, keeps them and the trust domain in
/// DIR/store, gives every Pod its token and trust bundle in DIR/pods, and listens on
/// DIR/store.sock. Only processes of the same user (and root) can connect.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// The mesh's directory; it is made if it is not there
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Where /metrics, /ready and /live are served
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9993")]
    admin: SocketAddr,
    /// How long a projected token lives; it is renewed at 80 % of that
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = process::parse_ttl)]
    token_ttl: std::time::Duration,
    /// The form of the log
    #[arg(long, value_name = "plain|json", default_value = "plain")]
    log_format: log::Format,
    /// What is logged, as in RUST_LOG
    #[arg(long, env = "STEADFAST_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = log::init(&args.log, args.log_format) {
        eprintln!("{}: {error}", steadfast_api::Code::CONFIG_INVALID);
        return ExitCode::from(2);
    }
    let config = Config { directory: args.dir, admin: args.admin, token_ttl: args.token_ttl };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %ErrorChain(error.as_ref()), "steadfast-store has stopped");
            ExitCode::FAILURE
        }
    }
}

/// One thread is plenty: the work is waiting for the disk, which has threads of its own.
fn run(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(process::run(config))
}
