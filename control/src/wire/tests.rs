//! A client that applies every message knows the snapshot; and what a message looks like.

use std::collections::BTreeMap;

use linkerd2_proxy_api::destination::{TlsIdentity, Update, update};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::index::{Index, Kind, MeshNames, Object};

/// What a client of Linkerd's API makes of the messages.
#[derive(Debug, Default, PartialEq)]
struct Client {
    exists: Option<bool>,
    addrs: BTreeMap<SocketAddr, WeightedAddr>,
}

impl Client {
    fn apply(&mut self, update: Update) {
        match update.update.expect("no message is empty") {
            update::Update::Add(set) => {
                assert!(!set.addrs.is_empty() && set.addrs.len() <= ADDRS_PER_MESSAGE_MAX);
                self.exists = Some(true);
                for addr in set.addrs {
                    let key = addr.addr.unwrap().try_into().unwrap();
                    self.addrs.insert(key, addr);
                }
            }
            update::Update::NoEndpoints(none) => {
                self.exists = Some(none.exists);
                self.addrs.clear();
            }
            update::Update::Remove(set) => {
                for addr in set.addrs {
                    let key = addr.try_into().unwrap();
                    assert!(self.addrs.remove(&key).is_some(), "{key} was never added");
                }
                assert!(!self.addrs.is_empty(), "an empty set has a message of its own");
            }
        }
    }
}

fn index() -> Index {
    let mut index = Index::new(MeshNames {
        trust_domain: "cluster.local".parse().unwrap(),
        control_namespace: "steadfast".to_owned(),
    });
    put(&mut index, Kind::ServiceAccount, "default", json!({}));
    index
}

fn put(index: &mut Index, kind: Kind, name: &str, value: serde_json::Value) {
    let object = Object::parse(kind, name, value.to_string().as_bytes(), &mut Vec::new()).unwrap();
    index.put(Name::new("demo", name), object);
}

/// The service `web`, each endpoint with the form that `forms` says: absent, or one of three.
fn snapshot(exists: bool, forms: &[u8]) -> ServiceSnapshot {
    let mut index = index();
    if exists {
        put(&mut index, Kind::Service, "web", json!({ "spec": { "ports": [{ "port": 80 }] } }));
    }
    let mut endpoints = Vec::new();
    for (number, form) in forms.iter().enumerate().filter(|(_, form)| **form > 0) {
        let (ip, pod) =
            (format!("10.0.{}.{}", number / 200, number % 200 + 1), format!("p{number}"));
        let inject = if *form == 1 { "disabled" } else { "enabled" };
        let value = json!({
            "metadata": {
                "uid": form.to_string(),
                "annotations": { "linkerd.io/inject": inject },
            },
            "status": { "podIP": ip },
        });
        put(&mut index, Kind::Pod, &pod, value);
        endpoints.push(json!({ "addresses": [ip], "targetRef": { "kind": "Pod", "name": pod } }));
    }
    let slice = json!({
        "metadata": { "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4", "ports": [{ "port": 8080 }], "endpoints": endpoints,
    });
    put(&mut index, Kind::EndpointSlice, "web", slice);
    index.service(&Name::new("demo", "web"))
}

fn expected(snapshot: &ServiceSnapshot) -> Client {
    let addresses = snapshot.addresses(80, None);
    let addrs = addresses.iter().map(|(addr, a)| (*addr, weighted_addr(*addr, a))).collect();
    Client { exists: Some(snapshot.existence == Existence::Present), addrs }
}

#[test]
fn the_first_message_comes_at_once_and_says_what_there_is() {
    for (exists, forms) in [(false, vec![]), (true, vec![]), (true, vec![2])] {
        let snapshot = snapshot(exists, &forms);
        let (mut told, mut client) = (Told::nothing(80, None), Client::default());
        let first = told.update(&snapshot);
        assert_eq!(first.len(), 1);
        first.into_iter().for_each(|update| client.apply(update));
        assert_eq!(client, expected(&snapshot));
        assert!(told.update(&snapshot).is_empty(), "what is known is not told again");
    }
}

#[test]
fn many_endpoints_are_told_in_messages_of_bounded_size() {
    let (all, fewer) = (snapshot(true, &[2; 2500]), snapshot(true, &[2; 100]));
    let (mut told, mut client) = (Told::nothing(80, None), Client::default());
    let first = told.update(&all);
    assert_eq!(first.len(), 3);
    first.into_iter().for_each(|update| client.apply(update));
    assert_eq!(client, expected(&all));
    told.update(&fewer).into_iter().for_each(|update| client.apply(update));
    assert_eq!(client, expected(&fewer));
}

#[test]
fn an_endpoint_looks_as_linkerds_clients_expect_it() {
    let snapshot = snapshot(true, &[2, 1]);
    let addresses = snapshot.addresses(80, None);
    let messages: Vec<_> = addresses.iter().map(|(addr, a)| weighted_addr(*addr, a)).collect();
    let [meshed, plain] = messages.as_slice() else { panic!("{messages:?}") };
    let name = "default.demo.serviceaccount.identity.steadfast.cluster.local".to_owned();
    let dns = tls_identity::DnsLikeIdentity { name };
    let identity = TlsIdentity {
        strategy: Some(tls_identity::Strategy::DnsLikeIdentity(dns.clone())),
        server_name: Some(dns),
    };
    assert_eq!(meshed.tls_identity, Some(identity));
    let hint = meshed.protocol_hint.unwrap();
    assert_eq!(hint.protocol, Some(protocol_hint::Protocol::H2(protocol_hint::H2 {})));
    assert_eq!(hint.opaque_transport.unwrap().inbound_port, 4143);
    assert_eq!(meshed.weight, 10_000);
    assert_eq!(meshed.metric_labels["pod"], "p0");
    assert_eq!(meshed.metric_labels["serviceaccount"], "default");
    assert_eq!((&plain.tls_identity, &plain.protocol_hint), (&None, &None));
    assert_eq!(plain.metric_labels["pod"], "p1");
}

proptest! {
    #[test]
    fn a_client_that_applies_every_message_knows_the_newest_snapshot(
        states in proptest::collection::vec(
            (proptest::bool::weighted(0.9), proptest::collection::vec(0..4_u8, 0..6)), 1..12
        )
    ) {
        let (mut told, mut client) = (Told::nothing(80, None), Client::default());
        for (exists, forms) in states {
            let snapshot = snapshot(exists, &forms);
            let before = client.addrs.clone();
            let updates = told.update(&snapshot);
            let changed = client.exists.is_none() || expected(&snapshot) != client;
            let mut was_empty = false;
            for update in updates {
                client.apply(update);
                was_empty |= client.addrs.is_empty();
            }
            let expected = expected(&snapshot);
            prop_assert_eq!(&client, &expected);
            // Between two sets that are not empty nothing is ever empty.
            prop_assert!(before.is_empty() || expected.addrs.is_empty() || !was_empty);
            // A pod that was made again under its name looks the same and is told again.
            prop_assert!(!changed || told.update(&snapshot).is_empty());
        }
    }
}
