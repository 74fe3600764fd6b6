//! Keys as Secrets: one for each, made once, immutable.
//!
//! Nobody reads another's because each namespace has its own reader; who may read which is for the
//! manifests to say.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, ListParams, ObjectMeta, PostParams};
use kube::{Api, Client};
use steadfast_api::KeyId;
use zeroize::{Zeroize as _, Zeroizing};

use crate::keys::{KeyStore, KeyStoreError, LocalKey, PrivateKey, TakesKeys};

/// The keys of one namespace that have one purpose.
#[derive(Clone)]
pub struct SecretKeys {
    secrets: Api<Secret>,
    namespace: String,
    purpose: Purpose,
}

/// What keys are for. It stands in their names, so that a person sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// They sign issuers.
    Anchors,
    /// They sign SVIDs.
    Issuers,
}

impl SecretKeys {
    /// The keys in this namespace.
    pub fn new(client: Client, namespace: &str, purpose: Purpose) -> Self {
        let secrets = Api::namespaced(client, namespace);
        Self { secrets, namespace: namespace.to_owned(), purpose }
    }

    fn name(&self, id: KeyId) -> String {
        format!("{}{id}", self.purpose.prefix())
    }

    fn failed(&self, action: &str, error: &kube::Error) -> KeyStoreError {
        let code = match error {
            kube::Error::Api(status) if status.is_forbidden() => ": RBAC refuses it",
            _ => "",
        };
        let namespace = &self.namespace;
        KeyStoreError::Device(format!("cannot {action} in namespace {namespace}{code}: {error}"))
    }

    async fn put_new(&self, id: KeyId, pkcs8: Zeroizing<Vec<u8>>) -> Result<(), KeyStoreError> {
        let name = self.name(id);
        let labels = BTreeMap::from([(KEY_LABEL.to_owned(), self.purpose.name().to_owned())]);
        let mut secret = Secret {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(labels),
                ..ObjectMeta::default()
            },
            type_: Some(SECRET_TYPE.to_owned()),
            immutable: Some(true),
            data: Some(BTreeMap::from([(KEY_ENTRY.to_owned(), ByteString(pkcs8.to_vec()))])),
            ..Secret::default()
        };
        let created = self.secrets.create(&PostParams::default(), &secret).await;
        wipe(&mut secret);
        match created {
            Ok(mut created) => {
                wipe(&mut created);
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                Err(KeyStoreError::Exists(self.place_of(id)))
            }
            Err(error) => Err(self.failed(&format!("create the Secret {name}"), &error)),
        }
    }
}

#[async_trait::async_trait]
impl TakesKeys for SecretKeys {
    async fn take(&self, id: KeyId, pkcs8: Zeroizing<Vec<u8>>) -> Result<(), KeyStoreError> {
        self.put_new(id, pkcs8).await
    }
}

#[async_trait::async_trait]
impl KeyStore for SecretKeys {
    async fn make(&self) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        let (key, pkcs8) = LocalKey::generate().map_err(KeyStoreError::Making)?;
        self.put_new(key.id(), pkcs8).await?;
        Ok(Arc::new(key))
    }

    async fn key(&self, id: KeyId) -> Result<Arc<dyn PrivateKey>, KeyStoreError> {
        let name = self.name(id);
        let found = self.secrets.get_opt(&name).await;
        let found =
            found.map_err(|error| self.failed(&format!("read the Secret {name}"), &error))?;
        let Some(mut secret) = found else {
            return Err(KeyStoreError::Missing(self.place_of(id)));
        };
        let pkcs8 = secret.data.as_mut().and_then(|data| data.remove(KEY_ENTRY));
        wipe(&mut secret);
        let other =
            |reason: String| KeyStoreError::Other { path: self.place_of(id).into(), reason };
        let pkcs8 = pkcs8.ok_or_else(|| other(format!("it has no {KEY_ENTRY}")))?;
        let key = LocalKey::from_pkcs8(&Zeroizing::new(pkcs8.0));
        let key = key.map_err(|error| other(error.to_string()))?;
        if key.id() != id {
            return Err(other(format!("it is the key {}", key.id())));
        }
        Ok(Arc::new(key))
    }

    async fn exists(&self, id: KeyId) -> Result<bool, KeyStoreError> {
        let name = self.name(id);
        let found = self.secrets.get_metadata_opt(&name).await;
        match found {
            Ok(found) => Ok(found.is_some()),
            Err(error) => Err(self.failed(&format!("look for the Secret {name}"), &error)),
        }
    }

    async fn list(&self) -> Result<Vec<KeyId>, KeyStoreError> {
        // Names alone: whoever lists keys needs none of them.
        let labelled =
            ListParams::default().labels(&format!("{KEY_LABEL}={}", self.purpose.name()));
        let listed = self.secrets.list_metadata(&labelled).await;
        let listed = listed.map_err(|error| self.failed("list Secrets", &error))?;
        let id = |name: &str| name.strip_prefix(self.purpose.prefix())?.parse::<KeyId>().ok();
        let names = listed.items.into_iter().filter_map(|secret| secret.metadata.name);
        let mut ids: Vec<_> = names.filter_map(|name| id(&name)).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    async fn destroy(&self, id: KeyId) -> Result<(), KeyStoreError> {
        let name = self.name(id);
        match self.secrets.delete(&name, &DeleteParams::default()).await {
            Ok(either::Either::Left(mut secret)) => {
                wipe(&mut secret);
                Ok(())
            }
            Ok(either::Either::Right(_)) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => Err(self.failed(&format!("delete the Secret {name}"), &error)),
        }
    }

    fn place_of(&self, id: KeyId) -> String {
        format!("secret/{}/{}", self.namespace, self.name(id))
    }
}

impl Purpose {
    const fn name(self) -> &'static str {
        match self {
            Self::Anchors => "anchor",
            Self::Issuers => "issuer",
        }
    }

    const fn prefix(self) -> &'static str {
        match self {
            Self::Anchors => "steadfast-anchor-",
            Self::Issuers => "steadfast-issuer-",
        }
    }
}

/// What is ours of it. What the client had in its buffers is not in our hands.
fn wipe(secret: &mut Secret) {
    for value in secret.data.iter_mut().flat_map(BTreeMap::values_mut) {
        value.0.zeroize();
    }
}

const KEY_LABEL: &str = "trust.steadfast.dev/key";
const KEY_ENTRY: &str = "key.p8";
/// A type of our own, so that nothing takes it for a certificate's.
const SECRET_TYPE: &str = "trust.steadfast.dev/key";
