//! The API server as the store: objects with versions, changed by compare-and-swap.
//!
//! The state of the trust domain is one `TrustDomain` object, the election of the controller's
//! leader a Lease, everything else of ours a ConfigMap of its own; what only the controller writes
//! lies in the namespace of the anchors' keys, where identity may not write. Resources are read as
//! they are and never written.
//!
//! The revision of a `TrustDomain` is its generation, which counts the changes of the state alone:
//! its resourceVersion changes with every condition and label too, and would begin a fence anew
//! that nothing has disturbed. All others have their resourceVersion, the revision of all of etcd.
//! From where to watch on is a resourceVersion too, and is told by lists and by [`Event::Synced`].

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _};
use k8s_openapi::api::coordination::v1::LeaseSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{
    DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions,
    WatchEvent, WatchParams,
};
use kube::core::Status;
use kube::{Api, Client};
use serde_json::{Value, json};
use steadfast_api::UnixTime;

use super::Namespaces;
use super::place::{Kind, Place, Scope};
use crate::names::{ObjectName, resource_key};
use crate::store::{
    Entry, Event, LEADER_KEY, LeaderLease, MIRRORS_PREFIX, RESOURCES_PREFIX, Revision, Store,
    StoreError, TRUST_DOMAIN_KEY,
};

/// The store, through the API server.
#[derive(Clone)]
pub struct KubeStore {
    client: Client,
    namespaces: Namespaces,
}

impl KubeStore {
    /// The store behind this client.
    pub fn new(client: Client, namespaces: Namespaces) -> Self {
        Self { client, namespaces }
    }

    /// The objects among which the one of this place is, and its name.
    fn objects(&self, place: &Place) -> (Api<DynamicObject>, String) {
        match place {
            Place::Domain => (self.all(Kind::DOMAIN), DOMAIN_NAME.to_owned()),
            Place::Leader => {
                (self.namespaced(Kind::LEASE, &self.namespaces.anchors), LEASE_NAME.to_owned())
            }
            Place::Mirror(namespace) => {
                (self.namespaced(Kind::RECORD, namespace), MIRROR_NAME.to_owned())
            }
            Place::Record(scope, name) => (self.records(*scope), format!("{RECORD_PREFIX}{name}")),
            Place::Resource(kind, name) if name.namespace.is_empty() => {
                (self.all(kind), name.name.clone())
            }
            Place::Resource(kind, name) => {
                (self.namespaced(kind, &name.namespace), name.name.clone())
            }
        }
    }

    fn records(&self, scope: Scope) -> Api<DynamicObject> {
        let namespace = match scope {
            Scope::Anchors => &self.namespaces.anchors,
            Scope::Control => &self.namespaces.control,
        };
        self.namespaced(Kind::RECORD, namespace)
    }

