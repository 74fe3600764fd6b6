//! Where destinations lead: one worker's copy of what discovery says, and the loads it sees.
//!
//! Names are balanced over their endpoints; an address is an endpoint, a service, or unknown to the
//! mesh. While discovery has said nothing, who asks waits for a while and is then refused.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::Hash;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use steadfast_api::Code;
use steadfast_process::Clock;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::balance::{Balancer, Picked};
use crate::discovery::{
    Authority, Discovery, DiscoveryError, Endpoint, Endpoints, Profile, ProtocolHint,
};
use crate::metrics::{HttpMeter, Labels, Metrics};
use crate::refusal::Refusal;
use crate::target::Target;
use crate::worker::Shared;

/// Where destinations lead.
pub(super) struct Routes {
    discovery: Option<Discovery>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    random: RefCell<SmallRng>,
    names: Cached<Authority, Balanced>,
    addresses: Cached<SocketAddr, Profiled>,
}

/// Where one destination leads.
#[derive(Clone)]
pub(super) struct Route {
    /// Not to be looked into.
    pub(super) opaque: bool,
    way: Way,
    /// As the application named it.
    authority: Rc<str>,
}

#[derive(Clone)]
enum Way {
    Balanced(Rc<Balanced>),
    Single(Arc<Endpoint>),
}

/// The endpoint for one request or connection.
pub(super) enum Chosen {
    /// Its load and its refusals are remembered.
    Balanced(Picked),
    /// There is no other.
    Single(Arc<Endpoint>),
}

/// The endpoints of a name.
struct Balanced {
    authority: Authority,
    updates: RefCell<watch::Receiver<Arc<Endpoints>>>,
    latest: RefCell<Arc<Endpoints>>,
    balancer: Balancer,
    meters: RefCell<HashMap<SocketAddr, Rc<HttpMeter>>>,
}

struct Profiled {
    updates: RefCell<watch::Receiver<Arc<Profile>>>,
    meters: RefCell<HashMap<SocketAddr, Rc<HttpMeter>>>,
}

/// Values by key, let go when nobody has used them for a while.
struct Cached<K, V>(RefCell<HashMap<K, Used<V>>>);

/// A value, and when it was last used.
type Used<V> = (Rc<V>, Cell<Duration>);

impl Routes {
    pub(super) fn new(shared: &Shared) -> Self {
        Self {
            discovery: shared.discovery.clone(),
            clock: shared.clock.clone(),
            metrics: shared.metrics.clone(),
            random: RefCell::new(SmallRng::from_os_rng()),
            names: Cached::default(),
            addresses: Cached::default(),
        }
    }

    /// Where a destination leads.
    pub(super) async fn resolve(&self, target: &Target) -> Result<Route, Refusal> {
        let authority: Rc<str> = target.to_string().into();
        match target {
            Target::Name(name) => {
                let way = Way::Balanced(self.balanced(name)?);
                Ok(Route { opaque: false, way, authority })
            }
            Target::Address(addr) => self.resolve_address(*addr, authority).await,
        }
    }

    /// The endpoint for one request or connection.
    pub(super) async fn choose(&self, route: &Route) -> Result<Chosen, Refusal> {
        match &route.way {
            Way::Single(endpoint) => Ok(Chosen::Single(endpoint.clone())),
            Way::Balanced(balanced) => loop {
                balanced.refresh();
                let random = self.random.borrow_mut().random();
                if let Some(picked) = balanced.balancer.pick(self.now(), random) {
                    return Ok(Chosen::Balanced(picked));
                }
                let patience = balanced.worth_waiting().ok_or_else(|| balanced.nothing())?;
                let mut updates = balanced.updates.borrow().clone();
                // A discovery that is gone has nothing more to say.
                if !matches!(timeout(patience, updates.changed()).await, Ok(Ok(()))) {
                    return Err(balanced.nothing());
                }
            },
        }
    }

    /// The endpoint could not be reached.
    pub(super) fn refused(&self, chosen: &Chosen) {
        if let Chosen::Balanced(picked) = chosen {
            picked.refused(self.now(), self.random.borrow_mut().random());
        }
    }

    /// Counts requests to an endpoint of this route.
    pub(super) fn meter(&self, route: &Route, endpoint: &Endpoint) -> Rc<HttpMeter> {
        let new = || Rc::new(self.metrics.http(route.labels(endpoint)));
        match &route.way {
            Way::Balanced(balanced) => {
                balanced.meters.borrow_mut().entry(endpoint.addr).or_insert_with(new).clone()
            }
            Way::Single(_) => match self.addresses.used(&endpoint.addr, self.now()) {
                Some(profiled) => {
                    profiled.meters.borrow_mut().entry(endpoint.addr).or_insert_with(new).clone()
                }
                None => new(),
            },
        }
    }

    /// Lets go of destinations that nobody uses, so that discovery can forget them.
    pub(super) fn sweep(&self) {
        self.names.sweep(self.now());
        self.addresses.sweep(self.now());
    }

