//! `kubectl`, as the cluster's administrator.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::{DEADLINE, Parts};
use crate::process::Process;
use crate::wait::until;

/// Asks the API server of a cluster.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
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
        self.run(args, "")
    }

    /// Applies manifests.
    pub fn apply(&self, yaml: &str) {
        self.run(&["apply", "--filename", "-"], yaml)
            .unwrap_or_else(|error| panic!("kubectl apply: {error}\n{yaml}"));
    }

    /// Creates an object, and returns what became of it.
    pub fn create(&self, object: &Value) -> Value {
        let created =
            self.run(&["create", "--output=json", "--filename", "-"], &object.to_string());
        let created = created.unwrap_or_else(|error| panic!("kubectl create: {error}\n{object:#}"));
        serde_json::from_str(&created).expect("kubectl prints JSON")
    }

    /// Waits until `kubectl wait` is satisfied with these arguments.
    pub async fn wait_for(&self, args: &[&str]) {
        until(&format!("kubectl wait {args:?}"), DEADLINE, || async {
            let mut all = vec!["wait", "--timeout=1s"];
            all.extend(args);
            self.try_kubectl(&all)
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

    fn run(&self, args: &[&str], input: &str) -> Result<String, String> {
        let mut kubectl = Command::new(&self.program)
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
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }
}
