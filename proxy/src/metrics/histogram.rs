//! A histogram of milliseconds in atomics: observing takes no lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{MetricEncoder, NoLabelSet};

/// Latencies by Linkerd's buckets.
#[derive(Debug, Default)]
pub(super) struct Histogram {
    /// One for each bound, and one for what is above them all.
    counts: [AtomicU64; BOUNDS_MS.len() + 1],
    sum_micros: AtomicU64,
}

impl Histogram {
    pub(super) fn observe(&self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_MS.partition_point(|&bound| bound * 1000 < micros);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_micros.fetch_add(micros, Ordering::Relaxed);
    }

    pub(super) fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        let bounds = BOUNDS_MS.iter().map(|&bound| bound as f64).chain([f64::INFINITY]);
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        let buckets: Vec<_> = bounds.zip(counts).collect();
        // Of the same reading as the buckets, so that a scrape is consistent in itself.
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = self.sum_micros.load(Ordering::Relaxed) as f64 / 1000.0;
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }
}

/// Linkerd's.
const BOUNDS_MS: [u64; 25] = [
    1, 2, 3, 4, 5, 10, 20, 30, 40, 50, 100, 200, 300, 400, 500, 1000, 2000, 3000, 4000, 5000,
    10_000, 20_000, 30_000, 40_000, 50_000,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_counts_in_the_first_bucket_that_holds_it() {
        let histogram = Histogram::default();
        for (micros, bucket) in [(0, 0), (1000, 0), (1001, 1), (50_000_000, 24), (u64::MAX, 25)] {
            let before = histogram.counts[bucket].load(Ordering::Relaxed);
            histogram.observe(Duration::from_micros(micros));
            assert_eq!(histogram.counts[bucket].load(Ordering::Relaxed), before + 1, "{micros}");
        }
    }
}
