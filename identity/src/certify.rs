//! A request for an SVID, from the token to the reply: the story, in numbered steps.
//!
//! The steps themselves are elsewhere; here is their order, and the one place where an outcome is
//! counted and a refusal is logged. The public key is all that is ever taken from a request.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use steadfast_api::{Code, KeyId, SpiffeId, UnixTime};
use steadfast_platform::ReviewedToken;
use steadfast_process::Clock;
use steadfast_rotation_protocol::trust_domain::POD_CERTIFICATES;
use tokio::sync::Semaphore;

use crate::csr::{self, WorkloadKey};
use crate::holders::Holders;
use crate::issuance_log::{Facts, IssuanceLog, Record};
use crate::issue::{Issued, Linted, Prepared, Subject, Terms};
use crate::limits::{Kind, Limits};
use crate::metrics::{CertifyLabels, Metrics};
use crate::refusal::Refusal;
use crate::replica::{Replica, View};
use crate::review::Reviews;
use crate::signer::Signer;

/// What issuance works with.
pub struct Certifier {
    /// The view of the trust domain and its lease.
    pub replica: Arc<Replica>,
    /// Who holds a token.
    pub reviews: Arc<Reviews>,
    /// How many are let through.
    pub limits: Limits,
    /// What is promised for those who cannot ack.
    pub holders: Holders,
    /// Where it is written down.
    pub log: IssuanceLog,
    /// The clocks.
    pub clock: Arc<dyn Clock>,
    /// What is counted.
    pub metrics: Metrics,
    /// What is the same for every SVID.
    pub profile: Profile,
    /// Requests that may be under way at once.
    pub in_flight: Semaphore,
}

/// What is the same for every SVID.
#[derive(Clone, Debug)]
pub struct Profile {
    /// The namespace of the control plane, part of every DNS identity.
    pub control_namespace: String,
    /// The namespace of the controller of rotations.
    pub controller_namespace: String,
    /// How long an SVID lives from now.
    pub svid_lifetime: Duration,
}

/// A request as it came.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The API it came by, for the counter.
    pub api: &'static str,
    /// The DNS identity it names; `None`: this API names none.
    pub identity: Option<&'a str>,
    /// Who proves to be the workload.
    pub proof: Proof<'a>,
    /// PKCS#10 in DER.
    pub csr: &'a [u8],
    /// Where it came from, for the log.
    pub peer: Option<SocketAddr>,
    /// How long the SVID is to be valid; `None`: as every workload's own.
    pub terms: Option<Terms>,
}

/// Who proves to be the workload.
#[derive(Clone, Copy, Debug)]
pub enum Proof<'a> {
    /// Whoever holds this.
    Token(&'a [u8]),
    /// The API server has checked it, and the pod is still that pod.
    Vouched(&'a Arc<ReviewedToken>),
}

impl Request<'_> {
    /// What kind of holder asks, if it is one that cannot ack: its API has no trust stream.
    fn holder_without_acks(&self) -> Option<&'static str> {
        match self.api {
            LINKERD => Some(LINKERD),
            POD_CERTIFICATE => Some(POD_CERTIFICATES),
            _ => None,
        }
    }
}

/// The reply to a request.
#[derive(Clone, Debug)]
pub struct Certified {
    /// The SVID and its issuer.
    pub issued: Issued,
    /// When the server would like the next request.
    pub renew_at: UnixTime,
    /// The sequence number of the bundle that it was issued under.
    pub seq: u64,
}

/// What is known of a request when it is refused.
#[derive(Default)]
struct Known {
    spiffe_id: Option<SpiffeId>,
    pod: Option<Arc<ReviewedToken>>,
    kind: Option<Kind>,
}

