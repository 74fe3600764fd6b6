//! Rotations to and from an anchor whose key is with somebody else.

use steadfast_api::UnixTime;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::Wait;
use steadfast_rotation_protocol::import::{ANCHORS_WAITING_MAX, ImportRefused};
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, Condemned, EXTERNAL, IssuerRecord, Request, WantedIssuer,
};

use crate::scenarios::Told;
use crate::world::{Action, NOW, Order, issuer, key};

#[test]
fn a_rotation_to_an_external_anchor_waits_for_its_owner_and_goes_on_with_his_issuer() {
    let mut told = told();
    told.run_to(PhaseName::Preparing);
    for _ in 0..20 {
        told.step();
    }
    assert_eq!(told.phase(), Some(PhaseName::Preparing));
    assert_eq!(told.waiting(), Wait::Signature { anchor: key(GIVEN) });
    let [wanted] = told.world.state.wanted_external[..] else { panic!("one wish") };
    assert_eq!(told.world.state.wanted_issuer, None, "the controller has nothing to sign");
    told.order(|state| state.import_issuer(wanted, issuer(key(GIVEN), 0)).unwrap());
    told.run_to_the_end();
    assert_eq!(told.anchors(), [(B, AnchorState::Standby), (GIVEN, AnchorState::Active)]);
    assert!(told.world.state.wanted_external.is_empty());
}

#[test]
fn an_issuer_that_was_signed_before_the_rotation_is_waited_for_by_nobody() {
    let mut told = told();
    let revision = told.world.revision;
    told.order(|state| {
        let wanted = state.request_issuer(key(GIVEN), revision).unwrap();
        let again = state.request_issuer(key(GIVEN), revision + 1).unwrap();
        assert_eq!(again, wanted, "the request that is open is the answer to a second one");
        state.import_issuer(wanted, issuer(key(GIVEN), 0)).unwrap();
    });
    let mut waits = Vec::new();
    told.act(Action::Give);
    while !told.world.settled_down() || told.world.state.rotations == 0 {
        told.step();
        waits.push(told.waiting());
        assert!(waits.len() < 200, "{waits:?}");
    }
    assert!(!waits.contains(&Wait::Signature { anchor: key(GIVEN) }));
    assert_eq!(told.anchors(), [(B, AnchorState::Standby), (GIVEN, AnchorState::Active)]);
}

#[test]
fn an_issuer_of_our_own_rotates_while_an_external_one_is_waited_for() {
    let mut told = told();
    told.run_to(PhaseName::Preparing);
    told.step();
    let old = told.world.state.active_issuer;
    told.order(|state| state.rotate_issuer(String::new(), None, UnixTime::default()).unwrap());
    for _ in 0..20 {
        told.step();
    }
    let state = &told.world.state;
    assert_ne!(state.active_issuer, old, "{:?}", told.waiting());
    assert_eq!(state.wanted_external.len(), 1, "the other wish still stands");
    assert_eq!(told.phase(), Some(PhaseName::Preparing));
}

#[test]
fn an_issuer_that_has_just_been_signed_waits_until_it_is_valid_on_every_clock() {
    let mut told = told();
    told.config.skew = 1;
    told.run_to(PhaseName::Preparing);
    let [wanted] = wished(&mut told);
    let now = UnixTime::from_millis(NOW * 1000);
    let young = IssuerRecord { not_before: now, ..issuer(key(GIVEN), 0) };
    told.order(|state| state.import_issuer(wanted, young).unwrap());
    told.step();
    told.step();
    assert_eq!(told.waiting(), Wait::Until(now + std::time::Duration::from_secs(1)));
    assert_eq!(told.phase(), Some(PhaseName::Preparing));
    told.order(|state| {
        state.issuers.iter_mut().for_each(|issuer| issuer.not_before = UnixTime::default());
    });
    told.run_to_the_end();
}

#[test]
fn no_key_of_an_external_anchor_is_ever_ours_to_destroy() {
    let mut told = told();
    told.run_to(PhaseName::Preparing);
    let [wanted] = wished(&mut told);
    told.order(|state| state.import_issuer(wanted, issuer(key(GIVEN), 0)).unwrap());
    told.run_to_the_end();
    // And away from it again, to the standby.
    let request = |state: &mut TrustDomainState| {
        let at = state.activated_at;
        state
            .request(Request { by: String::new(), at, anchor: None, canary: None, replaces: None })
            .unwrap();
    };
    told.order(request);
    for _ in 0..100 {
        told.step();
        let condemned = &told.world.state.condemned;
        assert!(!format!("{condemned:?}").contains(&key(GIVEN).to_string()), "{condemned:?}");
        if told.world.settled_down() && told.world.state.tombstones.contains(&key(GIVEN)) {
            return;
        }
    }
    panic!("no end: {:?} {:?}", told.phase(), told.waiting());
}

#[test]
fn an_abort_while_the_owner_is_waited_for_ends_as_it_had_begun() {
    let mut told = told();
    told.run_to(PhaseName::Preparing);
    wished(&mut told);
    told.order(|state| state.abort().unwrap());
    told.run_to_the_end();
    let expected =
        [(A, AnchorState::Active), (B, AnchorState::Standby), (GIVEN, AnchorState::Generated)];
    assert_eq!(told.anchors(), expected);
    // Forgotten after that, with the wish.
    told.order(|state| state.forget_anchor(key(GIVEN)).unwrap());
    told.step();
    told.step();
    assert!(told.world.state.wanted_external.is_empty() && told.world.state.condemned.is_empty());
}

