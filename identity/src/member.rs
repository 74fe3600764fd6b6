//! What is known of one instance of one workload: who it is, and what it acked last.

use serde::Serialize;
use steadfast_api::trust::v1;
use steadfast_api::{KeyId, SpiffeId, UnixTime};
use steadfast_platform::ReviewedToken;
use steadfast_rotation_protocol::TrustDomainState;

/// One start of one workload.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Instance {
    /// The pod, from the token.
    pub pod_uid: String,
    /// When its proxy was started, as it says itself.
    pub started_at: UnixTime,
}

/// A member of the mesh, as this replica sees it.
#[derive(Clone, Debug, Serialize)]
pub struct Member {
    /// Which start of which pod.
    #[serde(flatten)]
    pub instance: Instance,
    /// Who it is.
    pub spiffe_id: SpiffeId,
    /// Its pod's namespace.
    pub namespace: String,
    /// Its pod's name.
    pub pod: String,
    /// Of its proxy.
    pub version: String,
    /// Its open stream; `None`: it has none.
    pub open: Option<u64>,
    /// When anything was last heard of it.
    pub last_seen: UnixTime,
    /// Its last ack.
    pub ack: Option<Ack>,
    /// The highest nonce of a query that it has answered, on its open stream.
    pub answered: u64,
    /// The one before, on the same stream.
    pub answered_before: u64,
    /// The anchors in the handshakes of every ack after that answer, up to and with the newest.
    pub used: Vec<KeyId>,
    /// The anchors in the handshakes of the acks since the newest answer.
    #[serde(skip)]
    using: Vec<KeyId>,
    /// Handshakes by anchor since this replica knows it.
    pub handshakes: Vec<(KeyId, u64)>,
    /// Handshakes by issuer since this replica knows it.
    pub issuers: Vec<IssuerUse>,
}

/// Handshakes of a member that name an issuer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IssuerUse {
    /// Which.
    pub issuer: KeyId,
    /// Peers that dialled and were accepted.
    pub inbound: u64,
    /// Peers that were dialled and accepted.
    pub outbound: u64,
    /// Handshakes that failed over a certificate.
    pub failed: u64,
    /// The label of the newest failure's code; empty: none failed.
    pub failure: String,
    /// When that was told.
    pub failed_at: Option<UnixTime>,
}

/// An ack, as far as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ack {
    /// When it came.
    pub at: UnixTime,
    /// Of the query that it answers; 0: unasked.
    pub nonce: u64,
    /// Of the bundle in use.
    pub seq: u64,
    /// Of the bundle in use.
    pub digest: Option<KeyId>,
    /// Of the mounted file; `None`: it has none.
    pub mounted_digest: Option<KeyId>,
    /// Of its SVID; `None`: it has none.
    pub svid_issuer: Option<KeyId>,
    /// Of its SVID.
    pub svid_not_after: Option<UnixTime>,
    /// Its clock less ours, in milliseconds.
    pub clock_offset_ms: i64,
    /// What it holds, told when that is not what it was sent.
    #[serde(skip)]
    pub held: Option<v1::Held>,
    /// Handshakes since its ack before, by anchor.
    #[serde(skip)]
    handshakes: Vec<(KeyId, u64)>,
    /// The same by issuer.
    #[serde(skip)]
    issuers: Vec<IssuerUse>,
}

impl Member {
    /// A member that has just said hello.
    pub fn new(
        instance: Instance,
        spiffe_id: SpiffeId,
        pod: &ReviewedToken,
        version: String,
        now: UnixTime,
    ) -> Self {
        Self {
            instance,
            spiffe_id,
            namespace: pod.namespace.clone(),
            pod: pod.pod_name.clone(),
            version,
            open: None,
            last_seen: now,
            ack: None,
            answered: 0,
            answered_before: 0,
            used: Vec::new(),
            using: Vec::new(),
            handshakes: Vec::new(),
            issuers: Vec::new(),
        }
    }

    /// Takes over what was known from an older stream, but for what that stream has answered: a
    /// query is settled over a stream that is still open. What was used between its answers goes
    /// with them: an ack that was under way when it broke has never come, so nothing can be said of
    /// that time.
    pub fn inherit(&mut self, older: Self) {
        self.ack = older.ack;
        self.handshakes = older.handshakes;
        self.issuers = older.issuers;
    }

    /// Keeps an ack.
    pub fn acked(&mut self, ack: Ack) {
        for (anchor, _) in ack.handshakes.iter().filter(|(_, count)| *count > 0) {
            if self.using.len() < ANCHORS_MAX && !self.using.contains(anchor) {
                self.using.push(*anchor);
            }
        }
        // An ack that repeats an older nonce answers nothing new.
        if ack.nonce > self.answered {
            self.answered_before = std::mem::replace(&mut self.answered, ack.nonce);
            self.used = std::mem::take(&mut self.using);
        }
        for (anchor, count) in &ack.handshakes {
            let full = self.handshakes.len() >= ANCHORS_MAX;
            match self.handshakes.iter_mut().find(|(known, _)| known == anchor) {
                Some((_, total)) => *total = total.saturating_add(*count),
                None if full => {}
                None => {
                    // Nearly all have one or two: a vector's first step would be room for four.
                    self.handshakes.reserve_exact(1);
                    self.handshakes.push((*anchor, *count));
                }
            }
        }
        for used in &ack.issuers {
            self.count_issuer(used);
        }
        self.ack = Some(ack);
    }

