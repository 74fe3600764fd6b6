//! What discovery keeps of each Kubernetes object, read once when it arrives.
//!
//! A value that cannot be used is said (`notes`), never passed over in silence; whoever feeds the
//! index logs it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::Selector;
use serde::Deserialize;
pub use steadfast_platform::names::ObjectName as Name;
use steadfast_platform::names::parse_resource_key;
use steadfast_platform::store::RESOURCES_PREFIX;

use super::ports::{PortSet, port};
use super::snapshot::WorkloadKind;

/// The kinds of objects that discovery follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)] // Kubernetes' own names.
pub enum Kind {
    EndpointSlice,
    ExternalWorkload,
    Namespace,
    Pod,
    Server,
    Service,
    ServiceAccount,
}

/// An object that discovery follows.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// Endpoints of a service.
    EndpointSlice(Slice),
    /// A workload instance outside of the cluster.
    ExternalWorkload(External),
    /// Annotations that its pods and services inherit.
    Namespace(Namespace),
    /// A workload instance.
    Pod(Box<Pod>),
    /// What a port of some workloads is.
    Server(Server),
    /// A name and its ports.
    Service(Service),
    /// Whose SVIDs its pods get: that it is there is all that discovery asks.
    ServiceAccount,
}

/// What is kept of a Service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Service {
    pub(super) ports: Vec<ServicePort>,
    pub(super) cluster_ips: Vec<IpAddr>,
    pub(super) headless: bool,
    /// A CNAME: it has no endpoints.
    pub(super) external_name: bool,
    pub(super) publish_not_ready: bool,
    /// The labels of its workloads; none: somebody else says who they are.
    pub(super) selector: Labels,
    /// Whether IPv6 comes first; `None`: not said.
    pub(super) prefers_ipv6: Option<bool>,
    pub(super) opaque_ports: Option<PortSet>,
}

/// One TCP port of a Service.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ServicePort {
    pub(super) port: u16,
    pub(super) name: Box<str>,
    pub(super) target: TargetPort,
    pub(super) app_protocol: Option<Box<str>>,
}

/// Where a Service's port leads.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum TargetPort {
    Name(Box<str>),
    Number(u16),
}

/// What is kept of an EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Slice {
    pub(super) service: Option<Box<str>>,
    pub(super) ipv6: bool,
    pub(super) ports: Vec<SlicePort>,
    pub(super) endpoints: Vec<SliceEndpoint>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct SlicePort {
    pub(super) name: Box<str>,
    /// `None`: any port.
    pub(super) port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct SliceEndpoint {
    pub(super) ip: IpAddr,
    pub(super) ready: bool,
    /// Still answers while it ends: better than nothing.
    pub(super) serving_terminating: bool,
    /// What is behind it, by name; `None`: something that nothing is known of.
    pub(super) target: Option<(WorkloadKind, Box<str>)>,
    pub(super) hostname: Option<Box<str>>,
    pub(super) zone: Option<Box<str>>,
}

/// What is kept of a Namespace, and of a Pod in the same form: annotations that are inherited.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Namespace {
    pub(super) inject: Option<bool>,
    pub(super) inbound_port: Option<u16>,
    pub(super) opaque_ports: Option<PortSet>,
    pub(super) skip_inbound_ports: Option<PortSet>,
}

/// Labels, which the pods of one template share.
pub(super) type Labels = Arc<BTreeMap<String, String>>;

/// What is kept of an ExternalWorkload (`workload.linkerd.io`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct External {
    pub(super) labels: Labels,
    pub(super) ips: Vec<IpAddr>,
    pub(super) ports: Vec<(Box<str>, u16)>,
    /// As it is written: a SPIFFE ID or a DNS identity.
    pub(super) identity: Box<str>,
    pub(super) ready: bool,
    pub(super) annotations: Namespace,
    pub(super) owner: Option<(Box<str>, Box<str>)>,
}

/// What is kept of a Server (`policy.linkerd.io`).
#[derive(Clone, Debug, PartialEq)]
pub struct Server {
    pub(super) pods: Option<Selector>,
    pub(super) externals: Option<Selector>,
    pub(super) port: TargetPort,
    /// Not to be looked into.
    pub(super) opaque: bool,
}

