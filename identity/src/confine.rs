//! Landlock: the process shuts itself out of every file but its own.
//!
//! On a shared uid, mode 0600 protects nothing from another process of ours; and this process
//! talks to peers that nobody has authenticated. So it gives up, for good and before it starts a
//! thread, every file access but to the issuers' keys and its log. An anchor's key is then out of
//! reach even for code that an attacker brings. (A unix socket is connected to, not opened, so the
//! store stays in reach.) A directory of keys that is deleted and made again is a new one, which
//! needs a restart.

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
}

/// Confines the calling thread and every thread that it starts. Call it before any other thread
/// is there.
///
/// # Errors
/// A kernel with Landlock that refuses a rule.
pub fn confine(directory: &Directory) -> Result<Confinement, ConfineError> {
    let refused = |error: &dyn std::fmt::Display| ConfineError::Landlock(error.to_string());
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let append =
        read | AccessFs::WriteFile | AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::Truncate;
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI_KNOWN))
        .and_then(Ruleset::create)
        .map_err(|error| refused(&error))?;
    let mut rules: Vec<(std::path::PathBuf, BitFlags<AccessFs>)> =
        vec![(directory.issuer_keys(), read), (directory.log(), append)];
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

/// Says in one line how far the process is confined, and looks whether it is true.
pub fn report(confinement: Confinement, directory: &Directory) {
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
const SYSTEM_FILES: [&str; 2] = ["/proc/self", "/sys/fs/cgroup"];