    fn count_issuer(&mut self, used: &IssuerUse) {
        let full = self.issuers.len() >= ISSUERS_MAX;
        match self.issuers.iter_mut().find(|known| known.issuer == used.issuer) {
            Some(total) => {
                total.inbound = total.inbound.saturating_add(used.inbound);
                total.outbound = total.outbound.saturating_add(used.outbound);
                total.failed = total.failed.saturating_add(used.failed);
                if used.failed > 0 {
                    (total.failure, total.failed_at) = (used.failure.clone(), used.failed_at);
                }
            }
            None if full => {}
            None => {
                self.issuers.reserve_exact(1);
                self.issuers.push(used.clone());
            }
        }
    }
}

impl IssuerUse {
    fn new(used: &v1::IssuerUse, at: UnixTime) -> Option<Self> {
        let failed = used.failed > 0;
        let failure = used.failure.chars().take(FAILURE_CHARS_MAX).collect();
        Some(Self {
            issuer: KeyId::from_slice(&used.issuer_id)?,
            inbound: used.inbound,
            outbound: used.outbound,
            failed: used.failed,
            failure: if failed { failure } else { String::new() },
            failed_at: failed.then_some(at),
        })
    }
}

impl Ack {
    /// From the wire: ids that are none are as if they were not there. Of what it holds, what is
    /// stored here too says nothing new.
    pub fn new(ack: &v1::Ack, at: UnixTime, stored: Option<&TrustDomainState>) -> Self {
        let handshakes = ack.handshakes.iter().take(ANCHORS_MAX);
        Self {
            at,
            nonce: ack.nonce,
            seq: ack.seq,
            digest: KeyId::from_slice(&ack.digest),
            mounted_digest: KeyId::from_slice(&ack.mounted_digest),
            svid_issuer: KeyId::from_slice(&ack.svid_issuer),
            svid_not_after: ack.svid_not_after.map(UnixTime::from),
            clock_offset_ms: ack.clock_offset.as_ref().map_or(0, millis),
            handshakes: handshakes
                .filter_map(|used| Some((KeyId::from_slice(&used.anchor_id)?, used.count)))
                .collect(),
            issuers: (ack.issuers.iter().take(ISSUERS_MAX))
                .filter_map(|used| IssuerUse::new(used, at))
                .collect(),
            held: ack.held.as_ref().map(|held| bounded(held, stored)),
        }
    }
}

/// As much of it as is believed: ids, and not too many. Of those that it knows to be withdrawn, the
/// ones that are published come first: nobody who holds the others misses them.
fn bounded(held: &v1::Held, stored: Option<&TrustDomainState>) -> v1::Held {
    let ids = |ids: &[Vec<u8>]| {
        let ids = ids.iter().filter_map(|id| KeyId::from_slice(id));
        ids.map(|id| id.as_bytes().to_vec()).take(HELD_MAX).collect()
    };
    let published = |id: KeyId| stored.is_some_and(|s| s.published().any(|anchor| anchor.id == id));
    let known = |id: KeyId| stored.is_some_and(|stored| stored.tombstones.contains(&id));
    let tombstones = held.tombstones.iter().filter_map(|id| KeyId::from_slice(id));
    let mut tombstones: Vec<_> = tombstones.filter(|id| !known(*id)).collect();
    tombstones.sort_by_key(|id| !published(*id));
    let tombstones = tombstones.iter().map(|id| id.as_bytes().to_vec());
    v1::Held {
        anchors: ids(&held.anchors),
        tombstones: tombstones.take(HELD_MAX).collect(),
        denied_issuers: ids(&held.denied_issuers),
    }
}

fn millis(duration: &prost_types::Duration) -> i64 {
    duration.seconds.saturating_mul(1000).saturating_add(i64::from(duration.nanos / 1_000_000))
}

/// A bundle has two or three anchors; a proxy that counts more is not believed further.
const ANCHORS_MAX: usize = 16;
/// A century of yearly rotations.
const HELD_MAX: usize = 100;

