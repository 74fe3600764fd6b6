//! Starts a planned mesh, in the order in which each needs the other, and waits for what it can
//! see: sockets, files, `/ready`, and at last an answer through the whole of it.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use steadfast_platform::names::NameError;
use steadfast_platform::standalone::Directory;
use steadfast_process::ErrorChain;
use tokio::time::{Instant, sleep};
use tokio_util::task::TaskTracker;

use super::load::Target;
use super::manifests;
use super::plan::{CONTROL_NAMESPACE, NAMESPACE, Plan, PlanError, Workload};
use super::processes::{Death, Layer, ProcessError, Processes, Spec};
use super::programs::Programs;
use super::progress::Progress;
use crate::admin;
use crate::commands::trust::init::{self, InitError};

/// Why the mesh did not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("{0}")]
    Died(Death),
    #[error(
        "{} is not the demo's own, and it would write its services there: give the file another \
         name, or use another --dir",
        .0.display()
    )]
    Foreign(PathBuf),
    #[error("cannot write {}", .0.display())]
    Manifest(PathBuf, #[source] io::Error),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("after {} s, {what}: {last}", deadline.as_secs())]
    NotInTime { what: String, deadline: Duration, last: String },
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Trust(#[from] InitError),
}

/// Starts a mesh.
pub(crate) struct Starter<'a> {
    pub(crate) plan: &'a mut Plan,
    pub(crate) directory: &'a Directory,
    pub(crate) read_lease: Duration,
    pub(crate) programs: &'a Programs,
    pub(crate) processes: &'a mut Processes,
    pub(crate) progress: Progress,
}

