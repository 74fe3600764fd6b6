//! The way back where no phase can be left: what `steadfast trust recover` orders, and what a key
//! that is gone changes without a person.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may stop where it is wrong")]

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::json;
use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::census::{Ack, Held as Told, Listed, Member, ProxyStatus};
use steadfast_rotation_protocol::census::{Replica, Round};
use steadfast_rotation_protocol::controller::{
    Controller, Effect, Made, Now, Observation, Signed, Timings, Wait,
};
use steadfast_rotation_protocol::recover::{Ailment, Findings, Held, HeldAnchor, RecoverRefused};
use steadfast_rotation_protocol::rotation::{Phase, PhaseName, Rotation};
use steadfast_rotation_protocol::schedule::Schedule;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, Halt, IssuerRecord, Label, Promise, Request,
};
use steadfast_rotation_protocol::{Instance, TrustDomainState};

const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);
const SKEW: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);

fn id(name: u8) -> KeyId {
    KeyId::of_spki(&[name])
}

fn anchor(name: u8, state: AnchorState, not_after: UnixTime) -> AnchorRecord {
    let (key_ref, svid_life_max) = (String::new(), DAY);
    AnchorRecord {
        id: id(name),
        der: vec![name],
        not_after,
        state,
        taint: None,
        key_ref,
        svid_life_max,
    }
}

fn issuer(name: u8, anchor: u8, not_after: UnixTime) -> IssuerRecord {
    let key_ref = String::new();
    let (id, anchor_id) = (id(name), id(anchor));
    let not_before = NOW - DAY * 90;
    IssuerRecord {
        id,
        anchor_id,
        der: vec![name],
        chain: Vec::new(),
        not_before,
        not_after,
        key_ref,
    }
}

/// An active anchor 1 that ends then, its issuer 10 that ends a skew before, a standby 2.
fn state(active_ends: UnixTime, standby_ends: UnixTime) -> TrustDomainState {
    let anchors = vec![
        anchor(1, AnchorState::Active, active_ends),
        anchor(2, AnchorState::Standby, standby_ends),
    ];
    let domain = "cluster.local".parse().unwrap();
    let first = issuer(10, 1, active_ends - SKEW);
    TrustDomainState::founded(domain, anchors, first, NOW - DAY * 90)
}

fn timings() -> Timings {
    Timings {
        lease: Duration::from_secs(15),
        skew: SKEW,
        renew_window: DAY / 24,
        renew_window_urgent: SKEW,
        issuer_life: DAY * 30,
        issuer_left_min: DAY * 10,
        schedule: Schedule { anchor_period: DAY * 365, window: None },
    }
}

/// A controller that can reach nobody: what it is shown is the state, and what was made or signed;
/// or, with `answered`, that nobody is there to be waited for.
struct Alone {
    controller: Controller,
    state: TrustDomainState,
    revision: u64,
    made: Option<Made>,
    signed: Option<Signed>,
    seconds: u64,
    answered: bool,
    round: Option<Round>,
    keyless: Vec<KeyId>,
    /// How many issuers were signed: their names follow from it.
    issuers: u8,
}

impl Alone {
    fn new(state: TrustDomainState) -> Self {
        let controller = Controller::new(timings());
        let (made, signed, round) = (None, None, None);
        let (answered, keyless, issuers) = (false, Vec::new(), 0);
        let (revision, seconds) = (1, 0);
        Self {
            controller,
            state,
            revision,
            made,
            signed,
            seconds,
            answered,
            round,
            keyless,
            issuers,
        }
    }

    /// Looks so often, and does what it is told to.
    fn look(&mut self, times: u64) {
        for _ in 0..times {
            self.seconds += 1;
            let time = self.seconds;
            let now =
                Now { wall: NOW + Duration::from_secs(time), boot: Duration::from_secs(time) };
            let seen = Observation {
                round: self.round.clone(),
                state: self.state.clone(),
                revision: self.revision,
                clock_offset_ms: None,
                made: self.made.clone(),
                signed: self.signed.clone(),
                mirrors_current: self.answered,
                undestroyed: Vec::new(),
                keyless: self.keyless.clone(),
                listed: Vec::new(),
            };
            for effect in self.controller.handle(now, &seen) {
                match effect {
                    Effect::Persist(persist) => {
                        assert_eq!(persist.expected, self.revision);
                        self.state = persist.state;
                        self.revision += 1;
                        self.controller.persisted(now, self.revision);
                    }
                    Effect::Generate(label) => self.made = Some(made(label)),
                    Effect::Sign(wanted) => {
                        let anchor = self.state.anchor(wanted.anchor_id).expect("an anchor");
                        assert!(anchor.not_after > NOW, "one that has ended signs nothing");
                        assert!(!self.keyless.contains(&anchor.id), "one without a key neither");
                        if self.signed.as_ref().is_some_and(|signed| signed.wanted == wanted) {
                            continue;
                        }
                        let issuer = issuer(50 + self.issuers, 0, NOW + DAY * 30);
                        let issuer = IssuerRecord { anchor_id: anchor.id, ..issuer };
                        self.issuers += 1;
                        self.signed = Some(Signed { wanted, issuer });
                    }
                    Effect::Query(nonce) if self.answered => {
                        let loaded = self.state.issuers.iter().map(|issuer| issuer.id).collect();
                        let (name, reached) = ("identity".to_owned(), true);
                        let replica = Replica { name, reached, loaded, ..Replica::default() };
                        let replicas = vec![replica];
                        self.round = Some(Round { nonce, replicas, ..Round::default() });
                    }
                    Effect::Destroy(_) | Effect::Query(_) => {}
                }
            }
        }
    }

