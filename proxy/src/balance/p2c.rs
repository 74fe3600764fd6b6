//! The decisions of balancing, without clock or randomness: both are arguments.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::discovery::Endpoint;

/// Names one stay of an endpoint in the set: an endpoint that left and came back is another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SlotId(u64);

/// The endpoints, their loads and penalties.
#[derive(Debug, Default)]
pub(super) struct Core {
    /// By address, as discovery sorts them.
    slots: Vec<Slot>,
    /// Where each stay is in `slots`.
    places: HashMap<SlotId, usize>,
    /// For each slot the sum of its weight and those before it.
    cumulative: Vec<u64>,
    next_id: u64,
}

#[derive(Debug)]
struct Slot {
    id: SlotId,
    endpoint: Arc<Endpoint>,
    load: Load,
    penalty: Penalty,
}

/// What is expected of the next request at an endpoint.
#[derive(Clone, Copy, Debug)]
struct Load {
    pending: u32,
    /// Peak-sensitive moving average of the latency, in seconds, as of `at`.
    latency_secs: f64,
    at: Duration,
    /// Whether a response has ever been seen.
    measured: bool,
}

/// How long an endpoint is passed over.
#[derive(Clone, Copy, Debug, Default)]
struct Penalty {
    refusals: u32,
    until: Duration,
}

impl Core {
    /// Replaces the set; linear in both sets.
    pub(super) fn update(&mut self, now: Duration, endpoints: &[Arc<Endpoint>]) {
        let mut old: HashMap<SocketAddr, Slot> =
            self.slots.drain(..).map(|slot| (slot.endpoint.addr, slot)).collect();
        for endpoint in endpoints {
            let slot = match old.remove(&endpoint.addr) {
                // Another workload at a reused address has no claim to its predecessor's record.
                Some(slot) if slot.endpoint.identity == endpoint.identity => {
                    Slot { endpoint: endpoint.clone(), ..slot }
                }
                _ => self.fresh(now, endpoint.clone()),
            };
            self.slots.push(slot);
        }
        self.places = self.slots.iter().enumerate().map(|(at, slot)| (slot.id, at)).collect();
        let weights = self.slots.iter().map(|slot| u64::from(slot.endpoint.weight));
        self.cumulative = weights
            .scan(0, |sum, weight| {
                *sum += weight;
                Some(*sum)
            })
            .collect();
    }

    /// Of two endpoints drawn by weight the one with the lower load, passing over the penalised
    /// while there is another.
    pub(super) fn pick(&self, now: Duration, random: [u64; 2]) -> Option<(SlotId, Arc<Endpoint>)> {
        let total = *self.cumulative.last()?;
        if total == 0 {
            return None;
        }
        let first = self.at_weight(scale(random[0], total));
        let second = self.other_than(first, total, random[1]).unwrap_or(first);
        let picked = match (self.penalised(first, now), self.penalised(second, now)) {
            (false, true) => first,
            (true, false) => second,
            // A tie goes to the first, so that idle endpoints share by their weights.
            (false, false) if self.cost(second, now) < self.cost(first, now) => second,
            (false, false) => first,
            (true, true) => self.unpenalised(now, random[0]).unwrap_or_else(|| {
                // All refuse: try the one whose turn comes first, rather than none.
                if self.slots[second].penalty.until < self.slots[first].penalty.until {
                    second
                } else {
                    first
                }
            }),
        };
        let slot = &self.slots[picked];
        Some((slot.id, slot.endpoint.clone()))
    }

    pub(super) fn started(&mut self, id: SlotId) {
        self.with(id, |slot| slot.load.pending += 1);
    }

    pub(super) fn finished(&mut self, id: SlotId) {
        self.with(id, |slot| slot.load.pending = slot.load.pending.saturating_sub(1));
    }

    pub(super) fn connected(&mut self, id: SlotId) {
        self.with(id, |slot| slot.penalty = Penalty::default());
    }

    pub(super) fn responded(&mut self, id: SlotId, now: Duration, latency: Duration) {
        self.with(id, |slot| slot.load.observe(now, latency));
    }

