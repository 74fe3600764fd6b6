//! What the kubelet does elsewhere: each pod's token and bundle as files.
//!
//! The directory of every pod holds a token that is renewed at 80 % of its life, and a mirror of
//! the published bundle. Each is replaced in one step, so that a reader never sees half of one;
//! what others have changed is put right at the next look; and with its pod a directory goes.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use steadfast_api::UnixTime;
use steadfast_process::readiness::Component;
use steadfast_process::{Clock, Drain, ErrorChain};
use steadfast_rotation_protocol::trust_domain::TrustDomainState;

use super::directory::{Directory, PodDirectory};
use super::engine::{Engine, Value, Write};
use super::issuer::{Holder, Issuer, IssuerError};
use super::metrics::{Metrics, ResultLabels};
use crate::bundle_file::{self, BUNDLE_FILE};
use crate::keys::create_private_dir;
use crate::names::ObjectName;
use crate::names::{parse_resource_key, resource_key};
use crate::store::{Revision, StoreError, TOKEN_JWKS_KEY, TRUST_DOMAIN_KEY};
use crate::token::IDENTITY_AUDIENCE;

/// Keeps the pods' directories as the store says. A service of the process.
pub struct Projection {
    directory: Directory,
    engine: Engine,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    ready: Component,
    issuer: Arc<Issuer>,
    token_ttl: Duration,
    /// What follows from the store, and the revisions it follows from.
    wanted: Wanted,
    seen: Vec<(String, Revision)>,
    /// When the directories are looked at next though nothing has changed that matters here.
    due: Option<UnixTime>,
    /// What was said already, so that it is said once.
    said: BTreeMap<ObjectName, String>,
}

/// What every pod is to have.
#[derive(Clone, Default)]
struct Wanted {
    holders: Arc<Vec<Holder>>,
    /// Pods that get no token, and why: what they have is left as it is.
    without: BTreeMap<ObjectName, String>,
    bundle: Option<Arc<[u8]>>,
}

/// What one round over the directories has done.
#[derive(Default)]
struct Done {
    renewed: u64,
    failures: BTreeMap<ObjectName, String>,
    next: Option<UnixTime>,
}

impl Projection {
    /// The projection for a directory. `ready` objects until every pod has what it is to have.
    ///
    /// # Errors
    /// The issuer's key cannot be used.
    pub fn new(
        directory: Directory,
        engine: Engine,
        clock: Arc<dyn Clock>,
        token_ttl: Duration,
        ready: Component,
    ) -> Result<Self, IssuerError> {
        let issuer = Arc::new(Issuer::open(&directory.token_key())?);
        let (metrics, wanted) = (engine.metrics().clone(), Wanted::default());
        let (seen, due, said) = (Vec::new(), None, BTreeMap::new());
        Ok(Self {
            directory,
            engine,
            clock,
            metrics,
            ready,
            issuer,
            token_ttl,
            wanted,
            seen,
            due,
            said,
        })
    }

