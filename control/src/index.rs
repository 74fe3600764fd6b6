//! From Kubernetes objects to what discovery says of each service and address.
//!
//! Pure: objects in, immutable snapshots out. What a snapshot says follows from the objects that
//! are there and never from the order in which they came; every change marks what it may have
//! altered (`Dirty`), so that only that is looked at again. An identity is claimed for a pod that
//! is meshed and whose service account exists, at an address that is its own, and for nothing else.

mod objects;
mod ports;
mod snapshot;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use steadfast_api::{DnsIdentity, TrustDomain};

pub use objects::{Kind, Name, Object, ObjectError, parse_key};
pub use snapshot::{
    Address, AddressSet, AddressSnapshot, Existence, Mesh, PortSnapshot, ServiceSnapshot, Workload,
};

use objects::{Namespace, Pod, Service, ServicePort, Slice, SlicePort, TargetPort};
pub use ports::{BadPort, PortSet};

/// What makes a DNS identity of a service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshNames {
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// The namespace of the control plane.
    pub control_namespace: String,
}

/// The objects, and what leads from one to another.
#[derive(Debug)]
pub struct Index {
    mesh: MeshNames,
    default_opaque_ports: PortSet,
    namespaces: HashMap<String, Namespace>,
    pods: BTreeMap<Name, Pod>,
    services: BTreeMap<Name, Service>,
    service_accounts: BTreeSet<Name>,
    slices: BTreeMap<Name, Slice>,
    pods_by_ip: HashMap<IpAddr, BTreeSet<Name>>,
    services_by_ip: HashMap<IpAddr, BTreeSet<Name>>,
    slices_by_pod: HashMap<Name, BTreeSet<Name>>,
    slices_by_service: HashMap<Name, BTreeSet<Name>>,
    dirty: Dirty,
}

/// What may have changed since it was last asked.
#[derive(Debug, Default)]
pub struct Dirty {
    /// Services.
    pub services: BTreeSet<Name>,
    /// Addresses.
    pub addresses: HashSet<IpAddr>,
}

impl Index {
    /// Without objects.
    pub fn new(mesh: MeshNames) -> Self {
        Self {
            mesh,
            default_opaque_ports: PortSet::default_opaque(),
            namespaces: HashMap::new(),
            pods: BTreeMap::new(),
            services: BTreeMap::new(),
            service_accounts: BTreeSet::new(),
            slices: BTreeMap::new(),
            pods_by_ip: HashMap::new(),
            services_by_ip: HashMap::new(),
            slices_by_pod: HashMap::new(),
            slices_by_service: HashMap::new(),
            dirty: Dirty::default(),
        }
    }

    /// An object was made or changed.
    pub fn put(&mut self, name: Name, object: Object) {
        match object {
            Object::EndpointSlice(slice) => self.set_slice(name, Some(slice)),
            Object::Namespace(namespace) => self.set_namespace(name.name, Some(namespace)),
            Object::Pod(pod) => self.set_pod(name, Some(*pod)),
            Object::Service(service) => self.set_service(name, Some(service)),
            Object::ServiceAccount => self.set_service_account(name, true),
        }
    }

    /// An object is gone.
    pub fn delete(&mut self, kind: Kind, name: Name) {
        match kind {
            Kind::EndpointSlice => self.set_slice(name, None),
            Kind::Namespace => self.set_namespace(name.name, None),
            Kind::Pod => self.set_pod(name, None),
            Kind::Service => self.set_service(name, None),
            Kind::ServiceAccount => self.set_service_account(name, false),
        }
    }

    /// The names of the objects of a kind.
    pub fn names(&self, kind: Kind) -> Vec<Name> {
        match kind {
            Kind::EndpointSlice => self.slices.keys().cloned().collect(),
            Kind::Namespace => self.namespaces.keys().map(|name| Name::new("", name)).collect(),
            Kind::Pod => self.pods.keys().cloned().collect(),
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::ServiceAccount => self.service_accounts.iter().cloned().collect(),
        }
    }

