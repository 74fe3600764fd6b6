//! How a process stops: accept no more, let what runs finish until a deadline, then end.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Tells everyone that the process stops, and counts who is not done. All clones are one.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    token: CancellationToken,
    tracker: TaskTracker,
}

impl Drain {
    /// Not draining.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks everyone to finish.
    pub fn start(&self) {
        self.token.cancel();
        self.tracker.close();
    }

    /// Whether everyone has been asked to finish.
    pub fn started(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits until everyone is asked to finish.
    pub async fn wait(&self) {
        self.token.cancelled().await;
    }

    /// Held by work that should finish before the process ends.
    pub fn hold(&self) -> TaskTrackerToken {
        self.tracker.token()
    }

    /// Waits until nobody holds on, or the deadline is over; says which.
    pub async fn finished(&self, deadline: Duration) -> bool {
        tokio::time::timeout(deadline, self.tracker.wait()).await.is_ok()
    }
}

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
/// When the handlers cannot be installed.
pub async fn terminated() -> std::io::Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
    }
}
