//! Ten thousand workloads in one process: each with the identity that a sidecar has, and no proxy.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use prometheus_client::registry::Registry;
use steadfast_api::{DnsIdentity, TrustDomain};
use steadfast_identity_client::{BootstrapBundle, Config, Identity, TlsContext};
use steadfast_platform::standalone::{Client, Directory};
use steadfast_platform::store::{Event, Store as _, TRUST_DOMAIN_KEY};
use steadfast_process::{Clock as _, Drain, Readiness, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_test_rig::mesh::{NAMESPACE, TRUST_DOMAIN};
use steadfast_test_rig::{Mesh, until};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The workloads.
pub(crate) struct Swarm {
    /// An identity ends when the benchmark does, and not before.
    identities: JoinSet<anyhow::Result<()>>,
    drain: Drain,
}

/// When each bundle was written, and when it was in use where.
#[derive(Debug, Default)]
pub(crate) struct Pushes(Mutex<BTreeMap<u64, Push>>);

/// One bundle; times are on the boot clock.
#[derive(Clone, Debug, Default)]
struct Push {
    written: Option<Duration>,
    /// At each workload.
    used: Vec<Duration>,
}

/// How long a bundle took to all.
#[derive(Clone, Debug)]
pub(crate) struct Pushed {
    /// Its sequence number.
    pub(crate) seq: u64,
    /// To half of them.
    pub(crate) median: Duration,
    /// To the last.
    pub(crate) last: Duration,
}

/// A pod for each, under one service account.
pub(crate) fn write_manifests(mesh: &Mesh, workloads: u32) -> anyhow::Result<()> {
    let folder = mesh.dir().join("manifests");
    let account = format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {ACCOUNT}, namespace: {NAMESPACE}}}\n"
    );
    fs::write(folder.join("account.yaml"), account)?;
    let all: Vec<u32> = (0..workloads).collect();
    for (file, chunk) in all.chunks(PODS_PER_FILE).enumerate() {
        let mut text = String::new();
        for number in chunk {
            write!(
                text,
                "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {NAMESPACE}\n\
                 \x20 annotations: {{linkerd.io/inject: enabled}}\n\
                 spec:\n  serviceAccountName: {ACCOUNT}\n\
                 \x20 containers: [{{name: app, image: none}}]\n",
                name = name(*number)
            )?;
        }
        fs::write(folder.join(format!("pods-{file}.yaml")), text)?;
    }
    Ok(())
}

/// Waits until the store has given every pod its token and the bundle.
pub(crate) async fn tokens(mesh: &Mesh, workloads: u32) {
    let pods = &mesh.dir().join("pods").join(NAMESPACE);
    until("every pod has its token", TOKENS_DEADLINE, || async move {
        let has = |number: &u32| pods.join(name(*number)).join("bundle.json").exists();
        match (0..workloads).filter(|number| !has(number)).count() {
            0 => Ok(()),
            without => Err(format!("{without} have none")),
        }
    })
    .await;
}

impl Swarm {
    /// Everybody, once all have an SVID. So many at a time as a busy cluster starts.
    pub(crate) async fn join(
        mesh: &Mesh,
        workloads: u32,
        pushes: Arc<Pushes>,
    ) -> anyhow::Result<Self> {
        let mut swarm = Self { identities: JoinSet::new(), drain: Drain::new() };
        let mut joining = std::collections::VecDeque::new();
        for number in 0..workloads {
            joining.push_back(swarm.start(mesh, number, &pushes)?);
            if joining.len() >= JOINING_MAX
                && let Some(next) = joining.pop_front()
            {
                joined(next).await?;
            }
        }
        for next in joining {
            joined(next).await?;
        }
        Ok(swarm)
    }

    fn start(
        &mut self,
        mesh: &Mesh,
        number: u32,
        pushes: &Arc<Pushes>,
    ) -> anyhow::Result<watch::Receiver<Arc<TlsContext>>> {
        let trust_domain: TrustDomain = TRUST_DOMAIN.parse()?;
        let mounted = mesh.dir().join("pods").join(NAMESPACE).join(name(number));
        // Half of them each, wherever a name would have led them.
        let replica = if number % 2 == 0 { mesh.identity_addr } else { mesh.identity_2_addr() };
        let local = |account, namespace| {
            DnsIdentity::new(account, namespace, CONTROL_NAMESPACE, &trust_domain)
        };
        let config = Config {
            local: local(ACCOUNT, NAMESPACE)?,
            identity_address: replica.to_string(),
            identity_name: local("steadfast-identity", CONTROL_NAMESPACE)?,
            token_file: mounted.join("token"),
            bootstrap: BootstrapBundle::File(mounted.join("bundle.json")),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let (readiness, mut registry) = (Readiness::new(), Registry::default());
        let identity = Identity::new(config, Arc::new(SystemClock), &readiness, &mut registry)?;
        let contexts = identity.contexts();
        let drain = self.drain.clone();
        self.identities.spawn(async move { Ok(identity.run(drain).await?) });
        self.identities.spawn(follow(contexts.clone(), Arc::clone(pushes)));
        Ok(contexts)
    }

    /// That nobody has left.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        match self.identities.try_join_next() {
            None => Ok(()),
            Some(ended) => ended?.and_then(|()| anyhow::bail!("a workload has ended early")),
        }
    }
}

