//! The flags of a process, checked as a whole: every value that cannot be used is told at once.
//!
//! The values come as texts, since a parser of the command line stops at the first that it cannot
//! read. Each check gives some value in any case, so that all are made; [`Flags::check`] then lets
//! the configuration out only if nothing was wrong.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::time::Duration;

use steadfast_api::Code;

use crate::duration;
use crate::log::Format;

/// What is wrong so far.
#[derive(Clone, Debug, Default)]
pub struct Flags(Vec<String>);

/// Everything that is wrong with the flags.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: the configuration is wrong\n  {}", Code::CONFIG_INVALID, .0.join("\n  "))]
pub struct ConfigErrors(Vec<String>);

impl Flags {
    /// Lets a configuration out, if nothing was wrong with it.
    ///
    /// # Errors
    /// Every flag that cannot be used.
    pub fn check<T>(self, config: T) -> Result<T, ConfigErrors> {
        if self.0.is_empty() { Ok(config) } else { Err(ConfigErrors(self.0)) }
    }

    /// This flag cannot be used.
    pub fn wrong(&mut self, flag: &str, value: &str, why: &str) {
        self.0.push(format!("{flag} {value:?}: {why}"));
    }

    /// An address with its port.
    pub fn address(&mut self, flag: &str, value: &str) -> SocketAddr {
        value.parse().unwrap_or_else(|_| {
            self.wrong(flag, value, "expected an IP address and a port, such as 127.0.0.1:8080");
            SocketAddr::from(([127, 0, 0, 1], 0))
        })
    }

    /// Where plaintext may be served: beyond loopback, tokens would cross a network in the clear.
    pub fn loopback(&mut self, flag: &str, value: &str) -> Option<SocketAddr> {
        let address = self.address(flag, value);
        if address.ip().to_canonical().is_loopback() {
            return Some(address);
        }
        self.wrong(flag, value, "plaintext is served on loopback only, such as 127.0.0.1:8081");
        None
    }

    /// A duration within bounds.
    pub fn duration(
        &mut self,
        flag: &str,
        value: &str,
        bounds: RangeInclusive<Duration>,
    ) -> Duration {
        match duration::parse(value) {
            Ok(time) if bounds.contains(&time) => return time,
            Ok(_) => {
                let [least, most] = [bounds.start(), bounds.end()].map(|at| duration::show(*at));
                self.wrong(flag, value, &format!("expected a time from {least} to {most}"));
            }
            Err(error) => self.wrong(flag, value, &error.to_string()),
        }
        *bounds.start()
    }

    /// A whole number above 0.
    pub fn count(&mut self, flag: &str, value: &str) -> NonZeroU32 {
        value.parse().unwrap_or_else(|_| {
            self.wrong(flag, value, "expected a whole number above 0");
            NonZeroU32::MIN
        })
    }

    /// The form of the log.
    pub fn log_format(&mut self, flag: &str, value: &str) -> Format {
        value.parse().unwrap_or_else(|why: String| {
            self.wrong(flag, value, &why);
            Format::Plain
        })
    }

    /// A text that is not empty.
    pub fn filled(&mut self, flag: &str, value: String) -> String {
        if value.is_empty() {
            self.wrong(flag, &value, "must not be empty");
        }
        value
    }

    /// The name of a namespace.
    pub fn namespace(&mut self, flag: &str, value: String) -> String {
        if !is_dns_label(&value) {
            self.wrong(flag, &value, "is no namespace: lower-case letters, digits and \"-\"");
        }
        value
    }

    /// A DNS name.
    pub fn domain(&mut self, flag: &str, value: String) -> String {
        if !value.split('.').all(is_dns_label) {
            self.wrong(flag, &value, "is no DNS name; the usual one is \"cluster.local\"");
        }
        value
    }

    /// `host:port`, where the host may be a name.
    pub fn host_and_port(&mut self, flag: &str, value: String) -> String {
        let port = value.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(1..))) {
            self.wrong(flag, &value, "expected host:port");
        }
        value
    }
}

fn is_dns_label(label: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&label.len())
        && label.chars().all(inner)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_flag_is_told_at_once_with_its_value() {
        let mut flags = Flags::default();
        flags.address("--listen", "here");
        flags.loopback("--plaintext-listen", "0.0.0.0:1");
        flags.duration("--ttl", "1s", Duration::from_secs(5)..=Duration::from_secs(60));
        flags.duration("--ttl", "5", Duration::from_secs(5)..=Duration::from_secs(60));
        flags.count("--files", "0");
        flags.log_format("--log-format", "xml");
        flags.filled("--audience", String::new());
        flags.namespace("--control-namespace", "a.b".to_owned());
        flags.domain("--cluster-domain", "-".to_owned());
        flags.host_and_port("--identity-addr", "identity".to_owned());
        let text = flags.check(()).unwrap_err().to_string();
        assert!(text.starts_with("SFT-CFG-001: "), "{text}");
        assert_eq!(text.lines().count(), 11, "{text}");
        for words in ["--listen \"here\"", "from 5s to 1m00s", "write 5s for seconds", "\"a.b\""] {
            assert!(text.contains(words), "{words} is not in\n{text}");
        }
    }

    #[test]
    fn what_is_right_comes_out_as_it_is() {
        let mut flags = Flags::default();
        let minute = Duration::from_secs(60);
        assert_eq!(flags.duration("--ttl", "1m", Duration::ZERO..=minute), minute);
        assert_eq!(flags.loopback("--listen", "[::1]:7"), "[::1]:7".parse().ok());
        assert_eq!(flags.host_and_port("--identity-addr", "a.b:1".to_owned()), "a.b:1");
        assert_eq!(flags.domain("--cluster-domain", "a.b".to_owned()), "a.b");
        assert_eq!(flags.check(7), Ok(7));
    }
}
