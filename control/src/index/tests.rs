//! The index as a table of cases, and its properties over random objects.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn names() -> MeshNames {
    MeshNames {
        trust_domain: "cluster.local".parse().unwrap(),
        control_namespace: "steadfast".to_owned(),
    }
}

fn key(kind: Kind, namespace: &str, name: &str) -> String {
    format!("resources/{}/{namespace}/{name}", kind.as_str())
}

/// Puts an object as the store has it; returns what of it cannot be used.
fn put(index: &mut Index, kind: Kind, namespace: &str, name: &str, value: Value) -> Vec<String> {
    let key = key(kind, namespace, name);
    let (parsed_kind, parsed_name) = parse_key(&key).unwrap().unwrap();
    assert_eq!((parsed_kind, &parsed_name), (kind, &Name::new(namespace, name)));
    let mut notes = Vec::new();
    let object = Object::parse(kind, &key, value.to_string().as_bytes(), &mut notes).unwrap();
    if let Object::Pod(pod) = &object {
        // As a manifest has it beside its pods.
        index.put(Name::new(namespace, &pod.service_account), Object::ServiceAccount);
    }
    index.put(parsed_name, object);
    notes
}

fn pod(ip: &str, annotations: Value) -> Value {
    json!({
        "metadata": { "uid": format!("uid-{ip}"), "annotations": annotations },
        "spec": {
            "serviceAccountName": "web",
            "containers": [{ "name": "c", "ports": [
                { "containerPort": 8080, "name": "http" }, { "containerPort": 5432, "name": "db" },
            ]}],
        },
        "status": { "podIP": ip },
    })
}

fn service(ports: Value) -> Value {
    json!({ "spec": { "clusterIP": "10.96.0.1", "ports": ports } })
}

fn slice(service: &str, ports: Value, endpoints: Value) -> Value {
    json!({
        "metadata": { "labels": { "kubernetes.io/service-name": service } },
        "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
    })
}

fn endpoint(ip: &str, pod: &str) -> Value {
    json!({ "addresses": [ip], "targetRef": { "kind": "Pod", "name": pod } })
}

fn enabled() -> Value {
    json!({ "linkerd.io/inject": "enabled" })
}

/// One service `web` with port 80 to 8080 of one meshed pod.
fn web() -> Index {
    let mut index = Index::new(names());
    put(&mut index, Kind::Pod, "demo", "web-1", pod("10.0.0.1", enabled()));
    let ports = json!([{ "port": 80, "targetPort": "http" }]);
    put(&mut index, Kind::Service, "demo", "web", service(ports));
    let endpoints = json!([endpoint("10.0.0.1", "web-1")]);
    let value = slice("web", json!([{ "port": 8080 }]), endpoints);
    put(&mut index, Kind::EndpointSlice, "demo", "web-a", value);
    index
}

fn snapshot(index: &Index) -> ServiceSnapshot {
    index.service(&Name::new("demo", "web"))
}

fn addrs(index: &Index, port: u16) -> Vec<String> {
    snapshot(index).addresses(port, None).keys().map(ToString::to_string).collect()
}

