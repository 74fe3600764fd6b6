//! What holds a phase up: each guard refuses, names whom or what it waits for, and lets go when that
//! is so.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may stop where it is wrong")]

use std::time::Duration;

use semver::Version;
use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::census::{
    self, Ack, Bounds, Demand, HeldSvid, Listed, Member, OLDEST, ProxyStatus, Reason, Replica,
    Round, UNREADABLE, Vanished,
};
use steadfast_rotation_protocol::controller::{
    Controller, Effect, Made, Now, Observation, Signed, Timings, Wait,
};
use steadfast_rotation_protocol::orders::OrderRefused;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::schedule::{Schedule, Window};
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, Consumer, EXTERNAL, IssuerRecord, KUBELET_REFRESH, Outcome,
    POD_CERTIFICATES, PastRotation, Promise, Request,
};
use steadfast_rotation_protocol::{Instance, TrustDomainState};

const BEGUN: UnixTime = UnixTime::from_secs(1_800_000_000);
const DAY: Duration = Duration::from_secs(86_400);
const HOUR: Duration = Duration::from_secs(3600);
const SKEW: Duration = Duration::from_secs(60);

fn id(name: u8) -> KeyId {
    KeyId::of_spki(&[name])
}

fn anchor(name: u8, state: AnchorState) -> AnchorRecord {
    AnchorRecord {
        id: id(name),
        der: vec![name],
        not_after: BEGUN + DAY * 700,
        state,
        taint: None,
        key_ref: String::new(),
        svid_life_max: DAY,
    }
}

fn issuer(name: u8, anchor_id: KeyId) -> IssuerRecord {
    IssuerRecord {
        id: id(name),
        anchor_id,
        der: vec![name],
        chain: Vec::new(),
        not_before: BEGUN - DAY,
        not_after: BEGUN + DAY * 30,
        key_ref: String::new(),
    }
}

fn timings() -> Timings {
    Timings {
        lease: Duration::from_secs(15),
        skew: SKEW,
        renew_window: HOUR,
        renew_window_urgent: SKEW,
        issuer_life: DAY * 30,
        issuer_left_min: DAY * 10,
        schedule: Schedule { anchor_period: DAY * 365, window: None },
    }
}

/// A mesh of one workload, which does what it should but for what a test bends.
struct Mesh {
    controller: Controller,
    state: TrustDomainState,
    revision: u64,
    made: Option<Made>,
    signed: Option<Signed>,
    /// The newest query, and the one before.
    nonces: (u64, u64),
    seconds: u64,
    bend: fn(&mut Member),
    /// When it started by its own clock, which is ahead by so much, if it has not settled.
    start: Option<(UnixTime, i64)>,
    /// Of the controller, less the store's.
    clock_offset_ms: Option<i64>,
    /// Replicas of identity beside the one that does what it should.
    others: Vec<Replica>,
    mirrors_current: bool,
    /// What an operator's tool lists.
    listed: Vec<KeyId>,
}

impl Mesh {
    /// Nothing is under way.
    fn idle() -> Self {
        let anchors = vec![anchor(1, AnchorState::Active), anchor(2, AnchorState::Standby)];
        let domain = "cluster.local".parse().unwrap();
        Self {
            controller: Controller::new(timings()),
            state: TrustDomainState::founded(domain, anchors, issuer(10, id(1)), BEGUN),
            revision: 1,
            made: None,
            signed: None,
            nonces: (0, 0),
            seconds: 0,
            bend: |_| {},
            start: None,
            clock_offset_ms: None,
            others: Vec::new(),
            mirrors_current: true,
            listed: Vec::new(),
        }
    }

    /// A rotation has come to this phase.
    fn in_phase(phase: PhaseName) -> Self {
        let mut mesh = Self::idle();
        let by = "a person".to_owned();
        let request = Request { by, at: BEGUN, anchor: None, canary: None, replaces: None };
        mesh.state.request(request).unwrap();
        while mesh.phase() != Some(phase) {
            mesh.look();
            assert!(mesh.seconds < 400, "{phase:?}: {:?}", mesh.controller.waiting());
        }
        mesh
    }

    fn phase(&self) -> Option<PhaseName> {
        self.state.rotation.as_ref().map(|rotation| rotation.phase.name())
    }

    fn now(&self) -> Now {
        let boot = Duration::from_secs(self.seconds);
        Now { wall: BEGUN + boot, boot }
    }

