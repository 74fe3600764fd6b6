//! Replicas of identity: the real copy of the state under its real lease, the real signers, the real
//! table of members and orders; simulated are the process around them, its network and its disk.
//!
//! An idle replica reads the store every two seconds. Nothing comes of such a read while nothing is
//! written, but that the lease goes on: so the reads since are made up for, at their own times, when
//! somebody wants something of the replica, and before each write.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::Rng as _;
use steadfast_api::trust::v1;
use steadfast_api::{KeyId, UnixTime};
use steadfast_identity::authority::SKEW;
use steadfast_identity::certify::{renewal_of, still_signs};
use steadfast_identity::issuer_keys::IssuerKeys;
use steadfast_identity::member;
use steadfast_identity::members::{Bounds, Members};
use steadfast_identity::metrics::Metrics;
use steadfast_identity::orders::{Orders, Owed, Sent};
use steadfast_identity::own::is_due;
use steadfast_identity::promise::Promise;
use steadfast_identity::refusal::Refusal;
use steadfast_identity::replica::{LEASE, Replica, Sources, View};
use steadfast_platform::store::TRUST_DOMAIN_KEY;
use steadfast_platform::{Entry, ReviewedToken};
use steadfast_process::Clock as _;
use steadfast_rotation_protocol::census;
use steadfast_rotation_protocol::renewal::Issued;

use crate::mutant::Mutant;
use crate::ops::{Call, Op, Port, Reply, Task};
use crate::parts::MachineClock;
use crate::workload::Leaf;
use crate::world::{Asked, Event, Logged, Message, TaskId, World};

/// The process of one replica.
pub(crate) struct ReplicaHost {
    /// Which start of it.
    pub(crate) life: u32,
    pub(crate) up: bool,
    /// Frozen until then: nothing happens in it.
    pub(crate) frozen_until: UnixTime,
    pub(crate) cut_from_store: bool,
    pub(crate) clock: MachineClock,
    pub(crate) real: Arc<Replica>,
    sources: Arc<Sources>,
    /// Where its reads leave what they write.
    halts: Port,
    pub(crate) members: Members,
    orders: Orders,
    streams: BTreeMap<u64, StreamHost>,
    own: Option<OwnLeaf>,
    /// Whether its reads have been confirmed, one after the other, up to the newest.
    confirmed: bool,
    /// When its next periodic read is due.
    next_read: UnixTime,
    pub(crate) task: Option<Task>,
    /// Its keeper of keys has nothing to do.
    pub(crate) resting: Option<Call>,
    changed_at: UnixTime,
}

struct StreamHost {
    workload: usize,
    life: u32,
    sent: Sent,
    /// When its last message arrives: messages of a stream keep their order.
    last: UnixTime,
}

/// What came of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// By this start of the replica; whether the query was newer than all before.
    Answer {
        life: u32,
        taken: bool,
    },
    Nothing,
}

/// The SVID that a replica shows.
#[derive(Clone, Copy)]
struct OwnLeaf {
    leaf: Leaf,
    issued_at: UnixTime,
    renew_at: UnixTime,
}

impl World {
    pub(crate) fn add_replica(&mut self, replica: usize) {
        let clock = MachineClock::new(&self.time);
        let host = self.replica_process(0, clock);
        self.replicas.push(host);
        let at = self.now + Duration::from_millis(1);
        self.queue.push(at, Event::ReplicaRead { replica, life: 0 });
    }

