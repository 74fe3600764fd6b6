//! Whether a bundle that arrived takes the place of the one in use.
//!
//! Pure. The sequence number of what is used never falls, an anchor that was withdrawn once never
//! comes back, and a bundle that cannot be used changes nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use steadfast_api::bundle::{BundleError, digest, parse_anchors};
use steadfast_api::trust::v1::Bundle;
use steadfast_api::{Code, KeyId, TrustAnchor, TrustBundle, TrustDomain};

use crate::trust::Trust;

/// Why a bundle is not used; the one in use stays.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleRefused {
    /// It is none.
    #[error("the bundle cannot be used")]
    Bundle(#[from] BundleError),
    /// The same sequence number for something else.
    #[error("seq {0} was published twice with different anchors or denied issuers")]
    Changed(u64),
    /// An id that is none.
    #[error("the bundle names an issuer or anchor by {0} bytes; an id has 32")]
    Id(usize),
    /// Older than what is used.
    #[error("the bundle has seq {sent}, and {held} is in use")]
    Lower {
        /// Of what was sent.
        sent: u64,
        /// Of what is used.
        held: u64,
    },
    /// Not ours.
    #[error("the bundle is of the trust domain {sent:?}, and we are of {ours}")]
    TrustDomain {
        /// Whose it is.
        sent: String,
        /// Whose we use.
        ours: TrustDomain,
    },
}

impl BundleRefused {
    /// Its code.
    pub const fn code(&self) -> Code {
        match self {
            Self::Lower { .. } => Code::BUNDLE_SEQ_LOWER,
            _ => Code::BUNDLE_INVALID,
        }
    }
}

/// What to use from now on; `None` when it is what is used already.
///
/// # Errors
/// Why what was sent is not used.
pub fn next(
    held: Option<&Trust>,
    trust_domain: &TrustDomain,
    sent: &Bundle,
) -> Result<Option<Trust>, BundleRefused> {
    if sent.trust_domain != trust_domain.as_str() {
        let (sent, ours) = (sent.trust_domain.clone(), trust_domain.clone());
        return Err(BundleRefused::TrustDomain { sent, ours });
    }
    if let Some(held) = held.filter(|held| sent.seq < held.sequence()) {
        return Err(BundleRefused::Lower { sent: sent.seq, held: held.sequence() });
    }
    let denied = ids(sent.denied_issuers.iter().map(|denied| denied.issuer_id.as_slice()))?;
    let mut tombstones = ids(sent.tombstones.iter().map(Vec::as_slice))?;
    tombstones.extend(held.into_iter().flat_map(|held| held.tombstones()));
    let bundle = TrustBundle::new(trust_domain.clone(), sent.seq, parse_anchors(&sent.anchors)?)?;
    let trust = Trust::new(&bundle, denied, tombstones)?;
    match held.filter(|held| held.sequence() == sent.seq) {
        None => Ok(Some(trust)),
        Some(held) if held.digest() != trust.digest() => Err(BundleRefused::Changed(sent.seq)),
        Some(_) => Ok(None),
    }
}

/// Whether what is used is what was sent: by sequence number, anchors and denied issuers.
pub fn is_as_sent(used: &Trust, sent: &Bundle) -> bool {
    let denied = sent.denied_issuers.iter().map(|denied| denied.issuer_id.as_slice());
    let (Ok(anchors), Ok(denied)) = (parse_anchors(&sent.anchors), ids(denied)) else {
        return false;
    };
    let sent_digest = digest(anchors.iter().map(TrustAnchor::id), denied);
    used.sequence() == sent.seq && used.digest() == sent_digest
}

/// The anchors that were sent though they are withdrawn for ever.
pub(crate) fn withdrawn(sent: &Bundle, used: Option<Arc<Trust>>) -> BTreeSet<KeyId> {
    let anchors = parse_anchors(&sent.anchors).unwrap_or_default();
    let sent = anchors.iter().map(TrustAnchor::id);
    used.map_or_else(BTreeSet::new, |used| {
        sent.filter(|id| used.tombstones().contains(id)).collect()
    })
}

fn ids<'a>(ids: impl Iterator<Item = &'a [u8]>) -> Result<BTreeSet<KeyId>, BundleRefused> {
    ids.map(|id| KeyId::from_slice(id).ok_or(BundleRefused::Id(id.len()))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use steadfast_api::trust::v1::DeniedIssuer;

    use super::*;

    proptest! {
        #[test]
        fn no_bundle_panics_and_garbage_is_never_used(
            trust_domain in "cluster.local|elsewhere|",
            seq in any::<u64>(),
            anchors in vec(vec(any::<u8>(), 0..200), 0..4),
            denied in vec(vec(any::<u8>(), 0..40), 0..4),
            tombstones in vec(vec(any::<u8>(), 0..40), 0..4),
        ) {
            let denied_issuers = denied
                .into_iter()
                .map(|issuer_id| DeniedIssuer { issuer_id, until: None })
                .collect();
            let sent = Bundle { trust_domain, seq, anchors, denied_issuers, tombstones };
            let ours: TrustDomain = "cluster.local".parse().unwrap();
            let refused = next(None, &ours, &sent).err().map(|refused| refused.code());
            prop_assert_eq!(refused, Some(Code::BUNDLE_INVALID));
        }
    }
}
