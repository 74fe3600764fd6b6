//! The workload's own SVID: its chain, its key, and what a renewal and a listing need to know.
//!
//! An [`OwnSvid`] exists only after everything about it was checked against what we believe: the
//! key is ours, the identity is ours, the chain verifies, and its life is not over.

use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use steadfast_api::svid::SvidError;
use steadfast_api::{KeyId, SpiffeId, Svid, UnixTime};

use crate::key::SvidKey;
use crate::observed::server_time;
use crate::trust::Trust;
use crate::verify::{PeerRefused, Role, VerifiedPeer, check_chain, spki_id};

/// A checked SVID of our own.
#[derive(Clone, Debug)]
pub struct OwnSvid {
    candidate: Candidate,
    verified: Arc<VerifiedPeer>,
}

/// What an issuer sent for our key and in our name; whether the chain holds is not known yet,
/// since the bundle that it needs may still be on its way.
#[derive(Clone, Debug)]
pub struct Candidate {
    facts: Svid,
    chain: Vec<CertificateDer<'static>>,
    key: SvidKey,
    issued_at: UnixTime,
}

/// What an issuer sent.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The SVID first, then its issuers, in DER.
    pub chain: Vec<Vec<u8>>,
    /// When it was made, by the issuer's clock.
    pub issued_at: UnixTime,
}

/// Why our SVID is of no use at some time. Its life is told by the identity service's clock; but
/// peers are judged by ours, and so is it, or a process would believe in an SVID like those that it
/// refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lapse {
    /// By the identity service's clock.
    Expired,
    /// By our clock alone.
    ExpiredHere,
    /// By our clock alone. It still is shown: peers whose clocks are right take it.
    NotYetValidHere,
}

/// Why a chain that an issuer sent cannot be our SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidRefused {
    /// The chain does not verify, or is of another identity.
    #[error("the chain does not hold: {} {}", .0.code.title(), .0.detail)]
    Chain(Box<PeerRefused>),
    /// No certificate in it.
    #[error("the reply holds no certificate")]
    Empty,
    /// No SVID.
    #[error("the certificate is no SVID")]
    Form(#[source] SvidError),
    /// Made for another identity.
    #[error("the SVID is of {found}, and we are {ours}")]
    Identity {
        /// The identity in the SVID.
        found: SpiffeId,
        /// Ours.
        ours: SpiffeId,
    },
    /// Made for another key than the one that was asked for.
    #[error("the SVID is for key {found}, and key {ours} asked for it")]
    Key {
        /// The key in the SVID.
        found: String,
        /// Ours.
        ours: String,
    },
}

impl Candidate {
    /// Checks that what was sent is an SVID for `key` and `expected`.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(issued: Issued, key: SvidKey, expected: &SpiffeId) -> Result<Self, SvidRefused> {
        let chain: Vec<CertificateDer<'static>> =
            issued.chain.into_iter().map(CertificateDer::from).collect();
        let Some(leaf) = chain.first() else { return Err(SvidRefused::Empty) };
        let facts = Svid::parse(leaf).map_err(SvidRefused::Form)?;
        if facts.key_id != key.id() {
            let (found, ours) = (facts.key_id.short(), key.id().short());
            return Err(SvidRefused::Key { found, ours });
        }
        if facts.spiffe_id != *expected {
            let (found, ours) = (facts.spiffe_id, expected.clone());
            return Err(SvidRefused::Identity { found, ours });
        }
        Ok(Self { facts, chain, key, issued_at: issued.issued_at })
    }

    /// What the certificate says.
    pub fn facts(&self) -> &Svid {
        &self.facts
    }

    /// The key that is sent as its issuer's; that it signed anything is not known yet.
    pub fn presented_issuer(&self) -> Option<KeyId> {
        self.chain.get(1).and_then(|der| spki_id(der))
    }

    /// Checks that the chain holds at `now`.
    ///
    /// # Errors
    /// [`SvidRefused::Chain`].
    pub fn verify(&self, trust: &Trust, now: UnixTime) -> Result<OwnSvid, SvidRefused> {
        let (leaf, intermediates) = self.chain.split_first().ok_or(SvidRefused::Empty)?;
        // It must serve in both roles: whatever refuses it here, a peer would refuse later.
        let check = |role| check_chain(role, leaf, intermediates, trust, now, None);
        check(Role::Client).map_err(SvidRefused::Chain)?;
        let verified = check(Role::Server).map_err(SvidRefused::Chain)?;
        Ok(OwnSvid { candidate: self.clone(), verified })
    }
}

impl OwnSvid {
    /// Checks what an issuer sent for `key`, all at once.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn check(
        issued: Issued,
        key: SvidKey,
        expected: &SpiffeId,
        trust: &Trust,
        now: UnixTime,
    ) -> Result<Self, SvidRefused> {
        Candidate::parse(issued, key, expected)?.verify(trust, now)
    }

    /// What the certificate says.
    pub fn facts(&self) -> &Svid {
        &self.candidate.facts
    }

    /// Who we are.
    pub fn id(&self) -> &SpiffeId {
        &self.candidate.facts.spiffe_id
    }

    /// The SVID first, then its issuers, in DER.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.candidate.chain
    }

    /// Its key.
    pub fn key(&self) -> &SvidKey {
        &self.candidate.key
    }

    /// When it was made, by the issuer's clock.
    pub fn issued_at(&self) -> UnixTime {
        self.candidate.issued_at
    }

    /// The anchor that its chain ends in.
    pub fn anchor(&self) -> KeyId {
        self.verified.anchor
    }

    /// The key that signed it.
    pub fn issuer(&self) -> KeyId {
        self.verified.issuer
    }

    /// How a peer that believes what we believe sees it.
    pub fn verified(&self) -> &Arc<VerifiedPeer> {
        &self.verified
    }

    /// Whether it is of no use when our clock says `now` and is off by so much. The one rule for
    /// handshakes and readiness.
    pub fn lapse(&self, now: UnixTime, clock_offset_ms: Option<i64>) -> Option<Lapse> {
        let facts = &self.candidate.facts;
        // To the end of its last second.
        let is_over = |at: UnixTime| at.as_secs() > facts.not_after.as_secs();
        if is_over(server_time(now, clock_offset_ms)) {
            Some(Lapse::Expired)
        } else if is_over(now) {
            Some(Lapse::ExpiredHere)
        } else {
            (now < facts.not_before).then_some(Lapse::NotYetValidHere)
        }
    }
}
