//! Each refusal of a token, and what a good one says.

use std::sync::atomic::{AtomicU64, Ordering};

use steadfast_process::Drain;

use super::super::engine::{Engine, Value, Write};
use super::super::issuer::Issuer;
use super::super::issuer::tests::holder;
use super::*;
use crate::standalone::Directory;
use crate::token::IDENTITY_AUDIENCE;

/// A clock that the test sets.
#[derive(Default)]
struct TestClock(AtomicU64);

impl TestClock {
    fn set(&self, secs: u64) {
        self.0.store(secs, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> UnixTime {
        UnixTime::from_millis(self.0.load(Ordering::SeqCst) * 1000)
    }

    fn since_boot(&self) -> Duration {
        Duration::from_secs(self.0.load(Ordering::SeqCst))
    }
}

struct Fixture {
    engine: Engine,
    issuer: Issuer,
    clock: Arc<TestClock>,
    tokens: Arc<Tokens>,
}

const POD: &str = "resources/Pod/demo/web-1";

impl Fixture {
    /// Runs a test beside a store that holds the issuer's keys and one pod.
    async fn with(test: impl AsyncFnOnce(&Self)) {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path());
        let drain = Drain::new();
        let (engine, writer) = Engine::open(&directory, drain.clone()).unwrap();
        let issuer = Issuer::open(&directory.token_key()).unwrap();
        let clock = Arc::new(TestClock::default());
        clock.set(NOW);
        let (tokens, follow) = Tokens::new(Arc::new(engine.clone()), clock.clone());
        let fixture = Self { engine, issuer, clock, tokens };
        let body = async {
            fixture.put(TOKEN_JWKS_KEY, Some(fixture.issuer.jwks())).await;
            fixture.put(POD, Some(&pod("pod-uid", "web"))).await;
            test(&fixture).await;
        };
        tokio::select! {
            _ = follow => panic!("following ended"),
            ended = writer => panic!("{ended:?}"),
            () = body => {}
        }
    }

    async fn put(&self, key: &str, value: Option<&str>) {
        let expected = self.engine.entry(key).map(|entry| entry.revision);
        let value = value.map(|text| Value::Fixed(text.to_owned().into()));
        self.engine.write(vec![Write { key: key.to_owned(), expected, value }]).await.unwrap();
    }

    fn token(&self, audience: &str) -> String {
        let now = UnixTime::from_secs(NOW as i64);
        self.issuer.issue(&holder(), audience, now, LIFE, "id-1".to_owned()).unwrap()
    }

    async fn review(&self, token: &str) -> Result<ReviewedToken, TokenRefusal> {
        self.tokens.review(token.as_bytes(), IDENTITY_AUDIENCE).await
    }
}

fn pod(uid: &str, account: &str) -> String {
    serde_json::json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web-1", "namespace": "demo", "uid": uid},
        "spec": {"serviceAccountName": account, "containers": []},
    })
    .to_string()
}

#[tokio::test]
async fn a_good_token_says_whose_it_is() {
    Fixture::with(async |fixture| {
        let reviewed = fixture.review(&fixture.token(IDENTITY_AUDIENCE)).await.unwrap();
        let expected = ReviewedToken {
            namespace: "demo".to_owned(),
            service_account: "web".to_owned(),
            pod_name: "web-1".to_owned(),
            pod_uid: "pod-uid".to_owned(),
            node: None,
            token_id: "id-1".to_owned(),
            expires: UnixTime::from_secs(NOW as i64) + LIFE,
        };
        assert_eq!(reviewed, expected);
        // As read from a file.
        let line = fixture.token(IDENTITY_AUDIENCE) + "\n";
        assert!(fixture.review(&line).await.is_ok());
    })
    .await;
}

