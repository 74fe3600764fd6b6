//! The controller's API: who may call it, and what it is told.

#![allow(clippy::unwrap_used)] // A test may: clippy knows it of #[test] functions only.

mod support;

use std::sync::atomic::Ordering;

use steadfast_api::UnixTime;
use steadfast_api::trust::v1;
use steadfast_api::trust::v1::report_part::Part;
use steadfast_api::trust::v1::stream_request::Message as Up;
use steadfast_api::trust::v1::stream_response::Message as Down;
use steadfast_identity::fleet::BATCH_MEMBERS;
use steadfast_identity::replica::LEASE;
use steadfast_platform::Revision;
use steadfast_process::Clock as _;
use support::proxy::{ack, hello, open, web};
use support::{Mesh, token_of};
use tonic::{Code as Grpc, Status};

async fn query(mesh: &Mesh, token: &str, nonce: u64) -> Result<v1::QueryResponse, Status> {
    let request = v1::QueryRequest { token: token.into(), nonce };
    mesh.fleet().await.query(request).await.map(tonic::Response::into_inner)
}

/// A report as the controller: its head, and the members of each batch.
async fn report(mesh: &Mesh) -> (v1::ReportHead, Vec<Vec<v1::Member>>) {
    let request = v1::ReportRequest { token: b"controller".to_vec() };
    let mut parts = mesh.fleet().await.report(request).await.unwrap().into_inner();
    let first = parts.message().await.unwrap().unwrap().part;
    let Some(Part::Head(head)) = first else { panic!("no head but {first:?}") };
    let mut batches = Vec::new();
    while let Some(part) = parts.message().await.unwrap() {
        let Some(Part::Members(v1::Members { members })) = part.part else { panic!("{part:?}") };
        batches.push(members);
    }
    (head, batches)
}

#[track_caller]
fn assert_code(status: &Status, grpc: Grpc, code: &str) {
    assert_eq!(status.metadata().get("sft-code").unwrap(), code, "{status}");
    assert_eq!(status.code(), grpc);
}

#[tokio::test]
async fn only_the_controller_of_the_control_namespace_may_ask() {
    let mesh = Mesh::start().await;
    {
        let mut known = mesh.tokens.known.lock().unwrap();
        let elsewhere = token_of("steadfast", "steadfast-rotation", "rotation-2");
        known.insert("elsewhere".into(), Ok(elsewhere));
        known.insert("beside".into(), Ok(token_of("steadfast", "steadfast-identity", "i-1")));
    }
    for token in ["web", "elsewhere", "beside"] {
        let status = query(&mesh, token, 5).await.unwrap_err();
        assert_code(&status, Grpc::PermissionDenied, "SFT-ID-032");
        let request = v1::ReportRequest { token: token.into() };
        let status = mesh.fleet().await.report(request).await.unwrap_err();
        assert_code(&status, Grpc::PermissionDenied, "SFT-ID-032");
    }
    let status = query(&mesh, "", 5).await.unwrap_err();
    assert_code(&status, Grpc::Unauthenticated, "SFT-ID-001");
    let status = query(&mesh, "no token", 5).await.unwrap_err();
    assert_code(&status, Grpc::Unauthenticated, "SFT-ID-002");
    assert_eq!(mesh.app.streams.newest_query(), 0, "nobody was asked");
    let refusals = |reason| {
        let labels = steadfast_identity::metrics::RefusalLabels { reason };
        mesh.app.certifier.metrics.fleet_refusals.get_or_create(&labels).get()
    };
    assert_eq!((refusals("not_the_controller"), refusals("token_missing")), (6, 1));
    assert!(query(&mesh, "controller", 5).await.unwrap().taken);
}

#[tokio::test]
async fn a_query_that_is_not_newer_than_every_other_asks_nobody() {
    let mesh = Mesh::start().await;
    let mut proxy = web(&mesh).await;
    proxy.bundle().await;
    let answer = |taken, newest_nonce| v1::QueryResponse { taken, newest_nonce };
    assert_eq!(query(&mesh, "controller", 0).await.unwrap(), answer(false, 0));
    assert_eq!(query(&mesh, "controller", 7).await.unwrap(), answer(true, 7));
    assert_eq!(proxy.next().await.unwrap(), Some(Down::Query(v1::Query { nonce: 7 })));
    assert_eq!(query(&mesh, "controller", 7).await.unwrap(), answer(false, 7));
    assert_eq!(query(&mesh, "controller", 6).await.unwrap(), answer(false, 7));
    // Nothing would ascend from one that is far ahead of the time.
    let tomorrow_us = (mesh.clock.now().as_millis() + 86_400_000) * 1000;
    for ahead in [tomorrow_us, u64::MAX] {
        assert_eq!(query(&mesh, "controller", ahead).await.unwrap(), answer(false, 7));
    }
    assert_eq!(query(&mesh, "controller", 8).await.unwrap(), answer(true, 8));
    assert_eq!(proxy.next().await.unwrap(), Some(Down::Query(v1::Query { nonce: 8 })));
}

