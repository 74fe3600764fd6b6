//! What can happen to a renewal, one story each.

use std::time::Duration;

use steadfast_api::UnixTime;
use steadfast_rotation_protocol::Jitter;
use steadfast_rotation_protocol::renewal::{Alarm, Effect, Event, Failure, Readiness, RequestId};

use crate::world::{Ca, World, issuer};

const SEC: Duration = Duration::from_secs(1);
const MIN: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// How far apart consecutive requests were, in milliseconds.
fn gaps_millis(world: &World) -> Vec<u128> {
    world.request_times().windows(2).map(|pair| pair[1].since(pair[0]).as_millis()).collect()
}

#[test]
fn nothing_is_asked_for_before_the_start_and_one_svid_at_it() {
    let mut world = World::new(DAY, 1);
    world.bundle(1);
    world.run(HOUR);
    world.event(Event::Tick);
    assert_eq!(world.requests(), 0);
    assert_eq!(world.alarms(), Vec::<&Alarm>::new(), "nobody was asked to look at the clock");
    assert_eq!(world.readiness(), Some(Readiness::NoSvid));
    world.event(Event::Started);
    world.event(Event::Started);
    world.run(SEC);
    assert_eq!((world.requests(), world.installs()), (1, 1));
    assert_eq!(world.readiness(), Some(Readiness::Ready));
}

/// The certificate's own life is 306 s, since it begins 5 min before issue: 60 % of that is past
/// as soon as it is made. By the life from issue, 6 s make a renewal every 3.6 to 4.2 s.
#[test]
fn a_life_of_six_seconds_is_renewed_some_one_and_a_half_times() {
    let mut world = World::ready(6 * SEC, 0);
    world.run(60 * SEC);
    assert!(gaps_millis(&world).iter().all(|gap| (3600..=4210).contains(gap)));
    assert!((14..=17).contains(&world.requests()), "{} requests", world.requests());
    assert_eq!(world.installs(), world.requests());
    assert_eq!(world.alarms(), Vec::<&Alarm>::new());
}

#[test]
fn a_workload_whose_clock_is_minutes_off_renews_on_time_and_says_so() {
    for off_millis in [-420_000, 420_000] {
        let mut world = World::ready(100 * SEC, off_millis);
        world.run(1000 * SEC);
        assert!(gaps_millis(&world).iter().all(|gap| (60_000..=70_010).contains(gap)));
        let [Alarm::ClockOff { offset_millis }] = world.alarms()[..] else {
            panic!("{:?}", world.alarms());
        };
        assert!(offset_millis.abs_diff(off_millis) < 10, "{offset_millis}");
        let measured_millis = world.machine.clock_offset_millis().unwrap();
        assert!(measured_millis.abs_diff(off_millis) < 10, "{measured_millis}");
    }
}

#[test]
fn the_server_s_wish_is_honoured() {
    let mut world = World::ready(100 * SEC, 0);
    world.renew_at_percent = Some(40);
    world.run(400 * SEC);
    let gaps = gaps_millis(&world);
    assert!(gaps[1..].iter().all(|gap| (40_000..=40_010).contains(gap)), "{gaps:?}");
    assert!(gaps.len() > 5);
}

#[test]
fn retries_begin_within_a_second_and_grow_to_their_cap_with_jitter_inside() {
    let mut world = World::ready(DAY, 0);
    world.ca = Ca::Refuses;
    world.run(DAY - MIN);
    let gaps = &gaps_millis(&world)[1..];
    assert!((500..=1001).contains(&gaps[0]), "{gaps:?}");
    assert!((1000..=2001).contains(&gaps[1]), "{gaps:?}");
    assert!(gaps.iter().all(|&gap| gap <= 300_001), "{gaps:?}");
    let capped = &gaps[9..];
    assert!(capped.len() > 50 && capped.iter().all(|&gap| gap >= 150_000), "{capped:?}");
    let (least, most) = (capped.iter().min().unwrap(), capped.iter().max().unwrap());
    assert!(most - least > 75_000, "no jitter at the cap: {least} to {most}");
    assert_eq!(world.readiness(), Some(Readiness::Ready));
}

