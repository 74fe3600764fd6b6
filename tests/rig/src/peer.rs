//! Peers with a certificate of the test's making, in a process of their own: a client and a server
//! that speak the mesh's `transport.l5d.io/v1` with plain rustls and none of our verifiers.
//!
//! Each prints one line that begins with `through` or `refused`, and ends.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
};
use serde::{Deserialize, Serialize};
use steadfast_identity::authority::{ISSUER_LIFETIME, make_issuer};
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, IssuerRecord};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::mesh::{Mesh, NAMESPACE, TRUST_DOMAIN};
use crate::process::{Process, Spec};

/// Whom a peer is and whom it talks to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Peer {
    /// Where it connects to, or listens.
    pub addr: SocketAddr,
    /// The SNI of a client.
    pub server_name: String,
    /// The port that a client's transport header names.
    pub port: u16,
    /// The certificates it shows, DER in hex; none: a client without a certificate.
    pub chain: Vec<String>,
    /// The key of the first, PKCS#8 in hex.
    pub key: String,
}

/// What is spoken behind a transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// HTTP/2 with prior knowledge.
    Http2,
    /// Anything: bytes.
    Opaque,
}

/// What a leaf certificate says; the default of each field is that of a good one.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// Its DNS SAN.
    pub dns: String,
    /// Its URI SANs.
    pub uris: Vec<String>,
    /// It ended this long ago.
    pub expired: Option<Duration>,
}

impl Leaf {
    /// What the SVID of a workload in `demo` says.
    pub fn of(name: &str) -> Self {
        let uris = vec![format!("spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{name}")];
        Self { dns: dns_identity(name), uris, expired: None }
    }
}

/// The DNS identity of a workload in `demo`.
pub fn dns_identity(name: &str) -> String {
    format!("{name}.{NAMESPACE}.serviceaccount.identity.steadfast.{TRUST_DOMAIN}")
}

/// An issuer that the test may sign with.
#[derive(Debug)]
pub struct TestIssuer {
    der: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

impl TestIssuer {
    /// The issuer of a mesh, by its key file and its certificate.
    pub fn of_mesh(dir: &Path, der: &[u8]) -> Self {
        let keys = dir.join("keys").join("issuers");
        let file = fs::read_dir(keys).expect("the issuers' keys").next().expect("one").expect("it");
        let key = fs::read(file.path()).expect("the issuer's key");
        Self::of_key(&key, der)
    }

    /// A new issuer under an anchor of a mesh, made as the mesh would make it, with its record for
    /// the mesh's state and its key where identity looks for it.
    pub fn under_anchor(dir: &Path, anchor: &AnchorRecord) -> (Self, IssuerRecord) {
        let anchor_key = fs::read(dir.join(&anchor.key_ref)).expect("the anchor's key");
        #[allow(clippy::disallowed_methods)] // An issuer that is valid at the real time.
        let now = std::time::SystemTime::now().into();
        let trust_domain = TRUST_DOMAIN.parse().expect("a trust domain");
        let made = make_issuer(&trust_domain, &anchor.der, &anchor_key, now, ISSUER_LIFETIME);
        let made = made.expect("an issuer");
        let record = made.as_issuer(anchor.id);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(dir.join(&record.key_ref));
        file.expect("its key's file").write_all(&made.pkcs8).expect("its key is written");
        (Self::of_key(&made.pkcs8, &made.der), record)
    }

    fn of_key(pkcs8: &[u8], der: &[u8]) -> Self {
        let key = PrivatePkcs8KeyDer::from(pkcs8.to_vec());
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &rcgen::PKCS_ECDSA_P256_SHA256);
        let certificate = CertificateDer::from(der.to_vec());
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key.expect("P-256")).expect("an issuer");
        Self { der: der.to_vec(), issuer }
    }

    /// An authority that nobody knows.
    pub fn foreign() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "foreign");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).expect("a certificate");
        Self { der: certificate.der().to_vec(), issuer: Issuer::new(params, key) }
    }

    /// A peer with this leaf.
    pub fn peer(&self, leaf: &Leaf, addr: SocketAddr, server_name: &str, port: u16) -> Peer {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.subject_alt_names =
            vec![SanType::DnsName(leaf.dns.as_str().try_into().expect("a DNS name"))];
        let uris =
            leaf.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().expect("ASCII")));
        params.subject_alt_names.extend(uris);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        #[allow(clippy::disallowed_methods)] // A certificate that really ends at a real time.
        let now = std::time::SystemTime::now();
        let end = match leaf.expired {
            Some(ago) => now - ago,
            None => now + Duration::from_secs(3600),
        };
        params.not_before = (end - Duration::from_secs(7200)).into();
        params.not_after = end.into();
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        Peer {
            addr,
            server_name: server_name.to_owned(),
            port,
            chain: vec![hex(certificate.der()), hex(&self.der)],
            key: hex(&key.serialize_der()),
        }
    }
}

impl Peer {
    /// Runs it as a process of its own: `connect` or `serve`.
    pub fn start(&self, verb: &str, mesh: &Mesh) -> Process {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let json = serde_json::to_string(self).expect("a peer is JSON");
        let spec = Spec::ours(&format!("peer-{count}"), "steadfast-test-app");
        Process::start(&mesh.logs(), spec.args([verb, &json]))
    }

