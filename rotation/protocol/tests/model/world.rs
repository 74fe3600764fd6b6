//! A small mesh: a store, replicas, workloads and controllers, of which each step is one action.
//!
//! The controller is the real one; around it everything may happen in any order. Time goes in ticks
//! of one read lease and is kept relative to now, revisions and nonces by their order only, so that
//! worlds that differ in nothing that matters are one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::census::{
    Ack, HeldSvid, Listed, Member, ProxyStatus, Replica, Round,
};
use steadfast_rotation_protocol::controller::{
    Change, Controller, Effect, Made, Now, Observation, Persist, Signed, Timings, Wait,
};
use steadfast_rotation_protocol::guard::Fence;
use steadfast_rotation_protocol::journal;
use steadfast_rotation_protocol::rotation::{Phase, PhaseName};
use steadfast_rotation_protocol::schedule::Schedule;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, Condemned, EXTERNAL, IssuerRecord, Label, Request,
};
use steadfast_rotation_protocol::{Instance, TrustDomainState};

use crate::shortcut::Shortcut;

/// What can happen in a world, beside what must.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) name: String,
    /// Small enough to be searched to its end each time.
    pub(crate) small: bool,
    pub(crate) proxies: usize,
    pub(crate) replicas: usize,
    pub(crate) controllers: usize,
    /// Each may be given once, at any time, in this order.
    pub(crate) orders: Vec<Order>,
    pub(crate) faults: Faults,
    /// Writes of controllers may be under way for any time.
    pub(crate) slow_writes: bool,
    /// Replicas' clocks are ahead of the store's by so many ticks: as many as they may be.
    pub(crate) skew: u64,
    /// SVIDs end, after so many ticks; else they outlive the rotation.
    pub(crate) svid_life: Option<u64>,
    /// Every stream is at one replica at the beginning, and the other has an older copy.
    pub(crate) gathered: bool,
    /// What was ordered first, and has come to this phase when the rest begins.
    pub(crate) from: Option<PhaseName>,
    pub(crate) shortcut: Option<Shortcut>,
}

/// How often each may happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Faults {
    pub(crate) controller_restarts: u8,
    pub(crate) replica_restarts: u8,
    pub(crate) proxy_restarts: u8,
    /// A workload's stream breaks, or it cannot reach anybody; it runs on.
    pub(crate) cuts: u8,
    /// A workload is on no list any more, and runs on.
    pub(crate) vanishes: u8,
    pub(crate) restores: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Order {
    Abort,
    ExemptMissing,
    Rotate,
    /// With an anchor of the person's own, that everybody still has to learn.
    RotateGiven,
    /// To an anchor whose key is with somebody else.
    RotateExternal,
    /// He has signed the issuer that he was asked for.
    OwnerSigns,
    RotateIssuer,
    /// The active anchor's key is in other hands.
    TaintActive,
    /// That of the one being drained, or else of the standby.
    TaintOther,
    IssuerStolen,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) state: TrustDomainState,
    pub(crate) revision: u64,
    /// The keys of anchors that there are, by what they were made for.
    keys: BTreeMap<Label, KeyId>,
    next_key: u8,
    pub(crate) controllers: Vec<Ctl>,
    pub(crate) nodes: Vec<Node>,
    orders: usize,
    faults: Faults,
    backup: Option<Box<(TrustDomainState, u64)>>,
    /// Anchors whose addition the census has settled.
    settled: BTreeSet<KeyId>,
    /// What went wrong, if something did.
    pub(crate) broken: Option<&'static str>,
}

/// A replica and a workload whose trust stream is there: they are told apart by nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Node {
    pub(crate) replica: Option<Rep>,
    pub(crate) proxy: Option<Proxy>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Rep {
    served: Option<Served>,
    /// The read that confirmed it was in this tick.
    leased: bool,
    nonce: u64,
    /// The newest query of each controller that it took.
    taken: BTreeMap<usize, u64>,
    members: BTreeMap<usize, Rec>,
}

/// What of the state a replica acts on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Served {
    seq: u64,
    anchors: Vec<KeyId>,
    tombstones: Vec<KeyId>,
    denied: Vec<KeyId>,
    issuer: KeyId,
    anchor: KeyId,
    halted: bool,
}

