//! What the shell promises about getting and renewing an SVID, against an identity service on a
//! real socket: nothing is installed that is not ours, whole and believed; what fails is tried
//! again; readiness tells the truth.

#![allow(clippy::unwrap_used, reason = "in a test what cannot be had is a failure")]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use prometheus_client::registry::Registry;
use steadfast_api::trust::v1::stream_response::Message;
use steadfast_api::trust::v1::{DeniedIssuer, Query, Renew};
use steadfast_api::{Code, KeyId, UnixTime};
use steadfast_identity_client::{BootstrapBundle, Config, Expected, Identity, Status, TlsContext};
use steadfast_process::{Clock, Drain, Readiness, SystemClock};
use support::service::{Behaviour, Service, World, acks, hellos, service_name, wire_bundle};
use support::{Authority, bundle, id, name};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A workload `web` whose identity is under way.
struct Workload {
    contexts: watch::Receiver<Arc<TlsContext>>,
    status: watch::Receiver<Status>,
    readiness: Readiness,
    registry: Registry,
    dir: TempDir,
    _running: JoinSet<()>,
}

impl Workload {
    /// With a token, and `mounted` as its bundle.
    fn start(service: &Service, mounted: &[&Authority]) -> Self {
        Self::start_at(&service.address.to_string(), mounted, Some("e30.e30.sig"))
    }

    fn start_at(address: &str, mounted: &[&Authority], token: Option<&str>) -> Self {
        Self::start_by(Arc::new(SystemClock), address, mounted, token)
    }

    fn start_by(
        clock: Arc<dyn Clock>,
        address: &str,
        mounted: &[&Authority],
        token: Option<&str>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        if let Some(token) = token {
            std::fs::write(dir.path().join("token"), token).unwrap();
        }
        std::fs::write(dir.path().join("bundle.json"), bundle(1, mounted).to_jwks()).unwrap();
        let config = Config {
            local: name("web"),
            identity_address: address.to_owned(),
            identity_name: service_name(),
            token_file: dir.path().join("token"),
            bootstrap: BootstrapBundle::File(dir.path().join("bundle.json")),
            version: "test".to_owned(),
        };
        let (readiness, mut registry) = (Readiness::new(), Registry::default());
        let identity = Identity::new(config, clock, &readiness, &mut registry).unwrap();
        let (contexts, status) = (identity.contexts(), identity.status());
        let mut running = JoinSet::new();
        running.spawn(async move { identity.run(Drain::new()).await.unwrap() });
        Self { contexts, status, readiness, registry, dir, _running: running }
    }

    async fn status(&mut self, what: &str, level: impl FnMut(&Status) -> bool) -> Status {
        let waiting = self.status.wait_for(level);
        let Ok(status) = tokio::time::timeout(DEADLINE, waiting).await else {
            panic!("not within {DEADLINE:?}: {what}; {:?}", self.readiness.report());
        };
        status.unwrap().clone()
    }

    async fn unready(&self, part: &str) {
        eventually(|| {
            let report = self.readiness.report();
            report.reasons.get("identity").is_some_and(|reason| reason.contains(part))
        })
        .await
        .unwrap_or_else(|()| panic!("no {part:?} in {:?}", self.readiness.report()));
    }

