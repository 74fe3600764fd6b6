//! The world: what there is, what happens next, and how time passes.
//!
//! One loop takes the next event from the queue, lets it happen, and checks every invariant that it
//! can have touched. Nothing reads a clock or draws a number but from the world's own, so a seed
//! tells a whole history.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use steadfast_api::{KeyId, TrustDomain, UnixTime};
use steadfast_identity::authority::{make_anchor, make_issuer};
use steadfast_identity::replica::View;
use steadfast_identity_client::{Trust, bundle};
use steadfast_platform::Revision;
use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::renewal::{Issued, RequestId};
use steadfast_rotation_protocol::trust_domain::{AnchorState, RenewOrder};

use crate::controller::ControllerHost;
use crate::faults::{Fault, Faults};
use crate::invariants::{Truth, Violation};
use crate::operator::Operator;
use crate::ops::{Call, Reply};
use crate::parts::{Entries, Queue, START, TrueTime, Vault};
use crate::plan::{Hazard, Plan};
use crate::replica::{Heard, ReplicaHost};
use crate::report::Counts;
use crate::workload::{Leaf, Node, Workload};

/// Everything.
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) time: TrueTime,
    pub(crate) now: UnixTime,
    pub(crate) rng: SmallRng,
    pub(crate) queue: Queue<Event>,
    pub(crate) store: Entries,
    /// What the store holds of the trust domain, parsed.
    pub(crate) state: Arc<TrustDomainState>,
    pub(crate) anchor_keys: Vault,
    pub(crate) issuer_keys: Vault,
    pub(crate) replicas: Vec<ReplicaHost>,
    pub(crate) controllers: Vec<ControllerHost>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) workloads: Vec<Workload>,
    /// Places of workloads that are gone.
    pub(crate) free: Vec<usize>,
    pub(crate) by_uid: BTreeMap<String, usize>,
    /// How many there ever were.
    pub(crate) pods: u64,
    pub(crate) trusts: Trusts,
    pub(crate) operator: Operator,
    pub(crate) faults: Faults,
    pub(crate) truth: Truth,
    pub(crate) counts: Counts,
    pub(crate) broken: Option<Violation>,
    names: BTreeMap<KeyId, String>,
    /// What happened, in words; empty unless it is to be told.
    pub(crate) story: Vec<String>,
}

/// Something that happens.
pub(crate) enum Event {
    /// An ack reaches a replica.
    Ack {
        replica: usize,
        life: u32,
        stream: u64,
        ack: Box<steadfast_api::trust::v1::Ack>,
    },
    /// The answers to a query have been gathered.
    Asked {
        task: TaskId,
        life: u32,
        heard: Vec<Heard>,
        answer: Arc<Mutex<Option<Reply>>>,
    },
    /// A call of a process reaches whom it asks.
    Call {
        task: TaskId,
        life: u32,
        call: Box<Call>,
    },
    /// Its answer is back.
    Answer {
        task: TaskId,
        life: u32,
        reply: Box<Reply>,
        answer: Arc<Mutex<Option<Reply>>>,
    },
    /// A workload dials.
    Connect {
        workload: usize,
        life: u32,
    },
    /// A replica's message reaches a workload.
    Deliver {
        workload: usize,
        life: u32,
        replica: usize,
        stream: u64,
        message: Message,
    },
    /// An SVID may have ended.
    Expire {
        workload: usize,
        life: u32,
    },
    Fault,
    FaultEnds(Fault),
    /// A node's mounted bundles become what is published.
    Mount {
        node: usize,
    },
    /// A fault, or an order, in the middle of a rotation.
    Interference {
        order: bool,
    },
    Operator,
    RestartAll,
    /// The platform learns what has become of a pod.
    Listed {
        key: Box<str>,
        phase: &'static str,
    },
    /// The lists of the platform forget a pod.
    Unlisted {
        key: Box<str>,
    },
    /// A process of identity's looks after its keys and promises.
    ReplicaWork {
        replica: usize,
        life: u32,
    },
    ReplicaRead {
        replica: usize,
        life: u32,
    },
    /// A request for an SVID reaches a replica.
    Request {
        replica: usize,
        asked: Asked,
    },
    /// It is in the issuance log.
    Logged(Box<Logged>),
    /// Its reply reaches the workload.
    Issued {
        asked: Asked,
        outcome: Box<Result<(Issued, Leaf), String>>,
    },
    /// A workload starts anew, or its pod is replaced.
    Churn,
    Wake {
        workload: usize,
        life: u32,
    },
}

