//! Workloads: the real renewal engine and the real rules for bundles; simulated are keys, TLS and
//! the network. An SVID is its facts.
//!
//! The engine wants to look at its clock every half minute. Nothing comes of it until something is
//! due, so a workload is woken for that alone and told that it idled ([`Renewal::idle`]). One that
//! reaches nobody and has nothing to lose rests until it can reach somebody.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;
use steadfast_api::trust::v1;
use steadfast_api::{KeyId, UnixTime};
use steadfast_identity_client::ack::{held, share};
use steadfast_rotation_protocol::Jitter;
use steadfast_rotation_protocol::Renewal;
use steadfast_rotation_protocol::renewal::{Effect, Event as Told, Issued, RequestId};

use crate::invariants::Counted;
use crate::mutant::Mutant;
use crate::parts::shifted;
use crate::plan::{DAY, Hazard, MINUTE};
use crate::world::{Asked, Event, Message, World};

/// An SVID, as far as anybody judges it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) issuer: KeyId,
    pub(crate) anchor: KeyId,
    pub(crate) not_after: UnixTime,
}

/// A machine.
pub(crate) struct Node {
    /// Its wall clock less true time.
    pub(crate) off_ms: i64,
    /// Nobody reaches it, and it reaches nobody.
    pub(crate) cut: bool,
    /// What is mounted into its pods.
    pub(crate) mounted: Arc<Mounted>,
}

/// A mounted bundle.
pub(crate) struct Mounted {
    pub(crate) anchors: Vec<KeyId>,
    pub(crate) digest: Option<KeyId>,
}

/// One workload: a pod, and the proxy in it.
#[derive(Default)]
pub(crate) struct Workload {
    pub(crate) uid: String,
    pub(crate) namespace: String,
    pub(crate) node: usize,
    /// Which start of it: events of an earlier one are void.
    pub(crate) life: u32,
    pub(crate) started_at: UnixTime,
    /// The same in true time.
    pub(crate) began: UnixTime,
    pub(crate) running: bool,
    /// Suspended: nothing happens in it.
    pub(crate) asleep: bool,
    /// Its pod was deleted by force, and it runs on where nobody reaches it.
    pub(crate) lost: bool,
    pub(crate) machine: Renewal,
    /// What it believes; `None`: nothing yet.
    pub(crate) trust: Option<usize>,
    pub(crate) svid: Option<Leaf>,
    under_way: Option<RequestId>,
    held: Vec<(RequestId, Leaf)>,
    pub(crate) stream: Option<(usize, u64)>,
    dialling: bool,
    failures: u32,
    /// Requests in a row that brought nothing.
    fruitless: u32,
    /// When it is to be woken.
    pub(crate) wakes_at: Option<UnixTime>,
    /// Whether it is looked at when its SVID ends.
    expires_at: Option<UnixTime>,
    /// Anchors of handshakes since its last ack.
    used: Vec<KeyId>,
    /// The same by issuer: inbound and outbound.
    issuers: BTreeMap<KeyId, (u64, u64)>,
    /// As what it counts for who accepts whom.
    pub(crate) counted: Option<Counted>,
    /// The end of the SVID that it must not let go before.
    pub(crate) keeps: Option<UnixTime>,
    /// What it uses is not what was sent last on its stream.
    differs: bool,
    /// Nobody looked at its clock: it slept, or its clock jumped.
    pub(crate) overslept: bool,
}

impl Workload {
    pub(crate) fn resource_key(&self) -> String {
        format!("resources/Pod/{}/{}", self.namespace, self.uid)
    }
}

impl World {
    pub(crate) fn add_nodes(&mut self) {
        let mounted = Arc::new(self.published_mount());
        for _ in 0..self.plan.nodes {
            let off_ms = self.rng.random_range(-200..200);
            self.nodes.push(Node { off_ms, cut: false, mounted: Arc::clone(&mounted) });
        }
    }

    fn published_mount(&self) -> Mounted {
        Mounted {
            anchors: self.state.published().map(|anchor| anchor.id).collect(),
            digest: KeyId::from_slice(&self.state.mounted_digest()),
        }
    }

    pub(crate) fn mount(&mut self, node: usize) {
        if !self.nodes[node].cut {
            self.nodes[node].mounted = Arc::new(self.published_mount());
        }
    }

