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
    let end = Instant::now() + deadline;
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(reason) if Instant::now() >= end => {
                panic!("not within {deadline:?}: {what}: {reason}")
            }
            Err(_) => sleep(POLL).await,
        }
    }
}

const POLL: Duration = Duration::from_millis(5);
