//! The process of a sidecar: read the environment, start the log, run.

use std::process::ExitCode;

use steadfast_process::{ErrorChain, log};
use steadfast_proxy::app;
use steadfast_proxy::config::{self, Config, Environment};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        None => {}
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

/// EX_USAGE, as Linkerd's proxy ends when its environment is wrong.
const EXIT_USAGE: u8 = 64;