    fn replica_process(&self, life: u32, clock: MachineClock) -> ReplicaHost {
        let shared: Arc<dyn steadfast_process::Clock> = Arc::new(clock.clone());
        let real = Replica::new(Arc::clone(&shared), Metrics::unread());
        let port = Port::default();
        let (store, keys) = (Arc::new(port.clone()), Arc::new(port.clone()));
        let (_, nothing_proposed) = tokio::sync::watch::channel(None);
        let mut keeper = IssuerKeys::new(
            Arc::clone(&real),
            Arc::clone(&store) as _,
            keys,
            shared,
            nothing_proposed,
        );
        let promise = Promise::new(Arc::clone(&real), store, self.plan.svid_life);
        let pause = port.clone();
        let task = Task::new(port.clone(), async move {
            loop {
                // What fails is tried again with the next look, as in the process.
                let _ = keeper.look().await;
                let _ = promise.look().await;
                pause.call(Op::Pause(false)).await;
            }
        });
        let (off, halts) = (clock.clone(), Port::default());
        let sources = Arc::new(Sources {
            store: Arc::new(halts.clone()),
            keys: Arc::new(self.issuer_keys.clone()),
            clock_offset_ms: Box::new(move || Some(off.off_ms())),
        });
        ReplicaHost {
            life,
            up: true,
            frozen_until: UnixTime::default(),
            cut_from_store: false,
            clock,
            real,
            sources,
            halts,
            members: Members::new(Bounds { members: 100_000, streams: 100_000 }),
            orders: Orders::default(),
            streams: BTreeMap::new(),
            own: None,
            confirmed: false,
            next_read: self.now + READ_EVERY,
            task: Some(task),
            resting: None,
            changed_at: self.now,
        }
    }

    /// The process ends and starts again after a while; what it knew is gone.
    pub(crate) fn kill_replica(&mut self, replica: usize) {
        let streams = std::mem::take(&mut self.replicas[replica].streams);
        let host = &mut self.replicas[replica];
        (host.up, host.task, host.resting) = (false, None, None);
        host.life += 1;
        for stream in streams.into_values() {
            self.stream_broke(stream.workload, stream.life);
        }
    }

    pub(crate) fn start_replica(&mut self, replica: usize) {
        let host = &self.replicas[replica];
        if host.up {
            return;
        }
        let (life, clock, cut) = (host.life, host.clock.clone(), host.cut_from_store);
        self.replicas[replica] = self.replica_process(life, clock);
        self.replicas[replica].cut_from_store = cut;
        self.queue.push(self.now, Event::ReplicaRead { replica, life });
    }

    /// Whether nothing happens in this replica now; what should is put off.
    pub(crate) fn put_off(&mut self, replica: usize, event: Event) -> Option<Event> {
        let host = &self.replicas[replica];
        if host.up && host.frozen_until > self.now {
            self.queue.push(host.frozen_until, event);
            return None;
        }
        Some(event)
    }

    pub(crate) fn freeze_replica(&mut self, replica: usize, time: Duration) {
        self.refresh(replica);
        let wakes = self.draw(Duration::from_millis(50));
        let until = self.now + time;
        let host = &mut self.replicas[replica];
        (host.frozen_until, host.confirmed) = (until, false);
        // Its timers are overdue when it wakes.
        host.next_read = until + wakes;
    }

    /// It reads the store no more, or again.
    pub(crate) fn cut_from_store(&mut self, replica: usize, cut: bool) {
        self.refresh(replica);
        let host = &mut self.replicas[replica];
        (host.cut_from_store, host.confirmed) = (cut, false);
    }

    /// Makes up for the reads that were due meanwhile.
    pub(crate) fn refresh(&mut self, replica: usize) {
        let (now, host) = (self.now, &self.replicas[replica]);
        if !host.up || host.frozen_until > now || host.next_read > now {
            return;
        }
        let every = u64::try_from(READ_EVERY.as_millis()).unwrap_or(1);
        let since = u64::try_from(now.since(host.next_read).as_millis()).unwrap_or(0);
        let newest = host.next_read + READ_EVERY * u32::try_from(since / every).unwrap_or(0);
        self.replicas[replica].next_read = newest + READ_EVERY;
        if host_reads(&self.replicas[replica]) {
            // At the time of that read.
            self.time.set(newest);
            self.read(replica);
            self.time.set(now);
        }
    }

    pub(crate) fn refresh_all(&mut self) {
        for replica in 0..self.replicas.len() {
            self.refresh(replica);
        }
    }