#[test]
fn an_hour_without_the_ca_costs_nothing_and_the_stream_s_return_renews_at_once() {
    for stream_comes_back in [false, true] {
        let mut world = World::ready(DAY, 0);
        world.ca = Ca::Refuses;
        world.run_to_renewal();
        let asked = world.requests();
        world.run(HOUR);
        let tries = world.requests() - asked;
        assert!((18..=40).contains(&tries), "{tries} tries in an hour");
        world.ca = Ca::Answers { after: Duration::from_millis(5) };
        let soon = if stream_comes_back {
            world.event(Event::StreamCameBack);
            SEC + SEC
        } else {
            5 * MIN + SEC
        };
        world.run(soon);
        assert_eq!(world.installs(), 2, "stream_comes_back: {stream_comes_back}");
        assert_eq!(world.readiness(), Some(Readiness::Ready));
    }
}

#[test]
fn a_stream_that_comes_back_renews_nothing_that_is_well() {
    let mut world = World::ready(DAY, 0);
    for _ in 0..100 {
        world.event(Event::StreamCameBack);
        world.run(SEC);
    }
    assert_eq!(world.requests(), 1);
}

#[test]
fn after_its_end_the_svid_stays_in_use_and_is_asked_for_every_two_seconds() {
    for life in [6 * SEC, HOUR, DAY] {
        let mut world = World::ready(life, 0);
        world.ca = Ca::Refuses;
        let not_after = world.machine.installed().unwrap().not_after;
        world.run(not_after.since(world.now));
        let asked = world.requests();
        assert_eq!(world.readiness(), Some(Readiness::Expired { not_after }));
        assert!(world.machine.installed().is_some());
        world.run(100 * SEC);
        assert!((50..=101).contains(&(world.requests() - asked)));
        let expired = world.alarms().into_iter().filter(|a| matches!(a, Alarm::Expired { .. }));
        assert_eq!(expired.count(), 1, "an expiry is told once");
        world.ca = Ca::Answers { after: Duration::from_millis(5) };
        world.run(3 * SEC);
        assert_eq!(world.readiness(), Some(Readiness::Ready));
    }
}

#[test]
fn a_hung_request_is_cancelled_and_the_next_attempt_goes_elsewhere() {
    let mut world = World::ready(HOUR, 0);
    world.ca = Ca::Hangs;
    world.run_to_renewal();
    let hung = world.asking().expect("a request is under way");
    world.run(10 * SEC);
    assert!(world.alarms().iter().any(|alarm| matches!(
        alarm,
        Alarm::RenewalFailed { attempt: 1, failure: Failure::TimedOut(after), .. } if *after == 10 * SEC
    )));
    world.ca = Ca::Answers { after: Duration::from_millis(5) };
    world.run(MIN);
    let second = RequestId(hung.0 + 1);
    let sent = world.effects.iter().any(
        |(_, effect)| matches!(effect, Effect::Request { id, attempt: 2, .. } if *id == second),
    );
    assert!(sent);
    assert_eq!(world.machine.installed().unwrap().id, second);
}

#[test]
fn a_slow_ca_is_given_longer_each_time() {
    let mut world = World::ready(6 * SEC, 0);
    world.ca = Ca::Answers { after: 7 * SEC };
    world.run(40 * SEC);
    let timeouts: Vec<u128> = world
        .effects
        .iter()
        .filter_map(|(_, effect)| match effect {
            Effect::Request { timeout, .. } => Some(timeout.as_millis()),
            _ => None,
        })
        .collect();
    assert_eq!(timeouts[1..5], [1200, 2400, 4800, 9600]);
    assert_eq!(world.installs(), 2);
}

