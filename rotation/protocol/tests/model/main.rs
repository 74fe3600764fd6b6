//! The rotation under a model checker: the real controller in every world that a few workloads,
//! replicas and controllers can get into.
//!
//! Each world has one kind of fault. The small ones are searched to their end, the larger ones up
//! to a bound, which `STEADFAST_MODEL=full` lifts to what a machine has room for. A mutant is a world
//! with one shortcut ([`shortcut`]) in which an invariant must break.

mod external;
mod liveness;
mod mutants;
mod scenarios;
mod shortcut;
mod world;
mod worlds;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::Write as _;

use stateright::{Checker, Model, Property};
use steadfast_rotation_protocol::rotation::PhaseName;

use crate::mutants::mutants;
use crate::world::{Action, Config, World};
use crate::worlds::{cut_for_good, last_phases, put_back, smaller_worlds, worlds};

/// Says how many states there were, also where a test that passes is not heard.
macro_rules! told {
    ($($told:tt)*) => {
        writeln!(std::io::stderr(), $($told)*).unwrap()
    };
}

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
        let bound = if is_full() || config.small { FULL_STEPS_MAX } else { STEPS_MAX };
        let (states, whole, broken) = explore(config, bound);
        let how_far = if whole { "all of them" } else { "up to the bound" };
        told!("{name:>44}: {states:>9} states, {how_far}");
        assert!(broken.is_none(), "{name}: {}", broken.unwrap_or_default());
        total += states;
    }
    told!("{:>44}: {total:>9} states", "together");
}

#[test]
fn no_shortcut_survives() {
    for (shortcut, expected, config) in mutants() {
        let mutant = Config { shortcut: Some(shortcut), ..config.clone() };
        let (states, _, broken) = explore(mutant, MUTANT_STATES_MAX);
        let broken = broken.unwrap_or_else(|| panic!("{shortcut:?} survived {states} states"));
        let what = broken.lines().next().unwrap_or_default();
        told!("{:>44}: {states:>9} states, {what}", format!("{shortcut:?}"));
        let first = what.split(':').next();
        assert_eq!(first, Some(expected), "{shortcut:?} breaks something else first: {broken}");
        if is_full() {
            // It is the shortcut that breaks it: without it the same world holds for as long.
            let (states, _, broken) = explore(config, states * 3);
            told!("{:>44}: {states:>9} states, holds", "without it");
            assert!(broken.is_none(), "without {shortcut:?}: {}", broken.unwrap_or_default());
        }
    }
}

/// L1 and L5: whatever has happened, the end can still be reached.
#[test]
fn the_end_stays_in_reach() {
    let worlds = smaller_worlds().into_iter().chain(last_phases()).chain(put_back());
    for config in worlds.filter(|config| is_full() || config.small) {
        let reach = liveness::reach(&config, |world| {
            assert_eq!(world.broken, None, "{}", config.name);
            world.settled_down()
        });
        told!("{:>44}: {:>9} states", config.name, reach.states);
        assert!(reach.stuck.is_none(), "{}: no end after {:?}", config.name, reach.stuck);
    }
}

/// L2: who cannot be reached stops a rotation for ever, where that is safe, and is named; the issuer
/// still rotates.
#[test]
fn whoever_is_cut_off_for_good_is_named_and_issuers_go_on() {
    let mut stalled = BTreeSet::new();
    for config in cut_for_good().into_iter().filter(|config| is_full() || config.small) {
        let seen = RefCell::new(BTreeSet::new());
        let reach = liveness::reach(&config, |world| {
            assert_eq!(world.broken, None, "{}", config.name);
            let stalls = world.stalls_by_name(&config);
            if stalls {
                seen.borrow_mut().insert(world.phase());
            }
            stalls
        });
        stalled.extend(seen.into_inner());
        told!("{:>44}: {:>9} states", config.name, reach.states);
        assert!(reach.stuck.is_none(), "{}: no stall after {:?}", config.name, reach.stuck);
    }
    use PhaseName::{Draining, Staged, Withdrawn};
    let phases = [None, Some(Staged), Some(Draining), Some(Withdrawn)];
    assert_eq!(stalled, phases.into(), "each of them is come to");
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

#[allow(clippy::disallowed_methods)] // A test has no other way to get a flag.
fn is_full() -> bool {
    std::env::var("STEADFAST_MODEL").is_ok_and(|value| value == "full")
}

const SAFE: &str = "no invariant is broken";
/// How many steps are looked at in a world that is not small.
const STEPS_MAX: usize = 50_000;
/// The same where all that there is room for is looked at: some 8 million states, 20 GiB.
const FULL_STEPS_MAX: usize = 20_000_000;
/// A mutant that lives longer has survived.
const MUTANT_STATES_MAX: usize = 5_000_000;
