//! What one simulated world is like: drawn from its seed, but for what was asked for.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use steadfast_identity::authority::SKEW;
use steadfast_identity::replica::LEASE;
use steadfast_rotation_protocol::controller::Timings;
use steadfast_rotation_protocol::schedule::Schedule;

use crate::mutant::Mutant;

/// What a person asks for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// The same seed is the same world.
    pub seed: u64,
    /// How many workloads.
    pub workloads: usize,
    /// For how many days faults happen; the world then goes on until it has healed.
    pub days: u64,
    /// What goes wrong.
    pub hazard: Hazard,
    /// What is deliberately broken.
    pub mutant: Option<Mutant>,
    /// Whether every event is told.
    pub told: bool,
}

/// What goes wrong. All but the first two are directed: nothing else goes wrong, so that it does go
/// wrong where it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Hazard {
    /// Everything, at random.
    All,
    /// Nothing: only what the schedule begins.
    None,
    /// The controller dies at a quarter of its writes, before they are done or after.
    DeadlyWrites,
    /// All workloads start anew whenever an anchor is drained.
    Restarts,
    /// The store is put back from a copy of each phase, one after the other.
    Restores,
}

impl Hazard {
    /// Its name on the command line.
    pub fn name(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// One world.
#[derive(Clone, Debug)]
pub struct Plan {
    /// As asked for.
    pub wanted: Wanted,
    /// Replicas of identity.
    pub replicas: usize,
    /// Machines that workloads run on.
    pub nodes: usize,
    /// How long an SVID should live.
    pub svid_life: Duration,
    /// How long a new anchor lives.
    pub anchor_life: Duration,
    /// The controller's.
    pub timings: Timings,
    /// The mean time between two faults.
    pub fault_every: Duration,
    /// The mean time between two orders of a person.
    pub order_every: Duration,
    /// The mean time after which a workload starts anew, or in another pod.
    pub churn_every: Duration,
    /// Between two looks of the controller when nothing changes: at first, and at most.
    pub look_every: (Duration, Duration),
}

impl Plan {
    /// The world of a seed.
    pub fn new(wanted: Wanted) -> Self {
        let mut rng = SmallRng::seed_from_u64(wanted.seed ^ PLAN);
        let svid_life = [HOUR * 6, DAY, HOUR * 36][rng.random_range(0..3)];
        let period = match wanted.days {
            // A history of a day or two is to have a rotation in it, too.
            0..4 => HOUR * 10,
            // One rotation after the other.
            _ if !matches!(wanted.hazard, Hazard::All | Hazard::None) => DAY * 2,
            _ => DAY * rng.random_range(8..=20),
        };
        let slow_path = LEASE + svid_life.max(DAY) + SKEW;
        let timings = Timings {
            lease: LEASE,
            skew: SKEW,
            renew_window: MINUTE * rng.random_range(5..=90),
            renew_window_urgent: MINUTE * rng.random_range(1..=5),
            issuer_life: DAY * 10,
            issuer_left_min: DAY * 3,
            schedule: Schedule { anchor_period: period, window: None },
        };
        Self {
            wanted,
            replicas: rng.random_range(1..=3),
            nodes: (wanted.workloads / 25).clamp(3, 100),
            svid_life,
            anchor_life: period * 2 + slow_path * 6,
            timings,
            fault_every: HOUR * rng.random_range(4..=48),
            order_every: match wanted.workloads {
                0..1000 => HOUR * rng.random_range(24..=120),
                _ => HOUR * rng.random_range(4..=24),
            },
            churn_every: DAY * rng.random_range(3..=20),
            look_every: match wanted.workloads {
                0..1000 => (Duration::from_secs(rng.random_range(1..=10)), MINUTE * 5),
                _ => (Duration::from_secs(30), MINUTE * 20),
            },
        }
    }
}

pub(crate) const MINUTE: Duration = Duration::from_secs(60);
pub(crate) const HOUR: Duration = Duration::from_secs(3600);
pub(crate) const DAY: Duration = Duration::from_secs(86_400);
/// Tells the numbers of the plan from those of the world.
const PLAN: u64 = 0x706C_616E;
