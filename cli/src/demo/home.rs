//! The directory of a demo: one of its own, which goes with it, or one that the user keeps.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Child;

use steadfast_platform::keys::KeyStoreError;
use steadfast_platform::standalone::Directory;
use tempfile::TempDir;

use super::guard::{self, DIR_PREFIX};

/// The directory, and who removes it.
#[derive(Debug)]
pub(crate) struct Home {
    path: PathBuf,
    // Dropped before the janitor's pipe: it finds nothing to do.
    temporary: Option<(TempDir, Child)>,
}

/// Why there is no directory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HomeError {
    #[error("a store runs in {} already: is that another demo? Stop it, or use another --dir", .0.display())]
    Busy(PathBuf),
    #[error("the process that cleans up behind the demo does not start")]
    Janitor(#[source] std::io::Error),
    #[error(
        "the path {} is too long for a socket in it ({length} bytes, {SOCKET_PATH_BYTES_MAX} at \
         most); use a shorter --dir, or a shorter TMPDIR",
        path.display()
    )]
    Length { path: PathBuf, length: usize },
    #[error("cannot make {}", .0.display())]
    Make(PathBuf, #[source] std::io::Error),
    #[error(transparent)]
    Private(#[from] KeyStoreError),
    #[error("{} stays behind, with the keys of a mesh that has ended: remove it", .0.display())]
    Stays(PathBuf, #[source] std::io::Error),
}

/// What is left of a demo that has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// The directory that the user wanted kept.
    Files(PathBuf),
    /// Nothing.
    Nothing,
}

impl Home {
    /// The user's directory, or a new one that ends with the demo.
    ///
    /// # Errors
    /// One that cannot be made, or in which a mesh runs already.
    pub(crate) fn open(own_program: &Path, kept: Option<&Path>) -> Result<Self, HomeError> {
        let home = match kept {
            Some(path) => {
                Directory::new(path).create()?;
                let path = path.canonicalize().map_err(|e| HomeError::Make(path.to_owned(), e))?;
                Self { path, temporary: None }
            }
            None => Self::temporary(own_program)?,
        };
        let socket = home.directory().socket();
        let length = socket.as_os_str().len();
        if length > SOCKET_PATH_BYTES_MAX {
            return Err(HomeError::Length { path: home.path.clone(), length });
        }
        if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
            return Err(HomeError::Busy(home.path.clone()));
        }
        Ok(home)
    }

    fn temporary(own_program: &Path) -> Result<Self, HomeError> {
        let parent = std::env::temp_dir();
        let dir = tempfile::Builder::new().prefix(DIR_PREFIX).tempdir_in(&parent);
        let dir = dir.map_err(|error| HomeError::Make(parent, error))?;
        let path = dir.path().to_owned();
        let janitor = guard::janitor_command(own_program, &path).spawn();
        let janitor = janitor.map_err(HomeError::Janitor)?;
        Directory::new(&path).create()?;
        Ok(Self { path, temporary: Some((dir, janitor)) })
    }

    /// The directory as the processes know it.
    pub(crate) fn directory(&self) -> Directory {
        Directory::new(&self.path)
    }

    /// Whether it stays when the demo ends.
    pub(crate) fn is_kept(&self) -> bool {
        self.temporary.is_none()
    }
}

impl Home {
    /// Ends with the demo, all of whose processes have stopped: a directory that is kept has its
    /// socket removed, on which nobody listens any more, and one of our own goes.
    ///
    /// # Errors
    /// What could not be removed, by its path.
    pub(crate) fn close(mut self) -> Result<Left, HomeError> {
        let Some((dir, mut janitor)) = self.temporary.take() else {
            let socket = self.directory().socket();
            return match std::fs::remove_file(&socket) {
                // The store removes it itself, if it is given the time.
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    Err(HomeError::Stays(socket, error))
                }
                _ => Ok(Left::Files(self.path.clone())),
            };
        };
        // What fails here, the janitor tries once more; waiting closes its standard input first,
        // so it ends.
        let removed = dir.close();
        let _ = janitor.wait();
        match removed {
            Err(error) if self.path.exists() => Err(HomeError::Stays(self.path.clone(), error)),
            _ => Ok(Left::Nothing),
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Some((dir, mut janitor)) = self.temporary.take() {
            // A demo that could not begin: as in `close`, with nobody to tell.
            let _ = dir.close();
            let _ = janitor.wait();
        }
    }
}

/// `sockaddr_un` holds 108 bytes, the last of them zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_holds_no_socket_is_refused_by_its_length() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("d".repeat(100));
        let error = Home::open(Path::new("/nowhere"), Some(&long)).unwrap_err();
        assert!(matches!(error, HomeError::Length { .. }), "{error}");
    }

    #[test]
    fn what_stays_behind_is_named_and_never_called_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let kept = || Home::open(Path::new("/nowhere"), Some(dir.path())).unwrap();
        let path = dir.path().canonicalize().unwrap();
        assert_eq!(kept().close().unwrap(), Left::Files(path.clone()));
        // A directory is not removed as a socket is.
        let socket = Directory::new(&path).socket();
        std::fs::create_dir(&socket).unwrap();
        let error = kept().close().unwrap_err().to_string();
        assert!(error.contains(socket.to_str().unwrap()), "{error}");
    }

    #[test]
    fn a_directory_of_our_own_that_could_not_be_removed_is_named() {
        let janitor = || std::process::Command::new("true").spawn().unwrap();
        let home =
            |dir: TempDir| Home { path: dir.path().to_owned(), temporary: Some((dir, janitor())) };
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(home(dir).close().unwrap(), Left::Nothing);
        // Its path leads to a file now: what was asked to be removed is not what is there.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        std::fs::remove_dir(&path).unwrap();
        std::fs::write(&path, b"").unwrap();
        let error = home(dir).close().unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_directory_in_which_a_store_runs_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let socket = Directory::new(dir.path()).socket();
        let _store = std::os::unix::net::UnixListener::bind(socket).unwrap();
        let error = Home::open(Path::new("/nowhere"), Some(dir.path())).unwrap_err();
        assert!(matches!(error, HomeError::Busy(_)), "{error}");
        assert!(Directory::new(dir.path()).socket().exists(), "the other store's socket is gone");
    }
}
