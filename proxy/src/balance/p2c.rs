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

/// What is known of the next request at an endpoint.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    pending: u32,
    /// `None`: nothing was answered yet.
    latency: Option<Latency>,
}

/// Peak-sensitive moving average of the latency, as of its last sample.
#[derive(Clone, Copy, Debug)]
struct Latency {
    secs: f64,
    at: Duration,
}

/// How long an endpoint is passed over.
#[derive(Clone, Copy, Debug, Default)]
struct Penalty {
    refusals: u32,
    until: Duration,
}

impl Core {
    /// Replaces the set; linear in both sets.
    pub(super) fn update(&mut self, endpoints: &[Arc<Endpoint>]) {
        let mut old: HashMap<SocketAddr, Slot> =
            self.slots.drain(..).map(|slot| (slot.endpoint.addr, slot)).collect();
        for endpoint in endpoints {
            let slot = match old.remove(&endpoint.addr) {
                // Another workload at a reused address has no claim to its predecessor's record.
                Some(slot) if slot.endpoint.identity == endpoint.identity => {
                    Slot { endpoint: endpoint.clone(), ..slot }
                }
                _ => self.fresh(endpoint.clone()),
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
            (false, false) if self.is_cheaper(second, first, now) => second,
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
        self.with(id, |slot| {
            let first = Latency { secs: latency.as_secs_f64(), at: now };
            let known = slot.load.latency.map(|known| known.observed(now, latency));
            slot.load.latency = Some(known.unwrap_or(first));
        });
    }

    pub(super) fn refused(&mut self, id: SlotId, now: Duration, random: u64) {
        self.with(id, |slot| slot.penalty.refused(now, random));
    }

    fn fresh(&mut self, endpoint: Arc<Endpoint>) -> Slot {
        self.next_id += 1;
        let id = SlotId(self.next_id);
        Slot { id, endpoint, load: Load::default(), penalty: Penalty::default() }
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

    /// Whether one more request would wait less at one than at the other: the expected latency for
    /// itself, and for what is pending as far as the weight does not make up for it.
    fn is_cheaper(&self, one: usize, other: usize, now: Duration) -> bool {
        let (one, other) = (&self.slots[one], &self.slots[other]);
        let mean_weight =
            self.cumulative.last().map_or(0.0, |&sum| sum as f64) / self.cumulative.len() as f64;
        let cost = |slot: &Slot, latency: f64| {
            let share = mean_weight / f64::from(slot.endpoint.weight);
            latency * (1.0 + f64::from(slot.load.pending) * share)
        };
        let (latency, other_latency) = latencies(&one.load, &other.load, now);
        cost(one, latency) < cost(other, other_latency)
    }

    fn with(&mut self, id: SlotId, change: impl FnOnce(&mut Slot)) {
        // An endpoint that has left takes its record with it.
        if let Some(&at) = self.places.get(&id) {
            change(&mut self.slots[at]);
        }
    }
}

/// What to expect of two, compared.
///
/// Latencies decay without samples, so that an endpoint which was slow once is tried again; but
/// not below the other's: else of two equals the one that was not used lately would always look
/// faster, whatever its weight. One that has not answered yet is taken for as good as the other:
/// it gets its share at once, and what is pending there keeps that from being too much.
fn latencies(one: &Load, other: &Load, now: Duration) -> (f64, f64) {
    let (Some(a), Some(b)) = (&one.latency, &other.latency) else { return (1.0, 1.0) };
    let floor = a.secs.min(b.secs).max(LATENCY_SECS_MIN);
    (a.secs_at(now).max(floor), b.secs_at(now).max(floor))
}

impl Latency {
    /// A sample above the average replaces it at once; one below pulls it down by its share.
    fn observed(self, now: Duration, sample: Duration) -> Self {
        let (sample, keep) = (sample.as_secs_f64(), self.decay(now));
        let averaged = self.secs * keep + sample * (1.0 - keep);
        Self { secs: averaged.max(sample), at: now.max(self.at) }
    }

    fn secs_at(self, now: Duration) -> f64 {
        self.secs * self.decay(now)
    }

    fn decay(self, now: Duration) -> f64 {
        (-now.saturating_sub(self.at).as_secs_f64() / DECAY_SECS).exp()
    }
}

impl Penalty {
    /// Doubles with each refusal up to the cap; the jitter lies inside it. Many requests may share
    /// one attempt to connect, or try at once: what comes while a penalty runs says nothing new.
    fn refused(&mut self, now: Duration, random: u64) {
        if now < self.until {
            return;
        }
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
/// Below it differences in latency say nothing.
const LATENCY_SECS_MIN: f64 = 0.000_1;
const PENALTY_MIN: Duration = Duration::from_millis(200);
const PENALTY_MAX: Duration = Duration::from_secs(10);
/// Beyond the cap already.
const DOUBLINGS_MAX: u32 = 10;

#[cfg(test)]
mod tests;
