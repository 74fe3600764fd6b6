//! Tokens: any bytes as a token, and any claims under a good signature.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::executor::block_on;
use futures::stream::BoxStream;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{KeyPair, PublicKeyData as _};
use steadfast_api::UnixTime;
use steadfast_platform::standalone::Tokens;
use steadfast_platform::store::{Entry, Event, Revision, Store, StoreError, TOKEN_JWKS_KEY};
use steadfast_platform::token::{IDENTITY_AUDIENCE, TokenReview as _};
use steadfast_process::Clock;

use crate::certificates::NOW_SECS;

/// Bytes that begin with `{` are claims, which are signed here; others are a token as they are.
pub(crate) fn token(input: &[u8]) -> bool {
    let fixture = fixture();
    let signed = input.starts_with(b"{").then(|| {
        let claims: serde_json::Value = serde_json::from_slice(input).ok()?;
        jsonwebtoken::encode(&fixture.header, &claims, &fixture.key).ok()
    });
    let presented = signed.flatten().map_or_else(|| input.to_vec(), String::into_bytes);
    match block_on(fixture.tokens.review(&presented, IDENTITY_AUDIENCE)) {
        Ok(reviewed) => {
            assert_eq!((reviewed.namespace.as_str(), reviewed.pod_name.as_str()), ("demo", "web"));
            assert_eq!(
                (reviewed.pod_uid.as_str(), reviewed.service_account.as_str()),
                ("uid-1", "web")
            );
            assert!(input.starts_with(b"{"), "nobody else can sign");
            true
        }
        Err(refusal) => {
            assert!(refusal.to_string().len() < 64 * 1024);
            false
        }
    }
}

pub(crate) fn token_seeds() -> Vec<Vec<u8>> {
    let claims = |audience: &str, exp: i64, pod: &str| {
        serde_json::json!({
            "aud": [audience], "exp": exp, "iat": NOW_SECS, "iss": ISSUER, "jti": "1",
            "nbf": NOW_SECS, "sub": "system:serviceaccount:demo:web",
            "kubernetes.io": {
                "namespace": "demo",
                "pod": { "name": pod, "uid": "uid-1" },
                "serviceaccount": { "name": "web", "uid": "uid-2" },
            },
        })
        .to_string()
        .into_bytes()
    };
    let header = r#"eyJhbGciOiJFUzI1NiIsImtpZCI6ImsiLCJ0eXAiOiJKV1QifQ.e30.AAAA"#;
    vec![
        claims(IDENTITY_AUDIENCE, NOW_SECS + 3600, "web"),
        claims("elsewhere", NOW_SECS + 3600, "web"),
        claims(IDENTITY_AUDIENCE, NOW_SECS - 3600, "web"),
        claims(IDENTITY_AUDIENCE, NOW_SECS + 3600, "another"),
        header.as_bytes().to_vec(),
    ]
}

struct Fixture {
    tokens: Arc<Tokens>,
    header: Header,
    key: EncodingKey,
}

fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let pair = KeyPair::generate().unwrap();
        let (tokens, _work) = Tokens::new(Arc::new(OnePod::new(&pair)), Arc::new(Stopped));
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(KEY_NAME.to_owned());
        Fixture { tokens, header, key: EncodingKey::from_ec_der(&pair.serialize_der()) }
    })
}

/// A store that holds one pod and the key of its token.
struct OnePod {
    jwks: String,
}

impl OnePod {
    fn new(pair: &KeyPair) -> Self {
        // An uncompressed point: 4, x, y.
        let coordinate = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let point = pair.der_bytes();
        let jwks = serde_json::json!({ "keys": [{
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": KEY_NAME,
            "x": coordinate(&point[1..33]), "y": coordinate(&point[33..]),
        }]});
        Self { jwks: jwks.to_string() }
    }

    fn entry(key: &str, value: &str) -> Entry {
        let value = Bytes::copy_from_slice(value.as_bytes());
        Entry { key: key.to_owned(), value, revision: Revision(1) }
    }
}

#[async_trait::async_trait]
impl Store for OnePod {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(match key {
            TOKEN_JWKS_KEY => Some(Self::entry(key, &self.jwks)),
            "resources/Pod/demo/web" => Some(Self::entry(key, POD)),
            _ => None,
        })
    }

    async fn list(&self, _: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        Ok((Vec::new(), Revision(1)))
    }

    async fn compare_and_swap(
        &self,
        _: &str,
        _: Option<Revision>,
        _: Option<Bytes>,
    ) -> Result<Revision, StoreError> {
        Err(StoreError::Denied("this store never changes".to_owned()))
    }

    async fn watch(
        &self,
        _: &str,
        _: Revision,
    ) -> Result<BoxStream<'static, Result<Event, StoreError>>, StoreError> {
        Ok(futures::stream::pending().boxed())
    }
}

/// Time stands still.
struct Stopped;

impl Clock for Stopped {
    fn now(&self) -> UnixTime {
        UnixTime::from_secs(NOW_SECS)
    }

    fn since_boot(&self) -> Duration {
        Duration::from_secs(1000)
    }
}

const POD: &str = r#"{"metadata":{"name":"web","namespace":"demo","uid":"uid-1"},"spec":{"containers":[],"serviceAccountName":"web"}}"#;
const KEY_NAME: &str = "k";
const ISSUER: &str = "steadfast-store";