    pub(super) fn refused(&mut self, id: SlotId, now: Duration, random: u64) {
        self.with(id, |slot| slot.penalty.refused(now, random));
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn ready(&self, now: Duration) -> usize {
        self.slots.iter().filter(|slot| now >= slot.penalty.until).count()
    }

    fn fresh(&mut self, now: Duration, endpoint: Arc<Endpoint>) -> Slot {
        self.next_id += 1;
        let id = SlotId(self.next_id);
        Slot { id, endpoint, load: Load::unmeasured(now), penalty: Penalty::default() }
    }

    /// The slot in whose share of the weights this number falls.
    fn at_weight(&self, number: u64) -> usize {
        self.cumulative.partition_point(|&sum| sum <= number)
    }

    /// Draws by weight among all but one; `None` if no other has a weight.
    fn other_than(&self, first: usize, total: u64, random: u64) -> Option<usize> {
        let weight = u64::from(self.slots[first].endpoint.weight);
        let rest = total - weight;
        if rest == 0 {
            return None;
        }
        let number = scale(random, rest);
        let start = self.cumulative[first] - weight;
        Some(self.at_weight(if number < start { number } else { number + weight }))
    }

    /// Draws by weight among those without a penalty. Looks at each, but only when two draws in a
    /// row met a penalty.
    fn unpenalised(&self, now: Duration, random: u64) -> Option<usize> {
        let ready = || (0..self.slots.len()).filter(|&at| !self.penalised(at, now));
        let weight = |at: usize| u64::from(self.slots[at].endpoint.weight);
        let total: u64 = ready().map(weight).sum();
        if total == 0 {
            return None;
        }
        let mut number = scale(random, total);
        ready().find(|&at| {
            let found = number < weight(at);
            number = number.saturating_sub(weight(at));
            found
        })
    }

    fn penalised(&self, at: usize, now: Duration) -> bool {
        now < self.slots[at].penalty.until
    }

    fn cost(&self, at: usize, now: Duration) -> f64 {
        let slot = &self.slots[at];
        slot.load.cost(now) / f64::from(slot.endpoint.weight)
    }

    fn with(&mut self, id: SlotId, change: impl FnOnce(&mut Slot)) {
        // An endpoint that has left takes its record with it.
        if let Some(&at) = self.places.get(&id) {
            change(&mut self.slots[at]);
        }
    }
}

impl Load {
    fn unmeasured(now: Duration) -> Self {
        Self { pending: 0, latency_secs: LATENCY_SECS_UNMEASURED, at: now, measured: false }
    }

    /// What one more request would wait: the expected latency for each that is pending, and it.
    fn cost(&self, now: Duration) -> f64 {
        // Without the floor two endpoints that both answered long ago would be equal at zero
        // however much is pending at one of them.
        let latency = self.latency_at(now).max(LATENCY_SECS_MIN);
        latency * (f64::from(self.pending) + 1.0)
    }

    /// A sample above the average replaces it at once; one below pulls it down by its share.
    fn observe(&mut self, now: Duration, latency: Duration) {
        let (sample, average) = (latency.as_secs_f64(), self.latency_at(now));
        let keep = self.decay(now);
        self.latency_secs = if !self.measured || sample > average {
            sample
        } else {
            self.latency_secs * keep + sample * (1.0 - keep)
        };
        (self.at, self.measured) = (now.max(self.at), true);
    }

    /// Decays without samples, so that an endpoint which was slow once is tried again.
    fn latency_at(&self, now: Duration) -> f64 {
        self.latency_secs * self.decay(now)
    }

    fn decay(&self, now: Duration) -> f64 {
        (-now.saturating_sub(self.at).as_secs_f64() / DECAY_SECS).exp()
    }
}

impl Penalty {
    /// Doubles with each refusal up to the cap; the jitter lies inside it.
    fn refused(&mut self, now: Duration, random: u64) {
        let doubled = PENALTY_MIN.saturating_mul(1 << self.refusals.min(DOUBLINGS_MAX));
        let whole = doubled.min(PENALTY_MAX);
        let half = whole / 2;
        let jitter_millis = scale(random, half.as_millis() as u64 + 1);
        self.refusals = self.refusals.saturating_add(1);
        self.until = now + half + Duration::from_millis(jitter_millis);
    }
}

/// Maps a number that is uniform over all of `u64` to `0..below`.
fn scale(random: u64, below: u64) -> u64 {
    ((u128::from(random) * u128::from(below)) >> 64) as u64
}

/// How quickly latencies are forgotten.
const DECAY_SECS: f64 = 10.0;
/// What is expected of an endpoint that has not answered yet.
const LATENCY_SECS_UNMEASURED: f64 = 0.030;
/// Below it differences in latency say nothing.
const LATENCY_SECS_MIN: f64 = 0.000_1;
const PENALTY_MIN: Duration = Duration::from_millis(200);
const PENALTY_MAX: Duration = Duration::from_secs(10);
/// Beyond the cap already.
const DOUBLINGS_MAX: u32 = 10;
