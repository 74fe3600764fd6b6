//! The tasks of one worker: a drain can wait for them, and one that panics is counted.
//!
//! Nobody joins them, so a panic would otherwise go by with its line on standard error alone; it
//! takes nothing else with it.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt as _;
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;

use crate::metrics::Counter;

/// Owns tasks. All clones are one.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    panics: Arc<Counter>,
}

impl Tasks {
    /// Counts panics here.
    pub fn new(panics: Arc<Counter>) -> Self {
        Self { tracker: TaskTracker::new(), panics }
    }

    /// Runs `work` to its end on this worker.
    pub fn spawn_counted(&self, work: impl Future<Output = ()> + 'static) -> AbortHandle {
        let panics = self.panics.clone();
        let counted = async move {
            // The panic's own line is on standard error already.
            if AssertUnwindSafe(work).catch_unwind().await.is_err() {
                panics.add(1);
            }
        };
        self.tracker.spawn_local(counted).abort_handle()
    }

    /// Waits until all have ended; what is spawned meanwhile is waited for too.
    pub async fn finished(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::on_worker;

    #[test]
    fn a_task_that_panics_is_counted_and_waited_for_like_any_other() {
        on_worker(async {
            let panics = Arc::<Counter>::default();
            let tasks = Tasks::new(panics.clone());
            tasks.spawn_counted(async { panic!("on purpose") });
            tasks.spawn_counted(async {});
            tasks.finished().await;
            assert_eq!(panics.value(), 1);
        });
    }
}