    /// The same without a certificate.
    #[must_use]
    pub fn without_certificate(self) -> Self {
        Self { chain: Vec::new(), ..self }
    }

    /// Connects, says `ping`, and reads what comes back.
    pub async fn connect(self) -> String {
        outcome(timeout(TIMEOUT, self.ping()).await)
    }

    async fn ping(&self) -> std::io::Result<String> {
        let mut stream = self.open(Session::Opaque).await?;
        stream.write_all(b"ping").await?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// A connection to a sidecar, up to where the application's protocol begins.
    ///
    /// # Errors
    /// When it cannot be reached, or breaks off.
    pub async fn open(&self, session: Session) -> std::io::Result<TlsStream<TcpStream>> {
        self.open_with(&self.config()?, session).await
    }

    /// The same with this configuration, which remembers sessions.
    ///
    /// # Errors
    /// When it cannot be reached, or breaks off.
    pub async fn open_with(
        &self,
        config: &Arc<ClientConfig>,
        session: Session,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(self.server_name.clone()).map_err(std::io::Error::other)?;
        let stream = TcpStream::connect(self.addr).await?;
        let mut stream = TlsConnector::from(config.clone()).connect(name, stream).await?;
        stream.write_all(&self.header(session)).await?;
        stream.flush().await?;
        Ok(stream)
    }

    /// How it does TLS: it believes everyone, and resumes what it may.
    ///
    /// # Errors
    /// Certificates that are none.
    pub fn config(&self) -> std::io::Result<Arc<ClientConfig>> {
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(std::io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Everyone(provider())));
        let mut config = if self.chain.is_empty() {
            builder.with_no_client_auth()
        } else {
            let (chain, key) = self.identity();
            builder.with_client_auth_cert(chain, key).map_err(std::io::Error::other)?
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    /// Accepts one connection, skips its transport header, and answers `pong` to its first bytes.
    pub async fn serve(self) -> String {
        outcome(timeout(TIMEOUT, self.pong()).await)
    }

    async fn pong(&self) -> std::io::Result<String> {
        let (chain, key) = self.identity();
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(std::io::Error::other)?
            .with_client_cert_verifier(Arc::new(Everyone(provider())))
            .with_single_cert(chain, key)
            .map_err(std::io::Error::other)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        let listener = TcpListener::bind(self.addr).await?;
        println!("listening on {}", self.addr);
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let (stream, _) = listener.accept().await?;
        let mut stream = acceptor.accept(stream).await?;
        let payload = read_header(&mut stream).await?;
        stream.write_all(b"pong").await?;
        stream.shutdown().await?;
        Ok(format!("header of {payload} bytes"))
    }

    fn identity(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let chain = self.chain.iter().map(|der| CertificateDer::from(unhex(der))).collect();
        (chain, PrivateKeyDer::Pkcs8(unhex(&self.key).into()))
    }

    /// `Header { port, protocol }`, as LINKERD's proxy sends it.
    fn header(&self, session: Session) -> Vec<u8> {
        let mut body = vec![0x08];
        let mut port = u32::from(self.port);
        while port >= 0x80 {
            body.push(port as u8 | 0x80);
            port >>= 7;
        }
        body.push(port as u8);
        if session == Session::Http2 {
            body.extend_from_slice(&[0x1a, 2, 0x12, 0]);
        }
        let length = (body.len() as u32).to_be_bytes();
        [PREFACE, &length, &body].concat()
    }
}

/// A connection to a server of ours, whoever it says it is, without a certificate.
///
/// # Errors
/// When it cannot be reached, or breaks off.
pub async fn dial_tls(
    addr: SocketAddr,
    server_name: &str,
    alpn: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(std::io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Everyone(provider())))
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let name = ServerName::try_from(server_name.to_owned()).map_err(std::io::Error::other)?;
    let stream = TcpStream::connect(addr).await?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

async fn read_header<IO: AsyncRead + AsyncWrite + Unpin>(io: &mut IO) -> std::io::Result<usize> {
    let mut start = [0; PREFACE.len() + 4];
    io.read_exact(&mut start).await?;
    let mut length = [0; 4];
    length.copy_from_slice(&start[PREFACE.len()..]);
    let mut body = vec![0; u32::from_be_bytes(length) as usize % 4096];
    io.read_exact(&mut body).await?;
    let mut first = [0; 4];
    io.read_exact(&mut first).await?;
    Ok(body.len())
}

fn outcome(result: Result<std::io::Result<String>, tokio::time::error::Elapsed>) -> String {
    match result {
        Ok(Ok(text)) => format!("through: {text}"),
        Ok(Err(error)) => format!("refused: {error}"),
        Err(_) => "refused: nothing happened in time".to_owned(),
    }
}

/// Believes everyone: what is tested is the other side.
#[derive(Debug)]
struct Everyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Everyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Everyone {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let pair = |at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex");
    (0..text.len()).step_by(2).map(pair).collect()
}

const ALPN: &[u8] = b"transport.l5d.io/v1";
const PREFACE: &[u8] = b"transport.l5d.io/v1\r\n\r\n";
const TIMEOUT: Duration = Duration::from_secs(20);
