//! One seed, from its beginning to the day when all is well again.

use std::time::Duration;

use steadfast_api::UnixTime;

use crate::invariants::Violation;
use crate::parts::START;
use crate::plan::{DAY, HOUR, Plan, Wanted};
use crate::report::Counts;
use crate::world::World;

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What happened, how often.
    pub counts: Counts,
    /// The invariant that did not hold, if one did not.
    pub broken: Option<Violation>,
    /// It ended early: the store was put back where nobody could notice.
    pub unnoticed: bool,
    /// What happened, in words, if that was asked for.
    pub story: Vec<String>,
}

/// Runs a seed. `day` is told of each day that has passed.
pub fn run(wanted: Wanted, mut day: impl FnMut(u64, &Counts)) -> Outcome {
    // Keys sign on threads of its own, as in the processes.
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let _inside = runtime.enter();
    let mut world = World::new(Plan::new(wanted));
    for passed in 1..=wanted.days {
        world.run_until(START + DAY * u32::try_from(passed).unwrap_or(u32::MAX));
        if world.broken.is_some() || world.faults.unnoticed {
            break;
        }
        day(passed, &world.counts);
    }
    if world.broken.is_none() && !world.faults.unnoticed {
        world.end_faults();
        heal(&mut world);
    }
    world.counts.simulated_seconds = world.now.since(START).as_secs();
    world.counts.checks =
        world.truth.checks.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    let unnoticed = world.faults.unnoticed && world.broken.is_none();
    Outcome { counts: world.counts, broken: world.broken, unnoticed, story: world.story }
}

/// Nothing goes wrong any more: all must be well in so many days.
fn heal(world: &mut World) {
    let end: UnixTime = world.now + HEALED_AFTER_MAX;
    while world.now < end && world.broken.is_none() && !world.faults.unnoticed {
        world.run_until(world.now + HOUR);
        if world.unwell().is_none() {
            break;
        }
    }
    if world.broken.is_none() && !world.faults.unnoticed {
        world.check_liveness();
    }
}

/// A vanished pod is waited for as long as anything of it can be valid, in each of several phases.
const HEALED_AFTER_MAX: Duration = Duration::from_secs(12 * 86_400);
