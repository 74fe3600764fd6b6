//! The decision: a policy and the facts of a connection, to a permit or a refusal.
//!
//! An authorization names the networks that a client may come from and what it must have proved;
//! one that fits is enough. A policy without a fitting one refuses: there is no "off".

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use steadfast_api::{Code, SpiffeId};

use crate::{DefaultPolicy, Networks};

/// Who may speak to a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    name: Name,
    authorizations: Vec<Authorization>,
    loopback: LoopbackClients,
}

/// The resource that a decision goes back to, as Linkerd's metrics name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    /// `default` for a default policy, else the kind of the resource in lower case.
    pub kind: &'static str,
    /// The resource's name.
    pub name: Arc<str>,
}

/// One way in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Authorization {
    name: Name,
    networks: Networks,
    clients: Clients,
    /// Lets in what should be refused, and says so.
    audit: bool,
}

/// What a client must have proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Nothing.
    Any,
    /// A SPIFFE ID, by mutual TLS.
    Authenticated,
}

/// What a loopback address says about a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopbackClients {
    /// The client shares the workload's network namespace, as containers of one pod do. It could
    /// as well speak to the workload directly, so it is always let in.
    Exempt,
    /// Nothing: the namespace is a whole machine's, as in a standalone mesh.
    Judged,
}

/// What is known of a client when it is judged.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// The address it comes from.
    pub client: IpAddr,
    /// The ID that it has proved.
    pub peer: Option<&'a SpiffeId>,
    /// The port that it wants.
    pub port: u16,
}

/// Proof that a client was let in; only [`authorize`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a permit is what forwarding asks for"]
pub struct Permit {
    policy: Name,
    authorization: Name,
    audited: bool,
}

/// A client that was not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} from {client} is not let in to port {port}: the policy {policy} {reason}",
    PeerName(.peer.as_ref())
)]
pub struct Denied {
    policy: Name,
    client: IpAddr,
    peer: Option<SpiffeId>,
    port: u16,
    reason: DeniedReason,
}

/// What kept a client out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeniedReason {
    /// Nobody is let in.
    #[error("lets nobody in")]
    NoAuthorization,
    /// The client comes from elsewhere.
    #[error("does not name the client's network")]
    Network,
    /// The client has proved no ID.
    #[error("asks for a peer that is authenticated by mutual TLS")]
    Unauthenticated,
}

/// Decides whether a client is let in.
///
/// # Errors
/// Why it is not.
pub fn authorize(policy: &Policy, facts: &Facts<'_>) -> Result<Permit, Denied> {
    let client = facts.client.to_canonical();
    if policy.loopback == LoopbackClients::Exempt && client.is_loopback() {
        return Ok(policy.permit(Name::default_named(LOOPBACK), false));
    }
    let mut reason = DeniedReason::NoAuthorization;
    for authorization in &policy.authorizations {
        if !authorization.networks.contains(client) {
            // The reason that is told is of the authorization that came nearest.
            if reason == DeniedReason::NoAuthorization {
                reason = DeniedReason::Network;
            }
        } else if authorization.clients == Clients::Authenticated && facts.peer.is_none() {
            reason = DeniedReason::Unauthenticated;
        } else {
            return Ok(policy.permit(authorization.name.clone(), authorization.audit));
        }
    }
    Err(Denied {
        policy: policy.name.clone(),
        client,
        peer: facts.peer.cloned(),
        port: facts.port,
        reason,
    })
}

impl Policy {
    /// What a default policy means where these are the cluster's networks.
    pub fn of_default(
        default: DefaultPolicy,
        cluster: &Networks,
        loopback: LoopbackClients,
    ) -> Self {
        let name = Name::default_named(default.as_str());
        let (networks, clients) = match default {
            DefaultPolicy::AllAuthenticated => (Networks::any(), Clients::Authenticated),
            DefaultPolicy::AllUnauthenticated | DefaultPolicy::Audit => {
                (Networks::any(), Clients::Any)
            }
            DefaultPolicy::ClusterAuthenticated => (cluster.clone(), Clients::Authenticated),
            DefaultPolicy::ClusterUnauthenticated => (cluster.clone(), Clients::Any),
            DefaultPolicy::Deny => return Self { name, authorizations: Vec::new(), loopback },
        };
        let audit = default == DefaultPolicy::Audit;
        let only = Authorization { name: name.clone(), networks, clients, audit };
        Self { name, authorizations: vec![only], loopback }
    }

    /// The resource that it comes from.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Whether a client from this address can be let in without a proved ID: if not, it must show
    /// a certificate.
    pub fn admits_unauthenticated(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        (self.loopback == LoopbackClients::Exempt && client.is_loopback())
            || self
                .authorizations
                .iter()
                .any(|way| way.clients == Clients::Any && way.networks.contains(client))
    }

    fn permit(&self, authorization: Name, audited: bool) -> Permit {
        Permit { policy: self.name.clone(), authorization, audited }
    }
}

impl Permit {
    /// The policy that let it in.
    pub fn policy(&self) -> &Name {
        &self.policy
    }

    /// The authorization that let it in.
    pub fn authorization(&self) -> &Name {
        &self.authorization
    }

    /// Whether the client was let in only for the policy being tried out: count it and log it.
    pub fn audited(&self) -> bool {
        self.audited
    }
}

impl Denied {
    /// The policy that kept it out.
    pub fn policy(&self) -> &Name {
        &self.policy
    }

    /// Why.
    pub fn reason(&self) -> DeniedReason {
        self.reason
    }

