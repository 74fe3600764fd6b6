//! The trust stream: whose it is, what it pushes, whose acks it takes.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use steadfast_api::UnixTime;
use steadfast_api::trust::v1;
use steadfast_api::trust::v1::stream_request::Message as Up;
use steadfast_api::trust::v1::stream_response::Message as Down;
use steadfast_api_grpc::stream::{HEARTBEAT, SIGN_OF_LIFE, SILENT_BEATS_MAX, Wire, framed};
use steadfast_identity::replica::LEASE;
use steadfast_process::Clock as _;
use steadfast_rotation_protocol::trust_domain::RenewOrder;
use support::proxy::{ack, hello, open, web};
use support::{Mesh, WAIT};
use tokio::io::DuplexStream;
use tokio::task::JoinHandle;
use tonic::Status;

#[track_caller]
fn assert_code(status: &Status, code: &str) {
    assert!(status.message().starts_with(code), "{status}");
}

fn member(mesh: &Mesh) -> steadfast_identity::member::Member {
    mesh.app.streams.members().into_iter().next().unwrap()
}

#[tokio::test]
async fn the_first_message_is_the_bundle_and_every_change_follows() {
    let mesh = Mesh::start().await;
    let mut proxy = web(&mesh).await;
    let bundle = proxy.bundle().await;
    assert_eq!((bundle.seq, bundle.trust_domain.as_str()), (1, "cluster.local"));
    assert_eq!(bundle.anchors.len(), 2);
    let mut state = mesh.founding.state.clone();
    state.seq = 2;
    state.tombstones.push(state.anchors.pop().unwrap().id);
    mesh.store.put_state(&state);
    let bundle = proxy.bundle().await;
    assert_eq!((bundle.seq, bundle.anchors.len(), bundle.tombstones.len()), (2, 1, 1));
}

#[tokio::test]
async fn a_query_and_a_renewal_reach_every_stream_also_one_that_comes_later() {
    let mesh = Mesh::start().await;
    let mut early = web(&mesh).await;
    early.bundle().await;
    mesh.app.streams.query(9).unwrap();
    let id = mesh.app.streams.renew(mesh.clock.now(), Duration::from_secs(60));
    let mut late = open(&mesh, Some(hello("api", "uid-of-api-1"))).await.unwrap();
    late.bundle().await;
    for proxy in [&mut early, &mut late] {
        let query = proxy.next().await.unwrap();
        assert_eq!(query, Some(Down::Query(v1::Query { nonce: 9 })));
        let Some(Down::Renew(renew)) = proxy.next().await.unwrap() else { panic!("no renewal") };
        assert_eq!((renew.id, renew.window.unwrap().seconds), (id, 60));
    }
}

/// What was issued since then has followed it, and what was issued before has ended.
#[tokio::test]
async fn an_order_is_told_no_more_once_every_svid_from_before_it_has_ended() {
    let mesh = Mesh::start().await;
    mesh.app.streams.renew(mesh.clock.now(), Duration::from_secs(60));
    mesh.clock.wall_ms.fetch_add(3_661_000, Ordering::SeqCst);
    let mut late = web(&mesh).await;
    late.bundle().await;
    mesh.app.streams.query(9).unwrap();
    assert_eq!(late.next().await.unwrap(), Some(Down::Query(v1::Query { nonce: 9 })));
    let newer = mesh.app.streams.renew(mesh.clock.now(), Duration::from_secs(60));
    let Some(Down::Renew(renew)) = late.next().await.unwrap() else { panic!("no renewal") };
    assert_eq!(renew.id, newer);
}

#[tokio::test]
async fn the_ids_of_orders_differ_between_replicas_and_over_restarts() {
    let mesh = Mesh::start().await;
    let renew = |mesh: &Mesh| mesh.app.streams.renew(mesh.clock.now(), Duration::ZERO);
    let ids = [renew(&mesh), renew(&mesh), renew(&mesh)];
    assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
    let other = Mesh::start().await;
    assert!(renew(&other) > ids[0]);
}