#[test]
fn an_emergency_waits_for_no_owner() {
    let mut told = told();
    told.run_to(PhaseName::Preparing);
    wished(&mut told);
    let deadline = std::time::Duration::from_secs(1);
    told.order(|state| state.taint(key(A), String::new(), deadline).unwrap());
    for _ in 0..60 {
        told.step();
    }
    let active = told.world.state.active_anchor().map(|anchor| anchor.id);
    assert_eq!(active, Some(key(B)), "{:?}", told.waiting());
}

#[test]
fn the_issuer_of_an_external_anchor_is_asked_for_before_it_ends_and_the_anchor_is_never_old() {
    let mut told = told();
    let revision = told.world.revision;
    told.order(|state| {
        let wanted = state.request_issuer(key(GIVEN), revision).unwrap();
        state.import_issuer(wanted, issuer(key(GIVEN), 0)).unwrap();
    });
    told.run_to_the_end();
    assert!(told.world.state.wanted_external.is_empty());
    let soon = UnixTime::from_millis(100_500);
    told.order(|state| {
        let active = state.active_issuer;
        state.issuers.iter_mut().filter(|i| i.id == active).for_each(|i| i.not_after = soon);
        state.activated_at = UnixTime::default();
    });
    told.step();
    told.step();
    assert_eq!(told.world.state.wanted_external.len(), 1);
    assert_eq!(told.waiting(), Wait::Signature { anchor: key(GIVEN) });
    assert!(told.world.state.rotation.is_none());
}

#[test]
fn what_is_there_or_was_withdrawn_is_refused_by_name() {
    let mut state = TrustDomainState::clone(&told().world.state);
    let there = state.anchor(key(A)).cloned().unwrap();
    let import = |state: &mut TrustDomainState, anchor| state.import_anchor(anchor).unwrap_err();
    let error = import(&mut state, there.clone());
    assert!(matches!(error, ImportRefused::AnchorThere { .. }), "{error}");
    let renewed = AnchorRecord { der: vec![1], ..there.clone() };
    let error = import(&mut state, renewed);
    assert!(matches!(&error, ImportRefused::OldKey(id) if *id == key(A).to_string()), "{error}");
    state.tombstones.push(key(77));
    let error = import(&mut state, AnchorRecord { id: key(77), ..there.clone() });
    assert!(matches!(error, ImportRefused::Tombstoned(_)), "{error}");
    state.condemned.push(Condemned::Anchor(key(78)));
    let error = import(&mut state, AnchorRecord { id: key(78), ..there.clone() });
    assert!(matches!(error, ImportRefused::Condemned(_)), "{error}");
    let issuer = state.active_issuer;
    let error = import(&mut state, AnchorRecord { id: issuer, ..there.clone() });
    assert!(matches!(error, ImportRefused::IssuersKey(_)), "{error}");
    for n in 1..ANCHORS_WAITING_MAX {
        let anchor = AnchorRecord { id: key(200 + n as u8), ..there.clone() };
        assert_eq!(state.import_anchor(anchor), Ok(key(200 + n as u8)));
    }
    let error = import(&mut state, AnchorRecord { id: key(90), ..there });
    assert!(matches!(error, ImportRefused::TooMany), "{error}");
    let imported = state.anchor(key(201)).map(|anchor| (anchor.state, anchor.taint.clone()));
    assert_eq!(imported, Some((AnchorState::Generated, None)));
}

#[test]
fn an_issuer_nobody_asked_for_or_of_an_anchor_of_ours_is_refused() {
    let mut state = TrustDomainState::clone(&told().world.state);
    let error = state.request_issuer(key(A), 7).unwrap_err();
    assert!(matches!(error, ImportRefused::NotExternal(_)), "{error}");
    let wanted = WantedIssuer { anchor_id: key(GIVEN), number: 7 };
    let signed: IssuerRecord = issuer(key(GIVEN), 0);
    let error = state.import_issuer(wanted, signed.clone()).unwrap_err();
    assert!(matches!(error, ImportRefused::Unasked { .. }), "{error}");
    assert_eq!(state.request_issuer(key(GIVEN), 7), Ok(wanted));
    let other = IssuerRecord { anchor_id: key(B), ..signed.clone() };
    assert!(state.import_issuer(wanted, other).is_err());
    state.import_issuer(wanted, signed.clone()).unwrap();
    let error = state.import_issuer(wanted, signed).unwrap_err();
    assert!(matches!(error, ImportRefused::IssuerThere(_)), "{error}");
}

#[test]
fn a_state_from_before_there_were_chains_reads_as_one_without() {
    let mut state = TrustDomainState::clone(&told().world.state);
    let mut value = serde_json::to_value(&state).unwrap();
    assert!(value["issuers"][0].get("chain").is_none());
    value.as_object_mut().unwrap().remove("wanted_external");
    let read: TrustDomainState = serde_json::from_value(value).unwrap();
    assert_eq!(read, state);
    state.issuers[0].chain = vec![vec![1, 2], vec![3]];
    let text = serde_json::to_string(&state).unwrap();
    assert!(text.contains(r#""chain":["0102","03"]"#), "{text}");
    assert_eq!(serde_json::from_str::<TrustDomainState>(&text).unwrap(), state);
}

/// A world in which the anchor that is given is external, and is ordered next.
fn told() -> Told {
    let mut told = Told::new(&[Order::RotateGiven]);
    told.order(|state| {
        for anchor in state.anchors.iter_mut().filter(|anchor| anchor.id == key(GIVEN)) {
            anchor.key_ref = EXTERNAL.to_owned();
        }
    });
    told
}

fn wished(told: &mut Told) -> [WantedIssuer; 1] {
    for _ in 0..20 {
        if let [wanted] = told.world.state.wanted_external[..] {
            return [wanted];
        }
        told.step();
    }
    panic!("no wish: {:?}", told.waiting());
}

const A: u8 = 1;
const B: u8 = 2;
const GIVEN: u8 = 9;