#[tokio::test]
async fn a_caller_without_end_is_put_off() {
    let mesh = Mesh::start().await;
    let mut fleet = mesh.fleet().await;
    let put_off = async {
        loop {
            let request = v1::QueryRequest { token: b"controller".to_vec(), nonce: 1 };
            if let Err(status) = fleet.query(request).await {
                return status;
            }
        }
    };
    let status = tokio::time::timeout(support::WAIT, put_off).await.unwrap();
    assert_code(&status, Grpc::ResourceExhausted, "SFT-ID-020");
}

#[tokio::test]
async fn a_report_tells_all_that_a_census_needs_of_a_member() {
    let mesh = Mesh::start().await;
    let (head, batches) = report(&mesh).await;
    assert_eq!((head.newest_nonce, head.seq, batches.len()), (0, 1, 0));
    assert_eq!(head.loaded_issuers, [mesh.founding.issuer.id.as_bytes().to_vec()]);
    let revision = mesh.app.certifier.replica.newest().unwrap().revision;
    assert_eq!(Revision(head.revision), revision);
    let now = mesh.clock.now();
    assert!(UnixTime::from(head.started_at.unwrap()) <= now && head.forgotten.is_none());
    assert!(head.server_time.is_some());

    let mut proxy = web(&mesh).await;
    proxy.bundle().await;
    let full = |nonce, anchor: u8| {
        let Up::Ack(ack) = ack("uid-of-web-1", nonce) else { panic!("no ack") };
        Up::Ack(v1::Ack {
            mounted_digest: vec![8; 32],
            svid_issuer: vec![9; 32],
            svid_not_after: Some(UnixTime::from_secs(77).into()),
            clock_offset: Some(prost_types::Duration { seconds: -3, nanos: -250_000_000 }),
            handshakes: vec![v1::AnchorUse { anchor_id: vec![anchor; 32], count: 2 }],
            ..ack
        })
    };
    for (nonce, anchor) in [(0, 1), (4, 2), (0, 3), (6, 4), (0, 5)] {
        proxy.send(Some(full(nonce, anchor))).await;
    }
    let used = || mesh.app.streams.members()[0].handshakes.len();
    mesh.wait(|| used() == 5, "heard of five anchors").await;
    assert!(query(&mesh, "controller", 9).await.unwrap().taken);
    let (head, batches) = report(&mesh).await;
    assert_eq!(head.newest_nonce, 9);
    let member = &batches[0][0];
    let Up::Ack(expected) = full(0, 0) else { panic!("no ack") };
    let expected = v1::Ack { instance: None, handshakes: Vec::new(), ..expected };
    assert_eq!(member.ack.as_ref().unwrap(), &expected);
    let instance = member.instance.as_ref().unwrap();
    assert_eq!(instance.pod_uid, "uid-of-web-1");
    assert_eq!(instance.started_at, Some(UnixTime::from_secs(7).into()));
    assert_eq!((member.name.as_str(), member.version.as_str()), ("demo/web-1", "1"));
    assert!(member.open && UnixTime::from(member.last_heard.unwrap()) >= now);
    assert_eq!((member.answered_before, member.answered), (4, 6));
    assert_eq!(member.used, [vec![3; 32], vec![4; 32]], "between the two answers");

    // The stream breaks and another comes: what was answered is the new one's alone.
    drop(proxy);
    mesh.wait(|| mesh.app.streams.members()[0].open.is_none(), "closed").await;
    assert!(!report(&mesh).await.1[0][0].open);
    let mut proxy = web(&mesh).await;
    proxy.bundle().await;
    let member = &report(&mesh).await.1[0][0];
    assert_eq!((member.open, member.answered_before, member.answered), (true, 0, 0));
    assert_eq!(member.ack.as_ref().unwrap(), &expected);
}

#[tokio::test]
async fn a_report_has_every_member_once_in_batches() {
    let mesh = Mesh::start().await;
    let pods: Vec<_> = (0..BATCH_MEMBERS + 3).map(|pod| format!("pod-{pod:04}")).collect();
    let mut proxies = Vec::new();
    for pod in &pods {
        let token = token_of("demo", "web", pod);
        mesh.tokens.known.lock().unwrap().insert(pod.clone(), Ok(token));
        let token = hello(pod, &format!("uid-of-{pod}"));
        let mut proxy = open(&mesh, Some(token)).await.unwrap();
        proxy.bundle().await;
        proxies.push(proxy);
    }
    let (_, batches) = report(&mesh).await;
    assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [BATCH_MEMBERS, 3]);
    let told: Vec<_> = batches.concat().into_iter().map(|member| member.name).collect();
    assert!(
        told.iter().eq(pods.iter().map(|pod| format!("demo/{pod}")).collect::<Vec<_>>().iter())
    );
}

#[tokio::test]
async fn a_replica_without_a_lease_still_asks_and_reports() {
    let mesh = Mesh::start().await;
    mesh.store.down.store(true, Ordering::SeqCst);
    let lease = i64::try_from(LEASE.as_millis()).unwrap();
    mesh.clock.boot_ms.fetch_add(lease, Ordering::SeqCst);
    mesh.not_ready("trust_domain", "SFT-ID-021").await;
    assert!(query(&mesh, "controller", 3).await.unwrap().taken);
    assert_eq!(report(&mesh).await.0.seq, 1);
}
