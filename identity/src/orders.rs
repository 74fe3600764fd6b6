//! What a trust stream owes its workload: the bundle, an order to renew, a query.
//!
//! Levels, not events: what is owed follows from what there is and what this stream has been sent,
//! so nothing is lost to a stream that was slow or opened late. Pure, so that a simulation decides
//! by the same code as a stream.

use std::time::Duration;

use steadfast_api::UnixTime;
use steadfast_rotation_protocol::trust_domain::RenewOrder;

use crate::replica::View;

/// What every stream of a replica should have been sent.
#[derive(Clone, Debug, Default)]
pub struct Orders {
    /// The newest query; 0: none yet.
    nonce: u64,
    /// The newest renewal that is pulled forward here, by a person.
    renew: Option<Order>,
}

/// An order to renew early.
#[derive(Clone, Copy, Debug)]
struct Order {
    renew: RenewOrder,
    /// From then on nobody has an SVID from before it: it is told no more.
    until: UnixTime,
}

/// What one stream has been sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    bundle: Option<(u64, [u8; 32])>,
    nonce: u64,
    /// Of the admin page's orders.
    renew: u64,
    /// Of the state's orders, whose ids are given elsewhere.
    state_renew: u64,
}

/// The next message to a workload.
#[derive(Clone, Copy, Debug)]
pub enum Owed<'v> {
    /// What this view publishes.
    Bundle(&'v View),
    /// An ack with this nonce is wanted.
    Query(u64),
    /// It is to renew early.
    Renew(RenewOrder),
}

impl Orders {
    /// Asks every member for an ack that carries this nonce.
    ///
    /// # Errors
    /// The nonce of a query that is as new or newer: answers to this one could not be told from
    /// its own.
    pub fn query(&mut self, nonce: u64) -> Result<(), u64> {
        let newest = self.nonce;
        self.nonce = newest.max(nonce);
        if nonce > newest { Ok(()) } else { Err(newest) }
    }

    /// The newest query; 0: none yet.
    pub fn newest_query(&self) -> u64 {
        self.nonce
    }

    /// Pulls every renewal forward into a window that begins at `from`, where SVIDs live for
    /// `life`. Returns the order's id, which is a time: an order of another replica, or from before
    /// a restart, has another one.
    pub fn renew(
        &mut self,
        now: UnixTime,
        from: UnixTime,
        window: Duration,
        life: Duration,
    ) -> u64 {
        let id = now.as_millis();
        let id = self.renew.map_or(id, |order| id.max(order.renew.id.saturating_add(1)));
        let until = from.max(now) + window + life;
        self.renew = Some(Order { renew: RenewOrder { id, from, window }, until });
        id
    }
}

impl Sent {
    /// What the workload should have and has not been sent yet: the bundle first, so that the ack
    /// to a query speaks of the newest. A bundle is served under a confirmed view only, which is
    /// what `current` must be. What is answered counts as sent.
    pub fn owed<'v>(
        &mut self,
        (namespace, pod_uid): (&str, &str),
        current: Option<&'v View>,
        orders: &Orders,
        now: UnixTime,
    ) -> Option<Owed<'v>> {
        if let Some(view) = current {
            let published = Some((view.state.seq, view.digest));
            if self.bundle != published {
                self.bundle = published;
                return Some(Owed::Bundle(view));
            }
        }
        // Nothing else before the first bundle.
        self.bundle?;
        if let Some(view) = current
            && let order = view.state.renew_for(namespace, pod_uid)
            && let Some(order) = order.filter(|order| order.id > self.state_renew)
        {
            self.state_renew = order.id;
            // From then on nobody has an SVID from before it.
            if now < order.from + order.window + view.longest_life() {
                return Some(Owed::Renew(order));
            }
        }
        if orders.nonce > self.nonce {
            self.nonce = orders.nonce;
            return Some(Owed::Query(orders.nonce));
        }
        let order = orders.renew.filter(|order| order.renew.id > self.renew);
        let Order { renew, .. } = order.filter(|order| now < order.until)?;
        self.renew = renew.id;
        Some(Owed::Renew(renew))
    }
}
