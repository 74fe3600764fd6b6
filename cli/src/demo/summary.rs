//! What a demo comes to: the numbers that `--json` prints, and the table for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::load::{Tally, Unsent, quantile};
use super::observe::Edge;
use super::rotations::{Performed, ROTATIONS};
use crate::output::Paint;

/// The numbers of a whole demo. A rate of no request at all is none.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) requests: u64,
    pub(crate) failed: u64,
    pub(crate) success_rate: Option<f64>,
    pub(crate) mtls_rate: Option<f64>,
    pub(crate) svid_renewals: u64,
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
    pub(crate) duration_s: f64,
    /// Those that are over; `None`: none was wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rotations: Option<Vec<Performed>>,
    #[serde(skip)]
    edges: Vec<Edge>,
    #[serde(skip)]
    failures: BTreeMap<&'static str, (u64, String)>,
    #[serde(skip)]
    pub(crate) unsent: Option<Unsent>,
}

impl Summary {
    /// Of what the generator has counted and what the sidecars have; no edges if these do not tell.
    pub(crate) fn of(tally: &Tally, edges: &[Edge], renewals: u64, length: Duration) -> Self {
        let millis = |q| {
            let latency = quantile(&tally.latency, q)?;
            Some((latency.as_secs_f64() * 100_000.0).round() / 100.0)
        };
        let rate = |part: u64| (tally.sent > 0).then(|| part as f64 / tally.sent as f64);
        let counted: Vec<_> = edges.iter().map(|edge| edge.verified).collect();
        let mut failures = tally.failures.clone();
        let unanswered = tally.sent - tally.answered - tally.failed;
        if unanswered > 0 {
            failures.insert("unanswered", (unanswered, "still under way at the end".to_owned()));
        }
        Self {
            requests: tally.sent,
            failed: tally.failed + unanswered,
            success_rate: rate(tally.answered),
            mtls_rate: mtls_rate(tally.sent, &counted),
            svid_renewals: renewals,
            p50_ms: millis(0.5),
            p99_ms: millis(0.99),
            duration_s: (length.as_secs_f64() * 100.0).round() / 100.0,
            rotations: None,
            edges: edges.to_vec(),
            failures,
            unsent: tally.unsent,
        }
    }

    /// Whether no request failed, each was seen with its caller's identity on its whole way, and
    /// every rotation that was wanted is over.
    pub(crate) fn is_well(&self) -> bool {
        let restarted = self.rotations.iter().flatten().any(|rotation| rotation.restarts > 0);
        self.failed == 0
            && !restarted
            && !self.is_cut_short()
            && (self.requests == 0 || self.mtls_rate == Some(1.0))
    }

    fn is_cut_short(&self) -> bool {
        self.rotations.as_ref().is_some_and(|performed| performed.len() < ROTATIONS)
    }

    /// For people.
    pub(crate) fn table(&self, paint: Paint) -> String {
        let mut text = format!("\n{}\n", paint.bold("Summary"));
        let mut row = |name: &str, value: String| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {name:<14}{value}");
        };
        let failed = format!("{} failed", self.failed);
        let failed = if self.failed == 0 { paint.green(&failed) } else { paint.red(&failed) };
        row("requests", format!("{} in {} s, {failed}", self.requests, self.duration_s));
        if let Some(unsent) = self.unsent {
            row("warning", paint.red(&unsent.to_string()));
        }
        row("success", percent(self.success_rate));
        let mtls = percent(self.mtls_rate);
        let mtls = if self.mtls_rate == Some(1.0) { paint.green(&mtls) } else { paint.red(&mtls) };
        row(
            "mutual TLS",
            match self.edges.is_empty() {
                true => "not known: the sidecars no longer tell".to_owned(),
                false => format!("{mtls}  with the caller's exact SPIFFE ID, on every edge"),
            },
        );
        let ms = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |ms| format!("{ms} ms"));
        row("latency", format!("p50 {}, p99 {}", ms(self.p50_ms), ms(self.p99_ms)));
        row("renewals", format!("{} SVIDs renewed while requests flowed", self.svid_renewals));
        for rotation in self.rotations.iter().flatten() {
            let Performed { kind, phases, failed_requests, restarts } = rotation;
            let seconds: f64 = phases.iter().map(|phase| phase.seconds).sum();
            let phases: Vec<_> =
                phases.iter().map(|phase| format!("{} {} s", phase.name, phase.seconds)).collect();
            let name = format!("rotation: {kind}");
            let _ = writeln!(
                text,
                "  {name:<21}{seconds:.1} s, {failed_requests} failed requests, {restarts} restarts\n\
                 \x20                      {}",
                phases.join(", ")
            );
        }
        if !self.is_well() {
            text.push_str(&self.problems());
        }
        text
    }

    /// What went wrong, in lines.
    pub(crate) fn problems(&self) -> String {
        let mut text = String::new();
        for (kind, (count, first)) in &self.failures {
            let _ = writeln!(text, "  {count} × {kind}; the first: {first}");
        }
        for edge in self.edges.iter().filter(|edge| edge.verified != self.requests.cast_signed()) {
            let _ = writeln!(
                text,
                "  {} → {}: its sidecar counted {} requests of {} by mutual TLS, and {} were sent",
                edge.from, edge.to, edge.verified, edge.from_id, self.requests
            );
        }
        if self.is_cut_short() {
            let performed = self.rotations.iter().flatten().count();
            let _ = writeln!(text, "  only {performed} of {ROTATIONS} rotations were performed");
        }
        text
    }
}