    fn all(&self, kind: &Kind) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &kind.resource())
    }

    fn namespaced(&self, kind: &Kind, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, &kind.resource())
    }

    /// What a prefix covers.
    fn range(&self, prefix: &str) -> Result<Range, StoreError> {
        if prefix == TRUST_DOMAIN_KEY {
            let fields = Some(format!("metadata.name={DOMAIN_NAME}"));
            return Ok(Range {
                api: self.all(Kind::DOMAIN),
                fields,
                labels: None,
                form: Form::Domain,
            });
        }
        if prefix == MIRRORS_PREFIX {
            // By name, so that the right to read them is no right to read any other.
            let fields = Some(format!("metadata.name={MIRROR_NAME}"));
            let api = self.all(Kind::RECORD);
            return Ok(Range { api, fields, labels: None, form: Form::Mirror });
        }
        if let Some(rest) = prefix.strip_prefix(RESOURCES_PREFIX) {
            let kind = rest.strip_suffix('/').and_then(Kind::find);
            let kind = kind.ok_or_else(|| not_kept(prefix))?;
            let form = Form::Resource(kind);
            return Ok(Range { api: self.all(kind), fields: None, labels: None, form });
        }
        let labels = Some(format!("{RECORD_LABEL}=true"));
        let api = self.records(Scope::of(prefix));
        Ok(Range { api, fields: None, labels, form: Form::Record })
    }

    async fn create(&self, key: &str, value: &[u8]) -> Result<Revision, StoreError> {
        let place = Place::of(key).ok_or_else(|| not_kept(key))?;
        let (api, name) = self.objects(&place);
        let form = Form::of(&place);
        let created = api.create(&PostParams::default(), &form.object(&name, key, value)?).await;
        match created {
            Ok(created) => form.revision(&created),
            Err(error) => Err(self.refused(key, None, error).await),
        }
    }

    /// Replaces our own part of an object: labels and the like belong to others.
    async fn replace(
        &self,
        key: &str,
        expected: Revision,
        value: &[u8],
    ) -> Result<Revision, StoreError> {
        let place = Place::of(key).ok_or_else(|| not_kept(key))?;
        let (api, name) = self.objects(&place);
        let form = Form::of(&place);
        let changes = serde_json::from_value(form.changes(expected, key, value)?);
        let changes = Patch::<()>::Json(changes.map_err(|error| unreadable(key, &error))?);
        match api.patch(&name, &PatchParams::default(), &changes).await {
            Ok(changed) => form.revision(&changed),
            Err(error) => Err(self.refused(key, Some(expected), error).await),
        }
    }

    async fn delete(&self, key: &str, expected: Revision) -> Result<Revision, StoreError> {
        let place = Place::of(key).ok_or_else(|| not_kept(key))?;
        if place == Place::Domain {
            return Err(StoreError::Denied("the trust domain is never deleted".to_owned()));
        }
        let (api, name) = self.objects(&place);
        let resource_version = Some(expected.0.to_string());
        let preconditions = Some(Preconditions { resource_version, uid: None });
        let params = DeleteParams { preconditions, ..DeleteParams::default() };
        match api.delete(&name, &params).await {
            // The answer to a deletion tells no later version; the next read does.
            Ok(_) => Ok(expected),
            Err(error) => Err(self.refused(key, Some(expected), error).await),
        }
    }

    /// Why a write failed: because somebody else was faster, or for itself.
    async fn refused(
        &self,
        key: &str,
        expected: Option<Revision>,
        error: kube::Error,
    ) -> StoreError {
        let judged = matches!(&error, kube::Error::Api(status)
            if matches!(status.code, NOT_FOUND | CONFLICT | INVALID));
        if !judged {
            return failed(error);
        }
        let actual = match self.get(key).await {
            Ok(entry) => entry.map(|entry| entry.revision),
            Err(error) => return error,
        };
        if actual == expected {
            return StoreError::Denied(described(&error));
        }
        StoreError::Conflict { key: key.to_owned(), expected, actual }
    }
}

#[async_trait::async_trait]
impl Store for KubeStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        // What has no place here was never written.
        let Some(place) = Place::of(key) else { return Ok(None) };
        let (api, name) = self.objects(&place);
        // Without a resourceVersion the API server asks etcd's quorum, never its cache.
        match api.get_opt(&name).await.map_err(failed)? {
            Some(object) => Form::of(&place).entry(key, object).map(Some),
            None => Ok(None),
        }
    }

    async fn list(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        let mut all = Vec::new();
        let revision = self.list_parts(prefix, &mut |entries| all.extend(entries)).await?;
        all.sort_by(|a: &Entry, b| a.key.cmp(&b.key));
        Ok((all, revision))
    }

    async fn list_parts(
        &self,
        prefix: &str,
        part: &mut (dyn FnMut(Vec<Entry>) + Send),
    ) -> Result<Revision, StoreError> {
        let (range, mut page) = (self.range(prefix)?, None);
        loop {
            let listed = range.api.list(&range.list_params(page)).await;
            let listed = listed.map_err(|error| match &error {
                kube::Error::Api(status) if status.code == NOT_FOUND => {
                    StoreError::NoSuchKind(range.api.resource_url().to_owned())
                }
                _ => failed(error),
            })?;
            let revision = resource_version(listed.metadata.resource_version.as_deref())?;
            let mut entries = Vec::with_capacity(listed.items.len());
            for object in listed.items {
                let entry = range.form.found(object)?;
                entries.extend(entry.filter(|entry| entry.key.starts_with(prefix)));
            }
            part(entries);
            page = listed.metadata.continue_.filter(|page| !page.is_empty());
            if page.is_none() {
                return Ok(revision);
            }
        }
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Option<Bytes>,
    ) -> Result<Revision, StoreError> {
        if key.starts_with(RESOURCES_PREFIX) {
            return Err(StoreError::Denied(format!("{key:?} is not ours to write")));
        }
        match (expected, value) {
            (None, Some(value)) => self.create(key, &value).await,
            (Some(expected), Some(value)) => self.replace(key, expected, &value).await,
            (Some(expected), None) => self.delete(key, expected).await,
            (None, None) => match self.get(key).await? {
                None => Ok(Revision::default()),
                Some(Entry { revision, .. }) => Err(StoreError::Conflict {
                    key: key.to_owned(),
                    expected,
                    actual: Some(revision),
                }),
            },
        }
    }

    async fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> Result<BoxStream<'static, Result<Event, StoreError>>, StoreError> {
        let range = self.range(prefix)?;
        let chunks = range.open(from).await?;
        let prefix = prefix.to_owned();
        let watching = Watching { range, prefix, seen: from, chunks, ended: false };
        Ok(stream::unfold(watching, Watching::next).flat_map(stream::iter).boxed())
    }
}