    async fn ready(&self) {
        tokio::time::timeout(DEADLINE, self.readiness.ready())
            .await
            .unwrap_or_else(|_| panic!("{:?}", self.readiness.report()));
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    fn key(&self) -> Option<KeyId> {
        self.contexts.borrow().svid.as_ref().map(|svid| svid.key().id())
    }
}

/// Waits for a level that nothing announces.
async fn eventually(mut level: impl FnMut() -> bool) -> Result<(), ()> {
    let waiting = async {
        while !level() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting).await.map_err(drop)
}

#[tokio::test]
async fn an_svid_is_renewed_with_a_new_key_each_time_and_the_workload_stays_ready() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(3)).await;
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.ready().await;
    let mut keys = BTreeSet::from([web.key().unwrap()]);
    for renewals in 1..=2 {
        let status = web.status("a renewal", |status| status.renewals >= renewals).await;
        assert!(keys.insert(web.key().unwrap()), "a new key each time");
        assert_eq!(status.spiffe_id, Some(id("web")));
        assert_eq!(status.anchor, Some(world.anchor.id()));
        assert_eq!(status.bundle_seq, Some(1));
        assert!(status.chain_pem.matches("BEGIN CERTIFICATE").count() == 2);
        assert!(web.readiness.report().ready);
    }
    let metrics = web.metrics();
    assert!(
        metrics.contains("control_identity_cert_refreshes_total{result=\"ok\"} 3"),
        "{metrics}"
    );
    assert!(metrics.contains("steadfast_bundle_seq 1"), "{metrics}");
}

#[tokio::test]
async fn works_on_one_thread_with_everything_else() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    let local = tokio::task::LocalSet::new();
    local.run_until(async { Workload::start(&service, &[&world.anchor]).ready().await }).await;
}

#[tokio::test]
async fn a_hung_request_is_given_up_and_the_next_one_succeeds() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    service.behaviour.send_replace(Behaviour::Hang);
    let mut web = Workload::start(&service, &[&world.anchor]);
    eventually(|| service.asked.load(Ordering::SeqCst) == 1).await.unwrap();
    service.behaviour.send_replace(Behaviour::Issue { seq: 1 });
    web.status("an SVID", |status| status.serial.is_some()).await;
    let metrics = web.metrics();
    assert!(metrics.contains("refreshes_total{result=\"error\"} 1"), "{metrics}");
    assert!(metrics.contains("reason=\"timeout\""), "{metrics}");
}

#[tokio::test]
async fn what_was_issued_for_another_key_or_identity_is_never_used() {
    for (behaviour, reason) in
        [(Behaviour::OtherKey, "asked for it"), (Behaviour::OtherIdentity, "and we are")]
    {
        let world = World::new();
        let service = Service::start(&world, Duration::from_secs(60)).await;
        service.behaviour.send_replace(behaviour);
        let mut web = Workload::start(&service, &[&world.anchor]);
        let status = web.status("a failure", |status| status.failures >= 1).await;
        let failure = status.last_failure.unwrap();
        assert!(failure.contains(reason), "{failure}");
        assert_eq!(web.key(), None);
        web.unready("no SVID yet").await;
        service.behaviour.send_replace(Behaviour::Issue { seq: 1 });
        web.ready().await;
    }
}

#[tokio::test]
async fn an_svid_waits_for_the_bundle_it_was_issued_under() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    service.behaviour.send_replace(Behaviour::Refuse);
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.status("a bundle and no SVID", |s| s.bundle_seq == Some(1) && s.failures >= 1).await;
    let refused = service.asked.load(Ordering::SeqCst);
    service.behaviour.send_replace(Behaviour::IssueUnderNext { seq: 2 });
    eventually(|| service.asked.load(Ordering::SeqCst) > refused).await.unwrap();
    // The next renewal is planned far ahead as soon as an SVID is at hand.
    let far = SystemClock.now() + Duration::from_secs(30);
    web.status("a plan", |status| status.next_renewal.is_some_and(|at| at > far)).await;
    assert_eq!(web.key(), None, "its bundle is not here");
    service.publish(wire_bundle(2, &[&world.anchor, &world.next_anchor]));
    web.ready().await;
    let context = web.contexts.borrow().clone();
    assert_eq!(context.bundle.as_ref().unwrap().sequence(), 2);
    let svid = context.svid.as_ref().unwrap();
    assert_eq!(svid.anchor(), world.next_anchor.id(), "both in one snapshot");
    assert_eq!(service.asked.load(Ordering::SeqCst), refused + 1, "waiting is no failure");
}

