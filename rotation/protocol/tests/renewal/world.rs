//! A world for one renewal machine: true time, a wall clock that can be wrong, a shell that
//! sleeps as long as it is told, and a CA that can fail. After every event the invariants are
//! checked; the log of events can be replayed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::Jitter;
use steadfast_rotation_protocol::renewal::{
    Alarm, Effect, Event, Issued, Readiness, Record, Renewal, RequestId,
};

/// How the CA treats a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ca {
    Answers { after: Duration },
    Hangs,
    Refuses,
}

/// What a key that was made for a request is there for; one that was dropped is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Asking,
    Held { seq: u64, issuer: KeyId },
    Installed,
}

pub(crate) struct World {
    pub(crate) machine: Renewal,
    /// True time, which is the server's.
    pub(crate) now: UnixTime,
    /// The wall clock less true time.
    pub(crate) wall_off_millis: i64,
    pub(crate) ca: Ca,
    pub(crate) life: Duration,
    pub(crate) renew_at_percent: Option<u32>,
    /// What the CA issues under.
    pub(crate) ca_seq: u64,
    pub(crate) issuer: KeyId,
    pub(crate) bundle_seq: u64,
    /// Whether the shell can put to use what it is told to.
    pub(crate) installs_fail: bool,
    denied: BTreeSet<KeyId>,
    keys: BTreeMap<RequestId, Key>,
    last_id: RequestId,
    replies: Vec<(UnixTime, Event)>,
    timer: Option<UnixTime>,
    random: u64,
    pub(crate) log: Vec<Record>,
    /// Every effect with the true time at which it came.
    pub(crate) effects: Vec<(UnixTime, Effect)>,
}

impl World {
    /// Nothing has happened yet; clocks agree, the CA answers at once.
    pub(crate) fn new(life: Duration, seed: u64) -> Self {
        Self {
            machine: Renewal::new(),
            now: UnixTime::from_secs(1_800_000_000),
            wall_off_millis: 0,
            ca: Ca::Answers { after: Duration::from_millis(5) },
            life,
            renew_at_percent: None,
            ca_seq: 1,
            issuer: issuer(0),
            bundle_seq: 0,
            installs_fail: false,
            denied: BTreeSet::new(),
            keys: BTreeMap::new(),
            last_id: RequestId::default(),
            replies: Vec::new(),
            timer: None,
            random: seed,
            log: Vec::new(),
            effects: Vec::new(),
        }
    }

    /// A world whose workload has just installed its first SVID.
    pub(crate) fn ready(life: Duration, wall_off_millis: i64) -> Self {
        let mut world = Self::new(life, 7);
        world.wall_off_millis = wall_off_millis;
        world.bundle(1);
        world.event(Event::Started);
        world.run(Duration::from_millis(10));
        assert_eq!(world.readiness(), Some(Readiness::Ready));
        world
    }

    pub(crate) fn wall(&self) -> UnixTime {
        let shift = Duration::from_millis(self.wall_off_millis.unsigned_abs());
        if self.wall_off_millis < 0 { self.now - shift } else { self.now + shift }
    }

    pub(crate) fn bundle(&mut self, seq: u64) {
        self.bundle_seq = self.bundle_seq.max(seq);
        let denied = self.denied.iter().copied().collect();
        self.event(Event::BundleInstalled { seq, denied });
    }

    pub(crate) fn deny(&mut self, issuer: KeyId) {
        self.denied.insert(issuer);
        self.bundle(self.bundle_seq);
    }

    pub(crate) fn allow_all(&mut self) {
        self.denied.clear();
        self.bundle(self.bundle_seq);
    }

    pub(crate) fn taint(&mut self, issuer: KeyId) {
        self.denied.insert(issuer);
        self.event(Event::Tainted { issuer });
    }

