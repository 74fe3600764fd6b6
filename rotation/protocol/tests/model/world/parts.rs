//! What a world is made of: replicas, workloads and controllers, and what they hold.

use std::collections::BTreeMap;

use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::census::{Ack, Failed, HeldSvid, IssuerUse, Member};
use steadfast_rotation_protocol::guard::Fence;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::{Instance, TrustDomainState};

use super::{EXPIRED, NOW, TICK, key, started, uid};

/// A replica and a workload whose trust stream is there: they are told apart by nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Node {
    pub(crate) replica: Option<Rep>,
    pub(crate) proxy: Option<Proxy>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Rep {
    pub(super) served: Option<Served>,
    /// The read that confirmed it was in this tick.
    pub(super) leased: bool,
    pub(super) nonce: u64,
    /// The newest query of each controller that it took.
    pub(super) taken: BTreeMap<usize, u64>,
    pub(super) members: BTreeMap<usize, Rec>,
    /// The revision of what it serves, and when that was recovered, where revisions fall.
    pub(super) read: Option<(u64, Option<UnixTime>)>,
    /// The SVID that it shows, where it counts.
    pub(super) own: Option<Svid>,
    /// The issuers that it has loaded, where it takes its time; else all.
    pub(super) loaded: Option<Vec<KeyId>>,
}

/// What of the state a replica acts on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Served {
    pub(super) seq: u64,
    pub(super) anchors: Vec<KeyId>,
    pub(super) tombstones: Vec<KeyId>,
    pub(super) denied: Vec<KeyId>,
    pub(super) issuer: KeyId,
    pub(super) anchor: KeyId,
    /// The canaries' issuer, and its anchor.
    pub(super) canary: Option<(KeyId, KeyId)>,
    pub(super) halted: bool,
}

/// What a replica knows of its member.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Rec {
    pub(super) started: u64,
    pub(super) open: bool,
    pub(super) last_heard: u64,
    pub(super) answered: u64,
    pub(super) answered_before: u64,
    pub(super) seq: u64,
    pub(super) anchors: Vec<KeyId>,
    pub(super) denied: Vec<KeyId>,
    pub(super) svid: Option<Svid>,
    /// When it last told of a handshake that failed.
    pub(super) failed: Option<u64>,
    pub(super) mounted: Option<Vec<KeyId>>,
    pub(super) clock_off: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Proxy {
    /// Which start of it: it does not tell what is older.
    pub(super) started: u64,
    /// The replica that its stream is at, or was last.
    pub(super) home: usize,
    /// It reaches its replica.
    pub(super) connected: bool,
    pub(super) listed: bool,
    pub(super) seq: u64,
    pub(super) anchors: Vec<KeyId>,
    pub(super) tombstones: Vec<KeyId>,
    pub(super) denied: Vec<KeyId>,
    pub(super) svid: Option<Svid>,
    pub(super) reply: Option<(Svid, u64)>,
    /// What its mounted file says, in a world that has any.
    pub(super) mounted: Option<Vec<KeyId>>,
    /// By more than clocks may be.
    pub(super) clock_off: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Svid {
    pub(super) anchor: KeyId,
    pub(super) issuer: KeyId,
    /// The last tick in which it is valid, by the store's clock.
    pub(super) not_after: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Ctl {
    pub(crate) fence: Option<Fence>,
    /// Where revisions fall.
    pub(super) newest: Option<(u64, Option<UnixTime>)>,
    pub(super) nonce: u64,
    pub(super) pending: Option<Box<Pending>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pending {
    pub(super) expected: u64,
    pub(super) state: TrustDomainState,
    /// The rotation and phase that it was decided in.
    pub(super) from: (u64, Option<PhaseName>),
    pub(super) generating: bool,
}

impl Served {
    pub(super) fn of(state: &TrustDomainState) -> Self {
        let mut anchors: Vec<_> = state.published().map(|anchor| anchor.id).collect();
        anchors.sort();
        let canary = state.rotation.as_ref().and_then(|rotation| rotation.canary());
        Self {
            seq: state.seq,
            anchors,
            tombstones: state.tombstones.clone(),
            denied: state.denied_issuers.iter().map(|denied| denied.id).collect(),
            issuer: state.active_issuer,
            anchor: state.active_issuer().map_or_else(|| key(0), |issuer| issuer.anchor_id),
            canary: canary.map(|canary| (canary.issuer, canary.to)),
            halted: state.halted.is_some(),
        }
    }
}

impl Rep {
    /// What was told of failures stays.
    pub(super) fn keep(&mut self, n: usize, rec: Rec) {
        let failed = self.members.get(&n).and_then(|known| known.failed);
        self.members.insert(n, Rec { failed, ..rec });
    }
}

impl Proxy {
    pub(super) fn take(&mut self, served: &Served) {
        if served.seq <= self.seq {
            return;
        }
        for id in &served.tombstones {
            if !self.tombstones.contains(id) {
                self.tombstones.push(*id);
            }
        }
        self.seq = served.seq;
        self.anchors = served.anchors.clone();
        self.anchors.retain(|id| !self.tombstones.contains(id));
        self.denied = served.denied.clone();
    }
}

impl Rec {
    pub(super) fn of(proxy: &Proxy, answered: u64, answered_before: u64) -> Self {
        Self {
            started: proxy.started,
            open: true,
            last_heard: NOW,
            answered,
            answered_before,
            seq: proxy.seq,
            anchors: proxy.anchors.clone(),
            denied: proxy.denied.clone(),
            svid: proxy.svid,
            failed: None,
            mounted: proxy.mounted.clone(),
            clock_off: proxy.clock_off,
        }
    }

    /// As a replica reports it; its handshakes name the canaries' issuer.
    pub(super) fn member(&self, n: usize, canary: Option<KeyId>, skew: u64) -> Member {
        let (anchors, denied) = (self.anchors.iter().copied(), self.denied.iter().copied());
        let digest = steadfast_api::bundle::digest(anchors, denied);
        let svid = self.svid.map(Svid::held);
        Member {
            instance: Instance { pod_uid: uid(n), started_at: started(self.started) },
            name: uid(n),
            open: self.open,
            last_heard: UnixTime::from_millis(self.last_heard * TICK),
            answered: self.answered,
            answered_before: self.answered_before,
            used: Vec::new(),
            issuers: canary.map(|issuer| self.used(issuer)).into_iter().collect(),
            ack: Some(Ack {
                seq: self.seq,
                digest: KeyId::from_slice(&digest),
                mounted: self.mounted.as_ref().and_then(|anchors| {
                    KeyId::from_slice(&steadfast_api::bundle::digest(anchors.iter().copied(), []))
                }),
                svid,
                clock_offset_ms: if self.clock_off { (skew * TICK) as i64 + 1 } else { 0 },
                held: None,
            }),
            version: None,
        }
    }

    /// Everybody deals with everybody.
    fn used(&self, issuer: KeyId) -> IssuerUse {
        let failed = self.failed.map(|at| Failed {
            at: UnixTime::from_millis(at * TICK),
            count: 1,
            code: String::new(),
        });
        IssuerUse { issuer, inbound: 1, outbound: 1, failed }
    }
}

impl Svid {
    /// As an ack tells it.
    pub(super) fn held(self) -> HeldSvid {
        let not_after = UnixTime::from_millis(self.not_after * TICK);
        HeldSvid { issuer: self.issuer, not_after }
    }

    pub(super) fn older(self, skew: u64) -> Self {
        if self.not_after > NOW + 1000 {
            return self;
        }
        Self { not_after: (self.not_after - 1).max(EXPIRED - skew), ..self }
    }
}
