//! What a client asks for: the path of a lookup and the namespace it comes from.
//!
//! Paths come from peers; anything may be in them. What is no name of a service is told apart from
//! a service that does not exist: the first never will.

use std::net::{IpAddr, SocketAddr};

use crate::index::Name;

/// What a lookup names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// An address.
    Address(SocketAddr),
    /// A port of a service, or of one pod of a headless one.
    Service { name: Name, hostname: Option<Box<str>>, port: u16 },
}

/// Why a path names nothing that could exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TargetError {
    #[error(
        "{0:?} needs the namespace of the client: send a context token like {{\"ns\":\"demo\"}}"
    )]
    Bare(String),
    #[error(
        "{0:?} is no name of a service: expected <service>.<namespace>.svc.{1}, or the short forms <service>.<namespace>.svc, <service>.<namespace> and <service>"
    )]
    Name(String, String),
    #[error("{0:?} has no port from 1 to 65535")]
    Port(String),
    #[error("the path is {0} bytes long; at most {PATH_BYTES_MAX} are read")]
    TooLong(usize),
}

impl Target {
    /// Parses `host`, `host:port`, `ip` or `ip:port`; without a port it is 80, as Linkerd's.
    pub(crate) fn parse(
        path: &str,
        context_token: &str,
        cluster_domain: &str,
    ) -> Result<Self, TargetError> {
        if path.len() > PATH_BYTES_MAX {
            return Err(TargetError::TooLong(path.len()));
        }
        if let Some(addr) = parse_address(path) {
            return match addr.port() {
                0 => Err(TargetError::Port(path.to_owned())),
                _ => Ok(Self::Address(addr)),
            };
        }
        let (host, port) = match path.rsplit_once(':') {
            Some((host, port)) => {
                let digits = port.bytes().all(|c| c.is_ascii_digit());
                let number = port.parse().ok().filter(|&number| digits && number != 0);
                (host, number.ok_or_else(|| TargetError::Port(path.to_owned()))?)
            }
            None => (path, PORT_DEFAULT),
        };
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        let no_name = || TargetError::Name(host.clone(), cluster_domain.to_owned());
        let labels: Vec<&str> = host.split('.').collect();
        if !labels.iter().all(|label| is_label(label)) {
            return Err(no_name());
        }
        let namespace = context_namespace(context_token);
        let (name, hostname) = match strip_svc(&labels, cluster_domain) {
            Some([service, namespace]) => (Name::new(namespace, service), None),
            Some([hostname, service, namespace]) => {
                (Name::new(namespace, service), Some((*hostname).into()))
            }
            Some(_) => return Err(no_name()),
            None => match labels.as_slice() {
                [service, namespace] => (Name::new(namespace, service), None),
                [service] => match &namespace {
                    Some(namespace) => (Name::new(namespace, service), None),
                    None => return Err(TargetError::Bare(host)),
                },
                _ => return Err(no_name()),
            },
        };
        Ok(Self::Service { name, hostname, port })
    }
}

/// What stands before `svc`, or before `svc.<cluster domain>`.
fn strip_svc<'a, 'b>(labels: &'b [&'a str], cluster_domain: &str) -> Option<&'b [&'a str]> {
    let before_domain = labels.len().saturating_sub(cluster_domain.split('.').count());
    let (rest, domain) = labels.split_at(before_domain);
    let qualified = domain.iter().copied().eq(cluster_domain.split('.'));
    match if qualified { rest } else { labels } {
        // `web.svc` is the service `web` of a namespace that is called so; it is not stripped.
        [before @ .., "svc"] if before.len() >= 2 => Some(before),
        _ => None,
    }
}

/// The namespace in a context token: `{"ns":"demo", …}`, or the older `ns:demo`. A token of
/// another form says nothing: it is opaque to the proxy that sends it.
fn context_namespace(token: &str) -> Option<String> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let namespace = match token.strip_prefix("ns:") {
        Some(namespace) => namespace.to_owned(),
        None => {
            let value: serde_json::Value = serde_json::from_str(token).ok()?;
            value.get("ns")?.as_str()?.to_owned()
        }
    };
    is_label(&namespace).then_some(namespace)
}

