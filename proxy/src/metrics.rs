//! What the sidecar counts, by Linkerd's names.
//!
//! A connection or a pooled peer looks its series up once and then only adds to atomics: a request
//! takes no lock. The number of series is bounded; series that nobody holds expire after ten
//! minutes, and what was evicted is counted. Stages never touch this module: the stories do, with
//! what the stages return.

mod histogram;
mod process;
mod table;

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::MetricEncoder;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use steadfast_process::Clock;

use crate::io::Traffic;
use histogram::Histogram;
pub use table::Labels;
use table::{Family, Table};

/// All tables of the process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    authz: Table<Counter>,
    refusals: Table<Counter>,
    responses: Table<Counter>,
    requests: Table<HttpSeries>,
    tcp: Table<TcpSeries>,
    closes: Table<Counter>,
    errors: Table<Counter>,
    retries: Table<Counter>,
    waiting: [Arc<Gauge>; 2],
    /// Connections that outlive an SVID they were made with.
    pub outliving: Arc<Gauge>,
    /// Opaque connections and tunnels that outlive a withdrawn anchor.
    pub withdrawn: Arc<Gauge>,
    /// Tasks of connections that panicked.
    pub panics: Arc<Counter>,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

/// A number that rises and falls.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

/// Counts one while it is held.
#[derive(Debug)]
pub struct Held(Arc<Gauge>);

/// The requests between one client and one server.
#[derive(Debug, Default)]
pub struct HttpSeries {
    requests: Counter,
    latency: Histogram,
}

/// The connections of one kind.
#[derive(Debug, Default)]
pub struct TcpSeries {
    opened: Counter,
    open: Gauge,
    read_bytes: Counter,
    write_bytes: Counter,
}

/// Counts the requests of one client to one server, on one worker.
#[derive(Debug)]
pub struct HttpMeter {
    labels: Labels,
    series: Arc<HttpSeries>,
    /// The response series that were met: a handful.
    responses: RefCell<Vec<(Outcome, Arc<Counter>)>>,
    metrics: Metrics,
}

/// Counts one connection while it is open.
#[derive(Debug)]
pub struct TcpMeter {
    labels: Labels,
    series: Arc<TcpSeries>,
    errno: Cell<&'static str>,
    metrics: Metrics,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status of the response.
    pub status: u16,
    /// The gRPC status in the trailers or head, if there is one.
    pub grpc_status: Option<u8>,
    /// The message broke before its end.
    pub broken: bool,
}

/// The side of the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Peers come in.
    Inbound,
    /// The workload goes out.
    Outbound,
}

impl Metrics {
    /// Registers everything that the data plane counts.
    pub fn register(registry: &mut Registry, clock: Arc<dyn Clock>) -> Self {
        let metrics = Self {
            authz: Table::new("authz"),
            refusals: Table::new("refusals"),
            responses: Table::new("responses"),
            requests: Table::new("requests"),
            tcp: Table::new("tcp"),
            closes: Table::new("closes"),
            errors: Table::new("errors"),
            retries: Table::new("retries"),
            waiting: Default::default(),
            outliving: Arc::default(),
            withdrawn: Arc::default(),
            panics: Arc::default(),
        };
        registry
            .register_collector(Box::new(table::Collected::new(metrics.clone(), clock.clone())));
        process::register(registry, clock);
        metrics
    }

    /// Accepted connections that wait for a slot.
    pub fn waiting(&self, direction: Direction) -> &Arc<Gauge> {
        &self.waiting[direction as usize]
    }

    /// Counts a refused connection or request.
    pub fn refused(&self, direction: Direction, reason: &'static str, code: &str) {
        let labels =
            Labels::new([("direction", direction.label()), ("reason", reason), ("code", code)]);
        self.refusals.series(&labels).add(1);
    }

    /// Counts a decision of the inbound policy.
    pub fn authorized(&self, what: Authz, labels: &Labels) {
        self.decisions(what, labels).add(1);
    }

    /// What counts decisions of this kind.
    pub fn decisions(&self, what: Authz, labels: &Labels) -> Arc<Counter> {
        self.authz.series(&labels.with("", what.family()))
    }

    /// Counts an error that the proxy answered instead of the server.
    pub fn http_error(&self, direction: Direction, reason: &'static str) {
        self.errors.series(&Labels::new([("", direction.label()), ("error", reason)])).add(1);
    }

    /// Counts a request that was sent again because it provably was not processed.
    pub fn retried(&self, direction: Direction, reason: &'static str) {
        let labels = [("direction", direction.label()), ("reason", reason)];
        self.retries.series(&Labels::new(labels)).add(1);
    }

    /// The requests with these labels.
    pub fn http(&self, labels: Labels) -> HttpMeter {
        let series = self.requests.series(&labels);
        HttpMeter { labels, series, responses: RefCell::default(), metrics: self.clone() }
    }

    /// Counts a connection with these labels as open, until the meter is dropped.
    pub fn tcp(&self, labels: Labels) -> TcpMeter {
        let series = self.tcp.series(&labels);
        series.opened.add(1);
        series.open.add(1);
        TcpMeter { labels, series, errno: Cell::new(""), metrics: self.clone() }
    }

