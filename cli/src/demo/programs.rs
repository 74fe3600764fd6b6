//! The other programs of Steadfast, which lie beside this one.

use std::path::{Path, PathBuf};

/// Where each program is.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    /// This one.
    pub(crate) own: PathBuf,
    pub(crate) store: PathBuf,
    pub(crate) identity: PathBuf,
    pub(crate) control: PathBuf,
    pub(crate) rotation: PathBuf,
    pub(crate) proxy: PathBuf,
}

/// Why they cannot be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramsError {
    #[error(
        "{} {} missing in {}, where `steadfast` itself is\n  Build all of them:  {build}",
        names.join(", "),
        if names.len() == 1 { "is" } else { "are" },
        dir.display()
    )]
    Missing { names: Vec<&'static str>, dir: PathBuf, build: &'static str },
    #[error("cannot find out where this program is")]
    Own(#[source] std::io::Error),
}

impl Programs {
    /// Finds them beside the running program.
    ///
    /// # Errors
    /// Those that are missing, all at once.
    pub(crate) fn find() -> Result<Self, ProgramsError> {
        Self::beside(std::env::current_exe().map_err(ProgramsError::Own)?)
    }

    fn beside(own: PathBuf) -> Result<Self, ProgramsError> {
        let dir = own.parent().unwrap_or_else(|| Path::new("/")).to_owned();
        let names = [
            "steadfast-store",
            "steadfast-identity",
            "steadfast-control",
            "steadfast-rotation",
            "steadfast-proxy",
        ];
        let missing: Vec<_> = names.into_iter().filter(|name| !dir.join(name).is_file()).collect();
        if !missing.is_empty() {
            // Cargo names the folder of its default profile otherwise than the profile.
            let debug = dir.file_name().is_some_and(|name| name == "debug");
            let build = if debug { "cargo build" } else { "cargo build --release" };
            return Err(ProgramsError::Missing { names: missing, dir, build });
        }
        let [store, identity, control, rotation, proxy] = names.map(|name| dir.join(name));
        Ok(Self { own, store, identity, control, rotation, proxy })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_program_is_named_with_the_command_that_builds_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("steadfast-store"), b"").unwrap();
        std::fs::write(dir.path().join("steadfast-proxy"), b"").unwrap();
        let error = Programs::beside(dir.path().join("steadfast")).unwrap_err().to_string();
        assert!(
            error.starts_with(
                "steadfast-identity, steadfast-control, steadfast-rotation are missing"
            ),
            "{error}"
        );
        assert!(error.contains("cargo build --release"), "{error}");
        let debug = dir.path().join("debug/steadfast");
        let error = Programs::beside(debug).unwrap_err().to_string();
        assert!(error.ends_with("cargo build"), "{error}");
    }
}
