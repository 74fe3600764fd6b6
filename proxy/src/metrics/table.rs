//! Series by their labels: a bounded table that is locked to look up, never to count.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use steadfast_process::Clock;

use super::{Counter, Direction, Metrics};

/// Names and values, in the order in which they are shown. A name that is empty is not shown: it
/// tells families of one table apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Labels(Arc<[(Box<str>, Box<str>)]>);

/// The series of one or several families.
#[derive(Debug)]
pub(super) struct Table<S>(Arc<Shared<S>>);

#[derive(Debug)]
struct Shared<S> {
    name: &'static str,
    series: Mutex<HashMap<Labels, Entry<S>>>,
    evicted: AtomicU64,
}

#[derive(Debug)]
struct Entry<S> {
    series: Arc<S>,
    /// Since when a scrape has seen nobody hold it.
    idle_since: Option<Duration>,
}

impl Labels {
    /// These labels.
    pub fn new<'a>(labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(labels.into_iter().map(|(name, value)| (name.into(), shortened(value))).collect())
    }

    /// One more.
    #[must_use]
    pub fn with(&self, name: &str, value: &str) -> Self {
        let more = [(name.into(), shortened(value))];
        Self(self.0.iter().cloned().chain(more).collect())
    }

    fn value(&self, name: &str) -> &str {
        self.0.iter().find(|(n, _)| &**n == name).map_or("", |(_, value)| value)
    }

    fn shown(&self) -> Vec<(&str, &str)> {
        self.0.iter().filter(|(name, _)| !name.is_empty()).map(|(n, v)| (&**n, &**v)).collect()
    }
}

/// A value may come from a peer: a label holds its beginning.
fn shortened(value: &str) -> Box<str> {
    match value.char_indices().nth(VALUE_CHARS_MAX) {
        Some((at, _)) => value[..at].into(),
        None => value.into(),
    }
}

impl<S> Clone for Table<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S: Default> Table<S> {
    pub(super) fn new(name: &'static str) -> Self {
        let (series, evicted) = (Mutex::default(), AtomicU64::new(0));
        Self(Arc::new(Shared { name, series, evicted }))
    }

    /// The series with these labels. A full table gives up one that nobody holds; if all are held,
    /// what is new counts together.
    pub(super) fn series(&self, labels: &Labels) -> Arc<S> {
        let mut all = self.lock();
        if let Some(entry) = all.get(labels) {
            return entry.series.clone();
        }
        if all.len() >= SERIES_MAX {
            let overflow = self.overflow();
            let mut others = all.iter().filter(|(labels, _)| **labels != overflow);
            let unheld = others.find(|(_, entry)| entry.unheld()).map(|(l, _)| l.clone());
            self.0.evicted.fetch_add(1, Ordering::Relaxed);
            match unheld {
                Some(unheld) => drop(all.remove(&unheld)),
                None => return all.entry(overflow).or_default().series.clone(),
            }
        }
        all.entry(labels.clone()).or_default().series.clone()
    }

    /// Forgets what nobody has held for a while; returns how many.
    pub(super) fn expire(&self, now: Duration) -> u64 {
        let mut all = self.lock();
        let before = all.len();
        all.retain(|_, entry| {
            if !entry.unheld() {
                entry.idle_since = None;
                return true;
            }
            let since = *entry.idle_since.get_or_insert(now);
            now.saturating_sub(since) < IDLE_MAX
        });
        let expired = (before - all.len()) as u64;
        self.0.evicted.fetch_add(expired, Ordering::Relaxed);
        expired
    }

    pub(super) fn evicted(&self) -> u64 {
        self.0.evicted.load(Ordering::Relaxed)
    }

    pub(super) fn len(&self) -> u64 {
        self.lock().len() as u64
    }

    fn overflow(&self) -> Labels {
        Labels::new([("overflow", self.0.name)])
    }

    /// Nothing that is done under the lock panics; a poisoned one is as good.
    fn lock(&self) -> MutexGuard<'_, HashMap<Labels, Entry<S>>> {
        self.0.series.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> Entry<S> {
    fn unheld(&self) -> bool {
        Arc::strong_count(&self.series) == 1
    }
}

impl<S: Default> Default for Entry<S> {
    fn default() -> Self {
        Self { series: Arc::default(), idle_since: None }
    }
}

/// How one table is shown under one name.
pub(super) struct Family<'a> {
    encode: Box<dyn Fn(&mut DescriptorEncoder<'_>) -> fmt::Result + 'a>,
}

impl<'a> Family<'a> {
    pub(super) fn new<S: Default>(
        table: &'a Table<S>,
        name: &'a str,
        help: &'a str,
        kind: MetricType,
        encode: impl Fn(&S, MetricEncoder<'_>) -> fmt::Result + 'a,
    ) -> Self {
        Self::of(table, "", name, help, kind, encode)
    }

    pub(super) fn counter<S: Default>(
        table: &'a Table<S>,
        name: &'a str,
        help: &'a str,
        counter: impl Fn(&S) -> &Counter + 'a,
    ) -> Self {
        Self::new(table, name, help, MetricType::Counter, move |series, mut encoder| {
            counter(series).encode(&mut encoder)
        })
    }

    /// Several names of counters in one table, told apart by the label without a name.
    pub(super) fn split(
        table: &'a Table<Counter>,
        names: &'a [(&'a str, &'a str)],
        help: &'a str,
    ) -> Self {
        let encode = move |encoder: &mut DescriptorEncoder<'_>| {
            names.iter().try_for_each(|(which, name)| {
                let one = Self::of(table, which, name, help, MetricType::Counter, |c, mut e| {
                    c.encode(&mut e)
                });
                (one.encode)(encoder)
            })
        };
        Self { encode: Box::new(encode) }
    }

