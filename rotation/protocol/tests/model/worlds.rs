//! The worlds that are searched.

use steadfast_rotation_protocol::rotation::PhaseName;

use crate::world::{Config, Faults, Order};

/// Each with one kind of fault.
pub(crate) fn worlds() -> Vec<Config> {
    use Order::{
        Abort, ExemptMissing, IssuerStolen, OwnerSigns, Rotate, RotateCanary, RotateExternal,
        RotateGiven, RotateIssuer, TaintActive, TaintOther,
    };
    let none = Faults::default();
    let small = |config: Config| Config { small: true, ..config };
    let with = |faults: Faults, config: Config| Config { faults, ..config };
    let timed = |config: Config| Config { svid_life: Some(1), ..config };
    let vouched = |config: Config| Config { vouched: true, ..config };
    let mut worlds = vec![
        small(world("rotation", &[Rotate])),
        world("given anchor", &[RotateGiven]),
        world("external anchor", &[RotateExternal, OwnerSigns]),
        world("external anchor, abort", &[RotateExternal, Abort, OwnerSigns]),
        world("external anchor, emergency", &[RotateExternal, TaintActive, OwnerSigns]),
        with(Faults { failures: 1, ..none }, world("canary", &[RotateCanary])),
        with(Faults { failures: 1, ..none }, world("canary, abort", &[RotateCanary, Abort])),
        world("canary, emergency", &[RotateCanary, TaintActive]),
        world("canary stolen", &[RotateCanary, TaintOther]),
        world("abort", &[Rotate, Abort]),
        world("abort, given anchor", &[RotateGiven, Abort]),
        small(world("issuer", &[RotateIssuer])),
        world("issuer stolen", &[IssuerStolen]),
        world("issuer stolen in a rotation", &[Rotate, IssuerStolen]),
        world("emergency", &[TaintActive]),
        world("both stolen", &[TaintActive, TaintOther]),
        Config { controllers: 2, slow_writes: true, ..world("two controllers", &[Rotate]) },
        Config {
            controllers: 2,
            slow_writes: true,
            ..world("two controllers, abort", &[Rotate, Abort])
        },
        with(Faults { controller_restarts: 1, ..none }, world("controller restarts", &[Rotate])),
        with(Faults { replica_restarts: 1, ..none }, world("replica restarts", &[Rotate])),
        with(Faults { proxy_restarts: 1, ..none }, world("workload restarts", &[Rotate])),
        with(
            Faults { proxy_restarts: 1, ..none },
            world("workload restarts, given anchor", &[RotateGiven]),
        ),
        with(Faults { lost_keys: 1, ..none }, world("lost key", &[])),
        with(Faults { lost_keys: 1, ..none }, world("lost key in a rotation", &[Rotate])),
        with(Faults { lost_keys: 1, ..none }, world("lost key, emergency", &[TaintActive])),
        with(Faults { cuts: 1, ..none }, world("cut off", &[Rotate, ExemptMissing])),
        with(Faults { cuts: 1, ..none }, world("cut off in an emergency", &[TaintActive])),
        with(Faults { vanishes: 1, ..none }, timed(world("vanished", &[Rotate]))),
        Config { skew: 2, ..timed(world("slow path, clocks off", &[Rotate])) },
        timed(world("slow path, abort", &[Rotate, Abort])),
        Config { skew: 1, ends: Some(ENDS_SOON), ..timed(world("anchor ends", &[])) },
        Config { issuer_life: Some(ISSUER_LIFE), ..timed(world("issuer ends", &[])) },
        vouched(with(Faults { proxy_restarts: 1, ..none }, world("thief", &[Rotate]))),
        vouched(with(
            Faults { proxy_restarts: 1, ..none },
            world("thief of an issuer", &[IssuerStolen]),
        )),
        Config { loads: true, ..world("issuers load late", &[Rotate]) },
        with(Faults { drifts: 1, ..none }, world("workload's clock off", &[Rotate])),
    ];
    for phase in [
        PhaseName::Staged,
        PhaseName::Preparing,
        PhaseName::Activated,
        PhaseName::Draining,
        PhaseName::Withdrawn,
    ] {
        for (what, order) in [("active", TaintActive), ("other", TaintOther)] {
            let name = format!("{what} anchor stolen in {phase:?}");
            worlds.push(Config { from: Some(phase), ..world(&name, &[Rotate, order]) });
        }
        let restored = format!("restored to {phase:?}");
        let restored = Config { from: Some(phase), ..world(&restored, &[Rotate]) };
        worlds.push(with(Faults { restores: 1, ..none }, restored));
    }
    worlds
}

/// The same with one workload and one replica of identity, and some with one workload and two:
/// most of them are searched to their end each time.
pub(crate) fn smaller_worlds() -> Vec<Config> {
    let of_size = |proxies: usize, replicas: usize, config: Config| {
        let name = format!("{} ({proxies} of {replicas})", config.name);
        Config { name, proxies, replicas, ..config }
    };
    let alone = worlds().into_iter().map(|config| {
        let small = !LARGE_ALONE.contains(&config.name.as_str());
        of_size(1, 1, Config { small, ..config })
    });
    let two_replicas = worlds().into_iter().filter_map(|config| {
        let small = SMALL_WITH_TWO_REPLICAS.contains(&config.name.as_str());
        small.then(|| of_size(1, 2, Config { small, ..config }))
    });
    alone.chain(two_replicas).collect()
}

