//! The EndpointSlices of Services that nobody wrote any for, as Kubernetes' controller makes them:
//! from the pods that the Service selects. A pure function of what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use sha2::{Digest as _, Sha256};

use crate::names::ObjectName;

/// The slices to make. A Service without a selector, of type ExternalName, or with a slice of its
/// own in `written` gets none.
pub(super) fn derive(
    services: &BTreeMap<ObjectName, Service>,
    pods: &BTreeMap<ObjectName, Pod>,
    written: &BTreeSet<ObjectName>,
) -> Vec<EndpointSlice> {
    let mut slices = Vec::new();
    for (name, service) in services {
        let spec = service.spec.as_ref();
        let selector = spec.and_then(|spec| spec.selector.as_ref()).filter(|s| !s.is_empty());
        let external = spec.is_some_and(|spec| spec.type_.as_deref() == Some("ExternalName"));
        let Some(selector) = selector.filter(|_| !external && !written.contains(name)) else {
            continue;
        };
        // Of one namespace: the pods between its first and its last possible name.
        let selected = pods
            .range(ObjectName::new(&name.namespace, "")..)
            .take_while(|(pod, _)| pod.namespace == name.namespace)
            .filter(|(_, pod)| selects(selector, pod))
            .map(|(_, pod)| pod);
        slices.extend(slices_of(name, service, selected));
    }
    slices
}

/// The Service that a hand-written slice is of.
pub(super) fn service_of(slice: &EndpointSlice) -> Option<ObjectName> {
    let service = slice.metadata.labels.as_ref()?.get(SERVICE_LABEL)?;
    Some(ObjectName::new(slice.metadata.namespace.clone()?, service))
}

fn selects(selector: &BTreeMap<String, String>, pod: &Pod) -> bool {
    let labels = pod.metadata.labels.as_ref();
    selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

/// Endpoints that share a slice: of one address family, with the same ports.
type Groups = BTreeMap<(&'static str, Vec<ResolvedPort>), Vec<Endpoint>>;

/// A port of the Service as one pod has it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct ResolvedPort {
    name: String,
    port: i32,
    protocol: String,
    app_protocol: Option<String>,
}

fn slices_of<'a>(
    name: &ObjectName,
    service: &Service,
    pods: impl Iterator<Item = &'a Pod>,
) -> Vec<EndpointSlice> {
    let mut groups = Groups::new();
    for pod in pods.filter(|pod| !has_ended(pod)) {
        let ports = ports_of(service, pod);
        // A pod that has none of the ports serves nothing; a Service without ports asks for none.
        let wants_ports = service.spec.iter().any(|spec| spec.ports.iter().flatten().count() > 0);
        if ports.is_empty() && wants_ports {
            continue;
        }
        for address in addresses_of(service, pod) {
            let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
            let endpoint = endpoint(service, pod, address);
            groups.entry((family, ports.clone())).or_default().push(endpoint);
        }
    }
    let mut slices = Vec::new();
    for ((family, ports), endpoints) in groups {
        for endpoints in endpoints.chunks(ENDPOINTS_PER_SLICE) {
            slices.push(slice(name, service, slices.len(), family, &ports, endpoints.to_vec()));
        }
    }
    slices
}

