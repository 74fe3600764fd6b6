//! How long a connection goes on: until the process drains, an SVID of the pair nears its end, the
//! trust bundle no longer holds what an end of it stands on, or we have an SVID of another issuer.
//!
//! Wall clocks jump and laptops sleep: a timer only says when to look at the clock again.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Response;
use steadfast_api::UnixTime;
use steadfast_process::{Clock, Drain};
use tokio::time::Instant;

use crate::http::{Body, BodyError, Frame, Length, Source};
use crate::metrics::Gauge;
use crate::refusal::Reporter;
use crate::standing::Stand;

/// When a connection is to take no more requests.
pub struct Lifetime {
    clock: Arc<dyn Clock>,
    drain: Drain,
    retire_at: Option<UnixTime>,
    stand: Option<Stand>,
}

impl Lifetime {
    /// Until the drain starts, or this time, or what this says of it.
    pub fn new(
        clock: Arc<dyn Clock>,
        drain: Drain,
        retire_at: Option<UnixTime>,
        stand: Option<Stand>,
    ) -> Self {
        Self { clock, drain, retire_at, stand }
    }

    /// Waits for its end.
    pub async fn over(self) {
        let retired = async {
            match self.retire_at {
                Some(at) => reached(&*self.clock, at).await,
                None => std::future::pending().await,
            }
        };
        let lost = async {
            match &self.stand {
                Some(stand) => stand.over().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.drain.wait() => {}
            () = retired => {}
            () = lost => {}
        }
    }
}

/// How long bytes are copied on a connection that was made with an SVID, tunnels included: past the
/// end of the SVID, when the connection is counted, and up to a maximum age where there is one; and
/// up to a deadline once an anchor that it stands on was withdrawn.
#[derive(Clone)]
pub struct Ages {
    clock: Arc<dyn Clock>,
    outliving: Arc<Gauge>,
    max: Option<Duration>,
    distrust: Distrust,
}

/// What becomes of those whose anchor was withdrawn.
#[derive(Clone)]
pub struct Distrust {
    /// Counts them while they are open.
    pub withdrawn: Arc<Gauge>,
    /// From the withdrawal to the cut.
    pub deadline: Duration,
    /// Names them, then and when they are cut.
    pub reporter: Rc<Reporter>,
}

/// What bounds a connection that was made with an SVID; the default has none.
#[derive(Clone, Debug, Default)]
pub struct Bounds {
    /// Then the first SVID of the pair ends.
    pub expires_at: Option<UnixTime>,
    /// What the trust bundle of now says of it.
    pub stand: Option<Stand>,
}

/// A direction of a tunnel.
struct Tunnel {
    body: Body,
    over: Pin<Box<dyn Future<Output = ()>>>,
}

impl Ages {
    /// With this maximum age, counting here what outlives its SVID.
    pub fn new(
        clock: Arc<dyn Clock>,
        outliving: Arc<Gauge>,
        max: Option<Duration>,
        distrust: Distrust,
    ) -> Self {
        Self { clock, outliving, max, distrust }
    }

    /// Copies on a connection with these bounds. Returns `None` if it has become too old, or was
    /// or is to be cut; that was told.
    pub async fn limit<T>(&self, bounds: &Bounds, copying: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            done = copying => Some(done),
            () = self.too_old(bounds.expires_at) => None,
            () = self.distrusted(bounds.stand.as_ref()) => None,
        }
    }

    /// The same for a response that begins a tunnel.
    pub fn tunnel(&self, bounds: &Bounds, response: Response<Body>) -> Response<Body> {
        if bounds.expires_at.is_none() {
            return response;
        }
        let (ages, bounds) = (self.clone(), bounds.clone());
        let over = Box::pin(async move {
            tokio::select! {
                () = ages.too_old(bounds.expires_at) => {}
                () = ages.distrusted(bounds.stand.as_ref()) => {}
            }
        });
        response.map(|body| Body::from_source(Tunnel { body, over }))
    }