#[tokio::test]
async fn a_lower_seq_and_a_useless_bundle_change_nothing() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    service.publish(wire_bundle(5, &[&world.anchor]));
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.ready().await;
    let standby = Authority::anchor("standby");
    service.send(Message::Bundle(wire_bundle(4, &[&world.anchor, &standby])));
    service.send(Message::Bundle(wire_bundle(6, &[])));
    service.send(Message::Bundle(wire_bundle(5, &[&standby])));
    let mut elsewhere = wire_bundle(7, &[&world.anchor]);
    elsewhere.trust_domain = "elsewhere".to_owned();
    service.send(Message::Bundle(elsewhere));
    // What follows is in order: once this is there, the others were judged.
    service.send(Message::Bundle(wire_bundle(8, &[&world.anchor])));
    let status = web.status("seq 8", |status| status.bundle_seq == Some(8)).await;
    assert_eq!(status.bundle_anchors, [world.anchor.id()]);
    let metrics = web.metrics();
    for count in ["reason=\"bundle_seq_lower\"} 1", "reason=\"bundle_invalid\"} 3"] {
        assert!(metrics.contains(count), "{metrics}");
    }
}

#[tokio::test]
async fn a_withdrawn_anchor_never_returns() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.ready().await;
    let old = Authority::anchor("old");
    let mut withdrawing = wire_bundle(2, &[&world.anchor]);
    withdrawing.tombstones = vec![old.id().as_bytes().to_vec()];
    service.publish(withdrawing);
    service.publish(wire_bundle(3, &[&world.anchor, &old]));
    let status = web.status("seq 3", |status| status.bundle_seq == Some(3)).await;
    assert_eq!(status.bundle_anchors, [world.anchor.id()]);
}

#[tokio::test]
async fn a_query_is_answered_with_what_both_sides_of_tls_use() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.ready().await;
    let standby = Authority::anchor("standby");
    service.publish(wire_bundle(2, &[&world.anchor, &standby]));
    service.send(Message::Query(Query { nonce: 77 }));
    let mut heard = service.heard.subscribe();
    let answered = heard.wait_for(|heard| acks(heard).iter().any(|ack| ack.nonce == 77));
    let heard = tokio::time::timeout(DEADLINE, answered).await.unwrap().unwrap().clone();
    let ack = acks(&heard).into_iter().find(|ack| ack.nonce == 77).unwrap();
    let context = web.contexts.borrow().clone();
    let bundle = context.bundle.as_ref().unwrap();
    assert_eq!((ack.seq, bundle.sequence()), (2, 2));
    assert_eq!(ack.digest, bundle.digest());
    assert_eq!(ack.svid_issuer, world.issuer.id().as_bytes());
    assert_eq!(ack.mounted_digest.len(), 32);
    assert!(ack.clock_offset.is_some());
    // The handshake with the identity service itself, at least.
    let uses: u64 = acks(&heard).iter().flat_map(|ack| &ack.handshakes).map(|u| u.count).sum();
    assert!(uses >= 1, "{heard:?}");
    web.status("seq 2", |status| status.bundle_seq == Some(2)).await;
}

/// A worker's copy is replaced on its own thread: until it is, an ack would promise what that worker
/// does not do yet.
#[tokio::test]
async fn an_ack_waits_until_every_worker_uses_what_it_is_about() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.ready().await;
    let workers = [(); 2].map(|()| web.contexts.borrow().follower());
    let standby = Authority::anchor("standby");
    for seq in [2, 3] {
        service.publish(wire_bundle(seq, &[&world.anchor, &standby]));
        service.send(Message::Query(Query { nonce: seq }));
    }
    // What comes in order was handled in order: by now both queries were heard, but for the last.
    service.send(Message::Bundle(wire_bundle(4, &[&world.anchor, &standby])));
    web.status("seq 4", |status| status.bundle_seq == Some(4)).await;
    let [slow, gone] = workers;
    drop(gone);
    slow.uses(web.contexts.borrow().generation);
    let mut heard = service.heard.subscribe();
    let answered = heard.wait_for(|heard| acks(heard).iter().any(|ack| ack.nonce == 3));
    let heard = tokio::time::timeout(DEADLINE, answered).await.unwrap().unwrap().clone();
    let first = acks(&heard).into_iter().find(|ack| ack.seq > 1).unwrap();
    assert_eq!((first.seq, first.nonce), (4, 3), "none before, and the newest query is answered");
}

