//! The annotations that say how a workload is meshed: read from the pod, inherited from its
//! namespace, each value checked. A value that cannot be used is said, never passed over in silence.

use std::collections::BTreeMap;

use steadfast_process::duration;

use crate::index::PortSet;

/// Annotations by their names.
pub(super) type Annotations = BTreeMap<String, String>;

/// Whether a pod is to be meshed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inject {
    /// It is not, and somebody has said so.
    Disabled,
    /// It is.
    Enabled,
    /// Nobody has said anything.
    Unsaid,
}

/// What is said about one pod.
#[derive(Clone, Debug)]
pub(super) struct Said {
    pub(super) inject: Inject,
    /// The settings whose values can be used, by their names without the prefix.
    values: BTreeMap<&'static str, String>,
}

impl Said {
    /// Reads both; `named` says which port a name stands for. What is wrong goes to `warnings`.
    pub(super) fn read(
        pod: &Annotations,
        namespace: &Annotations,
        named: impl Fn(&str) -> Option<u16> + Copy,
        warnings: &mut Vec<String>,
    ) -> Self {
        let inject = match inject(pod, "pod", warnings) {
            Inject::Unsaid => inject(namespace, "namespace", warnings),
            said => said,
        };
        let mut values = BTreeMap::new();
        // What the pod says overrules what it inherits.
        for (annotations, whose) in [(namespace, "namespace"), (pod, "pod")] {
            for (name, value) in annotations {
                let Some(setting) = name.strip_prefix(PREFIX) else { continue };
                let wrong = |why: &str| format!("{name} of the {whose}: {why}");
                match KNOWN.iter().find(|(known, ..)| *known == setting) {
                    None => warnings.push(wrong("there is no such annotation; it is ignored")),
                    Some((known, kind, effect)) => match kind.check(value, named) {
                        Ok(value) => {
                            if *effect == Effect::None {
                                warnings.push(wrong("it has no effect in this version"));
                            }
                            values.insert(*known, value);
                        }
                        Err(expected) => warnings.push(wrong(&format!(
                            "{value:?} cannot be used, and is ignored: expected {expected}"
                        ))),
                    },
                }
            }
        }
        Self { inject, values }
    }

    /// The value of a setting, as it was checked.
    pub(super) fn text(&self, setting: &str) -> Option<&str> {
        self.values.get(setting).map(String::as_str)
    }

    /// The value of a setting that is a number.
    pub(super) fn number<T: std::str::FromStr>(&self, setting: &str) -> Option<T> {
        self.text(setting)?.parse().ok()
    }

    /// Whether a setting says yes.
    pub(super) fn is(&self, setting: &str) -> Option<bool> {
        self.text(setting).map(|value| matches!(value, "true" | "enabled"))
    }

    /// The settings that the proxy reads as they are: its variables and their values.
    pub(super) fn variables(&self) -> impl Iterator<Item = (&'static str, &str)> {
        KNOWN.iter().filter_map(|(name, _, effect)| match effect {
            Effect::Variable(variable) => Some((*variable, self.text(name)?)),
            Effect::Pod | Effect::None => None,
        })
    }
}

fn inject(annotations: &Annotations, whose: &str, warnings: &mut Vec<String>) -> Inject {
    let Some(value) = annotations.get(INJECT) else { return Inject::Unsaid };
    match &**value {
        "enabled" => Inject::Enabled,
        "disabled" => Inject::Disabled,
        "ingress" => {
            warnings.push(format!(
                "{INJECT}: ingress of the {whose}: this version takes it for enabled"
            ));
            Inject::Enabled
        }
        "true" | "yes" | "on" => {
            warnings.push(format!(
                "{INJECT} of the {whose}: {value:?} is taken for \"enabled\": write that"
            ));
            Inject::Enabled
        }
        _ => {
            warnings.push(format!(
                "{INJECT} of the {whose}: {value:?} says nothing: expected \"enabled\", \
                 \"disabled\" or \"ingress\""
            ));
            Inject::Unsaid
        }
    }
}

/// What a value must be.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Bool,
    Duration,
    OneOf(&'static [&'static str]),
    Port,
    Ports,
    Quantity,
    Subnets,
    Text,
    Uid,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// Nothing yet.
    None,
    /// The pod is made so.
    Pod,
    /// The proxy reads it.
    Variable(&'static str),
}