    /// Time passes, and the shell does what it is told.
    pub(crate) fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        for _ in 0..EVENTS_MAX {
            let reply = self.replies.iter().map(|(at, _)| *at).min();
            match [reply, self.timer].into_iter().flatten().min() {
                Some(next) if next <= end => {
                    self.now = self.now.max(next);
                    if reply.is_some_and(|at| at <= next) {
                        let earliest = (0..self.replies.len()).min_by_key(|&i| self.replies[i].0);
                        let (_, event) = self.replies.swap_remove(earliest.unwrap());
                        self.event(event);
                    } else {
                        self.event(Event::Tick);
                    }
                }
                _ => {
                    self.now = end;
                    return;
                }
            }
        }
        panic!("the shell was woken {EVENTS_MAX} times within {duration:?}");
    }

    /// As far as the next request, which then is under way.
    pub(crate) fn run_to_renewal(&mut self) {
        let at = self.machine.next_renewal().expect("nothing is under way");
        self.run(at.since(self.wall()));
        assert!(self.asking().is_some());
    }

    /// The machine sleeps: time passes and nobody is woken.
    pub(crate) fn suspend(&mut self, duration: Duration) {
        self.now = self.now + duration;
    }

    pub(crate) fn event(&mut self, event: Event) {
        let record = Record { now: self.wall(), jitter: self.draw(), event };
        self.log.push(record.clone());
        if let Event::Failed { id, .. } = record.event
            && self.keys.get(&id) == Some(&Key::Asking)
        {
            self.keys.remove(&id);
        }
        let installed = self.in_use();
        let issued = match &record.event {
            Event::Issued(issued) => Some(issued.clone()),
            _ => None,
        };
        let effects = self.machine.handle(record.now, record.jitter, record.event);
        let mut failed = None;
        for effect in effects {
            self.carry_out(&effect, issued.as_ref());
            if let Effect::Install { id } = effect
                && self.installs_fail
            {
                failed = Some(id);
            }
            self.effects.push((self.now, effect));
        }
        if let Some(id) = failed {
            let reason = "it fits no anchor".to_owned();
            return self.event(Event::InstallFailed { id, reason });
        }
        self.timer = self.machine.next_wakeup().map(|at| self.now + at.since(self.wall()));
        self.invariant_an_svid_in_use_is_let_go_for_another_only(installed);
        self.invariant_no_key_is_forgotten();
        self.invariant_the_wakeup_is_near();
        self.invariant_a_tick_too_many_changes_nothing();
    }

    fn carry_out(&mut self, effect: &Effect, issued: Option<&Issued>) {
        match *effect {
            Effect::Request { id, attempt, timeout } => {
                assert!(attempt >= 1);
                assert!((Duration::from_secs(1)..=Duration::from_secs(10)).contains(&timeout));
                self.invariant_no_two_requests_are_under_way();
                assert!(self.last_id < id, "ids ascend");
                self.last_id = id;
                self.keys.insert(id, Key::Asking);
                self.reply(id);
            }
            Effect::Cancel { id } => {
                assert_eq!(self.keys.remove(&id), Some(Key::Asking));
            }
            Effect::Discard { id } => {
                assert_ne!(self.keys.remove(&id), Some(Key::Installed), "{id:?} is in use");
            }
            Effect::Hold { id, seq } => {
                let issuer = issued.expect("only a reply can be held").issuer;
                assert!(seq > self.bundle_seq || self.bundle_seq == 0);
                assert_eq!(self.keys.insert(id, Key::Held { seq, issuer }), Some(Key::Asking));
            }
            Effect::Install { id } => {
                let (seq, issuer) = match self.keys.get(&id) {
                    Some(Key::Asking) => {
                        let issued = issued.expect("it was asked for and has just come");
                        (issued.seq, issued.issuer)
                    }
                    Some(&Key::Held { seq, issuer }) => (seq, issuer),
                    state @ (Some(Key::Installed) | None) => panic!("{id:?} is {state:?}"),
                };
                assert!(seq <= self.bundle_seq, "installed before its bundle");
                assert!(!self.denied.contains(&issuer), "installed though denied");
                if self.installs_fail {
                    self.keys.remove(&id);
                } else {
                    self.keys.retain(|_, key| *key != Key::Installed);
                    self.keys.insert(id, Key::Installed);
                }
            }
            Effect::Alarm(_) | Effect::Readiness(_) => {}
        }
    }

    fn reply(&mut self, id: RequestId) {
        match self.ca {
            Ca::Answers { after } => {
                let at = self.now + after;
                self.replies.push((at, Event::Issued(self.issued(id, at))));
            }
            Ca::Hangs => {}
            Ca::Refuses => {
                let reason = "the CA is away".to_owned();
                let at = self.now + Duration::from_millis(1);
                self.replies.push((at, Event::Failed { id, reason }));
            }
        }
    }

    /// What the CA would answer at `at`.
    pub(crate) fn issued(&self, id: RequestId, at: UnixTime) -> Issued {
        Issued {
            id,
            issued_at: at,
            not_after: at + self.life,
            renew_at: self.renew_at_percent.map(|percent| at + self.life * percent / 100),
            server_time: at,
            seq: self.ca_seq,
            issuer: self.issuer,
        }
    }

    /// How many requests were sent.
    pub(crate) fn requests(&self) -> usize {
        self.effects.iter().filter(|(_, e)| matches!(e, Effect::Request { .. })).count()
    }

    /// The true times at which requests were sent.
    pub(crate) fn request_times(&self) -> Vec<UnixTime> {
        self.effects
            .iter()
            .filter_map(|(at, effect)| matches!(effect, Effect::Request { .. }).then_some(*at))
            .collect()
    }

    pub(crate) fn installs(&self) -> usize {
        self.effects.iter().filter(|(_, e)| matches!(e, Effect::Install { .. })).count()
    }

    pub(crate) fn alarms(&self) -> Vec<&Alarm> {
        self.effects
            .iter()
            .filter_map(|(_, effect)| match effect {
                Effect::Alarm(alarm) => Some(alarm),
                _ => None,
            })
            .collect()
    }

    /// What was told last.
    pub(crate) fn readiness(&self) -> Option<Readiness> {
        self.effects.iter().rev().find_map(|(_, effect)| match effect {
            Effect::Readiness(readiness) => Some(*readiness),
            _ => None,
        })
    }

    /// The request under way.
    pub(crate) fn asking(&self) -> Option<RequestId> {
        self.keys.iter().find(|(_, key)| **key == Key::Asking).map(|(id, _)| *id)
    }

    fn invariant_no_two_requests_are_under_way(&self) {
        assert_eq!(self.asking(), None, "a second request: {:#?}", self.effects.last());
    }

    fn invariant_an_svid_in_use_is_let_go_for_another_only(&self, before: Option<RequestId>) {
        let after = self.machine.installed().map(|svid| svid.id);
        assert!(before.is_none() || after.is_some(), "the SVID in use was let go");
        assert_eq!(self.in_use(), after, "shell and machine differ");
    }

    /// What the shell uses.
    fn in_use(&self) -> Option<RequestId> {
        self.keys.iter().find(|(_, key)| **key == Key::Installed).map(|(id, _)| *id)
    }

    /// One key in use, one held for its bundle, one being certified: no fourth is left behind.
    fn invariant_no_key_is_forgotten(&self) {
        let held = self.keys.values().filter(|key| matches!(key, Key::Held { .. })).count();
        assert!(held <= 1 && self.keys.len() <= 3, "{:?}", self.keys);
    }

    fn invariant_the_wakeup_is_near(&self) {
        let Some(wakeup) = self.machine.next_wakeup() else { return };
        assert!(wakeup >= self.wall(), "a wakeup in the past makes a shell spin");
        assert!(wakeup.since(self.wall()) <= Duration::from_secs(30));
    }

    fn invariant_a_tick_too_many_changes_nothing(&self) {
        let mut machine = self.machine.clone();
        let effects = machine.handle(self.wall(), Jitter::NONE, Event::Tick);
        assert_eq!(effects, [], "after {:?}", self.log.last());
        assert_eq!(machine.next_wakeup(), self.machine.next_wakeup());
    }

    /// The log, written as JSON and read back, brings about the same effects.
    pub(crate) fn invariant_the_log_replays(&self) {
        let mut machine = Renewal::new();
        let lines = self.log.iter().map(|record| serde_json::to_string(record).unwrap());
        let effects: Vec<Effect> = lines
            .flat_map(|line| {
                let Record { now, jitter, event } = serde_json::from_str(&line).unwrap();
                machine.handle(now, jitter, event)
            })
            .collect();
        let told: Vec<Effect> = self.effects.iter().map(|(_, effect)| effect.clone()).collect();
        assert_eq!(effects, told);
    }

    /// SplitMix64: every call gets a share of its own, the same ones in every run of a seed.
    fn draw(&mut self) -> Jitter {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Jitter::from_bits((mixed >> 32) as u32)
    }
}

pub(crate) fn issuer(number: u8) -> KeyId {
    KeyId::of_spki(&[number])
}

/// More than a day of looking at the clock and asking in vain.
const EVENTS_MAX: usize = 200_000;
