//! The private key of an SVID: P-256, made in memory, used in memory, never written.
//!
//! The key lives inside aws-lc, which wipes it when it is freed; no byte of it ever reaches a
//! buffer of ours. It signs TLS handshakes (rustls) and the certificate request (rcgen).

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use rcgen::{CertificateParams, DistinguishedName, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls::sign::{Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};
use rustls_pki_types::SubjectPublicKeyInfoDer;
use steadfast_api::KeyId;

/// A P-256 key pair. All clones are one.
#[derive(Clone)]
pub struct SvidKey(Arc<Pair>);

struct Pair {
    pair: EcdsaKeyPair,
    spki: Vec<u8>,
    id: KeyId,
}

/// Why a key or a certificate request could not be made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The operating system gave no randomness, or the key could not be made from it.
    #[error("a P-256 key could not be made")]
    Generate,
    /// The certificate request could not be written.
    #[error("the certificate request could not be made")]
    Request(#[source] rcgen::Error),
}

impl SvidKey {
    /// A new key.
    ///
    /// # Errors
    /// [`KeyError::Generate`].
    pub fn generate() -> Result<Self, KeyError> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)
            .map_err(|_| KeyError::Generate)?;
        let point = pair.public_key().as_ref();
        let spki: Vec<u8> = [SPKI_P256_PREFIX, point].concat();
        let id = KeyId::of_spki(&spki);
        Ok(Self(Arc::new(Pair { pair, spki, id })))
    }

    /// SHA-256 of the SubjectPublicKeyInfo.
    pub fn id(&self) -> KeyId {
        self.0.id
    }

    /// The SubjectPublicKeyInfo in DER.
    pub fn spki_der(&self) -> &[u8] {
        &self.0.spki
    }

    /// A PKCS#10 request in DER that carries this key and no name: the identity service takes
    /// the name from the token.
    ///
    /// # Errors
    /// [`KeyError::Request`].
    pub fn request(&self) -> Result<Vec<u8>, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(self).map_err(KeyError::Request)?;
        Ok(request.der().to_vec())
    }

    fn sign_message(&self, message: &[u8]) -> Option<Vec<u8>> {
        let signature = self.0.pair.sign(&SystemRandom::new(), message).ok()?;
        Some(signature.as_ref().to_vec())
    }
}

impl fmt::Debug for SvidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SvidKey({})", self.0.id.short())
    }
}

impl PublicKeyData for SvidKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.pair.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for SvidKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.sign_message(message).ok_or(rcgen::Error::RemoteKeyError)
    }
}

impl SigningKey for SvidKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered.contains(&SCHEME).then(|| Box::new(self.clone()) as Box<dyn Signer>)
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(self.0.spki.as_slice().into())
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl Signer for SvidKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        self.sign_message(message)
            .ok_or_else(|| rustls::Error::General("the SVID's key could not sign".to_owned()))
    }

    fn scheme(&self) -> SignatureScheme {
        SCHEME
    }
}

const SCHEME: SignatureScheme = SignatureScheme::ECDSA_NISTP256_SHA256;
/// RFC 5480: SEQUENCE { SEQUENCE { id-ecPublicKey, prime256v1 }, BIT STRING }, up to the point.
const SPKI_P256_PREFIX: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spki_is_the_one_that_rcgen_writes_and_every_key_is_new() {
        let (one, other) = (SvidKey::generate().unwrap(), SvidKey::generate().unwrap());
        assert_eq!(one.spki_der(), one.subject_public_key_info());
        assert_ne!(one.id(), other.id());
    }

    #[test]
    fn debug_shows_an_id_and_no_key() {
        let key = SvidKey::generate().unwrap();
        assert_eq!(format!("{key:?}"), format!("SvidKey({})", key.id().short()));
    }
}
