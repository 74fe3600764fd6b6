//! What the client of the store says when there is no store.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

use std::os::unix::net::UnixListener;

use steadfast_platform::Store as _;
use steadfast_platform::standalone::{Client, Directory};

#[tokio::test]
async fn where_nothing_listens_the_command_that_does_is_named_once() {
    let dir = tempfile::tempdir().unwrap();
    let directory = Directory::new(dir.path());
    directory.create().unwrap();
    let client = Client::new(&directory);
    let expected = format!(
        "the store is unavailable: {}: nothing listens there: start steadfast-store --dir {}",
        directory.socket().display(),
        dir.path().display()
    );
    assert_eq!(client.get("key").await.unwrap_err().to_string(), expected);
    // A socket that a killed store left behind.
    drop(UnixListener::bind(directory.socket()).unwrap());
    assert_eq!(client.get("key").await.unwrap_err().to_string(), expected);
}