    fn phase(&self) -> Option<PhaseName> {
        self.state.rotation.as_ref().map(|rotation| rotation.phase.name())
    }
}

fn made(label: Label) -> Made {
    Made { label, anchor: anchor(40, AnchorState::Generated, NOW + DAY * 761) }
}

#[test]
fn an_expired_mesh_does_nothing_before_a_person_says_so_and_then_issues_without_an_answer() {
    let mut alone = Alone::new(state(NOW - DAY, NOW - DAY));
    alone.look(5);
    let ailment = alone.state.ailment(NOW, SKEW);
    assert!(matches!(ailment, Some(Ailment::Expired { .. })), "{ailment:?}");
    assert_eq!(alone.state.rotation, None);
    alone.state.rescue("a person".into(), NOW, SKEW).unwrap();
    alone.revision += 1;
    assert_eq!(alone.state.ailment(NOW, SKEW), None, "it is being healed");
    alone.look(8);
    let active = alone.state.active_anchor().map(|anchor| anchor.id);
    assert_eq!((active, alone.phase()), (Some(id(40)), Some(PhaseName::Activated)));
    assert_eq!(alone.state.active_issuer, id(50));
    assert!(alone.state.published().any(|anchor| anchor.id == id(1)), "added before removed");
    // One fence: the old one is gone; everybody is asked whether they hold what is published.
    alone.look(30);
    assert_eq!(alone.phase(), Some(PhaseName::Withdrawn));
    assert!(alone.state.tombstones.contains(&id(1)));
    assert_eq!(*alone.controller.waiting(), Wait::Round);
}

#[test]
fn a_standby_that_lasts_becomes_active_and_no_fresh_anchor_is_made() {
    let mut alone = Alone::new(state(NOW - DAY, NOW + DAY * 300));
    alone.state.rescue("a person".into(), NOW, SKEW).unwrap();
    alone.look(4);
    assert_eq!(alone.state.active_anchor().map(|anchor| anchor.id), Some(id(2)));
    assert_eq!(alone.made, None);
}

#[test]
fn while_an_svid_may_be_alive_nothing_is_rescued() {
    // Its anchor signs nothing more; what it has signed lives for a moment.
    let (ends, moment) = (NOW + SKEW + SKEW / 2, SKEW / 2);
    let mut dying = state(ends, NOW + DAY * 300);
    let before = dying.clone();
    let refused = dying.rescue("a person".into(), NOW, SKEW);
    assert_eq!(refused, Err(RecoverRefused::Alive(NOW + moment)));
    assert_eq!(dying, before);
    let mut well = state(NOW + DAY * 300, NOW + DAY * 300);
    assert_eq!(well.rescue("a person".into(), NOW, SKEW), Err(RecoverRefused::Well));
}

#[test]
fn an_issuer_alone_that_has_expired_is_replaced_without_a_person_and_without_an_answer() {
    let mut off_for_a_month = state(NOW + DAY * 300, NOW + DAY * 700);
    off_for_a_month.issuers[0].not_after = NOW - DAY;
    let mut alone = Alone::new(off_for_a_month);
    assert_eq!(alone.state.ailment(NOW, SKEW), None);
    alone.look(5);
    assert_eq!(alone.state.active_issuer, id(50));
    assert_eq!(alone.state.active_issuer().unwrap().anchor_id, id(1));
}

#[test]
fn an_issuer_that_can_sign_is_not_replaced_by_one_that_nobody_has_loaded() {
    let mut due = state(NOW + DAY * 300, NOW + DAY * 700);
    due.issuers[0].not_after = NOW + DAY;
    let mut alone = Alone::new(due);
    alone.look(20);
    assert_eq!(alone.state.active_issuer, id(10));
    assert!(alone.state.issuer(id(50)).is_some(), "it is made, and waits to be loaded");
}