/// What a replica is about to hand out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Logged {
    pub(crate) replica: usize,
    pub(crate) replica_life: u32,
    pub(crate) asked: Asked,
    pub(crate) leaf: Leaf,
    pub(crate) seq: u64,
}

/// Who asked for an SVID.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub(crate) workload: usize,
    pub(crate) life: u32,
    pub(crate) id: RequestId,
}

/// What a replica sends.
#[derive(Clone)]
pub(crate) enum Message {
    Bundle(Arc<View>),
    Query(u64),
    Renew(RenewOrder),
}

/// A process whose code is real and waits for answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TaskId {
    Controller(usize),
    /// Of a replica: its keys and promises.
    Replica(usize),
}

/// What a workload makes of a bundle that was sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    /// What it believes from now on, if that is something else than before.
    pub(crate) next: Option<usize>,
    /// What was sent was refused.
    pub(crate) refused: bool,
    /// What it believes now is not what was sent.
    pub(crate) differs: bool,
}

/// What workloads believe: few in number, shared by all who believe the same.
#[derive(Default)]
pub(crate) struct Trusts {
    all: Vec<Arc<Trust>>,
    /// What comes of a bundle, by what was held before and what was sent.
    next: BTreeMap<(Option<usize>, Bytes), Taken>,
}

impl Trusts {
    pub(crate) fn of(&self, class: usize) -> &Arc<Trust> {
        &self.all[class]
    }

    /// What a workload that believes `held` makes of this view's bundle.
    pub(crate) fn take(
        &mut self,
        held: Option<usize>,
        view: &View,
        trust_domain: &TrustDomain,
    ) -> Taken {
        let key = (held, view.encoded.clone());
        if let Some(known) = self.next.get(&key) {
            return *known;
        }
        let trust = held.map(|class| Arc::clone(&self.all[class]));
        let sent = &view.message;
        let next = bundle::next(trust.as_deref(), trust_domain, sent);
        let used = match &next {
            Ok(Some(next)) => Some(next),
            Ok(None) | Err(_) => trust.as_deref(),
        };
        let differs = used.is_some_and(|used| !bundle::is_as_sent(used, sent));
        let refused = next.is_err();
        let next = next.ok().flatten().map(|trust| self.class(trust));
        let taken = Taken { next, refused, differs };
        self.next.insert(key, taken);
        taken
    }

    pub(crate) fn class(&mut self, trust: Trust) -> usize {
        let same = |known: &Arc<Trust>| {
            known.sequence() == trust.sequence()
                && known.digest() == trust.digest()
                && known.tombstones() == trust.tombstones()
        };
        if let Some(class) = self.all.iter().rposition(same) {
            return class;
        }
        self.all.push(Arc::new(trust));
        self.all.len() - 1
    }
}