    /// A write wakes the watch, or the next periodic read comes first.
    pub(crate) fn read_soon(&mut self, replica: usize) {
        let host = &self.replicas[replica];
        if !host.up {
            return;
        }
        let (life, until) = (host.life, host.next_read);
        let most = until.since(self.now).max(Duration::from_millis(1));
        // The watch is quick, as a rule.
        let most = if self.chance(80) { most.min(Duration::from_millis(30)) } else { most };
        let at = self.now + self.draw(most);
        self.queue.push(at, Event::ReplicaRead { replica, life });
    }

    pub(crate) fn replica_reads(&mut self, replica: usize, life: u32) {
        let event = Event::ReplicaRead { replica, life };
        let Some(Event::ReplicaRead { .. }) = self.put_off(replica, event) else { return };
        let host = &mut self.replicas[replica];
        if host.life != life || !host_reads(host) {
            return;
        }
        host.next_read = self.now + READ_EVERY;
        self.read(replica);
    }

    /// One read of the store, answered at once, by the clock's time.
    fn read(&mut self, replica: usize) {
        let Some(entry) = self.store.get(TRUST_DOMAIN_KEY) else { return };
        let host = &self.replicas[replica];
        let before = host.real.newest().map(|view| view.revision);
        let leased = host.confirmed;
        let sent = host.clock.since_boot();
        let outcome = self.answer_read(replica, sent, entry);
        let host = &mut self.replicas[replica];
        host.confirmed = outcome.is_ok();
        host.members.tidy(host.clock.now() - (self.plan.svid_life + SKEW));
        if let Err(refusal) = outcome
            && leased
        {
            let what = refusal.to_string();
            self.tell(|| format!("replica {replica} confirms nothing: {what}"));
        }
        let host = &mut self.replicas[replica];
        let after = host.real.newest().map(|view| view.revision);
        if after != before || !leased && host.confirmed {
            host.changed_at = self.now;
            let life = host.life;
            let soon = self.now + self.draw(Duration::from_secs(1));
            self.queue.push(soon, Event::ReplicaWork { replica, life });
            self.pump(replica);
        }
    }

    /// What comes of a read. One that finds the store put back halts it with a write, in no time.
    fn answer_read(&mut self, replica: usize, sent: Duration, entry: Entry) -> Result<(), Refusal> {
        let host = &self.replicas[replica];
        let (real, sources) = (Arc::clone(&host.real), Arc::clone(&host.sources));
        let outcome = Arc::new(Mutex::new(Ok(())));
        let told = Arc::clone(&outcome);
        let mut task = Task::new(host.halts.clone(), async move {
            let outcome = real.answered(sent, &entry, &sources).await;
            *told.lock().unwrap() = outcome;
        });
        while let Some(calls) = task.go_on() {
            for Call { op, answer } in calls {
                let reply = self.carry_out(TaskId::Replica(replica), op);
                *answer.lock().unwrap() = Some(reply);
            }
        }
        drop(task);
        outcome.lock().unwrap().clone()
    }

    /// What this replica may act on.
    pub(crate) fn view(&self, replica: usize) -> Result<Arc<View>, String> {
        let real = &self.replicas[replica].real;
        if self.plan.wanted.mutant == Some(Mutant::NoLease)
            && let Some(view) = real.newest()
        {
            return Ok(view);
        }
        real.current().map_err(|refusal| refusal.to_string())
    }

    /// Sends every stream what it is owed.
    pub(crate) fn pump(&mut self, replica: usize) {
        let mut streams = std::mem::take(&mut self.replicas[replica].streams);
        for (id, stream) in &mut streams {
            self.pump_one(replica, *id, stream);
        }
        let opened = std::mem::replace(&mut self.replicas[replica].streams, streams);
        self.replicas[replica].streams.extend(opened);
    }

