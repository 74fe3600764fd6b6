//! Whoever watches hears that the store lives, whatever is written elsewhere.

#![allow(clippy::unwrap_used)] // A test may fail by panicking.

mod support;

use std::time::Duration;

use futures::StreamExt as _;
use steadfast_platform::standalone::Engine;
use steadfast_platform::store::Event;
use steadfast_platform::{Revision, Store as _};
use steadfast_process::Drain;
use support::TestDisk;

#[tokio::test(start_paused = true)]
async fn writes_that_do_not_concern_a_watch_do_not_put_its_heartbeat_off() {
    let (engine, writer) = Engine::open_on(TestDisk::new(), Drain::new()).unwrap();
    let mut watch = engine.watch("resources/", Revision(0)).await.unwrap();
    let writes = async {
        let mut last = None;
        loop {
            let written = engine.compare_and_swap("trust/leader", last, Some("x".into())).await;
            last = Some(written.unwrap());
            tokio::time::sleep(WRITTEN_EVERY).await;
        }
    };
    let beats = async {
        for _ in 0..3 {
            let beat = tokio::time::timeout(BEAT_MAX, watch.next()).await;
            assert!(matches!(beat, Ok(Some(Ok(Event::Synced(_))))), "{beat:?}");
        }
    };
    tokio::select! {
        () = writes => unreachable!("it writes for ever"),
        () = beats => {}
        ended = writer => panic!("the writer ended first: {ended:?}"),
    }
}

/// As a leader confirms its lease.
const WRITTEN_EVERY: Duration = Duration::from_secs(2);
/// A client takes the store for dead after three times as long.
const BEAT_MAX: Duration = Duration::from_secs(6);