#[test]
fn a_pod_whose_service_account_does_not_exist_is_left_out_and_never_called_in_plaintext() {
    let (mut index, account) = (web(), Name::new("demo", "web"));
    assert_eq!(addrs(&index, 80), ["10.0.0.1:8080"]);
    index.take_dirty();
    index.delete(Kind::ServiceAccount, account.clone());
    let dirty = index.take_dirty();
    assert!(dirty.services.contains(&Name::new("demo", "web")));
    assert!(dirty.addresses.contains(&ip("10.0.0.1")));
    assert_eq!(addrs(&index, 80), [""; 0]);
    let said = snapshot(&index).unusable.join("\n");
    assert!(said.contains("its ServiceAccount demo/web does not exist"), "{said}");
    let AddressSnapshot::Pods(pods) = index.address(ip("10.0.0.1")) else {
        panic!("the pod is gone")
    };
    assert!(pods[0].0.mesh_at(8080).unwrap().fault.is_some());
    // Made again, all is as before.
    index.put(account, Object::ServiceAccount);
    assert_eq!(index.take_dirty().services.len(), 1);
    assert_eq!(addrs(&index, 80), ["10.0.0.1:8080"]);
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mesh(index: &Index, addr: &str) -> Option<Mesh> {
    let addr: SocketAddr = addr.parse().unwrap();
    let addresses = snapshot(index).addresses(80, None);
    let workload = addresses[&addr].workload.clone()?;
    workload.mesh_at(addr.port()).cloned()
}

#[test]
fn a_meshed_endpoint_has_the_identity_of_its_pod() {
    let index = web();
    assert_eq!(addrs(&index, 80), ["10.0.0.1:8080"]);
    let mesh = mesh(&index, "10.0.0.1:8080").unwrap();
    assert_eq!(&*mesh.identity, "web.demo.serviceaccount.identity.steadfast.cluster.local");
    assert_eq!((mesh.inbound_port, mesh.fault), (4143, None));
}

#[test]
fn whether_a_pod_is_meshed_follows_from_its_annotation_then_its_namespace() {
    let inject = |value: Option<&str>| match value {
        Some(value) => json!({ "linkerd.io/inject": value }),
        None => json!({}),
    };
    for (namespace, own, meshed) in [
        (None, None, false),
        (None, Some("enabled"), true),
        (None, Some("ingress"), true),
        (None, Some("true"), true),
        (None, Some("disabled"), false),
        (None, Some("nonsense"), false),
        (Some("enabled"), None, true),
        (Some("enabled"), Some("disabled"), false),
        (Some("disabled"), Some("enabled"), true),
        (Some("enabled"), Some("nonsense"), true),
    ] {
        let mut index = web();
        put(&mut index, Kind::Pod, "demo", "web-1", pod("10.0.0.1", inject(own)));
        let value = json!({ "metadata": { "annotations": inject(namespace) } });
        put(&mut index, Kind::Namespace, "", "demo", value);
        assert_eq!(mesh(&index, "10.0.0.1:8080").is_some(), meshed, "{namespace:?}, {own:?}");
    }
}

#[test]
fn annotations_of_ports_are_the_pods_own_or_inherited() {
    let mut index = web();
    let inherited = json!({
        "linkerd.io/inject": "enabled",
        "config.linkerd.io/inbound-port": "5143",
        "config.linkerd.io/opaque-ports": "8080",
    });
    let namespace = json!({ "metadata": { "annotations": inherited } });
    put(&mut index, Kind::Namespace, "", "demo", namespace);
    let workload = |index: &Index| {
        let addresses = snapshot(index).addresses(80, None);
        addresses.values().next().unwrap().workload.clone().unwrap()
    };
    assert_eq!(workload(&index).mesh_at(8080).unwrap().inbound_port, 5143);
    assert!(workload(&index).opaque(8080) && !workload(&index).opaque(5432));
    assert!(snapshot(&index).ports[&80].addresses.len() == 1 && !snapshot(&index).opaque(80));
    let own = json!({
        "linkerd.io/inject": "enabled",
        "config.linkerd.io/inbound-port": "6143",
        "config.linkerd.io/opaque-ports": "db",
        "config.linkerd.io/skip-inbound-ports": "9000-9100",
    });
    put(&mut index, Kind::Pod, "demo", "web-1", pod("10.0.0.1", own));
    let workload = workload(&index);
    assert_eq!(workload.mesh_at(8080).unwrap().inbound_port, 6143);
    assert!(workload.opaque(5432) && !workload.opaque(8080));
    assert!(workload.mesh_at(9050).is_none(), "a skipped port does not lead through the proxy");
}

#[test]
fn an_identity_is_claimed_only_at_an_address_of_a_pod_that_is_there_and_meshed() {
    let mut index = web();
    let replace = |index: &mut Index, endpoints: Value| {
        let value = slice("web", json!([{ "port": 8080 }]), endpoints);
        put(index, Kind::EndpointSlice, "demo", "web-a", value);
    };
    // Named by a slice, but not its address; and a pod that nobody knows.
    replace(&mut index, json!([endpoint("10.0.0.9", "web-1")]));
    assert!(addrs(&index, 80).is_empty());
    replace(&mut index, json!([endpoint("10.0.0.1", "web-2")]));
    assert!(addrs(&index, 80).is_empty());
    // Outside the cluster, even at the address of a pod: as the slice says, without a pod.
    replace(&mut index, json!([{ "addresses": ["10.0.0.1"] }]));
    assert_eq!(mesh(&index, "10.0.0.1:8080"), None);
    replace(&mut index, json!([endpoint("10.0.0.1", "web-1")]));
    assert!(mesh(&index, "10.0.0.1:8080").is_some());
    // It shares the node's network, where it has no proxy of its own.
    let mut host = pod("10.0.0.1", enabled());
    host["spec"]["hostNetwork"] = json!(true);
    put(&mut index, Kind::Pod, "demo", "web-1", host);
    assert_eq!(mesh(&index, "10.0.0.1:8080"), None);
    // It has ended: the address may be another's.
    let mut ended = pod("10.0.0.1", enabled());
    ended["status"]["phase"] = json!("Succeeded");
    put(&mut index, Kind::Pod, "demo", "web-1", ended);
    assert!(addrs(&index, 80).is_empty());
    assert_eq!(index.address(ip("10.0.0.1")), AddressSnapshot::Foreign);
}

#[test]
fn a_meshed_pod_whose_identity_is_no_name_is_left_out_rather_than_spoken_to_in_plaintext() {
    let mut index = web();
    let mut long = pod("10.0.0.1", enabled());
    long["spec"]["serviceAccountName"] = json!(["a".repeat(63).as_str(); 4].join("."));
    put(&mut index, Kind::Pod, "demo", "web-1", long);
    assert!(addrs(&index, 80).is_empty());
    let unusable = snapshot(&index).unusable;
    assert!(unusable.len() == 1 && unusable[0].contains("demo/web-1"), "{unusable:?}");
    let address = index.address(ip("10.0.0.1"));
    assert!(address.workload_at(8080).unwrap().mesh_at(8080).unwrap().fault.is_some());
}

#[test]
fn ports_lead_where_service_and_slice_say() {
    for (service_ports, slice_ports, port, leads_to) in [
        (json!([{ "port": 80 }]), json!([{ "port": 8080 }]), 80, Some(8080)),
        (
            json!([{ "port": 80, "name": "a" }, { "port": 81, "name": "b", "targetPort": "db" }]),
            json!([{ "port": 8080, "name": "a" }, { "port": 5432, "name": "b" }]),
            81,
            Some(5432),
        ),
        // Names that do not meet.
        (json!([{ "port": 80, "name": "a" }]), json!([{ "port": 8080, "name": "b" }]), 80, None),
        // By hand: one port each, and the slice's has no name.
        (json!([{ "port": 80, "name": "a" }]), json!([{ "port": 8080 }]), 80, Some(8080)),
        // Any port: the Service's own target.
        (json!([{ "port": 80, "targetPort": 9000 }]), json!([{}]), 80, Some(9000)),
        (json!([{ "port": 80, "targetPort": "9001" }]), json!([{}]), 80, Some(9001)),
        (json!([{ "port": 80, "targetPort": 0 }]), json!([{}]), 80, Some(80)),
        (json!([{ "port": 80, "targetPort": "http" }]), json!([{}]), 80, None),
        // Not declared, and not TCP.
        (json!([{ "port": 80 }]), json!([{ "port": 8080 }]), 8080, None),
        (json!([{ "port": 80, "protocol": "UDP" }]), json!([{ "port": 8080 }]), 80, None),
        (json!([{ "port": 80 }]), json!([{ "port": 8080, "protocol": "UDP" }]), 80, None),
    ] {
        let mut index = web();
        put(&mut index, Kind::Service, "demo", "web", service(service_ports.clone()));
        let value = slice("web", slice_ports.clone(), json!([endpoint("10.0.0.1", "web-1")]));
        put(&mut index, Kind::EndpointSlice, "demo", "web-a", value);
        let expected: Vec<_> = leads_to.iter().map(|port| format!("10.0.0.1:{port}")).collect();
        assert_eq!(addrs(&index, port), expected, "{service_ports} {slice_ports} {port}");
    }
}

#[test]
fn conditions_decide_who_gets_traffic() {
    let mut index = web();
    put(&mut index, Kind::Pod, "demo", "web-2", pod("10.0.0.2", enabled()));
    let with = |name: &str, ip: &str, conditions: Value| {
        let mut endpoint = endpoint(ip, name);
        endpoint["conditions"] = conditions;
        endpoint
    };
    let ready = json!({ "ready": true });
    let not_ready = json!({ "ready": false, "serving": false });
    let ending = json!({ "ready": false, "serving": true, "terminating": true });
    let ended = json!({ "ready": false, "serving": false, "terminating": true });
    for (first, second, expected) in [
        (json!({}), not_ready.clone(), vec!["10.0.0.1:8080"]),
        (ready.clone(), ending.clone(), vec!["10.0.0.1:8080"]),
        (not_ready.clone(), ending.clone(), vec!["10.0.0.2:8080"]),
        (not_ready.clone(), ended.clone(), vec![]),
        (ready.clone(), ready.clone(), vec!["10.0.0.1:8080", "10.0.0.2:8080"]),
    ] {
        let endpoints = json!([
            with("web-1", "10.0.0.1", first.clone()),
            with("web-2", "10.0.0.2", second.clone()),
        ]);
        let value = slice("web", json!([{ "port": 8080 }]), endpoints);
        put(&mut index, Kind::EndpointSlice, "demo", "web-a", value);
        assert_eq!(addrs(&index, 80), expected, "{first} {second}");
    }
    let endpoints = json!([with("web-1", "10.0.0.1", not_ready)]);
    let value = slice("web", json!([{ "port": 8080 }]), endpoints);
    put(&mut index, Kind::EndpointSlice, "demo", "web-a", value);
    let mut unready = service(json!([{ "port": 80 }]));
    unready["spec"]["publishNotReadyAddresses"] = json!(true);
    put(&mut index, Kind::Service, "demo", "web", unready);
    assert_eq!(addrs(&index, 80), ["10.0.0.1:8080"]);
}

#[test]
fn a_pod_with_two_families_is_one_endpoint() {
    let mut index = web();
    let mut dual = pod("10.0.0.1", enabled());
    dual["status"]["podIPs"] = json!([{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }]);
    put(&mut index, Kind::Pod, "demo", "web-1", dual);
    let mut value = slice("web", json!([{ "port": 8080 }]), json!([endpoint("fd00::1", "web-1")]));
    value["addressType"] = json!("IPv6");
    put(&mut index, Kind::EndpointSlice, "demo", "web-6", value);
    assert_eq!(addrs(&index, 80), ["10.0.0.1:8080"], "the clusterIP is IPv4");
    let mut prefers = service(json!([{ "port": 80 }]));
    prefers["spec"]["ipFamilies"] = json!(["IPv6", "IPv4"]);
    put(&mut index, Kind::Service, "demo", "web", prefers);
    assert_eq!(addrs(&index, 80), ["[fd00::1]:8080"]);
    index.delete(Kind::EndpointSlice, Name::new("demo", "web-6"));
    assert_eq!(addrs(&index, 80), ["10.0.0.1:8080"], "the other family is better than none");
}

#[test]
fn a_headless_service_has_hosts_and_takes_any_port() {
    let mut index = web();
    let headless = json!({ "spec": { "clusterIP": "None", "ports": [{ "port": 80 }] } });
    put(&mut index, Kind::Service, "demo", "web", headless);
    put(&mut index, Kind::Pod, "demo", "web-2", pod("10.0.0.2", enabled()));
    let mut first = endpoint("10.0.0.1", "web-1");
    first["hostname"] = json!("web-1");
    let endpoints = json!([first, endpoint("10.0.0.2", "web-2")]);
    let value = slice("web", json!([{ "port": 8080 }]), endpoints);
    put(&mut index, Kind::EndpointSlice, "demo", "web-a", value);
    let of = |port, host| -> Vec<_> {
        snapshot(&index).addresses(port, host).keys().map(ToString::to_string).collect()
    };
    assert_eq!(of(80, None), ["10.0.0.1:8080", "10.0.0.2:8080"]);
    assert_eq!(of(9999, None), ["10.0.0.1:9999", "10.0.0.2:9999"]);
    assert_eq!(of(80, Some("web-1")), ["10.0.0.1:8080"]);
    assert_eq!(of(9999, Some("web-1")), ["10.0.0.1:9999"]);
    assert!(of(80, Some("web-2")).is_empty());
}

#[test]
fn opaque_ports_of_a_service_are_its_own_or_inherited_or_linkerds() {
    let ports = json!([
        { "port": 80, "name": "http" },
        { "port": 5432, "name": "sql" },
        { "port": 90, "name": "own", "appProtocol": "linkerd.io/opaque" },
    ]);
    let opaque = |index: &Index| {
        let snapshot = snapshot(index);
        [80, 5432, 90].map(|port| snapshot.opaque(port))
    };
    let mut index = web();
    put(&mut index, Kind::Service, "demo", "web", service(ports.clone()));
    assert_eq!(opaque(&index), [false, true, true]);
    assert_eq!(snapshot(&index).ports[&90].app_protocol.as_deref(), Some("linkerd.io/opaque"));
    let annotated =
        |text: &str| json!({ "annotations": { "config.linkerd.io/opaque-ports": text } });
    put(&mut index, Kind::Namespace, "", "demo", json!({ "metadata": annotated("80") }));
    assert_eq!(opaque(&index), [true, false, true]);
    let mut own = service(ports);
    own["metadata"] = annotated("sql");
    put(&mut index, Kind::Service, "demo", "web", own);
    assert_eq!(opaque(&index), [false, true, true]);
}

#[test]
fn an_address_leads_to_its_service_or_to_one_pod_beyond_doubt() {
    let mut index = web();
    let AddressSnapshot::Service(found) = index.address(ip("10.96.0.1")) else { panic!() };
    assert_eq!(found.name, Name::new("demo", "web"));
    let at = |index: &Index, port| {
        let found = index.address(ip("10.0.0.1")).workload_at(port).cloned();
        found.map(|workload| workload.name.name.to_string())
    };
    assert_eq!(at(&index, 12345).as_deref(), Some("web-1"), "one pod has all of its ports");
    // As on loopback: several pods share an address, and a declared port says which.
    let mut other = pod("10.0.0.1", enabled());
    other["spec"]["containers"] = json!([{ "name": "c", "ports": [{ "containerPort": 9000 }] }]);
    put(&mut index, Kind::Pod, "demo", "api-1", other);
    assert_eq!(at(&index, 8080).as_deref(), Some("web-1"));
    assert_eq!(at(&index, 9000).as_deref(), Some("api-1"));
    assert_eq!(at(&index, 12345), None);
    put(&mut index, Kind::Pod, "demo", "web-2", pod("10.0.0.1", enabled()));
    assert_eq!(at(&index, 8080), None, "two declare it");
    assert_eq!(index.address(ip("10.0.0.77")), AddressSnapshot::Foreign);
}

#[test]
fn what_cannot_be_used_is_said() {
    let mut index = web();
    let annotations = json!({
        "linkerd.io/inject": "true",
        "config.linkerd.io/inbound-port": "http",
        "config.linkerd.io/opaque-ports": "80,nope",
    });
    let notes = put(&mut index, Kind::Pod, "demo", "web-1", pod("10.0.0.x", annotations));
    assert_eq!(notes.len(), 4, "{notes:?}");
    for text in ["linkerd.io/inject", "inbound-port", "nope", "10.0.0.x"] {
        assert!(notes.iter().any(|note| note.contains(text)), "{text}: {notes:?}");
    }
    let notes = put(&mut index, Kind::Service, "demo", "web", service(json!([{ "port": 70_000 }])));
    assert!(notes[0].contains("70000"), "{notes:?}");
}

fn external(ip: &str, identity: &str) -> Value {
    json!({
        "metadata": { "labels": { "app": "web" } },
        "spec": {
            "meshTLS": { "identity": identity, "serverName": "vm.example" },
            "ports": [{ "name": "http", "port": 9000 }],
            "workloadIPs": [{ "ip": ip }],
        },
        "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
    })
}

#[test]
fn a_service_selects_workloads_outside_of_the_cluster_beside_its_pods() {
    let mut index = web();
    let mut selecting = service(json!([{ "port": 80, "targetPort": "http" }]));
    selecting["spec"]["selector"] = json!({ "app": "web" });
    put(&mut index, Kind::Service, "demo", "web", selecting);
    index.take_dirty();
    let identity = "spiffe://cluster.local/ns/demo/sa/vm";
    put(&mut index, Kind::ExternalWorkload, "demo", "vm-1", external("192.168.0.9", identity));
    assert!(index.take_dirty().services.contains(&Name::new("demo", "web")));
    let addresses = snapshot(&index).addresses(80, None);
    let at = |text: &str| addresses.get(&text.parse().unwrap()).cloned();
    assert!(at("10.0.0.1:8080").is_some());
    let workload = at("192.168.0.9:9000").unwrap().workload.unwrap();
    assert_eq!(workload.kind, WorkloadKind::External);
    let mesh = workload.mesh_at(9000).unwrap();
    let expected = "vm.demo.serviceaccount.identity.steadfast.cluster.local";
    assert_eq!((&*mesh.identity, &mesh.fault), (expected, &None));
    let AddressSnapshot::Pods(found) = index.address(ip("192.168.0.9")) else { panic!() };
    assert_eq!(found[0].0.name, Name::new("demo", "vm-1"));
    // One that is not ready, has another's labels, or is gone is no endpoint.
    let mut other = external("192.168.0.9", identity);
    other["status"] = json!({});
    put(&mut index, Kind::ExternalWorkload, "demo", "vm-1", other);
    assert_eq!(snapshot(&index).addresses(80, None).len(), 1);
    let mut other = external("192.168.0.9", identity);
    other["metadata"]["labels"] = json!({ "app": "other" });
    put(&mut index, Kind::ExternalWorkload, "demo", "vm-1", other);
    assert_eq!(snapshot(&index).addresses(80, None).len(), 1);
    index.delete(Kind::ExternalWorkload, Name::new("demo", "vm-1"));
    assert_eq!(index.address(ip("192.168.0.9")), AddressSnapshot::Foreign);
}

#[test]
fn a_workload_outside_whose_identity_nobody_here_can_have_is_left_out_and_never_in_plaintext() {
    for identity in ["spiffe://elsewhere/ns/demo/sa/vm", "spiffe://cluster.local/vm", "vm.example"]
    {
        let mut index = web();
        put(&mut index, Kind::ExternalWorkload, "demo", "vm-1", external("192.168.0.9", identity));
        let target = json!({ "kind": "ExternalWorkload", "name": "vm-1" });
        let endpoints = json!([{ "addresses": ["192.168.0.9"], "targetRef": target }]);
        let value = slice("web", json!([{ "port": 9000 }]), endpoints);
        put(&mut index, Kind::EndpointSlice, "demo", "web-b", value);
        let snapshot = snapshot(&index);
        assert_eq!(snapshot.addresses(80, None).len(), 1, "{identity}");
        assert!(snapshot.unusable[0].contains("demo/vm-1"), "{:?}", snapshot.unusable);
    }
}

#[test]
fn a_pod_is_itself_whatever_a_workload_outside_says_of_its_address() {
    let mut index = web();
    let claims = external("10.0.0.1", "spiffe://cluster.local/ns/evil/sa/vm");
    put(&mut index, Kind::ExternalWorkload, "evil", "vm", claims);
    for port in [8080, 9000] {
        let address = index.address(ip("10.0.0.1"));
        let workload = address.workload_at(port).expect("it is known");
        assert_eq!(
            (workload.kind, &workload.name),
            (WorkloadKind::Pod, &Name::new("demo", "web-1"))
        );
    }
    // Two outside: not told apart, and still never in plaintext.
    for name in ["vm-1", "vm-2"] {
        let value = external("192.168.0.9", &format!("spiffe://cluster.local/ns/demo/sa/{name}"));
        put(&mut index, Kind::ExternalWorkload, "demo", name, value);
    }
    for port in [9000, 1] {
        let address = index.address(ip("192.168.0.9"));
        assert!(address.workload_at(port).unwrap().mesh_at(port).is_some(), "{port}");
    }
}

#[test]
fn a_server_says_that_a_port_of_the_workloads_it_selects_is_opaque() {
    let mut index = web();
    let mut labelled = pod("10.0.0.1", enabled());
    labelled["metadata"]["labels"] = json!({ "app": "web" });
    put(&mut index, Kind::Pod, "demo", "web-1", labelled);
    let server = |labels: Value, port: Value, protocol: &str| {
        json!({ "spec": {
            "podSelector": { "matchLabels": labels }, "port": port, "proxyProtocol": protocol,
        }})
    };
    let opaque = |index: &Index| {
        let found = index.address(ip("10.0.0.1")).workload_at(8080).cloned().unwrap();
        (found.opaque(8080), found.opaque(5432))
    };
    assert_eq!(opaque(&index), (false, true), "5432 is one of the default ports");
    for (labels, port, protocol, expected) in [
        (json!({ "app": "web" }), json!("http"), "opaque", true),
        (json!({ "app": "web" }), json!(8080), "opaque", true),
        (json!({}), json!(8080), "opaque", true),
        (json!({ "app": "other" }), json!(8080), "opaque", false),
        (json!({ "app": "web" }), json!(8081), "opaque", false),
        (json!({ "app": "web" }), json!(8080), "HTTP/1", false),
    ] {
        index.take_dirty();
        let value = server(labels.clone(), port.clone(), protocol);
        put(&mut index, Kind::Server, "demo", "web", value);
        assert!(index.take_dirty().addresses.contains(&ip("10.0.0.1")));
        assert_eq!(opaque(&index), (expected, true), "{labels} {port} {protocol}");
    }
    let value = server(json!({}), json!(8080), "smtp");
    let notes = put(&mut index, Kind::Server, "other", "web", value);
    assert!(notes[0].contains("smtp"), "{notes:?}");
    index.delete(Kind::Server, Name::new("demo", "web"));
    assert_eq!(opaque(&index), (false, true));
}

#[test]
fn the_pods_of_one_template_share_their_labels_and_leave_none_behind() {
    let mut index = Index::new(names());
    for (number, app) in [(1, "web"), (2, "web"), (3, "api")] {
        let mut labelled = pod(&format!("10.0.0.{number}"), enabled());
        labelled["metadata"]["labels"] = json!({ "app": app });
        put(&mut index, Kind::Pod, "demo", &format!("pod-{number}"), labelled);
    }
    assert_eq!(index.labels.len(), 2);
    for number in [1, 2, 3] {
        index.delete(Kind::Pod, Name::new("demo", format!("pod-{number}")));
    }
    assert_eq!(index.labels.len(), 0);
}

#[test]
fn keys_that_are_no_resources_are_told_apart() {
    assert!(parse_key("trust/domain").is_err());
    assert!(parse_key("resources/Pod/demo").is_err());
    assert!(parse_key("resources/Pod/demo/a/b").is_err());
    assert!(parse_key("resources/Pod/demo/").is_err());
    assert!(parse_key("resources/ConfigMap/demo/web").unwrap().is_none());
}

#[test]
fn a_thousand_services_with_ten_endpoints_each_change_one_by_one() {
    let mut index = Index::new(names());
    for service_no in 0..1000 {
        let name = format!("s{service_no}");
        let mut endpoints = Vec::new();
        for pod_no in 0..10 {
            let ip = format!("10.{}.{}.{pod_no}", service_no / 250, service_no % 250);
            let pod_name = format!("{name}-{pod_no}");
            put(&mut index, Kind::Pod, "demo", &pod_name, pod(&ip, enabled()));
            endpoints.push(endpoint(&ip, &pod_name));
        }
        put(
            &mut index,
            Kind::Service,
            "demo",
            &name,
            json!({ "spec": { "ports": [{ "port": 80 }] } }),
        );
        let value = slice(&name, json!([{ "port": 8080 }]), endpoints.into());
        put(&mut index, Kind::EndpointSlice, "demo", &name, value);
    }
    index.take_dirty();
    // One pod touches one service: the work does not grow with the mesh.
    put(&mut index, Kind::Pod, "demo", "s7-3", pod("10.0.7.3", json!({})));
    let dirty = index.take_dirty();
    assert_eq!(dirty.services, BTreeSet::from([Name::new("demo", "s7")]));
    assert_eq!(dirty.addresses, HashSet::from([ip("10.0.7.3")]));
    assert_eq!(index.service(&Name::new("demo", "s7")).addresses(80, None).len(), 10);
}

#[derive(Clone, Debug)]
enum Step {
    Delete(usize),
    Put(usize, usize),
}

/// A small world in which objects refer to each other in every way: each with several forms.
fn world() -> Vec<(Kind, &'static str, &'static str, Vec<Value>)> {
    let ports = json!([{ "port": 80, "targetPort": "http" }, { "port": 5432, "name": "db" }]);
    let mut headless = service(ports.clone());
    headless["spec"]["clusterIP"] = json!("None");
    let mut moved = service(ports.clone());
    moved["spec"]["clusterIP"] = json!("10.96.0.2");
    let external = json!({ "spec": { "type": "ExternalName", "externalName": "example.com" } });
    let to = |service: &str, pods: &[(&str, &str)]| {
        let endpoints: Vec<_> = pods.iter().map(|(ip, pod)| endpoint(ip, pod)).collect();
        slice(service, json!([{ "port": 8080 }, { "port": 5432, "name": "db" }]), endpoints.into())
    };
    let mut finished = pod("10.0.0.1", enabled());
    finished["status"]["phase"] = json!("Failed");
    let annotated = |annotations: Value| json!({ "metadata": { "annotations": annotations } });
    vec![
        (
            Kind::Namespace,
            "",
            "demo",
            vec![
                annotated(enabled()),
                annotated(json!({ "config.linkerd.io/opaque-ports": "80,8080" })),
            ],
        ),
        (
            Kind::Pod,
            "demo",
            "web-1",
            vec![pod("10.0.0.1", enabled()), pod("10.0.0.2", json!({})), finished],
        ),
        (Kind::Pod, "demo", "web-2", vec![pod("10.0.0.2", enabled()), pod("10.0.0.1", json!({}))]),
        (
            Kind::Service,
            "demo",
            "web",
            vec![service(ports.clone()), headless, moved, external.clone()],
        ),
        (Kind::Service, "demo", "api", vec![service(ports), external]),
        (
            Kind::EndpointSlice,
            "demo",
            "a",
            vec![
                to("web", &[("10.0.0.1", "web-1")]),
                to("api", &[("10.0.0.2", "web-2"), ("10.0.0.1", "web-1")]),
                to("web", &[]),
            ],
        ),
        (
            Kind::EndpointSlice,
            "demo",
            "b",
            vec![
                to("web", &[("10.0.0.2", "web-2"), ("10.0.0.2", "web-1")]),
                to("web", &[("10.0.0.1", "web-2")]),
            ],
        ),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        1 => (0..7_usize).prop_map(Step::Delete),
        4 => (0..7_usize, 0..4_usize).prop_map(|(object, form)| Step::Put(object, form)),
    ];
    proptest::collection::vec(step, 0..40)
}

/// The world, read once.
static WORLD: LazyLock<Vec<(Kind, Name, Vec<Object>)>> = LazyLock::new(|| {
    let read = |kind, value: &Value| {
        Object::parse(kind, "", value.to_string().as_bytes(), &mut Vec::new()).unwrap()
    };
    world()
        .into_iter()
        .map(|(kind, namespace, name, forms)| {
            let forms = forms.iter().map(|value| read(kind, value)).collect();
            (kind, Name::new(namespace, name), forms)
        })
        .collect()
});

fn run(index: &mut Index, step: &Step) {
    match step {
        Step::Delete(object) => {
            let (kind, name, _) = &WORLD[*object];
            index.delete(*kind, name.clone());
        }
        Step::Put(object, form) => {
            let (_, name, forms) = &WORLD[*object];
            index.put(name.clone(), forms[form % forms.len()].clone());
        }
    }
}

fn all_services(index: &Index) -> Vec<ServiceSnapshot> {
    ["web", "api"].map(|name| index.service(&Name::new("demo", name))).into()
}

const IPS: [&str; 4] = ["10.0.0.1", "10.0.0.2", "10.96.0.1", "10.96.0.2"];

fn all_addresses(index: &Index) -> Vec<AddressSnapshot> {
    IPS.map(|text| index.address(ip(text))).into()
}

proptest! {
    #[test]
    fn the_order_of_events_does_not_matter_and_every_change_is_marked(
        steps in steps(), rotation in 0..7_usize
    ) {
        let mut index = Index::new(names());
        let mut last: HashMap<usize, Step> = HashMap::new();
        for step in &steps {
            let (services, addresses) = (all_services(&index), all_addresses(&index));
            index.take_dirty();
            run(&mut index, step);
            let dirty = index.take_dirty();
            for (old, new) in services.iter().zip(all_services(&index)) {
                prop_assert!(*old == new || dirty.services.contains(&new.name), "{:?}", new.name);
            }
            for ((old, new), text) in addresses.iter().zip(all_addresses(&index)).zip(IPS) {
                prop_assert!(*old == new || dirty.addresses.contains(&ip(text)), "{}", text);
            }
            let (Step::Delete(object) | Step::Put(object, _)) = step;
            last.insert(*object, step.clone());
        }
        // The last event of each object, in another order.
        let mut fresh = Index::new(names());
        for object in (0..7).map(|object| (object + rotation) % 7).rev() {
            if let Some(step) = last.get(&object) {
                run(&mut fresh, step);
            }
        }
        prop_assert_eq!(all_services(&index), all_services(&fresh));
        prop_assert_eq!(all_addresses(&index), all_addresses(&fresh));
    }

    #[test]
    fn an_identity_is_never_claimed_for_an_address_without_a_meshed_pod(steps in steps()) {
        let mut index = Index::new(names());
        steps.iter().for_each(|step| run(&mut index, step));
        for service in all_services(&index) {
            for (addr, address) in [80, 5432, 9999].iter().flat_map(|&port| {
                let all = service.addresses(port, None);
                all.iter().map(|(addr, address)| (*addr, address.clone())).collect::<Vec<_>>()
            }) {
                let Some(workload) = &address.workload else { continue };
                let pod = index.pods.get(&workload.name);
                prop_assert!(pod.is_some_and(|pod| pod.ips.contains(&addr.ip()) && !pod.finished));
                let inherited = index.namespaces.get("demo").and_then(|ns| ns.inject);
                let meshed = pod.and_then(|pod| pod.annotations.inject).or(inherited);
                prop_assert_eq!(workload.mesh_at(addr.port()).is_some(), meshed == Some(true));
            }
        }
    }

    #[test]
    fn no_value_panics(text in ".{0,200}", kind in 0..4_usize) {
        let kind = Kind::ALL[kind];
        let _ = Object::parse(kind, "resources/x/y/z", text.as_bytes(), &mut Vec::new());
        let _ = parse_key(&text);
    }
}
