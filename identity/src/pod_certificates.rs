//! Certificates for pods without a sidecar: the kubelet asks for one, by a PodCertificateRequest,
//! and renews it. The request goes the way of every other.
//!
//! Such a pod has no trust stream, so no census can ask it: what it gets is promised in the state
//! first. What stands in the way for a while leaves the request as it is, and the kubelet waits;
//! what would be refused again is denied.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use steadfast_api::{Code, UnixTime};
use steadfast_platform::kubernetes::{Answer, PodCertificate, PodRequest, PodRequests};
use tokio::time::Instant;

use crate::certify::{Certified, Certifier, POD_CERTIFICATE, Proof, Request};
use crate::issue::Terms;
use crate::refusal::Refusal;

/// Signs them.
pub struct PodCertificates {
    certifier: Arc<Certifier>,
    requests: PodRequests,
    /// The requests that wait, by their UIDs.
    waiting: BTreeMap<String, Waiting>,
    /// What was told last, so that what lasts is told once.
    told: Option<String>,
}

/// A request that waits.
struct Waiting {
    request: PodRequest,
    /// When it is looked at next.
    at: Instant,
    /// How often it was, in vain.
    in_vain: u32,
    /// Why; told when it changes.
    told: Option<Refusal>,
}

impl PodCertificates {
    /// Those of this cluster.
    pub fn new(certifier: Arc<Certifier>, requests: PodRequests) -> Self {
        Self { certifier, requests, waiting: BTreeMap::new(), told: None }
    }

    /// Answers requests for ever.
    ///
    /// # Errors
    /// None: what fails is told and tried again.
    pub async fn run(mut self) -> Result<(), Infallible> {
        let mut pending = self.requests.pending();
        loop {
            let due = self.waiting.values().map(|waiting| waiting.at).min();
            let due = due.unwrap_or_else(|| Instant::now() + LOOK_EVERY);
            tokio::select! {
                found = pending.next() => match found {
                    Some(Ok(request)) => {
                        self.told = None;
                        // Several replicas hear of it at once: one of them is likely to be first.
                        let at = Instant::now() + rand::random_range(Duration::ZERO..FIRST_WITHIN);
                        let uid = request.uid().to_owned();
                        let new = Waiting { request, at, in_vain: 0, told: None };
                        self.waiting.insert(uid, new);
                    }
                    Some(Err(error)) => self.tell(error),
                    None => pending = self.requests.pending(),
                },
                () = tokio::time::sleep_until(due) => self.answer_due().await,
            }
        }
    }

    /// An API server that does not serve such requests says so for ever.
    fn tell(&mut self, error: String) {
        if self.told.as_ref() != Some(&error) {
            tracing::info!(error, "no PodCertificateRequests can be read");
            self.told = Some(error);
        }
    }

    async fn answer_due(&mut self) {
        let now = Instant::now();
        let due = self.waiting.iter().filter(|(_, waiting)| waiting.at <= now);
        for uid in due.map(|(uid, _)| uid.clone()).collect::<Vec<_>>() {
            let Some(waiting) = self.waiting.remove(&uid) else { continue };
            let Err(refusal) = self.answer(&waiting.request).await else { continue };
            let request = format!("{}/{}", waiting.request.namespace(), waiting.request.name());
            if waiting.told.as_ref() != Some(&refusal) {
                let error = &refusal.what;
                tracing::warn!(code = %refusal.code, request, error, "a pod waits for its certificate");
            }
            let in_vain = waiting.in_vain.saturating_add(1);
            let pause = (AGAIN_AFTER * 2_u32.saturating_pow(in_vain)).min(AGAIN_AFTER_MAX);
            let (at, told) = (Instant::now() + pause, Some(refusal));
            self.waiting.insert(uid, Waiting { at, in_vain, told, ..waiting });
        }
    }

    /// Answers one, unless that has been done.
    async fn answer(&self, request: &PodRequest) -> Result<(), Refusal> {
        let failed = |error: steadfast_platform::StoreError| {
            Refusal::new(Code::STORE_UNAVAILABLE, error.to_string())
        };
        let Some(request) = self.requests.again(request).await.map_err(failed)? else {
            return Ok(());
        };
        let answer = match self.certificate(&request).await {
            Ok(certificate) => Answer::Issued(certificate),
            Err(refusal) => denial(&refusal).ok_or(refusal)?,
        };
        self.requests.answer(&request, answer).await.map(drop).map_err(failed)
    }

