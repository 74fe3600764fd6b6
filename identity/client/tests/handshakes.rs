//! What TLS between two workloads promises: each reason to refuse has its own code and alert, on
//! both sides, and the same peer mended in that one property gets through.

#![allow(clippy::unwrap_used, reason = "in a test what cannot be had is a failure")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::CertificateDer;
use steadfast_api::{Code, SpiffeId};
use steadfast_identity_client::{
    ClientAuth, Expected, HANDSHAKE_TIMEOUT, Refusal, SvidKey, TlsContext, TlsStream, VerifiedPeer,
};
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

type Accepted = Result<(TlsStream<DuplexStream>, Option<Arc<VerifiedPeer>>), Refusal>;
type Connected = Result<(TlsStream<DuplexStream>, Arc<VerifiedPeer>), Refusal>;

fn expected(service_account: &str) -> Expected {
    Expected::from(name(service_account))
}

async fn shake(
    client: &TlsContext,
    server: &TlsContext,
    expected: &Expected,
    client_auth: ClientAuth,
) -> (Connected, Accepted) {
    let (near, far) = duplex(64 * 1024);
    let alpn: &'static [u8] = b"transport.l5d.io/v1";
    let alpns = [alpn];
    tokio::join!(
        client.connect(near, expected, Some(alpn)),
        server.accept(far, client_auth, &alpns)
    )
}

/// A mesh of one anchor and one issuer.
struct Mesh {
    clock: Arc<TestClock>,
    anchor: Authority,
    issuer: Authority,
}

impl Mesh {
    fn new() -> Self {
        let anchor = Authority::anchor("anchor");
        let issuer = anchor.issuer("issuer");
        Self { clock: TestClock::at(NOW), anchor, issuer }
    }

    fn workload(&self, service_account: &str) -> Arc<TlsContext> {
        self.leaf(&Leaf::of(&name(service_account)))
    }

    fn leaf(&self, leaf: &Leaf) -> Arc<TlsContext> {
        let believes = trust(&[&self.anchor]);
        workload_with(self.clock.clone(), &self.issuer, leaf, believes, &self.anchor)
    }
}

/// What each side says of the pair: `client` dials `server`, which is expected to be "server".
async fn codes(client: &TlsContext, server: &TlsContext) -> (Option<Code>, Option<Code>) {
    let (connected, accepted) =
        shake(client, server, &expected("server"), ClientAuth::Required).await;
    let server_code = match &accepted {
        Ok(_) => None,
        Err(refusal) => Some(refusal.code),
    };
    // In TLS 1.3 the client learns with its first read what the server thinks of it.
    let client_code = match connected {
        Err(refusal) => Some(refusal.code),
        Ok((mut stream, _)) => {
            drop(accepted);
            let late = stream.late_refusal();
            let error = stream.read(&mut [0; 1]).await.err();
            let refusal = error.and_then(|error| stream.refusal_of(&error));
            assert_eq!(late.get(), refusal.as_ref(), "the handle holds what the read met");
            refusal.map(|refusal| refusal.code)
        }
    };
    (client_code, server_code)
}

#[tokio::test]
async fn two_workloads_talk_and_know_each_other() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload("client"), mesh.workload("server"));
    let (connected, accepted) =
        shake(&client, &server, &expected("server"), ClientAuth::Required).await;
    let (mut near, server_id) = connected.unwrap();
    let (mut far, client_id) = accepted.unwrap();
    assert_eq!(server_id.id, id("server"));
    assert_eq!(server_id.dns, Some(name("server")));
    assert_eq!(server_id.anchor, mesh.anchor.id());
    assert_eq!(server_id.issuer, mesh.issuer.id());
    assert_eq!(client_id.unwrap().id, id("client"));
    assert_eq!(far.alpn(), Some(&b"transport.l5d.io/v1"[..]));
    near.write_all(b"ping").await.unwrap();
    near.flush().await.unwrap();
    let mut bytes = [0; 4];
    far.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"ping");
}

#[tokio::test]
async fn tls_is_1_3_with_the_hybrid_group_and_the_second_handshake_is_full_again() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload("client"), mesh.workload("server"));
    for _ in 0..2 {
        let (connected, accepted) =
            shake(&client, &server, &expected("server"), ClientAuth::Required).await;
        let ((near, _), (far, _)) = (connected.unwrap(), accepted.unwrap());
        for side in [near.negotiated(), far.negotiated()] {
            assert_eq!(side.version, Some("TLSv1_3"));
            assert_eq!(side.group, Some("X25519MLKEM768"));
            assert!(!side.resumed);
        }
    }
}

