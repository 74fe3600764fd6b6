//! Promise: after a withdrawal nobody comes in with an SVID under the old anchor, and no TLS session
//! of before gets around it.

use steadfast_rotation_protocol::trust_domain::{AnchorState, Outcome};
use steadfast_test_rig::peer::{Peer, Session, TestIssuer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::rustls::{ClientConfig, HandshakeKind};

use steadfast_test_rig::MeshConfig;

use crate::support::{Field, assert_outcome, in_state, over, rotate, without_a_failed_request};

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_resumes_its_sessions_is_refused_once_its_anchor_is_withdrawn() {
    let field = Field::start(MeshConfig::rotating()).await;
    let mesh = &field.mesh;
    let anchor = in_state(&mesh.trust_domain().await.0, AnchorState::Active);
    let (issuer, _) = TestIssuer::under_anchor(mesh.dir(), &anchor);
    let peer = field.peer(&issuer);
    // One configuration, so one memory of sessions and tickets.
    let config = peer.config().expect("a configuration");
    for _ in 0..2 {
        let kind = ping(&peer, &config).await.expect("its anchor is believed");
        assert_eq!(kind, HandshakeKind::Full, "it shows its certificate each time");
    }
    let (state, past) = without_a_failed_request(field.load(), async {
        rotate(mesh).await;
        over(mesh, 1).await
    })
    .await;
    assert_outcome(&past, Outcome::Done);
    field.api_uses(state.seq).await;
    let refused = ping(&peer, &config).await;
    assert!(refused.is_err(), "{refused:?}");
}

/// What kind of handshake it was, once something came back.
async fn ping(
    peer: &Peer,
    config: &std::sync::Arc<ClientConfig>,
) -> std::io::Result<HandshakeKind> {
    let mut stream = peer.open_with(config, Session::Opaque).await?;
    stream.write_all(b"ping").await?;
    // Tickets, if there were any, come with the first bytes.
    stream.read_exact(&mut [0; 4]).await?;
    let kind = stream.get_ref().1.handshake_kind();
    kind.ok_or_else(|| std::io::Error::other("the handshake is not over"))
}
