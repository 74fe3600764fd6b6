//! What the API server checks and fills in beyond the types, for the kinds that the mesh acts on.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Serialize;
use serde_json::Value;

use super::locate::{Path, Step};
use crate::names::{check_name, check_namespace};
use crate::standalone::endpoints::MANAGED_BY_LABEL;
use crate::standalone::endpoints::MANAGER;

/// An object as its type has it, and the first problem in it.
pub(super) struct Checked {
    pub(super) value: Value,
    pub(super) problem: Option<Problem>,
}

type Problem = (Path, String);

/// A kind with nothing to check beyond its type.
pub(super) fn unchanged(object: &impl Serialize) -> Checked {
    finish(object, Ok(()))
}

pub(super) fn endpoint_slice(mut slice: EndpointSlice) -> Checked {
    let result = check_endpoint_slice(&mut slice);
    finish(&slice, result)
}

pub(super) fn pod(mut pod: Pod) -> Checked {
    let result = check_pod(&mut pod);
    finish(&pod, result)
}

pub(super) fn service(mut service: Service) -> Checked {
    let result = check_service(&mut service);
    finish(&service, result)
}

fn finish(object: &impl Serialize, result: Result<(), Problem>) -> Checked {
    let problem = result.err();
    match serde_json::to_value(object) {
        Ok(value) => Checked { value, problem },
        Err(error) => {
            let problem = problem.or_else(|| Some((Path::new(), error.to_string())));
            Checked { value: Value::Null, problem }
        }
    }
}

fn check_endpoint_slice(slice: &mut EndpointSlice) -> Result<(), Problem> {
    let labels = slice.metadata.labels.as_ref();
    if labels.and_then(|labels| labels.get(MANAGED_BY_LABEL)).is_some_and(|by| by == MANAGER) {
        let path = path(&[&"metadata", &"labels", &MANAGED_BY_LABEL]);
        let reason = format!("{MANAGED_BY_LABEL}: {MANAGER} marks what the store derives itself");
        return Err((path, reason));
    }
    let family = slice.address_type.as_str();
    if !matches!(family, "IPv4" | "IPv6" | "FQDN") {
        let reason = format!("addressType is {family:?}: expected IPv4, IPv6 or FQDN");
        return Err((path(&[&"addressType"]), reason));
    }
    for (index, endpoint) in slice.endpoints.iter().flatten().enumerate() {
        for (nth, address) in endpoint.addresses.iter().enumerate() {
            let good = match family {
                "IPv4" => matches!(address.parse(), Ok(IpAddr::V4(_))),
                "IPv6" => matches!(address.parse(), Ok(IpAddr::V6(_))),
                _ => check_name(address).is_ok(),
            };
            if !good {
                let at = path(&[&"endpoints", &index, &"addresses", &nth]);
                return Err((at, format!("{address:?} is no address of the type {family}")));
            }
        }
        if endpoint.addresses.is_empty() {
            let at = path(&[&"endpoints", &index]);
            return Err((at, "an endpoint needs an address".to_owned()));
        }
    }
    for (index, port) in slice.ports.iter_mut().flatten().enumerate() {
        if let Some(number) = port.port {
            check_port(number, &[&"ports", &index, &"port"])?;
        }
        port.protocol.get_or_insert_with(tcp);
        port.name.get_or_insert_default();
    }
    Ok(())
}

fn check_pod(pod: &mut Pod) -> Result<(), Problem> {
    let Some(spec) = &mut pod.spec else {
        return Err((path(&[&"spec"]), "spec is missing".to_owned()));
    };
    let account = spec
        .service_account_name
        .take_if(|name| !name.is_empty())
        .or_else(|| spec.service_account.clone().filter(|name| !name.is_empty()))
        .unwrap_or_else(|| DEFAULT_SERVICE_ACCOUNT.to_owned());
    check_name(&account)
        .map_err(|error| (path(&[&"spec", &"serviceAccountName"]), error.to_string()))?;
    spec.service_account_name = Some(account);
    check_containers("containers", &mut spec.containers)?;
    check_containers("initContainers", spec.init_containers.as_deref_mut().unwrap_or_default())?;
    let status = pod.status.iter();
    for (index, ip) in status.clone().flat_map(|s| s.pod_ips.iter().flatten()).enumerate() {
        check_ip(&ip.ip, &[&"status", &"podIPs", &index, &"ip"])?;
    }
    match status.clone().find_map(|status| status.pod_ip.as_ref()) {
        Some(ip) => check_ip(ip, &[&"status", &"podIP"]),
        None => Ok(()),
    }
}

