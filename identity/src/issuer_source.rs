//! An issuer that another tool keeps, as cert-manager does: a Secret of the type
//! `kubernetes.io/tls`.
//!
//! What is there is a proposal. Its key is kept under its own id before anything names it, since the
//! tool overwrites it when it renews, and the issuer of before signs on until every replica has the
//! new one loaded and its anchor's turn has come. Whether it is taken is for the controller to say.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use steadfast_api::KeyId;
use steadfast_platform::keys::{KeyKind, KeyStoreError, LocalKey, PrivateKey as _, TakesKeys};
use steadfast_platform::kubernetes::watched::{Changes, Fetch};
use steadfast_platform::store::ISSUER_PROPOSAL_KEY;
use steadfast_platform::{Store, StoreError};
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::import::{IssuerProposal, ProposedIssuer};
use tokio::sync::watch;
use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

use crate::replica::Replica;

/// The entries of such a Secret.
pub type Entries = BTreeMap<String, Zeroizing<Vec<u8>>>;

/// Follows the Secret.
pub struct IssuerSource {
    /// Where it is, for people.
    pub source: String,
    /// Where it is proposed.
    pub store: Arc<dyn Store>,
    /// Where its key is kept.
    pub keys: Arc<dyn TakesKeys>,
    /// Which issuers are denied.
    pub replica: Arc<Replica>,
    /// Reads what is there, past every cache; `None`: nothing is.
    pub fetch: Fetch<Entries>,
    /// The key that is proposed, which is of use though no state names it.
    pub proposed: watch::Sender<Option<KeyId>>,
}

/// An issuer, with its key.
struct Found {
    issuer: ProposedIssuer,
    pkcs8: Zeroizing<Vec<u8>>,
}

