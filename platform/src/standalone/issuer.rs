//! The token issuer: a key of its own, and tokens that are bound to one pod.

use std::path::Path;
use std::time::Duration;

use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header};
use steadfast_api::{KeyId, UnixTime};

use super::claims::{Bound, Claims, ISSUER, Reference, subject};
use super::tokens::signature_only;
use crate::keys::{self, KeyStoreError, Zeroizing};
use crate::names::ObjectName;

/// The issuer with its key.
pub(super) struct Issuer {
    key: EncodingKey,
    header: Header,
    public: DecodingKey,
    jwks: String,
}

/// Why there is no issuer.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    /// The file of its key cannot be used.
    #[error("the token issuer's key cannot be used")]
    File(#[from] KeyStoreError),
    /// The file holds something else.
    #[error(
        "{0} is no ECDSA P-256 key in PKCS#8; move it away, and a new one is made: tokens of the \
         old one are then replaced"
    )]
    Key(String),
}

/// For whom a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) pod: ObjectName,
    pub(super) pod_uid: String,
    pub(super) service_account: String,
    pub(super) service_account_uid: String,
    pub(super) node: Option<String>,
}

impl Issuer {
    /// The issuer whose key is in this file, which is made if there is none.
    pub(super) fn open(path: &Path) -> Result<Self, IssuerError> {
        let strange = || IssuerError::Key(path.display().to_string());
        let pkcs8 = match keys::read(path) {
            Err(KeyStoreError::Missing(_)) => {
                let pkcs8 = generate().ok_or_else(strange)?;
                keys::write_new(path, &pkcs8)?;
                tracing::info!(path = %path.display(), "a key for the token issuer was made");
                pkcs8
            }
            other => other?,
        };
        Self::new(&pkcs8).ok_or_else(strange)
    }

    fn new(pkcs8: &[u8]) -> Option<Self> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8).ok()?;
        let spki: PublicKeyX509Der<'_> = pair.public_key().as_der().ok()?;
        let id = KeyId::of_spki(spki.as_ref()).to_string();
        let key = EncodingKey::from_ec_der(pkcs8);
        let mut jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).ok()?;
        jwk.common.key_id = Some(id.clone());
        jwk.common.public_key_use = Some(PublicKeyUse::Signature);
        let public = DecodingKey::from_jwk(&jwk).ok()?;
        let jwks = serde_json::to_string(&JwkSet { keys: vec![jwk] }).ok()?;
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(id);
        Some(Self { key, header, public, jwks })
    }

    /// Its public key, as a JWK set.
    pub(super) fn jwks(&self) -> &str {
        &self.jwks
    }

    /// A token for a pod, from now on.
    pub(super) fn issue(
        &self,
        holder: &Holder,
        audience: &str,
        now: UnixTime,
        life: Duration,
        id: String,
    ) -> Result<String, jsonwebtoken::errors::Error> {
        let begins = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let life = i64::try_from(life.as_secs()).unwrap_or(i64::MAX);
        let reference =
            |name: &str, uid: &str| Reference { name: name.to_owned(), uid: Some(uid.to_owned()) };
        let claims = Claims {
            aud: vec![audience.to_owned()],
            exp: begins.saturating_add(life),
            iat: begins,
            iss: ISSUER.to_owned(),
            jti: id,
            nbf: begins,
            sub: subject(&holder.pod.namespace, &holder.service_account),
            bound: Some(Bound {
                namespace: holder.pod.namespace.clone(),
                node: holder.node.as_ref().map(|name| Reference { name: name.clone(), uid: None }),
                pod: Some(reference(&holder.pod.name, &holder.pod_uid)),
                serviceaccount: reference(&holder.service_account, &holder.service_account_uid),
            }),
        };
        self.sign(&claims)
    }

    pub(super) fn sign(&self, claims: &Claims) -> Result<String, jsonwebtoken::errors::Error> {
        jsonwebtoken::encode(&self.header, claims, &self.key)
    }

    /// When a token is to be renewed: at 80 % of its life. `None` if it is not ours, not this
    /// pod's, or for someone else.
    pub(super) fn renew_at(
        &self,
        token: &[u8],
        holder: &Holder,
        audience: &str,
    ) -> Option<UnixTime> {
        let token = jsonwebtoken::decode::<Claims>(token, &self.public, &signature_only()).ok()?;
        let claims = token.claims;
        let bound = claims.bound?;
        let pod = bound.pod?;
        let (namespace, account) = (&holder.pod.namespace, &holder.service_account);
        let same = claims.iss == ISSUER
            && claims.aud == [audience]
            && claims.sub == subject(namespace, account)
            && (&bound.namespace, &pod.name) == (namespace, &holder.pod.name)
            && pod.uid.as_ref() == Some(&holder.pod_uid)
            && bound.serviceaccount.uid.as_ref() == Some(&holder.service_account_uid)
            && bound.node.map(|node| node.name) == holder.node;
        let life = Duration::from_secs(u64::try_from(claims.exp - claims.iat).ok()?);
        same.then(|| UnixTime::from_secs(claims.iat) + life * 4 / 5)
    }
}

fn generate() -> Option<Zeroizing<Vec<u8>>> {
    let random = SystemRandom::new();
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).ok()?;
    Some(Zeroizing::new(pkcs8.as_ref().to_vec()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::standalone) fn holder() -> Holder {
        Holder {
            pod: ObjectName::new("demo", "web-1"),
            pod_uid: "pod-uid".to_owned(),
            service_account: "web".to_owned(),
            service_account_uid: "sa-uid".to_owned(),
            node: None,
        }
    }

    #[test]
    fn a_key_is_made_once_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token.key");
        let first = Issuer::open(&path).unwrap();
        assert_eq!(Issuer::open(&path).unwrap().jwks(), first.jwks());
        std::fs::write(&path, "something else").unwrap();
        let error = Issuer::open(&path).err().unwrap();
        assert!(error.to_string().contains("token.key"), "{error}");
    }

    #[test]
    fn a_token_is_renewed_at_four_fifths_of_its_life_and_only_for_its_pod() {
        let dir = tempfile::tempdir().unwrap();
        let issuer = Issuer::open(&dir.path().join("token.key")).unwrap();
        let now = UnixTime::from_secs(1000);
        let life = Duration::from_secs(100);
        let token = issuer.issue(&holder(), "a", now, life, "1".to_owned()).unwrap();
        let renew_at =
            |holder: &Holder, audience| issuer.renew_at(token.as_bytes(), holder, audience);
        assert_eq!(renew_at(&holder(), "a"), Some(UnixTime::from_secs(1080)));
        assert_eq!(renew_at(&holder(), "b"), None);
        for other in [
            Holder { pod: ObjectName::new("demo", "web-2"), ..holder() },
            Holder { pod_uid: "x".to_owned(), ..holder() },
            Holder { service_account: "x".to_owned(), ..holder() },
            Holder { service_account_uid: "x".to_owned(), ..holder() },
            Holder { node: Some("x".to_owned()), ..holder() },
        ] {
            assert_eq!(renew_at(&other, "a"), None);
        }
        let another = Issuer::open(&dir.path().join("another.key")).unwrap();
        assert_eq!(another.renew_at(token.as_bytes(), &holder(), "a"), None);
        assert_eq!(issuer.renew_at(b"garbage", &holder(), "a"), None);
    }
}