#[test]
fn late_and_repeated_replies_change_nothing() {
    let mut world = World::ready(HOUR, 0);
    let first = world.machine.installed().unwrap();
    let again = world.issued(first.id, world.now);
    world.event(Event::Issued(again));
    assert_eq!(world.machine.installed(), Some(first));
    world.ca = Ca::Hangs;
    world.run_to_renewal();
    let hung = world.asking().expect("a request is under way");
    world.run(10 * SEC);
    world.effects.clear();
    let late = world.issued(hung, world.now);
    world.event(Event::Issued(late));
    assert_eq!(world.effects, [(world.now, Effect::Discard { id: hung })]);
    world.effects.clear();
    world.event(Event::Failed { id: hung, reason: "told late".to_owned() });
    world.event(Event::Failed { id: RequestId(999), reason: "never sent".to_owned() });
    assert_eq!(world.effects, []);
    assert_eq!(world.machine.installed(), Some(first));
}

#[test]
fn a_clock_set_back_renews_now_and_goes_on_by_the_true_life() {
    for back in [10 * MIN, HOUR, 7 * DAY] {
        let mut world = World::ready(HOUR, 0);
        world.run(10 * MIN);
        world.wall_off_millis -= back.as_millis() as i64;
        world.run(40 * SEC);
        assert_eq!(world.installs(), 2, "a clock that jumped {back:?} back");
        assert!(
            world
                .alarms()
                .iter()
                .any(|alarm| matches!(alarm, Alarm::ClockJumped { by_millis } if *by_millis < 0))
        );
        world.run(10 * HOUR);
        let gaps = &gaps_millis(&world)[1..];
        assert!(gaps.len() > 13 && gaps.iter().all(|gap| (2_160_000..=2_520_010).contains(gap)));
        assert_eq!(world.readiness(), Some(Readiness::Ready));
    }
}

/// The shell looks every 2 s at such a life; a step of less than that between two looks is not
/// seen as a jump, and it delays by no more than itself.
#[test]
fn a_clock_that_creeps_back_delays_by_what_it_creeps() {
    let mut world = World::ready(MIN, 0);
    world.run(10 * SEC);
    world.wall_off_millis -= 900;
    world.run(80 * SEC);
    assert!(gaps_millis(&world).iter().all(|gap| (36_000..=42_910).contains(gap)));
}

#[test]
fn a_clock_set_forward_renews_soon_and_is_put_right_by_the_answer() {
    let mut world = World::ready(HOUR, 0);
    world.run(10 * MIN);
    world.wall_off_millis += 30 * DAY.as_millis() as i64;
    world.run(40 * SEC);
    assert_eq!(world.installs(), 2);
    assert_eq!(world.readiness(), Some(Readiness::Ready));
    world.run(10 * HOUR);
    let gaps = &gaps_millis(&world)[1..];
    assert!(gaps.len() > 13 && gaps.iter().all(|gap| (2_160_000..=2_520_010).contains(gap)));
}

#[test]
fn a_week_of_suspension_renews_on_waking() {
    let mut world = World::ready(DAY, 0);
    world.run(HOUR);
    world.suspend(7 * DAY);
    world.event(Event::Tick);
    assert!(matches!(world.readiness(), Some(Readiness::Expired { .. })));
    assert!(world.asking().is_some(), "asked for at once");
    world.run(SEC);
    assert_eq!(world.readiness(), Some(Readiness::Ready));
    world.invariant_the_log_replays();
}

#[test]
fn a_suspension_in_the_middle_of_a_request_is_a_request_that_failed() {
    let mut world = World::ready(DAY, 0);
    world.ca = Ca::Hangs;
    world.run_to_renewal();
    world.suspend(7 * DAY);
    world.ca = Ca::Answers { after: Duration::from_millis(5) };
    world.run(3 * SEC);
    assert_eq!(world.readiness(), Some(Readiness::Ready));
}