impl Starter<'_> {
    /// Starts everything and waits until a request gets through.
    ///
    /// # Errors
    /// What did not come up, and the last reason seen. What was started stays for the caller to
    /// stop.
    pub(crate) async fn start(mut self) -> Result<(), StartError> {
        let Self { directory, programs, progress, .. } = self;
        let own_control_plane = check_manifests(directory)?;
        let began = Instant::now();
        let reached = |what: &str, details: &str| progress.reached(what, began.elapsed(), details);

        self.processes.start(store(self.plan, directory, programs))?;
        self.store_answers().await?;
        reached("store", "keeps state, reads manifests, issues tokens");

        // A mesh that is there keeps its trust domain.
        let trust = init::run(directory.path(), None, self.read_lease).await?;
        self.plan.join(&trust.state.trust_domain)?;
        reached("trust", &trust.in_short());

        let plan = self.plan.clone();
        write_manifests(&plan, directory, own_control_plane)?;
        if !own_control_plane {
            progress.say(&format!("    {CONTROL_PLANE} is not the demo's own and stays as it is"));
        }
        self.start_control_plane(&plan, &reached).await?;
        self.start_workloads(&plan, &reached).await
    }

    async fn start_control_plane(
        &mut self,
        plan: &Plan,
        reached: impl Fn(&str, &str),
    ) -> Result<(), StartError> {
        let Self { directory, programs, .. } = *self;
        for workload in &plan.workloads {
            self.mounted(NAMESPACE, &workload.pod()).await?;
        }
        self.mounted(CONTROL_NAMESPACE, "steadfast-control-0").await?;
        self.processes.start(identity(plan, directory, programs))?;
        // Whoever finds no identity service tries again by itself: waiting for it only keeps the
        // logs free of that.
        self.ready("identity", plan.identity_admin).await?;
        reached("identity", &format!("issues SVIDs at {}", plan.identity));
        self.processes.start(control(plan, directory, programs))?;
        self.processes.start(rotation(plan, directory, programs))?;
        Ok(())
    }

    async fn start_workloads(
        &mut self,
        plan: &Plan,
        reached: impl Fn(&str, &str),
    ) -> Result<(), StartError> {
        let Self { directory, programs, .. } = *self;
        for (index, workload) in plan.workloads.iter().enumerate() {
            self.processes.start(application(plan, index, programs))?;
            self.processes.start(sidecar(plan, workload, directory, programs)?)?;
        }
        self.ready("control", plan.control_admin).await?;
        reached("control", &format!("discovery at {}", plan.control));
        self.ready("rotation", plan.rotation_admin).await?;
        reached("rotation", "rotates issuers and anchors");
        for workload in &plan.workloads {
            self.ready(&format!("the sidecar of {}", workload.name), workload.admin).await?;
            reached(&format!("{} and sidecar", workload.name), workload.spiffe_id.as_str());
        }
        self.first_answer().await?;
        let names: Vec<_> = plan.workloads.iter().map(|workload| workload.name).collect();
        reached("first request", &names.join(" → "));
        Ok(())
    }

    async fn store_answers(&mut self) -> Result<(), StartError> {
        let socket = self.directory.socket();
        self.until("the store serves no socket", || async {
            let connected = tokio::net::UnixStream::connect(&socket).await;
            connected.map(drop).map_err(|error| error.to_string())
        })
        .await
    }

    /// Waits until the store has projected a pod's token and bundle: as with a kubelet, no process
    /// of a pod starts before.
    async fn mounted(&mut self, namespace: &str, pod: &str) -> Result<(), StartError> {
        let mounted = self.directory.pod(namespace, pod)?;
        let what = format!("the store has not mounted token and bundle of {namespace}/{pod}");
        self.until(&what, || async {
            match [mounted.token(), mounted.bundle()].into_iter().find(|path| !path.exists()) {
                Some(missing) => Err(format!("{} is not there", missing.display())),
                None => Ok(()),
            }
        })
        .await
    }

    async fn ready(&mut self, name: &str, addr: SocketAddr) -> Result<(), StartError> {
        self.until(&format!("{name} is not ready"), || async {
            admin::ready(addr).await.map_err(|error| ErrorChain(&error).to_string())
        })
        .await
    }

    /// A request through all services, not part of the load: it is repeated until discovery knows
    /// them.
    async fn first_answer(&mut self) -> Result<(), StartError> {
        let Some(target) = Target::of(self.plan) else { return Ok(()) };
        let tasks = TaskTracker::new();
        self.until("no request gets through the mesh", || async {
            target.ask(&mut None, &tasks, 0).await.map_err(|error| error.to_string())
        })
        .await
    }

    /// Asks until it is so, a process has died, or the deadline is over.
    async fn until<F: Future<Output = Result<(), String>>>(
        &mut self,
        what: &str,
        mut ask: impl FnMut() -> F,
    ) -> Result<(), StartError> {
        let end = Instant::now() + DEADLINE;
        loop {
            let answer = ask().await;
            if let Some(death) = self.processes.dead() {
                return Err(StartError::Died(death));
            }
            match answer {
                Ok(()) => return Ok(()),
                Err(last) if Instant::now() >= end => {
                    let (what, deadline) = (what.to_owned(), DEADLINE);
                    return Err(StartError::NotInTime { what, deadline, last });
                }
                Err(_) => sleep(POLL).await,
            }
        }
    }
}

/// Where the environment of each process is written for those who want to attach something.
///
/// # Errors
/// The files cannot be written.
pub(crate) fn write_environments(
    directory: &Directory,
    processes: &Processes,
) -> Result<String, StartError> {
    let dir = directory.path().join("env");
    let mut all = String::new();
    fs::create_dir_all(&dir).map_err(|error| StartError::Manifest(dir.clone(), error))?;
    for (spec, pid) in processes.running() {
        let pid = pid.map_or_else(|| "ended".to_owned(), |pid| format!("pid {pid}"));
        let command = std::iter::once(spec.program.display().to_string()).chain(spec.args.clone());
        let mut text =
            format!("# {} ({pid}): {}\n", spec.name, command.collect::<Vec<_>>().join(" "));
        for (name, value) in &spec.env {
            text.push_str(&format!("export {name}='{}'\n", value.replace('\'', r"'\''")));
        }
        let path = dir.join(format!("{}.env", spec.name));
        fs::write(&path, &text).map_err(|error| StartError::Manifest(path.clone(), error))?;
        all.push_str(&text);
        all.push('\n');
    }
    Ok(all)
}

