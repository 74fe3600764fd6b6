//! The private key of an authority: ECDSA on P-256, in ring.
//!
//! A key is known by its id, the SHA-256 of its SPKI. It signs and is never written out from
//! here; what is stored is the PKCS#8 document that [`AuthorityKey::generate`] hands over once.

use rcgen::{PublicKeyData, SignatureAlgorithm, SigningKey};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use steadfast_api::KeyId;
use zeroize::Zeroizing;

/// A key that signs certificates.
pub struct AuthorityKey {
    pair: EcdsaKeyPair,
    id: KeyId,
    random: SystemRandom,
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The machine gives no random bytes.
    #[error("cannot make a key: the system's random generator failed")]
    Random,
    /// The bytes are no P-256 key.
    #[error("not a P-256 private key in PKCS#8: {0}")]
    Rejected(String),
}

impl AuthorityKey {
    /// A new key, and the PKCS#8 document to store: the only copy that can be written out.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn generate() -> Result<(Self, Zeroizing<Vec<u8>>), KeyError> {
        let document =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
                .map_err(|_| KeyError::Random)?;
        let pkcs8 = Zeroizing::new(document.as_ref().to_vec());
        Ok((Self::from_pkcs8(&pkcs8)?, pkcs8))
    }

    /// The key in a PKCS#8 document.
    ///
    /// # Errors
    /// [`KeyError::Rejected`].
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, KeyError> {
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8, &random)
            .map_err(|error| KeyError::Rejected(error.to_string()))?;
        let id = KeyId::of_spki(&Point(pair.public_key().as_ref()).subject_public_key_info());
        Ok(Self { pair, id, random })
    }

    /// SHA-256 of its SPKI.
    pub fn id(&self) -> KeyId {
        self.id
    }
}

impl std::fmt::Debug for AuthorityKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AuthorityKey({})", self.id)
    }
}

impl PublicKeyData for AuthorityKey {
    fn der_bytes(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for AuthorityKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature = self.pair.sign(&self.random, message);
        signature.map(|s| s.as_ref().to_vec()).map_err(|_| rcgen::Error::RingUnspecified)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_key_comes_back_under_the_same_id() {
        let (key, pkcs8) = AuthorityKey::generate().unwrap();
        assert_eq!(AuthorityKey::from_pkcs8(&pkcs8).unwrap().id(), key.id());
        let (other, _) = AuthorityKey::generate().unwrap();
        assert_ne!(other.id(), key.id());
    }

    #[test]
    fn bytes_that_are_no_key_are_refused_and_a_key_prints_only_its_id() {
        assert!(matches!(AuthorityKey::from_pkcs8(b"no key"), Err(KeyError::Rejected(_))));
        let (key, _) = AuthorityKey::generate().unwrap();
        assert_eq!(format!("{key:?}"), format!("AuthorityKey({})", key.id()));
    }
}
