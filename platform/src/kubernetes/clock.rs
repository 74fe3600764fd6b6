//! The API server's clock, as its answers tell it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::DATE;
use http::{Request, Response};
use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, SystemClock};
use tower::{Layer, Service};

/// How far our clock is from the API server's. All clones know the same.
#[derive(Clone, Debug)]
pub struct ServerClock(Arc<AtomicI64>);

impl Default for ServerClock {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(UNKNOWN)))
    }
}

impl ServerClock {
    /// Our wall clock less the API server's, in milliseconds, at the last answer; `None` before the
    /// first. It is off by half a second and half of what the answer took.
    pub fn offset_millis(&self) -> Option<i64> {
        let offset = self.0.load(Ordering::Relaxed);
        (offset != UNKNOWN).then_some(offset)
    }

    fn note(&self, date: Option<&str>, sent: UnixTime, took: Duration) {
        let Some(offset) = date.and_then(|date| offset_millis(date, sent, took)) else { return };
        self.0.store(offset, Ordering::Relaxed);
    }
}

/// What a Date header says of our clock, if it came soon enough to say anything. It tells seconds
/// only: on average half of one has passed since.
fn offset_millis(date: &str, sent: UnixTime, took: Duration) -> Option<i64> {
    if took > ANSWER_MAX {
        return None;
    }
    let date = jiff::fmt::rfc2822::parse(date).ok()?.timestamp().as_millisecond();
    let server = UnixTime::from_millis(u64::try_from(date).ok()?) + Duration::from_millis(500);
    Some((sent + took / 2).offset_millis(server))
}

impl<S> Layer<S> for ServerClock {
    type Service = Timed<S>;

    fn layer(&self, inner: S) -> Timed<S> {
        Timed { inner, clock: self.clone() }
    }
}

/// A client whose answers set the clock.
#[derive(Clone, Debug)]
pub struct Timed<S> {
    inner: S,
    clock: ServerClock,
}

impl<S, A, B> Service<Request<A>> for Timed<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let (clock, sent, boot) = (self.clock.clone(), SystemClock.now(), SystemClock.since_boot());
        let answered = self.inner.call(request);
        Box::pin(async move {
            let answer = answered.await?;
            let date = answer.headers().get(DATE).and_then(|date| date.to_str().ok());
            clock.note(date, sent, SystemClock.since_boot().saturating_sub(boot));
            Ok(answer)
        })
    }
}

const UNKNOWN: i64 = i64::MIN;
/// What took longer says too little: half of it is the error.
const ANSWER_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_of_an_answer_tells_how_far_the_clocks_are_apart() {
        let (date, at) = ("Sat, 21 Nov 2026 12:00:00 GMT", UnixTime::from_secs(1_795_262_400));
        let took = Duration::from_secs(1);
        assert_eq!(offset_millis(date, at, took), Some(0));
        assert_eq!(offset_millis(date, at + Duration::from_secs(90), took), Some(90_000));
        assert_eq!(offset_millis("Sat, 21 Nov 2026 12:01:30 GMT", at, took), Some(-90_000));
        assert_eq!(offset_millis(date, at, Duration::from_secs(6)), None);
        assert_eq!(offset_millis("yesterday", at, took), None);
    }

    #[test]
    fn the_clock_is_unknown_until_an_answer_says_the_time() {
        let clock = ServerClock::default();
        clock.note(None, UnixTime::from_secs(0), Duration::ZERO);
        assert_eq!(clock.offset_millis(), None);
    }
}