/// The answer was written before the machine slept: it says nothing about the server's clock now,
/// and an order of the server is followed when the order says.
#[test]
fn a_first_answer_that_was_slept_through_does_not_set_the_clock() {
    let mut world = World::new(HOUR, 7);
    world.bundle(1);
    world.event(Event::Started);
    world.suspend(5 * MIN);
    world.run(SEC);
    assert_eq!(world.machine.clock_offset_millis(), None);
    world.event(Event::PulledForward {
        id: 1,
        from: world.now,
        window: Duration::ZERO,
        share: Jitter::NONE,
    });
    assert!(world.asking().is_some());
}

/// A stream's message that lay in a buffer through a suspension must not bring back the time at
/// which it was written.
#[test]
fn an_old_message_does_not_hide_an_expiry() {
    let mut world = World::ready(DAY, 0);
    let written = world.now;
    world.ca = Ca::Refuses;
    world.suspend(7 * DAY);
    world.event(Event::ServerTime(written));
    assert!(matches!(world.readiness(), Some(Readiness::Expired { .. })));
}

#[test]
fn the_server_s_time_on_the_stream_shows_that_the_clock_is_behind() {
    let mut world = World::ready(HOUR, 0);
    world.run(10 * MIN);
    world.event(Event::ServerTime(world.now + 33 * MIN));
    assert!(world.asking().is_some(), "70 % of the life are over by the server's clock");
}

#[test]
fn a_renewal_is_pulled_forward_once_per_order_to_its_place_in_the_window() {
    let mut world = World::ready(DAY, 0);
    world.run(HOUR);
    let from = world.now + MIN;
    let share = Jitter::from_bits(1 << 31);
    let order = Event::PulledForward { id: 9, from, window: 10 * MIN, share };
    world.event(order.clone());
    world.run(5 * MIN);
    assert_eq!(world.requests(), 1, "before its place");
    world.event(order.clone());
    world.run(MIN + SEC);
    assert_eq!(world.requests(), 2);
    let place = world.request_times()[1].since(from);
    assert!(place.abs_diff(5 * MIN) <= SEC / 100, "{place:?}");
    world.event(order);
    world.run(HOUR);
    assert_eq!(world.requests(), 2, "the same order again");
    world.event(Event::PulledForward { id: 10, from: world.now, window: SEC, share });
    world.run(SEC);
    assert_eq!(world.requests(), 3, "another order");
}

#[test]
fn an_order_that_comes_while_a_request_is_under_way_is_followed_after_it() {
    let mut world = World::ready(HOUR, 0);
    world.run(10 * MIN);
    world.ca = Ca::Answers { after: 2 * SEC };
    world.event(Event::PulledForward { id: 1, from: world.now, window: SEC, share: Jitter::NONE });
    assert!(world.asking().is_some());
    world.run(SEC);
    world.event(Event::PulledForward { id: 2, from: world.now, window: SEC, share: Jitter::NONE });
    world.run(10 * SEC);
    assert_eq!(world.installs(), 3, "what was under way may still be of the old issuer");
    world.run(10 * MIN);
    assert_eq!(world.installs(), 3);
}

/// Ids begin anew with each replica and each restart of one: the window tells orders apart.
#[test]
fn an_order_of_another_replica_is_followed_though_its_id_was_heard_before() {
    let mut world = World::ready(DAY, 0);
    world.run(HOUR);
    for installs in [2, 3] {
        let from = world.now;
        let order = Event::PulledForward { id: 1, from, window: SEC, share: Jitter::NONE };
        world.event(order.clone());
        world.run(HOUR);
        assert_eq!(world.installs(), installs);
        world.event(order);
        world.run(HOUR);
        assert_eq!(world.installs(), installs, "told again");
    }
}