    /// Waits until a connection that begins now is too old; counts it once its SVID has ended.
    async fn too_old(&self, expires_at: Option<UnixTime>) {
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

    /// Waits until the connection is cut, or has outlived a withdrawn anchor for too long.
    async fn distrusted(&self, stand: Option<&Stand>) {
        let Some(stand) = stand else { return std::future::pending().await };
        stand.lost().await;
        if !stand.is_cut() {
            // Boxed, so that those many that are trusted pay for none of it.
            Box::pin(self.last_hours(stand)).await;
        }
    }

    async fn last_hours(&self, stand: &Stand) {
        let Distrust { withdrawn, deadline, reporter } = &self.distrust;
        let _held = withdrawn.hold();
        let named = async {
            while !reporter.withdrawn(self.clock.since_boot(), stand, *deadline) {
                tokio::time::sleep(LINES_PAUSE).await;
            }
            std::future::pending().await
        };
        tokio::select! {
            biased;
            () = stand.cut() => {}
            () = named => {}
            () = tokio::time::sleep(*deadline) => {
                let (direction, addr) = stand.place();
                reporter.report(self.clock.since_boot(), direction, addr, &stand.refusal());
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
/// Until the log takes further lines.
const LINES_PAUSE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use prometheus_client::registry::Registry;
    use steadfast_api::{KeyId, TrustBundle};
    use steadfast_identity_client::{Footing, Refusals, Trust, VerifiedPeer};

    use super::*;
    use crate::fakes::ANCHOR;
    use crate::metrics::{Direction, Metrics};
    use crate::standing::{Guarded, Standings};

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
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry, clock.clone());
        let handshakes = Refusals::new(&mut registry, clock.clone());
        let distrust = Distrust {
            withdrawn: Arc::default(),
            deadline: DEADLINE,
            reporter: Rc::new(Reporter::new(metrics, handshakes)),
        };
        (clock.clone(), Ages::new(clock, Arc::default(), max, distrust))
    }

    const DEADLINE: Duration = Duration::from_secs(3600);

    fn bounded() -> Bounds {
        Bounds { expires_at: Some(UnixTime::from_secs(1)), stand: None }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_outlives_its_svid_and_is_counted_while_it_does() {
        let (clock, ages) = ages(None);
        let bounds = bounded();
        let (done, wait) = tokio::sync::oneshot::channel();
        let mut work = std::pin::pin!(ages.limit(&bounds, wait));
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
        assert_eq!(ages.limit(&bounded(), forever()).await, None);
        let bounds = Bounds::default();
        let plaintext = ages.limit(&bounds, forever());
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
        let mut tunnel = ages.tunnel(&bounded(), Response::new(Body::from_source(Silent)));
        clock.0.store(2000, Ordering::Relaxed);
        {
            let mut frame = std::pin::pin!(tunnel.body_mut().frame());
            assert!(futures::poll!(frame.as_mut()).is_pending());
            assert_eq!(ages.outliving.value(), 1);
            assert!(matches!(frame.await, Some(Err(BodyError::Io(_)))));
        }
        assert_eq!(ages.outliving.value(), 0, "its source is dropped with its end");
    }

    /// A connection whose anchor is in no bundle, once one is asked.
    fn held() -> (Standings, Guarded, Stand) {
        let peer = VerifiedPeer {
            id: "spiffe://cluster.local/ns/demo/sa/web".parse().unwrap(),
            dns: None,
            serial: vec![1],
            not_before: UnixTime::from_secs(0),
            not_after: UnixTime::from_secs(1),
            anchor: KeyId::of_spki(b"gone"),
            issuer: KeyId::of_spki(b"issuer"),
            issuers: vec![KeyId::of_spki(b"issuer")],
        };
        let standings = Standings::default();
        let place = (Direction::Inbound, "10.0.0.9:40000".parse().unwrap());
        let footing = Footing::between(None, Some(Arc::new(peer)));
        let io = Box::new(tokio::io::duplex(16).0);
        let (guarded, stand) = standings.hold(footing, None, place, io).unwrap();
        (standings, guarded, stand)
    }

    fn trust(denied: Option<KeyId>) -> Trust {
        let bundle = TrustBundle::parse(&"cluster.local".parse().unwrap(), ANCHOR.as_bytes());
        Trust::new(&bundle.unwrap(), denied, []).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_under_a_withdrawn_anchor_are_counted_until_they_are_cut_at_the_deadline() {
        let (_, ages) = ages(None);
        let (standings, _guarded, stand) = held();
        let bounds = Bounds { expires_at: bounded().expires_at, stand: Some(stand) };
        let mut work = std::pin::pin!(ages.limit(&bounds, std::future::pending::<()>()));
        assert!(futures::poll!(work.as_mut()).is_pending());
        standings.judge(&trust(None));
        assert!(futures::poll!(work.as_mut()).is_pending());
        assert_eq!(ages.distrust.withdrawn.value(), 1);
        let withdrawn_at = Instant::now();
        assert_eq!(work.await, None);
        let elapsed = withdrawn_at.elapsed();
        assert!(elapsed >= DEADLINE && elapsed < DEADLINE * 2, "{elapsed:?}");
        assert_eq!(ages.distrust.withdrawn.value(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_under_a_denied_issuer_are_not_copied_to_the_deadline() {
        let (_, ages) = ages(None);
        let (standings, _guarded, stand) = held();
        let bounds = Bounds { expires_at: bounded().expires_at, stand: Some(stand) };
        let started = Instant::now();
        let mut work = std::pin::pin!(ages.limit(&bounds, std::future::pending::<()>()));
        standings.judge(&trust(None));
        assert!(futures::poll!(work.as_mut()).is_pending());
        standings.judge(&trust(Some(KeyId::of_spki(b"issuer"))));
        assert_eq!(work.await, None);
        assert_eq!(started.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_under_a_withdrawn_anchor_breaks_at_the_deadline() {
        let (_, ages) = ages(None);
        let (standings, _guarded, stand) = held();
        let bounds = Bounds { expires_at: bounded().expires_at, stand: Some(stand) };
        let mut tunnel = ages.tunnel(&bounds, Response::new(Body::from_source(Silent)));
        standings.judge(&trust(None));
        let withdrawn_at = Instant::now();
        assert!(matches!(tunnel.body_mut().frame().await, Some(Err(BodyError::Io(_)))));
        assert!(withdrawn_at.elapsed() >= DEADLINE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_withdrawn_anchor_ends_a_lifetime() {
        let clock = Arc::new(Hands(AtomicU64::new(0)));
        let (standings, _guarded, stand) = held();
        let life = Lifetime::new(clock, Drain::new(), None, Some(stand));
        let mut over = std::pin::pin!(life.over());
        assert!(futures::poll!(over.as_mut()).is_pending());
        standings.judge(&trust(None));
        over.await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_lifetime_ends_by_the_wall_clock_and_not_by_a_timer() {
        let clock = Arc::new(Hands(AtomicU64::new(0)));
        let life =
            Lifetime::new(clock.clone(), Drain::new(), Some(UnixTime::from_secs(3600)), None);
        let mut over = std::pin::pin!(life.over());
        tokio::time::sleep(Duration::from_secs(7200)).await;
        assert!(futures::poll!(over.as_mut()).is_pending());
        clock.0.store(3_600_000, Ordering::Relaxed);
        over.await;
    }
}
