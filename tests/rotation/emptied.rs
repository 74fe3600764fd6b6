//! Promise: a store that has lost everything is filled again from a backup, which holds no key and
//! is never overwritten: identity issues again, and nothing that was withdrawn since comes back.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use serde_json::Value;
use steadfast_test_rig::{Mesh, MeshConfig};

use crate::support::{Field, over, rotate};

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_store_is_recovered_from_a_backup_that_is_older() {
    let mut field = Field::start(MeshConfig::rotating()).await;
    let mesh = &mut field.mesh;
    let file = mesh.dir().join("backup.json").display().to_string();
    let backup = ["trust", "backup", &file];
    let (well, text) = mesh.command(&backup).await;
    assert!(well && text.contains("no private key"), "{text}");
    let (well, text) = mesh.command(&backup).await;
    assert!(!well && text.contains("never overwritten"), "{text}");
    assert_eq!(fs::metadata(&file).expect("a file").mode() & 0o777, 0o600);
    // What the backup knows is old by a whole rotation.
    rotate(mesh).await;
    let (before, _) = over(mesh, 1).await;

    lose_everything(mesh);
    let (well, text) = mesh.command(&["trust", "recover", "--yes"]).await;
    assert!(!well && text.contains("--from"), "{text}");
    let text = put_back(mesh, &file).await;
    assert!(text.contains("identity issues again"), "{text}");
    let state = mesh.trust_domain().await.0;
    assert!(state.halted.is_none() && state.seq > before.seq, "{state:#?}");
    for id in &before.tombstones {
        assert!(state.tombstones.contains(id), "{id} is not among {:?}", state.tombstones);
        assert!(state.published().all(|anchor| anchor.id != *id), "{id} is believed again");
    }
    let issuer = state.active_issuer().expect("an issuer").anchor_id;
    assert!(state.published().any(|anchor| anchor.id == issuer), "nothing can be issued");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_after_a_rotation_brings_its_history_back_and_what_it_was_left_on() {
    let mut field = Field::start(MeshConfig::rotating()).await;
    let mesh = &mut field.mesh;
    rotate(mesh).await;
    let (before, rotated) = over(mesh, 1).await;
    let number = rotated.number.to_string();
    let history = ["trust", "history", &number, "-o", "json"];
    let (well, told) = mesh.command(&history).await;
    assert!(well && verified(&told) > 0, "{told}");
    let file = mesh.dir().join("backup.json").display().to_string();
    let (well, text) = mesh.command(&["trust", "backup", &file]).await;
    assert!(well, "{text}");

    lose_everything(mesh);
    put_back(mesh, &file).await;
    let state = mesh.trust_domain().await.0;
    assert!(state.halted.is_none() && state.seq > before.seq, "{state:#?}");
    let (well, now) = mesh.command(&history).await;
    assert!(well && now == told, "{now}\nis not\n{told}");
}

/// The store has nothing any more.
fn lose_everything(mesh: &mut Mesh) {
    mesh.store.kill();
    fs::remove_file(mesh.dir().join("store/store.redb")).expect("it is lost");
    mesh.store.restart();
}

/// Recovers from a backup; what the command says. Its census waits for workloads that are other pods
/// now, since the store has lost those, too: it is not waited for.
async fn put_back(mesh: &Mesh, file: &str) -> String {
    mesh.command(&["trust", "recover", "--yes", "--timeout", "20s", "--from", file]).await.1
}

/// In how many phases of a rotation the evidence is the one that was relied on.
fn verified(history: &str) -> usize {
    let history: Value = serde_json::from_str(history).expect("it is JSON");
    let evidence = history["evidence"].as_array().expect("evidence for each phase");
    evidence.iter().filter(|found| found.get("verified").is_some()).count()
}
