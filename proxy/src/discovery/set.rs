//! The endpoints of one target, as they follow from the messages of its stream.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use linkerd2_proxy_api::destination::{Update, update};

use super::endpoint::{Endpoint, Unusable, parse_addr};

/// What is known of a target: one immutable snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Endpoints {
    /// The service exists.
    Known {
        /// Its usable endpoints by address; empty when it has none.
        endpoints: Vec<Arc<Endpoint>>,
        /// How many more it has that cannot be used.
        unusable: usize,
    },
    /// The control plane knows no such service.
    Missing,
    /// The control plane has not answered yet.
    #[default]
    Pending,
    /// The control plane says that this is no name of a service; asking again is of no use.
    Refused(Arc<str>),
}

/// The endpoints of one target while its streams come and go.
#[derive(Debug, Default)]
pub(super) struct Set {
    endpoints: BTreeMap<SocketAddr, Result<Arc<Endpoint>, Unusable>>,
    exists: bool,
    /// Whether this stream has spoken: what an earlier one said is stale, and holds until then.
    spoken: bool,
}

impl Set {
    /// A new stream begins: what is known stays until its first message.
    pub(super) fn reconnected(&mut self) {
        self.spoken = false;
    }

    /// Applies one message; returns the endpoints that are unusable since it.
    pub(super) fn apply(&mut self, update: Update) -> Vec<(Option<SocketAddr>, Unusable)> {
        let first = !std::mem::replace(&mut self.spoken, true);
        let before = if first { std::mem::take(&mut self.endpoints) } else { BTreeMap::new() };
        self.exists = true;
        let mut unusable = Vec::new();
        match update.update {
            Some(update::Update::Add(set)) => {
                for wire in set.addrs {
                    let addr = wire.addr.as_ref().and_then(parse_addr);
                    let endpoint = Endpoint::parse(wire, &set.metric_labels).map(Arc::new);
                    // Without an address there is nothing to remember it by, nor to dial.
                    let known =
                        addr.and_then(|a| before.get(&a).or_else(|| self.endpoints.get(&a)));
                    if let Err(reason) = &endpoint
                        && known != Some(&endpoint)
                    {
                        unusable.push((addr, reason.clone()));
                    }
                    if let Some(addr) = addr {
                        self.endpoints.insert(addr, endpoint);
                    }
                }
            }
            Some(update::Update::NoEndpoints(none)) => {
                self.endpoints.clear();
                self.exists = none.exists;
            }
            Some(update::Update::Remove(removed)) => {
                for addr in removed.addrs.iter().filter_map(parse_addr) {
                    self.endpoints.remove(&addr);
                }
            }
            // A kind of message that this proxy is too old for says nothing to it.
            None => {}
        }
        unusable
    }

    /// The snapshot of now.
    pub(super) fn snapshot(&self) -> Endpoints {
        if !self.exists {
            return Endpoints::Missing;
        }
        let endpoints: Vec<_> = self
            .endpoints
            .values()
            .filter_map(|endpoint| endpoint.as_ref().ok().cloned())
            .collect();
        let unusable = self.endpoints.len() - endpoints.len();
        Endpoints::Known { endpoints, unusable }
    }
}
