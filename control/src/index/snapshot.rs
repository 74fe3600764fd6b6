//! What the index says of a service or an address: immutable values, shared by every stream.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::objects::Name;
use super::ports::PortSet;

/// A service at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceSnapshot {
    /// Which one.
    pub name: Name,
    /// Whether and as what it exists.
    pub existence: Existence,
    /// Its TCP ports by number.
    pub ports: BTreeMap<u16, PortSnapshot>,
    /// Of a headless service: its endpoints without a port. Its pods are dialled by their own
    /// address, so that ports which it does not declare lead to them too.
    pub(super) hosts: Option<Vec<(IpAddr, Address)>>,
    /// Endpoints that were left out because they cannot be used, each with its reason.
    pub unusable: Vec<String>,
}

/// Whether and as what a service exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existence {
    /// As a CNAME: it has no endpoints.
    ExternalName,
    /// Not at all.
    #[default]
    Missing,
    /// With endpoints, or for now without.
    Present,
}

/// One port of a service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PortSnapshot {
    /// Not to be looked into.
    pub opaque: bool,
    /// `appProtocol` as the Service says it.
    pub app_protocol: Option<Box<str>>,
    /// Its endpoints.
    pub addresses: Arc<AddressSet>,
}

/// Endpoints by address.
pub type AddressSet = BTreeMap<SocketAddr, Address>;

/// One endpoint beside its address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Address {
    /// What is behind it; `None`: something that nothing is known of.
    pub workload: Option<Arc<Workload>>,
    /// The name by which a headless service's DNS knows it.
    pub hostname: Option<Box<str>>,
    /// Where it runs.
    pub zone: Option<Box<str>>,
}

/// What a workload instance is to Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WorkloadKind {
    /// An ExternalWorkload: outside of the cluster, with a sidecar.
    External,
    /// A Pod.
    Pod,
}

/// A workload instance as its peers need to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// What it is.
    pub kind: WorkloadKind,
    /// Which one.
    pub name: Name,
    /// Which instance of it.
    pub uid: Box<str>,
    /// Its service account; empty outside of the cluster.
    pub service_account: Box<str>,
    /// The metric label of its owner.
    pub owner: Option<(Box<str>, Box<str>)>,
    pub(super) mesh: Option<Mesh>,
    pub(super) opaque_ports: PortSet,
    pub(super) skip_inbound_ports: PortSet,
}

/// How a meshed pod is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Its DNS identity.
    pub identity: Box<str>,
    /// Why nobody can hold an SVID with that name: such a pod cannot be reached, and least of all
    /// in plaintext.
    pub fault: Option<Box<str>>,
    /// Where its proxy listens.
    pub inbound_port: u16,
}

/// What stands behind an IP address at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum AddressSnapshot {
    /// Nothing that is known.
    #[default]
    Foreign,
    /// Pods, of which several can share the address of their node: each with the ports that it
    /// declares.
    Pods(Vec<(Arc<Workload>, Vec<u16>)>),
    /// Cluster IP of a service.
    Service(Arc<ServiceSnapshot>),
}

impl ServiceSnapshot {
    /// The endpoints of one port, or of one host of it.
    pub fn addresses(&self, port: u16, hostname: Option<&str>) -> Arc<AddressSet> {
        let all = match (self.ports.get(&port), &self.hosts) {
            (Some(declared), _) => declared.addresses.clone(),
            (None, Some(hosts)) => Arc::new(
                hosts.iter().map(|(ip, host)| (SocketAddr::new(*ip, port), host.clone())).collect(),
            ),
            (None, None) => Arc::default(),
        };
        let Some(hostname) = hostname else { return all };
        let named = |address: &Address| address.hostname.as_deref() == Some(hostname);
        let of_host = all.iter().filter(|(_, address)| named(address));
        Arc::new(of_host.map(|(addr, address)| (*addr, address.clone())).collect())
    }

    /// Whether a port is not to be looked into.
    pub fn opaque(&self, port: u16) -> bool {
        self.ports.get(&port).is_some_and(|port| port.opaque)
    }
}

impl Workload {
    /// How this port of it is spoken to; `None`: in plaintext.
    pub fn mesh_at(&self, port: u16) -> Option<&Mesh> {
        self.mesh.as_ref().filter(|_| !self.skip_inbound_ports.contains(port))
    }

    /// Whether this port of it is not to be looked into.
    pub fn opaque(&self, port: u16) -> bool {
        self.opaque_ports.contains(port)
    }
}

impl AddressSnapshot {
    /// The pod that is reached at this port of the address, if that is beyond doubt: an identity
    /// must never be claimed for another.
    pub fn workload_at(&self, port: u16) -> Option<&Arc<Workload>> {
        let Self::Pods(pods) = self else { return None };
        if let [(only, _)] = pods.as_slice() {
            return Some(only);
        }
        let mut declaring = pods.iter().filter(|(_, ports)| ports.contains(&port));
        match (declaring.next(), declaring.next()) {
            (Some((workload, _)), None) => Some(workload),
            // Whichever it is of those outside, it is meshed: plaintext would be worse than none.
            _ => {
                pods.iter().map(|(workload, _)| workload).find(|w| w.kind == WorkloadKind::External)
            }
        }
    }
}
