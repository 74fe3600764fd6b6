//! Waiting for a state, never for a time.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Asks until there is an answer; panics after `deadline`, saying what was waited for and the last
/// reason why it was not so.
pub async fn until<T, F: Future<Output = Result<T, String>>>(
    what: &str,
    deadline: Duration,
    mut ask: impl FnMut() -> F,
) -> T {
    let begun = Instant::now();
    let end = begun + deadline;
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(reason) if Instant::now() >= end => {
                panic!("not within {deadline:?}: {what}: {reason}")
            }
            Err(_) => sleep(pause(begun.elapsed())).await,
        }
    }
}

/// Asking costs a process as a rule: what has lasted long is asked for less often.
fn pause(waited: Duration) -> Duration {
    let longest = (waited / 300).max(Duration::from_millis(200));
    (waited / 16).clamp(Duration::from_millis(5), longest)
}
