//! The rotation under a model checker: the real controller in every world that a few workloads,
//! replicas and controllers can get into.
//!
//! Each world has one kind of fault. The small ones are searched to their end, the larger ones up
//! to a bound; `STEADFAST_MODEL=full` lifts it. A mutant is a world with one shortcut
//! ([`shortcut`]) in which an invariant must break.

mod external;
mod liveness;
mod scenarios;
mod shortcut;
mod world;

use stateright::{Checker, Model, Property};
use steadfast_rotation_protocol::rotation::PhaseName;

use crate::shortcut::Shortcut;
use crate::world::{Action, Config, Faults, Order, World};

impl Model for Config {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        actions.extend(world.actions(self));
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        world.after(self, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always(SAFE, |_, world: &World| world.broken.is_none())]
    }
}

#[test]
fn no_world_breaks_an_invariant() {
    let mut total = 0;
    for config in worlds().into_iter().chain(smaller_worlds()) {
        let name = config.name.clone();
        let bound = if is_full() || config.small { usize::MAX } else { STEPS_MAX };
        let (states, whole, broken) = explore(config, bound);
        let how_far = if whole { "all of them" } else { "up to the bound" };
        println!("{name:>44}: {states:>9} states, {how_far}");
        assert!(broken.is_none(), "{name}: {}", broken.unwrap_or_default());
        total += states;
    }
    println!("{:>44}: {total:>9} states", "together");
}

#[test]
fn no_shortcut_survives() {
    for (shortcut, config) in mutants() {
        let config = Config { shortcut: Some(shortcut), ..config };
        let (states, _, broken) = explore(config, MUTANT_STATES_MAX);
        let broken = broken.unwrap_or_else(|| panic!("{shortcut:?} survived {states} states"));
        println!("{:>44}: {states:>9} states, {}", format!("{shortcut:?}"), first_line(&broken));
    }
}

/// L1 and L5: whatever has happened, the end can still be reached.
#[test]
fn the_end_stays_in_reach() {
    for config in smaller_worlds().into_iter().filter(|config| is_full() || config.small) {
        let reach = liveness::reach(&config, World::settled_down);
        println!("{:>44}: {:>9} states", config.name, reach.states);
        assert!(reach.stuck.is_none(), "{}: no end after {:?}", config.name, reach.stuck);
    }
}

