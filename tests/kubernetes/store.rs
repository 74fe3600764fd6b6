//! The API server as the store: what the other processes rely on, of a real one.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use steadfast_api::TrustDomain;
use steadfast_identity::authority::found;
use steadfast_platform::keys::{KeyStore as _, KeyStoreError};
use steadfast_platform::kubernetes::{KubeStore, Namespaces, Purpose, SecretKeys};
use steadfast_platform::store::{Event, LEADER_KEY, LeaderLease, TRUST_DOMAIN_KEY};
use steadfast_platform::{Revision, Store as _, StoreError};
use steadfast_process::{Clock as _, SystemClock};
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_test_rig::cluster::Cluster;
use tokio::time::timeout;

#[tokio::test]
async fn the_api_server_is_a_store_with_compare_and_swap_and_watch() {
    let cluster = Cluster::start(0).await;
    let (client, clock) = cluster.client().await;
    cluster.apply(include_str!("../../manifests/charts/steadfast-crds/templates/trustdomain.yaml"));
    let established = ["--for=condition=Established", "crd/trustdomains.trust.steadfast.dev"];
    cluster.wait_for(&established).await;
    for namespace in ["control", "anchors"] {
        cluster.kubectl(&["create", "namespace", namespace]);
    }
    let namespaces = Namespaces { control: "control".to_owned(), anchors: "anchors".to_owned() };
    let store = Arc::new(KubeStore::new(client.clone(), namespaces));
    assert_eq!(store.get(TRUST_DOMAIN_KEY).await, Ok(None));
    let offset = clock.offset_millis().expect("an answer has told the time");
    assert!(offset.abs() < 2_000, "{offset} ms");

    // The state of the trust domain, and what nobody may make of it.
    let mut state =
        found(&"cluster.local".parse::<TrustDomain>().unwrap(), SystemClock.now()).unwrap().state;
    let bytes = |state: &_| Bytes::from(serde_json::to_vec(state).unwrap());
    let put = |expected, value| store.compare_and_swap(TRUST_DOMAIN_KEY, expected, Some(value));
    let (_, from) = store.list(TRUST_DOMAIN_KEY).await.unwrap();
    let mut watch = store.watch(TRUST_DOMAIN_KEY, from).await.unwrap();
    let first = put(None, bytes(&state)).await.unwrap();
    let read = store.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap();
    assert_eq!(read.revision, first);
    assert_eq!(serde_json::from_slice::<TrustDomainState>(&read.value).unwrap(), state);
    let put_again = put(None, bytes(&state)).await;
    assert!(matches!(put_again, Err(StoreError::Conflict { actual: Some(at), .. }) if at == first));
    state.seq += 1;
    let second = put(Some(first), bytes(&state)).await.unwrap();
    assert!(second > first);
    let stale = put(Some(first), bytes(&state)).await;
    assert!(matches!(stale, Err(StoreError::Conflict { actual: Some(at), .. }) if at == second));
    for expected in [first, second] {
        let event = timeout(DEADLINE, next_put(&mut watch)).await.expect("it is told");
        assert_eq!(event, expected);
    }
    // A label is no change of the state.
    cluster.kubectl(&["label", "trustdomain/steadfast", "team=platform"]);
    assert_eq!(store.get(TRUST_DOMAIN_KEY).await.unwrap().unwrap().revision, second);
    let mut fallen = state.clone();
    fallen.seq = 1;
    let mut emptied = state.clone();
    emptied.anchors.clear();
    let mut swapped = state.clone();
    swapped.anchors = found(&state.trust_domain, SystemClock.now()).unwrap().state.anchors;
    let mut renamed = state.clone();
    renamed.trust_domain = "other.local".parse().unwrap();
    let mut back = state.clone();
    back.tombstones.push(back.anchors[0].id);
    for (wrong, told) in [
        (fallen, "seq never falls"),
        (emptied, "no published bundle is ever empty"),
        (swapped, "never by both at once"),
        (renamed, "never changes its name"),
        (back, "never comes back into the bundle"),
    ] {
        let error = put(Some(second), bytes(&wrong)).await.unwrap_err();
        assert!(matches!(&error, StoreError::Denied(why) if why.contains(told)), "{error}");
    }

    // Records, in the namespace of who writes them.
    let key = "trust/ledger/0";
    let written = store.compare_and_swap(key, None, Some(Bytes::from_static(b"\0\xff"))).await;
    let written = written.unwrap();
    let (entries, _) = store.list("trust/ledger/").await.unwrap();
    assert_eq!(entries.len(), 1);
    assert_eq!((&*entries[0].key, &*entries[0].value), (key, &b"\0\xff"[..]));
    cluster.kubectl(&["--namespace=anchors", "get", "configmap", "steadfast.ledger.0"]);
    store.compare_and_swap(key, Some(written), None).await.unwrap();
    assert_eq!(store.get(key).await, Ok(None));
    let request = "trust/issuer-requests/7";
    store.compare_and_swap(request, None, Some(Bytes::new())).await.unwrap();
    cluster.kubectl(&["--namespace=control", "get", "configmap", "steadfast.issuer-requests.7"]);

    // The Lease says to others what it says to us.
    let lease = LeaderLease {
        holder: "me".to_owned(),
        renewed_at: SystemClock.now(),
        duration: Duration::from_secs(8),
    };
    let value = Bytes::from(serde_json::to_vec(&lease).unwrap());
    store.compare_and_swap(LEADER_KEY, None, Some(value.clone())).await.unwrap();
    assert_eq!(store.get(LEADER_KEY).await.unwrap().unwrap().value, value);
    let holder = ["get", "lease", "steadfast-rotation", "--output=jsonpath={.spec.holderIdentity}"];
    assert_eq!(cluster.kubectl(&[&["--namespace=anchors"], &holder[..]].concat()), "me");

    // A watch goes on over changes of others, and says when it cannot.
    let mut accounts = store.watch("resources/ServiceAccount/", from).await.unwrap();
    cluster.kubectl(&["create", "serviceaccount", "web"]);
    let told = timeout(DEADLINE, async {
        loop {
            if let Some(Ok(Event::Put(entry))) = accounts.next().await
                && entry.key == "resources/ServiceAccount/default/web"
            {
                break entry;
            }
        }
    });
    let told = told.await.expect("the new service account is told");
    assert!(!String::from_utf8_lossy(&told.value).contains("managedFields"));
    assert!(store.compare_and_swap(&told.key, Some(told.revision), None).await.is_err());

    // Keys.
    let keys = SecretKeys::new(client, "anchors", Purpose::Anchors);
    let made = keys.make().await.unwrap();
    assert_eq!(keys.list().await.unwrap(), [made.id()]);
    assert!(keys.exists(made.id()).await.unwrap());
    let read = keys.key(made.id()).await.unwrap();
    assert_eq!(read.public(), made.public());
    let name = keys.place_of(made.id()).replace("secret/anchors/", "secret/");
    let change = ["--namespace=anchors", "patch", &name, "--type=merge", "--patch"];
    let changed = cluster.try_kubectl(&[&change[..], &[r#"{"data":{"key.p8":"AAAA"}}"#]].concat());
    assert!(changed.is_err_and(|why| why.contains("immutable")), "a key is never overwritten");
    keys.destroy(made.id()).await.unwrap();
    keys.destroy(made.id()).await.unwrap();
    assert!(matches!(keys.key(made.id()).await, Err(KeyStoreError::Missing(_))));
    assert_eq!(keys.list().await.unwrap(), []);
}

/// The revision of the next state that a watch tells.
async fn next_put(
    watch: &mut (impl futures::Stream<Item = Result<Event, StoreError>> + Unpin),
) -> Revision {
    loop {
        match watch.next().await.expect("a watch does not end").expect("it does not fail") {
            Event::Put(entry) => return entry.revision,
            Event::Deleted { .. } | Event::Synced(_) => {}
        }
    }
}

const DEADLINE: Duration = Duration::from_secs(20);
