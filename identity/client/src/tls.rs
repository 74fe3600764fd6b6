//! Our verifier in the shape that rustls wants, and the configurations that use it.
//!
//! rustls hands neither the path nor the connection over. So each handshake runs in the scope of a
//! [`Handshake`] that the verifier finds (a verifier runs inside the poll of its connection): it
//! carries the expected identity in and the judgement out, and no configuration is built anew for
//! a connection. Without that scope every certificate is refused.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use steadfast_api::SpiffeId;
use steadfast_process::Clock;

use crate::svid::OwnSvid;
use crate::trust::Trust;
use crate::verify::{PeerRefused, Role, VerifiedPeer, check_chain};

/// Whether a server asks its clients for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// Does not ask.
    None,
    /// Asks; a client without one may come, a client with a bad one may not.
    Optional,
    /// Asks, and refuses who has none.
    Required,
}

/// What the verifier thinks of a peer.
pub(crate) type Judgement = Result<Arc<VerifiedPeer>, Box<PeerRefused>>;

/// One handshake, as the verifier sees it.
pub(crate) struct Handshake {
    expected: Option<SpiffeId>,
    judgement: RefCell<Option<Judgement>>,
}

tokio::task_local! {
    static HANDSHAKE: Handshake;
}

/// Runs a handshake and returns, beside its result, what the verifier thought of the peer.
pub(crate) async fn judged<T>(
    expected: Option<SpiffeId>,
    handshake: impl Future<Output = T>,
) -> (T, Option<Judgement>) {
    let scope = Handshake { expected, judgement: RefCell::new(None) };
    HANDSHAKE
        .scope(scope, async {
            let result = handshake.await;
            (result, HANDSHAKE.with(|scope| scope.judgement.take()))
        })
        .await
}

/// Verifies peers against one [`Trust`].
struct Verifier {
    trust: Arc<Trust>,
    clock: Arc<dyn Clock>,
    client_auth: ClientAuth,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn judge(
        &self,
        role: Role,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
        let now = self.clock.now();
        HANDSHAKE
            .try_with(|scope| {
                let expected = scope.expected.as_ref();
                let judgement = check_chain(role, leaf, intermediates, &self.trust, now, expected);
                let result = judgement.as_ref().map(|_| ()).map_err(|refused| refused.tls_error());
                scope.judgement.replace(Some(judgement));
                result
            })
            .unwrap_or_else(|_| Err(rustls::Error::General(OUTSIDE.to_owned())))
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verifier(seq {}, {:?})", self.trust.sequence(), self.client_auth)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(Role::Server, leaf, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn offer_client_auth(&self) -> bool {
        self.client_auth != ClientAuth::None
    }

    fn client_auth_mandatory(&self) -> bool {
        self.client_auth == ClientAuth::Required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A workload has one SVID: hints would only tell strangers what we believe.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(Role::Client, leaf, intermediates).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// What every configuration of ours shares.
pub(crate) struct Builder {
    provider: Arc<CryptoProvider>,
    clock: Arc<dyn Clock>,
}

impl Builder {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        let provider = CryptoProvider {
            cipher_suites: vec![
                cipher_suite::TLS13_AES_128_GCM_SHA256,
                cipher_suite::TLS13_AES_256_GCM_SHA384,
                cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
            ..default_provider()
        };
        Self { provider: Arc::new(provider), clock }
    }

    /// A client that shows our SVID, or none.
    pub(crate) fn client(
        &self,
        trust: &Arc<Trust>,
        svid: Option<&OwnSvid>,
    ) -> Result<Arc<ClientConfig>, rustls::Error> {
        let builder = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(self.verifier(trust, ClientAuth::None));
        let mut config = match svid {
            Some(svid) => builder.with_client_cert_resolver(resolver(svid)),
            None => builder.with_no_client_auth(),
        };
        // A resumed session would skip the verifier, and with it renewal and withdrawal.
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// A server that shows our SVID.
    pub(crate) fn server(
        &self,
        trust: &Arc<Trust>,
        svid: &OwnSvid,
        client_auth: ClientAuth,
    ) -> Result<Arc<ServerConfig>, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(self.verifier(trust, client_auth))
            .with_cert_resolver(resolver(svid));
        // As above; on the server side rustls keeps sessions unless told not to.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    fn verifier(&self, trust: &Arc<Trust>, client_auth: ClientAuth) -> Arc<Verifier> {
        Arc::new(Verifier {
            trust: trust.clone(),
            clock: self.clock.clone(),
            client_auth,
            provider: self.provider.clone(),
        })
    }
}

fn resolver(svid: &OwnSvid) -> Arc<SingleCertAndKey> {
    let key = Arc::new(svid.key().clone());
    Arc::new(SingleCertAndKey::from(CertifiedKey::new(svid.chain().to_vec(), key)))
}

const OUTSIDE: &str = "a certificate was presented outside a handshake of ours";