    /// A new pod, somewhere.
    pub(crate) fn add_workload(&mut self) {
        let node = self.rng.random_range(0..self.nodes.len());
        let namespace = ["shop", "bank", "mail"][self.rng.random_range(0..3)].to_owned();
        self.pods += 1;
        let uid = format!("pod-{}", self.pods);
        let index = self.free.pop().unwrap_or(self.workloads.len());
        if index == self.workloads.len() {
            self.workloads.push(Workload::default());
        }
        let who = &mut self.workloads[index];
        let life = who.life;
        *who = Workload { uid: uid.clone(), namespace, node, life, ..Workload::default() };
        self.by_uid.insert(uid, index);
        // A pod stands in the platform's list before it runs; that it runs is known later.
        let key = self.workloads[index].resource_key().into_boxed_str();
        self.store.put(&key, Some(pod(&key, "Pending")));
        self.start_workload(index);
        let at = self.now + self.listing_lag();
        self.queue.push(at, Event::Listed { key, phase: "Running" });
    }

    fn listing_lag(&mut self) -> Duration {
        let lag = if self.faults.listing_lags { Duration::from_secs(60) } else { Duration::ZERO };
        lag + self.draw(Duration::from_secs(2))
    }

    /// The platform learns what has become of a pod: only ever forward.
    pub(crate) fn listed(&mut self, key: &str, phase: &'static str) {
        let Some(entry) = self.store.get(key) else { return };
        if entry.value == pod(key, "Succeeded") {
            return;
        }
        self.store.put(key, Some(pod(key, phase)));
        if phase == "Succeeded" {
            // Long enough to be seen: here an idle controller looks more rarely than it really would.
            let key = key.into();
            self.queue.push(self.now + self.plan.look_every.1 * 7, Event::Unlisted { key });
        }
    }

    /// The proxy starts: anew, with nothing.
    pub(crate) fn start_workload(&mut self, index: usize) {
        self.stop_workload(index);
        let wall = self.wall(index);
        let who = &mut self.workloads[index];
        who.started_at = wall.max(who.started_at + Duration::from_millis(1));
        (who.running, who.asleep, who.began, who.keeps) = (true, false, self.now, None);
        (who.machine, who.trust, who.svid) = (Renewal::new(), None, None);
        (who.under_way, who.wakes_at, who.expires_at) = (None, None, None);
        (who.dialling, who.failures, who.fruitless) = (false, 0, 0);
        who.held.clear();
        who.used.clear();
        who.issuers.clear();
        self.dial_soon(index, Duration::from_secs(2));
    }

    /// The proxy ends.
    pub(crate) fn stop_workload(&mut self, index: usize) {
        self.hang_up(index);
        let who = &mut self.workloads[index];
        who.life += 1;
        (who.running, who.trust, who.svid) = (false, None, None);
        self.count(index);
    }

    /// The pod is gone, in good order.
    pub(crate) fn remove_workload(&mut self, index: usize) {
        self.stop_workload(index);
        let key = self.workloads[index].resource_key().into();
        let at = self.now + self.listing_lag();
        self.queue.push(at, Event::Listed { key, phase: "Succeeded" });
        self.release(index);
    }

    /// Its place is another's from now on.
    pub(crate) fn release(&mut self, index: usize) {
        self.by_uid.remove(&self.workloads[index].uid);
        self.free.push(index);
    }

    /// The local wall clock.
    pub(crate) fn wall(&self, index: usize) -> UnixTime {
        shifted(self.now, self.nodes[self.workloads[index].node].off_ms)
    }

    pub(crate) fn reaches(&self, index: usize) -> bool {
        let who = &self.workloads[index];
        who.running && !who.asleep && !who.lost && !self.nodes[who.node].cut
    }

    /// Its end of the stream is gone; its replica notices.
    pub(crate) fn hang_up(&mut self, index: usize) {
        if let Some((replica, id)) = self.workloads[index].stream.take() {
            self.close_stream(replica, index, id);
        }
    }

    /// Its replica is gone.
    pub(crate) fn stream_broke(&mut self, index: usize, life: u32) {
        let who = &mut self.workloads[index];
        if who.life == life && who.stream.take().is_some() {
            self.dial_soon(index, Duration::from_secs(1));
        }
    }

