//! Texts that a peer or a configuration brings: identities, authorities, policies.

use steadfast_api::{DnsIdentity, SpiffeId, TrustDomain};
use steadfast_platform::standalone::manifests;
use steadfast_policy::{DefaultPolicy, Networks};
use steadfast_proxy::target::Target;

/// Whatever parses prints as it was written; an error shows a beginning only.
pub(crate) fn spiffe_id(input: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(input) else { return false };
    if let Ok(identity) = text.parse::<DnsIdentity>() {
        assert_eq!(identity.to_string(), text);
        assert_eq!(identity.spiffe_id().to_string().parse(), Ok(identity.spiffe_id()));
    }
    if let Ok(name) = text.parse::<TrustDomain>() {
        assert_eq!(name.id().to_string().parse(), Ok(name.id()));
    }
    match text.parse::<SpiffeId>() {
        Ok(id) => {
            assert_eq!(id.as_str(), text);
            assert!(id.is_member_of(&id.trust_domain()) && text.len() <= 2048);
            assert_eq!(format!("spiffe://{}{}", id.trust_domain_name(), id.path()), text);
            true
        }
        Err(error) => {
            assert!(error.to_string().len() < 2048);
            false
        }
    }
}

pub(crate) fn spiffe_id_seeds() -> Vec<Vec<u8>> {
    [
        "spiffe://cluster.local/ns/demo/sa/web",
        "spiffe://cluster.local",
        "spiffe://a/b/../c//d?e#f%20",
        "web.demo.serviceaccount.identity.steadfast.cluster.local",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

/// What is refused is refused at a line that the file has, in one line.
pub(crate) fn manifest(input: &[u8]) -> bool {
    match manifests::check(input) {
        Ok(objects) => objects > 0,
        Err(error) => {
            let lines = input.iter().filter(|byte| matches!(byte, b'\n' | b'\r')).count() as u64;
            assert!((1..=lines + 1).contains(&error.line) && error.column >= 1, "{error}");
            assert!(!error.reason.contains('\n'), "{error}");
            false
        }
    }
}

pub(crate) fn manifest_seeds() -> Vec<Vec<u8>> {
    let samples = include_str!("../../manifests/samples/two-programs.yaml");
    let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: ServiceAccount\n  \
        metadata: {name: web}\n- {apiVersion: v1, kind: Namespace, metadata: {name: demo}}\n";
    let slice = "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web-1}, \
        addressType: IPv4, ports: [{port: 80}], endpoints: [{addresses: [10.0.0.1]}]}";
    let aliases = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: &d {a: b}\nx: *d\n";
    [samples, list, slice, aliases].map(|text| text.as_bytes().to_vec()).into()
}

pub(crate) fn policy(input: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(input) else { return false };
    if let Ok(policy) = text.parse::<DefaultPolicy>() {
        assert_eq!(policy.as_str(), text);
    }
    let target = Target::parse(text, 80);
    if let Ok(target) = &target {
        assert_eq!(Target::parse(&target.to_string(), 80).as_ref(), Ok(target));
    }
    match text.parse::<Networks>() {
        Ok(networks) => {
            assert_eq!(networks.to_string().parse(), Ok(networks));
            true
        }
        Err(_) => target.is_ok(),
    }
}

pub(crate) fn policy_seeds() -> Vec<Vec<u8>> {
    ["10.0.0.0/8, fd00::/8", "all-authenticated", "db.prod:5432", "[::1]:80", "web.demo.svc"]
        .map(|text| text.as_bytes().to_vec())
        .into()
}
