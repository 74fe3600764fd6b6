//! Namespaces without names: a process holds them open, and whatever runs in them ends with it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::process::{Process, Spec};

/// Which namespaces are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A network alone.
    Network,
    /// A machine: network, mounts, processes, name and IPC. Its processes all end with the first.
    Machine,
}

/// Namespaces that are held open.
#[derive(Debug)]
pub struct Namespaces {
    kind: Kind,
    holder: Process,
}

impl Namespaces {
    /// Makes them, and runs this script in them before anything else.
    pub async fn new(logs: &Path, name: &str, kind: Kind, script: &str) -> Self {
        // As the first process of a machine, bash reaps whatever loses its parent.
        let (kinds, hold): (&[&str], _) = match kind {
            Kind::Network => (&["--net"], "exec sleep infinity"),
            Kind::Machine => (&MACHINE, "sleep infinity & wait"),
        };
        let script = format!("set -e; ip link set lo up; {script}\necho held; {hold}");
        let command =
            ["unshare", "--fork", "--kill-child"].iter().chain(kinds).map(ToString::to_string);
        let command = command.chain(["bash".to_owned(), "-c".to_owned(), script]).collect();
        let holder =
            Process::start(logs, Spec { name: name.to_owned(), command, ..Spec::default() });
        holder.logged(&["held"], DEADLINE).await;
        Self { kind, holder }
    }

    /// What puts a program into them.
    pub fn entrance(&self) -> Vec<String> {
        entrance(self.pid(), self.kind)
    }

    /// Runs a script in them; panics with what it printed when it fails.
    pub fn run(&self, script: &str) -> String {
        let entrance = self.entrance();
        let output = Command::new(&entrance[0])
            .args(&entrance[1..])
            .args(["sh", "-ec", script])
            .output()
            .expect("nsenter runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{script}\n{}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Ties them to a bridge in the network of `fabric`, as `eth0`.
    pub fn plug_into(&self, fabric: &Self, port: &str) {
        fabric.run(&format!(
            "ip link add {port} type veth peer name eth0 netns {}; ip link set {port} master br0 up",
            self.pid()
        ));
        self.run("ip link set eth0 up");
    }

    /// The first process in them, as seen from outside.
    pub fn pid(&self) -> u32 {
        self.holder.pid()
    }

    /// Ends every process in them.
    pub fn end(&mut self) {
        self.holder.kill();
    }
}

/// What puts a program into the namespaces of this process.
pub fn entrance(pid: u32, kind: Kind) -> Vec<String> {
    let kinds: &[&str] = match kind {
        Kind::Network => &["--net"],
        Kind::Machine => &["--net", "--mount", "--uts", "--ipc", "--pid"],
    };
    let mut command = vec!["nsenter".to_owned(), format!("--target={pid}")];
    command.extend(kinds.iter().map(ToString::to_string));
    command
}

/// The first child of a process.
pub fn child_of(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

const MACHINE: [&str; 8] =
    ["--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc", "--propagation", "private"];
const DEADLINE: Duration = Duration::from_secs(20);
