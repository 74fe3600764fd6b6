//! The service's own SVID: issued to itself by the same steps, renewed on the same schedule, and
//! swapped under the running TLS server.
//!
//! A new issuer or anchor renews it at once: whoever comes with the newest bundle must be able to
//! verify us. It is server-authenticated TLS only; a workload that slept through a rotation has no
//! SVID that we would believe, and comes back with its token.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use rustls::SignatureScheme;
use rustls::crypto::aws_lc_rs as provider;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, ServerConfig};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::Serialize;
use steadfast_api::{Code, KeyId, SpiffeId, Svid, UnixTime};
use steadfast_api_grpc::stream;
use steadfast_process::readiness::Component;

use crate::certify::{Bearer, Certifier, renew_at};
use crate::csr::WorkloadKey;
use crate::issue::{Issued, Subject, Terms};
use crate::key::AuthorityKey;
use crate::refusal::Refusal;
use crate::signer::Signer;

/// What the TLS server shows: empty until the first SVID is issued.
#[derive(Debug, Default)]
pub struct OwnSvid(ArcSwapOption<Shown>);

#[derive(Debug)]
struct Shown {
    certified: Arc<CertifiedKey>,
    page: Page,
    issued_at: UnixTime,
    not_before: UnixTime,
    renew_at: UnixTime,
    not_after: UnixTime,
    issuer: KeyId,
    anchor: KeyId,
}

/// `/identity.json`: as every process of ours tells it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Page {
    spiffe_id: Option<SpiffeId>,
    dns_names: Vec<String>,
    serial: Option<String>,
    chain_pem: String,
    issued_at: Option<UnixTime>,
    not_before: Option<UnixTime>,
    not_after: Option<UnixTime>,
    next_renewal: Option<UnixTime>,
    renewals: u64,
    anchor: Option<KeyId>,
    issuer: Option<KeyId>,
    bundle_seq: Option<u64>,
    bundle_anchors: Vec<KeyId>,
}

impl OwnSvid {
    /// The issuer of the SVID that is shown, and its end.
    pub fn issuer(&self) -> Option<(KeyId, UnixTime)> {
        self.0.load().as_ref().map(|shown| (shown.issuer, shown.not_after))
    }
}

impl ResolvesServerCert for OwnSvid {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let p256 = hello.signature_schemes().contains(&SignatureScheme::ECDSA_NISTP256_SHA256);
        let shown = self.0.load();
        shown.as_ref().filter(|_| p256).map(|shown| Arc::clone(&shown.certified))
    }
}