#[tokio::test]
async fn a_client_with_a_session_cache_gets_nothing_to_put_in_it() {
    let mesh = Mesh::new();
    let server = mesh.workload("server");
    let config = stranger_client(&mesh.issuer, &Leaf::of(&name("client")));
    for _ in 0..2 {
        let (near, far) = duplex(64 * 1024);
        let connector = tokio_rustls::TlsConnector::from(config.clone());
        let dialling = connector.connect("server.test".try_into().unwrap(), near);
        let (stream, accepted) =
            tokio::join!(dialling, server.accept(far, ClientAuth::Required, &[]));
        let (mut far, _) = accepted.unwrap();
        assert!(!far.negotiated().resumed);
        // Whatever tickets there were would come before this.
        far.write_all(b"x").await.unwrap();
        far.flush().await.unwrap();
        let mut stream = stream.unwrap();
        stream.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}

#[tokio::test]
async fn a_client_of_ours_that_is_offered_tickets_shakes_hands_in_full_again() {
    let mesh = Mesh::new();
    let client = mesh.workload("client");
    // rustls sends two tickets after each handshake unless it is told not to.
    let mut config = (*stranger_server(&mesh.issuer, &Leaf::of(&name("server")))).clone();
    config.alpn_protocols = vec![b"transport.l5d.io/v1".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    for _ in 0..2 {
        let (near, far) = duplex(64 * 1024);
        let alpn: Option<&'static [u8]> = Some(b"transport.l5d.io/v1");
        let server = expected("server");
        let (connected, accepted) =
            tokio::join!(client.connect(near, &server, alpn), acceptor.accept(far));
        let ((mut near, _), mut far) = (connected.unwrap(), accepted.unwrap());
        assert_eq!(far.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
        // The tickets come before this.
        far.write_all(b"x").await.unwrap();
        far.flush().await.unwrap();
        near.read_exact(&mut [0; 1]).await.unwrap();
    }
}

/// Each row: what is wrong with a peer, its leaf, and the code it gets.
fn bad_leaves() -> Vec<(&'static str, Leaf, Code)> {
    let good = |sa: &str| Leaf::of(&name(sa));
    let changed = |change: &dyn Fn(&mut Leaf)| {
        let mut leaf = good("peer-x");
        change(&mut leaf);
        leaf
    };
    vec![
        (
            "expired",
            changed(&|leaf| {
                leaf.not_before = NOW - HOUR;
                leaf.not_after = NOW - HOUR / 2;
            }),
            Code::PEER_EXPIRED,
        ),
        ("not yet", changed(&|leaf| leaf.not_before = NOW + HOUR / 2), Code::PEER_NOT_YET_VALID),
        ("no URI", changed(&|leaf| leaf.uris.clear()), Code::PEER_NOT_SVID),
        ("two URIs", changed(&|leaf| leaf.uris.push(id("other").to_string())), Code::PEER_NOT_SVID),
        (
            "no SPIFFE ID",
            changed(&|leaf| leaf.uris = vec!["https://example.com".to_owned()]),
            Code::PEER_NOT_SVID,
        ),
        ("a CA", changed(&|leaf| leaf.is_ca = true), Code::PEER_NOT_SVID),
        (
            "a signing key usage",
            changed(&|leaf| leaf.key_usages.push(rcgen::KeyUsagePurpose::KeyCertSign)),
            Code::PEER_NOT_SVID,
        ),
        (
            "half an extended key usage",
            changed(&|leaf| leaf.extended.truncate(1)),
            Code::PEER_NOT_SVID,
        ),
        (
            "another trust domain",
            changed(&|leaf| leaf.uris = vec!["spiffe://elsewhere/ns/demo/sa/peer-x".to_owned()]),
            Code::PEER_TRUST_DOMAIN,
        ),
    ]
}

/// The leaf with `peer-x` replaced by the role it plays.
fn playing(leaf: &Leaf, service_account: &str) -> Leaf {
    let rename = |names: &[String]| {
        names.iter().map(|name| name.replace("peer-x", service_account)).collect()
    };
    Leaf { uris: rename(&leaf.uris), dns: rename(&leaf.dns), ..leaf.clone() }
}

/// A client of another make, which shows whatever it is given and accepts whatever it sees.
fn stranger_client(issuer: &Authority, leaf: &Leaf) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(provider)))
        .with_client_cert_resolver(certified(issuer, leaf));
    Arc::new(config)
}

