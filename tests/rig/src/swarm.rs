//! Workloads without a proxy: each has the identity that a sidecar has, by a token of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use steadfast_api::{DnsIdentity, TrustDomain};
use steadfast_identity_client::{BootstrapBundle, Config, Identity};
use steadfast_process::{Drain, Readiness, SystemClock};
use tokio::task::JoinSet;

/// Runs one for each folder in `dir`, which is named after its service account and namespace
/// (`web.demo-1`) and has its token. The bundle that all of them have mounted is in `dir`. Says how
/// many have an SVID whenever that has changed, and never ends.
///
/// # Errors
/// A folder that is none, or an identity that ends.
pub async fn run(identity: &str, dir: &Path) -> anyhow::Result<()> {
    let (mut running, mut contexts) = (JoinSet::new(), Vec::new());
    for folder in folders(dir)? {
        let config = config(identity, dir, &folder)?;
        let (readiness, mut registry) = (Readiness::new(), Registry::default());
        let identity = Identity::new(config, Arc::new(SystemClock), &readiness, &mut registry)?;
        contexts.push(identity.contexts());
        running.spawn(identity.run(Drain::new()));
    }
    let mut told = None;
    loop {
        let have = contexts.iter().filter(|context| context.borrow().svid.is_some()).count();
        if told != Some(have) {
            println!("{have} of {} have an SVID", contexts.len());
            told = Some(have);
        }
        if let Ok(Some(ended)) = tokio::time::timeout(LOOK_EVERY, running.join_next()).await {
            ended??;
            anyhow::bail!("an identity has ended");
        }
    }
}

/// The folders of the workloads.
pub(crate) fn folders(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    Ok(entries.iter().map(std::fs::DirEntry::path).filter(|path| path.is_dir()).collect())
}

/// What the workload of this folder needs for its identity.
pub(crate) fn config(identity: &str, dir: &Path, folder: &Path) -> anyhow::Result<Config> {
    let name_of = folder.file_name().and_then(|name| name.to_str());
    let name_of = name_of.context("a name that is no text")?;
    let (account, rest) = name_of.split_once('.').context("a name without an account")?;
    let (namespace, _) = rest.rsplit_once('-').context("a name without a number")?;
    Ok(Config {
        local: name(account, namespace)?,
        identity_address: identity.to_owned(),
        identity_name: name("steadfast-identity", "steadfast")?,
        token_file: folder.join("token"),
        bootstrap: BootstrapBundle::File(dir.join("bundle.json")),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// Of a service account.
pub(crate) fn name(account: &str, namespace: &str) -> anyhow::Result<DnsIdentity> {
    let trust_domain: TrustDomain = "cluster.local".parse()?;
    Ok(DnsIdentity::new(account, namespace, "steadfast", &trust_domain)?)
}

const LOOK_EVERY: Duration = Duration::from_millis(200);
