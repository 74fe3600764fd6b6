//! What the sidecars tell about themselves: requests by edge, and who they are.
//!
//! A scrape is one look at all of them; two scrapes make a [`Screen`], which is all that a view
//! needs to know.

use std::time::Duration;

use futures::future::try_join_all;
use steadfast_api::UnixTime;
use tokio::time::Instant;

use super::load::{Load, Tally, quantile};
use super::plan::{Plan, Workload};
use super::rotations::Shown;
use super::summary::mtls_rate;
use crate::admin::{self, AdminError, IdentityStatus};
use crate::metrics::{Buckets, Metrics};

/// One look at every sidecar, in the plan's order.
#[derive(Clone, Debug)]
pub(crate) struct Scrape {
    at: Instant,
    sidecars: Vec<Sidecar>,
}

#[derive(Clone, Debug)]
struct Sidecar {
    metrics: Metrics,
    identity: IdentityStatus,
}

/// The calls of one service to another since the load began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Edge {
    pub(crate) from: &'static str,
    pub(crate) to: &'static str,
    /// The caller's SPIFFE ID.
    pub(crate) from_id: String,
    /// Requests that the callee's sidecar has counted with that very ID; less than none if the
    /// sidecar was restarted meanwhile.
    pub(crate) verified: i64,
}

/// Everything that is shown at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Screen {
    pub(crate) elapsed: Duration,
    pub(crate) length: Option<Duration>,
    pub(crate) trust_domain: String,
    pub(crate) svid_ttl: Duration,
    pub(crate) requests: u64,
    pub(crate) failed: u64,
    pub(crate) mtls_rate: Option<f64>,
    pub(crate) first_failure: Option<String>,
    pub(crate) edges: Vec<EdgeRow>,
    pub(crate) workloads: Vec<WorkloadRow>,
    /// How the rotations go, if there are any.
    pub(crate) rotation: Option<Shown>,
    /// Why the sidecars did not tell.
    pub(crate) problem: Option<String>,
}

/// One edge over the last interval.
#[derive(Clone, Debug)]
pub(crate) struct EdgeRow {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) requests_per_s: f64,
    pub(crate) success: Option<f64>,
    pub(crate) p50: Option<Duration>,
    pub(crate) p99: Option<Duration>,
    pub(crate) ends: Ends,
}

/// The TLS identities of an edge, each as the other side has verified it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ends {
    /// Mutual TLS.
    Mutual { client: String, server: String },
    /// No TLS, on purpose: from outside the mesh.
    Outside,
    /// Nothing was verified yet.
    Unverified,
}

/// One workload's identity now.
#[derive(Clone, Debug)]
pub(crate) struct WorkloadRow {
    pub(crate) name: &'static str,
    pub(crate) serial: Option<String>,
    pub(crate) age: Option<Duration>,
    pub(crate) life: Option<Duration>,
    pub(crate) next_renewal: Option<Duration>,
    pub(crate) renewals: u64,
    pub(crate) bundle_seq: Option<u64>,
    pub(crate) last_failure: Option<String>,
}

/// Looks at every sidecar at once.
///
/// # Errors
/// The first that does not tell.
pub(crate) async fn scrape(plan: &Plan) -> Result<Scrape, AdminError> {
    let looks = plan.workloads.iter().map(|workload| async {
        let (metrics, identity) =
            futures::try_join!(admin::metrics(workload.admin), admin::identity(workload.admin))?;
        Ok(Sidecar { metrics, identity })
    });
    Ok(Scrape { at: Instant::now(), sidecars: try_join_all(looks).await? })
}

impl Scrape {
    /// SVIDs that came since an earlier scrape, of all workloads together. A sidecar that was
    /// restarted meanwhile counts what it has had since.
    pub(crate) fn renewals_since(&self, earlier: &Self) -> u64 {
        let pairs = self.sidecars.iter().zip(&earlier.sidecars);
        let counts = pairs.map(|(now, before)| (now.identity.renewals, before.identity.renewals));
        counts.map(|(now, before)| now.checked_sub(before).unwrap_or(now)).sum()
    }

    /// The calls over each edge since an earlier scrape.
    pub(crate) fn edges_since(&self, plan: &Plan, earlier: &Self) -> Vec<Edge> {
        let counts = self.verified(plan).into_iter().zip(earlier.verified(plan));
        plan.edges()
            .zip(counts)
            .map(|((from, to), (now, before))| Edge {
                from: from.name,
                to: to.name,
                from_id: from.spiffe_id.to_string(),
                verified: now - before,
            })
            .collect()
    }

    /// Requests that each edge's callee has counted with the caller's exact SPIFFE ID.
    fn verified(&self, plan: &Plan) -> Vec<i64> {
        let callees = self.sidecars.iter().skip(1);
        plan.edges()
            .zip(callees)
            .map(|((from, _), callee)| {
                let labels = inbound(from);
                callee.metrics.sum("request_total", &labels) as i64
            })
            .collect()
    }