fn store(plan: &Plan, directory: &Directory, programs: &Programs) -> Spec {
    let args = [("--dir", shown(directory.path())), ("--admin", plan.store_admin.to_string())];
    ours("steadfast-store", &programs.store, Layer::Store, &args)
}

fn identity(plan: &Plan, directory: &Directory, programs: &Programs) -> Spec {
    let args = [
        ("--dir", shown(directory.path())),
        ("--listen", plan.identity.to_string()),
        ("--admin", plan.identity_admin.to_string()),
        ("--svid-ttl", format!("{}s", plan.svid_ttl.as_secs())),
    ];
    ours("steadfast-identity", &programs.identity, Layer::Control, &args)
}

fn control(plan: &Plan, directory: &Directory, programs: &Programs) -> Spec {
    let args = [
        ("--dir", shown(directory.path())),
        ("--listen", plan.control.to_string()),
        ("--admin", plan.control_admin.to_string()),
        ("--identity-addr", plan.identity.to_string()),
    ];
    ours("steadfast-control", &programs.control, Layer::Control, &args)
}

fn rotation(plan: &Plan, directory: &Directory, programs: &Programs) -> Spec {
    // SVIDs of half a minute need not be given ten to renew.
    let window = (plan.svid_ttl / 2).as_secs().max(1);
    let args = [
        ("--renew-window", format!("{window}s")),
        ("--emergency-renew-window", format!("{}s", window.min(5))),
        ("--dir", shown(directory.path())),
        ("--admin", plan.rotation_admin.to_string()),
        ("--identity-addr", plan.identity.to_string()),
    ];
    ours("steadfast-rotation", &programs.rotation, Layer::Control, &args)
}

fn application(plan: &Plan, index: usize, programs: &Programs) -> Spec {
    let workload = &plan.workloads[index];
    let listen = workload.application.to_string();
    let mut args = vec![("--name", workload.name.to_owned()), ("--listen", listen)];
    if let Some(next) = plan.workloads.get(index + 1) {
        args.push(("--next", next.authority()));
        args.push(("--via", workload.outbound.to_string()));
    }
    let mut spec = ours(&format!("{}-app", workload.name), &programs.own, Layer::Workload, &args);
    spec.args.splice(0..0, ["internal", "app"].map(str::to_owned));
    spec
}

fn sidecar(
    plan: &Plan,
    workload: &Workload,
    directory: &Directory,
    programs: &Programs,
) -> Result<Spec, StartError> {
    let mounted = directory.pod(NAMESPACE, &workload.pod())?;
    let of_control = |name: &str| {
        let domain = &plan.trust_domain;
        format!("{name}.{CONTROL_NAMESPACE}.serviceaccount.identity.{CONTROL_NAMESPACE}.{domain}")
    };
    let pod = format!("{{\"ns\":\"{NAMESPACE}\",\"pod\":\"{}\"}}", workload.pod());
    let env = [
        ("STEADFAST_PROXY_MODE", "explicit".to_owned()),
        ("STEADFAST_PROXY_BUNDLE_FILE", shown(&mounted.bundle())),
        ("LINKERD2_PROXY_IDENTITY_LOCAL_NAME", workload.dns_identity.to_string()),
        ("LINKERD2_PROXY_IDENTITY_TOKEN_FILE", shown(&mounted.token())),
        ("LINKERD2_PROXY_IDENTITY_SVC_ADDR", plan.identity.to_string()),
        ("LINKERD2_PROXY_IDENTITY_SVC_NAME", of_control("steadfast-identity")),
        ("LINKERD2_PROXY_DESTINATION_SVC_ADDR", plan.control.to_string()),
        ("LINKERD2_PROXY_DESTINATION_SVC_NAME", of_control("steadfast-control")),
        ("LINKERD2_PROXY_DESTINATION_CONTEXT", pod.clone()),
        ("LINKERD2_PROXY_POLICY_WORKLOAD", pod),
        ("LINKERD2_PROXY_INBOUND_LISTEN_ADDR", workload.inbound.to_string()),
        ("LINKERD2_PROXY_OUTBOUND_LISTEN_ADDR", workload.outbound.to_string()),
        ("LINKERD2_PROXY_ADMIN_LISTEN_ADDR", workload.admin.to_string()),
        ("LINKERD2_PROXY_INBOUND_PORTS", workload.application.port().to_string()),
        // Whoever has no identity of this mesh is not let in.
        ("LINKERD2_PROXY_INBOUND_DEFAULT_POLICY", "all-authenticated".to_owned()),
        ("LINKERD2_PROXY_SHUTDOWN_GRACE_PERIOD", GRACE.to_owned()),
    ];
    let mut spec = ours(&format!("{}-proxy", workload.name), &programs.proxy, Layer::Workload, &[]);
    spec.env = env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok(spec)
}

