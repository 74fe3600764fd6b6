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

use kube::core::SelectorExt as _;
use steadfast_api::spiffe::SpiffeError;
use steadfast_api::{DnsIdentity, SpiffeId, TrustDomain};

pub use objects::{Kind, Name, Object, ObjectError, parse_key};
pub use snapshot::{
    Address, AddressSet, AddressSnapshot, Existence, Mesh, PortSnapshot, ServiceSnapshot, Workload,
    WorkloadKind,
};

use objects::{External, Labels, Namespace, Pod, Server, Service, ServicePort, Slice, SlicePort};
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
    externals: BTreeMap<Name, External>,
    servers: BTreeMap<Name, Server>,
    /// Those of pods, each once: the pods of one template have the same.
    labels: BTreeSet<Labels>,
    pods: BTreeMap<Name, Pod>,
    services: BTreeMap<Name, Service>,
    service_accounts: BTreeSet<Name>,
    slices: BTreeMap<Name, Slice>,
    externals_by_ip: HashMap<IpAddr, BTreeSet<Name>>,
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
            externals: BTreeMap::new(),
            servers: BTreeMap::new(),
            labels: BTreeSet::new(),
            externals_by_ip: HashMap::new(),
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
            Object::ExternalWorkload(external) => self.set_external(name, Some(external)),
            Object::Namespace(namespace) => self.set_namespace(name.name, Some(namespace)),
            Object::Pod(pod) => self.set_pod(name, Some(*pod)),
            Object::Server(server) => self.set_server(name, Some(server)),
            Object::Service(service) => self.set_service(name, Some(service)),
            Object::ServiceAccount => self.set_service_account(name, true),
        }
    }

    /// An object is gone.
    pub fn delete(&mut self, kind: Kind, name: Name) {
        match kind {
            Kind::EndpointSlice => self.set_slice(name, None),
            Kind::ExternalWorkload => self.set_external(name, None),
            Kind::Namespace => self.set_namespace(name.name, None),
            Kind::Pod => self.set_pod(name, None),
            Kind::Server => self.set_server(name, None),
            Kind::Service => self.set_service(name, None),
            Kind::ServiceAccount => self.set_service_account(name, false),
        }
    }

    /// The names of the objects of a kind.
    pub fn names(&self, kind: Kind) -> Vec<Name> {
        match kind {
            Kind::EndpointSlice => self.slices.keys().cloned().collect(),
            Kind::ExternalWorkload => self.externals.keys().cloned().collect(),
            Kind::Namespace => self.namespaces.keys().map(|name| Name::new("", name)).collect(),
            Kind::Pod => self.pods.keys().cloned().collect(),
            Kind::Server => self.servers.keys().cloned().collect(),
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::ServiceAccount => self.service_accounts.iter().cloned().collect(),
        }
    }

    /// How many objects of a kind there are.
    pub fn count(&self, kind: Kind) -> usize {
        match kind {
            Kind::EndpointSlice => self.slices.len(),
            Kind::ExternalWorkload => self.externals.len(),
            Kind::Namespace => self.namespaces.len(),
            Kind::Pod => self.pods.len(),
            Kind::Server => self.servers.len(),
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
        let declared = |ports: &[(Box<str>, u16)]| ports.iter().map(|&(_, port)| port).collect();
        let pods = self.pods_by_ip.get(&ip).into_iter().flatten().filter_map(|name| {
            let pod = self.pods.get(name).filter(|pod| !pod.finished)?;
            Some((Arc::new(self.workload(name, pod)), declared(&pod.ports)))
        });
        let externals = self.externals_by_ip.get(&ip).into_iter().flatten().filter_map(|name| {
            let external = self.externals.get(name)?;
            Some((Arc::new(self.external(name, external)), declared(&external.ports)))
        });
        // A pod is itself, whatever somebody says of its address.
        let mut pods: Vec<_> = pods.collect();
        if pods.is_empty() {
            pods = externals.collect();
        }
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
                let at = |target: &str| (Name::new(&name.namespace, target), endpoint.ip);
                let workload = match &endpoint.target {
                    None => None,
                    Some((WorkloadKind::Pod, pod)) => Some(self.pod_at(at(pod))),
                    Some((WorkloadKind::External, name)) => Some(self.external_at(at(name))),
                };
                let workload = match workload {
                    None => None,
                    Some(Some(workload)) => Some(workload),
                    // The slice is ahead of the pod or behind it. To guess would be to name the
                    // wrong identity, or to send plaintext to a meshed pod.
                    Some(None) => continue,
                };
                candidates.push(Candidate {
                    ip: endpoint.ip,
                    ready: endpoint.ready,
                    serving_terminating: endpoint.serving_terminating,
                    ports: Ports::Listed(&slice.ports),
                    address: Address {
                        workload,
                        hostname: endpoint.hostname.clone(),
                        zone: endpoint.zone.clone(),
                    },
                });
            }
        }
        candidates.extend(self.external_candidates(name, service));
        candidates
    }

    /// The workloads outside of the cluster that a service selects: nobody writes slices for them.
    fn external_candidates(&self, name: &Name, service: &Service) -> Vec<Candidate<'_>> {
        let selects = |external: &External| {
            let mut wanted = service.selector.iter();
            !service.selector.is_empty()
                && wanted.all(|(key, value)| external.labels.get(key) == Some(value))
        };
        let externals = in_namespace(&self.externals, &name.namespace);
        let selected = externals.filter(|(_, external)| selects(external));
        let candidates = selected.filter_map(|(name, external)| {
            let family = |ip: &&IpAddr| service.prefers_ipv6.is_none_or(|v6| v6 == ip.is_ipv6());
            let ip = external.ips.iter().find(family).or_else(|| external.ips.first())?;
            let workload = Some(Arc::new(self.external(name, external)));
            Some(Candidate {
                ip: *ip,
                ready: external.ready,
                serving_terminating: false,
                ports: Ports::Own(&external.ports),
                address: Address { workload, ..Address::default() },
            })
        });
        candidates.collect()
    }

    /// The pod of this name, if this address is its own.
    fn pod_at(&self, (name, ip): (Name, IpAddr)) -> Option<Arc<Workload>> {
        let pod = self.pods.get(&name).filter(|pod| !pod.finished && pod.ips.contains(&ip))?;
        Some(Arc::new(self.workload(&name, pod)))
    }

    /// The workload of this name outside of the cluster, if this address is its own.
    fn external_at(&self, (name, ip): (Name, IpAddr)) -> Option<Arc<Workload>> {
        let external = self.externals.get(&name).filter(|external| external.ips.contains(&ip))?;
        Some(Arc::new(self.external(&name, external)))
    }

    fn external(&self, name: &Name, external: &External) -> Workload {
        let own = &external.annotations;
        let identity = self.identity_named(&external.identity);
        let mesh = Mesh {
            identity: identity.as_ref().unwrap_or(&external.identity).clone(),
            fault: identity.err(),
            inbound_port: own.inbound_port.unwrap_or(INBOUND_PORT_DEFAULT),
        };
        let opaque_ports = own.opaque_ports.as_ref().unwrap_or(&self.default_opaque_ports).clone();
        let selects = |server: &Server| {
            server.externals.as_ref().is_some_and(|selector| selector.matches(&external.labels))
        };
        Workload {
            kind: WorkloadKind::External,
            name: name.clone(),
            uid: "".into(),
            service_account: "".into(),
            owner: external.owner.clone(),
            mesh: Some(mesh),
            opaque_ports: self.and_of_servers(name, opaque_ports, &external.ports, selects),
            skip_inbound_ports: own.skip_inbound_ports.clone().unwrap_or_default(),
        }
    }

    /// The DNS identity of whoever has this one, in either form; or why nobody can.
    fn identity_named(&self, text: &str) -> Result<Box<str>, Box<str>> {
        let MeshNames { trust_domain, control_namespace } = &self.mesh;
        let foreign =
            || format!("its identity {text:?} is of no service account of {trust_domain}").into();
        if text.starts_with("spiffe://") {
            let id: SpiffeId = text.parse().map_err(|e: SpiffeError| e.to_string())?;
            let (namespace, account) = id
                .service_account()
                .filter(|_| id.is_member_of(trust_domain))
                .ok_or_else(foreign)?;
            let name = DnsIdentity::new(account, namespace, control_namespace, trust_domain);
            return name.map(|name| name.to_string().into()).map_err(|e| e.to_string().into());
        }
        let name: DnsIdentity = text.parse().map_err(|e: SpiffeError| e.to_string())?;
        let ours = name.trust_domain() == trust_domain
            && name.control_namespace() == control_namespace.as_str();
        if ours { Ok(name.to_string().into()) } else { Err(foreign()) }
    }

    /// These opaque ports, and those that Servers say are.
    fn and_of_servers(
        &self,
        name: &Name,
        ports: PortSet,
        declared: &[(Box<str>, u16)],
        selects: impl Fn(&Server) -> bool,
    ) -> PortSet {
        let servers = in_namespace(&self.servers, &name.namespace);
        let opaque = servers.filter(|(_, server)| server.opaque && selects(server));
        let more = opaque.filter_map(|(_, server)| server.port.among(declared));
        more.fold(ports, |ports, port| ports.with(port))
    }

    fn workload(&self, name: &Name, pod: &Pod) -> Workload {
        let none = Namespace::default();
        let inherited = self.namespaces.get(&name.namespace).unwrap_or(&none);
        let own = &pod.annotations;
        let injected = own.inject.or(inherited.inject).unwrap_or(false);
        let inbound_port = own.inbound_port.or(inherited.inbound_port);
        let opaque_ports = own.opaque_ports.as_ref().or(inherited.opaque_ports.as_ref());
        let opaque_ports = opaque_ports.unwrap_or(&self.default_opaque_ports).clone();
        let skip = own.skip_inbound_ports.as_ref().or(inherited.skip_inbound_ports.as_ref());
        let selects = |server: &Server| {
            server.pods.as_ref().is_some_and(|selector| selector.matches(&pod.labels))
        };
        Workload {
            kind: WorkloadKind::Pod,
            name: name.clone(),
            uid: pod.uid.clone(),
            service_account: pod.service_account.clone(),
            owner: pod.owner.clone(),
            mesh: (injected && !pod.host_network)
                .then(|| self.mesh_of(name, pod, inbound_port.unwrap_or(INBOUND_PORT_DEFAULT))),
            opaque_ports: self.and_of_servers(name, opaque_ports, &pod.ports, selects),
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

    fn set_external(&mut self, name: Name, external: Option<External>) {
        self.all_of(&name.namespace);
        let old = match &external {
            Some(external) => self.externals.insert(name.clone(), external.clone()),
            None => self.externals.remove(&name),
        };
        for ip in old.iter().flat_map(|old| &old.ips) {
            unlink(&mut self.externals_by_ip, ip, &name);
        }
        for ip in external.iter().flat_map(|new| &new.ips) {
            link(&mut self.externals_by_ip, *ip, &name);
        }
        for external in old.iter().chain(&external) {
            self.dirty.addresses.extend(&external.ips);
        }
    }

    fn set_server(&mut self, name: Name, server: Option<Server>) {
        self.all_of(&name.namespace);
        match server {
            Some(server) => self.servers.insert(name, server),
            None => self.servers.remove(&name),
        };
    }

    /// The same labels as another pod's, where one has them.
    fn shared(&mut self, labels: Labels) -> Labels {
        match self.labels.get(&labels) {
            Some(known) => Arc::clone(known),
            None => {
                self.labels.insert(Arc::clone(&labels));
                labels
            }
        }
    }

    fn set_pod(&mut self, name: Name, mut pod: Option<Pod>) {
        if let Some(pod) = &mut pod {
            pod.labels = self.shared(std::mem::take(&mut pod.labels));
        }
        let old = match &pod {
            Some(pod) => self.pods.insert(name.clone(), pod.clone()),
            None => self.pods.remove(&name),
        };
        if let Some(old) = &old
            && Arc::strong_count(&old.labels) == ONLY_OURS
        {
            self.labels.remove(&old.labels);
        }
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

    /// Everything in a namespace may have changed.
    fn all_of(&mut self, namespace: &str) {
        for (service_name, service) in in_namespace(&self.services, namespace) {
            self.dirty.services.insert(service_name.clone());
            self.dirty.addresses.extend(&service.cluster_ips);
        }
        for (_, pod) in in_namespace(&self.pods, namespace) {
            self.dirty.addresses.extend(&pod.ips);
        }
        for (_, external) in in_namespace(&self.externals, namespace) {
            self.dirty.addresses.extend(&external.ips);
        }
    }

    fn set_namespace(&mut self, name: String, namespace: Option<Namespace>) {
        self.all_of(&name);
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
    ports: Ports<'a>,
    address: Address,
}

/// What is known of an endpoint's ports.
enum Ports<'a> {
    /// The slice's, by the name of the service's port.
    Listed(&'a [SlicePort]),
    /// Its own, by their names.
    Own(&'a [(Box<str>, u16)]),
}

impl Candidate<'_> {
    /// The port to dial for a port of the service.
    fn target(&self, port: &ServicePort, all: &[ServicePort]) -> Option<u16> {
        let listed = match self.ports {
            Ports::Listed(listed) => listed,
            Ports::Own(own) => return port.target.among(own),
        };
        let named = listed.iter().find(|listed| listed.name == port.name);
        // Written by hand, the one port of the one port's slice often has no name.
        let only = || match (listed, all) {
            ([only], [_]) if only.name.is_empty() => Some(only),
            _ => None,
        };
        let listed = named.or_else(only)?;
        listed.port.or_else(|| port.target.among(&[]))
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
    let pod = workload.map(|workload| &workload.name);
    (unmeshed, pod, address.hostname.as_deref(), address.zone.as_deref())
}

fn unusable(candidates: &[Candidate<'_>]) -> Vec<String> {
    let faults = candidates.iter().filter_map(|candidate| {
        let workload = candidate.address.workload.as_ref()?;
        let kind = match workload.kind {
            WorkloadKind::Pod => "pod",
            WorkloadKind::External => "external workload",
        };
        Some(format!("the {kind} {} is left out: {}", workload.name, candidate.fault()?))
    });
    let sorted: BTreeSet<_> = faults.collect();
    sorted.into_iter().collect()
}

/// The objects of one namespace, which lie together.
fn in_namespace<'a, V>(
    objects: &'a BTreeMap<Name, V>,
    namespace: &str,
) -> impl Iterator<Item = (&'a Name, &'a V)> {
    let from = Name::new(namespace, "");
    objects.range(from..).take_while(move |(name, _)| *name.namespace == *namespace)
}

fn service_of(slice_name: &Name, slice: &Slice) -> Option<Name> {
    Some(Name::new(&slice_name.namespace, slice.service.as_deref()?))
}

fn pods_of<'a>(slice_name: &'a Name, slice: &'a Slice) -> impl Iterator<Item = Name> + 'a {
    let pods = slice.endpoints.iter().filter_map(|endpoint| match &endpoint.target {
        Some((WorkloadKind::Pod, pod)) => Some(pod),
        _ => None,
    });
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
/// The index's own, and the pod's that is on its way out.
const ONLY_OURS: usize = 2;
/// Stands for the port of a host until one is asked for.
const ANY_PORT: u16 = 0;

#[cfg(test)]
mod tests;