async fn joined(mut contexts: watch::Receiver<Arc<TlsContext>>) -> anyhow::Result<()> {
    let has_svid = contexts.wait_for(|context| context.svid.is_some());
    let waited = tokio::time::timeout(JOIN_DEADLINE, has_svid).await;
    waited.context("a workload got no SVID")?.map(drop).context("a workload has ended early")
}

/// Notes each bundle that a workload uses.
async fn follow(
    mut contexts: watch::Receiver<Arc<TlsContext>>,
    pushes: Arc<Pushes>,
) -> anyhow::Result<()> {
    let mut newest = 0;
    while contexts.changed().await.is_ok() {
        let seq = contexts.borrow_and_update().bundle.as_ref().map_or(0, |b| b.sequence());
        if seq > newest {
            newest = seq;
            pushes.used(seq);
        }
    }
    Ok(())
}

/// Follows the store, on a thread of its own: the workloads must not hold it up.
pub(crate) struct Watcher(tokio::sync::oneshot::Sender<()>);

impl Watcher {
    pub(crate) fn stop(self) {
        // It may have ended.
        let _ = self.0.send(());
    }
}

/// Notes when each bundle is written.
pub(crate) fn watch_bundles(mesh: &Mesh, pushes: Arc<Pushes>) -> anyhow::Result<Watcher> {
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let directory = Directory::new(mesh.dir());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("watcher".to_owned()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                watched = watch_store(&directory, &pushes) => {
                    if let Err(error) = watched {
                        eprintln!("the store is not followed any more: {error:#}");
                    }
                }
                _ = stopped => {}
            }
        });
    })?;
    Ok(Watcher(stop))
}

async fn watch_store(directory: &Directory, pushes: &Pushes) -> anyhow::Result<()> {
    use futures::StreamExt as _;
    let client = Client::new(directory);
    let (_, revision) = client.list(TRUST_DOMAIN_KEY).await?;
    let mut events = client.watch(TRUST_DOMAIN_KEY, revision).await?;
    while let Some(event) = events.next().await {
        if let Event::Put(entry) = event? {
            let state: TrustDomainState = serde_json::from_slice(&entry.value)?;
            pushes.written(state.seq);
        }
    }
    anyhow::bail!("it has ended")
}

impl Pushes {
    /// The first time that it is seen counts: a bundle stays for many states.
    fn written(&self, seq: u64) {
        let now = SystemClock.since_boot();
        self.with(seq, |push| push.written = push.written.or(Some(now)));
    }

    fn used(&self, seq: u64) {
        let now = SystemClock.since_boot();
        self.with(seq, |push| push.used.push(now));
    }

    fn with(&self, seq: u64, change: impl FnOnce(&mut Push)) {
        let mut pushes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(pushes.entry(seq).or_default());
    }

    /// The bundles that were written while it was watched.
    pub(crate) fn told(&self, workloads: u32) -> anyhow::Result<Vec<Pushed>> {
        let pushes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut told = Vec::new();
        for (&seq, push) in pushes.iter() {
            // That of before the rotation was seen with the first state, long after it was written.
            let Some(written) =
                push.written.filter(|written| push.used.iter().any(|u| u > written))
            else {
                continue;
            };
            let mut used = push.used.clone();
            used.sort_unstable();
            let (has, all) = (used.len(), workloads as usize);
            ensure!(has == all, "only {has} of {all} workloads use bundle {seq}");
            let took =
                |at: Option<&Duration>| at.map_or(Duration::ZERO, |at| at.saturating_sub(written));
            told.push(Pushed { seq, median: took(used.get(has / 2)), last: took(used.last()) });
        }
        ensure!(!told.is_empty(), "no bundle was written");
        Ok(told)
    }
}

fn name(number: u32) -> String {
    format!("w-{number:05}")
}

const ACCOUNT: &str = "worker";
const CONTROL_NAMESPACE: &str = "steadfast";
const PODS_PER_FILE: usize = 500;
const JOINING_MAX: usize = 64;
const JOIN_DEADLINE: Duration = Duration::from_secs(60);
const TOKENS_DEADLINE: Duration = Duration::from_secs(300);
