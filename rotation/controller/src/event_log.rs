//! The event log: each change of the state that the controller decided on, with everything that
//! it was made of, as a line of JSON. `steadfast trust replay` decides each of them again.
//!
//! It is for whoever asks later why something was done, so it holds nothing up: a line that cannot
//! be written is told, and what was decided is done.

use std::io;
use std::path::PathBuf;

use steadfast_rotation_protocol::controller::Effect;
use steadfast_rotation_protocol::journal::Line;
use tokio::fs::OpenOptions;
use tokio::io::AsyncWriteExt as _;

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
        let mut text = serde_json::to_vec(line).map_err(|error| failed(error.into()))?;
        text.push(b'\n');
        let file = OpenOptions::new().append(true).create(true).mode(OWNER_ONLY).open(path).await;
        let mut file = file.map_err(failed)?;
        file.write_all(&text).await.map_err(failed)?;
        file.flush().await.map_err(failed)
    }
}

const OWNER_ONLY: u32 = 0o600;
