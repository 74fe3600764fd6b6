//! Which endpoint gets the next request or connection.
//!
//! Power of two choices: of two endpoints, drawn by weight, the one with the lower load is taken.
//! The load is what recent responses took (a peak-sensitive moving average) times what is pending
//! there for its weight. An endpoint that refuses connections is passed over for a
//! while. Each worker has its own [`Balancer`]s: nothing here is shared or locked. The decisions
//! are in `p2c`, which knows neither clock nor randomness.

mod p2c;

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use crate::discovery::Endpoint;

use p2c::{Core, SlotId};

/// The endpoints of one target and their loads, as one worker sees them.
///
/// Times are on one monotonic clock of the caller's choice, e.g. since boot or since the worker
/// started.
#[derive(Debug, Default)]
pub struct Balancer(Rc<RefCell<Core>>);

/// An endpoint that was picked: it counts as pending there until dropped.
#[derive(Debug)]
pub struct Picked {
    endpoint: Arc<Endpoint>,
    slot: SlotId,
    since: Duration,
    core: Weak<RefCell<Core>>,
}

impl Balancer {
    /// Without endpoints.
    pub fn new() -> Self {
        Self::default()
    }

    /// These are the endpoints from now on; loads of those that stay are kept.
    pub fn update(&self, endpoints: &[Arc<Endpoint>]) {
        self.0.borrow_mut().update(endpoints);
    }

    /// Picks an endpoint by two random numbers, each uniform over all of `u64`. `None`: there is
    /// none, or none that has a weight.
    pub fn pick(&self, now: Duration, random: [u64; 2]) -> Option<Picked> {
        let mut core = self.0.borrow_mut();
        let (slot, endpoint) = core.pick(now, random)?;
        core.started(slot);
        Some(Picked { endpoint, slot, since: now, core: Rc::downgrade(&self.0) })
    }
}

impl Picked {
    /// What was picked.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// A connection to it was made: earlier refusals are forgiven.
    pub fn connected(&self) {
        self.with(|core| core.connected(self.slot));
    }

    /// The first byte of its answer is here: the time since the pick is its latency.
    pub fn responded(&self, now: Duration) {
        self.with(|core| core.responded(self.slot, now, now.saturating_sub(self.since)));
    }

    /// It refused the connection, did not answer the dial in time or failed the handshake: it is
    /// passed over for a while, longer each time, by a random number uniform over all of `u64`.
    pub fn refused(&self, now: Duration, random: u64) {
        self.with(|core| core.refused(self.slot, now, random));
    }

    fn with(&self, change: impl FnOnce(&mut Core)) {
        if let Some(core) = self.core.upgrade() {
            change(&mut core.borrow_mut());
        }
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.with(|core| core.finished(self.slot));
    }
}