fn worlds() -> Vec<Config> {
    use Order::{
        Abort, ExemptMissing, IssuerStolen, OwnerSigns, Rotate, RotateCanary, RotateExternal,
        RotateGiven, RotateIssuer, TaintActive, TaintOther,
    };
    let none = Faults::default();
    let small = |config: Config| Config { small: true, ..config };
    let with = |faults: Faults, config: Config| Config { faults, ..config };
    let timed = |config: Config| Config { svid_life: Some(1), ..config };
    let mut worlds = vec![
        small(world("rotation", &[Rotate])),
        world("given anchor", &[RotateGiven]),
        world("external anchor", &[RotateExternal, OwnerSigns]),
        world("external anchor, abort", &[RotateExternal, Abort, OwnerSigns]),
        world("external anchor, emergency", &[RotateExternal, TaintActive, OwnerSigns]),
        with(Faults { failures: 1, ..none }, world("canary", &[RotateCanary])),
        with(Faults { failures: 1, ..none }, world("canary, abort", &[RotateCanary, Abort])),
        world("canary, emergency", &[RotateCanary, TaintActive]),
        world("canary stolen", &[RotateCanary, TaintOther]),
        world("abort", &[Rotate, Abort]),
        world("abort, given anchor", &[RotateGiven, Abort]),
        small(world("issuer", &[RotateIssuer])),
        world("issuer stolen", &[IssuerStolen]),
        world("issuer stolen in a rotation", &[Rotate, IssuerStolen]),
        world("emergency", &[TaintActive]),
        world("both stolen", &[TaintActive, TaintOther]),
        Config { controllers: 2, slow_writes: true, ..world("two controllers", &[Rotate]) },
        Config {
            controllers: 2,
            slow_writes: true,
            ..world("two controllers, abort", &[Rotate, Abort])
        },
        with(Faults { controller_restarts: 1, ..none }, world("controller restarts", &[Rotate])),
        with(Faults { replica_restarts: 1, ..none }, world("replica restarts", &[Rotate])),
        with(Faults { proxy_restarts: 1, ..none }, world("workload restarts", &[Rotate])),
        with(
            Faults { proxy_restarts: 1, ..none },
            world("workload restarts, given anchor", &[RotateGiven]),
        ),
        with(Faults { lost_keys: 1, ..none }, world("lost key", &[])),
        with(Faults { lost_keys: 1, ..none }, world("lost key in a rotation", &[Rotate])),
        with(Faults { lost_keys: 1, ..none }, world("lost key, emergency", &[TaintActive])),
        with(Faults { cuts: 1, ..none }, world("cut off", &[Rotate, ExemptMissing])),
        with(Faults { cuts: 1, ..none }, world("cut off in an emergency", &[TaintActive])),
        with(Faults { vanishes: 1, ..none }, timed(world("vanished", &[Rotate]))),
        Config { skew: 2, ..timed(world("slow path, clocks off", &[Rotate])) },
        timed(world("slow path, abort", &[Rotate, Abort])),
    ];
    for phase in [
        PhaseName::Staged,
        PhaseName::Preparing,
        PhaseName::Activated,
        PhaseName::Draining,
        PhaseName::Withdrawn,
    ] {
        for (what, order) in [("active", TaintActive), ("other", TaintOther)] {
            let name = format!("{what} anchor stolen in {phase:?}");
            worlds.push(Config { from: Some(phase), ..world(&name, &[Rotate, order]) });
        }
        let restored = format!("restored to {phase:?}");
        let restored = Config { from: Some(phase), ..world(&restored, &[Rotate]) };
        worlds.push(with(Faults { restores: 1, ..none }, restored));
    }
    worlds
}

/// The same with one workload and one replica of identity, and some with one workload and two:
/// most of them are searched to their end each time.
fn smaller_worlds() -> Vec<Config> {
    let of_size = |proxies: usize, replicas: usize, config: Config| {
        let name = format!("{} ({proxies} of {replicas})", config.name);
        Config { name, proxies, replicas, ..config }
    };
    let alone = worlds().into_iter().map(|config| {
        let small = !LARGE_ALONE.contains(&config.name.as_str());
        of_size(1, 1, Config { small, ..config })
    });
    let two_replicas = worlds().into_iter().filter_map(|config| {
        let small = SMALL_WITH_TWO_REPLICAS.contains(&config.name.as_str());
        small.then(|| of_size(1, 2, Config { small, ..config }))
    });
    alone.chain(two_replicas).collect()
}

