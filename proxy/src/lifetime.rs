//! How long a connection goes on: until the process drains, or an SVID of the pair nears its end.
//!
//! Wall clocks jump and laptops sleep: a timer only says when to look at the clock again.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Response;
use steadfast_api::UnixTime;
use steadfast_process::{Clock, Drain};
use tokio::time::Instant;

use crate::http::{Body, BodyError, Frame, Length, Source};
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

/// How long bytes are copied on a connection that was made with an SVID, tunnels included: past the
/// end of the SVID, when the connection is counted, and up to a maximum age where there is one.
#[derive(Clone)]
pub struct Ages {
    clock: Arc<dyn Clock>,
    outliving: Arc<Gauge>,
    max: Option<Duration>,
}

/// A direction of a tunnel.
struct Tunnel {
    body: Body,
    over: Pin<Box<dyn Future<Output = ()>>>,
}

impl Ages {
    /// With this maximum age, counting here what outlives its SVID.
    pub fn new(clock: Arc<dyn Clock>, outliving: Arc<Gauge>, max: Option<Duration>) -> Self {
        Self { clock, outliving, max }
    }

    /// Copies on a connection whose first SVID ends then; `None`: it had none. Returns `None` if
    /// the connection has become too old.
    pub async fn limit<T>(
        &self,
        expires_at: Option<UnixTime>,
        copying: impl Future<Output = T>,
    ) -> Option<T> {
        tokio::select! {
            biased;
            done = copying => Some(done),
            () = self.over(expires_at) => None,
        }
    }

    /// The same for a response that begins a tunnel.
    pub fn tunnel(&self, expires_at: Option<UnixTime>, response: Response<Body>) -> Response<Body> {
        if expires_at.is_none() {
            return response;
        }
        let ages = self.clone();
        let over = Box::pin(async move { ages.over(expires_at).await });
        response.map(|body| Body::from_source(Tunnel { body, over }))
    }

    /// Waits until a connection that begins now is too old; counts it once its SVID has ended.
    async fn over(&self, expires_at: Option<UnixTime>) {
        let Some(expires_at) = expires_at else { return std::future::pending().await };
        let (started, mut held) = (Instant::now(), None);
        loop {
            let svid_left = expires_at.since(self.clock.now());
            if held.is_none() && svid_left.is_zero() {
                held = Some(self.outliving.hold());
            }
            let age_left = self.max.map(|max| max.saturating_sub(started.elapsed()));
            if age_left.is_some_and(|left| left.is_zero()) {
                tracing::debug!("a connection has reached its maximum age");
                return;
            }
            let svid_left = held.is_none().then(|| svid_left.min(LOOK_AGAIN));
            match age_left.into_iter().chain(svid_left).min() {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        }
    }
}

impl Source for Tunnel {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        if self.over.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Err(BodyError::Io(std::io::ErrorKind::TimedOut.into()))));
        }
        self.body.poll_frame(cx)
    }

    fn length(&self) -> Length {
        self.body.length()
    }

    fn is_end(&self) -> bool {
        self.body.is_end()
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

    fn ages(max: Option<Duration>) -> (Arc<Hands>, Ages) {
        let clock = Arc::new(Hands(AtomicU64::new(0)));
        (clock.clone(), Ages::new(clock, Arc::default(), max))
    }

    const EXPIRES_AT: Option<UnixTime> = Some(UnixTime::from_secs(1));

    #[tokio::test(start_paused = true)]
    async fn a_connection_outlives_its_svid_and_is_counted_while_it_does() {
        let (clock, ages) = ages(None);
        let (done, wait) = tokio::sync::oneshot::channel();
        let mut work = std::pin::pin!(ages.limit(EXPIRES_AT, wait));
        assert!(futures::poll!(work.as_mut()).is_pending());
        assert_eq!(ages.outliving.value(), 0);
        clock.0.store(2000, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(futures::poll!(work.as_mut()).is_pending());
        assert_eq!(ages.outliving.value(), 1);
        done.send(5).unwrap();
        assert_eq!(work.await, Some(Ok(5)));
        assert_eq!(ages.outliving.value(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_with_an_svid_ends_at_its_maximum_age_and_one_without_does_not() {
        let (_, ages) = ages(Some(Duration::from_secs(60)));
        let forever = || std::future::pending::<()>();
        assert_eq!(ages.limit(EXPIRES_AT, forever()).await, None);
        let plaintext = ages.limit(None, forever());
        let day = Duration::from_secs(24 * 3600);
        assert!(tokio::time::timeout(day, plaintext).await.is_err());
    }

    /// A server that keeps silent.
    struct Silent;

    impl Source for Silent {
        fn poll_frame(&mut self, _: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
            Poll::Pending
        }

        fn length(&self) -> Length {
            Length::Unknown
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_that_outlives_its_svid_is_counted_and_breaks_at_its_maximum_age() {
        let (clock, ages) = ages(Some(Duration::from_secs(60)));
        let mut tunnel = ages.tunnel(EXPIRES_AT, Response::new(Body::from_source(Silent)));
        clock.0.store(2000, Ordering::Relaxed);
        {
            let mut frame = std::pin::pin!(tunnel.body_mut().frame());
            assert!(futures::poll!(frame.as_mut()).is_pending());
            assert_eq!(ages.outliving.value(), 1);
            assert!(matches!(frame.await, Some(Err(BodyError::Io(_)))));
        }
        assert_eq!(ages.outliving.value(), 0, "its source is dropped with its end");
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