    async fn resolve_address(
        &self,
        addr: SocketAddr,
        authority: Rc<str>,
    ) -> Result<Route, Refusal> {
        let single = |endpoint| Way::Single(endpoint);
        let Some(discovery) = &self.discovery else {
            let way = single(Arc::new(unmeshed(addr)));
            return Ok(Route { opaque: false, way, authority });
        };
        let profiled = match self.addresses.used(&addr, self.now()) {
            Some(profiled) => profiled,
            None => {
                // Before discovery is asked, so that a worker never holds more than it may.
                self.addresses.make_room()?;
                let updates = RefCell::new(discovery.profile(addr).map_err(full)?);
                let profiled = Profiled { updates, meters: RefCell::default() };
                self.addresses.insert(addr, profiled, self.now())
            }
        };
        let mut updates = profiled.updates.borrow().clone();
        let known = updates.wait_for(|profile| !matches!(**profile, Profile::Pending));
        let profile = match timeout(ANSWER_WAIT_MAX, known).await {
            Ok(Ok(profile)) => profile.clone(),
            _ => return Err(unknown(&authority, "the control plane has not answered")),
        };
        let (way, opaque) = match &*profile {
            Profile::Endpoint { endpoint, opaque } => {
                let opaque = *opaque || endpoint.protocol == ProtocolHint::Opaque;
                (single(endpoint.clone()), opaque)
            }
            Profile::Foreign { opaque } => (single(Arc::new(unmeshed(addr))), *opaque),
            Profile::Service { authority, opaque } => {
                (Way::Balanced(self.balanced(authority)?), *opaque)
            }
            Profile::Unusable(why) => return Err(unknown(&authority, why)),
            Profile::Pending => {
                return Err(unknown(&authority, "the control plane has not answered"));
            }
        };
        Ok(Route { opaque, way, authority })
    }

    fn balanced(&self, name: &Authority) -> Result<Rc<Balanced>, Refusal> {
        let discovery = self
            .discovery
            .as_ref()
            .ok_or_else(|| unknown(name.as_str(), "no discovery is configured"))?;
        if let Some(balanced) = self.names.used(name, self.now()) {
            return Ok(balanced);
        }
        self.names.make_room()?;
        let mut updates = discovery.endpoints(name).map_err(full)?;
        updates.mark_changed();
        let balanced = Balanced {
            authority: name.clone(),
            updates: RefCell::new(updates),
            latest: RefCell::default(),
            balancer: Balancer::new(),
            meters: RefCell::default(),
        };
        Ok(self.names.insert(name.clone(), balanced, self.now()))
    }

    fn now(&self) -> Duration {
        self.clock.since_boot()
    }
}

impl Route {
    /// Of requests and connections to an endpoint of it.
    pub(super) fn labels(&self, endpoint: &Endpoint) -> Labels {
        let labels = Labels::new([("direction", "outbound"), ("authority", &*self.authority)]);
        let port = endpoint.addr.port().to_string();
        let labels = labels.with("target_port", &port);
        let labels = match &endpoint.identity {
            Some(expected) => labels.with("tls", "true").with("server_id", expected.id.as_str()),
            None => labels
                .with("tls", "no_identity")
                .with("no_tls_reason", "not_provided_by_service_discovery"),
        };
        endpoint
            .labels
            .iter()
            .fold(labels, |labels, (name, value)| labels.with(&format!("dst_{name}"), value))
    }
}

impl Chosen {
    pub(super) fn endpoint(&self) -> &Arc<Endpoint> {
        match self {
            Self::Balanced(picked) => picked.endpoint(),
            Self::Single(endpoint) => endpoint,
        }
    }

    pub(super) fn connected(&self) {
        if let Self::Balanced(picked) = self {
            picked.connected();
        }
    }

    pub(super) fn responded(&self, now: Duration) {
        if let Self::Balanced(picked) = self {
            picked.responded(now);
        }
    }
}

impl Balanced {
    /// Takes over what discovery has said since.
    fn refresh(&self) {
        let mut updates = self.updates.borrow_mut();
        // Costs one atomic read; a watch whose sender is gone keeps its last value.
        if !updates.has_changed().unwrap_or(false) {
            return;
        }
        let latest = updates.borrow_and_update().clone();
        let endpoints = match &*latest {
            Endpoints::Known { endpoints, .. } => endpoints.as_slice(),
            Endpoints::Missing | Endpoints::Pending | Endpoints::Refused(_) => &[],
        };
        self.balancer.update(endpoints);
        self.meters.take();
        self.latest.replace(latest);
    }

    /// How long an endpoint is worth waiting for: a name that does not exist will not come to
    /// exist soon; endpoints may.
    fn worth_waiting(&self) -> Option<Duration> {
        match &**self.latest.borrow() {
            Endpoints::Missing | Endpoints::Refused(_) => None,
            Endpoints::Known { .. } => Some(ENDPOINT_WAIT_MAX),
            Endpoints::Pending => Some(ANSWER_WAIT_MAX),
        }
    }

