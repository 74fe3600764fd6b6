//! The series of the controller: where a rotation stands, whom it misses, and what is about to end.
//!
//! Gauges are set from what was seen last, all at once; each label has a bound. A controller that
//! does not lead knows the state alone, and says of the rest that it is nothing: alerts look at the
//! one that leads.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::census::{Member, ProxyStatus, Reason, Round};
use steadfast_rotation_protocol::controller::{Standing, Wait};
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::AnchorState;

/// All series of the controller.
#[derive(Clone, Default)]
pub struct Metrics {
    number: Family<KindLabels, Gauge>,
    phase: Family<PhaseLabels, Gauge>,
    phase_seconds: Family<KindLabels, Seconds>,
    waiting: Family<WaitLabels, Gauge>,
    settled: Gauge,
    missing: Family<ReasonLabels, Gauge>,
    fence_seconds: Seconds,
    paused: Gauge,
    halted: Gauge,
    exemptions: Gauge,
    seq: Gauge,
    standbys: Gauge,
    anchors: Family<AnchorLabels, Seconds>,
    issuer_not_after: Seconds,
    promised_until: Seconds,
    trusting: Gauge,
    holding: Gauge,
    clock_offset: Seconds,
    leads: Gauge,
    ended: Family<EndedLabels, Counter>,
    looks: Family<ResultLabels, Counter>,
    /// Of the past rotations, those that were counted; `None`: nothing was seen yet.
    counted: Option<BTreeSet<u64>>,
}