fn stranger_server(issuer: &Authority, leaf: &Leaf) -> Arc<ServerConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(certified(issuer, leaf));
    Arc::new(config)
}

fn certified(issuer: &Authority, leaf: &Leaf) -> Arc<SingleCertAndKey> {
    let key = SvidKey::generate().unwrap();
    let chain = issuer.sign(leaf, &key).into_iter().map(CertificateDer::from).collect();
    Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, Arc::new(key))))
}

#[derive(Debug)]
struct Gullible(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls_pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What our server says of a client of another make, and the alert that the client gets.
async fn as_client(server: &TlsContext, config: Arc<ClientConfig>) -> (Accepted, Option<String>) {
    let (near, far) = duplex(64 * 1024);
    let dialling = async {
        let connector = tokio_rustls::TlsConnector::from(config);
        let name = "server.test".try_into().unwrap();
        match connector.connect(name, near).await {
            Ok(mut stream) => stream.read(&mut [0; 1]).await.err().map(|error| error.to_string()),
            Err(error) => Some(error.to_string()),
        }
    };
    let accepting = async {
        let mut accepted = server.accept(far, ClientAuth::Required, &[]).await;
        if let Ok((stream, _)) = &mut accepted {
            stream.write_all(b"x").await.unwrap();
            stream.flush().await.unwrap();
        }
        accepted
    };
    let (alert, accepted) = tokio::join!(dialling, accepting);
    (accepted, alert)
}

/// What our client says of a server of another make, and the alert that the server gets.
async fn as_server(
    client: &TlsContext,
    expected: &Expected,
    config: Arc<ServerConfig>,
) -> (Connected, Option<String>) {
    let (near, far) = duplex(64 * 1024);
    let acceptor = tokio_rustls::TlsAcceptor::from(config);
    let (connected, accepted) =
        tokio::join!(client.connect(near, expected, None), acceptor.accept(far));
    (connected, accepted.err().map(|error| error.to_string()))
}

#[tokio::test]
async fn each_flaw_of_a_leaf_has_its_code_on_both_sides_and_the_mended_peer_gets_through() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload("client"), mesh.workload("server"));
    for (flaw, leaf, code) in bad_leaves() {
        let config = stranger_client(&mesh.issuer, &playing(&leaf, "client"));
        let (accepted, alert) = as_client(&server, config).await;
        let refusal = accepted.err().unwrap_or_else(|| panic!("{flaw}: a client got in"));
        assert_eq!(refusal.code, code, "{flaw}, as client: {refusal}");
        assert!(alert.unwrap().contains("alert"), "{flaw}: the client is told");

        let config = stranger_server(&mesh.issuer, &playing(&leaf, "server"));
        let (connected, alert) = as_server(&client, &expected("server"), config).await;
        let refusal = connected.err().unwrap_or_else(|| panic!("{flaw}: a server got through"));
        assert_eq!(refusal.code, code, "{flaw}, as server: {refusal}");
        assert!(alert.unwrap().contains("alert"), "{flaw}: the server is told");
    }
    let config = stranger_client(&mesh.issuer, &Leaf::of(&name("client")));
    assert!(as_client(&server, config).await.0.is_ok(), "the mended client");
    let config = stranger_server(&mesh.issuer, &Leaf::of(&name("server")));
    assert!(as_server(&client, &expected("server"), config).await.0.is_ok(), "the mended server");
}

#[tokio::test]
async fn alerts_are_specific() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload("client"), mesh.workload("server"));
    let foreign = Authority::anchor("foreign").issuer("foreign issuer");
    let (not_before, not_after) = (NOW - HOUR, NOW - HOUR / 2);
    let expired = Leaf { not_before, not_after, ..Leaf::of(&name("client")) };
    let other = expected("other");
    let good_server = stranger_server(&mesh.issuer, &Leaf::of(&name("server")));
    for (alert, want) in [
        (
            as_client(&server, stranger_client(&foreign, &Leaf::of(&name("client")))).await.1,
            "UnknownCA",
        ),
        (as_client(&server, stranger_client(&mesh.issuer, &expired)).await.1, "CertificateExpired"),
        (as_server(&client, &other, good_server).await.1, "AccessDenied"),
    ] {
        let alert = alert.unwrap();
        assert!(alert.contains(want), "{alert} is not {want}");
    }
}

