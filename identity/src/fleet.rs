//! What the rotation controller is told, and by what it asks: one replica's part of a census.
//!
//! Nobody else may call: the answers name every workload of the mesh, and a query that nobody
//! counts would waste a nonce. A report is not copied out of the table of members as a whole, but
//! read from it batch by batch, as fast as the controller takes it; it is broken off when a member
//! had to go meanwhile, since its head would then say too little of who is missing.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use futures::stream::{self, BoxStream, StreamExt as _};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use steadfast_api::trust::v1;
use steadfast_api::trust::v1::report_part::Part;
use steadfast_api::{Code, KeyId, UnixTime};
use steadfast_platform::ReviewedToken;
use tonic::Status;

use crate::authority::SKEW;
use crate::certify::{Certifier, IN_FLIGHT_MAX};
use crate::member::{Ack, Instance, IssuerUse, Member};
use crate::metrics::RefusalLabels;
use crate::own::OwnSvid;
use crate::refusal::Refusal;
use crate::replica::View;
use crate::server::{Activity, Busy};
use crate::streams::Streams;

/// The parts of a report.
pub type Parts = BoxStream<'static, Result<v1::ReportPart, Status>>;

/// Answers the rotation controller.
pub struct Fleet {
    certifier: Arc<Certifier>,
    streams: Arc<Streams>,
    own: Arc<OwnSvid>,
    /// By pod UID.
    calls: DefaultKeyedRateLimiter<String>,
    started_at: UnixTime,
}

impl Fleet {
    /// Of these streams, from now on.
    pub fn new(certifier: Arc<Certifier>, streams: Arc<Streams>, own: Arc<OwnSvid>) -> Arc<Self> {
        let calls = RateLimiter::keyed(Quota::per_minute(CALLS_PER_MINUTE));
        let started_at = certifier.clock.now();
        Arc::new(Self { certifier, streams, own, calls, started_at })
    }

    /// Asks every member for an ack that carries this nonce, if it is newer than any before.
    ///
    /// # Errors
    /// A caller who is not the controller, or one who calls without end.
    pub async fn query(
        &self,
        token: &[u8],
        nonce: u64,
        peer: Option<SocketAddr>,
    ) -> Result<v1::QueryResponse, Refusal> {
        self.authorize(token, peer).await?;
        // Nonces ascend, and are about the time in microseconds: one far ahead would be the last.
        let ahead = self.certifier.clock.now() + SKEW * 2;
        if nonce > ahead.as_millis().saturating_mul(1000) {
            let newest_nonce = self.streams.newest_query();
            return Ok(v1::QueryResponse { taken: false, newest_nonce });
        }
        Ok(match self.streams.query(nonce) {
            Ok(()) => v1::QueryResponse { taken: true, newest_nonce: nonce },
            Err(newest_nonce) => v1::QueryResponse { taken: false, newest_nonce },
        })
    }

