//! A private key in this process's memory, from a PKCS#8 document.
//!
//! Keys that we make are ECDSA on P-256. An operator's own anchor may have another one, which signs
//! all the same. A key signs and prints its id, and is never written out from here.

use std::fmt;

use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair,
    EcdsaSigningAlgorithm, KeyPair as _, RSA_PKCS1_SHA256,
};
use steadfast_api::KeyId;
use zeroize::Zeroizing;

use super::{KeyKind, KeyStoreError, PrivateKey};

/// A key of which this process has the bytes.
pub struct LocalKey {
    pair: Pair,
    public: Vec<u8>,
    id: KeyId,
}

enum Pair {
    Ecdsa(KeyKind, Box<EcdsaKeyPair>),
    Rsa(Box<rsa::KeyPair>),
}

/// Why there is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocalKeyError {
    /// The machine gives no random bytes.
    #[error("cannot make a key: the system's random generator failed")]
    Random,
    /// The bytes are no key that could sign.
    #[error("not a private key in PKCS#8, DER: ECDSA on P-256 or P-384, or RSA")]
    Rejected,
}

impl LocalKey {
    /// A new key on P-256, and the PKCS#8 document to store: the only copy that can be written out.
    ///
    /// # Errors
    /// [`LocalKeyError::Random`].
    pub fn generate() -> Result<(Self, Zeroizing<Vec<u8>>), LocalKeyError> {
        let document =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
                .map_err(|_| LocalKeyError::Random)?;
        let pkcs8 = Zeroizing::new(document.as_ref().to_vec());
        Ok((Self::from_pkcs8(&pkcs8)?, pkcs8))
    }

    /// The key in a PKCS#8 document.
    ///
    /// # Errors
    /// [`LocalKeyError::Rejected`].
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, LocalKeyError> {
        if let Ok(pair) = rsa::KeyPair::from_pkcs8(pkcs8) {
            let (public, spki) = (pair.public_key().as_ref().to_vec(), pair.public_key().as_der());
            return Self::of(Pair::Rsa(Box::new(pair)), public, spki.ok());
        }
        for (kind, algorithm) in CURVES {
            if let Ok(pair) = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8) {
                let public = pair.public_key().as_ref().to_vec();
                let spki = pair.public_key().as_der();
                return Self::of(Pair::Ecdsa(kind, Box::new(pair)), public, spki.ok());
            }
        }
        Err(LocalKeyError::Rejected)
    }

    /// The PKCS#8 document of a key in the form of RFC 5915 (`EC PRIVATE KEY`), on P-256 or P-384.
    ///
    /// # Errors
    /// [`LocalKeyError::Rejected`].
    pub fn pkcs8_of_sec1(sec1: &[u8]) -> Result<Zeroizing<Vec<u8>>, LocalKeyError> {
        let pairs = CURVES.into_iter();
        let mut pairs =
            pairs.filter_map(|(_, curve)| EcdsaKeyPair::from_private_key_der(curve, sec1).ok());
        let pair = pairs.next().ok_or(LocalKeyError::Rejected)?;
        let document = pair.to_pkcs8v1().map_err(|_| LocalKeyError::Rejected)?;
        Ok(Zeroizing::new(document.as_ref().to_vec()))
    }

    fn of(
        pair: Pair,
        public: Vec<u8>,
        spki: Option<PublicKeyX509Der<'_>>,
    ) -> Result<Self, LocalKeyError> {
        let id = KeyId::of_spki(spki.ok_or(LocalKeyError::Rejected)?.as_ref());
        Ok(Self { pair, public, id })
    }
}

impl PrivateKey for LocalKey {
    fn id(&self) -> KeyId {
        self.id
    }

    fn kind(&self) -> KeyKind {
        match &self.pair {
            Pair::Ecdsa(kind, _) => *kind,
            Pair::Rsa(_) => KeyKind::Rsa,
        }
    }

    fn public(&self) -> &[u8] {
        &self.public
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyStoreError> {
        let (random, failed) = (SystemRandom::new(), |_| KeyStoreError::Signing(self.id));
        match &self.pair {
            Pair::Ecdsa(_, pair) => {
                pair.sign(&random, message).map(|s| s.as_ref().to_vec()).map_err(failed)
            }
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).map_err(failed)?;
                Ok(signature)
            }
        }
    }
}

impl fmt::Debug for LocalKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LocalKey({})", self.id)
    }
}

const CURVES: [(KeyKind, &EcdsaSigningAlgorithm); 2] = [
    (KeyKind::EcdsaP256, &ECDSA_P256_SHA256_ASN1_SIGNING),
    (KeyKind::EcdsaP384, &ECDSA_P384_SHA384_ASN1_SIGNING),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_key_comes_back_under_the_same_id_and_prints_only_that() {
        let (key, pkcs8) = LocalKey::generate().unwrap();
        assert_eq!(LocalKey::from_pkcs8(&pkcs8).unwrap().id(), key.id());
        assert_eq!(format!("{key:?}"), format!("LocalKey({})", key.id()));
        let (other, _) = LocalKey::generate().unwrap();
        assert_ne!(other.id(), key.id());
        assert_eq!(LocalKey::from_pkcs8(b"no key").unwrap_err(), LocalKeyError::Rejected);
        assert_eq!(LocalKey::pkcs8_of_sec1(b"no key").unwrap_err(), LocalKeyError::Rejected);
    }
}