type Seconds = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    kind: &'static str,
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WaitLabels {
    r#for: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnchorLabels {
    anchor: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndedLabels {
    kind: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

/// What came of a look, for its counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookResult {
    /// Somebody else had written meanwhile.
    Conflict,
    /// It came to nothing.
    Failed,
    /// It was whole.
    Ok,
}

impl Metrics {
    /// Registered as `steadfast_rotation_…`.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        // An alert on a rate needs the zero.
        for result in ["conflict", "failed", "ok"] {
            let _ = metrics.looks.get_or_create(&ResultLabels { result });
        }
        let registry = registry.sub_registry_with_prefix("steadfast_rotation");
        metrics.register_course(registry);
        metrics.register_state(registry);
        metrics
    }

    fn register_course(&self, registry: &mut Registry) {
        let m = self;
        registry.register("number", "Number of the rotation under way; 0: none", m.number.clone());
        registry.register("phase", "1 for the phase that a rotation is in", m.phase.clone());
        let help = "How long a rotation has been in its phase; 0: none is under way";
        registry.register("phase_seconds", help, m.phase_seconds.clone());
        let help = "1 for what is waited for; known to the controller that leads";
        registry.register("waiting", help, m.waiting.clone());
        let help = "Members that have settled in the census that is waited for";
        registry.register("members_settled", help, m.settled.clone());
        let help = "Members that hold the rotation up, by reason; /rotation.json names them";
        registry.register("members_missing", help, m.missing.clone());
        let help = "What is left of the fence that is waited for";
        registry.register("fence_seconds", help, m.fence_seconds.clone());
        let help = "Members that trust an anchor on its way out, by what they said last";
        registry.register("members_trusting_retiring", help, m.trusting.clone());
        let help = "Members with an SVID under an anchor on its way out";
        registry.register("members_holding_retiring", help, m.holding.clone());
        let help = "Rotations that this process has seen end, by kind and outcome";
        registry.register("ended", help, m.ended.clone());
        registry.register("looks", "Looks at everything, by what came of them", m.looks.clone());
        registry.register("leader", "1 while this controller decides", m.leads.clone());
        let help = "Our clock less the store's; beyond 60 s nothing is decided";
        registry.register("clock_offset_seconds", help, m.clock_offset.clone());
    }

    fn register_state(&self, registry: &mut Registry) {
        let m = self;
        registry.register("paused", "1 while phases wait for a person", m.paused.clone());
        let help = "1 while nothing is issued until a person has looked";
        registry.register("halted", help, m.halted.clone());
        registry.register("exemptions", "Members that no census waits for", m.exemptions.clone());
        registry.register("bundle_seq", "Sequence number of the stored bundle", m.seq.clone());
        let help = "Anchors that everyone holds and that sign nothing yet; 0: an emergency would \
                    have to wait for a census";
        registry.register("standbys", help, m.standbys.clone());
        let help = "End of each anchor, in seconds since the epoch";
        registry.register("anchor_not_after_timestamp_seconds", help, m.anchors.clone());
        let help = "End of the issuer that signs, in seconds since the epoch";
        registry.register("issuer_not_after_timestamp_seconds", help, m.issuer_not_after.clone());
        let help = "Until when holders that cannot ack may hold SVIDs under an anchor that \
                    retires; 0: none";
        registry.register("promised_until_timestamp_seconds", help, m.promised_until.clone());
    }

    /// A look is over.
    pub fn looked(&self, result: LookResult) {
        let result = match result {
            LookResult::Conflict => "conflict",
            LookResult::Failed => "failed",
            LookResult::Ok => "ok",
        };
        self.looks.get_or_create(&ResultLabels { result }).inc();
    }

    /// Shows how things stand. `offset_ms` is our clock less the store's.
    pub fn show(&mut self, standing: &Standing, round: Option<&Round>, offset_ms: Option<i64>) {
        self.leads.set(i64::from(standing.leads));
        self.clock_offset.set(offset_ms.unwrap_or(0) as f64 / 1000.0);
        let anchor = standing.waiting.as_ref().filter(|wait| **wait != Wait::Nothing);
        let waiting = anchor.or(standing.issuer_waiting.as_ref());
        self.show_waiting(waiting.filter(|_| standing.leads));
        let Some(state) = &standing.state else { return };
        self.show_course(state, standing.seen_at);
        self.show_state(state);
        self.show_retiring(state, round.filter(|_| standing.leads));
        self.count_ended(state);
    }

    fn show_waiting(&self, waiting: Option<&Wait>) {
        for label in Wait::LABELS {
            let is = waiting.is_some_and(|waiting| waiting.label() == label);
            self.waiting.get_or_create(&WaitLabels { r#for: label }).set(i64::from(is));
        }
        let tally = match waiting {
            Some(Wait::Census(tally)) => Some(tally),
            _ => None,
        };
        self.settled.set(count(tally.map_or(0, |tally| tally.settled.len())));
        for reason in Reason::LABELS {
            let missing = tally.iter().flat_map(|tally| &tally.missing);
            let missing = missing.filter(|missing| missing.reason.label() == reason).count();
            self.missing.get_or_create(&ReasonLabels { reason }).set(count(missing));
        }
        let left = match waiting {
            Some(Wait::Fence { left }) => left.as_secs_f64(),
            _ => 0.0,
        };
        self.fence_seconds.set(left);
    }

    fn show_course(&self, state: &TrustDomainState, now: UnixTime) {
        let anchor = state.rotation.as_ref().map(|r| (r.number, r.phase.name(), r.since));
        let issuer = state.issuer_rotation.as_ref().map(|r| (r.number, r.phase.name(), r.since));
        for (kind, course, phases) in
            [("anchor", anchor, &ANCHOR_PHASES[..]), ("issuer", issuer, &ISSUER_PHASES[..])]
        {
            let number = course.map_or(0, |(number, ..)| number);
            self.number.get_or_create(&KindLabels { kind }).set(gauge(number));
            let seconds = course.map_or(0.0, |(_, _, since)| now.since(since).as_secs_f64());
            self.phase_seconds.get_or_create(&KindLabels { kind }).set(seconds);
            for phase in phases {
                let is = course.is_some_and(|(_, name, _)| name == *phase);
                let labels = PhaseLabels { kind, phase: phase.label() };
                self.phase.get_or_create(&labels).set(i64::from(is));
            }
        }
    }

    fn show_state(&self, state: &TrustDomainState) {
        self.paused.set(i64::from(state.paused));
        self.halted.set(i64::from(state.halted.is_some()));
        self.exemptions.set(count(state.exemptions.len()));
        self.seq.set(gauge(state.seq));
        self.standbys.set(count(state.in_state(AnchorState::Standby).count()));
        // An anchor that has gone to another state, or is gone, leaves no series behind.
        self.anchors.clear();
        for anchor in &state.anchors {
            let labels = AnchorLabels { anchor: anchor.id.short(), state: anchor.state.label() };
            self.anchors.get_or_create(&labels).set(seconds(anchor.not_after));
        }
        let issuer = state.active_issuer().map_or(0.0, |issuer| seconds(issuer.not_after));
        self.issuer_not_after.set(issuer);
        let retiring = |id: KeyId| state.in_state(AnchorState::Retiring).any(|a| a.id == id);
        let promised = state.promised.iter().filter(|promise| retiring(promise.anchor_id));
        let until = promised.map(|promise| promise.not_after).max();
        self.promised_until.set(until.map_or(0.0, seconds));
    }

    fn show_retiring(&self, state: &TrustDomainState, round: Option<&Round>) {
        let (trusting, holding) = round.map_or((0, 0), |round| on_its_way_out(state, round));
        self.trusting.set(count(trusting));
        self.holding.set(count(holding));
    }

    /// What had ended before this process began is nothing that it has seen.
    fn count_ended(&mut self, state: &TrustDomainState) {
        let now: BTreeSet<u64> = state.past.iter().map(|past| past.number).collect();
        if let Some(counted) = &self.counted {
            for past in state.past.iter().filter(|past| !counted.contains(&past.number)) {
                let labels = EndedLabels { kind: past.kind.clone(), outcome: past.outcome.label() };
                self.ended.get_or_create(&labels).inc();
            }
        }
        self.counted = Some(now);
    }
}

/// How many members still trust an anchor on its way out, and how many still hold an SVID under
/// one. Of whom nobody knows anything, the worse is assumed.
fn on_its_way_out(state: &TrustDomainState, round: &Round) -> (usize, usize) {
    let retiring = state.in_state(AnchorState::Retiring).next().is_some();
    let withdrawn = state.in_state(AnchorState::Withdrawn).next().is_some();
    if !retiring && !withdrawn {
        return (0, 0);
    }
    let published = KeyId::from_slice(&state.digest());
    let rank = |m: &Member| (m.instance.started_at, m.open, m.answered, m.last_heard);
    let mut newest: HashMap<&str, &Member> = HashMap::new();
    for member in round.replicas.iter().flat_map(|replica| &replica.members) {
        let known = newest.entry(&member.instance.pod_uid).or_insert(member);
        if rank(member) >= rank(known) {
            *known = member;
        }
    }
    let (mut trusting, mut holding) = (0, 0);
    for listed in round.listed.iter().filter(|listed| listed.proxy == ProxyStatus::Running) {
        let newest = newest.get(listed.pod_uid.as_str());
        let ack = newest.and_then(|member| member.ack.as_ref());
        trusting += usize::from(retiring || ack.is_none_or(|ack| ack.digest != published));
        let under = ack.is_none_or(|ack| {
            ack.svid.is_some_and(|svid| {
                let anchor = state.issuer(svid.issuer).and_then(|i| state.anchor(i.anchor_id));
                anchor.is_none_or(|anchor| {
                    matches!(anchor.state, AnchorState::Retiring | AnchorState::Withdrawn)
                })
            })
        });
        holding += usize::from(under);
    }
    (trusting, holding)
}

fn seconds(at: UnixTime) -> f64 {
    at.as_millis() as f64 / 1000.0
}

fn count(of: usize) -> i64 {
    i64::try_from(of).unwrap_or(i64::MAX)
}

fn gauge(of: u64) -> i64 {
    i64::try_from(of).unwrap_or(i64::MAX)
}

const ANCHOR_PHASES: [PhaseName; 7] = [
    PhaseName::Generating,
    PhaseName::Staged,
    PhaseName::Preparing,
    PhaseName::Canary,
    PhaseName::Activated,
    PhaseName::Draining,
    PhaseName::Withdrawn,
];
const ISSUER_PHASES: [PhaseName; 4] =
    [PhaseName::Preparing, PhaseName::Activated, PhaseName::Draining, PhaseName::Denied];

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use steadfast_identity::authority::found;
    use steadfast_rotation_protocol::Instance;
    use steadfast_rotation_protocol::census::{Missing, Tally};
    use steadfast_rotation_protocol::trust_domain::{Outcome, PastRotation};

    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);

    fn shown(standing: &Standing, metrics: &mut Metrics, registry: &Registry) -> String {
        metrics.show(standing, None, Some(1500));
        let mut text = String::new();
        encode(&mut text, registry).unwrap();
        text
    }

    fn standing() -> Standing {
        let state = found(&"cluster.local".parse().unwrap(), NOW).unwrap().state;
        Standing { state: Some(state), seen_at: NOW, leads: true, ..Standing::default() }
    }

    #[test]
    fn what_an_alert_needs_is_there_from_the_first_look() {
        let mut registry = Registry::default();
        let mut metrics = Metrics::new(&mut registry);
        let text = shown(&standing(), &mut metrics, &registry);
        for line in [
            "steadfast_rotation_standbys 1",
            "steadfast_rotation_halted 0",
            "steadfast_rotation_leader 1",
            "steadfast_rotation_clock_offset_seconds 1.5",
            "steadfast_rotation_number{kind=\"anchor\"} 0",
            "steadfast_rotation_phase{kind=\"anchor\",phase=\"draining\"} 0",
            "steadfast_rotation_members_missing{reason=\"behind\"} 0",
            "steadfast_rotation_looks_total{result=\"failed\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        let anchors = text.lines().filter(|l| l.contains("anchor_not_after_timestamp_seconds{"));
        assert_eq!(anchors.count(), 2);
    }

    #[test]
    fn whoever_is_missing_is_counted_by_reason_where_it_is_known() {
        let mut registry = Registry::default();
        let mut metrics = Metrics::new(&mut registry);
        let instance = Instance { pod_uid: "u".to_owned(), started_at: NOW };
        let missing = Missing { name: "demo/web".to_owned(), instance, reason: Reason::Unanswered };
        let tally = Tally { missing: vec![missing], ..Tally::default() };
        let mut standing = Standing { waiting: Some(Wait::Census(tally)), ..standing() };
        let missing = "steadfast_rotation_members_missing{reason=\"unanswered\"} ";
        let text = shown(&standing, &mut metrics, &registry);
        assert!(text.contains(&format!("{missing}1\n")), "{text}");
        assert!(text.contains("steadfast_rotation_waiting{for=\"census\"} 1\n"), "{text}");
        standing.leads = false;
        let text = shown(&standing, &mut metrics, &registry);
        assert!(text.contains(&format!("{missing}0\n")), "{text}");
    }

    #[test]
    fn what_the_issuer_waits_for_is_told_while_no_anchor_waits() {
        let mut registry = Registry::default();
        let mut metrics = Metrics::new(&mut registry);
        let mut standing = Standing { issuer_waiting: Some(Wait::Round), ..standing() };
        for (waiting, label) in [(Wait::Nothing, "round"), (Wait::Key, "key")] {
            standing.waiting = Some(waiting);
            let text = shown(&standing, &mut metrics, &registry);
            let line = format!("steadfast_rotation_waiting{{for=\"{label}\"}} 1\n");
            assert!(text.contains(&line), "{text}");
        }
    }

    #[test]
    fn a_rotation_that_ends_is_counted_once_and_one_from_before_not_at_all() {
        let mut registry = Registry::default();
        let mut metrics = Metrics::new(&mut registry);
        let mut standing = standing();
        let past = |number| PastRotation {
            number,
            kind: "anchor".to_owned(),
            by: String::new(),
            started: NOW,
            ended: NOW,
            outcome: Outcome::Done,
            steps: Vec::new(),
        };
        standing.state.as_mut().unwrap().past.push(past(1));
        let before = shown(&standing, &mut metrics, &registry);
        assert!(!before.contains("steadfast_rotation_ended_total{"), "{before}");
        standing.state.as_mut().unwrap().past.push(past(2));
        for _ in 0..2 {
            let text = shown(&standing, &mut metrics, &registry);
            let line = "steadfast_rotation_ended_total{kind=\"anchor\",outcome=\"done\"} 1\n";
            assert!(text.contains(line), "{text}");
        }
    }
}
