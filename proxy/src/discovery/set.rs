//! The endpoints of one target, as they follow from the messages of its stream.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use linkerd2_proxy_api::destination::{Update, update};

use super::endpoint::{Endpoint, Unusable, parse_addr};

/// What is known of a target: one immutable snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Endpoints {
    /// The service exists.
    Known {
        /// Its usable endpoints by address; empty when it has none.
        endpoints: Vec<Arc<Endpoint>>,
        /// How many more it has that cannot be used.
        unusable: usize,
    },
    /// The control plane knows no such service.
    Missing,
    /// The control plane has not answered yet.
    #[default]
    Pending,
    /// The control plane says that this is no name of a service; asking again is of no use.
    Refused(Arc<str>),
}

/// The endpoints of one target while its streams come and go.
#[derive(Debug, Default)]
pub(super) struct Set {
    endpoints: BTreeMap<SocketAddr, Result<Arc<Endpoint>, Unusable>>,
    /// `None`: nothing was said yet.
    exists: Option<bool>,
    /// Whether this stream has spoken: what an earlier one said is stale, and holds until then.
    spoken: bool,
}

impl Set {
    /// A new stream begins: what is known stays until its first message.
    pub(super) fn reconnected(&mut self) {
        self.spoken = false;
    }

    /// Applies one message; returns the endpoints that are unusable since it.
    pub(super) fn apply(&mut self, update: Update) -> Vec<(Option<SocketAddr>, Unusable)> {
        // A kind of message that this proxy is too old for says nothing to it.
        let Some(update) = update.update else { return Vec::new() };
        // Only what says how things are, and not how they change, replaces what is known.
        let whole = matches!(update, update::Update::Add(_) | update::Update::NoEndpoints(_));
        let first = whole && !std::mem::replace(&mut self.spoken, true);
        let before = if first { std::mem::take(&mut self.endpoints) } else { BTreeMap::new() };
        self.exists = Some(true);
        let mut unusable = Vec::new();
        match update {
            update::Update::Add(set) => {
                for wire in set.addrs {
                    let addr = wire.addr.as_ref().and_then(parse_addr);
                    let endpoint = Endpoint::parse(wire, &set.metric_labels).map(Arc::new);
                    // Without an address there is nothing to remember it by, nor to dial.
                    let known =
                        addr.and_then(|a| before.get(&a).or_else(|| self.endpoints.get(&a)));
                    if let Err(reason) = &endpoint
                        && known != Some(&endpoint)
                    {
                        unusable.push((addr, reason.clone()));
                    }
                    if let Some(addr) = addr {
                        self.endpoints.insert(addr, endpoint);
                    }
                }
            }
            update::Update::NoEndpoints(none) => {
                self.endpoints.clear();
                self.exists = Some(none.exists);
            }
            update::Update::Remove(removed) => {
                for addr in removed.addrs.iter().filter_map(parse_addr) {
                    self.endpoints.remove(&addr);
                }
            }
        }
        unusable
    }

    /// The snapshot of now.
    pub(super) fn snapshot(&self) -> Endpoints {
        match self.exists {
            None => return Endpoints::Pending,
            Some(false) => return Endpoints::Missing,
            Some(true) => {}
        }
        let endpoints: Vec<_> = self
            .endpoints
            .values()
            .filter_map(|endpoint| endpoint.as_ref().ok().cloned())
            .collect();
        let unusable = self.endpoints.len() - endpoints.len();
        Endpoints::Known { endpoints, unusable }
    }
}

#[cfg(test)]
mod tests {
    use linkerd2_proxy_api::destination::protocol_hint::{H2, OpaqueTransport, Protocol};
    use linkerd2_proxy_api::destination::tls_identity::{
        DnsLikeIdentity, Strategy, UriLikeIdentity,
    };
    use linkerd2_proxy_api::destination::{
        AddrSet, NoEndpoints, ProtocolHint, TlsIdentity, WeightedAddr, WeightedAddrSet,
    };
    use linkerd2_proxy_api::net::TcpAddress;