#[tokio::test]
async fn the_states_order_to_renew_reaches_every_stream_once_beside_the_admin_pages() {
    let mesh = Mesh::start().await;
    let mut early = web(&mesh).await;
    early.bundle().await;
    // Ids of its own, possibly below those that the admin page has given.
    let admins = mesh.app.streams.renew(mesh.clock.now(), Duration::ZERO);
    let renewal = async |proxy: &mut support::proxy::Proxy| match proxy.next().await.unwrap() {
        Some(Down::Renew(renew)) => renew,
        other => panic!("no renewal but {other:?}"),
    };
    assert_eq!(renewal(&mut early).await.id, admins);
    let mut state = mesh.founding.state.clone();
    let from = mesh.clock.now();
    let order = |id| RenewOrder { id, from, window: Duration::from_secs(300) };
    state.renew = Some(order(3));
    mesh.store.put_state(&state);
    let told = renewal(&mut early).await;
    assert_eq!((told.id, told.from), (3, Some(from.into())));
    assert_eq!(told.window, Some(prost_types::Duration { seconds: 300, nanos: 0 }));
    let mut late = open(&mesh, Some(hello("api", "uid-of-api-1"))).await.unwrap();
    late.bundle().await;
    let both = [renewal(&mut late).await.id, renewal(&mut late).await.id];
    assert_eq!(both, [3, admins]);
    // Another change of the state repeats nothing; the next order is told.
    state.paused = true;
    mesh.store.put_state(&state);
    state.renew = Some(order(4));
    mesh.store.put_state(&state);
    assert_eq!(renewal(&mut early).await.id, 4);
    assert_eq!(renewal(&mut late).await.id, 4);
    // Of an order that is older than any SVID nobody is told.
    state.renew = Some(RenewOrder { from: UnixTime::from_secs(0), ..order(5) });
    state.seq = 2;
    mesh.store.put_state(&state);
    assert_eq!(early.bundle().await.seq, 2);
    mesh.app.streams.query(9).unwrap();
    assert_eq!(early.next().await.unwrap(), Some(Down::Query(v1::Query { nonce: 9 })));
}

#[tokio::test]
async fn a_pod_that_says_hello_without_end_is_put_off_and_nobody_else() {
    let mesh = Mesh::start().await;
    let put_off = async {
        loop {
            if let Err(status) = open(&mesh, Some(hello("web", "uid-of-web-1"))).await {
                return status;
            }
        }
    };
    let status = tokio::time::timeout(WAIT, put_off).await.unwrap();
    assert_code(&status, "SFT-ID-020");
    assert!(open(&mesh, Some(hello("api", "uid-of-api-1"))).await.is_ok());
}

#[tokio::test]
async fn an_ack_that_shows_a_live_svid_makes_the_next_request_a_renewal() {
    let mesh = Mesh::start().await;
    let mut proxy = web(&mesh).await;
    proxy.bundle().await;
    let Up::Ack(mut live) = ack("uid-of-web-1", 4) else { panic!("no ack") };
    live.svid_not_after = Some((mesh.clock.now() + Duration::from_secs(60)).into());
    proxy.send(Some(Up::Ack(live))).await;
    mesh.wait(|| member(&mesh).answered == 4, "answered").await;
    let kind = mesh.app.certifier.limits.admit("uid-of-web-1", mesh.clock.now()).unwrap();
    assert_eq!(kind, steadfast_identity::limits::Kind::Renewal);
}

#[tokio::test]
async fn an_ack_is_kept_with_the_nonce_that_it_answers() {
    let mesh = Mesh::start().await;
    let mut proxy = web(&mesh).await;
    proxy.bundle().await;
    proxy.send(Some(ack("uid-of-web-1", 4))).await;
    mesh.wait(|| member(&mesh).answered == 4, "answered").await;
    let known = member(&mesh);
    assert_eq!(known.ack.unwrap().seq, 1);
    assert_eq!(known.spiffe_id.as_str(), support::WEB_ID);
    // The stream ends: the member is still known, as one that has none.
    drop(proxy);
    mesh.wait(|| member(&mesh).open.is_none(), "closed").await;
    let kept = Duration::from_secs(3600) + steadfast_identity::authority::SKEW;
    mesh.app.streams.tidy(known.last_seen + kept + Duration::from_secs(60));
    assert!(mesh.app.streams.members().is_empty());
}

