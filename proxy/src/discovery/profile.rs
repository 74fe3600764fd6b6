//! What stands behind an address that a client dialled.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use linkerd2_proxy_api::destination::DestinationProfile;

use super::authority::Authority;
use super::endpoint::{Endpoint, Unusable};

/// What the control plane says of an original destination.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// One known endpoint (a pod was dialled by its address): no balancing.
    Endpoint {
        /// Where the connection goes.
        endpoint: Arc<Endpoint>,
        /// Not to be looked into.
        opaque: bool,
    },
    /// Nothing is known of this address: the connection goes where the client wanted, in
    /// plaintext.
    Foreign {
        /// Not to be looked into.
        opaque: bool,
    },
    /// The control plane has not answered yet.
    #[default]
    Pending,
    /// A service: the connection is balanced over the endpoints of this name.
    Service {
        /// What [`super::Discovery::endpoints`] is to be asked for.
        authority: Authority,
        /// Not to be looked into.
        opaque: bool,
    },
    /// The control plane describes the destination in a way that cannot be used: nothing may be
    /// sent there, least of all plaintext.
    Unusable(Arc<str>),
}

impl Profile {
    /// Parses a profile of this original destination.
    pub(super) fn parse(orig_dst: SocketAddr, wire: DestinationProfile) -> Result<Self, Unusable> {
        let opaque = wire.opaque_protocol;
        if let Some(endpoint) = wire.endpoint {
            let endpoint = Arc::new(Endpoint::parse(endpoint, &HashMap::new())?);
            return Ok(Self::Endpoint { endpoint, opaque });
        }
        if wire.fully_qualified_name.is_empty() {
            return Ok(Self::Foreign { opaque });
        }
        let authority = Authority::new(&wire.fully_qualified_name, orig_dst.port());
        Ok(Self::Service { authority: authority.map_err(|_| Unusable::Address)?, opaque })
    }
}

#[cfg(test)]
mod tests {
    use linkerd2_proxy_api::destination::{TlsIdentity, WeightedAddr};

    use super::*;

    fn parse(wire: DestinationProfile) -> Result<Profile, Unusable> {
        Profile::parse("10.0.0.9:8080".parse().unwrap(), wire)
    }

    fn endpoint(tls_identity: Option<TlsIdentity>) -> DestinationProfile {
        let addr: SocketAddr = "10.0.0.1:80".parse().unwrap();
        let endpoint = WeightedAddr { addr: Some(addr.into()), tls_identity, ..Default::default() };
        DestinationProfile { endpoint: Some(endpoint), ..DestinationProfile::default() }
    }

    #[test]
    fn a_profile_says_what_stands_behind_an_address() {
        let unknown = DestinationProfile { opaque_protocol: true, ..Default::default() };
        assert_eq!(parse(unknown.clone()), Ok(Profile::Foreign { opaque: true }));
        let fully_qualified_name = "web.demo.svc.cluster.local".to_owned();
        let service = DestinationProfile { fully_qualified_name, ..unknown };
        let authority = Authority::new("web.demo.svc.cluster.local", 8080).unwrap();
        assert_eq!(parse(service), Ok(Profile::Service { authority, opaque: true }));
        assert!(matches!(parse(endpoint(None)), Ok(Profile::Endpoint { opaque: false, .. })));
    }

    #[test]
    fn a_profile_that_cannot_be_understood_is_unusable_and_not_foreign() {
        assert_eq!(parse(endpoint(Some(TlsIdentity::default()))), Err(Unusable::IdentityKind));
        let fully_qualified_name = "no name".to_owned();
        let wire = DestinationProfile { fully_qualified_name, ..Default::default() };
        assert_eq!(parse(wire), Err(Unusable::Address));
    }
}
