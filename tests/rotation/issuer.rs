//! Promise: when an issuer's key is stolen, what was made with it is cut at once and comes in no
//! more. That is true of what honest workloads have made with it, too: what is under way on such a
//! connection when it is cut may fail, and nothing else. Where no key is stolen nothing fails,
//! however much is sent when connections go over to SVIDs of another issuer.

use std::time::Duration;

use steadfast_api::UnixTime;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_test_rig::metrics::get;
use steadfast_test_rig::peer::{Session, TestIssuer};
use steadfast_test_rig::{Load, MeshConfig, until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use crate::support::{DEADLINE, Field, without_a_failed_request};

#[tokio::test(flavor = "multi_thread")]
async fn a_stolen_issuer_is_replaced_and_denied_and_what_it_made_is_cut() {
    let field = Field::start(MeshConfig::rotating()).await;
    let mesh = &field.mesh;
    let old = mesh.trust_domain().await.0.active_issuer;
    // The very key that identity signs with.
    let thief = field.peer(&TestIssuer::of_mesh(mesh.dir(), &mesh.issuer_der().await));
    let mut stream = thief.open(Session::Opaque).await.expect("it is let in");
    let mut echo = [0; 4];
    stream.write_all(b"ping").await.expect("it is let in");
    stream.read_exact(&mut echo).await.expect("it is let in");
    let [http1, http2] = field.load();
    let in_flight_max = http1.connections as u64;
    let story = async {
        #[allow(clippy::disallowed_methods)] // As a person would, at the real time.
        let now: UnixTime = std::time::SystemTime::now().into();
        mesh.order(|state| {
            state.rotate_issuer("a test".to_owned(), Some(GRACE), now).expect("it is taken");
        })
        .await;
        mesh.state_where("it is denied", DEADLINE, |state| {
            state.denies(old) && state.issuer_rotation.is_none()
        })
        .await
    };
    let (first, (second, state)) = http1.during(http2.during(story)).await;
    for report in [&first, &second] {
        assert!(report.failed <= in_flight_max, "{report:#?}");
    }
    // Once it is over, all is as before.
    without_a_failed_request(field.load(), async {
        let before = field.http.requests();
        until("requests go on", DEADLINE, || async {
            let more = field.http.requests() - before;
            (more > 80).then_some(()).ok_or_else(|| more.to_string())
        })
        .await;
    })
    .await;
    assert_ne!(state.active_issuer, old);
    let cut = timeout(DEADLINE, stream.read_u8()).await.expect("it is cut");
    assert!(cut.is_err(), "{cut:?}");
    let again = thief.connect().await;
    assert!(again.starts_with("refused"), "{again}");
    let ops = "spiffe://cluster.local/ns/demo/sa/ops";
    field.api.proxy.logged(&["SFT-TLS-009", "issuer_denied", ops], DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn issuers_follow_each_other_under_heavy_load_without_a_failed_request() {
    let config = MeshConfig { svid_ttl: Duration::from_secs(15), ..MeshConfig::rotating() };
    let field = Field::start(config).await;
    let load = field.load().map(|load| Load { connections: 8, rate: 300, ..load });
    without_a_failed_request(load, async {
        for _ in 0..ROTATIONS {
            let old = field.mesh.trust_domain().await.0.active_issuer;
            #[allow(clippy::disallowed_methods)] // As a person would, at the real time.
            let now: UnixTime = std::time::SystemTime::now().into();
            let order = |state: &mut TrustDomainState| {
                state.rotate_issuer("a test".to_owned(), None, now).expect("it is taken");
            };
            field.mesh.order(order).await;
            let active = |state: &TrustDomainState| state.active_issuer != old;
            let next = field.mesh.state_where("it is active", DEADLINE, active).await.active_issuer;
            for pod in [&field.web, &field.api] {
                until("its SVID is of the next issuer", DEADLINE, || async {
                    let (_, text) = get(pod.admin, "/identity.json").await?;
                    if text.contains(&next.to_string()) { Ok(()) } else { Err(text) }
                })
                .await;
            }
        }
    })
    .await;
}

const ROTATIONS: usize = 3;
/// Nobody is cut off here for not answering.
const GRACE: Duration = Duration::from_secs(100);