fn slice(
    name: &ObjectName,
    service: &Service,
    index: usize,
    family: &str,
    ports: &[ResolvedPort],
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    let labels = [(SERVICE_LABEL, name.name.as_str()), (MANAGED_BY_LABEL, MANAGER)];
    let owner = service.metadata.uid.as_ref().map(|uid| OwnerReference {
        api_version: "v1".to_owned(),
        block_owner_deletion: Some(true),
        controller: Some(true),
        kind: "Service".to_owned(),
        name: name.name.clone(),
        uid: uid.clone(),
    });
    let port = |port: &ResolvedPort| EndpointPort {
        app_protocol: port.app_protocol.clone(),
        name: Some(port.name.clone()),
        port: Some(port.port),
        protocol: Some(port.protocol.clone()),
    };
    EndpointSlice {
        address_type: family.to_owned(),
        endpoints: Some(endpoints),
        metadata: ObjectMeta {
            labels: Some(labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into()),
            name: Some(slice_name(&name.name, index)),
            namespace: Some(name.namespace.clone()),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        ports: Some(ports.iter().map(port).collect()),
    }
}

/// `web-x7k2p`, as Kubernetes names them, but the same each time.
fn slice_name(service: &str, index: usize) -> String {
    let hash = Sha256::digest(format!("{service}/{index}"));
    let suffix: String = hash
        .iter()
        .take(5)
        .map(|byte| char::from(SUFFIX[usize::from(*byte) % SUFFIX.len()]))
        .collect();
    format!("{service}-{suffix}")
}

fn endpoint(service: &Service, pod: &Pod, address: IpAddr) -> Endpoint {
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let condition = |name: &str| {
        let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().find(|c| c.type_ == name).map(|c| c.status == "True")
    };
    // Nobody probes pods here: one that says nothing about itself is believed to be well.
    let serving = condition("Ready").unwrap_or(true);
    let spec = service.spec.as_ref();
    let always = spec.and_then(|spec| spec.publish_not_ready_addresses).unwrap_or(false);
    let pod_spec = pod.spec.as_ref();
    let in_subdomain =
        pod_spec.and_then(|spec| spec.subdomain.as_ref()) == service.metadata.name.as_ref();
    Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(EndpointConditions {
            ready: Some(always || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: pod_spec.filter(|_| in_subdomain).and_then(|spec| spec.hostname.clone()),
        node_name: pod_spec.and_then(|spec| spec.node_name.clone()),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }
}

fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Failed" | "Succeeded"))
}

/// The addresses of a pod that a Service reaches: of its families, or the pod's first.
fn addresses_of(service: &Service, pod: &Pod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else { return Vec::new() };
    let all = status.pod_ip.iter().chain(status.pod_ips.iter().flatten().map(|ip| &ip.ip));
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in all.filter_map(|text| text.parse().ok()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let families = service.spec.as_ref().and_then(|spec| spec.ip_families.as_ref());
    match families.filter(|families| !families.is_empty()) {
        Some(families) => addresses.retain(|address| {
            families.iter().any(|f| f == if address.is_ipv4() { "IPv4" } else { "IPv6" })
        }),
        None => addresses.truncate(1),
    }
    addresses
}

/// The Service's ports as this pod has them; one that it does not name is left out.
fn ports_of(service: &Service, pod: &Pod) -> Vec<ResolvedPort> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    let mut ports: Vec<_> = ports
        .filter_map(|port| {
            Some(ResolvedPort {
                name: port.name.clone().unwrap_or_default(),
                port: target_port(port, pod)?,
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect();
    ports.sort();
    ports
}

fn target_port(port: &ServicePort, pod: &Pod) -> Option<i32> {
    let name = match &port.target_port {
        None => return Some(port.port),
        Some(IntOrString::Int(number)) => return Some(*number),
        Some(IntOrString::String(name)) => name,
    };
    let protocol = |protocol: &Option<String>| protocol.clone().unwrap_or_else(|| "TCP".to_owned());
    let containers = pod
        .spec
        .iter()
        .flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    let found = ports.find(|candidate| {
        candidate.name.as_ref() == Some(name)
            && protocol(&candidate.protocol) == protocol(&port.protocol)
    });
    found.map(|port| port.container_port)
}

/// Which Service a slice is of.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// Who made a slice.
pub(super) const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
/// The mark of ours.
pub(super) const MANAGER: &str = "steadfast-store";

/// As Kubernetes fills them.
const ENDPOINTS_PER_SLICE: usize = 100;
/// Kubernetes' alphabet of generated names: no vowels, so no words.
const SUFFIX: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

#[cfg(test)]
mod tests {
    use super::*;

    fn of<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    fn service(ports: serde_json::Value) -> BTreeMap<ObjectName, Service> {
        let service = serde_json::json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "demo", "uid": "s"},
            "spec": {"selector": {"app": "web"}, "ports": ports},
        });
        [(ObjectName::new("demo", "web"), of(service))].into()
    }

    fn pod(name: &str, namespace: &str, label: &str, ip: &str) -> (ObjectName, Pod) {
        let pod = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": label}, "uid": name},
            "spec": {"containers": [{"name": "c", "ports": [
                {"name": "http", "containerPort": 8080}, {"name": "http", "containerPort": 53, "protocol": "UDP"},
            ]}]},
            "status": {"podIP": ip, "podIPs": [{"ip": ip}, {"ip": "fd00::1"}]},
        });
        (ObjectName::new(namespace, name), of(pod))
    }

    fn derive_one(
        services: &BTreeMap<ObjectName, Service>,
        pods: impl IntoIterator<Item = (ObjectName, Pod)>,
    ) -> EndpointSlice {
        let mut slices = derive(services, &pods.into_iter().collect(), &BTreeSet::new());
        assert_eq!(slices.len(), 1);
        slices.remove(0)
    }

    fn endpoints(slice: &EndpointSlice) -> &[Endpoint] {
        slice.endpoints.as_deref().unwrap()
    }

    #[test]
    fn the_selected_pods_of_the_same_namespace_are_the_endpoints() {
        let pods = [
            pod("a", "demo", "web", "10.0.0.1"),
            pod("b", "demo", "web", "10.0.0.2"),
            pod("c", "demo", "api", "10.0.0.3"),
            pod("d", "other", "web", "10.0.0.4"),
        ];
        let slice = derive_one(&service(serde_json::json!([{"port": 80, "targetPort": 81}])), pods);
        let found: Vec<_> = endpoints(&slice).iter().map(|e| e.addresses[0].as_str()).collect();
        assert_eq!(found, ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(slice.ports.as_ref().unwrap()[0].port, Some(81));
        assert_eq!(slice.metadata.labels.as_ref().unwrap()[SERVICE_LABEL], "web");
        assert_eq!(endpoints(&slice)[0].target_ref.as_ref().unwrap().uid.as_deref(), Some("a"));
        assert_eq!(endpoints(&slice)[0].conditions.as_ref().unwrap().ready, Some(true));
    }

    #[test]
    fn a_named_port_is_each_pods_own_of_the_same_protocol() {
        let mut other = pod("b", "demo", "web", "10.0.0.2");
        let ports = other.1.spec.as_mut().unwrap().containers[0].ports.as_mut().unwrap();
        ports[0].container_port = 9090;
        let mut none = pod("c", "demo", "web", "10.0.0.3");
        none.1.spec.as_mut().unwrap().containers[0].ports = None;
        let services = service(serde_json::json!([{"port": 80, "targetPort": "http"}]));
        let pods = [pod("a", "demo", "web", "10.0.0.1"), other, none].into();
        let slices = derive(&services, &pods, &BTreeSet::new());
        let found: Vec<_> = slices
            .iter()
            .map(|s| (s.ports.as_ref().unwrap()[0].port.unwrap(), endpoints(s).len()))
            .collect();
        assert_eq!(found, [(8080, 1), (9090, 1)]);
        let names: BTreeSet<_> = slices.iter().map(|s| s.metadata.name.clone()).collect();
        assert_eq!(names.len(), 2);
    }

    #[test]
    fn what_was_written_by_hand_wins() {
        let services = service(serde_json::json!([{"port": 80}]));
        let pods = [pod("a", "demo", "web", "10.0.0.1")].into();
        let written = [ObjectName::new("demo", "web")].into();
        assert!(derive(&services, &pods, &written).is_empty());
    }

    #[test]
    fn a_pod_that_is_going_is_not_ready_and_one_that_has_ended_is_no_endpoint() {
        let services = service(serde_json::json!([{"port": 80}]));
        let mut going = pod("a", "demo", "web", "10.0.0.1");
        going.1.metadata.deletion_timestamp = of(serde_json::json!("2026-01-01T00:00:00Z"));
        let mut ended = pod("b", "demo", "web", "10.0.0.2");
        ended.1.status.as_mut().unwrap().phase = Some("Succeeded".to_owned());
        let slice = derive_one(&services, [going, ended]);
        assert_eq!(endpoints(&slice).len(), 1);
        let conditions = endpoints(&slice)[0].conditions.as_ref().unwrap();
        assert_eq!((conditions.ready, conditions.terminating), (Some(false), Some(true)));
    }

    #[test]
    fn families_are_slices_of_their_own() {
        let mut services = service(serde_json::json!([{"port": 80}]));
        let spec = services.values_mut().next().unwrap().spec.as_mut().unwrap();
        spec.ip_families = Some(vec!["IPv4".to_owned(), "IPv6".to_owned()]);
        let pods = [pod("a", "demo", "web", "10.0.0.1")].into();
        let slices = derive(&services, &pods, &BTreeSet::new());
        let families: Vec<_> = slices.iter().map(|s| s.address_type.as_str()).collect();
        assert_eq!(families, ["IPv4", "IPv6"]);
    }

    #[test]
    fn a_slice_holds_a_hundred_endpoints() {
        let services = service(serde_json::json!([{"port": 80}]));
        let pods = (0..250).map(|i| pod(&format!("p{i}"), "demo", "web", &format!("10.0.1.{i}")));
        let slices = derive(&services, &pods.collect(), &BTreeSet::new());
        assert_eq!(slices.iter().map(|s| endpoints(s).len()).collect::<Vec<_>>(), [100, 100, 50]);
    }
}
