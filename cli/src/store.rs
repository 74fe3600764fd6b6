//! The store of a standalone mesh, as a command reaches it.

use std::path::{Path, PathBuf};

use steadfast_api::Code;
use steadfast_platform::StoreError;
use steadfast_platform::standalone::{Client, Directory};

/// Which mesh a command is about.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct DirArg {
    /// The state directory of the mesh, as steadfast-store was given it
    #[arg(long, value_name = "DIR", env = "STEADFAST_DIR")]
    pub(crate) dir: PathBuf,
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreProblem {
    #[error("the store refused: {0}")]
    Refused(StoreError),
    #[error(
        "{}: no store answers in {dir}: {why}\n  Start one:  steadfast-store --dir {dir}",
        Code::STORE_UNAVAILABLE,
        dir = dir.display()
    )]
    Unavailable { dir: PathBuf, why: String },
}

/// A client of the store of this directory. It connects when first asked, so this cannot fail.
pub(crate) fn client(dir: &Path) -> Client {
    Client::new(&Directory::new(dir))
}

/// An error of the store, as a person needs it.
pub(crate) fn explain(dir: &Path, error: StoreError) -> StoreProblem {
    match error {
        StoreError::Unavailable(why) => {
            let why = if dir.join("store.sock").exists() {
                why
            } else if dir.exists() {
                "there is no store.sock, so none is running".to_owned()
            } else {
                "there is no such directory".to_owned()
            };
            StoreProblem::Unavailable { dir: dir.to_owned(), why }
        }
        other => StoreProblem::Refused(other),
    }
}
