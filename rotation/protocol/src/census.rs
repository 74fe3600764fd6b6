//! The census: who must be asked, and whether each has given the answer that a phase waits for.
//!
//! A round is one query to every replica and what came of it. What is asked is the *list* of the
//! platform, taken after the query was decided on; what replicas know only adds to it. Nobody is
//! excused because nobody knows them. An answer counts if it answers a query of this census, over
//! a stream that is still open, from the newest instance of its pod, and names the published
//! bundle by sequence number *and* digest.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use semver::Version;
use serde::{Deserialize, Serialize};
use steadfast_api::{KeyId, UnixTime};

use crate::evidence::{Said, Witness};
use crate::instance::Instance;
use crate::trust_domain::{AnchorState, Exemption, TrustDomainState};

/// One query to everybody, and what was known when it had been answered or given up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Round {
    /// Of its query.
    pub nonce: u64,
    /// Who must be asked, by the platform; listed after the query was decided on.
    pub listed: Vec<Listed>,
    /// What the replicas say.
    pub replicas: Vec<Replica>,
    /// Instances that were known once and have vanished without a word that they ended.
    pub vanished: Vec<Vanished>,
}

/// A pod that carries our proxy, or a process of ours.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Listed {
    /// Its UID.
    pub pod_uid: String,
    /// Its name, for people: `namespace/name`.
    pub name: String,
    /// What its status says.
    pub proxy: ProxyStatus,
}

/// What an ack names as its mounted bundle when it has a file that cannot be read: it may be read
/// again, and nobody knows what it says then.
pub const UNREADABLE: [u8; 32] = [0; 32];

/// What the status of a pod says of its proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyStatus {
    /// It has ended for good.
    Ended,
    /// It has not been started.
    NotStarted,
    /// It runs, or may run.
    Running,
}

/// A replica of the identity service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Replica {
    /// Its name, for people.
    pub name: String,
    /// Whether it took the query of this round.
    pub reached: bool,
    /// When it was started: what it had counted before is lost.
    #[serde(default)]
    pub started_at: UnixTime,
    /// The newest query that it knows, of whomever.
    pub newest_nonce: u64,
    /// The issuers whose key and certificate it has loaded.
    pub loaded: Vec<KeyId>,
    /// What it serves, and the SVID that it serves it with: it has no stream to itself.
    pub own: Option<Ack>,
    /// Who has, or had, a stream there.
    pub members: Vec<Member>,
}

/// An instance, as a replica knows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Which.
    pub instance: Instance,
    /// Its pod, for people: `namespace/name`.
    pub name: String,
    /// Whether its stream is open.
    pub open: bool,
    /// When it was last heard of.
    pub last_heard: UnixTime,
    /// The newest query that it answered over the stream that is open.
    pub answered: u64,
    /// The one before.
    pub answered_before: u64,
    /// The anchors that its handshakes used between the two answers.
    pub used: Vec<KeyId>,
    /// Its handshakes by issuer, since the replica knows it.
    #[serde(default)]
    pub issuers: Vec<IssuerUse>,
    /// Its newest ack.
    pub ack: Option<Ack>,
    /// Of its proxy; `None`: it told none that can be read.
    #[serde(default)]
    pub version: Option<Version>,
}

/// The oldest version of a proxy that answers queries as this one asks them. Who is older and does
/// not answer will not.
pub const OLDEST: Version = Version::new(0, 1, 0);

/// Handshakes that name an issuer: the peer's, or one's own where the peer refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IssuerUse {
    /// Which.
    pub issuer: KeyId,
    /// Peers of that issuer that dialled and were accepted.
    pub inbound: u64,
    /// Peers of that issuer that were dialled and accepted.
    pub outbound: u64,
    /// Those that failed, if any did.
    pub failed: Option<Failed>,
}

/// Handshakes that failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Failed {
    /// When the newest was told, by the replica's clock.
    pub at: UnixTime,
    /// How many.
    pub count: u64,
    /// The label of the newest one's code.
    pub code: String,
}

