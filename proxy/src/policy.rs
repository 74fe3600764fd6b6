//! The third stage: may this peer speak to this port?
//!
//! The decision is `steadfast_policy::authorize`, which is pure; this module only says which policy
//! holds for a port, and turns a refusal into ours.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use steadfast_api::Code;
use steadfast_identity_client::VerifiedPeer;
use steadfast_policy::{Facts, LoopbackClients, Permit, Policy, authorize};

use crate::config::{Inbound, Mode};
use crate::refusal::Refusal;

/// Says which policy holds for a port.
pub trait Policies {
    /// The policy of now.
    fn for_port(&self, port: u16) -> Arc<Policy>;
}

/// One policy for every port: the default one, as the process was told.
#[derive(Clone, Debug)]
pub struct DefaultPolicies(Arc<Policy>);

/// Which ports the proxy forwards to.
#[derive(Clone, Debug)]
pub enum Ports {
    /// Those that the workload declares.
    Declared(BTreeSet<u16>),
    /// Those that the kernel redirects: any.
    Redirected,
}

impl DefaultPolicies {
    /// The policy for a process in this mode.
    pub fn new(inbound: &Inbound, mode: Mode) -> Self {
        let loopback = match mode {
            // Many workloads share the loopback of a machine: the address says nothing.
            Mode::Explicit => LoopbackClients::Judged,
            // The loopback of a pod is the pod.
            Mode::Transparent => LoopbackClients::Exempt,
        };
        let cluster = &inbound.cluster_networks;
        Self(Arc::new(Policy::of_default(inbound.default_policy, cluster, loopback)))
    }
}

impl Policies for DefaultPolicies {
    fn for_port(&self, _: u16) -> Arc<Policy> {
        self.0.clone()
    }
}

impl Ports {
    /// Whether the proxy forwards to this port.
    ///
    /// # Errors
    /// [`Refusal::Undeclared`].
    pub fn check(&self, port: u16) -> Result<(), Refusal> {
        match self {
            Self::Declared(ports) if !ports.contains(&port) => Err(Refusal::Undeclared(port)),
            Self::Declared(_) | Self::Redirected => Ok(()),
        }
    }
}

/// Decides whether a client may speak to a port. `tls` says whether it spoke TLS of this mesh, so
/// that one without a certificate is told so.
///
/// # Errors
/// [`Refusal::Denied`].
pub fn check(
    policy: &Policy,
    client: SocketAddr,
    peer: Option<&VerifiedPeer>,
    tls: bool,
    port: u16,
) -> Result<Permit, Refusal> {
    let facts = Facts { client: client.ip(), peer: peer.map(|peer| &peer.id), port };
    authorize(policy, &facts).map_err(|denied| {
        let code = match denied.code() {
            Code::PLAINTEXT_REFUSED if tls => Code::PEER_NO_CERTIFICATE,
            code => code,
        };
        Refusal::Denied { code, detail: denied.to_string() }
    })
}

#[cfg(test)]
mod tests {
    use steadfast_policy::DefaultPolicy;

    use super::*;

    fn policy(default: DefaultPolicy, mode: Mode) -> Arc<Policy> {
        let inbound = Inbound {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            ports: BTreeSet::new(),
            opaque_ports: BTreeSet::new(),
            default_policy: default,
            cluster_networks: steadfast_policy::Networks::any(),
            application: [127, 0, 0, 1].into(),
        };
        DefaultPolicies::new(&inbound, mode).for_port(80)
    }

    #[test]
    fn plaintext_and_tls_without_a_certificate_are_told_apart() {
        let policy = policy(DefaultPolicy::AllAuthenticated, Mode::Explicit);
        let client = SocketAddr::from(([127, 0, 0, 1], 9));
        for (tls, expected) in [(false, Code::PLAINTEXT_REFUSED), (true, Code::PEER_NO_CERTIFICATE)]
        {
            let refusal = check(&policy, client, None, tls, 80).unwrap_err();
            assert_eq!(refusal.code(), Some(expected));
        }
    }

    #[test]
    fn loopback_is_the_pod_only_where_the_kernel_redirects() {
        let client = SocketAddr::from(([127, 0, 0, 1], 9));
        let judge =
            |mode| check(&policy(DefaultPolicy::Deny, mode), client, None, false, 80).is_ok();
        assert!(judge(Mode::Transparent));
        assert!(!judge(Mode::Explicit));
    }

    #[test]
    fn only_declared_ports_are_forwarded_to() {
        let ports = Ports::Declared([80].into());
        assert!(ports.check(80).is_ok());
        assert!(matches!(ports.check(81), Err(Refusal::Undeclared(81))));
        assert!(Ports::Redirected.check(81).is_ok());
    }
}
