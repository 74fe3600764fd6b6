//! Landlock: the process shuts itself out of every file but its own.
//!
//! On a shared uid, mode 0600 protects nothing from another process of ours; and this process
//! talks to peers that nobody has authenticated. So it gives up, for good and while it has one
//! thread, every file access but to the issuers' keys and its log. An anchor's key is then out of
//! reach even for code that an attacker brings. (A unix socket is connected to, not opened, so the
//! store stays in reach.) A directory of keys that is deleted and made again is a new one, which
//! needs a restart.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, PathBeneath, PathFd, RestrictionStatus, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus,
};
use steadfast_platform::standalone::Directory;

/// How far the process is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// By every rule.
    Full,
    /// The kernel has no Landlock: by file modes alone.
    None,
    /// By the rules that this older kernel knows; those for opening files are among them.
    Partial,
}

/// Why the process could not be confined though the kernel can.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The kernel refused a rule.
    #[error("Landlock refused: {0}")]
    Landlock(String),
    /// Threads that no rule would bind.
    #[error("{0} threads run before the process is confined; Landlock would bind only one")]
    NotAlone(usize),
    /// The process could not start itself anew.
    #[error("cannot start again with one thread")]
    Restart(#[source] io::Error),
    /// Nobody knows how many threads there are.
    #[error("cannot count the threads of this process in {TASKS}")]
    Threads(#[source] io::Error),
}

/// Makes sure that the calling thread is the only one, since Landlock binds no other that is
/// there already. The allocator starts one of its own before `main`; so the process executes itself
/// once more, under the same pid, with that one turned off, and the allocator gives memory back
/// while it is used. `restarted` only says that this has been tried: with it, a second thread is an
/// error, so nobody gets past this by setting it.
///
/// # Errors
/// There are other threads, and a restart did not or cannot end them.
pub fn alone(restarted: bool) -> Result<(), ConfineError> {
    let threads = std::fs::read_dir(TASKS).map_err(ConfineError::Threads)?.count();
    match (threads, restarted) {
        (1, _) => Ok(()),
        (_, true) => Err(ConfineError::NotAlone(threads)),
        (_, false) => {
            let program = std::env::current_exe().map_err(ConfineError::Restart)?;
            let mut again = Command::new(program);
            again.arg(RESTARTED_FLAG).args(std::env::args_os().skip(1));
            // Comes back only if it fails.
            Err(ConfineError::Restart(again.env(ALLOCATOR_VARIABLE, ALLOCATOR_OPTIONS).exec()))
        }
    }
}

/// Confines the calling thread and every thread that it starts: the whole process, once [`alone`]
/// has found no other.
///
/// # Errors
/// A kernel with Landlock that refuses a rule.
pub fn confine(directory: Option<&Directory>, log: &Path) -> Result<Confinement, ConfineError> {
    let refused = |error: &dyn std::fmt::Display| ConfineError::Landlock(error.to_string());
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    // Keys of issuers are made, and destroyed.
    let keys = read | AccessFs::WriteFile | AccessFs::MakeReg | AccessFs::RemoveFile;
    let append =
        read | AccessFs::WriteFile | AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::Truncate;
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI_KNOWN))
        .and_then(Ruleset::create)
        .map_err(|error| refused(&error))?;
    let mut rules: Vec<(PathBuf, BitFlags<AccessFs>)> = vec![(log.to_owned(), append)];
    match directory {
        Some(directory) => rules.push((directory.issuer_keys(), keys)),
        None => rules.extend(KUBERNETES_FILES.map(|path| (path.into(), read))),
    }
    // How many cores the process may use is read from there; without it the machine's are taken.
    rules.extend(SYSTEM_FILES.map(|path| (path.into(), read)));
    for (path, access) in rules {
        // A machine without one of the system's directories needs no rule for it; our own were
        // made before.
        let Ok(path) = PathFd::new(&path) else { continue };
        ruleset =
            ruleset.add_rule(PathBeneath::new(path, access)).map_err(|error| refused(&error))?;
    }
    let RestrictionStatus { ruleset, .. } =
        ruleset.restrict_self().map_err(|error| refused(&error))?;
    Ok(match ruleset {
        RulesetStatus::FullyEnforced => Confinement::Full,
        RulesetStatus::PartiallyEnforced => Confinement::Partial,
        RulesetStatus::NotEnforced => Confinement::None,
    })
}

/// Says in one line how far the process is confined, and looks whether it is true. On Kubernetes
/// the keys of anchors are no files, and RBAC keeps them from us.
pub fn report(confinement: Confinement, directory: Option<&Directory>) {
    let Some(directory) = directory else {
        return tracing::info!(?confinement, "Landlock: nothing but the log and the pod's token");
    };
    let anchors = directory.anchor_keys();
    let reachable = std::fs::read_dir(&anchors).is_ok();
    let path = anchors.display();
    match (confinement, reachable) {
        (Confinement::None, _) => tracing::warn!(
            "not confined: this kernel has no Landlock, so the keys in {path} are kept from this \
             process by file permissions alone; give it a uid of its own"
        ),
        (_, true) => tracing::error!("confined by Landlock, and yet {path} can be read"),
        (Confinement::Full, false) => {
            tracing::info!("confined by Landlock to its own directories; {path} is out of reach");
        }
        (Confinement::Partial, false) => tracing::info!(
            "confined by Landlock as far as this kernel knows it; {path} is out of reach"
        ),
    }
}

/// What the rules are written for; a newer kernel's new rights are not handled, an older kernel
/// leaves out what it does not know.
const ABI_KNOWN: ABI = ABI::V5;
/// Says to the process that it has started itself anew.
pub const RESTARTED_FLAG: &str = "--restarted-with-one-thread";
/// Read by jemalloc before `main`, as tikv-jemallocator builds it.
const ALLOCATOR_VARIABLE: &str = "_RJEM_MALLOC_CONF";
/// Without its own thread; and large buffers begin with a page, not somewhere in it: of the 16 KiB
/// in which HTTP/2 writes, a connection uses the first few hundred bytes, which are then one page
/// and never two.
const ALLOCATOR_OPTIONS: &str = "background_thread:false,cache_oblivious:false";
/// One entry for each thread.
const TASKS: &str = "/proc/self/task";
/// Of a pod: what the API server is spoken to with, and how names are resolved.
const KUBERNETES_FILES: [&str; 2] = ["/var/run/secrets/kubernetes.io", "/etc"];
const SYSTEM_FILES: [&str; 2] = ["/proc/self", "/sys/fs/cgroup"];
