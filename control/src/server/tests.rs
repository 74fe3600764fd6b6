//! The streams without a network: what they say, when they are silent, and that they are bounded.

use std::collections::BTreeSet;
use std::task::Poll;

use futures::StreamExt as _;
use linkerd2_proxy_api::destination::destination_server::Destination as _;
use linkerd2_proxy_api::destination::update;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tonic::Code;

use super::*;
use crate::board::Change;
use crate::index::{Kind, MeshNames, Name, Object};

struct Rig {
    board: Arc<Board>,
    drain: Drain,
    destination: Destination,
}

impl Rig {
    fn new(streams_max: usize) -> Self {
        let board = Arc::new(Board::new(MeshNames {
            trust_domain: "cluster.local".parse().unwrap(),
            control_namespace: "steadfast".to_owned(),
        }));
        let drain = Drain::new();
        let settings = DestinationSettings { streams_max, ..DestinationSettings::default() };
        let metrics = Metrics::new(&mut Registry::default());
        let destination = Destination::new(board.clone(), metrics, drain.clone(), settings);
        Self { board, drain, destination }
    }

    /// A rig whose resources are read, with a service `web` of so many endpoints.
    fn with_web(endpoints: usize) -> Self {
        let rig = Self::new(16);
        let ports = json!([{ "port": 80 }]);
        rig.put(Kind::ServiceAccount, "default", json!({}));
        rig.put(
            Kind::Service,
            "web",
            json!({ "spec": { "clusterIP": "10.96.0.1", "ports": ports } }),
        );
        rig.endpoints(endpoints, "enabled");
        rig.board.set_synced();
        rig
    }

    fn put(&self, kind: Kind, name: &str, value: Value) {
        let bytes = value.to_string();
        let object = Object::parse(kind, name, bytes.as_bytes(), &mut Vec::new()).unwrap();
        self.board.apply(vec![Change::Put(Name::new("demo", name), object)]);
    }