#[tokio::test]
async fn an_svid_that_fits_no_bundle_in_the_end_is_a_failed_try() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    service.behaviour.send_replace(Behaviour::Refuse);
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.status("a bundle and no SVID", |s| s.bundle_seq == Some(1) && s.failures >= 1).await;
    let refused = service.asked.load(Ordering::SeqCst);
    service.behaviour.send_replace(Behaviour::IssueUnderNext { seq: 2 });
    eventually(|| service.asked.load(Ordering::SeqCst) > refused).await.unwrap();
    let far = SystemClock.now() + Duration::from_secs(30);
    web.status("a plan", |status| status.next_renewal.is_some_and(|at| at > far)).await;
    // The bundle comes, and does not have the anchor that the SVID was issued under.
    service.behaviour.send_replace(Behaviour::Refuse);
    service.publish(wire_bundle(2, &[&world.anchor]));
    let reason = "what was issued cannot be used: the chain does not hold";
    let says = |s: &Status| s.last_failure.as_ref().is_some_and(|why| why.starts_with(reason));
    web.status("a failure with its reason, once", says).await;
    assert_eq!(web.key(), None);
    service.behaviour.send_replace(Behaviour::Issue { seq: 2 });
    web.ready().await;
}

/// A clock that a test moves.
#[derive(Default)]
struct Moved(AtomicI64);

impl Clock for Moved {
    fn now(&self) -> UnixTime {
        let now = SystemClock.now().as_millis();
        UnixTime::from_millis(now.saturating_add_signed(self.0.load(Ordering::SeqCst)))
    }

    fn since_boot(&self) -> Duration {
        SystemClock.since_boot()
    }
}

/// Handshakes judge by our own clock: whatever the identity service's says, a process that refuses
/// its own SVID is not ready.
#[tokio::test]
async fn a_clock_by_which_the_svid_is_no_good_is_the_reason_for_not_being_ready() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    let clock = Arc::new(Moved::default());
    let address = service.address.to_string();
    let web = Workload::start_by(clock.clone(), &address, &[&world.anchor], Some("e30.e30.sig"));
    web.ready().await;
    for (moved_secs, direction) in [(120, "ahead of"), (-600, "behind")] {
        clock.0.store(moved_secs * 1000, Ordering::SeqCst);
        web.unready(&format!("s {direction} the identity service's")).await;
        let context = web.contexts.borrow().clone();
        let expected = Expected::from(name("api"));
        let (near, far) = tokio::io::duplex(64);
        drop(far);
        let refused = context.connect(near, &expected, None).await.err().unwrap();
        assert_eq!(refused.code == Code::SVID_EXPIRED, moved_secs > 0, "{refused}");
        clock.0.store(0, Ordering::SeqCst);
        web.ready().await;
    }
}

#[tokio::test]
async fn the_service_can_pull_a_renewal_forward() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(3600)).await;
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.ready().await;
    let window = prost_types::Duration { seconds: 0, nanos: 100_000_000 };
    let from = SystemClock.now();
    for _ in 0..2 {
        let renew = Renew { id: 1, from: Some(from.into()), window: Some(window) };
        service.send(Message::Renew(renew));
    }
    let status = web.status("a renewal", |status| status.renewals >= 1).await;
    assert_eq!(status.renewals, 1, "the same order, told twice, is followed once");
}