/// What an instance says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ack {
    /// Of the bundle that both its TLS configurations use.
    pub seq: u64,
    /// Of the same.
    pub digest: Option<KeyId>,
    /// Of the mounted file; `None`: it has none.
    pub mounted: Option<KeyId>,
    /// Its SVID; `None`: it has none.
    pub svid: Option<HeldSvid>,
    /// Its clock less the replica's.
    pub clock_offset_ms: i64,
    /// What it holds, told when that is not what it was sent.
    #[serde(default)]
    pub held: Option<Held>,
}

/// What an instance holds, by ids.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Held {
    /// The anchors that it uses.
    pub anchors: Vec<KeyId>,
    /// The anchors that it knows to be withdrawn for ever.
    pub tombstones: Vec<KeyId>,
    /// The issuers that it denies.
    pub denied: Vec<KeyId>,
}

/// What counts of an SVID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HeldSvid {
    /// Who signed it.
    pub issuer: KeyId,
    /// Its end.
    pub not_after: UnixTime,
}

/// An instance that is on no list any more, and of which nobody has said that it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Vanished {
    /// Which.
    pub instance: Instance,
    /// Its pod, for people.
    pub name: String,
    /// When any replica last had its stream or signed for it.
    pub last_heard: UnixTime,
}

/// What an answer must say beside naming the published bundle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Clocks must agree.
    pub clocks: bool,
    /// No SVID of these.
    pub free_of: Option<FreeOf>,
    /// No handshake, since the census began, under an anchor that retires.
    pub unused: bool,
    /// The mounted file must be of the published bundle.
    pub mounted: bool,
}

/// What is to be used no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreeOf {
    /// Those of one issuer.
    Issuer(KeyId),
    /// Those under an anchor that retires, or that is not in the bundle, and those of a denied issuer.
    Retiring,
}

/// How long things last that a census must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Clocks may differ by this much.
    pub skew: Duration,
    /// No SVID lives longer.
    pub svid_life_max: Duration,
}

/// How a census stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Who has settled, and by what word.
    pub settled: Vec<Witness>,
    /// Who has not, by name, and why.
    pub missing: Vec<Missing>,
    /// Whose exemption is over, because they have settled or started anew.
    pub healed: Vec<Instance>,
    /// Whose start before this one was exempt when nobody had heard of this one, though it ran: it is
    /// this one that is exempt.
    pub heard: Vec<Instance>,
}

/// Who has not settled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// The pod's name.
    pub name: String,
    /// Its newest instance; the epoch as its start: nobody has heard of it.
    pub instance: Instance,
    /// Why not.
    pub reason: Reason,
}

/// Why somebody has not settled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// It has not answered since the census began.
    Unanswered,
    /// It uses an older bundle.
    Behind {
        /// Of that bundle.
        seq: u64,
    },
    /// Its clock is off.
    ClockOff {
        /// By so much: positive is ahead.
        offset_ms: i64,
    },
    /// It uses another bundle of the same sequence number.
    Differs,
    /// Its mounted file is of another bundle.
    MountedStale,
    /// It has no stream.
    NotConnected {
        /// Since when, where it is known.
        since: Option<UnixTime>,
    },
    /// Its SVID is still under what is to be used no more.
    Svid {
        /// Who signed it.
        issuer: KeyId,
    },
    /// It still had handshakes under an anchor that retires.
    Used {
        /// That anchor.
        anchor: KeyId,
    },
    /// It is connected and does not answer as it is asked to, and its proxy is too old to.
    VersionTooOld {
        /// Of its proxy.
        version: Version,
    },
    /// It vanished without a word; nothing of it can be valid from then on.
    Vanished {
        /// When.
        until: UnixTime,
    },
}