fn ours(name: &str, program: &Path, layer: Layer, args: &[(&str, String)]) -> Spec {
    let args = args.iter().flat_map(|(flag, value)| [(*flag).to_owned(), value.clone()]);
    Spec {
        name: name.to_owned(),
        program: program.to_owned(),
        args: args.collect(),
        env: Vec::new(),
        layer,
    }
}

/// Whether the manifest of the control plane is the demo's to write; a user's own stays as it is.
///
/// # Errors
/// A manifest of the services that is not the demo's own.
fn check_manifests(directory: &Directory) -> Result<bool, StartError> {
    let foreign = |name: &str| {
        let path = directory.manifests().join(name);
        manifests::is_foreign(&path).map_err(|error| StartError::Manifest(path, error))
    };
    if foreign(SERVICES)? {
        return Err(StartError::Foreign(directory.manifests().join(SERVICES)));
    }
    Ok(!foreign(CONTROL_PLANE)?)
}

/// Each file whole or not at all: the drafts lie outside the watched directory.
fn write_manifests(
    plan: &Plan,
    directory: &Directory,
    own_control_plane: bool,
) -> Result<(), StartError> {
    let control_plane = own_control_plane.then(|| (CONTROL_PLANE, manifests::control_plane(plan)));
    let services = (SERVICES, manifests::services(plan));
    for (name, text) in control_plane.into_iter().chain([services]) {
        let path = directory.manifests().join(name);
        let draft = directory.path().join(format!(".{name}.draft"));
        let written = fs::write(&draft, text).and_then(|()| fs::rename(&draft, &path));
        written.map_err(|error| StartError::Manifest(path, error))?;
    }
    Ok(())
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

const CONTROL_PLANE: &str = init::MANIFEST;
const SERVICES: &str = "demo.yaml";
/// A debug build on a loaded machine of two cores takes its time.
const DEADLINE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// For requests that are under way when the demo ends; the load has ended before.
const GRACE: &str = "1s";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_own_manifests_are_never_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path());
        directory.create().unwrap();
        let path = |name: &str| directory.manifests().join(name);
        let domain = "cluster.local".parse().unwrap();
        let plan = Plan::new(&domain, Duration::from_secs(30), 0).unwrap();
        // Nothing there: both are the demo's, and are so at its next start.
        assert!(check_manifests(&directory).unwrap());
        write_manifests(&plan, &directory, true).unwrap();
        assert!(check_manifests(&directory).unwrap());
        // A mesh that `trust init` made.
        let own = init::control_plane([9990, 9992, 9991]);
        fs::write(path(CONTROL_PLANE), &own).unwrap();
        assert!(!check_manifests(&directory).unwrap());
        write_manifests(&plan, &directory, false).unwrap();
        assert_eq!(fs::read_to_string(path(CONTROL_PLANE)).unwrap(), own);
        fs::write(path(SERVICES), "# mine\n").unwrap();
        let error = check_manifests(&directory).unwrap_err();
        assert!(matches!(&error, StartError::Foreign(file) if *file == path(SERVICES)), "{error}");
    }
}