fn check_containers(field: &str, containers: &mut [Container]) -> Result<(), Problem> {
    let mut names = BTreeSet::new();
    for (index, container) in containers.iter_mut().enumerate() {
        let at = path(&[&"spec", &field, &index, &"name"]);
        check_namespace(&container.name)
            .map_err(|_| (at.clone(), format!("{:?} is no name of a container", container.name)))?;
        if !names.insert(container.name.clone()) {
            return Err((at, format!("two containers are called {:?}", container.name)));
        }
        for (nth, port) in container.ports.iter_mut().flatten().enumerate() {
            let at: [&dyn IntoStep; 6] =
                [&"spec", &field, &index, &"ports", &nth, &"containerPort"];
            check_port(port.container_port, &at)?;
            port.protocol.get_or_insert_with(tcp);
        }
    }
    Ok(())
}

fn check_service(service: &mut Service) -> Result<(), Problem> {
    let Some(spec) = &mut service.spec else {
        return Err((path(&[&"spec"]), "spec is missing".to_owned()));
    };
    let headless = spec.cluster_ip.as_deref() == Some("None");
    let external = spec.type_.as_deref() == Some("ExternalName");
    let ports = spec.ports.get_or_insert_default();
    if ports.is_empty() && !headless && !external {
        return Err((path(&[&"spec", &"ports"]), "a Service needs a port".to_owned()));
    }
    let several = ports.len() > 1;
    let mut names = BTreeSet::new();
    for (index, port) in ports.iter_mut().enumerate() {
        check_service_port(port, index)?;
        let name = port.name.clone().unwrap_or_default();
        if several && name.is_empty() {
            let at = path(&[&"spec", &"ports", &index]);
            return Err((at, "each of several ports needs a name".to_owned()));
        }
        if !names.insert(name.clone()) {
            let at = path(&[&"spec", &"ports", &index, &"name"]);
            return Err((at, format!("two ports are called {name:?}")));
        }
    }
    spec.type_.get_or_insert_with(|| "ClusterIP".to_owned());
    Ok(())
}

fn check_service_port(port: &mut ServicePort, index: usize) -> Result<(), Problem> {
    check_port(port.port, &[&"spec", &"ports", &index, &"port"])?;
    let target = port.target_port.get_or_insert(IntOrString::Int(port.port));
    let at: [&dyn IntoStep; 4] = [&"spec", &"ports", &index, &"targetPort"];
    match target {
        IntOrString::Int(number) => check_port(*number, &at)?,
        IntOrString::String(name) if name.is_empty() || name.len() > 15 => {
            let reason = format!("targetPort {name:?} is no name of a port: 1 to 15 characters");
            return Err((path(&at), reason));
        }
        IntOrString::String(_) => {}
    }
    let protocol = port.protocol.get_or_insert_with(tcp);
    if !matches!(protocol.as_str(), "TCP" | "UDP" | "SCTP") {
        let reason = format!("protocol {protocol:?} is none: expected TCP, UDP or SCTP");
        return Err((path(&[&"spec", &"ports", &index, &"protocol"]), reason));
    }
    Ok(())
}

fn check_port(number: i32, at: &[&dyn IntoStep]) -> Result<(), Problem> {
    if (1..=65_535).contains(&number) {
        return Ok(());
    }
    // The types of Kubernetes read a port that is not there as 0.
    let at = path(at);
    let field = super::locate::display(&at);
    Err((at, format!("{field} is {number} or missing: a port is from 1 to 65535")))
}

fn check_ip(text: &str, at: &[&dyn IntoStep]) -> Result<(), Problem> {
    match text.parse::<IpAddr>() {
        Ok(_) => Ok(()),
        Err(_) => Err((path(at), format!("{text:?} is no IP address"))),
    }
}

fn path(steps: &[&dyn IntoStep]) -> Path {
    steps.iter().map(|step| step.step()).collect()
}

/// What a path is written of.
trait IntoStep {
    fn step(&self) -> Step;
}

impl IntoStep for &str {
    fn step(&self) -> Step {
        Step::Key((*self).to_owned())
    }
}

impl IntoStep for usize {
    fn step(&self) -> Step {
        Step::Index(*self)
    }
}

fn tcp() -> String {
    "TCP".to_owned()
}

/// As the admission of Kubernetes fills it in.
pub(super) const DEFAULT_SERVICE_ACCOUNT: &str = "default";