impl Certifier {
    /// Issues an SVID, or says why not. Counts the outcome; logs a refusal, once.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub async fn certify(&self, request: Request<'_>) -> Result<Certified, Refusal> {
        let (started, mut known) = (self.clock.since_boot(), Known::default());
        let outcome = self.steps(request, &mut known).await;
        let took = self.clock.since_boot().saturating_sub(started);
        self.metrics.certify_seconds.observe(took.as_secs_f64());
        let (result, reason) = match &outcome {
            Ok(_) => ("issued", "issued"),
            Err(refusal) => ("refused", refusal.code.label()),
        };
        let kind = known.kind.map_or("unknown", Kind::label);
        let labels = CertifyLabels { api: request.api, kind, reason, result };
        self.metrics.certify.get_or_create(&labels).inc();
        if let Err(refusal) = &outcome {
            known.log(request, refusal);
        }
        outcome
    }

    async fn steps(&self, request: Request<'_>, known: &mut Known) -> Result<Certified, Refusal> {
        // 1. Only so many at once, and only under a confirmed view.
        let _slot = self.in_flight.try_acquire().map_err(|_| {
            Refusal::new(Code::RATE_LIMITED, format!("{IN_FLIGHT_MAX} requests are under way"))
        })?;
        self.replica.current()?;
        // 2. Authenticate: who holds this token.
        let pod = match request.proof {
            Proof::Token(token) => self.reviews.review(token).await?,
            Proof::Vouched(pod) => Arc::clone(pod),
        };
        known.pod = Some(Arc::clone(&pod));
        // 3. Authorise: a workload gets the identity of its own service account and no other. The
        // view is taken now: the review may have been long.
        let view = self.replica.current()?;
        let subject = self.subject(&view, &pod)?;
        known.spiffe_id = Some(subject.spiffe_id().clone());
        if let Some(asked) = request.identity
            && asked != subject.dns_name()
        {
            let asked: String = asked.chars().take(IDENTITY_CHARS_SHOWN).collect();
            let what = format!("the request names {asked:?}, the token {:?}", subject.dns_name());
            return Err(Refusal::new(Code::IDENTITY_MISMATCH, what));
        }
        // 4. Rate limits, now that it is known whose they are.
        let kind = self.limits.admit(&pod.pod_uid, self.clock.now());
        known.kind = Some(*kind.as_ref().unwrap_or_else(|(kind, _)| kind));
        kind.map_err(|(_, refusal)| refusal)?;
        // 5. The certificate request: proof of possession, and its public key.
        let key = csr::check(request.csr)?.key_for(&subject)?;
        // 6. Prepare, record the intent, sign, verify, look again, record.
        let bearer = Bearer::of(&pod);
        let signer = bearer.signer(&view)?;
        // 5a. No census can ask this holder: the state says first how long it may hold it.
        let usual = Terms::usual(self.profile.svid_lifetime);
        let terms = request.terms.unwrap_or(usual);
        let mut promised = None;
        if let Some(holder) = request.holder_without_acks() {
            let lifetime = view.svid_life(signer, terms.lifetime);
            // Nothing is promised that is not signed then.
            signer.window(self.clock.now(), Terms { lifetime, ..terms })?;
            let latest = self.clock.now() + lifetime + PROMISE_MARGIN;
            self.holders.cover(&view, signer.anchor_id(), holder, latest).await?;
            promised = Some(latest);
        }
        let issued = self.issue(&view, signer, subject, key, bearer, terms).await?;
        if let Some(latest) = promised.filter(|latest| issued.not_after > *latest) {
            let what = format!("the SVID ends at {}, {latest} was promised", issued.not_after);
            return Err(Refusal::new(Code::SELF_CHECK_FAILED, what));
        }
        // 7. The next request of this workload is a renewal.
        self.limits.issued(&pod.pod_uid, issued.not_after);
        let renew_at = renew_at(&issued);
        Ok(Certified { issued, renew_at, seq: view.state.seq })
    }

    /// Steps 6a to 6f, which our own SVID takes too.
    ///
    /// # Errors
    /// An issuer that cannot sign, a log that cannot be written, an SVID that does not verify.
    pub async fn issue(
        &self,
        view: &View,
        signer: &Signer,
        subject: Subject,
        key: WorkloadKey,
        bearer: Bearer<'_>,
        terms: Terms,
    ) -> Result<Issued, Refusal> {
        // 6a. Our profile, checked against the rules.
        let terms = Terms { lifetime: view.svid_life(signer, terms.lifetime), ..terms };
        let linted = Prepared::new(subject, key, signer, self.clock.now(), terms)?.lint(signer)?;
        // 6b. The intent is in the log before there is a signature.
        let spiffe_id = linted.subject().spiffe_id().clone();
        let facts = facts(&linted, &spiffe_id, signer, bearer);
        let (at, serial) = (linted.issued_at().to_string(), linted.serial().to_string());
        let intent = Record::Intent { at: at.clone(), serial: serial.clone(), facts: &facts };
        self.log.append(&intent).await?;
        // 6c, 6d. Sign; parse with a second parser and verify with a second library.
        let checked = linted.sign(signer).and_then(|signed| signed.verify(signer));
        // 6e. The view may have changed, or its lease ended, while the disk was written: what was
        // signed under an issuer that is no longer in force is not handed out.
        let checked = checked.map_err(Refusal::from);
        let outcome = checked.and_then(|issued| self.check_still(signer, bearer).map(|()| issued));
        // 6f. What became of the intent.
        let spiffe_id = spiffe_id.as_str();
        self.log.note(&match &outcome {
            Ok(_) => Record::Issued { at, serial, spiffe_id },
            Err(refusal) => Record::Failed { at, serial, spiffe_id, reason: refusal.to_string() },
        })?;
        outcome
    }

    /// The names of a pod's service account.
    ///
    /// # Errors
    /// [`Code::IDENTITY_MISMATCH`] for names that fit no SPIFFE ID or DNS name.
    pub fn subject(&self, view: &View, pod: &ReviewedToken) -> Result<Subject, Refusal> {
        let trust_domain = &view.state.trust_domain;
        let control = &self.profile.control_namespace;
        Subject::new(trust_domain, control, &pod.namespace, &pod.service_account)
            .map_err(|error| Refusal::new(Code::IDENTITY_MISMATCH, error.to_string()))
    }

    fn check_still(&self, signer: &Signer, bearer: Bearer<'_>) -> Result<(), Refusal> {
        let view = self.replica.current()?;
        still_signs(bearer.signer(&view)?, signer.id())
    }
}