/// What is kept of a Pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pod {
    pub(super) uid: Box<str>,
    pub(super) labels: Labels,
    pub(super) ips: Vec<IpAddr>,
    pub(super) service_account: Box<str>,
    pub(super) annotations: Namespace,
    pub(super) ports: Vec<(Box<str>, u16)>,
    /// Shares the node's network, where there is no proxy of its own.
    pub(super) host_network: bool,
    /// Has ended: its address may be another's by now.
    pub(super) finished: bool,
    /// The metric label of its owner: kind in lower case and name.
    pub(super) owner: Option<(Box<str>, Box<str>)>,
}

/// Why an entry of the store is no object that discovery can use.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// The key has not the form of a resource's.
    #[error("the key {0:?} is not {RESOURCES_PREFIX}<kind>/<namespace>/<name>")]
    Key(String),
    /// The value is no such object.
    #[error("{0:?} does not hold such an object")]
    Value(String, #[source] serde_json::Error),
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 7] = [
        Self::EndpointSlice,
        Self::ExternalWorkload,
        Self::Namespace,
        Self::Pod,
        Self::Server,
        Self::Service,
        Self::ServiceAccount,
    ];

    /// Whether a cluster may do without.
    pub const fn is_optional(self) -> bool {
        matches!(self, Self::ExternalWorkload | Self::Server)
    }

    /// Kubernetes' name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EndpointSlice => "EndpointSlice",
            Self::ExternalWorkload => "ExternalWorkload",
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::Server => "Server",
            Self::Service => "Service",
            Self::ServiceAccount => "ServiceAccount",
        }
    }
}

/// What the key of a resource names; `None` for a kind that discovery does not follow.
///
/// # Errors
/// A key that is no resource's.
pub fn parse_key(key: &str) -> Result<Option<(Kind, Name)>, ObjectError> {
    let parsed = parse_resource_key(key).ok_or_else(|| ObjectError::Key(key.to_owned()));
    let (kind, name) = parsed?;
    let kind = Kind::ALL.into_iter().find(|known| known.as_str() == kind);
    Ok(kind.map(|kind| (kind, name)))
}

impl Object {
    /// Reads an object of this kind; `notes` receives what in it cannot be used.
    ///
    /// # Errors
    /// A value that is no such object.
    pub fn parse(
        kind: Kind,
        key: &str,
        value: &[u8],
        notes: &mut Vec<String>,
    ) -> Result<Self, ObjectError> {
        let error = |error| ObjectError::Value(key.to_owned(), error);
        Ok(match kind {
            Kind::EndpointSlice => {
                Self::EndpointSlice(Slice::of(serde_json::from_slice(value).map_err(error)?, notes))
            }
            Kind::ExternalWorkload => {
                let external = serde_json::from_slice(value).map_err(error)?;
                Self::ExternalWorkload(External::of(external, notes))
            }
            Kind::Namespace => {
                let namespace: core::Namespace = serde_json::from_slice(value).map_err(error)?;
                Self::Namespace(Namespace::of(&namespace.metadata, |_| None, notes))
            }
            Kind::Pod => {
                Self::Pod(Box::new(Pod::of(serde_json::from_slice(value).map_err(error)?, notes)))
            }
            Kind::Server => {
                Self::Server(Server::of(serde_json::from_slice(value).map_err(error)?, notes))
            }
            Kind::Service => {
                Self::Service(Service::of(serde_json::from_slice(value).map_err(error)?, notes))
            }
            Kind::ServiceAccount => {
                let core::ServiceAccount { .. } = serde_json::from_slice(value).map_err(error)?;
                Self::ServiceAccount
            }
        })
    }
}

impl Service {
    fn of(object: core::Service, notes: &mut Vec<String>) -> Self {
        let spec = object.spec.unwrap_or_default();
        let ports: Vec<_> = spec
            .ports
            .into_iter()
            .flatten()
            .filter_map(|port| ServicePort::of(port, notes))
            .collect();
        let named = |name: &str| ports.iter().find(|p| *p.name == *name).map(|p| p.port);
        let opaque_ports = ports_annotation(&object.metadata, OPAQUE_PORTS, named, notes);
        let ips = spec.cluster_ips.into_iter().flatten().chain(spec.cluster_ip);
        let (mut cluster_ips, mut headless) = (Vec::new(), false);
        for ip in ips.filter(|ip| !ip.is_empty()) {
            match ip.parse() {
                Ok(ip) if !cluster_ips.contains(&ip) => cluster_ips.push(ip),
                Ok(_) => {}
                Err(_) if ip == "None" => headless = true,
                Err(_) => notes.push(format!("clusterIP {ip:?} is no IP address")),
            }
        }
        let families = spec.ip_families.unwrap_or_default();
        let by_family = families.first().map(|family| family == "IPv6");
        Self {
            external_name: spec.type_.as_deref() == Some("ExternalName"),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            prefers_ipv6: by_family.or_else(|| cluster_ips.first().map(IpAddr::is_ipv6)),
            selector: spec.selector.unwrap_or_default().into(),
            ports,
            cluster_ips,
            headless,
            opaque_ports,
        }
    }
}

