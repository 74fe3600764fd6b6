//! A power cut at any operation loses nothing that was acknowledged.
//!
//! The page cache survives a kill, so killing processes proves little about syncing. Here the disk
//! itself forgets: of what was not synced, any subset of sectors is gone.

#![allow(clippy::unwrap_used)] // A test may fail by panicking.

mod support;

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::StreamExt as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use steadfast_platform::standalone::Engine;
use steadfast_platform::standalone::engine::{Value, Write};
use steadfast_platform::{Revision, Store as _, StoreError, store::Event};
use steadfast_process::Drain;
use support::TestDisk;

/// What the store has acknowledged: by revision, the key and its new value.
type Acknowledged = BTreeMap<u64, (String, Option<Bytes>)>;

#[tokio::test]
async fn every_acknowledged_write_survives_power_cuts_and_revisions_have_no_hole() {
    for seed in 0..SEEDS {
        let mut rng = StdRng::seed_from_u64(seed);
        let (disk, mut acknowledged) = (TestDisk::new(), Acknowledged::new());
        for cut in 0..CUTS_PER_SEED {
            let context = format!("seed {seed}, cut {cut}");
            disk.cut_after(rng.random_range(0..OPERATIONS_MAX));
            write_until_cut(&disk, &mut rng, &mut acknowledged).await;
            disk.power_on(&mut rng);
            verify(&disk, &acknowledged, &context).await;
        }
        // Without any, there would have been nothing to lose.
        let count = acknowledged.len();
        assert!(count >= ACKNOWLEDGED_MIN, "seed {seed}: only {count} writes were acknowledged");
    }
}

async fn write_until_cut(disk: &TestDisk, rng: &mut StdRng, acknowledged: &mut Acknowledged) {
    let drain = Drain::new();
    // The power may go while the store is opened.
    let Ok((engine, writer)) = Engine::open_on(disk.clone(), drain.clone()) else { return };
    let writes = async {
        while !disk.is_cut() {
            let group = futures::future::join_all((0..rng.random_range(1..4)).map(|_| {
                let writes = random_writes(rng, &engine);
                let told = writes.iter().map(told).collect::<Vec<_>>();
                let engine = &engine;
                async move { (told, engine.write(writes).await) }
            }));
            for (told, reply) in group.await {
                match reply {
                    Ok(revisions) => {
                        assert_eq!(told.len(), revisions.len());
                        acknowledged.extend(revisions.into_iter().map(|r| r.0).zip(told));
                    }
                    Err(StoreError::Conflict { .. } | StoreError::WriteFailed(_)) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        }
        drain.start();
    };
    let (ended, ()) = tokio::join!(writer, writes);
    ended.unwrap();
}

fn random_writes(rng: &mut StdRng, engine: &Engine) -> Vec<Write> {
    let first = rng.random_range(0..KEYS);
    let count = rng.random_range(1..4);
    let keys = (first..first + count).map(|index| format!("trust/{index}"));
    keys.map(|key| {
        let expected = engine.entry(&key).map(|entry| entry.revision);
        let size = if rng.random_bool(0.1) { 20_000 } else { 50 };
        let bytes: Vec<u8> = (0..rng.random_range(0..size)).map(|_| rng.random()).collect();
        // To delete what is not there would take no revision.
        let value =
            (expected.is_none() || rng.random_bool(0.8)).then(|| Value::Fixed(bytes.into()));
        Write { key, expected, value }
    })
    .collect()
}

fn told(write: &Write) -> (String, Option<Bytes>) {
    let value = write.value.as_ref().map(|value| match value {
        Value::Fixed(bytes) => bytes.clone(),
        Value::Versioned(_) => panic!("not written here"),
    });
    (write.key.clone(), value)
}

/// The store opens; what it holds is what its history says, and every acknowledged write is there.
async fn verify(disk: &TestDisk, acknowledged: &Acknowledged, context: &str) {
    let drain = Drain::new();
    let (engine, writer) = Engine::open_on(disk.clone(), drain.clone())
        .unwrap_or_else(|error| panic!("{context}: {error}"));
    let (entries, revision) = engine.entries("");
    let mut history = engine.watch("", Revision(0)).await.unwrap();
    let (mut next, mut state) = (1, BTreeMap::new());
    loop {
        let (key, value, at) = match history.next().await.unwrap().unwrap() {
            Event::Put(entry) => (entry.key, Some(entry.value), entry.revision.0),
            Event::Deleted { key, revision } => (key, None, revision.0),
            Event::Synced(at) => break assert_eq!(at, revision, "{context}"),
        };
        assert_eq!(at, next, "{context}: the revisions have a hole");
        next += 1;
        if let Some(expected) = acknowledged.get(&at) {
            let found = (key.clone(), value.clone());
            assert_eq!(expected, &found, "{context}: revision {at} is not what was acknowledged");
        }
        match value {
            Some(value) => state.insert(key, (value, at)),
            None => state.remove(&key),
        };
    }
    let last = acknowledged.keys().last().copied().unwrap_or(0);
    assert!(last <= revision.0, "{context}: {last} was acknowledged, {revision:?} is there");
    let found: BTreeMap<_, _> =
        entries.into_iter().map(|entry| (entry.key, (entry.value, entry.revision.0))).collect();
    assert_eq!(found, state, "{context}: the entries are not what the history says");
    drain.start();
    writer.await.unwrap();
}

const SEEDS: u64 = 30;
const CUTS_PER_SEED: u64 = 6;
const OPERATIONS_MAX: u64 = 400;
const KEYS: u32 = 12;
const ACKNOWLEDGED_MIN: usize = 20;