#[tokio::test]
async fn each_bad_token_has_its_own_refusal() {
    Fixture::with(async |fixture| {
        assert_eq!(fixture.review(" \n").await, Err(TokenRefusal::Missing));
        let good = fixture.token(IDENTITY_AUDIENCE);
        let (head, signature) = good.rsplit_once('.').unwrap();
        let forged = format!("{head}.{}", signature.chars().rev().collect::<String>());
        let long = "x".repeat(TOKEN_BYTES_MAX + 1);
        for text in ["garbage", "a.b.c", &good[..good.len() / 2], &forged, &long] {
            let refusal = fixture.review(text).await;
            assert!(matches!(refusal, Err(TokenRefusal::Malformed(_))), "{refusal:?}");
        }
        let other = fixture.review(&fixture.token("another.audience")).await;
        assert!(matches!(other, Err(TokenRefusal::Audience { .. })), "{other:?}");
        let dir = tempfile::tempdir().unwrap();
        let stranger = Issuer::open(&dir.path().join("token.key")).unwrap();
        let now = UnixTime::from_secs(NOW as i64);
        let foreign =
            stranger.issue(&holder(), IDENTITY_AUDIENCE, now, LIFE, "1".to_owned()).unwrap();
        let refusal = fixture.review(&foreign).await;
        assert!(matches!(refusal, Err(TokenRefusal::Malformed(_))), "{refusal:?}");
    })
    .await;
}

#[tokio::test]
async fn a_token_is_good_for_its_life_and_a_small_leeway() {
    Fixture::with(async |fixture| {
        let token = fixture.token(IDENTITY_AUDIENCE);
        let end = NOW + LIFE.as_secs();
        fixture.clock.set(end + LEEWAY.as_secs());
        assert!(fixture.review(&token).await.is_ok());
        fixture.clock.set(end + LEEWAY.as_secs() + 1);
        let expired = Err(TokenRefusal::Expired(UnixTime::from_secs(end as i64)));
        assert_eq!(fixture.review(&token).await, expired);
        fixture.clock.set(NOW - LEEWAY.as_secs());
        assert!(fixture.review(&token).await.is_ok());
        fixture.clock.set(NOW - LEEWAY.as_secs() - 1);
        let early = fixture.review(&token).await;
        assert!(
            matches!(&early, Err(TokenRefusal::Malformed(why)) if why.contains("not valid before"))
        );
    })
    .await;
}

#[tokio::test]
async fn a_token_ends_with_its_pod() {
    Fixture::with(async |fixture| {
        let token = fixture.token(IDENTITY_AUDIENCE);
        fixture.review(&token).await.unwrap();
        for changed in [Some(pod("another", "web")), Some(pod("pod-uid", "api")), None] {
            fixture.put(POD, changed.as_deref()).await;
            let mut revisions = fixture.engine.revisions();
            revisions.borrow_and_update();
            // Whether or not the followed copy has it already.
            let refusal = loop {
                let refusal = fixture.review(&token).await;
                if refusal.is_err() {
                    break refusal;
                }
                tokio::task::yield_now().await;
            };
            assert!(matches!(refusal, Err(TokenRefusal::WorkloadGone(_))), "{refusal:?}");
        }
        fixture.put(POD, Some(&pod("pod-uid", "web"))).await;
        // A copy that lags refuses nobody: the store is asked.
        fixture.review(&token).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_token_that_is_bound_to_no_pod_is_refused() {
    Fixture::with(async |fixture| {
        let mut claims = Claims {
            aud: vec![IDENTITY_AUDIENCE.to_owned()],
            exp: NOW as i64 + 100,
            iat: NOW as i64,
            iss: ISSUER.to_owned(),
            jti: "1".to_owned(),
            nbf: NOW as i64,
            sub: subject("demo", "web"),
            bound: None,
        };
        let unbound = fixture.issuer.sign(&claims).unwrap();
        assert_eq!(fixture.review(&unbound).await, Err(TokenRefusal::Unbound));
        claims.iss = "kubernetes".to_owned();
        let refusal = fixture.review(&fixture.issuer.sign(&claims).unwrap()).await;
        assert!(matches!(refusal, Err(TokenRefusal::Malformed(_))), "{refusal:?}");
    })
    .await;
}

const NOW: u64 = 1_000_000;
const LIFE: Duration = Duration::from_secs(3600);