impl OwnSvid {
    /// Issues and renews it for ever.
    ///
    /// # Errors
    /// None: what fails is told by `/ready` and tried again.
    pub async fn run(
        self: Arc<Self>,
        certifier: Arc<Certifier>,
        ready: Component,
    ) -> Result<(), Infallible> {
        let mut views = certifier.replica.subscribe();
        let mut failures = 0_u32;
        loop {
            if self.due(&certifier) {
                match self.renew(&certifier).await {
                    Ok(()) => failures = 0,
                    Err(refusal) => {
                        failures = failures.saturating_add(1);
                        self.failed(&certifier, &refusal, failures);
                    }
                }
            }
            self.tell(&certifier, &ready);
            let pause = match failures {
                0 => LOOK_EVERY,
                _ => RETRY_MIN * 2_u32.saturating_pow(failures.min(6)),
            };
            // A wall clock that jumps is seen at the next look, whatever the timer says.
            let looked = tokio::time::timeout(pause.min(LOOK_EVERY), views.changed()).await;
            if matches!(looked, Ok(Err(_))) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }

    /// Who we are, for people; all of it is empty before the first SVID.
    pub fn page(&self) -> Page {
        self.0.load().as_ref().map(|shown| shown.page.clone()).unwrap_or_default()
    }

    fn due(&self, certifier: &Certifier) -> bool {
        let Some(shown) = self.0.load_full() else { return true };
        let Shown { issued_at, renew_at, issuer, anchor, .. } = *shown;
        let view = certifier.replica.current().ok();
        // While the trust domain is halted this is none: whoever we talk to may know that the
        // stored issuer's anchor was withdrawn, and recognises us by what we show.
        let signs = view.as_ref().and_then(|view| view.signer().ok());
        let signs = signs.map(|signer| (signer.id(), signer.anchor_id()));
        is_due(certifier.clock.now(), issued_at, renew_at, (issuer, anchor), signs)
    }

    async fn renew(&self, certifier: &Certifier) -> Result<(), Refusal> {
        let view = certifier.replica.current()?;
        let signer = view.own_signer()?;
        let broken = |what: String| Refusal::new(Code::SELF_CHECK_FAILED, what);
        let control = &certifier.profile.control_namespace;
        let subject = Subject::new(&view.state.trust_domain, control, control, SERVICE_ACCOUNT)
            .map_err(|error| broken(error.to_string()))?;
        let (key, pkcs8) = AuthorityKey::generate().map_err(|error| broken(error.to_string()))?;
        let workload_key = WorkloadKey::own(&key).ok_or_else(|| broken("no key".to_owned()))?;
        let bearer = Bearer::own(control);
        let terms = Terms::usual(certifier.profile.svid_lifetime);
        let issued = certifier.issue(&view, signer, subject, workload_key, bearer, terms).await?;
        let signing = provider::sign::any_ecdsa_type(&PrivateKeyDer::Pkcs8(
            PrivatePkcs8KeyDer::from(pkcs8.as_slice()),
        ))
        .map_err(|error| broken(error.to_string()))?;
        let chain = issued.chain().cloned().collect();
        let svid = Svid::parse(&issued.der).map_err(|error| broken(error.to_string()))?;
        let page = Page {
            renewals: self.0.load().as_ref().map_or(0, |shown| shown.page.renewals + 1),
            bundle_seq: Some(view.state.seq),
            bundle_anchors: view.state.published().map(|anchor| anchor.id).collect(),
            ..page(&issued, &svid, signer)
        };
        let shown = Shown {
            certified: Arc::new(CertifiedKey::new(chain, signing)),
            page,
            issued_at: issued.issued_at,
            not_before: svid.not_before,
            renew_at: renew_at(&issued),
            not_after: issued.not_after,
            issuer: signer.id(),
            anchor: signer.anchor_id(),
        };
        certifier.metrics.own_svid(svid.not_before, issued.not_after);
        tracing::info!(
            serial = %issued.serial, issuer = %signer.id(), not_after = %issued.not_after,
            renew_at = %shown.renew_at, "own SVID issued"
        );
        self.0.store(Some(Arc::new(shown)));
        Ok(())
    }

    fn failed(&self, certifier: &Certifier, refusal: &Refusal, failures: u32) {
        certifier.metrics.own_svid_failures.inc();
        let ends = self.0.load().as_ref().map(|shown| shown.not_after.to_string());
        // The first failure and every 64th: the cause is in `/ready` all the while.
        if failures == 1 || failures.is_multiple_of(64) {
            tracing::warn!(
                code = %refusal.code, error = %refusal.what, failures,
                not_after = ends.as_deref(), "own SVID not issued"
            );
        }
    }

    fn tell(&self, certifier: &Certifier, ready: &Component) {
        let now = certifier.clock.now();
        match self.0.load().as_ref() {
            None => ready.not_ready("the service has no SVID of its own yet"),
            Some(shown) if now >= shown.not_after => {
                ready.not_ready(&format!("the service's own SVID expired at {}", shown.not_after));
            }
            Some(shown) if now < shown.not_before => ready.not_ready(&format!(
                "the service's own SVID is not valid before {}: the clock was set back",
                shown.not_before
            )),
            Some(_) => ready.ready(),
        }
    }
}

/// Our own SVID is due when its time has come, and when issuer or anchor are others than those that
/// sign now, as far as we may know. A clock that was set back makes it due too: an SVID from the
/// future is valid to nobody until then.
pub fn is_due(
    now: UnixTime,
    issued_at: UnixTime,
    renew_at: UnixTime,
    signed: (KeyId, KeyId),
    signs: Option<(KeyId, KeyId)>,
) -> bool {
    now >= renew_at || now + STEP_BACK_MIN < issued_at || signs.is_some_and(|signs| signs != signed)
}

fn page(issued: &Issued, svid: &Svid, signer: &Signer) -> Page {
    Page {
        spiffe_id: Some(svid.spiffe_id.clone()),
        dns_names: svid.dns_names.clone(),
        serial: Some(svid.serial_hex()),
        chain_pem: issued.chain_pem(),
        issued_at: Some(issued.issued_at),
        not_before: Some(svid.not_before),
        not_after: Some(issued.not_after),
        next_renewal: Some(renew_at(issued)),
        anchor: Some(signer.anchor_id()),
        issuer: Some(signer.id()),
        ..Page::default()
    }
}

/// TLS 1.3 with our SVID and no client certificate. No tickets and no resumption: a handshake that
/// is cheap for us is a rotation that nobody sees.
///
/// # Errors
/// A provider without TLS 1.3, which ours is not.
pub fn server_config(own: Arc<OwnSvid>) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = rustls::crypto::CryptoProvider {
        kx_groups: vec![
            provider::kx_group::X25519MLKEM768,
            provider::kx_group::X25519,
            provider::kx_group::SECP256R1,
        ],
        ..provider::default_provider()
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(own);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = [stream::ALPN, b"h2", b"http/1.1"].map(<[u8]>::to_vec).into();
    Ok(Arc::new(config))
}

/// Our service account: what `LINKERD2_PROXY_IDENTITY_SVC_NAME` names.
pub const SERVICE_ACCOUNT: &str = "steadfast-identity";
/// Clocks are slewed by less all the time.
const STEP_BACK_MIN: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_secs(1);
const RETRY_MIN: Duration = Duration::from_millis(100);
