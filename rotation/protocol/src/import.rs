//! What comes from somebody else's CA: an anchor, whose key is perhaps never seen here, and the
//! issuers that it signs.
//!
//! What an external tool makes is a proposal. An anchor becomes one of the trust domain's by being
//! imported, is published by the rotation that is ordered with it, and leaves by another; an issuer
//! is used once its anchor's turn has come. Whether the certificates are any good is for those to
//! say who can read them, before this; here is what the trust domain already knows.

use serde::{Deserialize, Serialize};
use steadfast_api::KeyId;

use crate::orders::OrderRefused;
use crate::trust_domain::{
    AnchorRecord, AnchorState, Condemned, IssuerRecord, TrustDomainState, WantedIssuer,
};

/// Why an anchor or issuer is not taken: what is in the way, and what would help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportRefused {
    /// It signs already, or waits to.
    #[error("the issuer {0} is in this trust domain already: nothing is left to do")]
    IssuerThere(String),
    /// It is there.
    #[error(
        "the anchor {id} is in this trust domain already ({state}): nothing is left to do; \
         `steadfast anchor rotate --anchor` makes one active that is not published yet"
    )]
    AnchorThere {
        /// Which.
        id: String,
        /// In which state.
        state: String,
    },
    /// The same key with another certificate.
    #[error(
        "the key of this anchor, {0}, is that of an anchor which is there with another certificate: \
         a new certificate for an old key is no rotation, since whoever has the key has both; make \
         a new key for the new anchor"
    )]
    OldKey(String),
    /// It was forgotten a moment ago.
    #[error(
        "the key of the anchor {0} is being destroyed by steadfast-rotation, since the anchor was \
         forgotten: try again when that is done"
    )]
    Condemned(String),
    /// It would be its own issuer.
    #[error(
        "the key of this anchor, {0}, is that of an issuer of this trust domain: an anchor has a \
         key of its own; make a new one"
    )]
    IssuersKey(String),
    /// It cannot be used now.
    #[error(transparent)]
    Order(#[from] OrderRefused),
    /// It was withdrawn.
    #[error(
        "the anchor {0} was withdrawn from this trust domain, and what is withdrawn never comes \
         back: make an anchor with a new key"
    )]
    Tombstoned(String),
    /// More than anybody prepares.
    #[error(
        "{ANCHORS_WAITING_MAX} imported anchors wait for a rotation already; forget one first: \
         `steadfast anchor withdraw ID`"
    )]
    TooMany,
    /// Its key is here.
    #[error(
        "the anchor {0} is not external: the controller signs its issuers itself, and there is \
         nothing to request"
    )]
    NotExternal(String),
    /// Nobody has asked for it.
    #[error(
        "nobody has asked for an issuer with the key {key} under the anchor {anchor}: run \
         `steadfast issuer request` and sign what it prints"
    )]
    Unasked {
        /// Of the issuer.
        key: String,
        /// Its anchor.
        anchor: String,
    },
    /// Part of a rotation.
    #[error(
        "the anchor {0} is part of the rotation that is ordered or under way: abort that first"
    )]
    InUse(String),
}

/// What another tool keeps as the issuer of the mesh, as identity has found it. It is an object of
/// its own: what becomes of it is for the controller to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuerProposal {
    /// Where it was found, for people.
    pub source: String,
    /// The issuer, whose key identity keeps; or what is wrong with what is there.
    pub found: Result<ProposedIssuer, String>,
}

/// An issuer that another tool has made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProposedIssuer {
    /// SHA-256 of its SPKI.
    pub id: KeyId,
    /// Where identity keeps the key, for people.
    pub key_ref: String,
    /// Its certificate, and those between it and its anchor, in PEM.
    pub pem: String,
    /// The roots that the tool names, by the SHA-256 of their SPKI.
    pub roots: Vec<KeyId>,
}