    pub(crate) fn dial_soon(&mut self, index: usize, most: Duration) {
        if !self.reaches(index) || std::mem::replace(&mut self.workloads[index].dialling, true) {
            return;
        }
        let (workload, life) = (index, self.workloads[index].life);
        let at = self.now + self.draw(most);
        self.queue.push(at, Event::Connect { workload, life });
    }

    pub(crate) fn connect(&mut self, index: usize, life: u32) {
        if self.workloads[index].life != life {
            return;
        }
        self.workloads[index].dialling = false;
        if !self.reaches(index) || self.workloads[index].stream.is_some() {
            return;
        }
        let up: Vec<_> = (0..self.replicas.len()).filter(|r| self.replicas[*r].up).collect();
        let opened = match up.len() {
            // Whoever starts again wakes all who wait.
            0 => return self.start_machine(index),
            some => {
                let replica = up[self.rng.random_range(0..some)];
                self.dial(index, replica)
                    .and_then(|()| Ok((replica, self.open_stream(replica, index)?)))
            }
        };
        match opened {
            Ok(stream) => {
                let who = &mut self.workloads[index];
                (who.stream, who.failures) = (Some(stream), 0);
                self.start_machine(index);
                self.feed(index, Told::StreamCameBack);
                self.send_ack(index, 0);
            }
            Err(_) => {
                let who = &mut self.workloads[index];
                who.failures += 1;
                // The carrier's backoff; one that has failed for long is looked at less often here
                // than it really would dial.
                let most = match who.failures {
                    0..6 => Duration::from_millis(200) * 2_u32.pow(who.failures),
                    6..60 => Duration::from_secs(5),
                    _ => Duration::from_secs(60),
                };
                self.start_machine(index);
                self.dial_soon(index, most);
            }
        }
    }

    /// The engine is told that it may ask once the service was reached, or could not be.
    fn start_machine(&mut self, index: usize) {
        self.feed(index, Told::Started);
    }

    /// A TLS connection to a replica, authenticated by the live bundle or the mounted one.
    ///
    /// # Errors
    /// Why there is none.
    fn dial(&mut self, index: usize, replica: usize) -> Result<(), String> {
        let host = &self.replicas[replica];
        if !host.up || host.frozen_until > self.now {
            return Err("no answer".to_owned());
        }
        let own = self.own_leaf(replica).ok_or("the replica has no SVID")?;
        let who = &self.workloads[index];
        let live = who.trust.map(|class| &**self.trusts.of(class));
        let (denied, gone) = match live {
            Some(trust) => {
                (trust.denied().contains(&own.issuer), trust.tombstones().contains(&own.anchor))
            }
            None => (false, false),
        };
        let by_live = live.is_some_and(|t| t.anchors().iter().any(|a| a.id() == own.anchor));
        let mounted = &self.nodes[who.node].mounted;
        let by_mounted = mounted.anchors.contains(&own.anchor) && !gone;
        if own.not_after <= self.wall(index) {
            return Err("the replica's SVID has expired".to_owned());
        }
        if denied || !(by_live || by_mounted) {
            return Err("neither bundle fits".to_owned());
        }
        Ok(())
    }

    /// A message of its stream.
    pub(crate) fn delivered(
        &mut self,
        index: usize,
        life: u32,
        replica: usize,
        stream: u64,
        message: Message,
    ) {
        let who = &self.workloads[index];
        if who.life != life || who.stream != Some((replica, stream)) || !self.reaches(index) {
            return;
        }
        let server_time = steadfast_process::Clock::now(&self.replicas[replica].clock);
        self.feed(index, Told::ServerTime(server_time));
        match message {
            Message::Bundle(view) => self.take_bundle(index, &view),
            Message::Query(nonce) => self.send_ack(index, nonce),
            Message::Renew(order) => {
                let who = &self.workloads[index];
                let instance = v1::Instance {
                    pod_uid: who.uid.clone(),
                    started_at: Some(who.started_at.into()),
                };
                let share = share(&instance);
                let (id, from, window) = (order.id, order.from, order.window);
                self.feed(index, Told::PulledForward { id, from, window, share });
            }
        }
    }

