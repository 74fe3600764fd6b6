//! `steadfast-control`.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use steadfast_control::config::Args;

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = args.check() {
        eprintln!("{error}");
        return ExitCode::from(EXIT_USAGE);
    }
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("steadfast-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<()> {
    steadfast_process::log::init(&args.log, args.log_format)
        .map_err(anyhow::Error::msg)
        .context("--log")?;
    steadfast_process::limits::raise_open_files();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    Ok(runtime.block_on(steadfast_control::run(args))?)
}

const EXIT_USAGE: u8 = 2;