    fn edge_rows(&self, plan: &Plan, before: &Self) -> Vec<EdgeRow> {
        let seconds = self.at.duration_since(before.at).as_secs_f64().max(0.001);
        let sidecars = self.sidecars.iter().zip(&before.sidecars).collect::<Vec<_>>();
        let pairs = sidecars.iter().zip(sidecars.iter().skip(1));
        plan.edges()
            .zip(pairs)
            .map(|((from, to), (caller, callee))| {
                let sum = |side: &(&Sidecar, &Sidecar), name: &str, labels: &[(&str, &str)]| {
                    side.0.metrics.sum(name, labels) - side.1.metrics.sum(name, labels)
                };
                let (inbound, outbound) = (inbound(from), outbound(to));
                let success = |class| {
                    let labels = [inbound.as_slice(), &[("classification", class)]].concat();
                    sum(callee, "response_total", &labels)
                };
                let (good, bad) = (success("success"), success("failure"));
                let latency = latency(caller, &outbound);
                let server = caller.0.metrics.sum("request_total", &outbound) > 0.0;
                let client = callee.0.metrics.sum("request_total", &inbound) > 0.0;
                EdgeRow {
                    from: from.name.to_owned(),
                    to: to.name.to_owned(),
                    requests_per_s: sum(callee, "request_total", &inbound) / seconds,
                    success: (good + bad > 0.0).then(|| good / (good + bad)),
                    p50: latency.quantile(0.5),
                    p99: latency.quantile(0.99),
                    ends: if server && client {
                        Ends::Mutual {
                            client: from.spiffe_id.to_string(),
                            server: to.spiffe_id.to_string(),
                        }
                    } else {
                        Ends::Unverified
                    },
                }
            })
            .collect()
    }

    fn workload_rows(&self, plan: &Plan, now: UnixTime) -> Vec<WorkloadRow> {
        let rows = plan.workloads.iter().zip(&self.sidecars);
        rows.map(|(workload, sidecar)| WorkloadRow::of(workload.name, &sidecar.identity, now))
            .collect()
    }
}

/// What the latest scrapes and the load's own counts show.
pub(crate) struct Observer {
    /// Before the load began.
    pub(crate) baseline: Scrape,
    pub(crate) latest: Scrape,
    tally: Tally,
    at: Instant,
}

impl Observer {
    /// From the scrape before the load.
    pub(crate) fn new(baseline: Scrape, load: &Load) -> Self {
        let latest = baseline.clone();
        Self { baseline, latest, tally: load.tally(), at: Instant::now() }
    }

    /// Looks again.
    pub(crate) async fn look(&mut self, plan: &Plan, load: &Load, now: UnixTime) -> Screen {
        let before = std::mem::replace(&mut self.tally, load.tally());
        let seconds = self.at.elapsed().as_secs_f64().max(0.001);
        self.at = Instant::now();
        let mut edges = vec![ingress(plan, &before, &self.tally, load, seconds)];
        let (workloads, problem) = match scrape(plan).await {
            Ok(scrape) => {
                let before = std::mem::replace(&mut self.latest, scrape);
                edges.extend(self.latest.edge_rows(plan, &before));
                (self.latest.workload_rows(plan, now), None)
            }
            Err(error) => {
                let error = steadfast_process::ErrorChain(&error).to_string();
                (self.latest.workload_rows(plan, now), Some(error))
            }
        };
        let verified = self.latest.edges_since(plan, &self.baseline);
        let verified: Vec<_> = verified.iter().map(|edge| edge.verified).collect();
        let ended = self.tally.answered + self.tally.failed;
        let rate = live_rate(ended, load.tally().sent, &verified);
        Screen {
            elapsed: load.elapsed(),
            length: None,
            trust_domain: plan.trust_domain.to_string(),
            svid_ttl: plan.svid_ttl,
            requests: self.tally.sent,
            failed: self.tally.failed,
            mtls_rate: rate,
            first_failure: self.tally.failures.values().next().map(|(_, first)| first.clone()),
            edges,
            workloads,
            rotation: None,
            problem,
        }
    }
}

/// The rate while requests are under way: an edge may have counted any number between those that
/// had ended before the sidecars were asked and those that had been sent after. Outside of that,
/// it is off by as much as it is outside.
fn live_rate(ended_before: u64, sent_after: u64, counted_by_edge: &[i64]) -> Option<f64> {
    let clear: Vec<_> = counted_by_edge
        .iter()
        .map(|&counted| {
            let (least, most) = (ended_before.cast_signed(), sent_after.cast_signed());
            least + (counted - counted.clamp(least, most.max(least)))
        })
        .collect();
    mtls_rate(ended_before, &clear)
}

impl WorkloadRow {
    fn of(name: &'static str, status: &IdentityStatus, now: UnixTime) -> Self {
        Self {
            name,
            serial: status.serial.clone(),
            age: status.issued_at.map(|at| now.since(at)),
            life: status.issued_at.zip(status.not_after).map(|(from, to)| to.since(from)),
            next_renewal: status.next_renewal.map(|at| at.since(now)),
            renewals: status.renewals,
            bundle_seq: status.bundle_seq,
            last_failure: status.last_failure.clone(),
        }
    }
}