#[tokio::test]
async fn an_ack_that_names_another_workload_closes_the_stream() {
    let mesh = Mesh::start().await;
    let mut victim = open(&mesh, Some(hello("api", "uid-of-api-1"))).await.unwrap();
    victim.bundle().await;
    let mut forger = web(&mesh).await;
    forger.bundle().await;
    forger.send(Some(ack("uid-of-api-1", 4))).await;
    let status = forger.next().await.unwrap_err();
    assert_code(&status, "SFT-ID-030");
    let members = mesh.app.streams.members();
    assert!(members.iter().all(|member| member.ack.is_none() && member.answered == 0));
    // Another start of the same pod is another instance.
    let mut forger = web(&mesh).await;
    forger.bundle().await;
    let Up::Ack(mut older) = ack("uid-of-web-1", 4) else { panic!("no ack") };
    older.instance.as_mut().unwrap().started_at = Some(UnixTime::from_secs(6).into());
    forger.send(Some(Up::Ack(older))).await;
    assert_code(&forger.next().await.unwrap_err(), "SFT-ID-030");
}

#[tokio::test]
async fn a_hello_must_be_first_and_once_and_of_the_tokens_own_pod() {
    let mesh = Mesh::start().await;
    let refused = async |first| open(&mesh, first).await.err().unwrap();
    assert_code(&refused(Some(hello("web", "uid-of-api-1"))).await, "SFT-ID-030");
    assert_code(&refused(Some(hello("", "uid-of-web-1"))).await, "SFT-ID-001");
    assert_code(&refused(Some(hello("other", "uid-of-web-1"))).await, "SFT-ID-002");
    assert_code(&refused(Some(ack("uid-of-web-1", 0))).await, "SFT-ID-031");
    assert_code(&refused(None).await, "SFT-ID-031");
    let mut proxy = web(&mesh).await;
    proxy.bundle().await;
    proxy.send(Some(hello("web", "uid-of-web-1"))).await;
    assert_code(&proxy.next().await.unwrap_err(), "SFT-ID-031");
    // What is no message, and what is longer than any.
    for bytes in [&[0, 0, 0, 1, 0xff][..], &[0xff; 4]] {
        let mut proxy = web(&mesh).await;
        proxy.bundle().await;
        proxy.send_raw(bytes).await;
        assert_code(&proxy.next().await.unwrap_err(), "SFT-ID-031");
    }
    // Without a message it is a sign of life.
    let mut proxy = web(&mesh).await;
    proxy.bundle().await;
    proxy.send(None).await;
    proxy.send(Some(ack("uid-of-web-1", 0))).await;
    mesh.wait(|| member(&mesh).ack.is_some(), "heard after it").await;
}

#[tokio::test]
async fn a_newer_stream_of_an_instance_takes_the_place_of_the_older() {
    let mesh = Mesh::start().await;
    let mut older = web(&mesh).await;
    older.bundle().await;
    let mut newer = web(&mesh).await;
    newer.bundle().await;
    assert_eq!(mesh.app.streams.members().len(), 1);
    assert_eq!(older.next().await.unwrap_err().code(), tonic::Code::Aborted);
    newer.send(Some(ack("uid-of-web-1", 5))).await;
    mesh.wait(|| member(&mesh).answered == 5, "answered").await;
}

