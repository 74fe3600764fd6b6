//! A full or broken disk takes nothing away but writing, and gives that back by itself.

#![allow(clippy::unwrap_used)] // A test may fail by panicking.

mod support;

use std::time::Duration;

use futures::StreamExt as _;
use steadfast_platform::standalone::Engine;
use steadfast_platform::store::Event;
use steadfast_platform::{Revision, Store as _, StoreError};
use steadfast_process::Drain;
use support::{Failure, TestDisk};

const FAILURES: [Failure; 4] = [Failure::Everything, Failure::Full, Failure::Sync, Failure::Write];

/// Runs a test beside the writer of a store on this disk.
async fn with_store<T>(disk: &TestDisk, test: impl AsyncFnOnce(&Engine) -> T) -> T {
    let drain = Drain::new();
    let (engine, writer) = Engine::open_on(disk.clone(), drain.clone()).unwrap();
    let work = async {
        let result = test(&engine).await;
        drain.start();
        result
    };
    let (ended, result) = tokio::join!(writer, work);
    ended.unwrap();
    result
}

async fn put(engine: &Engine, key: &str, value: &str) -> Result<Revision, StoreError> {
    let expected = engine.entry(key).map(|entry| entry.revision);
    engine.compare_and_swap(key, expected, Some(value.to_owned().into())).await
}

async fn value(engine: &Engine, key: &str) -> Option<String> {
    let entry = engine.get(key).await.unwrap()?;
    Some(String::from_utf8(entry.value.to_vec()).unwrap())
}

#[tokio::test]
async fn a_failing_disk_refuses_writes_and_goes_on_answering_reads() {
    for failure in FAILURES {
        let disk = TestDisk::new();
        with_store(&disk, async |engine| {
            put(engine, "trust/a", "1").await.unwrap();
            disk.fail(Some(failure));
            for _ in 0..3 {
                let refused = put(engine, "trust/a", "2").await.unwrap_err();
                assert!(matches!(refused, StoreError::WriteFailed(_)), "{failure:?}: {refused}");
                assert!(refused.to_string().contains("SFT-STO-002"), "{refused}");
                assert_eq!(value(engine, "trust/a").await.as_deref(), Some("1"));
                assert_eq!(engine.entries("").1, Revision(1));
            }
            assert!(engine.refusing().borrow().is_some());
            // A conflict is one whether or not the disk works.
            let conflict = engine.compare_and_swap("trust/a", None, None).await.unwrap_err();
            assert!(matches!(conflict, StoreError::Conflict { .. }), "{conflict}");

            disk.fail(None);
            assert_eq!(put(engine, "trust/a", "3").await, Ok(Revision(2)), "{failure:?}");
            assert!(engine.refusing().borrow().is_none());
        })
        .await;
        // Nothing of the refused writes has stayed, and nothing acknowledged is lost.
        with_store(&disk, async |engine| {
            assert_eq!(value(engine, "trust/a").await.as_deref(), Some("3"), "{failure:?}");
            let mut history = engine.watch("", Revision(0)).await.unwrap();
            for revision in 1..=2 {
                let event = history.next().await.unwrap().unwrap();
                assert!(matches!(event, Event::Put(entry) if entry.revision.0 == revision));
            }
            assert_eq!(history.next().await, Some(Ok(Event::Synced(Revision(2)))));
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_disk_with_room_again_is_written_again_without_being_asked() {
    let disk = TestDisk::new();
    with_store(&disk, async |engine| {
        disk.fail(Some(Failure::Full));
        put(engine, "trust/a", "1").await.unwrap_err();
        disk.fail(None);
        let mut refusing = engine.refusing();
        let healed = refusing.wait_for(Option::is_none);
        tokio::time::timeout(Duration::from_secs(60), healed).await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_store_that_starts_on_a_full_disk_answers_reads() {
    let disk = TestDisk::new();
    with_store(&disk, async |engine| {
        put(engine, "trust/a", "1").await.unwrap();
    })
    .await;
    disk.fail(Some(Failure::Full));
    with_store(&disk, async |engine| {
        assert_eq!(value(engine, "trust/a").await.as_deref(), Some("1"));
        assert!(engine.refusing().borrow().is_some());
        assert!(put(engine, "trust/a", "2").await.is_err());
        disk.fail(None);
        assert_eq!(put(engine, "trust/a", "2").await, Ok(Revision(2)));
    })
    .await;
}

#[tokio::test]
async fn many_waiting_writes_share_a_sync_and_each_is_acknowledged() {
    let disk = TestDisk::new();
    with_store(&disk, async |engine| {
        let before = disk.syncs();
        let keys: Vec<String> = (0..100).map(|index| format!("trust/{index}")).collect();
        let writes = keys.iter().map(|key| put(engine, key, "x"));
        let mut revisions: Vec<_> = futures::future::join_all(writes)
            .await
            .into_iter()
            .map(|revision| revision.unwrap().0)
            .collect();
        revisions.sort_unstable();
        assert_eq!(revisions, (1..=100).collect::<Vec<_>>());
        assert!(disk.syncs() - before < 50, "{} syncs", disk.syncs() - before);
    })
    .await;
}
