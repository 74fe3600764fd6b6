//! The load generator: so many requests a second over keep-alive connections, each asked once.
//!
//! A request that is late because all connections are busy is measured from the moment when it was
//! due, so a mesh that stalls cannot hide it. Anything but a 200 with the very body that belongs to
//! the request is a failure; there are no retries. When the time is over nothing more is sent: what
//! was due and found no connection until then is counted as unsent, which is no failure of the mesh.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use http::StatusCode;
use steadfast_process::ErrorChain;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::app::PATH_PREFIX;
use super::plan::Plan;
use crate::http1::{Connection, HttpError};

/// Load on the first service of the demo.
#[derive(Debug)]
pub(crate) struct Load {
    shared: Arc<Shared>,
    tasks: TaskTracker,
    began: Instant,
}

#[derive(Debug)]
struct Shared {
    target: Target,
    rate_per_s: u32,
    began: Instant,
    length: Option<Duration>,
    /// The number of the next request.
    next: AtomicU64,
    stop: CancellationToken,
    tally: Mutex<Tally>,
}

/// Whom to ask, and what the right answer is.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    addr: SocketAddr,
    authority: String,
    /// The services on the way, in their order.
    names: String,
}

/// What has come of the requests.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    pub(crate) failed: u64,
    /// How often each kind of failure came, and what the first of it said.
    pub(crate) failures: BTreeMap<&'static str, (u64, String)>,
    /// In microseconds, of all that were answered rightly.
    pub(crate) latency: Histogram<u64>,
    /// The same since it was last looked at.
    recent: Histogram<u64>,
    /// What was due and not sent, once the load has ended.
    pub(crate) unsent: Option<Unsent>,
    /// For each period: how many were sent in it and have no right answer (yet).
    pub(crate) unanswered: Vec<u64>,
}