    fn nothing(&self) -> Refusal {
        let target = self.authority.to_string();
        let (code, detail) = match &**self.latest.borrow() {
            Endpoints::Known { unusable: 0, .. } => {
                (Code::NO_ENDPOINTS, "the service has no endpoint that is ready".to_owned())
            }
            Endpoints::Known { unusable, .. } => (
                Code::NO_ENDPOINTS,
                format!("the control plane describes {unusable} endpoints that cannot be used"),
            ),
            Endpoints::Missing => {
                (Code::NO_SUCH_DESTINATION, "there is no service of this name and port".to_owned())
            }
            Endpoints::Pending => {
                (Code::NO_SUCH_DESTINATION, "the control plane has not answered".to_owned())
            }
            Endpoints::Refused(why) => (Code::NO_SUCH_DESTINATION, why.to_string()),
        };
        Refusal::Unknown { code, target, detail }
    }
}

impl<K: Clone + Eq + Hash, V> Cached<K, V> {
    fn used(&self, key: &K, now: Duration) -> Option<Rc<V>> {
        let all = self.0.borrow();
        let (value, used) = all.get(key)?;
        used.set(now);
        Some(value.clone())
    }

    /// Where there is no room, what was used the longest ago goes; not what somebody holds.
    fn make_room(&self) -> Result<(), Refusal> {
        let mut all = self.0.borrow_mut();
        if all.len() < TARGETS_MAX {
            return Ok(());
        }
        let idle = all.iter().filter(|(_, (value, _))| Rc::strong_count(value) == 1);
        let oldest = idle.min_by_key(|(_, (_, used))| used.get()).map(|(key, _)| key.clone());
        let oldest = oldest.ok_or(Refusal::Overloaded("too many destinations are in use"))?;
        all.remove(&oldest);
        Ok(())
    }

    fn insert(&self, key: K, value: V, now: Duration) -> Rc<V> {
        let value = Rc::new(value);
        self.0.borrow_mut().insert(key, (value.clone(), Cell::new(now)));
        value
    }

    fn sweep(&self, now: Duration) {
        self.0.borrow_mut().retain(|_, (value, used)| {
            Rc::strong_count(value) > 1 || now.saturating_sub(used.get()) < IDLE_MAX
        });
    }
}

impl<K, V> Default for Cached<K, V> {
    fn default() -> Self {
        Self(RefCell::default())
    }
}

/// An address that no control plane knows: outside of the mesh.
fn unmeshed(addr: SocketAddr) -> Endpoint {
    Endpoint {
        addr,
        weight: 1,
        identity: None,
        inbound_port: None,
        protocol: ProtocolHint::Unknown,
        authority_override: None,
        labels: Arc::default(),
    }
}

fn unknown(target: &str, why: &str) -> Refusal {
    let (code, target) = (Code::NO_SUCH_DESTINATION, target.to_owned());
    Refusal::Unknown { code, target, detail: why.to_owned() }
}

fn full(_: DiscoveryError) -> Refusal {
    Refusal::Overloaded("discovery watches as many destinations as it can")
}

/// For discovery's first word.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(10);
/// For an endpoint to become ready, where there is none: Linkerd's time until it fails fast.
const ENDPOINT_WAIT_MAX: Duration = Duration::from_secs(3);
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Of names, and of addresses, by worker.
pub const TARGETS_MAX: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    fn used(cached: &Cached<usize, usize>, key: usize) -> Option<Rc<usize>> {
        cached.used(&key, Duration::from_secs(9999))
    }

    #[test]
    fn a_new_destination_takes_the_place_of_the_one_that_idled_longest() {
        let cached = Cached::<usize, usize>::default();
        let mut held = Vec::new();
        for key in 0..TARGETS_MAX {
            cached.make_room().unwrap();
            let value = cached.insert(key, key, Duration::from_secs(key as u64));
            // The oldest is in use, and may not go.
            held.extend((key == 0).then_some(value));
        }
        cached.make_room().unwrap();
        assert!(used(&cached, 0).is_some() && used(&cached, 1).is_none());
        cached.insert(TARGETS_MAX, 0, Duration::from_secs(9999));
        cached.make_room().unwrap();
        assert!(used(&cached, 2).is_none() && used(&cached, 3).is_some());
    }

    #[test]
    fn a_new_destination_is_refused_only_when_all_are_in_use() {
        let cached = Cached::<usize, usize>::default();
        let insert = |key| cached.insert(key, key, Duration::ZERO);
        let mut held: Vec<_> = (0..TARGETS_MAX).map(insert).collect();
        assert!(matches!(cached.make_room(), Err(Refusal::Overloaded(_))));
        held.pop();
        assert!(cached.make_room().is_ok());
    }
}
