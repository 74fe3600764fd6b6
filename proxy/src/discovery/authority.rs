//! The name and port that discovery is asked for.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// A DNS name and a port, in lower case, without a trailing dot: `web.demo.svc.cluster.local:80`.
/// Short forms (`web`, `web.demo`) are names too; the control plane completes them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Authority {
    /// `host:port`.
    text: Box<str>,
    /// Where the colon is.
    host_len: u8,
}

/// Why a text is no [`Authority`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// An IP address: discovery knows those by their profile ([`super::Discovery::profile`]).
    #[error("{0} is an address, not a name")]
    Address(SocketAddr),
    /// Not a DNS name.
    #[error(
        "{0:?} is no DNS name: letters, digits, \"-\" and \"_\" in labels of 1 to 63 bytes, 253 in all"
    )]
    Host(String),
    /// Not a port.
    #[error("{0:?} is no port: expected 1 to 65535")]
    Port(String),
}

impl Authority {
    /// Parses `host` or `host:port`, as in a Host header.
    ///
    /// # Errors
    /// What the text is instead. Any text may be given; none panics.
    pub fn parse(text: &str, default_port: u16) -> Result<Self, AuthorityError> {
        if let Some(addr) = parse_address(text, default_port) {
            return Err(AuthorityError::Address(addr));
        }
        match text.rsplit_once(':') {
            Some((host, port)) => {
                // `u16::from_str` takes a leading plus, which no authority has.
                let digits = port.bytes().all(|c| c.is_ascii_digit());
                match port.parse() {
                    Ok(number) if digits && number != 0 => Self::new(host, number),
                    _ => Err(AuthorityError::Port(shown(port))),
                }
            }
            None => Self::new(text, default_port),
        }
    }

    /// A name and a port.
    ///
    /// # Errors
    /// A host that is no DNS name (an address is none, with a dot at its end neither), or port 0.
    pub fn new(host: &str, port: u16) -> Result<Self, AuthorityError> {
        let name = host.strip_suffix('.').unwrap_or(host);
        if port == 0 {
            return Err(AuthorityError::Port("0".to_owned()));
        }
        let is_name = name.len() <= HOST_BYTES_MAX && name.split('.').all(is_label);
        if !is_name || name.parse::<IpAddr>().is_ok() {
            return Err(AuthorityError::Host(shown(host)));
        }
        let text = format!("{}:{port}", name.to_ascii_lowercase()).into();
        // At most 253, as was just checked.
        Ok(Self { text, host_len: name.len() as u8 })
    }

    /// `host:port`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The name.
    pub fn host(&self) -> &str {
        &self.text[..usize::from(self.host_len)]
    }

    /// The port.
    pub fn port(&self) -> u16 {
        // Written by `new` from a u16.
        self.text[usize::from(self.host_len) + 1..].parse().unwrap_or(0)
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.text)
    }
}

fn parse_address(text: &str, default_port: u16) -> Option<SocketAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let ip = bare.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, default_port));
    ip.or_else(|| text.parse().ok())
}

fn is_label(label: &str) -> bool {
    (1..=LABEL_BYTES_MAX).contains(&label.len())
        && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
}

/// A refused text may come from a client and be of any length: an error shows its beginning.
fn shown(text: &str) -> String {
    text.chars().take(CHARS_SHOWN).collect()
}

const HOST_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;
const CHARS_SHOWN: usize = 80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_are_canonical() {
        for (text, canonical) in [
            ("web", "web:80"),
            ("Web.Demo", "web.demo:80"),
            ("web.demo.:8080", "web.demo:8080"),
            ("web.demo.svc.cluster.local:443", "web.demo.svc.cluster.local:443"),
        ] {
            let authority = Authority::parse(text, 80).unwrap();
            assert_eq!(authority.as_str(), canonical, "{text:?}");
            assert_eq!(format!("{}:{}", authority.host(), authority.port()), canonical);
        }
    }

    #[test]
    fn what_is_no_authority_is_refused() {
        let long = "a".repeat(64);
        for text in [
            "",
            ":80",
            "web:",
            "web:0",
            "web:65536",
            "web:+80",
            "we b",
            "a..b",
            ".",
            "10.0.0.1.",
            "10.0.0.1.:80",
            &long,
        ] {
            assert!(Authority::parse(text, 80).is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_address_is_told_apart_from_a_name() {
        for (text, addr) in [
            ("10.0.0.1", "10.0.0.1:80"),
            ("10.0.0.1:8080", "10.0.0.1:8080"),
            ("[::1]", "[::1]:80"),
            ("[::1]:8080", "[::1]:8080"),
        ] {
            let addr = addr.parse().unwrap();
            assert_eq!(Authority::parse(text, 80), Err(AuthorityError::Address(addr)), "{text:?}");
        }
    }
}