impl ServicePort {
    /// `None` for what is no TCP port: other protocols are not proxied.
    fn of(port: core::ServicePort, notes: &mut Vec<String>) -> Option<Self> {
        if port.protocol.as_deref().unwrap_or("TCP") != "TCP" {
            return None;
        }
        let number = checked(port.port, "port", notes)?;
        let target = match port.target_port {
            // Kubernetes writes 0 and "" for "the same port".
            None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::String(name)) if name.is_empty() => TargetPort::Number(number),
            Some(target) => TargetPort::of(target, "targetPort", notes)?,
        };
        Some(Self {
            port: number,
            name: port.name.unwrap_or_default().into(),
            target,
            app_protocol: port.app_protocol.map(Into::into),
        })
    }

    /// Whether the Service itself says that this port is not to be looked into.
    pub(super) fn says_opaque(&self) -> bool {
        self.app_protocol.as_deref() == Some("linkerd.io/opaque")
    }
}

impl TargetPort {
    fn of(target: IntOrString, what: &str, notes: &mut Vec<String>) -> Option<Self> {
        match target {
            IntOrString::Int(number) => checked(number, what, notes).map(Self::Number),
            IntOrString::String(name) => Some(match name.parse() {
                Ok(0) | Err(_) => Self::Name(name.into()),
                Ok(number) => Self::Number(number),
            }),
        }
    }

    /// The port that it is where these are declared.
    pub(super) fn among(&self, declared: &[(Box<str>, u16)]) -> Option<u16> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Name(name) => find_port(declared, name),
        }
    }
}

impl Slice {
    fn of(object: discovery::EndpointSlice, notes: &mut Vec<String>) -> Self {
        let labels = object.metadata.labels.unwrap_or_default();
        // Names instead of addresses: nothing here resolves them.
        let named = object.address_type == "FQDN";
        let endpoints = object.endpoints.into_iter().flatten().filter(|_| !named);
        let ports = object.ports.into_iter().flatten().filter_map(|port| {
            let tcp = port.protocol.as_deref().unwrap_or("TCP") == "TCP";
            let number = match port.port {
                Some(number) => Some(checked(number, "port", notes)?),
                None => None,
            };
            tcp.then(|| SlicePort { name: port.name.unwrap_or_default().into(), port: number })
        });
        Self {
            service: labels.get("kubernetes.io/service-name").map(|name| name.as_str().into()),
            ipv6: object.address_type == "IPv6",
            ports: ports.collect(),
            endpoints: endpoints
                .filter_map(|endpoint| SliceEndpoint::of(endpoint, notes))
                .collect(),
        }
    }
}

impl SliceEndpoint {
    fn of(endpoint: discovery::Endpoint, notes: &mut Vec<String>) -> Option<Self> {
        // The addresses of one endpoint are interchangeable, says Kubernetes: all take the first.
        let address = endpoint.addresses.first()?;
        let Ok(ip) = address.parse() else {
            notes.push(format!("the address {address:?} is no IP address"));
            return None;
        };
        let conditions = endpoint.conditions.unwrap_or_default();
        let target = endpoint.target_ref.and_then(|target| {
            let kind = match target.kind.as_deref()? {
                "Pod" => WorkloadKind::Pod,
                "ExternalWorkload" => WorkloadKind::External,
                _ => return None,
            };
            Some((kind, target.name?.into()))
        });
        Some(Self {
            ip,
            ready: conditions.ready.unwrap_or(true),
            serving_terminating: conditions.serving.unwrap_or(true)
                && conditions.terminating.unwrap_or(false),
            target,
            hostname: endpoint.hostname.map(Into::into),
            zone: endpoint.zone.map(Into::into),
        })
    }
}