#[tokio::test]
async fn a_denied_issuer_is_left_by_renewing() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(3600)).await;
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.ready().await;
    let mut denying = wire_bundle(2, &[&world.anchor]);
    let until = Some((SystemClock.now() + Duration::from_secs(3600)).into());
    denying.denied_issuers =
        vec![DeniedIssuer { issuer_id: world.issuer.id().as_bytes().to_vec(), until }];
    service.publish(denying);
    // The service itself stands on it: its connections are cut, and it is believed no more.
    let status = web.status("a failure", |status| status.failures >= 1).await;
    assert_eq!(status.renewals, 0);
}

#[tokio::test]
async fn a_mounted_bundle_that_does_not_fit_is_named_and_read_again() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    let stale = Authority::anchor("an anchor of long ago");
    let web = Workload::start(&service, &[&stale]);
    web.unready("SFT-TRU-002 bootstrap_bundle_stale").await;
    assert_eq!(service.asked.load(Ordering::SeqCst), 0, "no token is shown to a stranger");
    std::fs::write(web.dir.path().join("bundle.json"), bundle(1, &[&world.anchor]).to_jwks())
        .unwrap();
    web.ready().await;
}

#[tokio::test]
async fn a_missing_token_is_named_and_read_again() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(60)).await;
    let address = service.address.to_string();
    let web = Workload::start_at(&address, &[&world.anchor], None);
    web.unready("token file").await;
    std::fs::write(web.dir.path().join("token"), "e30.e30.sig\n").unwrap();
    web.ready().await;
}

#[tokio::test]
async fn readiness_goes_back_when_the_svid_expires_and_not_before() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(4)).await;
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.ready().await;
    service.behaviour.send_replace(Behaviour::Refuse);
    web.status("a failed renewal", |status| status.failures >= 1).await;
    assert!(web.readiness.report().ready, "one failure unreadies nobody");
    web.unready("SFT-TRU-001 svid_expired").await;
    service.behaviour.send_replace(Behaviour::Issue { seq: 1 });
    web.ready().await;
}

#[tokio::test]
async fn a_service_that_went_away_is_found_again_without_losing_anything() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(3600)).await;
    let mut web = Workload::start(&service, &[&world.anchor]);
    web.ready().await;
    let (key, address) = (web.key(), service.address);
    service.stop();
    drop(service);
    // Another takes its place, at the same address.
    let mut listener = None;
    eventually(|| {
        listener = std::net::TcpListener::bind(address).ok();
        listener.is_some()
    })
    .await
    .unwrap();
    let again = Service::start_on(listener.unwrap(), &world, Duration::from_secs(3600));
    again.publish(wire_bundle(2, &[&world.anchor]));
    web.status("seq 2", |status| status.bundle_seq == Some(2)).await;
    assert_eq!(web.key(), key, "the SVID outlives the service");
    assert!(web.readiness.report().ready);
}

/// This service sends its bundle and then nothing, not even its time, on a connection that stands.
#[tokio::test]
async fn a_service_that_says_nothing_more_is_left_and_asked_again() {
    let world = World::new();
    let service = Service::start(&world, Duration::from_secs(3600)).await;
    let web = Workload::start(&service, &[&world.anchor]);
    web.ready().await;
    let mut heard = service.heard.subscribe();
    let again = heard.wait_for(|heard| hellos(heard) == 2);
    tokio::time::timeout(DEADLINE, again).await.expect("another stream").unwrap();
    assert!(web.readiness.report().ready, "a stream that was lost unreadies nobody");
}

#[tokio::test]
async fn a_service_that_does_not_speak_the_trust_stream_is_named_and_shown_no_token() {
    let world = World::new();
    let service = Service::start_without_streams(&world, Duration::from_secs(3600));
    let web = Workload::start(&service, &[&world.anchor]);
    web.unready("SFT-TLS-014 no_protocol").await;
    assert_eq!(hellos(&service.heard.borrow()), 0);
}

/// Some of the waits above hold a deadline of 5 s and a retry.
const DEADLINE: Duration = Duration::from_secs(30);
