//! Linkerd's default policies: what holds for a port that no policy resource selects.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A default policy, by Linkerd's name (`config.linkerd.io/default-inbound-policy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DefaultPolicy {
    /// Whoever has proved an ID.
    AllAuthenticated,
    /// Everyone.
    #[default]
    AllUnauthenticated,
    /// Everyone, each noted as one who would be refused.
    Audit,
    /// Whoever has proved an ID and comes from the cluster's networks.
    ClusterAuthenticated,
    /// Whoever comes from the cluster's networks.
    ClusterUnauthenticated,
    /// Nobody.
    Deny,
}

/// A text that names no default policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is no inbound policy (did you mean {nearest:?}?); the policies are {}",
    NAMES.join(", ")
)]
pub struct UnknownPolicy {
    value: String,
    nearest: DefaultPolicy,
}

impl DefaultPolicy {
    /// Every one of them.
    pub const ALL: [Self; 6] = [
        Self::AllAuthenticated,
        Self::AllUnauthenticated,
        Self::Audit,
        Self::ClusterAuthenticated,
        Self::ClusterUnauthenticated,
        Self::Deny,
    ];

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        NAMES[self as usize]
    }
}

impl fmt::Display for DefaultPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DefaultPolicy {
    type Err = UnknownPolicy;
    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.as_str() == text)
            .ok_or_else(|| UnknownPolicy::new(text))
    }
}

impl UnknownPolicy {
    fn new(text: &str) -> Self {
        let value: String = text.chars().take(VALUE_CHARS_SHOWN).collect();
        let nearest = DefaultPolicy::ALL
            .into_iter()
            .min_by_key(|policy| distance(&value, policy.as_str()))
            .unwrap_or_default();
        Self { value, nearest }
    }

    /// What was probably meant.
    pub fn nearest(&self) -> DefaultPolicy {
        self.nearest
    }
}

impl Serialize for DefaultPolicy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for DefaultPolicy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Levenshtein's: how many characters have to be changed, added or removed.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (done, a) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = done + 1;
        for (at, &b) in other.iter().enumerate() {
            let changed = diagonal + usize::from(!a.eq_ignore_ascii_case(&b));
            diagonal = row[at + 1];
            row[at + 1] = changed.min(row[at] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

/// In the order of the enum.
const NAMES: [&str; 6] = [
    "all-authenticated",
    "all-unauthenticated",
    "audit",
    "cluster-authenticated",
    "cluster-unauthenticated",
    "deny",
];
const VALUE_CHARS_SHOWN: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_read_back() {
        for policy in DefaultPolicy::ALL {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        assert_eq!(DefaultPolicy::default().as_str(), "all-unauthenticated");
    }

    #[test]
    fn a_wrong_name_is_answered_with_the_nearest_and_all_right_ones() {
        for (wrong, nearest) in [
            ("All-Authenticated", DefaultPolicy::AllAuthenticated),
            ("all-authenticate", DefaultPolicy::AllAuthenticated),
            ("all_unauthenticated", DefaultPolicy::AllUnauthenticated),
            ("cluster-unauthenticated ", DefaultPolicy::ClusterUnauthenticated),
            ("cluster-auth", DefaultPolicy::ClusterAuthenticated),
            ("denied", DefaultPolicy::Deny),
            ("audited", DefaultPolicy::Audit),
        ] {
            let error = wrong.parse::<DefaultPolicy>().unwrap_err();
            assert_eq!(error.nearest(), nearest, "{wrong}");
            for name in NAMES {
                assert!(error.to_string().contains(name), "{error}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_policy_or_a_short_error(text in ".*") {
            if let Err(error) = text.parse::<DefaultPolicy>() {
                prop_assert!(error.to_string().len() < 2000);
            }
        }
    }
}