impl Reason {
    /// In one word, for labels; [`Reason::LABELS`] are all of them.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Unanswered => "unanswered",
            Self::Behind { .. } => "behind",
            Self::ClockOff { .. } => "clock_off",
            Self::Differs => "differs",
            Self::MountedStale => "mounted_stale",
            Self::NotConnected { .. } => "not_connected",
            Self::Svid { .. } => "svid",
            Self::Used { .. } => "used",
            Self::Vanished { .. } => "vanished",
            Self::VersionTooOld { .. } => "version_too_old",
        }
    }

    /// Every label.
    pub const LABELS: [&'static str; 10] = [
        "unanswered",
        "behind",
        "clock_off",
        "differs",
        "mounted_stale",
        "not_connected",
        "svid",
        "used",
        "vanished",
        "version_too_old",
    ];
}

/// Takes stock of a round. Answers to queries older than `floor` are none.
pub fn tally(
    state: &TrustDomainState,
    demand: Demand,
    round: &Round,
    floor: u64,
    now: UnixTime,
    bounds: Bounds,
) -> Tally {
    let known = newest(round);
    let mut tally = Tally::default();
    let last_heard = last_heard(state, round);
    let exempt = state.exemptions.iter().map(|e| (e.instance.pod_uid.as_str(), e)).collect();
    let published =
        [state.digest(), state.mounted_digest()].map(|digest| KeyId::from_slice(&digest));
    let judge = Judge { state, published, demand, floor, now, bounds };
    for listed in round.listed.iter().filter(|listed| listed.proxy != ProxyStatus::Ended) {
        let member = known.get(listed.pod_uid.as_str());
        // Pending, pulling its image, crashing before it starts. Whoever was heard of has started.
        if listed.proxy == ProxyStatus::NotStarted && member.is_none() {
            continue;
        }
        let start =
            member.map_or_else(|| Start::unheard(&listed.pod_uid), |known| known.member.start());
        let verdict = member.map_or(Err(Reason::NotConnected { since: None }), |m| judge.known(m));
        tally.count(&exempt, bounds.skew, &listed.name, start, verdict);
    }
    let listed: HashSet<_> = round.listed.iter().map(|listed| listed.pod_uid.as_str()).collect();
    let listed = |uid: &str| listed.contains(uid);
    for known in known.values().filter(|known| !listed(&known.member.instance.pod_uid)) {
        let verdict = match judge.known(known) {
            Err(Reason::NotConnected { .. }) => {
                judge.vanished(last_heard[known.member.instance.pod_uid.as_str()])
            }
            verdict => verdict,
        };
        tally.count(&exempt, bounds.skew, &known.member.name, known.member.start(), verdict);
    }
    for replica in &round.replicas {
        let verdict = match &replica.own {
            _ if !replica.reached => Err(Reason::NotConnected { since: None }),
            Some(own) => judge.ack(own),
            None => Ok(()),
        };
        let verdict = verdict.map(|()| Said::Serves(replica.own.clone()));
        tally.count(&exempt, bounds.skew, &replica.name, Start::unheard(&replica.name), verdict);
    }
    for gone in round.vanished.iter().filter(|gone| {
        !listed(&gone.instance.pod_uid) && !known.contains_key(gone.instance.pod_uid.as_str())
    }) {
        let uid = gone.instance.pod_uid.as_str();
        let start = Start { instance: gone.instance.clone(), clock_offset_ms: 0 };
        let verdict = judge.vanished(last_heard[uid]);
        tally.count(&exempt, bounds.skew, &gone.name, start, verdict);
    }
    tally
}

/// Whose mounted file names other anchors than those that are published, by name: the mirror of a
/// standalone mesh is what each workload has mounted, and what all of them hold is read back by
/// their acks. Whom no census waits for, this waits for neither; a file that cannot be read shows
/// nothing, and the last census names whose it is.
pub fn mirrors_behind(state: &TrustDomainState, round: &Round) -> Vec<String> {
    let published = KeyId::from_slice(&state.mounted_digest());
    let members = round.replicas.iter().flat_map(|replica| &replica.members);
    let behind = members.filter(|member| {
        let uid = &member.instance.pod_uid;
        let exempt = state.exemptions.iter().any(|e| e.instance.pod_uid == *uid);
        let mounted = member.ack.as_ref().and_then(|ack| ack.mounted);
        let read = mounted.filter(|mounted| *mounted.as_bytes() != UNREADABLE);
        member.open && !exempt && read.is_some() && read != published
    });
    behind.map(|member| member.name.clone()).collect()
}

