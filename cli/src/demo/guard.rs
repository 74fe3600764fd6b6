//! Leaves nothing behind, however the demo ends.
//!
//! Every process of the demo is started through [`exec`], which asks the kernel to kill it when
//! the demo dies and then becomes the program: so even `kill -9` of the demo ends them all. A
//! janitor holds the other end of a pipe; when the demo is gone, it removes the directory that was
//! made for it. An orderly end stops the processes itself and leaves these two nothing to do.

use std::ffi::OsString;
use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use steadfast_process::{Clock as _, SystemClock};

/// Becomes another program that ends with the demo
#[derive(Debug, clap::Args)]
pub(crate) struct ExecArgs {
    /// The process that started this one
    #[arg(long)]
    parent: i32,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Removes the demo's directory once the demo is gone
#[derive(Debug, clap::Args)]
pub(crate) struct JanitorArgs {
    /// The directory
    #[arg(long)]
    dir: PathBuf,
}

/// Why a process of the demo does not run, or its directory is still there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuardError {
    #[error("cannot ask the kernel to end this process with the demo")]
    DeathSignal(#[source] rustix::io::Errno),
    #[error("{} does not start", .0.display())]
    Exec(PathBuf, #[source] std::io::Error),
    #[error("the demo ended before this process began")]
    Orphan,
    #[error("{} is not removed: it is no directory of the demo's own making", .0.display())]
    Strange(PathBuf),
    #[error("cannot remove {}", .0.display())]
    Remove(PathBuf, #[source] std::io::Error),
}

/// A command that will run `program` and die with this process. The kernel means the *thread* that
/// starts it, so it must be the main one: the demo's runtime has no other.
pub(crate) fn command(own_program: &Path, program: &Path) -> Command {
    let mut command = Command::new(own_program);
    command.args(["internal", "exec", "--parent"]).arg(std::process::id().to_string());
    command.arg("--").arg(program);
    command
}

/// Becomes the program.
///
/// # Errors
/// It does not return but with one.
pub(crate) fn exec(args: &ExecArgs) -> Result<(), GuardError> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(GuardError::DeathSignal)?;
    // The parent may have died before the line above: then nobody would ever send the signal.
    if getppid() != Pid::from_raw(args.parent) {
        return Err(GuardError::Orphan);
    }
    let [program, rest @ ..] = args.command.as_slice() else { return Err(GuardError::Orphan) };
    let error = Command::new(program).args(rest).exec();
    Err(GuardError::Exec(program.into(), error))
}

/// The command of a janitor for this directory: it waits until its standard input ends.
pub(crate) fn janitor_command(own_program: &Path, dir: &Path) -> Command {
    let mut command = Command::new(own_program);
    command.args(["internal", "janitor", "--dir"]).arg(dir);
    // A group of its own: a Ctrl-C or the end of the terminal is not for the janitor.
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Waits for the end of standard input, then removes the directory.
///
/// # Errors
/// A directory that is not the demo's, or that cannot be removed.
pub(crate) fn janitor(args: &JanitorArgs) -> Result<(), GuardError> {
    let name = args.dir.file_name().unwrap_or_default().to_string_lossy();
    if !name.starts_with(DIR_PREFIX) {
        return Err(GuardError::Strange(args.dir.clone()));
    }
    // Nothing is ever sent: whatever ends the read, the demo is gone.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    remove(&args.dir)
}

/// The processes of a demo that was killed die at about the same time as this begins: what they
/// still write while they do makes the removal fail, so it is tried until the deadline.
fn remove(dir: &Path) -> Result<(), GuardError> {
    let end = SystemClock.since_boot() + REMOVE_DEADLINE;
    loop {
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) if SystemClock.since_boot() > end => {
                return Err(GuardError::Remove(dir.to_owned(), error));
            }
            // Looked at once more: a process may have made a file in between.
            Ok(()) | Err(_) => std::thread::park_timeout(REMOVE_PAUSE),
        }
    }
}

/// How the directories begin that the demo makes for itself.
pub(crate) const DIR_PREFIX: &str = "steadfast-demo-";
const REMOVE_DEADLINE: Duration = Duration::from_secs(10);
const REMOVE_PAUSE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_janitor_touches_no_directory_but_the_demos_own() {
        let dir = tempfile::tempdir().unwrap();
        let args = JanitorArgs { dir: dir.path().to_owned() };
        assert!(matches!(janitor(&args), Err(GuardError::Strange(_))));
        assert!(dir.path().exists());
    }

    #[test]
    fn a_full_directory_is_removed_and_a_missing_one_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("steadfast-demo-x");
        std::fs::create_dir_all(inside.join("a/b")).unwrap();
        std::fs::write(inside.join("a/b/c"), b"x").unwrap();
        remove(&inside).unwrap();
        assert!(!inside.exists());
        remove(&inside).unwrap();
    }
}
