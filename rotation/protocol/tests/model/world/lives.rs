//! How long certificates live.
//!
//! Identity and the shell of the controller sign them and cut them short; both are out of this
//! crate's reach, so the world does it as they do. What the protocol decides is what there is to
//! sign with, and that another takes its place in time.

use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, IssuerRecord};

use super::{Config, FOREVER_TICKS, NOW, TICK, World, issuer, key, ticks};
use crate::shortcut::Shortcut;

impl Config {
    pub(super) fn anchor_end(&self, id: KeyId) -> UnixTime {
        let ends = self.ends.filter(|_| id == key(1)).map(|left| NOW + left);
        UnixTime::from_millis(ends.unwrap_or(FAR) * TICK)
    }

    /// An issuer that is signed now.
    pub(super) fn signed(&self, anchor: &AnchorRecord, number: u8) -> IssuerRecord {
        let mut issuer = issuer(anchor.id, number);
        let first = anchor.id == key(1) && number == 0;
        if let Some(life) = self.issuer_life.filter(|_| first) {
            issuer.not_after = UnixTime::from_millis((NOW + life) * TICK);
        }
        if self.shortcut != Some(Shortcut::IssuerOutlivesItsAnchor) {
            issuer.not_after = issuer.not_after.min(anchor.not_after - ticks(self.skew));
        }
        issuer
    }

    /// Of an SVID that is issued now, if nothing cuts it short.
    pub(super) fn not_after(&self) -> u64 {
        NOW + self.svid_life.unwrap_or(FOREVER_TICKS)
    }
}

impl World {
    /// The last tick of an SVID of this issuer that a replica signs now; `None`: there would be none.
    pub(super) fn svid_end(&self, config: &Config, issuer: KeyId, anchor: KeyId) -> Option<u64> {
        let (now, wished) = (NOW + config.skew, config.not_after() + config.skew);
        if config.shortcut == Some(Shortcut::SvidOutlivesItsIssuer) || !config.is_mortal() {
            return Some(wished);
        }
        let ends = self.ends(issuer, anchor)?;
        let not_after = wished.min(ends - config.skew);
        (not_after > now).then_some(not_after)
    }

    /// S4, of whatever is there.
    pub(super) fn outlives(&self, config: &Config) -> Option<&'static str> {
        if !config.is_mortal() {
            return None;
        }
        let issuers = self.state.issuers.iter().filter(|issuer| tick(issuer.not_after) >= NOW);
        let above = |issuer: &IssuerRecord| self.state.anchor(issuer.anchor_id);
        let mut late =
            issuers.filter_map(|issuer| Some((issuer.not_after, above(issuer)?.not_after)));
        let skew = ticks(config.skew);
        if late.any(|(issuer, anchor)| issuer + skew > anchor) {
            return Some("S4: an issuer outlives its anchor");
        }
        let proxies = self.nodes.iter().filter_map(|node| node.proxy.as_ref());
        let mut svids =
            proxies.flat_map(|p| p.svid.into_iter().chain(p.reply.map(|(svid, _)| svid)));
        let late = svids.any(|svid| {
            let ends = self.ends(svid.issuer, svid.anchor);
            ends.is_some_and(|ends| svid.not_after + config.skew > ends)
        });
        late.then_some("S4: an SVID outlives what it hangs from")
    }

    /// The first end of what an SVID hangs from, as far as the store still knows it.
    fn ends(&self, issuer: KeyId, anchor: KeyId) -> Option<u64> {
        let (issuer, anchor) = (self.state.issuer(issuer)?, self.state.anchor(anchor)?);
        Some(tick(issuer.not_after).min(tick(anchor.not_after)))
    }
}

impl Config {
    /// Whether anything above an SVID ends in this world.
    pub(super) fn is_mortal(&self) -> bool {
        self.ends.is_some() || self.issuer_life.is_some()
    }
}

fn tick(at: UnixTime) -> u64 {
    at.as_millis() / TICK
}

/// When what does not end ends, in ticks.
const FAR: u64 = 1_000_000_000;