fn asked(state: &TrustDomainState, acks: Vec<Ack>) -> Observation {
    let members = acks.into_iter().enumerate().map(|(index, ack)| Member {
        instance: Instance { pod_uid: index.to_string(), started_at: NOW },
        name: format!("demo/web-{index}"),
        open: true,
        last_heard: NOW,
        answered: 1,
        answered_before: 0,
        used: Vec::new(),
        issuers: Vec::new(),
        ack: Some(ack),
        version: None,
    });
    let replica = Replica {
        name: "identity".into(),
        reached: true,
        started_at: UnixTime::default(),
        newest_nonce: 1,
        loaded: Vec::new(),
        own: None,
        members: members.collect(),
    };
    let listed = |uid: &str, name: &str| {
        let (pod_uid, name) = (uid.to_owned(), name.to_owned());
        Listed { pod_uid, name, proxy: ProxyStatus::Running }
    };
    let listed = vec![listed("0", "demo/web-0"), listed("x", "demo/silent-0")];
    let round = Round { nonce: 1, listed, replicas: vec![replica], vanished: Vec::new() };
    Observation {
        round: Some(round),
        state: state.clone(),
        revision: 7,
        clock_offset_ms: None,
        made: None,
        signed: None,
        mirrors_current: true,
        undestroyed: Vec::new(),
        keyless: Vec::new(),
        listed: Vec::new(),
    }
}

fn ack(seq: u64, digest: [u8; 32], held: Option<Told>) -> Ack {
    let digest = KeyId::from_slice(&digest);
    Ack { seq, digest, mounted: None, svid: None, clock_offset_ms: 0, held }
}

/// What the controller makes of it: whether it halts, and at which sequence number.
fn halts(controller: &mut Controller, seen: &Observation) -> Option<Halt> {
    let now = Now { wall: NOW, boot: Duration::from_secs(100) };
    let effects = controller.handle(now, seen);
    effects.into_iter().find_map(|effect| match effect {
        Effect::Persist(persist) => persist.state.halted,
        _ => None,
    })
}

#[test]
fn a_bundle_that_was_never_published_halts_and_a_boast_does_not() {
    let state = state(NOW + DAY * 300, NOW + DAY * 700);
    let halts = |seq, digest| {
        let seen = asked(&state, vec![ack(seq, digest, None)]);
        halts(&mut Controller::new(timings()), &seen)
    };
    assert_eq!(halts(1, state.digest()), None);
    assert_eq!(halts(0, [7; 32]), None, "it has none yet");
    assert_eq!(halts(1, [7; 32]), Some(Halt::Restored { seen_seq: 1 }));
    assert_eq!(halts(9, [7; 32]), Some(Halt::Restored { seen_seq: 9 }));
    assert_eq!(halts(u64::MAX, [7; 32]), None, "nothing could be above it");
}

#[test]
fn a_revision_before_one_that_was_seen_halts() {
    let state = state(NOW + DAY * 300, NOW + DAY * 700);
    let mut controller = Controller::new(timings());
    let seen = asked(&state, Vec::new());
    assert_eq!(halts(&mut controller, &seen), None);
    let older = Observation { revision: 6, ..seen };
    assert_eq!(halts(&mut controller, &older), Some(Halt::Restored { seen_seq: 1 }));
}

#[test]
fn what_workloads_tell_is_counted_and_who_is_silent_is_named() {
    let state = state(NOW + DAY * 300, NOW + DAY * 700);
    let told = Told { anchors: vec![id(2), id(3)], tombstones: vec![id(1)], denied: vec![id(11)] };
    let acks = vec![ack(4, [7; 32], Some(told.clone())), ack(1, state.digest(), None)];
    let found = Findings::of(&state, asked(&state, acks).round.as_ref().unwrap(), NOW);
    assert_eq!(
        (found.seq, found.told, found.silent.as_slice()),
        (4, 2, &["demo/silent-0".to_owned()][..])
    );
    assert_eq!(found.tombstones, [Held { id: id(1), by: 1 }]);
    let forgotten: Vec<_> = found.forgotten(&state).map(|held| held.id).collect();
    assert_eq!(forgotten, [id(3)], "2 is stored, and 1 is withdrawn");
}

/// The state as a store that was put back has it, and what its controller finds of keys.
fn put_back(kept: &[KeyId]) -> (TrustDomainState, Findings) {
    let mut state = state(NOW + DAY * 300, NOW + DAY * 700);
    state.halted = Some(Halt::Restored { seen_seq: 9 });
    let mut found = Findings::default();
    found.and_kept(&state, kept);
    (state, found)
}

