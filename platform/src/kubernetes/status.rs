//! The status of the trust domain's object: derived, for people, no part of the state.

use kube::api::{DynamicObject, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use super::place::Kind;
use super::store::{DOMAIN_NAME, failed};
use crate::store::StoreError;

/// Reads and writes it.
#[derive(Clone)]
pub struct DomainStatus {
    api: Api<DynamicObject>,
}

impl DomainStatus {
    /// Of the trust domain of this cluster.
    pub fn new(client: Client) -> Self {
        Self { api: Api::all_with(client, &Kind::DOMAIN.resource()) }
    }

    /// What it is.
    ///
    /// # Errors
    /// The API server's.
    pub async fn read(&self) -> Result<Value, StoreError> {
        let found = self.api.get(DOMAIN_NAME).await.map_err(failed)?;
        Ok(found.data.get("status").cloned().unwrap_or_default())
    }

    /// Which object it is of, for references to it.
    ///
    /// # Errors
    /// The API server's.
    pub async fn uid(&self) -> Result<Option<String>, StoreError> {
        let found = self.api.get_metadata(DOMAIN_NAME).await.map_err(failed)?;
        Ok(found.metadata.uid)
    }

    /// Replaces it. The state's revision stays what it was.
    ///
    /// # Errors
    /// The API server's.
    pub async fn write(&self, status: Value) -> Result<(), StoreError> {
        let patch = Patch::Merge(json!({ "status": status }));
        let written = self.api.patch_status(DOMAIN_NAME, &PatchParams::default(), &patch).await;
        written.map(drop).map_err(failed)
    }
}
