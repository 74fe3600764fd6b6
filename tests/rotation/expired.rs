//! Promise: when everything has expired (SVIDs, issuer and anchors), one command heals the mesh, and
//! no pod, token, identity or process is made anew: whether they slept meanwhile or were off.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use steadfast_api::UnixTime;
use steadfast_identity::authority::{Founding, ISSUER_LIFETIME, SKEW, make_anchor, make_issuer};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::trust_domain::AnchorState;
use steadfast_test_rig::load::Sender;
use steadfast_test_rig::mesh::{QUICK_LEASE, TRUST_DOMAIN};
use steadfast_test_rig::{MeshConfig, Process, until};

use crate::support::{DEADLINE, Field, assert_idle, in_state, now};

#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_in_which_everything_has_expired_is_healed_by_one_command() {
    healed(|process| process.freeze(), |process| process.thaw(), "SFT-TRU-001").await;
}

/// Nothing is left of what was in memory: bundles, tombstones, last views.
#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_that_was_off_until_everything_had_expired_is_healed_by_one_command() {
    healed(Process::kill, Process::restart, "the identity service has no valid SVID").await;
}

/// The mesh is away, one way or the other, until nothing that it has is valid any more; its sidecars
/// then say why they are not ready.
async fn healed(goes: impl Fn(&mut Process), comes: impl Fn(&mut Process), why: &str) {
    let founding = Arc::new(founding(now()));
    let ends = founding.active.not_after;
    let mut field =
        Field::start(MeshConfig { founding: Some(founding.clone()), ..MeshConfig::rotating() })
            .await;
    hello(&field).await.expect("all is well at first");
    let before = made(&field);
    let (was, revision) = field.mesh.trust_domain().await;

    // 1. The machine sleeps, until nothing that it has is valid any more.
    each(&mut field, goes);
    until("everything has expired", Duration::from_secs(240), || async {
        (now() > ends)
            .then_some(())
            .ok_or_else(|| format!("{} s are left", ends.since(now()).as_secs()))
    })
    .await;
    each(&mut field, comes);
    let running = processes(&field);

    // 2. It does not come back by itself, and says why.
    for pod in [&field.web, &field.api] {
        until("the sidecar says why", DEADLINE, || async {
            let reason = pod.unready(DEADLINE).await;
            if reason.contains(why) { Ok(()) } else { Err(reason) }
        })
        .await;
    }
    assert!(hello(&field).await.is_err());
    let (asked, text) = field.mesh.command(&["trust", "recover"]).await;
    assert!(!asked && text.contains("--yes"), "nobody has said yes: {text}");
    let (well, text) = field.mesh.command(&["trust", "recover", "--dry-run"]).await;
    assert!(
        well && text.contains("fresh anchor") && text.contains("Nothing was changed"),
        "{text}"
    );

    // 3. One command.
    let (well, text) = field.mesh.command(&["trust", "recover", "--yes", "--timeout", "2m"]).await;
    assert!(well && text.contains("Healed"), "{text}");
    until("requests go through", DEADLINE, || hello(&field)).await;
    for pod in [&field.web, &field.api] {
        pod.ready().await;
    }
    assert_eq!(made(&field), before, "nothing was made anew");
    assert_eq!(processes(&field), running, "nothing restarted");
    let standby = |state: &TrustDomainState| {
        let standby = state.in_state(AnchorState::Standby).next();
        state.rotation.is_none() && standby.is_some_and(|standby| standby.not_after > ends)
    };
    let state = field.mesh.state_where("there is a standby again", DEADLINE, standby).await;
    assert!(state.seq > was.seq, "{} > {}", state.seq, was.seq);
    for id in [founding.active.id, founding.standby.id] {
        assert!(state.tombstones.contains(&id), "{:?}", state.tombstones);
    }
    assert!(in_state(&state, AnchorState::Active).not_after > ends);
    assert_idle(&field.mesh, &state).await;

    // 4. A mesh that is well is left as it is.
    let (well, text) = field.mesh.command(&["trust", "recover", "--yes", "--timeout", "2m"]).await;
    assert!(well && text.contains("nothing to recover"), "{text}");
    assert!(field.mesh.trust_domain().await.1 > revision);
}

/// Two anchors that end soon, and nobody who replaces them: somebody has paused the rotations.
fn founding(now: UnixTime) -> Founding {
    let trust_domain = TRUST_DOMAIN.parse().expect("a trust domain");
    let anchor = || make_anchor(&trust_domain, now, LIFE).expect("an anchor");
    let (active, standby) = (anchor(), anchor());
    let issuer = make_issuer(&trust_domain, &active.der, &active.pkcs8, now, ISSUER_LIFETIME);
    let issuer = issuer.expect("an issuer");
    let anchors =
        vec![active.as_anchor(AnchorState::Active), standby.as_anchor(AnchorState::Standby)];
    let first = issuer.as_issuer(active.id);
    let founded = TrustDomainState::founded(trust_domain.clone(), anchors, first, now);
    let state = TrustDomainState { read_lease: QUICK_LEASE, paused: true, ..founded };
    Founding { state, active, standby, issuer }
}

/// What must not be made anew: pods' directories and tokens, which name their UIDs.
fn made(field: &Field) -> Vec<String> {
    let mut made = Vec::new();
    for pod in [&field.web, &field.api] {
        let dir = field.mesh.dir().join("pods/demo").join(format!("{}-0", pod.spec.name));
        let inode = fs::metadata(&dir).expect("its directory").ino();
        let token = fs::read_to_string(dir.join("token")).expect("its token");
        made.extend([inode.to_string(), token]);
    }
    made
}

/// By pid.
fn processes(field: &Field) -> Vec<u32> {
    let mesh = &field.mesh;
    let rotation = mesh.rotation.as_ref().expect("a controller");
    let of_mesh = [&mesh.store, &mesh.identity, &mesh.control, rotation];
    let sidecars = [&field.web.proxy, &field.api.proxy];
    of_mesh.into_iter().chain(sidecars).map(Process::pid).collect()
}

fn each(field: &mut Field, what: impl Fn(&mut Process)) {
    let mesh = &mut field.mesh;
    let rotation = mesh.rotation.as_mut().expect("a controller");
    let (web, api) = (&mut field.web.proxy, &mut field.api.proxy);
    for process in [web, api, rotation, &mut mesh.control, &mut mesh.identity, &mut mesh.store] {
        what(process);
    }
}

async fn hello(field: &Field) -> Result<(), String> {
    let mut sender = Sender::connect(field.web.outbound, false).await?;
    let authority = field.api.spec.authority(field.http.addr.port());
    let request = http::Request::get("/hello").header("host", authority);
    let request = request.body(http_body_util::Full::default()).map_err(|e| e.to_string())?;
    let (status, body) = sender.exchange(request).await?;
    (status == StatusCode::OK).then_some(()).ok_or_else(|| format!("{status} {body:?}"))
}

/// An SVID ends two minutes before its anchor: for the start there is most of another one.
const LIFE: Duration = Duration::from_secs(SKEW.as_secs() * 2 + 45);
