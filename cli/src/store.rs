//! The store of a standalone mesh, as a command reaches it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use steadfast_api::Code;
use steadfast_platform::standalone::{Client, Directory};
use steadfast_platform::{Entry, Store as _, StoreError};
use tokio::time::{Instant, sleep};

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

/// The entry of a key, from a store that may have been started a moment ago in the same script: it
/// gets that moment to open its socket.
pub(crate) async fn first_get(client: &Client, key: &str) -> Result<Option<Entry>, StoreError> {
    let deadline = Instant::now() + START_TIME_MAX;
    loop {
        match client.get(key).await {
            Err(StoreError::Unavailable(_)) if Instant::now() < deadline => sleep(POLL).await,
            answer => return answer,
        }
    }
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

/// A store starts within a tenth of a second; a slow disk has to sync a few times.
const START_TIME_MAX: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(50);
