//! The published bundle as files: what a workload is given to know the identity service by.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pem::{EncodeConfig, LineEnding, Pem};
use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::TrustDomainState;

use crate::follow::{Change, follow};
use crate::store::{Entry, Event, Store, TRUST_DOMAIN_KEY};

/// The files, by their names: SPIFFE's form, and the anchors' certificates for everything else.
///
/// # Errors
/// The state makes no bundle, in words.
pub fn files(state: &TrustDomainState) -> Result<BTreeMap<String, String>, String> {
    let bundle = state.bundle().map_err(|error| ErrorChain(&error).to_string())?;
    let pems = bundle.anchors().iter().map(|anchor| Pem::new("CERTIFICATE", anchor.der()));
    let config = EncodeConfig::new().set_line_ending(LineEnding::LF);
    let pems = pem::encode_many_config(&pems.collect::<Vec<_>>(), config);
    let files = [(BUNDLE_FILE, bundle.to_jwks() + "\n"), (CERTIFICATES_FILE, pems)];
    Ok(files.map(|(name, text)| (name.to_owned(), text)).into())
}

/// Keeps a file in SPIFFE's form as the store says, for a process that can read the store itself:
/// it needs no mirror to begin with.
pub async fn keep(store: Arc<dyn Store>, file: PathBuf) -> Infallible {
    follow(store, TRUST_DOMAIN_KEY, move |change| {
        let entry = match &change {
            Change::Event(Event::Put(entry)) => Some(entry),
            Change::Reset(entries, _) => entries.first(),
            Change::Event(_) | Change::Failed(_) => None,
        };
        if let Some(error) = entry.and_then(|entry| write(entry, &file).err()) {
            tracing::warn!(file = %file.display(), error, "the bundle cannot be written");
        }
    })
    .await
}

/// In one step, so that a reader never sees half of it.
fn write(entry: &Entry, file: &Path) -> Result<(), String> {
    let state = serde_json::from_slice(&entry.value).map_err(|error| error.to_string())?;
    let bundle = files(&state)?.remove(BUNDLE_FILE).unwrap_or_default();
    let draft = file.with_extension("new");
    let written = std::fs::write(&draft, bundle).and_then(|()| std::fs::rename(&draft, file));
    written.map_err(|error| error.to_string())
}

/// SPIFFE's form: a JWK set.
pub const BUNDLE_FILE: &str = "bundle.json";
/// Certificates in PEM, one after the other.
pub const CERTIFICATES_FILE: &str = "ca-bundle.crt";