    fn pump_one(&mut self, replica: usize, id: u64, stream: &mut StreamHost) {
        let view = self.view(replica).ok();
        let now = self.replicas[replica].clock.now();
        loop {
            let orders = &self.replicas[replica].orders;
            let who = &self.workloads[stream.workload];
            let who = (who.namespace.as_str(), who.uid.as_str());
            let Some(owed) = stream.sent.owed(who, view.as_deref(), orders, now) else { return };
            let message = match (owed, &view) {
                (Owed::Bundle(_), Some(view)) => Message::Bundle(Arc::clone(view)),
                (Owed::Bundle(_), None) => return,
                (Owed::Query(nonce), _) => Message::Query(nonce),
                (Owed::Renew(order), _) => Message::Renew(order),
            };
            let trip = self.trip();
            stream.last = (self.now + trip).max(stream.last + Duration::from_millis(1));
            let StreamHost { workload, life, last, .. } = *stream;
            self.queue.push(last, Event::Deliver { workload, life, replica, stream: id, message });
        }
    }

    /// How long a message is under way: mostly some milliseconds, now and then seconds.
    pub(crate) fn trip(&mut self) -> Duration {
        match self.rng.random_range(0..1000) {
            0..2 => self.draw(Duration::from_secs(20)),
            2..20 => self.draw(Duration::from_secs(1)),
            _ => self.draw(Duration::from_millis(60)),
        }
    }

    /// A workload opens a stream here.
    ///
    /// # Errors
    /// Why it is refused.
    pub(crate) fn open_stream(&mut self, replica: usize, workload: usize) -> Result<u64, String> {
        self.refresh(replica);
        self.view(replica)?;
        let state = &self.state;
        let who = &self.workloads[workload];
        let spiffe_id =
            format!("spiffe://{}/ns/{}/sa/web", state.trust_domain, who.namespace).parse().unwrap();
        let pod = ReviewedToken {
            namespace: who.namespace.clone(),
            service_account: "web".to_owned(),
            pod_name: who.uid.clone(),
            pod_uid: who.uid.clone(),
            node: None,
            token_id: String::new(),
            expires: UnixTime::default(),
        };
        let instance = member::Instance { pod_uid: who.uid.clone(), started_at: who.started_at };
        let (life, host) = (who.life, &mut self.replicas[replica]);
        let now = host.clock.now();
        let member = member::Member::new(instance, spiffe_id, &pod, "1".to_owned(), now);
        let joined = host.members.join(member).map_err(|refusal| refusal.to_string())?;
        let mut stream = StreamHost { workload, life, sent: Sent::default(), last: self.now };
        self.pump_one(replica, joined.id, &mut stream);
        self.replicas[replica].streams.insert(joined.id, stream);
        Ok(joined.id)
    }

    /// A stream ends, as this replica sees it.
    pub(crate) fn close_stream(&mut self, replica: usize, workload: usize, id: u64) {
        let who = &self.workloads[workload];
        let instance = member::Instance { pod_uid: who.uid.clone(), started_at: who.started_at };
        let host = &mut self.replicas[replica];
        if host.up && host.streams.remove(&id).is_some() {
            host.members.leave(&instance, id, host.clock.now());
        }
    }

    pub(crate) fn ack_arrives(&mut self, replica: usize, life: u32, stream: u64, ack: &v1::Ack) {
        let event = || Event::Ack { replica, life, stream, ack: Box::new(ack.clone()) };
        if self.replicas[replica].frozen_until > self.now {
            let event = event();
            self.put_off(replica, event);
            return;
        }
        let host = &mut self.replicas[replica];
        if host.life != life || !host.streams.contains_key(&stream) {
            return;
        }
        let Some(said) = &ack.instance else { return };
        let instance = member::Instance {
            pod_uid: said.pod_uid.clone(),
            started_at: said.started_at.map(UnixTime::from).unwrap_or_default(),
        };
        let (now, view) = (host.clock.now(), host.real.newest());
        let ack = member::Ack::new(ack, now, view.as_deref().map(|view| &view.state));
        host.members.acked(&instance, stream, ack);
        self.counts.acks += 1;
    }