    /// How many objects of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::EndpointSlice => self.slices.len(),
            Kind::Namespace => self.namespaces.len(),
            Kind::Pod => self.pods.len(),
            Kind::Service => self.services.len(),
            Kind::ServiceAccount => self.service_accounts.len(),
        }
    }

    /// What may have changed since this was last called.
    pub fn take_dirty(&mut self) -> Dirty {
        std::mem::take(&mut self.dirty)
    }

    /// What is known of a service; linear in its endpoints.
    pub fn service(&self, name: &Name) -> ServiceSnapshot {
        let mut snapshot = self.service_without_endpoints(name);
        let Some(service) = self.services.get(name) else { return snapshot };
        if snapshot.existence != Existence::Present {
            return snapshot;
        }
        let candidates = self.candidates(name, service);
        for port in &service.ports {
            let target = |candidate: &Candidate<'_>| candidate.target(port, &service.ports);
            if let Some(known) = snapshot.ports.get_mut(&port.port) {
                known.addresses = Arc::new(select(service, &candidates, target));
            }
        }
        if service.headless {
            // Any port leads somewhere, so the one that is asked for is filled in later.
            let hosts = select(service, &candidates, |_| Some(ANY_PORT));
            snapshot.hosts =
                Some(hosts.into_iter().map(|(addr, host)| (addr.ip(), host)).collect());
        }
        snapshot.unusable = unusable(&candidates);
        snapshot
    }

    fn service_without_endpoints(&self, name: &Name) -> ServiceSnapshot {
        let mut snapshot = ServiceSnapshot { name: name.clone(), ..ServiceSnapshot::default() };
        let Some(service) = self.services.get(name) else { return snapshot };
        if service.external_name {
            snapshot.existence = Existence::ExternalName;
            return snapshot;
        }
        snapshot.existence = Existence::Present;
        let opaque_ports = self.service_opaque_ports(name, service);
        for port in &service.ports {
            let described = PortSnapshot {
                opaque: port.says_opaque() || opaque_ports.contains(port.port),
                app_protocol: port.app_protocol.clone(),
                addresses: Arc::default(),
            };
            snapshot.ports.insert(port.port, described);
        }
        snapshot
    }

    /// What stands behind an address.
    pub fn address(&self, ip: IpAddr) -> AddressSnapshot {
        if let Some(name) = self.services_by_ip.get(&ip).and_then(BTreeSet::first) {
            return AddressSnapshot::Service(Arc::new(self.service_without_endpoints(name)));
        }
        let pods = self.pods_by_ip.get(&ip).into_iter().flatten();
        let pods: Vec<_> = pods
            .filter_map(|name| {
                let pod = self.pods.get(name).filter(|pod| !pod.finished)?;
                let declared = pod.ports.iter().map(|&(_, port)| port).collect();
                Some((Arc::new(self.workload(name, pod)), declared))
            })
            .collect();
        if pods.is_empty() { AddressSnapshot::Foreign } else { AddressSnapshot::Pods(pods) }
    }

    /// Whether a port of something unknown is not to be looked into.
    pub fn opaque_by_default(&self, port: u16) -> bool {
        self.default_opaque_ports.contains(port)
    }

    /// Everything that may be an endpoint of a service, ready or not.
    fn candidates(&self, name: &Name, service: &Service) -> Vec<Candidate<'_>> {
        let names = self.slices_by_service.get(name).into_iter().flatten();
        let slices: Vec<_> =
            names.filter_map(|name| Some((name, self.slices.get(name)?))).collect();
        // A pod with two families has an address in two slices: one is enough.
        let family = service.prefers_ipv6.filter(|&ipv6| {
            slices.iter().any(|(_, slice)| slice.ipv6 == ipv6 && !slice.endpoints.is_empty())
        });
        let mut candidates = Vec::new();
        for (name, slice) in slices {
            if family.is_some_and(|ipv6| ipv6 != slice.ipv6) {
                continue;
            }
            for endpoint in &slice.endpoints {
                let workload = match &endpoint.pod {
                    None => None,
                    Some(pod) => {
                        match self.pod_at(&Name::new(&name.namespace, pod), endpoint.ip) {
                            Some(workload) => Some(workload),
                            // The slice is ahead of the pod or behind it. To guess would be to
                            // name the wrong identity, or to send plaintext to a meshed pod.
                            None => continue,
                        }
                    }
                };
                candidates.push(Candidate {
                    ip: endpoint.ip,
                    ready: endpoint.ready,
                    serving_terminating: endpoint.serving_terminating,
                    ports: &slice.ports,
                    address: Address {
                        workload,
                        hostname: endpoint.hostname.clone(),
                        zone: endpoint.zone.clone(),
                    },
                });
            }
        }
        candidates
    }

    /// The pod of this name, if this address is its own.
    fn pod_at(&self, name: &Name, ip: IpAddr) -> Option<Arc<Workload>> {
        let pod = self.pods.get(name).filter(|pod| !pod.finished && pod.ips.contains(&ip))?;
        Some(Arc::new(self.workload(name, pod)))
    }

    fn workload(&self, name: &Name, pod: &Pod) -> Workload {
        let none = Namespace::default();
        let inherited = self.namespaces.get(&name.namespace).unwrap_or(&none);
        let own = &pod.annotations;
        let injected = own.inject.or(inherited.inject).unwrap_or(false);
        let inbound_port = own.inbound_port.or(inherited.inbound_port);
        let opaque_ports = own.opaque_ports.as_ref().or(inherited.opaque_ports.as_ref());
        let skip = own.skip_inbound_ports.as_ref().or(inherited.skip_inbound_ports.as_ref());
        Workload {
            pod: name.clone(),
            uid: pod.uid.clone(),
            service_account: pod.service_account.clone(),
            owner: pod.owner.clone(),
            mesh: (injected && !pod.host_network)
                .then(|| self.mesh_of(name, pod, inbound_port.unwrap_or(INBOUND_PORT_DEFAULT))),
            opaque_ports: opaque_ports.unwrap_or(&self.default_opaque_ports).clone(),
            skip_inbound_ports: skip.cloned().unwrap_or_default(),
        }
    }

    fn mesh_of(&self, name: &Name, pod: &Pod, inbound_port: u16) -> Mesh {
        let MeshNames { trust_domain, control_namespace } = &self.mesh;
        let (account, namespace) = (&pod.service_account, &name.namespace);
        match DnsIdentity::new(account, namespace, control_namespace, trust_domain) {
            Ok(identity) => {
                let account = Name::new(namespace, account);
                // Nobody gets an SVID for an account that is not there. It is left out rather
                // than called without one: a deleted account must not turn mTLS off.
                let fault = (!self.service_accounts.contains(&account))
                    .then(|| format!("its ServiceAccount {account} does not exist").into());
                Mesh { identity: identity.to_string().into(), fault, inbound_port }
            }
            Err(error) => Mesh {
                identity: format!("{account}.{namespace}").into(),
                fault: Some(error.to_string().into()),
                inbound_port,
            },
        }
    }

    fn service_opaque_ports<'a>(&'a self, name: &Name, service: &'a Service) -> &'a PortSet {
        let inherited = || self.namespaces.get(&name.namespace)?.opaque_ports.as_ref();
        service.opaque_ports.as_ref().or_else(inherited).unwrap_or(&self.default_opaque_ports)
    }

    fn set_service(&mut self, name: Name, service: Option<Service>) {
        let old = match &service {
            Some(service) => self.services.insert(name.clone(), service.clone()),
            None => self.services.remove(&name),
        };
        for service in old.iter().chain(&service) {
            self.dirty.addresses.extend(&service.cluster_ips);
        }
        if let Some(old) = old {
            for ip in &old.cluster_ips {
                unlink(&mut self.services_by_ip, ip, &name);
            }
        }
        if let Some(new) = service {
            for ip in &new.cluster_ips {
                link(&mut self.services_by_ip, *ip, &name);
            }
        }
        self.dirty.services.insert(name);
    }

    fn set_slice(&mut self, name: Name, slice: Option<Slice>) {
        let old = match &slice {
            Some(slice) => self.slices.insert(name.clone(), slice.clone()),
            None => self.slices.remove(&name),
        };
        if let Some(old) = old {
            for pod in pods_of(&name, &old) {
                unlink(&mut self.slices_by_pod, &pod, &name);
            }
            if let Some(service) = service_of(&name, &old) {
                unlink(&mut self.slices_by_service, &service, &name);
                self.dirty.services.insert(service);
            }
        }
        if let Some(new) = slice {
            for pod in pods_of(&name, &new) {
                link(&mut self.slices_by_pod, pod, &name);
            }
            if let Some(service) = service_of(&name, &new) {
                link(&mut self.slices_by_service, service.clone(), &name);
                self.dirty.services.insert(service);
            }
        }
    }

    fn set_service_account(&mut self, name: Name, exists: bool) {
        let changed = match exists {
            true => self.service_accounts.insert(name.clone()),
            false => self.service_accounts.remove(&name),
        };
        if !changed {
            return;
        }
        let pods = in_namespace(&self.pods, &name.namespace);
        let pods = pods.filter(|(_, pod)| *pod.service_account == *name.name);
        let (services, addresses): (Vec<_>, Vec<_>) =
            pods.map(|(pod_name, pod)| (self.services_listing(pod_name), &pod.ips)).unzip();
        self.dirty.services.extend(services.into_iter().flatten());
        self.dirty.addresses.extend(addresses.into_iter().flatten());
    }

    fn services_listing(&self, pod: &Name) -> Vec<Name> {
        let slices = self.slices_by_pod.get(pod).into_iter().flatten();
        slices.filter_map(|slice| service_of(slice, self.slices.get(slice)?)).collect()
    }

    fn set_pod(&mut self, name: Name, pod: Option<Pod>) {
        let old = match &pod {
            Some(pod) => self.pods.insert(name.clone(), pod.clone()),
            None => self.pods.remove(&name),
        };
        for ip in old.iter().flat_map(|old| &old.ips) {
            unlink(&mut self.pods_by_ip, ip, &name);
        }
        for ip in pod.iter().flat_map(|new| &new.ips) {
            link(&mut self.pods_by_ip, *ip, &name);
        }
        let listing = self.services_listing(&name);
        self.dirty.services.extend(listing);
        for pod in old.iter().chain(&pod) {
            self.dirty.addresses.extend(&pod.ips);
        }
    }

    fn set_namespace(&mut self, name: String, namespace: Option<Namespace>) {
        for (service_name, service) in in_namespace(&self.services, &name) {
            self.dirty.services.insert(service_name.clone());
            self.dirty.addresses.extend(&service.cluster_ips);
        }
        for (_, pod) in in_namespace(&self.pods, &name) {
            self.dirty.addresses.extend(&pod.ips);
        }
        match namespace {
            Some(namespace) => self.namespaces.insert(name, namespace),
            None => self.namespaces.remove(&name),
        };
    }
}

