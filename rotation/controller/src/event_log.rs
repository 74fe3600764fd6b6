//! The event log: each change of the state that the controller decided on, with everything that
//! it was made of, as a line of JSON. It is told before it is tried, so that nothing is done that is
//! not in it; what came of it, the next line has. `steadfast trust replay` decides each of them again.
//!
//! It is for whoever asks later why something was done, so it holds nothing up: a line that cannot
//! be written is told, and what was decided is done.

use std::io::{self, SeekFrom};
use std::path::{Path, PathBuf};

use steadfast_rotation_protocol::controller::Effect;
use steadfast_rotation_protocol::journal::Line;
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

/// A file that lines are added to, or none.
#[derive(Clone, Debug, Default)]
pub struct EventLog(Option<PathBuf>);

/// Why a line is not in the event log.
#[derive(Debug, thiserror::Error)]
#[error("a decision cannot be written to the event log {}", .path.display())]
pub struct EventLogError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl EventLog {
    /// Into this file, which is made for its owner alone when the first line comes.
    pub fn new(path: Option<PathBuf>) -> Self {
        Self(path)
    }

    /// Whether somebody wants to know of these effects. Those that write nothing come again with
    /// each look until they are done.
    pub fn wants(&self, effects: &[Effect]) -> bool {
        self.0.is_some() && effects.iter().any(|effect| matches!(effect, Effect::Persist(_)))
    }

    /// Adds a line; it is with the operating system when this returns.
    ///
    /// # Errors
    /// [`EventLogError`]
    pub async fn add(&self, line: &Line) -> Result<(), EventLogError> {
        let Some(path) = &self.0 else { return Ok(()) };
        let failed = |source| EventLogError { path: path.clone(), source };
        let text = serde_json::to_vec(line).map_err(|error| failed(error.into()))?;
        append(path, text).await.map_err(failed)
    }
}

async fn append(path: &Path, mut text: Vec<u8>) -> io::Result<()> {
    text.push(b'\n');
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(OWNER_ONLY);
    let mut file = options.open(path).await?;
    if is_torn(&mut file).await? {
        text.insert(0, b'\n');
    }
    file.write_all(&text).await?;
    file.flush().await
}

/// Whether the last line was cut off by the end of a process or of the room on a disk: it takes none
/// with it.
async fn is_torn(file: &mut File) -> io::Result<bool> {
    if file.metadata().await?.len() == 0 {
        return Ok(false);
    }
    file.seek(SeekFrom::End(-1)).await?;
    Ok(file.read_u8().await? != b'\n')
}

const OWNER_ONLY: u32 = 0o600;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_line_that_was_cut_off_takes_no_other_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        append(&path, b"{}".to_vec()).await.unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).await.unwrap();
        file.write_all(b"{\"half").await.unwrap();
        file.flush().await.unwrap();
        for _ in 0..2 {
            append(&path, b"{}".to_vec()).await.unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{}\n{\"half\n{}\n{}\n");
    }
}