/// When anybody last heard of each pod, of whichever start of it. What the controllers have kept of
/// the time before a recovery may be of a copy that was made long before.
fn last_heard<'a>(state: &TrustDomainState, round: &'a Round) -> HashMap<&'a str, UnixTime> {
    let members = round.replicas.iter().flat_map(|replica| &replica.members);
    let members = members.map(|member| (&member.instance, member.last_heard));
    let recovered_at = state.recovered_at.unwrap_or_default();
    let kept = round.vanished.iter();
    let kept = kept.map(|gone| (&gone.instance, gone.last_heard.max(recovered_at)));
    let mut last_heard: HashMap<_, UnixTime> = HashMap::new();
    for (instance, at) in members.chain(kept) {
        let last = last_heard.entry(instance.pod_uid.as_str()).or_default();
        *last = at.max(*last);
    }
    last_heard
}

/// An instance that is counted.
struct Start {
    instance: Instance,
    /// Its clock less ours, as it said last.
    clock_offset_ms: i64,
}

impl Start {
    fn unheard(uid: &str) -> Self {
        let instance = Instance { pod_uid: uid.to_owned(), started_at: UnixTime::default() };
        Self { instance, clock_offset_ms: 0 }
    }

    /// When it was, by our clock.
    fn at(&self) -> UnixTime {
        let offset = Duration::from_millis(self.clock_offset_ms.unsigned_abs());
        let started_at = self.instance.started_at;
        if self.clock_offset_ms < 0 { started_at + offset } else { started_at - offset }
    }
}

impl Member {
    fn start(&self) -> Start {
        let clock_offset_ms = self.ack.as_ref().map_or(0, |ack| ack.clock_offset_ms);
        Start { instance: self.instance.clone(), clock_offset_ms }
    }
}

/// The newest instance of a pod, by the replica that knows best.
struct Known<'a> {
    member: &'a Member,
    /// Its stream is open, on a replica that took the query.
    connected: bool,
}

/// The newest instance of each pod that any replica knows; of one that several replicas know, what
/// the one says that has its stream open.
fn newest(round: &Round) -> BTreeMap<&str, Known<'_>> {
    let mut newest: BTreeMap<&str, Known<'_>> = BTreeMap::new();
    for replica in &round.replicas {
        for member in &replica.members {
            let next = Known { member, connected: member.open && replica.reached };
            let rank = |known: &Known<'_>| {
                let Member { instance, answered, last_heard, .. } = known.member;
                (instance.started_at, known.connected, *answered, *last_heard)
            };
            match newest.get(member.instance.pod_uid.as_str()) {
                Some(kept) if rank(kept) >= rank(&next) => {}
                _ => {
                    newest.insert(&member.instance.pod_uid, next);
                }
            }
        }
    }
    newest
}

struct Judge<'a> {
    state: &'a TrustDomainState,
    /// What an ack must name of the bundle in use, and of the mounted file.
    published: [Option<KeyId>; 2],
    demand: Demand,
    floor: u64,
    now: UnixTime,
    bounds: Bounds,
}