    /// Tells what this replica has loaded, and every member that it knows.
    ///
    /// # Errors
    /// As [`Fleet::query`].
    pub async fn report(
        self: Arc<Self>,
        token: &[u8],
        peer: Option<SocketAddr>,
        activity: Option<Arc<Activity>>,
    ) -> Result<Parts, Refusal> {
        self.authorize(token, peer).await?;
        let forgotten = self.streams.forgotten();
        let head = v1::ReportPart { part: Some(Part::Head(self.head(forgotten))) };
        let report =
            Report { fleet: self, forgotten, last: None, _activity: activity.map(Activity::begin) };
        let members = stream::unfold(Some(report), |report| async move {
            let mut report = report?;
            match report.next() {
                Ok(Some(part)) => Some((Ok(part), Some(report))),
                Ok(None) => None,
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(stream::iter([Ok(head)]).chain(members).boxed())
    }

    /// Forgets callers that have not called for a while.
    pub fn tidy(&self) {
        self.calls.retain_recent();
        self.calls.shrink_to_fit();
    }

    fn head(&self, forgotten: Option<UnixTime>) -> v1::ReportHead {
        let view = self.certifier.replica.newest();
        let now = self.certifier.clock.now();
        let loaded = view.iter().flat_map(|view| view.loaded(now));
        v1::ReportHead {
            newest_nonce: self.streams.newest_query(),
            loaded_issuers: loaded.map(|id| id.as_bytes().to_vec()).collect(),
            seq: view.as_ref().map_or(0, |view| view.state.seq),
            revision: view.as_ref().map_or(0, |view| view.revision.0),
            started_at: Some(self.started_at.into()),
            forgotten: forgotten.map(Into::into),
            server_time: Some(now.into()),
            own: view.map(|view| self.own_ack(&view)),
        }
    }

    /// What we serve, and the SVID that we serve it with.
    fn own_ack(&self, view: &View) -> v1::Ack {
        let svid = self.own.issuer();
        v1::Ack {
            seq: view.state.seq,
            digest: view.digest.to_vec(),
            svid_issuer: svid.map(|(issuer, _)| issuer.as_bytes().to_vec()).unwrap_or_default(),
            svid_not_after: svid.map(|(_, not_after)| not_after.into()),
            ..v1::Ack::default()
        }
    }

    /// Only the controller may call, and not without end. A refusal is counted and logged here.
    async fn authorize(&self, token: &[u8], peer: Option<SocketAddr>) -> Result<(), Refusal> {
        let mut known = None;
        let outcome = self.check(token, &mut known).await;
        if let Err(refusal) = &outcome {
            let labels = RefusalLabels { reason: refusal.code.label() };
            self.certifier.metrics.fleet_refusals.get_or_create(&labels).inc();
            tracing::warn!(
                code = %refusal.code,
                reason = refusal.code.label(),
                peer = peer.map(tracing::field::display),
                namespace = known.as_deref().map(|pod| pod.namespace.as_str()),
                pod = known.as_deref().map(|pod| pod.pod_name.as_str()),
                error = %refusal.what,
                "a call about the fleet was refused"
            );
        }
        outcome
    }

    async fn check(
        &self,
        token: &[u8],
        known: &mut Option<Arc<ReviewedToken>>,
    ) -> Result<(), Refusal> {
        let limited = |what: String| Refusal::new(Code::RATE_LIMITED, what);
        let _slot = self
            .certifier
            .in_flight
            .try_acquire()
            .map_err(|_| limited(format!("{IN_FLIGHT_MAX} requests are under way")))?;
        let pod = known.insert(self.certifier.reviews.review(token).await?);
        if self.calls.check_key(&pod.pod_uid).is_err() {
            let what = format!("the pod calls more than {CALLS_PER_MINUTE} times a minute");
            return Err(limited(what));
        }
        let (namespace, account) = (&pod.namespace, &pod.service_account);
        if *namespace != self.certifier.profile.controller_namespace
            || account != CONTROLLER_ACCOUNT
        {
            let what = format!("the token is of the service account {account} in {namespace}");
            return Err(Refusal::new(Code::NOT_THE_CONTROLLER, what));
        }
        Ok(())
    }
}

/// A report, as far as it has been told.
struct Report {
    fleet: Arc<Fleet>,
    /// As its head has said.
    forgotten: Option<UnixTime>,
    /// The last member that was told of.
    last: Option<Instance>,
    _activity: Option<Busy>,
}

impl Report {
    fn next(&mut self) -> Result<Option<v1::ReportPart>, Status> {
        let (forgotten, members) = self.fleet.streams.look(|table| {
            let batch = table.after(self.last.as_ref(), BATCH_MEMBERS);
            let last = batch.last().map(|member| member.instance.clone());
            let members: Vec<_> = batch.into_iter().map(member).collect();
            (table.forgotten(), last.map(|last| (last, members)))
        });
        if forgotten != self.forgotten {
            return Err(Status::aborted("a member had to go while the report was read: ask again"));
        }
        let Some((last, members)) = members else { return Ok(None) };
        self.last = Some(last);
        Ok(Some(v1::ReportPart { part: Some(Part::Members(v1::Members { members })) }))
    }
}

/// A member as a report tells of it.
pub fn member(known: &Member) -> v1::Member {
    v1::Member {
        instance: Some(v1::Instance {
            pod_uid: known.instance.pod_uid.clone(),
            started_at: Some(known.instance.started_at.into()),
        }),
        name: format!("{}/{}", known.namespace, known.pod),
        open: known.open.is_some(),
        last_heard: Some(known.last_seen.into()),
        answered: known.answered,
        answered_before: known.answered_before,
        used: known.used.iter().map(|id| id.as_bytes().to_vec()).collect(),
        ack: known.ack.as_ref().map(ack),
        version: known.version.clone(),
        issuers: known.issuers.iter().map(issuer_use).collect(),
    }
}

fn ack(ack: &Ack) -> v1::Ack {
    let bytes = |id: Option<KeyId>| id.map(|id| id.as_bytes().to_vec()).unwrap_or_default();
    let (seconds, millis) = (ack.clock_offset_ms / 1000, ack.clock_offset_ms % 1000);
    // Below a thousand, so far within its range.
    let nanos = i32::try_from(millis * 1_000_000).unwrap_or_default();
    v1::Ack {
        instance: None,
        nonce: ack.nonce,
        seq: ack.seq,
        digest: bytes(ack.digest),
        mounted_digest: bytes(ack.mounted_digest),
        svid_issuer: bytes(ack.svid_issuer),
        svid_not_after: ack.svid_not_after.map(Into::into),
        clock_offset: Some(prost_types::Duration { seconds, nanos }),
        handshakes: Vec::new(),
        issuers: Vec::new(),
        held: ack.held.clone(),
    }
}

fn issuer_use(used: &IssuerUse) -> v1::IssuerUse {
    v1::IssuerUse {
        issuer_id: used.issuer.as_bytes().to_vec(),
        inbound: used.inbound,
        outbound: used.outbound,
        failed: used.failed,
        failure: used.failure.clone(),
        failed_at: used.failed_at.map(Into::into),
    }
}

/// Whose service account may call.
pub const CONTROLLER_ACCOUNT: &str = "steadfast-rotation";
/// In one message: some 100 KiB.
pub const BATCH_MEMBERS: usize = 256;
/// A controller that looks every second asks twice each time; one that starts again begins anew.
const CALLS_PER_MINUTE: NonZeroU32 = NonZeroU32::new(600).unwrap();
