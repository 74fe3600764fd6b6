//! From the text of a manifest to objects, or to the line, column and reason why not. No I/O.
//!
//! A file is one thing: it holds only good objects, or it is refused whole. Kinds that the mesh
//! acts on are checked as the API server would (types, names, ports, defaults), so that a manifest
//! that passes here passes there; every other kind needs only the form of a Kubernetes object.

mod check;
mod locate;

use k8s_openapi::api::core::v1::{Namespace, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::check::Checked;
use self::locate::{Path, Step, locate};
use crate::names::{ObjectName, check_name, check_namespace};

/// One object of a manifest.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Object {
    pub(super) kind: String,
    pub(super) name: ObjectName,
    /// As the API server would keep it, without what the server itself sets.
    pub(super) value: Value,
    /// Where it begins.
    pub(super) line: u64,
}

/// Why a manifest cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("line {line}, column {column}: {reason}")]
pub(super) struct Invalid {
    pub(super) line: u64,
    pub(super) column: u64,
    pub(super) reason: String,
}

/// Something that does no harm and is most likely not what was meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Warning {
    pub(super) line: u64,
    pub(super) text: String,
}

/// The objects of a manifest, in their order.
pub(super) fn parse(bytes: &[u8]) -> Result<(Vec<Object>, Vec<Warning>), Invalid> {
    let text = utf8(bytes)?;
    let (mut objects, mut warnings) = (Vec::new(), Vec::new());
    let mut key_bytes = 0;
    for document in documents(text) {
        for object in document.parse(&mut warnings)? {
            key_bytes += object.kind.len() + object.name.namespace.len() + object.name.name.len();
            if objects.len() == OBJECTS_MAX || key_bytes > KEY_BYTES_MAX {
                let reason = format!("more than {OBJECTS_MAX} objects in one file: split it");
                return Err(Invalid { line: object.line, column: 1, reason });
            }
            objects.push(object);
        }
    }
    Ok((objects, warnings))
}

fn utf8(bytes: &[u8]) -> Result<&str, Invalid> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let good = &bytes[..error.valid_up_to()];
        let line = good.iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
        let column = good.iter().rev().take_while(|byte| **byte != b'\n').count() as u64 + 1;
        Invalid { line, column, reason: "is no UTF-8 text".to_owned() }
    })?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
}

/// One document of a file.
struct Document<'a> {
    text: &'a str,
    /// The line of the file on which its text begins, from 1.
    first_line: u64,
}

/// Cuts a file at the lines that begin a document. Such a line can be nothing else in YAML: inside
/// a scalar it is forbidden (YAML 1.2, `c-forbidden`), so this needs no parser.
fn documents(text: &str) -> Vec<Document<'_>> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let rest = line.strip_prefix("---");
        if offset > 0
            && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
        {
            documents.push(Document { text: &text[start..offset], first_line: start_line });
            (start, start_line) = (offset, index as u64 + 1);
        }
        offset += line.len();
    }
    documents.push(Document { text: &text[start..], first_line: start_line });
    documents
}

impl Document<'_> {
    /// Its objects: none if it is empty, those of a `List` (as `kubectl get -o yaml` prints), or
    /// the one that it is.
    fn parse(&self, warnings: &mut Vec<Warning>) -> Result<Vec<Object>, Invalid> {
        if self.is_blank() {
            return Ok(Vec::new());
        }
        let raw: Value = self.read()?;
        if raw.is_null() {
            return Ok(Vec::new());
        }
        if raw.get("kind").and_then(Value::as_str) != Some("List") {
            let line = self.first_line + locate(self.text, &Path::new()).0 - 1;
            let part = Part { document: self, at: Path::new(), line };
            return Ok(vec![part.parse(raw, warnings)?]);
        }
        let at = |index| vec![Step::Key("items".to_owned()), Step::Index(index)];
        let Some(Value::Array(items)) = raw.get("items") else {
            let whole = Part { document: self, at: Path::new(), line: self.first_line };
            let reason = "a List needs items: a sequence of objects";
            return Err(whole.invalid(&at(0)[..1], reason.to_owned()));
        };
        let lines = locate::lines_of_items(self.text);
        let parts = items
            .iter()
            .zip(lines.into_iter().chain(std::iter::repeat(1)))
            .enumerate()
            .map(|(index, (item, line))| {
                let part = Part { document: self, at: at(index), line: self.first_line + line - 1 };
                part.parse(item.clone(), warnings)
            });
        parts.collect()
    }

    fn is_blank(&self) -> bool {
        let text = self.text.strip_prefix("---").unwrap_or(self.text);
        let blank = |line: &str| {
            let line = line.trim();
            line.is_empty() || line.starts_with('#') || line.starts_with('%') || line == "..."
        };
        text.lines().all(blank)
    }

    fn read<T: DeserializeOwned>(&self) -> Result<T, Invalid> {
        // As strict as the API server: an annotation `"true"` is a text, `true` is not.
        let options = serde_saphyr::options! { no_schema: true, with_snippet: false };
        serde_saphyr::from_str_with_options(self.text, options).map_err(|error| {
            use serde_saphyr::MessageFormatter as _;
            let at = error.location();
            let formatter = serde_saphyr::UserMessageFormatter;
            let reason = formatter.format_message(error.without_snippet());
            let mut reason = reason.replace(char::is_control, " ");
            let (line, column) = at.map_or((1, 1), |at| (at.line().max(1), at.column().max(1)));
            // "invalid i32" alone does not say of what.
            if let Some(path) = locate::path_at(self.text, (line, column)) {
                reason = format!("{}: {reason}", locate::display(&path));
            }
            Invalid { line: self.first_line + line - 1, column, reason }
        })
    }
}