impl Namespace {
    fn of(
        metadata: &ObjectMeta,
        named: impl Fn(&str) -> Option<u16> + Copy,
        notes: &mut Vec<String>,
    ) -> Self {
        let inbound_port = annotation(metadata, INBOUND_PORT).and_then(|text| {
            let number = port(text);
            if number.is_none() {
                notes.push(format!("{INBOUND_PORT}: {text:?} is no port from 1 to 65535"));
            }
            number
        });
        Self {
            inject: annotation(metadata, INJECT).and_then(|text| parse_inject(text, notes)),
            inbound_port,
            opaque_ports: ports_annotation(metadata, OPAQUE_PORTS, named, notes),
            skip_inbound_ports: ports_annotation(metadata, SKIP_INBOUND_PORTS, named, notes),
        }
    }
}

/// As it is stored: k8s-openapi knows Kubernetes' own kinds alone.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawExternal {
    metadata: ObjectMeta,
    spec: RawExternalSpec,
    #[serde(default)]
    status: Option<RawExternalStatus>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawExternalSpec {
    #[serde(rename = "meshTLS", alias = "meshTls")]
    mesh_tls: RawMeshTls,
    #[serde(default)]
    ports: Vec<RawPort>,
    #[serde(default, rename = "workloadIPs")]
    workload_ips: Vec<core::PodIP>,
}

#[derive(Debug, Deserialize)]
struct RawPort {
    name: Option<String>,
    port: i32,
}

#[derive(Debug, Deserialize)]
struct RawMeshTls {
    identity: String,
}

#[derive(Debug, Deserialize)]
struct RawExternalStatus {
    #[serde(default)]
    conditions: Vec<core::PodCondition>,
}

impl External {
    fn of(object: RawExternal, notes: &mut Vec<String>) -> Self {
        let RawExternal { metadata, spec, status } = object;
        let declared = spec.ports.into_iter().filter_map(|declared| {
            let number = checked(declared.port, "port", notes)?;
            Some((declared.name.unwrap_or_default().into(), number))
        });
        let ports: Vec<(Box<str>, u16)> = declared.collect();
        let annotations = Namespace::of(&metadata, |name| find_port(&ports, name), notes);
        let ips = spec.workload_ips.into_iter().map(|listed| listed.ip);
        let conditions = status.map(|status| status.conditions).unwrap_or_default();
        let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
        Self {
            ips: addresses(ips, notes),
            ready: ready.is_some_and(|ready| ready.status == "True"),
            identity: spec.mesh_tls.identity.into(),
            owner: owner(&metadata),
            labels: metadata.labels.unwrap_or_default().into(),
            ports,
            annotations,
        }
    }
}

/// As it is stored.
#[derive(Debug, Deserialize)]
struct RawServer {
    spec: RawServerSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServerSpec {
    pod_selector: Option<LabelSelector>,
    external_workload_selector: Option<LabelSelector>,
    port: IntOrString,
    proxy_protocol: Option<String>,
}

impl Server {
    fn of(object: RawServer, notes: &mut Vec<String>) -> Self {
        let RawServerSpec { pod_selector, external_workload_selector, port, proxy_protocol } =
            object.spec;
        let protocol = proxy_protocol.unwrap_or_default();
        if !PROTOCOLS.contains(&protocol.as_str()) {
            notes.push(format!("proxyProtocol: {protocol:?} is none of {}", PROTOCOLS.join(", ")));
        }
        let mut selector = |selector: Option<LabelSelector>| {
            let read = Selector::try_from(selector?);
            read.map_err(|error| notes.push(format!("its selector: {error}"))).ok()
        };
        let (pods, externals) = (selector(pod_selector), selector(external_workload_selector));
        // One that stands for no port selects nothing.
        let port =
            TargetPort::of(port, "port", notes).unwrap_or_else(|| TargetPort::Name("".into()));
        Self { pods, externals, port, opaque: protocol == "opaque" }
    }
}

impl Pod {
    fn of(object: core::Pod, notes: &mut Vec<String>) -> Self {
        let (spec, status) = (object.spec.unwrap_or_default(), object.status.unwrap_or_default());
        let mut ports = Vec::new();
        for declared in
            spec.containers.iter().flat_map(|container| container.ports.iter().flatten())
        {
            if let Some(number) = checked(declared.container_port, "containerPort", notes) {
                ports.push((declared.name.clone().unwrap_or_default().into(), number));
            }
        }
        let named = |name: &str| find_port(&ports, name);
        let annotations = Namespace::of(&object.metadata, named, notes);
        let listed = status.pod_ips.into_iter().flatten().map(|listed| listed.ip);
        let ips = addresses(listed.chain(status.pod_ip), notes);
        let service_account =
            spec.service_account_name.or(spec.service_account).filter(|name| !name.is_empty());
        let owner = owner(&object.metadata);
        Self {
            uid: object.metadata.uid.unwrap_or_default().into(),
            labels: object.metadata.labels.unwrap_or_default().into(),
            ips,
            service_account: service_account.unwrap_or_else(|| "default".to_owned()).into(),
            annotations,
            ports,
            host_network: spec.host_network.unwrap_or(false),
            finished: matches!(status.phase.as_deref(), Some("Failed" | "Succeeded")),
            owner,
        }
    }
}

fn addresses(ips: impl Iterator<Item = String>, notes: &mut Vec<String>) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for ip in ips.filter(|ip| !ip.is_empty()) {
        match ip.parse() {
            Ok(ip) if !addresses.contains(&ip) => addresses.push(ip),
            Ok(_) => {}
            Err(_) => notes.push(format!("the IP {ip:?} is no IP address")),
        }
    }
    addresses
}

