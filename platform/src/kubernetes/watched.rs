//! Single objects of others, as they change: what cert-manager and trust-manager keep.

use std::collections::BTreeMap;

use futures::future::{BoxFuture, FutureExt as _};
use futures::stream::{BoxStream, StreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watch_object};
use kube::{Api, Client};
use steadfast_process::ErrorChain;
use zeroize::Zeroizing;

/// Whatever is new of an object; `None`: it is not there. What cannot be read is told and tried
/// again.
pub type Changes<T> = BoxStream<'static, Result<Option<T>, String>>;

/// Reads an object as it is now, past every cache.
pub type Fetch<T> = Box<dyn Fn() -> BoxFuture<'static, Result<Option<T>, String>> + Send + Sync>;

/// The texts of a ConfigMap.
pub fn config_map(
    client: Client,
    namespace: &str,
    name: &str,
) -> Changes<BTreeMap<String, String>> {
    let watched = watch_object(Api::<ConfigMap>::namespaced(client, namespace), name);
    let texts = |found: ConfigMap| found.data.unwrap_or_default();
    watched.default_backoff().map(move |found| told(found, texts)).boxed()
}

/// The entries of a Secret.
pub fn secret(
    client: Client,
    namespace: &str,
    name: &str,
) -> Changes<BTreeMap<String, Zeroizing<Vec<u8>>>> {
    let watched = watch_object(Api::<Secret>::namespaced(client, namespace), name);
    watched.default_backoff().map(|found| told(found, entries)).boxed()
}

/// The entries of a Secret, whenever they are asked for.
pub fn secret_now(
    client: Client,
    namespace: &str,
    name: &str,
) -> Fetch<BTreeMap<String, Zeroizing<Vec<u8>>>> {
    let (secrets, name) = (Api::<Secret>::namespaced(client, namespace), name.to_owned());
    Box::new(move || {
        let (secrets, name) = (secrets.clone(), name.clone());
        async move {
            let found = secrets.get_opt(&name).await;
            found
                .map(|found| found.map(entries))
                .map_err(|error| format!("the API server: {}", ErrorChain(&error)))
        }
        .boxed()
    })
}

fn entries(found: Secret) -> BTreeMap<String, Zeroizing<Vec<u8>>> {
    let data = found.data.unwrap_or_default();
    data.into_iter().map(|(name, value)| (name, Zeroizing::new(value.0))).collect()
}

fn told<K, T>(
    found: Result<Option<K>, watcher::Error>,
    read: impl Fn(K) -> T,
) -> Result<Option<T>, String> {
    match found {
        Ok(found) => Ok(found.map(read)),
        Err(error) => Err(format!("the API server: {}", ErrorChain(&error))),
    }
}
