//! What an application asks for: a name that discovery knows, or an address.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use crate::discovery::{Authority, AuthorityError};

/// A destination as an application names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// An address; discovery may know what stands behind it.
    Address(SocketAddr),
    /// A name and a port.
    Name(Authority),
}

impl Target {
    /// Parses `host` or `host:port`.
    ///
    /// # Errors
    /// What the text is instead. Any text may be given; none panics.
    pub fn parse(text: &str, default_port: u16) -> Result<Self, AuthorityError> {
        match Authority::parse(text, default_port) {
            Ok(name) => Ok(Self::Name(name)),
            Err(AuthorityError::Address(addr)) if addr.port() == 0 => {
                Err(AuthorityError::Port("0".to_owned()))
            }
            Err(AuthorityError::Address(addr)) => Ok(Self::Address(addr)),
            Err(error) => Err(error),
        }
    }
}

/// With its port, as in a listen map.
impl FromStr for Target {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text, 0).map_err(|error| {
            format!("{text:?} is no destination ({error}): expected host:port, as db.prod:5432")
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(addr) => addr.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_told_apart() {
        assert!(matches!("db.prod:5432".parse(), Ok(Target::Name(_))));
        assert!(matches!("[::1]:5432".parse(), Ok(Target::Address(_))));
        for wrong in ["db.prod", "10.0.0.1", "10.0.0.1:0", ":1", ""] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