#[test]
fn an_active_anchor_whose_key_is_gone_is_drained_toward_the_standby_whose_key_is_there() {
    let (mut state, found) = put_back(&[id(2)]);
    assert_eq!(found.keyless, [id(1)]);
    state.recover(&found, "a person".into(), NOW);
    assert_eq!(state.anchor(id(1)).unwrap().state, AnchorState::Retiring);
    let rotation = state.rotation.as_ref().unwrap();
    assert!(matches!(rotation.phase, Phase::Preparing(to) if to.to == id(2)), "{rotation:?}");
    assert!(!rotation.rescue, "identity is believed, so everybody is asked");
}

/// An abort since the copy was made leaves no tombstone of an anchor that never signed: its
/// workloads may use a bundle without it again.
#[test]
fn who_holds_what_was_added_is_asked_again_before_it_signs() {
    let (mut state, found) = put_back(&[id(1), id(2), id(3)]);
    state.anchors.push(anchor(3, AnchorState::Standby, NOW + DAY * 700));
    for to in [2, 3] {
        let mut state = state.clone();
        state.rotation = Some(preparing(to));
        state.recover(&found, "a person".into(), NOW);
        assert_eq!(state.anchor(id(3)).unwrap().state, AnchorState::Staged);
        let rotation = state.rotation.as_ref().unwrap();
        assert!(matches!(rotation.phase, Phase::Staged(s) if s.added == id(3)), "{rotation:?}");
    }
    // Nobody has an SVID, so nobody can be asked.
    state.rotation = Some(Rotation { rescue: true, ..preparing(3) });
    state.recover(&found, "a person".into(), NOW);
    let rotation = state.rotation.as_ref().unwrap();
    assert!(matches!(rotation.phase, Phase::Preparing(_)), "{rotation:?}");
}

/// To this anchor, after anchor 3 was added.
fn preparing(to: u8) -> Rotation {
    let mut state = state(NOW + DAY * 300, NOW + DAY * 700);
    state.anchors.push(anchor(3, AnchorState::Generated, NOW + DAY * 700));
    let given = (to == 3).then(|| id(3));
    let by = "a person".to_owned();
    let request = Request { by, at: NOW, anchor: given, canary: None, replaces: None };
    state.request(request).unwrap();
    let mut alone = Alone::new(state);
    alone.answered = true;
    while alone.state.rotation.is_none() {
        alone.look(1);
        assert!(alone.seconds < 60, "{:#?}", alone.state);
    }
    let mut rotation = alone.state.rotation.unwrap();
    rotation.added = Some(id(3));
    rotation.phase = serde_json::from_value(json!({"preparing": {"to": id(to)}})).unwrap();
    rotation
}

#[test]
fn a_standby_whose_key_is_gone_is_drained_and_not_used() {
    let (mut state, found) = put_back(&[id(1)]);
    assert_eq!(found.keyless, [id(2)]);
    state.recover(&found, "a person".into(), NOW);
    assert_eq!(state.active_anchor().map(|anchor| anchor.id), Some(id(1)));
    assert_eq!(state.anchor(id(2)).unwrap().state, AnchorState::Retiring);
    assert_eq!(state.rotation.map(|rotation| rotation.phase.name()), Some(PhaseName::Activated));
}

#[test]
fn without_any_key_a_fresh_anchor_is_staged_and_everybody_asked_whether_they_hold_it() {
    let (mut state, found) = put_back(&[]);
    state.recover(&found, "a person".into(), NOW);
    let rotation = state.rotation.as_ref().unwrap();
    assert_eq!((rotation.phase.name(), rotation.rescue), (PhaseName::Generating, false));
}

#[test]
fn an_anchor_whose_key_is_kept_comes_back_though_the_state_has_forgotten_it_and_nobody_tells() {
    let (mut state, mut found) = put_back(&[id(1), id(2), id(3)]);
    assert_eq!(found.anchors, [HeldAnchor { id: id(3), by: 0, record: None }]);
    found.anchors[0].record = Some(anchor(3, AnchorState::Generated, NOW + DAY * 761));
    state.recover(&found, "a person".into(), NOW);
    assert_eq!(state.anchor(id(3)).unwrap().state, AnchorState::Retiring);
    // What was withdrawn before the backup stays so, wherever its key still is.
    state.tombstones.push(id(4));
    found.and_kept(&state, &[id(4)]);
    assert!(!found.anchors.iter().any(|held| held.id == id(4)));
}

