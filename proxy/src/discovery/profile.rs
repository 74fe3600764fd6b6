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