#[tokio::test]
async fn a_foreign_anchor_is_unknown_to_both_sides_even_under_the_same_names() {
    let mesh = Mesh::new();
    let foreign = Authority::anchor("anchor");
    let foreign_issuer = foreign.issuer("issuer");
    let stranger = |sa: &str| {
        workload(
            mesh.clock.clone(),
            &foreign_issuer,
            sa,
            trust(&[&mesh.anchor, &foreign]),
            &foreign,
        )
    };
    let seen = codes(&stranger("client"), &mesh.workload("server")).await;
    assert_eq!(seen, (Some(Code::PEER_REFUSED_US), Some(Code::PEER_UNKNOWN_ISSUER)));
    let seen = codes(&mesh.workload("client"), &stranger("server")).await;
    assert_eq!(seen, (Some(Code::PEER_UNKNOWN_ISSUER), Some(Code::PEER_REFUSED_US)));
    // Mended: we believe its anchor.
    let believing = workload(
        mesh.clock.clone(),
        &mesh.issuer,
        "client",
        trust(&[&mesh.anchor, &foreign]),
        &mesh.anchor,
    );
    assert!(
        shake(&believing, &stranger("server"), &expected("server"), ClientAuth::Required)
            .await
            .0
            .is_ok()
    );
}

#[tokio::test]
async fn an_expired_anchor_carries_no_peer() {
    let mesh = Mesh::new();
    let old = Authority::anchor_valid("old", NOW - HOUR * 48, NOW - HOUR);
    let issuer = old.issuer_valid("old issuer", NOW - HOUR * 24, NOW + HOUR * 24);
    let leaf = Leaf { not_before: NOW - HOUR * 2, ..Leaf::of(&name("server")) };
    let believes = trust(&[&old, &mesh.anchor]);
    let peer = workload_with(mesh.clock.clone(), &issuer, &leaf, believes, &old);
    let client = workload(
        mesh.clock.clone(),
        &mesh.issuer,
        "client",
        trust(&[&mesh.anchor, &old]),
        &mesh.anchor,
    );
    let (connected, _) = shake(&client, &peer, &expected("server"), ClientAuth::Required).await;
    let refusal = connected.err().unwrap();
    assert_eq!(refusal.code, Code::PEER_EXPIRED);
    assert!(refusal.to_string().contains("its issuer or anchor"), "{refusal}");
}

#[tokio::test]
async fn a_denied_issuer_carries_no_peer() {
    let mesh = Mesh::new();
    let denying = trust_denying(&[&mesh.anchor], &[mesh.issuer.id()]);
    let fresh = mesh.anchor.issuer("fresh issuer");
    let strict = |sa| workload(mesh.clock.clone(), &fresh, sa, denying.clone(), &mesh.anchor);
    let seen = codes(&mesh.workload("client"), &strict("server")).await;
    assert_eq!(seen, (Some(Code::PEER_REFUSED_US), Some(Code::PEER_ISSUER_DENIED)));
    let seen = codes(&strict("client"), &mesh.workload("server")).await;
    assert_eq!(seen, (Some(Code::PEER_ISSUER_DENIED), Some(Code::PEER_REFUSED_US)));
    let (connected, _) =
        shake(&strict("client"), &strict("server"), &expected("server"), ClientAuth::Required)
            .await;
    assert!(connected.is_ok(), "under the new issuer");
}

#[tokio::test]
async fn another_identity_than_the_expected_is_refused_with_every_fact() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload("client"), mesh.workload("server"));
    let (connected, accepted) =
        shake(&client, &server, &expected("other"), ClientAuth::Required).await;
    let refusal = connected.err().unwrap();
    assert_eq!(refusal.code, Code::PEER_WRONG_IDENTITY);
    assert_eq!(accepted.err().unwrap().code, Code::PEER_REFUSED_US);
    let line = refusal.to_string();
    for fact in [
        format!("local={}", id("client")),
        format!("peer={}", id("server")),
        format!("expected={}", id("other")),
        format!("anchor={}", mesh.anchor.id().short()),
        format!("issuer={}", mesh.issuer.id().short()),
        "not_before=2027".to_owned(),
        "not_after=2027".to_owned(),
        "clock_offset=unknown".to_owned(),
    ] {
        assert!(line.contains(&fact), "{line} lacks {fact}");
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_taken_or_not_as_the_server_asks() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload("client"), mesh.workload("server"));
    for (client_auth, code) in [
        (ClientAuth::None, None),
        (ClientAuth::Optional, None),
        (ClientAuth::Required, Some(Code::PEER_NO_CERTIFICATE)),
    ] {
        let (near, far) = duplex(64 * 1024);
        let expected = expected("server");
        let (connected, accepted) = tokio::join!(
            client.connect_bootstrap(near, &expected, None),
            server.accept(far, client_auth, &[])
        );
        assert_eq!(connected.unwrap().1.id, id("server"));
        match accepted {
            Ok((_, peer)) => assert_eq!((peer, code), (None, None), "{client_auth:?}"),
            Err(refusal) => assert_eq!(Some(refusal.code), code, "{client_auth:?}"),
        }
    }
}

