//! Measures the identity process: CPU per SVID over gRPC and TLS, with a token of its own for each
//! request and connections that are kept, so without handshakes. (What a trust stream takes is measured by `steadfast-benchmark`.)
//!
//! `cargo run --release -p steadfast-identity --example load -- PATH/TO/steadfast-identity`

#![allow(clippy::unwrap_used)] // A measurement that cannot be made ends.

#[path = "../tests/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use steadfast_api::trust::v1::CertifyRequest;
use support::world::{Identity, World, wait};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let binary = std::env::args().nth(1).unwrap();
    let world = World::new(binary).await;
    let many = "1000000";
    let flags = [
        ["--svids-per-second", many],
        ["--renewals-per-second", many],
        ["--svids-per-workload-per-minute", "100000000"],
    ];
    let identity = world.start(&flags.concat()).await;
    wait(|| identity.ready().contains("\"ready\":true"), "ready").await;
    certify(&world, &identity).await;
}

/// Requests from some connections, each with several under way.
async fn certify(world: &World, identity: &Identity) {
    let tokens: Arc<Vec<_>> =
        Arc::new((0..REQUESTS).map(|_| world.token("identity.l5d.io", "u1")).collect());
    let csrs: Arc<Vec<_>> = Arc::new((0..64).map(|_| support::plain_csr()).collect());
    let next = Arc::new(AtomicUsize::new(0));
    let mut workers = tokio::task::JoinSet::new();
    let (cpu_before, began) = (cpu(identity), tokio::time::Instant::now());
    for _ in 0..CONNECTIONS {
        let trust = identity.trust(&world.founding).await;
        for _ in 0..IN_FLIGHT {
            let mut trust = trust.clone();
            let (tokens, csrs, next) = (tokens.clone(), csrs.clone(), next.clone());
            workers.spawn(async move {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(token) = tokens.get(at) else { return };
                    let csr = csrs[at % csrs.len()].clone();
                    trust.certify(CertifyRequest { token: token.clone(), csr }).await.unwrap();
                }
            });
        }
    }
    workers.join_all().await;
    let (used, took) = (cpu(identity) - cpu_before, began.elapsed());
    println!(
        "{REQUESTS} SVIDs in {:.2} s, {:.2} s of CPU: {:.0} SVIDs/s, {:.0} per core",
        took.as_secs_f64(),
        used.as_secs_f64(),
        REQUESTS as f64 / took.as_secs_f64(),
        REQUESTS as f64 / used.as_secs_f64(),
    );
}

/// User and system time of the process so far.
fn cpu(identity: &Identity) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", identity.child.id())).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

const REQUESTS: usize = 40_000;
const CONNECTIONS: usize = 4;
const IN_FLIGHT: usize = 16;
