//! From snapshots to the messages of `Destination.Get`: the first in full, then differences.
//!
//! A stream remembers the snapshot that it last sent and compares it with the newest when the
//! client is ready for more: a slow client skips what lies between, and nothing is queued for it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use linkerd2_proxy_api::destination::{
    AddrSet, NoEndpoints, ProtocolHint, TlsIdentity, Update, WeightedAddr, WeightedAddrSet,
    protocol_hint, tls_identity, update,
};
use linkerd2_proxy_api::meta;

use crate::index::{Address, AddressSet, Existence, Name, ServiceSnapshot, WorkloadKind};

/// What a client of one target has been told.
#[derive(Debug)]
pub(crate) struct Told {
    port: u16,
    hostname: Option<Box<str>>,
    last: Last,
}

#[derive(Debug, PartialEq)]
enum Last {
    Endpoints(Arc<AddressSet>),
    Missing,
    Nothing,
}

impl Told {
    /// Nothing yet of this port, or of this host of it.
    pub(crate) fn nothing(port: u16, hostname: Option<Box<str>>) -> Self {
        Self { port, hostname, last: Last::Nothing }
    }

    /// The messages that lead from what was told to this snapshot; none if it says nothing new.
    pub(crate) fn update(&mut self, snapshot: &ServiceSnapshot) -> Vec<Update> {
        if snapshot.existence != Existence::Present {
            let told = std::mem::replace(&mut self.last, Last::Missing);
            return if told == Last::Missing { Vec::new() } else { vec![no_endpoints(false)] };
        }
        let new = snapshot.addresses(self.port, self.hostname.as_deref());
        let none = Arc::default();
        let old = match &self.last {
            Last::Endpoints(old) => old,
            Last::Missing | Last::Nothing => &none,
        };
        let known = matches!(self.last, Last::Endpoints(_));
        let updates = if new.is_empty() {
            // Also when the last of several has gone: one message rather than a list of them.
            if known && old.is_empty() { Vec::new() } else { vec![no_endpoints(true)] }
        } else {
            differences(&snapshot.name, old, &new)
        };
        self.last = Last::Endpoints(new);
        updates
    }
}

/// What is new or has changed first, then what is gone: the client is never left with nothing
/// between the two.
fn differences(service: &Name, old: &AddressSet, new: &AddressSet) -> Vec<Update> {
    let added = new.iter().filter(|(addr, address)| old.get(addr) != Some(address));
    let added: Vec<_> = added.map(|(addr, address)| weighted_addr(*addr, address)).collect();
    let gone = old.keys().filter(|addr| !new.contains_key(addr));
    let gone: Vec<_> = gone.map(|addr| (*addr).into()).collect();
    let adds = added.chunks(ADDRS_PER_MESSAGE_MAX).map(|addrs| {
        let metric_labels = set_labels(service);
        update::Update::Add(WeightedAddrSet { addrs: addrs.to_vec(), metric_labels })
    });
    let removes = gone
        .chunks(ADDRS_PER_MESSAGE_MAX)
        .map(|addrs| update::Update::Remove(AddrSet { addrs: addrs.to_vec() }));
    adds.chain(removes).map(|update| Update { update: Some(update) }).collect()
}

/// One endpoint as Linkerd's clients expect it.
pub(crate) fn weighted_addr(addr: SocketAddr, address: &Address) -> WeightedAddr {
    let mut message =
        WeightedAddr { addr: Some(addr.into()), weight: WEIGHT, ..WeightedAddr::default() };
    let mut label = |name: &str, value: &str| {
        message.metric_labels.insert(name.to_owned(), value.to_owned());
    };
    if let Some(zone) = &address.zone {
        label("zone", zone);
    }
    let Some(workload) = &address.workload else { return message };
    match workload.kind {
        WorkloadKind::Pod => {
            label("pod", &workload.name.name);
            label("serviceaccount", &workload.service_account);
        }
        WorkloadKind::External => label("external_workload", &workload.name.name),
    }
    if let Some((kind, name)) = &workload.owner {
        label(kind, name);
    }
    message.resource_ref = Some(match workload.kind {
        WorkloadKind::Pod => resource(CORE, "Pod", &workload.name, 0),
        WorkloadKind::External => {
            resource("workload.linkerd.io", "ExternalWorkload", &workload.name, 0)
        }
    });
    if let Some(mesh) = workload.mesh_at(addr.port()) {
        let protocol = if workload.opaque(addr.port()) {
            protocol_hint::Protocol::Opaque(protocol_hint::Opaque {})
        } else {
            protocol_hint::Protocol::H2(protocol_hint::H2 {})
        };
        let inbound_port = u32::from(mesh.inbound_port);
        message.protocol_hint = Some(ProtocolHint {
            protocol: Some(protocol),
            opaque_transport: Some(protocol_hint::OpaqueTransport { inbound_port }),
        });
        let name = tls_identity::DnsLikeIdentity { name: mesh.identity.to_string() };
        message.tls_identity = Some(TlsIdentity {
            strategy: Some(tls_identity::Strategy::DnsLikeIdentity(name.clone())),
            server_name: Some(name),
        });
    }
    message
}

/// The labels that all endpoints of a service share.
fn set_labels(service: &Name) -> HashMap<String, String> {
    HashMap::from([
        ("namespace".to_owned(), service.namespace.to_string()),
        ("service".to_owned(), service.name.to_string()),
    ])
}

/// A reference to an object.
pub(crate) fn resource(group: &str, kind: &str, name: &Name, port: u16) -> meta::Metadata {
    meta::Metadata {
        kind: Some(meta::metadata::Kind::Resource(meta::Resource {
            group: group.to_owned(),
            kind: kind.to_owned(),
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
            section: String::new(),
            port: u32::from(port),
        })),
    }
}

fn no_endpoints(exists: bool) -> Update {
    Update { update: Some(update::Update::NoEndpoints(NoEndpoints { exists })) }
}

/// Linkerd's name of Kubernetes' own group.
pub(crate) const CORE: &str = "core";
/// Linkerd's weight of an endpoint that nothing is said about.
const WEIGHT: u32 = 10_000;
/// Some 400 bytes each: a message stays far below the 4 MiB that a client of gRPC reads.
const ADDRS_PER_MESSAGE_MAX: usize = 1000;

#[cfg(test)]
mod tests;