#[tokio::test]
async fn an_optional_certificate_that_is_bad_is_refused_all_the_same() {
    let mesh = Mesh::new();
    let foreign = Authority::anchor("foreign").issuer("foreign issuer");
    let server = mesh.workload("server");
    let (near, far) = duplex(64 * 1024);
    let connector =
        tokio_rustls::TlsConnector::from(stranger_client(&foreign, &Leaf::of(&name("client"))));
    let (_, accepted) = tokio::join!(
        connector.connect("server.test".try_into().unwrap(), near),
        server.accept(far, ClientAuth::Optional, &[])
    );
    assert_eq!(accepted.err().unwrap().code, Code::PEER_UNKNOWN_ISSUER);
}

#[tokio::test]
async fn a_stolen_certificate_without_its_key_is_a_bad_signature() {
    let mesh = Mesh::new();
    let (real, thief) = (SvidKey::generate().unwrap(), SvidKey::generate().unwrap());
    let chain: Vec<_> = mesh
        .issuer
        .sign(&Leaf::of(&name("server")), &real)
        .into_iter()
        .map(CertificateDer::from)
        .collect();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::new(
            chain,
            Arc::new(thief),
        ))));
    let client = mesh.workload("client");
    let (connected, _) = as_server(&client, &expected("server"), Arc::new(config)).await;
    let refusal = connected.err().unwrap();
    assert_eq!(refusal.code, Code::PEER_BAD_SIGNATURE);
    assert_eq!(refusal.facts.peer.id, Some(id("server")), "whose certificate it was");
}

#[tokio::test]
async fn an_altered_certificate_is_a_bad_signature() {
    let mesh = Mesh::new();
    let key = SvidKey::generate().unwrap();
    let mut chain = mesh.issuer.sign(&Leaf::of(&name("server")), &key);
    // The last byte is of the signature.
    *chain.first_mut().unwrap().last_mut().unwrap() ^= 1;
    let chain = chain.into_iter().map(CertificateDer::from).collect();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::new(
            chain,
            Arc::new(key),
        ))));
    let client = mesh.workload("client");
    let (connected, _) = as_server(&client, &expected("server"), Arc::new(config)).await;
    assert_eq!(connected.err().unwrap().code, Code::PEER_BAD_SIGNATURE);
}

#[tokio::test]
async fn what_speaks_no_tls_and_what_breaks_off_are_told_apart_from_bad_certificates() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload("client"), mesh.workload("server"));
    let (near, mut far) = duplex(64 * 1024);
    far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    let refusal = client.connect(near, &expected("server"), None).await.err().unwrap();
    assert_eq!(refusal.code, Code::PEER_NOT_TLS, "{refusal}");

    let (near, mut far) = duplex(64 * 1024);
    far.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let refusal = server.accept(near, ClientAuth::Required, &[]).await.err().unwrap();
    assert_eq!(refusal.code, Code::PEER_NOT_TLS, "{refusal}");

    let (near, far) = duplex(64 * 1024);
    drop(far);
    let refusal = client.connect(near, &expected("server"), None).await.err().unwrap();
    assert_eq!(refusal.code, Code::PEER_NOT_TLS, "{refusal}");
}