impl Judge<'_> {
    fn known(&self, known: &Known<'_>) -> Result<Said, Reason> {
        let member = known.member;
        if !known.connected {
            return Err(Reason::NotConnected { since: Some(member.last_heard) });
        }
        self.answer(member).map_err(|reason| match (&member.version, &reason) {
            (Some(version), Reason::Unanswered | Reason::Behind { .. } | Reason::Differs)
                if *version < OLDEST =>
            {
                Reason::VersionTooOld { version: version.clone() }
            }
            _ => reason,
        })
    }

    /// What it says over its stream.
    fn answer(&self, member: &Member) -> Result<Said, Reason> {
        let Some(ack) = member.ack.as_ref().filter(|_| member.answered >= self.floor) else {
            return Err(Reason::Unanswered);
        };
        self.ack(ack)?;
        if self.demand.unused {
            self.unused(member)?;
        }
        let (answered, last_heard) = (member.answered, member.last_heard);
        Ok(Said::Acked { ack: ack.clone(), answered, last_heard })
    }

    fn ack(&self, ack: &Ack) -> Result<(), Reason> {
        if ack.seq != self.state.seq {
            return Err(Reason::Behind { seq: ack.seq });
        }
        if ack.digest != self.published[0] {
            return Err(Reason::Differs);
        }
        let offset_ms = ack.clock_offset_ms;
        let off = u128::from(offset_ms.unsigned_abs()) > self.bounds.skew.as_millis();
        if self.demand.clocks && off {
            return Err(Reason::ClockOff { offset_ms });
        }
        if self.demand.mounted && ack.mounted.is_some() && ack.mounted != self.published[1] {
            return Err(Reason::MountedStale);
        }
        if let (Some(free_of), Some(svid)) = (self.demand.free_of, ack.svid)
            && svid.not_after + self.bounds.skew >= self.now
            && self.forbids(free_of, svid.issuer)
        {
            return Err(Reason::Svid { issuer: svid.issuer });
        }
        Ok(())
    }

    /// Between two answers of this census, so since the fence.
    fn unused(&self, member: &Member) -> Result<(), Reason> {
        if member.answered_before < self.floor {
            return Err(Reason::Unanswered);
        }
        let mut retiring = self.state.in_state(AnchorState::Retiring);
        match retiring.find(|anchor| member.used.contains(&anchor.id)) {
            Some(anchor) => Err(Reason::Used { anchor: anchor.id }),
            None => Ok(()),
        }
    }

    /// An issuer that the state does not know may be of any anchor.
    fn forbids(&self, free_of: FreeOf, issuer: KeyId) -> bool {
        match free_of {
            FreeOf::Issuer(forbidden) => issuer == forbidden,
            FreeOf::Retiring => self.state.issuer(issuer).is_none_or(|record| {
                let anchor = self.state.anchor(record.anchor_id);
                let stays = anchor.is_some_and(|anchor| {
                    anchor.state.published() && anchor.state != AnchorState::Retiring
                });
                !stays || self.state.denies(issuer)
            }),
        }
    }

    /// Nothing can be valid any more that was issued before it was last heard of.
    fn vanished(&self, last_heard: UnixTime) -> Result<Said, Reason> {
        let until = last_heard + self.bounds.svid_life_max + self.bounds.skew;
        if self.now > until {
            Ok(Said::Outlived { last_heard })
        } else {
            Err(Reason::Vanished { until })
        }
    }
}

impl Tally {
    /// Whether nobody is missing.
    pub fn is_settled(&self) -> bool {
        self.missing.is_empty()
    }

    fn count(
        &mut self,
        exempt: &HashMap<&str, &Exemption>,
        skew: Duration,
        name: &str,
        start: Start,
        verdict: Result<Said, Reason>,
    ) {
        let exempt = exempt.get(start.instance.pod_uid.as_str()).copied();
        let newer = exempt.is_some_and(|e| start.instance.started_at > e.instance.started_at);
        let anew = newer && exempt.is_some_and(|exempt| start.at() > exempt.at + skew);
        // What an older start said, or how it ended, is nothing of the one that is exempt.
        let meant = exempt.is_some_and(|e| start.instance.started_at >= e.instance.started_at);
        let instance = start.instance;
        if newer && !anew && verdict.is_err() {
            self.heard.push(instance.clone());
        }
        if let Some(exempt) = exempt.filter(|_| anew || meant && verdict.is_ok()) {
            self.healed.push(exempt.instance.clone());
        }
        match verdict {
            Ok(said) => self.settled.push(Witness { name: name.to_owned(), instance, said }),
            Err(_) if exempt.is_some() && !anew => {}
            Err(reason) => self.missing.push(Missing { name: name.to_owned(), instance, reason }),
        }
    }
}
