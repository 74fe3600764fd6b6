//! Small histories with everything that can go wrong, one large one, and defects made on purpose,
//! each of which must be found.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

use steadfast_chaos::{Counts, Hazard, Mutant, Outcome, Wanted, run};

fn wanted(seed: u64) -> Wanted {
    Wanted { seed, workloads: 20, days: 20, hazard: Hazard::All, mutant: None, told: false }
}

#[track_caller]
fn assert_held(wanted: Wanted, outcome: &Outcome) {
    let Wanted { seed, workloads, days, .. } = wanted;
    let hazard = wanted.hazard.name();
    if let Some(broken) = &outcome.broken {
        panic!(
            "{} does not hold at {}: {}\nstep by step: cargo run --release -p steadfast-chaos -- \
             --seed {seed} --workloads {workloads} --days {days} --hazard {hazard} --trace",
            broken.invariant, broken.at, broken.what
        );
    }
}

fn hold(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let wanted = wanted(seed);
        assert_held(wanted, &run(wanted, |_, _| {}));
    }
}

/// The first seed that finds a defect, and by which invariant.
fn found(defect: Mutant, seeds: std::ops::Range<u64>) -> Option<(u64, &'static str)> {
    seeds.into_iter().find_map(|seed| {
        let wanted = Wanted { mutant: Some(defect), ..wanted(seed) };
        Some((seed, run(wanted, |_, _| {}).broken?.invariant))
    })
}

#[test]
fn every_invariant_holds_in_histories_with_everything_that_can_go_wrong() {
    hold(1..8);
}

#[test]
fn every_invariant_holds_in_other_such_histories() {
    hold(8..15);
}

#[test]
fn ten_thousand_workloads_rotate_without_anybody_noticing() {
    let wanted = Wanted { workloads: 10_000, days: 1, ..wanted(2) };
    let outcome = run(wanted, |_, _| {});
    assert_held(wanted, &outcome);
    assert!(outcome.counts.installs > 10_000, "{:?}", outcome.counts);
    assert!(outcome.counts.rotations.contains_key("anchor done"), "{:?}", outcome.counts);
}

/// Directed histories, with nothing else that goes wrong; what happened in them.
fn directed(hazard: Hazard) -> Counts {
    let wanted = Wanted { hazard, ..wanted(1) };
    let outcome = run(wanted, |_, _| {});
    assert_held(wanted, &outcome);
    assert!(!outcome.unnoticed && outcome.counts.rotations.contains_key("anchor done"));
    outcome.counts
}

#[test]
fn a_controller_that_dies_between_any_two_of_its_writes_ends_its_rotations() {
    let Counts { faults, deadly_writes, .. } = directed(Hazard::DeadlyWrites);
    for phase in PHASES {
        assert!(faults.contains_key(&format!("controller killed, {phase}")), "{phase}: {faults:?}");
    }
    for write in deadly_writes.keys() {
        for when in ["before", "after"] {
            let kill = format!("controller killed {when} {write}");
            assert!(faults.contains_key(&kill), "not {kill}: {faults:?}");
        }
    }
}

#[test]
fn workloads_that_all_start_anew_while_an_anchor_is_drained_hold_nothing_up() {
    let Counts { faults, .. } = directed(Hazard::Restarts);
    assert!(faults.contains_key("all workloads restarted, draining"), "{faults:?}");
}

#[test]
fn a_store_that_is_put_back_from_each_phase_is_noticed_and_recovered() {
    let Counts { faults, .. } = directed(Hazard::Restores);
    for phase in PHASES.into_iter().chain(["between rotations"]) {
        assert!(faults.contains_key(&format!("store put back, {phase}")), "{phase}: {faults:?}");
    }
}

#[test]
fn a_seed_tells_the_same_history_each_time() {
    let wanted = Wanted { told: true, ..wanted(3) };
    let histories = [(); 2].map(|()| run(wanted, |_, _| {}).story);
    assert!(histories[0].len() > 20);
    assert_eq!(histories[0], histories[1]);
}

#[test]
fn keys_that_are_destroyed_too_early_are_found() {
    assert_eq!(found(Mutant::HastyDestruction, 1..20).map(|f| f.1), Some("S7"));
}

#[test]
fn a_bundle_without_anchors_is_found() {
    assert_eq!(found(Mutant::EmptyBundle, 1..20).map(|f| f.1), Some("S8"));
}

#[test]
fn a_bundle_that_nobody_published_is_found() {
    assert_eq!(found(Mutant::ForeignBundle, 1..20).map(|f| f.1), Some("S10"));
}

#[test]
fn svids_that_outlive_their_issuer_are_found() {
    assert_eq!(found(Mutant::EndlessSvids, 1..20).map(|f| f.1), Some("S4"));
}

#[test]
fn a_workload_that_drops_its_svid_when_a_renewal_fails_is_found() {
    assert_eq!(found(Mutant::DropsSvid, 1..20).map(|f| f.1), Some("S9"));
}

#[test]
fn an_anchor_that_nobody_was_asked_about_is_found() {
    assert_eq!(found(Mutant::EagerIssuer, 1..20).map(|f| f.1), Some("S3"));
}

#[test]
fn a_replica_that_acts_on_what_nobody_confirmed_is_found() {
    assert_eq!(found(Mutant::NoLease, 1..3).map(|f| f.1), Some("S7"));
}

#[test]
fn a_controller_without_a_fence_is_found() {
    assert_eq!(found(Mutant::NoFence, 2166..2167).map(|f| f.1), Some("S1"));
}

#[test]
fn a_reply_that_crosses_an_ack_is_found() {
    assert_eq!(found(Mutant::ReplyCrossesAck, 1057..1058).map(|f| f.1), Some("S1"));
}

#[test]
fn a_store_that_takes_every_write_is_found() {
    assert_eq!(found(Mutant::NoCompareAndSwap, 101..102).map(|f| f.1), Some("S6"));
}

#[test]
fn a_controller_that_forgets_who_has_vanished_is_found() {
    assert_eq!(found(Mutant::NoLedger, 100..101).map(|f| f.1), Some("S2"));
}

#[test]
fn a_census_of_open_streams_alone_is_found() {
    assert_eq!(found(Mutant::ListOfStreams, 1..3).map(|f| f.1), Some("L2"));
}

#[test]
fn a_workload_that_takes_whatever_bundle_comes_is_found() {
    assert_eq!(found(Mutant::AnyBundle, 2..8).map(|f| f.1), Some("S5"));
}

#[test]
fn anchors_that_change_places_in_one_write_are_found() {
    assert_eq!(found(Mutant::Swap, 1..20).map(|f| f.1), Some("S6"));
}

const PHASES: [&str; 7] =
    ["generating", "staged", "preparing", "canary", "activated", "draining", "withdrawn"];