impl World {
    /// A world at its beginning: a founded trust domain, and everybody about to start.
    pub fn new(plan: Plan) -> Self {
        let time = TrueTime::new();
        let trust_domain: TrustDomain = "cluster.local".parse().unwrap();
        let (anchor_keys, issuer_keys) = (Vault::default(), Vault::default());
        let [active, standby] =
            [(); 2].map(|()| make_anchor(&trust_domain, START, plan.anchor_life).unwrap());
        let life = plan.timings.issuer_life;
        let issuer = make_issuer(&trust_domain, &active.der, &active.pkcs8, START, life).unwrap();
        let anchors =
            vec![active.as_anchor(AnchorState::Active), standby.as_anchor(AnchorState::Standby)];
        let first = issuer.as_issuer(active.id);
        let state = TrustDomainState::founded(trust_domain, anchors, first, START);
        for authority in [&active, &standby] {
            anchor_keys.put(&authority.pkcs8);
        }
        issuer_keys.put(&issuer.pkcs8);
        let mut world = Self {
            time,
            now: START,
            rng: SmallRng::seed_from_u64(plan.wanted.seed),
            queue: Queue::new(),
            store: Entries::default(),
            truth: Truth::new(&state),
            state: Arc::new(state.clone()),
            anchor_keys,
            issuer_keys,
            replicas: Vec::new(),
            controllers: Vec::new(),
            nodes: Vec::new(),
            workloads: Vec::new(),
            free: Vec::new(),
            by_uid: BTreeMap::new(),
            pods: 0,
            trusts: Trusts::default(),
            operator: Operator::default(),
            faults: Faults::default(),
            counts: Counts::default(),
            broken: None,
            names: BTreeMap::new(),
            story: Vec::new(),
            plan,
        };
        world.name_keys();
        world.store.put(TRUST_DOMAIN_KEY, Some(serde_json::to_vec(&state).unwrap().into()));
        for replica in 0..world.plan.replicas {
            world.add_replica(replica);
        }
        world.add_nodes();
        for _ in 0..world.plan.wanted.workloads {
            world.add_workload();
        }
        world.start_controller(0);
        let (fault, order) = (world.plan.fault_every, world.plan.order_every);
        let churn = world.plan.churn_every / world.plan.wanted.workloads.max(1) as u32;
        if world.plan.wanted.hazard == Hazard::All {
            let at = world.later(fault);
            world.queue.push(at, Event::Fault);
        }
        if world.plan.wanted.hazard != Hazard::None {
            let at = world.later(churn);
            world.queue.push(at, Event::Churn);
        }
        let at = world.later(order);
        world.queue.push(at, Event::Operator);
        world
    }

    /// Lets what happens happen until this time, or until an invariant breaks.
    pub fn run_until(&mut self, end: UnixTime) {
        while self.broken.is_none() && !self.faults.unnoticed {
            match self.queue.next_at() {
                Some(at) if at <= end => {}
                _ => break,
            }
            let Some((at, event)) = self.queue.pop() else { break };
            self.set_now(at.max(self.now));
            self.counts.events += 1;
            self.happen(event);
        }
        if self.broken.is_none() {
            self.set_now(end);
        }
    }

