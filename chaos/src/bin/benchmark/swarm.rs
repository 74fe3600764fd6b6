//! Ten thousand workloads in one process: each with the identity that a sidecar has, and no proxy.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use prometheus_client::registry::Registry;
use steadfast_api::{DnsIdentity, TrustDomain, UnixTime};
use steadfast_identity_client::{BootstrapBundle, Config, Identity, TlsContext};
use steadfast_process::{Clock as _, Drain, Readiness, SystemClock};
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

/// When each bundle came to be used, at each workload.
#[derive(Debug, Default)]
pub(crate) struct Pushes(Mutex<BTreeMap<u64, Vec<UnixTime>>>);

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
        let mut joining = VecDeque::new();
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
        // An equal share of them each, wherever a name would have led them.
        let first = mesh.identity_2.is_none() || number.is_multiple_of(2);
        let replica = if first { mesh.identity_addr } else { mesh.identity_2_addr() };
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

impl Pushes {
    fn used(&self, seq: u64) {
        let now = SystemClock.now();
        self.lock().entry(seq).or_default().push(now);
    }

    /// How long the bundle that was written at this time took.
    pub(crate) fn pushed(
        &self,
        seq: u64,
        written: UnixTime,
        workloads: u32,
    ) -> anyhow::Result<Pushed> {
        let mut used = self.lock().get(&seq).cloned().unwrap_or_default();
        used.sort_unstable();
        let (has, all) = (used.len(), workloads as usize);
        ensure!(has == all, "{has} of {all} workloads use bundle {seq}");
        let took = |at: Option<&UnixTime>| at.map_or(Duration::ZERO, |at| at.since(written));
        Ok(Pushed { seq, median: took(used.get(has / 2)), last: took(used.last()) })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<UnixTime>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