    /// Its SVID is of the active issuer, as it has renewed.
    fn member(&self) -> Member {
        let issuer = self.state.active_issuer;
        let not_after = self.now().wall + DAY;
        let ack = Ack {
            seq: self.state.seq,
            digest: KeyId::from_slice(&self.state.digest()),
            mounted: KeyId::from_slice(&self.state.mounted_digest()),
            svid: Some(HeldSvid { issuer, not_after }),
            clock_offset_ms: 0,
            held: None,
        };
        let mut member = Member {
            instance: Instance { pod_uid: "pod".to_owned(), started_at: BEGUN },
            name: "demo/web-0".to_owned(),
            open: true,
            last_heard: self.now().wall,
            answered: self.nonces.0,
            answered_before: self.nonces.1,
            used: Vec::new(),
            issuers: Vec::new(),
            ack: Some(ack),
            version: None,
        };
        if let Some((started_at, clock_offset_ms)) = self.start {
            member.instance.started_at = started_at;
            let told = member.ack.iter_mut();
            told.for_each(|ack| (ack.seq, ack.clock_offset_ms) = (1, clock_offset_ms));
        }
        (self.bend)(&mut member);
        member
    }

    fn look(&mut self) {
        self.seconds += 1;
        let nonce = self.nonces.0;
        let (pod_uid, name) = ("pod".to_owned(), "demo/web-0".to_owned());
        let replica = Replica {
            name: "identity".to_owned(),
            reached: true,
            newest_nonce: nonce,
            loaded: self.state.issuers.iter().map(|issuer| issuer.id).collect(),
            members: vec![self.member()],
            ..Replica::default()
        };
        let listed = vec![Listed { pod_uid, name, proxy: ProxyStatus::Running }];
        let replicas = self.others.iter().cloned().chain([replica]).collect();
        let round = Round { nonce, listed, replicas, vanished: Vec::new() };
        let seen = Observation {
            round: (nonce > 0).then_some(round),
            state: self.state.clone(),
            revision: self.revision,
            clock_offset_ms: self.clock_offset_ms,
            made: self.made.clone(),
            signed: self.signed.clone(),
            mirrors_current: self.mirrors_current,
            undestroyed: Vec::new(),
            keyless: Vec::new(),
            listed: self.listed.clone(),
        };
        let now = self.now();
        for effect in self.controller.handle(now, &seen) {
            match effect {
                Effect::Persist(persist) => {
                    self.state = persist.state;
                    self.revision += 1;
                    self.controller.persisted(now, self.revision);
                }
                Effect::Generate(label) => {
                    self.made = Some(Made { label, anchor: anchor(3, AnchorState::Generated) });
                }
                Effect::Sign(wanted) => {
                    self.signed = Some(Signed { wanted, issuer: issuer(11, wanted.anchor_id) });
                }
                Effect::Query(nonce) => self.nonces = (nonce, self.nonces.0),
                Effect::Destroy(_) => {}
            }
        }
    }

    /// What it waits for once the fence has passed and everybody was asked more than once.
    fn waits(&mut self) -> Wait {
        let phase = self.phase();
        for _ in 0..20 {
            self.look();
        }
        assert_eq!(self.phase(), phase, "it went on");
        self.controller.waiting().clone()
    }

    /// The reason why the one workload is missing.
    fn missing(&mut self) -> Reason {
        match self.waits() {
            Wait::Census(tally) => {
                assert_eq!(tally.missing[0].name, "demo/web-0");
                tally.missing[0].reason.clone()
            }
            other => panic!("{other:?}"),
        }
    }

    /// Nothing is bent any more: the phase is left.
    fn goes_on(&mut self) {
        let phase = self.phase();
        self.bend = |_| {};
        // What has expired is tidied away first, which begins the fence again.
        for _ in 0..20 {
            self.look();
        }
        assert_ne!(self.phase(), phase, "waiting for {:?}", self.controller.waiting());
    }
}

fn ack(member: &mut Member) -> &mut Ack {
    member.ack.as_mut().unwrap()
}

#[test]
fn a_clock_that_is_off_holds_staging_up_by_name() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    mesh.bend = |member| ack(member).clock_offset_ms = 61_000;
    assert_eq!(mesh.missing(), Reason::ClockOff { offset_ms: 61_000 });
    mesh.goes_on();
}

