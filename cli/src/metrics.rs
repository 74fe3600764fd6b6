//! A scrape of `/metrics` as values: sums over series, and quantiles of histograms.

use std::collections::BTreeMap;
use std::time::Duration;

/// The samples of one scrape.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics(Vec<Sample>);

/// One line of a scrape.
#[derive(Clone, Debug, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// The cumulated buckets of one histogram, summed over series: upper bound in ms, count.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Buckets(BTreeMap<u64, f64>);

impl Metrics {
    /// Reads Prometheus' and OpenMetrics' text. A line that is neither is passed over: what is
    /// read here is shown to a person and decides nothing.
    pub(crate) fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(Sample::parse).collect())
    }

    /// The sum of all series of this name with these labels.
    pub(crate) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.select(name, labels).map(|sample| sample.value).sum()
    }

    /// The buckets of a histogram over all series with these labels.
    pub(crate) fn buckets(&self, name: &str, labels: &[(&str, &str)]) -> Buckets {
        let mut buckets = BTreeMap::new();
        for sample in self.select(name, labels) {
            let Some(le) = sample.labels.get("le").and_then(|le| le.parse::<f64>().ok()) else {
                continue;
            };
            let le = if le.is_finite() { le.round() as u64 } else { u64::MAX };
            *buckets.entry(le).or_default() += sample.value;
        }
        Buckets(buckets)
    }

    fn select<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| {
            let has = |(key, value): &(&str, &str)| {
                sample.labels.get(*key).is_some_and(|have| have == value)
            };
            sample.name == name && labels.iter().all(has)
        })
    }
}

impl Buckets {
    /// What has been added since an earlier scrape.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let less = |(le, count): (&u64, &f64)| {
            (*le, (count - earlier.0.get(le).copied().unwrap_or(0.0)).max(0.0))
        };
        Self(self.0.iter().map(less).collect())
    }

    /// The value below which a share `q` of what was counted lies, within its bucket by its rank;
    /// `None` if nothing was counted.
    pub(crate) fn quantile(&self, q: f64) -> Option<Duration> {
        let total = self.0.values().copied().fold(0.0, f64::max);
        if total <= 0.0 {
            return None;
        }
        let rank = q * total;
        let (mut below, mut lower_ms) = (0.0, 0.0);
        for (le, count) in &self.0 {
            if *count >= rank {
                // What is above the last finite bound is shown as that bound.
                let upper_ms = if *le == u64::MAX { lower_ms } else { *le as f64 };
                let share = if *count > below { (rank - below) / (count - below) } else { 1.0 };
                let millis = lower_ms + (upper_ms - lower_ms) * share;
                return Some(Duration::from_secs_f64(millis / 1000.0));
            }
            (below, lower_ms) = (*count, *le as f64);
        }
        None
    }
}

impl Sample {
    fn parse(line: &str) -> Option<Self> {
        if line.starts_with('#') {
            return None;
        }
        let name_end = line.find(['{', ' '])?;
        let (name, mut rest) = line.split_at(name_end);
        let mut labels = BTreeMap::new();
        if let Some(inside) = rest.strip_prefix('{') {
            rest = inside;
            loop {
                rest = rest.trim_start_matches(',');
                if let Some(after) = rest.strip_prefix('}') {
                    rest = after;
                    break;
                }
                let (key, value) = rest.split_once("=\"")?;
                let (value, after) = unescape(value)?;
                labels.insert(key.to_owned(), value);
                rest = after;
            }
        }
        let value = rest.split_whitespace().next()?.parse().ok()?;
        Some(Self { name: name.to_owned(), labels, value })
    }
}

/// A label's value up to its closing quote, and what is behind it.
fn unescape(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match chars.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRAPE: &str = "# HELP request_total Requests.\n\
        request_total{direction=\"inbound\",client_id=\"spiffe://a/b\",odd=\"a,\\\"b\\\"}\"} 7\n\
        request_total{direction=\"outbound\"} 2 1700000000\n\
        up 1\n\
        latency_ms_bucket{le=\"1\"} 10\n\
        latency_ms_bucket{le=\"10.0\"} 19\n\
        latency_ms_bucket{le=\"+Inf\"} 20\n\
        broken{ 3\n\n";

    #[test]
    fn series_are_summed_by_their_labels() {
        let metrics = Metrics::parse(SCRAPE);
        assert_eq!(metrics.sum("request_total", &[]), 9.0);
        assert_eq!(metrics.sum("request_total", &[("client_id", "spiffe://a/b")]), 7.0);
        assert_eq!(metrics.sum("request_total", &[("client_id", "spiffe://a/")]), 0.0);
        assert_eq!(metrics.sum("up", &[]), 1.0);
        assert_eq!(metrics.sum("request_total", &[("odd", "a,\"b\"}")]), 7.0);
    }

    #[test]
    fn quantiles_lie_in_their_bucket() {
        let buckets = Metrics::parse(SCRAPE).buckets("latency_ms_bucket", &[]);
        assert_eq!(buckets.quantile(0.25), Some(Duration::from_micros(500)));
        assert_eq!(buckets.quantile(0.725), Some(Duration::from_millis(5).mul_f64(1.1)));
        assert_eq!(buckets.quantile(1.0), Some(Duration::from_millis(10)));
        assert_eq!(Buckets::default().quantile(0.5), None);
        assert_eq!(buckets.since(&buckets).quantile(0.5), None);
    }
}
