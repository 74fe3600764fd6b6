//! Each shortcut, in a world in which it breaks something, and what it breaks there.

use steadfast_rotation_protocol::rotation::PhaseName;

use crate::shortcut::Shortcut;
use crate::world::{Config, Faults, Order};
use crate::worlds::{put_back_and_abort, world};

/// Each shortcut, in a world in which it breaks something.
pub(crate) fn mutants() -> Vec<(Shortcut, &'static str, Config)> {
    use Order::{Abort, ExemptMissing, Rotate, RotateGiven, TaintActive, TaintOther};
    let none = Faults::default();
    let world = |orders: &[Order]| Config { strict: false, ..world("", orders) };
    let rotation = || world(&[Rotate]);
    let one = |config: Config| Config { proxies: 1, ..config };
    let restart = Faults { proxy_restarts: 1, ..none };
    let alone = |config: Config| Config { proxies: 1, replicas: 1, ..config };
    let timed = |config: Config| Config { svid_life: Some(1), ..config };
    let from = |phase: PhaseName, config: Config| Config { from: Some(phase), ..config };
    vec![
        (Shortcut::TimedWaits, "S1", alone(rotation())),
        (Shortcut::SwapWithoutOverlap, "S1", alone(rotation())),
        (Shortcut::NoLease, "S1", one(from(PhaseName::Activated, rotation()))),
        (
            Shortcut::CensusBeforeTheFenceAtStaging,
            "S1",
            Config {
                gathered: true,
                faults: restart,
                ..from(PhaseName::Staged, world(&[RotateGiven]))
            },
        ),
        (Shortcut::CensusBeforeTheFenceAtDrain, "S1", one(from(PhaseName::Activated, rotation()))),
        (
            Shortcut::CensusBeforeTheFenceAtTheEnd,
            "S2",
            Config { faults: restart, ..one(from(PhaseName::Draining, rotation())) },
        ),
        (Shortcut::AcksFromBeforeTheFence, "S1", one(rotation())),
        (Shortcut::AbortByDropping, "S1", alone(world(&[Rotate, Abort]))),
        (Shortcut::NoSkewMargin, "S1", Config { skew: 2, ..timed(alone(rotation())) }),
        (
            Shortcut::CompareRotationAndPhase,
            "S1",
            Config {
                controllers: 2,
                slow_writes: true,
                ..from(PhaseName::Draining, alone(world(&[Rotate, Abort])))
            },
        ),
        (Shortcut::ReplyCrossesAck, "S1", one(from(PhaseName::Activated, rotation()))),
        (
            Shortcut::DeadlineInsideTheFence,
            "S1",
            one(from(PhaseName::Activated, world(&[TaintActive]))),
        ),
        (Shortcut::WatermarkOfAnEarlierActivation, "S1", timed(alone(world(&[Rotate, Abort])))),
        (
            Shortcut::UnknownExcuses,
            "S1",
            Config { faults: Faults { replica_restarts: 1, ..none }, ..alone(rotation()) },
        ),
        (
            Shortcut::VanishedIsReleasedAtItsLastAck,
            "S2",
            Config {
                faults: Faults { vanishes: 1, ..none },
                ..from(PhaseName::Activated, timed(alone(rotation())))
            },
        ),
        (
            Shortcut::ExemptionEndsWithTheRotation,
            "S2",
            Config {
                faults: Faults { cuts: 1, ..none },
                ..from(PhaseName::Activated, alone(world(&[Rotate, ExemptMissing])))
            },
        ),
        (
            Shortcut::FailingCanariesAreNoMatter,
            "a rotation went on past a canary that fails",
            Config {
                faults: Faults { failures: 1, ..none },
                ..alone(world(&[Order::RotateCanary]))
            },
        ),
        (
            Shortcut::AckedByPhase,
            "S3",
            Config {
                replicas: 1,
                ..from(PhaseName::Staged, world(&[Rotate, TaintActive, TaintOther]))
            },
        ),
        (Shortcut::TimedWaits, "L2", Config { strict: true, ..alone(rotation()) }),
        (
            Shortcut::SwapWithoutOverlap,
            "an anchor is added as another is removed",
            Config { strict: true, ..alone(rotation()) },
        ),
        (
            Shortcut::CompareRotationAndPhase,
            "S6",
            Config {
                strict: true,
                controllers: 2,
                slow_writes: true,
                ..from(PhaseName::Draining, alone(world(&[Rotate, Abort])))
            },
        ),
        (
            Shortcut::SvidOutlivesItsIssuer,
            "S4",
            Config { skew: 1, ends: Some(6), ..timed(alone(world(&[]))) },
        ),
        (
            Shortcut::IssuerOutlivesItsAnchor,
            "S4",
            Config { skew: 1, ends: Some(6), ..timed(alone(world(&[]))) },
        ),
        (Shortcut::BundleOfAnybody, "S10", Config { vouched: true, ..alone(rotation()) }),
        (Shortcut::MountedFileUnfiltered, "S10", Config { vouched: true, ..alone(rotation()) }),
        (Shortcut::MountedFilesAreNoMatter, "S2", Config { vouched: true, ..alone(rotation()) }),
        (
            Shortcut::MirrorIsTakenForCurrent,
            "an anchor is settled that the mirror lacks",
            Config { vouched: true, strict: true, ..alone(rotation()) },
        ),
        (
            Shortcut::UnloadedIsTakenForLoaded,
            "an issuer becomes active that a replica has not loaded",
            Config { loads: true, strict: true, ..alone(rotation()) },
        ),
        (
            Shortcut::ClocksAreNoMatter,
            "a rotation begins while a clock is off",
            Config { strict: true, faults: Faults { drifts: 1, ..none }, ..alone(rotation()) },
        ),
        (Shortcut::RevisionsAreNotCompared, "S3", Config { strict: false, ..put_back_and_abort() }),
    ]
}