#[test]
fn an_emergency_goes_to_no_anchor_that_only_a_recovery_has_put_back() {
    let (mut state, mut found) = put_back(&[id(1), id(2), id(3)]);
    found.anchors[0].record = Some(anchor(3, AnchorState::Generated, NOW + DAY * 761));
    state.recover(&found, "a person".into(), NOW);
    assert_eq!(state.unsettled, [id(3)]);
    state.taint(id(1), "a person".into(), SKEW).unwrap();
    let mut alone = Alone::new(state);
    alone.look(1);
    let rotation = alone.state.rotation.as_ref().unwrap();
    assert!(matches!(rotation.phase, Phase::Preparing(to) if to.to == id(2)), "{rotation:?}");
    let settled = settled(&mut alone);
    assert!(settled.iter().all(|(anchor, _)| ![id(1), id(3)].contains(anchor)), "{settled:?}");
    assert_eq!(alone.state.unsettled, []);
}

/// A recovery may have left no anchor active: the one that was to be is stolen before it is.
#[test]
fn a_stolen_anchor_that_a_recovery_makes_active_is_replaced_by_another() {
    let (mut state, found) = put_back(&[id(2)]);
    state.recover(&found, "a person".into(), NOW);
    assert_eq!(state.active_anchor(), None);
    state.taint(id(2), "a person".into(), SKEW).unwrap();
    let mut alone = Alone { keyless: vec![id(1)], ..Alone::new(state) };
    alone.look(1);
    let rotation = alone.state.rotation.as_ref().unwrap();
    assert_eq!((rotation.phase.name(), rotation.rescue), (PhaseName::Generating, false));
    assert!(replaced_by_a_fresh_one(&mut alone), "{:?}", alone.state.anchors);
}

#[test]
fn no_way_leads_back_to_an_anchor_that_only_a_recovery_has_put_back() {
    let (mut state, mut found) = put_back(&[id(2), id(3)]);
    found.anchors[0].record = Some(anchor(3, AnchorState::Generated, NOW + DAY * 761));
    found.tombstones = vec![Held { id: id(1), by: 9 }];
    state.recover(&found, "a person".into(), NOW);
    let mut alone = Alone { answered: true, ..Alone::new(state) };
    while alone.phase() != Some(PhaseName::Draining) {
        alone.look(1);
        assert!(alone.seconds < 400, "waiting for {:?}", alone.controller.waiting());
    }
    let states = alone.state.anchors.iter().map(|anchor| (anchor.id, anchor.state));
    let [_, active, retiring] = states.collect::<Vec<_>>()[..] else { panic!("{found:?}") };
    assert_eq!(active, (id(2), AnchorState::Active));
    assert_eq!(retiring, (id(3), AnchorState::Retiring));
    assert!(alone.state.abort().is_err());
}

/// It may have signed, for all that the state knows, and not everybody holds it yet.
#[test]
fn an_anchor_that_is_stolen_while_it_is_staged_after_a_recovery_is_drained_and_never_signs() {
    let (mut state, found) = put_back(&[id(1)]);
    state.recover(&found, "a person".into(), NOW);
    state.taint(id(1), "a person".into(), SKEW).unwrap();
    let mut alone = Alone::new(state);
    while alone.phase() != Some(PhaseName::Staged) {
        alone.look(1);
        assert!(alone.seconds < 60, "waiting for {:?}", alone.controller.waiting());
    }
    alone.state.taint(id(40), "a person".into(), SKEW).unwrap();
    alone.look(1);
    assert_eq!(alone.state.anchor(id(40)).map(|a| a.state), Some(AnchorState::Retiring));
    assert!(!alone.state.acked(id(40)));
}

/// Nobody could be asked about another: identity has no SVID before an anchor is active.
#[test]
fn where_nothing_else_is_believed_a_stolen_anchor_becomes_active_before_it_is_replaced() {
    let (mut state, mut found) = put_back(&[id(3)]);
    let record = anchor(3, AnchorState::Generated, NOW + DAY * 761);
    found.anchors[0].record = Some(record);
    found.tombstones = [id(1), id(2)].map(|id| Held { id, by: 9 }).to_vec();
    state.recover(&found, "a person".into(), NOW);
    state.taint(id(3), "a person".into(), SKEW).unwrap();
    let mut alone = Alone::new(state);
    while alone.state.active_anchor().is_none() {
        alone.look(1);
        assert!(alone.seconds < 400, "waiting for {:?}", alone.controller.waiting());
    }
    assert_eq!(alone.state.active_anchor().map(|anchor| anchor.id), Some(id(3)));
    assert!(replaced_by_a_fresh_one(&mut alone), "{:?}", alone.state.anchors);
}