fn find_port(ports: &[(Box<str>, u16)], name: &str) -> Option<u16> {
    ports.iter().find(|(known, _)| **known == *name).map(|&(_, number)| number)
}

/// As Linkerd labels it: a ReplicaSet's pod belongs to the Deployment, whose name is the
/// ReplicaSet's less the hash.
fn owner(metadata: &ObjectMeta) -> Option<(Box<str>, Box<str>)> {
    let owners = metadata.owner_references.as_deref().unwrap_or_default();
    let owner = owners.iter().find(|owner| owner.controller == Some(true))?;
    let hash = metadata.labels.as_ref().and_then(|labels| labels.get("pod-template-hash"));
    let deployment = hash
        .filter(|_| owner.kind == "ReplicaSet")
        .and_then(|hash| owner.name.strip_suffix(hash.as_str())?.strip_suffix('-'));
    Some(match deployment {
        Some(name) => ("deployment".into(), name.into()),
        None => (owner.kind.to_ascii_lowercase().into(), owner.name.as_str().into()),
    })
}

/// `None`: says nothing, so that what is inherited holds.
fn parse_inject(text: &str, notes: &mut Vec<String>) -> Option<bool> {
    match text {
        "enabled" | "ingress" => Some(true),
        "disabled" => Some(false),
        // The most common mistake of the field. The injector takes it for what was plainly meant,
        // and discovery must agree: a meshed pod that is taken for unmeshed is sent plaintext.
        "true" | "yes" | "on" => {
            notes.push(format!("{INJECT}: {text:?} is taken for \"enabled\": write that"));
            Some(true)
        }
        _ => {
            notes.push(format!(
                "{INJECT}: {text:?} says nothing: expected \"enabled\", \"disabled\" or \"ingress\""
            ));
            None
        }
    }
}

fn ports_annotation(
    metadata: &ObjectMeta,
    annotation_name: &str,
    named: impl Fn(&str) -> Option<u16>,
    notes: &mut Vec<String>,
) -> Option<PortSet> {
    let (ports, bad) = PortSet::parse(annotation(metadata, annotation_name)?, named);
    notes.extend(bad.iter().map(|bad| format!("{annotation_name}: {bad}")));
    Some(ports)
}

fn annotation<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(name).map(|text| text.trim())
}

fn checked(number: i32, what: &str, notes: &mut Vec<String>) -> Option<u16> {
    let checked = u16::try_from(number).ok().filter(|&port| port != 0);
    if checked.is_none() {
        notes.push(format!("{what}: {number} is no port from 1 to 65535"));
    }
    checked
}

/// What a Server may say of its port.
const PROTOCOLS: [&str; 7] = ["", "unknown", "HTTP/1", "HTTP/2", "gRPC", "opaque", "TLS"];
const INJECT: &str = "linkerd.io/inject";
const INBOUND_PORT: &str = "config.linkerd.io/inbound-port";
const OPAQUE_PORTS: &str = "config.linkerd.io/opaque-ports";
const SKIP_INBOUND_PORTS: &str = "config.linkerd.io/skip-inbound-ports";
