//! Any sequence of what can happen keeps the invariants, and once the world is well again the
//! workload is ready and renews as often as its schedule says.

use std::time::Duration;

use proptest::prelude::*;
use steadfast_rotation_protocol::Jitter;
use steadfast_rotation_protocol::renewal::{Event, Readiness, RequestId};

use crate::world::{Ca, World, issuer};

#[derive(Clone, Debug)]
enum Action {
    Ack,
    AllowAll,
    Bundle,
    Ca(Ca),
    CaSeq,
    Deny(u8),
    InstallsFail(bool),
    Issuer(u8),
    Life(Duration),
    OldReply(u64),
    Pass(Duration),
    Pull { id: u64, from_millis: u64, window: Duration, share: Jitter },
    ServerTime { behind: Duration },
    Step { millis: i64 },
    StrayFailure(u64),
    StreamBack,
    Suspend(Duration),
    Taint(u8),
    Tick,
}

fn action() -> impl Strategy<Value = Action> {
    let millis = |range: std::ops::Range<u64>| range.prop_map(Duration::from_millis);
    let week = 7 * 86_400_000;
    prop_oneof![
        2 => Just(Action::Ack),
        1 => Just(Action::AllowAll),
        2 => Just(Action::Bundle),
        2 => ca().prop_map(Action::Ca),
        1 => Just(Action::CaSeq),
        1 => (0..3_u8).prop_map(Action::Deny),
        1 => any::<bool>().prop_map(Action::InstallsFail),
        1 => (0..3_u8).prop_map(Action::Issuer),
        1 => life().prop_map(Action::Life),
        1 => (0..20_u64).prop_map(Action::OldReply),
        6 => millis(0..20_000).prop_map(Action::Pass),
        3 => millis(0..1_800_000).prop_map(Action::Pass),
        2 => (0..20_u64, 0..600_000_u64, millis(0..600_000), any::<u32>()).prop_map(
            |(id, from_millis, window, share)| {
                Action::Pull { id, from_millis, window, share: Jitter::from_bits(share) }
            }
        ),
        1 => millis(0..week).prop_map(|behind| Action::ServerTime { behind }),
        1 => (-3_600_000..3_600_000_i64).prop_map(|millis| Action::Step { millis }),
        1 => (-(week as i64)..week as i64).prop_map(|millis| Action::Step { millis }),
        1 => (0..20_u64).prop_map(Action::StrayFailure),
        1 => Just(Action::StreamBack),
        1 => millis(0..week).prop_map(Action::Suspend),
        1 => (0..3_u8).prop_map(Action::Taint),
        2 => Just(Action::Tick),
    ]
}

fn ca() -> impl Strategy<Value = Ca> {
    prop_oneof![
        (0..15_000_u64).prop_map(|ms| Ca::Answers { after: Duration::from_millis(ms) }),
        Just(Ca::Hangs),
        Just(Ca::Refuses),
    ]
}

fn life() -> impl Strategy<Value = Duration> {
    prop_oneof![Just(6), Just(60), Just(3600), Just(86_400), 2..200_000_u64]
        .prop_map(Duration::from_secs)
}

fn act(world: &mut World, action: Action) {
    match action {
        Action::Ack => world.event(Event::AckSent),
        Action::AllowAll => world.allow_all(),
        Action::Bundle => world.bundle(world.ca_seq),
        Action::Ca(ca) => world.ca = ca,
        Action::CaSeq => world.ca_seq += 1,
        Action::Deny(number) => world.deny(issuer(number)),
        Action::InstallsFail(fail) => world.installs_fail = fail,
        Action::Issuer(number) => world.issuer = issuer(number),
        Action::Life(life) => world.life = life,
        Action::OldReply(id) => {
            // Not the one that is under way: that one comes by itself.
            if world.asking() != Some(RequestId(id)) {
                let old = world.issued(RequestId(id), world.now);
                world.event(Event::Issued(old));
            }
        }
        Action::Pass(duration) => world.run(duration),
        Action::Pull { id, from_millis, window, share } => {
            let from = world.now + Duration::from_millis(from_millis);
            world.event(Event::PulledForward { id, from, window, share });
        }
        Action::ServerTime { behind } => world.event(Event::ServerTime(world.now - behind)),
        Action::Step { millis } => world.wall_off_millis += millis,
        Action::StrayFailure(id) => {
            if world.asking() != Some(RequestId(id)) {
                let reason = "told late".to_owned();
                world.event(Event::Failed { id: RequestId(id), reason });
            }
        }
        Action::StreamBack => world.event(Event::StreamCameBack),
        Action::Suspend(duration) => world.suspend(duration),
        Action::Taint(number) => world.taint(issuer(number)),
        Action::Tick => world.event(Event::Tick),
    }
}

/// Every cause of trouble ends.
fn heal(world: &mut World) {
    world.ca = Ca::Answers { after: Duration::from_millis(5) };
    world.installs_fail = false;
    world.allow_all();
    world.bundle(world.ca_seq);
    // A retry comes within its cap, an order within its window, a clock that jumped is noticed.
    world.run(Duration::from_secs(1500));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() })]

    #[test]
    fn whatever_happens_the_invariants_hold_and_the_workload_recovers(
        seed: u64,
        life in life(),
        actions in prop::collection::vec(action(), 0..60),
    ) {
        let mut world = World::new(life, seed);
        world.event(Event::Started);
        for action in actions {
            act(&mut world, action);
        }
        world.life = Duration::from_secs(100);
        heal(&mut world);
        // Whatever long life is still scheduled is renewed into the short one. Every message of the
        // stream tells the time: a sleep that a step of the clock hid from the machine shows here.
        let at = world.now;
        world.event(Event::ServerTime(at));
        world.event(Event::PulledForward {
            id: 1000, from: at, window: Duration::ZERO, share: Jitter::NONE,
        });
        world.run(Duration::from_secs(100));
        prop_assert_eq!(world.readiness(), Some(Readiness::Ready));
        let before = world.requests();
        world.run(Duration::from_secs(1000));
        let renewals = world.requests() - before;
        prop_assert!((1000 / 71 - 1..=1000 / 60 + 1).contains(&renewals), "{renewals} renewals");
        prop_assert_eq!(world.readiness(), Some(Readiness::Ready));
        world.invariant_the_log_replays();
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..Default::default() })]

    #[test]
    fn an_svid_renews_as_often_as_its_schedule_says(
        seed: u64,
        life_millis in 6_000..86_400_000_u64,
        wall_off_millis in -600_000..600_000_i64,
        latency_permille in 0..20_u32,
    ) {
        const LIVES: u32 = 20;
        let life = Duration::from_millis(life_millis);
        let mut world = World::new(life, seed);
        world.wall_off_millis = wall_off_millis;
        let after = (life * latency_permille / 1000).min(Duration::from_millis(900));
        world.ca = Ca::Answers { after };
        world.bundle(1);
        world.event(Event::Started);
        world.run(life * LIVES);
        let renewals = world.requests() as f64 - 1.0;
        let span = f64::from(LIVES) * life.as_secs_f64();
        let rarest = span / (0.7 * life.as_secs_f64() + 2.0 * after.as_secs_f64());
        let most_often = span / (0.6 * life.as_secs_f64());
        prop_assert!(renewals >= rarest - 1.0, "{renewals} renewals, not {rarest}");
        prop_assert!(renewals <= most_often + 1.0, "{renewals} renewals, not {most_often}");
        let under_way = usize::from(world.asking().is_some());
        prop_assert_eq!(world.installs() + under_way, world.requests());
    }
}