/// Somebody is cut off and never comes back.
pub(crate) fn cut_for_good() -> Vec<Config> {
    use Order::{Rotate, RotateIssuer};
    let cut = |name: &str, proxies: usize, orders: &[Order]| Config {
        small: true,
        proxies,
        replicas: 1,
        faults: Faults { cuts: 1, ..Faults::default() },
        cut_for_good: true,
        ..world(&format!("cut off for good{name} ({proxies} of 1)"), orders)
    };
    let from = |phase: PhaseName, config: Config| Config { from: Some(phase), ..config };
    let large = |config: Config| Config { small: false, ..config };
    let both = [Rotate, RotateIssuer];
    let expiring = cut(", SVIDs end", 1, &both);
    vec![
        cut("", 1, &both),
        Config { svid_life: Some(1), ..expiring },
        large(from(PhaseName::Staged, cut(" in Staged", 2, &[Rotate]))),
        from(PhaseName::Draining, cut(" in Draining", 2, &[Rotate])),
        from(PhaseName::Withdrawn, cut(" in Withdrawn", 2, &[Rotate])),
        large(from(PhaseName::Withdrawn, cut(" in Withdrawn, issuer", 2, &both))),
    ]
}

/// The last phases with two workloads, with two replicas where it stays small, and with two
/// controllers.
pub(crate) fn last_phases() -> Vec<Config> {
    use Order::{Abort, Rotate};
    let from = |phase: PhaseName, replicas: usize, orders: &[Order]| {
        let name = format!("{orders:?} from {phase:?} (2 of {replicas})");
        Config { small: true, replicas, from: Some(phase), ..world(&name, orders) }
    };
    let two_controllers = |phase: PhaseName| Config {
        name: format!("two controllers from {phase:?} (1 of 1)"),
        proxies: 1,
        controllers: 2,
        slow_writes: true,
        ..from(phase, 1, &[Rotate])
    };
    vec![
        from(PhaseName::Draining, 2, &[Rotate]),
        from(PhaseName::Withdrawn, 2, &[Rotate]),
        Config { small: false, ..from(PhaseName::Staged, 1, &[Rotate, Abort]) },
        from(PhaseName::Draining, 1, &[Rotate, Abort]),
        Config { small: false, ..from(PhaseName::Staged, 2, &[Rotate, Abort]) },
        Config { small: false, ..from(PhaseName::Draining, 2, &[Rotate, Abort]) },
        two_controllers(PhaseName::Staged),
        two_controllers(PhaseName::Draining),
        two_controllers(PhaseName::Withdrawn),
    ]
}

/// A store is put back with the revisions that it had.
pub(crate) fn put_back() -> Vec<Config> {
    use PhaseName::{Activated, Draining, Staged, Withdrawn};
    let put_back = |(phase, replicas): (PhaseName, usize)| Config {
        small: replicas == 1 && matches!(phase, Staged | Draining),
        proxies: 1,
        replicas,
        from: Some(phase),
        faults: Faults { restores: 1, ..Faults::default() },
        revisions_fall: true,
        ..world(&format!("put back to {phase:?} (1 of {replicas})"), &[Order::Rotate])
    };
    let phases = [Staged, Activated, Draining, Withdrawn];
    let put_back = phases.into_iter().flat_map(|phase| [(phase, 1), (phase, 2)]).map(put_back);
    put_back.chain([put_back_and_abort()]).collect()
}

/// The one in which only revisions tell: a bundle that names the given anchor is held before it
/// signs and after, and an abort takes back what has never signed.
pub(crate) fn put_back_and_abort() -> Config {
    use Order::{Abort, RotateGiven};
    Config {
        small: true,
        proxies: 1,
        replicas: 1,
        from: Some(PhaseName::Preparing),
        faults: Faults { restores: 1, ..Faults::default() },
        revisions_fall: true,
        ..world("put back to Preparing, abort (1 of 1)", &[RotateGiven, Abort])
    }
}

/// Two workloads, two replicas, one controller, and nothing that goes wrong.
pub(crate) fn world(name: &str, orders: &[Order]) -> Config {
    Config {
        name: name.to_owned(),
        small: false,
        proxies: 2,
        replicas: 2,
        controllers: 1,
        orders: orders.to_vec(),
        faults: Faults::default(),
        slow_writes: false,
        skew: 0,
        svid_life: None,
        gathered: false,
        from: None,
        ends: None,
        issuer_life: None,
        cut_for_good: false,
        vouched: false,
        loads: false,
        revisions_fall: false,
        strict: true,
        controller_clock_ms: None,
        shortcut: None,
    }
}

/// With one workload and one replica there is more to them than is searched each time.
const LARGE_ALONE: [&str; 5] = [
    "issuer stolen in a rotation",
    "both stolen",
    "two controllers",
    "two controllers, abort",
    "cut off in an emergency",
];
const SMALL_WITH_TWO_REPLICAS: [&str; 7] = [
    "rotation",
    "given anchor",
    "abort",
    "abort, given anchor",
    "controller restarts",
    "other anchor stolen in Draining",
    "issuers load late",
];
/// In ticks: a rotation begins by itself at once.
const ENDS_SOON: u64 = 6;
/// In ticks.
const ISSUER_LIFE: u64 = 4;