/// Objects of one kind.
struct Range {
    api: Api<DynamicObject>,
    fields: Option<String>,
    labels: Option<String>,
    form: Form,
}

/// What came at once, of a watch.
type Chunks = BoxStream<'static, Vec<Result<WatchEvent<DynamicObject>, kube::Error>>>;

impl Range {
    fn list_params(&self, page: Option<String>) -> ListParams {
        ListParams {
            field_selector: self.fields.clone(),
            label_selector: self.labels.clone(),
            limit: Some(PAGE),
            continue_token: page,
            ..ListParams::default()
        }
    }

    /// A watch from this revision on.
    async fn open(&self, from: Revision) -> Result<Chunks, StoreError> {
        let params = WatchParams {
            field_selector: self.fields.clone(),
            label_selector: self.labels.clone(),
            timeout: Some(WATCH_SECONDS),
            ..WatchParams::default()
        };
        let watch = self.api.watch(&params, &from.0.to_string()).await;
        Ok(watch.map_err(|error| watch_failed(error, from))?.ready_chunks(CHUNK).boxed())
    }
}

/// A watch that goes on where the API server ended it, which it does every minute: a connection
/// that died without a word is noticed so.
struct Watching {
    range: Range,
    prefix: String,
    seen: Revision,
    chunks: Chunks,
    ended: bool,
}

impl Watching {
    /// The next events, with [`Event::Synced`] behind what came at once; `None` after an error.
    async fn next(mut self) -> Option<(Vec<Result<Event, StoreError>>, Self)> {
        while !self.ended {
            let Some(chunk) = self.chunks.next().await else {
                match self.range.open(self.seen).await {
                    Ok(chunks) => self.chunks = chunks,
                    Err(error) => return Some((vec![Err(error)], self.ends())),
                }
                continue;
            };
            let mut told = Vec::with_capacity(chunk.len() + 1);
            for event in chunk {
                match self.event(event) {
                    Ok(event) => told.extend(event.map(Ok)),
                    Err(error) => {
                        // What came before it has been told in full.
                        told.push(Ok(Event::Synced(self.seen)));
                        told.push(Err(error));
                        return Some((told, self.ends()));
                    }
                }
            }
            told.push(Ok(Event::Synced(self.seen)));
            return Some((told, self));
        }
        None
    }

    fn ends(mut self) -> Self {
        self.ended = true;
        self
    }

    fn event(
        &mut self,
        event: Result<WatchEvent<DynamicObject>, kube::Error>,
    ) -> Result<Option<Event>, StoreError> {
        let (object, deleted) = match event.map_err(|error| watch_failed(error, self.seen))? {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => (object, false),
            WatchEvent::Deleted(object) => (object, true),
            WatchEvent::Bookmark(bookmark) => {
                self.seen = resource_version(Some(&bookmark.metadata.resource_version))?;
                return Ok(None);
            }
            WatchEvent::Error(status) => {
                return Err(watch_failed(kube::Error::Api(status), self.seen));
            }
        };
        let seen = resource_version(object.metadata.resource_version.as_deref())?;
        let event = match (self.range.form.found(object)?, deleted) {
            (Some(entry), false) => Some(Event::Put(entry)),
            (Some(Entry { key, .. }), true) => Some(Event::Deleted { key, revision: seen }),
            (None, _) => None,
        };
        self.seen = seen;
        Ok(event.filter(|event| match event {
            Event::Put(Entry { key, .. }) | Event::Deleted { key, .. } => {
                key.starts_with(&self.prefix)
            }
            Event::Synced(_) => true,
        }))
    }
}