/// Each shortcut, in a world in which it breaks something.
fn mutants() -> Vec<(Shortcut, Config)> {
    use Order::{Abort, ExemptMissing, Rotate, RotateGiven, TaintActive, TaintOther};
    let none = Faults::default();
    let rotation = || world("", &[Rotate]);
    let one = |config: Config| Config { proxies: 1, ..config };
    let restart = Faults { proxy_restarts: 1, ..none };
    let alone = |config: Config| Config { proxies: 1, replicas: 1, ..config };
    let timed = |config: Config| Config { svid_life: Some(1), ..config };
    let from = |phase: PhaseName, config: Config| Config { from: Some(phase), ..config };
    vec![
        (Shortcut::TimedWaits, alone(rotation())),
        (Shortcut::SwapWithoutOverlap, alone(rotation())),
        (Shortcut::NoLease, one(from(PhaseName::Activated, rotation()))),
        (
            Shortcut::CensusBeforeTheFenceAtStaging,
            Config {
                gathered: true,
                faults: restart,
                ..from(PhaseName::Staged, world("", &[RotateGiven]))
            },
        ),
        (Shortcut::CensusBeforeTheFenceAtDrain, one(from(PhaseName::Activated, rotation()))),
        (
            Shortcut::CensusBeforeTheFenceAtTheEnd,
            Config { faults: restart, ..one(from(PhaseName::Draining, rotation())) },
        ),
        (Shortcut::AcksFromBeforeTheFence, one(rotation())),
        (Shortcut::AbortByDropping, alone(world("", &[Rotate, Abort]))),
        (Shortcut::NoSkewMargin, Config { skew: 2, ..timed(alone(rotation())) }),
        (
            Shortcut::CompareRotationAndPhase,
            Config {
                controllers: 2,
                slow_writes: true,
                ..from(PhaseName::Draining, alone(world("", &[Rotate, Abort])))
            },
        ),
        (Shortcut::ReplyCrossesAck, one(from(PhaseName::Activated, rotation()))),
        (
            Shortcut::DeadlineInsideTheFence,
            one(from(PhaseName::Activated, world("", &[TaintActive]))),
        ),
        (Shortcut::WatermarkOfAnEarlierActivation, timed(alone(world("", &[Rotate, Abort])))),
        (
            Shortcut::UnknownExcuses,
            Config { faults: Faults { replica_restarts: 1, ..none }, ..alone(rotation()) },
        ),
        (
            Shortcut::VanishedIsReleasedAtItsLastAck,
            Config {
                faults: Faults { vanishes: 1, ..none },
                ..from(PhaseName::Activated, timed(alone(rotation())))
            },
        ),
        (
            Shortcut::ExemptionEndsWithTheRotation,
            Config {
                faults: Faults { cuts: 1, ..none },
                ..from(PhaseName::Activated, alone(world("", &[Rotate, ExemptMissing])))
            },
        ),
        (
            Shortcut::FailingCanariesAreNoMatter,
            Config {
                faults: Faults { failures: 1, ..none },
                ..alone(world("", &[Order::RotateCanary]))
            },
        ),
        (
            Shortcut::AckedByPhase,
            Config {
                replicas: 1,
                ..from(PhaseName::Staged, world("", &[Rotate, TaintActive, TaintOther]))
            },
        ),
    ]
}

/// Two workloads, two replicas, one controller, and nothing that goes wrong.
fn world(name: &str, orders: &[Order]) -> Config {
    Config {
        name: name.to_owned(),
        small: false,
        proxies: 2,
        replicas: 2,
        controllers: 1,
        orders: orders.to_vec(),
        faults: Faults::default(),
        slow_writes: false,
        skew: 0,
        svid_life: None,
        gathered: false,
        from: None,
        shortcut: None,
    }
}

/// How many states there are, whether these are all, and what broke, by which actions.
fn explore(config: Config, bound: usize) -> (usize, bool, Option<String>) {
    let checker = config.checker().threads(2).target_state_count(bound).spawn_bfs().join();
    let broken = checker.discovery(SAFE).map(|path| {
        let broken = path.last_state().broken.unwrap_or_default();
        let (last, actions) = (path.last_state().clone(), path.into_actions());
        format!("{broken}\nafter {actions:?}\nin {last:#?}")
    });
    (checker.unique_state_count(), checker.state_count() < bound, broken)
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[allow(clippy::disallowed_methods)] // A test has no other way to get a flag.
fn is_full() -> bool {
    std::env::var("STEADFAST_MODEL").is_ok_and(|value| value == "full")
}

/// With one workload and one replica there is more to them than is searched each time.
const LARGE_ALONE: [&str; 5] = [
    "issuer stolen in a rotation",
    "both stolen",
    "two controllers",
    "two controllers, abort",
    "cut off in an emergency",
];
const SMALL_WITH_TWO_REPLICAS: [&str; 6] = [
    "rotation",
    "given anchor",
    "abort",
    "abort, given anchor",
    "controller restarts",
    "other anchor stolen in Draining",
];
const SAFE: &str = "no invariant is broken";
/// How many steps are looked at in a world that is not small.
const STEPS_MAX: usize = 50_000;
/// A mutant that lives longer has survived.
const MUTANT_STATES_MAX: usize = 5_000_000;