#[tokio::test]
async fn a_peer_without_a_protocol_in_common_is_told_so_on_both_sides() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload("client"), mesh.workload("server"));
    let (near, far) = duplex(64 * 1024);
    let expected = expected("server");
    let (connected, accepted) = tokio::join!(
        client.connect(near, &expected, Some(b"of tomorrow")),
        server.accept(far, ClientAuth::Required, &[b"h2"]),
    );
    let refusals = (connected.err().unwrap(), accepted.err().unwrap());
    assert_eq!(refusals.0.code, Code::PEER_NO_PROTOCOL, "{}", refusals.0);
    assert_eq!(refusals.1.code, Code::PEER_NO_PROTOCOL, "{}", refusals.1);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_is_given_up_at_the_deadline() {
    let mesh = Mesh::new();
    let server = mesh.workload("server");
    let (near, _far) = duplex(64 * 1024);
    let begin = tokio::time::Instant::now();
    let refusal = server.accept(near, ClientAuth::Required, &[]).await.err().unwrap();
    assert_eq!(refusal.code, Code::PEER_NOT_TLS);
    assert!(begin.elapsed() >= HANDSHAKE_TIMEOUT);
}

#[tokio::test]
async fn an_own_svid_that_has_expired_is_shown_to_nobody() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload("client"), mesh.workload("server"));
    mesh.clock.set(NOW + HOUR + Duration::from_secs(1));
    // Before a byte is sent: the other end of the pipe is gone, and that is not what is said.
    let pipe = || duplex(64).0;
    let refusal = client.connect(pipe(), &expected("server"), None).await.err().unwrap();
    assert_eq!(refusal.code, Code::SVID_EXPIRED);
    assert!(refusal.to_string().contains(&mesh.issuer.id().short()), "{refusal}");
    for client_auth in [ClientAuth::None, ClientAuth::Optional, ClientAuth::Required] {
        let refusal = server.accept(pipe(), client_auth, &[]).await.err().unwrap();
        assert_eq!(refusal.code, Code::SVID_EXPIRED);
    }
    // To the end of its last second it is good.
    mesh.clock.set(NOW + HOUR);
    assert_eq!(codes(&client, &server).await, (None, None));
}

#[tokio::test]
async fn a_known_chain_is_refused_once_its_time_is_over() {
    let mesh = Mesh::new();
    let long = Leaf { not_after: NOW + HOUR * 2, ..Leaf::of(&name("client")) };
    let client = mesh.leaf(&long);
    let short = Leaf { not_after: NOW + HOUR / 2, ..Leaf::of(&name("server")) };
    let server = stranger_server(&mesh.issuer, &short);
    assert!(as_server(&client, &expected("server"), server.clone()).await.0.is_ok());
    mesh.clock.set(NOW + HOUR);
    let (connected, _) = as_server(&client, &expected("server"), server).await;
    assert_eq!(connected.err().unwrap().code, Code::PEER_EXPIRED);
}

#[tokio::test]
async fn a_context_without_an_svid_dials_the_identity_service_only() {
    let mesh = Mesh::new();
    let contexts = steadfast_identity_client::Contexts::new(mesh.clock.clone());
    let nothing = contexts.current();
    let refusal = nothing.connect_bootstrap(duplex(64).0, &expected("server"), None).await;
    assert_eq!(refusal.err().unwrap().code, Code::SVID_MISSING);
    let early = contexts.publish(None, trust(&[&mesh.anchor])).unwrap();
    let refusal = early.connect(duplex(64).0, &expected("server"), None).await.err().unwrap();
    assert_eq!(refusal.code, Code::SVID_MISSING);
    let server = mesh.workload("server");
    let (near, far) = duplex(64 * 1024);
    let expected = expected("server");
    let (connected, _) = tokio::join!(
        early.connect_bootstrap(near, &expected, None),
        server.accept(far, ClientAuth::None, &[])
    );
    assert_eq!(connected.unwrap().1.id, id("server"));
}

#[test]
fn a_dns_name_counts_only_if_it_names_the_same_workload() {
    let mesh = Mesh::new();
    let believes = trust(&[&mesh.anchor]);
    let mut leaf = Leaf::of(&name("server"));
    leaf.dns = vec![name("other").to_string()];
    let key = SvidKey::generate().unwrap();
    let chain: Vec<_> =
        mesh.issuer.sign(&leaf, &key).into_iter().map(CertificateDer::from).collect();
    let (svid, issuers) = chain.split_first().unwrap();
    let peer = steadfast_identity_client::verify::check_chain(
        steadfast_identity_client::verify::Role::Server,
        svid,
        issuers,
        &believes,
        NOW,
        None::<&SpiffeId>,
    )
    .unwrap();
    assert_eq!(peer.dns, None);
}
