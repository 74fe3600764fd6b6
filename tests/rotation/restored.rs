//! Promise: a store that was put back from a copy of any phase is found out: nothing is issued,
//! metrics say so, traffic goes on, and `steadfast trust recover` makes one whole of what is stored
//! and what workloads hold.

use std::fs;
use std::path::PathBuf;

use http::StatusCode;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::AnchorState;
use steadfast_test_rig::metrics::{Metrics, get};
use steadfast_test_rig::{Mesh, MeshConfig, until};

use crate::support::{
    DEADLINE, Field, assert_idle, in_phase, over, phase, rotate, rotate_by_canaries,
    without_a_failed_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_store_put_back_to_before_or_the_beginning_of_a_rotation_is_recovered() {
    restored(&[None, Some(PhaseName::Generating)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_put_back_to_before_an_activation_is_recovered() {
    restored(&[Some(PhaseName::Staged), Some(PhaseName::Preparing)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_put_back_to_when_canaries_went_first_is_recovered() {
    restored(&[Some(PhaseName::Canary)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_put_back_to_after_an_activation_is_recovered() {
    use PhaseName::{Activated, Draining, Withdrawn};
    restored(&[Some(Activated), Some(Draining), Some(Withdrawn)]).await;
}

/// One rotation, with a copy of the store in each of these phases (`None`: before it). Each copy is
/// put back in turn, so that the later ones are older by a recovery, too.
async fn restored(phases: &[Option<PhaseName>]) {
    let mut field = Field::start(MeshConfig::rotating()).await;
    let load = field.load();
    let mesh = &mut field.mesh;
    without_a_failed_request(load, async {
        let mut copies = Vec::new();
        for phase in phases {
            match phase {
                None => copies.push(copy(mesh, "before")),
                Some(name) => {
                    // Without the keys of anchors none is made and no issuer signed: these two last.
                    let lasts = matches!(name, PhaseName::Generating | PhaseName::Preparing);
                    if *name == PhaseName::Preparing {
                        in_phase(mesh, PhaseName::Staged).await;
                    }
                    let _away = lasts.then(|| KeysAway::new(mesh));
                    if mesh.trust_domain().await.0.rotation.is_none() {
                        match name {
                            PhaseName::Canary => rotate_by_canaries(mesh).await,
                            _ => rotate(mesh).await,
                        }
                    }
                    in_phase(mesh, *name).await;
                    copies.push(copy(mesh, &format!("{name:?}")));
                }
            }
        }
        if mesh.trust_domain().await.0.rotation.is_none() {
            rotate(mesh).await;
        }
        let (mut before, _) = over(mesh, 1).await;
        for (phase, copy) in phases.iter().zip(copies) {
            before = put_back(mesh, *phase, &copy, &before).await;
        }
        assert_idle(mesh, &before).await;
    })
    .await;
}

/// The place of the anchors' keys is not there until this is dropped.
struct KeysAway(PathBuf);

impl KeysAway {
    fn new(mesh: &Mesh) -> Self {
        let keys = mesh.dir().join("keys/anchors");
        fs::rename(&keys, keys.with_extension("away")).expect("the keys are away");
        Self(keys)
    }
}

impl Drop for KeysAway {
    fn drop(&mut self) {
        fs::rename(self.0.with_extension("away"), &self.0).expect("the keys are back");
    }
}

/// Puts a copy of this phase back, and checks what follows; the state when all is well again.
async fn put_back(
    mesh: &mut Mesh,
    copied: Option<PhaseName>,
    copy: &PathBuf,
    before: &TrustDomainState,
) -> TrustDomainState {
    // 1. Back to it.
    mesh.store.kill();
    fs::copy(copy, store_file(mesh)).expect("the copy is put back");
    mesh.store.restart();
    // 2. It is found out: nothing is issued, and an alert would fire.
    let what = format!("{} is found out", copy.display());
    let halted = mesh.state_where(&what, DEADLINE, |state| state.halted.is_some()).await;
    assert_eq!(phase(&halted), copied, "{:?}", halted.rotation);
    for (name, admin) in
        [("steadfast_identity", mesh.identity_admin), ("steadfast_rotation", mesh.rotation_admin)]
    {
        tells_halted(name, admin, 1.0).await;
    }
    until("identity says that nothing is issued", DEADLINE, || async {
        let (status, reason) = get(mesh.identity_admin, "/ready").await?;
        let told = status != StatusCode::OK && reason.contains("SFT-ID-026");
        told.then_some(()).ok_or_else(|| format!("{status} {reason}"))
    })
    .await;
    // 3. One command.
    let (well, text) = mesh.command(&["trust", "recover", "--yes", "--timeout", "2m"]).await;
    assert!(well && text.contains("Healed"), "{text}");
    for (name, admin) in
        [("steadfast_identity", mesh.identity_admin), ("steadfast_rotation", mesh.rotation_admin)]
    {
        tells_halted(name, admin, 0.0).await;
    }
    let well = |state: &TrustDomainState| {
        let standby = state.in_state(AnchorState::Standby).next();
        state.rotation.is_none() && state.requested.is_none() && standby.is_some()
    };
    let state = mesh.state_where("there is a standby", DEADLINE, well).await;
    // 4. No number falls, and what was withdrawn stays so.
    assert!(state.seq > before.seq, "{} > {}", state.seq, before.seq);
    for id in &before.tombstones {
        assert!(state.tombstones.contains(id), "{id} is not among {:?}", state.tombstones);
        assert!(state.published().all(|anchor| anchor.id != *id), "{id} is believed again");
    }
    state
}

async fn tells_halted(name: &str, admin: std::net::SocketAddr, expected: f64) {
    until(&format!("{name}_halted is {expected}"), DEADLINE, || async {
        let value = Metrics::scrape(admin).await?.sum(&format!("{name}_halted"), &[]);
        (value == expected).then_some(()).ok_or_else(|| value.to_string())
    })
    .await;
}

/// A copy of the store's file, taken while nobody writes it.
pub(crate) fn copy(mesh: &Mesh, name: &str) -> PathBuf {
    let copy = mesh.dir().join(format!("copy-{name}.redb"));
    mesh.store.freeze();
    let copied = fs::copy(store_file(mesh), &copy);
    mesh.store.thaw();
    copied.expect("a copy");
    copy
}

pub(crate) fn store_file(mesh: &Mesh) -> PathBuf {
    mesh.dir().join("store/store.redb")
}
