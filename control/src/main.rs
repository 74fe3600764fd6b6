//! `steadfast-control`.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use steadfast_control::config::{Args, Config};

/// Gives memory back after a burst: all pods of a cluster are read, and hardly anything of them kept.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let config = match Args::parse().check() {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("steadfast-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    steadfast_process::log::init(&config.log_filter, config.log_format)
        .map_err(anyhow::Error::msg)
        .context("--log")?;
    steadfast_process::limits::raise_open_files();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    Ok(runtime.block_on(steadfast_control::run(config))?)
}

const EXIT_USAGE: u8 = 2;
