//! The projected token: read again for each request, since it is renewed under our feet.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use steadfast_process::ErrorChain;

/// Why there is no token to send.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    /// The file is there and holds nothing.
    #[error("the token file {0} is empty: what projects it has not written it yet")]
    Empty(PathBuf),
    /// The file cannot be read.
    #[error("the token file {0} cannot be read: check that it is projected into the workload")]
    Read(PathBuf, #[source] std::io::Error),
    /// No token is so large.
    #[error("the token file {0} is larger than {TOKEN_BYTES_MAX} bytes: it holds no token")]
    TooLong(PathBuf),
}

/// The token in this file, without white space around it.
///
/// The read blocks: the file is a few hundred bytes in memory (a projected volume is a tmpfs), and
/// a thread for it would cost the sidecar more than the read.
///
/// # Errors
/// [`TokenError`].
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, TokenError> {
    let failed = |source| TokenError::Read(path.to_owned(), source);
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(TOKEN_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > TOKEN_BYTES_MAX {
        return Err(TokenError::TooLong(path.to_owned()));
    }
    match bytes.trim_ascii() {
        [] => Err(TokenError::Empty(path.to_owned())),
        token => Ok(token.to_vec()),
    }
}

/// Waits for the token of a workload that has just been made: what projects it may be a moment
/// behind. If it does not come, whoever asks for it next says what is wrong.
pub(crate) async fn projected(path: &Path) {
    let Err(error) = read(path) else { return };
    tracing::info!(reason = %ErrorChain(&error), "waiting for the token");
    let there = async {
        while read(path).is_err() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    // Over either way.
    let _ = tokio::time::timeout(PROJECTED_WITHIN, there).await;
}

/// The UID of the pod that the token says it is bound to. Nothing is verified: it only fills in
/// who we say we are, and the service compares it with what it has verified.
pub(crate) fn pod_uid(token: &[u8]) -> Option<String> {
    let payload = token.split(|&byte| byte == b'.').nth(1)?;
    let claims: serde_json::Value =
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()?;
    let uid = claims.get("kubernetes.io")?.get("pod")?.get("uid")?.as_str()?;
    Some(uid.to_owned())
}

const LOOK_AGAIN: Duration = Duration::from_millis(100);
const PROJECTED_WITHIN: Duration = Duration::from_secs(5);
const TOKEN_BYTES_MAX: u64 = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_uid_is_found_in_the_claims_and_garbage_has_none() {
        let claims = URL_SAFE_NO_PAD.encode(r#"{"kubernetes.io":{"pod":{"name":"a","uid":"u1"}}}"#);
        let token = format!("e30.{claims}.sig");
        assert_eq!(pod_uid(token.as_bytes()).as_deref(), Some("u1"));
        for garbage in ["", "a.b.c", "..", "e30.e30.", "no token"] {
            assert_eq!(pod_uid(garbage.as_bytes()), None, "{garbage:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_that_comes_a_moment_late_is_waited_for_but_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let started = tokio::time::Instant::now();
        projected(&path).await;
        assert_eq!(started.elapsed(), PROJECTED_WITHIN);
        let started = tokio::time::Instant::now();
        let write = async {
            tokio::task::yield_now().await;
            std::fs::write(&path, "abc").unwrap();
        };
        tokio::join!(projected(&path), write);
        assert_eq!(started.elapsed(), LOOK_AGAIN);
    }

    #[test]
    fn a_missing_an_empty_and_an_endless_file_each_say_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        assert!(matches!(read(&path), Err(TokenError::Read(..))));
        std::fs::write(&path, " \n").unwrap();
        assert!(matches!(read(&path), Err(TokenError::Empty(_))));
        assert!(matches!(read(Path::new("/dev/zero")), Err(TokenError::TooLong(_))));
        std::fs::write(&path, "abc\n").unwrap();
        assert_eq!(read(&path).unwrap(), b"abc");
    }
}