    /// Projects until the drain has begun.
    ///
    /// # Errors
    /// None: whatever fails is said, and tried again.
    pub async fn run(mut self, drain: Drain) -> Result<(), Infallible> {
        let mut revisions = self.engine.revisions();
        loop {
            revisions.borrow_and_update();
            let wait = self.round().await;
            tokio::select! {
                () = drain.wait() => return Ok(()),
                changed = revisions.changed() => if changed.is_err() { return Ok(()) },
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Puts everything right once; says when to look again.
    async fn round(&mut self) -> Duration {
        // 1. Nobody believes a token before the key is known.
        if let Err(error) = self.publish_key().await {
            let why = format!("the token issuer's key is not in the store: {error}");
            self.ready.not_ready(&why);
            return RETRY;
        }
        // 2. Who is to have what. Most writes to the store are about something else, and the files
        //    of ten thousand pods are not read for each of them.
        let (changed, now) = (self.refresh(), self.clock.now());
        if let Some(due) = self.due.filter(|due| !changed && now < *due && due.since(now) <= POLL) {
            return due.since(now);
        }
        self.due = None;
        // 3. The files.
        let (directory, issuer, wanted, ttl) =
            (self.directory.clone(), Arc::clone(&self.issuer), self.wanted.clone(), self.token_ttl);
        let work = move || project(&directory, &issuer, &wanted, ttl, now);
        let done = match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(error) => {
                tracing::error!(%error, "projecting tokens panicked; it is tried again");
                return RETRY;
            }
        };
        self.account(&done);
        let now = self.clock.now();
        let due = done.next.map_or(POLL, |next| next.since(now));
        let wait = if done.failures.is_empty() { due.clamp(WAIT_MIN, POLL) } else { RETRY };
        self.due = Some(now + wait);
        wait
    }

    async fn publish_key(&self) -> Result<(), StoreError> {
        let jwks = Bytes::copy_from_slice(self.issuer.jwks().as_bytes());
        let entry = self.engine.entry(TOKEN_JWKS_KEY);
        if entry.as_ref().is_some_and(|entry| entry.value == jwks) {
            return Ok(());
        }
        let (key, expected) = (TOKEN_JWKS_KEY.to_owned(), entry.map(|entry| entry.revision));
        let write = Write { key, expected, value: Some(Value::Fixed(jwks)) };
        self.engine.write(vec![write]).await.map(drop)
    }

    /// Reads the store, if anything has changed that matters here; says whether it has.
    fn refresh(&mut self) -> bool {
        let (pods, _) = self.engine.entries("resources/Pod/");
        let (accounts, _) = self.engine.entries("resources/ServiceAccount/");
        let domain = self.engine.entry(TRUST_DOMAIN_KEY);
        let all = pods.iter().chain(&accounts).chain(&domain);
        let seen: Vec<_> = all.map(|entry| (entry.key.clone(), entry.revision)).collect();
        if seen == self.seen && !seen.is_empty() {
            return false;
        }
        self.seen = seen;
        let account_uids: BTreeMap<String, String> = accounts
            .iter()
            .filter_map(|entry| {
                let account: ServiceAccount = serde_json::from_slice(&entry.value).ok()?;
                Some((entry.key.clone(), account.metadata.uid?))
            })
            .collect();
        let (mut holders, mut without) = (Vec::new(), BTreeMap::new());
        for entry in &pods {
            let Some((_, name)) = parse_resource_key(&entry.key) else { continue };
            let pod = serde_json::from_slice(&entry.value).map_err(|error| error.to_string());
            match pod.and_then(|pod| holder(&name, pod, &account_uids)) {
                Ok(holder) => holders.push(holder),
                Err(why) => drop(without.insert(name, why)),
            }
        }
        let bundle = domain.and_then(|entry| match bundle(&entry.value) {
            Ok(bundle) => Some(bundle),
            Err(error) => {
                tracing::error!(key = TRUST_DOMAIN_KEY, %error, "the trust domain gives no bundle; the pods keep theirs");
                self.wanted.bundle.clone()
            }
        });
        self.wanted = Wanted { holders: Arc::new(holders), without, bundle };
        true
    }

    /// Metrics, log lines and readiness of a round.
    fn account(&mut self, done: &Done) {
        let renewals = |result| self.metrics.token_renewals.get_or_create(&ResultLabels { result });
        renewals("ok").inc_by(done.renewed);
        renewals("error").inc_by(done.failures.len() as u64);
        let problems: BTreeMap<_, _> = self.wanted.without.iter().chain(&done.failures).collect();
        self.metrics.projection_failures.set(i64::try_from(problems.len()).unwrap_or(i64::MAX));
        for (pod, why) in &problems {
            if self.said.get(*pod) != Some(*why) {
                tracing::warn!(%pod, %why, "a pod has no fresh token or bundle");
            }
        }
        self.said = problems.into_iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        match done.failures.first_key_value() {
            None => self.ready.ready(),
            Some((pod, why)) => self.ready.not_ready(&format!("the pod {pod}: {why}")),
        }
    }
}

/// For whom the token of a pod is, or why it gets none: as on Kubernetes, a pod whose service
/// account is not there is nobody.
fn holder(
    name: &ObjectName,
    pod: Pod,
    account_uids: &BTreeMap<String, String>,
) -> Result<Holder, String> {
    let spec = pod.spec.ok_or("it has no spec")?;
    let service_account = spec.service_account_name.ok_or("it has no service account")?;
    let account = ObjectName::new(&name.namespace, &service_account);
    let service_account_uid = account_uids
        .get(&resource_key("ServiceAccount", &account))
        .ok_or_else(|| format!("the ServiceAccount {account} is not there; add its manifest"))?;
    Ok(Holder {
        pod: name.clone(),
        pod_uid: pod.metadata.uid.ok_or("it has no UID")?,
        service_account,
        service_account_uid: service_account_uid.clone(),
        node: spec.node_name,
    })
}

fn bundle(state: &[u8]) -> Result<Arc<[u8]>, String> {
    let state: TrustDomainState =
        serde_json::from_slice(state).map_err(|error| error.to_string())?;
    let mut files = bundle_file::files(&state)?;
    Ok(files.remove(BUNDLE_FILE).unwrap_or_default().into_bytes().into())
}

/// One round over all directories.
fn project(
    directory: &Directory,
    issuer: &Issuer,
    wanted: &Wanted,
    ttl: Duration,
    now: UnixTime,
) -> Done {
    let mut done = Done::default();
    for holder in wanted.holders.iter() {
        match project_one(directory, issuer, holder, wanted.bundle.as_deref(), ttl, now) {
            Ok((renewed, next)) => {
                done.renewed += u64::from(renewed);
                done.next = Some(done.next.map_or(next, |other: UnixTime| other.min(next)));
            }
            Err(why) => drop(done.failures.insert(holder.pod.clone(), why)),
        }
    }
    let pods = wanted.holders.iter().map(|holder| &holder.pod).chain(wanted.without.keys());
    let kept = pods.map(|pod| (pod.namespace.as_str(), pod.name.as_str())).collect();
    if let Err(error) = remove_others(&directory.pods(), &kept) {
        tracing::warn!(path = %directory.pods().display(), %error, "what is left of gone pods could not be removed; it is tried again");
    }
    done
}

/// Whether the token was renewed, and when it is to be renewed next.
fn project_one(
    directory: &Directory,
    issuer: &Issuer,
    holder: &Holder,
    bundle: Option<&[u8]>,
    ttl: Duration,
    now: UnixTime,
) -> Result<(bool, UnixTime), String> {
    let pod = directory
        .pod(&holder.pod.namespace, &holder.pod.name)
        .map_err(|error| error.to_string())?;
    create_private_dir(pod.path()).map_err(|error| ErrorChain(&error).to_string())?;
    if let Some(bundle) = bundle {
        keep(&pod, &pod.bundle(), bundle)?;
    }
    let found = read_private(&pod.token());
    let renew_at = found.and_then(|token| issuer.renew_at(&token, holder, IDENTITY_AUDIENCE));
    match renew_at {
        // A renewal further away than a life: the clock was set back, or the life made shorter.
        Some(at) if now < at && at.since(now) <= ttl => return Ok((false, at)),
        _ => {}
    }
    let id = uuid::Uuid::new_v4().to_string();
    let token = issuer
        .issue(holder, IDENTITY_AUDIENCE, now, ttl, id)
        .map_err(|error| format!("its token could not be signed: {error}"))?;
    replace(&pod, &pod.token(), token.as_bytes())?;
    Ok((true, now + ttl * 4 / 5))
}

/// Writes a file if it is not so already.
fn keep(pod: &PodDirectory, path: &Path, bytes: &[u8]) -> Result<(), String> {
    if read_private(path).as_deref() == Some(bytes) {
        return Ok(());
    }
    replace(pod, path, bytes)
}

/// A file that only its owner can use; any other is to be written anew.
fn read_private(path: &Path) -> Option<Vec<u8>> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    let good =
        metadata.is_file() && metadata.mode() & 0o077 == 0 && metadata.len() <= FILE_BYTES_MAX;
    good.then(|| std::fs::read(path).ok()).flatten()
}

/// Replaces a file in one step. What a power cut leaves of it is put right at the next start.
fn replace(pod: &PodDirectory, path: &Path, bytes: &[u8]) -> Result<(), String> {
    let draft = pod.path().join(".draft");
    let written = (|| {
        match std::fs::remove_file(&draft) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        let mut options = std::fs::File::options();
        let mut file = options.write(true).create_new(true).mode(0o600).open(&draft)?;
        io::Write::write_all(&mut file, bytes)?;
        std::fs::rename(&draft, path)
    })();
    written.map_err(|error| format!("{} could not be written: {error}", path.display()))
}

/// Removes the directories of pods that are no more.
fn remove_others(pods: &Path, kept: &BTreeSet<(&str, &str)>) -> io::Result<()> {
    for namespace in directories(pods)? {
        let path = pods.join(&namespace);
        for pod in directories(&path)? {
            if !kept.contains(&(namespace.as_str(), pod.as_str())) {
                std::fs::remove_dir_all(path.join(&pod))?;
            }
        }
        if !kept.iter().any(|(kept, _)| *kept == namespace) {
            // Not ours to remove if anything else is in it.
            let _ = std::fs::remove_dir(&path);
        }
    }
    Ok(())
}

fn directories(path: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir()
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// How often everything is looked at without a reason: what others have changed is put right.
const POLL: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_secs(2);
const WAIT_MIN: Duration = Duration::from_millis(100);

/// A bundle of a hundred anchors is some 150 KiB.
const FILE_BYTES_MAX: u64 = 4 << 20;

#[cfg(test)]
mod tests;
