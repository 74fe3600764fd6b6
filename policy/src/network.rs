//! IP networks in CIDR form.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// One network: the addresses that share its first bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Network {
    address: IpAddr,
    prefix_bits: u8,
}

/// Several networks; an address is in them if it is in one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(Vec<Network>);

/// A text that is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is no network: {reason}; write an address and the number of bits that count, \
         as 10.0.0.0/8 or fd00::/8"
)]
pub struct NetworkError {
    value: String,
    reason: &'static str,
}

impl Network {
    /// Whether the address is in it. An IPv4 address that arrives as `::ffff:a.b.c.d` is IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let differing = network.to_bits() ^ address.to_bits();
                differing.leading_zeros() >= u32::from(self.prefix_bits)
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let differing = network.to_bits() ^ address.to_bits();
                differing.leading_zeros() >= u32::from(self.prefix_bits)
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl Networks {
    /// Every address.
    pub fn any() -> Self {
        let all = |address| Network { address, prefix_bits: 0 };
        Self(vec![
            all(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)),
            all(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)),
        ])
    }

    /// Whether the address is in one of them.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address))
    }

    /// Whether there is none, so that no address is in them.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Network> for Networks {
    fn from_iter<I: IntoIterator<Item = Network>>(networks: I) -> Self {
        Self(networks.into_iter().collect())
    }
}

impl FromStr for Network {
    type Err = NetworkError;
    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let error =
            |reason| NetworkError { value: text.chars().take(VALUE_CHARS_SHOWN).collect(), reason };
        let (address, bits) = text.split_once('/').ok_or_else(|| error("it has no \"/\""))?;
        let address: IpAddr =
            address.parse().map_err(|_| error("what stands before the \"/\" is no address"))?;
        let bits_max = if address.is_ipv4() { 32 } else { 128 };
        let digits = (1..=3).contains(&bits.len()) && bits.bytes().all(|b| b.is_ascii_digit());
        match bits.parse() {
            Ok(prefix_bits) if digits && prefix_bits <= bits_max => {
                Ok(Self { address, prefix_bits })
            }
            _ => Err(error("what follows the \"/\" is no number of bits of such an address")),
        }
    }
}

/// Networks with commas between them; nothing at all is none.
impl FromStr for Networks {
    type Err = NetworkError;
    fn from_str(text: &str) -> Result<Self, NetworkError> {
        text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::parse).collect()
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

impl fmt::Display for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, network) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{network}")?;
        }
        Ok(())
    }
}

const VALUE_CHARS_SHOWN: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_network_holds_what_shares_its_first_bits() {
        for (network, address, inside) in [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.0", false),
            ("10.1.2.3/8", "10.9.9.9", true),
            ("192.0.2.7/32", "192.0.2.7", true),
            ("192.0.2.7/32", "192.0.2.6", false),
            ("192.0.2.6/31", "192.0.2.7", true),
            ("0.0.0.0/0", "203.0.113.1", true),
            ("0.0.0.0/0", "2001:db8::1", false),
            ("::/0", "2001:db8::1", true),
            ("fd00::/8", "fdff::1", true),
            ("fd00::/8", "fe80::1", false),
            ("10.0.0.0/8", "::ffff:10.0.0.1", true),
            ("::1/128", "::1", true),
        ] {
            let network: Network = network.parse().unwrap();
            assert_eq!(network.contains(address.parse().unwrap()), inside, "{network} {address}");
        }
    }

    #[test]
    fn a_wrong_network_is_named_with_the_right_form() {
        for wrong in [
            "10.0.0.0",
            "10.0.0.0/33",
            "10.0.0/8",
            "fd00::/129",
            "/8",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0.0/ 8",
            "10.0.0.0/8/8",
            "::1%eth0/64",
        ] {
            let error = wrong.parse::<Network>().unwrap_err().to_string();
            assert!(error.contains(wrong) && error.contains("10.0.0.0/8"), "{error}");
        }
        assert!("10.0.0.0/8,nonsense".parse::<Networks>().is_err());
    }

    #[test]
    fn no_networks_hold_nothing_and_any_hold_all() {
        let none: Networks = "".parse().unwrap();
        assert!(none.is_empty());
        for address in ["10.0.0.1", "::1", "::ffff:192.0.2.1"] {
            assert!(!none.contains(address.parse().unwrap()));
            assert!(Networks::any().contains(address.parse().unwrap()));
        }
    }

    proptest! {
        #[test]
        fn networks_read_back(address: IpAddr, bits in 0_u8..=128) {
            let bits = if address.is_ipv4() { bits % 33 } else { bits };
            let network = Network { address, prefix_bits: bits };
            prop_assert_eq!(network.to_string().parse(), Ok(network));
            prop_assert!(network.contains(address.to_canonical()) || address != address.to_canonical());
        }

        #[test]
        fn any_text_is_a_network_or_an_error(text in ".*") {
            let _ = text.parse::<Networks>();
        }
    }
}