/// What was signed may be handed out only if the same issuer would still sign it.
///
/// # Errors
/// [`Code::ISSUER_UNUSABLE`].
pub fn still_signs(signs: &Signer, signed: KeyId) -> Result<(), Refusal> {
    if signs.id() == signed {
        return Ok(());
    }
    let what = format!("the issuer {signed} was replaced while it signed");
    Err(Refusal::new(Code::ISSUER_UNUSABLE, what))
}

/// Who gets an SVID, as the log has it.
#[derive(Clone, Copy, Debug)]
pub struct Bearer<'a> {
    namespace: &'a str,
    pod: &'a str,
    pod_uid: &'a str,
    node: Option<&'a str>,
    token_id: &'a str,
}

impl<'a> Bearer<'a> {
    fn of(pod: &'a ReviewedToken) -> Self {
        Self {
            namespace: &pod.namespace,
            pod: &pod.pod_name,
            pod_uid: &pod.pod_uid,
            node: pod.node.as_deref(),
            token_id: &pod.token_id,
        }
    }

    /// This process itself, which needs no token.
    pub(crate) fn own(control_namespace: &'a str) -> Self {
        Self { namespace: control_namespace, pod: "", pod_uid: "", node: None, token_id: "own" }
    }

    /// What signs for it. This process is no pod, so no canary, whatever its namespace.
    fn signer<'v>(&self, view: &'v View) -> Result<&'v Arc<Signer>, Refusal> {
        if self.pod_uid.is_empty() {
            return view.own_signer();
        }
        view.signer_for(self.namespace, self.pod_uid)
    }
}

fn facts<'a>(
    linted: &Linted,
    spiffe_id: &'a SpiffeId,
    signer: &Signer,
    bearer: Bearer<'a>,
) -> Facts<'a> {
    Facts {
        spiffe_id: spiffe_id.as_str(),
        namespace: bearer.namespace,
        pod: bearer.pod,
        pod_uid: bearer.pod_uid,
        node: bearer.node,
        token_id: bearer.token_id,
        key_id: linted.key_id(),
        issuer_id: signer.id(),
        not_before: linted.not_before().to_string(),
        not_after: linted.not_after().to_string(),
    }
}

impl Known {
    /// The one line about a refusal.
    fn log(&self, request: Request<'_>, refusal: &Refusal) {
        let pod = self.pod.as_deref();
        tracing::warn!(
            code = %refusal.code,
            reason = refusal.code.label(),
            api = request.api,
            peer = request.peer.map(tracing::field::display),
            workload = self.spiffe_id.as_ref().map(tracing::field::display),
            namespace = pod.map(|pod| pod.namespace.as_str()),
            pod = pod.map(|pod| pod.pod_name.as_str()),
            pod_uid = pod.map(|pod| pod.pod_uid.as_str()),
            error = %refusal.what,
            "no SVID issued"
        );
    }
}

/// At 60 to 70 % of its life from now, spread by the serial number's random bits, so that a fleet
/// that started together does not renew together.
pub(crate) fn renew_at(issued: &Issued) -> UnixTime {
    renewal_of(issued.issued_at, issued.not_after, issued.serial.fraction())
}

/// The same of an SVID of which only this is known; `share` is in [0, 1].
pub fn renewal_of(issued_at: UnixTime, not_after: UnixTime, share: f64) -> UnixTime {
    issued_at + not_after.since(issued_at).mul_f64(0.6 + 0.1 * share)
}

/// Linkerd's API, by which its own proxy asks.
pub const LINKERD: &str = "linkerd";
/// The API server's, by which kubelets ask for their pods.
pub const POD_CERTIFICATE: &str = "pod-certificate";
/// Between a promise and the signature lie a write to the store and one to the log.
const PROMISE_MARGIN: Duration = Duration::from_secs(60);
/// Each holds some kilobytes; more than a core does in a second never wait.
pub const IN_FLIGHT_MAX: usize = 4096;
const IDENTITY_CHARS_SHOWN: usize = 300;
