//! Promise: a replica of identity that was frozen past its read lease acts on nothing it knew
//! before; with another one beside it nobody notices, and the rotation ends when it is back.

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use steadfast_api::trust::v1::CertifyRequest;
use steadfast_api_grpc::trust_client::TrustClient;
use steadfast_rotation_protocol::rotation::PhaseName;
use steadfast_rotation_protocol::trust_domain::Outcome;
use steadfast_test_rig::mesh::QUICK_LEASE;
use steadfast_test_rig::peer::dial_tls;
use steadfast_test_rig::{Mesh, MeshConfig, until};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::support::{
    DEADLINE, Field, assert_idle, assert_outcome, in_phase, over, page, rotate,
    without_a_failed_request,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_was_frozen_past_its_lease_neither_issues_nor_serves_an_old_bundle() {
    let config = MeshConfig { second_identity: true, ..MeshConfig::rotating() };
    let field = Field::start(config).await;
    let mesh = &field.mesh;
    let (state, past) = without_a_failed_request(field.load(), async {
        let asking = Asking::connect(mesh).await;
        rotate(mesh).await;
        in_phase(mesh, PhaseName::Generating).await;
        mesh.identity.freeze();
        let frozen = Instant::now();
        let staged = in_phase(mesh, PhaseName::Staged).await;
        until("the rotation waits for the replica", DEADLINE, || waits_for_replica(mesh)).await;
        until("its lease has run out", DEADLINE, || async {
            let passed = frozen.elapsed();
            (passed > QUICK_LEASE).then_some(()).ok_or_else(|| format!("{passed:?}"))
        })
        .await;
        // What it is asked while it sleeps is the first thing that it does.
        let answers = asking.ask(mesh);
        mesh.identity.thaw();
        answers.are_not_older_than(staged.seq).await;
        over(mesh, 1).await
    })
    .await;
    assert_outcome(&past, Outcome::Done);
    assert_idle(mesh, &state).await;
}

async fn waits_for_replica(mesh: &Mesh) -> Result<(), String> {
    let page = page(mesh).await?;
    let missing = page["waiting"]["census"]["missing"].as_array().cloned().unwrap_or_default();
    let frozen = format!("identity {}", mesh.identity_addr);
    let named = missing.iter().any(|one| one["name"] == *frozen);
    named.then_some(()).ok_or_else(|| page["waiting"].to_string())
}

/// Connections to the first replica, made before it falls asleep.
struct Asking {
    bundle: hyper::client::conn::http1::SendRequest<Empty<Bytes>>,
    certify: TrustClient<Channel>,
    connection: JoinSet<()>,
}

/// What it is being asked.
struct Answers {
    bundle: JoinSet<(StatusCode, String)>,
    certify: JoinSet<Result<u64, Status>>,
    _connection: JoinSet<()>,
}

impl Asking {
    async fn connect(mesh: &Mesh) -> Self {
        let name = "steadfast-identity.steadfast.serviceaccount.identity.steadfast.cluster.local";
        let dial = async |alpn: &[u8]| {
            let stream = dial_tls(mesh.identity_addr, name, alpn).await;
            TokioIo::new(stream.expect("it answers"))
        };
        let shaken = hyper::client::conn::http1::handshake(dial(b"http/1.1").await).await;
        let (bundle, http1) = shaken.expect("HTTP/1");
        let mut connection = JoinSet::new();
        connection.spawn(async move { drop(http1.await) });
        let mut once = Some(dial(b"h2").await);
        let connector = tower::service_fn(move |_| {
            let stream = once.take().ok_or(std::io::ErrorKind::NotConnected);
            std::future::ready(stream.map_err(std::io::Error::from))
        });
        let endpoint = Endpoint::from_static("http://identity");
        let channel = endpoint.connect_with_connector(connector).await;
        let certify = TrustClient::new(channel.expect("HTTP/2"));
        Self { bundle, certify, connection }
    }

    /// Writes both requests.
    fn ask(self, mesh: &Mesh) -> Answers {
        let Self { bundle: mut sender, certify: mut client, connection } = self;
        let token = std::fs::read(mesh.dir().join("pods/demo/web-0/token")).expect("a token");
        let key = KeyPair::generate().expect("a key");
        let csr = CertificateParams::default().serialize_request(&key).expect("a request");
        let csr = csr.der().to_vec();
        let mut bundle = JoinSet::new();
        bundle.spawn(async move {
            let request = Request::get("/bundle").header("host", "identity").body(Empty::new());
            let response = sender.send_request(request.expect("a request")).await;
            let response = response.expect("an answer");
            let status = response.status();
            let body = response.into_body().collect().await.expect("its body").to_bytes();
            (status, String::from_utf8_lossy(&body).into_owned())
        });
        let mut certify = JoinSet::new();
        certify.spawn(async move {
            let reply = client.certify(CertifyRequest { token, csr }).await?;
            Ok(reply.into_inner().seq)
        });
        Answers { bundle, certify, _connection: connection }
    }
}

impl Answers {
    async fn are_not_older_than(mut self, seq: u64) {
        let (status, body) = self.bundle.join_next().await.expect("asked").expect("an answer");
        match status {
            StatusCode::OK => {
                let bundle: serde_json::Value = serde_json::from_str(&body).expect("a bundle");
                assert!(bundle["spiffe_sequence"].as_u64() >= Some(seq), "not {seq}: {body}");
            }
            status => {
                assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
                assert!(body.contains("SFT-ID-021"), "{body}");
            }
        }
        match self.certify.join_next().await.expect("asked").expect("an answer") {
            Ok(issued) => assert!(issued >= seq, "issued under {issued}, not {seq}"),
            Err(status) => {
                let code = status.metadata().get("sft-code").and_then(|code| code.to_str().ok());
                assert_eq!(code, Some("SFT-ID-021"), "{status}");
            }
        }
    }
}
