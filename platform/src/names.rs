//! The names of Kubernetes objects, checked before they become part of a key or a path.

use std::fmt;

use crate::store::RESOURCES_PREFIX;

/// Namespace and name of an object; the namespace of a cluster-wide one is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl ObjectName {
    /// The name of an object.
    pub fn new(namespace: impl AsRef<str>, name: impl AsRef<str>) -> Self {
        Self { namespace: namespace.as_ref().to_owned(), name: name.as_ref().to_owned() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return f.write_str(&self.name);
        }
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The key of a resource in the store.
pub fn resource_key(kind: &str, name: &ObjectName) -> String {
    format!("{RESOURCES_PREFIX}{kind}/{}/{}", name.namespace, name.name)
}

/// Kind and name of the resource with this key; `None` for any other key.
pub fn parse_resource_key(key: &str) -> Option<(&str, ObjectName)> {
    let (kind, rest) = key.strip_prefix(RESOURCES_PREFIX)?.split_once('/')?;
    let (namespace, name) = rest.split_once('/')?;
    let whole = !kind.is_empty() && !name.is_empty() && !name.contains('/');
    whole.then(|| (kind, ObjectName::new(namespace, name)))
}

/// A text that is no name of an object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no {1}: expected {2} of lower-case letters, digits and '-', beginning and ending \
     with a letter or digit"
)]
pub struct NameError(String, &'static str, &'static str);

/// Checks a namespace: an RFC 1123 label.
///
/// # Errors
/// What else it is.
pub fn check_namespace(text: &str) -> Result<(), NameError> {
    if is_label(text) {
        return Ok(());
    }
    Err(NameError(text.to_owned(), "namespace", "1 to 63 characters"))
}

/// Checks the name of an object: an RFC 1123 subdomain, so that no name can be `.`, `..` or hold
/// a `/`.
///
/// # Errors
/// What else it is.
pub fn check_name(text: &str) -> Result<(), NameError> {
    if text.len() <= SUBDOMAIN_LENGTH_MAX && text.split('.').all(is_label) {
        return Ok(());
    }
    Err(NameError(text.to_owned(), "name", "labels, joined by '.', at most 253 characters,"))
}

fn is_label(text: &str) -> bool {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let bytes = text.as_bytes();
    matches!(bytes.len(), 1..=LABEL_LENGTH_MAX)
        && bytes.iter().copied().all(inner)
        && bytes.first() != Some(&b'-')
        && bytes.last() != Some(&b'-')
}

const LABEL_LENGTH_MAX: usize = 63;
const SUBDOMAIN_LENGTH_MAX: usize = 253;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_a_resource_names_it_and_no_other_key_does() {
        for name in [ObjectName::new("demo", "web"), ObjectName::new("", "demo")] {
            assert_eq!(parse_resource_key(&resource_key("Pod", &name)), Some(("Pod", name)));
        }
        for other in [
            "trust/domain",
            "resources/Pod",
            "resources/Pod/demo",
            "resources/Pod/demo/",
            "resources/Pod/demo/a/b",
            "resources//demo/web",
            "resources/",
        ] {
            assert_eq!(parse_resource_key(other), None, "{other}");
        }
    }

    #[test]
    fn a_name_can_never_leave_its_directory() {
        for bad in ["", ".", "..", "a/b", "../a", "a..b", "-a", "a-", "A", "a_b", "a\0", "ä"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
            assert!(check_namespace(bad).is_err(), "{bad:?}");
        }
        assert!(check_name(&"a".repeat(64)).is_err());
        assert!(check_name(&["a"; 128].join(".")).is_err());
        for good in ["a", "web-1", "0", "web-7d9f.v2"] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
        assert!(check_namespace("a.b").is_err());
    }
}