/// How a value lies in its object.
#[derive(Clone, Copy, Debug)]
enum Form {
    /// The specification of a TrustDomain.
    Domain,
    /// The fields of a Lease.
    Leader,
    /// The files of a ConfigMap.
    Mirror,
    /// The bytes of a ConfigMap.
    Record,
    /// The whole object.
    Resource(&'static Kind),
}

impl Form {
    const fn of(place: &Place) -> Self {
        match place {
            Place::Domain => Self::Domain,
            Place::Leader => Self::Leader,
            Place::Mirror(_) => Self::Mirror,
            Place::Record(..) => Self::Record,
            Place::Resource(kind, _) => Self::Resource(kind),
        }
    }

    /// The entry that an object of this form is; `None`: somebody else's.
    fn found(self, object: DynamicObject) -> Result<Option<Entry>, StoreError> {
        let name = object.metadata.name.clone().unwrap_or_default();
        let key = match self {
            Self::Domain => TRUST_DOMAIN_KEY.to_owned(),
            Self::Leader => LEADER_KEY.to_owned(),
            Self::Mirror => {
                let namespace = object.metadata.namespace.clone().unwrap_or_default();
                format!("{MIRRORS_PREFIX}{namespace}")
            }
            Self::Record => match name.strip_prefix(RECORD_PREFIX) {
                Some(name) => Place::record_key(name),
                None => return Ok(None),
            },
            Self::Resource(kind) => {
                let namespace = object.metadata.namespace.clone().unwrap_or_default();
                resource_key(kind.kind, &ObjectName { namespace, name })
            }
        };
        self.entry(&key, object).map(Some)
    }

    fn revision(self, object: &DynamicObject) -> Result<Revision, StoreError> {
        match self {
            Self::Domain => {
                let generation = object.metadata.generation.and_then(|at| u64::try_from(at).ok());
                generation.map(Revision).ok_or_else(|| {
                    StoreError::Unavailable("the API server tells no generation".to_owned())
                })
            }
            _ => resource_version(object.metadata.resource_version.as_deref()),
        }
    }

    fn entry(self, key: &str, mut object: DynamicObject) -> Result<Entry, StoreError> {
        let revision = self.revision(&object)?;
        let value = match self {
            Self::Domain => match object.data.get("spec") {
                Some(spec) => spec.to_string().into_bytes(),
                None => return Err(unreadable(key, &"it has no spec")),
            },
            Self::Leader => {
                let lease = object.data.get("spec").and_then(lease_of).unwrap_or_default();
                serde_json::to_vec(&lease).map_err(|error| unreadable(key, &error))?
            }
            // Also one that somebody has emptied: it is written anew.
            Self::Mirror => match object.data.get("data") {
                Some(files) => files.to_string().into_bytes(),
                None => Vec::new(),
            },
            Self::Record => {
                let value = object.data.pointer("/binaryData/value").and_then(Value::as_str);
                let value = value.ok_or_else(|| unreadable(key, &"it has no binaryData.value"))?;
                BASE64.decode(value).map_err(|error| unreadable(key, &error))?
            }
            Self::Resource(_) => {
                // Who has changed which field is half of an object, and is never asked for.
                object.metadata.managed_fields = None;
                serde_json::to_vec(&object).map_err(|error| unreadable(key, &error))?
            }
        };
        Ok(Entry { key: key.to_owned(), value: value.into(), revision })
    }

