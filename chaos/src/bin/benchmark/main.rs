//! What a rotation costs in a mesh of ten thousand workloads: real processes, real trust streams.
//!
//! Store, the replicas of identity and the controller run as a mesh has them, from the same build
//! as this. The workloads live in this process (`swarm.rs`): each is the identity that a sidecar
//! has, with a token, a key and a trust stream of its own, and proxies nothing. Then a person
//! orders a rotation, and from its first step to its last the kernel's books are read
//! (`kernel.rs`). What is measured stands beside what it may be; the exit code says whether it is
//! within it.

mod args;
mod kernel;
mod swarm;
mod told;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser as _;
use steadfast_process::{Clock as _, SystemClock, limits};
use steadfast_rotation_protocol::rotation::{PhaseName, Step};
use steadfast_rotation_protocol::trust_domain::{Outcome, PastRotation, Request};
use steadfast_test_rig::metrics::Metrics;
use steadfast_test_rig::{Mesh, MeshConfig, Process, until};

use crate::args::{Args, EXIT_OVER};
use crate::kernel::Usage;
use crate::swarm::{Pushes, Swarm};
use crate::told::{Measured, Phase, Told};

/// As identity has it: what is counted here is not how two allocators differ.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let told = runtime.context("no runtime").and_then(|runtime| runtime.block_on(bench(&args)));
    match told {
        Ok(told) => {
            told.print(args.output);
            if told.within() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_OVER) }
        }
        Err(error) => {
            eprintln!("steadfast-benchmark: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench(args: &Args) -> anyhow::Result<Told> {
    let needed = u64::from(args.workloads) + FILES_SPARE;
    let files = limits::raise_open_files();
    ensure!(files >= needed, "{needed} open files are needed, the limit is {files}: ulimit -Hn");
    // 1. A mesh with nobody in it.
    let mesh = Mesh::start(MeshConfig {
        rotation: true,
        second_identity: args.replicas > 1,
        read_lease: args.read_lease,
        renew_window: args.renew_window,
        ..MeshConfig::default()
    })
    .await;
    let second = mesh.identity_2.as_ref().map(|replica| (replica, mesh.identity_2_admin));
    let replicas = || std::iter::once((&mesh.identity, mesh.identity_admin)).chain(second);
    let share = args.workloads / args.replicas;
    say("the mesh stands");
    swarm::write_manifests(&mesh, args.workloads).context("the pods' manifests")?;
    swarm::tokens(&mesh, args.workloads).await;
    say("every pod has its token");
    tokio::time::sleep(SETTLE).await;
    let empty: Vec<_> = replicas().map(|(replica, _)| Usage::of(replica.pid())).collect();
    let before = Usage::of(controller(&mesh)?.pid())?;
    // 2. Everybody joins.
    let pushes = Arc::new(Pushes::default());
    let mut swarm = Swarm::join(&mesh, args.workloads, Arc::clone(&pushes)).await?;
    say("every workload has its SVID");
    for (_, admin) in replicas() {
        until("every trust stream is open", OPEN_DEADLINE, || async move {
            let open = Metrics::scrape(admin).await?.sum("steadfast_identity_streams", &[]);
            if open >= f64::from(share) { Ok(()) } else { Err(format!("{open} of {share} are")) }
        })
        .await;
    }
    // What was taken to join is given back after a while, as the allocator does it.
    tokio::time::sleep(SETTLE).await;
    let mut stream_bytes = Vec::new();
    for ((replica, _), empty) in replicas().zip(empty) {
        let grown = Usage::of(replica.pid())?.resident.saturating_sub(empty?.resident);
        stream_bytes.push(grown / u64::from(share));
    }
    say(&format!("a trust stream takes {stream_bytes:?} bytes"));
    // 3. A rotation, from the order to its end.
    let joined = Usage::of(controller(&mesh)?.pid())?;
    let idle_from = SystemClock.since_boot();
    tokio::time::sleep(IDLE).await;
    let idle = SystemClock.since_boot().saturating_sub(idle_from);
    let ordered = Usage::of(controller(&mesh)?.pid())?;
    let began = SystemClock.since_boot();
    let past = rotate(&mesh).await?;
    let took = SystemClock.since_boot().saturating_sub(began);
    let ended = Usage::of(controller(&mesh)?.pid())?;
    tokio::time::sleep(SETTLE).await;
    ensure!(past.outcome == Outcome::Done, "the rotation ended as {:?}", past.outcome);
    swarm.check()?;
    // Two phases end with a new bundle; a moment before it is written they say when.
    let seq = mesh.trust_domain().await.0.seq;
    let mut pushed = Vec::new();
    for (seq, phase) in [(seq - 1, PhaseName::Generating), (seq, PhaseName::Draining)] {
        let step =
            past.steps.iter().find(|step| step.phase == phase).context("a phase is missing")?;
        pushed.push(pushes.pushed(seq, step.at, args.workloads)?);
    }
    Ok(Told::new(Measured {
        workloads: args.workloads,
        took,
        phases: phases(&past),
        joining_cpu: joined.cpu.saturating_sub(before.cpu),
        idle_cpu: ordered.cpu.saturating_sub(joined.cpu),
        idle,
        rotation_cpu: ended.cpu.saturating_sub(ordered.cpu),
        rotation_peak: ended.peak,
        stream_bytes,
        pushes: pushed,
    }))
}

/// Orders a rotation as a person does, and waits for its end.
async fn rotate(mesh: &Mesh) -> anyhow::Result<PastRotation> {
    let at = SystemClock.now();
    mesh.order(|state| {
        let by = "a benchmark".to_owned();
        state.request(Request { by, at, anchor: None, canary: None, replaces: None })
    })
    .await
    .context("the order is refused")?;
    say("a rotation is ordered");
    let ended = mesh.state_where("the rotation is over", ROTATION_DEADLINE, |state| {
        state.rotation.is_none() && state.requested.is_none()
    });
    let state = ended.await;
    say("the rotation is over");
    state.past.last().cloned().context("no rotation of the past")
}

/// How long each phase took, and how many had settled when it was left.
fn phases(past: &PastRotation) -> Vec<Phase> {
    let entered = std::iter::once(past.started).chain(past.steps.iter().map(|step| step.at));
    let of = |(step, entered): (&Step, _)| Phase {
        name: step.phase.label(),
        seconds: step.at.since(entered).as_secs_f64(),
        acked: step.acked,
    };
    past.steps.iter().zip(entered).map(of).collect()
}

fn controller(mesh: &Mesh) -> anyhow::Result<&Process> {
    mesh.rotation.as_ref().context("no controller")
}

/// It takes a quarter of an hour: a person sees how far it is.
fn say(what: &str) {
    eprintln!("{}  {what}", SystemClock.now());
}

/// Beside one connection for each workload.
const FILES_SPARE: u64 = 500;
const SETTLE: Duration = Duration::from_secs(15);
const IDLE: Duration = Duration::from_secs(30);
const OPEN_DEADLINE: Duration = Duration::from_secs(60);
const ROTATION_DEADLINE: Duration = Duration::from_secs(3600);
