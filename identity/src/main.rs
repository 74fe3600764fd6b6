//! `steadfast-identity`.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use steadfast_identity::config::{Args, Config};
use steadfast_identity::{app, confine};
use steadfast_platform::access::Platform;
use steadfast_platform::standalone::Directory;
use steadfast_process::ErrorChain;

/// Gives memory back after a burst, which a service of many small connections must.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let config = match Args::parse().check() {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(2);
        }
    };
    match start(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("steadfast-identity: {}", ErrorChain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn start(config: Config) -> anyhow::Result<()> {
    confine::alone(config.restarted)?;
    steadfast_process::log::init(&config.log_filter, config.log_format)
        .map_err(anyhow::Error::msg)?;
    let directory = match &config.platform {
        Platform::Kubernetes => None,
        Platform::Standalone(dir) => Some(Directory::new(dir)),
    };
    match &directory {
        None => std::fs::create_dir_all(&config.log_dir)
            .with_context(|| format!("cannot create {}", config.log_dir.display()))?,
        Some(directory) => directory.create()?,
    }
    // Before any thread is started: what is confined is the thread, and those that it starts.
    let confinement = confine::confine(directory.as_ref(), &config.log_dir)?;
    confine::report(confinement, directory.as_ref());
    steadfast_process::limits::raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(app::run(config))?;
    Ok(())
}
