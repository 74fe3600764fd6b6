//! Landlock: what the identity service may still open once it is confined.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

use std::fs;
use std::io::ErrorKind;

use steadfast_api::KeyId;
use steadfast_identity::confine::{Confinement, confine};
use steadfast_platform::keys::{FileKeys, KeyStore as _, Zeroizing};
use steadfast_platform::standalone::Directory;

/// A confined thread stays confined and so do the threads it starts; the test's others do not.
#[test]
fn a_confined_process_reaches_its_own_files_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let directory = Directory::new(dir.path());
    directory.create().unwrap();
    let anchor = directory.anchor_keys().join("a.key");
    let issuer = directory.issuer_keys().join("i.key");
    fs::write(&anchor, "anchor").unwrap();
    fs::write(&issuer, "issuer").unwrap();
    fs::write(directory.store_file(), "store").unwrap();
    let link = directory.issuer_keys().join("link.key");
    std::os::unix::fs::symlink(&anchor, &link).unwrap();
    let confined = std::thread::spawn(move || {
        if confine(Some(&directory), &directory.log()).unwrap() == Confinement::None {
            eprintln!("this kernel has no Landlock: nothing to test");
            return;
        }
        let inner = std::thread::spawn(move || {
            let denied = |result: std::io::Result<()>| {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
            };
            denied(fs::read(&anchor).map(drop));
            denied(fs::read_dir(directory.anchor_keys()).map(drop));
            // Nor by a link in a directory that it may read, nor by moving the file there.
            denied(fs::read(&link).map(drop));
            assert!(fs::hard_link(&anchor, directory.log().join("stolen")).is_err());
            assert!(fs::rename(&anchor, directory.log().join("stolen")).is_err());
            denied(fs::read(directory.store_file()).map(drop));
            denied(fs::read("/etc/passwd").map(drop));
            denied(fs::create_dir(directory.issuer_keys().join("new")));
            assert!(fs::hard_link(&anchor, directory.issuer_keys().join("stolen.key")).is_err());
            assert_eq!(fs::read(&issuer).unwrap(), b"issuer");
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let keys = FileKeys::open(directory.issuer_keys()).unwrap();
                let id = KeyId::of_spki(b"a new issuer");
                keys.put_new(id, Zeroizing::new(b"new".to_vec())).await.unwrap();
                assert_eq!(*keys.load(id).await.unwrap(), b"new");
                assert_eq!(keys.list().await.unwrap(), [id]);
                keys.destroy(id).await.unwrap();
                assert!(keys.list().await.unwrap().is_empty());
            });
            let log = directory.log().join("issuance.jsonl");
            fs::write(&log, "line").unwrap();
            fs::rename(&log, directory.log().join("issuance.jsonl.1")).unwrap();
            fs::remove_file(directory.log().join("issuance.jsonl.1")).unwrap();
        });
        inner.join().unwrap();
    });
    confined.join().unwrap();
    assert_eq!(fs::read(dir.path().join("keys/anchors/a.key")).unwrap(), b"anchor");
}