#[test]
fn a_proxy_that_is_too_old_to_answer_holds_staging_up_by_its_version() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    mesh.bend = |member| {
        member.version = Some(Version::new(0, 0, 9));
        member.answered = 0;
    };
    assert_eq!(mesh.missing(), Reason::VersionTooOld { version: Version::new(0, 0, 9) });
    // One that is as old and answers holds nothing up, and one of now is told to be silent.
    let mut silent = Mesh::in_phase(PhaseName::Staged);
    silent.bend = |member| {
        member.version = Some(OLDEST);
        member.answered = 0;
    };
    assert_eq!(silent.missing(), Reason::Unanswered);
    mesh.bend = |member| member.version = Some(Version::new(0, 0, 9));
    for _ in 0..20 {
        mesh.look();
    }
    assert_ne!(mesh.phase(), Some(PhaseName::Staged));
}

#[test]
fn what_the_schedule_waits_for_is_told_apart_from_what_the_issuer_s_rotation_waits_for() {
    let mut mesh = Mesh::idle();
    mesh.bend = |member| ack(member).clock_offset_ms = 61_000;
    mesh.state.anchors[1].not_after = BEGUN + DAY * 300;
    mesh.state.rotate_issuer("a person".to_owned(), Some(HOUR), BEGUN).unwrap();
    let is_activated = |mesh: &Mesh| {
        mesh.state.issuer_rotation.as_ref().unwrap().phase.name() == PhaseName::Activated
    };
    while !is_activated(&mesh) {
        mesh.look();
    }
    for _ in 0..4 {
        mesh.look();
    }
    let waits = mesh.controller.waits();
    assert!(matches!(waits.issuer, Wait::Fence { .. }), "{waits:?}");
    let Wait::Census(tally) = &waits.anchor else { panic!("{waits:?}") };
    assert_eq!(tally.missing[0].reason, Reason::ClockOff { offset_ms: 61_000 });
    assert_eq!(mesh.phase(), None, "the standby is to be replaced, and it has not begun");
}

#[test]
fn a_handshake_under_the_retiring_anchor_holds_the_drain_up_by_name() {
    let mut mesh = Mesh::in_phase(PhaseName::Draining);
    mesh.bend = |member| member.used = vec![id(1)];
    assert_eq!(mesh.missing(), Reason::Used { anchor: id(1) });
    mesh.goes_on();
}

#[test]
fn an_svid_of_the_retiring_anchor_holds_the_drain_up_by_name() {
    let mut mesh = Mesh::in_phase(PhaseName::Draining);
    mesh.bend = |member| ack(member).svid.as_mut().unwrap().issuer = id(10);
    assert_eq!(mesh.missing(), Reason::Svid { issuer: id(10) });
    mesh.goes_on();
}

#[test]
fn a_mounted_file_that_is_old_or_cannot_be_read_holds_the_end_up_by_name() {
    let bends: [fn(&mut Member); 2] = [
        |member| ack(member).mounted = Some(id(99)),
        |member| ack(member).mounted = KeyId::from_slice(&UNREADABLE),
    ];
    for bend in bends {
        let mut mesh = Mesh::in_phase(PhaseName::Withdrawn);
        mesh.bend = bend;
        assert_eq!(mesh.missing(), Reason::MountedStale);
        mesh.goes_on();
    }
    // Whoever has no file holds nothing up.
    let mut mesh = Mesh::in_phase(PhaseName::Withdrawn);
    mesh.bend = |member| ack(member).mounted = None;
    for _ in 0..20 {
        mesh.look();
    }
    assert_eq!(mesh.phase(), None);
}

#[test]
fn a_holder_that_cannot_ack_holds_staging_up_until_it_has_read_the_bundle_or_is_removed() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    let consumer = |refresh| Consumer { name: "vpn".to_owned(), refresh };
    mesh.state.add_consumer(consumer(None));
    assert_eq!(mesh.waits(), Wait::Consumers(vec!["vpn".to_owned()]));
    mesh.state.add_consumer(consumer(Some(Duration::from_secs(30))));
    assert_eq!(mesh.waits(), Wait::Consumers(vec!["vpn".to_owned()]), "four times 30 s");
    for _ in 0..120 {
        mesh.look();
    }
    assert_ne!(mesh.phase(), Some(PhaseName::Staged));
    let mut removed = Mesh::in_phase(PhaseName::Staged);
    removed.state.add_consumer(consumer(None));
    assert!(matches!(removed.waits(), Wait::Consumers(_)));
    removed.state.remove_consumer("vpn").unwrap();
    removed.goes_on();
}

