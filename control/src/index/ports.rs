//! Sets of ports as annotations write them: `25,587,8000-8100`, and names of declared ports.

use std::fmt;

/// Ports as sorted, disjoint ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortSet(Vec<(u16, u16)>);

/// A part of a port list that is neither a port, a range nor the name of a declared port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadPort(String);

impl fmt::Display for BadPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no port, range of ports or name of a declared port", self.0)
    }
}

impl PortSet {
    /// Parses a list; `named` says which port a name stands for. Parts that are no ports are left
    /// out and returned.
    pub fn parse(text: &str, named: impl Fn(&str) -> Option<u16>) -> (Self, Vec<BadPort>) {
        let (mut ranges, mut bad) = (Vec::new(), Vec::new());
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match parse_range(part).or_else(|| named(part).map(|port| (port, port))) {
                Some(range) => ranges.push(range),
                None => bad.push(BadPort(part.to_owned())),
            }
        }
        (Self::of(ranges), bad)
    }

    /// Linkerd's: what speaks first at the server, or must not be looked into.
    pub(crate) fn default_opaque() -> Self {
        Self::of(DEFAULT_OPAQUE_PORTS.iter().map(|&port| (port, port)).collect())
    }

    /// The ranges, each with its first and its last port.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u16, u16)> + '_ {
        self.0.iter().copied()
    }

    /// These ports, and one more.
    pub(crate) fn with(&self, port: u16) -> Self {
        let mut ranges = self.0.clone();
        ranges.push((port, port));
        Self::of(ranges)
    }

    pub(crate) fn contains(&self, port: u16) -> bool {
        let at = self.0.partition_point(|&(first, _)| first <= port);
        at > 0 && port <= self.0[at - 1].1
    }

    fn of(mut ranges: Vec<(u16, u16)>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(open) if first <= open.1.saturating_add(1) => open.1 = open.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }
}

impl fmt::Display for PortSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{first}")?;
            if first != last {
                write!(f, "-{last}")?;
            }
        }
        Ok(())
    }
}

fn parse_range(part: &str) -> Option<(u16, u16)> {
    let (first, last) = part.split_once('-').unwrap_or((part, part));
    let (first, last) = (port(first)?, port(last)?);
    (first <= last).then_some((first, last))
}

/// A port number from 1 on.
pub(crate) fn port(text: &str) -> Option<u16> {
    let text = text.trim();
    // `u16::from_str` takes a leading plus.
    let digits = text.bytes().all(|c| c.is_ascii_digit());
    text.parse().ok().filter(|&port| digits && port != 0)
}

const DEFAULT_OPAQUE_PORTS: [u16; 8] = [25, 587, 3306, 4444, 5432, 6379, 9300, 11211];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (PortSet, Vec<BadPort>) {
        PortSet::parse(text, |name| (name == "db").then_some(5432))
    }

    #[test]
    fn lists_hold_ports_ranges_and_names() {
        let (set, bad) = parse(" 25, 8000-8002,db,8003 ,,");
        assert!(bad.is_empty());
        for (port, inside) in [
            (24, false),
            (25, true),
            (26, false),
            (5432, true),
            (7999, false),
            (8000, true),
            (8003, true),
            (8004, false),
        ] {
            assert_eq!(set.contains(port), inside, "{port}");
        }
        assert_eq!(set.0, [(25, 25), (5432, 5432), (8000, 8003)]);
    }

    #[test]
    fn a_bad_part_is_named_and_the_others_hold() {
        for part in ["web", "0", "65536", "9-8", "-5", "+5", "1-2-3"] {
            let (set, bad) = parse(&format!("80,{part}"));
            assert_eq!(bad, [BadPort(part.to_owned())]);
            assert!(set.contains(80));
        }
    }

    #[test]
    fn nested_ranges_are_one() {
        assert_eq!(parse("1-65535,80,70-90").0.0, [(1, 65535)]);
    }
}