    fn take_bundle(&mut self, index: usize, view: &steadfast_identity::replica::View) {
        let mutant = self.plan.wanted.mutant;
        let held = self.workloads[index].trust;
        let held = if mutant == Some(Mutant::AnyBundle) { None } else { held };
        let taken = self.trusts.take(held, view, &self.state.trust_domain.clone());
        self.counts.bundles_refused += u64::from(taken.refused);
        self.workloads[index].differs = taken.differs;
        let Some(class) = taken.next else { return self.send_ack(index, 0) };
        let class = if mutant == Some(Mutant::ForeignBundle) && self.chance(1) {
            self.foreign_bundle(class)
        } else {
            class
        };
        self.counts.bundles += 1;
        let before = self.workloads[index].trust.replace(class);
        self.after_bundle(index, before, class);
        self.count(index);
        let trust = self.trusts.of(class);
        let (seq, denied) = (trust.sequence(), trust.denied().iter().copied().collect());
        self.feed(index, Told::BundleInstalled { seq, denied });
        self.send_ack(index, 0);
    }

    /// Says what it uses; 0 is no query's nonce.
    fn send_ack(&mut self, index: usize, nonce: u64) {
        let Some((replica, stream)) = self.workloads[index].stream else { return };
        if nonce > 0 {
            self.shake_hands(index);
            if self.plan.wanted.mutant != Some(Mutant::ReplyCrossesAck) {
                self.feed(index, Told::AckSent);
            }
        }
        let lost = self.faults.acks_lost && self.chance(50);
        let trip = self.trip();
        let who = &mut self.workloads[index];
        let used = std::mem::take(&mut who.used);
        let issuers = std::mem::take(&mut who.issuers);
        if lost {
            return;
        }
        let trust = who.trust.map(|class| self.trusts.of(class));
        let mounted = self.nodes[who.node].mounted.digest;
        let id = |id: KeyId| id.as_bytes().to_vec();
        let offset = who.machine.clock_offset_millis();
        let ack = v1::Ack {
            instance: Some(v1::Instance {
                pod_uid: who.uid.clone(),
                started_at: Some(who.started_at.into()),
            }),
            nonce,
            seq: trust.map_or(0, |trust| trust.sequence()),
            digest: trust.map_or_else(Vec::new, |trust| trust.digest().to_vec()),
            issuers: issuers.into_iter().map(issuer_use).collect(),
            mounted_digest: mounted.map(id).unwrap_or_default(),
            svid_issuer: who.svid.map(|svid| id(svid.issuer)).unwrap_or_default(),
            svid_not_after: who.svid.map(|svid| svid.not_after.into()),
            clock_offset: offset.map(|millis| prost_types::Duration {
                seconds: millis / 1000,
                nanos: (millis % 1000) as i32 * 1_000_000,
            }),
            handshakes: used
                .into_iter()
                .map(|anchor| v1::AnchorUse { anchor_id: id(anchor), count: 1 })
                .collect(),
            held: trust.filter(|_| who.differs).map(|trust| held(trust)),
        };
        let life = self.replicas[replica].life;
        let at = self.now + trip;
        self.queue.push(at, Event::Ack { replica, life, stream, ack: Box::new(ack) });
    }

    /// It has talked to somebody since its last ack.
    fn shake_hands(&mut self, index: usize) {
        let peer = self.rng.random_range(0..self.workloads.len());
        if peer == index || !self.reaches(peer) || !self.reaches(index) {
            return;
        }
        self.after_handshake(index, peer);
        let (ours, theirs) = (self.workloads[index].svid, self.workloads[peer].svid);
        for (who, leaf) in [(index, theirs), (peer, ours)] {
            let Some(leaf) = leaf.filter(|leaf| leaf.not_after > self.now) else { continue };
            let workload = &mut self.workloads[who];
            if !workload.used.contains(&leaf.anchor) {
                workload.used.push(leaf.anchor);
            }
            let (inbound, outbound) = workload.issuers.entry(leaf.issuer).or_default();
            *if who == peer { inbound } else { outbound } += 1;
        }
    }

    /// Tells the engine, and does what it says.
    pub(crate) fn feed(&mut self, index: usize, event: Told) {
        let mut events = std::collections::VecDeque::from([event]);
        let wall = self.wall(index);
        let who = &mut self.workloads[index];
        if !std::mem::take(&mut who.overslept) {
            // It has looked at its clock all the while.
            who.machine.idle(wall);
        }
        while let Some(event) = events.pop_front() {
            let jitter = Jitter::from_bits(self.rng.random());
            let machine = &mut self.workloads[index].machine;
            let effects = machine.handle(wall, jitter, event);
            for effect in effects {
                if let Some(event) = self.carry_out_effect(index, effect) {
                    events.push_back(event);
                }
            }
        }
        self.invariant_s9_works_to_its_end(index);
        self.plan_wake(index);
    }