#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error("its key cannot be kept")]
    Keys(#[from] KeyStoreError),
    #[error("it cannot be read: {0}")]
    Source(String),
    #[error("it cannot be proposed")]
    Store(#[from] StoreError),
    #[error("it cannot be written down")]
    Json(#[from] serde_json::Error),
}

impl IssuerSource {
    /// Proposes what is there, for ever.
    ///
    /// # Errors
    /// None: what fails is told and tried again.
    pub async fn run(self, mut changes: Changes<Entries>) -> Result<(), Infallible> {
        let (mut found, mut told) = (None, None);
        loop {
            tokio::select! {
                change = changes.next() => match change {
                    Some(Ok(entries)) => found = Some(read(entries.as_ref())),
                    // What was there stays.
                    Some(Err(error)) => {
                        tracing::debug!(error, source = self.source, "not read");
                        if !matches!(found, Some(Ok(_))) {
                            found = Some(Err(format!("it cannot be read: {error}")));
                        }
                    }
                    None => tokio::time::sleep(LOOK_EVERY).await,
                },
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            let Some(found) = &found else { continue };
            let trouble = match (self.keep(found).await, found) {
                (Err(error), _) => Some(ErrorChain(&error).to_string()),
                (Ok(()), Err(fault)) => Some(fault.clone()),
                (Ok(()), Ok(_)) => None,
            };
            if let Some(error) = trouble.as_ref().filter(|_| trouble != told) {
                tracing::warn!(error, source = self.source, "the issuer there is not taken");
            }
            told = trouble;
        }
    }

    /// Keeps the key, then proposes the issuer.
    async fn keep(&self, found: &Result<Found, String>) -> Result<(), KeepError> {
        self.take(found).await?;
        let stored = self.store.get(ISSUER_PROPOSAL_KEY).await?;
        let is_stored = |wanted: &[u8]| stored.as_ref().is_some_and(|s| s.value == wanted);
        if is_stored(&self.proposal(found)?) {
            return Ok(());
        }
        // A watch may be behind, and what is stored be another replica's newer word.
        let now = (self.fetch)().await.map_err(KeepError::Source)?;
        let now = read(now.as_ref());
        self.take(&now).await?;
        let wanted = self.proposal(&now)?;
        if is_stored(&wanted) {
            return Ok(());
        }
        let expected = stored.map(|stored| stored.revision);
        let wanted = Some(wanted.into());
        match self.store.compare_and_swap(ISSUER_PROPOSAL_KEY, expected, wanted).await {
            // Another replica was faster; what it wrote is looked at in a moment.
            Ok(_) | Err(StoreError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps the key of what was found, which is proposed from then on.
    async fn take(&self, found: &Result<Found, String>) -> Result<(), KeepError> {
        let issuer = found.as_ref().map(|found| &found.issuer);
        self.proposed.send_replace(issuer.ok().map(|issuer| issuer.id));
        let view = self.replica.current();
        let denied = |id| view.as_ref().is_ok_and(|view| view.state.denies(id));
        if let Ok(found) = found.as_ref()
            && !denied(found.issuer.id)
        {
            match self.keys.take(found.issuer.id, found.pkcs8.clone()).await {
                Ok(()) => tracing::info!(key = %found.issuer.id, source = self.source,
                    "the key of an issuer is kept"),
                Err(KeyStoreError::Exists(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// What is stored of it.
    fn proposal(&self, found: &Result<Found, String>) -> Result<Vec<u8>, serde_json::Error> {
        let issuer = found.as_ref().map(|found| ProposedIssuer {
            key_ref: self.keys.place_of(found.issuer.id),
            ..found.issuer.clone()
        });
        let proposal =
            IssuerProposal { source: self.source.clone(), found: issuer.map_err(Clone::clone) };
        serde_json::to_vec(&proposal)
    }
}

/// What would be proposed of such a Secret; or what is wrong with it, in words.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(entries: &Entries) -> Result<ProposedIssuer, String> {
    read(Some(entries)).map(|found| found.issuer)
}

/// The issuer in such a Secret, or what is wrong with it.
fn read(entries: Option<&Entries>) -> Result<Found, String> {
    let entries = entries.ok_or("it is not there")?;
    let entry = |name: &str| {
        let found = entries.get(name).filter(|value| !value.is_empty());
        found.ok_or_else(|| {
            format!(
                "it has no {name}: expected tls.crt, tls.key and ca.crt, as cert-manager keeps them"
            )
        })
    };
    let (certificates, key) = (entry("tls.crt")?, entry("tls.key")?);
    let pkcs8 = key_of(key)?;
    let key = LocalKey::from_pkcs8(&pkcs8).map_err(|error| format!("tls.key: {error}"))?;
    if key.kind() != KeyKind::EcdsaP256 {
        return Err("tls.key is not on P-256, which is all that SVIDs are signed with: in the \
                    Certificate set privateKey: { algorithm: ECDSA, size: 256 }"
            .to_owned());
    }
    let ids = ids_of(certificates).map_err(|error| format!("tls.crt: {error}"))?;
    if ids.first() != Some(&key.id()) {
        return Err(
            "tls.crt does not begin with a certificate of the key in tls.key: a tool writes \
                    both at once, so somebody has changed one of them"
                .to_owned(),
        );
    }
    let roots = match entries.get("ca.crt").filter(|value| !value.is_empty()) {
        Some(roots) => ids_of(roots).map_err(|error| format!("ca.crt: {error}"))?,
        None => Vec::new(),
    };
    let pem = String::from_utf8(certificates.to_vec()).map_err(|_| "tls.crt is no text")?;
    let issuer = ProposedIssuer { id: key.id(), key_ref: String::new(), pem, roots };
    Ok(Found { issuer, pkcs8 })
}

/// The key in a PEM file, as PKCS#8.
fn key_of(pem: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
    let block = Pem::iter_from_buffer(pem).next();
    let block = block.ok_or("tls.key is no PEM")?.map_err(|error| format!("tls.key: {error}"))?;
    let (label, bytes) = (block.label, Zeroizing::new(block.contents));
    match label.as_str() {
        "PRIVATE KEY" => Ok(bytes),
        "EC PRIVATE KEY" => {
            LocalKey::pkcs8_of_sec1(&bytes).map_err(|error| format!("tls.key: {error}"))
        }
        "RSA PRIVATE KEY" => {
            Err("tls.key is an RSA key, and SVIDs are signed with ECDSA on P-256 \
                                  alone: in the Certificate set privateKey: { algorithm: ECDSA, \
                                  size: 256 }"
                .to_owned())
        }
        _ => Err("tls.key holds no private key".to_owned()),
    }
}

/// The keys of the certificates in a PEM file.
fn ids_of(pem: &[u8]) -> Result<Vec<KeyId>, String> {
    let blocks = Pem::iter_from_buffer(pem).take(CERTIFICATES_MAX);
    let ids = blocks.map(|block| {
        let block = block.map_err(|error| error.to_string())?;
        let parsed = X509Certificate::from_der(&block.contents);
        let (_, certificate) = parsed.map_err(|error| error.to_string())?;
        Ok(KeyId::of_spki(certificate.public_key().raw))
    });
    let ids: Vec<_> = ids.collect::<Result<_, String>>()?;
    if ids.is_empty() { Err("it holds no certificate".to_owned()) } else { Ok(ids) }
}

/// What could not be done is tried again this often, and what somebody has undone is done again.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Longer than any honest chain.
const CERTIFICATES_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use crate::authority;

    use super::*;

    fn pem(label: &str, der: &[u8]) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(pem::encode(&pem::Pem::new(label, der)).into_bytes())
    }

    fn made() -> (authority::Founding, Entries) {
        let now = steadfast_api::UnixTime::from_secs(1_795_262_400);
        let made = authority::found(&"cluster.local".parse().unwrap(), now).unwrap();
        let entries = [
            ("tls.crt", pem("CERTIFICATE", &made.issuer.der)),
            ("tls.key", pem("PRIVATE KEY", &made.issuer.pkcs8)),
            ("ca.crt", pem("CERTIFICATE", &made.active.der)),
        ];
        let entries = entries.map(|(name, value)| (name.to_owned(), value));
        (made, entries.into_iter().collect())
    }

    #[test]
    fn an_issuer_is_read_as_cert_manager_keeps_it() {
        let (made, entries) = made();
        let found = read(Some(&entries)).ok().unwrap();
        assert_eq!((found.issuer.id, found.issuer.roots), (made.issuer.id, vec![made.active.id]));
        assert_eq!(found.pkcs8, made.issuer.pkcs8);
    }

    #[test]
    fn a_key_in_the_older_form_is_the_same_key() {
        let (made, mut entries) = made();
        // The inner document of PKCS#8 is that of RFC 5915.
        let at = made.issuer.pkcs8.windows(5).position(|w| w[..2] == [4, 0x6d] && w[2] == 0x30);
        let sec1 = &made.issuer.pkcs8[at.unwrap() + 2..];
        entries.insert("tls.key".to_owned(), pem("EC PRIVATE KEY", sec1));
        let found = read(Some(&entries)).ok().unwrap();
        assert_eq!(found.issuer.id, made.issuer.id);
        assert_eq!(LocalKey::from_pkcs8(&found.pkcs8).unwrap().id(), made.issuer.id);
    }

    #[test]
    fn what_is_wrong_with_a_secret_is_named_with_its_entry() {
        let fault = |change: &dyn Fn(&mut Entries)| {
            let (_, mut entries) = made();
            change(&mut entries);
            read(Some(&entries)).err().unwrap()
        };
        assert_eq!(read(None).err().unwrap(), "it is not there");
        let root = made().1["ca.crt"].clone();
        let cases = [
            ("tls.key", Zeroizing::default(), "it has no tls.key"),
            ("tls.key", pem("RSA PRIVATE KEY", b""), "ECDSA"),
            ("tls.key", pem("PRIVATE KEY", b"x"), "tls.key: "),
            ("tls.crt", root, "somebody has changed"),
            ("ca.crt", pem("CERTIFICATE", b"x"), "ca.crt: "),
        ];
        for (entry, value, words) in cases {
            let fault = fault(&|entries| drop(entries.insert(entry.to_owned(), value.clone())));
            assert!(fault.contains(words), "{words:?} is not in {fault}");
        }
    }
}
