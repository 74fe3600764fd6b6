//! The private key of an authority, as the certificates' library wants it.
//!
//! A key is known by its id, the SHA-256 of its SPKI. It signs where its store keeps it, in this
//! process or in a token, and is never written out from here.

use std::sync::Arc;

use rcgen::{PublicKeyData, SignatureAlgorithm, SigningKey};
use steadfast_api::KeyId;
use steadfast_platform::keys::{KeyKind, LocalKey, LocalKeyError, PrivateKey};
use steadfast_process::ErrorChain;
use zeroize::Zeroizing;

/// A key that signs certificates.
#[derive(Clone)]
pub struct AuthorityKey(Arc<dyn PrivateKey>);

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// None could be made, or the bytes are none.
    #[error(transparent)]
    Local(#[from] LocalKeyError),
    /// The machine gives no random bytes.
    #[error("the system's random generator failed")]
    Random,
}

impl AuthorityKey {
    /// A new key on P-256, and the PKCS#8 document to store: the only copy that can be written out.
    ///
    /// # Errors
    /// [`KeyError::Local`].
    pub fn generate() -> Result<(Self, Zeroizing<Vec<u8>>), KeyError> {
        let (key, pkcs8) = LocalKey::generate()?;
        Ok((Self::of(Arc::new(key)), pkcs8))
    }

    /// The key in a PKCS#8 document.
    ///
    /// # Errors
    /// [`KeyError::Local`].
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, KeyError> {
        Ok(Self::of(Arc::new(LocalKey::from_pkcs8(pkcs8)?)))
    }

    /// A key of a store.
    pub fn of(key: Arc<dyn PrivateKey>) -> Self {
        Self(key)
    }

    /// SHA-256 of its SPKI.
    pub fn id(&self) -> KeyId {
        self.0.id()
    }
}

impl std::fmt::Debug for AuthorityKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AuthorityKey({})", self.id())
    }
}

impl PublicKeyData for AuthorityKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.public()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        match self.0.kind() {
            KeyKind::EcdsaP256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            KeyKind::EcdsaP384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            KeyKind::Rsa => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

impl SigningKey for AuthorityKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message).map_err(|error| {
            // The library's error has no room for the reason.
            tracing::warn!(key = %self.id(), error = %ErrorChain(&error), "a key does not sign");
            rcgen::Error::RemoteKeyError
        })
    }
}

/// An uncompressed point on P-256, as a public key for rcgen.
pub(crate) struct Point<'a>(pub(crate) &'a [u8]);

impl PublicKeyData for Point<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}