#[test]
fn whoever_must_load_the_next_issuer_is_told_apart_from_whoever_cannot_be_reached() {
    let mut mesh = Mesh::in_phase(PhaseName::Preparing);
    let other =
        |name: &str, reached| Replica { name: name.to_owned(), reached, ..Replica::default() };
    mesh.others = vec![other("slow", true), other("dead", false)];
    let [loading, away] = ["slow", "dead"].map(|name| vec![name.to_owned()]);
    assert_eq!(mesh.waits(), Wait::Issuer { loading, away });
    // One that nobody waits for is not named.
    let unheard = Instance { pod_uid: "dead".to_owned(), started_at: UnixTime::default() };
    let [name, reason, by] = ["dead", "its machine is gone", "a person"].map(str::to_owned);
    let now = mesh.now().wall;
    mesh.state.exempt(unheard, name, reason, by, now);
    mesh.revision += 1;
    let loading = vec!["slow".to_owned()];
    assert_eq!(mesh.waits(), Wait::Issuer { loading, away: Vec::new() });
    mesh.others[0].loaded = mesh.state.issuers.iter().map(|issuer| issuer.id).collect();
    mesh.goes_on();
}

#[test]
fn a_mirror_that_is_behind_holds_staging_up_and_names_who_mounts_it() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    mesh.bend = |member| ack(member).mounted = Some(id(99));
    mesh.mirrors_current = false;
    assert_eq!(mesh.waits(), Wait::Mirrors(vec!["demo/web-0".to_owned()]));
    mesh.mirrors_current = true;
    mesh.goes_on();
}

#[test]
fn what_a_holder_was_promised_holds_the_drain_up_until_it_ends() {
    let mut mesh = Mesh::in_phase(PhaseName::Draining);
    let not_after = mesh.now().wall + HOUR;
    let holder = "linkerd".to_owned();
    mesh.state.promised.push(Promise { anchor_id: id(1), holder, not_after });
    assert_eq!(mesh.waits(), Wait::Promised { until: not_after + SKEW });
    mesh.seconds += HOUR.as_secs() + SKEW.as_secs();
    mesh.goes_on();
}

#[test]
fn what_an_operators_tool_still_lists_holds_the_drain_up_by_name_but_for_an_emergency() {
    let mut mesh = Mesh::in_phase(PhaseName::Draining);
    mesh.listed = vec![id(1), id(2)];
    assert_eq!(mesh.waits(), Wait::Listed(vec![id(1)]));
    let mut urgent = Mesh::in_phase(PhaseName::Draining);
    urgent.listed = vec![id(1)];
    urgent.state.taint(id(1), "a person".to_owned(), HOUR).unwrap();
    urgent.goes_on();
    mesh.listed = vec![id(2)];
    mesh.goes_on();
}

#[test]
fn pods_whose_kubelets_ask_for_their_certificates_are_given_time_to_read_the_bundle() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    let (not_after, holder) = (mesh.now().wall + HOUR, POD_CERTIFICATES.to_owned());
    mesh.state.promised.push(Promise { anchor_id: id(1), holder, not_after });
    assert_eq!(mesh.waits(), Wait::Consumers(vec![POD_CERTIFICATES.to_owned()]));
    mesh.seconds += KUBELET_REFRESH.as_secs() * 4;
    mesh.goes_on();
}

#[test]
fn an_exemption_of_somebody_unheard_is_of_the_first_start_that_is_heard_of() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    let unheard = Instance { pod_uid: "pod".to_owned(), started_at: UnixTime::default() };
    let [name, reason, by] = ["demo/web-0", "it is asleep", "a person"].map(str::to_owned);
    let now = mesh.now().wall;
    mesh.state.exempt(unheard, name, reason, by, now);
    // It is heard of, and does not hold what is published: it stays exempt, by its start.
    mesh.bend = |member| ack(member).seq = 1;
    for _ in 0..20 {
        mesh.look();
    }
    let exempt: Vec<_> = mesh.state.exemptions.iter().map(|e| e.instance.started_at).collect();
    assert_eq!(exempt, [BEGUN]);
    // The next start of the same pod is another instance, and is waited for.
    mesh.bend = |member| {
        member.instance.started_at = BEGUN + HOUR;
        ack(member).seq = 1;
    };
    for _ in 0..40 {
        mesh.look();
    }
    assert_eq!(mesh.state.exemptions, []);
}

