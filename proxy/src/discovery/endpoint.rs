//! One endpoint as the control plane describes it, parsed strictly and once.
//!
//! An endpoint whose TLS identity does not parse is unusable. It must never be taken for one
//! without an identity: that one is dialled in plaintext.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use linkerd2_proxy_api::destination::{TlsIdentity, WeightedAddr, protocol_hint, tls_identity};
use linkerd2_proxy_api::net::TcpAddress;
use steadfast_api::DnsIdentity;
use steadfast_api::spiffe::SpiffeError;
use steadfast_identity_client::Expected;

/// Metric labels, by name.
pub type Labels = BTreeMap<String, String>;

/// Where a request or connection can go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The workload itself: its IP and the port it listens on.
    pub addr: SocketAddr,
    /// Its share of the traffic beside that of the others; 0 gets none.
    pub weight: u32,
    /// Who must answer there by mutual TLS; `None`: not meshed, plaintext.
    pub identity: Option<Expected>,
    /// The inbound port of its proxy, where the `transport.l5d.io/v1` header is understood.
    pub inbound_port: Option<u16>,
    /// What is known of its protocol.
    pub protocol: ProtocolHint,
    /// The authority that its HTTP requests carry instead of the client's.
    pub authority_override: Option<String>,
    /// Labels for its metrics: those of the set and its own.
    pub labels: Arc<Labels>,
}

/// What the control plane knows of an endpoint's protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ProtocolHint {
    /// Its proxy understands HTTP/2, also for HTTP/1 inside it.
    Http2,
    /// Not to be looked into.
    Opaque,
    /// Nothing.
    #[default]
    Unknown,
}

/// Why an endpoint cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// No IP address, or a port that is none.
    #[error("its address is no IP address with a port from 1 to 65535")]
    Address,
    /// The TLS identity is of a kind that is not known here.
    #[error(
        "its TLS identity is of an unknown kind; the control plane may be newer than this proxy"
    )]
    IdentityKind,
    /// The TLS identity does not parse.
    #[error("its TLS identity does not parse")]
    IdentityName(#[source] SpiffeError),
    /// The port of its proxy is none.
    #[error("its proxy's inbound port is {0}; expected 1 to 65535")]
    InboundPort(u32),
    /// The server name does not parse.
    #[error("its TLS server name does not parse")]
    ServerName(#[source] SpiffeError),
}

impl Unusable {
    /// The label that counts it.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::IdentityKind => "identity_kind",
            Self::IdentityName(_) => "identity_name",
            Self::InboundPort(_) => "inbound_port",
            Self::ServerName(_) => "server_name",
        }
    }
}

impl Endpoint {
    /// Parses one endpoint of a set with these labels.
    ///
    /// # Errors
    /// Why it cannot be used. Any message may be given; none panics.
    pub fn parse(
        wire: WeightedAddr,
        set_labels: &HashMap<String, String>,
    ) -> Result<Self, Unusable> {
        let addr = wire.addr.as_ref().and_then(parse_addr).ok_or(Unusable::Address)?;
        let identity = wire.tls_identity.map(expected).transpose()?;
        let hint = wire.protocol_hint.unwrap_or_default();
        let inbound_port = hint.opaque_transport.map(|transport| {
            port(transport.inbound_port).ok_or(Unusable::InboundPort(transport.inbound_port))
        });
        let labels = set_labels.iter().chain(&wire.metric_labels);
        Ok(Self {
            addr,
            weight: wire.weight,
            identity,
            inbound_port: inbound_port.transpose()?,
            protocol: match hint.protocol {
                Some(protocol_hint::Protocol::H2(_)) => ProtocolHint::Http2,
                Some(protocol_hint::Protocol::Opaque(_)) => ProtocolHint::Opaque,
                None => ProtocolHint::Unknown,
            },
            authority_override: wire
                .authority_override
                .map(|authority| authority.authority_override)
                .filter(|authority| !authority.is_empty()),
            labels: Arc::new(labels.map(|(k, v)| (k.clone(), v.clone())).collect()),
        })
    }
}

fn expected(wire: TlsIdentity) -> Result<Expected, Unusable> {
    let server_name = wire
        .server_name
        .map(|server_name| server_name.name.parse().map_err(Unusable::ServerName))
        .transpose()?;
    match (wire.strategy, server_name) {
        (Some(tls_identity::Strategy::DnsLikeIdentity(dns)), server_name) => {
            let dns: DnsIdentity = dns.name.parse().map_err(Unusable::IdentityName)?;
            Ok(Expected { id: dns.spiffe_id(), server_name: server_name.unwrap_or(dns) })
        }
        (Some(tls_identity::Strategy::UriLikeIdentity(uri)), Some(server_name)) => {
            let id = uri.uri.parse().map_err(Unusable::IdentityName)?;
            Ok(Expected { id, server_name })
        }
        _ => Err(Unusable::IdentityKind),
    }
}

/// An address with a port, or nothing; `TryFrom` of the API crate cuts a port to 16 bits.
pub(super) fn parse_addr(wire: &TcpAddress) -> Option<SocketAddr> {
    let ip = IpAddr::try_from(wire.ip?).ok()?;
    Some(SocketAddr::new(ip, port(wire.port)?))
}

fn port(number: u32) -> Option<u16> {
    u16::try_from(number).ok().filter(|&port| port != 0)
}