/// Requests that were due before the end and for which no connection was free until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{count} requests were due and not sent: this machine is too slow for --rate {rate_per_s}")]
pub(crate) struct Unsent {
    pub(crate) count: u64,
    pub(crate) rate_per_s: u32,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("answered {0:?}, not {1:?}")]
    Body(String, String),
    #[error("{}", ErrorChain(.0))]
    Connection(#[from] HttpError),
    #[error("answered {0}: {1}")]
    Status(StatusCode, String),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

impl Load {
    /// Begins to send, until `length` is over or it is stopped.
    pub(crate) fn start(target: Target, rate_per_s: u32, length: Option<Duration>) -> Self {
        let began = Instant::now();
        let shared = Arc::new(Shared {
            target,
            rate_per_s: rate_per_s.max(1),
            began,
            length,
            next: AtomicU64::new(0),
            stop: CancellationToken::new(),
            tally: Mutex::new(Tally::new()),
        });
        let tasks = TaskTracker::new();
        for _ in 0..CONNECTIONS {
            tasks.spawn(send(Arc::clone(&shared), tasks.clone()));
        }
        tasks.close();
        Self { shared, tasks, began }
    }

    /// Sends no further request.
    pub(crate) fn stop(&self) {
        self.shared.stop.cancel();
    }

    /// Waits until the last request is answered or has failed.
    pub(crate) async fn finished(&self) {
        self.tasks.wait().await;
    }

    /// From now on, what becomes of a request is counted for the next period, also if it comes to
    /// nothing only after that.
    pub(crate) fn begin_period(&self) {
        self.shared.tally().unanswered.push(0);
    }

    /// How long it has been sending.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// What has come of it so far.
    pub(crate) fn tally(&self) -> Tally {
        self.shared.tally().clone()
    }

    /// What came of it after it was sent for this long.
    pub(crate) fn final_tally(&self, sent_for: Duration) -> Tally {
        let mut tally = self.tally();
        let rate_per_s = self.shared.rate_per_s;
        let due = due_by_the_end(rate_per_s, self.shared.length, sent_for);
        let count = due.saturating_sub(tally.sent);
        tally.unsent = (count > 0).then_some(Unsent { count, rate_per_s });
        tally
    }

    /// The latencies since the last call of this.
    pub(crate) fn recent(&self) -> Histogram<u64> {
        let mut tally = self.shared.tally();
        let recent = tally.recent.clone();
        tally.recent.reset();
        recent
    }
}

impl Target {
    /// The first service of a plan.
    ///
    /// It is asked at the port of its application, as an edge of a mesh is: so each request makes
    /// exactly one call over each of the plan's edges.
    pub(crate) fn of(plan: &Plan) -> Option<Self> {
        let first = plan.workloads.first()?;
        let names: Vec<_> = plan.workloads.iter().map(|workload| workload.name).collect();
        Some(Self { addr: first.application, authority: first.authority(), names: names.join(" ") })
    }

    /// Sends one request and judges its answer.
    ///
    /// # Errors
    /// Why it failed.
    pub(crate) async fn ask(
        &self,
        connection: &mut Option<Connection>,
        tasks: &TaskTracker,
        number: u64,
    ) -> Result<(), RequestError> {
        let exchange = async {
            let mut open = match connection.take().filter(|open| !open.is_closed()) {
                Some(open) => open,
                None => Connection::open(self.addr, tasks).await?,
            };
            let answer = open.get(&self.authority, &format!("{PATH_PREFIX}{number}")).await?;
            *connection = Some(open);
            Ok::<_, HttpError>(answer)
        };
        let answer = timeout(REQUEST_DEADLINE, exchange).await;
        let answer = answer.map_err(|_| RequestError::Timeout(REQUEST_DEADLINE))??;
        let body = String::from_utf8_lossy(answer.body());
        if answer.status() != StatusCode::OK {
            return Err(RequestError::Status(answer.status(), shortened(&body)));
        }
        let expected = format!("{} {number}", self.names);
        if body != expected {
            return Err(RequestError::Body(shortened(&body), expected));
        }
        Ok(())
    }
}

impl Shared {
    fn due(&self, number: u64) -> Instant {
        self.began + Duration::from_secs(1).mul_f64(number as f64 / f64::from(self.rate_per_s))
    }

    fn is_over(&self, moment: Instant) -> bool {
        self.length.is_some_and(|length| moment >= self.began + length)
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's share of the requests: the next that is due, again and again.
async fn send(shared: Arc<Shared>, tasks: TaskTracker) {
    let mut connection = None;
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        let (due, now) = (shared.due(number), Instant::now());
        if shared.stop.is_cancelled() || shared.is_over(due) || shared.is_over(now) {
            return;
        }
        let late = now > due;
        if !late {
            tokio::select! {
                () = shared.stop.cancelled() => return,
                () = sleep_until(due) => {}
            }
        }
        // A timer wakes up to a millisecond late, which is not the mesh's doing.
        let from = if late { due } else { Instant::now() };
        let period = shared.tally().send();
        let result = shared.target.ask(&mut connection, &tasks, number).await;
        shared.tally().record(period, from.elapsed(), result);
    }
}

impl Tally {
    fn new() -> Self {
        // Microseconds, to two digits: some KiB, and no value that a request can take is out of
        // its range.
        let histogram = || {
            let mut histogram = Histogram::new_with_bounds(1, LATENCY_US_MAX, 2)
                .unwrap_or_else(|_| unreachable!("the bounds are constants that fit"));
            histogram.auto(true);
            histogram
        };
        Self {
            sent: 0,
            answered: 0,
            failed: 0,
            failures: BTreeMap::new(),
            latency: histogram(),
            recent: histogram(),
            unsent: None,
            unanswered: vec![0],
        }
    }

    /// So many requests, all answered.
    #[cfg(test)]
    pub(crate) fn for_test(requests: u64) -> Self {
        let mut tally = Self::new();
        for _ in 0..requests {
            let period = tally.send();
            tally.record(period, Duration::from_millis(2), Ok(()));
        }
        tally
    }

    /// Counts one that is sent, and tells in which period.
    fn send(&mut self) -> usize {
        let period = self.unanswered.len() - 1;
        self.sent += 1;
        self.unanswered[period] += 1;
        period
    }

    fn record(&mut self, period: usize, took: Duration, result: Result<(), RequestError>) {
        match result {
            Ok(()) => {
                self.answered += 1;
                self.unanswered[period] -= 1;
                let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                self.latency.saturating_record(micros);
                self.recent.saturating_record(micros);
            }
            Err(error) => {
                self.failed += 1;
                let entry = self.failures.entry(error.kind());
                entry.or_insert_with(|| (0, error.to_string())).0 += 1;
            }
        }
    }
}

impl RequestError {
    /// What the failures of one kind are gathered under.
    fn kind(&self) -> &'static str {
        match self {
            Self::Body(..) => "wrong body",
            Self::Connection(_) => "broken connection",
            Self::Status(..) => "not a 200",
            Self::Timeout(_) => "no answer in time",
        }
    }
}

/// How many requests were due in a load of `length` that was stopped after `sent_for`.
///
/// One that ran its full length has those before its end; one that a person stopped has not
/// those of the last moment, which were just about to be sent.
fn due_by_the_end(rate_per_s: u32, length: Option<Duration>, sent_for: Duration) -> u64 {
    let until = match length {
        Some(length) if sent_for >= length => length,
        _ => sent_for.saturating_sub(STOP_SLACK),
    };
    (until.as_secs_f64() * f64::from(rate_per_s)).ceil() as u64
}

/// The value at a quantile of a histogram in microseconds; `None` if it is empty.
pub(crate) fn quantile(histogram: &Histogram<u64>, q: f64) -> Option<Duration> {
    (!histogram.is_empty()).then(|| Duration::from_micros(histogram.value_at_quantile(q)))
}

fn shortened(text: &str) -> String {
    text.trim().chars().take(FAILURE_CHARS_SHOWN).collect()
}

/// Enough that a stall of some 100 ms does not leave requests waiting for a connection at the
/// default rate.
const CONNECTIONS: usize = 16;
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
const STOP_SLACK: Duration = Duration::from_millis(100);
const LATENCY_US_MAX: u64 = 60_000_000;
const FAILURE_CHARS_SHOWN: usize = 300;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// A server that answers each request with what `answer` makes of its path.
    async fn server(answer: fn(&str) -> (u16, String)) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let tasks = TaskTracker::new();
        let owner = tasks.clone();
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                owner.spawn(async move {
                    let mut bytes = vec![0; 4096];
                    while let Ok(n @ 1..) = stream.read(&mut bytes).await {
                        let head = String::from_utf8_lossy(&bytes[..n]).into_owned();
                        let path = head.split(' ').nth(1).unwrap_or("").to_owned();
                        let (status, body) = answer(&path);
                        let text = format!(
                            "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        if stream.write_all(text.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        addr
    }

    async fn target(answer: fn(&str) -> (u16, String)) -> Target {
        Target {
            addr: server(answer).await,
            authority: "web.demo".to_owned(),
            names: "web api".to_owned(),
        }
    }

    async fn tally_of(answer: fn(&str) -> (u16, String)) -> Tally {
        let load = Load::start(target(answer).await, 500, Some(Duration::from_millis(100)));
        load.finished().await;
        load.final_tally(load.elapsed())
    }

    #[tokio::test]
    async fn each_due_request_is_sent_once_and_a_right_answer_is_no_failure() {
        let tally = tally_of(|path| (200, format!("web api {}", &path[PATH_PREFIX.len()..]))).await;
        // A machine that stalls at the very end leaves some unsent, and says so.
        let unsent = tally.unsent.map_or(0, |unsent| unsent.count);
        assert_eq!((tally.sent + unsent, tally.failed), (50, 0), "{:?}", tally.failures);
        assert_eq!((tally.answered, tally.latency.len()), (tally.sent, tally.sent));
    }

    #[tokio::test]
    async fn a_load_that_is_over_sends_nothing_of_what_it_is_behind_with() {
        // One second's requests are due, the load begins when that second is over.
        let (length, rate_per_s) = (Duration::from_secs(1), 1000);
        let shared = Arc::new(Shared {
            target: Target {
                addr: server(|_| (200, String::new())).await,
                authority: "web".to_owned(),
                names: "web".to_owned(),
            },
            rate_per_s,
            began: Instant::now() - length,
            length: Some(length),
            next: AtomicU64::new(0),
            stop: CancellationToken::new(),
            tally: Mutex::new(Tally::new()),
        });
        let (began, tasks) = (shared.began, TaskTracker::new());
        send(Arc::clone(&shared), tasks.clone()).await;
        let load = Load { shared, tasks, began };
        let tally = load.final_tally(load.elapsed());
        assert_eq!((tally.sent, tally.failed), (0, 0));
        let unsent = tally.unsent.unwrap();
        assert_eq!(unsent, Unsent { count: 1000, rate_per_s });
        assert!(unsent.to_string().contains("too slow for --rate 1000"), "{unsent}");
    }

    #[test]
    fn what_was_due_ends_with_the_load_or_a_moment_before_it_was_stopped() {
        let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
        for (rate, length, sent_for, due) in [
            (50, Some(second), minute, 50),
            (3, Some(second), second, 3),
            (20_000, Some(minute), minute, 1_200_000),
            (100, None, 2 * second, 190),
            (100, Some(minute), 2 * second, 190),
            (100, None, Duration::ZERO, 0),
        ] {
            assert_eq!(due_by_the_end(rate, length, sent_for), due, "{rate} {length:?}");
        }
    }

    #[tokio::test]
    async fn a_wrong_body_and_a_wrong_status_are_failures_with_their_words() {
        let tally = failures_of(|_| (200, "web api".to_owned())).await;
        assert_eq!((tally.answered, tally.failed), (0, tally.sent));
        assert!(tally.failures["wrong body"].1.contains("\"web api\""), "{:?}", tally.failures);
        let tally = failures_of(|_| (503, "no endpoint".to_owned())).await;
        assert_eq!((tally.failures["not a 200"].0, tally.answered), (tally.sent, 0));
        assert!(tally.failures["not a 200"].1.contains("no endpoint"));
    }

    /// Of a load that ends when some have failed: how many are sent within a time is the machine's
    /// doing.
    async fn failures_of(answer: fn(&str) -> (u16, String)) -> Tally {
        let load = Load::start(target(answer).await, 500, None);
        while load.tally().failed < 50 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        load.stop();
        load.finished().await;
        load.tally()
    }

    #[test]
    fn what_fails_late_is_counted_for_the_period_in_which_it_was_sent() {
        let mut tally = Tally::new();
        let [early, late] = [tally.send(), tally.send()];
        tally.unanswered.push(0);
        let next = tally.send();
        let failed = || Err(RequestError::Timeout(REQUEST_DEADLINE));
        tally.record(next, Duration::ZERO, Ok(()));
        tally.record(late, Duration::ZERO, failed());
        assert_eq!(tally.unanswered, [2, 0], "one has failed, and one is still under way");
        tally.record(early, Duration::ZERO, Ok(()));
        assert_eq!((tally.unanswered, tally.failed), (vec![1, 0], 1));
    }

    #[tokio::test]
    async fn a_stopped_load_sends_no_more() {
        let target = Target {
            addr: server(|_| (200, String::new())).await,
            authority: "web".to_owned(),
            names: "web".to_owned(),
        };
        let load = Load::start(target, 1, None);
        load.stop();
        load.finished().await;
        assert!(load.tally().sent <= 1);
    }

    #[test]
    fn an_empty_histogram_has_no_quantile() {
        let tally = Tally::new();
        assert_eq!(quantile(&tally.latency, 0.5), None);
    }
}