#[test]
fn an_exemption_is_of_every_start_that_ran_when_it_was_given() {
    let started = |started_at| Instance { pod_uid: "pod".to_owned(), started_at };
    let exempt_after = |later: Duration, clock_offset_ms| {
        let mut mesh = Mesh::in_phase(PhaseName::Staged);
        let [name, reason, by] = ["demo/web-0", "it is asleep", "a person"].map(str::to_owned);
        let (known, given) = (started(BEGUN - HOUR), mesh.now().wall);
        mesh.state.exempt(known, name, reason, by, given);
        // A start that nobody had told of, and whose SVID may be of what goes.
        mesh.start = Some((given + later, clock_offset_ms));
        for _ in 0..40 {
            mesh.look();
        }
        mesh.state.exemptions.iter().map(|e| e.instance.started_at).collect::<Vec<_>>()
    };
    let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
    assert_eq!(exempt_after(Duration::ZERO, 0).len(), 1, "it ran already");
    assert_eq!(exempt_after(minutes(1), 0).len(), 1, "it may have run, on another clock");
    assert_eq!(exempt_after(minutes(2), 0), [], "it has started since");
    assert_eq!(exempt_after(minutes(11), 600_000).len(), 1, "its clock is ten minutes ahead");
    assert_eq!(exempt_after(Duration::ZERO, -600_000), [], "its clock is ten minutes behind");
}

#[test]
fn who_is_exempt_for_its_clock_stays_so_while_an_anchor_is_half_staged() {
    let mut mesh = Mesh::in_phase(PhaseName::Withdrawn);
    mesh.state.anchors.push(anchor(7, AnchorState::Staged));
    mesh.bend = |member| ack(member).clock_offset_ms = 120_000;
    assert_eq!(mesh.missing(), Reason::ClockOff { offset_ms: 120_000 });
    let instance = Instance { pod_uid: "pod".to_owned(), started_at: BEGUN };
    let [name, reason, by] = ["demo/web-0", "its clock", "a person"].map(str::to_owned);
    let now = mesh.now().wall;
    mesh.state.exempt(instance, name, reason, by, now);
    for _ in 0..40 {
        mesh.look();
    }
    assert_eq!(mesh.phase(), None, "waiting for {:?}", mesh.controller.waiting());
    assert!(mesh.state.acked(id(7)));
}

#[test]
fn what_became_of_an_older_start_says_nothing_of_the_one_that_is_exempt() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    let instance = Instance { pod_uid: "pod".to_owned(), started_at: BEGUN + HOUR };
    let [name, reason, by] = ["demo/web-0", "its node is gone", "a person"].map(str::to_owned);
    mesh.state.exempt(instance, name, reason, by, BEGUN + HOUR);
    for _ in 0..40 {
        mesh.look();
    }
    assert_eq!(mesh.state.exemptions.len(), 1, "an older start has settled");
}

#[test]
fn whoever_vanished_is_waited_for_as_long_as_any_start_of_it_may_be_valid() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    let started = |started_at| Instance { pod_uid: "gone".to_owned(), started_at };
    let name = "demo/gone-0".to_owned();
    let first = Member {
        instance: started(BEGUN),
        name: name.clone(),
        open: false,
        last_heard: BEGUN,
        ..mesh.member()
    };
    let replica = Replica { reached: true, members: vec![first], ..Replica::default() };
    // The replica that had its next start is gone; the ledger has it.
    let next = Vanished { instance: started(BEGUN + HOUR), name, last_heard: BEGUN + HOUR };
    let round = Round { nonce: 1, replicas: vec![replica], vanished: vec![next], listed: vec![] };
    let bounds = Bounds { skew: SKEW, svid_life_max: DAY };
    let moment = Duration::from_secs(1);
    let missing = |state: &TrustDomainState, now: UnixTime| {
        census::tally(state, Demand::default(), &round, 0, now, bounds).missing.len()
    };
    assert_eq!(missing(&mesh.state, BEGUN + DAY + SKEW + moment), 1, "its next start is not");
    assert_eq!(missing(&mesh.state, BEGUN + HOUR + DAY + SKEW + moment), 0);
    // What is kept of the time before a recovery may be of a copy.
    mesh.state.recovered_at = Some(BEGUN + HOUR * 2);
    assert_eq!(missing(&mesh.state, BEGUN + HOUR + DAY + SKEW + moment), 1);
    assert_eq!(missing(&mesh.state, BEGUN + HOUR * 2 + DAY + SKEW + moment), 0);
}