#[test]
fn an_order_from_before_the_svid_was_issued_is_followed_already() {
    let mut world = World::ready(DAY, 0);
    world.run(HOUR);
    let from = world.now - 2 * HOUR;
    world.event(Event::PulledForward { id: 5, from, window: MIN, share: Jitter::NONE });
    world.run(HOUR);
    assert_eq!(world.requests(), 1);
}

/// The stream of a newcomer tells the order before the first SVID is there.
#[test]
fn a_newcomer_that_is_told_an_old_order_asks_once() {
    for under_way in [false, true] {
        let mut world = World::new(DAY, 7);
        world.bundle(1);
        let from = world.now - HOUR;
        let order = Event::PulledForward { id: 5, from, window: MIN, share: Jitter::NONE };
        world.ca = Ca::Answers { after: SEC };
        if under_way {
            world.event(Event::Started);
            assert!(world.asking().is_some());
            world.event(order);
        } else {
            world.event(order);
            world.event(Event::Started);
        }
        world.run(HOUR);
        assert_eq!((world.requests(), world.installs()), (1, 1), "under way: {under_way}");
    }
}

#[test]
fn a_renewal_before_the_window_does_not_stand_for_the_one_in_it() {
    let mut world = World::ready(HOUR, 0);
    let from = world.now + 45 * MIN;
    let order = Event::PulledForward { id: 1, from, window: MIN, share: Jitter::NONE };
    world.event(order);
    world.run(44 * MIN);
    assert_eq!(world.installs(), 2, "the schedule's own");
    world.run(2 * MIN);
    assert_eq!(world.installs(), 3, "the order's");
    world.run(20 * MIN);
    assert_eq!(world.installs(), 3);
}

#[test]
fn an_svid_is_used_only_once_its_bundle_is_installed() {
    let mut world = World::ready(HOUR, 0);
    let first = world.machine.installed().unwrap();
    world.ca_seq = 3;
    world.run(HOUR * 7 / 10 + SEC);
    assert_eq!(world.machine.installed(), Some(first), "the one before stays in use");
    assert!(
        world.alarms().contains(&&Alarm::BundleBehind { needed_seq: 3, installed_seq: Some(1) })
    );
    world.bundle(2);
    assert_eq!(world.machine.installed(), Some(first));
    world.bundle(3);
    assert_eq!(world.machine.installed().unwrap().id, RequestId(2));
    // An older bundle that is told late takes nothing back.
    world.event(Event::BundleInstalled { seq: 2, denied: Vec::new() });
    world.run_to_renewal();
    world.run(SEC);
    assert_eq!(world.machine.installed().unwrap().id, RequestId(3));
}

#[test]
fn the_first_svid_waits_for_the_first_bundle() {
    let mut world = World::new(HOUR, 1);
    world.event(Event::Started);
    world.run(SEC);
    assert_eq!((world.installs(), world.readiness()), (0, Some(Readiness::NoBundle)));
    world.bundle(1);
    assert_eq!((world.installs(), world.readiness()), (1, Some(Readiness::Ready)));
}

#[test]
fn an_svid_that_waited_past_its_end_is_not_installed() {
    let mut world = World::ready(MIN, 0);
    world.ca_seq = 2;
    world.run_to_renewal();
    world.run(SEC);
    world.ca = Ca::Refuses;
    world.run(2 * MIN);
    let before = world.machine.installed();
    world.bundle(2);
    assert_eq!(world.machine.installed(), before);
    world.ca = Ca::Answers { after: Duration::from_millis(5) };
    world.run(3 * SEC);
    assert_eq!(world.readiness(), Some(Readiness::Ready));
}

#[test]
fn an_ack_makes_replies_to_earlier_requests_worthless_and_asks_again() {
    let mut world = World::ready(HOUR, 0);
    world.ca = Ca::Answers { after: 3 * SEC };
    world.event(Event::PulledForward { id: 1, from: world.now, window: SEC, share: Jitter::NONE });
    world.run(SEC);
    let before = world.asking().unwrap();
    world.event(Event::AckSent);
    let after = world.asking().unwrap();
    assert!(after > before);
    world.run(10 * SEC);
    assert_eq!(world.machine.installed().unwrap().id, after);
    assert_eq!(world.alarms(), Vec::<&Alarm>::new(), "an ack is no failure");
}