impl TrustDomainState {
    /// Takes an anchor in that another CA has made. It is in no bundle before a rotation is ordered
    /// with it. Its key is external, unless the record says where ours has it.
    ///
    /// # Errors
    /// [`ImportRefused`]; nothing has changed then.
    pub fn import_anchor(&mut self, anchor: AnchorRecord) -> Result<KeyId, ImportRefused> {
        self.check_halt()?;
        let id = anchor.id;
        if self.tombstones.contains(&id) {
            return Err(ImportRefused::Tombstoned(id.to_string()));
        }
        if let Some(there) = self.anchor(id) {
            let (id, state) = (id.to_string(), format!("{:?}", there.state).to_lowercase());
            return Err(match there.der == anchor.der {
                true => ImportRefused::AnchorThere { id, state },
                false => ImportRefused::OldKey(id),
            });
        }
        if self.issuer(id).is_some() || self.denies(id) {
            return Err(ImportRefused::IssuersKey(id.to_string()));
        }
        // Whoever destroys it would take the new one's key for the old one's.
        if self.condemned.contains(&Condemned::Anchor(id)) {
            return Err(ImportRefused::Condemned(id.to_string()));
        }
        if self.in_state(AnchorState::Generated).count() >= ANCHORS_WAITING_MAX {
            return Err(ImportRefused::TooMany);
        }
        self.anchors.push(AnchorRecord { state: AnchorState::Generated, taint: None, ..anchor });
        Ok(id)
    }

    /// Forgets an anchor that was imported and never published. A key of it that we keep is
    /// destroyed. What lists it does not bring it back.
    ///
    /// # Errors
    /// It is not there, or was published, or a rotation has been ordered with it.
    pub fn forget_anchor(&mut self, id: KeyId) -> Result<(), ImportRefused> {
        self.check_halt()?;
        let there = self.anchor(id).filter(|anchor| anchor.state == AnchorState::Generated);
        if there.is_none() {
            return Err(OrderRefused::NoAnchor(id.to_string()).into());
        }
        let requested = self.requested.as_ref().and_then(|request| request.anchor) == Some(id);
        if requested || self.rotation.as_ref().is_some_and(|rotation| rotation.aims_at(id)) {
            return Err(ImportRefused::InUse(id.to_string()));
        }
        self.turn_away(id);
        self.take_back(id);
        Ok(())
    }

    /// The wish for an issuer under this external anchor: the one that is open, or a new one, made
    /// at this revision of the state.
    ///
    /// # Errors
    /// There is no such anchor whose key is in good hands, its key is ours, or nothing is issued until a person has looked.
    pub fn request_issuer(
        &mut self,
        anchor_id: KeyId,
        revision: u64,
    ) -> Result<WantedIssuer, ImportRefused> {
        self.check_halt()?;
        let signs = |a: &&AnchorRecord| a.state != AnchorState::Withdrawn && a.taint.is_none();
        let anchor = self.anchor(anchor_id).filter(signs);
        let anchor = anchor.ok_or_else(|| OrderRefused::NoAnchor(anchor_id.to_string()))?;
        if !anchor.is_external() {
            return Err(ImportRefused::NotExternal(anchor_id.to_string()));
        }
        self.want_issuer(anchor_id, revision, false);
        let open = self.wanted_external.iter().find(|wanted| wanted.anchor_id == anchor_id);
        open.copied().ok_or_else(|| OrderRefused::NoAnchor(anchor_id.to_string()).into())
    }

    /// Takes an issuer in that an external anchor's CA has signed, as the answer to this wish. It
    /// signs SVIDs once its anchor is the active one and every replica has it loaded.
    ///
    /// # Errors
    /// [`ImportRefused`]; nothing has changed then.
    pub fn import_issuer(
        &mut self,
        wanted: WantedIssuer,
        issuer: IssuerRecord,
    ) -> Result<(), ImportRefused> {
        self.check_halt()?;
        if self.issuer(issuer.id).is_some() {
            return Err(ImportRefused::IssuerThere(issuer.id.to_string()));
        }
        let asked = wanted.anchor_id == issuer.anchor_id && self.wanted_external.contains(&wanted);
        if !asked || self.denies(issuer.id) {
            let (key, anchor) = (issuer.id.to_string(), issuer.anchor_id.to_string());
            return Err(ImportRefused::Unasked { key, anchor });
        }
        self.wanted_external.retain(|open| *open != wanted);
        self.issuers.push(issuer);
        Ok(())
    }

    /// Every issuer that identity is to make a key for: the controller signs one, persons the rest.
    pub fn wishes(&self) -> impl Iterator<Item = WantedIssuer> {
        self.wanted_issuer.into_iter().chain(self.wanted_external.iter().copied())
    }
}

/// Imported anchors that wait for a rotation: one is usual, and each is in every read of the state.
pub const ANCHORS_WAITING_MAX: usize = 8;