/// The share of the generated requests that were seen with their caller's exact SPIFFE ID by every
/// inbound sidecar on their way.
///
/// Each generated request makes exactly one call over each edge, so each edge's count over the
/// requests should be 1. The rate is that of the worst edge: the lowest if one is below 1, else the
/// highest. Nothing is capped: a request too many shows as much as one too few.
pub(crate) fn mtls_rate(requests: u64, counted_by_edge: &[i64]) -> Option<f64> {
    if requests == 0 {
        return None;
    }
    let rates = || counted_by_edge.iter().map(|counted| *counted as f64 / requests as f64);
    let lowest = rates().min_by(f64::total_cmp)?;
    if lowest < 1.0 { Some(lowest) } else { rates().max_by(f64::total_cmp) }
}

/// A share for people: only what is whole is shown as whole.
pub(crate) fn percent(share: Option<f64>) -> String {
    match share {
        None => "–".to_owned(),
        Some(1.0) => "100 %".to_owned(),
        Some(share) if share < 1.0 => format!("{:.2} %", (share * 10_000.0).floor() / 100.0),
        Some(share) => format!("{:.2} %", (share * 10_000.0).ceil() / 100.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_one_only_if_every_edge_has_seen_every_request_once() {
        for (requests, counted, rate) in [
            (100, vec![100, 100], Some(1.0)),
            (100, vec![100, 99], Some(0.99)),
            (100, vec![101, 100], Some(1.01)),
            // One too few is never balanced by one too many.
            (100, vec![150, 99], Some(0.99)),
            (100, vec![0, 100], Some(0.0)),
            // A sidecar that was restarted counts from zero: less than before.
            (100, vec![-5, 100], Some(-0.05)),
            (0, vec![0, 0], None),
            (100, vec![], None),
        ] {
            assert_eq!(mtls_rate(requests, &counted), rate, "{counted:?}");
        }
    }

    #[test]
    fn what_is_not_whole_is_not_shown_as_whole() {
        assert_eq!(percent(Some(1.0)), "100 %");
        assert_eq!(percent(Some(0.99999)), "99.99 %");
        assert_eq!(percent(Some(1.00001)), "100.01 %");
        assert_eq!(percent(None), "–");
    }

    fn edge(verified: i64) -> Edge {
        Edge {
            from: "web",
            to: "api",
            from_id: "spiffe://cluster.local/ns/demo/sa/web".to_owned(),
            verified,
        }
    }

    #[test]
    fn the_json_has_the_promised_fields_and_no_others() {
        let mut tally = Tally::for_test(3);
        let summary = Summary::of(&tally, &[edge(3)], 2, Duration::from_millis(1500));
        assert!(summary.is_well());
        let json = serde_json::to_value(&summary).unwrap();
        let keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let mut promised = vec![
            "requests",
            "failed",
            "success_rate",
            "mtls_rate",
            "svid_renewals",
            "p50_ms",
            "p99_ms",
            "duration_s",
        ];
        promised.sort_unstable();
        let mut sorted = keys;
        sorted.sort_unstable();
        assert_eq!(sorted, promised);
        assert_eq!(json["duration_s"], 1.5);
        assert_eq!(json["mtls_rate"], 1.0);
        // Sidecars that no longer tell prove nothing.
        assert!(!Summary::of(&tally, &[], 2, Duration::ZERO).is_well());
        // A request that was never answered is no success either.
        tally.sent = 4;
        let summary = Summary::of(&tally, &[edge(4)], 2, Duration::ZERO);
        assert_eq!((summary.failed, summary.is_well()), (1, false));
    }

    #[test]
    fn rotations_that_were_interrupted_are_told_and_are_no_success() {
        let mut summary = Summary::of(&Tally::for_test(3), &[edge(3)], 0, Duration::from_secs(1));
        let performed =
            Performed { kind: "issuer", phases: Vec::new(), failed_requests: 0, restarts: 0 };
        for (performed, well) in [(Vec::new(), false), (vec![performed.clone()], false)]
            .into_iter()
            .chain([(vec![performed; ROTATIONS], true)])
        {
            let count = performed.len();
            summary.rotations = Some(performed);
            assert_eq!(summary.is_well(), well, "{count}");
            let json = serde_json::to_value(&summary).unwrap();
            assert_eq!(json["rotations"].as_array().unwrap().len(), count);
            let told = format!("only {count} of {ROTATIONS} rotations were performed");
            assert_eq!(summary.table(Paint::plain()).contains(&told), !well);
        }
    }

    #[test]
    fn a_machine_that_is_too_slow_is_a_warning_and_no_failure_of_the_mesh() {
        let mut tally = Tally::for_test(3);
        tally.unsent = Some(Unsent { count: 7, rate_per_s: 10 });
        let summary = Summary::of(&tally, &[edge(3)], 0, Duration::from_secs(1));
        assert!(summary.is_well());
        assert_eq!((summary.requests, summary.success_rate), (3, Some(1.0)));
        let text = summary.table(Paint::plain());
        assert!(text.contains("7 requests were due and not sent"), "{text}");
    }

    #[test]
    fn the_table_says_what_went_wrong() {
        let mut tally = Tally::for_test(2);
        (tally.sent, tally.failed) = (3, 1);
        tally.failures.insert("not a 200", (1, "answered 503".to_owned()));
        let text = Summary::of(&tally, &[edge(2)], 0, Duration::ZERO).table(Paint::plain());
        for words in ["1 failed", "1 × not a 200; the first: answered 503", "counted 2 requests"] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
    }
}
