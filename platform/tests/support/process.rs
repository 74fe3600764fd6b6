//! The real `steadfast-store`, started and killed by the tests.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use steadfast_platform::standalone::{Client, Directory};
use steadfast_platform::{Entry, Store as _};

/// A running store; killed when it is dropped.
pub struct StoreProcess(Child);

impl StoreProcess {
    pub fn start(directory: &Directory) -> Self {
        Self(command(directory.path(), ANY_PORT).stderr(Stdio::null()).spawn().unwrap())
    }

    /// With a log and an admin port that the test knows.
    #[allow(dead_code, reason = "not every test looks at them")]
    pub fn start_watched(directory: &Directory, admin: SocketAddr, log: File) -> Self {
        Self(command(directory.path(), &admin.to_string()).stderr(log).spawn().unwrap())
    }

    /// SIGTERM, and how it ended.
    #[allow(dead_code, reason = "not every test stops one in order")]
    pub fn stop(&mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.0.wait().unwrap()
    }

    /// SIGKILL: nothing of the process runs after this.
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for StoreProcess {
    fn drop(&mut self) {
        // It may be dead already, which is all that is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn command(directory: &Path, admin: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_steadfast-store"));
    command.arg("--dir").arg(directory).args(["--admin", admin]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Runs a store that is expected to end by itself: how, and what it said.
pub fn run_to_end(directory: &Path) -> (ExitStatus, String) {
    let output = command(directory, ANY_PORT).stderr(Stdio::piped()).output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Waits until the store answers.
pub async fn serving(client: &Client) {
    eventually("the store answers", async || client.get("trust/x").await.ok().map(drop)).await;
}

/// Waits for a level, under a deadline.
pub async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let seen = async {
        loop {
            if let Some(seen) = look().await {
                return seen;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    match tokio::time::timeout(DEADLINE, seen).await {
        Ok(seen) => seen,
        Err(_) => panic!("not within {DEADLINE:?}: {what}"),
    }
}

/// The JSON of a resource, if it is there.
pub async fn resource(client: &Client, key: &str) -> Option<serde_json::Value> {
    let entry: Option<Entry> = client.get(&format!("resources/{key}")).await.unwrap();
    entry.map(|entry| serde_json::from_slice(&entry.value).unwrap())
}

const ANY_PORT: &str = "127.0.0.1:0";
const LOOK_AGAIN: Duration = Duration::from_millis(2);
const DEADLINE: Duration = Duration::from_secs(30);
