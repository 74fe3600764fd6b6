//! Promise: a connection of our own obeys each new bundle while it is open.

#![allow(clippy::unwrap_used, reason = "in a test what cannot be had is a failure")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use steadfast_identity_client::{
    ClientAuth, Contexts, Expected, Footing, Issued, OwnSvid, SvidKey, TlsContext, TlsStream,
    Trust, Vouched,
};
use support::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

/// A client that trusts both anchors, and a server under the first.
struct Pair {
    contexts: Contexts,
    client: Vouched<DuplexStream>,
    server: TlsStream<DuplexStream>,
}

fn own(issuer: &Authority, anchor: &Authority) -> Arc<OwnSvid> {
    let (key, leaf) = (SvidKey::generate().unwrap(), Leaf::of(&name("web")));
    let issued = Issued { chain: issuer.sign(&leaf, &key), issued_at: leaf.not_before };
    Arc::new(OwnSvid::check(issued, key, &id("web"), &trust(&[anchor]), NOW).unwrap())
}

async fn pair(anchors: [&Authority; 2], issuer: &Authority) -> Pair {
    let clock = TestClock::at(NOW);
    let contexts = Contexts::new(clock.clone());
    let client = contexts.publish(Some(own(issuer, anchors[0])), trust(&anchors)).unwrap();
    let server: Arc<TlsContext> = workload(clock, issuer, "api", trust(&anchors), anchors[0]);
    let (near, far) = duplex(64 * 1024);
    let expected = Expected::from(name("api"));
    let (connected, accepted) = tokio::join!(
        client.connect(near, &expected, Some(b"h2")),
        server.accept(far, ClientAuth::Required, &[b"h2"])
    );
    let (stream, peer) = connected.unwrap();
    let footing = Footing::new(&client, Some(peer));
    let client = Vouched::new(stream, footing, contexts.subscribe());
    let mut pair = Pair { contexts, client, server: accepted.unwrap().0 };
    pair.talks().await;
    pair
}

impl Pair {
    fn publish(&self, trust: Arc<Trust>) {
        let svid = self.contexts.current().svid.clone();
        self.contexts.publish(svid, trust).unwrap();
    }

    async fn talks(&mut self) {
        self.server.write_all(b"ping").await.unwrap();
        let mut ping = [0; 4];
        self.client.read_exact(&mut ping).await.unwrap();
    }

    /// What a read that waits comes to.
    async fn read(&mut self) -> String {
        let mut byte = [0];
        let reading = self.client.read(&mut byte);
        let read = tokio::time::timeout(Duration::from_secs(3600), reading).await;
        read.map_or_else(|_| "waits".to_owned(), |read| read.unwrap_err().to_string())
    }
}

#[tokio::test(start_paused = true)]
async fn a_denied_issuer_ends_it_at_once_though_nothing_is_said() {
    let (a, b) = (Authority::anchor("a"), Authority::anchor("b"));
    let issuer = a.issuer("issuer");
    let mut pair = pair([&a, &b], &issuer).await;
    let began = tokio::time::Instant::now();
    pair.publish(trust_denying(&[&a, &b], &[issuer.id()]));
    let ended = pair.read().await;
    assert!(ended.starts_with("SFT-T"), "{ended}");
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_withdrawn_anchor_ends_it_within_a_moment_and_another_one_does_not() {
    let (a, b) = (Authority::anchor("a"), Authority::anchor("b"));
    let issuer = a.issuer("issuer");
    let mut pair = pair([&a, &b], &issuer).await;
    pair.publish(trust(&[&a]));
    assert_eq!(pair.read().await, "waits");
    pair.talks().await;
    let began = tokio::time::Instant::now();
    pair.publish(trust(&[&b]));
    let ended = pair.read().await;
    assert!(ended.starts_with("SFT-T"), "{ended}");
    assert!(began.elapsed() <= Duration::from_secs(31), "{:?}", began.elapsed());
}
