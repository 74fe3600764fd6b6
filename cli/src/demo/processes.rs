//! The processes of the demo: started with a log file each, watched for a death that nobody asked
//! for, and stopped in the reverse order of who needs whom.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use futures::future::{pending, select_all};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout_at};

use super::guard;

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// For people, and the log's name.
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) layer: Layer,
}

/// What a process serves: those above are stopped before those below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    Store,
    Control,
    Workload,
}

/// All that run.
#[derive(Debug)]
pub(crate) struct Processes {
    own_program: PathBuf,
    log_dir: PathBuf,
    running: Vec<Running>,
}

#[derive(Debug)]
struct Running {
    spec: Spec,
    child: Child,
    log: PathBuf,
}

/// A process that ended though nobody asked it to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Death {
    pub(crate) name: String,
    how: String,
    last_lines: Vec<String>,
}

/// Why a process does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    #[error("cannot write the log {}", .0.display())]
    Log(PathBuf, #[source] io::Error),
    #[error("{0} does not start")]
    Start(String, #[source] io::Error),
}

impl Processes {
    /// None yet; their logs go into this directory.
    pub(crate) fn new(own_program: &Path, log_dir: PathBuf) -> Self {
        Self { own_program: own_program.to_owned(), log_dir, running: Vec::new() }
    }

    /// Starts one. It dies with this process, whatever kills it.
    ///
    /// # Errors
    /// It, or its log, cannot be made.
    pub(crate) fn start(&mut self, spec: Spec) -> Result<(), ProcessError> {
        let log = self.log_dir.join(format!("{}.log", spec.name));
        let failed = |error| ProcessError::Log(log.clone(), error);
        fs::create_dir_all(&self.log_dir).map_err(failed)?;
        let file = File::create(&log).map_err(failed)?;
        let both = file.try_clone().map_err(failed)?;
        let mut command = Command::from(guard::command(&self.own_program, &spec.program));
        command
            .args(&spec.args)
            .env_clear()
            .envs(inherited())
            .envs(spec.env.iter().map(|(name, value)| (name, value)))
            // A group of its own: a Ctrl-C is for the demo, which then stops all in their order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(both)
            .kill_on_drop(true);
        let child =
            command.spawn().map_err(|error| ProcessError::Start(spec.name.clone(), error))?;
        self.running.push(Running { spec, child, log });
        Ok(())
    }

    /// Waits until one of them ends. Dropping the wait loses nothing.
    pub(crate) async fn death(&mut self) -> Death {
        if self.running.is_empty() {
            return pending().await;
        }
        let waits = self.running.iter_mut().map(|running| {
            let Running { spec, child, log } = running;
            Box::pin(async { (spec.name.clone(), child.wait().await, log.clone()) })
        });
        let ((name, status, log), ..) = select_all(waits).await;
        Death { name, how: ended(status), last_lines: last_lines(&log) }
    }

    /// One that has ended already, if any has. Never waits.
    pub(crate) fn dead(&mut self) -> Option<Death> {
        self.running.iter_mut().find_map(|running| {
            let status = running.child.try_wait().transpose()?;
            let name = running.spec.name.clone();
            Some(Death { name, how: ended(status), last_lines: last_lines(&running.log) })
        })
    }

    /// Asks all to stop, layer by layer, and waits until they are gone; what does not go is killed.
    /// `hurry` ends the patience.
    pub(crate) async fn stop(&mut self, hurry: impl Future<Output = ()>) {
        let in_order = async {
            for layer in [Layer::Workload, Layer::Control, Layer::Store] {
                self.stop_layer(layer).await;
            }
        };
        tokio::select! { () = in_order => {} () = hurry => {} }
        for running in &mut self.running {
            // Whatever is gone cannot be killed: that is no error.
            let _ = running.child.start_kill();
        }
        for running in &mut self.running {
            let _ = running.child.wait().await;
        }
        self.running.clear();
    }

    async fn stop_layer(&mut self, layer: Layer) {
        let deadline = Instant::now() + STOP_DEADLINE;
        let of_layer = || |running: &&mut Running| running.spec.layer == layer;
        for running in self.running.iter_mut().filter(of_layer()) {
            // No id once it has ended and was waited for.
            let pid = running.child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
            if let Some(pid) = pid {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        for running in self.running.iter_mut().filter(of_layer()) {
            let _ = timeout_at(deadline, running.child.wait()).await;
        }
    }

    /// Each process with its id, for those who want to attach something.
    pub(crate) fn running(&self) -> impl Iterator<Item = (&Spec, Option<u32>)> {
        self.running.iter().map(|running| (&running.spec, running.child.id()))
    }
}

impl Death {
    /// Whether it ended because its port was taken: then others are worth a try.
    pub(crate) fn is_of_a_taken_port(&self) -> bool {
        let last = self.last_lines.join("\n").to_lowercase();
        PORT_TAKEN.iter().any(|text| last.contains(text))
    }
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.how)?;
        if self.last_lines.is_empty() {
            return write!(f, " and has logged nothing");
        }
        write!(f, "; the last lines of its log:")?;
        self.last_lines.iter().try_for_each(|line| write!(f, "\n    {line}"))
    }
}

fn ended(status: io::Result<ExitStatus>) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("has ended with exit code {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => format!("has ended: {status}"),
        },
        Err(error) => format!("cannot be watched any more ({error})"),
    }
}

fn last_lines(log: &Path) -> Vec<String> {
    let read = || {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES_READ)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let from = lines.len().saturating_sub(LOG_LINES_SHOWN);
    lines[from..].iter().map(|line| (*line).to_owned()).collect()
}

/// What a process of the demo takes over of our environment. The variables that configure a
/// sidecar are not among them: one that a user's shell has set must not change the demo.
fn inherited() -> impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)> {
    std::env::vars_os().filter(|(name, _)| INHERITED.iter().any(|taken| name == taken))
}

const INHERITED: [&str; 7] =
    ["HOME", "LANG", "LLVM_PROFILE_FILE", "PATH", "RUST_BACKTRACE", "STEADFAST_LOG", "TMPDIR"];
const PORT_TAKEN: [&str; 3] = ["address already in use", "address in use", "os error 98"];
const LOG_LINES_SHOWN: usize = 12;
const LOG_BYTES_READ: u64 = 16 * 1024;
/// A layer gets this long; the sidecars of the demo are told to drain for less.
const STOP_DEADLINE: Duration = Duration::from_secs(4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_names_the_process_how_it_ended_and_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("x.log");
        let lines: Vec<_> = (0..40).map(|n| format!("line {n}")).collect();
        fs::write(&log, lines.join("\n")).unwrap();
        let death = Death {
            name: "steadfast-store".to_owned(),
            how: "was killed by signal 9".to_owned(),
            last_lines: last_lines(&log),
        };
        let text = death.to_string();
        assert!(text.starts_with("steadfast-store was killed by signal 9; the last"), "{text}");
        assert!(text.contains("line 28") && text.ends_with("line 39"), "{text}");
        assert!(!text.contains("line 27"));
        assert!(!death.is_of_a_taken_port());
    }

    #[test]
    fn a_taken_port_is_recognised_and_an_empty_log_said() {
        let mut death =
            Death { name: "x".to_owned(), how: "has ended".to_owned(), last_lines: Vec::new() };
        assert!(death.to_string().ends_with("has logged nothing"));
        death.last_lines =
            vec!["bind 127.0.0.1:1: Address already in use (os error 98)".to_owned()];
        assert!(death.is_of_a_taken_port());
    }
}
