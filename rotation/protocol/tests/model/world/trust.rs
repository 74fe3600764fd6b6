//! Whom a workload takes a bundle from: what replicas show of themselves, the mounted file, and a
//! thief who offers one of his own.

use std::collections::BTreeSet;

use steadfast_api::KeyId;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::census::Ack;

use super::parts::{Proxy, Rep, Svid};
use super::{Config, NOW, Order, World, key};
use crate::shortcut::Shortcut;

/// Copies of what the store publishes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Mirror {
    /// What whoever starts finds; workloads get it later.
    pub(super) anchors: Vec<KeyId>,
    /// Every bundle that there ever was, by its sequence number.
    published: BTreeSet<(u64, Vec<KeyId>)>,
}

impl Mirror {
    pub(super) fn of(state: &TrustDomainState) -> Self {
        let anchors = published(state);
        Self { published: [(state.seq, anchors.clone())].into(), anchors }
    }

    pub(super) fn update(&mut self, state: &TrustDomainState) {
        self.anchors = published(state);
    }

    pub(super) fn is_current(&self, state: &TrustDomainState) -> bool {
        self.anchors == published(state)
    }
}

impl Proxy {
    /// As a workload dials identity: by its live bundle, else by the mounted file less what it knows
    /// to be withdrawn; whose issuer it denies is refused by either.
    fn vouches_for(&self, shown: Svid, shortcut: Option<Shortcut>) -> bool {
        let filtered = shortcut != Some(Shortcut::MountedFileUnfiltered);
        let withdrawn = filtered && self.tombstones.contains(&shown.anchor);
        let mounted = self.mounted.as_ref().is_some_and(|m| m.contains(&shown.anchor));
        let denied = self.denied.contains(&shown.issuer);
        shown.not_after >= NOW
            && !denied
            && (self.anchors.contains(&shown.anchor) || mounted && !withdrawn)
            || shortcut == Some(Shortcut::BundleOfAnybody)
    }
}

impl World {
    /// A workload believes a replica, in a world where that is asked.
    pub(super) fn vouched(&self, config: &Config, i: usize, r: usize) -> Option<()> {
        if !config.vouched {
            return Some(());
        }
        let shown = self.nodes[r].replica.as_ref()?.own?;
        self.nodes[i].proxy.as_ref()?.vouches_for(shown, config.shortcut).then_some(())
    }

    /// A replica issues its own SVID, halted or not.
    pub(super) fn own(&mut self, i: usize) -> Option<()> {
        let replica = self.nodes[i].replica.as_mut()?;
        let served = replica.served.as_ref().filter(|_| replica.leased && self.mirror.is_some())?;
        let not_after = NOW + super::FOREVER_TICKS;
        replica.own = Some(Svid { anchor: served.anchor, issuer: served.issuer, not_after });
        Some(())
    }

    /// Somebody has the key of the first anchor, or of its issuer, and offers a bundle of his own.
    /// As long as that is rightly believed no protocol helps; afterwards nobody may take it.
    pub(super) fn forge(&mut self, config: &Config, i: usize) -> Option<()> {
        let issuer = match config.orders.contains(&Order::IssuerStolen) {
            true => super::issuer(key(1), 0).id,
            false => key(THIEF),
        };
        let shown = Svid { anchor: key(1), issuer, not_after: NOW };
        let idle = self.state.rotation.is_none() && self.state.halted.is_none();
        let over = idle && !self.is_exempt(i) && self.state.tombstones.contains(&shown.anchor);
        let proxy = self.nodes[i].proxy.as_mut()?;
        let known = proxy.tombstones.contains(&shown.anchor) || proxy.denied.contains(&issuer);
        if !(known || over) || !proxy.vouches_for(shown, config.shortcut) {
            return None;
        }
        proxy.seq += 1;
        proxy.anchors = vec![key(THIEF)];
        Some(())
    }

    /// What is stored now has been published.
    pub(super) fn publish(&mut self) {
        if let Some(mirror) = &mut self.mirror {
            mirror.published.insert((self.state.seq, published(&self.state)));
        }
    }

    /// Whether a workload holds what was never published.
    pub(super) fn is_deceived(&self, proxy: &Proxy) -> bool {
        let held = (proxy.seq, proxy.anchors.clone());
        self.mirror.as_ref().is_some_and(|mirror| !mirror.published.contains(&held))
    }

    /// Whether the copies that whoever starts will find lack one of these.
    pub(super) fn mirror_lacks(&self, anchor: KeyId) -> bool {
        self.mirror.as_ref().is_some_and(|mirror| !mirror.anchors.contains(&anchor))
    }
}

impl Rep {
    /// What a replica tells of itself in a census, in a world where it has an SVID.
    pub(super) fn own_ack(&self) -> Option<Ack> {
        let (served, own) = (self.served.as_ref()?, self.own?);
        let (anchors, denied) = (served.anchors.iter().copied(), served.denied.iter().copied());
        Some(Ack {
            seq: served.seq,
            digest: KeyId::from_slice(&steadfast_api::bundle::digest(anchors, denied)),
            mounted: None,
            svid: Some(own.held()),
            clock_offset_ms: 0,
            held: None,
        })
    }
}

fn published(state: &TrustDomainState) -> Vec<KeyId> {
    let mut anchors: Vec<_> = state.published().map(|anchor| anchor.id).collect();
    anchors.sort();
    anchors
}

/// An anchor, and the issuer, of the thief's own.
const THIEF: u8 = 200;
