//! Promise: a store that has lost everything is filled again from a backup, which holds no key and
//! is never overwritten: identity issues again, and nothing that was withdrawn since comes back.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use steadfast_test_rig::MeshConfig;

use crate::support::{Field, over, rotate};

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_store_is_recovered_from_a_backup_that_is_older() {
    let mut field = Field::start(MeshConfig::rotating()).await;
    let mesh = &mut field.mesh;
    let file = mesh.dir().join("backup.json");
    let backup = ["trust", "backup", file.to_str().expect("a path")].map(str::to_owned);
    let backup: Vec<&str> = backup.iter().map(String::as_str).collect();
    let (well, text) = mesh.command(&backup).await;
    assert!(well && text.contains("no private key"), "{text}");
    let (well, text) = mesh.command(&backup).await;
    assert!(!well && text.contains("never overwritten"), "{text}");
    assert_eq!(fs::metadata(&file).expect("a file").mode() & 0o777, 0o600);
    // What the backup knows is old by a whole rotation.
    rotate(mesh).await;
    let (before, _) = over(mesh, 1).await;

    mesh.store.kill();
    fs::remove_file(mesh.dir().join("store/store.redb")).expect("it is lost");
    mesh.store.restart();
    let (well, text) = mesh.command(&["trust", "recover", "--yes"]).await;
    assert!(!well && text.contains("--from"), "{text}");
    let from = ["trust", "recover", "--yes", "--timeout", "20s", "--from"].map(str::to_owned);
    let from = [&from[..], &[file.display().to_string()]].concat();
    let from: Vec<&str> = from.iter().map(String::as_str).collect();
    let (_, text) = mesh.command(&from).await;
    assert!(text.contains("identity issues again"), "{text}");
    // Its census waits for workloads that are other pods now: the store has lost those, too.
    let state = mesh.trust_domain().await.0;
    assert!(state.halted.is_none() && state.seq > before.seq, "{state:#?}");
    for id in &before.tombstones {
        assert!(state.tombstones.contains(id), "{id} is not among {:?}", state.tombstones);
        assert!(state.published().all(|anchor| anchor.id != *id), "{id} is believed again");
    }
    let issuer = state.active_issuer().expect("an issuer").anchor_id;
    assert!(state.published().any(|anchor| anchor.id == issuer), "nothing can be issued");
}