#[test]
fn a_store_that_was_put_back_is_noticed_until_it_is_halted_and_never_again_once_recovered() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    let (newest, before) = (mesh.revision, mesh.state.clone());
    // Another clock than the store's decides nothing, and forgets nothing either.
    mesh.revision = newest - 1;
    mesh.clock_offset_ms = Some(120_000);
    assert!(matches!(mesh.waits(), Wait::Clock { .. }));
    assert_eq!(mesh.state.halted, None);
    mesh.clock_offset_ms = None;
    mesh.look();
    assert!(mesh.state.halted.is_some());
    // One that was frozen meanwhile sees what a person has made of it.
    let mut frozen = Mesh::in_phase(PhaseName::Staged);
    frozen.state = TrustDomainState { recovered_at: Some(BEGUN + HOUR), ..before };
    frozen.revision = newest - 1;
    frozen.look();
    assert_eq!(frozen.state.halted, None);
}

#[test]
fn whom_a_phase_was_left_without_is_waited_for_again_by_no_order() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    let started = |started_at| Instance { pod_uid: "pod".to_owned(), started_at };
    let exempt = |mesh: &mut Mesh, instance| {
        let [name, reason, by] = ["demo/web-0", "it is asleep", "a person"].map(str::to_owned);
        let now = mesh.now().wall;
        mesh.state.exempt(instance, name, reason, by, now);
    };
    exempt(&mut mesh, started(BEGUN));
    mesh.bend = |member| ack(member).seq = 1;
    for _ in 0..40 {
        mesh.look();
    }
    assert_ne!(mesh.phase(), Some(PhaseName::Staged));
    // Said again, also of a start that nobody can name now.
    for instance in [started(BEGUN), started(UnixTime::default()), started(BEGUN)] {
        exempt(&mut mesh, instance);
        let refused = mesh.state.unexempt("pod").unwrap_err();
        assert_eq!(refused, OrderRefused::ReliedOn("demo/web-0".to_owned()));
    }
}

#[test]
fn what_is_due_waits_for_its_hours_unless_it_is_late() {
    let mut mesh = Mesh::in_phase(PhaseName::Staged);
    let midnight = BEGUN - Duration::from_millis(BEGUN.as_millis() % 86_400_000);
    let schedule = Schedule {
        anchor_period: DAY * 30,
        window: Some(Window { from: HOUR * 22, length: HOUR * 4 }),
    };
    mesh.state.activated_at = midnight;
    let due =
        |day: u32, hour: u32| schedule.is_due(&mesh.state, midnight + DAY * day + HOUR * hour, DAY);
    assert!(!due(29, 23), "it is not old");
    assert!(!due(30, 12), "it is old, and not the hour");
    assert!(due(30, 22) && due(31, 1), "it is old, and the hour");
    assert!(!due(690, 12) && due(698, 12), "three slow paths before the end any hour will do");
}

#[test]
fn an_active_issuer_whose_key_is_gone_is_replaced_and_none_whose_key_is_gone_takes_its_place() {
    let mesh = Mesh::in_phase(PhaseName::Staged);
    let mut state = mesh.state.clone();
    let active = state.active_issuer;
    assert!(!state.set_lost_issuers(Vec::new(), BEGUN), "its key is there");
    assert!(state.set_lost_issuers(vec![active], BEGUN));
    let rotation = state.issuer_rotation.clone().unwrap();
    assert_eq!((rotation.old, &*rotation.by, rotation.urgent), (active, "lost key", None));
    assert!(!state.set_lost_issuers(vec![active], BEGUN), "that is under way");
    assert!(state.set_lost_issuers(Vec::new(), BEGUN), "it was put back");

    // Somebody removes whatever key there is: one rotation an hour.
    state.issuer_rotation = None;
    state.past.push(PastRotation {
        number: 1,
        kind: "issuer".to_owned(),
        by: "lost key".to_owned(),
        started: BEGUN,
        ended: BEGUN,
        outcome: Outcome::Done,
        steps: Vec::new(),
    });
    state.set_lost_issuers(vec![active], BEGUN + HOUR / 2);
    assert_eq!(state.issuer_rotation, None);
    assert!(state.set_lost_issuers(vec![active], BEGUN + HOUR * 2));
    assert!(state.issuer_rotation.is_some());

    // An external one is for its owner to bring back.
    let anchor = state.active_anchor().unwrap().id;
    assert_eq!(state.own_issuers(BEGUN).collect::<Vec<_>>(), [active]);
    let ends = state.active_issuer().unwrap().not_after;
    assert_eq!(state.own_issuers(ends).next(), None);
    let record = state.anchors.iter_mut().find(|record| record.id == anchor).unwrap();
    record.key_ref = EXTERNAL.to_owned();
    assert_eq!(state.own_issuers(BEGUN).next(), None);
}