/// Whether, when no emergency is left, there is no anchor but one that was made for it.
fn replaced_by_a_fresh_one(alone: &mut Alone) -> bool {
    alone.answered = true;
    let urgent = |alone: &Alone| alone.state.rotation.as_ref().is_some_and(|r| r.urgent.is_some());
    loop {
        alone.look(1);
        assert!(alone.seconds < 400, "waiting for {:?}", alone.controller.waiting());
        if !urgent(alone) {
            break;
        }
    }
    let anchors = alone.state.anchors.iter().filter(|a| a.state != AnchorState::Standby);
    anchors.map(|anchor| (anchor.id, anchor.state)).eq([(id(40), AnchorState::Active)])
}

#[test]
fn where_all_that_was_stored_is_withdrawn_the_anchor_that_most_hold_becomes_active() {
    let (mut state, mut found) = put_back(&[id(3), id(4), id(5)]);
    for (held, by) in found.anchors.iter_mut().zip([1, 9, 0]) {
        let record = anchor(0, AnchorState::Generated, NOW + DAY * 761);
        (held.by, held.record) = (by, Some(AnchorRecord { id: held.id, ..record }));
    }
    let most = found.anchors[1].id;
    found.tombstones = [id(1), id(2)].map(|id| Held { id, by: 9 }).to_vec();
    state.recover(&found, "a person".into(), NOW);
    let rotation = state.rotation.as_ref().unwrap();
    assert!(matches!(rotation.phase, Phase::Preparing(to) if to.to == most), "{rotation:?}");
}

#[test]
fn where_nobody_can_be_asked_about_a_fresh_anchor_a_staged_or_stolen_one_becomes_active() {
    let becomes_active = |bend: fn(&mut TrustDomainState)| {
        let (mut state, mut found) = put_back(&[id(2)]);
        found.tombstones = vec![Held { id: id(1), by: 9 }];
        bend(&mut state);
        state.recover(&found, "a person".into(), NOW);
        let rotation = state.rotation.as_ref().unwrap();
        assert!(!rotation.rescue, "there is one that is believed");
        matches!(rotation.phase, Phase::Preparing(to) if to.to == id(2))
    };
    assert!(becomes_active(|state| state.anchors[1].state = AnchorState::Staged));
    assert!(becomes_active(|state| state.taint(id(2), "a person".into(), SKEW).unwrap()));
}

#[test]
fn a_recovery_promises_again_what_holders_that_cannot_ack_may_hold_under_any_anchor() {
    let (mut state, found) = put_back(&[id(1), id(2)]);
    let holder = "linkerd".to_owned();
    let promise = |anchor_id, not_after| Promise { anchor_id, holder: holder.clone(), not_after };
    state.promised = vec![promise(id(1), NOW - DAY)];
    state.recover(&found, "a person".into(), NOW);
    assert_eq!(state.promised, [promise(id(1), NOW + DAY), promise(id(2), NOW + DAY)]);
}

/// A recovered state that may have issued under its standby, and no rotation that is about others.
fn recovered() -> TrustDomainState {
    let (mut state, found) = put_back(&[id(1), id(2)]);
    state.recover(&found, "a person".into(), NOW);
    (state.rotation, state.wanted_issuer) = (None, None);
    state
}

#[test]
fn a_standby_that_is_tainted_after_a_recovery_is_drained_and_not_dropped() {
    let mut state = recovered();
    state.taint(id(2), "a person".into(), SKEW).unwrap();
    let mut alone = Alone::new(state);
    alone.look(1);
    assert_eq!(alone.state.anchor(id(2)).unwrap().state, AnchorState::Retiring);
    assert_eq!(alone.phase(), Some(PhaseName::Activated));
    // Once nothing can have been issued under it before, it goes at once.
    let mut late = recovered();
    late.recovered_at = Some(NOW - DAY * 2);
    late.taint(id(2), "a person".into(), SKEW).unwrap();
    let mut alone = Alone::new(late);
    alone.look(1);
    assert_eq!(alone.state.anchor(id(2)).map(|a| a.state), Some(AnchorState::Withdrawn));
}

#[test]
fn a_standby_that_is_replaced_after_a_recovery_is_drained_and_not_dropped() {
    let replaced = |recovered_at| {
        let mut state = recovered();
        state.recovered_at = recovered_at;
        // Too old to be active for a year.
        state.anchors[1].not_after = NOW + DAY * 300;
        let mut alone = Alone { answered: true, ..Alone::new(state) };
        let of_it = |alone: &Alone| alone.state.anchor(id(2)).map(|anchor| anchor.state);
        while of_it(&alone) == Some(AnchorState::Standby) {
            alone.look(1);
            assert!(alone.seconds < 400, "waiting for {:?}", alone.controller.waiting());
        }
        of_it(&alone)
    };
    assert_eq!(replaced(Some(NOW)), Some(AnchorState::Retiring));
    assert_eq!(replaced(None), Some(AnchorState::Withdrawn), "it has never signed");
}

