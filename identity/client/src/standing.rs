//! Whether the trust bundle of now still vouches for a connection that an older one let in.
//!
//! Pure. A handshake is judged once, and its connection may go on for days; meanwhile an anchor is
//! withdrawn, or an issuer denied. A [`Footing`] remembers what both ends of a connection stand on,
//! so that each new bundle can be asked about it. Nothing here ends a connection.

use std::sync::Arc;

use steadfast_api::{Code, KeyId, SpiffeId};

use crate::context::TlsContext;
use crate::trust::Trust;
use crate::verify::VerifiedPeer;

/// What the two ends of a connection by mutual TLS stand on. No key is in it, so a long connection
/// keeps none alive.
#[derive(Clone, Debug, Default)]
pub struct Footing {
    own: Option<Arc<VerifiedPeer>>,
    peer: Option<Arc<VerifiedPeer>>,
}

/// What a bundle says of a connection, from the best to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// A handshake of now would get the same answer.
    Good,
    /// An anchor was withdrawn: nothing new may begin, what runs may end in good order.
    Withdrawn(End, KeyId),
    /// An issuer was denied, since its key is in other hands: nothing may go on.
    Denied(End, KeyId),
}

/// An end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// Ours.
    Own,
    /// The other one.
    Peer,
}

impl Footing {
    /// Of a connection that was made with this snapshot, to this peer if it has shown itself.
    pub fn new(context: &TlsContext, peer: Option<Arc<VerifiedPeer>>) -> Self {
        Self::between(context.svid.as_ref().map(|svid| svid.verified().clone()), peer)
    }

    /// Of a connection between these two.
    pub fn between(own: Option<Arc<VerifiedPeer>>, peer: Option<Arc<VerifiedPeer>>) -> Self {
        Self { own, peer }
    }

    /// What this bundle says of it: the worst that it says of either end.
    pub fn standing(&self, trust: &Trust) -> Standing {
        let own = self.own.as_deref().map(|own| standing(End::Own, own, trust));
        let peer = self.peer.as_deref().map(|peer| standing(End::Peer, peer, trust));
        own.into_iter().chain(peer).max().unwrap_or(Standing::Good)
    }

    /// Who we are in it.
    pub fn own_id(&self) -> Option<&SpiffeId> {
        self.own.as_deref().map(|own| &own.id)
    }

    /// Who signed our own SVID.
    pub fn own_issuer(&self) -> Option<KeyId> {
        self.own.as_deref().map(|own| own.issuer)
    }

    /// Who the peer is; `None`: it has shown no certificate.
    pub fn peer_id(&self) -> Option<&SpiffeId> {
        self.peer.as_deref().map(|peer| &peer.id)
    }
}

impl Standing {
    /// Why the connection has to end; `None`: it has not.
    pub const fn code(self) -> Option<Code> {
        match self {
            Self::Good => None,
            Self::Withdrawn(End::Own, _) => Some(Code::SVID_ANCHOR_WITHDRAWN),
            Self::Withdrawn(End::Peer, _) => Some(Code::PEER_ANCHOR_WITHDRAWN),
            Self::Denied(End::Own, _) => Some(Code::SVID_ISSUER_DENIED),
            Self::Denied(End::Peer, _) => Some(Code::PEER_ISSUER_DENIED),
        }
    }
}

/// The same rules by which a handshake is judged, without those of time: an SVID that ends takes no
/// connection with it.
fn standing(end: End, verified: &VerifiedPeer, trust: &Trust) -> Standing {
    if let Some(denied) = verified.issuers.iter().find(|id| trust.denied().contains(id)) {
        return Standing::Denied(end, *denied);
    }
    if trust.anchors().iter().all(|anchor| anchor.id() != verified.anchor) {
        return Standing::Withdrawn(end, verified.anchor);
    }
    Standing::Good
}
