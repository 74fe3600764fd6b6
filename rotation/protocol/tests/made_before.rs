//! After the store was put back, numbers of rotations come again: what was made for one before may
//! be withdrawn, and stays so.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

use std::time::Duration;

use steadfast_api::{KeyId, UnixTime};
use steadfast_rotation_protocol::census::Round;
use steadfast_rotation_protocol::controller::{
    Controller, Effect, Made, Now, Observation, Timings,
};
use steadfast_rotation_protocol::schedule::Schedule;
use steadfast_rotation_protocol::trust_domain::{
    AnchorRecord, AnchorState, IssuerRecord, TrustDomainState,
};

const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);
const DAY: Duration = Duration::from_secs(86_400);

fn anchor(name: &str, state: AnchorState) -> AnchorRecord {
    AnchorRecord {
        id: KeyId::of_spki(name.as_bytes()),
        der: Vec::new(),
        not_after: NOW + DAY * 700,
        state,
        taint: None,
        key_ref: String::new(),
        svid_life_max: DAY,
    }
}

/// Without a standby, so that a rotation begins at once.
fn lonely() -> TrustDomainState {
    let active = anchor("active", AnchorState::Active);
    let issuer = IssuerRecord {
        id: KeyId::of_spki(b"issuer"),
        anchor_id: active.id,
        der: Vec::new(),
        chain: Vec::new(),
        not_before: NOW,
        not_after: NOW + DAY * 30,
        key_ref: String::new(),
    };
    TrustDomainState::founded("cluster.local".parse().unwrap(), vec![active], issuer, NOW)
}

fn seen(state: TrustDomainState, revision: u64) -> Observation {
    Observation {
        round: None,
        state,
        revision,
        clock_offset_ms: None,
        made: None,
        signed: None,
        mirrors_current: true,
        undestroyed: Vec::new(),
        keyless: Vec::new(),
        listed: Vec::new(),
    }
}

#[test]
fn an_anchor_that_is_withdrawn_or_known_is_not_staged_though_it_was_made_for_this_number() {
    let timings = Timings {
        lease: Duration::from_secs(15),
        skew: Duration::from_secs(60),
        renew_window: Duration::from_secs(600),
        renew_window_urgent: Duration::from_secs(60),
        issuer_life: DAY * 30,
        issuer_left_min: DAY * 10,
        schedule: Schedule { anchor_period: DAY * 365, window: None },
    };
    let now = Now { wall: NOW, boot: Duration::from_secs(1000) };
    let mut controller = Controller::new(timings);
    let asked = controller.handle(now, &seen(lonely(), 1));
    let [Effect::Query(nonce)] = asked[..] else { panic!("{asked:?}") };
    let round = Some(Round { nonce, ..Round::default() });
    let begun = controller.handle(now, &Observation { round, ..seen(lonely(), 1) });
    let [Effect::Persist(persist)] = &begun[..] else { panic!("{begun:?}") };
    let state = persist.state.clone();
    let label = state.rotation.as_ref().unwrap().label();

    let mut withdrawn = state.clone();
    withdrawn.tombstones.push(KeyId::of_spki(b"before"));
    let mut known = state.clone();
    known.anchors.push(anchor("before", AnchorState::Retiring));
    let made = |name: &str| Some(Made { label, anchor: anchor(name, AnchorState::Generated) });
    for state in [withdrawn, known] {
        let again = Observation { made: made("before"), ..seen(state.clone(), 2) };
        let effects = controller.handle(now, &again);
        assert!(effects.contains(&Effect::Generate(label)), "another is made: {effects:?}");
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Persist(_))), "{effects:?}");
        let fresh = Observation { made: made("fresh"), ..seen(state, 2) };
        let effects = controller.handle(now, &fresh);
        assert!(matches!(effects[..], [Effect::Persist(_)]), "a fresh one is staged: {effects:?}");
    }
}
