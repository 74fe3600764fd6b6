//! The process as its neighbours meet it: who may open what, and what a file that is no store does.

#![allow(clippy::unwrap_used)] // A test may fail by panicking.

mod support;

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;

use futures::StreamExt as _;
use steadfast_platform::standalone::{Client, Directory};
use steadfast_platform::store::Event;
use steadfast_platform::{Revision, Store as _, StoreError};
use support::process::{StoreProcess, eventually, run_to_end, serving};

fn directory() -> (tempfile::TempDir, Directory) {
    let dir = tempfile::tempdir().unwrap();
    let directory = Directory::new(dir.path().join("mesh"));
    (dir, directory)
}

/// A store that was started, written to and killed.
async fn used(directory: &Directory) {
    let mut store = StoreProcess::start(directory);
    let client = Client::new(directory);
    serving(&client).await;
    for index in 0..50 {
        let key = format!("trust/{index}");
        client.compare_and_swap(&key, None, Some("x".repeat(2000).into())).await.unwrap();
    }
    store.kill();
}

#[tokio::test]
async fn a_file_that_is_no_store_is_named_and_left_as_it_is() {
    let (_dir, directory) = directory();
    used(&directory).await;
    let file = directory.store_file();
    let good = std::fs::read(&file).unwrap();
    let foreign = {
        let path = directory.store().join("foreign.redb");
        let database = redb::Database::create(&path).unwrap();
        let write = database.begin_write().unwrap();
        let table = redb::TableDefinition::<&str, u64>::new("other");
        write.open_table(table).unwrap().insert("a", 1).unwrap();
        write.commit().unwrap();
        drop(database);
        std::fs::read(path).unwrap()
    };
    let mut zeroed = good.clone();
    zeroed[..512].fill(0);
    let mut scrambled = good.clone();
    scrambled[4096..].iter_mut().for_each(|byte| *byte ^= 0x5a);
    let cases: &[(&str, Vec<u8>)] = &[
        ("empty", Vec::new()),
        ("text", b"this is no database\n".to_vec()),
        ("cut in its header", good[..100].to_vec()),
        ("cut in the middle", good[..good.len() / 2].to_vec()),
        ("cut by one page", good[..good.len() - 4096].to_vec()),
        ("without its header", zeroed),
        ("scrambled", scrambled),
        ("of another program", foreign),
    ];
    for (what, bytes) in cases {
        std::fs::write(&file, bytes).unwrap();
        let (status, said) = run_to_end(directory.path());
        assert_eq!(status.code(), Some(1), "{what}: {said}");
        assert!(said.contains("SFT-STO-004") && said.contains("store.redb"), "{what}: {said}");
        assert!(std::fs::read(&file).unwrap() == *bytes, "{what}: the file was changed");
    }
    std::fs::write(&file, good).unwrap();
    let _store = StoreProcess::start(&directory);
    let client = Client::new(&directory);
    serving(&client).await;
    assert_eq!(client.list("trust/").await.unwrap().0.len(), 50);
}

#[tokio::test]
async fn a_second_store_on_the_same_directory_is_refused() {
    let (_dir, directory) = directory();
    let _store = StoreProcess::start(&directory);
    let client = Client::new(&directory);
    serving(&client).await;
    let (status, said) = run_to_end(directory.path());
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("another steadfast-store (pid "), "{said}");
    client.get("trust/x").await.unwrap();
}

