//! A cluster to play with: `tests/kubernetes/cluster` builds what it needs and starts this.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use steadfast_test_rig::cluster::{Cluster, load, parts_root};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};

#[tokio::main]
async fn main() -> ExitCode {
    run().await.unwrap_or_else(|error| {
        eprintln!("steadfast-cluster: {error}");
        ExitCode::FAILURE
    })
}

async fn run() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let files = Files::new();
    match args.as_slice() {
        ["up"] => up(&files, 2).await?,
        ["up", "--nodes", nodes] => up(&files, nodes_of(nodes)?).await?,
        ["down"] => down(&files).await?,
        ["status"] => return status(&files),
        ["load"] => load_images(&files)?,
        ["hold", nodes] => hold(&files, nodes_of(nodes)?).await?,
        other => {
            eprintln!("{other:?}: expected up [--nodes N], load, down or status");
            return Ok(ExitCode::from(2));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn nodes_of(text: &str) -> anyhow::Result<u8> {
    let nodes = text.parse().ok().filter(|nodes| (1..=NODES_MAX).contains(nodes));
    nodes.with_context(|| format!("--nodes {text:?}: expected a number from 1 to {NODES_MAX}"))
}

/// Starts a process that holds the cluster, and waits until it is ready.
async fn up(files: &Files, nodes: u8) -> anyhow::Result<()> {
    if let Some(pid) = files.holder() {
        bail!("a cluster is up already (process {pid}): tests/kubernetes/cluster down ends it");
    }
    ensure!(rustix::process::geteuid().is_root(), "nodes are namespaces, which need root");
    let _ = fs::remove_file(&files.kubeconfig);
    let log = File::create(&files.log)?;
    let started = Instant::now();
    println!("starting a cluster of {nodes} nodes …");
    let mut holder = Command::new("setsid")
        .arg(std::env::current_exe()?)
        .args(["hold", &nodes.to_string()])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    while !files.kubeconfig.exists() {
        if let Some(status) = holder.try_wait()? {
            let log = fs::read_to_string(&files.log)?;
            bail!("the cluster did not start ({status}):\n{log}");
        }
        sleep(POLL).await;
    }
    println!("ready after {:.1} s\n", started.elapsed().as_secs_f64());
    println!("  export KUBECONFIG={}", files.kubeconfig.display());
    println!("  export PATH={}:$PATH        # kubectl and helm", files.bin.display());
    println!("\n  kubectl get nodes");
    println!("  tests/kubernetes/cluster install  # Steadfast, as it is built from here");
    println!("  tests/kubernetes/cluster down     # ends it");
    Ok(())
}

/// Holds a cluster until it is told to end.
async fn hold(files: &Files, nodes: u8) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    fs::write(&files.pid, std::process::id().to_string())?;
    let cluster = tokio::select! {
        cluster = Cluster::start(nodes) => cluster,
        _ = terminate.recv() => return Ok(()),
    };
    let nodes = cluster.nodes().iter().map(|node| format!("{}\n", node.namespaces.pid()));
    fs::write(&files.nodes, nodes.collect::<String>())?;
    // Complete at once, and for its owner alone: it names a token.
    let draft = files.kubeconfig.with_extension("new");
    let _ = fs::remove_file(&draft);
    let mut options = File::options();
    let mut file = options.create_new(true).write(true).mode(0o600).open(&draft)?;
    std::io::copy(&mut File::open(cluster.kubeconfig())?, &mut file)?;
    fs::rename(&draft, &files.kubeconfig)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = fs::remove_file(&files.kubeconfig);
    drop(cluster);
    let _ = fs::remove_file(&files.pid);
    Ok(())
}

/// Brings our own programs, as they are built now, into every node.
fn load_images(files: &Files) -> anyhow::Result<()> {
    ensure!(files.holder().is_some(), "no cluster is up: tests/kubernetes/cluster up");
    let nodes = fs::read_to_string(&files.nodes)?;
    let nodes = nodes.lines().map(str::parse::<u32>).collect::<Result<Vec<_>, _>>()?;
    load(&nodes);
    println!("loaded the images localhost/steadfast-*:1 into {} nodes", nodes.len());
    Ok(())
}

async fn down(files: &Files) -> anyhow::Result<()> {
    let Some(pid) = files.holder() else {
        println!("no cluster is up");
        return Ok(());
    };
    let asked = Command::new("kill").args(["-TERM", &pid.to_string()]).status()?;
    ensure!(asked.success(), "process {pid} cannot be asked to end the cluster");
    let deadline = Instant::now() + DOWN_DEADLINE;
    while files.holder().is_some() {
        ensure!(
            Instant::now() < deadline,
            "process {pid} has not ended: see {}",
            files.log.display()
        );
        sleep(POLL).await;
    }
    println!("the cluster is gone");
    Ok(())
}

fn status(files: &Files) -> anyhow::Result<ExitCode> {
    let Some(pid) = files.holder() else {
        println!("no cluster is up");
        return Ok(ExitCode::FAILURE);
    };
    println!("up (process {pid})");
    let kubectl = Command::new(files.bin.join("kubectl"))
        .arg("--kubeconfig")
        .arg(&files.kubeconfig)
        .args(["get", "nodes", "--output", "wide"])
        .status()?;
    Ok(if kubectl.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is kept of a cluster that is up.
struct Files {
    bin: PathBuf,
    kubeconfig: PathBuf,
    log: PathBuf,
    pid: PathBuf,
    /// The first process of each node.
    nodes: PathBuf,
}

impl Files {
    fn new() -> Self {
        let root = parts_root();
        Self {
            bin: root.join("bin"),
            kubeconfig: root.join("kubeconfig"),
            log: root.join("cluster.log"),
            pid: root.join("cluster.pid"),
            nodes: root.join("cluster.nodes"),
        }
    }

    /// The process that holds it, if it still runs.
    fn holder(&self) -> Option<u32> {
        let pid: u32 = fs::read_to_string(&self.pid).ok()?.parse().ok()?;
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        // A process id may have gone to another since.
        let ours = program
            .file_name()
            .is_some_and(|name| Path::new(name).to_string_lossy().starts_with("steadfast-cluster"));
        ours.then_some(pid)
    }
}

const NODES_MAX: u8 = 9;
const POLL: Duration = Duration::from_millis(50);
const DOWN_DEADLINE: Duration = Duration::from_secs(60);