impl Kind {
    /// The value as it is used, or what was expected.
    fn check(
        self,
        value: &str,
        named: impl Fn(&str) -> Option<u16> + Copy,
    ) -> Result<String, String> {
        let value = value.trim();
        let whole = || value.to_owned();
        match self {
            Self::Bool => {
                Self::OneOf(&["true", "false", "enabled", "disabled"]).check(value, named)
            }
            Self::Duration => match duration::parse(value) {
                Ok(_) => Ok(whole()),
                Err(_) => Err("a time with its unit, such as 10s".to_owned()),
            },
            Self::OneOf(known) if known.contains(&value) => Ok(whole()),
            Self::OneOf(known) => Err(format!("one of {}", known.join(", "))),
            Self::Port => match value.parse::<u16>() {
                Ok(1..) => Ok(whole()),
                _ => Err("a port from 1 to 65535".to_owned()),
            },
            Self::Ports => match PortSet::parse(value, named) {
                (ports, bad) if bad.is_empty() => Ok(ports.to_string()),
                (_, bad) => Err(format!("ports and ranges, such as 25,8000-8100; {}", bad[0])),
            },
            Self::Quantity if is_quantity(value) => Ok(whole()),
            Self::Quantity => Err("a quantity, such as 100m or 128Mi".to_owned()),
            Self::Subnets if value.split(',').map(str::trim).all(is_subnet) => Ok(whole()),
            Self::Subnets => Err("subnets, such as 10.0.0.0/8,192.168.0.0/16".to_owned()),
            Self::Text if !value.is_empty() => Ok(whole()),
            Self::Text => Err("a text".to_owned()),
            Self::Uid => match value.parse::<u32>() {
                Ok(1..) => Ok(whole()),
                _ => Err("a number from 1 on: the proxy never runs as root".to_owned()),
            },
        }
    }
}

/// Kubernetes' quantities: a number, and a suffix of its binary or decimal units.
fn is_quantity(text: &str) -> bool {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let units =
        ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    !number.is_empty() && number.parse::<f64>().is_ok() && units.contains(&unit)
}

