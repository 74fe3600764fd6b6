//! The process of a sidecar: read the environment, start the log, run.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use steadfast_process::{ErrorChain, log};
use steadfast_proxy::config::{self, Config, Environment};
use steadfast_proxy::{app, awaiting};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let argument = std::env::args().nth(1);
    match argument.as_deref() {
        None | Some("--await") => {}
        Some("--help" | "-h") => {
            print!("{}", config::help());
            return ExitCode::SUCCESS;
        }
        Some("--version" | "-V") => {
            println!("steadfast-proxy {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some(other) => {
            eprintln!("steadfast-proxy takes no argument {other:?}; --help lists its environment");
            return ExitCode::from(EXIT_USAGE);
        }
    }
    let config = match Config::parse(&Environment) {
        Ok(config) => config,
        Err(errors) => {
            errors.iter().for_each(|error| eprintln!("{error}"));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    if argument.is_some() {
        return wait(config.admin_listen);
    }
    let log = match log::init(&config.log_filter, config.log_format) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("{}", config::log_filter_error(&error));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match app::run(config, log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", ErrorChain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Waits until the sidecar that runs with this configuration is ready.
fn wait(admin: SocketAddr) -> ExitCode {
    let admin = if admin.ip().is_unspecified() {
        SocketAddr::from(([127, 0, 0, 1], admin.port()))
    } else {
        admin
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ready = match runtime {
        Ok(runtime) => runtime.block_on(awaiting::ready(admin, AWAIT_MAX)),
        Err(error) => Err(format!("cannot start the runtime: {error}")),
    };
    match ready {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("steadfast-proxy --await: {error}");
            ExitCode::FAILURE
        }
    }
}

/// As long as Linkerd waits.
const AWAIT_MAX: Duration = Duration::from_secs(120);
/// EX_USAGE, as Linkerd's proxy ends when its environment is wrong.
const EXIT_USAGE: u8 = 64;