#[test]
fn an_ack_makes_a_held_svid_worthless_and_asks_again() {
    let mut world = World::ready(HOUR, 0);
    world.ca_seq = 2;
    world.run(HOUR * 7 / 10 + SEC);
    let held = RequestId(2);
    world.event(Event::AckSent);
    assert!(world.effects.iter().any(|(_, e)| *e == Effect::Discard { id: held }));
    world.run(SEC);
    world.bundle(2);
    assert_eq!(world.machine.installed().unwrap().id, RequestId(3));
}

#[test]
fn acks_without_end_make_no_storm() {
    let mut world = World::ready(HOUR, 0);
    world.ca = Ca::Hangs;
    world.run_to_renewal();
    let asked = world.requests();
    for _ in 0..1000 {
        world.event(Event::AckSent);
        world.run(Duration::from_millis(10));
    }
    assert!(world.requests() - asked <= 21, "{}", world.requests() - asked);
}

#[test]
fn a_denied_issuer_makes_its_svid_renew_now() {
    let (old, new) = (issuer(0), issuer(1));
    for tainted in [false, true] {
        let mut world = World::ready(HOUR, 0);
        world.run(MIN);
        world.issuer = new;
        if tainted {
            world.taint(old)
        } else {
            world.deny(old)
        }
        assert!(world.asking().is_some(), "tainted: {tainted}");
        world.run(SEC);
        assert_eq!(world.machine.installed().unwrap().issuer, new);
        world.run(10 * MIN);
        assert_eq!(world.installs(), 2);
    }
}

#[test]
fn an_svid_of_a_denied_issuer_is_never_installed_and_the_old_one_stays() {
    let mut world = World::ready(HOUR, 0);
    world.issuer = issuer(1);
    world.deny(issuer(1));
    world.run(HOUR * 7 / 10 + MIN);
    assert_eq!(world.installs(), 1);
    assert!(world.requests() > 2);
    assert!(world.alarms().iter().any(|alarm| matches!(
        alarm,
        Alarm::RenewalFailed { failure: Failure::IssuerDenied(id), .. } if *id == issuer(1)
    )));
}

#[test]
fn a_held_svid_whose_issuer_is_denied_meanwhile_is_dropped() {
    let mut world = World::ready(HOUR, 0);
    (world.ca_seq, world.issuer) = (2, issuer(1));
    world.run(HOUR * 7 / 10 + SEC);
    world.issuer = issuer(2);
    world.deny(issuer(1));
    world.run(SEC);
    world.bundle(2);
    assert_eq!(world.machine.installed().unwrap().issuer, issuer(2));
}

#[test]
fn an_svid_that_the_shell_cannot_use_leaves_the_one_before_and_is_a_failed_try() {
    let mut world = World::ready(HOUR, 0);
    let first = world.machine.installed();
    world.installs_fail = true;
    world.run_to_renewal();
    world.run(10 * MIN);
    assert_eq!(world.machine.installed(), first);
    let attempts: Vec<u32> = world
        .alarms()
        .iter()
        .filter_map(|alarm| match alarm {
            Alarm::RenewalFailed { attempt, failure: Failure::Request(_), .. } => Some(*attempt),
            _ => None,
        })
        .collect();
    assert_eq!(attempts[..4], [1, 2, 3, 4]);
    assert!(attempts.len() < 20, "backs off: {attempts:?}");
    assert_eq!(world.readiness(), Some(Readiness::Ready));
    world.installs_fail = false;
    world.run(3 * MIN);
    assert_ne!(world.machine.installed(), first);
}