    /// The SVID that this replica shows whoever dials it.
    pub(crate) fn own_leaf(&mut self, replica: usize) -> Option<Leaf> {
        self.refresh(replica);
        let host = &self.replicas[replica];
        let (now, view) = (host.clock.now(), host.real.current().ok());
        let signer = view.as_ref().and_then(|view| view.own_signer().ok());
        let signs = signer.map(|signer| (signer.id(), signer.anchor_id()));
        let due = host.own.is_none_or(|own| {
            let signed = (own.leaf.issuer, own.leaf.anchor);
            is_due(now, own.issued_at, own.renew_at, signed, signs)
        });
        if due && let (Some(view), Some(signer)) = (&view, signer) {
            let life = view.svid_life(signer, self.plan.svid_life);
            if let Ok(not_after) = signer.end(now, life) {
                let leaf = Leaf { issuer: signer.id(), anchor: signer.anchor_id(), not_after };
                let renew_at = renewal_of(now, not_after, 0.5);
                self.replicas[replica].own = Some(OwnLeaf { leaf, issued_at: now, renew_at });
            }
        }
        self.replicas[replica].own.map(|own| own.leaf)
    }

    /// A request for an SVID: steps 1 to 6b of `Certifier::certify`.
    pub(crate) fn requested(&mut self, replica: usize, asked: Asked) {
        if self.put_off(replica, Event::Request { replica, asked }).is_none() {
            return;
        }
        if !self.replicas[replica].up {
            return self.refuse(asked, "the connection was reset".to_owned());
        }
        self.refresh(replica);
        match self.prepare(replica, asked) {
            Err(reason) => self.refuse(asked, reason),
            Ok((leaf, seq)) => {
                let at = self.now + self.draw(Duration::from_millis(20));
                let replica_life = self.replicas[replica].life;
                let logged = Logged { replica, replica_life, asked, leaf, seq };
                self.queue.push(at, Event::Logged(Box::new(logged)));
            }
        }
    }

    fn prepare(&self, replica: usize, asked: Asked) -> Result<(Leaf, u64), String> {
        let view = self.view(replica)?;
        let who = &self.workloads[asked.workload];
        let signer = view.signer_for(&who.namespace, &who.uid).map_err(|r| r.to_string())?;
        let life = view.svid_life(signer, self.plan.svid_life);
        let now = self.replicas[replica].clock.now();
        let not_after = signer.end(now, life).map_err(|error| error.to_string())?;
        let not_after = match self.plan.wanted.mutant {
            Some(Mutant::EndlessSvids) => now + self.plan.anchor_life,
            _ => not_after,
        };
        let leaf = Leaf { issuer: signer.id(), anchor: signer.anchor_id(), not_after };
        Ok((leaf, view.state.seq))
    }

    /// The intent is in the log: signed, looked at once more, and handed out.
    pub(crate) fn logged(&mut self, logged: Logged) {
        let Logged { replica, replica_life, asked, leaf, seq } = logged;
        let event = Event::Logged(Box::new(logged));
        if self.put_off(replica, event).is_none() || self.replicas[replica].life != replica_life {
            return;
        }
        self.refresh(replica);
        let who = &self.workloads[asked.workload];
        let checked = self.view(replica).and_then(|view| {
            let signer = view.signer_for(&who.namespace, &who.uid).map_err(|r| r.to_string())?;
            still_signs(signer, leaf.issuer).map_err(|refusal| refusal.to_string())
        });
        if let Err(reason) = checked {
            return self.refuse(asked, reason);
        }
        self.counts.svids += 1;
        self.after_issue(asked.workload, leaf);
        let now = self.replicas[replica].clock.now();
        // As `Prepared::new`: to whole seconds, like a certificate.
        let not_after = UnixTime::from_millis(leaf.not_after.as_secs() * 1000);
        let share = self.rng.random_range(0.0..1.0);
        let issued = Issued {
            id: asked.id,
            issued_at: now,
            not_after,
            renew_at: Some(renewal_of(now, not_after, share)),
            server_time: now,
            seq,
            issuer: leaf.issuer,
        };
        let at = self.now + self.trip();
        let outcome = Box::new(Ok((issued, Leaf { not_after, ..leaf })));
        self.queue.push(at, Event::Issued { asked, outcome });
    }