#[test]
fn what_was_staged_before_a_recovery_is_not_taken_back_at_once() {
    let aborted = |recovered_at| {
        let mut state = recovered();
        (state.recovered_at, state.anchors[1].not_after) = (recovered_at, NOW + DAY * 300);
        let mut alone = Alone::new(state);
        alone.answered = true;
        alone.look(2);
        alone.answered = false;
        alone.look(3);
        assert_eq!(alone.phase(), Some(PhaseName::Staged));
        alone.state.abort().unwrap();
        alone.look(1);
        alone.state.anchor(id(40)).map(|anchor| anchor.state)
    };
    assert_eq!(aborted(Some(NOW)), Some(AnchorState::Staged));
    assert_eq!(aborted(None), None);
}

/// Where each anchor stands, when nothing goes on any more.
fn settled(alone: &mut Alone) -> Vec<(KeyId, AnchorState)> {
    alone.answered = true;
    alone.look(400);
    assert_eq!(alone.phase(), None, "waiting for {:?}", alone.controller.waiting());
    alone.state.anchors.iter().map(|anchor| (anchor.id, anchor.state)).collect()
}

fn well() -> TrustDomainState {
    state(NOW + DAY * 700, NOW + DAY * 750)
}

#[test]
fn an_active_anchor_whose_key_is_gone_is_replaced_by_the_standby_without_a_person() {
    let mut alone = Alone { keyless: vec![id(1)], ..Alone::new(well()) };
    let expected = [(id(2), AnchorState::Active), (id(40), AnchorState::Standby)];
    assert_eq!(settled(&mut alone), expected);
    assert_eq!(alone.state.past.last().unwrap().by, "lost key");
}

#[test]
fn a_standby_whose_key_is_gone_is_replaced_by_a_fresh_one() {
    let mut alone = Alone { keyless: vec![id(2)], ..Alone::new(well()) };
    let expected = [(id(1), AnchorState::Active), (id(40), AnchorState::Standby)];
    assert_eq!(settled(&mut alone), expected);
}

#[test]
fn a_key_that_is_gone_while_its_anchor_is_prepared_sends_the_rotation_to_the_fresh_one() {
    let mut alone = Alone { keyless: vec![id(1)], answered: true, ..Alone::new(well()) };
    while alone.phase() != Some(PhaseName::Preparing) {
        alone.look(1);
    }
    alone.keyless = vec![id(1), id(2)];
    while alone.state.active_anchor().map(|anchor| anchor.id) == Some(id(1)) {
        alone.look(1);
        assert!(alone.seconds < 400, "waiting for {:?}", alone.controller.waiting());
    }
    assert_eq!(alone.state.active_anchor().map(|anchor| anchor.id), Some(id(40)));
}

#[test]
fn an_emergency_goes_to_no_standby_whose_key_is_gone() {
    let mut stolen = well();
    stolen.taint(id(1), "a person".into(), SKEW).unwrap();
    let mut alone = Alone { keyless: vec![id(2)], answered: true, ..Alone::new(stolen) };
    alone.look(60);
    assert_eq!(alone.state.active_anchor().map(|anchor| anchor.id), Some(id(40)));
}

#[test]
fn an_issuer_that_is_stolen_while_a_stolen_one_is_replaced_is_denied_too() {
    for phase in [PhaseName::Activated, PhaseName::Draining, PhaseName::Denied] {
        let mut alone = Alone { answered: true, ..Alone::new(well()) };
        let by = || "a person".to_owned();
        alone.state.rotate_issuer(by(), Some(SKEW), NOW).unwrap();
        let in_phase = |alone: &Alone| {
            alone.state.issuer_rotation.as_ref().is_some_and(|r| r.phase.name() == phase)
        };
        while !in_phase(&alone) {
            alone.look(1);
            assert!(alone.seconds < 400, "{phase:?}: {:?}", alone.controller.waiting());
        }
        assert_eq!(alone.state.active_issuer, id(50));
        alone.state.rotate_issuer(by(), Some(SKEW), NOW).unwrap();
        alone.revision += 1;
        alone.look(200);
        assert_eq!(alone.state.issuer_rotation, None, "{phase:?}");
        assert!(alone.state.denies(id(10)) && alone.state.denies(id(50)), "{phase:?}");
        assert_eq!(alone.state.active_issuer, id(51), "{phase:?}");
    }
}

