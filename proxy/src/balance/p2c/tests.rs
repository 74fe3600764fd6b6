//! What balancing promises, over random sets, events and draws.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::discovery::{Labels, ProtocolHint};

fn endpoint(port: u16, weight: u32) -> Arc<Endpoint> {
    Arc::new(Endpoint {
        addr: ([127, 0, 0, 1], port).into(),
        weight,
        identity: None,
        inbound_port: None,
        protocol: ProtocolHint::Unknown,
        authority_override: None,
        labels: Arc::new(Labels::new()),
    })
}

fn core(endpoints: &[(u16, u32)]) -> Core {
    let mut core = Core::default();
    let endpoints: Vec<_> =
        endpoints.iter().map(|&(port, weight)| endpoint(port, weight)).collect();
    core.update(&endpoints);
    core
}

/// A sequence of draws that looks random and never differs (splitmix64).
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn pair(&mut self) -> [u64; 2] {
        [self.next(), self.next()]
    }
}

fn at(secs: f64) -> Duration {
    Duration::from_secs_f64(secs)
}

fn pick(core: &Core, now: Duration, draws: &mut Draws) -> (SlotId, u16) {
    let (slot, endpoint) = core.pick(now, draws.pair()).expect("there is an endpoint");
    (slot, endpoint.addr.port())
}

/// How many endpoints are not passed over.
fn ready(core: &Core, now: Duration) -> usize {
    core.slots.iter().filter(|slot| now >= slot.penalty.until).count()
}

#[test]
fn none_is_picked_of_none_or_of_those_without_weight() {
    assert!(core(&[]).pick(Duration::ZERO, [0, 0]).is_none());
    assert!(core(&[(1, 0), (2, 0)]).pick(Duration::ZERO, [u64::MAX; 2]).is_none());
    let mut draws = Draws(1);
    for _ in 0..100 {
        assert_eq!(pick(&core(&[(1, 0), (2, 5), (3, 0)]), Duration::ZERO, &mut draws).1, 2);
    }
}

fn assert_shares(counts: &[u32], weights: &[u32]) {
    let (requests, total): (u32, u32) = (counts.iter().sum(), weights.iter().sum());
    for (count, weight) in counts.iter().zip(weights) {
        let fair = f64::from(requests) * f64::from(*weight) / f64::from(total);
        let off = (f64::from(*count) - fair).abs();
        assert!(off <= fair * 0.1 + 20.0, "{weights:?}: {counts:?}");
    }
}

#[test]
fn requests_one_after_the_other_share_by_the_weights() {
    for weights in [vec![1, 9], vec![1, 1, 1, 1], vec![10, 20, 70], vec![1, 2, 3, 4]] {
        let endpoints: Vec<_> = weights.iter().zip(1..).map(|(&w, port)| (port, w)).collect();
        let mut core = core(&endpoints);
        let (mut draws, mut counts) = (Draws(7), vec![0; weights.len()]);
        for n in 0..10_000 {
            let (slot, port) = pick(&core, at(f64::from(n) * 0.1), &mut draws);
            core.started(slot);
            core.responded(slot, at(f64::from(n) * 0.1), at(0.010));
            core.finished(slot);
            counts[usize::from(port - 1)] += 1;
        }
        assert_shares(&counts, &weights);
    }
}

#[test]
fn a_newcomer_gets_its_share_at_once() {
    let mut core = core(&[(1, 1)]);
    core.responded(core.slots[0].id, at(1.0), at(0.001));
    core.update(&[endpoint(1, 1), endpoint(2, 1)]);
    let (mut draws, mut counts) = (Draws(17), [0; 2]);
    for _ in 0..1000 {
        counts[usize::from(pick(&core, at(1.0), &mut draws).1 - 1)] += 1;
    }
    assert_shares(&counts, &[1, 1]);
}

#[test]
fn pending_requests_share_by_their_weights() {
    for weights in [[1, 1, 1, 1], [1, 2, 3, 4], [1, 1, 1, 97]] {
        let endpoints: Vec<_> = weights.iter().zip(1..).map(|(&w, port)| (port, w)).collect();
        let mut core = core(&endpoints);
        let (mut draws, mut counts) = (Draws(3), [0_u32; 4]);
        for _ in 0..10_000 {
            let (slot, port) = pick(&core, Duration::ZERO, &mut draws);
            core.started(slot);
            counts[usize::from(port - 1)] += 1;
        }
        assert_shares(&counts, &weights);
    }
}