fn parse_address(path: &str) -> Option<SocketAddr> {
    let bare = path.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(path);
    let ip = bare.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, PORT_DEFAULT));
    let addr = ip.or_else(|| path.parse().ok())?;
    // A dual-stack socket shows IPv4 so.
    Some(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
}

fn is_label(label: &str) -> bool {
    (1..=LABEL_BYTES_MAX).contains(&label.len())
        && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
}

const PORT_DEFAULT: u16 = 80;
/// A DNS name and a port.
const PATH_BYTES_MAX: usize = 300;
const TOKEN_BYTES_MAX: usize = 4096;
const LABEL_BYTES_MAX: usize = 63;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(path: &str) -> Result<Target, TargetError> {
        Target::parse(path, r#"{"ns":"here","nodeName":"n","pod":"p"}"#, "cluster.local")
    }

    fn service(namespace: &str, name: &str, hostname: Option<&str>, port: u16) -> Target {
        let hostname = hostname.map(Into::into);
        Target::Service { name: Name::new(namespace, name), hostname, port }
    }

    #[test]
    fn every_form_of_a_service_name_is_read() {
        for (path, target) in [
            ("web.demo.svc.cluster.local:8080", service("demo", "web", None, 8080)),
            ("web.demo.svc.cluster.local.:8080", service("demo", "web", None, 8080)),
            ("WEB.demo.SVC.Cluster.Local", service("demo", "web", None, 80)),
            ("web.demo.svc:1", service("demo", "web", None, 1)),
            ("web.demo:65535", service("demo", "web", None, 65535)),
            ("web:80", service("here", "web", None, 80)),
            ("db-0.db.demo.svc.cluster.local:5432", service("demo", "db", Some("db-0"), 5432)),
            ("db-0.db.demo.svc:5432", service("demo", "db", Some("db-0"), 5432)),
            ("web.svc:80", service("svc", "web", None, 80)),
            ("10.0.0.1:80", Target::Address("10.0.0.1:80".parse().unwrap())),
            ("[::1]:80", Target::Address("[::1]:80".parse().unwrap())),
            ("[::ffff:10.0.0.1]:80", Target::Address("10.0.0.1:80".parse().unwrap())),
            ("10.0.0.1", Target::Address("10.0.0.1:80".parse().unwrap())),
        ] {
            assert_eq!(parse(path), Ok(target), "{path:?}");
        }
    }

    #[test]
    fn what_names_no_service_is_refused() {
        let long = format!("{}.demo:80", "a".repeat(64));
        let longer = "a.".repeat(200);
        for path in [
            "",
            ":80",
            "web.demo:0",
            "web.demo:65536",
            "web.demo:+80",
            "web.demo:",
            "web..svc.cluster.local:80",
            "www.example.com:443",
            "a.b.c.demo.svc.cluster.local:80",
            "web.demo.svc.other.domain:80",
            "we b:80",
            "10.0.0.1:0",
            &long,
            &longer,
        ] {
            assert!(parse(path).is_err(), "{path:?}");
        }
    }

    #[test]
    fn a_bare_name_is_in_the_namespace_of_the_client() {
        let bare = |token| Target::parse("web:80", token, "cluster.local");
        assert_eq!(bare("ns:demo"), Ok(service("demo", "web", None, 80)));
        assert_eq!(bare(r#"{"ns":"demo"}"#), Ok(service("demo", "web", None, 80)));
        for token in ["", "demo", "{", r#"{"ns":1}"#, r#"{"ns":""}"#, "ns:", "ns:a/b"] {
            assert_eq!(bare(token), Err(TargetError::Bare("web".to_owned())), "{token:?}");
        }
    }

    proptest! {
        #[test]
        fn no_path_and_no_token_panics(path in ".{0,400}", token in ".{0,100}") {
            let _ = Target::parse(&path, &token, "cluster.local");
        }
    }
}