    fn endpoints(&self, count: usize, inject: &str) {
        let mut endpoints = Vec::new();
        for number in 0..count {
            let (ip, pod) = (format!("10.0.0.{number}"), format!("web-{number}"));
            let annotations = json!({ "linkerd.io/inject": inject });
            let value =
                json!({ "metadata": { "annotations": annotations }, "status": { "podIP": ip } });
            self.put(Kind::Pod, &pod, value);
            endpoints
                .push(json!({ "addresses": [ip], "targetRef": { "kind": "Pod", "name": pod } }));
        }
        let slice = json!({
            "metadata": { "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": "IPv4", "ports": [{ "port": 8080 }], "endpoints": endpoints,
        });
        self.put(Kind::EndpointSlice, "web", slice);
    }

    async fn get(&self, path: &str) -> Result<Messages<Update>, Status> {
        self.destination.get(Request::new(lookup(path))).await.map(Response::into_inner)
    }

    async fn profile(&self, path: &str) -> Result<Messages<DestinationProfile>, Status> {
        self.destination.get_profile(Request::new(lookup(path))).await.map(Response::into_inner)
    }
}

fn lookup(path: &str) -> GetDestination {
    GetDestination { path: path.to_owned(), ..GetDestination::default() }
}

/// The addresses of the messages that are there now, and how many messages that were.
fn read(stream: &mut Messages<Update>) -> (BTreeSet<String>, usize) {
    let (mut addrs, mut messages) = (BTreeSet::new(), 0);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    while let Poll::Ready(Some(message)) = stream.poll_next_unpin(&mut context) {
        messages += 1;
        if let Some(update::Update::Add(set)) = message.unwrap().update {
            addrs.extend(set.addrs.into_iter().map(|wire| {
                let meshed = if wire.tls_identity.is_some() { "meshed" } else { "plain" };
                let addr = std::net::SocketAddr::try_from(wire.addr.unwrap()).unwrap();
                format!("{addr} {meshed}")
            }));
        }
    }
    (addrs, messages)
}

#[tokio::test]
async fn nothing_is_said_before_the_resources_were_read() {
    let rig = Rig::new(16);
    let mut asked = std::pin::pin!(rig.get("web.demo:80"));
    assert!(futures::poll!(asked.as_mut()).is_pending());
    rig.board.set_synced();
    let first = asked.await.unwrap().next().await.unwrap().unwrap();
    let Some(update::Update::NoEndpoints(none)) = first.update else { panic!("{first:?}") };
    assert!(!none.exists);
}

#[tokio::test]
async fn a_slow_client_gets_the_newest_state_and_not_every_step() {
    let rig = Rig::with_web(20);
    let mut stream = rig.get("web.demo.svc.cluster.local:80").await.unwrap();
    assert_eq!(read(&mut stream).0.len(), 20);
    for _ in 0..10 {
        rig.endpoints(20, "disabled");
        rig.endpoints(19, "enabled");
    }
    rig.endpoints(20, "disabled");
    let (addrs, messages) = read(&mut stream);
    assert_eq!(messages, 1, "what lies between is coalesced");
    assert!(addrs.len() == 20 && addrs.iter().all(|addr| addr.ends_with("plain")));
}

#[tokio::test]
async fn a_change_that_says_nothing_new_is_not_sent() {
    let rig = Rig::with_web(2);
    let mut stream = rig.get("web.demo:80").await.unwrap();
    let mut profile = rig.profile("10.96.0.1:80").await.unwrap();
    read(&mut stream);
    profile.next().await.unwrap().unwrap();
    rig.endpoints(2, "enabled");
    rig.put(Kind::Pod, "other", json!({ "status": { "podIP": "10.0.9.9" } }));
    assert_eq!(read(&mut stream).1, 0);
    assert!(futures::poll!(profile.next()).is_pending());
}

#[tokio::test]
async fn streams_are_bounded_in_number_and_a_place_is_given_back() {
    let rig = Rig::new(2);
    rig.board.set_synced();
    let first = rig.get("a.demo:80").await.unwrap();
    let _second = rig.profile("b.demo:80").await.unwrap();
    let refused = rig.get("c.demo:80").await.err().unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    drop(first);
    assert!(rig.get("c.demo:80").await.is_ok());
}

#[tokio::test]
async fn what_names_no_service_is_refused_for_good() {
    let rig = Rig::with_web(1);
    let external = json!({ "spec": { "type": "ExternalName", "externalName": "example.com" } });
    rig.put(Kind::Service, "cname", external);
    for path in ["", "www.example.com:80", "10.0.0.1:80", "web:80", "cname.demo:80"] {
        let status = rig.get(path).await.err().unwrap();
        assert_eq!(status.code(), Code::InvalidArgument, "{path:?}");
    }
    for path in ["", "www.example.com:80", "cname.demo:80", "10.0.0.1:0"] {
        let status = rig.profile(path).await.err().unwrap();
        assert_eq!(status.code(), Code::InvalidArgument, "{path:?}");
    }
}

#[tokio::test]
async fn streams_end_when_the_process_drains() {
    let rig = Rig::with_web(1);
    let mut stream = rig.get("web.demo:80").await.unwrap();
    read(&mut stream);
    rig.drain.start();
    assert_eq!(stream.next().await.unwrap().err().unwrap().code(), Code::Unavailable);
    assert!(stream.next().await.is_none());
}

#[tokio::test]
async fn profiles_say_what_stands_behind_an_address() {
    let rig = Rig::with_web(1);
    let first = async |path: &str| rig.profile(path).await.unwrap().next().await.unwrap().unwrap();
    let service = first("10.96.0.1:80").await;
    assert_eq!(service.fully_qualified_name, "web.demo.svc.cluster.local");
    assert!(service.endpoint.is_none() && service.parent_ref.is_some());
    assert_eq!(first("web.demo:80").await, service);
    let pod = first("10.0.0.0:8080").await.endpoint.unwrap();
    assert!(pod.tls_identity.is_some());
    assert_eq!(pod.metric_labels["namespace"], "demo");
    let unknown = first("192.0.2.1:80").await;
    assert_eq!((unknown.fully_qualified_name.as_str(), unknown.endpoint), ("", None));
    assert!(!unknown.opaque_protocol && first("192.0.2.1:5432").await.opaque_protocol);
    assert_eq!(first("nobody.demo:80").await.fully_qualified_name, "");
}

#[tokio::test]
async fn an_address_that_becomes_known_is_told() {
    let rig = Rig::with_web(0);
    let mut stream = rig.profile("10.0.0.7:8080").await.unwrap();
    assert!(stream.next().await.unwrap().unwrap().endpoint.is_none());
    rig.endpoints(8, "enabled");
    assert!(stream.next().await.unwrap().unwrap().endpoint.unwrap().tls_identity.is_some());
    rig.endpoints(8, "disabled");
    assert!(stream.next().await.unwrap().unwrap().endpoint.unwrap().tls_identity.is_none());
}