#[test]
fn a_first_svid_that_the_shell_cannot_use_is_asked_for_again_every_two_seconds() {
    let mut world = World::new(DAY, 7);
    world.installs_fail = true;
    world.bundle(1);
    world.event(Event::Started);
    world.run(MIN);
    assert_eq!(world.readiness(), Some(Readiness::NoSvid));
    assert!((30..=62).contains(&world.requests()), "{}", world.requests());
    world.installs_fail = false;
    world.run(3 * SEC);
    assert_eq!(world.readiness(), Some(Readiness::Ready));
}

#[test]
fn a_held_svid_that_the_shell_cannot_use_in_the_end_is_a_failed_try() {
    let mut world = World::ready(HOUR, 0);
    let first = world.machine.installed();
    world.ca_seq = 2;
    world.run(HOUR * 7 / 10 + SEC);
    world.installs_fail = true;
    world.bundle(2);
    assert_eq!(world.machine.installed(), first);
    world.installs_fail = false;
    world.run(2 * SEC);
    assert_ne!(world.machine.installed(), first);
}

#[test]
fn a_reply_without_life_is_a_failure() {
    let mut world = World::ready(HOUR, 0);
    world.life = Duration::ZERO;
    world.run(HOUR * 7 / 10 + SEC);
    assert_eq!(world.installs(), 1);
    assert!(world.alarms().iter().any(|alarm| matches!(
        alarm,
        Alarm::RenewalFailed { failure: Failure::NoLife { .. }, .. }
    )));
}

#[test]
fn a_reply_that_ended_before_it_was_sent_is_a_failure() {
    let mut world = World::ready(HOUR, 0);
    world.ca = Ca::Hangs;
    world.run_to_renewal();
    let id = world.asking().unwrap();
    let mut issued = world.issued(id, world.now - 2 * HOUR);
    issued.server_time = world.now;
    world.event(Event::Issued(issued));
    assert_eq!(world.installs(), 1);
    assert!(world.alarms().iter().any(|alarm| matches!(
        alarm,
        Alarm::RenewalFailed { failure: Failure::NoLife { .. }, .. }
    )));
}

#[test]
fn extreme_times_never_panic() {
    for extreme in [0, 1, u64::MAX / 2, i64::MAX as u64, u64::MAX - 1, u64::MAX] {
        let extreme = UnixTime::from_millis(extreme);
        let mut world = World::ready(HOUR, 0);
        world.event(Event::ServerTime(extreme));
        world.event(Event::PulledForward {
            id: 1,
            from: extreme,
            window: Duration::MAX,
            share: Jitter::MAX,
        });
        world.ca = Ca::Hangs;
        world.run(HOUR);
        let mut machine = world.machine.clone();
        for now in [extreme, UnixTime::default(), extreme] {
            machine.handle(now, Jitter::MAX, Event::Tick);
            if let Some(id) = world.asking() {
                let mut issued = world.issued(id, extreme);
                issued.renew_at = Some(extreme);
                machine.handle(now, Jitter::NONE, Event::Issued(issued));
            }
            let _ = (machine.next_wakeup(), machine.next_renewal());
        }
    }
}

#[test]
fn idling_is_looking_at_the_clock_all_the_while() {
    for wall_off_millis in [0, -400_000, 400_000] {
        let world = World::ready(DAY, wall_off_millis);
        let (mut ticked, mut idled) = (world.machine.clone(), world.machine.clone());
        let end = ticked.next_renewal().unwrap() - SEC;
        let mut ticks = 0;
        while let Some(at) = ticked.next_wakeup().filter(|at| *at <= end) {
            assert_eq!(ticked.handle(at, Jitter::MAX, Event::Tick), []);
            ticks += 1;
        }
        assert!(ticks > 1000, "{ticks}");
        assert_eq!(ticked.handle(end, Jitter::MAX, Event::Tick), []);
        idled.idle(end);
        assert_eq!(format!("{ticked:?}"), format!("{idled:?}"));
    }
}
