//! `kubectl`, as the cluster's administrator.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::{DEADLINE, Parts};
use crate::process::{Process, free_port};
use crate::wait::until;

/// Asks the API server of a cluster.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

/// A `kubectl port-forward` that runs.
#[derive(Debug)]
pub struct Forward {
    /// Where it listens, a moment after it has started.
    pub addr: SocketAddr,
    kubectl: Child,
}

impl Drop for Forward {
    fn drop(&mut self) {
        // One that has ended by itself is gone already.
        let _ = self.kubectl.kill();
        let _ = self.kubectl.wait();
    }
}

impl Kubectl {
    pub(super) fn new(parts: &Parts, kubeconfig: PathBuf) -> Self {
        Self { program: parts.path("kubectl"), kubeconfig }
    }

    /// The file that tells a client on this machine how to reach the API server.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// What `kubectl` prints; panics with its error when it fails.
    pub fn kubectl(&self, args: &[&str]) -> String {
        self.try_kubectl(args).unwrap_or_else(|error| panic!("kubectl {args:?}: {error}"))
    }

    /// What `kubectl` prints, or its error.
    ///
    /// # Errors
    /// What it printed to its error output.
    pub fn try_kubectl(&self, args: &[&str]) -> Result<String, String> {
        self.run(args, "").map(|(printed, _)| printed)
    }

    /// Applies manifests, and returns the warnings that were heard.
    pub fn apply(&self, yaml: &str) -> String {
        let applied = self.run(&["apply", "--filename", "-"], yaml);
        applied.unwrap_or_else(|error| panic!("kubectl apply: {error}\n{yaml}")).1
    }

    /// Deletes what manifests name, and waits until it is gone.
    pub fn delete(&self, yaml: &str) {
        self.run(&["delete", "--timeout=60s", "--filename", "-"], yaml)
            .unwrap_or_else(|error| panic!("kubectl delete: {error}\n{yaml}"));
    }

    /// Creates an object, and returns what became of it.
    pub fn create(&self, object: &Value) -> Value {
        let created =
            self.run(&["create", "--output=json", "--filename", "-"], &object.to_string());
        let created = created.unwrap_or_else(|error| panic!("kubectl create: {error}\n{object:#}"));
        serde_json::from_str(&created.0).expect("kubectl prints JSON")
    }

    /// Leads a port of this machine to one of a pod, until the returned is dropped.
    pub fn forward(&self, pod: &[&str], port: u16) -> Forward {
        let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let kubectl = Command::new(&self.program)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("port-forward")
            .args(pod)
            .arg(format!("{}:{port}", addr.port()))
            .stdout(Stdio::null())
            .spawn()
            .expect("kubectl starts");
        Forward { addr, kubectl }
    }

    /// Waits until `kubectl wait` is satisfied with these arguments.
    pub async fn wait_for(&self, args: &[&str]) {
        until(&format!("kubectl wait {args:?}"), DEADLINE, || async {
            let mut all = vec!["wait", "--timeout=1s"];
            all.extend(args);
            self.try_kubectl(&all).map_err(|error| {
                let pods = self.try_kubectl(&["get", "pods", "--all-namespaces"]);
                format!("{error}\n{}", pods.unwrap_or_else(|error| error))
            })
        })
        .await;
    }

    /// Waits until this API server says that it is ready.
    pub async fn served(&self, api: &mut Process) {
        until("the API server is ready", DEADLINE, || {
            assert!(api.alive(), "the API server has ended");
            let ready = self.try_kubectl(&["get", "--raw", "/readyz"]);
            async move { ready.map(|_| ()) }
        })
        .await;
    }

    /// What it printed to its output and to its error output, or the latter alone.
    fn run(&self, args: &[&str], input: &str) -> Result<(String, String), String> {
        // One that never ends would outlive every deadline of a test.
        let mut kubectl = Command::new("timeout")
            .arg(LONGEST_S.to_string())
            .arg(&self.program)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        let stdin = kubectl.stdin.take().expect("it was asked for");
        // A kubectl that does not read has failed, and says why.
        let _ = { stdin }.write_all(input.as_bytes());
        let output = kubectl.wait_with_output().expect("kubectl runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (printed, mut said) = (text(&output.stdout), text(&output.stderr));
        if output.status.code() == Some(ENDED_BY_TIMEOUT) {
            said += &format!("kubectl {args:?} has not ended within {LONGEST_S} s");
        }
        if output.status.success() { Ok((printed, said)) } else { Err(said) }
    }
}

const LONGEST_S: u32 = 120;
/// The exit code of `timeout`.
const ENDED_BY_TIMEOUT: i32 = 124;
