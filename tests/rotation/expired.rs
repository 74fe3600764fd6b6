//! Promise: when everything has expired (SVIDs, issuer and anchors), one command heals the mesh, and
//! no pod, token, identity or process is made anew.

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
use steadfast_test_rig::{MeshConfig, until};

use crate::support::{DEADLINE, Field, assert_idle, in_state};

#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_in_which_everything_has_expired_is_healed_by_one_command() {
    let founding = Arc::new(founding(now()));
    let ends = founding.active.not_after;
    let mut field =
        Field::start(MeshConfig { founding: Some(founding.clone()), ..MeshConfig::rotating() })
            .await;
    hello(&field).await.expect("all is well at first");
    let before = made(&field);
    let (was, revision) = field.mesh.trust_domain().await;

    // 1. The machine sleeps, until nothing that it has is valid any more.
    each(&mut field, |process| process.freeze());
    until("everything has expired", Duration::from_secs(240), || async {
        (now() > ends)
            .then_some(())
            .ok_or_else(|| format!("{} s are left", ends.since(now()).as_secs()))
    })
    .await;
    each(&mut field, |process| process.thaw());

    // 2. It does not come back by itself, and says why.
    for pod in [&field.web, &field.api] {
        let reason = pod.unready(DEADLINE).await;
        assert!(reason.contains("SFT-TRU-001"), "{reason}");
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
    assert_eq!(made(&field), before, "nothing was made anew, and nothing restarted");
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

/// What must not be made anew: processes, pods' directories, their tokens and UIDs.
fn made(field: &Field) -> Vec<String> {
    let mesh = &field.mesh;
    let pid = |process: &steadfast_test_rig::Process| process.pid().to_string();
    let rotation = mesh.rotation.as_ref().expect("a controller");
    let processes = [&mesh.store, &mesh.identity, &mesh.control, rotation];
    let mut made: Vec<_> = processes.map(pid).to_vec();
    for pod in [&field.web, &field.api] {
        let dir = mesh.dir().join("pods/demo").join(format!("{}-0", pod.spec.name));
        let inode = fs::metadata(&dir).expect("its directory").ino();
        let token = fs::read_to_string(dir.join("token")).expect("its token");
        made.extend([pid(&pod.proxy), inode.to_string(), token]);
    }
    made
}

fn each(field: &mut Field, what: impl Fn(&steadfast_test_rig::Process)) {
    let mesh = &field.mesh;
    let rotation = mesh.rotation.as_ref().expect("a controller");
    for process in
        [&field.web.proxy, &field.api.proxy, rotation, &mesh.control, &mesh.identity, &mesh.store]
    {
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

fn now() -> UnixTime {
    #[allow(clippy::disallowed_methods)] // What really expires at a real time.
    std::time::SystemTime::now().into()
}

/// An SVID ends two minutes before its anchor: for the start there is most of another one.
const LIFE: Duration = Duration::from_secs(SKEW.as_secs() * 2 + 45);