    fn carry_out_effect(&mut self, index: usize, effect: Effect) -> Option<Told> {
        let who = &mut self.workloads[index];
        match effect {
            Effect::Cancel { id } => {
                who.under_way.take_if(|under_way| *under_way == id);
            }
            Effect::Discard { id } => who.held.retain(|(held, _)| *held != id),
            Effect::Install { id } => return self.install(index, id),
            Effect::Request { id, attempt, .. } => self.request(index, id, attempt),
            Effect::Alarm(_) | Effect::Hold { .. } | Effect::Readiness(_) => {}
        }
        None
    }

    fn request(&mut self, index: usize, id: RequestId, attempt: u32) {
        let who = &mut self.workloads[index];
        (who.under_way, who.fruitless) = (Some(id), who.fruitless + 1);
        if !self.reaches(index) {
            // Nobody answers: the engine gives up by itself.
            return;
        }
        let asked = Asked { workload: index, life: self.workloads[index].life, id };
        let stream = self.workloads[index].stream.filter(|_| attempt == 1);
        let replica = match stream {
            Some((replica, _)) => replica,
            None => attempt.saturating_sub(1) as usize % self.replicas.len(),
        };
        if !self.replicas[replica].up {
            return self.refuse(asked, "the connection was refused".to_owned());
        }
        if stream.is_none()
            && let Err(reason) = self.dial(index, replica)
        {
            return self.refuse(asked, reason);
        }
        let at = self.now + self.trip();
        self.queue.push(at, Event::Request { replica, asked });
    }

    /// A reply: used only if it is still waited for, and only if it fits what is believed.
    pub(crate) fn issued(&mut self, asked: Asked, outcome: Result<(Issued, Leaf), String>) {
        let Asked { workload: index, life, id } = asked;
        let who = &mut self.workloads[index];
        if who.life != life || who.asleep || who.under_way != Some(id) {
            return;
        }
        if !self.reaches(index) {
            return;
        }
        let who = &mut self.workloads[index];
        who.under_way = None;
        let event = match outcome {
            Err(reason) => {
                if self.plan.wanted.mutant == Some(Mutant::DropsSvid) {
                    who.svid = None;
                    self.count(index);
                }
                Told::Failed { id, reason }
            }
            Ok((issued, leaf)) => {
                let trust = who.trust.map(|class| self.trusts.of(class));
                let known = trust.filter(|trust| trust.sequence() >= issued.seq);
                match known.map(|trust| verify(trust, leaf, issued.server_time)) {
                    Some(Err(reason)) => Told::Failed { id, reason },
                    Some(Ok(())) | None => {
                        who.held.push((id, leaf));
                        Told::Issued(issued)
                    }
                }
            }
        };
        self.feed(index, event);
    }

    fn install(&mut self, index: usize, id: RequestId) -> Option<Told> {
        let who = &mut self.workloads[index];
        let held = who.held.iter().position(|(held, _)| *held == id);
        let leaf = held.map(|held| who.held.swap_remove(held).1);
        let trust = who.trust.map(|class| Arc::clone(self.trusts.of(class)));
        let failed = |reason: &str| Some(Told::InstallFailed { id, reason: reason.to_owned() });
        let (Some(leaf), Some(trust)) = (leaf, trust) else { return failed("it is not held") };
        let offset = self.workloads[index].machine.clock_offset_millis().unwrap_or(0);
        let server_now = shifted(self.wall(index), -offset);
        if let Err(reason) = verify(&trust, leaf, server_now) {
            return failed(&reason);
        }
        self.counts.installs += 1;
        let who = &mut self.workloads[index];
        (who.svid, who.fruitless) = (Some(leaf), 0);
        self.count(index);
        self.plan_expiry(index);
        None
    }

    fn plan_expiry(&mut self, index: usize) {
        let who = &mut self.workloads[index];
        let Some(svid) = who.svid else { return };
        if who.expires_at.is_none() {
            who.expires_at = Some(svid.not_after);
            let life = who.life;
            self.queue.push(svid.not_after, Event::Expire { workload: index, life });
        }
    }