    /// Our part of an object: the field that it is in, and what is in it.
    fn part(self, key: &str, value: &[u8]) -> Result<(&'static str, Value), StoreError> {
        let parsed = || serde_json::from_slice(value).map_err(|error| unreadable(key, &error));
        match self {
            Self::Domain => Ok(("spec", parsed()?)),
            Self::Leader => {
                let lease = serde_json::from_slice(value);
                Ok(("spec", spec_of(&lease.map_err(|error| unreadable(key, &error))?)))
            }
            Self::Mirror => Ok(("data", parsed()?)),
            Self::Record => Ok(("binaryData", json!({ "value": BASE64.encode(value) }))),
            Self::Resource(_) => Err(StoreError::Denied(format!("{key:?} is not ours to write"))),
        }
    }

    /// A new object.
    fn object(self, name: &str, key: &str, value: &[u8]) -> Result<DynamicObject, StoreError> {
        let kind = match self {
            Self::Domain => Kind::DOMAIN,
            Self::Leader => Kind::LEASE,
            Self::Mirror | Self::Record => Kind::RECORD,
            Self::Resource(kind) => kind,
        };
        let (field, part) = self.part(key, value)?;
        let mut object = DynamicObject::new(name, &kind.resource()).data(json!({ field: part }));
        let record = matches!(self, Self::Record).then_some((RECORD_LABEL, "true"));
        let labels = record.into_iter().chain([("app.kubernetes.io/part-of", "steadfast")]);
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned()));
        object.metadata.labels = Some(labels.collect());
        Ok(object)
    }

    /// The changes that make an object of the expected revision hold another value, as JSON patch:
    /// the API server makes all of them or none.
    fn changes(self, expected: Revision, key: &str, value: &[u8]) -> Result<Value, StoreError> {
        let (field, part) = self.part(key, value)?;
        let test = match self {
            Self::Domain => json!({
                "op": "test", "path": "/metadata/generation", "value": expected.0,
            }),
            _ => json!({
                "op": "test", "path": "/metadata/resourceVersion", "value": expected.0.to_string(),
            }),
        };
        // "add" replaces what is there, and mends what somebody has taken away.
        Ok(json!([test, { "op": "add", "path": format!("/{field}"), "value": part }]))
    }
}

/// A Lease as a value of ours; `None`: somebody has taken a part of it away.
fn lease_of(spec: &Value) -> Option<LeaderLease> {
    let spec: LeaseSpec = serde_json::from_value(spec.clone()).ok()?;
    let renewed = spec.renew_time?.0.as_millisecond();
    let seconds = u64::try_from(spec.lease_duration_seconds?).ok()?;
    Some(LeaderLease {
        holder: spec.holder_identity?,
        renewed_at: UnixTime::from_millis(u64::try_from(renewed).ok()?),
        duration: std::time::Duration::from_secs(seconds),
    })
}

fn spec_of(lease: &LeaderLease) -> Value {
    let millis = i64::try_from(lease.renewed_at.as_millis()).unwrap_or(i64::MAX);
    let renewed = jiff::Timestamp::from_millisecond(millis).unwrap_or(jiff::Timestamp::MAX);
    json!(LeaseSpec {
        holder_identity: Some(lease.holder.clone()),
        lease_duration_seconds: i32::try_from(lease.duration.as_secs()).ok(),
        renew_time: Some(MicroTime(renewed)),
        ..LeaseSpec::default()
    })
}

fn resource_version(text: Option<&str>) -> Result<Revision, StoreError> {
    let number = text.and_then(|text| text.parse().ok());
    number.map(Revision).ok_or_else(|| {
        StoreError::Unavailable(format!("the API server tells no resourceVersion, but {text:?}"))
    })
}

fn unreadable(key: &str, why: &dyn std::fmt::Display) -> StoreError {
    StoreError::Unreadable { key: key.to_owned(), why: why.to_string() }
}

fn not_kept(key: &str) -> StoreError {
    StoreError::Denied(format!("{key:?} has no place in the API server"))
}

fn watch_failed(error: kube::Error, from: Revision) -> StoreError {
    match error {
        kube::Error::Api(status) if status.code == GONE => StoreError::Compacted(from),
        error => failed(error),
    }
}

pub(super) fn failed(error: kube::Error) -> StoreError {
    match &error {
        kube::Error::Api(status) if matches!(status.code, UNAUTHORIZED | FORBIDDEN) => {
            StoreError::Denied(described(&error))
        }
        _ => StoreError::Unavailable(described(&error)),
    }
}