#[tokio::test]
async fn a_socket_that_was_left_behind_is_taken_over_and_private() {
    let (_dir, directory) = directory();
    directory.create().unwrap();
    drop(UnixListener::bind(directory.socket()).unwrap());
    let _store = StoreProcess::start(&directory);
    serving(&Client::new(&directory)).await;
    assert_eq!(std::fs::metadata(directory.socket()).unwrap().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(directory.store_file()).unwrap().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(directory.token_key()).unwrap().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_store_that_is_asked_to_stop_takes_its_socket_with_it() {
    let (_dir, directory) = directory();
    let mut store = StoreProcess::start(&directory);
    serving(&Client::new(&directory)).await;
    assert!(directory.socket().exists());
    assert!(store.stop().success());
    assert!(!directory.socket().exists(), "the socket is left behind");
}

#[tokio::test]
async fn something_else_in_the_place_of_the_socket_is_not_removed() {
    let (_dir, directory) = directory();
    directory.create().unwrap();
    std::fs::write(directory.socket(), "precious").unwrap();
    let (status, said) = run_to_end(directory.path());
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("store.sock"), "{said}");
    assert_eq!(std::fs::read(directory.socket()).unwrap(), b"precious");
}

#[tokio::test]
async fn clients_write_under_trust_only() {
    let (_dir, directory) = directory();
    let _store = StoreProcess::start(&directory);
    let client = Client::new(&directory);
    serving(&client).await;
    for key in ["resources/Pod/demo/web", "tokens/jwks", "trusty", ""] {
        let denied = client.compare_and_swap(key, None, Some("x".into())).await;
        assert!(matches!(denied, Err(StoreError::Denied(_))), "{key:?}: {denied:?}");
    }
    let large = client.compare_and_swap("trust/a", None, Some(vec![0; (1 << 20) + 1].into())).await;
    assert!(matches!(large, Err(StoreError::Denied(_))), "{large:?}");
    let huge = client.compare_and_swap("trust/a", None, Some(vec![0; 8 << 20].into())).await;
    assert!(huge.is_err(), "{huge:?}");
    let largest = vec![0; 1 << 20];
    let revision = client.compare_and_swap("trust/a", None, Some(largest.into())).await.unwrap();
    let entry = client.get("trust/a").await.unwrap().unwrap();
    assert_eq!((entry.value.len(), entry.revision), (1 << 20, revision));
    let conflict = client.compare_and_swap("trust/a", None, None).await.unwrap_err();
    let expected =
        StoreError::Conflict { key: "trust/a".to_owned(), expected: None, actual: Some(revision) };
    assert_eq!(conflict, expected);
    assert!(client.clock_offset_millis().unwrap().abs() < 60_000);
}

#[tokio::test]
async fn a_watch_resumes_from_its_revision_after_a_restart() {
    let (_dir, directory) = directory();
    let mut store = StoreProcess::start(&directory);
    let client = Client::new(&directory);
    serving(&client).await;
    let from = client.list("").await.unwrap().1;
    let mut watch = client.watch("trust/", from).await.unwrap();
    assert!(matches!(watch.next().await, Some(Ok(Event::Synced(_)))));
    client.compare_and_swap("trust/a", None, Some("1".into())).await.unwrap();
    let Some(Ok(Event::Put(seen))) = watch.next().await else { panic!("no event") };
    client.compare_and_swap("trust/b", None, Some("2".into())).await.unwrap();
    store.kill();
    let broken = watch.skip_while(|event| std::future::ready(event.is_ok())).next().await;
    assert!(matches!(broken, Some(Err(StoreError::Unavailable(_)))), "{broken:?}");
    assert!(matches!(client.get("trust/a").await, Err(StoreError::Unavailable(_))));

    let _store = StoreProcess::start(&directory);
    serving(&client).await;
    let mut resumed = client.watch("trust/", seen.revision).await.unwrap();
    let Some(Ok(Event::Put(next))) = resumed.next().await else { panic!("no event") };
    assert_eq!(next.key, "trust/b");
    // A revision that this store has never had: it was put back from a backup, say.
    let mut future = client.watch("trust/", Revision(1_000_000)).await.unwrap();
    assert!(matches!(future.next().await, Some(Err(StoreError::Compacted(_)))));
}

#[tokio::test]
async fn a_file_that_is_removed_under_the_store_is_made_again_from_memory() {
    let (_dir, directory) = directory();
    let mut store = StoreProcess::start(&directory);
    let client = Client::new(&directory);
    serving(&client).await;
    client.compare_and_swap("trust/a", None, Some("1".into())).await.unwrap();
    std::fs::remove_file(directory.store_file()).unwrap();
    eventually("the store writes again", async || {
        client.compare_and_swap("trust/b", None, Some("2".into())).await.ok().map(drop)
    })
    .await;
    store.kill();
    let _store = StoreProcess::start(&directory);
    serving(&client).await;
    let (entries, _) = client.list("trust/").await.unwrap();
    assert_eq!(
        entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(),
        ["trust/a", "trust/b"]
    );
}