fn is_subnet(text: &str) -> bool {
    let Some((ip, bits)) = text.split_once('/') else { return false };
    let most = match ip.parse() {
        Ok(std::net::IpAddr::V4(_)) => 32,
        Ok(std::net::IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    bits.parse::<u8>().is_ok_and(|bits| bits <= most)
}

/// Linkerd's.
pub(super) const INJECT: &str = "linkerd.io/inject";
const PREFIX: &str = "config.linkerd.io/";
const POLICIES: &[&str] = &[
    "all-unauthenticated",
    "all-authenticated",
    "cluster-unauthenticated",
    "cluster-authenticated",
    "deny",
    "audit",
];

/// Linkerd's annotations, each with what its value must be and what becomes of it.
const KNOWN: [(&str, Kind, Effect); 50] = [
    ("access-log", Kind::OneOf(&["apache", "json"]), Effect::None),
    ("admin-port", Kind::Port, Effect::Pod),
    ("close-wait-timeout", Kind::Duration, Effect::None),
    ("control-port", Kind::Port, Effect::None),
    ("debug-image", Kind::Text, Effect::None),
    ("debug-image-pull-policy", Kind::Text, Effect::None),
    ("debug-image-version", Kind::Text, Effect::None),
    (
        "default-inbound-policy",
        Kind::OneOf(POLICIES),
        Effect::Variable("LINKERD2_PROXY_INBOUND_DEFAULT_POLICY"),
    ),
    ("enable-debug-sidecar", Kind::Bool, Effect::None),
    ("enable-external-profiles", Kind::Bool, Effect::None),
    ("enable-gateway", Kind::Bool, Effect::None),
    ("init-image", Kind::Text, Effect::Pod),
    ("init-image-version", Kind::Text, Effect::Pod),
    ("image-pull-policy", Kind::OneOf(&["Always", "IfNotPresent", "Never"]), Effect::Pod),
    ("inbound-port", Kind::Port, Effect::Pod),
    (
        "opaque-ports",
        Kind::Ports,
        Effect::Variable("LINKERD2_PROXY_INBOUND_PORTS_DISABLE_PROTOCOL_DETECTION"),
    ),
    ("outbound-port", Kind::Port, Effect::Pod),
    ("pod-inbound-ports", Kind::Ports, Effect::Pod),
    ("proxy-additional-env", Kind::Text, Effect::None),
    ("proxy-admin-shutdown", Kind::Bool, Effect::None),
    ("proxy-await", Kind::Bool, Effect::Pod),
    ("proxy-cpu-limit", Kind::Quantity, Effect::Pod),
    ("proxy-cpu-ratio-limit", Kind::Quantity, Effect::None),
    ("proxy-cpu-request", Kind::Quantity, Effect::Pod),
    ("proxy-disable-inbound-protocol-detect-timeout", Kind::Bool, Effect::None),
    ("proxy-disable-outbound-protocol-detect-timeout", Kind::Bool, Effect::None),
    ("proxy-enable-native-sidecar", Kind::Bool, Effect::Pod),
    ("proxy-ephemeral-storage-limit", Kind::Quantity, Effect::Pod),
    ("proxy-ephemeral-storage-request", Kind::Quantity, Effect::Pod),
    ("proxy-gid", Kind::Uid, Effect::Pod),
    ("proxy-image", Kind::Text, Effect::Pod),
    ("proxy-inbound-connect-timeout", Kind::Duration, Effect::None),
    ("proxy-inbound-discovery-cache-unused-timeout", Kind::Duration, Effect::None),
    (
        "proxy-log-format",
        Kind::OneOf(&["plain", "json"]),
        Effect::Variable("LINKERD2_PROXY_LOG_FORMAT"),
    ),
    ("proxy-log-http-headers", Kind::Text, Effect::None),
    ("proxy-log-level", Kind::Text, Effect::Variable("LINKERD2_PROXY_LOG")),
    ("proxy-memory-limit", Kind::Quantity, Effect::Pod),
    ("proxy-memory-request", Kind::Quantity, Effect::Pod),
    ("proxy-metrics-hostname-labels", Kind::Bool, Effect::None),
    ("proxy-outbound-connect-timeout", Kind::Duration, Effect::None),
    ("proxy-outbound-discovery-cache-unused-timeout", Kind::Duration, Effect::None),
    ("proxy-require-identity-inbound-ports", Kind::Ports, Effect::None),
    ("proxy-uid", Kind::Uid, Effect::Pod),
    ("proxy-version", Kind::Text, Effect::Pod),
    ("retry-policy", Kind::Text, Effect::None),
    ("retry-timeout", Kind::Duration, Effect::None),
    (
        "shutdown-grace-period",
        Kind::Duration,
        Effect::Variable("LINKERD2_PROXY_SHUTDOWN_GRACE_PERIOD"),
    ),
    ("skip-inbound-ports", Kind::Ports, Effect::Pod),
    ("skip-outbound-ports", Kind::Ports, Effect::Pod),
    ("skip-subnets", Kind::Subnets, Effect::Pod),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pod: &[(&str, &str)], namespace: &[(&str, &str)]) -> (Said, Vec<String>) {
        let map = |all: &[(&str, &str)]| {
            all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let mut warnings = Vec::new();
        let named = |name: &str| (name == "db").then_some(5432);
        let said = Said::read(&map(pod), &map(namespace), named, &mut warnings);
        (said, warnings)
    }

    #[test]
    fn the_pod_overrules_its_namespace_and_what_was_plainly_meant_is_taken_and_said() {
        for (pod, namespace, expected, warned) in [
            (None, None, Inject::Unsaid, false),
            (None, Some("enabled"), Inject::Enabled, false),
            (Some("disabled"), Some("enabled"), Inject::Disabled, false),
            (Some("enabled"), Some("disabled"), Inject::Enabled, false),
            (Some("true"), None, Inject::Enabled, true),
            (None, Some("yes"), Inject::Enabled, true),
            (Some("maybe"), Some("enabled"), Inject::Enabled, true),
            (Some(""), None, Inject::Unsaid, true),
        ] {
            let one = |value: Option<&'static str>| value.map(|value| (INJECT, value));
            let (said, warnings) = read(
                &one(pod).into_iter().collect::<Vec<_>>(),
                &one(namespace).into_iter().collect::<Vec<_>>(),
            );
            assert_eq!(said.inject, expected, "{pod:?} in {namespace:?}");
            assert_eq!(!warnings.is_empty(), warned, "{warnings:?}");
        }
    }

    #[test]
    fn a_value_that_cannot_be_used_is_named_with_what_was_expected() {
        for (name, good, bad) in [
            ("proxy-cpu-limit", "100m", "100 m"),
            ("proxy-memory-limit", "128Mi", "128MB"),
            ("skip-inbound-ports", "25,8000-8100,db", "http"),
            ("inbound-port", "4143", "0"),
            ("proxy-uid", "2102", "0"),
            ("shutdown-grace-period", "10s", "10"),
            ("default-inbound-policy", "deny", "denied"),
            ("skip-subnets", "10.0.0.0/8, fd00::/8", "10.0.0.0/33"),
            ("proxy-enable-native-sidecar", "false", "no"),
        ] {
            let annotation = format!("{PREFIX}{name}");
            let (said, warnings) = read(&[(&annotation, good)], &[]);
            assert!(said.text(name).is_some() && warnings.is_empty(), "{name}: {warnings:?}");
            let (said, warnings) = read(&[(&annotation, bad)], &[]);
            assert_eq!(said.text(name), None);
            assert!(warnings[0].contains(&annotation), "{warnings:?}");
            assert!(warnings[0].contains(bad) && warnings[0].contains("expected"), "{warnings:?}");
        }
        let (_, warnings) = read(&[("config.linkerd.io/skip-inbound-port", "1")], &[]);
        assert!(warnings[0].contains("no such annotation"), "{warnings:?}");
        let (_, warnings) = read(&[], &[("config.linkerd.io/access-log", "json")]);
        assert!(warnings[0].contains("no effect"), "{warnings:?}");
    }

    #[test]
    fn no_annotation_is_known_twice() {
        let mut names: Vec<_> = KNOWN.iter().map(|(name, ..)| name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), KNOWN.len());
    }
}
