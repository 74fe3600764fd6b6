//! Rotations told from beginning to end, in a world where everybody does what he should unless the
//! test says otherwise.

use steadfast_api::KeyId;
use steadfast_rotation_protocol::census::Reason;
use steadfast_rotation_protocol::controller::Wait;
use steadfast_rotation_protocol::orders::OrderRefused;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{AnchorState, Selector};
use steadfast_rotation_protocol::{TrustDomainState, journal};

use crate::world::{Action, Config, Faults, Order, World, key};

#[test]
fn a_rotation_goes_through_its_phases_and_ends_with_the_standby_active() {
    let mut told = Told::new(&[Order::Rotate]);
    let phases = told.run_to_the_end();
    use PhaseName::{Activated, Draining, Generating, Preparing, Staged, Withdrawn};
    assert_eq!(phases, [Generating, Staged, Preparing, Activated, Draining, Withdrawn]);
    assert_eq!(told.anchors(), [(B, AnchorState::Active), (S, AnchorState::Standby)]);
    let state = &told.world.state;
    assert_eq!((state.seq, state.tombstones.as_slice()), (3, [key(A)].as_slice()));
    assert!(state.condemned.is_empty() && !told.world.has_key(key(A)), "its key is destroyed");
    assert!(told.world.has_key(key(B)) && told.world.has_key(key(S)));
}

#[test]
fn an_anchor_that_was_given_becomes_active_and_the_standby_stays() {
    let mut told = Told::new(&[Order::RotateGiven]);
    told.run_to_the_end();
    assert_eq!(told.anchors(), [(B, AnchorState::Standby), (GIVEN, AnchorState::Active)]);
}

#[test]
fn a_paused_rotation_waits_in_its_phase_and_goes_on_when_it_is_resumed() {
    let mut told = Told::new(&[Order::Rotate]);
    told.run_to(PhaseName::Draining);
    told.order(|state| state.pause(true));
    for _ in 0..10 {
        told.step();
    }
    assert_eq!(told.phase(), Some(PhaseName::Draining));
    assert_eq!(told.waiting(), Wait::Paused);
    told.order(|state| state.pause(false));
    told.run_to_the_end();
}

#[test]
fn an_abort_ends_idle_with_a_standby_from_every_phase_that_has_a_way_back() {
    use PhaseName::{Activated, Draining, Generating, Preparing, Staged, Withdrawn};
    for phase in [Generating, Staged, Preparing, Activated, Draining] {
        let mut told = Told::new(&[Order::Rotate]);
        told.run_to(phase);
        told.order(|state| state.abort().unwrap());
        told.run_to_the_end();
        let standby = if matches!(phase, Activated | Draining) { S } else { B };
        let expected = [(A, AnchorState::Active), (standby, AnchorState::Standby)];
        assert_eq!(told.anchors(), expected, "from {phase:?}");
    }
    let mut told = Told::new(&[Order::Rotate]);
    told.run_to(Withdrawn);
    let refused = TrustDomainState::clone(&told.world.state).abort().unwrap_err();
    assert!(matches!(&refused, OrderRefused::Abort(why) if why.contains("new key")), "{refused}");
}

#[test]
fn whoever_does_not_answer_is_named_and_holds_the_rotation_up_until_he_is_exempt() {
    let mut told = Told::new(&[Order::Rotate, Order::ExemptMissing]);
    told.run_to(PhaseName::Staged);
    told.world = told.world.after(&told.config, Action::Cut(0)).unwrap();
    for _ in 0..20 {
        told.step();
    }
    assert_eq!(told.phase(), Some(PhaseName::Staged));
    let Wait::Census(tally) = told.waiting() else { panic!("{:?}", told.waiting()) };
    let [missing] = tally.missing.as_slice() else { panic!("{tally:?}") };
    assert!(matches!(missing.reason, Reason::NotConnected { .. }), "{missing:?}");
    told.act(Action::Give);
    told.run_to_the_end();
    assert_eq!(told.world.state.exemptions.len(), 1, "it has not been heard of again");
    let pod = told.world.state.exemptions[0].instance.pod_uid.clone();
    let refused = TrustDomainState::clone(&told.world.state).unexempt(&pod).unwrap_err();
    assert!(refused.to_string().contains("ends by itself"), "{refused}");
}

