//! How long a connection goes on: until the process drains, or an SVID of the pair nears its end.
//!
//! Wall clocks jump and laptops sleep: a timer only says when to look at the clock again.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use steadfast_api::UnixTime;
use steadfast_process::{Clock, Drain};

use crate::metrics::Gauge;

/// When a connection is to take no more requests.
pub struct Lifetime {
    clock: Arc<dyn Clock>,
    drain: Drain,
    retire_at: Option<UnixTime>,
}

impl Lifetime {
    /// Until the drain starts, or this time.
    pub fn new(clock: Arc<dyn Clock>, drain: Drain, retire_at: Option<UnixTime>) -> Self {
        Self { clock, drain, retire_at }
    }

    /// Waits for its end.
    pub async fn over(self) {
        match self.retire_at {
            Some(at) => tokio::select! {
                () = self.drain.wait() => {}
                () = reached(&*self.clock, at) => {}
            },
            None => self.drain.wait().await,
        }
    }
}

/// Runs what outlives the expiry of an SVID, and counts it there from then on.
pub async fn outliving<T>(
    clock: &dyn Clock,
    expires_at: Option<UnixTime>,
    gauge: &Arc<Gauge>,
    work: impl Future<Output = T>,
) -> T {
    let Some(expires_at) = expires_at else { return work.await };
    let counted = async {
        reached(clock, expires_at).await;
        let _held = gauge.hold();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        done = work => done,
        () = counted => std::future::pending().await,
    }
}

/// Waits until the wall clock shows this time.
async fn reached(clock: &dyn Clock, at: UnixTime) {
    loop {
        let left = at.since(clock.now());
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(LOOK_AGAIN)).await;
    }
}

/// The clock is looked at this often, in case it has jumped.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    struct Hands(AtomicU64);

    impl Clock for Hands {
        fn now(&self) -> UnixTime {
            UnixTime::from_millis(self.0.load(Ordering::Relaxed))
        }

        fn since_boot(&self) -> Duration {
            Duration::ZERO
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_outlives_its_svid_and_is_counted_while_it_does() {
        let (clock, gauge) = (Hands(AtomicU64::new(0)), Arc::default());
        let (done, wait) = tokio::sync::oneshot::channel();
        let at = Some(UnixTime::from_secs(1));
        let mut work = std::pin::pin!(outliving(&clock, at, &gauge, wait));
        assert!(futures::poll!(work.as_mut()).is_pending());
        assert_eq!(gauge.value(), 0);
        clock.0.store(2000, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(futures::poll!(work.as_mut()).is_pending());
        assert_eq!(gauge.value(), 1);
        done.send(5).unwrap();
        assert_eq!(work.await, Ok(5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lifetime_ends_by_the_wall_clock_and_not_by_a_timer() {
        let clock = Arc::new(Hands(AtomicU64::new(0)));
        let life = Lifetime::new(clock.clone(), Drain::new(), Some(UnixTime::from_secs(3600)));
        let mut over = std::pin::pin!(life.over());
        tokio::time::sleep(Duration::from_secs(7200)).await;
        assert!(futures::poll!(over.as_mut()).is_pending());
        clock.0.store(3_600_000, Ordering::Relaxed);
        over.await;
    }
}