    use super::*;
    use crate::discovery;

    const WEB: &str = "web.demo.serviceaccount.identity.steadfast.cluster.local";

    fn addr(port: u16) -> SocketAddr {
        ([10, 0, 0, 1], port).into()
    }

    fn plain(port: u16) -> WeightedAddr {
        WeightedAddr { addr: Some(addr(port).into()), weight: 1, ..WeightedAddr::default() }
    }

    fn dns(name: &str) -> DnsLikeIdentity {
        DnsLikeIdentity { name: name.to_owned() }
    }

    fn meshed(port: u16, name: &str) -> WeightedAddr {
        let strategy = Some(Strategy::DnsLikeIdentity(dns(name)));
        let identity = TlsIdentity { strategy, server_name: Some(dns(name)) };
        WeightedAddr { tls_identity: Some(identity), ..plain(port) }
    }

    fn add(addrs: Vec<WeightedAddr>) -> Update {
        let metric_labels = [("service".to_owned(), "web".to_owned())].into();
        Update { update: Some(update::Update::Add(WeightedAddrSet { addrs, metric_labels })) }
    }

    fn remove(port: u16) -> Update {
        let addrs = vec![addr(port).into()];
        Update { update: Some(update::Update::Remove(AddrSet { addrs })) }
    }

    fn none(exists: bool) -> Update {
        Update { update: Some(update::Update::NoEndpoints(NoEndpoints { exists })) }
    }