    /// Its code.
    pub fn code(&self) -> Code {
        self.reason.code()
    }
}

impl DeniedReason {
    /// The label that counts this refusal.
    pub const fn label(self) -> &'static str {
        match self {
            Self::NoAuthorization => "no_authorization",
            Self::Network => "network",
            Self::Unauthenticated => "unauthenticated",
        }
    }

    /// Its code.
    pub const fn code(self) -> Code {
        match self {
            Self::NoAuthorization | Self::Network => Code::POLICY_DENIED,
            Self::Unauthenticated => Code::PLAINTEXT_REFUSED,
        }
    }
}

impl Name {
    fn default_named(name: &str) -> Self {
        Self { kind: "default", name: name.into() }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.name)
    }
}

struct PeerName<'a>(Option<&'a SpiffeId>);

impl fmt::Display for PeerName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(id) => write!(f, "{id}"),
            None => f.write_str("an unauthenticated client"),
        }
    }
}

const LOOPBACK: &str = "localhost";

#[cfg(test)]
mod tests {
    use super::*;

    const INSIDE: &str = "10.1.2.3";
    const OUTSIDE: &str = "192.0.2.7";
    const PEER: &str = "spiffe://cluster.local/ns/demo/sa/web";

    fn judge(
        default: DefaultPolicy,
        loopback: LoopbackClients,
        client: &str,
        peer: Option<&str>,
    ) -> Result<Permit, Denied> {
        let cluster = "10.0.0.0/8,fd00::/8".parse().unwrap();
        let peer = peer.map(|id| id.parse().unwrap());
        let policy = Policy::of_default(default, &cluster, loopback);
        let facts = Facts { client: client.parse().unwrap(), peer: peer.as_ref(), port: 5432 };
        let verdict = authorize(&policy, &facts);
        if peer.is_none() {
            assert_eq!(policy.admits_unauthenticated(facts.client), verdict.is_ok());
        }
        verdict
    }

    #[test]
    fn each_default_policy_lets_in_whom_its_name_says() {
        use DefaultPolicy as P;
        use DeniedReason as D;
        let anonymous = [None, None];
        type ByClient = [Option<D>; 2];
        // (policy, [inside, outside] without an ID, [inside, outside] with one)
        let cases: [(P, ByClient, ByClient); 6] = [
            (P::AllAuthenticated, [Some(D::Unauthenticated); 2], anonymous),
            (P::AllUnauthenticated, anonymous, anonymous),
            (P::Audit, anonymous, anonymous),
            (
                P::ClusterAuthenticated,
                [Some(D::Unauthenticated), Some(D::Network)],
                [None, Some(D::Network)],
            ),
            (P::ClusterUnauthenticated, [None, Some(D::Network)], [None, Some(D::Network)]),
            (P::Deny, [Some(D::NoAuthorization); 2], [Some(D::NoAuthorization); 2]),
        ];
        assert_eq!(cases.each_ref().map(|(policy, ..)| *policy), P::ALL);
        for (policy, without, with) in cases {
            for (peer, expected) in [(None, without), (Some(PEER), with)] {
                for (client, expected) in [INSIDE, OUTSIDE].into_iter().zip(expected) {
                    let verdict = judge(policy, LoopbackClients::Judged, client, peer);
                    let reason = verdict.as_ref().err().map(Denied::reason);
                    assert_eq!(reason, expected, "{policy} {client} {peer:?}");
                    let audited = verdict.is_ok_and(|permit| permit.audited());
                    assert_eq!(audited, policy == P::Audit, "{policy} {client} {peer:?}");
                }
            }
        }
    }

    #[test]
    fn loopback_is_exempt_only_where_it_means_the_same_pod() {
        for client in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            for policy in DefaultPolicy::ALL {
                let permit = judge(policy, LoopbackClients::Exempt, client, None).unwrap();
                assert_eq!(permit.authorization().to_string(), "default/localhost");
                assert!(!permit.audited());
            }
            let denied =
                judge(DefaultPolicy::AllAuthenticated, LoopbackClients::Judged, client, None);
            assert_eq!(denied.unwrap_err().reason(), DeniedReason::Unauthenticated);
        }
        assert!(judge(DefaultPolicy::Deny, LoopbackClients::Exempt, OUTSIDE, Some(PEER)).is_err());
    }

    #[test]
    fn an_ipv4_client_on_an_ipv6_listener_is_judged_by_its_ipv4_address() {
        let judge = |client| {
            judge(DefaultPolicy::ClusterUnauthenticated, LoopbackClients::Judged, client, None)
        };
        assert!(judge("::ffff:10.1.2.3").is_ok());
        assert!(judge("::ffff:192.0.2.7").is_err());
    }

    #[test]
    fn a_refusal_names_peer_port_policy_and_reason() {
        let refusal =
            |policy, peer| judge(policy, LoopbackClients::Judged, OUTSIDE, peer).unwrap_err();
        let denied = refusal(DefaultPolicy::AllAuthenticated, None);
        assert_eq!(denied.code(), Code::PLAINTEXT_REFUSED);
        assert_eq!(
            denied.to_string(),
            "an unauthenticated client from 192.0.2.7 is not let in to port 5432: the policy \
             default/all-authenticated asks for a peer that is authenticated by mutual TLS"
        );
        let denied = refusal(DefaultPolicy::ClusterAuthenticated, Some(PEER));
        assert_eq!(denied.code(), Code::POLICY_DENIED);
        assert!(denied.to_string().starts_with(PEER), "{denied}");
    }
}
