//! Where each key of the store lies in the API server.

use kube::core::ApiResource;

use crate::names::{ObjectName, check_namespace, parse_resource_key};
use crate::store::{
    ISSUER_PROPOSAL_KEY, ISSUER_REQUESTS_PREFIX, LEADER_KEY, MIRRORS_PREFIX, TRUST_DOMAIN_KEY,
};

/// What a key is to the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The state of the trust domain.
    Domain,
    /// Which controller of rotations leads.
    Leader,
    /// The mirror of the bundle in this namespace.
    Mirror(String),
    /// Anything else of ours, by the name of its ConfigMap.
    Record(Scope, String),
    /// An object of somebody else's.
    Resource(&'static Kind, ObjectName),
}

/// Who may write a record: the namespace that it lies in says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// The controller of rotations alone.
    Anchors,
    /// Identity too.
    Control,
}

/// A kind of object that is read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Kind {
    /// As it stands in a key of the store.
    pub(super) kind: &'static str,
    group: &'static str,
    version: &'static str,
    plural: &'static str,
}

impl Place {
    /// Where this key lies; `None`: nothing with this key is kept here.
    pub(super) fn of(key: &str) -> Option<Self> {
        match key {
            TRUST_DOMAIN_KEY => return Some(Self::Domain),
            LEADER_KEY => return Some(Self::Leader),
            _ => {}
        }
        if let Some(namespace) = key.strip_prefix(MIRRORS_PREFIX) {
            return check_namespace(namespace).ok().map(|()| Self::Mirror(namespace.to_owned()));
        }
        if let Some((kind, name)) = parse_resource_key(key) {
            return Some(Self::Resource(Kind::find(kind)?, name));
        }
        let name = key.strip_prefix(RECORDS_PREFIX)?;
        let plain = |part: &str| {
            let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
            !part.is_empty()
                && part.bytes().all(inner)
                && !part.starts_with('-')
                && !part.ends_with('-')
        };
        // A `.` of its own would be taken for a `/`.
        let whole = name.split('/').all(plain);
        whole.then(|| Self::Record(Scope::of(key), name.replace('/', ".")))
    }

    /// The key of the record that a ConfigMap of this name is.
    pub(super) fn record_key(name: &str) -> String {
        format!("{RECORDS_PREFIX}{}", name.replace('.', "/"))
    }
}

impl Scope {
    /// Where records lie whose keys begin so.
    pub(super) fn of(prefix: &str) -> Self {
        let identitys = prefix.starts_with(ISSUER_REQUESTS_PREFIX) || prefix == ISSUER_PROPOSAL_KEY;
        if identitys { Self::Control } else { Self::Anchors }
    }
}

impl Kind {
    /// The state of the trust domain.
    pub(super) const DOMAIN: &'static Self = &Self {
        kind: "TrustDomain",
        group: "trust.steadfast.dev",
        version: "v1alpha1",
        plural: "trustdomains",
    };
    /// The election of a leader.
    pub(super) const LEASE: &'static Self =
        &Self { kind: "Lease", group: "coordination.k8s.io", version: "v1", plural: "leases" };
    /// A record.
    pub(super) const RECORD: &'static Self =
        &Self { kind: "ConfigMap", group: "", version: "v1", plural: "configmaps" };

    /// The kind of this name, if it is one that is read.
    pub(super) fn find(kind: &str) -> Option<&'static Self> {
        KINDS.iter().find(|known| known.kind == kind)
    }

    /// How the API server calls it.
    pub(super) fn resource(&self) -> ApiResource {
        let Self { kind, group, version, plural } = self;
        ApiResource {
            group: (*group).to_owned(),
            version: (*version).to_owned(),
            api_version: if group.is_empty() {
                (*version).to_owned()
            } else {
                format!("{group}/{version}")
            },
            kind: (*kind).to_owned(),
            plural: (*plural).to_owned(),
        }
    }
}

const RECORDS_PREFIX: &str = "trust/";

/// Every kind that is read.
static KINDS: [Kind; 7] = [
    Kind {
        kind: "EndpointSlice",
        group: "discovery.k8s.io",
        version: "v1",
        plural: "endpointslices",
    },
    Kind {
        kind: "ExternalWorkload",
        group: "workload.linkerd.io",
        version: "v1beta1",
        plural: "externalworkloads",
    },
    Kind { kind: "Server", group: "policy.linkerd.io", version: "v1beta3", plural: "servers" },
    Kind { kind: "Namespace", group: "", version: "v1", plural: "namespaces" },
    Kind { kind: "Pod", group: "", version: "v1", plural: "pods" },
    Kind { kind: "Service", group: "", version: "v1", plural: "services" },
    Kind { kind: "ServiceAccount", group: "", version: "v1", plural: "serviceaccounts" },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_kept_is_found_again_by_the_name_of_its_object() {
        for (key, expected) in [
            ("trust/ledger/7", Scope::Anchors),
            ("trust/evidence/1/2/0a/0", Scope::Anchors),
            ("trust/issuer-requests/9", Scope::Control),
            ("trust/issuer-proposal", Scope::Control),
        ] {
            let Some(Place::Record(scope, name)) = Place::of(key) else { panic!("{key}") };
            assert_eq!(Place::record_key(&name), key);
            assert_eq!(scope, expected, "{key}");
        }
        assert_eq!(Place::of("trust/domain"), Some(Place::Domain));
        assert_eq!(Place::of("trust/rotation-leader"), Some(Place::Leader));
        assert_eq!(Place::of("mirrors/demo"), Some(Place::Mirror("demo".to_owned())));
        for other in ["mirrors/", "mirrors/a/b"] {
            assert_eq!(Place::of(other), None, "{other}");
        }
        for other in ["tokens/jwks", "trust/", "trust/a.b", "trust/../x", "resources/Node//n", "x"]
        {
            assert_eq!(Place::of(other), None, "{other}");
        }
    }
}