    pub(crate) fn refuse(&mut self, asked: Asked, reason: String) {
        self.counts.refused += 1;
        let at = self.now + self.draw(Duration::from_millis(20));
        self.queue.push(at, Event::Issued { asked, outcome: Box::new(Err(reason)) });
    }

    /// The real keeper of keys and promises looks, if it rests.
    pub(crate) fn replica_works(&mut self, replica: usize, life: u32) {
        let event = Event::ReplicaWork { replica, life };
        if self.put_off(replica, event).is_none() || self.replicas[replica].life != life {
            return;
        }
        self.refresh(replica);
        if let Some(call) = self.replicas[replica].resting.take() {
            *call.answer.lock().unwrap() = Some(Reply::Resumed);
        }
        self.go_on(TaskId::Replica(replica));
    }

    /// The keeper has looked: it looks again soon after a change, and now and then in any case.
    pub(crate) fn replica_rests(&mut self, replica: usize, call: Call) {
        let host = &mut self.replicas[replica];
        host.resting = Some(call);
        let lately = self.now.since(host.changed_at) < Duration::from_secs(60);
        let pause = Duration::from_secs(if lately { 5 } else { 600 });
        let life = host.life;
        self.queue.push(self.now + pause, Event::ReplicaWork { replica, life });
    }

    /// Takes a query, if it is up and awake.
    pub(crate) fn take_query(&mut self, replica: usize, nonce: u64) -> Heard {
        let host = &mut self.replicas[replica];
        if !host.up || host.frozen_until > self.now {
            return Heard::Nothing;
        }
        let (life, taken) = (host.life, host.orders.query(nonce).is_ok());
        self.refresh(replica);
        self.pump(replica);
        Heard::Answer { life, taken }
    }

    /// What a replica knows, as the controller is told of it.
    pub(crate) fn report(&mut self, replica: usize, heard: Heard) -> census::Replica {
        let name = format!("identity#{replica}");
        let host = &self.replicas[replica];
        let taken = match heard {
            Heard::Answer { life, taken } if life == host.life => Some(taken),
            _ => None,
        };
        let Some(taken) = taken.filter(|_| host.up && host.frozen_until <= self.now) else {
            let (reached, newest_nonce) = (false, 0);
            return census::Replica {
                name,
                reached,
                started_at: UnixTime::default(),
                newest_nonce,
                loaded: vec![],
                own: None,
                members: vec![],
            };
        };
        let own = self.own_leaf(replica);
        let host = &self.replicas[replica];
        let (view, now) = (host.real.newest(), host.clock.now());
        let members = host.members.after(None, usize::MAX).into_iter();
        let members = members.map(steadfast_identity::fleet::member);
        let members = members.filter_map(|wire| steadfast_rotation::fleet::member(&wire));
        let members: Vec<_> = members.collect();
        self.told_of(&members);
        let host = &self.replicas[replica];
        census::Replica {
            name,
            reached: taken,
            started_at: UnixTime::default(),
            newest_nonce: host.orders.newest_query(),
            loaded: view.iter().flat_map(|view| view.loaded(now)).collect(),
            own: view.as_ref().map(|view| census::Ack {
                seq: view.state.seq,
                digest: KeyId::from_slice(&view.digest),
                mounted: None,
                svid: own
                    .map(|own| census::HeldSvid { issuer: own.issuer, not_after: own.not_after }),
                clock_offset_ms: 0,
                held: None,
            }),
            members,
        }
    }
}

fn host_reads(host: &ReplicaHost) -> bool {
    host.up && !host.cut_from_store
}

/// As in the process.
const READ_EVERY: Duration = Duration::from_millis(LEASE.as_millis() as u64 * 2 / 15);
