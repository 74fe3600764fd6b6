//! Who will run where: the addresses of every process of the demo, and its names.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use steadfast_api::spiffe::SpiffeError;
use steadfast_api::{DnsIdentity, SpiffeId, TrustDomain};

/// A demo before it is started.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) svid_ttl: Duration,
    pub(crate) store_admin: SocketAddr,
    pub(crate) identity: SocketAddr,
    pub(crate) identity_admin: SocketAddr,
    pub(crate) control: SocketAddr,
    pub(crate) control_admin: SocketAddr,
    pub(crate) rotation_admin: SocketAddr,
    /// In the order of the call: each calls the next.
    pub(crate) workloads: Vec<Workload>,
}

/// One service with its one pod, and the sidecar in it.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    /// Also the name of its Service and of its service account.
    pub(crate) name: &'static str,
    pub(crate) dns_identity: DnsIdentity,
    pub(crate) spiffe_id: SpiffeId,
    pub(crate) application: SocketAddr,
    pub(crate) inbound: SocketAddr,
    pub(crate) outbound: SocketAddr,
    pub(crate) admin: SocketAddr,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    #[error("no identity for {0}")]
    Identity(&'static str, #[source] SpiffeError),
    #[error("no free port on 127.0.0.1 between {PORT_FIRST} and {PORT_LAST}")]
    NoPort,
}

impl Plan {
    /// Chooses ports that nobody listens on. Another process may take one before ours does: the
    /// next attempt then chooses others.
    ///
    /// # Errors
    /// No port left.
    pub(crate) fn new(
        trust_domain: &TrustDomain,
        svid_ttl: Duration,
        attempt: u16,
    ) -> Result<Self, PlanError> {
        let mut ports = Ports::new(std::process::id(), attempt);
        let mut workloads = Vec::new();
        for name in SERVICES {
            let dns_identity = dns_identity(name, trust_domain)?;
            workloads.push(Workload {
                name,
                spiffe_id: dns_identity.spiffe_id(),
                dns_identity,
                application: ports.next()?,
                inbound: ports.next()?,
                outbound: ports.next()?,
                admin: ports.next()?,
            });
        }
        Ok(Self {
            trust_domain: trust_domain.clone(),
            svid_ttl,
            store_admin: ports.next()?,
            identity: ports.next()?,
            identity_admin: ports.next()?,
            control: ports.next()?,
            control_admin: ports.next()?,
            rotation_admin: ports.next()?,
            workloads,
        })
    }

    /// Takes the trust domain of the mesh that it is to run in, if that is another one.
    ///
    /// # Errors
    /// A trust domain under which the services have no identity.
    pub(crate) fn join(&mut self, trust_domain: &TrustDomain) -> Result<(), PlanError> {
        for workload in &mut self.workloads {
            workload.dns_identity = dns_identity(workload.name, trust_domain)?;
            workload.spiffe_id = workload.dns_identity.spiffe_id();
        }
        self.trust_domain = trust_domain.clone();
        Ok(())
    }

    /// Caller and callee of every call between the services.
    pub(crate) fn edges(&self) -> impl Iterator<Item = (&Workload, &Workload)> {
        self.workloads.iter().zip(self.workloads.iter().skip(1))
    }
}

fn dns_identity(name: &'static str, trust_domain: &TrustDomain) -> Result<DnsIdentity, PlanError> {
    DnsIdentity::new(name, NAMESPACE, CONTROL_NAMESPACE, trust_domain)
        .map_err(|error| PlanError::Identity(name, error))
}

impl Workload {
    /// The name of its one pod.
    pub(crate) fn pod(&self) -> String {
        format!("{}-0", self.name)
    }

    /// How other services call it: port 80 of its Service.
    pub(crate) fn authority(&self) -> String {
        format!("{}.{NAMESPACE}.svc.cluster.local", self.name)
    }
}

/// Ports below the range that the kernel takes for outgoing connections, so that no connection of
/// the demo itself takes one between choice and use.
struct Ports {
    start: u32,
    taken: u32,
}

impl Ports {
    /// Two demos at once begin at different places, and so does each further attempt.
    fn new(process_id: u32, attempt: u16) -> Self {
        let start = process_id.wrapping_mul(PORTS_PER_DEMO) + u32::from(attempt) * PORTS_PER_DEMO;
        Self { start, taken: 0 }
    }

    fn next(&mut self) -> Result<SocketAddr, PlanError> {
        let all = u32::from(PORT_LAST - PORT_FIRST);
        while self.taken < all {
            let offset = (self.start.wrapping_add(self.taken)) % all;
            self.taken += 1;
            let port = PORT_FIRST + u16::try_from(offset).unwrap_or(0);
            let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            if TcpListener::bind(addr).is_ok() {
                return Ok(addr);
            }
        }
        Err(PlanError::NoPort)
    }
}

/// The services, each calling the next.
const SERVICES: [&str; 3] = ["web", "api", "store"];
/// The namespace of the services.
pub(crate) const NAMESPACE: &str = "demo";
/// The namespace of the control plane.
pub(crate) const CONTROL_NAMESPACE: &str = "steadfast";
const PORT_FIRST: u16 = 20_000;
const PORT_LAST: u16 = 32_000;
const PORTS_PER_DEMO: u32 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(attempt: u16) -> Plan {
        let domain = "cluster.local".parse().unwrap();
        Plan::new(&domain, Duration::from_secs(30), attempt).unwrap()
    }

    #[test]
    fn every_address_is_another_and_another_attempt_uses_none_of_them() {
        let addresses = |plan: &Plan| {
            let mut all = vec![plan.store_admin, plan.identity, plan.identity_admin];
            all.extend([plan.control, plan.control_admin, plan.rotation_admin]);
            for w in &plan.workloads {
                all.extend([w.application, w.inbound, w.outbound, w.admin]);
            }
            all.sort_unstable();
            all
        };
        let (first, second) = (addresses(&plan(0)), addresses(&plan(1)));
        assert!(first.windows(2).all(|pair| pair[0] != pair[1]));
        assert!(second.iter().all(|addr| !first.contains(addr)));
    }

    #[test]
    fn a_taken_port_is_not_chosen() {
        let mut ports = Ports { start: 7, taken: 0 };
        let first = ports.next().unwrap();
        let _held = TcpListener::bind(first).unwrap();
        assert_ne!(Ports { start: 7, taken: 0 }.next().unwrap(), first);
    }

    #[test]
    fn in_a_mesh_with_another_trust_domain_every_service_has_its_identity_there() {
        let mut plan = plan(0);
        let before = plan.workloads[0].inbound;
        plan.join(&"prod.example.org".parse().unwrap()).unwrap();
        let web = &plan.workloads[0];
        assert_eq!(plan.trust_domain.as_str(), "prod.example.org");
        assert_eq!(web.spiffe_id.as_str(), "spiffe://prod.example.org/ns/demo/sa/web");
        assert!(web.dns_identity.to_string().ends_with(".prod.example.org"));
        assert_eq!(web.inbound, before);
    }

    #[test]
    fn each_service_calls_the_next() {
        let plan = plan(0);
        let edges: Vec<_> = plan.edges().map(|(from, to)| (from.name, to.name)).collect();
        assert_eq!(edges, [("web", "api"), ("api", "store")]);
        assert_eq!(plan.workloads[0].spiffe_id.as_str(), "spiffe://cluster.local/ns/demo/sa/web");
    }
}