fn described(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => {
            let Status { code, message, reason, .. } = &**status;
            format!("the API server answers {code} {reason}: {message}")
        }
        error => format!("the API server: {}", steadfast_process::ErrorChain(error)),
    }
}

/// There is one trust domain in a cluster.
pub(super) const DOMAIN_NAME: &str = "steadfast";
const LEASE_NAME: &str = "steadfast-rotation";
/// In every namespace.
const MIRROR_NAME: &str = "steadfast-trust-bundle";
const RECORD_PREFIX: &str = "steadfast.";
const RECORD_LABEL: &str = "trust.steadfast.dev/record";
/// So many pods are some 2 MiB, and several times that while they are read.
const PAGE: u32 = 250;
const CHUNK: usize = 256;
const WATCH_SECONDS: u32 = 60;
const UNAUTHORIZED: u16 = 401;
const FORBIDDEN: u16 = 403;
const NOT_FOUND: u16 = 404;
const CONFLICT: u16 = 409;
const GONE: u16 = 410;
const INVALID: u16 = 422;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_value_that_is_written_is_read_back_as_it_was() {
        let lease = LeaderLease {
            holder: "a/1".to_owned(),
            renewed_at: UnixTime::from_millis(1_795_262_400_123),
            duration: Duration::from_secs(8),
        };
        let cases = [
            (TRUST_DOMAIN_KEY, r#"{"seq":1}"#.to_owned()),
            (LEADER_KEY, serde_json::to_string(&lease).unwrap()),
            ("trust/ledger/0", "any \u{0} bytes".to_owned()),
            ("mirrors/demo", r#"{"bundle.json":"{}"}"#.to_owned()),
        ];
        for (key, value) in cases {
            let form = Form::of(&Place::of(key).unwrap());
            let mut made = form.object("x", key, value.as_bytes()).unwrap();
            made.metadata.generation = Some(7);
            made.metadata.resource_version = Some("7".to_owned());
            let entry = form.entry(key, made).unwrap();
            assert_eq!(entry.value, value.as_bytes(), "{key}");
            assert_eq!(entry.revision, Revision(7));
        }
    }

    #[test]
    fn the_state_changes_its_revision_with_its_content_alone() {
        let domain = |version: &str| {
            object(json!({
                "metadata": { "name": "steadfast", "generation": 3, "resourceVersion": version },
                "spec": { "seq": 1 },
            }))
        };
        for version in ["10", "11"] {
            assert_eq!(Form::Domain.revision(&domain(version)), Ok(Revision(3)));
        }
        let changes = Form::Domain.changes(Revision(3), TRUST_DOMAIN_KEY, b"{}").unwrap();
        assert_eq!(changes[0]["path"], "/metadata/generation");
        assert_eq!(changes[0]["value"], 3);
        let changes = Form::Record.changes(Revision(10), "trust/ledger/0", b"").unwrap();
        assert_eq!(changes[0]["value"], "10");
    }

    #[test]
    fn what_somebody_has_changed_by_hand_is_named_and_never_taken_for_empty() {
        let bare = || object(json!({ "metadata": { "generation": 1, "resourceVersion": "1" } }));
        for (form, key) in [(Form::Domain, TRUST_DOMAIN_KEY), (Form::Record, "trust/ledger/0")] {
            let error = form.entry(key, bare()).unwrap_err();
            assert!(matches!(error, StoreError::Unreadable { .. }), "{error}");
            assert!(error.to_string().contains(key), "{error}");
        }
        // A lease that says nothing holds nobody back.
        assert!(Form::Leader.entry(LEADER_KEY, bare()).is_ok());
    }

    #[test]
    fn an_error_says_whether_to_list_again_to_mend_the_rights_or_to_wait() {
        let status = |code| {
            let status = Status { code, ..Status::failure("why", "Reason") };
            kube::Error::Api(Box::new(status))
        };
        assert_eq!(watch_failed(status(410), Revision(5)), StoreError::Compacted(Revision(5)));
        for code in [401, 403] {
            assert!(matches!(failed(status(code)), StoreError::Denied(_)), "{code}");
        }
        for code in [429, 500, 503, 504] {
            assert!(matches!(failed(status(code)), StoreError::Unavailable(_)), "{code}");
        }
    }
}