    /// The families in the order of the output.
    fn families(&self) -> Vec<Family<'_>> {
        let mut families = self.http_families();
        families.extend(self.tcp_families());
        families.extend([
            Family::split(&self.authz, &Authz::FAMILIES, "Decisions of the inbound policy"),
            Family::split(
                &self.errors,
                &[("inbound", "inbound_http_errors"), ("outbound", "outbound_http_errors")],
                "Errors that the proxy answered instead of the server",
            ),
            Family::counter(
                &self.retries,
                "request_resend",
                "Requests sent again because they were not processed",
                |c| c,
            ),
            Family::counter(
                &self.refusals,
                "steadfast_connection_refusals",
                "Refused connections and handshakes",
                |c| c,
            ),
        ]);
        families
    }

    fn http_families(&self) -> Vec<Family<'_>> {
        vec![
            Family::counter(&self.requests, "request", "HTTP requests", |s| &s.requests),
            Family::counter(&self.responses, "response", "HTTP responses, at their end", |c| c),
            Family::new(
                &self.requests,
                "response_latency_ms",
                "Milliseconds from a request to the head of its response",
                MetricType::Histogram,
                |series, encoder| series.latency.encode(encoder),
            ),
        ]
    }

    fn tcp_families(&self) -> Vec<Family<'_>> {
        vec![
            Family::counter(&self.tcp, "tcp_open", "Connections opened", |s| &s.opened),
            Family::new(
                &self.tcp,
                "tcp_open_connections",
                "Connections open now",
                MetricType::Gauge,
                |series, mut encoder| encoder.encode_gauge(&series.open.value()),
            ),
            Family::counter(&self.tcp, "tcp_read_bytes", "Bytes read", |s| &s.read_bytes),
            Family::counter(&self.tcp, "tcp_write_bytes", "Bytes written", |s| &s.write_bytes),
            Family::counter(&self.closes, "tcp_close", "Connections closed", |c| c),
        ]
    }

    /// Forgets series that nobody has held for a while; called with each scrape.
    fn expire(&self, now: Duration) -> u64 {
        self.requests.expire(now)
            + self.tcp.expire(now)
            + self.responses.expire(now)
            + self.closes.expire(now)
            + self.authz.expire(now)
    }

    fn evicted(&self) -> u64 {
        [&self.authz, &self.refusals, &self.responses, &self.closes, &self.errors, &self.retries]
            .iter()
            .map(|table| table.evicted())
            .sum::<u64>()
            + self.requests.evicted()
            + self.tcp.evicted()
    }

    fn series(&self) -> u64 {
        [&self.authz, &self.refusals, &self.responses, &self.closes, &self.errors, &self.retries]
            .iter()
            .map(|table| table.len())
            .sum::<u64>()
            + self.requests.len()
            + self.tcp.len()
    }
}

impl HttpMeter {
    /// A request has come.
    pub fn request(&self) {
        self.series.requests.add(1);
    }

    /// The head of its response has come, after this time.
    pub fn latency(&self, latency: Duration) {
        self.series.latency.observe(latency);
    }

    /// Its response has ended.
    pub fn response(&self, outcome: Outcome) {
        let mut responses = self.responses.borrow_mut();
        if let Some((_, counter)) = responses.iter().find(|(known, _)| *known == outcome) {
            return counter.add(1);
        }
        let mut labels = self.labels.with("status_code", &outcome.status.to_string());
        labels = labels.with("classification", outcome.classification());
        if let Some(status) = outcome.grpc_status {
            labels = labels.with("grpc_status", &status.to_string());
        }
        let counter = self.metrics.responses.series(&labels);
        counter.add(1);
        if responses.len() < OUTCOMES_MAX {
            responses.push((outcome, counter));
        }
    }
}

impl Traffic for TcpMeter {
    fn read(&self, bytes: usize) {
        self.series.read_bytes.add(bytes as u64);
    }

    fn written(&self, bytes: usize) {
        self.series.write_bytes.add(bytes as u64);
    }

    fn broke(&self, error: &std::io::Error) {
        self.errno.set(errno(error));
    }
}

impl Drop for TcpMeter {
    fn drop(&mut self) {
        self.series.open.sub(1);
        self.metrics.closes.series(&self.labels.with("errno", self.errno.get())).add(1);
    }
}

/// The names that Linkerd's label has.
fn errno(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind as Kind;
    match error.kind() {
        Kind::BrokenPipe => "EPIPE",
        Kind::ConnectionAborted => "ECONNABORTED",
        Kind::ConnectionRefused => "ECONNREFUSED",
        Kind::ConnectionReset => "ECONNRESET",
        Kind::NotConnected => "ENOTCONN",
        Kind::TimedOut => "ETIMEDOUT",
        Kind::UnexpectedEof => "EOF",
        _ => "OTHER",
    }
}