/// What of a document is one object: the whole, or an item of a list.
struct Part<'a> {
    document: &'a Document<'a>,
    /// The way to it; empty: the whole document.
    at: Path,
    /// Where it begins.
    line: u64,
}

impl Part<'_> {
    fn parse(&self, mut raw: Value, warnings: &mut Vec<Warning>) -> Result<Object, Invalid> {
        let header = self.header(&raw)?;
        remove_server_fields(&mut raw);
        let mut value = match self.typed(&header, &raw)? {
            Some(Checked { value, problem: None }) => {
                self.warn_of_unknown_fields(&header, &raw, &value, warnings);
                value
            }
            Some(Checked { problem: Some((path, reason)), .. }) => {
                return Err(self.invalid(&path, reason));
            }
            None => raw,
        };
        if serde_json::to_vec(&value).map_or(0, |bytes| bytes.len()) > OBJECT_BYTES_MAX {
            let reason = format!("the object is larger than {OBJECT_BYTES_MAX} bytes");
            return Err(self.invalid(&[], reason));
        }
        remove_server_fields(&mut value);
        set_namespace(&mut value, &header.name);
        Ok(Object { kind: header.kind, name: header.name, value, line: self.line })
    }

    /// The object in its type. The text says best where something is wrong; within a list, the
    /// item is named.
    fn read<T: DeserializeOwned>(&self, raw: &Value) -> Result<T, Invalid> {
        if self.at.is_empty() {
            return self.document.read();
        }
        T::deserialize(raw)
            .map_err(|error| self.invalid(&[], format!("{}: {error}", locate::display(&self.at))))
    }

    fn header(&self, raw: &Value) -> Result<Header, Invalid> {
        let text = |path: &[&str]| -> Result<String, Invalid> {
            let path: Path = path.iter().map(|key| Step::Key((*key).to_owned())).collect();
            match locate::get(raw, &path) {
                Some(Value::String(text)) if !text.is_empty() => Ok(text.clone()),
                Some(Value::Null) | None => {
                    Err(self.invalid(&path, format!("{} is missing", locate::display(&path))))
                }
                Some(_) => {
                    Err(self.invalid(&path, format!("{} is no text", locate::display(&path))))
                }
            }
        };
        if !raw.is_object() {
            let reason = "a Kubernetes object is expected: apiVersion, kind, metadata";
            return Err(self.invalid(&[], reason.to_owned()));
        }
        let (api_version, kind) = (text(&["apiVersion"])?, text(&["kind"])?);
        let name = text(&["metadata", "name"])?;
        let namespace = raw.pointer("/metadata/namespace").filter(|value| !value.is_null());
        let namespace = match namespace {
            Some(_) => text(&["metadata", "namespace"])?,
            None => DEFAULT_NAMESPACE.to_owned(),
        };
        let namespaced = !CLUSTER_WIDE.contains(&kind.as_str());
        let name = ObjectName::new(if namespaced { namespace } else { String::new() }, name);
        let header = Header { api_version, kind, name };
        header.check().map_err(|(path, reason)| {
            let path: Path = path.iter().map(|key| Step::Key((*key).to_owned())).collect();
            self.invalid(&path, reason)
        })?;
        Ok(header)
    }

    /// The object as its type has it, for the kinds that the mesh acts on.
    fn typed(&self, header: &Header, raw: &Value) -> Result<Option<Checked>, Invalid> {
        Ok(Some(match header.kind.as_str() {
            "EndpointSlice" => check::endpoint_slice(self.read::<EndpointSlice>(raw)?),
            "Namespace" => check::unchanged(&self.read::<Namespace>(raw)?),
            "Pod" => check::pod(self.read::<Pod>(raw)?),
            "Service" => check::service(self.read::<Service>(raw)?),
            "ServiceAccount" => check::unchanged(&self.read::<ServiceAccount>(raw)?),
            _ => return Ok(None),
        }))
    }

    /// What was written and is not in the type: a typing error, in all likelihood.
    fn warn_of_unknown_fields(
        &self,
        header: &Header,
        raw: &Value,
        typed: &Value,
        warnings: &mut Vec<Warning>,
    ) {
        let mut unknown = Vec::new();
        locate::missing(raw, typed, &mut Path::new(), &mut unknown);
        let room = WARNINGS_MAX.saturating_sub(warnings.len());
        for path in unknown.into_iter().take(room) {
            let (kind, name) = (&header.kind, &header.name);
            let text =
                format!("{kind} {name}: unknown field {} is ignored", locate::display(&path));
            warnings.push(Warning { line: self.locate(&path).0, text });
        }
    }

    fn invalid(&self, path: &[Step], reason: String) -> Invalid {
        let (line, column) = self.locate(path);
        Invalid { line, column, reason }
    }

    /// Line of the file, and column.
    fn locate(&self, path: &[Step]) -> (u64, u64) {
        let path = [self.at.as_slice(), path].concat();
        let (line, column) = locate(self.document.text, &path);
        (self.document.first_line + line - 1, column)
    }
}

