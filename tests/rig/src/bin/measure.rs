//! What a sidecar costs: idle memory, exec to ready, requests a second and CPU per request of a
//! pair of sidecars against none. Run it from a release build; it prints a table.
//!
//! Every figure is of whole processes, read from /proc; the machine's speed drifts, so the ratio
//! in one run is worth more than a figure.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use steadfast_test_rig::load::Report;
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::process::{Process, Spec, free_addr};
use steadfast_test_rig::{Load, Mesh, MeshConfig, Pod, PodSpec, until};
use tokio::time::Instant;

#[tokio::main]
async fn main() {
    let mesh = Mesh::start(MeshConfig::default()).await;
    let address = free_addr();
    let app = Spec::ours("app", "steadfast-test-app").args(["http", &address.to_string()]);
    let app = Process::start(&mesh.logs(), app);
    app.logged(&["listening"], DEADLINE).await;
    let api = mesh.pod(PodSpec::new("api", &[address.port()]).policy("all-authenticated"));
    let mut web = mesh.pod(PodSpec::new("web", &[]));
    api.ready().await;
    web.ready().await;

    println!("{:<44} {:>12}", "what", "figure");
    let mut starts = exec_to_ready(&mut web).await;
    starts.sort();
    row(
        "exec to ready with an SVID, median",
        &format!("{:.1} ms", millis(starts[starts.len() / 2])),
    );
    row("exec to ready with an SVID, best", &format!("{:.1} ms", millis(starts[0])));
    // Idle is after the burst of the start: jemalloc gives back what it does not need in a second.
    let idle = Instant::now() + Duration::from_secs(5);
    tokio::time::sleep_until(idle).await;
    for field in ["Pss_Anon", "Pss", "Rss"] {
        row(
            &format!("idle sidecar, {field}"),
            &format!("{} KiB", memory_kib(web.proxy.pid(), field)),
        );
    }

    let alone = measure(&[app.pid()], direct(address, &api)).await;
    let pair = [app.pid(), web.proxy.pid(), api.proxy.pid()];
    let through = measure(&pair, through(&web, &api, address.port())).await;
    let sidecars = through.cpu[1] + through.cpu[2];
    row("requests/s, no sidecar", &format!("{:.0}", alone.rate));
    row("requests/s, a pair of sidecars", &format!("{:.0}", through.rate));
    row("ratio of requests/s, pair to none", &format!("{:.2}", through.rate / alone.rate));
    row("CPU per request of the pair", &format!("{:.1} us", sidecars * 1e6));
    row("CPU per request of the application alone", &format!("{:.1} us", alone.cpu[0] * 1e6));
    row("failed requests", &format!("{}", alone.failed + through.failed));
    let idle = Instant::now() + Duration::from_secs(60);
    tokio::time::sleep_until(idle).await;
    row(
        "a minute after the load, Pss_Anon",
        &format!("{} KiB", memory_kib(web.proxy.pid(), "Pss_Anon")),
    );
}

/// What a load cost.
struct Cost {
    rate: f64,
    failed: u64,
    /// Seconds of CPU per request, of each process.
    cpu: Vec<f64>,
}

async fn exec_to_ready(pod: &mut Pod) -> Vec<Duration> {
    let mut starts = Vec::new();
    for _ in 0..STARTS {
        pod.proxy.kill();
        let start = Instant::now();
        pod.proxy.restart();
        until("the sidecar is ready", DEADLINE, || async {
            let (status, reason) = get(pod.admin, "/ready").await?;
            if status.is_success() { Ok(()) } else { Err(reason) }
        })
        .await;
        starts.push(start.elapsed());
    }
    starts
}

async fn measure(pids: &[u32], load: Load) -> Cost {
    // The connections and pools of the first second are not what is measured.
    let warm = Load { duration_ms: 2_000, ..load.clone() };
    let _: Report = warm.run().await;
    let before: Vec<_> = pids.iter().map(|pid| cpu_seconds(*pid)).collect();
    let seconds = load.duration_ms as f64 / 1000.0;
    let report = load.run().await;
    let requests = report.requests.max(1) as f64;
    let cpu = pids.iter().zip(before).map(|(pid, before)| (cpu_seconds(*pid) - before) / requests);
    if let Some(error) = report.errors.first() {
        eprintln!("{} requests failed, first: {error}", report.failed);
    }
    Cost { rate: requests / seconds, failed: report.failed, cpu: cpu.collect() }
}

fn direct(to: SocketAddr, api: &Pod) -> Load {
    Load { to, ..load(api, to.port()) }
}

fn through(web: &Pod, api: &Pod, port: u16) -> Load {
    Load { to: web.outbound, ..load(api, port) }
}

fn load(api: &Pod, port: u16) -> Load {
    Load {
        to: api.inbound,
        authority: api.spec.authority(port),
        http2: false,
        connections: 16,
        rate: 0,
        duration_ms: 10_000,
    }
}

/// User and system time, in seconds: fields 14 and 15 of /proc/PID/stat (proc(5)), in ticks of
/// 10 ms.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("its name").split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<f64>().expect("a number");
    (ticks(11) + ticks(12)) / 100.0
}

fn memory_kib(pid: u32, field: &str) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("the process runs");
    let line = rollup.lines().find(|line| line.starts_with(&format!("{field}:")));
    let value = line.and_then(|line| line.split_whitespace().nth(1));
    value.and_then(|value| value.parse().ok()).expect("a figure")
}

fn row(what: &str, figure: &str) {
    println!("{what:<44} {figure:>12}");
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

const STARTS: usize = 15;
const DEADLINE: Duration = Duration::from_secs(30);