impl Outcome {
    /// As Linkerd classifies: by the gRPC status where there is one, else by the HTTP status.
    pub fn classification(self) -> &'static str {
        let failed = self.broken
            || match self.grpc_status {
                // UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS and the like are the
                // server's failures; NOT_FOUND and the like are answers.
                Some(status) => matches!(status, 2 | 4 | 7 | 13 | 14 | 15),
                None => self.status >= 500,
            };
        if failed { "failure" } else { "success" }
    }
}

impl Direction {
    /// The metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// A decision of the inbound policy and what it was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authz {
    /// A connection was let in only because the policy is being tried out.
    Audit,
    /// A request was let in.
    HttpAllow,
    /// A request was refused.
    HttpDeny,
    /// A connection was let in.
    TcpAllow,
    /// A connection was refused.
    TcpDeny,
}

impl Authz {
    const FAMILIES: [(&str, &str); 5] = [
        ("audit", "steadfast_inbound_authz_audit"),
        ("http_allow", "inbound_http_authz_allow"),
        ("http_deny", "inbound_http_authz_deny"),
        ("tcp_allow", "inbound_tcp_authz_allow"),
        ("tcp_deny", "inbound_tcp_authz_deny"),
    ];

    const fn family(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::HttpAllow => "http_allow",
            Self::HttpDeny => "http_deny",
            Self::TcpAllow => "tcp_allow",
            Self::TcpDeny => "tcp_deny",
        }
    }
}

impl Counter {
    /// Adds.
    pub fn add(&self, number: u64) {
        self.0.fetch_add(number, Ordering::Relaxed);
    }

    /// The number now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn encode(&self, encoder: &mut MetricEncoder<'_>) -> std::fmt::Result {
        use prometheus_client::encoding::NoLabelSet;
        encoder.encode_counter::<NoLabelSet, u64, u64>(&self.value(), None)
    }
}

impl Gauge {
    /// Counts one until what is returned is dropped.
    pub fn hold(self: &Arc<Self>) -> Held {
        self.add(1);
        Held(self.clone())
    }

    /// The number now; never below zero.
    pub fn value(&self) -> i64 {
        self.0.load(Ordering::Relaxed) as i64
    }

    fn add(&self, number: u64) {
        self.0.fetch_add(number, Ordering::Relaxed);
    }

    fn sub(&self, number: u64) {
        self.0.fetch_sub(number, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.sub(1);
    }
}

/// Statuses times gRPC statuses that one client meets at one server; more are counted, by a
/// lookup each time.
const OUTCOMES_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    fn metrics() -> (Registry, Metrics) {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry, Arc::new(steadfast_process::SystemClock));
        (registry, metrics)
    }

    #[test]
    fn series_have_linkerds_names() {
        let (registry, metrics) = metrics();
        let meter = metrics.http(Labels::new([("direction", "inbound"), ("tls", "true")]));
        meter.request();
        meter.latency(Duration::from_millis(3));
        meter.response(Outcome { status: 503, grpc_status: None, broken: false });
        let tcp = metrics.tcp(Labels::new([("direction", "inbound"), ("peer", "src")]));
        tcp.read(5);
        metrics.authorized(Authz::HttpAllow, &Labels::new([("target_port", "80")]));
        metrics.refused(Direction::Inbound, "expired", "SFT-TLS-002");
        metrics.http_error(Direction::Outbound, "unreachable");
        let text = text(&registry);
        for line in [
            "request_total{direction=\"inbound\",tls=\"true\"} 1",
            "response_total{direction=\"inbound\",tls=\"true\",status_code=\"503\",classification=\"failure\"} 1",
            "response_latency_ms_bucket{le=\"3.0\",direction=\"inbound\",tls=\"true\"} 1",
            "response_latency_ms_count{direction=\"inbound\",tls=\"true\"} 1",
            "tcp_open_total{direction=\"inbound\",peer=\"src\"} 1",
            "tcp_open_connections{direction=\"inbound\",peer=\"src\"} 1",
            "tcp_read_bytes_total{direction=\"inbound\",peer=\"src\"} 5",
            "inbound_http_authz_allow_total{target_port=\"80\"} 1",
            "steadfast_connection_refusals_total{direction=\"inbound\",reason=\"expired\",code=\"SFT-TLS-002\"} 1",
            "outbound_http_errors_total{error=\"unreachable\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(text.contains("proxy_build_info{") && text.contains("process_open_fds"), "{text}");
    }

    #[test]
    fn a_closed_connection_is_no_longer_open() {
        let (registry, metrics) = metrics();
        let tcp = metrics.tcp(Labels::new([("peer", "src")]));
        tcp.broke(&std::io::ErrorKind::ConnectionReset.into());
        drop(tcp);
        let text = text(&registry);
        assert!(text.contains("tcp_open_connections{peer=\"src\"} 0"), "{text}");
        assert!(text.contains("tcp_close_total{peer=\"src\",errno=\"ECONNRESET\"} 1"), "{text}");
    }

    #[test]
    fn a_grpc_status_decides_over_the_http_status() {
        let outcome = |grpc_status| Outcome { status: 200, grpc_status, broken: false };
        assert_eq!(outcome(Some(14)).classification(), "failure");
        assert_eq!(outcome(Some(5)).classification(), "success");
        assert_eq!(outcome(None).classification(), "success");
    }
}