    fn ports(set: &Set) -> Vec<u16> {
        match set.snapshot() {
            Endpoints::Known { endpoints, .. } => endpoints.iter().map(|e| e.addr.port()).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_add_up() {
        let mut set = Set::default();
        set.apply(add(vec![plain(1), plain(2)]));
        set.apply(add(vec![plain(3)]));
        set.apply(remove(1));
        assert_eq!(ports(&set), [2, 3]);
        set.apply(none(true));
        assert!(ports(&set).is_empty());
        set.apply(none(false));
        assert_eq!(set.snapshot(), Endpoints::Missing);
        set.apply(add(vec![plain(4)]));
        assert_eq!(ports(&set), [4]);
    }

    #[test]
    fn what_is_known_stays_until_a_new_stream_speaks_and_then_is_replaced() {
        let mut set = Set::default();
        set.apply(add(vec![plain(1), plain(2)]));
        set.reconnected();
        assert_eq!(ports(&set), [1, 2]);
        set.apply(add(vec![plain(2)]));
        assert_eq!(ports(&set), [2]);
    }

    #[test]
    fn a_message_of_an_unknown_kind_takes_no_endpoint_away() {
        let mut set = Set::default();
        set.apply(Update { update: None });
        assert_eq!(set.snapshot(), Endpoints::Pending);
        set.apply(add(vec![plain(1), plain(2)]));
        set.reconnected();
        set.apply(Update { update: None });
        assert_eq!(ports(&set), [1, 2]);
        set.apply(remove(1));
        assert_eq!(ports(&set), [2]);
        set.apply(add(vec![plain(3)]));
        assert_eq!(ports(&set), [3]);
    }

    #[test]
    fn an_endpoint_is_read_in_full() {
        let mut wire = meshed(80, WEB);
        wire.weight = 7;
        wire.metric_labels = [("pod".to_owned(), "web-1".to_owned())].into();
        wire.protocol_hint = Some(ProtocolHint {
            protocol: Some(Protocol::H2(H2 {})),
            opaque_transport: Some(OpaqueTransport { inbound_port: 4143 }),
        });
        let mut set = Set::default();
        assert!(set.apply(add(vec![wire])).is_empty());
        let Endpoints::Known { endpoints, unusable: 0 } = set.snapshot() else { panic!() };
        let endpoint = &endpoints[0];
        let identity = endpoint.identity.as_ref().unwrap();
        assert_eq!(identity.id.as_str(), "spiffe://cluster.local/ns/demo/sa/web");
        assert_eq!(identity.server_name.to_string(), WEB);
        assert_eq!((endpoint.weight, endpoint.inbound_port), (7, Some(4143)));
        assert_eq!(endpoint.protocol, discovery::ProtocolHint::Http2);
        let labels: Vec<_> = endpoint.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(labels, ["pod=web-1", "service=web"]);
    }

    #[test]
    fn an_identity_that_cannot_be_read_is_never_plaintext() {
        let identity = |strategy, server_name| {
            let tls_identity = Some(TlsIdentity { strategy, server_name });
            WeightedAddr { tls_identity, ..plain(1) }
        };
        let uri = |uri: &str| Strategy::UriLikeIdentity(UriLikeIdentity { uri: uri.to_owned() });
        let id = "spiffe://cluster.local/ns/demo/sa/web";
        let good = Strategy::DnsLikeIdentity(dns(WEB));
        for (reason, wire) in [
            ("identity_name", identity(Some(Strategy::DnsLikeIdentity(dns(""))), None)),
            ("server_name", meshed(1, "")),
            ("identity_name", identity(Some(Strategy::DnsLikeIdentity(dns("web.demo"))), None)),
            ("identity_name", identity(Some(uri("http://web")), Some(dns(WEB)))),
            ("server_name", identity(Some(good.clone()), Some(dns("")))),
            ("server_name", identity(Some(uri(id)), Some(dns("web")))),
            ("identity_kind", identity(Some(uri(id)), None)),
            ("identity_kind", identity(None, Some(dns(WEB)))),
            ("identity_kind", identity(None, None)),
        ] {
            let mut set = Set::default();
            let unusable = set.apply(add(vec![wire, plain(2)]));
            assert_eq!((unusable.len(), unusable[0].1.label()), (1, reason));
            assert_eq!(ports(&set), [2], "{reason}");
            assert!(matches!(set.snapshot(), Endpoints::Known { unusable: 1, .. }));
        }
        let good = identity(Some(uri(id)), Some(dns(WEB)));
        assert!(Set::default().apply(add(vec![good])).is_empty());
    }

    #[test]
    fn an_endpoint_that_becomes_unusable_is_no_longer_used_and_is_said_once() {
        let mut set = Set::default();
        set.apply(add(vec![meshed(1, WEB)]));
        assert_eq!(set.apply(add(vec![meshed(1, "?")])).len(), 1);
        assert!(ports(&set).is_empty());
        assert_eq!(set.apply(add(vec![meshed(1, "?")])).len(), 0);
        set.reconnected();
        assert_eq!(set.apply(add(vec![meshed(1, "?")])).len(), 0);
        set.apply(add(vec![meshed(1, WEB)]));
        assert_eq!(ports(&set), [1]);
    }

    #[test]
    fn a_port_is_not_cut_to_sixteen_bits() {
        let mut set = Set::default();
        let ip = TcpAddress::from(addr(1)).ip;
        for port in [0, 65_536, 65_616, u32::MAX] {
            let wire = WeightedAddr { addr: Some(TcpAddress { ip, port }), ..plain(1) };
            assert_eq!(set.apply(add(vec![wire]))[0].1, Unusable::Address);
        }
        assert_eq!(set.apply(add(vec![WeightedAddr::default()]))[0].1, Unusable::Address);
        let hint = ProtocolHint {
            protocol: None,
            opaque_transport: Some(OpaqueTransport { inbound_port: 70_000 }),
        };
        let wire = WeightedAddr { protocol_hint: Some(hint), ..plain(1) };
        assert_eq!(set.apply(add(vec![wire]))[0].1, Unusable::InboundPort(70_000));
        assert!(ports(&set).is_empty());
    }
}