    pub(crate) fn expire(&mut self, index: usize, life: u32) {
        let who = &mut self.workloads[index];
        if who.life != life {
            return;
        }
        who.expires_at = None;
        let Some(svid) = who.svid else { return };
        if svid.not_after > self.now {
            return self.plan_expiry(index);
        }
        self.count(index);
        if !self.workloads[index].asleep {
            self.counts.expired += 1;
            self.feed(index, Told::Tick);
        }
    }

    /// When something is due, in true time.
    fn plan_wake(&mut self, index: usize) {
        let wall = self.wall(index);
        let reaches = self.reaches(index) && self.replicas.iter().any(|replica| replica.up);
        let who = &mut self.workloads[index];
        if !who.running || who.asleep {
            return;
        }
        let alive = who.svid.is_some_and(|svid| svid.not_after > self.now);
        if !reaches && !alive {
            return;
        }
        let due = who.machine.next_renewal().or_else(|| who.machine.next_wakeup());
        let Some(due) = due else { return };
        // What has been asked for in vain for long is asked for less often here than it really is.
        let patient =
            !alive && who.fruitless > FRUITLESS_MAX && who.machine.next_renewal().is_some();
        let least = if patient { MINUTE } else { Duration::from_millis(1) };
        let at = self.now + due.since(wall).max(least);
        if who.wakes_at.is_none_or(|planned| planned > at || planned <= self.now) {
            who.wakes_at = Some(at);
            let life = who.life;
            self.queue.push(at, Event::Wake { workload: index, life });
        }
    }

    pub(crate) fn wake(&mut self, index: usize, life: u32) {
        let who = &mut self.workloads[index];
        if who.life != life || who.asleep || who.wakes_at != Some(self.now) {
            return;
        }
        who.wakes_at = None;
        self.feed(index, Told::Tick);
    }

    pub(crate) fn idle(&mut self, index: usize) {
        let wall = self.wall(index);
        self.workloads[index].machine.idle(wall);
    }

    /// Whoever rests because nobody could be reached tries again.
    pub(crate) fn stir(&mut self, index: usize) {
        if !self.reaches(index) {
            return;
        }
        if self.workloads[index].stream.is_none() {
            self.dial_soon(index, Duration::from_secs(5));
        }
        self.feed(index, Told::Tick);
    }

    pub(crate) fn stir_all(&mut self) {
        for index in 0..self.workloads.len() {
            self.stir(index);
        }
    }

    /// A workload, or a pod, is replaced in the course of things.
    pub(crate) fn churn(&mut self) {
        let index = self.rng.random_range(0..self.workloads.len());
        if self.reaches(index) {
            self.counts.churned += 1;
            if self.chance(50) {
                self.start_workload(index);
            } else {
                self.remove_workload(index);
                self.add_workload();
            }
        }
        if self.plan.wanted.hazard != Hazard::None && !self.faults.over {
            let share = self.plan.wanted.workloads.max(1) as u32;
            let at = self.later(self.plan.churn_every / share);
            self.queue.push(at, Event::Churn);
        }
    }
}

fn issuer_use((issuer, (inbound, outbound)): (KeyId, (u64, u64))) -> v1::IssuerUse {
    let issuer_id = issuer.as_bytes().to_vec();
    v1::IssuerUse { issuer_id, inbound, outbound, ..v1::IssuerUse::default() }
}

/// A pod, as the platform has it.
fn pod(key: &str, phase: &str) -> bytes::Bytes {
    let mut parts = key.rsplit('/');
    let (uid, namespace) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
    format!(
        r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{uid}","namespace":"{namespace}","uid":"{uid}"}},"spec":{{"serviceAccountName":"web","containers":[]}},"status":{{"phase":"{phase}"}}}}"#
    )
    .into()
}

/// As a peer, and as its owner, judges an SVID.
fn verify(
    trust: &steadfast_identity_client::Trust,
    leaf: Leaf,
    now: UnixTime,
) -> Result<(), String> {
    if trust.denied().contains(&leaf.issuer) {
        return Err("its issuer is denied".to_owned());
    }
    if !trust.anchors().iter().any(|anchor| anchor.id() == leaf.anchor) {
        return Err("it fits no anchor".to_owned());
    }
    if now >= leaf.not_after || leaf.not_after > now + DAY * 800 {
        return Err("its life is over".to_owned());
    }
    Ok(())
}

/// Beyond so many requests in vain, history is told in larger steps.
const FRUITLESS_MAX: u32 = 20;
