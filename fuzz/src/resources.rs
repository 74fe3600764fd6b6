//! What others keep in the API server: objects that discovery follows, and an issuer of cert-manager's.

use std::collections::BTreeMap;

use serde_json::json;
use steadfast_control::index::{Index, Kind, MeshNames, Name, Object};
use steadfast_identity::authority;
use steadfast_identity::issuer_source;
use zeroize::Zeroizing;

/// Any bytes are an object of some kinds or of none; what an index makes of one follows from what is
/// in it alone, and is gone with it.
pub(crate) fn resources(input: &[u8]) -> bool {
    let names = MeshNames {
        trust_domain: "cluster.local".parse().expect("a trust domain"),
        control_namespace: "steadfast".to_owned(),
    };
    let mut index = Index::new(names);
    let name = || Name::new("demo", "web");
    let mut read = 0;
    for kind in Kind::ALL {
        let key = format!("resources/{}/demo/web", kind.as_str());
        let Ok(object) = Object::parse(kind, &key, input, &mut Vec::new()) else { continue };
        read += 1;
        index.put(name(), object);
        let once = index.service(&name());
        assert_eq!(index.service(&name()), once);
    }
    let before = index.take_dirty();
    for address in before.addresses {
        index.address(address);
    }
    for kind in Kind::ALL {
        index.delete(kind, name());
        assert_eq!(index.count(kind), 0);
    }
    read > 0
}

pub(crate) fn resources_seeds() -> Vec<Vec<u8>> {
    let external = json!({
        "metadata": { "labels": { "app": "web" } },
        "spec": {
            "meshTLS": { "identity": "spiffe://cluster.local/ns/a/sa/b", "serverName": "x" },
            "ports": [{ "name": "http", "port": 80 }],
            "workloadIPs": [{ "ip": "10.0.0.1" }],
        },
        "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
    });
    let server = json!({ "metadata": {}, "spec": {
        "podSelector": { "matchExpressions": [{ "key": "a", "operator": "Exists" }] },
        "port": "http", "proxyProtocol": "opaque",
    }});
    let slice = json!({
        "metadata": { "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4", "ports": [{ "port": 80 }],
        "endpoints": [{ "addresses": ["10.0.0.1"], "targetRef": { "kind": "Pod", "name": "web" } }],
    });
    let service = json!({ "metadata": {}, "spec": {
        "clusterIP": "10.96.0.1", "selector": { "app": "web" },
        "ports": [{ "port": 80, "targetPort": "http" }],
    }});
    let pod = json!({
        "metadata": { "annotations": { "linkerd.io/inject": "enabled" } },
        "spec": { "containers": [{ "name": "c", "ports": [{ "containerPort": 80 }] }] },
        "status": { "podIP": "10.0.0.1" },
    });
    [external, server, slice, service, pod].iter().map(|o| o.to_string().into_bytes()).collect()
}

/// Any two texts, with a zero byte in between, are the key and the certificate of an issuer, or are
/// refused in words.
pub(crate) fn issuer_secret(input: &[u8]) -> bool {
    let mut parts = input.splitn(2, |byte| *byte == 0);
    let (key, certificate) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let entry = |name: &str, text: &[u8]| (name.to_owned(), Zeroizing::new(text.to_vec()));
    let entries = BTreeMap::from([
        entry("tls.crt", certificate),
        entry("tls.key", key),
        entry("ca.crt", certificate),
    ]);
    match issuer_source::check(&entries) {
        Ok(issuer) => {
            assert_eq!(issuer.roots.first(), Some(&issuer.id), "both are the same text");
            true
        }
        Err(why) => {
            assert!(!why.is_empty());
            false
        }
    }
}

pub(crate) fn issuer_secret_seeds() -> Vec<Vec<u8>> {
    let now = steadfast_api::UnixTime::from_secs(1_795_262_400);
    let made = authority::found(&"cluster.local".parse().expect("a trust domain"), now);
    let issuer = made.expect("it is made").issuer;
    let pem = |label: &str, der: &[u8]| pem::encode(&pem::Pem::new(label, der));
    let (key, certificate) = (pem("PRIVATE KEY", &issuer.pkcs8), pem("CERTIFICATE", &issuer.der));
    [key.clone() + "\0" + &certificate, certificate + "\0" + &key, key]
        .map(String::into_bytes)
        .into()
}