    pub(crate) fn set_now(&mut self, now: UnixTime) {
        self.now = now;
        self.time.set(now);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Ack { replica, life, stream, ack } => {
                self.ack_arrives(replica, life, stream, &ack)
            }
            Event::Answer { task, life, reply, answer } => {
                self.answered(task, life, *reply, &answer)
            }
            Event::Asked { task, life, heard, answer } => self.gathered(task, life, &heard, answer),
            Event::Call { task, life, call } => self.called(task, life, *call),
            Event::Churn => self.churn(),
            Event::Connect { workload, life } => self.connect(workload, life),
            Event::Deliver { workload, life, replica, stream, message } => {
                self.delivered(workload, life, replica, stream, message);
            }
            Event::Expire { workload, life } => self.expire(workload, life),
            Event::Fault => self.fault(),
            Event::FaultEnds(fault) => self.fault_ends(fault),
            Event::Issued { asked, outcome } => self.issued(asked, *outcome),
            Event::Listed { key, phase } => self.listed(&key, phase),
            Event::Logged(logged) => self.logged(*logged),
            Event::Mount { node } => self.mount(node),
            Event::Interference { order: true } => self.order_at_random(),
            Event::Interference { order: false } => self.one_fault(),
            Event::Operator => self.operate(),
            Event::RestartAll => self.restart_all(),
            Event::ReplicaRead { replica, life } => self.replica_reads(replica, life),
            Event::ReplicaWork { replica, life } => self.replica_works(replica, life),
            Event::Request { replica, asked } => self.requested(replica, asked),
            Event::Unlisted { key } => {
                self.store.put(&key, None);
            }
            Event::Wake { workload, life } => self.wake(workload, life),
        }
    }

    /// The stored state has been written: everybody will come to know, and every invariant about it
    /// is checked.
    pub(crate) fn state_written(&mut self, by: &str, revision: Revision) {
        let entry = self.store.get(TRUST_DOMAIN_KEY).unwrap();
        let state: TrustDomainState = serde_json::from_slice(&entry.value).unwrap();
        let before = std::mem::replace(&mut self.state, Arc::new(state));
        self.name_keys();
        self.counts.written(&before, &self.state);
        if self.plan.wanted.told {
            let line = self.state_in_words(&before);
            self.tell(|| format!("{by} writes revision {}: {line}", revision.0));
        }
        self.after_write(&before);
        self.back_up();
        self.interfere();
        let published = before.mounted_digest() != self.state.mounted_digest();
        if published {
            self.mount_soon();
        }
        for replica in 0..self.replicas.len() {
            self.read_soon(replica);
        }
    }

    /// Every node's mounted bundle becomes what is stored, after a while.
    pub(crate) fn mount_soon(&mut self) {
        for node in 0..self.nodes.len() {
            let at = self.now + self.draw(MOUNT_LAG_MAX);
            self.queue.push(at, Event::Mount { node });
        }
    }

    /// A time from now, exponentially distributed around this mean.
    pub(crate) fn later(&mut self, mean: Duration) -> UnixTime {
        let share: f64 = self.rng.random_range(0.0001..1.0);
        self.now + mean.mul_f64(-share.ln())
    }

    /// A share of this, at least a millisecond.
    pub(crate) fn draw(&mut self, most: Duration) -> Duration {
        let most = u64::try_from(most.as_millis()).unwrap_or(u64::MAX).max(1);
        Duration::from_millis(self.rng.random_range(1..=most))
    }

    pub(crate) fn chance(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    /// Adds to the story, if it is told.
    pub(crate) fn tell(&mut self, line: impl FnOnce() -> String) {
        if self.plan.wanted.told {
            let since = self.now.since(START);
            let (days, rest) = (since.as_secs() / 86_400, since.as_millis() % 86_400_000);
            let (hours, minutes, seconds) = (rest / 3_600_000, rest / 60_000 % 60, rest % 60_000);
            self.story.push(format!(
                "day {days:3} {hours:02}:{minutes:02}:{:02}.{:03}  {}",
                seconds / 1000,
                seconds % 1000,
                line()
            ));
        }
    }

    /// Keys are random; their names come in the order in which they are made, in every run alike.
    fn name_keys(&mut self) {
        let state = Arc::clone(&self.state);
        let anchors = state.anchors.iter().map(|anchor| ("A", anchor.id));
        let issuers = state.issuers.iter().map(|issuer| ("I", issuer.id));
        for (kind, id) in anchors.chain(issuers) {
            let number = self.names.len() + 1;
            self.names.entry(id).or_insert_with(|| format!("{kind}{number}"));
        }
    }

    pub(crate) fn name(&self, id: KeyId) -> String {
        self.names.get(&id).cloned().unwrap_or_else(|| "a key that never was in the state".into())
    }

    fn state_in_words(&self, before: &TrustDomainState) -> String {
        let state = &self.state;
        let anchors = state.anchors.iter().map(|anchor| {
            let tainted = if anchor.taint.is_some() { "!" } else { "" };
            format!("{}{tainted} {:?}", self.name(anchor.id), anchor.state)
        });
        let anchors: Vec<_> = anchors.collect();
        let rotation = state.rotation.as_ref().map_or_else(String::new, |rotation| {
            format!(", {} {} {:?}", rotation.kind(), rotation.number, rotation.phase.name())
        });
        let issuer = state.issuer_rotation.as_ref().map_or_else(String::new, |rotation| {
            format!(", issuer {:?} urgent {:?}", rotation.phase, rotation.urgent)
        });
        let ended = match (&before.rotation, &state.rotation, state.past.last()) {
            (Some(_), None, Some(past)) => {
                format!(", rotation {} is {:?}", past.number, past.outcome)
            }
            _ => String::new(),
        };
        let exempt = state.exemptions.iter().map(|exemption| {
            let instance = &exemption.instance;
            format!("{}@{}", instance.pod_uid, instance.started_at.as_secs())
        });
        let exempt = exempt.collect::<Vec<_>>().join(" ");
        let exempt = if exempt.is_empty() { exempt } else { format!(", exempt {exempt}") };
        format!(
            "seq {} [{}] signed by {}{rotation}{issuer}{ended}{}{}{exempt}",
            state.seq,
            anchors.join(", "),
            self.name(state.active_issuer),
            if state.paused { ", paused" } else { "" },
            if state.halted.is_some() { ", HALTED" } else { "" },
        )
    }
}

/// A platform brings a changed bundle to its pods within a minute.
const MOUNT_LAG_MAX: Duration = Duration::from_secs(60);
