//! What is known of an inbound connection, and how it is labelled.

use std::net::SocketAddr;
use std::sync::Arc;

use steadfast_api::UnixTime;
use steadfast_identity_client::VerifiedPeer;
use steadfast_policy::{Permit, Policy};

use crate::lifetime::Bounds;
use crate::metrics::Labels;
use crate::policy;
use crate::refusal::Refusal;

/// What is known of a connection before a byte of it is passed on.
pub(super) struct Facts {
    pub(super) client: SocketAddr,
    /// Who is there; `None` in plaintext, or by TLS without a certificate.
    pub(super) peer: Option<Arc<VerifiedPeer>>,
    /// Whether it came by TLS of this mesh.
    pub(super) mesh: bool,
    /// Where the application is.
    pub(super) target: SocketAddr,
    /// Whether the client named that port, in a transport header.
    pub(super) named: bool,
    /// From then on it takes no new request.
    pub(super) retire_at: Option<UnixTime>,
    /// What bounds it, if it was made with an SVID.
    pub(super) bounds: Bounds,
}

impl Facts {
    /// Nobody is known.
    pub(super) fn plaintext(client: SocketAddr, target: SocketAddr) -> Self {
        Self {
            client,
            peer: None,
            mesh: false,
            target,
            named: false,
            retire_at: None,
            bounds: Bounds::default(),
        }
    }

    /// Whether the policy lets it in.
    pub(super) fn judge(&self, policy: &Policy) -> Result<Permit, Refusal> {
        let port = self.target.port();
        policy::check(policy, self.client, self.peer.as_deref(), self.mesh, port)
    }

    /// Of its requests, and of the connection to the client with `peer="src"` beside.
    pub(super) fn labels(&self) -> Labels {
        let port = self.target.port().to_string();
        let labels = Labels::new([("direction", "inbound"), ("target_port", port.as_str())]);
        match &self.peer {
            Some(peer) => labels.with("tls", "true").with("client_id", peer.id.as_str()),
            None if self.mesh => labels.with("tls", "true").with("client_id", ""),
            None => labels
                .with("tls", "no_identity")
                .with("no_tls_reason", "no_tls_from_remote")
                .with("client_id", ""),
        }
    }

    pub(super) fn client_labels(&self) -> Labels {
        self.labels().with("peer", "src")
    }

    /// Of the connection to the application.
    pub(super) fn server_labels(&self) -> Labels {
        let port = self.target.port().to_string();
        Labels::new([
            ("direction", "inbound"),
            ("target_port", port.as_str()),
            ("tls", "no_identity"),
            ("no_tls_reason", "loopback"),
            ("peer", "dst"),
        ])
    }

    /// Of a judgement of it.
    pub(super) fn authz_labels(&self, policy: &Policy, permit: Option<&Permit>) -> Labels {
        let name = policy.name();
        let labels = self.labels().with("srv_kind", name.kind).with("srv_name", &name.name);
        match permit.map(Permit::authorization) {
            Some(authz) => labels.with("authz_kind", authz.kind).with("authz_name", &authz.name),
            None => labels,
        }
    }
}