#[test]
fn a_clock_that_is_off_is_named_and_holds_a_rotation_up_until_it_is_right() {
    for phase in [PhaseName::Staged, PhaseName::Draining] {
        let mut told = Told::new(&[Order::Rotate]);
        told.run_to(phase);
        told.act(Action::Drift(0));
        for _ in 0..20 {
            told.step();
        }
        assert_eq!(told.phase(), Some(phase));
        let Wait::Census(tally) = told.waiting() else { panic!("{:?}", told.waiting()) };
        let [missing] = tally.missing.as_slice() else { panic!("{tally:?}") };
        assert!(matches!(missing.reason, Reason::ClockOff { .. }), "{missing:?}");
        told.act(Action::Adjust(0));
        told.act(Action::Adjust(1));
        told.run_to_the_end();
    }
}

#[test]
fn a_controller_whose_own_clock_is_off_does_nothing_and_says_so() {
    for offset_ms in [-1, 1] {
        let mut told = Told::new(&[Order::Rotate]);
        told.run_to(PhaseName::Staged);
        told.config.controller_clock_ms = Some(offset_ms);
        for _ in 0..20 {
            told.step();
        }
        assert_eq!(told.phase(), Some(PhaseName::Staged));
        assert_eq!(told.waiting(), Wait::Clock { offset_ms });
        told.config.controller_clock_ms = Some(0);
        told.run_to_the_end();
    }
}

#[test]
fn a_stolen_active_anchor_is_replaced_at_once_and_a_new_standby_follows() {
    let mut told = Told::new(&[Order::TaintActive]);
    let phases = told.run_to_the_end();
    use PhaseName::{Activated, Draining, Generating, Preparing, Staged, Withdrawn};
    assert_eq!(phases, [Preparing, Activated, Draining, Withdrawn, Generating, Staged]);
    assert_eq!(told.anchors(), [(B, AnchorState::Active), (S, AnchorState::Standby)]);
    assert!(!told.world.has_key(key(A)));
}

#[test]
fn a_stolen_standby_leaves_the_bundle_at_once_whatever_is_under_way() {
    for phase in [PhaseName::Staged, PhaseName::Activated, PhaseName::Draining] {
        let mut told = Told::new(&[Order::Rotate]);
        told.run_to(phase);
        let standby = if phase == PhaseName::Staged { B } else { S };
        let deadline = std::time::Duration::from_secs(1);
        told.order(|state| state.taint(key(standby), String::new(), deadline).unwrap());
        told.act(Action::Look(0));
        let state = &told.world.state;
        assert!(state.published().all(|anchor| anchor.id != key(standby)), "{phase:?}");
        assert!(state.tombstones.contains(&key(standby)), "{phase:?}");
        told.run_to_the_end();
    }
}

#[test]
fn a_stolen_issuer_is_denied_after_everybody_has_another() {
    let mut told = Told::new(&[Order::IssuerStolen]);
    let old = told.world.state.active_issuer;
    told.act(Action::Give);
    for _ in 0..40 {
        told.step();
    }
    let state = &told.world.state;
    assert!(state.issuer_rotation.is_none() && state.active_issuer != old);
    assert!(state.denies(old));
    assert_eq!(state.seq, 2);
}

#[test]
fn what_was_decided_is_decided_again_from_the_journal() {
    let mut told = Told::new(&[Order::Rotate]);
    let mut journal = String::new();
    told.act(Action::Give);
    for _ in 0..60 {
        journal.push_str(&serde_json::to_string(&told.world.line(&told.config, 0)).unwrap());
        journal.push('\n');
        told.step();
    }
    assert_eq!(journal::steps(&journal).filter_map(Result::ok).count(), 60);
    let first = |journal: &str| journal::steps(journal).find_map(Result::err).unwrap().to_string();
    let bent = first(&journal.replace("\"paused\":false", "\"paused\":true"));
    assert!(bent.starts_with("line "), "{bent}");
    assert!(first("no line").contains("line 1"));
}

