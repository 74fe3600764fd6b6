//! `steadfast-store`: what Kubernetes' API server and kubelet are elsewhere, for a standalone mesh.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use steadfast_platform::standalone::process::{self, Config};
use steadfast_process::flags::{ConfigErrors, Flags};
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
    admin: String,
    /// How long a projected token lives (5s to 2d); it is renewed at 80 % of that
    #[arg(long, value_name = "DURATION", default_value = "1h")]
    token_ttl: String,
    /// The form of the log
    #[arg(long, value_name = "plain|json", default_value = "plain")]
    log_format: String,
    /// What is logged, as in RUST_LOG
    #[arg(long, env = "STEADFAST_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = args.log.clone();
    let (config, log_format) = match args.check() {
        Ok(checked) => checked,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = log::init(&filter, log_format) {
        eprintln!("{}: {error}", steadfast_api::Code::CONFIG_INVALID);
        return ExitCode::from(2);
    }
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %ErrorChain(error.as_ref()), "steadfast-store has stopped");
            ExitCode::FAILURE
        }
    }
}

impl Args {
    /// Checks all of it: every flag that cannot be used is told.
    fn check(self) -> Result<(Config, log::Format), ConfigErrors> {
        let mut flags = Flags::default();
        let bounds = process::TOKEN_TTL_MIN..=process::TOKEN_TTL_MAX;
        let config = Config {
            directory: self.dir,
            admin: flags.address("--admin", &self.admin),
            token_ttl: flags.duration("--token-ttl", &self.token_ttl, bounds),
        };
        let log_format = flags.log_format("--log-format", &self.log_format);
        flags.check((config, log_format))
    }
}

/// One thread is plenty: the work is waiting for the disk, which has threads of its own.
fn run(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(process::run(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_flag_is_told_at_once() {
        let flags = ["--admin=9993", "--token-ttl=1s", "--log-format=xml"];
        let args = ["steadfast-store", "--dir", "mesh"].iter().chain(&flags);
        let error = Args::try_parse_from(args).unwrap().check().unwrap_err().to_string();
        for flag in flags {
            let name = flag.split('=').next().unwrap();
            assert!(error.contains(name), "{name} is not in {error}");
        }
        assert!(error.starts_with("SFT-CFG-001") && error.contains("from 5s to 2d"), "{error}");
    }
}