    fn of<S: Default>(
        table: &'a Table<S>,
        which: &'a str,
        name: &'a str,
        help: &'a str,
        kind: MetricType,
        encode: impl Fn(&S, MetricEncoder<'_>) -> fmt::Result + 'a,
    ) -> Self {
        let encode = move |encoder: &mut DescriptorEncoder<'_>| {
            let all = table.lock();
            let mut of_family =
                all.iter().filter(|(labels, _)| labels.value("") == which).peekable();
            if of_family.peek().is_none() {
                return Ok(());
            }
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            of_family.try_for_each(|(labels, entry)| {
                let labels = labels.shown();
                encode(&entry.series, family.encode_family(&labels)?)
            })
        };
        Self { encode: Box::new(encode) }
    }
}

/// Shows all tables with each scrape.
#[derive(Debug)]
pub(super) struct Collected {
    metrics: Metrics,
    clock: ClockOf,
}

struct ClockOf(Arc<dyn Clock>);

impl Collected {
    pub(super) fn new(metrics: Metrics, clock: Arc<dyn Clock>) -> Self {
        Self { metrics, clock: ClockOf(clock) }
    }
}

impl Collector for Collected {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.metrics.expire(self.clock.0.since_boot());
        for family in self.metrics.families() {
            (family.encode)(&mut encoder)?;
        }
        for (name, help, value) in [
            ("proxy_metric_series_evicted", "Series given up or shared", self.metrics.evicted()),
            (
                "proxy_connection_panics",
                "Tasks of connections that panicked",
                self.metrics.panics.value(),
            ),
        ] {
            let mut counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            counter.encode_counter::<NoLabelSet, u64, u64>(&value, None)?;
        }
        for (name, help, value) in [
            ("proxy_metric_series", "Series held", self.metrics.series() as i64),
            (
                "tcp_outliving_svid_connections",
                "Open connections whose SVID, or their peer's, has expired since",
                self.metrics.outliving.value(),
            ),
            (
                "tcp_withdrawn_anchor_connections",
                "Open connections whose anchor, or their peer's, has been withdrawn since",
                self.metrics.withdrawn.value(),
            ),
            (
                "inbound_connections_waiting",
                "Accepted connections of peers that wait for a slot",
                self.metrics.waiting(Direction::Inbound).value(),
            ),
            (
                "outbound_connections_waiting",
                "Accepted connections of the workload that wait for a slot",
                self.metrics.waiting(Direction::Outbound).value(),
            ),
        ] {
            let mut gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge.encode_gauge(&value)?;
        }
        Ok(())
    }
}

impl fmt::Debug for ClockOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// Of one table. A series is some 300 bytes.
const SERIES_MAX: usize = 4096;
const IDLE_MAX: Duration = Duration::from_secs(600);
/// A SPIFFE ID may have 2,048 bytes; real ones are below this.
const VALUE_CHARS_MAX: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(number: usize) -> Labels {
        Labels::new([("n", number.to_string().as_str())])
    }

    #[test]
    fn a_full_table_gives_up_what_nobody_holds_and_else_shares() {
        let table = Table::<Counter>::new("t");
        let held: Vec<_> = (1..SERIES_MAX).map(|n| table.series(&labels(n))).collect();
        drop(table.series(&labels(0)));
        table.series(&labels(SERIES_MAX)).add(1);
        assert_eq!((table.len(), table.evicted()), (SERIES_MAX as u64, 1));
        let last = table.series(&labels(SERIES_MAX));
        assert_eq!(last.value(), 1);
        // Now all are held: whatever else comes is counted together.
        table.series(&labels(SERIES_MAX + 1)).add(1);
        assert_eq!(table.series(&labels(SERIES_MAX + 2)).value(), 1);
        drop(held);
    }

    #[test]
    fn an_idle_series_expires_and_a_held_one_does_not() {
        let table = Table::<Counter>::new("t");
        let (held, idle) = (table.series(&labels(1)), table.series(&labels(2)));
        drop(idle);
        table.expire(Duration::ZERO);
        assert_eq!(table.expire(IDLE_MAX - Duration::from_secs(1)), 0);
        assert_eq!(table.expire(IDLE_MAX), 1);
        assert_eq!(table.len(), 1);
        drop(held);
    }
}