/// What a replica knows of its member.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Rec {
    started: u64,
    open: bool,
    last_heard: u64,
    answered: u64,
    answered_before: u64,
    seq: u64,
    anchors: Vec<KeyId>,
    denied: Vec<KeyId>,
    svid: Option<Svid>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Proxy {
    /// Which start of it: it does not tell what is older.
    started: u64,
    /// The replica that its stream is at, or was last.
    home: usize,
    /// It reaches its replica.
    connected: bool,
    listed: bool,
    seq: u64,
    anchors: Vec<KeyId>,
    tombstones: Vec<KeyId>,
    denied: Vec<KeyId>,
    svid: Option<Svid>,
    reply: Option<(Svid, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Svid {
    anchor: KeyId,
    issuer: KeyId,
    /// The last tick in which it is valid, by the store's clock.
    not_after: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Ctl {
    pub(crate) fence: Option<Fence>,
    nonce: u64,
    pending: Option<Box<Pending>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pending {
    expected: u64,
    state: TrustDomainState,
    /// The rotation and phase that it was decided in.
    from: (u64, Option<PhaseName>),
    generating: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// A tick of all clocks.
    Tick,
    /// A replica reads the store.
    Read(usize),
    /// A workload's stream brings it the bundle.
    Bundle(usize),
    /// A workload asks a replica for an SVID, and it signs.
    Request(usize, usize),
    /// The reply arrives.
    Install(usize),
    /// A workload answers the newest query of its replica.
    Answer(usize),
    /// A controller looks, and acts.
    Look(usize),
    /// A controller's write reaches the store.
    Write(usize),
    Give,
    RestartController(usize),
    RestartReplica(usize),
    RestartProxy(usize),
    Cut(usize),
    /// A workload opens a stream at a replica.
    Reconnect(usize, usize),
    Vanish(usize),
    Backup,
    Restore,
    Recover,
}

impl World {
    /// Where everything begins.
    pub(crate) fn new(config: &Config) -> Self {
        let mut world = Self::founded(config);
        let Some(phase) = config.from else { return world };
        world.take(config, Action::Give);
        for _ in 0..100 {
            if place(&world.state).1 == Some(phase) {
                if config.gathered {
                    world.answer_at_home(config);
                }
                return world;
            }
            world.go_well(config);
        }
        panic!("{phase:?} was not reached: {world:#?}");
    }

    /// Everybody does what he should, once.
    pub(crate) fn go_well(&mut self, config: &Config) {
        let busy = self.state.rotation.is_some() || self.state.issuer_rotation.is_some();
        if busy && self.controllers[0].pending.is_none() {
            self.take(config, Action::Tick);
        }
        // Equal nodes change places: whoever has done his part is not asked again.
        for _ in 0..4 {
            for i in 0..self.nodes.len() {
                self.take(config, Action::Read(i));
            }
            for i in 0..config.proxies {
                self.take(config, Action::Bundle(i));
                let proxy = self.nodes[i].proxy.as_ref();
                let active = self.state.active_issuer;
                if proxy.is_some_and(|p| p.svid.is_none_or(|svid| svid.issuer != active)) {
                    self.take(config, Action::Request(i, 0));
                    self.take(config, Action::Install(i));
                }
                self.take(config, Action::Answer(i));
            }
        }
        self.take(config, Action::Look(0));
        self.take(config, Action::Write(0));
    }

    /// The one replica that has streams learns what is new; the other acts on what it had.
    fn answer_at_home(&mut self, config: &Config) {
        for _ in 0..4 {
            if let Some(home) = self.nodes[0].proxy.as_ref().map(|proxy| proxy.home) {
                self.take(config, Action::Read(home));
            }
            for i in 0..config.proxies {
                self.take(config, Action::Bundle(i));
            }
        }
    }

    fn take(&mut self, config: &Config, action: Action) {
        if let Some(next) = self.after(config, action) {
            *self = next;
        }
    }

    fn founded(config: &Config) -> Self {
        let (a, b) = (key(1), key(2));
        let anchor = |id, state| anchor(config, id, state);
        let anchors = vec![anchor(a, AnchorState::Active), anchor(b, AnchorState::Standby)];
        let first = issuer(a, 0);
        let mut state =
            TrustDomainState::founded(trust_domain(), anchors, first, UnixTime::from_millis(0));
        if config.orders.contains(&Order::RotateGiven) {
            state.anchors.push(anchor(key(9), AnchorState::Generated));
        }
        if config.orders.contains(&Order::RotateExternal) {
            let given = anchor(key(9), AnchorState::Generated);
            state.anchors.push(AnchorRecord { key_ref: EXTERNAL.to_owned(), ..given });
        }
        let served = Served::of(&state);
        let made = |attempt| Label { rotation: 0, attempt };
        let nodes = (0..config.proxies.max(config.replicas)).map(|i| {
            let proxy = (i < config.proxies).then(|| Proxy {
                connected: true,
                listed: true,
                seq: 1,
                anchors: served.anchors.clone(),
                svid: Some(Svid {
                    anchor: a,
                    issuer: state.active_issuer,
                    not_after: config.not_after(),
                }),
                ..Proxy::default()
            });
            let replica = (i < config.replicas).then(|| Rep {
                served: Some(served.clone()),
                leased: true,
                ..Rep::default()
            });
            Node { replica, proxy }
        });
        let mut nodes: Vec<Node> = nodes.collect();
        for i in 0..config.proxies {
            let home = if config.gathered { 0 } else { i % config.replicas };
            let Some(proxy) = &mut nodes[i].proxy else { continue };
            proxy.home = home;
            let rec = Rec::of(proxy, 0, 0);
            if let Some(replica) = &mut nodes[home].replica {
                replica.members.insert(i, rec);
            }
        }
        Self {
            revision: 1,
            keys: [(made(1), a), (made(2), b)].into(),
            next_key: 3,
            controllers: vec![Ctl::default(); config.controllers],
            nodes,
            orders: 0,
            faults: config.faults,
            backup: None,
            settled: [a, b].into(),
            broken: None,
            state,
        }
        .normal()
    }

    pub(crate) fn actions(&self, config: &Config) -> Vec<Action> {
        let mut actions = vec![Action::Tick];
        let has_replica = |i: usize| self.nodes[i].replica.is_some();
        for (i, node) in self.nodes.iter().enumerate() {
            if node.replica.is_some() {
                actions.push(Action::Read(i));
                if self.faults.replica_restarts > 0 {
                    actions.push(Action::RestartReplica(i));
                }
            }
            let Some(proxy) = &node.proxy else { continue };
            if proxy.connected {
                actions.extend([Action::Bundle(i), Action::Answer(i)]);
                actions.extend(
                    (0..self.nodes.len())
                        .filter(|r| has_replica(*r))
                        .map(|r| Action::Request(i, r)),
                );
                if self.faults.cuts > 0 {
                    actions.push(Action::Cut(i));
                }
            } else {
                actions.extend(
                    (0..self.nodes.len())
                        .filter(|r| has_replica(*r))
                        .map(|r| Action::Reconnect(i, r)),
                );
            }
            if proxy.reply.is_some() {
                actions.push(Action::Install(i));
            }
            if self.faults.proxy_restarts > 0 {
                actions.push(Action::RestartProxy(i));
            }
            if self.faults.vanishes > 0 && proxy.listed {
                actions.push(Action::Vanish(i));
            }
        }
        for (i, controller) in self.controllers.iter().enumerate() {
            match controller.pending {
                Some(_) => actions.push(Action::Write(i)),
                None => actions.push(Action::Look(i)),
            }
            if self.faults.controller_restarts > 0 {
                actions.push(Action::RestartController(i));
            }
        }
        if self.orders < config.orders.len() {
            actions.push(Action::Give);
        }
        if self.faults.restores > 0 {
            actions.push(if self.backup.is_some() { Action::Restore } else { Action::Backup });
        }
        if self.state.halted.is_some() {
            actions.push(Action::Recover);
        }
        actions
    }

    /// The world after an action; `None`: nothing happens.
    pub(crate) fn after(&self, config: &Config, action: Action) -> Option<Self> {
        let mut next = self.clone();
        next.act(config, action)?;
        next.check();
        let next = next.normal();
        (next != *self).then_some(next)
    }

    fn act(&mut self, config: &Config, action: Action) -> Option<()> {
        match action {
            Action::Tick => self.tick(config.skew),
            Action::Read(i) => {
                let served = Served::of(&self.state);
                let replica = self.nodes[i].replica.as_mut()?;
                // A replica that has seen a later state acts on no earlier one.
                if replica.served.as_ref().is_some_and(|held| held.seq > served.seq) {
                    return None;
                }
                (replica.served, replica.leased) = (Some(served), true);
            }
            Action::Bundle(i) => {
                let served = self.home(i).filter(|r| r.leased)?.served.clone()?;
                self.nodes[i].proxy.as_mut()?.take(&served);
                self.hear(i);
            }
            Action::Request(i, r) => self.request(config, i, r)?,
            Action::Install(i) => {
                let proxy = self.nodes[i].proxy.as_mut()?;
                let (svid, seq) = proxy.reply?;
                if seq > proxy.seq {
                    return None;
                }
                proxy.reply = None;
                // A chain that does not verify is not installed.
                if proxy.anchors.contains(&svid.anchor) && !proxy.denied.contains(&svid.issuer) {
                    proxy.svid = Some(svid);
                }
            }
            Action::Answer(i) => {
                let replica = self.home(i)?;
                let (nonce, known) = (replica.nonce, replica.members.get(&i).filter(|m| m.open)?);
                let answered = known.answered;
                if nonce <= answered {
                    return None;
                }
                let proxy = self.nodes[i].proxy.as_mut()?;
                if config.shortcut != Some(Shortcut::ReplyCrossesAck) {
                    proxy.reply = None;
                }
                let rec = Rec::of(proxy, nonce, answered);
                self.home(i)?.members.insert(i, rec);
            }
            Action::Look(i) => self.look(config, i)?,
            Action::Write(i) => self.write(config, i)?,
            Action::Give => {
                let order = *config.orders.get(self.orders)?;
                self.orders += 1;
                self.give(order)?;
            }
            Action::RestartController(i) => {
                self.faults.controller_restarts -= 1;
                self.controllers[i] = Ctl::default();
            }
            Action::RestartReplica(i) => {
                self.faults.replica_restarts -= 1;
                self.nodes[i].replica = Some(Rep::default());
                let proxies = self.nodes.iter_mut().filter_map(|node| node.proxy.as_mut());
                for proxy in proxies.filter(|proxy| proxy.home == i) {
                    proxy.connected = false;
                }
            }
            Action::RestartProxy(i) => {
                self.faults.proxy_restarts -= 1;
                let proxy = self.nodes[i].proxy.as_mut()?;
                let (started, listed, home) = (proxy.started + 1, proxy.listed, proxy.home);
                *proxy = Proxy { started, listed, home, ..Proxy::default() };
                self.close(i);
            }
            Action::Cut(i) => {
                self.faults.cuts -= 1;
                self.nodes[i].proxy.as_mut()?.connected = false;
                self.close(i);
            }
            Action::Reconnect(i, r) => {
                // The first message of a stream is the bundle.
                self.nodes[i].proxy.as_mut()?.home = r;
                let served = self.home(i).filter(|r| r.leased)?.served.clone()?;
                let proxy = self.nodes[i].proxy.as_mut()?;
                proxy.connected = true;
                proxy.take(&served);
                let rec = Rec::of(proxy, 0, 0);
                self.home(i)?.members.insert(i, rec);
            }
            Action::Vanish(i) => {
                self.faults.vanishes -= 1;
                let proxy = self.nodes[i].proxy.as_mut()?;
                (proxy.listed, proxy.connected) = (false, false);
                self.close(i);
            }
            Action::Backup => self.backup = Some(Box::new((self.state.clone(), self.revision))),
            Action::Restore => {
                self.faults.restores -= 1;
                self.state = self.backup.take()?.0;
                self.revision += 1;
            }
            Action::Recover => {
                let proxies = || self.nodes.iter().filter_map(|node| node.proxy.as_ref());
                let seq = proxies().map(|proxy| proxy.seq).max().unwrap_or(0);
                let tombstones: BTreeSet<_> =
                    proxies().flat_map(|p| p.tombstones.clone()).collect();
                let tombstones: Vec<_> = tombstones.into_iter().collect();
                self.state.recover(seq, &tombstones);
                self.revision += 1;
            }
        }
        Some(())
    }

    fn request(&mut self, config: &Config, i: usize, r: usize) -> Option<()> {
        let replica = self.nodes[r].replica.as_ref()?;
        let leased = replica.leased || config.shortcut == Some(Shortcut::NoLease);
        let served = replica.served.as_ref().filter(|served| leased && !served.halted)?;
        let not_after = config.not_after() + config.skew;
        let svid = Svid { anchor: served.anchor, issuer: served.issuer, not_after };
        if !self.settled.contains(&svid.anchor) {
            self.broken = Some("S3: an SVID was issued under an anchor that was not acked");
        }
        let seq = served.seq;
        let proxy = self.nodes[i].proxy.as_mut()?;
        if proxy.reply.is_none() && proxy.svid == Some(svid) {
            return None;
        }
        proxy.reply = Some((svid, seq));
        if proxy.home == r {
            self.hear(i);
        }
        Some(())
    }

    /// What a controller would see and decide now.
    pub(crate) fn line(&self, config: &Config, i: usize) -> journal::Line {
        let mut controller = Controller::resume(timings(config), self.controllers[i].fence.clone());
        let seen = self.observation(config, i);
        journal::handle(&mut controller, timings(config), now(), seen).1
    }

    /// What a controller would wait for now.
    pub(crate) fn waiting(&self, config: &Config, i: usize) -> Wait {
        let mut controller = Controller::resume(timings(config), self.controllers[i].fence.clone());
        let _ = controller.handle(now(), &self.observation(config, i));
        controller.waiting().clone()
    }

    pub(crate) fn has_key(&self, id: KeyId) -> bool {
        self.keys.values().any(|key| *key == id)
    }

    fn look(&mut self, config: &Config, i: usize) -> Option<()> {
        let mut controller = Controller::resume(timings(config), self.controllers[i].fence.clone());
        let mut seen = self.observation(config, i);
        if let Some(shortcut) = config.shortcut {
            shortcut.bend_sight(&mut seen);
            shortcut.bend_fence(&mut controller, &seen, timings(config));
        }
        let effects = controller.handle(now(), &seen);
        let mut pending = None;
        for effect in effects {
            match effect {
                Effect::Destroy(condemned) => self.destroy(&condemned),
                Effect::Generate(label) => {
                    if !self.keys.contains_key(&label) {
                        self.keys.insert(label, key(self.next_key));
                        self.next_key += 1;
                    }
                }
                Effect::Persist(persist) => pending = Some(self.pending(config, *persist)),
                Effect::Query(nonce) => {
                    self.controllers[i].nonce = nonce;
                    for replica in self.nodes.iter_mut().filter_map(|node| node.replica.as_mut()) {
                        if nonce > replica.nonce {
                            replica.nonce = nonce;
                            replica.taken.insert(i, nonce);
                        }
                    }
                }
                // Identity and the key of the anchor are there: the next look finds it signed.
                Effect::Sign(_) => {}
            }
        }
        self.controllers[i].fence = controller.fence().cloned();
        if let Some(pending) = pending {
            self.controllers[i].pending = Some(Box::new(pending));
            if !config.slow_writes {
                self.write(config, i)?;
            }
        }
        Some(())
    }

    fn pending(&self, config: &Config, persist: Persist) -> Pending {
        let mut state = persist.state;
        if let Some(shortcut) = config.shortcut {
            shortcut.bend_write(&self.state, &mut state);
        }
        let generating = persist.change == Change::Left(PhaseName::Generating);
        Pending { expected: persist.expected, state, from: place(&self.state), generating }
    }

    fn write(&mut self, config: &Config, i: usize) -> Option<()> {
        let pending = self.controllers[i].pending.take()?;
        let unchanged = match config.shortcut {
            Some(Shortcut::CompareRotationAndPhase) => place(&self.state) == pending.from,
            _ => self.revision == pending.expected,
        };
        if !unchanged {
            self.controllers[i].fence = None;
            return Some(());
        }
        self.state = pending.state;
        self.revision += 1;
        let acked = self.state.anchors.iter().filter(|anchor| anchor.state.acked());
        self.settled.extend(acked.map(|anchor| anchor.id));
        let mut controller = Controller::resume(timings(config), None);
        controller.persisted(now(), self.revision);
        self.controllers[i].fence = controller.fence().cloned();
        Some(())
    }

    fn observation(&self, config: &Config, i: usize) -> Observation {
        let nonce = self.controllers[i].nonce;
        let round = (nonce > 0).then(|| self.round(i, nonce));
        let label = self.state.rotation.as_ref().map(|rotation| rotation.label());
        let made = label.and_then(|label| {
            let id = *self.keys.get(&label)?;
            Some(Made { label, anchor: anchor(config, id, AnchorState::Generated) })
        });
        let signed = self.state.wanted_issuer.map(|wanted| {
            let siblings =
                self.state.issuers.iter().filter(|issuer| issuer.anchor_id == wanted.anchor_id);
            let number = siblings.count() as u8 + u8::from(wanted.anchor_id == key(1));
            Signed { wanted, issuer: issuer(wanted.anchor_id, number) }
        });
        let undestroyed = self.state.condemned.iter().filter(|condemned| self.exists(**condemned));
        Observation {
            round,
            state: self.state.clone(),
            revision: self.revision,
            clock_offset_ms: None,
            made,
            signed,
            mirrors_current: true,
            undestroyed: undestroyed.copied().collect(),
        }
    }

    fn round(&self, i: usize, nonce: u64) -> Round {
        let proxies = self.nodes.iter().enumerate();
        let listed = proxies.filter_map(|(n, node)| Some((n, node.proxy.as_ref()?)));
        let listed = listed.filter(|(_, proxy)| proxy.listed).map(|(n, _)| Listed {
            pod_uid: uid(n),
            name: uid(n),
            proxy: ProxyStatus::Running,
        });
        let replicas = self.nodes.iter().enumerate().filter_map(|(n, node)| {
            let replica = node.replica.as_ref()?;
            Some(Replica {
                name: format!("replica {}", uid(n)),
                reached: replica.taken.get(&i) == Some(&nonce),
                newest_nonce: replica.nonce,
                own: None,
                loaded: self.state.issuers.iter().map(|issuer| issuer.id).collect(),
                members: replica.members.iter().map(|(p, rec)| rec.member(*p)).collect(),
            })
        });
        Round {
            nonce,
            listed: listed.collect(),
            replicas: replicas.collect(),
            vanished: Vec::new(),
        }
    }

    fn exists(&self, condemned: Condemned) -> bool {
        match condemned {
            Condemned::Anchor(id) => self.keys.values().any(|key| *key == id),
            Condemned::MadeFor(label) => self.keys.contains_key(&label),
        }
    }

    fn destroy(&mut self, condemned: &[Condemned]) {
        for key in condemned {
            let gone = |label: &Label, id: &KeyId| match key {
                Condemned::Anchor(condemned) => condemned == id,
                Condemned::MadeFor(condemned) => condemned == label,
            };
            let ids: Vec<_> =
                self.keys.iter().filter(|(l, id)| gone(l, id)).map(|(_, id)| *id).collect();
            if ids.iter().any(|id| self.state.published().any(|anchor| anchor.id == *id)) {
                self.broken = Some("S7: the key of a published anchor was destroyed");
            }
            self.keys.retain(|label, id| !gone(label, id));
        }
    }

    fn give(&mut self, order: Order) -> Option<()> {
        let now = UnixTime::from_millis(NOW * TICK);
        let request = |anchor| Request { by: String::new(), at: now, anchor, canary: None };
        let deadline = Duration::from_millis(TICK);
        let active = self.state.active_anchor().map(|anchor| anchor.id);
        let other = [AnchorState::Retiring, AnchorState::Standby]
            .into_iter()
            .find_map(|state| self.state.in_state(state).find(|a| a.taint.is_none()).map(|a| a.id));
        let taken = match order {
            Order::Abort => self.state.abort(),
            Order::ExemptMissing => {
                let missing = self
                    .nodes
                    .iter()
                    .position(|node| node.proxy.as_ref().is_some_and(|proxy| !proxy.connected))?;
                let started_at = started(self.nodes[missing].proxy.as_ref()?.started);
                let instance = Instance { pod_uid: uid(missing), started_at };
                self.state.exempt(instance, String::new(), String::new());
                Ok(())
            }
            Order::Rotate => self.state.request(request(None)),
            Order::RotateGiven => self.state.request(request(Some(key(9)))),
            Order::RotateExternal => self.state.request(request(Some(key(9)))),
            Order::OwnerSigns => {
                let wanted = *self.state.wanted_external.first()?;
                self.state.import_issuer(wanted, issuer(wanted.anchor_id, 0)).ok()?;
                Ok(())
            }
            Order::RotateIssuer => self.state.rotate_issuer(String::new(), None, now),
            Order::IssuerStolen => self.state.rotate_issuer(String::new(), Some(deadline), now),
            Order::TaintActive => self.state.taint(active?, String::new(), deadline),
            Order::TaintOther => self.state.taint(other?, String::new(), deadline),
        };
        taken.ok()?;
        self.revision += 1;
        Some(())
    }

    fn close(&mut self, i: usize) {
        if let Some(member) = self.home(i).and_then(|replica| replica.members.get_mut(&i)) {
            member.open = false;
        }
    }

    fn hear(&mut self, i: usize) {
        if let Some(member) = self.home(i).and_then(|replica| replica.members.get_mut(&i)) {
            member.last_heard = NOW;
        }
    }

    /// The replica where a workload's trust stream is.
    fn home(&mut self, i: usize) -> Option<&mut Rep> {
        let home = self.nodes[i].proxy.as_ref()?.home;
        self.nodes[home].replica.as_mut()
    }

    /// Everything that has a time is one tick older.
    fn tick(&mut self, skew: u64) {
        older(&mut self.state);
        if let Some(backup) = &mut self.backup {
            older(&mut backup.0);
        }
        for controller in &mut self.controllers {
            if let Some(fence) = &mut controller.fence {
                // Older than the lease is as good as any age.
                let oldest = Duration::from_millis((NOW - 1) * TICK);
                fence.since = fence.since.saturating_sub(Duration::from_millis(TICK)).max(oldest);
            }
            if let Some(pending) = &mut controller.pending {
                older(&mut pending.state);
            }
        }
        for node in &mut self.nodes {
            if let Some(replica) = &mut node.replica {
                replica.leased = false;
                for member in replica.members.values_mut() {
                    if !member.open {
                        member.last_heard = (member.last_heard - 1).max(OLDEST);
                    }
                    member.svid = member.svid.map(|svid| svid.older(skew));
                }
            }
            if let Some(proxy) = &mut node.proxy {
                proxy.svid = proxy
                    .svid
                    .map(|svid| svid.older(skew))
                    .filter(|svid| svid.not_after > EXPIRED - skew);
                proxy.reply = proxy.reply.map(|(svid, seq)| (svid.older(skew), seq));
                proxy.reply = proxy.reply.filter(|(svid, _)| svid.not_after > EXPIRED - skew);
            }
        }
    }

    /// The invariants that are of this moment.
    fn check(&mut self) {
        let mut live = Vec::new();
        for (i, node) in self.nodes.iter().enumerate() {
            let Some(proxy) = node.proxy.as_ref().filter(|proxy| proxy.seq > 0) else { continue };
            let exempt = self.state.exemptions.iter().any(|e| e.instance.pod_uid == uid(i));
            if !exempt {
                live.push(proxy);
            }
        }
        let unexpired = |p: &&&Proxy| p.svid.filter(|svid| svid.not_after >= NOW);
        for p in &live {
            let Some(svid) = unexpired(&p) else { continue };
            if live.iter().any(|q| !q.anchors.contains(&svid.anchor)) {
                self.broken.get_or_insert("S1: a workload refuses another's SVID");
            }
        }
        let idle = self.state.rotation.is_none() && self.state.halted.is_none();
        let buried = |p: &Proxy| p.anchors.iter().any(|id| self.state.tombstones.contains(id));
        if idle && live.iter().any(|p| unexpired(&p).is_some() && buried(p)) {
            self.broken.get_or_insert("S2: a withdrawn anchor is trusted after the end");
        }
        if self.state.published().any(|anchor| self.state.tombstones.contains(&anchor.id)) {
            self.broken.get_or_insert("S5: a tombstoned anchor is published");
        }
        if self.state.published().next().is_none() {
            self.broken.get_or_insert("S8: the bundle is empty");
        }
    }

    /// Idle, as it should be: two anchors, one issuer, nobody exempt, nothing asked for.
    pub(crate) fn settled_down(&self) -> bool {
        let state = &self.state;
        state.rotation.is_none()
            && state.issuer_rotation.is_none()
            && state.requested.is_none()
            && state.in_state(AnchorState::Standby).count() >= 1
            && state.in_state(AnchorState::Active).count() == 1
    }

    /// The same world as whoever cannot tell more apart would see it.
    fn normal(mut self) -> Self {
        self.order_revisions();
        self.order_nonces();
        forget_dates(&mut self.state);
        if let Some(backup) = &mut self.backup {
            forget_dates(&mut backup.0);
        }
        for controller in &mut self.controllers {
            if let Some(pending) = &mut controller.pending {
                forget_dates(&mut pending.state);
            }
        }
        // Two pairs of a workload and its replica are told apart by nothing but an exemption.
        if self.state.exemptions.is_empty()
            && self.nodes.len() == 2
            && self.nodes.iter().all(|node| node.replica.is_some() && node.proxy.is_some())
        {
            let mut swapped = [self.nodes[1].clone(), self.nodes[0].clone()];
            for proxy in swapped.iter_mut().filter_map(|node| node.proxy.as_mut()) {
                proxy.home = 1 - proxy.home;
            }
            for replica in swapped.iter_mut().filter_map(|node| node.replica.as_mut()) {
                let members = std::mem::take(&mut replica.members);
                replica.members = members.into_iter().map(|(p, rec)| (1 - p, rec)).collect();
            }
            if swapped[..] < self.nodes[..] {
                self.nodes = swapped.into();
            }
        }
        self
    }

    fn order_revisions(&mut self) {
        let mut all = BTreeSet::from([self.revision]);
        for controller in &self.controllers {
            all.extend(controller.fence.as_ref().map(|fence| fence.revision));
            all.extend(controller.pending.as_ref().map(|pending| pending.expected));
        }
        let rank = |revision: u64| 1 + all.range(..revision).count() as u64;
        let mut controllers = std::mem::take(&mut self.controllers);
        for controller in &mut controllers {
            if let Some(fence) = &mut controller.fence {
                fence.revision = rank(fence.revision);
            }
            if let Some(pending) = &mut controller.pending {
                pending.expected = rank(pending.expected);
            }
        }
        self.controllers = controllers;
        self.revision = rank(self.revision);
    }

    fn order_nonces(&mut self) {
        let mut all = BTreeSet::from([0]);
        let mut nonces = Vec::new();
        self.each_nonce(|nonce| nonces.push(*nonce));
        all.extend(nonces);
        // Far below the time of day: the next query is above all of them.
        self.each_nonce(|nonce| *nonce = all.range(..*nonce).count() as u64);
    }

    fn each_nonce(&mut self, mut visit: impl FnMut(&mut u64)) {
        for controller in &mut self.controllers {
            visit(&mut controller.nonce);
            if let Some(fence) = &mut controller.fence {
                let queries = &mut fence.queries;
                visit(&mut queries.last);
                queries.first.iter_mut().for_each(&mut visit);
                queries.first_fenced.iter_mut().for_each(&mut visit);
            }
        }
        for replica in self.nodes.iter_mut().filter_map(|node| node.replica.as_mut()) {
            visit(&mut replica.nonce);
            replica.taken.values_mut().for_each(&mut visit);
            for member in replica.members.values_mut() {
                visit(&mut member.answered);
                visit(&mut member.answered_before);
            }
        }
    }
}

impl Served {
    fn of(state: &TrustDomainState) -> Self {
        let mut anchors: Vec<_> = state.published().map(|anchor| anchor.id).collect();
        anchors.sort();
        Self {
            seq: state.seq,
            anchors,
            tombstones: state.tombstones.clone(),
            denied: state.denied_issuers.iter().map(|denied| denied.id).collect(),
            issuer: state.active_issuer,
            anchor: state.active_issuer().map_or_else(|| key(0), |issuer| issuer.anchor_id),
            halted: state.halted.is_some(),
        }
    }
}

impl Proxy {
    fn take(&mut self, served: &Served) {
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
    fn of(proxy: &Proxy, answered: u64, answered_before: u64) -> Self {
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
        }
    }

    fn member(&self, n: usize) -> Member {
        let (anchors, denied) = (self.anchors.iter().copied(), self.denied.iter().copied());
        let digest = steadfast_api::bundle::digest(anchors, denied);
        let svid = self.svid.map(|svid| HeldSvid {
            issuer: svid.issuer,
            not_after: UnixTime::from_millis(svid.not_after * TICK),
        });
        Member {
            instance: Instance { pod_uid: uid(n), started_at: started(self.started) },
            name: uid(n),
            open: self.open,
            last_heard: UnixTime::from_millis(self.last_heard * TICK),
            answered: self.answered,
            answered_before: self.answered_before,
            used: Vec::new(),
            ack: Some(Ack {
                seq: self.seq,
                digest: KeyId::from_slice(&digest),
                mounted: None,
                svid,
                clock_offset_ms: 0,
            }),
        }
    }
}

impl Svid {
    fn older(self, skew: u64) -> Self {
        if self.not_after > NOW + 1000 {
            return self;
        }
        Self { not_after: (self.not_after - 1).max(EXPIRED - skew), ..self }
    }
}

/// What a state is called: its rotation and phase.
fn place(state: &TrustDomainState) -> (u64, Option<PhaseName>) {
    (state.rotations, state.rotation.as_ref().map(|rotation| rotation.phase.name()))
}

/// Every date of a state that counts is one tick older.
fn older(state: &mut TrustDomainState) {
    let older = |at: &mut UnixTime| {
        let oldest = UnixTime::from_millis(OLDEST * TICK);
        *at = (*at - Duration::from_millis(TICK)).max(oldest);
    };
    older(&mut state.activated_at);
    if let Some(rotation) = &mut state.rotation {
        rotation.deadline.iter_mut().for_each(older);
    }
    if let Some(rotation) = &mut state.issuer_rotation
        && let steadfast_rotation_protocol::issuer::IssuerPhase::Draining(draining) =
            &mut rotation.phase
    {
        older(&mut draining.deadline);
    }
}

/// What nothing depends on.
fn forget_dates(state: &mut TrustDomainState) {
    let epoch = UnixTime::default();
    state.past.clear();
    state.renew = None;
    if let Some(rotation) = &mut state.rotation {
        (rotation.started, rotation.since) = (epoch, epoch);
        rotation.steps.clear();
        if matches!(rotation.phase, Phase::Withdrawn(_)) {
            state.activated_at = UnixTime::from_millis(OLDEST * TICK);
        }
    } else {
        state.activated_at = UnixTime::from_millis(OLDEST * TICK);
    }
    if let Some(rotation) = &mut state.issuer_rotation {
        (rotation.started, rotation.since) = (epoch, epoch);
    }
    if let Some(request) = &mut state.requested {
        request.at = epoch;
    }
    for wanted in state.wanted_issuer.iter_mut().chain(&mut state.wanted_external) {
        wanted.number = 0;
    }
}

fn now() -> Now {
    Now { wall: UnixTime::from_millis(NOW * TICK), boot: Duration::from_millis(NOW * TICK) }
}

fn timings(config: &Config) -> Timings {
    let ticks = |ticks: u64| Duration::from_millis(ticks * TICK);
    Timings {
        lease: ticks(1),
        skew: match config.shortcut {
            Some(Shortcut::NoSkewMargin) => Duration::ZERO,
            _ => ticks(config.skew),
        },
        renew_window: ticks(1),
        renew_window_urgent: ticks(1),
        issuer_life: ticks(1000),
        issuer_left_min: ticks(1),
        schedule: Schedule { anchor_period: ticks(1_000_000), window: None },
    }
}

#[allow(clippy::unwrap_used)] // It is a name.
fn trust_domain() -> steadfast_api::TrustDomain {
    "m".parse().unwrap()
}

#[allow(clippy::unwrap_used)] // They are 32 bytes.
pub(crate) fn key(n: u8) -> KeyId {
    KeyId::from_slice(&[n; 32]).unwrap()
}

impl Config {
    /// Of an SVID that is issued now.
    fn not_after(&self) -> u64 {
        NOW + self.svid_life.unwrap_or(FOREVER_TICKS)
    }
}

fn anchor(config: &Config, id: KeyId, state: AnchorState) -> AnchorRecord {
    AnchorRecord {
        id,
        der: Vec::new(),
        not_after: UnixTime::from_millis(1_000_000_000 * TICK),
        state,
        taint: None,
        key_ref: String::new(),
        svid_life_max: Duration::from_millis(config.svid_life.unwrap_or(FOREVER_TICKS) * TICK),
    }
}

pub(crate) fn issuer(anchor_id: KeyId, number: u8) -> IssuerRecord {
    IssuerRecord {
        id: key(100 + anchor_id.as_bytes()[0] * 8 + number),
        anchor_id,
        der: Vec::new(),
        chain: Vec::new(),
        not_before: UnixTime::default(),
        not_after: UnixTime::from_millis((1_000_000 + u64::from(number)) * TICK),
        key_ref: String::new(),
    }
}

fn uid(n: usize) -> String {
    ["a", "b", "c", "d"][n].to_owned()
}

fn started(n: u64) -> UnixTime {
    UnixTime::from_millis(1 + n)
}

/// Where the clocks stand, always.
pub(crate) const NOW: u64 = 100;
/// Older is all the same.
const OLDEST: u64 = NOW - 8;
/// The last tick of an SVID that has expired, less the skew.
const EXPIRED: u64 = NOW - 1;
/// Milliseconds; a tick is as long as a lease.
const TICK: u64 = 1000;
const FOREVER_TICKS: u64 = 10_000;
