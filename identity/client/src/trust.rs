//! What this workload believes: a trust bundle in the form that verifying needs.
//!
//! A [`Trust`] is immutable. It holds the anchors of one sequence number without those that are
//! withdrawn for ever, the issuers that are denied, and the outcomes of paths that were built
//! against exactly these anchors, so that a new bundle forgets them all.

use std::collections::BTreeSet;

use rustls_pki_types::CertificateDer;
use steadfast_api::bundle::{BundleError, digest};
use steadfast_api::{KeyId, TrustAnchor, TrustBundle, TrustDomain};
use x509_parser::prelude::{FromDer as _, ParsedExtension, X509Certificate};

use crate::outcomes::Outcomes;

/// A trust bundle, ready to verify with.
#[derive(Debug)]
pub struct Trust {
    bundle: TrustBundle,
    denied: BTreeSet<KeyId>,
    tombstones: BTreeSet<KeyId>,
    /// In the order of `bundle.anchors()`.
    pub(crate) roots: Vec<rustls_pki_types::TrustAnchor<'static>>,
    /// The subject key identifier of each anchor, where it has one; in the same order.
    pub(crate) key_identifiers: Vec<Option<Vec<u8>>>,
    pub(crate) outcomes: Outcomes,
}

impl Trust {
    /// Takes the bundle's anchors, less the withdrawn ones.
    ///
    /// # Errors
    /// [`BundleError::Empty`] when none is left, [`BundleError::Anchor`] for one that cannot be
    /// verified against.
    pub fn new(
        bundle: &TrustBundle,
        denied: impl IntoIterator<Item = KeyId>,
        tombstones: impl IntoIterator<Item = KeyId>,
    ) -> Result<Self, BundleError> {
        let tombstones: BTreeSet<KeyId> = tombstones.into_iter().collect();
        let live = bundle.anchors().iter().filter(|anchor| !tombstones.contains(&anchor.id()));
        let bundle = TrustBundle::new(
            bundle.trust_domain().clone(),
            bundle.sequence(),
            live.cloned().collect(),
        )?;
        let roots = bundle.anchors().iter().enumerate().map(root).collect::<Result<_, _>>()?;
        let key_identifiers = bundle.anchors().iter().map(|a| key_identifier(a.der())).collect();
        Ok(Self {
            bundle,
            denied: denied.into_iter().collect(),
            tombstones,
            roots,
            key_identifiers,
            outcomes: Outcomes::default(),
        })
    }

    /// Its sequence number.
    pub fn sequence(&self) -> u64 {
        self.bundle.sequence()
    }

    /// Whose bundle it is.
    pub fn trust_domain(&self) -> &TrustDomain {
        self.bundle.trust_domain()
    }

    /// The anchors that are believed, sorted by id.
    pub fn anchors(&self) -> &[TrustAnchor] {
        self.bundle.anchors()
    }

    /// The bundle without what is withdrawn.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// Issuers whose SVIDs are refused.
    pub fn denied(&self) -> &BTreeSet<KeyId> {
        &self.denied
    }

    /// Anchors that are withdrawn for ever.
    pub fn tombstones(&self) -> &BTreeSet<KeyId> {
        &self.tombstones
    }

    /// What an ack names.
    pub fn digest(&self) -> [u8; 32] {
        digest(self.anchors().iter().map(TrustAnchor::id), self.denied.iter().copied())
    }
}

fn root(
    (index, anchor): (usize, &TrustAnchor),
) -> Result<rustls_pki_types::TrustAnchor<'static>, BundleError> {
    webpki::anchor_from_trusted_cert(&CertificateDer::from(anchor.der()))
        .map(|root| root.to_owned())
        .map_err(|error| BundleError::Anchor { index, reason: format!("cannot be used: {error}") })
}

/// The subject key identifier of a certificate, if it has one that parses.
fn key_identifier(der: &[u8]) -> Option<Vec<u8>> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    certificate.extensions().iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
        _ => None,
    })
}
