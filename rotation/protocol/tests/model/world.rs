//! A small mesh: a store, replicas, workloads and controllers, of which each step is one action.
//!
//! The controller is the real one; around it everything may happen in any order. Time goes in ticks
//! of one read lease and is kept relative to now, revisions and nonces by their order only, so that
//! worlds that differ in nothing that matters are one.

mod control;
mod invariants;
mod lives;
mod parts;
mod restore;
mod time;
mod trust;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, EXTERNAL, IssuerRecord, Label,
};

use self::control::place;
use self::parts::{Ctl, Node, Proxy, Rec, Rep, Served, Svid};
use self::trust::Mirror;
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
    /// The anchor that is active at the beginning ends, after so many ticks.
    pub(crate) ends: Option<u64>,
    /// The first issuer ends, after so many ticks.
    pub(crate) issuer_life: Option<u64>,
    /// Who is cut off stays so.
    pub(crate) cut_for_good: bool,
    /// Replicas show an SVID of their own, and workloads have a file mounted: a bundle is taken only
    /// from whom one or the other vouches for, and a thief offers one.
    pub(crate) vouched: bool,
    /// Replicas load issuers when they come to it.
    pub(crate) loads: bool,
    /// A store that is put back has its revisions of then, too; else it is written back.
    pub(crate) revisions_fall: bool,
    /// What is written is held against what is there at once. Without it a shortcut lives on until
    /// somebody is the worse for it.
    pub(crate) strict: bool,
    /// The controllers' clocks, less the store's.
    pub(crate) controller_clock_ms: Option<i64>,
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
    /// A workload tells of a handshake that failed and names the canaries' issuer.
    pub(crate) failures: u8,
    /// The key of a published anchor is gone.
    pub(crate) lost_keys: u8,
    /// A workload's clock is off by more than it may be.
    pub(crate) drifts: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Order {
    Abort,
    ExemptMissing,
    Rotate,
    /// One workload goes first.
    RotateCanary,
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
    /// Shared by all worlds in which it is the same: most actions leave it alone.
    pub(crate) state: Arc<TrustDomainState>,
    pub(crate) revision: u64,
    /// The keys of anchors that there are, by what they were made for.
    keys: BTreeMap<Label, KeyId>,
    next_key: u8,
    pub(crate) controllers: Vec<Ctl>,
    pub(crate) nodes: Vec<Node>,
    orders: usize,
    faults: Faults,
    backup: Option<(Arc<TrustDomainState>, u64)>,
    /// The copies of the bundle for whoever starts, in a world that has any.
    mirror: Option<Mirror>,
    /// Anchors that everybody held who counts, when they were taken for settled.
    settled: BTreeSet<KeyId>,
    /// When somebody last told of a handshake that names the canaries' issuer and failed.
    failed: Option<u64>,
    /// What went wrong, if something did.
    pub(crate) broken: Option<&'static str>,
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
    /// A workload tells of a failure.
    Fail(usize),
    /// A workload opens a stream at a replica.
    Reconnect(usize, usize),
    Vanish(usize),
    /// The key of an anchor in this state is lost.
    Lose(AnchorState),
    Backup,
    Restore,
    Recover,
    /// A replica renews its own SVID.
    Own(usize),
    /// A replica loads the issuers that there are.
    Load(usize),
    /// The mirror of the bundle is brought up to date.
    Mirror,
    /// It reaches the file that a workload has mounted.
    Mount(usize),
    /// A thief offers a workload a bundle of his own.
    Forge(usize),
    /// A workload's clock goes wrong.
    Drift(usize),
    /// It is right again.
    Adjust(usize),
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
            self.take(config, Action::Mirror);
            for i in 0..self.nodes.len() {
                self.take(config, Action::Read(i));
                self.take(config, Action::Load(i));
                self.take(config, Action::Own(i));
            }
            for i in 0..config.proxies {
                self.take(config, Action::Mount(i));
                self.take(config, Action::Bundle(i));
                let proxy = self.nodes[i].proxy.as_ref();
                let due = self.state.issuer_for(&uid(i), &uid(i));
                if proxy.is_some_and(|p| p.svid.is_none_or(|svid| svid.issuer != due)) {
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
        let first = config.signed(&anchors[0], 0);
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
                mounted: config.vouched.then(|| served.anchors.clone()),
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
                own: config.vouched.then(|| Svid {
                    anchor: a,
                    issuer: state.active_issuer,
                    not_after: config.not_after(),
                }),
                loaded: config.loads.then(|| vec![state.active_issuer]),
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
            keys: [(made(1), a), (made(2), b), (made(9), key(9))].into(),
            next_key: 3,
            controllers: vec![Ctl::default(); config.controllers],
            nodes,
            orders: 0,
            faults: config.faults,
            backup: None,
            mirror: config.vouched.then(|| Mirror::of(&state)),
            settled: [a, b].into(),
            failed: None,
            broken: None,
            state: Arc::new(state),
        }
        .normal(true)
    }

    pub(crate) fn actions(&self, config: &Config) -> Vec<Action> {
        let mut actions = vec![Action::Tick];
        let has_replica = |i: usize| self.nodes[i].replica.is_some();
        for (i, node) in self.nodes.iter().enumerate() {
            if node.replica.is_some() {
                actions.push(Action::Read(i));
                if config.vouched {
                    actions.push(Action::Own(i));
                }
                if config.loads {
                    actions.push(Action::Load(i));
                }
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
                let canary = self.state.rotation.as_ref().and_then(|r| r.canary());
                if self.faults.failures > 0 && canary.is_some() {
                    actions.push(Action::Fail(i));
                }
            } else if !config.cut_for_good {
                actions.extend(
                    (0..self.nodes.len())
                        .filter(|r| has_replica(*r))
                        .map(|r| Action::Reconnect(i, r)),
                );
            }
            if config.vouched {
                actions.extend([Action::Mount(i), Action::Forge(i)]);
            }
            if self.faults.drifts > 0 {
                actions.push(Action::Drift(i));
            }
            if proxy.clock_off {
                actions.push(Action::Adjust(i));
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
        if self.faults.lost_keys > 0 {
            let kinds = [AnchorState::Active, AnchorState::Standby, AnchorState::Staged];
            actions.extend(kinds.map(Action::Lose));
        }
        if self.faults.restores > 0 {
            actions.push(if self.backup.is_some() { Action::Restore } else { Action::Backup });
        }
        if self.state.halted.is_some() {
            actions.push(Action::Recover);
        }
        if config.vouched {
            actions.push(Action::Mirror);
        }
        actions
    }

    /// The world after an action; `None`: nothing happens.
    pub(crate) fn after(&self, config: &Config, action: Action) -> Option<Self> {
        let mut next = self.clone();
        next.act(config, action)?;
        next.publish();
        next.compare(self, config, action);
        next.check(config);
        let stored = !Arc::ptr_eq(&next.state, &self.state) || config.slow_writes;
        let next = next.normal(stored);
        (next != *self).then_some(next)
    }

    fn act(&mut self, config: &Config, action: Action) -> Option<()> {
        match action {
            Action::Tick => self.tick(config.skew),
            Action::Read(i) => self.read(config, i)?,
            Action::Bundle(i) => {
                self.vouched(config, i, self.nodes[i].proxy.as_ref()?.home)?;
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
                self.home(i)?.keep(i, rec);
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
                let loaded = config.loads.then(Vec::new);
                self.nodes[i].replica = Some(Rep { loaded, ..Rep::default() });
                let proxies = self.nodes.iter_mut().filter_map(|node| node.proxy.as_mut());
                for proxy in proxies.filter(|proxy| proxy.home == i) {
                    proxy.connected = false;
                }
            }
            Action::RestartProxy(i) => {
                self.faults.proxy_restarts -= 1;
                let proxy = self.nodes[i].proxy.as_mut()?;
                let (mut started, listed, home) = (proxy.started + 1, proxy.listed, proxy.home);
                if self.state.exemptions.iter().any(|e| e.instance.pod_uid == uid(i)) {
                    started |= SINCE_EXEMPT;
                }
                let (mounted, clock_off) = (proxy.mounted.take(), proxy.clock_off);
                *proxy = Proxy { started, listed, home, mounted, clock_off, ..Proxy::default() };
                self.close(i);
            }
            Action::Cut(i) => {
                self.faults.cuts -= 1;
                self.nodes[i].proxy.as_mut()?.connected = false;
                self.close(i);
            }
            Action::Fail(i) => {
                self.faults.failures -= 1;
                self.home(i)?.members.get_mut(&i).filter(|m| m.open)?.failed = Some(NOW);
                self.failed = Some(NOW);
            }
            Action::Reconnect(i, r) => {
                self.vouched(config, i, r)?;
                // The first message of a stream is the bundle.
                self.nodes[i].proxy.as_mut()?.home = r;
                let served = self.home(i).filter(|r| r.leased)?.served.clone()?;
                let proxy = self.nodes[i].proxy.as_mut()?;
                proxy.connected = true;
                proxy.take(&served);
                let rec = Rec::of(proxy, 0, 0);
                self.home(i)?.keep(i, rec);
            }
            Action::Vanish(i) => {
                self.faults.vanishes -= 1;
                let proxy = self.nodes[i].proxy.as_mut()?;
                (proxy.listed, proxy.connected) = (false, false);
                self.close(i);
            }
            Action::Lose(of) => {
                let lost = self.state.in_state(of).next()?.id;
                self.faults.lost_keys -= 1;
                self.keys.retain(|_, key| *key != lost);
            }
            Action::Backup => self.backup = Some((self.state.clone(), self.revision)),
            Action::Restore => self.restore(config)?,
            Action::Recover => self.recover(),
            Action::Own(i) => self.own(i)?,
            Action::Load(i) => {
                let loaded = self.nodes[i].replica.as_mut()?.loaded.as_mut()?;
                *loaded = self.state.issuers.iter().map(|issuer| issuer.id).collect();
                loaded.sort();
            }
            Action::Mirror => self.mirror.as_mut()?.update(&self.state),
            Action::Mount(i) => {
                let mirrored = self.mirror.as_ref()?.anchors.clone();
                self.nodes[i].proxy.as_mut()?.mounted = Some(mirrored);
            }
            Action::Forge(i) => self.forge(config, i)?,
            Action::Drift(i) => {
                self.faults.drifts -= 1;
                self.nodes[i].proxy.as_mut()?.clock_off = true;
            }
            Action::Adjust(i) => self.nodes[i].proxy.as_mut()?.clock_off = false,
        }
        Some(())
    }

    fn request(&mut self, config: &Config, i: usize, r: usize) -> Option<()> {
        let replica = self.nodes[r].replica.as_ref()?;
        let leased = replica.leased || config.shortcut == Some(Shortcut::NoLease);
        let served = replica.served.as_ref().filter(|served| leased && !served.halted)?;
        self.vouched(config, i, r)?;
        let canary = served.canary.filter(|_| uid(i) == CANARY);
        let (issuer, anchor) = canary.unwrap_or((served.issuer, served.anchor));
        if replica.loaded.as_ref().is_some_and(|loaded| !loaded.contains(&issuer)) {
            return None;
        }
        let not_after = self.svid_end(config, issuer, anchor)?;
        let svid = Svid { anchor, issuer, not_after };
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
}

#[allow(clippy::unwrap_used)] // It is a name.
fn trust_domain() -> steadfast_api::TrustDomain {
    "m".parse().unwrap()
}

#[allow(clippy::unwrap_used)] // They are 32 bytes.
pub(crate) fn key(n: u8) -> KeyId {
    KeyId::from_slice(&[n; 32]).unwrap()
}

fn ticks(ticks: u64) -> Duration {
    Duration::from_millis(ticks * TICK)
}

fn anchor(config: &Config, id: KeyId, state: AnchorState) -> AnchorRecord {
    AnchorRecord {
        id,
        der: Vec::new(),
        not_after: config.anchor_end(id),
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

/// Time stands still here: of starts, only what came after an exemption must be told apart.
fn started(n: u64) -> UnixTime {
    if n < SINCE_EXEMPT { UnixTime::from_millis(1 + n) } else { UnixTime::from_secs(1 << 40) }
}

const SINCE_EXEMPT: u64 = 1 << 32;

/// The workload that goes first.
const CANARY: &str = "a";
/// How long no handshake with it may fail, in ticks.
const CANARY_WINDOW: u64 = 2;
/// Where the clocks stand, always.
pub(crate) const NOW: u64 = 100;
/// Older is all the same.
const OLDEST: u64 = NOW - 8;
/// The last tick of an SVID that has expired, less the skew.
const EXPIRED: u64 = NOW - 1;
/// Milliseconds; a tick is as long as a lease.
const TICK: u64 = 1000;
const FOREVER_TICKS: u64 = 10_000;