/// What the generator itself has measured.
fn ingress(plan: &Plan, before: &Tally, now: &Tally, load: &Load, seconds: f64) -> EdgeRow {
    let recent = load.recent();
    let (good, bad) = (now.answered - before.answered, now.failed - before.failed);
    EdgeRow {
        from: "you".to_owned(),
        to: plan.workloads.first().map_or("", |first| first.name).to_owned(),
        requests_per_s: (now.sent - before.sent) as f64 / seconds,
        success: (good + bad > 0).then(|| good as f64 / (good + bad) as f64),
        p50: quantile(&recent, 0.5),
        p99: quantile(&recent, 0.99),
        ends: Ends::Outside,
    }
}

fn latency(caller: &(&Sidecar, &Sidecar), labels: &[(&str, &str)]) -> Buckets {
    let of = |sidecar: &Sidecar| sidecar.metrics.buckets("response_latency_ms_bucket", labels);
    of(caller.0).since(&of(caller.1))
}

/// The series of an inbound sidecar for what this caller sent by mutual TLS.
fn inbound(from: &Workload) -> [(&str, &str); 3] {
    [("direction", "inbound"), ("tls", "true"), ("client_id", from.spiffe_id.as_str())]
}

/// The series of an outbound sidecar for what it sent to this callee by mutual TLS.
fn outbound(to: &Workload) -> [(&str, &str); 3] {
    [("direction", "outbound"), ("tls", "true"), ("server_id", to.spiffe_id.as_str())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let domain = "cluster.local".parse().unwrap();
        Plan::new(&domain, Duration::from_secs(30), 0).unwrap()
    }

    fn scrape_of(texts: [&str; 3]) -> Scrape {
        let sidecars = texts.map(|text| Sidecar {
            metrics: Metrics::parse(text),
            identity: IdentityStatus { renewals: 2, ..IdentityStatus::default() },
        });
        Scrape { at: Instant::now(), sidecars: sidecars.to_vec() }
    }

    const ID: &str = "spiffe://cluster.local/ns/demo/sa";

    #[test]
    fn only_requests_with_the_callers_exact_identity_count() {
        let api = format!(
            "request_total{{direction=\"inbound\",tls=\"true\",client_id=\"{ID}/web\"}} 7\n\
             request_total{{direction=\"inbound\",tls=\"true\",client_id=\"{ID}/store\"}} 100\n\
             request_total{{direction=\"inbound\",tls=\"no_identity\",client_id=\"{ID}/web\"}} 100\n\
             request_total{{direction=\"outbound\",tls=\"true\",client_id=\"{ID}/web\"}} 100\n\
             request_total{{direction=\"inbound\",tls=\"true\",client_id=\"{ID}/web2\"}} 100\n"
        );
        let store = format!(
            "request_total{{direction=\"inbound\",tls=\"true\",client_id=\"{ID}/api\"}} 9\n"
        );
        let (now, before) = (scrape_of(["", &api, &store]), scrape_of(["", "", &store]));
        let edges = now.edges_since(&plan(), &before);
        let counted: Vec<_> =
            edges.iter().map(|edge| (edge.from, edge.to, edge.verified)).collect();
        assert_eq!(counted, [("web", "api", 7), ("api", "store", 0)]);
    }

    #[test]
    fn only_renewals_since_the_load_began_count() {
        let renewed = |counts: [u64; 3]| {
            let mut scrape = scrape_of(["", "", ""]);
            for (sidecar, renewals) in scrape.sidecars.iter_mut().zip(counts) {
                sidecar.identity.renewals = renewals;
            }
            scrape
        };
        let before = renewed([2, 2, 5]);
        assert_eq!(before.renewals_since(&before), 0);
        // The last was restarted.
        assert_eq!(renewed([3, 4, 1]).renewals_since(&before), 1 + 2 + 1);
    }

    #[test]
    fn requests_under_way_do_not_blur_the_live_rate() {
        assert_eq!(live_rate(100, 110, &[100, 110]), Some(1.0));
        assert_eq!(live_rate(100, 110, &[99, 105]), Some(0.99));
        assert_eq!(live_rate(100, 110, &[111, 105]), Some(1.01));
        assert_eq!(live_rate(0, 5, &[3, 2]), None);
    }

    #[test]
    fn an_edge_shows_both_identities_only_once_both_sides_have_verified_them() {
        let web = format!(
            "request_total{{direction=\"outbound\",tls=\"true\",server_id=\"{ID}/api\"}} 1\n"
        );
        let api = format!(
            "request_total{{direction=\"inbound\",tls=\"true\",client_id=\"{ID}/web\"}} 1\n"
        );
        let nothing = scrape_of(["", "", ""]);
        let ends = |now: &Scrape| now.edge_rows(&plan(), &nothing)[0].ends.clone();
        assert_eq!(ends(&scrape_of(["", &api, ""])), Ends::Unverified);
        let both = Ends::Mutual { client: format!("{ID}/web"), server: format!("{ID}/api") };
        assert_eq!(ends(&scrape_of([&web, &api, ""])), both);
    }
}