struct Header {
    api_version: String,
    kind: String,
    name: ObjectName,
}

impl Header {
    fn check(&self) -> Result<(), (&'static [&'static str], String)> {
        let (api_version, kind) = (&self.api_version, &self.kind);
        if !is_api_version(api_version) {
            let reason = format!("apiVersion {api_version:?} is none: expected v1 or group/v1");
            return Err((&["apiVersion"], reason));
        }
        let word = kind.starts_with(|c: char| c.is_ascii_uppercase())
            && kind.len() <= 63
            && kind.chars().all(|c| c.is_ascii_alphanumeric());
        if !word {
            return Err((
                &["kind"],
                format!("kind {kind:?} is none: expected a word like Service"),
            ));
        }
        let expected = match kind.as_str() {
            "EndpointSlice" => Some("discovery.k8s.io/v1"),
            "Namespace" | "Pod" | "Service" | "ServiceAccount" => Some("v1"),
            _ => None,
        };
        if let Some(expected) = expected.filter(|expected| *expected != api_version.as_str()) {
            let reason = format!("apiVersion of a {kind} is {expected}, not {api_version}");
            return Err((&["apiVersion"], reason));
        }
        if !self.name.namespace.is_empty() {
            check_namespace(&self.name.namespace)
                .map_err(|error| (&["metadata", "namespace"][..], error.to_string()))?;
        }
        self.check_name().map_err(|reason| (&["metadata", "name"][..], reason))
    }

    fn check_name(&self) -> Result<(), String> {
        let name = &self.name.name;
        match self.kind.as_str() {
            "Namespace" | "Service" => check_namespace(name)
                .map_err(|error| error.to_string().replacen("namespace", "name", 1)),
            "EndpointSlice" | "Pod" | "ServiceAccount" => {
                check_name(name).map_err(|error| error.to_string())
            }
            // Roles have names like `system:node`; a path segment is all that is asked of those.
            _ if name.len() > 253
                || matches!(name.as_str(), "." | "..")
                || name.contains(|c: char| c == '/' || c == '%' || c.is_control()) =>
            {
                Err(format!("{name:?} is no name: at most 253 characters, without '/' and '%'"))
            }
            _ => Ok(()),
        }
    }
}

fn is_api_version(text: &str) -> bool {
    let (group, version) = text.rsplit_once('/').map_or((None, text), |(g, v)| (Some(g), v));
    let digits = version.strip_prefix('v').is_some_and(|rest| {
        rest.starts_with(|c: char| c.is_ascii_digit())
            && rest.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    });
    digits && group.is_none_or(|group| check_name(group).is_ok())
}

/// What the server sets and a manifest may hold because it was copied from a server.
fn remove_server_fields(value: &mut Value) {
    if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
        for field in SERVER_FIELDS {
            metadata.remove(*field);
        }
    }
}

fn set_namespace(value: &mut Value, name: &ObjectName) {
    if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
        if name.namespace.is_empty() {
            metadata.remove("namespace");
        } else {
            metadata.insert("namespace".to_owned(), Value::String(name.namespace.clone()));
        }
    }
}

const DEFAULT_NAMESPACE: &str = "default";

/// What the server sets itself.
const SERVER_FIELDS: &[&str] =
    &["creationTimestamp", "generation", "managedFields", "resourceVersion", "selfLink", "uid"];

/// Kinds that are in no namespace.
const CLUSTER_WIDE: &[&str] = &[
    "APIService",
    "ClusterRole",
    "ClusterRoleBinding",
    "ClusterTrustBundle",
    "CustomResourceDefinition",
    "GatewayClass",
    "IngressClass",
    "MutatingWebhookConfiguration",
    "Namespace",
    "Node",
    "PersistentVolume",
    "PriorityClass",
    "StorageClass",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
    "ValidatingWebhookConfiguration",
];

const OBJECTS_MAX: usize = 10_000;
/// So that the list of a file's objects is itself below the bound of a value.
const KEY_BYTES_MAX: usize = 768 * 1024;
/// A value of the store, less what the server adds.
const OBJECT_BYTES_MAX: usize = (1 << 20) - 4096;
const WARNINGS_MAX: usize = 20;

#[cfg(test)]
mod tests;
