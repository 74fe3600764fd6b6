//! Writes the seeds of every target into `<directory>/<target>/`, where a fuzzer keeps its corpus.

use std::path::PathBuf;
use std::{env, fs};

fn main() -> std::io::Result<()> {
    let directory = env::args_os().nth(1).map(PathBuf::from);
    let Some(directory) = directory else {
        eprintln!("usage: seeds DIRECTORY");
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    for target in steadfast_fuzz::TARGETS {
        let corpus = directory.join(target.name);
        fs::create_dir_all(&corpus)?;
        for (index, seed) in (target.seeds)().into_iter().enumerate() {
            fs::write(corpus.join(format!("seed-{index}")), seed)?;
        }
    }
    Ok(())
}