/// What may be an endpoint of a service, before its port is chosen.
struct Candidate<'a> {
    ip: IpAddr,
    ready: bool,
    serving_terminating: bool,
    ports: &'a [SlicePort],
    address: Address,
}

impl Candidate<'_> {
    /// The port to dial for a port of the service.
    fn target(&self, port: &ServicePort, all: &[ServicePort]) -> Option<u16> {
        let named = self.ports.iter().find(|listed| listed.name == port.name);
        // Written by hand, the one port of the one port's slice often has no name.
        let only = || match (self.ports, all) {
            ([only], [_]) if only.name.is_empty() => Some(only),
            _ => None,
        };
        let listed = named.or_else(only)?;
        listed.port.or(match port.target {
            TargetPort::Number(number) => Some(number),
            TargetPort::Name(_) => None,
        })
    }

    /// Why it cannot be spoken to.
    fn fault(&self) -> Option<&str> {
        self.address.workload.as_ref()?.mesh.as_ref()?.fault.as_deref()
    }
}

/// The endpoints among the candidates: those that are ready; if none is, those that still answer
/// while they end, as kube-proxy does it.
fn select(
    service: &Service,
    candidates: &[Candidate<'_>],
    target: impl Fn(&Candidate<'_>) -> Option<u16>,
) -> AddressSet {
    let choose = |wanted: &dyn Fn(&Candidate<'_>) -> bool| {
        let mut chosen = AddressSet::new();
        for candidate in candidates.iter().filter(|c| wanted(c) && c.fault().is_none()) {
            let Some(port) = target(candidate) else { continue };
            let addr = SocketAddr::new(candidate.ip, port);
            let address = &candidate.address;
            // Two pods cannot have one address for long. While it looks so, the meshed one is
            // believed: then nothing is sent in plaintext that need not be.
            let better = chosen.get(&addr).is_none_or(|known| rank(address) < rank(known));
            if better {
                chosen.insert(addr, address.clone());
            }
        }
        chosen
    };
    let ready = choose(&|candidate| candidate.ready || service.publish_not_ready);
    if ready.is_empty() { choose(&|candidate| candidate.serving_terminating) } else { ready }
}

/// An order that depends on nothing but the address itself.
fn rank(address: &Address) -> (bool, Option<&Name>, Option<&str>, Option<&str>) {
    let workload = address.workload.as_deref();
    let unmeshed = workload.is_none_or(|workload| workload.mesh.is_none());
    let pod = workload.map(|workload| &workload.pod);
    (unmeshed, pod, address.hostname.as_deref(), address.zone.as_deref())
}

fn unusable(candidates: &[Candidate<'_>]) -> Vec<String> {
    let faults = candidates.iter().filter_map(|candidate| {
        let pod = &candidate.address.workload.as_ref()?.pod;
        Some(format!("the pod {pod} is left out: {}", candidate.fault()?))
    });
    let sorted: BTreeSet<_> = faults.collect();
    sorted.into_iter().collect()
}

/// The objects of one namespace, which lie together.
fn in_namespace<'a, V>(
    objects: &'a BTreeMap<Name, V>,
    namespace: &'a str,
) -> impl Iterator<Item = (&'a Name, &'a V)> {
    let from = Name::new(namespace, "");
    objects.range(from..).take_while(move |(name, _)| *name.namespace == *namespace)
}

fn service_of(slice_name: &Name, slice: &Slice) -> Option<Name> {
    Some(Name::new(&slice_name.namespace, slice.service.as_deref()?))
}

fn pods_of<'a>(slice_name: &'a Name, slice: &'a Slice) -> impl Iterator<Item = Name> + 'a {
    let pods = slice.endpoints.iter().filter_map(|endpoint| endpoint.pod.as_deref());
    pods.map(|pod| Name::new(&slice_name.namespace, pod))
}

fn link<K: Eq + Hash>(map: &mut HashMap<K, BTreeSet<Name>>, key: K, name: &Name) {
    map.entry(key).or_default().insert(name.clone());
}

fn unlink<K: Eq + Hash>(map: &mut HashMap<K, BTreeSet<Name>>, key: &K, name: &Name) {
    if let Some(names) = map.get_mut(key) {
        names.remove(name);
        if names.is_empty() {
            map.remove(key);
        }
    }
}

/// Linkerd's, of `config.linkerd.io/inbound-port`.
const INBOUND_PORT_DEFAULT: u16 = 4143;
/// Stands for the port of a host until one is asked for.
const ANY_PORT: u16 = 0;

#[cfg(test)]
mod tests;