#[test]
fn of_two_the_less_loaded_is_picked() {
    let mut core = core(&[(1, 1), (2, 1)]);
    let mut draws = Draws(5);
    let (busy, busy_port) = pick(&core, Duration::ZERO, &mut draws);
    core.started(busy);
    for _ in 0..100 {
        assert_ne!(pick(&core, Duration::ZERO, &mut draws).1, busy_port);
    }
    core.finished(busy);
    let again: BTreeSet<_> = (0..100).map(|_| pick(&core, Duration::ZERO, &mut draws).1).collect();
    assert_eq!(again.len(), 2);
}

#[test]
fn one_slow_answer_is_felt_at_once_and_forgotten_in_time() {
    let mut core = core(&[(1, 1), (2, 1)]);
    let mut draws = Draws(11);
    let ids: Vec<_> = core.slots.iter().map(|slot| slot.id).collect();
    core.responded(ids[0], at(1.0), at(0.010));
    core.responded(ids[1], at(1.0), at(0.010));
    core.responded(ids[0], at(1.0), at(1.0));
    assert!((0..100).all(|_| pick(&core, at(1.0), &mut draws).1 == 2));
    // The other goes on answering in 10 ms; that alone must not starve this one for ever.
    let mut now = 1.0;
    let found = (0..1000).find(|_| {
        now += 0.1;
        let (slot, port) = pick(&core, at(now), &mut draws);
        core.responded(slot, at(now), at(0.010));
        port == 1
    });
    assert!(found.is_some_and(|tries| tries > 10), "{found:?}");
}

#[test]
fn who_refuses_is_passed_over_longer_each_time_and_then_tried_again() {
    let mut core = core(&[(1, 1), (2, 1)]);
    let mut draws = Draws(13);
    let id = core.slots[0].id;
    let mut last = Duration::ZERO;
    let mut now = at(1.0);
    for refusals in 1..20 {
        core.refused(id, now, u64::MAX);
        let until = core.slots[0].penalty.until;
        assert!(until - now >= last && until - now <= PENALTY_MAX, "{refusals}");
        assert!((0..50).all(|_| pick(&core, now, &mut draws).1 == 2));
        (last, now) = (until - now, until);
        let ports: BTreeSet<_> = (0..50).map(|_| pick(&core, now, &mut draws).1).collect();
        assert_eq!(ports.len(), 2, "its time is over");
    }
    assert_eq!(last, PENALTY_MAX);
    core.connected(id);
    core.refused(id, now, 0);
    assert_eq!(core.slots[0].penalty.until - now, PENALTY_MIN / 2);
}

#[test]
fn one_failed_attempt_is_one_refusal_however_many_requests_shared_it() {
    let mut core = core(&[(1, 1), (2, 1)]);
    let id = core.slots[0].id;
    for _ in 0..50 {
        core.refused(id, at(1.0), u64::MAX);
    }
    assert_eq!(core.slots[0].penalty.until, at(1.0) + PENALTY_MIN);
}

#[test]
fn when_all_refuse_one_is_tried_all_the_same() {
    let mut core = core(&[(1, 1), (2, 1)]);
    let (first, second) = (core.slots[0].id, core.slots[1].id);
    core.refused(first, at(1.0), u64::MAX);
    core.refused(second, at(1.0), 0);
    assert_eq!(ready(&core, at(1.0)), 0);
    assert!((0..50).all(|n| pick(&core, at(1.0), &mut Draws(n)).1 == 2), "it is back first");
}

#[test]
fn an_update_keeps_the_load_of_who_stays_and_of_nobody_else() {
    let mut core = core(&[(1, 1), (2, 1)]);
    let (first, second) = (core.slots[0].id, core.slots[1].id);
    core.started(first);
    core.started(first);
    core.refused(first, at(1.0), 0);
    core.started(second);
    core.update(&[endpoint(1, 9), endpoint(3, 1)]);
    assert_eq!(core.slots[0].id, first);
    assert_eq!((core.slots[0].load.pending, core.slots[0].endpoint.weight), (2, 9));
    assert_eq!(ready(&core, at(1.0)), 1);
    // What ends at one that has left touches nobody, also not its successor at the address.
    core.update(&[endpoint(2, 1)]);
    core.finished(first);
    core.finished(second);
    core.responded(second, at(2.0), at(9.0));
    core.refused(second, at(2.0), 0);
    assert_eq!((core.slots[0].load.pending, ready(&core, at(2.0))), (0, 1));
    assert!(core.slots[0].load.latency.is_none());
}