#[tokio::test]
async fn past_the_lease_no_bundle_is_pushed_and_then_the_newest() {
    let mesh = Mesh::start().await;
    let mut proxy = web(&mesh).await;
    proxy.bundle().await;
    mesh.store.down.store(true, Ordering::SeqCst);
    let lease = i64::try_from(LEASE.as_millis()).unwrap();
    mesh.clock.boot_ms.fetch_add(lease, Ordering::SeqCst);
    mesh.not_ready("trust_domain", "SFT-ID-021").await;
    let refused = open(&mesh, Some(hello("web", "uid-of-web-1"))).await.err().unwrap();
    assert_code(&refused, "SFT-ID-021");
    let mut state = mesh.founding.state.clone();
    state.seq = 3;
    mesh.store.put_state(&state);
    mesh.store.down.store(false, Ordering::SeqCst);
    assert_eq!(proxy.bundle().await.seq, 3);
}

#[tokio::test]
async fn a_draining_replica_waits_for_no_hello() {
    let mesh = Mesh::start().await;
    let (mut silent, served) = in_process(&mesh);
    mesh.drain.start();
    let ends = ended(&mut silent).await;
    assert_eq!(ends.code, tonic::Code::Unavailable as i32);
    served.await.unwrap();
}

#[tokio::test]
async fn a_proxy_that_says_nothing_more_is_given_up_and_one_that_is_alive_is_not() {
    let mesh = Mesh::start().await;
    let (mut proxy, served) = in_process(&mesh);
    let hello = v1::StreamRequest { message: Some(hello("web", "uid-of-web-1")) };
    proxy.send(&framed(&hello, &[])).await.unwrap();
    mesh.wait(|| mesh.app.streams.members().iter().any(|m| m.open.is_some()), "open").await;
    // Nothing here waits for anything but time and this stream.
    tokio::time::pause();
    for _ in 0..4 {
        tokio::time::advance(SIGN_OF_LIFE).await;
        proxy.send(&framed(&v1::StreamRequest::default(), &[])).await.unwrap();
    }
    let began = tokio::time::Instant::now();
    let given_up = tokio::time::timeout(HEARTBEAT * (SILENT_BEATS_MAX + 2), ended(&mut proxy));
    let ends = given_up.await.unwrap();
    assert_eq!(ends.code, tonic::Code::DeadlineExceeded as i32);
    assert!(began.elapsed() > HEARTBEAT * (SILENT_BEATS_MAX - 1), "and not before");
    served.await.unwrap();
    assert!(member(&mesh).open.is_none());
}

/// A stream without a network: time stands still in a test only where nobody waits for one.
fn in_process(mesh: &Mesh) -> (Wire<DuplexStream>, JoinHandle<()>) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let streams = mesh.app.streams.clone();
    let peer = ([127, 0, 0, 1], 1).into();
    #[expect(clippy::disallowed_methods, reason = "it is awaited")]
    let served = tokio::spawn(async move { streams.serve(far, peer).await });
    (Wire::new(near, 1 << 20), served)
}

async fn ended(wire: &mut Wire<DuplexStream>) -> v1::End {
    loop {
        let said: v1::StreamResponse = wire.next().await.unwrap().unwrap();
        if let Some(Down::End(end)) = said.message {
            return end;
        }
    }
}

#[tokio::test]
async fn a_draining_replica_ends_its_streams_with_unavailable() {
    let mesh = Mesh::start().await;
    let mut proxy = web(&mesh).await;
    proxy.bundle().await;
    mesh.drain.start();
    assert_eq!(proxy.next().await.unwrap_err().code(), tonic::Code::Unavailable);
}

#[tokio::test]
async fn a_review_is_remembered_only_while_its_pod_is_unchanged() {
    let mesh = Mesh::start().await;
    let reviews = || mesh.tokens.reviews.load(Ordering::SeqCst);
    let review = async || mesh.app.certifier.reviews.review(b"web").await.unwrap();
    // Followed soon after the start: from then on a second review asks nobody.
    let remembered = async {
        loop {
            review().await;
            let before = reviews();
            review().await;
            if reviews() == before {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(WAIT, remembered).await.unwrap();
    mesh.tokens.known.lock().unwrap().remove("web");
    review().await;
    // The pod is deleted: what was said of its token no longer counts.
    mesh.store.delete("resources/Pod/demo/web-1");
    let forgotten = async {
        while mesh.app.certifier.reviews.review(b"web").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(WAIT, forgotten).await.unwrap();
}