#[test]
fn a_rotation_that_mends_cannot_be_aborted_and_says_so() {
    let (mut state, found) = put_back(&[id(1)]);
    state.recover(&found, "a person".into(), NOW);
    let refused = state.abort().unwrap_err().to_string();
    assert!(refused.contains("nothing good to go back to"), "{refused}");
}

fn states() -> impl Strategy<Value = AnchorState> {
    use AnchorState::{Active, Generated, Retiring, Staged, Standby, Withdrawn};
    prop_oneof![
        Just(Generated),
        Just(Staged),
        Just(Standby),
        Just(Retiring),
        Just(Withdrawn),
        Just(Active)
    ]
}

proptest! {
    #[test]
    fn a_recovered_state_goes_on_from_everything_that_was_seen(
        kinds in vec(states(), 1..5),
        seq in 1..50_u64,
        seen_seq in 0..100_u64,
        tombstones in vec(1..8_u8, 0..4),
        held in vec((1..8_u8, any::<bool>()), 0..5),
        denied in vec(10..14_u8, 0..3),
        under_way in any::<bool>(),
    ) {
        let mut before = state(NOW + DAY * 300, NOW + DAY * 700);
        // At most one anchor is active.
        let mut active = false;
        before.anchors = kinds.iter().zip(1_u8..).map(|(kind, name)| {
            let kind = match kind {
                AnchorState::Active if std::mem::replace(&mut active, true) => AnchorState::Standby,
                kind => *kind,
            };
            anchor(name, kind, NOW + DAY * 300)
        }).collect();
        before.tombstones =
            before.in_state(AnchorState::Withdrawn).map(|anchor| anchor.id).collect();
        (before.seq, before.halted) = (seq, Some(Halt::Restored { seen_seq }));
        if under_way {
            let mut other = state(NOW - DAY, NOW + DAY * 300);
            other.rescue("a person".into(), NOW, SKEW).unwrap();
            before.rotation = other.rotation;
        }
        let held = held.iter().map(|(name, ours)| HeldAnchor {
            id: id(*name),
            by: 1,
            record: ours.then(|| anchor(*name, AnchorState::Generated, NOW + DAY * 761)),
        });
        let one = |name: &u8| Held { id: id(*name), by: 1 };
        let found = Findings {
            seq: seen_seq,
            anchors: held.collect(),
            tombstones: tombstones.iter().map(one).collect(),
            denied: denied.iter().map(one).collect(),
            ..Findings::default()
        };
        let mut after = before.clone();
        after.recover(&found, "a person".into(), NOW);

        prop_assert!(after.seq > seq && after.seq > seen_seq);
        prop_assert_eq!(after.halted, None);
        let withdrawn = |id: KeyId| {
            before.tombstones.contains(&id) || found.tombstones.iter().any(|held| held.id == id)
        };
        let published = |id: KeyId| after.published().any(|anchor| anchor.id == id);
        for anchor in before.published() {
            prop_assert_eq!(published(anchor.id), !withdrawn(anchor.id), "of what was stored");
        }
        for held in &found.anchors {
            let ours = held.record.is_some();
            prop_assert!(!ours || published(held.id) || withdrawn(held.id), "of what is held");
        }
        for anchor in after.published() {
            let stored = before.published().any(|before| before.id == anchor.id);
            let ours = found.anchors.iter().any(|h| h.id == anchor.id && h.record.is_some());
            prop_assert!(stored || ours, "nobody's word brings an anchor in");
        }
        for id in before.tombstones.iter().chain(found.tombstones.iter().map(|held| &held.id)) {
            prop_assert!(after.tombstones.contains(id));
        }
        for held in &found.denied {
            prop_assert!(after.denies(held.id));
        }
        let ids: Vec<_> = after.anchors.iter().map(|anchor| anchor.id).collect();
        let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
        prop_assert_eq!(distinct.len(), ids.len(), "each is there once");
        prop_assert!(after.in_state(AnchorState::Active).count() <= 1);
        let rotation = after.rotation.as_ref().expect("its census shows that all is well");
        if after.active_anchor().is_none() && after.rotations > before.rotations {
            let to = match &rotation.phase {
                Phase::Preparing(preparing) => published(preparing.to),
                // Identity is believed as long as its issuer is.
                Phase::Generating(_) => {
                    let issuer = after.active_issuer();
                    let issuer = issuer.filter(|issuer| !after.denies(issuer.id));
                    rotation.rescue != issuer.is_some_and(|issuer| published(issuer.anchor_id))
                }
                _ => false,
            };
            prop_assert!(to, "{:?}", rotation);
        }
    }
}