/// Those of a rotation or two, and what strangers show.
const ISSUERS_MAX: usize = 32;
const FAILURE_CHARS_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::found;

    fn ack(nonce: u64, counts: &[(u8, u64)]) -> Ack {
        let handshakes = counts
            .iter()
            .map(|(id, count)| v1::AnchorUse { anchor_id: vec![*id; 32], count: *count });
        let wire = v1::Ack { nonce, handshakes: handshakes.collect(), ..Default::default() };
        Ack::new(&wire, UnixTime::from_secs(1), None)
    }

    fn member() -> Member {
        let pod = ReviewedToken {
            namespace: "demo".into(),
            service_account: "web".into(),
            pod_name: "web-1".into(),
            pod_uid: "uid".into(),
            node: None,
            token_id: "token".into(),
            expires: UnixTime::from_secs(2),
        };
        let instance = Instance { pod_uid: "uid".into(), started_at: UnixTime::from_secs(0) };
        let id = "spiffe://cluster.local/ns/demo/sa/web".parse().unwrap();
        Member::new(instance, id, &pod, "1".into(), UnixTime::from_secs(1))
    }

    #[test]
    fn handshakes_add_up_over_acks_and_stay_bounded() {
        let mut member = member();
        member.acked(ack(0, &[(1, 3)]));
        member.acked(ack(0, &[(1, 4), (2, 1)]));
        let id = |byte: u8| KeyId::from_slice(&[byte; 32]).unwrap();
        assert_eq!(member.handshakes, [(id(1), 7), (id(2), 1)]);
        for byte in 3..200 {
            member.acked(ack(0, &[(byte, 1)]));
        }
        assert_eq!(member.handshakes.len(), ANCHORS_MAX);
    }

    #[test]
    fn what_was_used_between_two_answers_is_what_every_ack_between_them_says() {
        let mut member = member();
        let id = |byte: u8| KeyId::from_slice(&[byte; 32]).unwrap();
        member.acked(ack(0, &[(1, 1)]));
        member.acked(ack(5, &[(2, 1)]));
        assert_eq!((member.answered_before, member.answered), (0, 5));
        assert_eq!(member.used, [id(1), id(2)]);
        // Unasked ones, one with an anchor that was known but not used, and an older nonce again.
        member.acked(ack(0, &[(3, 1), (4, 0)]));
        member.acked(ack(4, &[(3, 2)]));
        assert_eq!((member.answered_before, member.answered), (0, 5));
        assert_eq!(member.used, [id(1), id(2)], "still of the newest answer");
        member.acked(ack(7, &[(5, 1)]));
        assert_eq!((member.answered_before, member.answered), (5, 7));
        assert_eq!(member.used, [id(3), id(5)]);
        member.acked(ack(8, &[]));
        assert_eq!((member.answered_before, member.used.len()), (7, 0));
    }

    #[test]
    fn an_answer_counts_only_on_the_stream_that_is_open() {
        let mut older = member();
        older.acked(ack(5, &[]));
        older.acked(ack(6, &[(1, 1)]));
        assert_eq!((older.answered_before, older.answered, older.used.len()), (5, 6, 1));
        let mut newer = member();
        newer.inherit(older);
        assert_eq!((newer.answered_before, newer.answered, newer.used.len()), (0, 0, 0));
        assert_eq!(newer.ack.as_ref().unwrap().nonce, 6);
    }

    #[test]
    fn handshakes_by_issuer_add_up_and_the_newest_failure_is_dated_when_it_was_told() {
        let mut member = member();
        let told = |secs: i64, inbound: u64, failed: u64, failure: &str| {
            let used = v1::IssuerUse {
                issuer_id: vec![7; 32],
                inbound,
                failed,
                failure: failure.to_owned(),
                ..Default::default()
            };
            let wire = v1::Ack { issuers: vec![used], ..Default::default() };
            Ack::new(&wire, UnixTime::from_secs(secs), None)
        };
        member.acked(told(1, 2, 0, ""));
        member.acked(told(2, 1, 3, "expired"));
        member.acked(told(3, 4, 0, "ignored"));
        let [used] = member.issuers.as_slice() else { panic!("{:?}", member.issuers) };
        assert_eq!((used.inbound, used.outbound, used.failed), (7, 0, 3));
        assert_eq!(used.failed_at, Some(UnixTime::from_secs(2)));
        assert_eq!(used.failure, "expired");
    }

    #[test]
    fn ids_that_are_none_are_left_out() {
        let wire = v1::Ack {
            digest: vec![1; 31],
            clock_offset: Some(prost_types::Duration { seconds: i64::MAX, nanos: i32::MAX }),
            ..Default::default()
        };
        let ack = Ack::new(&wire, UnixTime::from_secs(1), None);
        assert_eq!(ack.digest, None);
        assert_eq!(ack.clock_offset_ms, i64::MAX);
    }

    #[test]
    fn an_anchor_that_is_published_and_known_to_be_withdrawn_is_told_before_all_others() {
        let tombstones: Vec<_> = (0..=HELD_MAX).map(|n| KeyId::of_spki(&n.to_be_bytes())).collect();
        let domain = "cluster.local".parse().unwrap();
        let mut stored = found(&domain, UnixTime::from_secs(1)).unwrap().state;
        stored.anchors[0].id = tombstones[HELD_MAX];
        stored.tombstones = tombstones[..2].to_vec();
        let ids = |ids: &[KeyId]| ids.iter().map(|id| id.as_bytes().to_vec()).collect::<Vec<_>>();
        let held = v1::Held { tombstones: ids(&tombstones), ..Default::default() };
        let told = bounded(&held, Some(&stored)).tombstones;
        assert_eq!(told[0], tombstones[HELD_MAX].as_bytes());
        assert_eq!(told[1..], ids(&tombstones[2..HELD_MAX]));
    }
}
