//! SPIFFE IDs, trust domains and Linkerd's DNS identities, parsed strictly and once.
//!
//! The rules are those of the SPIFFE-ID standard, §2
//! (<https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md>): a value of one of these
//! types has no other constructor, so whoever holds one need not check it again.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The name of a trust domain: 1 to 255 bytes of `a-z 0-9 . - _`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Box<str>);

/// An ID in a trust domain: `spiffe://<trust domain>/<segment>/…`, at most 2048 bytes.
///
/// An ID without a path names the trust domain itself; [`SpiffeId::path`] is then empty.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    /// The whole URI.
    uri: Box<str>,
    /// Where the path begins in `uri`.
    path_at: u16,
}

/// A workload by Linkerd's DNS name:
/// `<service account>.<namespace>.serviceaccount.identity.<control plane namespace>.<trust domain>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DnsIdentity {
    service_account: Box<str>,
    namespace: Box<str>,
    control_namespace: Box<str>,
    trust_domain: TrustDomain,
}

/// Why a text is no SPIFFE ID, trust domain or DNS identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {value:?}: {reason}")]
pub struct SpiffeError {
    kind: &'static str,
    value: String,
    reason: Reason,
}

/// The rule that a refused text broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// A character outside the allowed set.
    #[error("has the character {0:?}; allowed are {1}")]
    Character(char, &'static str),
    /// A path segment of one or two dots.
    #[error("has a path segment \".\" or \"..\"")]
    DotSegment,
    /// Nothing at all.
    #[error("is empty")]
    Empty,
    /// Two slashes in a row, or one at the end.
    #[error("has an empty path segment (a double or trailing \"/\")")]
    EmptySegment,
    /// Not of the form a DNS identity has.
    #[error(
        "is not <service account>.<namespace>.serviceaccount.identity.<control plane namespace>.<trust domain>"
    )]
    Form,
    /// The words that divide a DNS identity, within its service account and namespace.
    #[error(
        "has \"serviceaccount.identity\" in its service account, so that it would be read as another"
    )]
    Infix,
    /// A name that is no DNS label or DNS subdomain.
    #[error(
        "has a part that is no DNS name (lower-case letters, digits and \"-\" between them, 63 bytes a label)"
    )]
    Label,
    /// Nothing where the trust domain should be.
    #[error("has no trust domain")]
    NoTrustDomain,
    /// Not `spiffe://`.
    #[error("does not begin with \"spiffe://\"")]
    Scheme,
    /// Longer than the standard allows.
    #[error("is {0} bytes long; at most {1} are allowed")]
    TooLong(usize, usize),
}

impl SpiffeError {
    /// The rule that was broken.
    pub fn reason(&self) -> Reason {
        self.reason
    }
}

impl TrustDomain {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The ID of the trust domain itself: `spiffe://<name>`.
    pub fn id(&self) -> SpiffeId {
        let uri = format!("{SCHEME}{}", self.0);
        SpiffeId { path_at: uri.len() as u16, uri: uri.into() }
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;
    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        check_trust_domain(text)
            .map_err(|reason| SpiffeError::new("trust domain", text, reason))?;
        Ok(Self(text.into()))
    }
}

impl SpiffeId {
    /// The ID of a service account: `spiffe://<td>/ns/<namespace>/sa/<service account>`.
    ///
    /// # Errors
    /// A namespace that is no DNS label, or a service account that is no DNS subdomain.
    pub fn for_service_account(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeError> {
        let uri = format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}");
        check_workload(namespace, service_account)
            .map_err(|reason| SpiffeError::new("SPIFFE ID", &uri, reason))?;
        uri.parse()
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The name of its trust domain.
    pub fn trust_domain_name(&self) -> &str {
        &self.uri[SCHEME.len()..self.path_at as usize]
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.trust_domain_name().into())
    }

    /// The path with its leading slash; empty for the trust domain itself.
    pub fn path(&self) -> &str {
        &self.uri[self.path_at as usize..]
    }

    /// Whether it is in this trust domain.
    pub fn is_member_of(&self, trust_domain: &TrustDomain) -> bool {
        self.trust_domain_name() == trust_domain.as_str()
    }

    /// Namespace and service account, if the path has the form `/ns/<namespace>/sa/<name>`.
    pub fn service_account(&self) -> Option<(&str, &str)> {
        let (namespace, rest) = self.path().strip_prefix("/ns/")?.split_once('/')?;
        let name = rest.strip_prefix("sa/")?;
        (!name.contains('/')).then_some((namespace, name))
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;
    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let path_at =
            check_id(text).map_err(|reason| SpiffeError::new("SPIFFE ID", text, reason))?;
        Ok(Self { uri: text.into(), path_at: path_at as u16 })
    }
}

impl DnsIdentity {
    /// The name of a service account in a mesh whose control plane lives in `control_namespace`.
    ///
    /// # Errors
    /// A part that is no DNS name, or a whole of more than 253 bytes.
    pub fn new(
        service_account: &str,
        namespace: &str,
        control_namespace: &str,
        trust_domain: &TrustDomain,
    ) -> Result<Self, SpiffeError> {
        let identity = Self {
            service_account: service_account.into(),
            namespace: namespace.into(),
            control_namespace: control_namespace.into(),
            trust_domain: trust_domain.clone(),
        };
        identity
            .check()
            .map_err(|reason| SpiffeError::new("DNS identity", &identity.to_string(), reason))?;
        Ok(identity)
    }

    /// The workload's namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The workload's service account.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }

    /// The namespace of the control plane.
    pub fn control_namespace(&self) -> &str {
        &self.control_namespace
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The same workload as a SPIFFE ID.
    pub fn spiffe_id(&self) -> SpiffeId {
        let uri = format!(
            "{SCHEME}{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        );
        // Every part was checked when this value was made, and the whole is at most 253 bytes.
        SpiffeId { path_at: (SCHEME.len() + self.trust_domain.0.len()) as u16, uri: uri.into() }
    }

    fn check(&self) -> Result<(), Reason> {
        check_workload(&self.namespace, &self.service_account)?;
        let whole = self.to_string();
        if whole.len() > DNS_NAME_BYTES_MAX {
            return Err(Reason::TooLong(whole.len(), DNS_NAME_BYTES_MAX));
        }
        check_label(&self.control_namespace)?;
        // The first such words divide a text when it is parsed: they must be ours.
        if whole.find(DNS_INFIX) != Some(self.service_account.len() + 1 + self.namespace.len()) {
            return Err(Reason::Infix);
        }
        self.trust_domain.0.split('.').try_for_each(check_label)
    }
}

impl FromStr for DnsIdentity {
    type Err = SpiffeError;
    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let error = |reason| SpiffeError::new("DNS identity", text, reason);
        let (workload, mesh) = text.split_once(DNS_INFIX).ok_or_else(|| error(Reason::Form))?;
        // A service account may hold dots, a namespace may not: the last dot divides them.
        let (service_account, namespace) =
            workload.rsplit_once('.').ok_or_else(|| error(Reason::Form))?;
        let (control_namespace, trust_domain) =
            mesh.split_once('.').ok_or_else(|| error(Reason::Form))?;
        let trust_domain = trust_domain.parse::<TrustDomain>().map_err(|e| error(e.reason))?;
        Self::new(service_account, namespace, control_namespace, &trust_domain)
    }
}

impl fmt::Display for DnsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service_account, namespace, control_namespace, trust_domain } = self;
        write!(f, "{service_account}.{namespace}{DNS_INFIX}{control_namespace}.{trust_domain}")
    }
}

impl SpiffeError {
    fn new(kind: &'static str, value: &str, reason: Reason) -> Self {
        // A refused text may come from a peer and be of any length: an error shows its beginning.
        let value = match value.char_indices().nth(VALUE_CHARS_SHOWN) {
            Some((at, _)) => format!("{}…", &value[..at]),
            None => value.to_owned(),
        };
        Self { kind, value, reason }
    }
}

/// Checks a whole ID and returns where its path begins.
fn check_id(text: &str) -> Result<usize, Reason> {
    if text.is_empty() {
        return Err(Reason::Empty);
    }
    if text.len() > ID_BYTES_MAX {
        return Err(Reason::TooLong(text.len(), ID_BYTES_MAX));
    }
    let rest = text.strip_prefix(SCHEME).ok_or(Reason::Scheme)?;
    let name = rest.split('/').next().unwrap_or(rest);
    if name.is_empty() {
        return Err(Reason::NoTrustDomain);
    }
    check_trust_domain(name)?;
    let path_at = SCHEME.len() + name.len();
    // Each segment of "/a/b" is preceded by its slash; nothing at all is the trust domain's own ID.
    for segment in text[path_at..].split('/').skip(1) {
        check_segment(segment)?;
    }
    Ok(path_at)
}

fn check_trust_domain(name: &str) -> Result<(), Reason> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._".contains(c);
    if name.is_empty() {
        return Err(Reason::Empty);
    }
    if name.len() > TRUST_DOMAIN_BYTES_MAX {
        return Err(Reason::TooLong(name.len(), TRUST_DOMAIN_BYTES_MAX));
    }
    match name.chars().find(|&c| !allowed(c)) {
        Some(c) => Err(Reason::Character(c, "a-z, 0-9, \".\", \"-\" and \"_\"")),
        None => Ok(()),
    }
}

fn check_segment(segment: &str) -> Result<(), Reason> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    match segment {
        "" => Err(Reason::EmptySegment),
        "." | ".." => Err(Reason::DotSegment),
        _ => match segment.chars().find(|&c| !allowed(c)) {
            Some(c) => Err(Reason::Character(c, "a-z, A-Z, 0-9, \".\", \"-\" and \"_\"")),
            None => Ok(()),
        },
    }
}

/// A namespace is a DNS label, a service account a DNS subdomain (Kubernetes' own rules).
fn check_workload(namespace: &str, service_account: &str) -> Result<(), Reason> {
    if service_account.len() > DNS_NAME_BYTES_MAX {
        return Err(Reason::TooLong(service_account.len(), DNS_NAME_BYTES_MAX));
    }
    check_label(namespace)?;
    service_account.split('.').try_for_each(check_label)
}

/// RFC 1123, §2.1, in lower case as Kubernetes wants it.
fn check_label(label: &str) -> Result<(), Reason> {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let bytes = label.as_bytes();
    let valid = (1..=DNS_LABEL_BYTES_MAX).contains(&bytes.len())
        && bytes.iter().all(|&c| inner(c))
        && bytes.first() != Some(&b'-')
        && bytes.last() != Some(&b'-');
    if valid { Ok(()) } else { Err(Reason::Label) }
}

macro_rules! text_type {
    ($type:ty) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.as_str())
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
text_type!(TrustDomain);
text_type!(SpiffeId);

const SCHEME: &str = "spiffe://";
const DNS_INFIX: &str = ".serviceaccount.identity.";
/// SPIFFE-ID, §2.3: implementations must support up to 2048 bytes and must not make longer ones.
const ID_BYTES_MAX: usize = 2048;
/// SPIFFE-ID, §2.1.
const TRUST_DOMAIN_BYTES_MAX: usize = 255;
const DNS_NAME_BYTES_MAX: usize = 253;
const DNS_LABEL_BYTES_MAX: usize = 63;
const VALUE_CHARS_SHOWN: usize = 120;