    async fn certificate(&self, request: &PodRequest) -> Result<PodCertificate, Refusal> {
        if let Some(wish) = request.wishes().next() {
            let what = format!("the pod's author wants {wish:?}, which this signer does not know");
            return Err(Refusal::new(Code::CSR_NAMES, what));
        }
        let pod = Arc::new(self.requests.pod(request).await?);
        let lasts = Duration::from_secs(request.life_max_seconds.into());
        let asked = Request {
            api: POD_CERTIFICATE,
            identity: None,
            proof: Proof::Vouched(&pod),
            csr: request.csr(),
            peer: None,
            terms: Some(terms(lasts, self.certifier.profile.svid_lifetime)),
        };
        let Certified { issued, renew_at, .. } = self.certifier.certify(asked).await?;
        let to_second = |at: UnixTime| UnixTime::from_secs(at.as_secs() as i64);
        Ok(PodCertificate {
            chain: issued.chain_pem(),
            not_before: issued.not_before,
            not_after: issued.not_after,
            renew_at: to_second(renew_at),
        })
    }
}

/// As long as every SVID, an hour at least and no longer than is allowed, from its beginning on.
/// The API server takes none that begins five minutes ago, and counts its life from there.
fn terms(lasts_max: Duration, svid_lifetime: Duration) -> Terms {
    let lasts = svid_lifetime.max(LASTS_MIN).min(lasts_max.max(LASTS_MIN));
    Terms { lifetime: lasts - BACKDATE, backdate: BACKDATE, least: LASTS_MIN }
}

/// The answer to a request that would be refused again; `None`: another time it may not be.
fn denial(refusal: &Refusal) -> Option<Answer> {
    let reason = match refusal.code {
        Code::CSR_KEY => "UnsupportedKeyType",
        Code::CSR_NAMES | Code::CSR_AUTHORITY => "UnsupportedWish",
        Code::CSR_MALFORMED | Code::CSR_SIGNATURE | Code::CSR_TOO_LARGE => "MalformedRequest",
        Code::IDENTITY_MISMATCH => "NoIdentity",
        Code::TOKEN_WORKLOAD_GONE => "PodGone",
        _ => return None,
    };
    let hint = match refusal.code {
        Code::CSR_KEY => ": set keyType: ECDSAP256",
        _ => "",
    };
    Some(Answer::Denied { reason, message: format!("{}: {}{hint}", refusal.code, refusal.what) })
}

/// The API server's least.
const LASTS_MIN: Duration = Duration::from_secs(3600);
/// For peers whose clocks are behind; the API server refuses five.
const BACKDATE: Duration = Duration::from_secs(240);
const FIRST_WITHIN: Duration = Duration::from_millis(200);
const AGAIN_AFTER: Duration = Duration::from_secs(1);
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_lives_as_long_as_an_svid_within_what_the_api_server_takes() {
        let hour = Duration::from_secs(3600);
        for (allowed, svid, expected) in [
            (hour * 24, hour * 24, hour * 24),
            (hour * 24, hour / 60, hour),
            (hour, hour * 24, hour),
        ] {
            let terms = terms(allowed, svid);
            assert_eq!(terms.lifetime + terms.backdate, expected);
            assert!(terms.backdate < hour / 12, "the API server refuses five minutes");
        }
    }

    #[test]
    fn what_may_pass_leaves_a_request_as_it_is_and_what_does_not_is_denied() {
        for code in [Code::LEASE_EXPIRED, Code::STORE_UNAVAILABLE, Code::RATE_LIMITED, Code::HALTED]
        {
            assert_eq!(denial(&Refusal::new(code, "for a while")), None, "{code}");
        }
        let denied = denial(&Refusal::new(Code::CSR_KEY, "an RSA key"));
        let Some(Answer::Denied { reason, message }) = denied else { panic!("{denied:?}") };
        assert_eq!(reason, "UnsupportedKeyType");
        assert!(message.contains("ECDSAP256"), "{message}");
    }
}
