//! From snapshots to the messages of `Destination.GetProfile`.

use std::net::SocketAddr;
use std::sync::Arc;

use linkerd2_proxy_api::destination::{DestinationProfile, RetryBudget};

use crate::index::{Address, AddressSnapshot, Existence, ServiceSnapshot, Workload};
use crate::wire::{CORE, resource, weighted_addr};

/// What is said of something that nothing is known of: the connection goes where it wanted.
pub(crate) fn of_unknown(opaque: bool) -> DestinationProfile {
    DestinationProfile {
        opaque_protocol: opaque,
        retry_budget: Some(RetryBudget {
            retry_ratio: RETRY_RATIO,
            min_retries_per_second: RETRIES_PER_SECOND_MIN,
            ttl: Some(prost_types::Duration { seconds: RETRY_TTL_SECS, nanos: 0 }),
        }),
        ..DestinationProfile::default()
    }
}

/// What stands behind an address.
pub(crate) fn of_address(
    addr: SocketAddr,
    snapshot: &AddressSnapshot,
    cluster_domain: &str,
    opaque_by_default: bool,
) -> DestinationProfile {
    match (snapshot, snapshot.workload_at(addr.port())) {
        (AddressSnapshot::Service(service), _) => {
            of_service(service, addr.port(), cluster_domain, opaque_by_default)
        }
        (_, Some(workload)) => of_workload(addr, workload),
        _ => of_unknown(opaque_by_default),
    }
}

/// What a port of a service is.
pub(crate) fn of_service(
    service: &ServiceSnapshot,
    port: u16,
    cluster_domain: &str,
    opaque_by_default: bool,
) -> DestinationProfile {
    if service.existence != Existence::Present {
        return of_unknown(opaque_by_default);
    }
    let name = &service.name;
    DestinationProfile {
        fully_qualified_name: format!("{}.{}.svc.{cluster_domain}", name.name, name.namespace),
        parent_ref: Some(resource(CORE, "Service", name, port)),
        ..of_unknown(service.opaque(port))
    }
}

/// One pod of a headless service.
pub(crate) fn of_host(
    service: &ServiceSnapshot,
    hostname: &str,
    port: u16,
    opaque_by_default: bool,
) -> DestinationProfile {
    let addresses = service.addresses(port, Some(hostname));
    let Some((&addr, address)) = addresses.first_key_value() else {
        return of_unknown(opaque_by_default);
    };
    match &address.workload {
        Some(workload) => of_workload(addr, workload),
        None => {
            let endpoint = Some(weighted_addr(addr, address));
            DestinationProfile { endpoint, ..of_unknown(opaque_by_default) }
        }
    }
}

fn of_workload(addr: SocketAddr, workload: &Arc<Workload>) -> DestinationProfile {
    let address = Address { workload: Some(workload.clone()), ..Address::default() };
    let mut endpoint = weighted_addr(addr, &address);
    // In a set of endpoints the namespace is the set's label.
    let namespace = workload.name.namespace.to_string();
    endpoint.metric_labels.insert("namespace".to_owned(), namespace);
    DestinationProfile { endpoint: Some(endpoint), ..of_unknown(workload.opaque(addr.port())) }
}

/// Linkerd's own defaults.
const RETRY_RATIO: f32 = 0.2;
const RETRIES_PER_SECOND_MIN: u32 = 10;
const RETRY_TTL_SECS: i64 = 10;