#[test]
fn a_canary_that_fails_is_named_and_holds_the_rotation_up_and_an_abort_leads_back() {
    let mut told = Told::new(&[Order::RotateCanary]);
    told.run_to(PhaseName::Canary);
    told.step();
    told.act(Action::Fail(0));
    told.step();
    assert_eq!(told.phase(), Some(PhaseName::Canary));
    let Wait::Canary(standing) = told.waiting() else { panic!("{:?}", told.waiting()) };
    assert_eq!((standing.canaries, standing.failures.len()), (1, 1), "{standing:?}");
    assert_eq!(standing.failures[0].name, "a");
    told.order(|state| state.abort().unwrap());
    told.run_to_the_end();
    assert_eq!(told.anchors(), [(A, AnchorState::Active), (S, AnchorState::Standby)]);
}

#[test]
fn canaries_that_do_well_lead_on_and_a_plan_that_selects_nobody_is_told_before() {
    let mut told = Told::new(&[Order::RotateCanary]);
    let phases = told.run_to_the_end();
    assert!(phases.contains(&PhaseName::Canary), "{phases:?}");
    assert_eq!(told.anchors(), [(B, AnchorState::Active), (S, AnchorState::Standby)]);
    let mut told = Told::new(&[Order::RotateCanary]);
    told.act(Action::Give);
    told.order(|state| {
        let canary = state.requested.as_mut().and_then(|request| request.canary.as_mut());
        canary.unwrap().selector = Selector::Namespace("nobody".to_owned());
    });
    for _ in 0..60 {
        told.step();
    }
    assert_eq!(told.phase(), Some(PhaseName::Preparing));
    let Wait::Canary(standing) = told.waiting() else { panic!("{:?}", told.waiting()) };
    assert_eq!(standing.canaries, 0);
}

/// A world, and what is told of it.
pub(crate) struct Told {
    pub(crate) config: Config,
    pub(crate) world: World,
}

impl Told {
    pub(crate) fn new(orders: &[Order]) -> Self {
        let config = Config {
            faults: Faults { cuts: 1, failures: 1, drifts: 1, ..Faults::default() },
            ..crate::worlds::world("", orders)
        };
        let world = World::new(&config);
        Self { config, world }
    }

    pub(crate) fn act(&mut self, action: Action) {
        if let Some(next) = self.world.after(&self.config, action) {
            self.world = next;
        }
        assert_eq!(self.world.broken, None);
    }

    pub(crate) fn order(&mut self, order: impl FnOnce(&mut TrustDomainState)) {
        order(std::sync::Arc::make_mut(&mut self.world.state));
        self.world.revision += 1;
    }

    /// Everybody does his part, once.
    pub(crate) fn step(&mut self) {
        self.world.go_well(&self.config);
        assert_eq!(self.world.broken, None);
    }

    pub(crate) fn run_to(&mut self, phase: PhaseName) {
        self.act(Action::Give);
        for _ in 0..100 {
            if self.phase() == Some(phase) {
                return;
            }
            self.step();
        }
        panic!("{phase:?} was not reached: {:#?}", self.world);
    }

    /// The phases that were seen, each once.
    pub(crate) fn run_to_the_end(&mut self) -> Vec<PhaseName> {
        if self.world.state.rotation.is_none() {
            self.act(Action::Give);
        }
        let mut phases = Vec::new();
        for _ in 0..200 {
            self.step();
            let phase = self.phase();
            if phase.is_some() && phases.last() != phase.as_ref() {
                phases.extend(phase);
            }
            if self.world.settled_down()
                && self.world.state.condemned.is_empty()
                && self.waiting() == Wait::Nothing
            {
                return phases;
            }
        }
        panic!("no end after {phases:?}: {:?}\n{:#?}", self.waiting(), self.world);
    }

    pub(crate) fn phase(&self) -> Option<PhaseName> {
        self.world.phase()
    }

    pub(crate) fn waiting(&self) -> Wait {
        self.world.waiting(&self.config, 0)
    }

    /// The anchors that there are, the older first.
    pub(crate) fn anchors(&self) -> Vec<(u8, AnchorState)> {
        let mut anchors: Vec<_> =
            self.world.state.anchors.iter().map(|a| (number(a.id), a.state)).collect();
        anchors.sort_unstable();
        anchors
    }
}

fn number(id: KeyId) -> u8 {
    id.as_bytes()[0]
}

const A: u8 = 1;
const B: u8 = 2;
const S: u8 = 3;
const GIVEN: u8 = 9;