#[test]
fn another_workload_at_the_same_address_starts_afresh() {
    let named = |name: &str| {
        let identity: steadfast_api::DnsIdentity =
            format!("{name}.demo.serviceaccount.identity.steadfast.cluster.local").parse().unwrap();
        let expected =
            crate::discovery::Expected { id: identity.spiffe_id(), server_name: identity };
        Arc::new(Endpoint { identity: Some(expected), ..(*endpoint(1, 1)).clone() })
    };
    let mut core = Core::default();
    core.update(&[named("old")]);
    core.refused(core.slots[0].id, at(1.0), u64::MAX);
    core.update(&[named("new")]);
    assert_eq!(ready(&core, at(1.0)), 1);
}

#[derive(Clone, Debug)]
enum Action {
    Advance(u64),
    Finish(usize),
    Pick([u64; 2]),
    Refuse(usize, u64),
    Respond(usize, u64),
    Update(Vec<(u16, u32)>),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let set = proptest::collection::btree_map(
        1_u16..6,
        prop_oneof![Just(0), 1..20_u32, Just(u32::MAX)],
        0..6,
    );
    proptest::collection::vec(
        prop_oneof![
            (0..5_000_u64).prop_map(Action::Advance),
            (0..8_usize).prop_map(Action::Finish),
            any::<[u64; 2]>().prop_map(Action::Pick),
            (0..8_usize, any::<u64>()).prop_map(|(n, random)| Action::Refuse(n, random)),
            (0..8_usize, 0..5_000_u64).prop_map(|(n, millis)| Action::Respond(n, millis)),
            set.prop_map(|set| Action::Update(set.into_iter().collect())),
        ],
        1..60,
    )
}

proptest! {
    #[test]
    fn only_a_present_endpoint_with_weight_is_picked_and_a_ready_one_if_there_is_any(
        actions in actions()
    ) {
        let (mut core, mut now, mut open) = (Core::default(), Duration::ZERO, Vec::new());
        let mut present: Vec<(u16, u32)> = Vec::new();
        for action in actions {
            match action {
                Action::Advance(millis) => now += Duration::from_millis(millis),
                Action::Finish(n) if n < open.len() => core.finished(open.swap_remove(n)),
                Action::Refuse(n, random) if n < open.len() => core.refused(open[n], now, random),
                Action::Respond(n, millis) if n < open.len() => {
                    core.responded(open[n], now, Duration::from_millis(millis));
                }
                Action::Finish(_) | Action::Refuse(..) | Action::Respond(..) => {}
                Action::Update(set) => {
                    let endpoints: Vec<_> = set.iter().map(|&(p, w)| endpoint(p, w)).collect();
                    core.update(&endpoints);
                    present = set;
                }
                Action::Pick(random) => {
                    let Some((slot, picked)) = core.pick(now, random) else {
                        prop_assert!(present.iter().all(|&(_, weight)| weight == 0));
                        continue;
                    };
                    let port = picked.addr.port();
                    prop_assert!(present.iter().any(|&(p, weight)| p == port && weight > 0));
                    let ready = |slot: &Slot| now >= slot.penalty.until && slot.endpoint.weight > 0;
                    if core.slots.iter().any(ready) {
                        prop_assert!(core.slots.iter().any(|s| s.id == slot && ready(s)));
                    }
                    core.started(slot);
                    open.push(slot);
                }
            }
            let pending: u32 = core.slots.iter().map(|slot| slot.load.pending).sum();
            let live = open.iter().filter(|slot| core.places.contains_key(slot)).count();
            prop_assert_eq!(pending as usize, live);
        }
    }

    #[test]
    fn a_draw_covers_every_share_exactly(weights in proptest::collection::vec(0..50_u32, 1..8)) {
        let endpoints: Vec<_> = weights.iter().zip(1..).map(|(&w, port)| (port, w)).collect();
        let core = core(&endpoints);
        let total: u64 = weights.iter().map(|&w| u64::from(w)).sum();
        let mut hits = vec![0; weights.len()];
        for number in 0..total {
            hits[core.at_weight(number)] += 1;
        }
        prop_assert_eq!(&hits, &weights);
        for first in (0..weights.len()).filter(|&at| weights[at] > 0) {
            let rest = total - u64::from(weights[first]);
            let mut others = vec![0; weights.len()];
            for number in 0..rest {
                // The middle of the number's share of all of `u64`.
                let random = ((u128::from(number) * 2 + 1) << 63) / u128::from(rest);
                if let Some(other) = core.other_than(first, total, random as u64) {
                    others[other] += 1;
                }
            }
            let expected: Vec<_> =
                weights.iter().enumerate().map(|(at, &w)| if at == first { 0 } else { w }).collect();
            prop_assert_eq!(others, expected);
        }
    }
}
