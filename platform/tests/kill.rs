//! `kill -9` at any moment loses nothing that was acknowledged, and leaves no hole.
//!
//! The real binary is killed while several clients write, at moments that a seed spreads over the
//! sending of requests, over their answers and over the start of the process.

#![allow(clippy::unwrap_used)] // A test may fail by panicking.

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::StreamExt as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use steadfast_platform::standalone::{Client, Directory};
use steadfast_platform::store::Event;
use steadfast_platform::{Revision, Store as _, StoreError};
use support::process::{StoreProcess, eventually, serving};
use tokio::sync::watch;

/// One write: its key and its new value.
type Change = (String, Option<Bytes>);

/// What the clients were told, and what the store has shown.
#[derive(Default)]
struct Ledger {
    /// By revision, since the last verification.
    acknowledged: BTreeMap<u64, Change>,
    /// Everything up to this revision was seen in the history, without a hole.
    verified: Revision,
    /// What the history adds up to.
    state: BTreeMap<String, (Bytes, u64)>,
}

#[tokio::test]
async fn every_acknowledged_write_survives_kill_9_and_revisions_have_no_hole() {
    let dir = tempfile::tempdir().unwrap();
    let directory = Directory::new(dir.path().join("mesh"));
    // One client for all: it must find every new process by itself.
    let client = Client::new(&directory);
    let (mut rng, mut ledger) = (StdRng::seed_from_u64(SEED), Ledger::default());
    let mut acknowledged = 0;
    for round in 0..KILLS {
        if rng.random_bool(0.1) {
            kill_while_it_starts(&directory, &mut rng).await;
        }
        let mut store = StoreProcess::start(&directory);
        serving(&client).await;
        verify(&client, &mut ledger, round).await;
        let told = write_until_killed(&client, &mut store, rng.random(), round).await;
        acknowledged += told.len();
        for (revision, change) in told {
            let before = ledger.acknowledged.insert(revision, change);
            assert!(before.is_none(), "round {round}: revision {revision} was given twice");
        }
    }
    let _store = StoreProcess::start(&directory);
    serving(&client).await;
    verify(&client, &mut ledger, KILLS).await;
    assert!(acknowledged as u64 > KILLS * 5, "only {acknowledged} writes: nothing was tested");
}

/// The socket is there at some moment of the start; the seed decides how far it may get.
async fn kill_while_it_starts(directory: &Directory, rng: &mut StdRng) {
    let mut store = StoreProcess::start(directory);
    for _ in 0..rng.random_range(0..30) {
        if std::os::unix::net::UnixStream::connect(directory.socket()).is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    store.kill();
}

/// Several clients write; after so many requests were sent, the store is killed.
async fn write_until_killed(
    client: &Client,
    store: &mut StoreProcess,
    seed: u64,
    round: u64,
) -> Vec<(u64, Change)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let (sent, mut watch_sent) = watch::channel(0_u64);
    let sent = Arc::new(sent);
    let told = Arc::new(Mutex::new(Vec::new()));
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (client, sent, told) = (client.clone(), Arc::clone(&sent), Arc::clone(&told));
        let mut rng = StdRng::seed_from_u64(rng.random());
        writers.spawn(async move {
            for number in 0.. {
                let (key, value) = next_change(&mut rng, writer, round, number);
                let Ok(entry) = client.get(&key).await else { return };
                let expected = entry.as_ref().map(|entry| entry.revision);
                let value = match (value, expected) {
                    // To delete what is not there takes no revision.
                    (None, None) => continue,
                    (Some(NewValue::Increment), _) => Some(increment(entry.map(|e| e.value))),
                    (Some(NewValue::Fresh(value)), _) => Some(value),
                    (None, Some(_)) => None,
                };
                sent.send_modify(|sent| *sent += 1);
                match client.compare_and_swap(&key, expected, value.clone()).await {
                    Ok(revision) => told.lock().unwrap().push((revision.0, (key, value))),
                    Err(StoreError::Conflict { .. }) => {}
                    Err(StoreError::Unavailable(_)) => return,
                    Err(other) => panic!("{other}"),
                }
            }
        });
    }
    let limit = rng.random_range(1..REQUESTS_PER_ROUND_MAX);
    watch_sent.wait_for(|sent| *sent >= limit).await.unwrap();
    // Some kills at once, some a few answers later.
    let later = rng.random_range(0..3) + told.lock().unwrap().len();
    eventually("some answers", async || (told.lock().unwrap().len() >= later).then_some(())).await;
    store.kill();
    while let Some(ended) = writers.join_next().await {
        ended.unwrap();
    }
    std::mem::take(&mut *told.lock().unwrap())
}

enum NewValue {
    Fresh(Bytes),
    Increment,
}

fn next_change(
    rng: &mut StdRng,
    writer: u64,
    round: u64,
    number: u64,
) -> (String, Option<NewValue>) {
    static UNIQUE: AtomicU64 = AtomicU64::new(0);
    match rng.random_range(0..10) {
        0..3 => (format!("trust/counter/{writer}"), Some(NewValue::Increment)),
        3..5 => ("trust/counter/shared".to_owned(), Some(NewValue::Increment)),
        5 => (format!("trust/slot/{}", rng.random_range(0..5)), None),
        6..8 => {
            let value = format!("{}", UNIQUE.fetch_add(1, Ordering::Relaxed));
            let key = format!("trust/slot/{}", rng.random_range(0..5));
            (key, Some(NewValue::Fresh(value.into())))
        }
        _ => {
            let value = vec![0; rng.random_range(0..5000)];
            (format!("trust/new/{round}-{writer}-{number}"), Some(NewValue::Fresh(value.into())))
        }
    }
}

fn increment(value: Option<Bytes>) -> Bytes {
    let before: u64 =
        value.map_or(0, |value| std::str::from_utf8(&value).unwrap().parse().unwrap());
    (before + 1).to_string().into()
}

/// Reads the history since the last verification: it has no hole, it holds every acknowledged
/// write as it was acknowledged, and it adds up to what the store lists.
async fn verify(client: &Client, ledger: &mut Ledger, round: u64) {
    let (entries, revision) = client.list("").await.unwrap();
    let mut history = client.watch("", ledger.verified).await.unwrap();
    let mut next = ledger.verified.0 + 1;
    while next <= revision.0 {
        let (key, value, at) = match history.next().await.unwrap().unwrap() {
            Event::Put(entry) => (entry.key, Some(entry.value), entry.revision.0),
            Event::Deleted { key, revision } => (key, None, revision.0),
            Event::Synced(_) => continue,
        };
        assert_eq!(at, next, "round {round}: the revisions have a hole");
        next += 1;
        if let Some(expected) = ledger.acknowledged.remove(&at) {
            let found = (key.clone(), value.clone());
            assert_eq!(expected, found, "round {round}: revision {at} is another write");
        }
        match value {
            Some(value) => ledger.state.insert(key, (value, at)),
            None => ledger.state.remove(&key),
        };
    }
    let lost = &ledger.acknowledged;
    assert!(lost.is_empty(), "round {round}: acknowledged, and lost: {:?}", lost.keys());
    let found: BTreeMap<_, _> =
        entries.into_iter().map(|entry| (entry.key, (entry.value, entry.revision.0))).collect();
    assert!(found == ledger.state, "round {round}: the list is not what the history says");
    ledger.verified = revision;
}

const SEED: u64 = 20_261_121;
const KILLS: u64 = 200;
const WRITERS: u64 = 4;
const REQUESTS_PER_ROUND_MAX: u64 = 40;
